"""A sweep on Ray: two workers end with the tables of one process, and only the driver writes the ledger."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_tools import sweep, tables, write_configs

from spectral_fast import embedded
from spectral_fast.sweep.ledger import LEDGER

SCRIPT = """
import sys
from pathlib import Path
from sweep_tools import sweep
result = sweep(Path(sys.argv[1]), Path(sys.argv[2]), group=2, controls=2, ray="local", workers=2)
print(len(result["runs"]))
"""
LINES = [{"edit_mode": "abs_select", "amp_factor": [1.1, 1.2], "keep_adapter": True}, {"edit_mode": "gd"}]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")
def test_two_workers_end_with_the_tables_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(embedded.adapter_dir(), "adapter")  # under a relative name
    configs = write_configs(tmp_path, [{**line, "lora_local_path": "adapter"} for line in LINES])
    result = sweep(configs, tmp_path / "here", group=2, controls=2)
    # A process of its own: Ray starts threads, and its warnings are not ours.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(configs), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) == len(result["runs"])
    here, there = tables(tmp_path / "here"), tables(tmp_path / "ray")
    assert here == there
    lines = [(tmp_path / name / LEDGER).read_text().splitlines() for name in ("here", "ray")]
    assert len(lines[0]) == len(lines[1])
    assert not list((tmp_path / "ray").rglob("*.partial"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"--ray needs Ray: pip install 'spectral-fast\[ray\]'"):
        sweep(write_configs(tmp_path, LINES[1:]), tmp_path / "out", ray="local")
