"""The edit, file to file: what it changes, what it keeps, what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import save
from plain_batches import calibration_loss
from safetensors.torch import load_file
from tiny_models import tiny_llama, with_lora

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.edit import META, edit_adapter
from spectral_fast.policies import POLICIES, AbsSelect, RandomIndex
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity

SAME = {"amp_factor": 1.0, "sup_factor": 1.0, "mid_factor": 1.0}


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    with_lora(tiny_llama(), rank_pattern={"o_proj": 3}).save_pretrained(tmp_path / "source")
    return Adapter.open(tmp_path / "source")


def random_sensitivity(adapter: Adapter) -> Sensitivity:
    generator = torch.Generator().manual_seed(5)
    modules = {}
    for name, module in adapter.modules.items():
        b, a = adapter.read(module)
        s = torch.linalg.svdvals(b.double() @ a.double())[: module.r]
        modules[name] = ModuleSensitivity(s, torch.randn(module.r, generator=generator, dtype=torch.float64))
    return Sensitivity(modules, {"adapter_sha256": adapter.fingerprint()})


def product(adapter: Adapter, name: str) -> torch.Tensor:
    b, a = adapter.read(adapter.modules[name])
    return b.double() @ a.double()


@pytest.mark.parametrize("mode", ["abs_select", "smooth_abs", "double_smooth", "z_score", "robust_z", "random_index"])
def test_factors_of_one_change_no_product(adapter: Adapter, tmp_path: Path, mode: str) -> None:
    edit_adapter(adapter, POLICIES[mode](**SAME), tmp_path / "out", sensitivity=random_sensitivity(adapter))
    edited = Adapter.open(tmp_path / "out")
    for name in adapter.modules:
        old = product(adapter, name)
        assert (product(edited, name) - old).norm() <= 1e-6 * old.norm()


@pytest.mark.parametrize("mode", POLICIES)
def test_the_edited_product_has_the_policy_s_singular_values_in_the_old_directions(
    adapter: Adapter, tmp_path: Path, mode: str
) -> None:
    edited_modules = edit_adapter(adapter, POLICIES[mode](), tmp_path / "out", sensitivity=random_sensitivity(adapter))
    edited = Adapter.open(tmp_path / "out")
    for name, module in edited_modules.items():
        u, s, vh = torch.linalg.svd(product(adapter, name), full_matrices=False)
        r = len(module.s)
        wanted = (u[:, :r] * module.edit.s_new) @ vh[:r]
        torch.testing.assert_close(module.s, s[:r], rtol=1e-6, atol=0)
        assert (product(edited, name) - wanted).norm() <= 1e-6 * wanted.norm()
        assert not torch.equal(module.edit.s_new, module.s)


def test_only_selected_modules_change_and_the_rest_is_carried_byte_for_byte(adapter: Adapter, tmp_path: Path) -> None:
    (adapter.path / "notes").mkdir()
    (adapter.path / "notes" / "a.txt").write_text("kept")
    chosen = adapter.select(("o_proj",), 1, 2)
    edit_adapter(adapter, RandomIndex(), tmp_path / "out", modules=chosen)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (adapter.path, tmp_path / "out"))
    changed = {key for module in chosen for key in (module.a_key, module.b_key)}
    assert {key for key in old if not torch.equal(old[key], new[key])} == changed
    assert (tmp_path / "out" / "notes" / "a.txt").read_text() == "kept"
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        adapter.path / "adapter_config.json"
    ).read_bytes()


def test_peft_loads_the_result_generates_and_merges_to_the_same_model(adapter: Adapter, tmp_path: Path) -> None:
    from peft import PeftModel

    edited_modules = edit_adapter(adapter, AbsSelect(), tmp_path / "out", sensitivity=random_sensitivity(adapter))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = model(ids).logits
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape == (
            2,
            10,
        )
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    base = tiny_llama()
    for name, module in edited_modules.items():
        u, _, vh = torch.linalg.svd(product(adapter, name), full_matrices=False)
        r = len(module.s)
        delta = adapter.modules[name].scaling * (u[:, :r] * module.edit.s_new) @ vh[:r]
        plain = name.removeprefix("base_model.model.")
        wanted = base.get_submodule(plain).weight.double() + delta
        torch.testing.assert_close(merged.get_submodule(plain).weight.double(), wanted, rtol=1e-5, atol=1e-5)


def test_probe_in_memory_then_edit_lowers_or_raises_what_g_says(adapter: Adapter, tmp_path: Path) -> None:
    """One step of gd with a small eta must lower the calibration loss by about eta · |g|²."""
    from peft import PeftModel

    examples = [Example.continuation(range(i, i + 20), 4) for i in range(6)]

    def loss(folder: Path) -> float:
        model = PeftModel.from_pretrained(tiny_llama(), folder).double().eval()
        return calibration_loss(model, examples, 2)

    model = PeftModel.from_pretrained(tiny_llama(), adapter.path)
    measured = calibrate(model, "default", examples)
    policy = POLICIES["gd"](eta=1e-4, update_mode="additive", grad_norm="none", preserve_energy="none")
    edit_adapter(adapter, policy, tmp_path / "out", sensitivity=measured)
    expected = 1e-4 * sum(module.g.square().sum().item() for module in measured.modules.values())
    assert loss(adapter.path) - loss(tmp_path / "out") == pytest.approx(expected, rel=0.05)


def test_the_meta_file_repeats_the_run(adapter: Adapter, tmp_path: Path) -> None:
    policy = POLICIES["robust_z"](robust_z_tau=0.35, preserve_energy="l2")
    edit_adapter(adapter, policy, tmp_path / "out", sensitivity=random_sensitivity(adapter), meta={"seed": 3})
    content = json.loads((tmp_path / "out" / META).read_text())
    meta = content["meta"]
    assert meta["mode"] == "robust_z"
    assert meta["robust_z_tau"] == 0.35
    assert meta["preserve_energy"] == "l2"
    assert meta["seed"] == 3
    assert meta["adapter_sha256"] == adapter.fingerprint()
    assert torch.__version__.startswith(meta["versions"]["torch"])  # a CUDA build from PyPI adds +cu130
    assert meta["backends"]["lowrank_svd"] in ("cpu", "reference")
    assert list(content["sigma_stats"]) == list(adapter.modules)


def test_editing_twice_gives_the_same_bytes(adapter: Adapter, tmp_path: Path) -> None:
    for out in ("one", "two"):
        edit_adapter(adapter, AbsSelect(), tmp_path / out, sensitivity=random_sensitivity(adapter))
    one, two = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def other_adapter(s: Sensitivity) -> Sensitivity:
    return Sensitivity(s.modules, {"adapter_sha256": "0" * 64})


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_threads(adapter: Adapter, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    written = []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            edit_adapter(adapter, AbsSelect(), tmp_path / str(count), sensitivity=random_sensitivity(adapter))
            written.append((tmp_path / str(count) / "adapter_model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]


def broken(*_: Any) -> Any:
    raise ValueError("no policy can help")


def interrupted(*arguments: Any) -> Any:
    if "layers.0.mlp.down_proj" in arguments[-1]:  # the first, so that no other module's error comes before
        signal.raise_signal(signal.SIGINT)  # reaches the main thread, as Ctrl-C does
    time.sleep(0.1)
    raise ValueError("the interrupt came first")


@pytest.mark.parametrize(("apply", "kind"), [(broken, ValueError), (interrupted, KeyboardInterrupt)])
def test_an_edit_that_ends_early_leaves_no_file_and_no_thread(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply: Any, kind: type[BaseException]
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(RandomIndex, "apply", apply)
    with pytest.raises(kind):
        edit_adapter(adapter, RandomIndex(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert set(threading.enumerate()) <= before


def one_missing(s: Sensitivity) -> Sensitivity:
    return Sensitivity(dict(list(s.modules.items())[1:]), s.record)


def other_sigma(s: Sensitivity) -> Sensitivity:
    return Sensitivity({n: ModuleSensitivity(2 * m.s, m.g) for n, m in s.modules.items()}, s.record)


def shorter(s: Sensitivity) -> Sensitivity:
    return Sensitivity({n: ModuleSensitivity(m.s[:-1], m.g[:-1]) for n, m in s.modules.items()}, s.record)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_adapter, "another adapter"),
        (lambda s: other_adapter(one_missing(s)), "another adapter"),  # it explains the other misfits
        (lambda s: other_adapter(other_sigma(s)), "another adapter"),
        (one_missing, "lack 1 of the selected modules"),
        (other_sigma, "not this module's"),
        (shorter, "not this module's"),
        (lambda _: None, "needs sensitivities"),
    ],
)
def test_a_sensitivity_that_does_not_fit_is_refused_and_nothing_is_written(
    adapter: Adapter, tmp_path: Path, spoil: Any, message: str
) -> None:
    modules, sensitivity = list(adapter.modules.values()), spoil(random_sensitivity(adapter))
    with pytest.raises(ValueError, match=message):
        edit_adapter(adapter, AbsSelect(), tmp_path / "out", modules=modules, sensitivity=sensitivity)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_a_list_of_modules_those_that_were_measured_are_edited(adapter: Adapter, tmp_path: Path) -> None:
    sensitivity = one_missing(random_sensitivity(adapter))
    edited = edit_adapter(adapter, AbsSelect(), tmp_path / "out", sensitivity=sensitivity)
    assert list(edited) == list(sensitivity.modules) == list(adapter.modules)[1:]
    control = edit_adapter(adapter, RandomIndex(), tmp_path / "control", sensitivity=sensitivity)
    assert list(control) == list(adapter.modules), "which asks for no sensitivities, and heeds none"


def test_sensitivities_of_none_of_the_modules_are_refused_without_a_list_too(adapter: Adapter, tmp_path: Path) -> None:
    strange = Sensitivity({"elsewhere": ModuleSensitivity(torch.ones(2), torch.ones(2))})
    with pytest.raises(ValueError, match="of the selected modules"):
        edit_adapter(adapter, AbsSelect(), tmp_path / "out", sensitivity=strange)


def test_what_is_returned_holds_no_memory_beyond_its_values(adapter: Adapter, tmp_path: Path) -> None:
    edited = edit_adapter(adapter, AbsSelect(), tmp_path / "out", sensitivity=random_sensitivity(adapter))
    for module in edited.values():
        for tensor in (module.s, module.edit.s_new):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_an_edit_beyond_the_range_of_the_adapter_s_dtype_names_the_module_and_writes_nothing(tmp_path: Path) -> None:
    adapter = Adapter.open(save(with_lora(tiny_llama()).half(), tmp_path / "source"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: .* beyond the range of torch\.float16"):
        edit_adapter(adapter, RandomIndex(amp_factor=1e30, preserve_energy="none"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_in_a_factor_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj").lora_B["default"].weight.data[2, 1] = float(
        "nan"
    )
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj"):
        edit_adapter(Adapter.open(tmp_path / "source"), RandomIndex(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# 48 modules of 4.7 MB, 226 MB in all; the peak is that of a second edit, as the first brings libraries in.
MEMORY = """
import json, re, sys
from pathlib import Path
import torch
from spectral_fast.adapter import Adapter
from spectral_fast.edit import edit_adapter
from spectral_fast.policies import RandomIndex
from spectral_fast.tensorfile import Layout, TensorInfo, writing_safetensors

