"""Where an adapter's folder is: on this machine, or in a Hugging Face repository that is downloaded."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from spectral_fast.adapter.naming import CONFIG


def resolve(lora_path: Path | str, cache_dir: Path | str | None = None) -> Path:
    """The local folder of an adapter: `lora_path` itself, or the snapshot of a Hugging Face repository.

    Args:
        lora_path: a folder, or the id of a repository such as `user/adapter`.
        cache_dir: where huggingface_hub keeps its downloads; None for its default.

    Raises:
        FileNotFoundError: it is neither; says what was tried, why the download failed, and what to do.
    """
    folder = Path(lora_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds {CONFIG} and the weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    absent = f"{str(lora_path)!r} is no local folder ({folder.absolute()} does not exist)"
    meant = like(folder)
    try:
        return Path(snapshot_download(str(lora_path), cache_dir=cache_dir))
    except HFValidationError as error:
        raise FileNotFoundError(f"{absent}, nor a name that a Hugging Face repository can have{meant}") from error
    except Exception as error:  # its kinds differ between versions and HTTP libraries; all mean: no adapter
        raise FileNotFoundError(f"{absent}, and {_why(error)}{meant}") from error


def like(folder: Path) -> str:
    """The folder that may have been meant."""
    there = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, there, n=1)
    return f"; did you mean {folder.with_name(close[0])}?" if close else ""


def _why(error: Exception) -> str:
    """Why a repository was not downloaded, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the Hugging Face repository of this name is gated: ask for access on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hugging Face hub has no such repository, or it is private: check the name, or `hf auth login` as "
            "someone who may read it"
        )
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "it is not whole in the cache of downloads, and HF_HUB_OFFLINE forbids to download it: unset that"
        return "it is not whole in the cache of downloads, and the hub cannot be reached: check the network"
    return f"the Hugging Face repository cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())})"
