"""Compiles every shipped kernel for every architecture, without a GPU: ``python -m benchmarks.codegen``.

Of each variant that an op's ``shipped`` names: it compiles, spills nothing, fits into the registers and the shared
memory of its architecture, and its products run on matrix units where they must. Then csrc/cuda by nvcc, where that
is installed. A failure is named, and the exit status is 1.

Some 770 variants take ten minutes of a core, nearly all of it to find what results/codegen.csv says already. So each
row has a key, a hash of all that it follows from: names, Triton's own cache key of the source (the kernel, all that it
calls, its constants and signature), options, architecture and its limits, Triton's version, and the checks made here.
A row that is compiled again must come out as the table says, and with ``--again 5``, as `make codegen` has it, of the
rows with a key that is the table's only one in five are.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.resources import Resources, of_amdgcn, of_cubin
from benchmarks.timing import ROOT
from benchmarks.traffic import Launch
from spectral_fast.kernels.gpu import ARCHITECTURES, INTERPRETED, Shipped, Variant

CSV = ROOT / "benchmarks/results/codegen.csv"
NVCC_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
REGISTERS = {"cuda": 255, "hip": 512}  # of 32 bits, that one thread can have
# That all warps of a multiprocessor share: 64 Ki for warps of 32 (CUDA), 128 Ki for waves of 64 (CDNA).
REGISTERS_OF_ALL_WARPS = 2048
# Compiled for sizes that are no multiples of 16, too; for all architectures it would take too long. Loads of single
# elements take so many registers for addresses that these may spill: what no layer of a model has may be slow.
ANY_SIZES = "sm_90"
MARK = ", any sizes"
TENSOR_MEMORY = 512  # columns, of Blackwell's
Job = tuple[str, str, int]  # module, architecture, number of the variant


@dataclass(frozen=True)
class Result:
    """One kernel, compiled for one architecture.

    Attributes:
        op: folder of the kernel.
        name: of the variant, or of the function in CUDA.
        arch: key of ``ARCHITECTURES``, or nvcc's name.
        seconds: that compiling and reading it took.
        resources: what it uses; None if it did not compile.
        failures: what is wrong, in words.
        key: of all that the resources follow from; none of CUDA, which is compiled every time.
    """

    op: str
    name: str
    arch: str
    seconds: float
    resources: Resources | None
    failures: tuple[str, ...]
    key: str = ""

    @property
    def matrix(self) -> str:
        """Matrix instructions, e.g. "HMMA 32"."""
        counts = self.resources.matrix if self.resources else {}
        return " + ".join(f"{kind} {count}" for kind, count in counts.items())

    def row(self) -> dict[str, str]:
        """What the CSV keeps: nothing that differs from run to run."""
        x = self.resources
        figures = (x.registers, x.spills, x.shared) if x else ("", "", "")
        return {
            "op": self.op,
            "variant": self.name,
            "arch": self.arch,
            **dict(zip(("registers", "spill_bytes", "shared_bytes"), map(str, figures), strict=True)),
            "matrix_instructions": self.matrix,
            "key": self.key,
        }

    def __str__(self) -> str:
        x = self.resources
        figures = f"{x.registers:>5}{x.spills:>7}{x.shared:>8}" if x else f"{'-':>5}{'-':>7}{'-':>8}"
        verdict = "  FAILED" if self.failures else ""
        return f"{self.op:<16}{self.name:<58}{self.arch:<8}{figures}  {self.matrix:<12}{self.seconds:>6.1f}{verdict}"


HEADER = f"{'op':<16}{'variant':<58}{'arch':<8}{'regs':>5}{'spills':>7}{'shared':>8}  {'matrix':<12}{'s':>6}"


def kernel_modules() -> list[str]:
    """The modules with Triton kernels: every kernels/<op>/gpu.py."""
    return [f"spectral_fast.kernels.{file.parent.name}.gpu" for file in sorted((ROOT / "kernels").glob("*/gpu.py"))]


@lru_cache
def shipped(module: str, arch: str) -> tuple[Shipped, ...]:
    """What a module ships for an architecture, and, for one, also as Triton compiles it for sizes such as r = 8."""
    items = tuple(importlib.import_module(module).shipped(arch))
    if arch != ANY_SIZES:
        return items
    # Bfloat16 is compiled as float16 is, for which there are fewer variants.
    items_once = [x for x in items if "*bf16" not in x.signature.values()]
    general = [
        x._replace(signature={name: kind.removesuffix(":16") for name, kind in x.signature.items()}) for x in items_once
    ]
    added: list[Shipped] = []
    for x, y in zip(items_once, general, strict=True):
        # Variants that differ by what a size is a multiple of are the same now.
        if x.signature != y.signature and not any((y.variant, y.signature) == other[1:3] for other in added):
            added.append(y._replace(name=y.name + MARK))
    return (*items, *added)


def uncompiled(launches: Iterable[Launch], arch: str) -> list[str]:
    """Launches that no shipped variant fits: what would run there is not what is compiled here."""
    everything = [item for module in kernel_modules() for item in shipped(module, arch)]
    return [
        f"{launch.kernel} with {dict(launch.variant.constants)}, {launch.variant.warps} warps"
        for launch in launches
        if not any(launch.fits(item, any_sizes=item.name.endswith(MARK)) for item in everything)
    ]


def key(job: Job) -> str:
    """The hash of all that a variant's row follows from; of what is not even a source, none."""
    import triton

    module, arch, index = job
    item = shipped(module, arch)[index]
    try:
        source = _source(item).hash()
    except TypeError:  # which compiling it will name
        return ""
    what = (module, item.name, item.matrix, source, sorted(_options(item.variant).items()))
    parts = (*what, arch, ARCHITECTURES[arch], triton.__version__, _checks())
    return sha256(repr(parts).encode()).hexdigest()[:16]


