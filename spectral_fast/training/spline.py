"""A learned spline after every LoRA layer (LS-LoRA): the settings of a training for it, and the trainer's part."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from spectral_fast.options import option
from spectral_fast.splines import PARAMETERS, PRESETS, SplineOptions, mean_facts

if TYPE_CHECKING:
    from torch import nn


@dataclass
class SplineArguments(SplineOptions):
    """Whether there is one, and its shape."""

    use_spline: bool = option(False, "a learned spline after every LoRA layer (LS-LoRA)")
    spline_preset: str | None = option(
        None, "a version of the method: V7 is the default one, V0 the first", choices=tuple(PRESETS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.use_spline:
            raise ValueError(f"{given[0]} is for use_spline, which is off; leave out one of the two")

    def shape(self) -> dict[str, Any]:
        """The fields of `SplineOptions`, as LSLoraConfig takes them."""
        return {f.name: getattr(self, f.name) for f in fields(SplineOptions)}


def described(model: nn.Module) -> dict[str, float]:
    """How many parameters the splines of a model have, and the means of `Spline.facts` over its layers."""
    from spectral_fast.lslora import spline_parameters, splines_of

    return {"parameters": sum(p.numel() for p in spline_parameters(model)), **mean_facts(splines_of(model).values())}


def splined(trainer_class: Any) -> Any:
    """A trainer of transformers or TRL for models with LS-LoRA.

    Adds `spline_penalty` to the loss of training (not to that of evaluation), and the means over layers of deviation,
    slope variance and scales to what is logged, as spline/deviation and so on. TRL makes the adapter of a quantised
    model bfloat16, whose steps near 3 are 0.016: the splines stay in float32. Weight decay is not for splines.
    """
    from spectral_fast.lslora import spline_parameters, spline_penalty, splines_of

    class SplinedTrainer(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for parameter in spline_parameters(self.model):
                parameter.data = parameter.data.float()

        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not model.training:
                return found
            # As the trainer's next line will have it, which leaves it to some losses to be a share of a batch.
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = by_items or self.compute_loss_func is not None
            penalty = spline_penalty(self.model)
            penalty = penalty / self.current_gradient_accumulation_steps if scaled else penalty
            return (found[0] + penalty, found[1]) if return_outputs else found + penalty

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            # Decay draws to 0, where a spline is not the identity but nothing at all; the penalty is what holds it.
            return [n for n in super().get_decay_parameter_names(model) if not any(part in n for part in PARAMETERS)]

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs:
                means = mean_facts(splines_of(self.model).values())
                logs |= {f"spline/{name}": value for name, value in means.items()}
            super().log(logs, *args)

    return SplinedTrainer
