"""LoRA from a base checkpoint and one that was tuned in full: B A is the nearest to W_tuned − W_base of its rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import torch

from spectral_fast.adapter.creation import check_out_dir
from spectral_fast.adapter.folder import is_finite
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.streaming.work_folder import discard, work_folder
from spectral_fast.provenance import sha256_file, versions
from spectral_fast.spectrum import Spectrum, lowrank_svd, rebuild
from spectral_fast.toolbox.extraction.checkpoints import Pair, differences, open_checkpoints
from spectral_fast.toolbox.extraction.options import ExtractOptions
from spectral_fast.toolbox.extraction.parts import Extracted, Parts
from spectral_fast.toolbox.extraction.range_finder import Projection, project
from spectral_fast.toolbox.extraction.result import Extraction, NothingDiffersError, collect, write
from spectral_fast.toolbox.streaming import batches

META = "extract_meta.json"
_START = 64  # columns to begin with where the rank is not known


def extract_adapter(
    base_model: Path | str,
    tuned_model: Path | str,
    options: ExtractOptions,
    out_dir: Path | str,
    *,
    target_modules: Sequence[str] = ("all-linear",),
    modules_to_save: bool = False,
    model_options: ModelOptions | None = None,
    model_class: str = "auto",
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    work_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[Sequence[Pair]], Iterable[Pair]] = iter,
) -> Extraction:
    """Write the adapter with B A ≈ W_tuned − W_base in every linear layer that differs, at a scaling of 1.

    Tensors are read one by one from the safetensors files, a layer's difference is formed in blocks of rows, and its
    leading directions are found from random ones (`range_finder`): memory is that of two stored weights, which are
    mapped files, and of some (m + 3 n) (rank + oversampling) numbers.

    Args:
        base_model: folder or name of the model before.
        tuned_model: folder or name of the model after.
        options: rank or goal, dtype and the rest.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        target_modules: last components of linear layers' names; all-linear alone is all but the output head.
        modules_to_save: put modules whose change LoRA cannot hold into the adapter as they are (norms, embeddings).
        model_options: where the models come from (cache_dir, trust_remote_code).
        model_class: transformers class whose module names are wanted; "auto" is the class that wrote the base.
        meta: more entries for the "meta" part of `extract_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        work_dir: folder for finished modules, so that a run that was killed can go on; None for a temporary one.
        resume: go on with what is in `work_dir`.
        progress: wraps the list of layers.

    Returns:
        Ranks and measured errors by module; what was equal, saved in full, or lost.

    Raises:
        FileNotFoundError: a model is not to be had, or not as safetensors.
        ValueError: no layer differs; what changed is not finite, or leaves the dtype's range; a model is quantised,
            damaged, or not the other's; or `work_dir` is of another run.
        FileExistsError: `out_dir` or `work_dir` holds something, and neither `overwrite` nor `resume` is given.

    Example:
        >>> from peft import PeftModel
        >>> from transformers import AutoModelForCausalLM
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import ExtractOptions, extract_adapter
        >>> base = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir())
        >>> tuned = PeftModel.from_pretrained(base, str(embedded.adapter_dir())).merge_and_unload()
        >>> tuned.save_pretrained("tuned")
        >>> found = extract_adapter(embedded.base_model_dir(), "tuned", ExtractOptions(rank=32), "lora")
        >>> len(found.ranks), max(x.error / x.norm for x in found.modules.values()) < 0.05
        (20, True)
    """
    base_model, tuned_model = str(base_model), str(tuned_model)
    sources = [Path(model) for model in (base_model, tuned_model) if Path(model).is_dir()]
    check_out_dir(out_dir, sources, overwrite=overwrite)
    found = open_checkpoints(base_model, tuned_model, target_modules, model_options or ModelOptions(), model_class)
    run = {
        **{"base_model": _stamp(found.files[0]), "tuned_model": _stamp(found.files[1])},
        **{"target_modules": list(target_modules), "model_class": model_class, **asdict(options)},
    }
    changed = [pair for pair in found.others if pair.changed()]
    with work_folder(work_dir, run, resume=resume) as folder, _hashes(found.files) as hashes:
        parts = Parts(folder / "modules")
        left = [pair for pair in found.matrices if not parts.has(pair.name)]
        for batch in batches(progress(left), lambda pair: 4 * pair.shape[0] * pair.shape[1]):
            for pair, one in zip(batch, _extract(batch, options), strict=True):
                parts.add(pair.name, one)
        parts.flush()
        try:
            result = collect(found, parts, changed, modules_to_save=modules_to_save)
        except NothingDiffersError:
            discard(folder)  # going on would find the same
            raise

        def record() -> bytes:
            content = {
                "meta": {
                    "base_model": base_model,
                    "tuned_model": tuned_model,
                    **asdict(options),
                    "target_modules": list(target_modules),
                    "modules_to_save": modules_to_save,
                    **(meta or {}),
                    "files_sha256": hashes(),
                    "versions": versions(),
                },
                **result.record(),
            }
            return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

        write(found, parts, result, out_dir, base_model, {META: record}, sources=sources, overwrite=overwrite)
    if work_dir is not None:
        discard(work_dir)
    return result


def _extract(batch: Sequence[Pair], options: ExtractOptions) -> list[Extracted]:
    """The results of some layers; their small SVDs are taken at once."""
    results: dict[int, Extracted] = {}
    chosen: dict[int, tuple[Spectrum, int, float, float, bool]] = {}
    projections: dict[int, Projection | None] = dict.fromkeys(range(len(batch)))
    columns = options.most if options.rank is not None else min(options.most, _START)
    while projections:
        for i, before in projections.items():
            projections[i] = _project(batch[i], columns + options.oversampling, options, before)
            if projections[i] is None:
                results[i] = Extracted(None, None, 0.0, 0.0, True)
        there = {i: x for i, x in projections.items() if x is not None}
        spectra = lowrank_svd(
            [x.y for x in there.values()], [x.q for x in there.values()], [batch[i].name for i in there]
        )
        for (i, projection), spectrum in zip(there.items(), spectra, strict=True):
            k, missed, reached = options.choose(spectrum.s, projection)
            if reached or columns >= min(options.most, *batch[i].shape):
                chosen[i] = spectrum, k, projection.energy, missed, reached
        projections = {i: x for i, x in there.items() if i not in chosen}
        columns = min(2 * columns, options.most)
    kept = [spectrum.only(torch.arange(k)) for spectrum, k, *_ in chosen.values()]
    factors = rebuild(kept, [spectrum.s for spectrum in kept], names=[batch[i].name for i in chosen])
    for (i, (_, _, energy, missed, reached)), (b, a) in zip(chosen.items(), factors, strict=True):
        if batch[i].transposed:
            b, a = a.mT, b.mT
        dtype = batch[i].info.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        b, a = b.to(dtype).contiguous(), a.to(dtype).contiguous()
        if not (is_finite(b) and is_finite(a)):
            raise ValueError(
                f"{batch[i].name}: the factors leave the range of {dtype}, {torch.finfo(dtype).max:.3g}; give another "
                "dtype, such as float32"
            )
        results[i] = Extracted(b, a, energy**0.5, max(missed, 0.0) ** 0.5, reached)
    return [results[i] for i in range(len(batch))]


def _project(pair: Pair, columns: int, options: ExtractOptions, before: Projection | None) -> Projection | None:
    """Of the difference as it is stored."""
    base, tuned = pair.base(), pair.tuned()
    dtype = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    digest = sha256(f"{options.seed}:{pair.name}".encode()).digest()  # whatever the order, or where a run was killed
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    start = None if before is None else before.q
    m, n = pair.info.shape
    try:
        return project(
            partial(differences, base, tuned, dtype), (m, n), columns, options.passes, generator, dtype, start
        )
    except ValueError as error:
        raise ValueError(f"{pair.name}: {error}") from error


def _stamp(files: Sequence[Path]) -> dict[str, list[int]]:
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


@contextmanager
def _hashes(files: tuple[Sequence[Path], Sequence[Path]]) -> Iterator[Callable[[], dict[str, dict[str, str]]]]:
    """A function that waits for the SHA-256 of every file, which a thread takes while the block runs."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            lambda: {
                which: {file.name: sha256_file(file, stop) for file in each}
                for which, each in zip(("base_model", "tuned_model"), files, strict=True)
            }
        )
        try:
            yield future.result
        finally:
            stop.set()
