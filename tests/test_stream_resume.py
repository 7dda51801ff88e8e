"""A streamed run that is killed at any moment goes on where it stopped, with the same result."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from stream_models import family_model, ragged_samples, save_adapter, save_in_shards

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.probe import CalibrationOptions, probe
from spectral_fast.calibration.streaming import options as stream_options
from spectral_fast.calibration.streaming.options import StreamOptions
from spectral_fast.calibration.streaming.skeleton import load_skeleton
from spectral_fast.calibration.streaming.stream import streamed
from spectral_fast.calibration.streaming.work_folder import discard, work_folder
from spectral_fast.cli.common import discard_work, work_dir

SAMPLES = ragged_samples(5)

# A child is forked that dies when it is about to make, rename or remove its n-th file; then another one, which goes on,
# until one lives to the end. For every budget and n given; the numbers of deaths are printed. The parent computes
# nothing, so that its children may use threads.
KILLED = """
import os, signal, sys
from pathlib import Path
import test_stream_resume as test

folder = Path(sys.argv[1])
loaded = test.load(folder)

def child(budget, every):
    operations = 0
    def dying(event, args):
        nonlocal operations
        changing = event in ("os.rename", "os.remove") or (event == "open" and set(args[1] or "r") & set("wx"))
        if changing and str(folder / "work") in str(args[0]):
            operations += 1
            if operations == every:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(dying)
    test.run(folder, budget, resume=True, loaded=loaded)

for word in sys.argv[2:]:
    budget, every = map(int, word.split(","))
    test.discard(folder / "work")
    deaths = -1
    status = signal.SIGKILL
    while os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
        if not (pid := os.fork()):
            child(budget, every)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
    assert status == 0
    (folder / "g").rename(folder / f"g {word}")
    print(deaths, flush=True)
"""


def load(folder: Path) -> Any:
    return load_skeleton(str(folder / "base"), ModelOptions(device="cpu"), Adapter.open(folder / "adapter"))


def run(folder: Path, budget: int, *, resume: bool, loaded: Any = None) -> dict[str, torch.Tensor]:
    model, weights = loaded or load(folder)
    with work_folder(folder / "work", {"format": 1}, resume=resume) as work:
        engines = partial(streamed, weights=weights, folder=work, budget=budget)
        found = calibrate(model, "default", SAMPLES, batch_size=2, pack_tokens=40, engines=engines)
    g = {name: module.samples for name, module in found.modules.items() if module.samples is not None}
    torch.save(g, folder / "g")
    return g


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    model = family_model("llama")
    save_in_shards(model, folder / "base")
    save_adapter(model, "llama", folder / "adapter")
    return folder


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_g(folder: Path) -> None:
    cases = ["0,1000000000", "0,5", "0,6", "1000000000,7"]
    done = forked.run(KILLED, str(folder), *cases)
    assert done.returncode == 0, done.stderr[-2000:]
    deaths = [int(line) for line in done.stdout.split()]
    assert deaths[0] == 0
    assert min(deaths[1:]) >= 3
    wanted, *others = [torch.load(folder / f"g {case}") for case in cases]
    for got in others:
        for name, g in wanted.items():
            assert torch.equal(got[name], g), name


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run that ends before its first layer is differentiated."""
    from spectral_fast.calibration.streaming import stream

    def failing(_: Any, part: Any) -> None:
        raise KeyboardInterrupt(part)

    discard(folder / "work")
    with monkeypatch.context() as patch:
        patch.setattr(stream._Sweeps, "_backward", failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder, 0, resume=False)


def test_layers_that_are_given_something_of_the_embeddings_get_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("gemma4")
    save_in_shards(model, tmp_path / "base")
    save_adapter(model, "gemma4", tmp_path / "adapter")
    wanted = run(tmp_path, 0, resume=False)
    stopped(tmp_path, monkeypatch)
    got = run(tmp_path, 0, resume=True)
    assert all(torch.equal(got[name], g) for name, g in wanted.items())


def test_what_is_there_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_fast.calibration.streaming import stream

    steps: list[Any] = []
    stopped(folder, monkeypatch)
    first = stream._Sweeps._steps
    monkeypatch.setattr(stream._Sweeps, "_steps", lambda self: steps.append(found := first(self)) or found)
    wanted = run(folder, 0, resume=True)
    again = run(folder, 0, resume=True)
    assert steps == [[("backward", k) for k in (3, 2, 1, 0)], []]
    assert all(torch.equal(again[name], g) for name, g in wanted.items())
    left = [path.name for path in (folder / "work").rglob("*") if path.is_file()]
    assert sorted(left) == ["gradient-0", "lock", "run.json"]


