"""Files that never show half of themselves under their final name.

Owns :func:`writing`, the one way in which this package puts a file down: under a temporary name in the same folder, synced, renamed, and
the folder synced.  Refuses nothing.  An exception on the way leaves neither the new file nor its temporary one, and what stood under the
name before is untouched.  What a kill leaves is a temporary file that no reader of ours takes for anything.  Called by captures, the trace
trees and convert.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"
"""Ending of a temporary name."""


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
