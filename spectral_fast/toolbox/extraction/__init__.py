"""LoRA from two full checkpoints: the leading directions of every difference, streamed from the files."""

from spectral_fast.toolbox.extraction.extract import META, ExtractOptions, extract_adapter
from spectral_fast.toolbox.extraction.parts import Extracted
from spectral_fast.toolbox.extraction.result import Extraction

__all__ = ["META", "ExtractOptions", "Extracted", "Extraction", "extract_adapter"]
