"""An adapter's folder: selection, what is carried along, what is refused, memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_tools import everything, files, handmade

from spectral_fast.adapter import Adapter, resolve
from spectral_fast.edit import META


def chosen_names(adapter: Adapter, *args: Any, **options: Any) -> list[str]:
    return [module.name.removeprefix("base_model.model.model.layers.") for module in adapter.select(*args, **options)]


def test_modules_are_selected_by_last_component_and_layer(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    assert len(adapter.select()) == 6
    assert chosen_names(adapter, ["o_proj"], 1, 1) == ["1.self_attn.o_proj"]
    assert chosen_names(adapter, ("o_proj", "down_proj"), layer_min=2) == [
        "2.mlp.down_proj",
        "2.self_attn.o_proj",
    ]
    assert chosen_names(adapter, "down_proj", layer_max=0) == ["0.mlp.down_proj"]
    for all_of_them in (["all"], ["all-linear"], "all"):
        assert len(adapter.select(all_of_them, layer_max=1)) == 4
    assert not adapter.warnings
    assert len(adapter.select(["o_proj", "q_proj"])) == 3
    assert adapter.warnings == ["target_modules: the adapter has no q_proj; it has down_proj, o_proj"]
    remedy = "; name some of these, or all-linear"
    for targets, layers, end in (
        (["proj"], (0, 9), remedy),
        (["self_attn.o_proj"], (0, 9), remedy),
        (["o_proj"], (3, 9), ""),
        (["o_proj"], (1, 0), ""),
    ):
        message = rf"layers \d to \d; the adapter has down_proj \(3\), o_proj \(3\){end}$"
        with pytest.raises(ValueError, match=message):
            adapter.select(targets, *layers)


def test_modules_without_a_layer_are_in_every_range(tmp_path: Path) -> None:
    tensors = {}
    for prefix in ("h.7.o_proj", "o_proj", "layers.7.o_proj", "m.layers.7.o_proj"):
        tensors |= {
            f"{prefix}.lora_A.weight": torch.zeros(4, 6),
            f"{prefix}.lora_B.weight": torch.zeros(5, 4),
        }
    adapter = Adapter.open(handmade(tmp_path / "a", tensors=tensors))
    assert {module.name for module in adapter.select(layer_max=3)} == set(adapter.modules) - {"m.layers.7.o_proj"}


def test_all_that_lies_in_the_folder_is_carried_with_its_mode(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    (path / "README.md").write_text("# words")
    (path / "checkpoint-1" / "deep").mkdir(parents=True)
    (path / "checkpoint-1" / "deep" / "state.json").write_bytes(b"\x00\xff")
    (path / "run.sh").write_text("true")
    (path / "run.sh").chmod(0o750)
    (path / "adapter_model.safetensors").chmod(0o440)
    for skipped in (".git", ".cache"):
        (path / skipped).mkdir()
        (path / skipped / "x").touch()
    (path / ".gitattributes").touch()
    expected = {name: content for name, content in files(path).items() if not name.startswith((".git/", ".cache/"))}
    for evaluation in ("eval_config.json", "gsm8k_predictions.jsonl", "samples_lora.jsonl", "per_problem_lora.json"):
        (path / evaluation).touch()
    adapter = Adapter.open(path)
    adapter.write(tmp_path / "out", everything(adapter))
    assert files(tmp_path / "out") == expected
    for name in expected:
        assert (tmp_path / "out" / name).stat().st_mode == (path / name).stat().st_mode


def test_links_of_a_cached_snapshot_become_files(tmp_path: Path) -> None:
    blobs = handmade(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    (snapshot / "linked").symlink_to(tmp_path / "folder")
    adapter = Adapter.open(snapshot)
    adapter.write(tmp_path / "out", everything(adapter))
    shutil.rmtree(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert Adapter.open(tmp_path / "out").modules == adapter.modules
    assert (tmp_path / "out" / "linked" / "x").read_text() == "x"


@pytest.mark.parametrize("target", ["..", "nowhere"])
def test_a_link_that_cannot_be_copied_is_named(tmp_path: Path, target: str) -> None:
    path = handmade(tmp_path / "a")
    (path / "sub").mkdir()
    (path / "sub" / "odd").symlink_to(target)
    with pytest.raises(ValueError, match=r"sub/odd is a"):
        Adapter.open(path).write(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_extra_files_are_made_after_the_edit_and_replace_stale_ones(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    (path / META).write_text("stale, and longer than the new one")
    adapter = Adapter.open(path)
    done: list[str] = []

    def edited() -> Any:
        for module, b, a in everything(adapter):
            yield module, b, a
            done.append(module.name)

    extra = {META: lambda: json.dumps(done).encode(), "note": b"n"}
    adapter.write(tmp_path / "out", edited(), extra)
    assert json.loads((tmp_path / "out" / META).read_text()) == list(adapter.modules)
    assert (tmp_path / "out" / "note").read_bytes() == b"n"
    assert (path / META).read_text().startswith("stale")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "../x", "sub/x", "/x", ".."])
def test_an_extra_file_must_be_a_plain_name_beside_the_weights(tmp_path: Path, name: str) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    with pytest.raises(ValueError, match="extra_files"):
        adapter.write(tmp_path / "out", [], {name: b""})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_values_that_are_not_finite_are_refused_and_nothing_is_written(
    tmp_path: Path, value: float, side: int, overwrite: bool
) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    out = handmade(tmp_path / "out") if overwrite else tmp_path / "out"
    before = files(tmp_path)
    edited = list(everything(adapter))
    module = edited[3][0]
    edited[3][1 + side][2, 3] = value
    key = (module.b_key, module.a_key)[side]
    with pytest.raises(ValueError, match=f"the edited {key} has NaN or infinite values"):
        adapter.write(out, edited, overwrite=overwrite)
    assert files(tmp_path) == before


def test_8_bit_floats_are_checked_and_written_too(tmp_path: Path) -> None:
    dtype = torch.float8_e5m2
    tensors = {"x.lora_A.weight": torch.ones(4, 6).to(dtype), "x.lora_B.weight": torch.ones(5, 4).to(dtype)}
    adapter = Adapter.open(handmade(tmp_path / "a", tensors=tensors))
    module = adapter.modules["x"]
    b, a = adapter.read(module)
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapter.write(tmp_path / "out", [(module, (math.inf * b.float()).to(dtype), a)])
    adapter.write(tmp_path / "out", [(module, (2 * b.float()).to(dtype), a)])
    written = Adapter.open(tmp_path / "out")
    assert (written.read(module)[0].float() == 2).all()


def test_factors_of_another_shape_dtype_or_module_are_refused(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    other = Adapter.open(handmade(tmp_path / "b", config={"lora_alpha": 9}))
    [module, *_] = adapter.modules.values()
    b, a = adapter.read(module)
    for edited, message in (
        ([(module, b[:-1], a)], r"lora_B\.weight needs an edited factor of shape \(10, 4\), got \(9, 4\)"),
        ([(module, b, a.T)], r"lora_A\.weight needs an edited factor of shape"),
        ([(module, b.float(), a)], r"lora_B\.weight is to be torch\.bfloat16 .*got torch\.float32"),
        ([(module, b, a)] * 2, "was given twice"),
        ([(other.modules[module.name], b, a)], "is not an editable module of"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.write(tmp_path / "out", edited)
        assert not (tmp_path / "out").exists()


def test_overwrite_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    out = handmade(tmp_path / "out", config={"note": "old"})
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapter.write(out, [])
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapter.check_out_dir(out)
    adapter.check_out_dir(out, overwrite=True)
    adapter.write(out, [], overwrite=True)
    assert files(out) == files(tmp_path / "a")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    for act in (adapter.check_out_dir, lambda out_dir, overwrite: adapter.write(out_dir, [], overwrite=overwrite)):
        with pytest.raises(FileExistsError, match=r"it has no adapter_config\.json"):
            act(tmp_path / "precious", overwrite=True)
        for inside in (tmp_path, tmp_path / "a", tmp_path / "a" / "edited"):
            with pytest.raises(ValueError, match="must not contain each other"):
                act(inside, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_the_fingerprint_follows_the_weights_and_the_config_only(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    adapter = Adapter.open(path)
    assert set(adapter.hashes) == {"adapter_config.json", "adapter_model.safetensors"}
    adapter.write(tmp_path / "same", everything(adapter), {"README.md": b"other words"})
    assert Adapter.open(tmp_path / "same").fingerprint() == adapter.fingerprint()
    [module, *_] = adapter.modules.values()
    b, a = adapter.read(module)
    adapter.write(tmp_path / "edited", [(module, -b, a)])
    (tmp_path / "same" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    changed = {Adapter.open(tmp_path / name).fingerprint() for name in ("same", "edited")}
    assert len(changed | {adapter.fingerprint()}) == 3
    assert all(len(digest) == 64 for digest in changed)


def test_a_fingerprint_taken_meanwhile_is_the_same_and_its_thread_ends(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    with adapter.fingerprint_meanwhile({}) as fingerprint:
        assert fingerprint() == adapter.fingerprint()
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 1 << 40)  # sparse: hashing it would take ten minutes
    adapter = replace(adapter, weights=SimpleNamespace(path=large))
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), adapter.fingerprint_meanwhile({}):
        raise KeyboardInterrupt
    assert set(threading.enumerate()) <= before


def test_the_fingerprint_of_files_that_were_not_touched_is_taken_from_the_record(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    record = {"adapter_sha256": "known", "adapter_stamp": json.loads(json.dumps(adapter.stamp()))}
    with adapter.fingerprint_meanwhile(record) as fingerprint:
        assert fingerprint() == "known"
    os.utime(adapter.weights.path, ns=(1, 1))
    with adapter.fingerprint_meanwhile(record) as fingerprint:
        assert fingerprint() == adapter.fingerprint()


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert resolve("~/a") == tmp_path / "a"


def test_a_name_is_looked_up_at_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo_id: str, cache_dir: Any) -> str:
        return str(Path(cache_dir) / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/adapter", cache_dir=tmp_path) == tmp_path / "someone" / "adapter"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("someone/adapter", "HF_HUB_OFFLINE forbids to download it"),
        ("./no/such/folder", "nor a name that a Hugging Face repository can have"),
        ("/no/such/folder", "nor a name that a Hugging Face repository can have"),
    ],
)
def test_a_name_that_is_neither_says_so(name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=why) as caught:
        resolve(name, cache_dir=tmp_path)
    assert str(caught.value).startswith(f"{name!r} is no local folder ({Path(name).absolute()} does not exist)")
    assert caught.value.__cause__ is not None


def test_a_misspelt_folder_is_told_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "edited").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"; did you mean {tmp_path / 'edited'}\?$"):
        resolve(tmp_path / "editd")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("RepositoryNotFoundError", "no such repository, or it is private: check the name, or `hf auth login`"),
        ("GatedRepoError", "gated: ask for access on its page"),
        ("LocalEntryNotFoundError", "the hub cannot be reached: check the network"),
        ("OfflineModeIsEnabled", r"cannot be downloaded \(OfflineModeIsEnabled: 500 and more\)"),
    ],
)
def test_a_repository_that_cannot_be_downloaded_says_why(
    kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    def fail(*_: object, **__: object) -> str:
        error: type[Exception] = getattr(errors, kind)
        raise error.__new__(error, "500\nand more")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=why):
        resolve("someone/adapter", cache_dir=tmp_path)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is a file; give the folder"):
        resolve(tmp_path / "x.safetensors")


# A sparse file stands for the source: 32 modules of 4.7 MB, and a head of 262 MB that is only carried.
MEMORY = """
import json, os, re, sys
from pathlib import Path
import torch
from spectral_fast.adapter import Adapter
from spectral_fast.tensorfile import Layout, TensorInfo

