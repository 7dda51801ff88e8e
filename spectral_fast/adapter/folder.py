"""An adapter's folder: opened, read one module at a time, and written anew with some factors edited."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePath
from threading import Event
from typing import Any

import torch
from torch import Tensor

from spectral_fast.adapter.naming import CONFIG, LoraModule, take_inventory, with_ranks
from spectral_fast.adapter.patterns import ALL_LAYERS
from spectral_fast.atomic import check_out_dir, replace_directory
from spectral_fast.picklefile import PickleFile
from spectral_fast.provenance import sha256_file
from spectral_fast.splines import PARAMETERS, PEFT_TYPE
from spectral_fast.tensorfile import SafetensorsFile

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# These describe the source, and would lie about an edited copy: its repository, and its evaluation.
_NOT_CONTENT = (
    *(".git", ".cache", "eval_config*.json", "gsm8k_predictions*.jsonl", "metrics_gsm8k.json"),
    *("samples_lora.jsonl*", "raw_generations_lora.jsonl", "per_problem_lora.json"),
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk: checked when it is opened; weights are read when they are asked for.

    Attributes:
        path: the folder.
        config: adapter_config.json as it stands.
        weights: the weight file.
        modules: name -> editable module, in the file's order.
        carried: module or tensor that is not editable -> why; it is copied as it is.
        warnings: what to know before trusting an edit.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> module = adapter.select(("o_proj",))[0]
        >>> module.name, (module.m, module.n), module.r
        ('base_model.model.model.layers.0.self_attn.o_proj', (256, 256), 32)
        >>> b, a = adapter.read(module)
        >>> b.shape, a.shape, b.dtype
        (torch.Size([256, 32]), torch.Size([32, 256]), torch.bfloat16)
    """

    path: Path
    config: dict[str, Any]
    weights: SafetensorsFile | PickleFile
    modules: dict[str, LoraModule]
    carried: dict[str, str]
    warnings: list[str]

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        adapter_name: str | None = None,
        include_conv: bool = False,
        include_embedding: bool = False,
        splines: bool = False,
    ) -> Adapter:
        """Open a folder with adapter_config.json and adapter_model.safetensors (or else adapter_model.bin).

        Args:
            path: the folder.
            adapter_name: which adapter to edit, if the keys of the weight file name several.
            include_conv: take LoRA on convolutions as editable, lora_A flattened to (r, channels · kernel).
            include_embedding: take LoRA on embeddings as editable, with B (dim, r) and A (r, vocabulary).
            splines: take an LS-LoRA, too, to be run as it is: its modules are those of its factors, and an edit of
                these alone would be another function.

        Raises:
            FileNotFoundError: the folder, its config or its weights are missing.
            ValueError: a file is broken, the adapter is not LoRA, or config and weights do not agree.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"an adapter is a folder with {CONFIG} and {WEIGHTS[0]}; {path} is not a folder")
        config = _read_config(path, splines)
        file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has neither {' nor '.join(WEIGHTS)}; {_contents(path)}")
        weights = SafetensorsFile(file) if file.suffix == ".safetensors" else PickleFile(file)
        of_splines = [key for key in weights.tensors if key.endswith(PARAMETERS)]
        if of_splines and config["peft_type"] != PEFT_TYPE:
            raise ValueError(
                f"{file} has {of_splines[0]}, so {CONFIG} should say peft_type {PEFT_TYPE} and not "
                f"{config['peft_type']}: without its splines the adapter is another one"
            )
        found = take_inventory(
            {key: tensor for key, tensor in weights.tensors.items() if not key.endswith(PARAMETERS)},
            config,
            adapter_name=adapter_name,
            include_conv=include_conv,
            include_embedding=include_embedding,
        )
        return cls(path, config, weights, found.modules, found.carried, found.warnings)

    def select(
        self,
        target_modules: Sequence[str] = ("down_proj", "o_proj"),
        layer_min: int = 0,
        layer_max: int = ALL_LAYERS,
    ) -> list[LoraModule]:
        """The modules whose last name component is a target, in the layers layer_min to layer_max inclusive.

        Args:
            target_modules: last components of module names; "all" or "all-linear" alone takes every module.
            layer_min: first layer, as in `.layers.0.`; modules whose name has no such part are always in.
            layer_max: last layer.

        Raises:
            ValueError: nothing is left; names what the adapter has.
        """
        if isinstance(target_modules, str):
            target_modules = (target_modules,)
        components = Counter(_component(module) for module in self.modules.values())
        wanted = set(components) if tuple(target_modules) in (("all",), ("all-linear",)) else set(target_modules)

        def in_range(module: LoraModule) -> bool:
            layer = _LAYER.search(module.name)
            return layer is None or layer_min <= int(layer[1]) <= layer_max

        chosen = [module for module in self.modules.values() if _component(module) in wanted and in_range(module)]
        if not chosen:
            has = ", ".join(f"{name} ({count})" for name, count in components.items()) or "no editable module"
            where = f"from layer {layer_min} on" if layer_max == ALL_LAYERS else f"in layers {layer_min} to {layer_max}"
            remedy = "; name some of these, or all-linear" if components and not wanted & set(components) else ""
            raise ValueError(
                f"no module of {self.path} is among target_modules {' '.join(target_modules)} {where}; the adapter "
                f"has {has}{self._carried_in_short()}{remedy}"
            )
        for name in target_modules:
            if name in wanted - set(components):
                warning = f"target_modules: the adapter has no {name}; it has {', '.join(components)}"
                if warning not in self.warnings:
                    self.warnings.append(warning)
        return chosen

    def _carried_in_short(self) -> str:
        reasons = Counter(self.carried.values())
        return "".join(f"; {count} carried unedited: {reason}" for reason, count in reasons.items())

    def read(self, module: LoraModule, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The factors b (m, r) and a (r, n) of a module, in the stored dtype, on the CPU.

        Args:
            module: one of `modules`.
            memory: where to put them, from `memory_for`; new memory if left out.
        """
        b = self.weights.read(module.b_key, memory)
        a = self.weights.read(module.a_key, None if memory is None else memory[_aligned(b.nbytes) :])
        return b.reshape(module.m, module.r), a.reshape(module.r, module.n)

    def memory_for(self, modules: Iterable[LoraModule]) -> Tensor:
        """Memory that `read` can put any of these modules into, again and again, uint8 (bytes,)."""
        return torch.empty(max(map(self.size_of, modules), default=0), dtype=torch.uint8)

    def size_of(self, module: LoraModule) -> int:
        """Bytes of memory that `read` takes for a module."""
        return sum(_aligned(self.weights.tensors[key].nbytes) for key in (module.b_key, module.a_key))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of the two files that make the adapter."""
        return self._hash_files()

    def fingerprint(self) -> str:
        """SHA-256 over the config and the weights: equal exactly if both files are equal, byte for byte."""
        return _fingerprint(self.hashes)

    def stamp(self) -> dict[str, list[int]]:
        """File name -> size in bytes and time of the last change in ns, of the two: equal while neither is touched."""
        stats = {file.name: file.stat() for file in (self.path / CONFIG, self.weights.path)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    @contextmanager
    def fingerprint_meanwhile(self, record: Mapping[str, Any]) -> Iterator[Callable[[], str]]:
        """Give a function that waits for the `fingerprint`, which a thread takes afresh while the block runs.

        A thread of its own: hashing 1.7 GB takes longer than any other part of an edit. It ends with the block.

        Args:
            record: with `adapter_stamp` and `adapter_sha256` as `probe` notes them, maybe of this adapter. If the stamp
                is, so is the fingerprint, and nothing is hashed.
        """
        if record.get("adapter_stamp") == self.stamp() and isinstance(record.get("adapter_sha256"), str):
            yield lambda: str(record["adapter_sha256"])
            return
        stop = Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(lambda: _fingerprint(self._hash_files(stop)))
            try:
                yield future.result
            finally:
                stop.set()

    def _hash_files(self, stop: Event | None = None) -> dict[str, str]:
        return {file.name: sha256_file(file, stop) for file in (self.path / CONFIG, self.weights.path)}

    def check_out_dir(self, out_dir: Path | str, *, overwrite: bool = False) -> None:
        """Raise now what `write` would raise about `out_dir`, before long work."""
        check_out_dir(out_dir, overwrite=overwrite, source=self.path, marker=CONFIG)

    @contextmanager
    def rewriting(
        self,
        out_dir: Path | str,
        extra_files: Mapping[str, bytes | Callable[[], bytes]] | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        config: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        check_finite: bool = True,
    ) -> Iterator[Callable[[LoraModule, Tensor, Tensor], None]]:
        """Write a copy of the adapter with edited factors, everything else byte for byte, in one atomic step.

        Left out are .git, .cache, a second weight file in the other format, and evaluations of the source.

        Args:
            out_dir: the new folder; it appears complete when the block ends well, or not at all.
            extra_files: name -> content of files to add or replace; functions are called at the end.
            ranks: name of a module -> its rank in the copy, where it changes.
            config: the copy's adapter_config.json; by default the source's or, with ranks, `config_with` them.
            overwrite: replace an adapter that is in `out_dir`.
            check_finite: look for NaN and infinity in the factors; off for who knows that there is none.

        Yields:
            put(module, b (m, r), a (r, n)), for any thread and in any order: factors in the stored dtype. Modules
            of another rank must all be put.

        Raises:
            ValueError: factors that are not finite or not of the stored dtype and shape, a module that is
                unknown or repeated, ranks that the config cannot say, or an `out_dir` that overlaps with the source.
            FileExistsError: `out_dir` is not empty, and `overwrite` is off or it is not an adapter.
        """
        extra_files, ranks = extra_files or {}, ranks or {}
        if ranks and config is None:
            config = self.config_with(ranks)
        if config is not None:
            extra_files = {**extra_files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        name = self.weights.path.name
        for extra in extra_files:
            if PurePath(extra).name != extra or extra in {name, ".."}:
                raise ValueError(f"extra_files: {extra!r} must be the name of a file beside {name}")
        with replace_directory(out_dir, overwrite=overwrite, source=self.path, marker=CONFIG) as folder:
            _copy_folder(self.path, folder, (*_NOT_CONTENT, *WEIGHTS, *extra_files))
            shapes = {key: shape for name, r in ranks.items() for key, shape in self._shapes(self.modules[name], r)}
            with self.weights.rewriting(folder / name, shapes) as put_tensor:

                def put(module: LoraModule, b: Tensor, a: Tensor) -> None:
                    r = ranks.get(module.name, module.r)
                    if self.modules.get(module.name) != module:
                        raise ValueError(f"{module.name} is not an editable module of {self.path}")
                    check_factors(module, r, b, a, check_finite)
                    for (key, shape), factor in zip(self._shapes(module, r), (b, a), strict=True):
                        put_tensor(key, factor.reshape(shape))

                yield put
            shutil.copymode(self.weights.path, folder / name)
            for extra, content in extra_files.items():
                (folder / extra).write_bytes(content if isinstance(content, bytes) else content())

    def write(
        self,
        out_dir: Path | str,
        edited: Iterable[tuple[LoraModule, Tensor, Tensor]],
        extra_files: Mapping[str, bytes | Callable[[], bytes]] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a copy with the factors of `edited`, (module, b, a), taken one by one; see `rewriting`."""
        with self.rewriting(out_dir, extra_files, overwrite=overwrite) as put:
            for module, b, a in edited:
                put(module, b, a)

    def config_with(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """adapter_config.json for a copy in which some modules have another rank, and all their scaling.

        Raises:
            ValueError: no rank can change: several adapters in one file, PiSSA and other inits that change the base
                weights by r; or patterns cannot tell the modules apart.
        """
        if any(why.startswith("belongs to adapter") for why in self.carried.values()):
            raise ValueError(
                f"{self.weights.path} holds several adapters under one config, which gives both the same ranks; "
                "zero the channels instead"
            )
        return with_ranks(self.config, self.modules, self.carried_modules, ranks)

    @property
    def carried_modules(self) -> list[str]:
        """Names of the modules among `carried`: those that have factors, though not editable ones."""
        return [name for name in self.carried if name not in self.weights.tensors]

    def _shapes(self, module: LoraModule, r: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The stored shapes of lora_B and lora_A for rank r."""
        b, a = (self.weights.tensors[key].shape for key in (module.b_key, module.a_key))
        yield module.b_key, (b[0], r, *b[2:])
        yield module.a_key, (r, *a[1:])


def check_factors(module: LoraModule, r: int, b: Tensor, a: Tensor, check_finite: bool = True) -> None:
    """Refuse factors to write that have not the module's shape for rank r, or NaN or infinite values."""
    for key, factor, shape in ((module.b_key, b, (module.m, r)), (module.a_key, a, (r, module.n))):
        if factor.shape != shape:
            raise ValueError(f"{key} needs an edited factor of shape {shape}, got {tuple(factor.shape)}")
        if check_finite and not is_finite(factor):
            raise ValueError(
                f"the edited {key} has NaN or infinite values ({factor.dtype} ends at "
                f"{torch.finfo(factor.dtype).max:.3g}); edit less, or look for NaN in the source"
            )


def _read_config(path: Path, splines: bool) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}; {_contents(path)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind == PEFT_TYPE and not splines:
        raise ValueError(
            f"{file} describes an LS-LoRA: after B A comes a learned spline, so that the update has no singular values "
            "to measure, edit or prune, cannot be merged, and runs in transformers only (eval --engine transformers)"
        )
    if kind not in ("LORA", PEFT_TYPE):
        raise ValueError(
            f"{file} should describe a LoRA adapter (peft_type LORA), got {kind!r}; only LoRA can be edited"
        )
    return dict(config)


def _contents(path: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    return f"it contains {', '.join(names[:20])}{' …' * (len(names) > 20)}" if names else "it is empty"


def _aligned(size: int) -> int:
    return -(-size // 64) * 64  # a cache line, as torch aligns its own


def _fingerprint(hashes: Mapping[str, str]) -> str:
    return sha256("".join(hashes.values()).encode()).hexdigest()


def _component(module: LoraModule) -> str:
    return module.name.rpartition(".")[2]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # aminmax hands NaN on and takes a tenth of the time of isfinite().all(); it lacks the 8-bit floats.
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    return math.isfinite(low) and math.isfinite(high)


def _copy_folder(source: Path, target: Path, skip: Iterable[str] = ()) -> None:
    """Copy files, modes and times; links (as in a Hugging Face snapshot) become what they point to."""
    for entry in sorted(source.iterdir()):
        if any(fnmatch(entry.name, pattern) for pattern in skip):
            continue
        if entry.is_dir():
            if entry.resolve() in (source.resolve(), *source.resolve().parents):
                raise ValueError(f"{entry} is a link to a folder that contains it; remove it before copying {source}")
            (target / entry.name).mkdir()
            _copy_folder(entry, target / entry.name)
        elif entry.is_file():
            shutil.copy2(entry, target / entry.name)
        else:
            raise ValueError(f"{entry} is a broken link or not a plain file; remove it before copying {source}")
