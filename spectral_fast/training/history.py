"""The decisions of a gate over a training, as logs and gate_metrics.json have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from spectral_fast.atomic import replace_file


class History:
    """What a gate has decided so far.

    Attributes:
        novelties, losses, accepts: one each per micro-batch; losses are means over the tokens, None of no tokens.
        optimizer_steps: windows of which something was accepted.
        told: whether the logs say what the gate was made with.
    """

    def __init__(self) -> None:
        self.novelties: list[float] = []
        self.losses: list[float | None] = []
        self.accepts: list[bool] = []
        self.optimizer_steps, self.told = 0, False

    def summary(self) -> dict[str, Any]:
        """Counts and shares, as gate_metrics.json has them."""
        total, accepted = len(self.accepts), sum(self.accepts)
        return {
            "acceptance_rate": accepted / total if total else 1.0,
            "accepted_steps": accepted,
            "total_steps": total,
            "rejected_steps": total - accepted,
            "optimizer_steps": self.optimizer_steps,
            "avg_novelty": math.fsum(self.novelties) / len(self.novelties) if self.novelties else None,
        }

    def logs(self) -> dict[str, float]:
        """Of the last micro-batch and of all, under the names that they are logged by."""
        summary = self.summary()
        found = {f"gate/{name}": summary[name] for name in ("acceptance_rate", "accepted_steps", "total_steps")}
        if self.novelties:
            found["gate/novelty_avg"] = summary["avg_novelty"]
        return {**found, "gate/accept": int(self.accepts[-1]), "gate/optimizer_steps": self.optimizer_steps}

    def write(self, file: Path) -> None:
        """gate_metrics.json, in one step."""
        history = {"novelty_history": self.novelties, "accept_history": self.accepts, "loss_history": self.losses}
        replace_file(file, json.dumps({**self.summary(), **history}) + "\n")
