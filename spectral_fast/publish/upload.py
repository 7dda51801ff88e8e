"""An adapter's folder and its card, as one commit on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter
from spectral_fast.adapter.folder import is_finite
from spectral_fast.adapter.naming import CONFIG
from spectral_fast.evaluation.evaluate import METRICS
from spectral_fast.publish.card import README, write_card
from spectral_fast.publish.figures import CONFIGS
from spectral_fast.publish.making import RECORDS, read_json
from spectral_fast.publish.paths import is_repo_id, without_paths

# What is published beside the config and the weights. All else stays: nobody can know what is private in it.
_RECORDS = (*RECORDS, CONFIGS, METRICS)
_TOKENIZER = (
    *("tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
_LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """What was published, or would be.

    Attributes:
        url: of the repository or the pull request; None for a dry run.
        card: README.md.
        files: name there -> bytes.
        left_out: names of files and folders that stay here.
        warnings: what to know.
    """

    url: str | None
    card: str
    files: dict[str, int]
    left_out: list[str]
    warnings: list[str]


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    base_model: str | None = None,
    results: Sequence[Path | str] = (),
    card: Path | str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Publish an adapter on the Hugging Face hub, with a generated model card, in one commit.

    Config, weights, tokenizer, licenses and records go up; of a path of this machine in them only the last part.

    Args:
        folder: of the adapter; it is not touched.
        repo_id: ORG/NAME; made if there is none.
        base_model: its name on the hub, where adapter_config.json has another.
        results: more folders with results of `eval`, `eval-humaneval` or `sweep`.
        card: a file to publish as README.md instead of the card that is made.
        private: of a new repository; None for what its owner has as a default.
        token: of the hub; by default that of `hf auth login`, or $HF_TOKEN.
        commit_message: by default one that names the tool.
        create_pr: propose the commit as a pull request.
        dry_run: look only; needs no network.

    Raises:
        FileNotFoundError: the folder, its config, its weights, `card` or one of `results` are missing.
        ValueError: it is no whole LoRA adapter, a value is not finite, a record is broken, a link leads out of the
            folder; or the hub refuses the name or the card.
        PermissionError: not logged in, or the token may not write there.
        ConnectionError: the hub cannot be reached, or fails; nothing was published.

    >>> from spectral_fast import embedded, push_to_hub
    >>> list(push_to_hub(embedded.adapter_dir(), "ORG/NAME", dry_run=True).files)
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    if "/" not in repo_id or not is_repo_id(repo_id):
        raise ValueError(f"repo_id must be ORG/NAME, of letters, digits, '-', '_' and '.'; got {repo_id!r}")
    adapter = Adapter.open(folder, include_conv=True, include_embedding=True, splines=True)
    if any(part.endswith(".partial") for part in adapter.path.resolve().parts):
        raise ValueError(f"{folder} is unfinished, as its name says: wait for the run that writes it to end")
    _check_weights(adapter)
    names = sorted(os.fsencode(path.name).decode(errors="replace") for path in adapter.path.iterdir())
    wanted = [CONFIG, adapter.weights.path.name, *_RECORDS, *_TOKENIZER, *_LICENSES, README]
    chosen = list(filter_repo_objects(names, allow_patterns=wanted))
    for name in chosen:
        _check_file(adapter.path / name)
    if card is None:
        made, warnings = write_card(adapter, repo_id, base_model, results)
        text = str(made)
    else:
        text, warnings = Path(card).read_text(encoding="utf-8"), []
    files = {name: _content(adapter.path / name, base_model) for name in chosen} | {README: text.encode()}
    files = dict(sorted(files.items()))
    sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in files.items()}
    done = Upload(None, text, sizes, [name for name in names if name not in chosen], warnings)
    if dry_run:
        return done
    if token is None and get_token() is None:
        raise PermissionError(f"not logged in to the Hugging Face hub: {_LOG_IN}")
    api = HfApi(token=token)
    with _explained(repo_id, api.endpoint):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # Not upload_folder, which makes several commits of a large folder, and knows no files that are bytes.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or "Upload a LoRA adapter by spectral_fast",
            create_pr=create_pr,
        )
    return replace(done, url=str(commit.pr_url or url))


def _check_weights(adapter: Adapter) -> None:
    for name, tensor in adapter.weights.tensors.items():
        if tensor.nbytes == 0:
            raise ValueError(f"{adapter.weights.path}: {name} is empty; was it saved from shards? Save it whole first")
        values = adapter.weights.read(name)
        if values.dtype.is_floating_point and not is_finite(values):
            raise ValueError(f"{adapter.weights.path}: {name} has NaN or infinite values: mend the adapter first")


def _check_file(file: Path) -> None:
    """Links may lead to files of the folder and, in a snapshot of the hub's cache, to its blobs."""
    if not file.is_file():
        raise ValueError(f"{file} is no plain file, or a broken link; remove it from the folder before publishing")
    home, target = file.parent.resolve(), file.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not {home, blobs} & {*target.parents}:
        raise ValueError(f"{file} is a link to {target}, which is not in the folder: publish a copy in its place")


def _content(file: Path, base_model: str | None) -> Path | bytes:
    """The file, or its content without the paths of this machine if there are any."""
    if any(file.match(name) for name in _RECORDS):
        new = without_paths(old := read_json(file))
    elif file.name in (CONFIG, "tokenizer_config.json"):
        new = _configured(old := read_json(file))
        new |= {"base_model_name_or_path": base_model} if base_model and file.name == CONFIG else {}
    else:
        return file
    return file if new == old else (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()


def _configured(value: Any) -> Any:
    """A configuration without paths, but where they are: a token in it may look like one."""
    if not isinstance(value, dict):
        return value
    items = value.items()
    return {key: (without_paths if key.endswith(("_path", "_file")) else _configured)(item) for key, item in items}


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """What the hub's client raises, in a line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status, said = error.response.status_code, _one_line(error.server_message or error)
        if status >= 500:
            raise ConnectionError(f"{endpoint} fails ({said}); nothing was published: try again later") from error
        if status in (401, 403, 404):
            hint = f"{_LOG_IN}; or propose the upload to the owner by create_pr"
            raise PermissionError(f"the hub does not let this token write to {repo_id} ({said}): {hint}") from error
        raise ValueError(f"the hub refuses {repo_id} ({said})") from error
    except (OSError, ValueError):  # the client's own, in words, or of a file here
        raise
    except Exception as error:  # of whichever HTTP library it has: only calls of the hub are in here
        said = f"{type(error).__name__}: {_one_line(error)}"
        raise ConnectionError(f"the upload to {endpoint} failed ({said}); nothing was published: try again") from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
