"""vLLM as an engine: many prompts at once, each with its own adapter. The only module that imports vllm."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from spectral_fast.adapter import Adapter, changes_base
from spectral_fast.calibration.model import check_fit, check_whole, load_tokenizer
from spectral_fast.calibration.options import DTYPES, ModelOptions
from spectral_fast.calibration.streaming.skeleton import empty_model
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.engines.protocol import Progress, Sampling, one_per_prompt
from spectral_fast.evaluation.engines.text import continuation, end_tokens, sample_seed, tokenise, until_stop

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be: vllm.config.lora.MaxLoRARanks
MOST_LORAS = 8
SHARE_OF_FREE_MEMORY = 0.4  # for keys and values on a CPU, whose memory others use as well
SEQUENCES = 256  # that run together at most; what is set aside for keys and values on a CPU is for so many
# What vLLM would refuse in the middle of the work, and how to say it.
_REFUSED = {
    "use_dora": "is a DoRA adapter",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "is a block-diagonal LoRA",
    "alora_invocation_tokens": "acts after its invocation tokens only (aLoRA)",
    "layer_replication": "replicates layers",
    "modules_to_save": "replaces whole modules (modules_to_save)",
}


class VllmEngine:
    """A base model in a vLLM engine, which is a process of its own; see `Engine`.

    Args:
        base_model: folder or hub name.
        model_options: dtype and source of the base model; the device is that of the installed vLLM.
        options: limits and memory; what is None is derived.
        adapters: those that will be asked for, or others of the same ranks.

    Raises:
        RuntimeError: vLLM is missing or does not start.
        FileNotFoundError: the model or an adapter is missing.
        ValueError: vLLM cannot serve an adapter or does not run on this device.
    """

    name: ClassVar[str] = "vllm"

    def __init__(
        self, base_model: str, model_options: ModelOptions, options: EngineOptions, adapters: Sequence[Path] = ()
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
            from vllm.lora.peft_helper import PEFTHelper
        except ImportError as error:
            raise RuntimeError(
                "--engine vllm needs vLLM: pip install 'spectral-fast[eval]' for a GPU, 'spectral-fast[eval-cpu]' for "
                f"a CPU ({error}); or take --engine transformers"
            ) from error
        if not hasattr(PEFTHelper, "get_rank_and_scaling"):
            raise RuntimeError("this vLLM is too old, it ignores rank_pattern and alpha_pattern; 0.32 does not")
        self._max_rank = served_rank(adapters, options.max_lora_rank)
        self._tokenizer = load_tokenizer(base_model, model_options)
        whole, self._ends = _configs(base_model, model_options, self._tokenizer)
        config = whole.get_text_config()
        self._base_model = base_model
        self._skeleton = empty_model(whole, torch.float32, model_options.trust_remote_code)
        self._positions = getattr(config, "max_position_embeddings", None)
        self._max_model_len = min(n for n in (self._positions, options.max_model_len) if n is not None)
        self._numbers = itertools.count(1)
        asked = {
            "dtype": _dtype(model_options),
            "max_model_len": self._max_model_len,
            "enforce_eager": options.enforce_eager or os.environ.get("VLLM_ENFORCE_EAGER", "0") == "1",
            **_memory(options, config, self._max_model_len),
            "max_num_seqs": SEQUENCES,
        }
        if self._max_rank is not None:
            asked["max_lora_rank"] = self._max_rank
            asked["max_loras"] = options.max_loras or min(max(len(set(adapters)), 1), MOST_LORAS)
        self._llm: Any = LLM(
            base_model,
            enable_lora=self._max_rank is not None,
            trust_remote_code=model_options.trust_remote_code,
            download_dir=model_options.cache_dir,
            disable_log_stats=True,
            **asked,
        )
        used = self._llm.llm_engine.vllm_config
        self.settings: Mapping[str, Any] = {
            **asked,
            "dtype": str(used.model_config.dtype).removeprefix("torch."),
            "device": str(used.device_config.device),
            "max_num_batched_tokens": used.scheduler_config.max_num_batched_tokens,
        }

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        adapters: Path | Sequence[Path | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[str]]:
        """See `Engine`. Prompts of all adapters run together; an adapter gets a fresh name and id in every call."""
        from vllm import SamplingParams, TokensPrompt

        if not prompts:
            return []
        folders = one_per_prompt(adapters, prompts)
        loras = {folder: self._load(folder) for folder in dict.fromkeys(folders) if folder is not None}
        ids = tokenise(self._tokenizer, prompts, sampling.max_tokens, self._positions, self._max_model_len)
        greedy = sampling.temperature == 0
        texts: list[list[str]] = [[] for _ in ids]
        # The base model's prompts go apart from the others: vLLM's kernels for CPUs would give them, whose adapter has
        # the number -1, the adapter in the last place.
        for bare in (True, False):
            of_these = (i for i, folder in enumerate(folders) if (folder is None) == bare)
            runs = [(i, j) for i in of_these for j in range(1 if greedy else sampling.n)]
            if not runs:
                continue
            outputs = self._answers(
                [TokensPrompt(prompt_token_ids=ids[i]) for i, _ in runs],
                [
                    SamplingParams(
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        seed=None if greedy else sample_seed(sampling.seed, ids[i], j),
                        stop=list(sampling.stop),
                        stop_token_ids=self._ends,
                    )
                    for i, j in runs
                ],
                lora_request=None if bare else [loras[folder] for i, _ in runs if (folder := folders[i]) is not None],
                use_tqdm=False if progress is None else _bar(progress, sampling.n if greedy else 1),
            )
            for (i, _), output in zip(runs, outputs, strict=True):
                texts[i] += [self._text(ids[i], output, sampling)] * (sampling.n if greedy else 1)
        return texts

    def _answers(self, *arguments: Any, **how: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self._llm.generate(*arguments, **how)
        except EngineDeadError as error:
            raise RuntimeError(
                "vLLM's own process has died; what it wrote above says why. If it was killed for memory, lower "
                "--max_loras, --max_model_len or VLLM_CPU_KVCACHE_SPACE"
            ) from error

    def _text(self, ids: Sequence[int], output: Any, sampling: Sampling) -> str:
        new = list(output.outputs[0].token_ids)
        end = next((k for k, token in enumerate(new) if token in self._ends), len(new))
        return until_stop(continuation(self._tokenizer, ids[-1], new[:end]), sampling.stop)

    def _load(self, folder: Path) -> Any:
        """A request's adapter; loaded now, because an adapter that does not load later would end the engine."""
        from vllm.lora.request import LoRARequest

        adapter = Adapter.open(folder)
        rank = _rank(adapter)
        if self._max_rank is None or rank > self._max_rank:
            raise ValueError(
                f"{folder} has rank {rank}, and the engine was started for ranks up to {self._max_rank or 0}: "
                "name the adapter when it starts, or set --max_lora_rank"
            )
        check_whole(adapter)
        check_fit(self._skeleton, adapter.modules.values(), self._base_model, folder)  # vLLM takes what fits of it
        number = next(self._numbers)
        request = LoRARequest(f"{folder.name}-{number}", number, str(folder.resolve()))
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:  # of many kinds, from another process
            raise ValueError(f"vLLM cannot load {folder}: {error}") from error
        return request

    def close(self) -> None:
        """End vLLM's process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar(progress: Progress, copies: int) -> Any:
    """A progress bar for vLLM that shows nothing and tells `progress` of every request, which is so many texts."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            progress(int(n or 0) * copies)
            return bool(super().update(n))

    return partial(Bar, file=io.StringIO())


