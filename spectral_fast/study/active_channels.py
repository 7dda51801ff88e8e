"""`active-channels`: how many of a layer's truly active channels does SparseLoRA's SVD predictor find?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from spectral_fast.atomic import replace_directory
from spectral_fast.calibration.data import IGNORED, Example
from spectral_fast.calibration.model import load_model, load_tokenizer
from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.calibration.probe import load_examples
from spectral_fast.report.drawing import WHOLE
from spectral_fast.report.names import places
from spectral_fast.study.channel_scores import (
    FFN,
    ORACLE,
    QK,
    RANDOM,
    SVD,
    SVD_TOKENS,
    VO,
    WANDA,
    Block,
    Scores,
    Seen,
    find_blocks,
)
from spectral_fast.study.options import ActiveChannelOptions
from spectral_fast.study.output import COLOURS, MARKS, draw, to_csv

Row = dict[str, Any]
TABLE, PICTURE = "active_channels.csv", "active_channels.png"
COLUMNS = ("block", "layer", "part", "sparsity", "channels", "kept", "method", "recall", "energy_kept", "energy_oracle")
PARTS = {FFN: "feed-forward", QK: "queries and keys", VO: "values"}
METHODS = (SVD, SVD_TOKENS, WANDA, RANDOM)


def run_active_channels(
    base_model: Path | str,
    data: CalibrationOptions,
    options: ActiveChannelOptions,
    out_dir: Path | str,
    *,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Write a table of the recall of predicted channels against the oracle's, per block, and a figure.

    Per batch (`calib_batch_size` samples) and block, each method names the channels of its highest scores, as many as
    SparseLoRA would compute. The oracle ranks by the norms of the true activations. `svd` predicts these from rank-8
    factors of the weights and the samples' average inputs, `svd_per_token` from those and every token, `wanda` weighs
    the true norms by down_proj, and `random` draws.

    Args:
        base_model: folder or Hugging Face name of a Llama-like causal language model.
        data: which samples.
        options: rank and sparsities.
        out_dir: folder for the files; appears when all are complete.
        model_options: device and dtype.
        overwrite: replace what an earlier run left there.
        progress: wraps the list of batches.

    Returns:
        `rows` of the table, each a mean over batches: recall |chosen ∩ oracle's| / kept, and the share of the squared
        norms of the true activations that the chosen channels have; `summary`, their means over blocks.

    Raises:
        FileNotFoundError, ValueError: no such model or data, or no Llama-like blocks.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast import CalibrationOptions, embedded
        >>> from spectral_fast.study import ActiveChannelOptions, run_active_channels
        >>> data = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=2)
        >>> options = ActiveChannelOptions(sparsity=(0.8,))
        >>> result = run_active_channels(embedded.base_model_dir(), data, options, "active")
        >>> sorted({row["part"] for row in result["summary"]})
        ['ffn', 'qk', 'vo']
    """
    model_options = model_options or ModelOptions()
    base_model = str(base_model)
    with replace_directory(out_dir, overwrite=overwrite, marker=TABLE) as folder:
        examples = load_examples(load_tokenizer(base_model, model_options), data)
        model = load_model(base_model, model_options)
        blocks = find_blocks(model, options.rank)
        rows = _rows(model, blocks, examples, data.calib_batch_size, options, progress)
        (folder / TABLE).write_text(to_csv(COLUMNS, rows), encoding="utf-8")
        _draw(folder / PICTURE, rows)
    return {
        "out_dir": str(out_dir),
        "base_model": base_model,
        "samples": len(examples),
        "blocks": len(blocks),
        "rank": options.rank,
        "summary": _summary(rows),
        "rows": rows,
    }


