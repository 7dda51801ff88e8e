"""The settings of a base model and of the calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectral_fast.options import check, option

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by torch's names
DEFAULT_SAMPLES = 32


@dataclass(frozen=True)
class ModelOptions:
    """Where a base model comes from and how it computes.

    Example:
        >>> from spectral_fast import ModelOptions
        >>> ModelOptions(device="cpu", dtype="bf16").resolved()
        (device(type='cpu'), torch.bfloat16)
    """

    dtype: str = option(
        "auto",
        "computation type; auto is the checkpoint's own on a GPU, fp32 on a CPU",
        choices=("auto", *DTYPES),
    )
    device: str = option("auto", "torch device, e.g. cpu, cuda, cuda:1; auto takes a GPU where there is one")
    device_map: str = option(
        "none",
        "spread a model that is larger than one card over all of them and, if need be, host memory",
        choices=("none", "auto", "balanced", "sequential"),
    )
    cache_dir: str | None = option(None, "cache folder for downloads from the Hugging Face hub")
    load_in_4bit: bool = option(False, "load the base model's linear layers as bitsandbytes' 4-bit NF4")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        check(self)
        if self.device_map != "none" and self.device != "auto":
            raise ValueError(
                f"--device {self.device} and --device_map {self.device_map} exclude each other: leave out one"
            )

    def resolved(self) -> tuple[torch.device, torch.dtype | str]:
        """The device and the dtype to load with.

        Raises:
            ValueError: for a device string that torch does not know or that this machine does not have.
        """
        import torch

        name = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
        if self.dtype == "auto":
            return device, torch.float32 if device.type == "cpu" else "auto"
        return device, getattr(torch, DTYPES[self.dtype])


@dataclass(frozen=True)
class CalibrationOptions:
    """Which samples to calibrate on.

    Example:
        >>> from spectral_fast import CalibrationOptions
        >>> CalibrationOptions().limit, CalibrationOptions(until_stable=0.9).limit
        (32, None)
        >>> CalibrationOptions(calib_samples=0)
        Traceback (most recent call last):
            ...
        ValueError: calib_samples must be at least 1; got 0
    """

    calib_data: str = option("gsm8k", "gsm8k (the train split, by datasets) or a .jsonl or .parquet file")
    calib_samples: int | None = option(
        None,
        "samples to take, from the first on; with --until_stable the most to take",
        low=1,
        shown="32; with --until_stable all",
    )
    until_stable: float = option(
        0.0,
        "take samples until doubling them has left this share of the core and noise directions as they were, e.g. 0.9",
        low=0.0,
        high=1.0,
        shown="0, off",
    )
    calib_batch_size: int = option(2, "samples per nominal batch, whose mean loss is differentiated", low=1)
    question_column: str = option("question", "column with the question")
    answer_column: str = option("answer", "column with the answer, whose tokens are the labels")
    messages_column: str | None = option(None, "column with chat messages; replaces question and answer")

    def __post_init__(self) -> None:
        check(self)

    @property
    def limit(self) -> int | None:
        """The most samples to take; None for all that there are."""
        return self.calib_samples or (None if self.until_stable else DEFAULT_SAMPLES)
