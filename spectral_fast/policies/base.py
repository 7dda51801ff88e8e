"""What all policies share: checks, normalisation of g, clip, energy, statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from spectral_fast.options import check, option

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-8  # floor of every denominator
LARGEST = 1e150  # squares and sums of anything up to this stay finite in float64


@dataclass(frozen=True, eq=False)
class Edit:
    """One module's edited spectrum.

    Attributes:
        s_new: the edited singular values, (r,) float64 on the CPU, in the order of the given s (perhaps
            unsorted).
        stats: what the policy did, JSON-serialisable, keys as in spectral_edit_meta.json. A module of rank
            0 has the common keys only.
        core: (r,) bool, the directions that the policy treats as core.
        noise: (r,) bool, the directions that it treats as noise.
    """

    s_new: Tensor
    stats: dict[str, Any]
    core: Tensor
    noise: Tensor


class Module(NamedTuple):
    """What a rule is given: the name, and s and g as float64 (r,) on the CPU (g zero if there is none)."""

    name: str
    s: Tensor
    g: Tensor


class Outcome(NamedTuple):
    """What a rule returns, before clip and energy: s', core and noise masks, the mode's own statistics."""

    s: Tensor
    core: Tensor
    noise: Tensor
    stats: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A rule from (s, g) to s', with its hyperparameters. Each mode is a subclass that gives `_rule`.

    Raises:
        TypeError: a hyperparameter of the wrong type.
        ValueError: a hyperparameter out of its range, or not among its choices.

    Example:
        >>> import torch
        >>> from spectral_fast.policies import AbsSelect, Policy
        >>> s, g = torch.tensor([4.0, 3.0, 2.0, 1.0]).double(), torch.tensor([0.0, 9.0, -5.0, 1.0]).double()
        >>> policy: Policy = AbsSelect(core_frac=0.25, noise_frac=0.25, min_core_k=1, preserve_energy="none")
        >>> policy.apply(s, g, "o_proj").s_new / s  # the largest |g| is amplified, the smallest suppressed
        tensor([0.8000, 1.2500, 1.0000, 1.0000], dtype=torch.float64)
    """

    mode: ClassVar[str]
    needs_sensitivity: ClassVar[bool] = True
    _overflow_hint: ClassVar[str]

    grad_norm: str = option(
        "mean_abs",
        "what g is divided by: nothing, the mean of |g|, or its 2-norm",
        choices=("none", "mean_abs", "l2"),
    )
    preserve_energy: str = option(
        "l1", "rescale s' so that the sum (l1) or the 2-norm (l2) of s is kept", choices=("none", "l1", "l2")
    )
    sigma_clip_min: float = option(0.0, "lower bound of s', applied before the energy step", low=0.0)

    def __post_init__(self) -> None:
        check(self, self.mode)

    def apply(self, s: Tensor, g: Tensor | None, name: str) -> Edit:
        """Edit one module's spectrum.

        Args:
            s: (r,) singular values, any real dtype and device, >= 0, in any order.
            g: (r,) sensitivities dL/ds; None only where `needs_sensitivity` is False.
            name: the module's name, for errors and for the draw of `random_index`.

        Returns:
            The edit. A module of rank 0 has nothing to edit and comes back empty.

        Raises:
            ValueError: s or g is missing, misshapen, not finite or beyond 1e150 in magnitude, s is
                negative, or the hyperparameters push s' beyond 1e150.
        """
        s = _vector(s, "s", name)
        if bool((s < 0).any()):
            raise ValueError(f"{name}: singular values must be >= 0; got {s.min().item():g}")
        if g is not None:
            g = _vector(g, "g", name)
            if g.shape != s.shape:
                raise ValueError(f"{name}: s has {s.numel()} values but g has {g.numel()}; they must match")
        elif self.needs_sensitivity:
            raise ValueError(f"{name}: mode {self.mode} needs the sensitivity g; got None. Calibrate first")

        if s.numel() == 0:
            nothing = s > 0
            outcome = Outcome(s, nothing, nothing, {})
        else:
            outcome = self._rule(Module(name, s, s.new_zeros(s.shape) if g is None else g))
        s_new = self._in_range(outcome.s.clamp_min(self.sigma_clip_min), s, name)
        if self.preserve_energy != "none":
            order = 1 if self.preserve_energy == "l1" else 2
            before, after = (x.norm(order).clamp_min(TINY) for x in (s, s_new))
            s_new = self._in_range(s_new * (before / after), s, name)

        stats = {
            "r": s.numel(),
            "mode": self.mode,
            "g_abs_mean": None if g is None else g.abs().sum().item() / max(g.numel(), 1),
            "g_abs_max": None if g is None else _max(g.abs()),
            "sigma0_sum": s.sum().item(),
            "sigma_new_sum": s_new.sum().item(),
            "sigma0_top1": _max(s),
            "sigma_new_top1": _max(s_new),
            "k_core": None,
            "k_noise": None,
        }
        return Edit(s_new, stats | outcome.stats, outcome.core, outcome.noise)

    def shared(self, other: type[Policy]) -> dict[str, Any]:
        """The hyperparameters that this policy has in common with another mode, as that mode's arguments."""
        return {f.name: getattr(self, f.name) for f in fields(other) if hasattr(self, f.name)}

    @abstractmethod
    def _rule(self, module: Module) -> Outcome: ...

    def _normalised(self, g: Tensor) -> Tensor:
        """G / max(mean|g|, 1e-8), g / max(||g||_2, 1e-8) or g."""
        if self.grad_norm == "none":
            return g
        norm = g.abs().mean() if self.grad_norm == "mean_abs" else g.norm()
        return g / norm.clamp_min(TINY)

    def _in_range(self, s_new: Tensor, s: Tensor, name: str) -> Tensor:
        if bool((s_new <= LARGEST).all()):  # False for nan too
            return s_new
        raise ValueError(
            f"{name}: mode {self.mode} pushes s' beyond {LARGEST:g}; the largest s is {_max(s):g}. "
            f"Lower {self._overflow_hint}"
        )


@dataclass(frozen=True, kw_only=True)
class Gains(Policy):
    """A policy of the form s' = gate * s, with gates between sup_factor, mid_factor and amp_factor."""

    _overflow_hint: ClassVar[str] = "amp_factor, mid_factor, sup_factor or sigma_clip_min"

    amp_factor: float = option(1.25, "gain of core directions, where |g| is large", low=0.0)
    sup_factor: float = option(0.80, "gain of noise directions, where |g| is small", low=0.0)
    mid_factor: float = option(1.0, "gain of the directions in between", low=0.0)


@dataclass(frozen=True, kw_only=True)
class Fractions(Gains):
    """Gains whose core and noise are fractions of the directions."""

    core_frac: float = option(0.2, "fraction of the directions that is core", low=0.0, high=1.0)
    noise_frac: float = option(0.2, "fraction of the directions that is noise", low=0.0, high=1.0)


def _max(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _vector(x: Tensor, what: str, name: str) -> Tensor:
    """The input as a checked float64 vector on the CPU: r numbers are not worth a device."""
    if x.ndim != 1 or x.is_complex():
        raise ValueError(f"{name}: {what} must be a real vector (r,); got shape {tuple(x.shape)}, {x.dtype}")
    x = x.detach().cpu().double()
    wrong = ~(x.abs() <= LARGEST)  # True for nan too
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: {what}[{k}] is {x[k].item():g}; want finite values of at most {LARGEST:g}")
    return x
