"""What is told of an adapter's spectra, and of two adapters beside each other, against dense matrices."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_tools import handmade
from safetensors.torch import load_file, save_file
from toolbox_tools import PREFIX, many, odd, update

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.adapter.patterns import Patterns
from spectral_fast.cli import main
from spectral_fast.report.inspection import inspection_picture
from spectral_fast.toolbox.difference import compare_adapters
from spectral_fast.toolbox.inspection import InspectOptions, as_csv, inspect_adapter
from spectral_fast.toolbox.resize import ResizeOptions, resize_adapter

Q, ZERO, DEAD = (f"{PREFIX}.{name}" for name in ("0.self_attn.q_proj", "1.mlp.down_proj", "1.self_attn.q_proj"))
WIDE = f"{PREFIX}.0.mlp.router"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_the_numbers_are_those_of_the_dense_update(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    found = inspect_adapter(Adapter.open(odd(tmp_path / "source", dtype, use_rslora=rslora)))
    for name, w in update(tmp_path / "source").items():
        row, s = found[name].row(), torch.linalg.svdvals(w).numpy()
        r = row["r"]
        np.testing.assert_allclose(found[name].s[: len(s)], s[:r], rtol=1e-5, atol=1e-5 * s[0])
        if name == ZERO:
            assert found[name].remarks() == ["zero update"]
            assert (row["numerical_rank"], row["stable_rank"], row["condition"], row["rank_90"]) == (
                0,
                None,
                None,
                None,
            )
            continue
        live = s[: {Q: 4, DEAD: 2, WIDE: 3}.get(name, r)]
        p, shares = live / live.sum(), np.cumsum(live**2) / (live**2).sum()
        wanted = {
            "frobenius": np.linalg.norm(w),
            "spectral": s[0],
            "nuclear": live.sum(),
            "stable_rank": (live**2).sum() / s[0] ** 2,
            "effective_rank": np.exp(-(p * np.log(p)).sum()),
            "numerical_rank": len(live),
            "condition": live[0] / live[-1],
            "energy_top_1": shares[0],
            "energy_top_16": 1.0,
            "rank_90": 1 + int(np.argmax(shares >= 0.9)),
            "rank_99": 1 + int(np.argmax(shares >= 0.99)),
        }
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-4), name
    assert found[DEAD].remarks() == ["2 of 4 directions are zero"]
    assert found[WIDE].remarks() == ["5 of 8 directions are zero"]


def test_a_spike_is_remarked_on(tmp_path: Path) -> None:
    b = torch.eye(10, 4) * torch.tensor([40.0, 2.0, 1.0, 1.0])
    tensors = {f"{Q}.lora_A.weight": torch.eye(4, 12), f"{Q}.lora_B.weight": b}
    adapter = Adapter.open(handmade(tmp_path / "source", tensors=tensors))
    [found] = inspect_adapter(adapter).values()
    assert found.row()["spikes"] == 1
    assert found.remarks() == ["1 spike, up to 26.7 x median"]
    [found] = inspect_adapter(adapter, InspectOptions(spike=30)).values()
    assert not found.remarks()
    negative = Adapter.open(handmade(tmp_path / "negative", {"lora_alpha": -8}, tensors))
    [same] = inspect_adapter(negative).values()
    assert same.s.tolist() == found.s.tolist()


def test_the_command_writes_table_json_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, out = str(embedded.adapter_dir()), tmp_path / "out"
    argv = ["inspect", "--lora_path", lora, "--rows", "3"]
    assert main([*argv, "--out_dir", str(out)]) == 0
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("layers.")]) == 3
    assert "17 modules with smaller updates" in text
    assert sorted(file.name for file in out.iterdir()) == ["inspection.csv", "inspection.json", "inspection.png"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "inspection.json").read_text())
    assert result["meta"]["adapter_sha256"] == Adapter.open(lora).fingerprint()
    with (out / "inspection.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["module"] for row in rows] == list(result["modules"])
    assert float(rows[5]["frobenius"]) == result["modules"][rows[5]["module"]]["frobenius"]
    assert main([*argv, "--out_dir", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*argv, "--out_dir", str(out), "--overwrite"]) == 0


def test_thousands_of_modules_are_inspected_compared_and_drawn(tmp_path: Path) -> None:
    adapter = Adapter.open(many(tmp_path / "source", layers=4, experts=100))
    found = inspect_adapter(adapter)
    assert len(as_csv(found.values()).splitlines()) == 1201
    assert inspection_picture(found).png.startswith(b"\x89PNG")
    resized = resize_adapter(adapter, ResizeOptions(rank=4), tmp_path / "out")
    compared = compare_adapters(adapter, Adapter.open(tmp_path / "out")).modules
    assert {name: x.relative for name, x in compared.items()} == pytest.approx(
        {name: x.error for name, x in resized.items()}, rel=1e-4
    )


def dense(one: torch.Tensor, other: torch.Tensor, k: int) -> tuple[float, float, float, float]:
    (u, _, vh), (w, _, zh) = (torch.linalg.svd(x, full_matrices=False) for x in (one, other))
    return (
        float((one - other).norm() / max(one.norm(), other.norm())),
        float((one * other).sum() / (one.norm() * other.norm())),
        float((u[:, :k].mT @ w[:, :k]).square().sum() / k),
        float((vh[:k] @ zh[:k].mT).square().sum() / k),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_adapters_are_compared_as_their_dense_updates_are(tmp_path: Path, dtype: torch.dtype) -> None:
    first = Adapter.open(odd(tmp_path / "first", dtype, use_rslora=True))
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    # The other one in float32, of rank 5 throughout, half of it the first one's factors.
    other = {}
    for module in first.modules.values():
        b, a = tensors[module.b_key].float(), tensors[module.a_key].float()
        b, a = (torch.cat([x, torch.randn(x.shape, generator=generator)], dim) for x, dim in ((b, 1), (a, 0)))
        some = torch.arange(5) + module.r - 2
        other[module.b_key], other[module.a_key] = b[:, some].contiguous(), a[some].contiguous()
    second = Adapter.open(handmade(tmp_path / "second", {"r": 5, "lora_alpha": 7}, other))
    found = compare_adapters(first, second, directions=2)
    one, two = update(tmp_path / "first"), update(tmp_path / "second")
    for name, x in found.modules.items():
        assert x.ranks == (first.modules[name].r, 5)
        assert x.norms == pytest.approx((float(one[name].norm()), float(two[name].norm())), rel=1e-9)
        if name == ZERO:
            assert x.relative == pytest.approx(1.0, abs=1e-12)
            assert (x.cosine, x.overlap_u) == (None, None)
            continue
        wanted = dense(one[name], two[name], 2)
        assert (x.relative, x.cosine) == pytest.approx(wanted[:2], rel=1e-9)
        assert (x.overlap_u, x.overlap_v) == pytest.approx(wanted[2:], abs=1e-4)
    assert found.config["lora_alpha"] == (8, 7)
    assert found.config["use_rslora"] == (True, None)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_differences_do_not_drown_in_the_squares(tmp_path: Path, size: float) -> None:
    tensors = {
        key: tensor.double() for key, tensor in load_file(odd(tmp_path / "a") / "adapter_model.safetensors").items()
    }
    near = {key: x + size * torch.randn_like(x) if "lora_B" in key else x for key, x in tensors.items()}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    one, two = (Adapter.open(handmade(tmp_path / name, config, x)) for name, x in (("one", tensors), ("two", near)))
    for name, found in compare_adapters(one, two).modules.items():
        module = one.modules[name]
        wanted = ((near[module.b_key] - tensors[module.b_key]) @ tensors[module.a_key]).norm() * module.scaling
        assert found.relative * max(found.norms) == pytest.approx(wanted.item(), rel=1e-3), name
    same = compare_adapters(one, one).modules.values()
    assert all(x.relative == 0 for x in same)
    assert all(x.cosine is None or x.cosine == pytest.approx(1.0, abs=1e-12) for x in same)


def test_the_command_names_what_only_one_has_and_fails_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = handmade(tmp_path / "first")
    tensors = load_file(first / "adapter_model.safetensors")
    last = [key for key in tensors if ".2.mlp" in key]
    changed = {key: x for key, x in tensors.items() if key not in last}
    changed[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"] = torch.randn(4, 20).bfloat16()
    changed[f"{PREFIX}.1.mlp.down_proj.lora_B.weight"] *= 1.5
    second = handmade(tmp_path / "second", {"bias": "none"}, {k: x.clone() for k, x in changed.items()})
    argv = ["diff", str(first), str(second)]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["only_first"] == [f"{PREFIX}.2.mlp.down_proj"]
    assert result["only_second"] == []
    assert result["shapes"] == {f"{PREFIX}.0.mlp.down_proj": [[10, 14], [10, 20]]}
    assert result["config"] == {"bias": [None, "none"]}
    assert result["relative_most"] == pytest.approx(1 / 3, rel=1e-2)  # |1 - 1.5| / 1.5, and bfloat16's rounding
    assert main([*argv, "--at_most", "0.1"]) == 1
    text = capsys.readouterr().out
    assert "3 modules or tensors are beyond --at_most 0.1" in text
    assert "3 with the same factors bit for bit, 1 with others" in text
    assert main(["diff", str(first), str(first), "--at_most", "0"]) == 0
    save_file({**tensors, last[0]: tensors[last[0]] * float("nan")}, first / "adapter_model.safetensors")
    for flag, value, words in (
        ("--directions", "0", "at least 1; got 0"),
        ("--at_most", "nan", "at least 0; got nan"),
        ("--at_most", "-1", "at least 0; got -1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*argv, flag, value])
        assert f"{flag} must be {words}" in capsys.readouterr().err
    assert main(["inspect", "--lora_path", str(first)]) == 1
    assert "layers.2.mlp.down_proj: A holds a NaN" in capsys.readouterr().err


def test_tensors_beside_the_modules_are_compared_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = handmade(tmp_path / "first")
    tensors = load_file(first / "adapter_model.safetensors")
    norm, magnitude = "base_model.model.model.norm.weight", f"{PREFIX}.0.mlp.down_proj.lora_magnitude_vector"
    both = {**tensors, norm: torch.ones(10), magnitude: torch.ones(10)}
    one = handmade(tmp_path / "one", {}, both)
    other = handmade(tmp_path / "other", {}, {**both, magnitude: torch.arange(10.0), norm: torch.ones(10).bfloat16()})
    assert compare_adapters(Adapter.open(one), Adapter.open(one)).beyond(0) == []
    found = compare_adapters(Adapter.open(one), Adapter.open(other))
    assert all(x.relative == 0 for x in found.modules.values())
    assert sorted(found.others) == sorted(found.beyond(0)) == sorted([norm, magnitude])
    assert sorted(compare_adapters(Adapter.open(first), Adapter.open(one)).others) == sorted([norm, magnitude])
    assert main(["diff", str(one), str(other), "--at_most", "1"]) == 1
    assert "not the same, beside the modules: 2 tensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at_most must be at least 0; got nan"):
        found.beyond(float("nan"))


def test_patterns_are_looked_up_as_regular_expressions_would_find_them() -> None:
    import re

    patterns = ["q_proj", "layers.1.q_proj", r".*layers\.[02]\..*", "a.b", "x-y.q", "model.layers.1.q_proj", "q"]
    names = [
        *(
            "model.layers.1.q_proj",
            "model.layers.0.q_proj",
            "layers.1.q_proj",
            "q_proj",
            "xq_proj",
            "b.layersx1.q_proj",
        ),
        *("a.b", "aXb", "z.aXb", "zaXb", "x-y.q", "m.x-yzq", "k_proj", "q", "model.layers.12.q_proj", "1.q"),
    ]
    for order in (patterns, patterns[::-1], sorted(patterns)):
        looked_up = Patterns("rank_pattern", {pattern: i for i, pattern in enumerate(order)})
        for name in names:
            wanted = next((i for i, p in enumerate(order) if re.match(rf"(.*\.)?({p})$", name)), -1)
            assert looked_up.get(name, -1) == wanted, name
    with pytest.raises(ValueError, match="'q\\(' in rank_pattern is no regular expression"):
        Patterns("rank_pattern", {"q(": 1})
