"""Which implementation is taken, and what is said when none is."""

from __future__ import annotations

import pytest
import torch

from spectral_fast import backends
from spectral_fast.backends import (
    ENVIRONMENT_VARIABLE,
    Backend,
    chosen_backends,
    define,
    pick,
    register,
    registered,
)


def accepts(*_: object) -> str | None:
    return None


def refuses(*_: object) -> str | None:
    return "it is Sunday"


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_the_first_backend_that_accepts_is_taken_and_recorded() -> None:
    gpu, cpu, reference = (
        Backend("gpu", refuses, abs),
        Backend("cpu", accepts, abs),
        Backend("reference", accepts, abs),
    )
    register("op", gpu, cpu, reference)
    assert pick("op") is cpu
    assert chosen_backends() == {"op": "cpu"}
    assert registered() == {"op": (gpu, cpu, reference)}


def test_a_backend_decides_by_the_arguments() -> None:
    small = Backend("cpu", lambda x: "too large" if x > 9 else None, abs)
    register("op", small, Backend("reference", accepts, abs))
    assert pick("op", 9).name == "cpu"
    assert pick("op", 10).name == "reference"
    assert chosen_backends() == {"op": "reference"}


def test_when_all_refuse_the_error_gives_each_reason() -> None:
    register("op", Backend("gpu", lambda: "no GPU", abs), Backend("cpu", refuses, abs))
    with pytest.raises(RuntimeError, match=r"no backend for op: gpu refuses: no GPU; cpu refuses: it is Sunday"):
        pick("op")
    assert chosen_backends() == {}


def test_a_forced_backend_is_taken_before_better_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    register("op", Backend("cpu", accepts, abs), Backend("reference", accepts, abs))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert pick("op").name == "reference"


def test_a_forced_backend_that_refuses_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    register("op", Backend("cpu", refuses, abs), Backend("reference", accepts, abs))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(RuntimeError, match="cpu refuses: it is Sunday; SPECTRAL_FAST_BACKEND=cpu allows no other"):
        pick("op")
    assert chosen_backends() == {}


def test_an_op_without_the_forced_backend_chooses_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    register("op", Backend("cpu", refuses, abs), Backend("reference", accepts, abs))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    assert pick("op").name == "reference"


def test_forcing_an_unknown_backend_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    register("op", Backend("cpu", accepts, abs))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpuu")
    with pytest.raises(ValueError, match="SPECTRAL_FAST_BACKEND='gpuu' is no backend; known: cpu, gpu, reference"):
        pick("op")


def test_a_backend_cannot_be_registered_under_a_name_that_nobody_could_force() -> None:
    with pytest.raises(ValueError, match="a backend of op is named 'quick'; names are cpu, gpu, reference"):
        register("op", Backend("quick", accepts, abs))


def test_an_exception_inside_a_backend_reaches_the_caller() -> None:
    def broken(_: object = None) -> str | None:
        raise ZeroDivisionError

    register("op", Backend("cpu", broken, abs), Backend("reference", accepts, abs))
    with pytest.raises(ZeroDivisionError):
        pick("op")


def test_a_defined_op_has_a_schema_an_implementation_and_shapes() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = define("doubled_for_a_test", "(Tensor x) -> Tensor", doubled, torch.empty_like)
    assert op(torch.ones(3)).tolist() == [2, 2, 2]
    assert torch.ops.spectral_fast.doubled_for_a_test(torch.ones(1)).item() == 2
    assert op(torch.empty(5, 7, device="meta")).shape == (5, 7)
    torch.library.opcheck(op, (torch.ones(3),))
