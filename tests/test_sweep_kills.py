"""A sweep that is killed at random moments ends with the same table as an undisturbed one, and repeats nothing."""

from __future__ import annotations

from pathlib import Path

import forked
from sweep_tools import write_configs

# One process imports everything; each sweep is a fork of it, so a run takes a second and not ten. It dies when it is
# about to make, rename or remove its n-th file; by the clock most would die in whatever a busy machine is slow at.
SCRIPT = """
import os, random, signal, sys
from pathlib import Path
from sweep_tools import sweep, tables
import matplotlib.figure, peft, spectral_fast.sweep.report, transformers

root, kills = Path(sys.argv[1]), int(sys.argv[2])
configs = root / "configs.jsonl"

def status_of(out, dies_at=0):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    operations = 0
    def counting(event, args):
        nonlocal operations
        changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if (changing or event == "open" and set(args[1] or "r") & set("wx")) and str(out) in str(args[0]):
            operations += 1
            if operations == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(counting)
    try:
        failures = sweep(configs, out, group=1, controls=1)["failures"]
        assert not failures, failures
        (root / "operations").write_text(str(operations))
        os._exit(0)
    except BaseException as error:
        print("the sweep failed:", repr(error), flush=True)
        os._exit(1)

assert status_of(root / "undisturbed") == 0
operations = int((root / "operations").read_text())
expected = tables(root / "undisturbed")
lines = len((root / "undisturbed/ledger.jsonl").read_bytes().splitlines())
random.seed(0)
done, rounds, seen = 0, 0, set()
while done < kills:
    out, before = root / f"killed{rounds}", b""
    rounds += 1
    assert rounds < 200, "the sweeps end before they can be killed"
    for _ in range(4):  # so many kills of one sweep, as far as it has that much to do
        status = status_of(out, random.randint(1, int(0.6 * operations)))
        if status != signal.SIGKILL:
            assert status == 0, "a sweep that goes on failed"
            break
        done += 1
        ledger = out / "ledger.jsonl"
        before = ledger.read_bytes() if ledger.exists() else b""
        before = before[: before.rfind(b"\\n") + 1]
        seen.add(before.count(b"\\n"))
    assert status_of(out) == 0, "a sweep that goes on failed"
    after = (out / "ledger.jsonl").read_bytes()
    assert after.startswith(before), "what was finished was done again"
    assert len(after.splitlines()) == lines, after.decode()
    assert tables(out) == expected, (expected["summary.csv"].decode(), tables(out)["summary.csv"].decode())
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
