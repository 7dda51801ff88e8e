"""The spectrum of a low-rank update, ΔW = B A = U diag(s) Vᵀ: the object that everything else works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectral_fast.kernels import lowrank_svd as kernel
from spectral_fast.kernels.recompose import Product, recompose

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Compact SVD B A = U diag(s) Vᵀ of one module's factors B (m, r) and A (r, n).

    U and V are formed on demand; editing s with ``rebuild`` does not need them.

    Attributes:
        factored: U and V as a tall basis times a small transform each.
        dtypes: those of B and of A.

    Example:
        >>> import torch
        >>> from spectral_fast import Spectrum
        >>> spectrum = Spectrum.of(torch.eye(3, 2), torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> [round(s, 6) for s in spectrum.s.tolist()]
        [2.0, 1.0]
        >>> b, a = spectrum.rebuild(torch.tensor([5.0, 0.0]))  # other singular values, the same directions
        >>> [round(s, 4) for s in torch.linalg.svdvals(b @ a).tolist()]
        [5.0, 0.0, 0.0]
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
        return self._vectors(self.factored.basis_b, self.factored.t_b, self.dtypes[0], flat=False)

    @property
    def vh(self) -> Tensor:
        """Right singular vectors (r, n) as rows, float32, or float64 if A is. Computed on every access."""
        return self._vectors(self.factored.basis_a, self.factored.t_a, self.dtypes[1], flat=True)

    def _new_factors(self) -> tuple[Tensor, Tensor]:
        f = self.factored
        b = f.basis_b.new_empty(f.basis_b.shape[0], f.t_b.shape[1], dtype=self.dtypes[0])
        return b, f.basis_a.new_empty(f.t_a.shape[1], f.basis_a.shape[1], dtype=self.dtypes[1])

    def _vectors(self, basis: Tensor, transform: Tensor, dtype: torch.dtype, *, flat: bool) -> Tensor:
        r = transform.shape[1]
        shape = (r, basis.shape[1]) if flat else (len(basis), r)
        out = basis.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        recompose([Product(basis, transform, transform.new_ones(r), out, flat, wide=True)])
        return out

    def only(self, kept: Tensor) -> Spectrum:
        """Some directions alone: what ``rebuild`` makes of it has as many as its rank.

        Args:
            kept: (k,) their indices, or (r,) bool.
        """
        f = self.factored
        return replace(self, factored=f._replace(t_b=f.t_b[:, kept], s=f.s[kept], t_a=f.t_a[:, kept]))

    def rebuild(self, s_new: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Factors of U diag(s_new) Vᵀ: B' = U diag(√s_new) and A' = diag(√s_new) Vᵀ; see `rebuild`."""
        [factors] = rebuild([self], [s_new], None if out is None else [out])
        return factors


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
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses, or ``SPECTRAL_FAST_ISA`` names an
            instruction set that this processor lacks.

    Source: ``spectral_fast.kernels.lowrank_svd``. Cost: one pass over the factors, (m + n) r² flops.

    Example:
        >>> import torch
        >>> from spectral_fast import lowrank_svd
        >>> bs, as_ = [torch.randn(64, 4), torch.randn(48, 8)], [torch.randn(4, 32), torch.randn(8, 64)]
        >>> one, two = lowrank_svd(bs, as_)
        >>> one.u.shape, one.s.shape, one.vh.shape
        (torch.Size([64, 4]), torch.Size([4]), torch.Size([4, 32]))
        >>> bool(torch.dist(two.u * two.s.float() @ two.vh, bs[1] @ as_[1]) < 1e-3)
        True
    """
    results = kernel.lowrank_svd(bs, as_, names)
    return [Spectrum(f, (b.dtype, a.dtype)) for f, b, a in zip(results, bs, as_, strict=True)]


def rebuild(
    spectra: Sequence[Spectrum],
    s_new: Sequence[Tensor],
    out: Sequence[tuple[Tensor, Tensor]] | None = None,
    names: Sequence[str] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Factors of U diag(s') Vᵀ of all modules at once: B' = U diag(√s') and A' = diag(√s') Vᵀ.

    Args:
        spectra: one per module.
        s_new: s' of each module, (r,), finite and not negative, in any order.
        out: (B', A') to write to, contiguous, in the dtypes of B and A. They may be the very factors that a spectrum
            was computed from; it is then of no further use.
        names: what errors call the modules; "module 0", "module 1", ... if left out.

    Returns:
        B' (m, r) and A' (r, n) of each module in the dtypes of its B and A: `out`, if given.

    Raises:
        ValueError: an s' has another shape, or a value that is negative, infinite or NaN; or a value of B' or A' is
            beyond the range of its dtype: `out` is then overwritten.

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, the reconstruction step. Cost: one pass over the
    factors, 2 (m + n) r² flops.
    """
    names = [f"module {i}" for i in range(len(spectra))] if names is None else names
    if out is None:
        out = [x._new_factors() for x in spectra]
    if not len(spectra) == len(s_new) == len(out) == len(names):
        counts = f"{len(spectra)}, {len(s_new)}, {len(out)} and {len(names)}"
        raise ValueError(f"one s_new, one out and one name per spectrum; got {counts}")
    for spectrum, s, (b, a), name in zip(spectra, s_new, out, names, strict=True):
        if s.shape != spectrum.s.shape:
            raise ValueError(f"{name}: s_new must have shape {tuple(spectrum.s.shape)}, got {tuple(s.shape)}")
        if (b.dtype, a.dtype) != spectrum.dtypes:
            raise ValueError(f"{name}: out must have dtypes {spectrum.dtypes}, got {(b.dtype, a.dtype)}")
    roots = _roots([s.to(spectrum.s) for spectrum, s in zip(spectra, s_new, strict=True)])
    if roots is None:
        roots = [s.sqrt() for s in s_new]
        i = next(i for i, root in enumerate(roots) if not root.isfinite().all())
        raise ValueError(f"{names[i]}: s_new must be finite and not negative, got {s_new[i].tolist()}")
    products = []
    for spectrum, root, (b, a) in zip(spectra, roots, out, strict=True):
        f = spectrum.factored
        products.append(Product(f.basis_b, f.t_b, root, b, False, _needs_float64(f.amplification, b.dtype)))
        products.append(Product(f.basis_a, f.t_a, root, a, True, _needs_float64(f.amplification, a.dtype)))
    finite = recompose(products)
    if not all(finite):
        worst = finite.index(False)
        dtype = products[worst].out.dtype
        raise ValueError(
            f"{names[worst // 2]}: the rebuilt {'BA'[worst % 2]} has values beyond the range of {dtype} (up to "
            f"{torch.finfo(dtype).max:.3g}); make the singular values smaller, or store the adapter in a wider dtype"
        )
    return list(out)


def _roots(values: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The square root of each, all at once where they are on one device; None if one is not finite."""
    if len({x.device for x in values}) > 1:
        roots: Sequence[Tensor] = [x.sqrt() for x in values]
        return roots if all(bool(x.isfinite().all()) for x in roots) else None
    joined = torch.cat(list(values)).sqrt() if values else torch.empty(0)
    return torch.split(joined, [len(x) for x in values]) if joined.isfinite().all() else None


def _needs_float64(amplification: float, dtype: torch.dtype) -> bool:
    """Whether sums in float32 would show: their rounding shall be a sixteenth of the result's own."""
    return amplification * EPS[torch.float32] > EPS[dtype] / 16