@cache
def _checks() -> str:
    files = (Path(__file__), Path(__file__).with_name("resources.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def compile_shipped(job: Job, recorded: Mapping[str, str] | None = None) -> Result:
    """Compiles and checks one variant, in a worker, also against the row that the table has of it."""
    start = time.perf_counter()
    module, arch, index = job
    item = shipped(module, arch)[index]
    try:
        resources, tensor_memory = _compile(item, arch)
    except Exception as error:  # of whatever kind: it is the finding
        message = " ".join(str(error).split())
        resources, failures = None, (f"does not compile: {type(error).__name__}: {message[:400]}",)
    else:
        failures = tuple(_failures(item, arch, resources, tensor_memory))
    op = module.removesuffix(".gpu").rpartition(".")[2]
    result = Result(op, item.name, arch, time.perf_counter() - start, resources, failures, key(job))
    if recorded and not failures and (wrong := dict(recorded.items() - result.row().items())):
        result = replace(result, failures=(f"the table says {wrong}, of the same source and compiler",))
    return result


def _source(item: Shipped) -> Any:
    from triton.compiler import ASTSource

    variant = item.variant
    names = variant.kernel.arg_names
    if unknown := {*variant.constants, *item.signature} ^ set(names):
        raise TypeError(f"constants and signature must name each argument of the kernel once; look at {unknown}")
    types = {name: item.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _aligned(types[name])}
    return ASTSource(
        fn=variant.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=dict(variant.constants),
        attrs=aligned,
    )


def _compile(item: Shipped, arch: str) -> tuple[Resources, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", arch, 64) if _backend(arch) == "hip" else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(_source(item), target=target, options=_options(item.variant))
    shared = compiled.metadata.shared
    if _backend(arch) == "hip":
        return of_amdgcn(compiled.asm["amdgcn"], shared), 0
    [resources] = of_cubin(compiled.asm["cubin"], shared, matrix=item.matrix).values()
    return resources, compiled.metadata.tmem_size


def _aligned(kind: str) -> bool:
    """Whether Triton may take an argument for a multiple of 16: tensors are, and sizes that say so."""
    return kind.startswith("*") or kind.endswith(":16")


def _options(variant: Variant) -> dict[str, Any]:
    return {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": variant.fusion}


def _backend(arch: str) -> str:
    return "hip" if arch.startswith("gfx") else "cuda"


def _failures(item: Shipped, arch: str, used: Resources, tensor_memory: int) -> Iterator[str]:
    if used.spills and not item.name.endswith(MARK):
        yield f"spills {used.spills} bytes"
    most = min(REGISTERS[_backend(arch)], REGISTERS_OF_ALL_WARPS // item.variant.warps)
    if used.registers > most:
        yield f"{used.registers} registers a thread; {item.variant.warps} warps can have {most}"
    if used.shared > ARCHITECTURES[arch].shared:
        yield f"{used.shared} bytes of shared memory; a program can have {ARCHITECTURES[arch].shared}"
    if tensor_memory > TENSOR_MEMORY:
        yield f"{tensor_memory} columns of tensor memory; there are {TENSOR_MEMORY}"
    if item.matrix and not used.matrix:
        yield "its products must run on matrix units, but there is no matrix instruction in the code"


def compile_cuda(file: Path, arch: str) -> list[Result]:
    """Compiles and checks the kernels of one CUDA source by nvcc."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-o", str(cubin), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"does not compile: {' '.join(done.stderr.split())[:400]}"
            return [Result("csrc/cuda", file.name, arch, time.perf_counter() - start, None, (message,))]
        kernels = of_cubin(cubin.read_bytes(), matrix=False)
    seconds = (time.perf_counter() - start) / max(1, len(kernels))
    return [
        Result(
            "csrc/cuda",
            f"{file.name}: {_plain(name)}",
            arch,
            seconds,
            x,
            (f"spills {x.spills} bytes",) if x.spills else (),
        )
        for name, x in kernels.items()
    ]


def _plain(name: str) -> str:
    """A mangled name without its unnamed namespace, which differs from build to build, and without its arguments."""
    return re.sub(r"^_ZN\d+_GLOBAL__N__\w*?_cu_[0-9a-f]{8}\d+|EE\w*$", "", name)


def _worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def results(
    todo: Iterable[tuple[Job, Mapping[str, str] | None]], sources: Iterable[Path], jobs: int
) -> Iterator[Result]:
    """The variants, each with the row it must agree with, and every CUDA source, by so many processes, in order."""
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_worker, initargs=(cache,)) as pool,
    ):
        futures = [pool.submit(compile_shipped, job, recorded) for job, recorded in todo]
        cuda = [pool.submit(compile_cuda, file, arch) for file in sources for arch in NVCC_ARCHITECTURES]
        for future in futures:
            yield future.result()
        for future in cuda:
            yield from future.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument(
        "modules", nargs="*", help="modules with a `shipped` (default: those of all ops, and csrc/cuda)"
    )
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)")
    parser.add_argument(
        "--again",
        type=int,
        default=1,
        metavar="N",
        help="of variants whose key the CSV has compile 1 in N (default: all)",
    )
    parser.add_argument("--out", type=Path, help="CSV (default: results/codegen.csv where everything is compiled)")
    args = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile under the interpreter")
    if args.again < 1:
        parser.error(f"--again must be 1 or more; got {args.again}")
    everything = not args.modules and args.arch == list(ARCHITECTURES)
    out = args.out or (CSV if everything else None)
    sources = [] if args.modules else sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if sources and shutil.which("nvcc") is None:
        print(f"nvcc is not installed: {', '.join(file.name for file in sources)} in csrc/cuda not compiled")
        sources = []

    start = time.perf_counter()
    table = read_csv(out or CSV)
    wanted = [
        (module, arch, i)
        for module in args.modules or kernel_modules()
        for arch in args.arch
        for i in range(len(shipped(module, arch)))
    ]
    if not wanted:
        parser.error("nothing is shipped by these modules")
    rows = {job: table.get(key(job)) for job in wanted}
    todo = [(job, row) for job, row in rows.items() if row is None or int(row["key"], 16) % args.again == 0]
    print(HEADER)
    done = []
    for result in results(todo, sources, args.jobs):
        print(result, flush=True)
        done.append(result)
    rows |= {job: result.row() for (job, _), result in zip(todo, done, strict=False)}
    failed = [f"{x.op}: {x.name} for {x.arch}: {failure}" for x in done for failure in x.failures]
    print(f"{len(done)} kernels in {time.perf_counter() - start:.0f} s, {len(failed)} failures")
    print(f"{len(wanted) - len(todo)} more are unchanged since they were")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    if out is not None and not failed:
        write_csv(out, [*filter(None, rows.values()), *(x.row() for x in done[len(todo) :])])
    return 1 if failed else 0


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    """Key -> row, without the compiler's version, which the key has."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "triton"} for row in csv.DictReader(file)]
    return {row["key"]: row for row in rows if row.get("key")}


def write_csv(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One row per kernel and architecture, with the compiler's version: other versions allot otherwise."""
    import triton

    rows = [row | {"triton": triton.__version__} for row in map(dict, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
