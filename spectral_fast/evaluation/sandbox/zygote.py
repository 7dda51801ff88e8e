"""A worker's interpreter: forks a supervisor per program, and that the program and its checker.

Messages on standard input and output (`channel`), JSON: first the view; back comes the way of isolation that holds, or
why none does. Then per program, in two parts, {source, entry_point, limits} and {helpers, test}; back comes
{verdict, detail}. The first part is read by the supervisor alone and the second after the fork of the program, so
that neither an earlier program nor any test is anywhere in the memory of a program.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from . import channel, kernel, roles
from .confine import FIRST_USER, WAYS, Limits, View, confine, enter

REQUESTS, ANSWERS = 0, 1


def main() -> None:
    """Serve programs until standard input ends."""
    start = json.loads(channel.receive(REQUESTS))
    view = View(**start["view"])
    refused = {}
    for way in WAYS:
        if start["isolation"] not in (None, way):
            continue
        refusal = _try(way, view)
        if refusal is None:
            break
        refused[way] = refusal
    else:
        _answer(way=None, refused=refused)
        return
    _answer(way=way, refused=refused)
    gc.freeze()  # a collection would copy every page that it looks at
    while _more():
        channel.send(ANSWERS, _judged(way, view))
    _remove(Path(view.work))


def _judged(way: str, view: View) -> bytes:
    """The answer to one request, by a supervisor that has ended by then: nothing of a program runs on after it."""
    told, tell = os.pipe()
    supervisor = _forked(lambda: channel.send(tell, json.dumps(_supervise(way, view)).encode()))
    os.close(tell)
    _, status = os.waitpid(supervisor, 0)
    if status != 0:
        raise ChildProcessError(f"the supervisor of a program has ended with status {status}")
    answer = channel.receive(told)
    os.close(told)
    return answer


def _more() -> bool:
    """Wait for the next request without reading it."""
    poll = select.poll()
    poll.register(REQUESTS, select.POLLIN)
    [(_, event)] = poll.poll()
    return bool(event & select.POLLIN)


def _remove(work: Path) -> None:
    """Take away the worker's directory: an evaluator that was killed will not."""
    for link in (work / "packages").iterdir():
        link.unlink()
    for folder in (work / "packages", work / "scratch", work):
        folder.rmdir()


def _answer(**content: Any) -> None:
    channel.send(ANSWERS, json.dumps(content).encode())


def _end_with(run: Any) -> None:
    """Run and end the process; an exception is a status."""
    try:
        run()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _try(way: str, view: View) -> str | None:
    """Why this way of isolation is refused here, by trying it; None if it is not."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            user = FIRST_USER + os.getpid()
            enter(way, view, Limits(), user)
            grandchild = os.fork()  # only a child is in the new process namespace
            if grandchild == 0:
                confine(way, view, Limits(), user, [tell, null])
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        except BaseException as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
    os.close(tell)
    reason = os.read(told, 4096).decode(errors="replace")
    os.close(told)
    _, status = os.waitpid(child, 0)
    return reason or (f"status {status}" if status else None)


def _supervise(way: str, view: View) -> dict[str, str]:
    """One program, from its request to its answer."""
    kernel.die_with_parent(signal.SIGKILL)
    program = json.loads(channel.receive(REQUESTS))
    limits = Limits(**program["limits"])
    user = FIRST_USER + os.getpid()
    Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine's memory ends, this goes first
    null = os.open(os.devnull, os.O_RDWR)
    enter(way, view, limits, user)
    call_reader, calls = os.pipe()
    replies, reply_writer = os.pipe()
    test_reader, test_writer = os.pipe()
    verdict_reader, verdict = os.pipe()
    confined_reader, confined = os.pipe()

    def keep(*fds: int) -> None:
        sys.path.append(confine(way, view, limits, user, [*fds, confined, null]))
        os.write(confined, b".")
        os.close(confined)

    def check() -> None:
        keep(calls, replies, test_reader, verdict)
        test = json.loads(channel.receive(test_reader))
        answer = roles.check(test["helpers"], test["test"], program["entry_point"], calls, replies)
        channel.send(verdict, json.dumps(answer).encode())

    def run() -> None:
        keep(call_reader, reply_writer)
        roles.run_program(program["source"], program["entry_point"], call_reader, reply_writer)

    deadline = time.monotonic() + limits.seconds
    children = [_forked(check), _forked(run)]  # the checker is first: if it ends, so does its process namespace
    for fd in (call_reader, calls, replies, reply_writer, test_reader, verdict, confined):
        os.close(fd)
    answer = ["timed out", ""]
    try:
        if len(os.read(confined_reader, 1) + os.read(confined_reader, 1)) < 2:
            raise RuntimeError("a process could not be confined")
        channel.send(test_writer, channel.receive(REQUESTS))
        if select.select([verdict_reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            answer = json.loads(channel.receive(verdict_reader))
    except EOFError:
        answer = ["failed", "the tests have ended without a verdict: too much memory or time, or too large a value"]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in reversed(children):
            os.waitpid(child, 0)
    return {"verdict": answer[0], "detail": answer[1]}


def _forked(run: Any) -> int:
    child = os.fork()
    if child == 0:
        _end_with(run)
    return child
