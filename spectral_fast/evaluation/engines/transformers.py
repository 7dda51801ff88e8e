"""The engine that is always there: transformers' models with PEFT's adapters, one adapter after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from spectral_fast.adapter import Adapter, changes_base
from spectral_fast.calibration.model import check_fit, check_whole, load_model, load_tokenizer
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.evaluation.engines.decoding import generate
from spectral_fast.evaluation.engines.protocol import Progress, Sampling, one_per_prompt
from spectral_fast.splines import PEFT_TYPE


class TransformersEngine:
    """A base model in this process; see `Engine`.

    Args:
        base_model: folder or hub name.
        model_options: device, dtype and source of the base model.
        batch_size: texts that run together.
        max_model_len: most tokens of prompt and answer together; None leaves it to the model.

    Raises:
        FileNotFoundError: there is no such model.
    """

    name: ClassVar[str] = "transformers"

    def __init__(
        self, base_model: str, model_options: ModelOptions, *, batch_size: int = 32, max_model_len: int | None = None
    ) -> None:
        self._base_model, self._model_options = base_model, model_options
        self._batch_size, self._max_model_len = batch_size, max_model_len
        self._tokenizer = load_tokenizer(base_model, model_options)
        self._model: Any = load_model(base_model, model_options)
        self.settings: Mapping[str, Any] = {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "attention": self._model.config.get_text_config()._attn_implementation,
            "batch_size": batch_size,
            "max_model_len": max_model_len,
        }

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        adapters: Path | Sequence[Path | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[str]]:
        """See `Engine`."""
        indices: dict[Path | None, list[int]] = {}
        for i, folder in enumerate(one_per_prompt(adapters, prompts)):
            indices.setdefault(folder, []).append(i)
        texts: list[list[str]] = [[]] * len(prompts)
        for folder, model in self._each(indices):
            mine = generate(
                model,
                self._tokenizer,
                [prompts[i] for i in indices[folder]],
                sampling,
                batch_size=self._batch_size,
                max_model_len=self._max_model_len,
                progress=progress,
            )
            for i, of_prompt in zip(indices[folder], mine, strict=True):
                texts[i] = of_prompt
        return texts

    def _each(self, folders: Iterable[Path | None]) -> Iterator[tuple[Path | None, Any]]:
        """(adapter, model with it alone active); an adapter leaves memory before the next comes."""
        from peft import PeftModel

        opened = {folder: None if folder is None else Adapter.open(folder, splines=True) for folder in folders}
        if any(adapter is not None and adapter.config["peft_type"] == PEFT_TYPE for adapter in opened.values()):
            import spectral_fast.lslora  # noqa: F401  so that PEFT knows the method
        for folder, adapter in opened.items():
            if self._model is None:
                self._model = load_model(self._base_model, self._model_options)
            if adapter is None:
                yield folder, self._model
                continue
            check_whole(adapter)
            check_fit(self._model, adapter.modules.values(), self._base_model, adapter.path)
            with_adapter = PeftModel.from_pretrained(self._model, str(folder)).eval()
            try:
                yield folder, with_adapter
            finally:
                self._model = None if changes_base(adapter.config) else with_adapter.unload()

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def __enter__(self) -> TransformersEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
