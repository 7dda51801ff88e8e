"""Tools for adapters, file to file, without a base model: factors in, factors out, a batch of modules at a time."""

from spectral_fast.prune import PruneOptions, prune_adapter
from spectral_fast.toolbox.clip import ClipOptions, clip_adapter
from spectral_fast.toolbox.difference import compare_adapters
from spectral_fast.toolbox.export import export_adapter
from spectral_fast.toolbox.extraction import ExtractOptions, extract_adapter
from spectral_fast.toolbox.inspection import InspectOptions, inspect_adapter
from spectral_fast.toolbox.merging import MergeOptions, merge_adapters
from spectral_fast.toolbox.resize import ResizeOptions, resize_adapter

__all__ = [
    "ClipOptions",
    "ExtractOptions",
    "InspectOptions",
    "MergeOptions",
    "PruneOptions",
    "ResizeOptions",
    "clip_adapter",
    "compare_adapters",
    "export_adapter",
    "extract_adapter",
    "inspect_adapter",
    "merge_adapters",
    "prune_adapter",
    "resize_adapter",
]
