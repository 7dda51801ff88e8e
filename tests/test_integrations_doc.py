"""The script in docs/integrations.md does what is said of it; test_documentation.py runs the page."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
[KOHYA] = [block for block in BLOCKS if "lora_down" in block]


def test_kohyas_files_are_resized_to_the_best_of_their_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, down, up in (
        ("lora_unet_to_q", (8, 40), (30, 8)),
        ("lora_unet_conv", (8, 6, 3, 3), (30, 8, 1, 1)),
        ("lora_te_fc", (2, 40), (30, 2)),
    ):
        tensors[f"{name}.lora_down.weight"] = torch.randn(down).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(up).half()
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file(tensors, source, {"ss_network_dim": "8", "kept": "yes"})
    scope: dict[str, object] = {}
    exec(compile(KOHYA, str(PAGE), "exec"), scope)
    scope["resize"](str(source), str(target), 4)  # type: ignore[operator]
    resized = load_file(target)
    assert resized.keys() == tensors.keys()
    for key in [key for key in tensors if "lora_down" in key]:
        name = key.removesuffix(".lora_down.weight")
        old, new = (
            x[f"{name}.alpha"]
            / len(x[key])
            * x[f"{name}.lora_up.weight"].flatten(1).double()
            @ x[key].flatten(1).double()
            for x in (tensors, resized)
        )
        k = min(4, len(tensors[key]))
        assert resized[key].shape == (k, *tensors[key].shape[1:])
        best = torch.linalg.svdvals(old)[k:].norm()
        assert (old - new).norm() <= best + 2 * torch.finfo(torch.float16).eps * old.norm()
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic", "kept": "yes"}
