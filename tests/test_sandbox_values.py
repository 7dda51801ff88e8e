"""The values that the pipe between a program and its tests carries."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from spectral_fast.evaluation.sandbox import values


def carried(value: object) -> object:
    return values.loads(values.dumps(value, strict=True))


def test_plain_values_arrive_as_they_were() -> None:
    plain = [
        None,
        True,
        0,
        -(2**53),
        2**4000,
        0.1,
        -0.0,
        math.inf,
        1j,
        "é\ud800",
        b"\xff",
        bytearray(b"a"),
        range(9, 0, -2),
    ]
    plain += [
        (),
        (1, [2.0, {}]),
        {1: "a", (2, 3): None, "1": []},
        {1, "a"},
        frozenset({()}),
        Fraction(1, 3),
        Decimal("0.10"),
    ]
    for value in plain:
        arrived = carried(value)
        assert (type(arrived), repr(arrived)) == (type(value), repr(value))
    assert math.isnan(carried(math.nan))  # type: ignore[arg-type]
    assert type(carried(Counter("aab"))) is dict
    assert repr(carried(np.float32(0.5))) == "0.5"
    assert carried(np.bool_(True)) is True
    assert list(carried(x for x in "ab")) == ["a", "b"]  # type: ignore[call-overload]
    assert list(carried({"k": 1}.items())) == [("k", 1)]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="a function cannot be passed"):
        carried(carried)
    assert repr(values.loads(values.dumps([carried], strict=False))) == "[<function>]"
