"""Eight variants in one sweep against eight runs of `edit` and `eval`: ``python -m benchmarks.sweep [ENGINE]``.

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
from pathlib import Path

from spectral_fast import embedded

GAINS = [(amp, sup) for amp in (1.1, 1.25, 1.5, 2.0) for sup in (0.5, 0.8)]
SAMPLES = 32
# vLLM's LoRA on a CPU copies weights per token; page faults cost more than the copies unless glibc keeps the memory.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def command(*words: object) -> tuple[float, float]:
    """Seconds that a command of ours took, and seconds of processor time, which other programs change less."""
    began, used = time.perf_counter(), processor_time()
    line = [sys.executable, "-m", "spectral_fast", *map(str, words)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=os.environ | KEPT_MEMORY)
    return time.perf_counter() - began, processor_time() - used


def processor_time() -> float:
    """Of all processes that this one has waited for, and those that they have."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(engine: str = "vllm") -> None:
    """Measure both, and print the ratios."""
    base, lora = embedded.base_model_dir(), embedded.adapter_dir()
    calibration = ["--calib_data", embedded.calibration_file(), "--calib_samples", 8]
    task = ["--eval_data", embedded.heldout_file(), "--fewshot", 0, "--max_samples", SAMPLES, "--max_tokens", 96]
    task += ["--engine", engine, "--dtype", "fp32", "--max_model_len", 512, "--enforce_eager", "--base_model", base]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = {"lora_local_path": str(lora), "edit_mode": "abs_select"}
        lines = [{**config, "amp_factor": amp, "sup_factor": sup} for amp, sup in GAINS]
        (root / "configs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        together = ["sweep", root / "configs.jsonl", "--out_dir", root / "sweep", *task, *calibration]
        one = command(*together, "--controls", 0, "--max_loras", len(GAINS) + 1)  # the original is evaluated, too
        apart = []
        for i, (amp, sup) in enumerate(GAINS):
            edited = root / f"edited{i}"
            files = ["--base_model", base, "--lora_path", lora, "--out_dir", edited]
            gains = ["--amp_factor", amp, "--sup_factor", sup, "--dtype", "fp32"]
            apart.append(command("edit", *files, *calibration, *gains))
            apart.append(command("eval", "--lora_dir", edited, *task))
    for name, mine, theirs in zip(("seconds", "processor time"), one, zip(*apart, strict=True), strict=True):
        print(
            f"{engine}, {name}: 8 variants and the original in one sweep {mine:.1f}; 8 times edit and eval "
            f"{sum(theirs):.1f}; {sum(theirs) / mine:.1f} times as long"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
