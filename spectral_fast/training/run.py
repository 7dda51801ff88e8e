"""A training from its settings to an adapter on disk."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from spectral_fast.atomic import replace_directory
from spectral_fast.calibration.model import load_model, load_tokenizer
from spectral_fast.calibration.quantised import keep_differentiable
from spectral_fast.progress import Counter
from spectral_fast.provenance import versions
from spectral_fast.training.adapter import lora_config, quantization
from spectral_fast.training.data import load_split
from spectral_fast.training.folder import FINAL, RunFolder
from spectral_fast.training.options import GateArguments
from spectral_fast.training.settings import Settings
from spectral_fast.training.spline import described, splined

_TEMPLATES = (".jinja", ".j2")  # TRL takes other files for tokenizers


def train(
    settings: Settings, *, overwrite: bool = False, progress: Counter = lambda *_: nullcontext()
) -> dict[str, Any]:
    """Train as the settings say, by TRL's SFTTrainer.

    Writes, in `output_dir`: training_params.json, {run_name}.log, checkpoints as asked for, and at the end
    final_checkpoint/, an adapter as PEFT has it (a whole model without `use_peft`) with its tokenizer, and
    log_history.json, all that the trainer logged. With a gate also gate_metrics.json: what it decided.

    Args:
        settings: see `settings.load`.
        overwrite: replace what an earlier run left in `output_dir`; its checkpoints, the final one and its monitor's
            file are deleted when this one begins.
        progress: called with a description and the number of steps; a context that gives a function to be told how
            many more are done.

    Returns:
        {output_dir, final_checkpoint, steps, train_loss, eval_loss, seconds, trainable_parameters, rank_pattern, gate,
        splines}; no eval_loss without held-out data, no rank_pattern without an adapter, no gate without one, no
        splines without `use_spline`. With a gate `steps` counts the rejected ones, too; gate has what was accepted.

    Raises:
        RuntimeError: several processes were started, or several GPUs are in sight.
        ValueError: the weights are no longer finite at the end; no final checkpoint is written then.
        FileExistsError, FileNotFoundError, NotADirectoryError: as `RunFolder.of`.
        FileNotFoundError, RuntimeError, ValueError: as `load_split`, `load_model`, `lora_config` and `quantization`.
    """
    model = settings.model
    if settings.training.n_gpu > 1:
        raise RuntimeError(f"training works on one GPU, and {settings.training.n_gpu} are seen: CUDA_VISIBLE_DEVICES=0")
    if settings.training.world_size > 1:
        raise RuntimeError(
            f"training is one process, and {settings.training.world_size} were started: leave out the launcher"
        )
    quantized = quantization(model)
    folder = RunFolder.of(settings, overwrite)
    tokenizer = load_tokenizer(model.name, model.loading())
    rows, held_out = _data(settings, tokenizer)
    config = lora_config(model, settings.ranks, settings.spline)
    how = {"attn_implementation": model.attn_implementation, "quantization_config": quantized}
    base = load_model(model.name, model.loading(), **{k: v for k, v in how.items() if v is not None})
    keep_differentiable(base, always=True)

    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    from spectral_fast.training.callbacks import BatchTimeCallback, LogCallback, ProgressCallback, SystemMonitor
    from spectral_fast.training.trainer import gated

    gate = _gate(settings.slora, base)
    kind = splined(SFTTrainer) if settings.spline.use_spline else SFTTrainer
    trainer = (gated(kind) if gate else kind)(
        model=base,
        args=settings.training,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=config,
        **gate,
    )
    folder.check(config)  # in which PEFT has put the modules that "all-linear" means
    if settings.training.max_steps <= 0:
        batches = math.ceil(len(trainer.train_dataset) / settings.training.per_device_train_batch_size)
        settings.slora.check_burn_in(math.ceil(batches * settings.training.num_train_epochs), "num_train_epochs")
    if gate and folder.checkpoint is not None:
        trainer.take_up(folder.checkpoint)
    trainer.remove_callback(PrinterCallback)
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    ranks = {} if config is None else {"rank_pattern": config.rank_pattern or {"": config.r}}
    folder.begin(settings)
    with ExitStack() as stack:
        log = stack.enter_context(folder.log(settings))
        for callback in (BatchTimeCallback(log), LogCallback(log), ProgressCallback(progress, stack)):
            trainer.add_callback(callback)
        log.info("%s", json.dumps({"versions": versions(), "trainable_parameters": parameters, **ranks}))
        if settings.logging.system_monitor:
            stack.enter_context(SystemMonitor(folder.path))
        began = time.perf_counter()
        done = trainer.train(resume_from_checkpoint=folder.checkpoint and str(folder.checkpoint))
        seconds = time.perf_counter() - began
        _check_finite(trainer)
        measured = {} if held_out is None else {"eval_loss": trainer.evaluate()["eval_loss"]}
        final = folder.path / FINAL
        with replace_directory(final, overwrite=True) as directory:
            trainer.model.save_pretrained(directory)
            trainer.processing_class.save_pretrained(directory)
        folder.end(trainer.state.log_history)
        log.info("done: %s", final)
    return {
        "output_dir": str(folder.path),
        "final_checkpoint": str(final),
        "steps": done.global_step,
        "train_loss": done.training_loss,
        **measured,
        "seconds": seconds,
        "trainable_parameters": parameters,
        **ranks,
        **({"gate": trainer.history.summary()} if gate else {}),
        **({"splines": described(trainer.model)} if settings.spline.use_spline else {}),
    }


def _gate(slora: GateArguments, base: Any) -> dict[str, Any]:
    """What a gated trainer takes beside the rest; nothing without a gate."""
    from spectral_fast.training.head import Head

    if not slora.enable:
        return {}
    head = Head(base)
    return {"gate": slora.open(head.d_hidden, head.vocab_size), "max_optimizer_steps": slora.max_optimizer_steps}


def _check_finite(trainer: Any) -> None:
    """What diverged cannot be used, and the trainer's log counts losses that are not finite as zero."""
    trained = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
    broken = next((name for name, p in trained if not p.isfinite().all()), None)
    if broken is not None:
        raise ValueError(
            f"the training diverged: {broken} is not finite after step {trainer.state.global_step}; lower "
            f"learning_rate, which was {trainer.args.learning_rate:g}"
        )


def _data(settings: Settings, tokenizer: Any) -> tuple[Any, Any]:
    """Rows to train on, and held-out ones or None."""
    from trl import is_conversational

    data, template = settings.data, settings.training.chat_template_path
    if template is not None and Path(template).is_file() and not template.endswith(_TEMPLATES):
        raise ValueError(f"chat_template_path {template} must end in {' or '.join(_TEMPLATES)}")
    how = (data, settings.training.dataset_text_field, settings.model.cache_dir)
    rows = load_split(data.source, data.train_split, data.train_samples, *how)
    if is_conversational(rows[0]) and not (tokenizer.chat_template or template):
        raise ValueError(
            f"{data.source} has messages, and {settings.model.name} no chat template: give "
            f"chat_template_path, a file that ends in {' or '.join(_TEMPLATES)}"
        )
    if data.val_dataset_path is None:
        return rows, None
    return rows, load_split(data.val_dataset_path, data.val_split, data.val_samples, *how)
