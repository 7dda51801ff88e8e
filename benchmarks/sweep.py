"""Eight variants in one sweep against eight runs of `edit` and `eval`: ``python -m benchmarks.sweep``.

Both sides start from nothing, on the embedded model and the same problems, one command after another.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import parser_of, write_table
from benchmarks.timing import ROOT
from spectral_fast import embedded

RESULTS = ROOT / "benchmarks" / "results" / "sweep.csv"
GAINS = [(amp, sup) for amp in (1.1, 1.25, 1.5, 2.0) for sup in (0.5, 0.8)]
SAMPLES = 32
Times = tuple[float, float]  # by the clock, and of the processor
# vLLM's LoRA on a CPU copies weights per token; page faults cost more than the copies unless glibc keeps the memory.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def command(*words: object) -> Times:
    """Seconds that a command of ours took, and seconds of processor time, which other programs change less."""
    began, used = time.perf_counter(), processor_time()
    line = [sys.executable, "-m", "spectral_fast", *map(str, words)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=os.environ | KEPT_MEMORY)
    return time.perf_counter() - began, processor_time() - used


def processor_time() -> float:
    """Of all processes that this one has waited for, and those that they have."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(engine: str, variants: int, samples: int) -> tuple[Times, Times]:
    """What one sweep takes, and what `edit` and `eval` of each variant take together."""
    base, lora = embedded.base_model_dir(), embedded.adapter_dir()
    calibration = ["--calib_data", embedded.calibration_file(), "--calib_samples", 8]
    task = ["--eval_data", embedded.heldout_file(), "--fewshot", 0, "--max_samples", samples, "--max_tokens", 96]
    task += ["--engine", engine, "--dtype", "fp32", "--max_model_len", 512, "--enforce_eager", "--base_model", base]
    gains = GAINS[:variants]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = {"lora_local_path": str(lora), "edit_mode": "abs_select"}
        lines = [{**config, "amp_factor": amp, "sup_factor": sup} for amp, sup in gains]
        (root / "configs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        together = ["sweep", root / "configs.jsonl", "--out_dir", root / "sweep", *task, *calibration]
        one = command(*together, "--controls", 0, "--max_loras", len(gains) + 1)  # the original is evaluated, too
        apart = []
        for i, (amp, sup) in enumerate(gains):
            edited = root / f"edited{i}"
            files = ["--base_model", base, "--lora_path", lora, "--out_dir", edited]
            factors = ["--amp_factor", amp, "--sup_factor", sup, "--dtype", "fp32"]
            apart.append(command("edit", *files, *calibration, *factors))
            apart.append(command("eval", "--lora_dir", edited, *task))
    clock, processor = (sum(times) for times in zip(*apart, strict=True))
    return one, (clock, processor)


def table(one: Times, apart: Times) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    for way, (clock, processor) in (("one sweep", one), ("edit and eval of each", apart)):
        yield {
            "way": way,
            "seconds": f"{clock:.1f}",
            "processor_seconds": f"{processor:.1f}",
            "times_as_long": f"{clock / one[0]:.2f}",
            "times_the_processor": f"{processor / one[1]:.2f}",
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both; print the table and write it."""
    parser = parser_of("benchmarks.sweep", __doc__, RESULTS)
    parser.add_argument("engine", nargs="?", default="vllm", choices=("vllm", "transformers"), help="(default: vllm)")
    parser.add_argument("--variants", type=int, default=len(GAINS), help=f"1 to {len(GAINS)} (default: all)")
    parser.add_argument("--problems", type=int, default=SAMPLES, help=f"held-out problems (default: {SAMPLES})")
    args = parser.parse_args(argv)
    made = {"engine": args.engine, "variants": args.variants, "problems": args.problems}
    write_table(table(*seconds(args.engine, args.variants, args.problems)), made, args.out, "benchmarks.sweep", argv)


if __name__ == "__main__":
    main()
