"""Merged adapters beside those that PEFT's add_weighted_adapter makes, and what PEFT computes with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import logits
from merge_tools import peft_adapter, relative, update, weighted_sum
from peft import PeftModel
from tiny_models import tiny_llama

from spectral_fast.adapter import Adapter
from spectral_fast.toolbox.merging import METHODS, MergeOptions, merge_adapters

WEIGHTS = [0.7, -0.4]
PEFTS = [
    *("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
    *("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"),
]
# Sums of float32 products of up to 64 terms, and an SVD, by two routes.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


def options_for(method: str, **more: Any) -> MergeOptions:
    how = METHODS[method]
    return MergeOptions(method=method, density=0.5 if how.sparsify else None, **more)


def whole_rank(method: str) -> dict[str, int]:
    """For PEFT, where it would truncate: two truncations agree to rounding only where singular values are far apart."""
    return {"svd_rank": 48} if method.endswith("svd") else {}


def by_peft(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, method: str, out: Path, **more: Any
) -> dict[str, torch.Tensor]:
    """Module -> scaling · B A of PEFT's own result, its masks drawn from seed 3."""
    model = PeftModel.from_pretrained(tiny_llama(), str(folders[0]), adapter_name="one")
    names = ["one", "two"]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    # PEFT draws the initial factors, too, which it then replaces: the masks begin where it freezes them.
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(3))
    if METHODS[method].sparsify:
        more["density"] = 0.5
    model.add_weighted_adapter(names, WEIGHTS, "merged", combination_type=method, **more)
    model.save_pretrained(str(out), selected_adapters=["merged"])
    return update(out / "merged")


@pytest.mark.parametrize("method", PEFTS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_the_result_is_that_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, sign: str) -> None:
    if sign == "frequency" and not METHODS[method].elect:
        pytest.skip("no election")
    folders = [peft_adapter(tmp_path / "a", 1), peft_adapter(tmp_path / "b", 2, lora_alpha=9)]
    whole = whole_rank(method)
    wanted = by_peft(folders, monkeypatch, method, tmp_path / "peft", majority_sign_method=sign, **whole)
    sources = [Adapter.open(folder) for folder in folders]
    how = {"seed": 3, "majority_sign": sign}
    merge_adapters(sources, WEIGHTS, options_for(method, **how, rank=whole.get("svd_rank")), tmp_path / "out")
    got = update(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert max(relative(got[name], wanted[name]) for name in got) < TOLERANCE
    if whole:  # as near to it as a matrix of rank 4, PEFT's default here, can be
        merged = merge_adapters(sources, WEIGHTS, options_for(method, **how), tmp_path / "truncated")
        for name, delta in update(tmp_path / "truncated").items():
            s = torch.linalg.svdvals(wanted[name])
            nearest = float(s[4:].norm() / s.norm())
            assert merged[name].r == 4
            assert relative(delta, wanted[name]) == pytest.approx(nearest, abs=TOLERANCE)
            assert merged[name].error == pytest.approx(nearest, abs=TOLERANCE)


@pytest.mark.parametrize("method", ["svd", "cat", "ties_svd"])
def test_the_result_is_that_of_peft_for_other_ranks_targets_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    folders = [
        peft_adapter(tmp_path / "a", 1, r=6, rank_pattern={"o_proj": 2}, alpha_pattern={"down_proj": 5}),
        peft_adapter(tmp_path / "b", 2, r=3, target_modules=["o_proj", "up_proj"]),
    ]
    whole = whole_rank(method)
    wanted = by_peft(folders, monkeypatch, method, tmp_path / "peft", **whole)
    sources = [Adapter.open(folder) for folder in folders]
    merged = merge_adapters(sources, WEIGHTS, options_for(method, rank=whole.get("svd_rank")), tmp_path / "out")
    got = update(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert max(relative(got[name], wanted[name]) for name in got) < TOLERANCE
    owners = {name.split(".")[-1]: module.sources for name, module in merged.items()}
    assert owners == {"q_proj": [0], "o_proj": [0, 1], "down_proj": [0], "up_proj": [1]}


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_result_and_computes_with_it(tmp_path: Path, method: str) -> None:
    folders = [peft_adapter(tmp_path / "a", 1, use_rslora=True), peft_adapter(tmp_path / "b", 2)]
    merge_adapters([Adapter.open(folder) for folder in folders], WEIGHTS, options_for(method), tmp_path / "out")
    merged = tiny_llama()
    with torch.no_grad():
        for name, delta in update(tmp_path / "out").items():
            merged.get_submodule(name.removeprefix("base_model.model.")).weight += delta.float()
    got = logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")))
    torch.testing.assert_close(got, logits(merged), rtol=0, atol=1e-5)
    assert (got - logits(tiny_llama())).abs().max() > 1e-3


def test_rslora_adapters_are_summed_with_their_own_scalings(tmp_path: Path) -> None:
    folders = [peft_adapter(tmp_path / "a", 1, use_rslora=True), peft_adapter(tmp_path / "b", 2, r=9, use_rslora=True)]
    merge_adapters([Adapter.open(x) for x in folders], WEIGHTS, MergeOptions(method="cat"), tmp_path / "out")
    wanted, got = weighted_sum(folders, WEIGHTS), update(tmp_path / "out")
    assert max(relative(got[name], wanted[name]) for name in wanted) < torch.finfo(torch.float32).eps
    assert {module.scaling for module in Adapter.open(tmp_path / "out").modules.values()} == {1.0}