@torch.no_grad()
def _rows(
    model: Any,
    blocks: Sequence[Block],
    examples: Sequence[Example],
    batch_size: int,
    options: ActiveChannelOptions,
    progress: Callable[[Sequence[Any]], Iterable[Any]],
) -> list[Row]:
    rng = np.random.default_rng(options.seed)
    measured: dict[tuple[str, str, float, str], list[tuple[int, int, float, float, float]]] = defaultdict(list)
    decoder = model.base_model  # without the head: logits are not wanted
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    for batch in progress(batches):
        ids, mask, counted = _padded(batch, context_only=options.context_only)
        with _watched(blocks, counted.to(model.device)) as seen:
            decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        for block in blocks:
            for part, scores in block.scores(seen(block)):
                scores[RANDOM] = torch.from_numpy(rng.random(len(scores[ORACLE])))
                for sparsity in options.sparsity:
                    keep = options.keep(len(scores[ORACLE]), sparsity)
                    for method, outcome in _compared(scores, keep):
                        measured[block.name, part, sparsity, method].append((len(scores[ORACLE]), keep, *outcome))
    layers = places({block.name for block in blocks})
    rows = []
    for (name, part, sparsity, method), outcomes in measured.items():
        channels, keep = outcomes[0][:2]
        recall, energy, best = (fmean(values) for values in list(zip(*outcomes, strict=True))[2:])
        values = (name, layers[name].layer, part, sparsity, channels, keep, method, recall, energy, best)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _compared(scores: Scores, keep: int) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Per method: recall against the oracle, and the shares of the true energy that method and oracle keep."""
    energy = scores[ORACLE].double().square().cpu()
    total = energy.sum().clamp_min(1e-300)
    best = scores[ORACLE].topk(keep).indices.cpu()
    for method in METHODS:
        if method in scores:
            chosen = scores[method].topk(keep).indices.cpu()
            recall = torch.isin(chosen, best).double().mean().item()
            yield method, (recall, (energy[chosen].sum() / total).item(), (energy[best].sum() / total).item())


def _padded(batch: Sequence[Example], *, context_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of padded rows, and which tokens count."""
    longest = max(len(example.ids) for example in batch)
    ids, mask, counted = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length], mask[row, :length] = torch.tensor(example.ids), 1
        context = torch.tensor(example.labels) == IGNORED
        counted[row, :length] = context if context_only else 1
    return ids, mask, counted.bool()


@contextmanager
def _watched(blocks: Sequence[Block], counted: Tensor) -> Iterator[Callable[[Block], Seen]]:
    """Give a function that says, after a forward pass within the context, what it did to a block."""
    caught: dict[tuple[str, str], Tensor] = {}

    def catch(block: str, layer: str, first: bool, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        caught[block, layer] = args[0] if layer == "down_proj" else output
        if first:
            caught[block, "x"] = args[0]

    def seen(block: Block) -> Seen:
        x = caught.pop((block.name, "x")).float()
        outputs = {layer: caught.pop((block.name, layer))[counted].float() for layer in block.watched}
        weights = counted / counted.sum(1, keepdim=True).clamp_min(1)
        return Seen(x[counted], torch.einsum("st,sth->sh", weights.float(), x), outputs)

    handles = [
        getattr(block.module, layer).register_forward_hook(partial(catch, block.name, layer, layer == block.watched[0]))
        for block in blocks
        for layer in block.watched
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _summary(rows: Sequence[Row]) -> list[Row]:
    """Means over blocks, per part, sparsity and method."""
    groups: dict[tuple[str, float, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["part"], row["sparsity"], row["method"]].append(row)
    return [
        {
            "part": part,
            "sparsity": sparsity,
            "method": method,
            **{key: fmean(row[key] for row in some) for key in ("recall", "energy_kept", "energy_oracle")},
            "chance": fmean(row["kept"] / row["channels"] for row in some),
        }
        for (part, sparsity, method), some in groups.items()
    ]


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Recall by block, a panel per part and a line per method, at the middle one of the sparsities."""
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    sparsities = sorted({row["sparsity"] for row in rows})
    sparsity = sparsities[len(sparsities) // 2]

    def fill(figure: Figure) -> None:
        for panel, part in zip(figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts, strict=True):
            for method, colour, mark in zip(METHODS, COLOURS, MARKS, strict=False):
                some = [r for r in rows if (r["part"], r["method"], r["sparsity"]) == (part, method, sparsity)]
                if some:
                    recalls = [row["recall"] for row in some]
                    panel.plot(range(len(some)), recalls, label=method, color=colour, marker=mark, ms=4, lw=0.8)
            panel.set_title(f"{PARTS[part]}, sparsity {sparsity:g}")
            panel.set_xlabel("block")
            panel.xaxis.set_major_locator(MaxNLocator(9, **WHOLE))
            panel.set_ylim(0, 1)
            panel.legend()
        figure.supylabel("recall against the oracle", fontsize=9.5)

    draw(path, (3.6 * len(parts), 3.4), fill)


def as_text(result: Mapping[str, Any]) -> str:
    """The means over blocks as a table."""
    lines = ["part  sparsity  method         recall  chance  energy kept  by the oracle"]
    lines += [
        f"{row['part']:4}  {row['sparsity']:8.2f}  {row['method']:13}  {row['recall']:6.3f}  {row['chance']:6.3f}  "
        f"{row['energy_kept']:11.3f}  {row['energy_oracle']:13.3f}"
        for row in result["summary"]
    ]
    where = f"rank {result['rank']}, {result['blocks']} blocks, {result['samples']} samples -> {result['out_dir']}"
    return "\n".join([*lines, where])
