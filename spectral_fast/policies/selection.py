"""Policies that amplify and suppress a fixed number of directions: abs_select and random_index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spectral_fast.options import option

from .base import Fractions, Module, Outcome, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Selection(Fractions):
    """k_core directions get amp_factor, k_noise others get sup_factor, the rest mid_factor.

    k_core = min(r, max(round(r core_frac), min_core_k)), k_noise = min(round(r noise_frac), r - k_core);
    halves round to even.
    """

    min_core_k: int = option(1, "at least this many directions are core", low=0)

    def counts(self, r: int) -> tuple[int, int]:
        """k_core and k_noise of a module of rank r."""
        k_core = min(r, max(round(r * self.core_frac), self.min_core_k))
        return k_core, min(round(r * self.noise_frac), r - k_core)

    def _select(self, s: Tensor, core: Tensor, noise: Tensor) -> Outcome:
        gate = s.new_full(s.shape, self.mid_factor)
        gate[core], gate[noise] = self.amp_factor, self.sup_factor
        counts = {"k_core": int(core.sum()), "k_noise": int(noise.sum())}
        factors = {name: getattr(self, name) for name in ("amp_factor", "sup_factor", "mid_factor")}
        return Outcome(s * gate, core, noise, counts | factors)


@dataclass(frozen=True, kw_only=True)
class AbsSelect(Selection):
    """Core is where |g| is largest, noise where it is smallest.

    Ties go by index, lower first. The order is that of |g| itself: normalising could only round neighbours
    into ties.
    """

    mode: ClassVar[str] = "abs_select"

    def choose(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The masks of core and noise, both (..., r) bool, for sensitivities g of shape (..., r), any real dtype."""
        r = g.shape[-1]
        k_core, k_noise = self.counts(r)
        order = g.abs().argsort(dim=-1, descending=True, stable=True)
        return _mask(order[..., :k_core], r), _mask(order[..., r - k_noise :], r)

    def _rule(self, module: Module) -> Outcome:
        return self._select(module.s, *self.choose(module.g))


@dataclass(frozen=True, kw_only=True)
class RandomIndex(Selection):
    """The control: as many core and noise directions as `abs_select`, drawn at random, whatever g is.

    The draw depends on (seed, module name) alone, so the result does not depend on the order of the modules.
    """

    mode: ClassVar[str] = "random_index"
    needs_sensitivity: ClassVar[bool] = False

    seed: int = option(0, "seed of the draw")

    def _rule(self, module: Module) -> Outcome:
        import torch

        digest = hashlib.sha256(f"{self.seed}:{module.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        r = module.s.numel()
        k_core, k_noise = self.counts(r)
        order = torch.randperm(r, generator=generator)
        return self._select(module.s, _mask(order[:k_core], r), _mask(order[k_core : k_core + k_noise], r))


def _mask(indices: Tensor, r: int) -> Tensor:
    """(..., k) indices below r to a mask (..., r)."""
    import torch

    return torch.zeros(*indices.shape[:-1], r, dtype=torch.bool, device=indices.device).scatter_(-1, indices, True)


def matched_control(policy: Policy, seed: int) -> RandomIndex:
    """The matched control: `random_index` with every hyperparameter that the two modes share.

    For `abs_select` it has the same counts and factors, so that only the choice of directions differs.
    A mode without counts (z_score, robust_z, gd) or without factors (gd) leaves `random_index` its
    defaults for them.
    """
    return RandomIndex(**policy.shared(RandomIndex) | {"seed": seed})


def hard_choice(policy: Policy) -> AbsSelect:
    """The hard choice of core and noise by |g| with the fractions of a policy, or the defaults if it has none.

    For `abs_select` it is what the policy itself selects.
    """
    return AbsSelect(**policy.shared(AbsSelect))
