"""PEFT LoRA adapters on disk: factors out, factors in. Only this package knows PEFT's file and key names."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.adapter.folder import Adapter as Adapter
    from spectral_fast.adapter.hub import resolve as resolve
    from spectral_fast.adapter.naming import LoraModule as LoraModule
    from spectral_fast.adapter.naming import changes_base as changes_base
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.adapter.folder": ("Adapter",),
            "spectral_fast.adapter.hub": ("resolve",),
            "spectral_fast.adapter.naming": ("LoraModule", "changes_base"),
        },
    )