source, out = Path(sys.argv[1], "source"), Path(sys.argv[1], "out")
source.mkdir()
m, n, r = 28672, 8192, 64
infos = {"base_model.model.lm_head.weight": TensorInfo(torch.bfloat16, (32000, 4096))}
for layer in range(32):
    prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
    infos[f"{prefix}.lora_A.weight"] = TensorInfo(torch.bfloat16, (r, n))
    infos[f"{prefix}.lora_B.weight"] = TensorInfo(torch.bfloat16, (m, r))
layout = Layout.of(infos)
weights = source / "adapter_model.safetensors"
weights.write_bytes(layout.header)
os.truncate(weights, layout.size)
(source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r}))

adapter = Adapter.open(source)
modules = adapter.select()
def resident(peak):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(("VmHWM" if peak else "VmRSS") + r":\\s+(\\d+) kB", status)[1])

before = resident(peak=False)
adapter.write(out, ((module, b + 1, a - 1) for module in modules for b, a in [adapter.read(module)]))
growth = resident(peak=True) - before  # ru_maxrss would be the peak of the parent too
written = Adapter.open(out)
b, a = written.read(modules[-1])
assert (b == 1).all() and (a == -1).all()
print(len(modules), growth, (m + n) * r * 2, weights.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_writing_a_large_adapter_takes_the_memory_of_a_few_modules(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert result.returncode == 0, result.stderr
    modules, growth, largest, size = map(int, result.stdout.split())
    assert modules == 32
    assert size > 400e6
    assert growth < 10 * largest


def test_importing_the_package_imports_no_model_library() -> None:
    heavy = {"transformers", "peft", "huggingface_hub"}
    script = f"import sys, spectral_fast.adapter; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
