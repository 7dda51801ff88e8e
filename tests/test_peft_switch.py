"""PEFT's functions get the compact inside and their own back: in blocks, threads, and beside others who patch."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import peft
import pytest

from spectral_fast.integrations import peft as backend
from spectral_fast.integrations import peft_svd
from spectral_fast.integrations.peft import INSIDES, SOURCES, disable, enable, enabled, fast_svd

FUNCTIONS = [peft_svd.find(path) for path in INSIDES]
CODES = [inspect.unwrap(function).__code__ for function in FUNCTIONS]


def own_insides() -> bool:
    return all(inspect.unwrap(f).__code__ is code for f, code in zip(FUNCTIONS, CODES, strict=True))


def test_disabling_gives_every_function_its_very_code_back() -> None:
    before = [(function, vars(peft.tuners.lora.LoraModel).copy()) for function in FUNCTIONS]
    enable()
    enable()
    try:
        assert enabled()
        assert not own_insides()
        assert [peft_svd.find(path) for path in INSIDES] == [function for function, _ in before]
    finally:
        disable()
    assert not enabled()
    assert own_insides()
    assert vars(peft.tuners.lora.LoraModel) == before[0][1]
    disable()
    assert own_insides()


def test_blocks_nest_and_an_error_ends_them() -> None:
    with fast_svd():
        with pytest.raises(ZeroDivisionError), fast_svd():
            raise ZeroDivisionError
        assert enabled()
        enable()
    assert enabled()
    with fast_svd():
        disable()
        assert enabled()  # the block has not ended
    assert own_insides()


def test_blocks_of_several_threads_overlap() -> None:
    start, failures = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        for _ in range(25):
            with fast_svd():
                if not enabled() or own_insides():
                    failures.append("off within a block")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not enabled()
    assert own_insides()


@pytest.mark.parametrize("path", SOURCES)
def test_a_peft_with_another_inside_is_refused_and_not_touched(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, path, "0" * 64)
    message = (
        f"PEFT {peft.__version__} does not have the insides of PEFT 0.21.2, .*: {path.replace('.', '[.]')} differs"
    )
    with pytest.raises(RuntimeError, match=message):
        enable()
    with pytest.raises(RuntimeError, match=message), fast_svd():
        pass
    assert not enabled()
    assert own_insides()


def test_a_peft_without_sources_is_refused_by_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(_: Any) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    with pytest.raises(RuntimeError, match=r"installed without its sources, .* has none.* with its \.py files"):
        enable()
    assert not enabled()
    assert own_insides()


def test_a_name_that_another_replaces_meanwhile_keeps_its_own_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import conversion, intruders

    def mine() -> None:
        pass

    code = mine.__code__
    with fast_svd():
        monkeypatch.setattr(intruders, "reduce_intruder_dimension", mine)
        monkeypatch.delattr(conversion, "_convert_module_to_lora")
    assert mine.__code__ is code
    assert not enabled()
    assert own_insides()


def test_a_function_that_is_gone_or_replaced_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import conversion, intruders

    monkeypatch.delattr(conversion, "_convert_module_to_lora")
    monkeypatch.setattr(intruders, "reduce_intruder_dimension", len)
    with pytest.raises(RuntimeError, match="_convert_module_to_lora differs, and 1 others do"):
        enable()


def test_the_insides_have_the_parameters_of_pefts_functions() -> None:
    for path, inside in INSIDES.items():
        ours, its = (inspect.signature(f).parameters.values() for f in (inside, peft_svd.find(path)))
        assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in its]


def test_the_deltas_that_are_known_are_among_those_that_are_checked() -> None:
    assert set(peft_svd.DELTAS) <= set(SOURCES)
    assert backend.WRITTEN_FOR == "0.21.2"
