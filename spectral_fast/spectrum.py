"""The spectrum of a low-rank update, ΔW = B A = U diag(s) Vᵀ: the object that everything else works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_fast.kernels import lowrank_svd as kernel


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Compact SVD B A = U diag(s) Vᵀ of one module's factors B (m, r) and A (r, n).

    U and V are formed on demand; editing s with ``rebuild`` does not need them.

    Attributes:
        factored: U and V as a tall basis times a small transform each.
        dtypes: those of B and of A.
    """

    factored: kernel.Factored
    dtypes: tuple[torch.dtype, torch.dtype]

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> Spectrum:
        """The spectrum of one pair of factors, see ``lowrank_svd``."""
        [spectrum] = lowrank_svd([b], [a])
        return spectrum

    @property
    def s(self) -> Tensor:
        """Singular values (r,) float64, descending, not negative."""
        return self.factored.s

    @property
    def u(self) -> Tensor:
        """Left singular vectors (m, r) as columns, float32, or float64 if B is. Computed on every access."""
        return _tall(self.factored.basis_b, self.factored.t_b, torch.promote_types(self.dtypes[0], torch.float32))

    @property
    def vh(self) -> Tensor:
        """Right singular vectors (r, n) as rows, float32, or float64 if A is. Computed on every access."""
        return _flat(self.factored.t_a.mT, self.factored.basis_a, torch.promote_types(self.dtypes[1], torch.float32))

    def rebuild(self, s_new: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of U diag(s_new) Vᵀ: B' = U diag(√s_new) and A' = diag(√s_new) Vᵀ.

        Args:
            s_new: (r,), finite and not negative, in any order.

        Returns:
            B' (m, r) and A' (r, n) in the dtypes of B and A.

        Raises:
            ValueError: s_new has another shape, or a value that is negative, infinite or NaN.

        Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, the reconstruction step.
        """
        if s_new.shape != self.s.shape:
            raise ValueError(f"s_new must have shape {tuple(self.s.shape)}, got {tuple(s_new.shape)}")
        if not bool(((s_new >= 0) & s_new.isfinite()).all()):
            raise ValueError(f"s_new must be finite and not negative, got {s_new.tolist()}")
        root = s_new.to(self.s).sqrt()
        b = _tall(self.factored.basis_b, self.factored.t_b * root, self.dtypes[0])
        a = _flat((self.factored.t_a * root).mT, self.factored.basis_a, self.dtypes[1])
        return b, a


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Spectrum]:
    """Spectra of all modules of an adapter at once.

    Args:
        bs: of each module B (m, r): bfloat16, float16, float32 or float64; shapes and ranks may differ.
        as_: of each module A (r, n), on the device of its B.
        names: what errors call the modules; "module 0", "module 1", ... if left out.

    Returns:
        one ``Spectrum`` per module, in order; r directions each, those beyond min(m, n) zero throughout.

    Raises:
        TypeError: a factor is no tensor, or of another dtype.
        ValueError: the lists differ in length, two factors do not fit, or one holds a NaN or an infinity.
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses.

    Source: ``spectral_fast.kernels.lowrank_svd``. Cost: one pass over the factors, 2 (m + n) r² flops.
    """
    results = kernel.lowrank_svd(bs, as_, names)
    return [Spectrum(f, (b.dtype, a.dtype)) for f, b, a in zip(results, bs, as_, strict=True)]


# Products in float64: an entry of a transform may exceed the result by its basis' condition. Piecewise, as
# whole float64 copies of the factors cost page faults, at (64, 28672) four times the product's own time.
PIECE = 2048


def _tall(basis: Tensor, transform: Tensor, dtype: torch.dtype) -> Tensor:
    """Basis (m, k) @ transform (k, r)."""
    out = basis.new_empty(basis.shape[0], transform.shape[1], dtype=dtype)
    for rows, result in zip(torch.split(basis, PIECE), torch.split(out, PIECE), strict=True):
        result.copy_(rows.double() @ transform)
    return out


def _flat(transform: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Transform (r, k) @ basis (k, n)."""
    out = basis.new_empty(transform.shape[0], basis.shape[1], dtype=dtype)
    for columns, result in zip(torch.split(basis, PIECE, 1), torch.split(out, PIECE, 1), strict=True):
        result.copy_(transform @ columns.double())
    return out
