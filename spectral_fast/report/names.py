"""Where a module stands in its model, and a name for it that is short enough for a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile


@dataclass(frozen=True)
class Place:
    """A module's layer (None if its name has no number), its kind such as `o_proj`, and a unique label."""

    layer: int | None
    kind: str
    label: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each module: `model.layers.3.self_attn.o_proj` is of kind `o_proj` in layer 3: `3 o_proj`.

    The layer is the first component that is a number. Where several stacks of layers have adapters (a vision
    tower and a language model), the kind says which. Modules that are alike in layer and kind (the experts of
    a layer) have as their label all of the name that is not common to all modules.
    """
    paths = {name: name.split(".") for name in names}
    stacks = {name: list(takewhile(lambda part: not part.isdecimal(), path[:-1])) for name, path in paths.items()}
    layered = [stacks[name] for name, path in paths.items() if len(stacks[name]) < len(path) - 1]
    common = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*layered, strict=False)))
    several = any(stack != layered[0] for stack in layered)

    found = {}
    for name, path in paths.items():
        stack, kind, depth = stacks[name], path[-1], len(stacks[name])
        if depth == len(path) - 1:
            found[name] = Place(None, kind, kind)
            continue
        if several:
            kind = f"{stack[common] if depth > common else '-'} {kind}"
        found[name] = Place(int(path[depth]), kind, f"{path[depth]} {kind}")
    uses = Counter(place.label for place in found.values())
    for name, place in found.items():
        if uses[place.label] > 1:
            rest = paths[name] if place.layer is None else paths[name][common:]
            found[name] = replace(place, label=".".join(rest))
    return found
