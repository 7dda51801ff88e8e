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
S = TypeVar("S")
T = TypeVar("T")
Batch = list[LoraModule]
Factors = list[tuple[Tensor, Tensor]]
Progress = Callable[[Sequence[LoraModule]], Iterable[LoraModule]]

# Calls cost some 0.2 ms whatever they are given, as much as the SVD of a module this size.
BATCH_BYTES = 1 << 18
# With fewer bytes per item threads wait for each other's calls: two took up to 2.6 times as long as one.
TINY = 1 << 17


@contextmanager
def streamed(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    work: Callable[[Batch, Factors], R],
    progress: Progress = iter,
) -> Iterator[Iterator[R]]:
    """Give an iterator over work(modules, factors) for all modules in order, a batch of neighbours at a time.

    A batch has factors of up to `BATCH_BYTES` together, or is one larger module. As many batches as torch has threads
    are in work, or one if modules are tiny, and one more is in memory.

    Args:
        adapter: the adapter, opened.
        modules: which of its modules.
        work: called in a thread, with modules and b (m, r), a (r, n) of each, in the stored dtype. It may write into
            the factors; they are the next batch's when the result after its own is asked for.
        progress: wraps the list of modules.
    """
    with in_batches(modules, adapter.size_of, adapter.read, work, progress, torch.get_num_threads()) as results:
        yield results


@contextmanager
def in_batches(
    items: Sequence[T],
    size_of: Callable[[T], int],
    read: Callable[[T, Tensor], S],
    work: Callable[[list[T], list[S]], R],
    progress: Callable[[Sequence[T]], Iterable[T]],
    threads: int,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[Iterator[R]]:
    """`streamed`, of any items, by some threads.

    Args:
        items: what to go through.
        size_of: bytes of memory that an item takes.
        read: called in a thread with an item and memory, uint8, as large as that or larger.
        work: called in the same thread with a batch of items and what was read of them.
        progress: wraps the list of items.
        threads: how many batches are in work at a time; one, if items are tiny.
        batch_bytes: of items together; a larger one is alone.
    """
    sizes = [size_of(item) for item in items]
    threads = 1 if sum(sizes) < TINY * len(sizes) else threads
    room = min(max([batch_bytes, *sizes]), sum(sizes))
    slots = [torch.empty(room, dtype=torch.uint8) for _ in range(threads + 1)]

    def read_and_work(batch: list[T], memory: Tensor) -> R:
        found, begin = [], 0
        for item in batch:
            found.append(read(item, memory[begin:]))
            begin += size_of(item)
        return work(batch, found)

    with in_order(read_and_work, batches(progress(items), size_of, batch_bytes), slots, threads) as results:
        yield results


def batches(items: Iterable[T], size_of: Callable[[T], int], most: int = BATCH_BYTES) -> Iterator[list[T]]:
    """Neighbours together, of up to so many bytes, or a larger one alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
