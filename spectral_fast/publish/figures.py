"""Results of evaluations, of the very files that are published: by the hashes that every result has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_fast.evaluation.evaluate import METRICS
from spectral_fast.publish.paths import LOCAL, hub_name
from spectral_fast.publish.records import HUB_NAMES, Record, read_record

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CONFIGS = "eval_config*.json"  # of one evaluation
SWEEP, RUNS = "results.json", "runs"  # of a sweep, beside the folder with its runs
_METRICS = {"strict_match_accuracy": "accuracy"}
_NO_CONTROL = "What random edits of this size would have done was not measured"
_NAMES = {"openai/gsm8k": "GSM8K", "openai/openai_humaneval": "HumanEval"}


@dataclass(frozen=True)
class Figure:
    """One result of one adapter.

    Attributes:
        task: gsm8k or humaneval.
        data: the data set as the record names it.
        metric: accuracy or pass@k.
        value: a fraction.
        error: its standard error.
        problems: how many.
        settings: how it was decoded and read, for people.
        arguments: the same for machines.
    """

    task: str
    data: str
    split: str
    metric: str
    value: float
    error: float
    problems: int
    settings: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, record: Record) -> Figure:
        """From a file eval_config.json."""
        meta, metric, decoding = record["meta"], record["metric"], record["decoding"]
        data = str(meta.get("eval_data") or f"problems like {record['task']}")
        arguments = {
            "num_few_shot": record["num_fewshot"],
            "problems": metric.get("total") or record["total_tasks"],
            "standard_error": metric["standard_error"],
            "engine": record["engine"],
            "dtype": record["engine_settings"].get("dtype"),
            "profile": meta.get("profile"),
            "answer_parser": record.get("answer_parser"),
            "generations": decoding["n_generations"],
            "temperature": decoding["temperature"],
            "max_tokens": decoding["max_tokens"],
            "seed": meta.get("seed"),
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        how = "greedy" if decoding["strategy"] == "greedy" else f"temperature {decoding['temperature']:g}"
        parts = [
            *([f"profile `{arguments['profile']}`"] if "profile" in arguments else []),
            f"{record['num_fewshot']}-shot, {how}, at most {decoding['max_tokens']} tokens",
            *([f"{decoding['n_generations']} programs per problem"] if decoding["n_generations"] > 1 else []),
            *([f"answers by `{record['answer_parser']}`"] if "answer_parser" in record else []),
            f"{record['engine']} {record['engine_settings'].get('dtype', '')}".strip(),
        ]
        return cls(
            record["task"],
            HUB_NAMES.get(data, data),
            record["split"],
            _METRICS.get(metric["name"], metric["name"]),
            metric["score"],
            metric["standard_error"],
            arguments["problems"],
            "; ".join(parts),
            arguments,
        )

    @property
    def dataset(self) -> str:
        """The data set for people."""
        return _NAMES.get(self.data, self.data.removesuffix(LOCAL) + " (a local file)" * self.data.endswith(LOCAL))

    def eval_result(self) -> EvalResult:
        """The entry of a model-index."""
        from huggingface_hub import EvalResult

        return EvalResult(
            task_type="text-generation",
            dataset_type=hub_name(self.data) or self.data.removesuffix(LOCAL),
            dataset_name=self.dataset,
            dataset_split=self.split,
            metric_type=self.metric,
            metric_value=self.value,
            metric_name=f"{self.metric} ({self.settings})",
            metric_args=dict(self.arguments),
        )


@dataclass
class Figures:
    """All results that were found.

    Attributes:
        own: of the adapter.
        source: of one that it was made from.
        compared: what comparisons on the same problems say.
        others: files with results of other weights.
    """

    own: list[Figure] = field(default_factory=list)
    source: list[Figure] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def find(folder: Path, results: Iterable[Path], hashes: Mapping[str, str], sources: Sequence[str]) -> Figures:
    """The results that are of an adapter, or of what it was made from.

    Args:
        folder: the adapter's; a sweep leaves its results in the one above.
        results: more folders with results; of a sweep, its own will do.
        hashes: name -> SHA-256 of the adapter's config and of its weights.
        sources: fingerprints of the adapters that it was made from.

    Raises:
        FileNotFoundError: one of `results` is no folder.
        ValueError: a file is broken, or is no result of spectral_fast.
    """
    found = Figures()
    named = [folder.resolve(), *(path.resolve() for path in results)]
    for path in named:
        if not path.is_dir():
            raise FileNotFoundError(f"results are a folder that eval, eval-humaneval or sweep wrote; {path} is none")
    above = folder.resolve().parent
    sweeps = [*named, *([above.parent.parent] if above.parent.name == RUNS else [])]
    files = [file for path in [*named, above] for file in sorted(path.glob(CONFIGS))]
    files += [file for path in sweeps for file in sorted(path.glob(f"{RUNS}/*/{CONFIGS}"))]
    for file in dict.fromkeys(files):
        record = read_record(file)
        try:
            known = _add(found, file, record, hashes, sources)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is no result of spectral_fast ({type(error).__name__}: {error}): remove it"
            ) from error
        if not known and file.parent in named:
            found.others.append(file)
    return found


def _add(found: Figures, file: Path, record: Record, hashes: Mapping[str, str], sources: Sequence[str]) -> bool:
    of = record["meta"].get("adapter_files_sha256") or {}
    own = of == dict(hashes)
    if not own and sha256("".join(of.values()).encode()).hexdigest() not in sources:
        return False
    figure, figures = Figure.of(record), found.own if own else found.source
    if figure not in figures:
        figures.append(figure)
    if own:
        found.compared += [*_edits(file, figure), *_sweeps(file)]
    return True


def _edits(file: Path, figure: Figure) -> list[str]:
    """What `edit --eval_gsm8k` compared."""
    metrics = file.with_name(METRICS)
    if not metrics.is_file() or figure.task != "gsm8k" or file.stem != "eval_config_edited":
        return []
    comparison = read_record(metrics)["comparison"]
    return [f"{figure.dataset}: {_difference(comparison)}; {comparison['verdict']}. {_NO_CONTROL}."]


def _sweeps(file: Path) -> list[str]:
    """What a sweep compared: with the original, and with random edits."""
    results = file.parent.parent.with_name(SWEEP)
    if file.parent.parent.name != RUNS or not results.is_file():
        return []
    content = read_record(results)
    run = next((run for run in content["runs"] if run["run"] == file.parent.name), None)
    if run is None or run["comparison"] is None:
        return []
    difference, control = _difference(run["comparison"]), run["random_controls"]
    if run["role"] != "variant":
        return [f"In a sweep, as a random control: {difference}."]
    text = f"In a sweep of {sum(one['role'] == 'variant' for one in content['runs'])} variants: {difference}"
    if run["p_holm"] is not None:
        text += f"; p = {run['p_holm']:.3g} after Holm's correction over them"
    if control is not None:
        span = " to ".join(f"{100 * control[name]:+.2f}" for name in ("lowest", "highest"))
        text += (
            f". {control['controls']} random edits of the same size came to {span} points, "
            f"{100 * control['mean']:+.2f} on average"
        )
    else:
        text += f". {_NO_CONTROL}"
    return [f"{text}. {run['verdict'][:1].upper()}{run['verdict'][1:]}."]


def _difference(comparison: Record) -> str:
    low, high = comparison["interval"]
    return (
        f"{100 * comparison['difference']:+.2f} points against the original on the same {comparison['n']:,} problems "
        f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f}, {comparison['test']} p = {comparison['p_value']:.3g})"
    )
