"""Command lines that cannot be meant, found before the work begins."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from spectral_fast import options
from spectral_fast.atomic import check_parents
from spectral_fast.policies import Policy

T = TypeVar("T")


class UsageError(Exception):
    """A combination of flags that cannot be meant."""


def take(cls: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """As `options.take`, of a command line: values that cannot be, or not together, are a `UsageError`."""
    try:
        return options.take(cls, given, prefix)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def check_places(args: argparse.Namespace) -> None:
    """Refuses places for results where there can be none: a folder that is a file, a file that is a folder, or in one.

    Raises:
        NotADirectoryError: as `check_parents`.
    """
    for flag in ("out_dir", "out_json", "report", "output"):
        path = getattr(args, flag, None)
        if path is None:
            continue
        check_parents(path)
        if flag == "out_dir" and path.exists() and not path.is_dir():
            raise UsageError(f"--{flag} {path} is a file; name a folder for the results")
        if flag != "out_dir" and path.is_dir():
            raise UsageError(f"--{flag} {path} is a folder; name a file for the result")


def check_inputs_kept(args: argparse.Namespace) -> None:
    """Refuses to replace a folder that holds what the run reads."""
    out_dir = args.out_dir.resolve()
    for flag in ("sensitivity", "base_model", "calib_data", "eval_data", "eval_fewshot_data"):
        value = getattr(args, flag, None)
        if value is not None and Path(value).exists() and out_dir in (p := Path(value).resolve(), *p.parents):
            raise UsageError(f"--{flag} {value} is inside --out_dir {args.out_dir}, which is replaced")


def check_report(args: argparse.Namespace, source: Path) -> None:
    """Refuses to lose what stands where the report shall be."""
    if args.report is None:
        return
    report = args.report.resolve()
    if source.resolve() in report.parents or args.out_dir.resolve() in report.parents:
        raise UsageError(f"--report {args.report} is inside an adapter's folder; put it elsewhere")
    if report.is_dir() or (report.exists() and not args.overwrite):
        raise UsageError(f"--report {args.report} exists; choose another name, or --overwrite a file")


def check_stream(args: argparse.Namespace) -> None:
    """Refuses two ways at once to deal with a model that is larger than the memory."""
    others = [name for name in ("device_map", "load_in_4bit") if name in vars(args)]
    if getattr(args, "stream", False) and others:
        raise UsageError(f"--stream and --{others[0]} exclude each other; leave out one of the two")


def unused(args: argparse.Namespace, policy: Policy, needs_probe: bool) -> list[str]:
    """Warnings about flags that were given and have no effect."""
    from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
    from spectral_fast.calibration.streaming.options import StreamOptions

    unused = [] if needs_probe else [f.name for cls in (CalibrationOptions, StreamOptions) for f in fields(cls)]
    if not (needs_probe or args.eval_gsm8k):
        unused += ["base_model", *(f.name for f in fields(ModelOptions) if f.name != "cache_dir")]
    unused += [] if policy.needs_sensitivity else ["sensitivity"]
    given = [name for name in unused if vars(args).get(name) is not None]
    if not args.eval_gsm8k:
        given += [name for name in vars(args) if name.startswith("eval_") and name != "eval_gsm8k"]
    return [f"--{name} has no effect here" for name in given]
