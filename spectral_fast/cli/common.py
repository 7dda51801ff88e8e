"""What several commands share: their parser, groups of flags, the probe, and warnings."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.atomic import replace_file
from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.calibration.streaming.options import StreamOptions
from spectral_fast.cli.parser import STATUSES, Parser
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.options import add_flags, option
from spectral_fast.progress import bar, counter
from spectral_fast.usage import UsageError, take


@dataclass(frozen=True)
class EveryModule(SelectionOptions):
    """All modules, unless some are named."""

    target_modules: tuple[str, ...] = option(("all-linear",), "last name components, or all-linear")


def add_command(
    commands: Any,
    name: str,
    run: Callable[..., Any],
    help: str,
    description: str = "",
    *,
    examples: Sequence[str],
    writes: Mapping[str, str] = {},
) -> Parser:
    """A subcommand.

    Args:
        commands: what `add_subparsers` returned.
        name: of the command.
        run: takes the parsed flags and returns the result, as JSON and as text.
        help: one line in the list of commands, of at most 55 characters.
        description: sentences of the command's own help, without line breaks.
        examples: complete command lines, each in one line; help breaks them.
        writes: name of a file -> what is in it, in one line.
    """
    parser: Parser = commands.add_parser(
        name,
        help=help.replace("%", "%%"),  # argparse formats it, but not the description
        description=textwrap.fill(description or f"{help[0].upper()}{help[1:]}.", 80),
        epilog=_epilog(examples, writes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.summary, parser.examples, parser.writes = help, examples, writes
    parser.set_defaults(run=run)
    return parser


def _epilog(examples: Sequence[str], writes: Mapping[str, str]) -> str:
    blocks = {"examples" if len(examples) > 1 else "example": "\n".join(map(broken, examples))}
    if writes:
        hanging = (textwrap.fill(f"{name}: {text}", 76, subsequent_indent="  ") for name, text in writes.items())
        blocks["files written"] = "\n".join(hanging)
    blocks["exit status"] = STATUSES
    return "\n\n".join(f"{title}:\n{textwrap.indent(text, '  ')}" for title, text in blocks.items())


def broken(example: str, width: int = 76) -> str:
    """A command line broken before flags, by backslashes, where it is longer than `width`."""
    first, *rest = re.split(r" (?=-)", example)
    lines = [first]
    for part in rest:
        if len(lines[-1]) + len(part) + 3 > width:  # with the space before it, and the backslash after it
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


def add_adapter_flags(
    parser: argparse.ArgumentParser, out_dir: str, selection: type[SelectionOptions] = SelectionOptions
) -> None:
    """Flags of commands that read an adapter and write a folder."""
    parser.add_argument("--lora_path", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--out_dir", required=True, type=Path, help=out_dir)
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    add_flags(parser.add_argument_group("modules"), selection)


def add_model_flags(parser: argparse.ArgumentParser, *, base_model_required: bool) -> None:
    """Flags of the base model."""
    group = parser.add_argument_group("base model")
    group.add_argument("--base_model", required=base_model_required, help="folder or Hugging Face name")
    add_flags(group, ModelOptions)


def add_result_flags(parser: argparse.ArgumentParser, out_dir: str) -> None:
    """Flags of commands that evaluate one adapter: where the result goes, and what belongs to it."""
    parser.add_argument("--out_dir", type=Path, help=out_dir)
    parser.add_argument("--out_json", type=Path, help="write the result to this file, too")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling, if any (default: 0)")
    parser.add_argument(
        "--config_src",
        type=Path,
        help="file that says how the adapter came about; its hash is recorded with the result",
    )
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run generated programs on this machine, in the sandbox"
    )


def add_subject_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of what is evaluated: an adapter, or the base model alone."""
    parser.add_argument("--lora_dir", help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--base_only", action="store_true", help="evaluate the base model alone")


def subject(args: argparse.Namespace) -> Path | None:
    """Folder of the adapter that is evaluated; None for the base model alone.

    Raises:
        UsageError: both are given, or none.
    """
    from spectral_fast.adapter import resolve

    if args.base_only != (args.lora_dir is None):
        raise UsageError("give --lora_dir for an adapter, or --base_only for the base model, and not both")
    return None if args.base_only else resolve(args.lora_dir, getattr(args, "cache_dir", None))


def evaluated(args: argparse.Namespace, folder: Path | None, options: Any, **more: Any) -> dict[str, Any]:
    """The result of one adapter, or of the base model alone, as the flags of model, engine and result say."""
    from spectral_fast.evaluation.adapters import evaluate_adapters

    engine_options = take(EngineOptions, vars(args))
    warn_of_engine(args, engine_options)
    [result] = evaluate_adapters(
        args.base_model,
        {None: folder},
        args.out_dir or folder or Path(),
        take(ModelOptions, vars(args)),
        options,
        engine_options,
        profile=args.eval_profile,
        seed=args.seed,
        meta=config_source(args),
        progress=counter,
        **more,
    ).values()
    write_result(args, result)
    return result


def warn_of_engine(args: argparse.Namespace, options: EngineOptions, prefix: str = "") -> None:
    """Warn about flags of the engine that is not taken."""
    from spectral_fast.evaluation.engines.options import TRANSFORMERS_ONLY, VLLM_ONLY

    engine = options.chosen()
    others = VLLM_ONLY if engine == "transformers" else TRANSFORMERS_ONLY
    given = [f"{prefix}{name}" for name in others if f"{prefix}{name}" in vars(args)]
    warn(f"--{name} has no effect: the engine is {engine}" for name in given)


def config_source(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of --config_src; nothing if it is not given."""
    from spectral_fast.provenance import sha256_file

    path = args.config_src
    return {} if path is None else {"config_src": {"path": str(path), "sha256": sha256_file(path)}}


def write_result(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """The result in the file --out_json, if it is given."""
    if args.out_json is not None:
        args.out_json.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out_json, json.dumps(result, indent=2) + "\n")


def add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the calibration."""
    add_flags(parser.add_argument_group("calibration"), CalibrationOptions)
    add_flags(parser.add_argument_group("layer by layer"), StreamOptions)


def run_probe(
    args: argparse.Namespace, adapter: Any, modules: Any, options: Any, work_dir: Path | None, ranks: Any = None
) -> Any:
    """Sensitivities measured as the flags say, with a progress bar."""
    from spectral_fast.calibration.probe import probe

    first = ranks is None or ranks.rank == 0
    try:
        return probe(
            adapter,
            modules,
            args.base_model,
            take(CalibrationOptions, vars(args)),
            options,
            progress=bar("calibrate") if first else iter,
            ranks=ranks,
            stream=take(StreamOptions, vars(args)),
            work_dir=work_dir,
        )
    except BaseException as error:
        if first and work_dir is not None and work_dir.exists() and not isinstance(error, FileExistsError):
            warn([f"{work_dir.parent} keeps what was computed so far: go on with it by --resume, or remove it"])
        raise


def work_dir(args: argparse.Namespace, rank: int = 0) -> Path | None:
    """Where a streamed run keeps what it has so far: beside the folder that it shall write."""
    if not getattr(args, "stream", False):
        return None
    return unfinished(args.out_dir) / f"rank-{rank}"


def unfinished(out_dir: Path) -> Path:
    """Where a run that can go on by --resume keeps what it has so far."""
    out = out_dir.resolve()  # "." has no name of its own
    return out.with_name(f"{out.name}.unfinished")


def discard_work(folder: Path) -> None:
    """Remove what `work_dir` named, and what held it if no other rank's is left there."""
    from spectral_fast.calibration.streaming.work_folder import discard

    discard(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def certainty(record: Mapping[str, Any]) -> list[str]:
    """Lines about how certain the choice of directions is, from a probe's record."""
    from spectral_fast.calibration import rounds
    from spectral_fast.statistics import as_text

    lines = [as_text(record["stability"])] if record["stability"] else []
    return [rounds.as_text(record), *lines] if record["until_stable"] else lines


def warn(warnings: Iterable[str]) -> None:
    """One line per warning on stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
