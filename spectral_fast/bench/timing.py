"""Time of a call between two events on an idle device, from a cold cache: what the host does meanwhile is in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSHED = 512 << 20  # bytes: twice the largest cache of a card in ``cards.CARDS``


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int, budget: float) -> list[float]:
    """Times of repeated calls on the current stream, host work included where the device waits for it.

    Args:
        run: the call; it has run before, so that everything is compiled.
        device: a CUDA device.
        rounds: repeats, at most.
        budget: milliseconds after which it is not repeated any more; it is timed at least once.
    """
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    times: list[float] = []
    while len(times) < rounds and sum(times) < budget:
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return times
