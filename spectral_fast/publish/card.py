"""The model card of an adapter, from what its folder holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_fast.adapter import Adapter
from spectral_fast.evaluation.engines.vllm import served_rank
from spectral_fast.publish.figures import Figures, find
from spectral_fast.publish.making import Step, counted, steps
from spectral_fast.publish.paths import hub_name, text_without_paths, without_paths
from spectral_fast.splines import PEFT_TYPE

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

README = "README.md"
_OURS = "*What is above was written by spectral_fast, from the files beside it.*"
_UNFILLED = "[More Information Needed]"  # in PEFT's and TRL's form of a card
_NO_LICENSE = f"the card has no license: begin {README} in the folder with lines `---`, `license: NAME`, `---`"
# What of the source's metadata would be wrong here: its figures, and what the hub derives by itself.
_NOT_OURS = ("model-index", "metrics", "eval_results", "model_name", "base_model", "base_model_relation")
# Task of an adapter -> transformers' class of the base model, and the hub's name of the task.
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def write_card(
    adapter: Adapter, repo_id: str, base_model: str | None, results: Sequence[Path | str]
) -> tuple[ModelCard, list[str]]:
    """What an adapter is, how it was made, with which figures, and how to load it; and what its publisher should know.

    All of it comes from files: the adapter's config and weights, the records that spectral_fast's commands leave,
    results of evaluations of these very files (by their hashes), and the card in the folder, which is kept below. Of
    paths of this machine only the last part is in it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name, config, made = repo_id.rpartition("/")[2], adapter.config, steps(adapter.path)
    found = find(adapter.path, [Path(path) for path in results], adapter.hashes, made)
    source = _source(adapter.path / README)
    theirs = {key: value for key, value in vars(source.data).items() if value is not None}
    text = source.text.partition(_OURS)[2] or source.text
    named = [x for x in (base_model, config.get("base_model_name_or_path"), *_united(theirs.get("base_model"))) if x]
    base = next(filter(None, map(hub_name, named)), None)
    shown = base or next((str(without_paths(name)) for name in named), None)
    metadata = {key: value for key, value in theirs.items() if key not in _NOT_OURS}
    metadata |= {"base_model": base, "base_model_relation": "adapter"} if base else {}
    task = _TASKS.get(str(config.get("task_type")), ("", None))[1]
    metadata |= {"library_name": "peft", "pipeline_tag": task or metadata.get("pipeline_tag")}
    kinds = {"dora": config.get("use_dora"), "rslora": config.get("use_rslora"), "ls-lora": _splines(adapter)}
    tags = ["lora", "spectral_fast", *(tag for tag, on in kinds.items() if on)]
    metadata["tags"] = _united(metadata.get("tags"), [*tags, *(tag for step in made for tag in step.tags)])
    metadata["datasets"] = _united(metadata.get("datasets"), [data for step in made for data in step.datasets]) or None
    if found.own:
        metadata |= {"model_name": name, "eval_results": found.own}
    parts = [
        f"# {name}",
        *_opening(adapter, shown, base),
        *_making(made),
        *_evaluation(found),
        *_loading(adapter, repo_id, shown or "BASE_MODEL"),
    ]
    if any("`./" in part or "'./" in part for part in parts):
        parts.append("Names that begin with `./` stand for files and folders that are not on the hub.")
    below = "" if _UNFILLED in text else text_without_paths(text).strip()
    parts += [_OURS, *([below] if below else [])]
    data = ModelCardData(**without_paths(metadata), ignore_metadata_errors=True)
    card = ModelCard("\n".join(["---", data.to_yaml(), "---\n", "\n\n".join(parts), ""]))
    return card, [*_remarks(named, base, found, text), *([] if data.license else [_NO_LICENSE])]


