"""Where an adapter's folder is: on this machine, or in a Hugging Face repository that is downloaded."""

from __future__ import annotations

from pathlib import Path

from spectral_fast.adapter.naming import CONFIG


def resolve(lora_path: Path | str, cache_dir: Path | str | None = None) -> Path:
    """The local folder of an adapter: `lora_path` itself, or the snapshot of a Hugging Face repository.

    Args:
        lora_path: a folder, or the id of a repository such as `user/adapter`.
        cache_dir: where huggingface_hub keeps its downloads; None for its default.

    Raises:
        FileNotFoundError: it is neither; says what was tried, and why the download failed.
    """
    folder = Path(lora_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds {CONFIG} and the weights")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(lora_path), cache_dir=cache_dir))
    except Exception as error:  # its kinds differ between versions and HTTP libraries; all mean: no adapter
        raise FileNotFoundError(
            f"{str(lora_path)!r} is neither a local folder ({folder.absolute()} does not exist) nor a "
            f"Hugging Face repository that can be downloaded ({type(error).__name__}: {error})"
        ) from error
