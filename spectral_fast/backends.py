"""Choice of implementation: every op has a list of backends, and the first that does not refuse is taken.

The environment variable ``SPECTRAL_FAST_BACKEND`` forces one backend for every op that has it; a forced
backend that refuses is an error, never a fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "SPECTRAL_FAST_BACKEND"
NAMES = ("cpu", "gpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of ``NAMES``.
        refuses: called with the op's arguments; None to accept, else the reason in words. Called with no
            arguments it answers for this machine alone.
        call: the implementation; its exceptions reach the caller.
    """

    name: str
    refuses: Callable[..., str | None]
    call: Callable[..., Any]


_registered: dict[str, tuple[Backend, ...]] = {}
_chosen: dict[str, str] = {}


def register(op: str, *backends: Backend) -> None:
    """Makes the backends of an op known, best first.

    Raises:
        ValueError: a backend's name is not one of ``NAMES``.
    """
    for backend in backends:
        if backend.name not in NAMES:
            raise ValueError(f"a backend of {op} is named {backend.name!r}; names are {', '.join(NAMES)}")
    _registered[op] = backends


def registered() -> dict[str, tuple[Backend, ...]]:
    """The backends of every op imported so far, best first."""
    return dict(_registered)


def pick(op: str, *args: Any) -> Backend:
    """The first backend of an op that accepts these arguments, or the forced one.

    Args:
        op: a name given to ``register``.
        *args: the op's arguments, handed to each backend's ``refuses``.

    Raises:
        ValueError: ``SPECTRAL_FAST_BACKEND`` names no backend.
        RuntimeError: the forced backend refuses, or all do; the message gives each one's reason.
    """
    backends = _registered[op]
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is no backend; known: {', '.join(NAMES)}")
    if any(backend.name == forced for backend in backends):
        backends = tuple(backend for backend in backends if backend.name == forced)
    reasons = []
    for backend in backends:
        reason = backend.refuses(*args)
        if reason is None:
            _chosen[op] = backend.name
            return backend
        reasons.append(f"{backend.name} refuses: {reason}")
    cause = f"{ENVIRONMENT_VARIABLE}={forced} allows no other" if forced else "none is left"
    raise RuntimeError(f"no backend for {op}: {'; '.join(reasons)}; {cause}")


def chosen_backends() -> dict[str, str]:
    """For every op used so far in this process, the name of the backend that its latest call took."""
    return dict(_chosen)


def define(name: str, signature: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers ``torch.ops.spectral_fast.<name>``: schema, implementation for every device, and shapes.

    Args:
        name: the op's name.
        signature: its schema without the name, e.g. ``"(Tensor x) -> Tensor"``.
        call: the implementation.
        fake: the same on fake tensors: shapes, dtypes and devices of the results only.

    Returns:
        The op, to be called with tensors.
    """
    qualified = f"spectral_fast::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "default", call)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.spectral_fast, name).default


def native_missing() -> str | None:
    """None if the native module can be imported, else the reason in words."""
    try:
        import spectral_fast._C  # noqa: F401
    except ImportError as error:
        return f"the native module spectral_fast._C cannot be imported ({error}); reinstall spectral-fast"
    return None
