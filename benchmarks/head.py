"""The subspace gate's look at a micro-batch, beside the original's method in plain torch and beside a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Calibration, Head
from benchmarks.models import config
from benchmarks.tasks import OURS, PASS, WHOLE
from benchmarks.workloads import Candidate, Workload
from spectral_fast.bench.gate import EPS32, WrongResult
from spectral_fast.kernels.head_sketch import reference
from spectral_fast.training import HeadGradientGate

Batch = tuple[Tensor, Tensor, Tensor]  # hidden states, logits, aligned labels
Found = tuple[Tensor, float]  # the sketch, of length 1, and its novelty


def batch(case: Head) -> Batch:
    """Random states, and logits as spread as those of a language model."""
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype)
    logits = torch.randn(case.tokens, case.vocabulary, generator=generator).mul_(3).to(dtype)
    return hidden, logits, torch.randint(0, case.vocabulary, (case.tokens,), generator=generator)


def ready(case: Head) -> HeadGradientGate:
    """A gate that remembers k directions."""
    gate = HeadGradientGate(
        case.hidden, case.vocabulary, case.m, case.k, k_topk=case.top_k, fd_mode="orthonormal", shift_labels=False
    )
    for z in torch.nn.functional.normalize(torch.randn(case.k, case.m, generator=torch.Generator().manual_seed(1))):
        gate.update(z)
    return gate


def ours(gate: HeadGradientGate, given: Batch) -> Found:
    """As a training loop asks."""
    z = gate.embed(*given)
    return z, gate.novelty(z)


def original(gate: HeadGradientGate, w: Tensor, *, whole: bool, given: Batch) -> Found:
    """Top-K, a softmax over what was found (or a logsumexp over the whole vocabulary), complex FFTs per token."""
    hidden, logits, labels = given
    hashes = gate.hashes
    values, ids = logits.topk(gate.k_topk)
    gold = labels[:, None]
    beside = (ids != gold).all(1, keepdim=True)
    values, ids = torch.cat([values, logits.gather(1, gold)], 1).float(), torch.cat([ids, gold], 1)
    kept = torch.cat([torch.ones_like(ids[:, 1:], dtype=torch.bool), beside], 1)  # the label once
    values = values.masked_fill(~kept, -torch.inf)
    p = (values - logits.float().logsumexp(1, keepdim=True)).exp() if whole else values.softmax(1)
    errors = p - ((ids == gold) & kept).float()
    buckets = hashes.bucket_h.long()  # by int32 it would take five times as long
    s_h = torch.zeros(len(hidden), hashes.m).index_add_(1, buckets, hidden.float() * hashes.sign_h)
    s_e = torch.zeros(len(hidden), hashes.m).scatter_add_(1, hashes.bucket_e[ids].long(), errors * hashes.sign_e[ids])
    z = torch.fft.ifft(torch.fft.fft(s_h) * torch.fft.fft(s_e)).real.sum(0)
    z = z / z.norm()
    return z, 1 - float((w.mT @ z).square().sum())


def expected(gate: HeadGradientGate, given: Batch, ids: Tensor, *, whole: bool) -> Found:
    """In float64, by the definition; ids (tokens, top_k) are the largest logits, of equal ones any."""
    hidden, logits, labels = given[0].double(), given[1].double(), given[2]
    hashes, rows = gate.hashes, torch.arange(len(labels))
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, ids, value=True)[rows, labels] = True
    errors = (logits if whole else logits.masked_fill(~chosen, -torch.inf)).softmax(1) * chosen
    errors[rows, labels] -= 1
    buckets = hashes.bucket_e.expand(len(labels), -1)
    z = reference.convolved(hidden, errors * hashes.sign_e, buckets, hashes.bucket_h, hashes.sign_h, hashes.m)
    z /= z.norm()
    return z, gate.novelty(z)


def check(name: str, size: float, wanted: Found, found: Found) -> None:
    """Sketch and novelty, to `size` roundoffs of float32, as many as are added up one after the other."""
    error = float((found[0].double() - wanted[0]).norm())
    if not max(error, abs(found[1] - wanted[1]) / 2) <= size * EPS32:
        raise WrongResult(f"{name}: z differs by {error:.2g}, novelty is {found[1]:.6f} and should be {wanted[1]:.6f}")


def model(case: Calibration) -> Any:
    """A random Llama, made in its own dtype."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, case.dtype))
        return LlamaForCausalLM(config(case)).eval()
    finally:
        torch.set_default_dtype(before)


def looks(case: Head, names: Sequence[str]) -> Workload:
    """Sketch and novelty of a micro-batch whose forward pass is done; and that forward pass, as a measure.

    Floor: states and logits are read once.
    """
    gate, given = ready(case), batch(case)
    w = gate.sketch.basis.mT.float().contiguous()
    small = Head(8, 32, 300, m=64, k=4, top_k=8, dtype=case.dtype)
    few = ready(small)
    lowest = given[1].argsort(dim=1, descending=True, stable=True)[:, : case.top_k]
    any_of_equals = given[1].topk(case.top_k).indices
    size = case.top_k + case.vocabulary / 64 + 2 * case.hidden / case.m + 100

    def candidate(name: str) -> Candidate:
        if name == PASS:
            assert case.decoder is not None
            llama, ids = model(case.decoder), given[2][None]
            run: Callable[[], Any] = partial(llama, input_ids=ids, use_cache=False)
            return Candidate(name, partial(llama, input_ids=ids[:, :8], use_cache=False), run, finite)
        if name == OURS:
            return Candidate(
                name,
                partial(ours, few, batch(small)),
                partial(ours, gate, given),
                partial(check, name, size, expected(gate, given, lowest, whole=True)),
            )
        by = partial(original, whole=name == WHOLE)
        return Candidate(
            name,
            partial(by, few, few.sketch.basis.mT.float(), given=batch(small)),
            partial(by, gate, w, given=given),
            partial(check, name, size, expected(gate, given, any_of_equals, whole=name == WHOLE)),
        )

    nbytes = given[0].nbytes + given[1].nbytes
    flops = 2 * case.tokens * (case.top_k + 1) * case.m
    copied = [(torch.empty_like(given[1]), given[1])]
    return Workload((candidate(name) for name in names), copied, nbytes, flops, (torch.float32,))


def finite(found: Any) -> None:
    """A forward pass that computed something."""
    if not bool(found.logits.isfinite().all()):
        raise WrongResult("the forward pass gives logits that are not finite")
