"""`extract`: an adapter from a base model and one that was tuned in full."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.calibration.options import ModelOptions
from spectral_fast.cli.common import add_command, unfinished, warn
from spectral_fast.cli.outputs import NEW_ADAPTER, UNFINISHED
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.toolbox.extraction.options import ExtractOptions
from spectral_fast.usage import UsageError, take

_SHOWN = 5  # tensors that are named; --json has all

_WRITES = {
    **NEW_ADAPTER,
    "extract_meta.json": "meta (models and hashes of their files, all settings, versions), modules: r, norm (|ΔW|), "
    "error (|ΔW - B A|), reached (whether the goal was); equal (layers without a difference), lost (changed and not in "
    "the adapter), saved (in full), warnings",
    **UNFINISHED,
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "extract",
        _run,
        "make an adapter of the difference of two models",
        "Makes a LoRA adapter of the difference between a model that was tuned in full and its base. The weights are"
        " read tensor by tensor, so that memory is that of the largest layer, not of the models; --passes times over"
        " both. Tells the error of every module and what changed that LoRA cannot hold. A run that was ended goes on"
        " by --resume. Next: `eval`, or `resize`.",
        examples=[
            "spectral-fast extract --base_model ORG/BASE --tuned_model ORG/TUNED --out_dir ./lora --rank 64",
            "spectral-fast extract --base_model ORG/BASE --tuned_model ORG/TUNED --out_dir ./lora30 --error 0.3 "
            "--resume",
        ],
        writes=_WRITES,
    )
    parser.add_argument("--base_model", required=True, help="folder or Hugging Face name of the model before")
    parser.add_argument("--tuned_model", required=True, help="folder or Hugging Face name of the model after")
    parser.add_argument("--out_dir", required=True, type=Path, help="folder to write; must be new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    parser.add_argument(
        "--resume", action="store_true", help="go on with what a run that was ended has left in OUT_DIR.unfinished"
    )
    group = parser.add_argument_group("size (one of the first three)")
    add_flags(group, ExtractOptions)
    group = parser.add_argument_group("modules")
    group.add_argument(
        "--target_modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="last name components of linear layers; all-linear is all but the output head (default: all-linear)",
    )
    group.add_argument(
        "--modules_to_save",
        action="store_true",
        help="put modules that changed and that LoRA cannot hold (norms, embeddings) into the adapter in full",
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model_class",
        default="auto",
        help="transformers class whose module names are wanted (default: the one that wrote the base checkpoint)",
    )
    group.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.toolbox.extraction import extract_adapter

    options = take(ExtractOptions, vars(args))
    if options.rank is not None and "max_rank" in vars(args):
        raise UsageError("--max_rank is for --energy and --error, and --rank is given; leave out one of the two")
    work = unfinished(args.out_dir)
    try:
        found = extract_adapter(
            args.base_model,
            args.tuned_model,
            options,
            args.out_dir,
            target_modules=args.target_modules,
            modules_to_save=args.modules_to_save,
            model_options=ModelOptions(cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code),
            model_class=args.model_class,
            overwrite=args.overwrite,
            work_dir=work,
            resume=args.resume,
            progress=bar("extract"),
        )
    except BaseException as error:
        if work.exists() and not isinstance(error, FileExistsError):
            warn([f"{work} keeps what was computed so far: go on with it by --resume, or remove it"])
        raise
    warn(found.warnings)
    ranks = sorted(found.ranks.values())
    errors = [x.error / x.norm for x in found.modules.values()]
    short = [name for name, x in found.modules.items() if not x.reached]
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = [
        f"extracted {len(ranks)} modules, {span} -> {args.out_dir}",
        f"|ΔW - B A| / |ΔW| is {sum(errors) / len(errors):.3g} on average, {max(errors):.3g} at most",
    ]
    if short:
        lines.append(f"--max_rank {options.max_rank} was too small for {len(short)} modules, such as {short[0]}")
    if found.equal:
        lines.append(f"equal in both models: {len(found.equal)} linear layers")
    if found.saved:
        lines.append(f"in full (modules_to_save): {_named(found.saved)}")
    if found.lost:
        lines.append("changed, and not in the adapter: " + _named([f"{k} ({why})" for k, why in found.lost.items()]))
    result = {
        "out_dir": str(args.out_dir),
        "ranks": [ranks[0], ranks[-1]],
        "error_mean": sum(errors) / len(errors),
        "error_most": max(errors),
        "not_reached": short,
        **found.record(),
    }
    return result, "\n".join(lines)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} others (named in --json)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