torch.set_num_threads(2)
source = Path(sys.argv[1], "source")
source.mkdir()
m, n, r = 28672, 8192, 64
prefixes = [f"base_model.model.model.layers.{layer}.mlp.up_proj" for layer in range(48)]
sides = (("A", (r, n)), ("B", (m, r)))
shapes = {f"{prefix}.lora_{side}.weight": shape for prefix in prefixes for side, shape in sides}
layout = Layout.of({name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()})
weights = source / "adapter_model.safetensors"
with writing_safetensors(weights, layout) as put:
    for name, shape in shapes.items():
        put(name, torch.randn(shape).bfloat16())
(source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r}))

def resident(peak):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(("VmHWM" if peak else "VmRSS") + r":\\s+(\\d+) kB", status)[1])

adapter = Adapter.open(source)
modules = adapter.select(["all"])
edit_adapter(adapter, RandomIndex(), Path(sys.argv[1], "small"), modules=modules[:1])
before = resident(peak=False)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
edit_adapter(adapter, RandomIndex(), Path(sys.argv[1], "out"), modules=modules)
print(resident(peak=True) - before, (m + n) * r * 2, weights.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_an_edit_takes_the_memory_of_a_few_modules_whatever_the_adapter_s_size(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert result.returncode == 0, result.stderr
    growth, largest, size = map(int, result.stdout.split())
    print(growth, largest)
    assert size > 40 * largest
    assert growth < 8 * largest
