"""A sweep that is killed at random moments ends with the same table as an undisturbed one, and repeats nothing."""

from __future__ import annotations

from pathlib import Path

import forked
from sweep_tools import write_configs

# One process imports everything; each sweep is a fork of it, so that a run takes a second and not ten. A sweep that is
# killed six times has something left to do.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from sweep_tools import sweep, tables
import matplotlib.figure, peft, spectral_fast.sweep.report, transformers

root, kills = Path(sys.argv[1]), int(sys.argv[2])
configs = root / "configs.jsonl"

def start(out):
    pid = os.fork()
    if pid:
        return pid
    try:
        sweep(configs, out, group=1, controls=1)
        os._exit(0)
    except BaseException as error:
        print("the sweep failed:", repr(error), flush=True)
        os._exit(1)

def finish(out):
    _, status = os.waitpid(start(out), 0)
    assert status == 0, "a sweep that goes on failed"

began = time.perf_counter()
finish(root / "undisturbed")
duration = time.perf_counter() - began
expected = tables(root / "undisturbed")
random.seed(0)
done, rounds, seen = 0, 0, set()
while done < kills:
    out, before = root / f"killed{rounds}", b""
    rounds += 1
    assert rounds < 200, "the sweeps end before they can be killed"
    for _ in range(6):  # so many kills of one sweep, as far as it has that much to do
        pid = start(out)
        time.sleep(random.random() * duration * 0.6)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            break
        done += 1
        ledger = out / "ledger.jsonl"
        before = ledger.read_bytes() if ledger.exists() else b""
        before = before[: before.rfind(b"\\n") + 1]
        seen.add(before.count(b"\\n"))
    finish(out)
    after = (out / "ledger.jsonl").read_bytes()
    assert after.startswith(before), "what was finished was done again"
    assert len(after.splitlines()) == len((root / "undisturbed/ledger.jsonl").read_bytes().splitlines())
    assert tables(out) == expected, [name for name in expected if tables(out)[name] != expected[name]]
    leftovers = list(out.rglob(".*"))
    assert not leftovers, leftovers
print(done, len(seen))
"""


def test_a_sweep_killed_at_12_random_moments_ends_with_the_same_tables(tmp_path: Path) -> None:
    lines = [{"edit_mode": "abs_select", "amp_factor": [1.1, 1.2]}, {"edit_mode": "gd", "keep_adapter": True}]
    write_configs(tmp_path, lines)
    result = forked.run(SCRIPT, str(tmp_path), "12")
    assert result.returncode == 0, result.stdout + result.stderr
    killed, moments = map(int, result.stdout.split()[-2:])
    assert killed >= 12
    assert moments >= 3  # before the first group was finished, and after some of them
