"""The public functions, the two ops under them, and their backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu, native
from spectral_fast.kernels.head_sketch import reference
from spectral_fast.kernels.head_sketch.hashes import Hashes

IGNORED = -100  # label of a token that takes no part
ELSEWHERE = -1  # label of a token whose gold id is in another chunk of the vocabulary


class Top(NamedTuple):
    """What a row of logits is reduced to; zeros where the label is ``IGNORED``.

    Attributes:
        logsumexp: over the whole row, (tokens,) float32.
        gold: logit of the label, (tokens,) float32.
        values: the largest logits, in the order of their ids, (tokens, k) float32.
        ids: where they are, ascending, (tokens, k) int64; of equal logits the lowest ones.
    """

    logsumexp: Tensor
    gold: Tensor
    values: Tensor
    ids: Tensor


def head_sketch(hidden: Tensor, logits: Tensor, labels: Tensor, hashes: Hashes, top_k: int) -> Tensor:
    """TensorSketch of Σ_t e_t h_tᵀ, the gradient of the output embedding for a summed cross-entropy.

    e_t = softmax(logits_t) − onehot(label_t), kept at the `top_k` largest logits and at the label. Has no gradient.
    Labels that are not aligned yet are shifted, not the logits, which would be copied: `labels[:, 1:]` padded at its
    end by ``IGNORED``.

    Args:
        hidden: states that enter the output embedding, (tokens, hidden features): bfloat16, float16 or float32 (or
            float64, by the reference).
        logits: (tokens, vocabulary), likewise.
        labels: id that each row of logits should have predicted, (tokens,) int64; ``IGNORED`` to leave a token out,
            whose row is not read.
        hashes: drawn for these sizes, on the device of the tensors.
        top_k: how many of the largest logits; all of them where there are fewer.

    Returns:
        z, (m,) float32 (or float64), not normalised.

    Raises:
        ValueError: shapes, devices or labels do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses.

    Cost: logits and hidden are read once; (top_k + 1) · m multiplications per token.
    """
    _check(hidden, labels, hashes, logits.shape, "logits (tokens, vocabulary)")
    return _sketch(hidden, labels, top_logits(logits, labels, top_k), hashes)


def head_sketch_from_weight(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    hashes: Hashes,
    top_k: int,
    bias: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """The same, with logits = hidden weightᵀ + bias formed for `chunk` ids at a time and never stored whole.

    Args:
        hidden: (tokens, hidden features), as for `head_sketch`.
        weight: of the output embedding, (vocabulary, hidden features), the dtype of `hidden`.
        labels: as for `head_sketch`.
        hashes: as for `head_sketch`.
        top_k: as for `head_sketch`.
        bias: (vocabulary,), or None.
        chunk: vocabulary ids at a time, at least 1.

    Returns:
        z, (m,) float32 (or float64), not normalised.

    Raises:
        ValueError: as `head_sketch`; or `chunk` is below 1.
        TypeError: as `head_sketch`.
    """
    _check(hidden, labels, hashes, (len(hidden), len(weight)), "weight (vocabulary, hidden features)")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not bool((kept := labels != IGNORED).all()):
        hidden, labels = hidden[kept], labels[kept]
    hidden, top = hidden.detach(), None
    for first in range(0, len(weight), chunk):
        part = slice(first, first + chunk)
        with torch.no_grad():
            logits = torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part])
        inside = (labels >= first) & (labels < first + logits.shape[1])
        found = top_logits(logits, torch.where(inside, labels - first, ELSEWHERE), top_k)
        found = found._replace(ids=found.ids + first)
        top = found if top is None else _merged(top, found, top_k)
    assert top is not None
    return _sketch(hidden, labels, top, hashes)


def top_logits(logits: Tensor, labels: Tensor, top_k: int) -> Top:
    """Logsumexp, gold logit and the largest logits of every row, which is read once.

    Args:
        logits: (tokens, vocabulary): bfloat16, float16, float32 or float64.
        labels: (tokens,) int64; ``IGNORED`` for a row that is left out, −1 for one without a gold logit (−inf).
        top_k: how many; all of them where there are fewer.

    Raises:
        ValueError: shapes or labels do not fit, or top_k is below 1.
        TypeError: dtypes do not fit.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return Top(*_top_op(logits.detach(), labels, min(top_k, logits.shape[-1])))


def _check(hidden: Tensor, labels: Tensor, hashes: Hashes, logits: tuple[int, ...], what: str) -> None:
    sizes = (len(hashes.bucket_h), len(hashes.bucket_e))
    if hidden.ndim != 2 or hidden.shape[1] != sizes[0] or tuple(logits) != (len(hidden), sizes[1]):
        raise ValueError(
            f"hashes are of {sizes[0]} hidden features and {sizes[1]} ids, so hidden (tokens, {sizes[0]}) and {what} "
            f"of that vocabulary are wanted; got hidden {tuple(hidden.shape)}, and logits would be {tuple(logits)}"
        )
    if hidden.dtype not in native.CODES:
        raise TypeError(f"hidden must be one of {', '.join(map(str, native.CODES))}; got {hidden.dtype}")
    _check_labels(labels, len(hidden), sizes[1])
    if labels.numel() and bool((labels == ELSEWHERE).any()):
        raise ValueError(f"labels must be ids, or {IGNORED} for tokens that are left out; one is {ELSEWHERE}")
    devices = {str(x.device) for x in (hidden, labels, hashes.bucket_h)}
    if len(devices) > 1:
        raise ValueError(f"hidden, labels and hashes must be on one device, got {', '.join(sorted(devices))}")


