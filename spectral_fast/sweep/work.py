"""The work of a sweep: probe, make variants, evaluate a group of them in one call of a running engine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from spectral_fast.atomic import replace_directory
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.probe import probe
from spectral_fast.edit import edit_adapter
from spectral_fast.evaluation.adapters import Run as Evaluation
from spectral_fast.evaluation.adapters import evaluate
from spectral_fast.evaluation.engines import Engine, EngineOptions, open_engine
from spectral_fast.evaluation.evaluate import write_json
from spectral_fast.progress import Counter
from spectral_fast.provenance import versions
from spectral_fast.sensitivity import RECORD, Sensitivity
from spectral_fast.sweep.plan import Planner, Probe, Run
from spectral_fast.sweep.tasks import read_scores

PROBES, RUNS, ADAPTER = "probes", "runs", "adapter"
OpenEngine = Callable[[str, ModelOptions, EngineOptions, Sequence[Path]], Engine]


def silent(*_: object) -> AbstractContextManager[None]:
    """A counter that shows nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share.

    Attributes:
        out_dir: its folder.
        models: device, dtype and source of base models.
        engine: what generates; `max_loras` is the size of a group.
        open_engine: starts it.
        counter: shows progress: a context from a description and a total, that may give a function of counts.
    """

    out_dir: Path | str
    models: ModelOptions = field(default_factory=ModelOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    open_engine: OpenEngine = open_engine
    counter: Counter = silent


class Worker:
    """Does a sweep's work in this process; keeps its engine from group to group while the base model is the same."""

    def __init__(self, settings: Settings, planner: Planner, adapters: Mapping[str, Sequence[Path]]) -> None:
        """Take settings, the planner with its opened adapters, and base model -> all adapters that it will get."""
        self._settings, self._planner, self._adapters = settings, planner, adapters
        self._engine: Engine | None = None
        self._base_model: str | None = None

    def probe(self, name: str, wanted: Probe) -> str | None:
        """Measure sensitivities into probes/NAME, unless they are there; returns why that failed, if it did.

        Raises:
            OSError: files cannot be read or written, which is no matter of this probe alone.
        """
        try:
            self._probe(name, wanted)
        except OSError:
            raise
        except Exception as error:
            return f"its probe failed: {_reason(error)}"
        return None

    def _probe(self, name: str, wanted: Probe) -> None:
        folder, config = Path(self._settings.out_dir, PROBES, name), wanted.config
        names = wanted.modules
        if (folder / RECORD).is_file():
            present = set(Sensitivity.load(folder).modules)
            if names <= present:
                return
            names |= present
        source = self._planner.source(config)
        source.check_unchanged()
        adapter = source.adapter
        modules = [module for module in adapter.modules.values() if module.name in names]
        measured = probe(adapter, modules, config.base_model, config.calibration, self._settings.models)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # an engine in another process wants the room
        _remove(folder)
        with replace_directory(folder) as new:
            measured.save(new)

    def evaluate(self, group: Sequence[Run], broken: Mapping[str, str]) -> dict[str, Any]:
        """Make the adapters of a group, evaluate them together, leave a folder per run; returns the ledger's entry.

        A run that fails is noted, and the others go on; where a call of the engine fails, they go on one by one, in a
        new engine if it may be broken.

        Args:
            group: of one base model, task and decoding.
            broken: probes that failed, and why.

        Raises:
            OSError: files cannot be read or written, e.g. since the disk is full.
            RuntimeError, ValueError: the engine does not start.
        """
        began = time.perf_counter()
        engine, failures = self._opened(group[0].config.base_model), list[dict[str, str]]()
        about = {"engine": engine.name, "engine_settings": dict(engine.settings)}
        try:
            records = self._together(engine, group, broken, failures)
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, ValueError):  # which an engine raises before it begins
                self.close()
            if len(group) > 1:
                alone = [self.evaluate([run], broken) for run in group]
                records = [record for entry in alone for record in entry["runs"]]
                failures = [failure for entry in alone for failure in entry["failures"]]
            else:
                records, failures = [], [{"id": group[0].id, "error": _reason(error)}]
        return {
            "runs": records,
            "failures": failures,
            "versions": versions(),
            **about,
            "seconds": round(time.perf_counter() - began, 3),
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        }

    def _together(
        self, engine: Engine, group: Sequence[Run], broken: Mapping[str, str], failures: list[dict[str, str]]
    ) -> list[dict[str, Any]]:
        """The records of a group; adapters that cannot be made are added to the failures, and left out."""
        task, made = self._planner.task(group[0].config), list[tuple[Run, Evaluation]]()
        with ExitStack() as folders:
            for run in group:
                self._planner.source(run.config).check_unchanged(run.identity["adapter_sha256"])
                try:
                    with ExitStack() as own:
                        target = Path(self._settings.out_dir, RUNS, run.id)
                        _remove(target)
                        new = own.enter_context(replace_directory(target))
                        adapter = self._adapter(run, new / ADAPTER, broken)
                        folders.enter_context(own.pop_all())
                except OSError:
                    raise
                except Exception as error:
                    failures.append({"id": run.id, "error": _reason(error)})
                    continue
                config = run.config
                meta = {
                    "base_model_id": config.base_model,
                    "eval_data": config.evaluation.eval_data,
                    "profile": config.profile,
                    "run": run.id,
                    "mode": config.mode,
                }
                made.append((run, Evaluation(adapter, new, None, meta)))
            if not made:
                return []
            results = evaluate(engine, task, [one for _, one in made], progress=self._settings.counter)
            return [self._record(run, one.out_dir, result) for (run, one), result in zip(made, results, strict=True)]

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _adapter(self, run: Run, folder: Path, broken: Mapping[str, str]) -> Path:
        """The folder of the run's adapter: the source's, or a new one."""
        config, source = run.config, self._planner.source(run.config).adapter
        if config.policy is None:
            return source.path
        if run.probe is not None and run.probe in broken:
            raise RuntimeError(broken[run.probe])
        sensitivity = None if run.probe is None else Sensitivity.load(Path(self._settings.out_dir, PROBES, run.probe))
        edit_adapter(
            source,
            config.policy,
            folder,
            modules=self._planner.modules(config),
            sensitivity=sensitivity,
            meta={**asdict(config.selection), "seed": config.seed, "lora_path": config.lora},
        )
        return folder

    def _record(self, run: Run, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
        """The run's part of the ledger; its folder is completed, and loses an adapter that nobody wants to keep."""
        if not run.keeps_adapter:
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        config = {
            "task": run.config.task,
            "base_model": run.config.base_model,
            "lora": run.config.lora,
            "role": run.role,
            "seed": run.config.seed,
            "edit_mode": run.config.mode,
            "notes": run.config.notes,
            "hyperparameters": run.config.hyperparameters,
            "identity": dict(run.identity),
        }
        metrics = {key: value for key, value in result.items() if not key.endswith("_path")}
        write_json(folder / "config.json", config)
        write_json(folder / "metrics.json", metrics)
        (folder / "adapter_ref.txt").write_text(f"{run.config.lora}\n", encoding="utf-8")
        scores = read_scores(run.config.task, folder)
        return {"id": run.id, "config": config, "metrics": metrics, "scores": scores}

    def _opened(self, base_model: str) -> Engine:
        if self._engine is None or self._base_model != base_model:
            self.close()
            s = self._settings
            self._engine = s.open_engine(base_model, s.models, s.engine, self._adapters[base_model])
            self._base_model = base_model
        return self._engine


def _remove(folder: Path) -> None:
    """Remove what is to be made again, so that no half of it is ever there under its name.

    Network file systems cannot exchange it with the new one in a step; a sweep that is killed now makes it again.
    """
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old.partial")
        folder.rename(old)
        shutil.rmtree(old)


def _reason(error: Exception) -> str:
    """The error in words, for the ledger and the tables."""
    kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return kind + (str(error) or type(error).__name__)


def group_size(engine: EngineOptions) -> int:
    """How many runs are evaluated together: with vLLM several, as that is faster; else one, as it is safe sooner."""
    return engine.max_loras or (8 if engine.chosen() == "vllm" else 1)


def with_group_size(engine: EngineOptions) -> EngineOptions:
    """The options with room for a whole group of adapters."""
    return replace(engine, max_loras=group_size(engine))
