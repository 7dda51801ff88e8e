"""`train`: a LoRA adapter from a YAML file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spectral_fast.cli.common import add_command
from spectral_fast.options import add_flags
from spectral_fast.progress import counter
from spectral_fast.training.settings import PREFIXES, SECTIONS
from spectral_fast.usage import UsageError

T = TypeVar("T")

_WRITES = {
    "final_checkpoint/": "the adapter, adapter_config.json and adapter_model.safetensors, with the tokenizer and "
    "PEFT's README.md; with use_spline also splines.png",
    "checkpoint-*/": "the trainer's, every save_steps: adapter, optimizer, scheduler and trainer_state.json, to resume "
    "from",
    "training_params.json": "all settings: loramodel_args, training_args, data_args, rank_assignment_args; gate_args "
    "and spline_args where used",
    "*.log": "RUN_NAME.log: versions, parameters and ranks, then what was logged, with times",
    "log_history.json": "a list of what the trainer logged: step, epoch, loss, grad_norm, learning_rate ...; at the "
    "end train_runtime (seconds)",
    "gate_metrics.json": "with slora_enable: acceptance_rate, accepted_steps, total_steps, rejected_steps, "
    "optimizer_steps, avg_novelty, and of every micro-batch novelty_history, accept_history, loss_history",
    "system_monitoring/usage.jsonl": "with system_monitor, a line per second: time, cpu_percent, memory_percent, "
    "process_cpu_percent, process_memory_bytes, gpus",
    "README.md": "TRL's model card",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "train",
        _run,
        "train an adapter, from a YAML file",
        "Trains a LoRA adapter by TRL's SFTTrainer: of one rank, or of ranks by the spectra of the base weights. "
        "Settings come from a YAML file and from flags, which win; every field of TRL's SFTConfig (--learning_rate, "
        "--max_steps, --output_dir ...) is a flag, too. One process, one GPU. A run that was stopped goes on by "
        "--resume_from_checkpoint latest. Next: `eval`, `probe` or `edit` on OUTPUT_DIR/final_checkpoint.",
        examples=[
            "spectral-fast train --config train.yaml --learning_rate 1e-4",
            "spectral-fast train --config train.yaml --output_dir ./gated --slora_enable --slora_target_novelty 0.3 "
            "--slora_burn_in 200",
            "spectral-fast train --model_name_or_path meta-llama/Llama-3.1-8B --train_dataset_path mine.jsonl "
            "--lora_r 16 --output_dir ./trained-on-mine",
        ],
        writes=_WRITES,
    )
    parser.add_argument("--config", type=Path, help="YAML of flags' names; flags win, --no_NAME for false")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in output_dir")
    for name, cls in SECTIONS.items():
        add_flags(parser.add_argument_group(name), cls, prefix=PREFIXES.get(name, ""))
    parser.takes_more, parser.config_text = True, _config_text
    parser.again = (
        "Run it again; where it has left a checkpoint, with --resume_from_checkpoint latest to go on from there, or "
        "with --overwrite to begin anew."
    )
    return parser


def _config_text(args: argparse.Namespace) -> str:
    """The run as the file that --config reads: without sections, which need not be."""
    from spectral_fast.cli.config import entry, flags, head, title
    from spectral_fast.training.settings import given_keys, training_defaults

    given = _understood(given_keys, args)
    text = (
        head(args.parser)
        + flags(args.parser, given, without=("overwrite", "json"))
        + title("training: TRL's SFTConfig")
    )
    for name, (default, about) in training_defaults().items():
        shown = "DIR" if name == "output_dir" else default
        text += entry(name, given.get(name, shown), about, name in given)
    return text


def _understood(read: Callable[..., T], args: argparse.Namespace) -> T:
    """What the file and the flags say; what they cannot say is a wrong command line."""
    try:
        return read(args.config, vars(args), args.rest)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from spectral_fast.training import Settings, load, train

    def complete(*given: Any) -> Settings:
        settings = load(*given)
        _ = settings.model.name, settings.data.source  # which are needed, and may come from the file
        return settings

    settings = _understood(complete, args)
    os.environ.setdefault("WANDB_PROJECT", settings.training.project)  # transformers tells W&B no other way
    result = train(settings, overwrite=args.overwrite, progress=counter)
    loss = f"loss {result['train_loss']:.4f}"
    if "eval_loss" in result:
        loss += f", on held-out data {result['eval_loss']:.4f}"
    final = Path(result["final_checkpoint"])
    lines = [
        f"trained {result['trainable_parameters']:,} parameters for {result['steps']} steps, {loss}",
        f"-> {final}",
    ]
    if "gate" in result:
        lines.insert(
            1,
            "the gate accepted {accepted_steps} of {total_steps} micro-batches ({acceptance_rate:.1%}), which made "
            "{optimizer_steps} steps of the optimizer".format(**result["gate"]),
        )
    if settings.spline.use_spline:
        from spectral_fast.report.splines import save_spline_picture
        from spectral_fast.splines import read_splines

        save_spline_picture(final / "splines.png", read_splines(final))
        found = result["splines"]
        lines.append(
            f"splines: {found['parameters']} of the parameters, mean |v - k| {found['deviation']:.4f}, variance of the "
            f"slopes {found['slope_variance']:.4f}, scales {found['input_scale']:.3f} and {found['output_scale']:.3f} "
            "(means over layers; splines.png has each)"
        )
    if settings.model.use_peft:
        engine = " --engine transformers" if settings.spline.use_spline else ""
        lines.append(f"next: spectral-fast eval --base_model {settings.model.name} --lora_dir {final}{engine}")
    return result, "\n".join(lines)