def test_a_run_that_differs_is_refused_with_what_differs(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", {"dtype": "bf16", "samples": [1, 2]}, resume=False):
        pass
    with (
        pytest.raises(
            ValueError, match=r"another run \(dtype was bf16, now it is fp32\): remove the folder, or choose another"
        ),
        work_folder(tmp_path / "work", {"dtype": "fp32", "samples": (1, 2)}, resume=True),
    ):
        pass
    with work_folder(tmp_path / "work", {"dtype": "bf16", "samples": (1, 2)}, resume=True) as path:
        assert path == tmp_path / "work"


def test_hashes_that_differ_are_not_shown(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", {"the adapter": "0" * 64, "calib_samples": 32}, resume=False):
        pass
    with (
        pytest.raises(ValueError, match=r"another run \(the adapter changed; calib_samples was 32, now it is 8\): "),
        work_folder(tmp_path / "work", {"the adapter": "1" * 64, "calib_samples": 8}, resume=True),
    ):
        pass


def test_a_run_of_another_dtype_is_refused_by_its_name(tmp_path: Path) -> None:
    from spectral_fast import embedded

    adapter = Adapter.open(embedded.adapter_dir())

    def run(dtype: str) -> None:
        probe(
            adapter,
            list(adapter.modules.values()),
            str(embedded.base_model_dir()),
            CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=2),
            ModelOptions(dtype=dtype, device="cpu"),
            stream=StreamOptions(stream=True, resume=True),
            work_dir=tmp_path / "work",
        )

    run("fp32")
    with pytest.raises(ValueError, match=r"another run \(dtype was float32, now it is bfloat16\): remove"):
        run("bf16")
    run("fp32")


def test_an_unfinished_run_is_neither_continued_nor_lost_unasked(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", {}, resume=False) as path:
        (path / "precious").touch()
    with pytest.raises(FileExistsError, match="--resume"), work_folder(path, {}, resume=False):
        pass
    assert (path / "precious").exists()


def test_resume_without_an_earlier_run_starts_anew(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", {"a": 1}, resume=True) as path:
        assert json.loads((path / "run.json").read_text()) == {"a": 1}


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / "work", {}, resume=True) as path,
        pytest.raises(RuntimeError, match="another process is at work"),
        work_folder(path, {}, resume=True),
    ):
        pass


@pytest.mark.parametrize("files", [[], ["stage/inputs-0.partial"], ["stage/inputs-0"]])
def test_after_an_error_the_folder_stays_only_if_there_is_something_to_go_on_with(
    files: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "work"

    def ends_early() -> None:
        with work_folder(path, {}, resume=False) as folder:
            for file in files:
                (folder / file).parent.mkdir()
                (folder / file).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends_early()
    assert path.exists() == (files == ["stage/inputs-0"])


@pytest.mark.parametrize("content", [b"", b"\xd9", b"[]"])
def test_a_damaged_record_of_a_run_says_what_to_do(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"run\.json is damaged .*remove the folder"),
        work_folder(tmp_path, {}, resume=True),
    ):
        pass


def test_what_is_kept_is_named_when_a_run_ends_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_fast import embedded
    from spectral_fast.calibration.streaming import stream
    from spectral_fast.cli import main

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream._Sweeps, "_loss", interrupted)
    command = ["probe", "--base_model", str(embedded.base_model_dir()), "--lora_path", str(embedded.adapter_dir())]
    command += ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2"]
    command += ["--out_dir", str(tmp_path / "out"), "--stream"]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out.unfinished'} keeps what was computed so far: go on with it by --resume" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_temporary_folder_is_gone_afterwards() -> None:
    with work_folder(None, {}, resume=False) as path:
        assert path.is_dir()
    assert not path.exists()


def test_discard_leaves_the_folder_that_held_it(tmp_path: Path) -> None:
    with work_folder(tmp_path / "of a user" / "work", {}, resume=False) as path:
        pass
    discard(path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "of a user"]


def test_the_last_rank_removes_the_folder_of_all(tmp_path: Path) -> None:
    args = Namespace(out_dir=tmp_path / "out", stream=True)
    for rank in (0, 1):
        with work_folder(work_dir(args, rank), {}, resume=False):
            pass
    discard_work(tmp_path / "out.unfinished" / "rank-0")
    assert (tmp_path / "out.unfinished" / "rank-1" / "run.json").exists()
    discard_work(tmp_path / "out.unfinished" / "rank-1")
    assert not (tmp_path / "out.unfinished").exists()
    discard_work(tmp_path / "out.unfinished" / "rank-1")


def test_the_work_folder_is_beside_an_out_dir_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert work_dir(Namespace(out_dir=Path(), stream=True)) == tmp_path / "here.unfinished" / "rank-0"
    assert work_dir(Namespace(out_dir=Path(), stream=False)) is None


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("2.5", 25 * 10**8), (".5GiB", 2**29), ("0", 0)],
)
def test_sizes_are_understood(text: str, nbytes: int) -> None:
    assert StreamOptions(stream=True, activation_memory=text).budget(torch.device("cpu")) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-1GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a size such as 8GB"):
        StreamOptions(stream=True, activation_memory=text)


def test_by_default_half_of_the_free_memory_is_used() -> None:
    import psutil

    budget = StreamOptions(stream=True).budget(torch.device("cpu"))
    assert 0 < budget <= psutil.virtual_memory().total / 2


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_options, "_available", lambda _: 600)
    options = StreamOptions(stream=True)
    assert options.budget(torch.device("cpu")) == 300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert options.budget(torch.device("cpu")) == 100
    assert options.budget(torch.device("cuda")) == 300


@pytest.mark.parametrize("given", [{"resume": True}, {"activation_memory": "1GB"}])
def test_settings_of_streaming_without_stream_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(given))} says how to stream"):
        StreamOptions(**given)
