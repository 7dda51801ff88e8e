"""Probing by several processes of torchrun: the same g as by one, and a clear end for all when one fails or dies."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from tiny_models import tiny_llama, with_lora

from spectral_fast import calibrate, embedded
from spectral_fast.calibration import ranks
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.calibration.torchrun import ENVIRONMENT
from spectral_fast.cli import main, parser
from spectral_fast.sensitivity import Sensitivity

PROBE = [
    "probe",
    *("--base_model", str(embedded.base_model_dir())),
    *("--lora_path", str(embedded.adapter_dir())),
    *("--calib_data", str(embedded.calibration_file())),
]

# The command line, on whose rank 1 the second pass through the model does not come back.
ACCIDENT = """
import os, signal, sys, time
from spectral_fast import cli
from spectral_fast.calibration.calibrate import InMemory

gradients = InMemory._gradients

def accident(engine, pack):
    if os.environ["RANK"] == "1":
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the disk is on fire")
    if sys.argv[1] == "killed":
        time.sleep(1000)  # the others end all the same
    return gradients(engine, pack)

InMemory._gradients = accident
sys.exit(cli.main(sys.argv[2:]))
"""

# The command line, after which each rank says which of its threads are gloo's.
THREADS = """
import os, sys
from spectral_fast import cli

status = cli.main(sys.argv[1:])
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
print("left:", sorted(name for name in names if "gloo" in name), file=sys.stderr)
sys.exit(status)
"""


def torchrun(
    size: int, *argv: str, script: Sequence[str] = ("-m", "spectral_fast")
) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run([*run, *script, *argv], capture_output=True, text=True, check=False)


def test_every_sample_is_one_ranks_and_the_longest_go_first_to_who_has_least() -> None:
    lengths = [5, 9, 2, 2, 7, 1]
    shares = [Ranks(rank, 2).share(lengths) for rank in range(2)]
    assert shares == [[1, 2, 3], [0, 4, 5]]  # 9 | 7, 5 to the 7, 2 and 2 to the 9, 1 to the 12
    assert Ranks().share(lengths) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_a_partition_and_as_even_as_the_longest_sample_allows(size: int) -> None:
    lengths = torch.randint(1, 400, (5 * size - 2,), generator=torch.Generator().manual_seed(size)).tolist()
    shares = [Ranks(rank, size).share(lengths) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some clusters do for all their jobs
    assert not ranks.launched()
    with ranks.join(ModelOptions()) as alone:
        assert (alone.rank, alone.size) == (0, 1)
    assert not torch.distributed.is_initialized()


def by_torchrun(*argv: str) -> str:
    result = torchrun(2, *argv)
    assert result.returncode == 0, result.stderr
    return result.stdout


def by_three_streaming_processes(*argv: str) -> str:
    results = forked.ranks(3, forked.COMMAND, *argv, "--stream")
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    return "".join(result.stdout for result in results)


@pytest.mark.parametrize(
    ("size", "samples", "started"), [(2, 5, by_torchrun), (3, 2, by_three_streaming_processes)], ids=["2-5", "3-2"]
)
def test_g_does_not_depend_on_the_number_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, samples: int, started: Callable[..., str]
) -> None:
    """Also where some rank has no sample at all. Batches of 2: what a token weighs is said by the whole set."""
    argv = [*PROBE, "--calib_samples", str(samples), "--json", "--out_dir"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    many = json.loads(started(*argv, str(tmp_path / "many")))  # rank 0 alone has printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]
    assert many["ranks"] == size
    same = ["modules", "samples_used", "tokens", "labels", "adapter_sha256", "calib_tokens_sha256"]
    assert [one[key] for key in same] == [many[key] for key in same]
    wanted, got = Sensitivity.load(tmp_path / "one"), Sensitivity.load(tmp_path / "many")
    for name, module in wanted.modules.items():
        torch.testing.assert_close(module.s, got.modules[name].s, rtol=1e-6, atol=0)
        assert module.samples is not None
        assert got.modules[name].samples is not None
        torch.testing.assert_close(
            got.modules[name].samples, module.samples, rtol=0, atol=1e-5 * module.samples.abs().max().item()
        )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux's /proc only")
def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path) -> None:
    """One that does may abort the process at its very end, when the results are written."""
    results = forked.ranks(2, THREADS, *PROBE, "--calib_samples", "4", "--out_dir", str(tmp_path / "out"))
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "left: []" in result.stderr


def test_a_rank_that_fails_ends_all_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    argv = ["failed", *PROBE, "--calib_samples", "4", "--out_dir", str(tmp_path / "out")]
    results = forked.ranks(3, ACCIDENT, *argv)
    assert all(result.returncode != 0 for result in results)
    assert [result.stdout for result in results] == [""] * 3
    failed = "spectral-fast probe: error: rank 1 failed: ValueError: the disk is on fire"
    assert failed in results[0].stderr
    # Rank 0 has the store here, which torchrun has otherwise: it may be gone before the last rank could read there.
    assert failed in results[2].stderr or "another rank died" in results[2].stderr
    assert "spectral-fast probe: error: the disk is on fire" in results[1].stderr
    assert not list(tmp_path.iterdir())


def test_a_rank_that_dies_ends_all_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    """The others wait for it; torchrun ends them."""
    script = tmp_path / "accident.py"
    script.write_text(ACCIDENT)
    argv = ["killed", *PROBE, "--calib_samples", "4", "--out_dir", str(tmp_path / "out")]
    result = torchrun(3, *argv, script=[str(script)])
    assert result.returncode != 0
    assert result.stdout == ""
    message = "spectral-fast probe: error: another rank died without a word (killed, or out of memory?)"
    assert result.stderr.count(message) == 2, result.stderr
    assert "the disk is on fire" not in result.stderr
    assert list(tmp_path.iterdir()) == [script]


@pytest.fixture
def as_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ENVIRONMENT, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_torchrun")
def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.place(ModelOptions(device="cpu")).device == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.place(ModelOptions()).device == "cuda:1"
    assert ranks.place(ModelOptions(device="cuda")).device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own: there are 1"):
        ranks.place(ModelOptions())
    with pytest.raises(ValueError, match="--device_map auto spreads one model over all GPUs"):
        ranks.place(ModelOptions(device_map="auto"))


@pytest.mark.usefixtures("as_torchrun")
def test_a_wrong_command_line_is_told_by_rank_0_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "RANK_0_SPEAKS", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    edit = ["edit", "--mode", "random_index", *PROBE[3:5], "--out_dir", str(tmp_path / "out")]
    try:
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            for argv, message in ((edit, "torchrun is for `probe` only"), (["probe", "--nonsense"], "unrecognized")):
                with pytest.raises(SystemExit) as ended:
                    main(argv)
                assert ended.value.code == 2
                err = capsys.readouterr().err
                assert message in err if rank == "0" else err == ""
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


SAVE = """
import sys
from spectral_fast import cli
from spectral_fast.sensitivity import Sensitivity

