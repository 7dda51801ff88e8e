"""Progress bars on stderr, shown on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
# What library functions take to tell of progress: a description and a total give a context with a function of counts.
Counter = Callable[[str, int], AbstractContextManager[Callable[[int], object] | None]]


def bar(description: str) -> Callable[[Sequence[T]], Iterable[T]]:
    """A wrapper of a list that shows how far an iteration over it has come."""

    def wrap(items: Sequence[T]) -> Iterable[T]:
        from tqdm import tqdm

        shown: Iterable[T] = tqdm(
            items, desc=description, file=sys.stderr, leave=False, disable=not sys.stderr.isatty()
        )
        return shown

    return wrap


@contextmanager
def counter(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A context that shows how many of `total` are done, and gives a function to be told how many more are."""
    from tqdm import tqdm

    with tqdm(total=total, desc=description, file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