def _check_labels(labels: Tensor, tokens: int, vocabulary: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (tokens,):
        raise ValueError(f"labels must be ({tokens},), one per token, got {tuple(labels.shape)}")
    wrong = (labels >= vocabulary) | ((labels < 0) & (labels != IGNORED) & (labels != ELSEWHERE))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be from 0 to {vocabulary - 1}, or {IGNORED} for tokens that are left out; one is "
            f"{int(labels[wrong][0])}"
        )


def _merged(a: Top, b: Top, top_k: int) -> Top:
    """Of two parts of the vocabulary, `a` of the lower ids."""
    values, ids = torch.cat([a.values, b.values], 1), torch.cat([a.ids, b.ids], 1)
    kept = values.argsort(dim=1, descending=True, stable=True)[:, :top_k].sort(1).values
    lse = torch.logaddexp(a.logsumexp, b.logsumexp)
    return Top(lse, torch.maximum(a.gold, b.gold), values.gather(1, kept), ids.gather(1, kept))


def _sketch(hidden: Tensor, labels: Tensor, top: Top, hashes: Hashes) -> Tensor:
    tables = (hashes.bucket_h, hashes.sign_h, hashes.bucket_e, hashes.sign_e)
    z: Tensor = _sketch_op(hidden.detach(), *top, labels, *tables, hashes.m)
    return z


def _top_logits(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.ndim != 2 or logits.dtype not in native.CODES:
        names = ", ".join(map(str, native.CODES))
        raise TypeError(f"logits must be a matrix of {names}; got {tuple(logits.shape)} {logits.dtype}")
    if logits.device != labels.device:
        raise ValueError(f"logits and labels must be on one device, got {logits.device}, {labels.device}")
    _check_labels(labels, *logits.shape)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = pick("top_logits", logits, labels).call(logits, labels, top_k)
    return result


def _tensor_sketch(hidden: Tensor, *rest: Any) -> Tensor:
    if not len(hidden):
        return hidden.new_zeros(rest[-1], dtype=_wide(hidden))
    z: Tensor = pick("tensor_sketch", hidden, rest[0], rest[2]).call(hidden, *rest)
    return z


def _cpu_top(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spectral_fast import _C

    logits, labels = native.readable(logits), labels.contiguous()
    rows, vocabulary = logits.shape
    lse, gold, values = torch.empty(rows), torch.empty(rows), torch.empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64)
    outputs = (lse.numpy(), gold.numpy(), values.numpy(), ids.numpy())
    threads = torch.get_num_threads()
    _C.top_logits(logits.data_ptr(), native.CODES[logits.dtype], vocabulary, labels.numpy(), *outputs, threads)
    return lse, gold, values, ids


def _cpu_sketch(hidden: Tensor, *rest: Any) -> Tensor:
    from spectral_fast import _C

    *tensors, m = rest
    hidden, z = native.readable(hidden), torch.empty(m)
    arguments: list[Any] = [*(x.contiguous().numpy() for x in tensors), z.numpy(), torch.get_num_threads()]
    _C.tensor_sketch(hidden.data_ptr(), native.CODES[hidden.dtype], *arguments)
    return z


def _refuses(elsewhere: Callable[[Iterable[Tensor]], str | None]) -> Callable[..., str | None]:
    def refuses(*tensors: Tensor) -> str | None:
        if any(x.dtype == torch.float64 for x in tensors):
            return "sums are in float32, and float64 came"
        return elsewhere(tensors)

    return refuses


def _gpu_top(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spectral_fast.kernels.head_sketch.gpu import top_logits

    return top_logits(*args)


def _gpu_sketch(*args: Any) -> Tensor:
    from spectral_fast.kernels.head_sketch.gpu import tensor_sketch

    return tensor_sketch(*args)


register(
    "top_logits",
    Backend("cpu", _refuses(native.refuses), _cpu_top),
    Backend("gpu", _refuses(gpu.refuses_together), _gpu_top),
    Backend("reference", lambda *_: None, reference.top_logits),
)
register(
    "tensor_sketch",
    Backend("cpu", _refuses(native.refuses), _cpu_sketch),
    Backend("gpu", _refuses(gpu.refuses_together), _gpu_sketch),
    Backend("reference", lambda *_: None, reference.tensor_sketch),
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _top_fake(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, ...]:
    rows, wide = len(logits), _wide(logits)
    of_rows = (logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide))
    return *of_rows, logits.new_empty(rows, top_k, dtype=wide), labels.new_empty(rows, top_k)


_top_op = define(
    "top_logits",
    "(Tensor logits, Tensor labels, int top_k) -> (Tensor logsumexp, Tensor gold, Tensor values, Tensor ids)",
    _top_logits,
    _top_fake,
)
_sketch_op = define(
    "tensor_sketch",
    "(Tensor hidden, Tensor logsumexp, Tensor gold, Tensor values, Tensor ids, Tensor labels, Tensor bucket_h, "
    "Tensor sign_h, Tensor bucket_e, Tensor sign_e, int m) -> Tensor",
    _tensor_sketch,
    lambda hidden, *rest: hidden.new_empty(rest[-1], dtype=_wide(hidden)),
)
