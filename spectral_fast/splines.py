"""The learned activations of LS-LoRA: what a spline is, how far it is from the identity, and where it is on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_fast.options import check, option

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "LSLORA"  # in adapter_config.json
# Names of a layer's parameters in PEFT, and with the module's name before them the keys of a file.
VALUES, INPUT_SCALE, OUTPUT_SCALE = PARAMETERS = (
    "lora_spline_values",
    "lora_spline_input_scale",
    "lora_spline_output_scale",
)


@dataclass
class SplineOptions:
    """The shape of a spline, and how it is held near the identity.

    Defaults are the method's own. Not frozen, because PEFT's configurations, of which this is a part, are not.
    """

    num_knots: int = option(5, "knots, equally spaced, with a learnable value each", low=2, high=256)
    k_min: float = option(-3.0, "first knot")
    k_max: float = option(3.0, "last knot")
    interpolation_method: str = option(
        "piecewise", "between knots: lines, or weights by distance (soft)", choices=("piecewise", "soft")
    )
    clamp: bool = option(
        True, "clamp what enters to the knots; unclamped, lines go on beyond them and it starts as LoRA"
    )
    extrapolate: bool = option(False, "let lines go on where input_scale carries clamped values beyond the knots")
    spline_reg_weight: float = option(0.01, "weight of the penalty in the loss", low=0.0)
    spline_regularizer: str = option(
        "identity", "penalise the distance from the identity, or bends (curvature)", choices=("identity", "curvature")
    )
    spline_init: str = option("identity", "values at the start; sine is preset V0's", choices=("identity", "sine"))
    spline_tanh: bool = option(False, "tanh(input_scale z) in place of clamp, as in presets V0 to V2")
    spline_output_scale: float = option(1.0, "output_scale at the start")

    def __post_init__(self) -> None:
        check(self)
        if self.k_min >= self.k_max:
            raise ValueError(f"k_min must be below k_max; got {self.k_min:g} and {self.k_max:g}")
        if self.num_knots < 3 and self.spline_regularizer == "curvature":
            raise ValueError("two knots have no curvature; take num_knots of 3 or more, or spline_regularizer identity")
        if self.extrapolate and self.interpolation_method == "soft":
            raise ValueError("a soft spline tends to its end values beyond the knots; leave out extrapolate")
        if self.spline_tanh and not self.clamp:
            raise ValueError("spline_tanh bounds what enters, so clamp must stay; leave out one of the two")

    @property
    def step(self) -> float:
        """Distance of two knots."""
        return (self.k_max - self.k_min) / (self.num_knots - 1)

    @property
    def goes_on(self) -> bool:
        """Whether lines go on beyond the knots."""
        return self.interpolation_method == "piecewise" and (self.extrapolate or not self.clamp)

    def grid(self) -> Tensor:
        """The knots, (num_knots,) float32."""
        import torch

        return torch.linspace(self.k_min, self.k_max, self.num_knots, dtype=torch.float32)

    def initial(self) -> dict[str, Tensor]:
        """Name -> value of the three parameters at the start, float32."""
        grid = self.grid()
        values = grid + 0.2 * (math.pi * grid).sin() if self.spline_init == "sine" else grid
        one = grid.new_ones(1)
        return {VALUES: values, INPUT_SCALE: one, OUTPUT_SCALE: self.spline_output_scale * one}

    def apply(
        self, z: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, base: Tensor | None = None
    ) -> Tensor:
        """output_scale · φ(input_scale · clamp(z)), element by element, in the dtype of z; or base plus that.

        Args:
            z: any shape.
            values: of the knots, (num_knots,).
            input_scale: (1,).
            output_scale: (1,).
            base: what it is added to, in whose dtype the result is then.
        """
        from spectral_fast.kernels.spline import spline

        if self.spline_tanh:
            z, input_scale = (z * input_scale).tanh().to(z.dtype), input_scale.new_ones(input_scale.shape)
        result: Tensor = spline(
            z,
            values,
            input_scale,
            output_scale,
            self.k_min,
            self.k_max,
            clamp=self.clamp and not self.spline_tanh,
            extrapolate=self.goes_on,
            method=self.interpolation_method,
            base=base,
        )
        return result

    def penalty(self, values: Tensor) -> Tensor:
        """What is added to the loss: spline_reg_weight · R, the mean over layers, a scalar.

        R = mean (v_i - k_i)², or mean ((v_{i+1} - 2 v_i + v_{i-1})²) / Δk² (Eilers and Marx, "Flexible smoothing with
        B-splines and penalties", 1996).

        Args:
            values: of all layers, (layers, num_knots).
        """
        if self.spline_regularizer == "curvature":
            return self.spline_reg_weight * values.diff(n=2).square().mean() / self.step**2
        return self.spline_reg_weight * (values - self.grid().to(values)).square().mean()


# The way from the first version of the method to the present one, a change each; the last one, V7, is of the training
# (learning rate 2e-4 for 5e-5, and a 32-bit optimiser for an 8-bit one), not of the spline.
_LADDER: tuple[dict[str, Any], ...] = (
    {
        "k_min": -1.0,
        "k_max": 1.0,
        "interpolation_method": "soft",
        "spline_init": "sine",
        "spline_tanh": True,
        "spline_output_scale": 0.1,
        "spline_reg_weight": 1e-4,
    },
    {"spline_init": "identity"},
    {"k_min": -3.0, "k_max": 3.0},
    {"spline_tanh": False},
    {"spline_output_scale": 1.0},
    {"interpolation_method": "piecewise"},
    {"spline_reg_weight": 0.01},
    {},
)
PRESETS: dict[str, dict[str, Any]] = {
    f"V{i}": {key: value for step in _LADDER[: i + 1] for key, value in step.items()} for i in range(len(_LADDER))
}


@dataclass(frozen=True, eq=False)
class Spline:
    """A layer's learned activation.

    Attributes:
        values: of the knots, (num_knots,) float32, on the CPU.
        input_scale: factor of what enters.
        output_scale: factor of what leaves.
        options: knots and interpolation.
    """

    values: Tensor
    input_scale: float
    output_scale: float
    options: SplineOptions

    @classmethod
    def of(cls, parameters: Callable[[str], Tensor], options: SplineOptions) -> Spline:
        """From the three parameters, each asked for by its name; a copy."""
        import torch

        values, inner, outer = (parameters(name).detach().to("cpu", torch.float32, copy=True) for name in PARAMETERS)
        return cls(values, float(inner), float(outer), options)

    def __call__(self, z: Tensor) -> Tensor:
        """What becomes of LoRA's output z, any shape."""
        scales = (self.values.new_tensor([scale]) for scale in (self.input_scale, self.output_scale))
        return self.options.apply(z, self.values, *scales)

    @property
    def deviation(self) -> float:
        """Mean |v_i - k_i|; 0.01 to 0.1 is what the method aims at, above 1 is bad."""
        return float((self.values - self.options.grid()).abs().mean())

    @property
    def slope_variance(self) -> float:
        """Population variance of the slopes (v_{i+1} - v_i) / Δk; above 0.05 is aimed at, above 1 is bad."""
        return float((self.values.diff() / self.options.step).var(correction=0))

    def facts(self) -> dict[str, float]:
        """{deviation, slope_variance, input_scale, output_scale}."""
        return {
            "deviation": self.deviation,
            "slope_variance": self.slope_variance,
            "input_scale": self.input_scale,
            "output_scale": self.output_scale,
        }


def mean_facts(splines: Iterable[Spline]) -> dict[str, float]:
    """The means of `Spline.facts` over layers, of which there is one at least."""
    rows = [found.facts() for found in splines]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def options_of(config: Mapping[str, Any]) -> SplineOptions:
    """Those in an adapter_config.json; defaults for what it lacks.

    Raises:
        TypeError, ValueError: as `SplineOptions`.
    """
    return SplineOptions(**{f.name: config[f.name] for f in fields(SplineOptions) if f.name in config})


def read_splines(folder: Path | str) -> dict[str, Spline]:
    """Module -> its spline, of an LS-LoRA adapter as PEFT saves it; the base model is not needed.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: a file is broken, or it is another adapter.
    """
    from spectral_fast.tensorfile import SafetensorsFile

    path = Path(folder)
    file = SafetensorsFile(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != PEFT_TYPE:
        raise ValueError(f"{path} has no splines: adapter_config.json should say peft_type {PEFT_TYPE}, got {kind!r}")
    options = options_of(config)
    names = [key.removesuffix(".lora_A.weight") for key in file.tensors if key.endswith(".lora_A.weight")]
    if not names:
        raise ValueError(f"{file.path} has no splines, and no layers of an adapter either")
    shapes = {VALUES: (options.num_knots,), INPUT_SCALE: (1,), OUTPUT_SCALE: (1,)}
    for name, (part, shape) in product(names, shapes.items()):
        held = file.tensors.get(f"{name}.{part}")
        if held is None or held.shape != shape:
            got = "nothing" if held is None else held.shape
            raise ValueError(f"{file.path} should have {name}.{part} of shape {shape}, got {got}")
    return {name: Spline.of(lambda part, name=name: file.read(f"{name}.{part}"), options) for name in names}  # type: ignore[misc]
