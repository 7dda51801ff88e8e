"""Results of evaluations, of the very files that are published: by the hashes that every result has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_fast.evaluation.evaluate import METRICS
from spectral_fast.publish.making import HUB_NAMES, Record, Step, read_json
from spectral_fast.publish.paths import without_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CONFIGS = "eval_config*.json"  # of one evaluation
SWEEP, RUNS = "results.json", "runs"  # of a sweep, beside the folder with its runs
_NAMES = {"openai/gsm8k": "GSM8K", "openai/openai_humaneval": "HumanEval"}


@dataclass
class Figures:
    """All results that were found: of the adapter, of what it was made from, comparisons, files with other weights'."""

    own: list[EvalResult] = field(default_factory=list)
    source: list[EvalResult] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def find(folder: Path, results: Sequence[Path], hashes: Mapping[str, str], steps: Sequence[Step]) -> Figures:
    """The results that are of an adapter, or of what it was made from.

    Those of a sweep are around its adapter; `hashes` are of the adapter's config and weights, by name.

    Raises:
        FileNotFoundError: one of `results` is no folder.
        ValueError: a file is broken, or is no result of spectral_fast.
    """
    for path in results:
        if not path.is_dir():
            raise FileNotFoundError(f"results are a folder that eval, eval-humaneval or sweep wrote; {path} is none")
    found, sources = Figures(), {sha for step in steps for sha in step.sources}
    named = [folder.resolve(), *(path.resolve() for path in results)]
    above = named[0].parent
    sweep = [above.parent.parent] if above.parent.name == RUNS else []
    files = [file for path in [*named, above] for file in sorted(path.glob(CONFIGS))]
    files += [file for path in [*named, *sweep] for file in sorted(path.glob(f"{RUNS}/*/{CONFIGS}"))]
    for file in dict.fromkeys(files):
        record = without_paths(read_json(file))
        try:
            of, result = record["meta"].get("adapter_files_sha256") or {}, _result(record)
            own = of == dict(hashes)
            if own or sha256("".join(of.values()).encode()).hexdigest() in sources:
                known = found.own if own else found.source
                known += [result] * (result not in known)
                found.compared += _compared(file, str(result.dataset_name)) if own else []
            elif file.parent in named:
                found.others.append(file)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is no result of spectral_fast ({type(error).__name__}: {error}): remove it"
            ) from error
    return found


def _result(record: Record) -> EvalResult:
    """An entry of a model-index, from a file eval_config.json."""
    from huggingface_hub import EvalResult

    meta, metric, decoding = record["meta"], record["metric"], record["decoding"]
    given = str(meta.get("eval_data") or f"problems like {record['task']}")
    data = HUB_NAMES.get(given, given)
    arguments = {
        "num_few_shot": record["num_fewshot"],
        "problems": int(metric.get("total") or record["total_tasks"]),
        "standard_error": float(metric["standard_error"]),
        "engine": record["engine"],
        "dtype": record["engine_settings"].get("dtype"),
        "profile": meta.get("profile"),
        "answer_parser": record.get("answer_parser"),
        "generations": decoding["n_generations"],
        "temperature": decoding["temperature"],
        "max_tokens": decoding["max_tokens"],
        "seed": meta.get("seed"),
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=data.removeprefix("./"),
        dataset_name=_NAMES.get(data, data),
        dataset_split=record["split"],
        metric_type=metric["name"].replace("strict_match_accuracy", "accuracy"),
        metric_value=float(metric["score"]),
        metric_args={name: value for name, value in arguments.items() if value is not None},
    )


def _compared(file: Path, data: str) -> Iterator[str]:
    """What `edit --eval_gsm8k` or a sweep says of the same problems before and after."""
    metrics, sweep = file.with_name(METRICS), file.parent.parent.parent / SWEEP
    control, place = None, ""
    if file.stem == "eval_config_edited" and metrics.is_file():
        comparison = without_paths(read_json(metrics))["comparison"]
        verdict = comparison["verdict"]
    elif file.parent.parent.name == RUNS and sweep.is_file():
        runs = without_paths(read_json(sweep))["runs"]
        run = next((run for run in runs if run["run"] == file.parent.name), None)
        if run is None or run["comparison"] is None:
            return
        comparison, control = run["comparison"], run["random_controls"]
        verdict = run["verdict"] or "a random control"
        place = f", one of {sum(one['role'] == 'variant' for one in runs)} variants of a sweep"
        if run["p_holm"] is not None:
            verdict += f" (p = {run['p_holm']:.3g} after Holm's correction over all variants)"
    else:
        return
    low, high = (f"{100 * x:+.2f}" for x in comparison["interval"])
    yield (
        f"{data}{place}: {100 * comparison['difference']:+.2f} points against the original on the same "
        f"{comparison['n']:,} problems (95 % interval {low} to {high}, {comparison['test']} "
        f"p = {comparison['p_value']:.3g}): {verdict}. "
    ) + (
        f"{control['controls']} random edits of the same size came to {100 * control['lowest']:+.2f} to "
        f"{100 * control['highest']:+.2f} points."
        if control
        else "What random edits of this size would have done was not measured."
    )
