"""Tools for adapters, file to file, without a base model: factors in, factors out, a batch of modules at a time."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.toolbox.clip import clip_adapter as clip_adapter
    from spectral_fast.toolbox.difference import compare_adapters as compare_adapters
    from spectral_fast.toolbox.export import export_adapter as export_adapter
    from spectral_fast.toolbox.extraction.extract import extract_adapter as extract_adapter
    from spectral_fast.toolbox.extraction.options import ExtractOptions as ExtractOptions
    from spectral_fast.toolbox.inspection import inspect_adapter as inspect_adapter
    from spectral_fast.toolbox.merging.merge import merge_adapters as merge_adapters
    from spectral_fast.toolbox.merging.options import MergeOptions as MergeOptions
    from spectral_fast.toolbox.options import ClipOptions as ClipOptions
    from spectral_fast.toolbox.options import InspectOptions as InspectOptions
    from spectral_fast.toolbox.options import PruneOptions as PruneOptions
    from spectral_fast.toolbox.options import ResizeOptions as ResizeOptions
    from spectral_fast.toolbox.prune import prune_adapter as prune_adapter
    from spectral_fast.toolbox.resize import resize_adapter as resize_adapter
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.toolbox.clip": ("clip_adapter",),
            "spectral_fast.toolbox.difference": ("compare_adapters",),
            "spectral_fast.toolbox.export": ("export_adapter",),
            "spectral_fast.toolbox.extraction.extract": ("extract_adapter",),
            "spectral_fast.toolbox.extraction.options": ("ExtractOptions",),
            "spectral_fast.toolbox.inspection": ("inspect_adapter",),
            "spectral_fast.toolbox.merging.merge": ("merge_adapters",),
            "spectral_fast.toolbox.merging.options": ("MergeOptions",),
            "spectral_fast.toolbox.options": ("ClipOptions", "InspectOptions", "PruneOptions", "ResizeOptions"),
            "spectral_fast.toolbox.prune": ("prune_adapter",),
            "spectral_fast.toolbox.resize": ("resize_adapter",),
        },
    )
