"""PEFT's LoRA layers with a spline after each adapter, as a variant of LoRA in PEFT's own sense."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from spectral_fast.lslora.config import LSLoraConfig
from spectral_fast.splines import PARAMETERS, Spline, SplineOptions

NO_MERGE = (
    "LS-LoRA cannot be merged: its update is a learned function of B A x, and no matrix that could be added to the "
    "base weight. Keep the adapter beside the base model"
)


class SplineVariant(lora.LoraVariant):  # type: ignore[misc]
    """What an adapter of a `SplineLayer` adds to the base layer's output."""

    def supports_lora_conversion(self) -> bool:
        """No matrix does what it does."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, config: Any, **_: Any) -> None:
        """Add the parameters: in float32 whatever the weights are, since bfloat16 would round their steps away."""
        device = module.lora_A[adapter_name].weight.device
        for name, value in config.options.initial().items():
            if not hasattr(module, name):
                setattr(module, name, nn.ParameterDict())
            getattr(module, name)[adapter_name] = nn.Parameter(value.to(device))
        module.spline_options[adapter_name] = config.options

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The base layer's result + s_out · φ(s_in · clamp(scaling · B A dropout(x)))."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        # There is no bias after B, so that the few channels in front of it may be scaled instead.
        z = module.lora_B[active_adapter](low * module.scaling[active_adapter])
        parameters = (getattr(module, name)[active_adapter] for name in PARAMETERS)
        added: Tensor = module.spline_options[active_adapter].apply(z, *parameters, base=result)
        return added


class SplineLayer(lora.LoraLayer):  # type: ignore[misc]
    """Beside the factors of LoRA: a spline's values and two scales per adapter."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, *PARAMETERS)
    other_param_names = (*lora.LoraLayer.other_param_names, "spline_options")

    def resolve_lora_variant(self, **_: Any) -> SplineVariant:
        """The only one."""
        return SplineVariant()

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: it is one of plain LoRA.
        """
        if not isinstance(config, LSLoraConfig):
            raise ValueError(
                f"the model has LS-LoRA where the plain LoRA {adapter_name!r} shall be, which is without a spline: "
                "take it off first"
            )
        if not hasattr(self, "spline_options"):
            self.spline_options: dict[str, SplineOptions] = {}
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def spline(self, adapter_name: str) -> Spline:
        """A copy of an adapter's spline, on the CPU."""
        return Spline.of(lambda name: getattr(self, name)[adapter_name], self.spline_options[adapter_name])

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Impossible.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_MERGE)

    def get_delta_weight(self, *_: Any) -> NoReturn:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_MERGE)


class Linear(SplineLayer, lora.Linear):  # type: ignore[misc]
    """On torch's linear layer."""


def spline_layer(base: nn.Module) -> type[SplineLayer] | None:
    """The class for a base layer; None where there is none. bitsandbytes is imported only where it is installed."""
    if is_bnb_available():
        from peft.tuners.lora import bnb

        if is_bnb_4bit_available() and isinstance(base, bnb.bnb.nn.Linear4bit):
            return _with_splines(bnb.Linear4bit)
        if isinstance(base, bnb.bnb.nn.Linear8bitLt):
            return _with_splines(bnb.Linear8bitLt)
    return Linear if isinstance(base, nn.Linear) else None


@cache
def _with_splines(layer: type) -> type[SplineLayer]:
    return type(layer.__name__, (SplineLayer, layer), {})
