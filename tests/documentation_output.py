"""What a page shows beside what is printed: all agrees but times, rates, sizes of files, versions and hashes."""

from __future__ import annotations

import re

# Of the run and the machine; what stands for them is the same on both sides.
OTHERWISE = [
    (r"(?<![.\w])[0-9a-f]{12,}\b", "hash"),
    (r"\b\d+\.\d+\.\d+\S*", "version"),
    (r"(?<=  )\d[\d,]*$|\b\d[\d,]*(?= bytes\b)", "size"),  # records name versions
    (r"\b\d[\d.,]*(?= (ms|s|min|GB/s)\b)", "time"),
]
NUMBER = re.compile(r"[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?%?")
# Numbers in full (JSON) differ as sums in float32 of another order do: by sqrt(n) eps, with n up to 688 in the
# model inside the package, in each of 7 products of 4 layers, forward and back.
FULL, RELATIVE = 9, 56 * 688**0.5 * 2.0**-24
Line = tuple[str, list[str]]


def taken_apart(line: str, *, small: bool = False) -> Line:
    """Words with 0 for every number, and the numbers; `small`: without them, and without words that depend on them."""
    for pattern, instead in OTHERWISE:
        line = re.sub(pattern, instead, line)
    if small:
        line = re.sub(r"\b(within the|above all|below all)\b", "among", line)
    words = " ".join(NUMBER.sub(lambda number: "0" + "%" * number[0].endswith("%"), line).split())
    return words, [] if small else NUMBER.findall(line)


def agree(shown: str, real: str) -> bool:
    """Counts exactly; decimals and percentages to the last place, in which roundings of nearly the same may differ."""
    a, b = (float(number.replace(",", "").replace("−", "-").rstrip("%")) for number in (shown, real))
    places = len(shown.partition("e")[0].rstrip("%").partition(".")[2])
    if not places and not shown.endswith("%"):
        return a == b
    return abs(a - b) <= (RELATIVE * abs(b) if places >= FULL else 1.01 * 10.0**-places)


def same(shown: Line, real: Line) -> bool:
    return shown[0] == real[0] and len(shown[1]) == len(real[1]) and all(map(agree, shown[1], real[1]))


def missing_lines(shown: str, real: str, *, small: bool = False) -> list[str]:
    """Lines of `shown` that are not in `real`, in this order; a line `…` stands for any.

    Args:
        shown: what a page shows.
        real: what is printed.
        small: the command was made smaller, so that its numbers are others.
    """
    rest, absent = [taken_apart(line, small=small) for line in real.splitlines()], []
    for line in shown.splitlines():
        if line.strip() in ("", "…", "..."):
            continue
        wanted = taken_apart(line, small=small)
        at = next((i for i, other in enumerate(rest) if same(wanted, other)), None)
        if at is None:
            absent.append(line)
        else:
            rest = rest[at + 1 :]
    return absent
