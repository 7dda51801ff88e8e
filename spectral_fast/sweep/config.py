"""One configuration of a sweep: every key checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.calibration.options import CalibrationOptions
from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions, HumanEvalOptions
from spectral_fast.options import check, nearest, option, take
from spectral_fast.policies import POLICIES, Policy
from spectral_fast.sweep.files import LISTS, read_configs

BASELINE = "baseline"
TASKS = {"gsm8k_full": "gsm8k", "gsm8k": "gsm8k", "humaneval_full": "humaneval", "humaneval": "humaneval"}
Evaluation = EvaluationOptions | HumanEvalOptions
EVALUATIONS: dict[str, type[EvaluationOptions] | type[HumanEvalOptions]] = {
    "gsm8k": EvaluationOptions,
    "humaneval": HumanEvalOptions,
}


@dataclass(frozen=True)
class Keys:
    """The keys of a configuration that are not those of a policy, a selection, a calibration or an evaluation."""

    task: str = option("gsm8k_full", "what to evaluate on", choices=tuple(TASKS))
    base_model: str | None = option(None, "folder or hub name of the base model")
    lora_repo_id: str | None = option(None, "hub name of the adapter, and what tables call it")
    lora_local_path: str | None = option(None, "folder of the adapter")
    edit_mode: str = option("abs_select", "policy, or baseline for the adapter as it is", choices=(BASELINE, *POLICIES))
    seed: int = option(0, "of random_index, and of the sampling if any", low=0, high=2**32 - 1)
    keep_adapter: bool = option(False, "keep the edited adapter")
    notes: str = option("", "whatever the user wants to remember")
    eval_profile: str | None = option(None, "named settings of the evaluation", choices=tuple(PROFILES))
    out_dir: str | None = option(None, "has no effect here")
    run_root: str | None = option(None, "has no effect here")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Config:
    """A configuration, understood.

    Attributes:
        where: where it stands, for messages.
        task: gsm8k or humaneval.
        base_model: folder or hub name.
        lora: folder or hub name of the adapter.
        label: what tables call the adapter.
        policy: None for the adapter as it is.
        selection: which modules are edited.
        calibration: None if the policy needs none.
        evaluation: problems and decoding.
        profile: its name, if the decoding has one.
        seed: of the configuration; the policy's own seed is in the policy.
        keep_adapter: whether the edited adapter stays.
        notes: as given.
    """

    where: str
    task: str
    base_model: str
    lora: str
    label: str
    policy: Policy | None
    selection: SelectionOptions
    calibration: CalibrationOptions | None
    evaluation: Evaluation
    profile: str | None
    seed: int = 0
    keep_adapter: bool = False
    notes: str = ""

    @property
    def mode(self) -> str:
        """The name of the policy."""
        return BASELINE if self.policy is None else self.policy.mode

    @property
    def greedy(self) -> bool:
        """Whether the seed makes no difference to the texts."""
        return (self.evaluation if self.profile is None else PROFILES[self.profile]).temperature == 0

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What can differ between the variants of one adapter: those of the policy, modules, calibration."""
        if self.policy is None:
            return {}
        own = {"edit_mode": self.mode, **asdict(self.policy), **asdict(self.selection)}
        if self.calibration is None:
            return own
        return {**own, **asdict(self.calibration), "calib_samples": self.calibration.limit}

    @property
    def circumstances(self) -> dict[str, Any]:
        """What else can make two runs of one policy differ: the base model, and how they are evaluated."""
        own = {"base_model": self.base_model, "eval_profile": self.profile}
        own |= {eval_key(name): value for name, value in asdict(self.evaluation).items()}
        return own if self.greedy else {**own, "sampling_seed": self.seed}

    @property
    def metric(self) -> str:
        """The name of the score."""
        return f"pass@{self.evaluation.pass_k}" if isinstance(self.evaluation, HumanEvalOptions) else "accuracy"


@cache
def known_keys() -> frozenset[str]:
    """Every key that a configuration may have."""
    names = {f.name for cls in (Keys, SelectionOptions, CalibrationOptions, *POLICIES.values()) for f in fields(cls)}
    return frozenset(names | {eval_key(f.name) for cls in EVALUATIONS.values() for f in fields(cls)})


def parse(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Check one configuration.

    Args:
        where: where it stands.
        given: its keys. A null stands for a key that is not given. Keys of another mode or task are allowed, as
            the method's own files have them, and have no effect.
        defaults: values for keys that are not given.

    Raises:
        ValueError: an unknown key, with what may be meant; a value of the wrong type, out of range, or missing.
    """
    unknown = [key for key in given if key not in known_keys()]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}{nearest(str(unknown[0]), known_keys())}")
    values = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    for key in LISTS:
        if key in values:
            values[key] = _strings(where, key, values[key])
    try:
        return _parse(where, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def load_configs(path: Path | str, defaults: Mapping[str, Any] | None = None) -> list[Config]:
    """All configurations of a file, checked; see `read_configs` and `parse`.

    Args:
        path: JSON lines, a configuration each; or YAML, where lists stand for each of their items.
        defaults: values for keys that a configuration does not have.

    Returns:
        One per configuration, in the file's order, combinations of a grid spelt out.

    Raises:
        FileNotFoundError, ValueError: naming up to five of the configurations that are wrong.

    Example:
        >>> from pathlib import Path
        >>> from spectral_fast.sweep import Config, load_configs
        >>> _ = Path("grid.yaml").write_text("edit_mode: [abs_select, smooth_abs]")
        >>> configs: list[Config] = load_configs("grid.yaml", {"base_model": "BASE", "lora_local_path": "ADAPTER"})
        >>> [config.mode for config in configs]
        ['abs_select', 'smooth_abs']
    """
    configs, wrong = [], []
    for where, given in read_configs(path):
        try:
            configs.append(parse(where, given, defaults or {}))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        wrong = list(dict.fromkeys(wrong))
        raise ValueError("\n".join([*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])]))
    return configs


def _parse(where: str, values: Mapping[str, Any]) -> Config:
    keys = take(Keys, values)
    lora = keys.lora_local_path or keys.lora_repo_id
    if lora is None:
        raise ValueError("no adapter: give lora_local_path or lora_repo_id")
    if keys.base_model is None:
        raise ValueError("no base model: give base_model, or --base_model for all")
    task = TASKS[keys.task]
    if keys.eval_profile is not None and PROFILES[keys.eval_profile].task != task:
        raise ValueError(f"profile {keys.eval_profile} is one of {PROFILES[keys.eval_profile].task}, not of {task}")
    policy = None if keys.edit_mode == BASELINE else take(POLICIES[keys.edit_mode], values)
    return Config(
        where=where,
        task=task,
        base_model=keys.base_model,
        lora=lora,
        label=keys.lora_repo_id or lora,
        policy=policy,
        selection=take(SelectionOptions, values),
        calibration=take(CalibrationOptions, values) if policy and policy.needs_sensitivity else None,
        evaluation=take(EVALUATIONS[task], values, prefix="eval_"),
        profile=keys.eval_profile,
        seed=keys.seed,
        keep_adapter=keys.keep_adapter,
        notes=keys.notes,
    )


def _strings(where: str, key: str, value: Any) -> list[str]:
    values: Sequence[Any] = [value] if isinstance(value, str) else list(value)
    if not values or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{where}: {key} must be a list of names; got {value!r}")
    return list(values)


def eval_key(name: str) -> str:
    """The key of a field of an evaluation's options."""
    return name if name.startswith("eval_") else f"eval_{name}"
