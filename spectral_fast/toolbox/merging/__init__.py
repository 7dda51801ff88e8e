"""Several adapters become one: exactly, truncated by singular values, or with interference between them resolved."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.toolbox.merging.merge import META, MergedModule, merge_adapters
    from spectral_fast.toolbox.merging.options import METHODS, MergeOptions
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "spectral_fast.toolbox.merging.merge": ("META", "MergedModule", "merge_adapters"),
            "spectral_fast.toolbox.merging.options": ("METHODS", "MergeOptions"),
        },
    )

__all__ = [
    "META",
    "METHODS",
    "MergeOptions",
    "MergedModule",
    "merge_adapters",
]