def _source(file: Path) -> ModelCard:
    """The card in the folder; an empty one if there is none.

    Raises:
        ValueError: its front matter is no metadata of a card.
    """
    import yaml
    from huggingface_hub import ModelCard

    content = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    empty = "" if content.lstrip().startswith("---") else "---\n\n---\n"
    try:
        return ModelCard(empty + content, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: what is between its two lines --- is no metadata ({reason}): mend it") from error


def _united(theirs: Any, own: Iterable[str] = ()) -> list[str]:
    """Theirs and ours, without the tags that the hub makes of the base model, which may name a folder."""
    theirs = theirs if isinstance(theirs, list) else [theirs] if theirs else []
    return list(dict.fromkeys(x for x in [*map(str, theirs), *own] if not x.startswith("base_model:")))


def _splines(adapter: Adapter) -> bool:
    return bool(adapter.config["peft_type"] == PEFT_TYPE)


def _opening(adapter: Adapter, shown: str | None, base: str | None) -> Iterator[str]:
    config, modules = adapter.config, adapter.modules
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{shown}`" if shown else "a base model not named"
    yield f"A {'LS-LoRA' if _splines(adapter) else 'LoRA'} adapter for {name}."
    dtypes = sorted({str(module.dtype).removeprefix("torch.") for module in modules.values()})
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in adapter.weights.tensors.values())
    options = [option for option in ("use_dora", "use_rslora") if config.get(option)]
    file = adapter.weights.path.name
    yield _table(
        {
            "PEFT type": ", ".join([str(config["peft_type"]), *options]),
            "rank": _span(module.r for module in modules.values()),
            "scaling": _span(module.scaling for module in modules.values()),
            "modules": counted(modules),
            "parameters": f"{parameters:,}, {' and '.join(dtypes)}",
            "weights": f"`{file}`, sha256 `{adapter.hashes[file]}`",
        }
    )


def _making(made: Sequence[Step]) -> Iterator[str]:
    yield "## How it was made"
    if not made:
        yield "The folder has no record of spectral_fast that tells how."
    for step in made:
        yield from (f"### {step.title}", step.text, _table(step.facts))


def _evaluation(found: Figures) -> Iterator[str]:
    yield "## Evaluation"
    if not found.own:
        yield "**These weights were not evaluated**, or no result of theirs was at hand."
    if rows := [("this adapter", x) for x in found.own] + [("what it was made from", x) for x in found.source]:
        head = ["| | data | metric | score | problems | how |", "|---|---|---|---|---|---|"]
        yield "\n".join([*head, *(_row(name, result) for name, result in rows)])
        yield "Scores are in percent, ± one standard error."
    yield from found.compared
    if found.own and not found.compared:
        yield "It was not compared with another adapter on the same problems."


def _row(name: str, result: EvalResult) -> str:
    told = dict(result.metric_args or {})
    error, problems = told.pop("standard_error"), told.pop("problems")
    data, how = f"`{result.dataset_name}` ({result.dataset_split})", ", ".join(f"{k} = {v}" for k, v in told.items())
    score = f"{100 * result.metric_value:.2f} ± {100 * error:.2f}"
    return f"| {name} | {_cell(data)} | {result.metric_type} | {score} | {problems:,} | {_cell(how)} |"


def _loading(adapter: Adapter, repo_id: str, base: str) -> Iterator[str]:
    yield "## Load it"
    register = "import spectral_fast.lslora  # pip install spectral-fast: PEFT alone does not know LS-LoRA\n"
    task = adapter.config.get("task_type") or "CAUSAL_LM"
    model = _TASKS.get(task, ("AutoModel", None))[0]
    yield (
        f"```python\n{register if _splines(adapter) else ''}"
        f"from peft import PeftModel\nfrom transformers import {model}, AutoTokenizer\n\n"
        f"base = {model}.from_pretrained({base!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {repo_id!r})\n```"
    )
    try:
        rank = served_rank([adapter.path]) if task == "CAUSAL_LM" else None
    except ValueError:  # vLLM would refuse it, or serve something else
        return
    if rank is not None:
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank}"
        yield f"```sh\n{serve} --lora-modules {repo_id.rpartition('/')[2]}={repo_id}\n```"


def _remarks(named: Sequence[Any], base: str | None, found: Figures, text: str) -> Iterator[str]:
    if base is None:
        name = f"is {named[0]!r}, by which nobody else finds it" if named else "is not named"
        yield f"the base model {name}: give base_model, its name on the hub"
    for file in found.others:
        yield f"{file} is left out: it is of other weights, or of another adapter_config.json"
    if not found.own:
        yield "no results of these weights were found, and the card says so: name their folder in results"
    if _UNFILLED in text:
        yield f"the text of {README} is left out, as it is a form with blanks: fill in or delete each {_UNFILLED}"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items() if value)]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _span(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return " to ".join(f"{x:g}" for x in (found[:1] + found[-1:] if len(found) > 1 else found)) or "none"
