"""Processes that measure together, such as those of `torchrun`: samples are split, and sensitivities summed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.torchrun import launched

T = TypeVar("T")

PATIENCE = timedelta(hours=1)  # with a rank that hangs; one that dies is noticed at once
FAILURE = "spectral_fast/failure"
LOST = "another rank died without a word (killed, or out of memory?); torchrun's report names it"


class RankLostError(RuntimeError):
    """This rank ends because another did; the message says which and why, as far as it is known."""


@dataclass(frozen=True)
class Ranks:
    """The processes of this run; by default this one alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: on which sums over ranks are made.
        store: what all can read and write, to say why a rank failed; of `join` only.
        group: the process group; by default the default one.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    store: Any = None
    group: Any = None

    @classmethod
    def of_process_group(cls, group: Any = None) -> Ranks:
        """The processes of a group that the caller has made, as a training loop has; it stays the caller's.

        All of them call `calibrate` with the same data. One that fails there does not tell the others, which wait for
        it as in any collective operation: until it ends, or for the group's timeout.

        Args:
            group: of torch.distributed, of this process and others; by default the default group. Sums are made by
                nccl on the current GPU if that is all that the group has, on the CPU otherwise.

        Raises:
            RuntimeError: if torch.distributed is not initialised.
            ValueError: if this process is not in the group.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("there is no process group yet; call torch.distributed.init_process_group() before")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"process {dist.get_rank()} is not in this group; only those that are may measure with it")
        device = "cpu" if "cpu:" in dist.get_backend_config(group) else f"cuda:{torch.cuda.current_device()}"
        return cls(rank, dist.get_world_size(group), device, group=group)

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which samples are this rank's, ascending: the longest first, each to the rank with the fewest tokens.

        Args:
            lengths: tokens of each sample.
        """
        loads = [0] * self.size
        mine = []
        for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += lengths[sample]
            if rank == self.rank:
                mine.append(sample)
        return sorted(mine)

    def sum(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks, made in float64, the same on every rank.

        Args:
            found: tensors on the CPU, of the same names and shapes on every rank.

        Raises:
            RankLostError: if another rank failed or died.
        """
        if self.size == 1:
            return dict(found)
        flat = torch.cat([x.double().flatten() for x in found.values()])
        self.wait()
        total = flat.to(self.device)
        self._all_reduce(total)
        parts = torch.split(total.cpu(), [x.numel() for x in found.values()])
        return {name: part.view_as(x).to(x.dtype) for (name, x), part in zip(found.items(), parts, strict=True)}

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as long as no other rank has failed.

        Raises:
            RankLostError: naming the rank, with its message.
        """
        for item in items:
            self._check()
            yield item

    def wait(self) -> None:
        """Until all ranks are here.

        Raises:
            RankLostError: if another rank failed or died.
        """
        if self.size == 1:
            return
        # On the CPU where `join` has made the group: there a connection that breaks ends the waiting.
        one = torch.ones(1, device=self.device if self.store is None else "cpu")
        try:
            self._all_reduce(one)
            one.item()
        except RuntimeError as error:
            self._check()
            raise RankLostError(LOST) from error

    def _all_reduce(self, x: Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(x, group=self.group)

    def _check(self) -> None:
        if self.store is not None and (failure := _failure(self.store)):
            raise RankLostError(failure)


def place(options: ModelOptions) -> ModelOptions:
    """The options with a GPU of its own for each process of a machine.

    Raises:
        ValueError: if there are fewer GPUs than processes, or the model shall be spread over several.
    """
    if not launched():
        return options
    if options.device_map != "none":
        raise ValueError(
            f"--device_map {options.device_map} spreads one model over all GPUs, of which torchrun's processes would "
            "each want one; leave out one of the two"
        )
    if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()):
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; start "
                "fewer with --nproc-per-node, or say --device cpu"
            )
        return replace(options, device=f"cuda:{local}")
    return options


@contextmanager
def join(options: ModelOptions) -> Iterator[Ranks]:
    """Within the context the processes of `torchrun` are one run; without torchrun this process is alone.

    A rank that fails says so to all others, which then end with its message; one that dies ends the others, too.

    Args:
        options: after `place`; sums are made by nccl if it names a GPU, by gloo otherwise.

    Raises:
        RankLostError: in place of whatever else ends this rank, if another failed or died before.
    """
    if not launched():
        yield Ranks()
        return
    import torch.distributed as dist

    # Imported later, as transformers does, its functions' default arguments would be the process group that `join` has
    # made: gloo's threads would outlive it, and now and then abort the interpreter that ends around them.
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

    device, _ = options.resolved()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=device if gpu else None,
    )
    # torchrun ends the ranks of a machine by this signal once one of them is gone.
    before = signal.signal(signal.SIGTERM, _ended_by_torchrun)
    try:
        yield Ranks(rank, size, str(device), store)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it shall say why before it ends
        failure = _failure(store)
        if failure is not None and isinstance(error, Exception):
            raise RankLostError(failure) from error
        if not isinstance(error, RankLostError):
            store.set(FAILURE, f"rank {rank} failed: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


def _failure(store: Any) -> str | None:
    try:
        return store.get(FAILURE).decode() if store.check([FAILURE]) else None
    except RuntimeError:  # whoever kept the store is gone
        return LOST


def _ended_by_torchrun(*_: Any) -> None:
    raise RankLostError(LOST)