def save(*_):
    raise OSError("no space left on device")

Sensitivity.save = save
sys.exit(cli.main(sys.argv[1:]))
"""


def test_no_rank_ends_well_if_the_result_cannot_be_written(tmp_path: Path) -> None:
    results = forked.ranks(2, SAVE, *PROBE, "--calib_samples", "2", "--out_dir", str(tmp_path / "out"))
    assert [result.returncode for result in results] == [1, 1]
    assert "probe: error: no space left on device" in results[0].stderr
    assert not list(tmp_path.iterdir())


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def fail_within(before: Any) -> None:
    with ranks.join(ModelOptions(device="cpu")):
        assert signal.getsignal(signal.SIGTERM) is not before
        raise ValueError("on fire")


def test_a_run_that_fails_leaves_the_signals_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ENVIRONMENT, ("0", "1", "0", "localhost", free_port()), strict=True):
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="on fire"):
        fail_within(before)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not torch.distributed.is_initialized()


TOOL = """
import os, sys
import torch
import torch.distributed as dist
from tiny_models import tiny_llama, with_lora
from spectral_fast import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.ranks import Ranks

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/group", rank=int(os.environ["RANK"]), world_size=3)
group = dist.new_group([2, 1])
if dist.get_rank() == 0:
    try:
        Ranks.of_process_group(group)
    except ValueError as error:
        assert "process 0 is not in this group" in str(error)
    else:
        sys.exit("not refused")
else:
    ranks = Ranks.of_process_group(group)
    assert (ranks.size, ranks.device) == (2, "cpu")
    examples = [Example.continuation(range(i, 20), 4 + i) for i in range(5)]
    g = calibrate(with_lora(tiny_llama()), "default", examples, ranks=ranks)
    torch.save({name: module.g for name, module in g.modules.items()}, f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.barrier()
assert dist.is_initialized()
dist.destroy_process_group()
"""


def test_a_tool_measures_with_a_process_group_of_its_own(tmp_path: Path) -> None:
    results = forked.ranks(3, TOOL, str(tmp_path))
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    examples = [Example.continuation(range(i, 20), 4 + i) for i in range(5)]
    wanted = calibrate(with_lora(tiny_llama()), "default", examples)
    for rank in (1, 2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, module in wanted.modules.items():
            torch.testing.assert_close(got[name], module.g, rtol=0, atol=1e-5 * module.g.abs().max().item())


def test_without_a_process_group_there_is_nothing_to_take() -> None:
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group\(\) before"):
        Ranks.of_process_group()
