"""A bounded map over threads: work overlaps, results come in order, and memory is used again."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Thread, current_thread
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
Slot = TypeVar("Slot")


@contextmanager
def in_order(
    work: Callable[[T, Slot], R], items: Iterable[T], slots: Sequence[Slot], threads: int
) -> Iterator[Iterator[R]]:
    """Give an iterator over work(item, slot) for every item, in the items' order, made by several threads ahead.

    A slot is what one item's work needs to itself, such as a buffer. It passes to a later item only when the
    result after its own is asked for, so a result may live in its slot until then.

    Args:
        work: called in a thread; what it raises reaches the caller at that item's turn.
        items: taken one by one, in the caller's thread.
        slots: one per item that may be in work or wait for its turn; more than `threads`, to keep them busy.
        threads: how many items are worked on at a time.

    Yields:
        The results. No thread is left when the block ends, in whatever way; work not begun is dropped.
    """
    pending: deque[tuple[Slot, Future[R]]] = deque()
    remaining = iter(items)
    started: list[Thread] = []
    pool = ThreadPoolExecutor(threads, initializer=lambda: started.append(current_thread()))

    def begin(slot: Slot) -> None:
        pending.extend((slot, pool.submit(work, item, slot)) for item in islice(remaining, 1))

    def results() -> Iterator[R]:
        for slot in slots:
            begin(slot)
        while pending:
            slot, future = pending.popleft()
            yield future.result()
            begin(slot)

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
        for thread in started:  # the pool does not know one during whose start an interrupt came
            thread.join()


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Within the context torch uses one thread per caller; gives how many callers there may be.

    Callers whose products want all threads each would wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, os.cpu_count() or 1)
    finally:
        torch.set_num_threads(threads)
