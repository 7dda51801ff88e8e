"""Several adapters become one: exactly, truncated by singular values, or with interference between them resolved."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.toolbox.merging.merge import META as META
    from spectral_fast.toolbox.merging.merge import MergedModule as MergedModule
    from spectral_fast.toolbox.merging.merge import merge_adapters as merge_adapters
    from spectral_fast.toolbox.merging.options import METHODS as METHODS
    from spectral_fast.toolbox.merging.options import MergeOptions as MergeOptions
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.toolbox.merging.merge": ("META", "MergedModule", "merge_adapters"),
            "spectral_fast.toolbox.merging.options": ("METHODS", "MergeOptions"),
        },
    )
