"""LoRA from two full checkpoints: the leading directions of every difference, streamed from the files."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.toolbox.extraction.extract import META as META
    from spectral_fast.toolbox.extraction.extract import extract_adapter as extract_adapter
    from spectral_fast.toolbox.extraction.options import ExtractOptions as ExtractOptions
    from spectral_fast.toolbox.extraction.parts import Extracted as Extracted
    from spectral_fast.toolbox.extraction.result import Extraction as Extraction
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.toolbox.extraction.extract": ("META", "extract_adapter"),
            "spectral_fast.toolbox.extraction.options": ("ExtractOptions",),
            "spectral_fast.toolbox.extraction.parts": ("Extracted",),
            "spectral_fast.toolbox.extraction.result": ("Extraction",),
        },
    )
