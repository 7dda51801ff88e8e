"""`probe`: measure sensitivities and write them."""

from __future__ import annotations

import argparse
import shlex
import signal
from contextlib import nullcontext
from typing import Any

from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.cli.common import (
    add_adapter_flags,
    add_calibration_flags,
    add_command,
    add_model_flags,
    certainty,
    discard_work,
    run_probe,
    warn,
    work_dir,
)
from spectral_fast.cli.outputs import SENSITIVITY, UNFINISHED
from spectral_fast.usage import check_inputs_kept, check_stream, take

_WRITES = {**SENSITIVITY, **UNFINISHED}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "probe",
        _run,
        "measure sensitivities, for many edits later",
        "Measures g = dL/ds, how much the loss depends on each singular value of an adapter, on the calibration "
        "samples. Takes a forward and a backward pass per sample, with the base model in memory or, with --stream, "
        "two of its layers. Says how certain the choice of directions is. torchrun splits the samples over "
        "processes. Next, without the base model: `edit`, `resize` or `ranks` with --sensitivity.",
        examples=[
            "spectral-fast probe --base_model meta-llama/Llama-3.1-8B --lora_path ORG/ADAPTER --out_dir ./probed",
            "spectral-fast probe --base_model meta-llama/Llama-3.1-8B --lora_path ORG/ADAPTER --out_dir "
            "./probed-on-mine --calib_data mine.jsonl --until_stable 0.9",
            "spectral-fast probe --base_model meta-llama/Llama-3.1-8B --lora_path ORG/ADAPTER --out_dir "
            "./probed-by-layers --stream --target_modules all-linear",
            "torchrun --nproc-per-node 2 -m spectral_fast probe --base_model meta-llama/Llama-3.1-8B --lora_path "
            "ORG/ADAPTER --out_dir ./probed-by-two",
        ],
        writes=_WRITES,
    )
    add_adapter_flags(parser, "folder to write; must be new, or empty")
    add_model_flags(parser, base_model_required=True)
    add_calibration_flags(parser)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    from spectral_fast.calibration.ranks import join, place
    from spectral_fast.calibration.torchrun import launched

    check_inputs_kept(args)
    check_stream(args)
    options = place(take(ModelOptions, vars(args)))
    try:
        with join(options) as ranks:
            return _probe(args, options, ranks)
    except Exception:
        if launched():  # what ends this rank is still to be printed when torchrun ends those that are left
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


def _probe(args: argparse.Namespace, options: Any, ranks: Any) -> tuple[dict[str, Any], str] | None:
    """The result, on rank 0: nobody else writes or prints."""
    from spectral_fast.adapter import resolve
    from spectral_fast.atomic import check_out_dir, replace_directory
    from spectral_fast.sensitivity import RECORD

    selection = take(SelectionOptions, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, getattr(args, "cache_dir", None)))
    target = {"source": adapter.path, "overwrite": args.overwrite, "marker": RECORD}
    check_out_dir(args.out_dir, **target)
    if ranks.rank == 0:
        warn(adapter.warnings)
    folder = work_dir(args, ranks.rank)
    # Taken before the work: who comes second, or writes where nothing can be written, is told so at once.
    writing = replace_directory(args.out_dir, **target) if ranks.rank == 0 else nullcontext()
    with writing as directory:
        sensitivity = run_probe(args, adapter, modules, options, folder, ranks)
        if directory is not None:
            sensitivity.save(directory)
    ranks.wait()  # until the result is safe: if it cannot be written, no rank ends well
    if folder is not None:
        discard_work(folder)
    if ranks.rank != 0:
        return None
    record = sensitivity.record
    samples = f"{record['samples_used']} samples ({record['labels']} labelled tokens)"
    lines = [
        f"probed {len(modules)} modules on {samples} -> {args.out_dir}",
        *certainty(record),
        f"next: spectral-fast {shlex.join(_edit(args))}",
    ]
    return {"out_dir": str(args.out_dir), "modules": len(modules), **record}, "\n".join(lines)


def _edit(args: argparse.Namespace) -> list[str]:
    """The command that edits what was probed: the modules must be told again."""
    words = ["edit", "--sensitivity", str(args.out_dir), "--lora_path", str(args.lora_path), "--out_dir", "./edited"]
    for name in ("target_modules", "layer_min", "layer_max", "adapter_name"):
        value = vars(args).get(name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
