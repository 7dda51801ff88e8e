"""LoRA from two full checkpoints: the leading directions of every difference, streamed from the files."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.toolbox.extraction.extract import META, extract_adapter
    from spectral_fast.toolbox.extraction.options import ExtractOptions
    from spectral_fast.toolbox.extraction.parts import Extracted
    from spectral_fast.toolbox.extraction.result import Extraction
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "spectral_fast.toolbox.extraction.extract": ("META", "extract_adapter"),
            "spectral_fast.toolbox.extraction.options": ("ExtractOptions",),
            "spectral_fast.toolbox.extraction.parts": ("Extracted",),
            "spectral_fast.toolbox.extraction.result": ("Extraction",),
        },
    )

__all__ = [
    "META",
    "ExtractOptions",
    "Extracted",
    "Extraction",
    "extract_adapter",
]
