"""The bounded map over threads: order, bounds, reuse of slots, and what is left when something goes wrong."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from spectral_fast.pipeline import in_order


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def squares(item: int, _: Any) -> int:
    return item * item


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_results_come_in_the_items_order_however_long_each_takes(threads: int, count: int) -> None:
    delays = random.Random(0)
    pauses = [delays.random() / 500 for _ in range(count)]

    def work(item: int, _: int) -> int:
        time.sleep(pauses[item])
        return item * item

    with in_order(work, range(count), range(2 * threads + 1), threads) as results:
        assert list(results) == [i * i for i in range(count)]


def test_as_many_items_are_worked_on_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(3, timeout=30)  # breaks if fewer than 3 ever wait at it at once

    def work(item: int, _: int) -> int:
        together.wait()
        return item

    with in_order(work, range(9), range(4), threads=3) as results:
        assert list(results) == list(range(9))


def test_no_more_items_are_taken_than_there_are_slots_beyond_the_results_asked_for() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            taken.append(i)
            yield i

    with in_order(squares, items(), range(4), threads=2) as results:
        for done, _ in enumerate(results):
            assert len(taken) == min(4 + done, 20)


def test_a_result_lives_in_its_slot_until_the_next_one_is_asked_for() -> None:
    slots = [[-1] for _ in range(3)]

    def work(item: int, slot: list[int]) -> list[int]:
        slot[0] = item
        return slot

    with in_order(work, range(40), slots, threads=2) as results:
        for i, slot in enumerate(results):
            time.sleep(0.001)  # time for work that should not have this slot
            assert slot == [i]


def test_an_error_comes_at_its_item_s_turn_and_what_had_not_begun_never_does() -> None:
    begun: list[int] = []

    def work(item: int, _: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    got: list[int] = []
    with pytest.raises(ValueError, match="five"), in_order(work, range(100), range(3), threads=2) as results:
        got.extend(results)
    assert got == [0, 1, 2, 3, 4]
    assert max(begun) <= 5 + 2


def test_an_error_of_the_items_comes_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"), in_order(squares, items(), range(3), threads=2) as results:
        list(results)


def test_a_caller_that_stops_early_leaves_nothing_running() -> None:
    begun: list[int] = []

    def work(item: int, _: int) -> int:
        begun.append(item)
        return item

    with in_order(work, range(100), range(4), threads=2) as results:
        assert next(results) == 0
    assert len(begun) <= 4


def test_an_interrupt_reaches_a_caller_that_waits() -> None:
    def work(item: int, _: int) -> int:
        if item == 3:
            signal.raise_signal(signal.SIGINT)  # Python handles it in the main thread
            time.sleep(0.05)
        return item

    with pytest.raises(KeyboardInterrupt), in_order(work, range(10), range(4), threads=2) as results:
        list(results)


def test_an_interrupt_while_a_thread_starts_leaves_it_not_running(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.wait()
        raise KeyboardInterrupt

    def work(item: int, _: int) -> int:
        begun.set()
        time.sleep(0.05)
        return item

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), in_order(work, range(10), range(4), threads=2) as results:
        next(results)
