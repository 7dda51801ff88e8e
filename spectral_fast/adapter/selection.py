"""The settings that say which modules of an adapter to work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_fast.adapter.patterns import ALL_LAYERS
from spectral_fast.options import check, option

if TYPE_CHECKING:
    from spectral_fast.adapter import Adapter, LoraModule


@dataclass(frozen=True)
class SelectionOptions:
    """Which of an adapter's modules to work on."""

    target_modules: tuple[str, ...] = option(("down_proj", "o_proj"), "last name components, or all-linear")
    layer_min: int = option(0, "first layer, inclusive", low=0)
    layer_max: int = option(ALL_LAYERS, "last layer, inclusive", low=0, shown="the last")
    adapter_name: str | None = option(None, "which adapter, if the weight file's keys name several")
    include_conv: bool = option(False, "take LoRA on convolutions, too; it cannot be probed")
    include_embedding: bool = option(False, "take LoRA on embeddings, too; it cannot be probed")

    def __post_init__(self) -> None:
        check(self)

    def open(self, path: Path) -> tuple[Adapter, list[LoraModule]]:
        """The adapter and the modules that these options select."""
        from spectral_fast.adapter import Adapter

        adapter = Adapter.open(
            path,
            adapter_name=self.adapter_name,
            include_conv=self.include_conv,
            include_embedding=self.include_embedding,
        )
        return adapter, adapter.select(self.target_modules, self.layer_min, self.layer_max)
