"""An adapter's folder and its card, as one commit on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectral_fast.publish.card import opened, write_card
from spectral_fast.publish.files import Content, check_weights, chosen, unfinished
from spectral_fast.publish.paths import check_repo_id
from spectral_fast.publish.source_card import README

MAIN = "main"


@dataclass(frozen=True)
class Publication:
    """All that an upload would do.

    Attributes:
        repo_id: where.
        card: README.md as it will be.
        contents: all files, the card among them.
        left_out: file -> why it stays here.
        warnings: what to know before.
    """

    repo_id: str
    card: str
    contents: list[Content]
    left_out: dict[str, str]
    warnings: list[str]

    @classmethod
    def of(
        cls,
        folder: Path | str,
        repo_id: str,
        *,
        base_model: str | None = None,
        results: Sequence[Path | str] = (),
        card: Path | str | None = None,
    ) -> Publication:
        """Look through a folder; needs no network.

        Args:
            folder: of the adapter; it is not touched.
            repo_id: ORG/NAME.
            base_model: its name on the hub, where adapter_config.json has another.
            results: more folders with results of `eval`, `eval-humaneval` or `sweep`.
            card: a file to publish as README.md instead of the card that is made.

        Raises:
            FileNotFoundError: the folder, its config, its weights, or `card` are missing.
            ValueError: it is no whole LoRA adapter, a value is not finite, a record is broken, a link leads out of the
                folder, or the repository's name is none.
        """
        if "/" not in check_repo_id(repo_id):
            raise ValueError(f"repo_id must be ORG/NAME, with your own name or an organization's; got {repo_id!r}")
        folder = Path(folder)
        if (part := unfinished(folder)) is not None:
            raise ValueError(f"{folder} is unfinished: a run writes to {part}; wait for it to end")
        adapter = opened(folder)
        contents, left = chosen(adapter, base_model)
        check_weights(adapter)
        if card is None:
            made, warnings = write_card(adapter, repo_id, base_model, [Path(path) for path in results])
            text = str(made)
        else:
            text, warnings = Path(card).read_text(encoding="utf-8"), []
        readme = text.encode()
        contents = sorted([Content(README, len(readme), readme), *contents], key=lambda content: content.name)
        return cls(repo_id, text, contents, left, warnings)

    def send(
        self,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        endpoint: str | None = None,
    ) -> str:
        """Make the repository if there is none, and commit all files at once; returns the address.

        Args:
            private: of a new repository; None for what its owner has as a default.
            token: of the hub; by default that of `hf auth login`, or $HF_TOKEN.
            revision: a branch, which is made if there is none; by default main.
            commit_message: by default one that names the tool.
            create_pr: propose the commit as a pull request.
            endpoint: another hub; by default $HF_ENDPOINT, or huggingface.co.

        Raises:
            PermissionError: not logged in, or the token may not write there.
            ConnectionError: the hub cannot be reached, or fails.
            ValueError: the hub refuses a name, or the card.
        """
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if create_pr and revision not in (None, MAIN):
            raise ValueError(f"a pull request is made against {MAIN}; leave out revision {revision}, or create_pr")
        if token is None and get_token() is None:
            raise PermissionError(f"not logged in to the Hugging Face hub: {_LOG_IN}")
        api = HfApi(endpoint=endpoint, token=token)
        with _explained(self.repo_id, api.endpoint):
            url = api.create_repo(self.repo_id, private=private, exist_ok=True)
            if revision not in (None, MAIN):
                api.create_branch(self.repo_id, branch=str(revision), exist_ok=True)
            done = api.create_commit(
                self.repo_id,
                [CommitOperationAdd(content.name, content.source) for content in self.contents],
                commit_message=commit_message or "Upload a LoRA adapter by spectral_fast",
                revision=revision,
                create_pr=create_pr,
            )
        if done.pr_url:
            return str(done.pr_url)
        return f"{url}/tree/{revision}" if revision not in (None, MAIN) else str(url)


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    results: Sequence[Path | str] = (),
    card: Path | str | None = None,
) -> str:
    """Publish an adapter on the Hugging Face hub with a generated model card; returns the address.

    Caches, a trainer's state and generated texts stay here. Paths of this machine in records and adapter_config.json
    are cut to their last part. See `Publication.of` and `Publication.send` for the arguments and what is raised.

    >>> from spectral_fast import embedded, push_to_hub
    >>> push_to_hub(embedded.adapter_dir(), "ORG/NAME", create_pr=True, revision="dev")
    Traceback (most recent call last):
    ValueError: a pull request is made against main; leave out revision dev, or create_pr
    """
    publication = Publication.of(folder, repo_id, base_model=base_model, results=results, card=card)
    return publication.send(
        private=private, token=token, revision=revision, commit_message=commit_message, create_pr=create_pr
    )


_LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN"


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """What the hub's client raises, in a line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status, said = error.response.status_code, _said(error)
        if status == 401:
            raise PermissionError(f"the hub does not know this token ({said}): {_LOG_IN}") from error
        if status in (403, 404):
            raise PermissionError(
                f"this token may not write to {repo_id} ({said}): take a token with the right to write there, or a "
                "repository of your own; --create_pr proposes the upload to the owner"
            ) from error
        if status < 500:
            raise ValueError(f"the hub refuses {repo_id} ({said})") from error
        raise ConnectionError(f"{endpoint} fails ({said}); nothing was published: try again later") from error
    except json.JSONDecodeError as error:
        raise ConnectionError(f"{endpoint} does not answer as a hub does; nothing was published: try again") from error
    except ValueError as error:
        raise ValueError(f"{repo_id}: {_one_line(error)}") from error
    except (FileNotFoundError, PermissionError):  # of a file here
        raise
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(
            f"the upload to {endpoint} failed ({_root(error)}); nothing was published: check the network, and try again"
        ) from error


def _said(error: Exception) -> str:
    return _one_line(getattr(error, "server_message", None) or error)


def _root(error: BaseException) -> str:
    """What it began with, which the client may have wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
