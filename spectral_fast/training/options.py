"""The settings of a training: the fields of these classes are the keys of the YAML file, and the flags."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from spectral_fast.calibration.options import DTYPES, ModelOptions
from spectral_fast.options import check, option
from spectral_fast.training.gate.names import KINDS, MODES, SOURCE

if TYPE_CHECKING:
    from spectral_fast.training.gate.base import Gate

ALL_LINEAR = "all-linear"  # PEFT's name


@dataclass(frozen=True)
class LoraModelConfig:
    """The base model, and what is trained on it."""

    model_name_or_path: str | None = option(None, "base model: a folder or a Hugging Face name")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    attn_implementation: str | None = option(
        None, "e.g. sdpa, eager or flash_attention_2", shown="transformers' choice"
    )
    dtype: str = option(
        "auto",
        "type of the base weights; auto is the checkpoint's own on a GPU, fp32 on a CPU",
        choices=("auto", *DTYPES),
    )
    cache_dir: str | None = option(None, "cache folder for downloads from the Hugging Face hub, and for data sets")
    use_peft: bool = option(True, "train a LoRA adapter; without one, all weights")
    use_qlora: bool = option(False, "hold the base weights in 4 bits (in 8 with --load_in_8bit)")
    use_rslora: bool = option(False, "scale an update by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = option(False, "weight-decomposed LoRA: a magnitude per output is trained, too")
    lora_r: int = option(16, "rank", low=1)
    lora_alpha: int = option(32, "alpha, of the scaling alpha / r", low=1)
    lora_dropout: float = option(0.05, "dropout before A", low=0.0, high=0.99)
    lora_target_modules: tuple[str, ...] = option(
        (), "last name components of the modules to adapt", shown="all-linear, all but the head"
    )
    lora_modules_to_save: tuple[str, ...] = option((), "names of modules to train whole, beside the adapter")
    lora_task_type: str = option("CAUSAL_LM", "PEFT's name of the task", choices=("CAUSAL_LM",))
    load_in_8bit: bool = option(False, "hold the base weights in bitsandbytes' 8 bits")
    load_in_4bit: bool = option(False, "hold the base weights in bitsandbytes' 4 bits")
    bnb_4bit_quant_type: str = option("nf4", "the kind of 4 bits", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = option(False, "quantise the scales of the 4 bits, too")

    def __post_init__(self) -> None:
        check(self)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; leave out one of the two")
        needs_peft = ("use_qlora", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit")
        given = [name for name in needs_peft if getattr(self, name)]
        if given and not self.use_peft:
            raise ValueError(f"{given[0]} is for an adapter, and use_peft is off; leave out one of the two")

    @property
    def name(self) -> str:
        """Folder or hub name of the base model.

        Raises:
            ValueError: there is none.
        """
        if self.model_name_or_path is None:
            raise ValueError("no base model: give model_name_or_path, in the file or as a flag")
        return self.model_name_or_path

    @property
    def adapts_all(self) -> bool:
        """Whether every linear layer is adapted but the head."""
        return self.lora_target_modules in ((), (ALL_LINEAR,))

    @property
    def bits(self) -> int | None:
        """Of a base weight, if it is to be quantised."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit or self.use_qlora else None

    def loading(self) -> ModelOptions:
        """How the project's own loader shall load it."""
        return ModelOptions(dtype=self.dtype, cache_dir=self.cache_dir, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class DataArguments:
    """What to train on."""

    train_dataset_path: str | None = option(
        None, "a .parquet or .jsonl file, a folder with one named after the split, or a Hugging Face name"
    )
    val_dataset_path: str | None = option(None, "the same for the loss on held-out data")
    dataset_config: str | None = option(None, "configuration of a data set of the hub, e.g. main")
    train_split: str = option("train", "split of a folder or of a data set of the hub")
    val_split: str = option("val", "the same for the held-out data")
    train_samples: int | None = option(None, "rows to take, from the first on", low=1, shown="all")
    val_samples: int | None = option(None, "held-out rows to take, from the first on", low=1, shown="all")
    question_column: str = option("question", "column with the question")
    answer_column: str = option("answer", "column with the answer, whose tokens are the labels")

    def __post_init__(self) -> None:
        check(self)

    @property
    def source(self) -> str:
        """Where the rows to train on are.

        Raises:
            ValueError: that is not said.
        """
        if self.train_dataset_path is None:
            raise ValueError("no data: give train_dataset_path, in the file or as a flag")
        return self.train_dataset_path


@dataclass(frozen=True)
class LoggingArguments:
    """What is told of a run, beside the trainer's own logs."""

    system_monitor: bool = option(False, "record the use of processor, memory and GPUs once per second")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class GateArguments:
    """A gate before the backward pass: which micro-batches are learned from. As flags, all begin with slora_."""

    enable: bool = option(False, "ask a gate before each backward pass")
    gate: str = option("novelty", "what it looks at; random is a control", choices=KINDS)
    target_novelty: float = option(0.3, "share of micro-batches to accept, by any gate", positive=True, high=1.0)
    burn_in: int = option(2000, "micro-batches that are all accepted at first", low=0)
    seed: int = option(0, "seed of the gate's hashes and draws", low=0, high=2**32 - 1)
    m: int = option(512, "length of a gradient's sketch", low=1)
    k: int = option(64, "most directions that are remembered", low=1)
    target_novelty_scaler: float = option(10.0, "how sharply novelty decides", positive=True)
    novelty_ema_rate: float = option(0.01, "step of the threshold on novelty", low=0.0)
    reorth_every: int = option(128, "updates after which the directions' rounding errors are taken off", low=1)
    k_topk: int = option(64, "largest logits of a token that its error is made of", low=1)
    fd_mode: str | None = option(
        None, "Frequent Directions, or the original's without weights", choices=MODES, shown="liberty"
    )
    compat: str | None = option(None, "source for all choices of the original", choices=(SOURCE,))
    max_optimizer_steps: int | None = option(
        None,
        "optimizer steps to end after, and over which the learning rate's schedule goes",
        low=1,
        shown="max_steps",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.k > self.m:
            raise ValueError(f"there are at most m directions: k must be <= m = {self.m}; got {self.k}")
        if self.target_novelty == 1 and self.gate in ("loss_floor", "both"):
            raise ValueError("no loss is below a floor that lets all pass: target_novelty must be < 1; got 1.0")

    def check_burn_in(self, micro_batches: int, source: str) -> None:
        """Refuse a training that is over before the gate decides anything.

        Raises:
            ValueError: naming both numbers.
        """
        if self.enable and micro_batches <= self.burn_in:
            raise ValueError(
                f"slora_burn_in = {self.burn_in} micro-batches are all accepted, and {source} gives {micro_batches}: "
                "the gate would never decide; lower slora_burn_in"
            )

    def open(self, d_hidden: int, vocab_size: int) -> Gate:
        """The gate for an output embedding of these sizes."""
        from spectral_fast.training.gate.opening import open_gate

        given = asdict(self)
        kind, _, _ = given.pop("gate"), given.pop("enable"), given.pop("max_optimizer_steps")
        return open_gate(kind, d_hidden, vocab_size, **given)
