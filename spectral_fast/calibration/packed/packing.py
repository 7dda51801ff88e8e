"""Samples that go through the model together, laid out so that nothing is computed for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectral_fast.calibration.data import IGNORED, Example

LAYOUTS = ("packed", "padded", "single")


@dataclass(frozen=True)
class Pack:
    """Samples that go through the model together: as one row without padding, or as padded rows.

    The loss of a pack is Σ weights · cross entropy; that of all packs together does not depend on how the samples
    are spread over them.

    Attributes:
        samples: index of each sample in the calibration set.
        input_ids: (rows, length) int64; one row unless padded.
        position_ids: (rows, length) int64, from 0 in every sample.
        attention_mask: (rows, length) int64, 1 where there is text; None without padding.
        starts: first token of each sample among rows · length tokens, and their number: (samples + 1,) int64, CPU.
        positions: of the token that predicts each label, among rows · length tokens: (labels,) int64.
        label_starts: first label of each sample, and their number: (samples + 1,) int64, CPU.
        targets: ids of the labels: (labels,) int64.
        weights: of each label, 1 / labels in the nominal batch of its sample: (labels,) float64.
    """

    samples: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    starts: Tensor
    positions: Tensor
    label_starts: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack with its token tensors on another device; the bounds of samples stay on the CPU."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        moved = {name: getattr(self, name).to(device) for name in _ON_DEVICE}
        return replace(self, attention_mask=mask, **moved)


_ON_DEVICE = ("input_ids", "position_ids", "positions", "targets", "weights")


def packs(
    examples: Sequence[Example],
    batch_size: int,
    *,
    samples: Sequence[int] | None = None,
    tokens: int = 1024,
    layout: str = "packed",
) -> list[Pack]:
    """Lay out samples, which keep the weights that they have in the nominal batches of all examples.

    Args:
        examples: the whole calibration set, in order.
        batch_size: examples per nominal batch, whose mean token loss is differentiated.
        samples: indices of the examples to lay out; by default all.
        tokens: of a pack, padding included; a longer sample is a pack of its own.
        layout: "packed" in one row, in order; "padded" on the right, samples of like length together; "single", a
            pack per sample.

    Raises:
        ValueError: if a nominal batch has no label to predict, or batch_size is below 1.
    """
    weights = label_weights(examples, batch_size)
    chosen = range(len(examples)) if samples is None else samples
    if layout == "padded":
        chosen = sorted(chosen, key=lambda i: len(examples[i].ids))
    groups = _groups([(i, len(examples[i].ids)) for i in chosen], tokens, layout)
    return [_pack(group, [examples[i] for i in group], [weights[i] for i in group], layout) for group in groups]


def label_weights(examples: Sequence[Example], batch_size: int) -> list[float]:
    """Of the labels of each example: 1 / labels in its nominal batch. Raises as `packs`."""
    if batch_size < 1:
        raise ValueError(f"calib_batch_size must be at least 1, got {batch_size}")
    weights = []
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        labels = sum(example.n_labels for example in batch)
        if labels == 0:
            last = first + len(batch) - 1
            raise ValueError(f"calibration samples {first} to {last} have no label to predict")
        weights += [1 / labels] * len(batch)
    return weights


def _groups(lengths: Sequence[tuple[int, int]], tokens: int, layout: str) -> Iterator[list[int]]:
    group: list[int] = []
    total = longest = 0
    for index, length in lengths:
        total, longest = total + length, max(longest, length)
        taken = longest * (len(group) + 1) if layout == "padded" else total
        if group and (layout == "single" or taken > tokens):
            yield group
            group, total, longest = [], length, length
        group.append(index)
    if group:
        yield group


def _pack(indices: Sequence[int], examples: Sequence[Example], weights: Sequence[float], layout: str) -> Pack:
    lengths = torch.tensor([len(example.ids) for example in examples])
    ids = [torch.tensor(example.ids, dtype=torch.long) for example in examples]
    places = [torch.arange(len(example.ids)) for example in examples]
    if padded := layout == "padded":
        width = int(lengths.max())
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        position_ids = torch.arange(width).expand(len(ids), width)
        starts = torch.arange(len(ids) + 1) * width
    else:
        input_ids, position_ids = torch.cat(ids)[None], torch.cat(places)[None]
        starts = _bounds(lengths)
    labels = [
        torch.tensor(example.labels[1:], dtype=torch.long) for example in examples
    ]  # nothing predicts the first token
    predicting = [(label != IGNORED).nonzero().squeeze(1) for label in labels]
    counts = torch.tensor([len(place) for place in predicting])
    return Pack(
        samples=tuple(indices),
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=(position_ids < lengths[:, None]).long() if padded else None,
        starts=starts,
        positions=torch.cat([place + start for place, start in zip(predicting, starts, strict=False)]),
        label_starts=_bounds(counts),
        targets=torch.cat([label[place] for label, place in zip(labels, predicting, strict=True)]),
        weights=torch.tensor(weights, dtype=torch.float64).repeat_interleave(counts),
    )


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
