"""The exceptions of aprender, and nothing else.

The C core fails with a kind from ``csrc/base/errors.def``; the extension raises the class named there, from this file, with the fields of
the core's error struct as attributes.  Python code raises the same classes with the same keywords.  Commands catch :class:`Error` once,
in ``aprender._command``.
"""

from __future__ import annotations


class Error(Exception):
    """Base of everything that aprender raises on purpose.

    Parameters
    ----------
    message : str
        One line: what is wrong, with both values, and what to do.
    code : str, optional
        Stable identifier such as ``"TRUNCATED"`` (the rows of ``csrc/base/errors.def``).
    path, field : str, optional
        File and key, tensor, stage or argument concerned.
    offset : int, optional
        Byte offset in the file.
    layer : int, optional
    stage : str, optional
    """

    code: str | None
    path: str | None
    offset: int | None
    field: str | None
    layer: int | None
    stage: str | None

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        path: str | None = None,
        offset: int | None = None,
        field: str | None = None,
        layer: int | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.path = path
        self.offset = offset
        self.field = field
        self.layer = layer
        self.stage = stage


class FormatError(Error, ValueError):
    """A file is not what it claims to be, or uses what is not supported."""


class ConfigError(Error, ValueError):
    """The parts of a model do not fit together: missing or left-over tensors, shapes, hyper-parameters."""


class ArgumentError(Error, ValueError):
    """A value given by the caller is out of range."""


class UnknownName(Error, LookupError):
    """A stage, profile, fault or side that does not exist; the message suggests the nearest one."""


class NotComparable(Error, ValueError):
    """Two captures hold unlike things: ids, positions, population, capture point or lane order differ."""


class CannotRun(Error, RuntimeError):
    """The request is right but cannot be carried out here."""


class DeviceError(Error, RuntimeError):
    """A device that was asked for is missing or failed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device has too little memory; the message has the bytes needed and the bytes free."""
