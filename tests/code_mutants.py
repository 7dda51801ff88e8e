"""Wrong programs out of right ones, for comparing evaluators; every kind of fault that a model's program may have."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


def mutants(prompt: str, solution: str, entry_point: str) -> Iterator[tuple[str, str]]:
    """(kind, completion that replaces the solution), as many kinds as the solution has room for."""
    yield "none", "    return None\n"
    yield "raise", "    raise ValueError('no')\n"
    for kind in ("off by one", "operator"):
        tree = ast.parse(prompt + solution)
        function = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point][-1]
        if _mutate(function, kind):
            # The prompt stands before it, so that the later definition, mutated, is the one that counts.
            yield kind, f"    pass\n\n{ast.unparse(function)}\n"


def _mutate(function: ast.FunctionDef, kind: str) -> bool:
    for statement in function.body[1:]:
        for node in ast.walk(statement):
            if kind == "off by one" and isinstance(node, ast.Constant) and type(node.value) is int:
                node.value += 1
                return True
            if kind == "operator" and isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
                node.op = _OPERATORS[type(node.op)]()  # type: ignore[assignment]
                return True
            if kind == "operator" and isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
                node.ops[0] = _OPERATORS[type(node.ops[0])]()  # type: ignore[call-overload]
                return True
    return False
