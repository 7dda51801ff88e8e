"""Gated training against training on all, and on a random share: ``python -m benchmarks.gate``, or ``make gate``.

LoRA adapters of the embedded model are trained by `spectral_fast.training` on two-step problems, for each seed once
without a gate, once with each gate, and once with a random gate that accepts as much, all on the same micro-batches in
the same order at a constant learning rate. So a curve of the loss on held-out data can be cut anywhere: at as many
accepted micro-batches, or at as much data seen. A gate and its random control have both in common.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import SEEDS, answer, interval, parser_of, train_on_problems, write_table
from benchmarks.timing import ROOT
from spectral_fast import embedded
from spectral_fast.atomic import replace_file
from spectral_fast.evaluation.comparison import compare

RESULTS = ROOT / "benchmarks" / "results" / "gate.csv"
PICTURE = ROOT / "docs" / "pictures" / "gate.png"
ALL, RANDOM = "all", "random"
GATES = {"novelty": "novelty", "loss_floor": "loss floor", "both": "novelty and loss floor"}
LABELS = {ALL: "no gate", **GATES, RANDOM: "random, as many"}
COLOURS = {ALL: "#222222", "novelty": "#0072b2", "loss_floor": "#009e73", "both": "#cc79a7", RANDOM: "#d55e00"}
BATCH, STEPS, BURN_IN, TARGET = 4, 240, 32, 0.4
SAME = 0.03  # shares that differ by no more have one random control
EVERY, HELD_OUT, PROBLEMS = 24, 96, 256
TRAINING = (
    f"--num_train_epochs 1 --per_device_train_batch_size {BATCH} --learning_rate 3e-3 --warmup_steps 10 "
    "--lr_scheduler_type constant_with_warmup --no_gradient_checkpointing --save_strategy no --logging_steps 20 "
    "--eval_strategy steps --per_device_eval_batch_size 16"
)
# The threshold has 240 micro-batches to settle in, not tens of thousands: it moves in larger steps.
GATE = {"slora_burn_in": BURN_IN, "slora_novelty_ema_rate": 0.05}


@dataclass(frozen=True)
class Run:
    """One adapter.

    Attributes:
        arm: one of `LABELS`.
        seed: of the data and of the adapter.
        share: of the micro-batches after the burn-in that were accepted.
        curve: (micro-batches seen, accepted, loss on held-out data).
        seconds: of the training, with its evaluations.
        correct: held-out problem -> solved.
    """

    arm: str
    seed: int
    share: float
    curve: list[tuple[int, int, float]]
    seconds: float
    correct: dict[Any, bool]

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps({**vars(self), "correct": list(self.correct.items())})

    @classmethod
    def loads(cls, text: str) -> Run:
        """The inverse of `dumps`."""
        fields = json.loads(text)
        correct = {tuple(key): solved for key, solved in fields["correct"]}
        return cls(**fields | {"curve": [tuple(point) for point in fields["curve"]], "correct": correct})

    @property
    def end(self) -> tuple[int, int, float]:
        """The last of the curve."""
        return self.curve[-1]

    def loss_at(self, accepted: int) -> float:
        """On held-out data after so many accepted micro-batches, between the two measurements around."""
        return float(np.interp(accepted, [a for _, a, _ in self.curve], [loss for *_, loss in self.curve]))


def run(arm: str, seed: int, folder: Path, steps: int, problems: int, share: float | None = None) -> Run:
    """Train and evaluate one adapter; `share` is what a random gate shall accept."""
    flags: dict[str, Any] = {
        "val_dataset_path": str(embedded.heldout_file()),
        "val_samples": HELD_OUT,
        "lora_r": 8,
        "lora_alpha": 16,
    }
    if arm != ALL:
        own = {"slora_enable": True, "slora_gate": arm, "slora_seed": seed, "slora_target_novelty": share or TARGET}
        flags |= {**GATE, **own, "slora_burn_in": min(BURN_IN, steps - 1)}
    words = [*TRAINING.split(), "--max_steps", str(steps), "--eval_steps", str(min(EVERY, steps))]
    trained = train_on_problems(flags, words, seed, steps * BATCH, folder)
    out = Path(trained["output_dir"])
    accepts = [True] * steps
    if arm != ALL:
        accepts = json.loads((out / "gate_metrics.json").read_text(encoding="utf-8"))["accept_history"]
    history = json.loads((out / "log_history.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return Run(
        arm=arm,
        seed=seed,
        share=fmean(accepts[BURN_IN:] or accepts),
        curve=[(step, sum(accepts[:step]), loss) for step, loss in sorted(losses.items())],
        seconds=trained["seconds"],
        correct=answer(trained["final_checkpoint"], folder, problems),
    )


def table(pairs: Sequence[tuple[Run, Run, Run]]) -> Iterator[dict[str, Any]]:
    """A row per run with a gate, beside that of its seed on all data and its random control; and one per gate.

    Args:
        pairs: (run, its random control, the run on all).
    """
    for found, control, every in pairs:
        yield _row(found.seed, [(found, control, every)])
    for arm in GATES:
        yield _row("all", [pair for pair in pairs if pair[0].arm == arm])


def _row(seed: int | str, pairs: Sequence[tuple[Run, Run, Run]]) -> dict[str, Any]:
    def mean(of: Any) -> float:
        return fmean(of(*pair) for pair in pairs)

    differences = [found.end[2] - control.end[2] for found, control, _ in pairs]
    low, high = interval(differences)
    along = [_along(found, control) for found, control, _ in pairs]
    answers = [
        {(run.seed, key): solved for run in runs for key, solved in run.correct.items()}
        for runs in zip(*pairs, strict=True)
    ]
    compared = compare(answers[1], answers[0])
    return {
        "gate": pairs[0][0].arm,
        "seed": seed,
        "seen": f"{mean(lambda x, *_: x.end[0]):.0f}",
        "accepted": f"{mean(lambda x, *_: x.end[1]):.1f}",
        "accepted_by_control": f"{mean(lambda _, y, __: y.end[1]):.1f}",
        "share_after_burn_in": f"{mean(lambda x, *_: x.share):.3f}",
        "loss": f"{mean(lambda x, *_: x.end[2]):.4f}",
        "random": f"{mean(lambda _, y, __: y.end[2]):.4f}",
        "all_at_equal_steps": f"{mean(lambda x, _, z: z.loss_at(x.end[1])):.4f}",
        "all_at_equal_data": f"{mean(lambda _, __, z: z.end[2]):.4f}",
        "minus_random": f"{fmean(differences):+.4f}",
        "low": f"{low:+.4f}",
        "high": f"{high:+.4f}",
        "along": f"{fmean(along):+.4f}",
        "along_low": f"{interval(along)[0]:+.4f}",
        "along_high": f"{interval(along)[1]:+.4f}",
        "accuracy": f"{compared.edited:.4f}",
        "accuracy_random": f"{compared.baseline:.4f}",
        "accuracy_all": f"{fmean(answers[2].values()):.4f}",
        "accuracy_low": f"{compared.interval[0]:+.4f}",
        "accuracy_high": f"{compared.interval[1]:+.4f}",
        "seconds": f"{mean(lambda x, *_: x.seconds):.0f}",
        "seconds_all": f"{mean(lambda _, __, z: z.seconds):.0f}",
    }


def _along(found: Run, control: Run) -> float:
    """Mean difference of the losses at equal accepted micro-batches, from the burn-in to the end of either."""
    last = min(found.end[1], control.end[1])
    return fmean(found.loss_at(n) - control.loss_at(n) for n in range(min(BURN_IN, last), last + 1))


def verdict(row: Mapping[str, Any]) -> str:
    """Whether the gate beats skipping at random, in words: only if both the end and the curve say so."""
    ends = f"loss {row['minus_random']} ({row['low']} to {row['high']}) against random skipping at the end"
    curves = f"{row['along']} ({row['along_low']} to {row['along_high']}) along the curve"
    better = max(float(row["high"]), float(row["along_high"])) < 0
    worse = min(float(row["low"]), float(row["along_low"])) > 0
    return f"{GATES[row['gate']]}: {ends}, {curves}: {'better' if better else 'worse' if worse else 'not told apart'}"


def draw(runs: Sequence[Run], file: Path) -> None:
    """Loss on held-out data against accepted steps, and against data seen: a faint line per seed, and their mean."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from spectral_fast.report.drawing import STYLE, WIDTH

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 3.8))
        for panel, (axis, name) in zip(figure.subplots(1, 2, sharey=True), ((1, "accepted"), (0, "seen")), strict=True):
            for arm, label in LABELS.items():
                curves = [np.array(run.curve, dtype=np.float64)[:, [axis, 2]].T for run in runs if run.arm == arm]
                at = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves))
                for x, loss in curves:
                    panel.plot(x, loss, color=COLOURS[arm], lw=0.7, alpha=0.3)
                mean = np.mean([np.interp(at, x, loss) for x, loss in curves], axis=0)
                panel.plot(at, mean, color=COLOURS[arm], lw=1.8, label=label)
            panel.set_xlabel(f"micro-batches {name}")
            panel.set_yscale("log")
            panel.set_yticks([0.1, 0.2, 0.4])
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_formatter(NullFormatter())
        figure.axes[0].set_ylabel("loss on held-out problems")
        figure.axes[1].legend()
        figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, compare; print the table, write it, draw the curves."""
    parser = parser_of("benchmarks.gate", __doc__, RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"micro-batches of {BATCH} (default: {STEPS})")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="held-out problems to answer (default: 256)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG to write (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder with a file per run: what is there is not done again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    def done(arm: str, seed: int, share: float | None = None) -> Run:
        name = f"{arm}-{seed}-{args.steps}" + ("" if share is None else f"-{share:.3f}")
        kept = None if args.keep is None else args.keep / f"{name}.json"
        if kept is not None and kept.is_file():
            return Run.loads(kept.read_text(encoding="utf-8"))
        with TemporaryDirectory() as folder:
            found = run(arm, seed, Path(folder), args.steps, args.problems, share)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_file(kept, found.dumps())
        told = f"{arm}, seed {seed}: {found.end[1]} of {found.end[0]} accepted, {found.share:.3f} after the burn-in"
        print(f"{told}; loss {found.end[2]:.4f}, {found.seconds:.0f} s", file=sys.stderr, flush=True)
        return found

    pairs, drawn = [], []
    for seed in range(args.first, args.first + args.seeds):
        every, controls = done(ALL, seed), list[Run]()
        for arm in GATES:
            found = done(arm, seed)
            near = [x for x in controls if abs(x.share - found.share) <= SAME]
            if not near:
                near = [done(RANDOM, seed, min(max(found.share, 0.01), 1.0))]
                controls += near
            pairs.append((found, near[0], every))
            drawn.append(found)
        drawn += [every, controls[0]]
    made = {"batch": BATCH, "burn_in": BURN_IN, "target": TARGET}
    rows = write_table(table(pairs), made, args.out, "benchmarks.gate", argv)
    print(*map(verdict, rows[-len(GATES) :]), sep="\n")
    draw(drawn, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
