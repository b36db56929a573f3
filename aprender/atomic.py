"""Files that never show half of themselves under their final name, and folders that have one writer at a time.

Owns :func:`writing`, the one way in which this package puts a file down: under a temporary name in the same folder, synced, renamed, and
the folder synced; and :func:`locked`, under which a folder of several files is written.  Refuses a second writer.  An exception on the way
leaves neither the new file nor its temporary one, and what stood under the name before is untouched.  What a kill leaves is a temporary
file that no reader of ours takes for anything.  Called by captures, aprt and convert.
"""

from __future__ import annotations

import fcntl
import functools
import os
import stat
from collections.abc import Callable, Iterator
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
    CannotRun
        Code BUSY: somebody else is writing it.
    OSError
        With the final name as ``filename``.
    """
    final = Path(path)
    temporary = final.with_name(final.name + SUFFIX)
    try:
        with open(temporary, "wb", opener=_alone) as out:
            try:
                yield out
                out.flush()
                os.fsync(out.fileno())
                os.replace(temporary, final)  # still locked: nobody else has opened this name in between
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        sync_folder(final.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(final)
        raise


def _alone(name: str, flags: int) -> int:
    """Open a temporary file that nobody else is writing, and empty it: one that a killed writer left is taken over.

    Between opening and locking another writer may have finished and given the file its final name; then it is not ours, and the name is
    free again.
    """
    while True:
        handle = os.open(name, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(name) and os.path.samestat(os.fstat(handle), os.lstat(name)):
                os.ftruncate(handle, 0)
                return handle
        except BlockingIOError:
            os.close(handle)
            raise CannotRun(f"{name} is being written by another process", code="BUSY", path=name) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        os.close(handle)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[Callable[[bytes], None]]:
    """Be the only writer of a folder.

    Parameters
    ----------
    folder : path
        Must exist.

    Yields
    ------
    callable
        Appends lines to the lock, which outlive a kill; they are gone when the block ends, by whichever way.

    Raises
    ------
    CannotRun
        Code BUSY: another process writes it, and which one; code PATH: what has that name is not such a lock.
    OSError
    """
    path = Path(folder) / LOCK
    handle = _hold(path)
    try:
        note = functools.partial(_append, path, handle)
        note(_HOLDER + b"%d\n" % os.getpid())
        yield note
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _append(path: Path, handle: int, data: bytes) -> None:
    """Put bytes at the end of a file, and on the disk."""
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise


def check_unlocked(folder: str | os.PathLike[str]) -> None:
    """Whether nobody writes a folder at the moment: before long work, so that it is not done in vain; raises as :func:`locked`."""
    path = Path(folder) / LOCK
    with suppress(FileNotFoundError, NotADirectoryError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _lock(path, handle)
        finally:
            os.close(handle)


def _hold(path: Path) -> int:
    """A descriptor of the lock file, locked.  One that its last holder removed before we had it is no lock: try again."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _lock(path, handle)
            if os.fstat(handle).st_nlink:
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(path: Path, handle: int) -> None:
    """Lock the open file, if it is a lock of ours and nobody else has it."""
    begins = os.pread(handle, len(_HOLDER), 0) if stat.S_ISREG(os.fstat(handle).st_mode) else b"\0"
    if not _HOLDER.startswith(begins):  # a kill may have cut it
        raise CannotRun(f"{path} is not a lock of ours: remove it, or write elsewhere", code="PATH", path=str(path))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holders = [line for line in os.pread(handle, 1 << 20, 0).splitlines() if line.startswith(_HOLDER)]
        who = holders[-1].decode(errors="replace") if holders else "unknown"
        raise CannotRun(f"{path.parent} is being written by another process ({who})", code="BUSY", path=str(path.parent)) from None
