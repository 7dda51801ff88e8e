"""Adapters on disk for the timed commands: ``python -m benchmarks.adapter_file make|check TASK FOLDER``.

``make`` leaves FOLDER/adapter and FOLDER/sensitivity and prints what it was made with, ``check`` verifies
FOLDER/edited. Both run in a process of their own, so that the one that times commands stays small.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.cases import ALL_LINEAR, Task
from benchmarks.cases import Adapter as Case
from benchmarks.factors import adapter_factors
from benchmarks.machine import software
from spectral_fast.adapter import Adapter
from spectral_fast.bench.gate import EPS32, RATIO, WrongResult, probe_error
from spectral_fast.kernels.lowrank_svd import reference
from spectral_fast.policies import POLICIES
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity
from spectral_fast.spectrum import lowrank_svd

MODE = "abs_select"


def make(case: Case, folder: Path) -> None:
    """An adapter in PEFT's format, and sensitivities as `probe` would leave them, at random."""
    adapter, probed = folder / "adapter", folder / "sensitivity"
    adapter.mkdir(parents=True)
    probed.mkdir()
    bs, as_ = adapter_factors(case)
    tensors: dict[str, Tensor] = {}
    for name, b, a in zip(case.shapes(), bs, as_, strict=True):
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": case.rank,
        "lora_alpha": 2 * case.rank,
        "target_modules": list(case.targets),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    modules = {
        name: ModuleSensitivity(x.s, torch.randn(case.rank, generator=generator, dtype=torch.float64))
        for name, x in zip(case.shapes(), lowrank_svd(bs, as_), strict=True)
    }
    opened = Adapter.open(adapter)
    record = {"adapter_stamp": opened.stamp(), "adapter_sha256": opened.fingerprint()}
    Sensitivity(modules, record).save(probed)


def check(folder: Path) -> None:
    """The edit of the first and the last layer's modules, against the definition in float64.

    Column k of B' and row k of A' must have the squared length s'_k, which tells that direction k was edited, and
    B' diag(s / s') A' must be ΔW, which tells that the directions are right. Bounds: U and V are orthonormal
    to 30 r ε, and rounding to the file's dtype moves a squared length by (1 + u)² and ΔW by 2 u ‖s‖.
    """
    source, edited = Adapter.open(folder / "adapter"), Adapter.open(folder / "edited")
    sensitivity, policy = Sensitivity.load(folder / "sensitivity"), POLICIES[MODE]()
    names = list(source.modules)
    for name in {*names[: len(ALL_LINEAR)], *names[-len(ALL_LINEAR) :]}:
        b, a = (x.double() for x in source.read(source.modules[name]))
        b_new, a_new = (x.double() for x in edited.read(edited.modules[name]))
        dtype, rank = source.modules[name].dtype, b.shape[1]
        s = reference.factor(b, a, name).s
        s_new = policy.apply(s, sensitivity.modules[name].g, name).s_new
        contract = RATIO * rank * EPS32
        lengths = torch.stack([b_new.square().sum(0), a_new.square().sum(1)]) / s_new
        # s' follows s, so the relative error of a small s is that of the largest one, enlarged.
        length_bound = 3 * torch.finfo(dtype).eps / 2 + contract * (1 + s.amax() / s)
        error = probe_error(b_new * (s / s_new), a_new, partial(_product, b, a))
        bound = 2 * (torch.finfo(dtype).eps * s.norm() + 2 * contract * b.norm() * a.norm())
        if not (((lengths - 1).abs() <= length_bound).all() and error <= bound):
            raise WrongResult(
                f"{name}: the edit undone must be ΔW within {bound:.2e}, got {error:.2e}; squared lengths over s' "
                f"must be 1, got {lengths.amin():.4g} to {lengths.amax():.4g}"
            )


def _product(b: Tensor, a: Tensor, probes: Tensor) -> Tensor:
    return b @ (a @ probes)


def main() -> None:
    """Make or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "check"])
    parser.add_argument("task", type=Task.loads)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.action == "make":
        make(args.task.case, args.folder)
        print(json.dumps(software()))
    else:
        check(args.folder)


if __name__ == "__main__":
    main()
