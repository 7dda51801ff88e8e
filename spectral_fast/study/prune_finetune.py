"""`prune-finetune`: train a LoRA on a classifier, prune its channels, train on, and compare the accuracies."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from spectral_fast.atomic import replace_file
from spectral_fast.calibration.model import from_pretrained
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.study.channel_mask import ChannelMask
from spectral_fast.study.options import PruneFinetuneOptions
from spectral_fast.study.output import to_csv
from spectral_fast.study.sentences import encoded, load_sentences

Row = dict[str, Any]
RESULTS, ARGUMENTS = "results.csv", "run_args.json"
COLUMNS = (
    *("model", "dataset", "method", "keep_ratio", "lora_r", "effective_r", "seed", "train_samples", "eval_samples"),
    *("warmup_epochs", "post_epochs", "acc_before", "acc_after", "delta_acc", "warm_time_sec", "post_time_sec"),
    *("target_modules", "lora_trainable_params", "lora_total_params"),
)
HEADS = ("classifier", "score")  # which PEFT trains as they are, without LoRA
GENERIC = ("q", "k", "v", "out", "dense", "fc1", "fc2", "classifier")
DISTILBERT = ("q_lin", "k_lin", "v_lin", "out_lin")


def run_prune_finetune(
    model: Path | str, dataset: Path | str, options: PruneFinetuneOptions, out_dir: Path | str
) -> dict[str, Any]:
    """Train, prune, train on; append a row to results.csv and write run_args.json.

    Phase A trains the LoRA (dropout 0, on a sequence classifier) and the head. Then every module keeps its channels of
    the highest scores. Phase B goes on with what is left, by default with a fresh AdamW; pruned entries are exactly
    zero after every step, whatever the optimizer remembers or decays. Pruned parameters still count among
    `lora_trainable_params`, and DistilBERT's `pre_classifier` stays as it was drawn, since PEFT does not train it.

    Args:
        model: folder or Hugging Face name of an encoder or a classifier.
        dataset: "glue/sst2", or files, see `load_sentences`.
        options: the LoRA, its pruning, both phases.
        out_dir: folder of results.csv, made if missing.

    Returns:
        The row, and `kept`: name of each LoRA layer -> indices of its channels.

    Raises:
        FileNotFoundError, RuntimeError: no such model or data.
        ValueError: for target modules that the model has not, rows without the columns, classes in the evaluation that
            training has not, a LoRA that is not finite after training, or a results.csv with other columns.
        OSError: out_dir cannot be written to.

    Example:
        >>> import json
        >>> from spectral_fast import embedded
        >>> from spectral_fast.study import PruneFinetuneOptions, run_prune_finetune
        >>> with open("rows.jsonl", "w") as file:
        ...     for i in range(20):
        ...         print(json.dumps({"sentence": f"{i} + {i}", "label": i % 2}), file=file)
        >>> options = PruneFinetuneOptions(keep_ratio=0.5, lora_r=8, target_modules="q_proj")
        >>> result = run_prune_finetune(embedded.base_model_dir(), "rows.jsonl", options, "lora_runs")
        >>> result["lora_r"], result["effective_r"]
        (8, 4)
    """
    model, dataset, out_dir = str(model), str(dataset), Path(out_dir)
    check_results(out_dir / RESULTS)
    set_seed(options.seed)
    train, evaluation, classes = load_sentences(dataset, options)
    tokenizer = from_pretrained(AutoTokenizer, model, ModelOptions())
    adapted, targets = lora_classifier(model, len(classes), options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        adapted.config.pad_token_id = tokenizer.pad_token_id
    data = tuple(encoded(tokenizer, rows, classes, adapted.config) for rows in (train, evaluation))
    lora = [p for name, p in adapted.named_parameters() if "lora_" in name]

    before, warm_time, optimizer = _phase(adapted, tokenizer, data, options, options.warmup_epochs)
    mask = ChannelMask(adapted, options)
    retained = optimizer if options.keep_optimizer else None
    after, post_time, _ = _phase(adapted, tokenizer, data, options, options.post_epochs, mask, retained)

    row = {
        "model": model,
        "dataset": dataset,
        **{name: getattr(options, name) for name in COLUMNS if hasattr(options, name)},
        "effective_r": options.keep(options.lora_r),
        "acc_before": before,
        "acc_after": after,
        "delta_acc": after - before,
        "warm_time_sec": warm_time,
        "post_time_sec": post_time,
        "target_modules": ",".join(targets),
        "lora_trainable_params": sum(p.numel() for p in lora if p.requires_grad),
        "lora_total_params": sum(p.numel() for p in lora),
    }
    append(out_dir / RESULTS, row)
    arguments = {"model": model, "dataset": dataset, **asdict(options), "out_dir": str(out_dir)}
    replace_file(out_dir / ARGUMENTS, json.dumps(arguments, indent=2) + "\n")
    kept = {name: channels.nonzero().squeeze(1).tolist() for name, channels in mask.kept.items()}
    return {"out_dir": str(out_dir), **{name: row[name] for name in COLUMNS}, "kept": kept}


def lora_classifier(model: str, classes: int, options: PruneFinetuneOptions) -> tuple[Any, list[str]]:
    """A sequence classifier with a LoRA on it, and the names of its target modules."""
    from peft import LoraConfig, get_peft_model

    base = from_pretrained(
        AutoModelForSequenceClassification, model, ModelOptions(), num_labels=classes, dtype=torch.float32
    )
    targets = target_modules(base, options.target_modules)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, config), targets


def target_modules(model: nn.Module, wanted: str) -> list[str]:
    """The layers to adapt: `wanted`, or those of q, k, v, out, dense, fc1, fc2 that there are, or DistilBERT's.

    Args:
        model: the classifier.
        wanted: last components of names, with commas; or nothing.

    Raises:
        ValueError: the model has no linear layer of some wanted name, or none of the lists.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    has = f"the linear layers of {type(model).__name__} are {', '.join(sorted(linear - set(HEADS)))}"
    names = list(dict.fromkeys(name for name in (part.strip() for part in wanted.split(",")) if name))
    for name in names:
        if name in HEADS:
            raise ValueError(f"target_modules: {name} is the head, which is trained in full; {has}")
        if name not in linear:
            raise ValueError(f"target_modules: there is no {name}; {has}")
    if names:
        return names
    for several in (GENERIC, DISTILBERT):
        found = [name for name in several if name in linear and name not in HEADS]
        if found:
            return found
    raise ValueError(f"give --target_modules: {has}")


