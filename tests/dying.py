"""Interruptions for the tests of what writes files: every step of a writer can be counted, fail, or be the process's last.

Owns the list of what a step is: opening for writing, half a write, the other half, sync, rename, removal, making and removing a folder.
``steps`` patches them in this process, ``killed`` runs something in a child that is gone, without cleaning up, at the k-th of them.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

Step = Callable[[str, str], None]
KILLED, FAILED = 9, 7


def _halves(step: Step, path: str, write: Callable[[Any], int], flush: Callable[[], None], data: Any) -> int:
    """A write that can be interrupted before it and in the middle."""
    view = memoryview(data).cast("B")
    step("write", path)
    done = write(view[: len(view) // 2])
    flush()
    step("write", path)
    return done + write(view[len(view) // 2 :])


@contextmanager
def steps(step: Step) -> Iterator[None]:
    """Call ``step(what, path)`` before each step of whatever is written inside."""
    real_open, real_write = builtins.open, os.write

    class Buffered(io.BufferedWriter):
        def write(self, data: Any) -> int:
            return _halves(step, str(self.raw.name), super().write, super().flush, data)

    def raw(handle: int, data: Any) -> int:
        return _halves(step, descriptor(handle), functools.partial(real_write, handle), lambda: None, data)

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode != "wb":
            return real_open(path, mode, *more, **named)
        step("open", str(path))
        return Buffered(io.FileIO(path, mode))

    def watched(name: str, where: Callable[..., str]) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **named: Any) -> Any:
            step(name, where(*args))
            return real(*args, **named)

        return mock.patch.object(os, name, call)

    def first(path: Any, *_: Any) -> str:
        return str(path)

    def descriptor(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    with (
        mock.patch.object(builtins, "open", opened), mock.patch.object(os, "write", raw), watched("fsync", descriptor),
        watched("replace", lambda _, new: str(new)), watched("unlink", first), watched("mkdir", first), watched("rmdir", first),
        watched("open", first),
    ):  # fmt: skip
        yield


def killed(work: Callable[[], object], k: int) -> bool:
    """Run it in a child that dies at step k, 0 first; False if it was done before that."""
    count = 0

    def step(what: str, path: str) -> None:
        nonlocal count
        if count == k:
            os._exit(KILLED)
        count += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a child of a process with threads; it only writes files and exits
        child = os.fork()
    if not child:
        try:
            with steps(step):
                work()
            os._exit(0)
        finally:
            os._exit(FAILED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"the child ended with {code}"
    return code == KILLED
