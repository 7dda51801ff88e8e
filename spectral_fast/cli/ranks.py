"""`ranks`: how large the LoRA of each layer should be."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_fast.allocation.options import PRESETS, RankOptions, SpectralOptions, preset_of
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.cli.common import add_command, warn
from spectral_fast.options import add_flags
from spectral_fast.progress import counter
from spectral_fast.usage import UsageError, check_inputs_kept, take

CSV, JSON = "ranks.csv", "ranks.json"

_WRITES = {
    JSON: "lora_config (what LoraConfig takes: r, lora_alpha, target_modules, rank_pattern, alpha_pattern), "
    "parameters, base_model, ranks_from, preset, all settings, versions",
    CSV: "a layer per row: layer_index, layer_name, shape, lora_parameters_per_rank, weighted_score, rank_pattern, "
    "alpha_pattern; by spectra alpha_hill, spectral_norm, D (distance of the fit), norm, alphahat, num_spikes, "
    "stable_rank, xmin, bulk_edge, sigma_mp, Q, alpha_hill_normalized, num_spikes_normalized; by sensitivities "
    "sensitivity (sum of |s g|), directions (how many share it)",
    "ranks.png": "scores and ranks by depth",
    "spectra-*.png": "by spectra: 24 layers a page, each with bulk and power law",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "ranks",
        _run,
        "give each layer of a model a LoRA rank",
        "Gives each linear layer and convolution of a model a score and a LoRA rank, by the spectrum of its weights,"
        " or by the sensitivities that `probe` measured. The weights are read one matrix after the other; 85 "
        "matrices of 2048 columns took 24 s on two cores. Prints the ranks and how to hand them to PEFT. Next: "
        "`train` with adaptive_ranks, or LoraConfig in your own code.",
        examples=[
            "spectral-fast ranks --base_model meta-llama/Llama-3.1-8B --out_dir ./ranks --budget_uniform_rank 16 "
            "--exclude_modules lm_head",
            "spectral-fast ranks --base_model meta-llama/Llama-3.1-8B --out_dir ./ranks-by-loss --sensitivity "
            "./probed --no_pictures",
        ],
        writes=_WRITES,
    )
    parser.add_argument("--base_model", required=True, help="folder or Hugging Face name; read one matrix at a time")
    parser.add_argument("--out_dir", required=True, type=Path, help="folder to write; must be new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    parser.add_argument(
        "--sensitivity",
        type=Path,
        help="folder that `probe` wrote: ranks by how much the directions of a module matter, not by spectra",
    )
    parser.add_argument(
        "--preset",
        default="paper",
        choices=list(PRESETS),
        help="defaults of the flags below: the method as described, or as in its source (default: paper)",
    )
    add_flags(parser.add_argument_group("ranks"), RankOptions)
    add_flags(parser.add_argument_group("spectra"), SpectralOptions)
    parser.add_argument("--no_pictures", action="store_true", help="write the tables only")
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--model_class",
        default="auto",
        help="transformers class whose module names are wanted (default: the one that wrote the checkpoint)",
    )
    group.add_argument("--device", default="auto", help="where spectra are computed (default: a GPU if there is one)")
    group.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.allocation import allocate, layers_of
    from spectral_fast.atomic import check_out_dir, replace_directory
    from spectral_fast.provenance import versions
    from spectral_fast.sensitivity import Sensitivity

    given = {**preset_of(args.preset), **vars(args)}
    options, spectral = take(RankOptions, given), take(SpectralOptions, given)
    where = ModelOptions(device=args.device, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code)
    device, _ = where.resolved()
    target: dict[str, Any] = {"overwrite": args.overwrite, "marker": JSON}
    if Path(args.base_model).is_dir():
        target["source"] = Path(args.base_model)
    check_out_dir(args.out_dir, **target)
    check_inputs_kept(args)
    sensitivity = None
    if args.sensitivity is not None:
        sensitivity = Sensitivity.load(args.sensitivity)
        unused = sorted({*asdict(spectral), "hill_weight", "mp_spikes_weight"} & vars(args).keys())
        if args.preset != "paper":
            unused = ["preset"]
        if unused:
            raise UsageError(f"--{unused[0]} is about spectra, and --sensitivity takes none: leave out one of the two")
        probed = sensitivity.record.get("base_model")
        if probed is not None and os.path.realpath(str(probed)) != os.path.realpath(args.base_model):
            warn([f"{args.sensitivity} was probed on {probed}, not on {args.base_model}: are they the same model?"])
    layers = layers_of(args.base_model, where, args.model_class, lambda text: warn([text]))
    with (
        replace_directory(args.out_dir, **target) as directory,
        counter("spectra", len(layers) if sensitivity is None else 0) as progress,
    ):
        result = allocate(layers, options, spectral, sensitivity=sensitivity, device=device, progress=progress)
        table = result.table.drop(columns="eigs", errors="ignore")
        table.to_csv(directory / CSV, index=False)
        record = {
            "lora_config": result.fields(),
            "parameters": result.parameters,
            "base_model": args.base_model,
            "ranks_from": "spectra" if sensitivity is None else f"sensitivities in {args.sensitivity}",
            "preset": args.preset,
            **asdict(options),
            **(asdict(spectral) if sensitivity is None else {}),
            "versions": versions(),
        }
        (directory / JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        files = [CSV, JSON]
        if not args.no_pictures:
            from spectral_fast.report.allocation import save_allocation_pictures

            files += [file.name for file in save_allocation_pictures(directory, result)]
    warn(_warnings(result.table, sensitivity is None))
    adapted = result.table[result.table.rank_pattern > 0]
    text = "\n".join(
        [
            *_lines(adapted, "alpha_hill" if sensitivity is None else "sensitivity"),
            f"{len(adapted)} of {len(result.table)} layers, ranks {adapted.rank_pattern.min()} to {result.r}, "
            f"{result.parameters:,} parameters -> {args.out_dir} ({', '.join(files[:3])}{', …' * (len(files) > 3)})",
            f'use: LoraConfig(**json.load(open("{args.out_dir / JSON}"))["lora_config"])',
        ]
    )
    return {"out_dir": str(args.out_dir), "files": files, "layers": len(result.table), **record}, text


def _lines(table: Any, measured: str) -> list[str]:
    """The adapted layers, a line each."""
    width = max(len(name) for name in table.layer_name)
    spikes = "num_spikes" if "num_spikes" in table else "directions"
    lines = [f"{'layer':<{width}}{measured:>13}{spikes:>12}{'score':>8}{'rank':>6}{'alpha':>7}"]
    lines += [
        f"{row.layer_name:<{width}}{getattr(row, measured):>13.4g}{getattr(row, spikes):>12.4g}"
        f"{row.weighted_score:>8.3f}{row.rank_pattern:>6}{row.alpha_pattern:>7g}"
        for row in table.itertuples()
    ]
    return lines


def _warnings(table: Any, spectral: bool) -> Iterator[str]:
    names = list(table.layer_name[table.weighted_score.isna()])
    if names and spectral:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        yield f"{names[0]}{more} cannot get a rank: too few eigenvalues, zeros only, or a grouped convolution"
    heads = [name for name in table.layer_name[table.rank_pattern > 0] if name.rpartition(".")[2] == "lm_head"]
    if heads:
        yield f"{heads[0]} is adapted: PEFT will save the embeddings, too; --exclude_modules lm_head leaves it out"