class _Reapply(TrainerCallback):  # type: ignore[misc]
    """Pruned channels at zero after every step of the optimizer, whatever it remembers or decays."""

    def __init__(self, mask: ChannelMask) -> None:
        self.mask = mask

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.mask.apply()


def _phase(
    model: Any,
    tokenizer: Any,
    data: Sequence[list[Row]],
    options: PruneFinetuneOptions,
    epochs: float,
    mask: ChannelMask | None = None,
    optimizer: Any = None,
) -> tuple[float, float, Any]:
    """A phase of training; gives the accuracy after it, its time in seconds, and its optimizer."""
    cuda = torch.cuda.is_available()
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=options.train_bsz,
            per_device_eval_batch_size=options.eval_bsz,
            learning_rate=options.lr,
            weight_decay=options.weight_decay,
            seed=options.seed,
            fp16=cuda,
            dataloader_pin_memory=cuda,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
            callbacks=[] if mask is None else [_Reapply(mask)],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        start = perf_counter()
        if epochs:
            trainer.train()
        seconds = perf_counter() - start
        return float(trainer.evaluate()["eval_accuracy"]), seconds, getattr(trainer.optimizer, "optimizer", None)


def _accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))}


def check_results(path: Path) -> None:
    """Refuse, before the work, a results.csv to which a row cannot be appended.

    Raises:
        ValueError: it has other columns.
        OSError: its folder, or the nearest above that exists, is none, or not one that may be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with TemporaryFile(dir=folder):
        pass
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            header = file.readline().rstrip("\n")
        if header and header != ",".join(COLUMNS):
            raise ValueError(f"{path} has other columns: {header}; choose another --out_dir")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row in one write, below the header; several runs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        file.write(to_csv(COLUMNS, [row], header=not file.tell()))


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, 2)
        yield file


def as_text(result: Mapping[str, Any]) -> str:
    """What came out, in two lines."""
    kept = f"{result['effective_r']} of {result['lora_r']} channels kept in {len(result['kept'])} modules"
    return (
        f"accuracy {result['acc_before']:.4f} before pruning, {result['acc_after']:.4f} after it and training on "
        f"({result['delta_acc']:+.4f})\n{result['method']}: {kept} -> {result['out_dir']}"
    )
