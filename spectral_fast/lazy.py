"""Public names whose modules are imported when a name is first asked for: what is not used costs no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazily(
    package: str, owners: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` (PEP 562) and `__all__` of a package; its modules are attributes, too.

    Args:
        package: its name.
        owners: module -> the public names that are taken from it. Type checkers want the same as imports.
    """
    places = {name: module for module, names in owners.items() for name in names}

    def get(name: str) -> Any:
        if name in places:
            return getattr(import_module(places[name]), name)
        module = f"{package}.{name}"
        if not name.startswith("_"):  # Python's own, such as __path__ and __wrapped__, are no modules
            try:
                return import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *places})

    return get, names, sorted(places)
