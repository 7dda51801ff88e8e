"""The kernels, called directly: each beside its definition in torch, with the error and the time of both.

Times are of one call on this machine, the best of a few, with as many threads as torch has; sizes are small. The
honest comparisons, with machine and peers, are those of `make bench`.
"""

# %% What is compared
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_fast.backends import chosen_backends
from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.frequent_directions import frequent_directions
from spectral_fast.kernels.head_sketch import Hashes, head_sketch
from spectral_fast.kernels.lowrank_svd import lowrank_svd, singular_values
from spectral_fast.kernels.recompose import Product, recompose
from spectral_fast.kernels.sensitivity import segment_products
from spectral_fast.kernels.spectral_linear import spectral_linear
from spectral_fast.kernels.spline import spline


def best(function: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """The result, and the shortest time in ms."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - began)
    return result, 1e3 * min(times)


def told(name: str, error: float, ours: float, theirs: float, bound: float) -> None:
    """Print a line, and refuse an error above the bound."""
    print(f"{name:<20} error {error:.1e}   {ours:8.2f} ms   torch {theirs:8.2f} ms")
    assert error <= bound, name


torch.manual_seed(0)
m, n, r = 512, 768, 16
b, a = torch.randn(m, r), torch.randn(r, n)

# %% SVD of a product of factors
# B A = U diag(s) Vᵀ, with U and V as the factors times small transforms; the dense product is never formed.
[[f], ours] = best(lambda: lowrank_svd([b], [a]))
(u, s, vh), theirs = best(lambda: torch.linalg.svd(b @ a, full_matrices=False))
rebuilt = (f.basis_b.double() @ f.t_b * f.s) @ (f.basis_a.double().mT @ f.t_a).mT
told("lowrank_svd", float((rebuilt - b @ a).norm() / (b @ a).norm()), ours, theirs, 1e-5)
[[alone], ours] = best(lambda: singular_values([b], [a]))
told("singular_values", float((alone - s[:r]).abs().max() / s[0]), ours, theirs, 1e-5)

# %% Factors times small transforms
# The second half of an edit: B' = B (T_B diag(√s')) and A' = (diag(√s') T_Aᵀ) A, here with s' = s.
new_b, new_a = torch.empty(m, r), torch.empty(r, n)
root = f.s.sqrt()
products = [Product(f.basis_b, f.t_b, root, new_b, False, False), Product(f.basis_a, f.t_a, root, new_a, True, False)]
finite, ours = best(lambda: recompose(products))
wanted, theirs = best(lambda: (b @ (f.t_b * root).float(), (f.t_a * root).float().mT @ a))
assert finite == [True, True]
told("recompose", float((new_b - wanted[0]).abs().max()), ours, theirs, 1e-4)

# %% Many small SVDs
# The cores of many modules, by one-sided Jacobi.
cores = torch.randn(32, r, r, dtype=torch.float64)
(u1, s1, vh1), ours = best(lambda: batched_svd(cores))
(_, s2, _), theirs = best(lambda: torch.linalg.svd(cores))
told("batched_svd", float(((u1 * s1[:, None]) @ vh1 - cores).abs().max()), ours, theirs, 1e-12)

# %% A LoRA branch in spectral form
# y + scaling ((x V) ⊙ s) Uᵀ, whose backward pass has ∂L/∂s, the sensitivity, for an elementwise product and a sum.
x, y = torch.randn(256, n), torch.randn(256, m)
left, right = u[:, :r].contiguous(), vh[:r].contiguous()


def gradient(branch: Callable[[Tensor], Tensor]) -> Tensor:
    """∂L/∂s of a loss of the branch's output."""
    values = s[:r].clone().requires_grad_()
    [found] = torch.autograd.grad(branch(values).square().mean(), [values])
    return found


g, ours = best(lambda: gradient(lambda values: spectral_linear(x, y, left, values, right, 2.0)))
dense, theirs = best(lambda: gradient(lambda values: y + 2.0 * (x @ ((left * values) @ right).mT)))
told("spectral_linear", float((g - dense).norm() / dense.norm()), ours, theirs, 1e-4)

# %% Sums over the tokens of each sample
p, q, starts = torch.randn(256, r), torch.randn(256, r), torch.tensor([0, 100, 256])
sums, ours = best(lambda: segment_products(p, q, starts))
wanted_sums, theirs = best(lambda: torch.stack([(p * q)[:100].sum(0), (p * q)[100:].sum(0)]))
told("segment_products", float((sums - wanted_sums).abs().max()), ours, theirs, 1e-4)

# %% A learned spline
# Piecewise linear between knots, in one pass; torch needs indices, gathers and a few temporaries.
z, knots = torch.randn(256, m), torch.linspace(-3, 3, 7)
values, one = torch.tanh(knots), torch.ones(1)


def by_hand() -> Tensor:
    """The definition."""
    i = ((z.clamp(-3, 3) + 3).floor()).clamp(max=5).long()
    t = z.clamp(-3, 3) - knots[i]
    return torch.lerp(values[i], values[i + 1], t)


bent, ours = best(lambda: spline(z, values, one, one))
wanted_bent, theirs = best(by_hand)
told("spline", float((bent - wanted_bent).abs().max()), ours, theirs, 1e-5)

# %% A sketch of the head's gradient
# z with ⟨z, z'⟩ ≈ ⟨G, G'⟩ for the gradients G = Σ e_t h_tᵀ of the output embedding; here the square of one's length.
hidden, logits, labels = torch.randn(64, 128), torch.randn(64, 1000), torch.randint(0, 1000, (64,))
lengths = []
for seed in range(8):
    hashes = Hashes.draw(d_hidden=128, vocab_size=1000, m=1024, seed=2 * seed)
    sketch, ours = best(lambda hashes=hashes: head_sketch(hidden, logits, labels, hashes, top_k=1000), 1)  # type: ignore[misc]
    lengths.append(float(sketch.square().sum()))
full, theirs = best(lambda: (logits.softmax(-1) - torch.eye(1000)[labels]).mT @ hidden)
told("head_sketch", abs(sum(lengths) / 8 / float(full.square().sum()) - 1), ours, theirs, 0.2)

# %% A subspace that follows a stream
# One step of Frequent Directions: the best k directions of U diag(s²) Uᵀ + z zᵀ.
basis, squares = torch.zeros(8, 64, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
stream, removed = torch.randn(20, 64, dtype=torch.float64), 0.0
for row in stream:
    basis, squares, delta = frequent_directions(basis, squares, row)
    removed += delta
gap = torch.linalg.eigvalsh(stream.mT @ stream - (basis.mT * squares) @ basis)
print(f"frequent_directions  0 <= lost energy <= {removed:.1f} in every direction: {gap.min():.1e} to {gap.max():.1f}")
assert gap.min() > -1e-9
assert gap.max() <= removed + 1e-9

# %% Who worked
print(chosen_backends())