def served_rank(adapters: Iterable[Path], asked: int | None = None) -> int | None:
    """The least max_lora_rank of vLLM that holds all these adapters, or the rank that is asked for; None if neither.

    Raises:
        FileNotFoundError: an adapter is missing.
        ValueError: vLLM cannot serve one of them, or a rank is above the one that is asked for, or that above 512.
    """
    if asked is not None and asked > RANKS[-1]:
        raise ValueError(f"max_lora_rank must be at most {RANKS[-1]}, vLLM's largest; got {asked}")
    largest = 0
    for folder in adapters:
        rank = _rank(Adapter.open(folder))
        if asked is not None and rank > asked:
            raise ValueError(f"{folder} has rank {rank}, above the max_lora_rank of {asked}")
        largest = max(largest, rank)
    wanted = asked or largest
    return next(rank for rank in RANKS if rank >= wanted) if wanted else None


def _rank(adapter: Adapter) -> int:
    """The largest rank of an adapter that vLLM serves as PEFT does.

    Raises:
        ValueError: vLLM would refuse it or, worse, serve something else.
    """
    config = adapter.config
    why = [reason for option, reason in _REFUSED.items() if config.get(option)]
    if changes_base(config):
        why.append(f"changes the base weights (init_lora_weights={config['init_lora_weights']})")
    if any(module.adapter_name is not None for module in adapter.modules.values()):
        why.append("has its name in the keys of its weights")
    ignored = {reason for reason in adapter.carried.values() if reason != "DoRA magnitudes"}
    if ignored and not why:
        why.append(f"holds more than LoRA factors of linear layers ({'; '.join(sorted(ignored))})")
    ranks = [module.r for module in adapter.modules.values()]
    largest = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values(), *ranks])
    if largest > RANKS[-1]:
        why.append(f"has rank {largest}, above {RANKS[-1]}")
    if not ranks and not why:
        why.append("has no LoRA module")
    if why:
        raise ValueError(f"vLLM cannot serve {adapter.path}: it {', and '.join(why)}; take --engine transformers")
    return int(largest)


def _configs(base_model: str, options: ModelOptions, tokenizer: Any) -> tuple[Any, list[int]]:
    """The model's config and the tokens that end a text, as transformers reads them."""
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"cache_dir": options.cache_dir}
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=options.trust_remote_code, **where)
    try:
        generation = GenerationConfig.from_pretrained(base_model, **where)
    except OSError:  # it is optional
        generation = GenerationConfig.from_model_config(config)
    return config, end_tokens(generation, tokenizer)


def _dtype(options: ModelOptions) -> str:
    from vllm.platforms import current_platform

    device, here = options.device.partition(":")[0], current_platform.device_type
    if device not in ("auto", here):
        raise ValueError(f"--device {options.device}: the installed vLLM runs on {here}; take --engine transformers")
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    return "float32" if here == "cpu" else "auto"


def _memory(options: EngineOptions, config: Any, max_model_len: int) -> dict[str, Any]:
    """Memory settings of vLLM: its share of a GPU; on a CPU, where it would take nearly all, what it can use."""
    from vllm.platforms import current_platform

    share = options.gpu_memory_utilization or os.environ.get("VLLM_GPU_MEMORY_UTILIZATION")
    if share is not None:
        return {"gpu_memory_utilization": float(share)}
    if current_platform.device_type != "cpu" or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    import psutil

    per_token = 2 * config.num_hidden_layers * config.hidden_size * 4  # bytes, for float32 and heads of their own
    useful = SEQUENCES * max_model_len * per_token
    return {"kv_cache_memory_bytes": min(useful, int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available))}
