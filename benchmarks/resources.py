"""What a compiled kernel takes of a multiprocessor, read from the machine code; the tools come with Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Matrix instructions: of tensor cores up to Ada and for float64, of Hopper's, of Blackwell's, and of AMD's CDNA.
MATRIX = re.compile(r"\b(HMMA|DMMA|HGMMA|UTC\w*MMA|v_mfma)")


@dataclass(frozen=True)
class Resources:
    """What one kernel uses.

    Attributes:
        registers: of 32 bits, per thread.
        spills: bytes of a thread's own memory, which is where registers go that are too many.
        shared: bytes of shared memory.
        matrix: matrix instructions in the code by kind.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]


def of_cubin(cubin: bytes, shared: int | None = None, *, matrix: bool = True) -> dict[str, Resources]:
    """Resources of each kernel of a cubin.

    Args:
        cubin: the ELF file.
        shared: bytes of shared memory that the launch asks for; None where the code declares what it uses.
        matrix: whether to look for matrix instructions, which takes longer than all the rest.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        code = dict(_sections(_tool("nvdisasm", "-ndf", str(file)))) if matrix else {}
    found = {}
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, usage):
        registers, stack, static, local = map(int, numbers)
        instructions = _matrix(code[name]) if matrix else {}
        found[name] = Resources(registers, stack + local, static if shared is None else shared, instructions)
    return found


def of_amdgcn(assembly: str, shared: int) -> Resources:
    """Resources of the kernel in AMD's assembly; a scratch buffer counts as spilled."""

    def number(key: str) -> int:
        [value] = re.findall(rf"^\s+-? *\.{key}: +(\d+)$", assembly, re.MULTILINE)
        return int(value)

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    spills = max(spilled, number("private_segment_fixed_size"))
    return Resources(number("vgpr_count"), spills, shared, _matrix(assembly))


def _sections(code: str) -> Iterator[tuple[str, str]]:
    """(kernel, its instructions) of a disassembly."""
    for part in re.split(r"^\s*\.section\s+", code, flags=re.MULTILINE):
        if name := re.match(r"\.text\.([^\s,]+)", part):
            yield name[1], part


def _matrix(code: str) -> dict[str, int]:
    return dict(sorted(Counter(match[1] for match in MATRIX.finditer(code)).items()))


def _tool(name: str, *args: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    # Its warnings go to stderr: about what it cannot draw, not about the code.
    return subprocess.run([program, *args], check=True, capture_output=True, text=True).stdout
