"""Files that never show half of themselves under their final name, and folders that have one writer at a time.

Owns :func:`writing`, the one way in which this package puts a file down: under a temporary name in the same folder, synced, renamed, and
the folder synced; and :func:`locked`, under which a folder of several files is written.  Refuses a second writer.  An exception on the way
leaves neither the new file nor its temporary one, and what stood under the name before is untouched.  What a kill leaves is a temporary
file that no reader of ours takes for anything.  Called by captures, aprt and convert.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aprender.errors import CannotRun

SUFFIX = ".tmp"
"""Ending of a temporary name."""

LOCK = ".lock"
"""The file that a folder's writer holds locked.  A killed writer leaves it; it stops nobody, the system has let go of it."""

_HOLDER = b"pid "


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears whole or not at all.

    Parameters
    ----------
    path : path
        The final name; its folder must exist.

    Yields
    ------
    binary file
        Seekable.  When the block ends without an exception its bytes are synced and take the final name.

    Raises
    ------
    OSError
        With the final name as ``filename``.
    """
    final = Path(path)
    temporary = final.with_name(final.name + SUFFIX)
    try:
        with open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, final)
        sync_folder(final.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(final)
        raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Be the only writer of a folder.

    Parameters
    ----------
    folder : path
        Must exist.

    Yields
    ------
    binary file
        The lock, to append lines to that outlive a kill; they are gone when the block ends, by whichever way.

    Raises
    ------
    CannotRun
        Code BUSY: another process writes it, and which one; code PATH: the file of that name is not such a lock.
    OSError
    """
    path = Path(folder) / LOCK
    with os.fdopen(_hold(path), "r+b", buffering=0) as lock:
        try:
            lock.write(_HOLDER + b"%d\n" % os.getpid())
            yield lock
        finally:
            path.unlink(missing_ok=True)


def _hold(path: Path) -> int:
    """A descriptor of the lock file, locked.  One that its last holder removed before we had it is no lock: try again."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                _check_lock(path, handle)
                return handle
        except BlockingIOError:
            holders = [line for line in os.pread(handle, 1 << 20, 0).splitlines() if line.startswith(_HOLDER)]
            who = holders[-1].decode(errors="replace") if holders else "unknown"
            os.close(handle)
            raise CannotRun(f"{path.parent} is being written by another process ({who})", code="BUSY", path=str(path.parent)) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _check_lock(path: Path, handle: int) -> None:
    """Refuse a file of somebody else that only has the name of our lock."""
    begins = os.pread(handle, len(_HOLDER), 0)
    if begins not in (b"", _HOLDER):
        raise CannotRun(f"{path} is not a lock of ours: remove it, or write elsewhere", code="PATH", path=str(path))
