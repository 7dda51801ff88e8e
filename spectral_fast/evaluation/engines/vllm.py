"""vLLM as an engine: many prompts at once, each with its own adapter. The only module that imports vllm."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.model import ModelOptions, load_tokenizer
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.engines.protocol import Progress, Sampling, one_per_prompt
from spectral_fast.evaluation.engines.text import continuation, end_tokens, sample_seed, tokenise, until_stop

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be: vllm.config.lora.MaxLoRARanks
MOST_LORAS = 8
SHARE_OF_FREE_MEMORY = 0.4  # for keys and values on a CPU, whose memory others use as well
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
        except ImportError as error:
            raise RuntimeError(
                "--engine vllm needs vLLM: pip install 'spectral-fast[eval]' for a GPU, 'spectral-fast[eval-cpu]' for "
                f"a CPU ({error}); or take --engine transformers"
            ) from error
        self._max_rank = options.max_lora_rank or served_rank(adapters)
        self._tokenizer = load_tokenizer(base_model, model_options)
        config, self._ends = _configs(base_model, model_options, self._tokenizer)
        self._positions = getattr(config, "max_position_embeddings", None)
        self._max_model_len = min(n for n in (self._positions, options.max_model_len) if n is not None)
        self._numbers = itertools.count(1)
        asked = {
            "dtype": _dtype(model_options),
            "max_model_len": self._max_model_len,
            "enforce_eager": options.enforce_eager or os.environ.get("VLLM_ENFORCE_EAGER", "0") == "1",
            **_memory(options),
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
            "max_num_seqs": used.scheduler_config.max_num_seqs,
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
        from vllm.lora.request import LoRARequest

        if not prompts:
            return []
        folders = one_per_prompt(adapters, prompts)
        requests = {None: None}
        for folder in dict.fromkeys(folders):
            if folder is not None:
                self._check(folder)
                number = next(self._numbers)
                requests[folder] = LoRARequest(f"{folder.name}-{number}", number, str(folder.resolve()))
        ids = tokenise(self._tokenizer, prompts, sampling.max_tokens, self._positions, self._max_model_len)
        greedy = sampling.temperature == 0
        runs = [(i, j) for i in range(len(ids)) for j in range(1 if greedy else sampling.n)]
        tokens = self._run(
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
            [requests[folders[i]] for i, _ in runs],
            progress,
        )
        texts: list[list[str]] = [[] for _ in ids]
        for (i, _), new in zip(runs, tokens, strict=True):
            end = next((k for k, token in enumerate(new) if token in self._ends), len(new))
            text = until_stop(continuation(self._tokenizer, ids[i][-1], new[:end]), sampling.stop)
            texts[i] += [text] * (sampling.n if greedy else 1)
        return texts

    def _run(
        self, prompts: list[Any], params: list[Any], loras: list[Any], progress: Progress | None
    ) -> list[list[int]]:
        """The new tokens of every request, in order."""
        engine, ended = self._llm.llm_engine, {}
        for k, (prompt, param, lora) in enumerate(zip(prompts, params, loras, strict=True)):
            engine.add_request(str(k), prompt, param, lora_request=lora)
        while engine.has_unfinished_requests():
            done = [output for output in engine.step() if output.finished]
            ended.update({int(output.request_id): list(output.outputs[0].token_ids) for output in done})
            if progress is not None and done:
                progress(len(done))
        return [ended[k] for k in range(len(prompts))]

    def _check(self, folder: Path) -> None:
        rank = _rank(Adapter.open(folder))
        if self._max_rank is None or rank > self._max_rank:
            raise ValueError(
                f"{folder} has rank {rank}, and the engine was started for ranks up to {self._max_rank or 'none'}: "
                "name the adapter when it starts, or set --max_lora_rank"
            )

    def close(self) -> None:
        """End vLLM's process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def served_rank(adapters: Iterable[Path]) -> int | None:
    """The least max_lora_rank of vLLM that holds all these adapters; None if there is none.

    Raises:
        FileNotFoundError: an adapter is missing.
        ValueError: vLLM cannot serve one of them.
    """
    largest = max((_rank(Adapter.open(folder)) for folder in adapters), default=None)
    return None if largest is None else next(rank for rank in RANKS if rank >= largest)


def _rank(adapter: Adapter) -> int:
    """The largest rank of an adapter that vLLM serves as PEFT does.

    Raises:
        ValueError: vLLM would refuse it or, worse, serve something else.
    """
    ignored = {reason for key, reason in adapter.carried.items() if reason != "DoRA magnitudes"}
    why = [f"{len(ignored)} part(s) of it would be ignored: {'; '.join(sorted(ignored))}"] if ignored else []
    if adapter.config.get("use_dora"):
        why.append("it is a DoRA adapter")
    if adapter.config.get("modules_to_save"):
        why.append(f"it replaces modules ({', '.join(adapter.config['modules_to_save'])})")
    if any(module.adapter_name for module in adapter.modules.values()):
        why.append("its keys name the adapter")
    largest = max((module.r for module in adapter.modules.values()), default=0)
    if largest > RANKS[-1]:
        why.append(f"its rank {largest} is above {RANKS[-1]}")
    if why or not largest:
        reasons = ", and ".join(why) or "it has no LoRA module"
        raise ValueError(f"vLLM cannot serve {adapter.path}: {reasons}; take --engine transformers")
    return largest


def _configs(base_model: str, options: ModelOptions, tokenizer: Any) -> tuple[Any, list[int]]:
    """The text model's config and the tokens that end a text, as transformers reads them."""
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"cache_dir": options.cache_dir}
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=options.trust_remote_code, **where)
    try:
        generation = GenerationConfig.from_pretrained(base_model, **where)
    except OSError:  # it is optional
        generation = GenerationConfig.from_model_config(config)
    return config.get_text_config(), end_tokens(generation, tokenizer)


def _dtype(options: ModelOptions) -> str:
    from vllm.platforms import current_platform

    device, here = options.device.partition(":")[0], current_platform.device_type
    if device not in ("auto", here):
        raise ValueError(f"--device {options.device}: the installed vLLM runs on {here}; take --engine transformers")
    if options.dtype != "auto":
        return _DTYPES[options.dtype]
    return "float32" if here == "cpu" else "auto"


def _memory(options: EngineOptions) -> dict[str, Any]:
    """Memory settings of vLLM: on a GPU its share, on a CPU the room for keys and values."""
    from vllm.platforms import current_platform

    share = options.gpu_memory_utilization or os.environ.get("VLLM_GPU_MEMORY_UTILIZATION")
    if current_platform.device_type != "cpu":
        return {} if share is None else {"gpu_memory_utilization": float(share)}
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    import psutil

    return {"kv_cache_memory_bytes": int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)}
