"""The model card of an adapter, from what its folder holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_fast._version import __version__
from spectral_fast.adapter import Adapter
from spectral_fast.evaluation.engines.vllm import served_rank
from spectral_fast.publish.figures import Figure, Figures, find
from spectral_fast.publish.paths import hub_name, in_command, text_without_paths, without_paths
from spectral_fast.publish.records import Made, made_by
from spectral_fast.publish.source_card import SourceCard
from spectral_fast.publish.training import trained
from spectral_fast.splines import PEFT_TYPE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

EXAMPLE = "ORG/NAME"
_NO_LICENSE = "the card has no license: begin README.md in the folder with lines `---`, `license: NAME`, `---`"
# Task of an adapter -> transformers' class of the base model, and the hub's name of the task.
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def model_card(
    folder: Path | str,
    repo_id: str = EXAMPLE,
    *,
    base_model: str | None = None,
    results: Sequence[Path | str] = (),
) -> ModelCard:
    """The model card of an adapter: what it is, how it was made, with which figures, how to load and repeat it.

    All of it comes from files: the adapter's config and weights, the records that spectral_fast's commands leave,
    results of evaluations of these very files (by their hashes), and the source's card, which is kept below. Of paths
    of this machine only the last part is in it.

    Args:
        folder: the adapter's.
        repo_id: where it will be, for the lines that load it.
        base_model: the base model's name on the hub, where adapter_config.json has another.
        results: more folders with results of `eval`, `eval-humaneval` or `sweep`.

    Raises:
        FileNotFoundError, ValueError: it is no adapter, or a record is broken.
    """
    return write_card(opened(folder), repo_id, base_model, [Path(path) for path in results])[0]


def opened(folder: Path | str) -> Adapter:
    """The adapter in a folder, with every kind of module that there may be."""
    return Adapter.open(folder, include_conv=True, include_embedding=True, splines=True)


def write_card(
    adapter: Adapter, repo_id: str, base_model: str | None, results: Sequence[Path]
) -> tuple[ModelCard, list[str]]:
    """The card, and what whoever publishes it should know."""
    from huggingface_hub import ModelCard, ModelCardData

    steps = [*trained(adapter.path.resolve()), *made_by(adapter.path)]
    found = find(adapter.path, results, adapter.hashes, [sha for step in steps for sha in step.sources])
    source = SourceCard.of(adapter)
    stated = base_model or adapter.config.get("base_model_name_or_path")
    base = hub_name(stated) or hub_name(source.base_model)
    data = ModelCardData(**source.merged(_metadata(adapter, steps, base)), ignore_metadata_errors=True)
    if found.own:
        data.model_name = repo_id.rpartition("/")[2]
        data.eval_results = [figure.eval_result() for figure in found.own]
    shown_base = base or (without_paths(stated) if stated else None)
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        _opening(adapter, shown_base, base, steps),
        _table(_facts(adapter, shown_base)),
        *_making(steps),
        *_evaluation(found),
        *_loading(adapter, repo_id, base or in_command(shown_base or "BASE_MODEL")),
        *_repeating(steps),
        f"Written by spectral_fast {__version__} from the files beside it.",
    ]
    own = text_without_paths("\n\n".join(parts))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{own}\n{source.below(adapter.hashes)}")
    license = [] if data.get("license") else [_NO_LICENSE]
    return card, [*_remarks(stated, base, steps, found), *license, *source.warnings]


def _metadata(adapter: Adapter, steps: Sequence[Made], base: str | None) -> dict[str, Any]:
    config = adapter.config
    kinds = [name for name, on in (("dora", config.get("use_dora")), ("rslora", config.get("use_rslora"))) if on]
    kinds += ["ls-lora"] * (config["peft_type"] == PEFT_TYPE)
    tags = ["lora", "spectral_fast", *kinds, *(tag for step in steps for tag in step.tags)]
    _, pipeline = _TASKS.get(str(config.get("task_type")), ("", None))
    return {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": tags,
        "datasets": [name for step in steps for name in step.datasets],
    }


def _opening(adapter: Adapter, shown: str | None, base: str | None, steps: Sequence[Made]) -> str:
    kind = "LS-LoRA" if adapter.config["peft_type"] == PEFT_TYPE else "LoRA"
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{shown}`" if shown else "a base model not named"
    how = " → ".join(step.title.lower() for step in steps)
    return f"A {kind} adapter for {name}" + (f", made by spectral_fast: {how}." if steps else ".")


def _facts(adapter: Adapter, shown: str | None) -> dict[str, str]:
    config, modules = adapter.config, list(adapter.modules.values())
    kinds = Counter(module.name.rpartition(".")[2] for module in modules)
    dtypes = sorted({str(module.dtype).removeprefix("torch.") for module in modules})
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in adapter.weights.tensors.values())
    options = [name for name in ("use_dora", "use_rslora") if config.get(name)]
    facts = {
        "base model": f"`{shown}`" if shown else "not named",
        "PEFT type": ", ".join([str(config["peft_type"]), *options]),
        "rank": _span(module.r for module in modules),
        "scaling": _span(module.scaling for module in modules) + f" (lora_alpha = {config.get('lora_alpha', 8)})",
        "modules": f"{len(modules):,}: {', '.join(f'{kind} ({count})' for kind, count in kinds.items())}",
        "parameters": f"{parameters:,}, {' and '.join(dtypes)}",
        "weights": f"`{adapter.weights.path.name}`, sha256 `{adapter.hashes[adapter.weights.path.name]}`",
    }
    if adapter.carried:
        facts["not of LoRA's factors"] = f"{len(adapter.carried):,} other tensors or modules"
    return facts


def _making(steps: Sequence[Made]) -> Iterable[str]:
    yield "## How it was made"
    if not steps:
        yield "The folder has no record of spectral_fast that tells how."
    for step in steps:
        if len(steps) > 1:
            yield f"### {step.title}"
        yield from (step.text, _table(step.facts))


def _evaluation(found: Figures) -> Iterable[str]:
    yield "## Evaluation"
    if not found.own:
        yield "**These weights were not evaluated**, or no result of theirs was at hand: there are no figures."
    if found.own or found.source:
        rows = [("this adapter", x) for x in found.own] + [("what it was made from", x) for x in found.source]
        yield "\n".join(
            ["| | data | score | problems | how |", "|---|---|---|---|---|", *(_row(name, x) for name, x in rows)]
        )
        yield "Scores are in percent, ± one standard error."
    yield from found.compared
    if found.own and not found.compared:
        yield "It was not compared with another adapter on the same problems."


def _row(name: str, x: Figure) -> str:
    score = f"{x.metric} {100 * x.value:.2f} ± {100 * x.error:.2f}"
    return f"| {name} | {_cell(x.dataset)} ({x.split}) | {score} | {x.problems:,} | {_cell(x.settings)} |"


def _loading(adapter: Adapter, repo_id: str, base: str) -> Iterable[str]:
    yield "## Load it"
    splines = adapter.config["peft_type"] == PEFT_TYPE
    register = "import spectral_fast.lslora  # pip install spectral-fast: PEFT alone does not know LS-LoRA\n"
    task = adapter.config.get("task_type") or "CAUSAL_LM"
    model, _ = _TASKS.get(task, ("AutoModel", None))
    yield (
        "```python\n"
        f"{register if splines else ''}"
        f"from peft import PeftModel\nfrom transformers import {model}, AutoTokenizer\n\n"
        f"base = {model}.from_pretrained({base!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {repo_id!r})\n```"
    )
    if task != "CAUSAL_LM":
        return
    try:
        rank = served_rank([adapter.path])
    except ValueError:
        yield "vLLM would refuse it, or serve something else."
    else:
        yield (
            f"```sh\nvllm serve {base} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {repo_id.rpartition('/')[2]}={repo_id}\n```"
        )


def _repeating(steps: Sequence[Made]) -> Iterable[str]:
    commands = [line for step in steps for line in step.commands]
    if commands:
        yield "## Repeat it"
        yield "\n".join(["```sh", *commands, "```"])
        yield "Names that begin with `./` stand for local files and folders."


def _remarks(stated: Any, base: str | None, steps: Sequence[Made], found: Figures) -> Iterable[str]:
    if base is None:
        yield (
            f"the base model is {stated!r}, by which nobody else finds it: give base_model, its name on the hub"
            if stated
            else "the adapter does not name its base model: give base_model, its name on the hub"
        )
    if not steps:
        yield "there is no record of how the adapter was made; the card does not tell"
    for file in found.others:
        yield f"{file} is left out: it is of other weights, or of another adapter_config.json"
    if not found.own:
        yield "no results of these weights were found, and the card says so: name their folder in results"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _span(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return " to ".join(f"{x:g}" for x in (found[:1] + found[-1:] if len(found) > 1 else found)) or "none"
