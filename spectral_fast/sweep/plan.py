"""What a sweep has to do: distinct runs, the baselines and random controls that they are compared with, the probes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from spectral_fast.adapter import Adapter, LoraModule, resolve
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.probe import SPLIT
from spectral_fast.calibration.rows import GSM8K, data_file, read_rows
from spectral_fast.evaluation.adapters import make_task
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.evaluation.evaluate import Task
from spectral_fast.policies import RandomIndex, matched_control
from spectral_fast.provenance import sha256_file
from spectral_fast.sweep.config import Config

CONTROLS = 5
SAMPLED = 2**24  # bytes of a file of the base model that are hashed whole

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """An adapter that is edited, opened, with its hash."""

    adapter: Adapter
    fingerprint: str
    stamp: Mapping[str, Any]

    def check_unchanged(self, planned: str | None = None) -> None:
        """Refuse to go on with other files than those that were hashed, here or (`planned`) where the plan was made.

        Raises:
            OSError: they have been written to.
        """
        if self.adapter.stamp() != self.stamp or planned not in (None, self.fingerprint):
            raise OSError(f"{self.adapter.path} was changed while the sweep ran; start the sweep again")


@dataclass(frozen=True)
class Run:
    """One adapter to make and evaluate.

    Attributes:
        id: hash of all that decides the result, `identity`.
        identity: JSON.
        config: the first configuration that wants it.
        role: baseline, variant or control.
        probe: id of the probe that it needs, or None.
        group: id of what its problems and decoding are; runs of one group are compared, and evaluated together.
        family: id without the seed of `random_index`: of a control, which controls are its like.
    """

    id: str
    identity: Mapping[str, Any]
    config: Config
    role: str
    probe: str | None
    group: str
    family: str

    @property
    def keeps_adapter(self) -> bool:
        """Whether the adapter that it makes stays."""
        return self.config.keep_adapter and self.config.policy is not None


@dataclass(frozen=True)
class Probe:
    """Sensitivities that several runs share: of all the modules that any of them edits."""

    config: Config
    modules: frozenset[str]


@dataclass
class Plan:
    """A sweep, checked.

    Attributes:
        lines: (configuration, its run's id) in the file's order.
        runs: id -> run, in the order in which they are to be done: group by group, baselines first.
        probes: id -> probe.
        baseline_of: run id -> id of the baseline that it is compared with.
        controls_of: variant's id -> ids of its random controls.
    """

    lines: list[tuple[Config, str]] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    baseline_of: dict[str, str] = field(default_factory=dict)
    controls_of: dict[str, list[str]] = field(default_factory=dict)

    def of_role(self, role: str) -> list[Run]:
        """The runs of one role."""
        return [run for run in self.runs.values() if run.role == role]

    def groups(self, done: Iterable[str], size: int) -> list[list[Run]]:
        """The runs that are not done, in groups that can share an engine's call, at most `size` each.

        A group is finished as a whole or not at all, so the groups of a sweep that goes on are those that it had.
        """
        finished, by_group = set(done), dict[str, list[Run]]()
        for run in self.runs.values():
            if run.id not in finished:
                by_group.setdefault(run.group, []).append(run)
        return [some[i : i + size] for some in by_group.values() for i in range(0, len(some), size)]


class Planner:
    """Opens each adapter and each data set once, and names runs by what decides their results."""

    def __init__(self, models: ModelOptions, engine: EngineOptions) -> None:
        self._models, self._engine = models, engine
        self._memory: dict[Any, Any] = {}

    def plan(self, configs: Sequence[Config], controls: int = CONTROLS) -> Plan:
        """The runs of the configurations, each once, with what they are compared with.

        Args:
            configs: parsed.
            controls: seeds of `random_index` with the counts and factors of each variant; 0 adds none.

        Raises:
            FileNotFoundError, RuntimeError, ValueError: an adapter, a model or data that cannot be used, naming the
                configuration.
        """
        plan, first = Plan(), [self._run(config) for config in configs]
        plan.lines = [(config, run.id) for config, run in zip(configs, first, strict=True)]
        found: dict[str, Run] = {}
        for run in first:
            baseline = self._run(replace(run.config, policy=None, calibration=None, keep_adapter=False))
            found.setdefault(baseline.id, baseline)
            if run.config.keep_adapter or run.id not in found:
                found[run.id] = run
            plan.baseline_of[run.id] = baseline.id
        given = [run for run in found.values() if run.role == "control"]
        for variant in [run for run in found.values() if run.role == "variant"]:
            like = self._control(variant, seed=1)
            mine = [run.id for run in given if run.family == like.family]
            for seed in range(1, controls + 1):
                like = self._control(variant, seed)
                if len(mine) < controls and like.id not in mine:
                    mine.append(found.setdefault(like.id, like).id)
                    plan.baseline_of[like.id] = plan.baseline_of[variant.id]
            plan.controls_of[variant.id] = mine
        order = {group: i for i, group in enumerate(dict.fromkeys(run.group for run in found.values()))}
        plan.runs = {run.id: run for run in sorted(found.values(), key=lambda run: order[run.group])}
        for run in plan.runs.values():
            if run.probe is not None:
                names = frozenset(module.name for module in self.modules(run.config))
                earlier = plan.probes.get(run.probe)
                plan.probes[run.probe] = Probe(
                    earlier.config if earlier else run.config, names | (earlier.modules if earlier else frozenset())
                )
        return plan

    def source(self, config: Config) -> Source:
        """The adapter of a configuration."""

        def opened() -> Source:
            folder = resolve(config.lora, self._models.cache_dir)
            s = config.selection
            adapter = Adapter.open(
                folder,
                adapter_name=s.adapter_name,
                include_conv=s.include_conv,
                include_embedding=s.include_embedding,
            )
            stamp = adapter.stamp()
            return Source(adapter, adapter.fingerprint(), stamp)

        s = config.selection
        return self._once(("adapter", config.lora, s.adapter_name, s.include_conv, s.include_embedding), opened)

    def modules(self, config: Config) -> list[LoraModule]:
        """The modules that a configuration edits."""
        s = config.selection
        return self.source(config).adapter.select(s.target_modules, s.layer_min, s.layer_max)

    def task(self, config: Config) -> Task:
        """Problems and decoding of a configuration."""
        seed = 0 if config.greedy else config.seed
        key = ("task", config.task, config.evaluation, config.profile, seed)
        return self._once(key, lambda: make_task(config.evaluation, config.profile, seed))

    def _control(self, variant: Run, seed: int) -> Run:
        policy = variant.config.policy
        assert policy is not None
        like = matched_control(policy, seed)
        return self._run(replace(variant.config, policy=like, calibration=None, keep_adapter=False, notes=""))

    def _run(self, config: Config) -> Run:
        try:
            source, task = self.source(config), self.task(config)
            modules = [] if config.policy is None else [module.name for module in self.modules(config)]
            base = self._once(("base", config.base_model), lambda: _base_identity(config.base_model))
            calibration = self._calibration(config)
            group = {
                "base_model": base,
                "dtype": self._models.dtype,
                "engine": self._engine.chosen(),
                "adapter_sha256": source.fingerprint,
                "adapter_name": config.selection.adapter_name,
                "task": config.task,
                "prompts_sha256": self._once(("prompts", id(task)), lambda: _hash([list(task.prompts), repr(task)])),
                "sampling": asdict(task.sampling),
            }
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{config.where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{config.where}: {error}") from error
        policy = None if config.policy is None else {"mode": config.mode, **asdict(config.policy)}
        if policy is not None and calibration is None:
            del policy["grad_norm"]  # which has no effect without g
        identity = {**group, "policy": policy, "modules": modules, "calibration": calibration}
        role = "baseline" if policy is None else "control" if config.mode == RandomIndex.mode else "variant"
        probe = None
        if calibration is not None:
            s = config.selection
            opened = [source.fingerprint, s.adapter_name, s.include_conv, s.include_embedding]
            settled = modules if calibration["until_stable"] else None  # by which the number of samples is decided
            probe = _hash([calibration, base, self._models.dtype, opened, settled])
        alike = {**identity, "policy": {**policy, "seed": None} if role == "control" and policy else policy}
        return Run(_hash(identity), identity, config, role, probe, _hash(group), _hash(alike))

    def _calibration(self, config: Config) -> dict[str, Any] | None:
        data = config.calibration
        if data is None:
            return None
        return self._once(
            ("calibration", data),
            lambda: {**asdict(data), "calib_data": _data_identity(data), "calib_samples": data.limit},
        )

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._memory:
            self._memory[key] = make()
        found: T = self._memory[key]
        return found


def _base_identity(base_model: str) -> Any:
    """What tells one base model from another without reading all of its weights: its files, large ones by samples."""
    folder = Path(base_model)
    if not folder.is_dir():
        return base_model
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{base_model} has no config.json: it is not a transformers model folder")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    return [[path.name, path.stat().st_size, _sampled(path)] for path in files]


def _sampled(path: Path) -> str:
    """Hash of a small file, or of its first bytes and of pages all over a large one: training changes every page."""
    size, digest = path.stat().st_size, sha256()
    with path.open("rb") as file:
        digest.update(file.read(SAMPLED))
        for start in range(SAMPLED, size, max(size // 256, 1)):
            file.seek(start)
            digest.update(file.read(4096))
    return digest.hexdigest()


def _data_identity(data: Any) -> str:
    columns = [data.messages_column or data.question_column, *([] if data.messages_column else [data.answer_column])]
    read_rows(data.calib_data, columns, SPLIT, 1)  # so that a wrong name is known now
    return GSM8K if data.calib_data == GSM8K else sha256_file(data_file(data.calib_data, SPLIT))


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
