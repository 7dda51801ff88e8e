"""An adapter's modules through a function in threads, several small ones at once, without reading it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.pipeline import in_order

R = TypeVar("R")
T = TypeVar("T")
Batch = list[LoraModule]
Factors = list[tuple[Tensor, Tensor]]
Progress = Callable[[Sequence[LoraModule]], Iterable[LoraModule]]

# Calls cost some 0.2 ms whatever they are given, as much as the SVD of a module this size.
BATCH_BYTES = 1 << 18


@contextmanager
def streamed(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    work: Callable[[Batch, Factors], R],
    progress: Progress = iter,
) -> Iterator[Iterator[R]]:
    """Give an iterator over work(modules, factors) for all modules in order, a batch of neighbours at a time.

    A batch has factors of up to `BATCH_BYTES` together, or is one larger module. As many batches as torch has threads
    are in work, and one more is in memory.

    Args:
        adapter: the adapter, opened.
        modules: which of its modules.
        work: called in a thread, with modules and b (m, r), a (r, n) of each, in the stored dtype. It may write into
            the factors; they are the next batch's when the result after its own is asked for.
        progress: wraps the list of modules.
    """
    threads = torch.get_num_threads()
    sizes = [adapter.size_of(module) for module in modules]
    room = min(max([BATCH_BYTES, *sizes]), sum(sizes))
    slots = [torch.empty(room, dtype=torch.uint8) for _ in range(threads + 1)]

    def read_and_work(batch: Batch, memory: Tensor) -> R:
        factors, begin = [], 0
        for module in batch:
            factors.append(adapter.read(module, memory[begin:]))
            begin += adapter.size_of(module)
        return work(batch, factors)

    with in_order(read_and_work, batches(progress(modules), adapter.size_of), slots, threads) as results:
        yield results


def batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours together, of up to `BATCH_BYTES`, or a larger one alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
