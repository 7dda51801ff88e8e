"""Several adapters become one: exactly, truncated by singular values, or with interference between them resolved."""

from spectral_fast.toolbox.merging.merge import META, MergedModule, merge_adapters
from spectral_fast.toolbox.merging.options import METHODS, MergeOptions

__all__ = ["META", "METHODS", "MergeOptions", "MergedModule", "merge_adapters"]
