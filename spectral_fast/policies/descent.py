"""The policy that steps against the signed gradient: gd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spectral_fast.options import option

from .base import Module, Outcome, Policy


@dataclass(frozen=True, kw_only=True)
class GradientDescent(Policy):
    """A step against x = g / norm(g): s' = s exp(-step) (multiplicative) or s - step (additive).

    step = eta x, or, asymmetric, eta_suppress relu(x)^pos_power - eta_enhance relu(-x).
    Core, for reports, is step < 0 (raised before the energy step), noise is step > 0 (lowered).
    """

    mode: ClassVar[str] = "gd"
    _overflow_hint: ClassVar[str] = (
        "eta (eta_suppress, eta_enhance if asymmetric) or sigma_clip_min, or set grad_norm to mean_abs"
    )

    eta: float = option(0.2, "step size of the symmetric update", low=0.0)
    update_mode: str = option("multiplicative", "form of the step", choices=("additive", "multiplicative"))
    asymmetric_update: bool = option(False, "different steps for g > 0 and g < 0")
    eta_suppress: float = option(2.0, "step size where g > 0, if asymmetric", low=0.0)
    eta_enhance: float = option(0.2, "step size where g < 0, if asymmetric", low=0.0)
    pos_power: float = option(1.0, "exponent of g where g > 0, if asymmetric", positive=True)

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g)
        if self.asymmetric_update:
            step = self.eta_suppress * x.relu() ** self.pos_power - self.eta_enhance * (-x).relu()
        else:
            step = self.eta * x
        s_new = module.s - step if self.update_mode == "additive" else module.s * (-step).exp()
        return Outcome(s_new, step < 0, step > 0, {})
