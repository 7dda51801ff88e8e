"""The layers of the code: a module imports from its own floor or a lower one, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Unit (a module or package directly under spectral_fast) -> floor; "" is spectral_fast/__init__.py.
FLOORS = {
    "_C": 0,
    "_version": 0,
    "atomic": 1,
    "backends": 1,
    "lazy": 1,
    "options": 1,
    "picklefile": 1,
    "pipeline": 1,
    "progress": 1,
    "provenance": 1,
    "tensorfile": 1,
    "yamlfile": 1,
    "kernels": 2,
    "spectrum": 3,
    "splines": 3,
    "lslora": 4,
    "adapter": 4,
    "functional": 4,
    "policies": 4,
    "sensitivity": 4,
    "statistics": 4,
    "allocation": 5,
    "calibration": 5,
    "edit": 5,
    "toolbox": 5,
    "training": 5,
    "embedded": 6,
    "evaluation": 6,
    "integrations": 6,
    "report": 6,
    "study": 6,
    "bench": 7,
    "demo": 7,
    "publish": 7,
    "sweep": 7,
    "__main__": 8,
    "cli": 8,
    "environment": 7,
    "usage": 7,
    "": 9,
}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file. The kernels are reached through their own folder: globs do not follow links."""
    found = {}
    for folder, package in (
        (root / "spectral_fast", "spectral_fast"),
        (root / "kernels", "spectral_fast.kernels"),
    ):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def imports(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too."""
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def unit(module: str) -> str:
    """`adapter` for spectral_fast.adapter.folder.Adapter; each kernel is a unit, such as `kernels.spline`."""
    parts = module.split(".")[1:]
    if parts[:1] == ["kernels"]:
        return ".".join(parts[:2])
    # `from spectral_fast import __version__` names no module: it reads the package itself.
    return parts[0] if parts and parts[0] in FLOORS else ""


def floor(of: str) -> int:
    return FLOORS[of.split(".")[0]]


def violations(root: Path) -> list[str]:
    found = []
    for module, file in sorted(sources(root).items()):
        own = module.split(".")[1:2]
        if own and own[0] not in FLOORS:
            found.append(f"{module} has no floor: add {own[0]!r} to FLOORS in {Path(__file__).name}")
            continue
        for line, target in imports(module, file):
            place = f"{file.relative_to(root)}:{line}"
            if target.split(".")[0] == "kernels":
                found.append(f"{place} imports {target}: the kernels are named spectral_fast.kernels")
            elif target.split(".")[0] == "spectral_fast":
                own_floor, its_floor = floor(unit(module)), floor(unit(target))
                if its_floor > own_floor:
                    found.append(f"{place} is on floor {own_floor} and imports {target} from floor {its_floor}")
    return found


def test_no_module_imports_from_a_higher_floor() -> None:
    assert violations(ROOT) == []


def test_no_units_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, file in sources(ROOT).items():
        targets = {unit(target) for _, target in imports(module, file) if target.split(".")[0] == "spectral_fast"}
        graph.setdefault(unit(module), set()).update(targets - {unit(module)})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor for types only, and not within functions. What a package's own face hands on is asked for where it is."""
    modules = sources(ROOT)
    graph = {}
    for module, file in modules.items():
        if file.stem != "__init__":
            named = [target for _, target in imports(module, file)]
            graph[module] = {name for x in named for name in (x, x.rpartition(".")[0]) if name in modules} - {module}
    TopologicalSorter(graph).prepare()


def test_the_walk_sees_every_part_of_the_tree() -> None:
    modules = sources(ROOT)
    assert {"spectral_fast", "spectral_fast.backends", "spectral_fast.kernels.lowrank_svd.op"} <= set(modules)
    seen = {
        target
        for _, target in imports(
            "spectral_fast.kernels.lowrank_svd.cpu", modules["spectral_fast.kernels.lowrank_svd.cpu"]
        )
    }
    assert "spectral_fast._C" in seen  # imported inside a function


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        (
            "spectral_fast/backends.py",
            "def f():\n    from spectral_fast.cli import main\n",
            "floor 1 and imports",
        ),
        ("spectral_fast/backends.py", "from spectral_fast import edit\n", "floor 1 and imports"),
        ("spectral_fast/adapter/folder.py", "from ..report.names import places\n", "floor 4 and imports"),
        ("kernels/spline/op.py", "import spectral_fast.spectrum\n", "floor 2 and imports"),
        (
            "spectral_fast/edit.py",
            "from kernels.lowrank_svd import lowrank_svd\n",
            "named spectral_fast.kernels",
        ),
        ("spectral_fast/brand_new.py", "", "add 'brand_new' to FLOORS in test_floors.py"),
    ],
)
def test_a_breach_is_reported(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    [message] = violations(tmp_path)
    assert complaint in message
