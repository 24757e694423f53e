"""A file of settings that a running server reads again when it changes, and keeps the last good one of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from photon_grpc.errors import ConfigError

__all__ = ["WatchedFile"]

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class WatchedFile(Generic[_T]):
    """What `parse` makes of the file that `setting` names. Looks at the file with each question."""

    def __init__(self, setting: str, file: str, parse: Callable[[bytes], _T]) -> None:
        """`parse` raises ValueError, whose text ends up in the log. Raises ConfigError for a file that cannot
        be used."""
        self._setting = setting
        self._file = Path(file)
        self._parse = parse
        # Before the read: what is written in between is then read with the next question.
        self._stamp = self._unreadable = self._look()
        try:
            self._value = parse(self._file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{setting}: {self._describe(error)}") from None

    def current(self) -> _T:
        """The content as it is now, or the last that was good; the same object while nothing changes."""
        stamp = self._look()
        if stamp == self._stamp:
            return self._value
        try:
            content = self._file.read_bytes()
        except OSError as error:
            # It may be readable with the next question, unchanged: this process had no descriptor left.
            if stamp != self._unreadable:
                self._unreadable = stamp
                self._warn(error)
            return self._value
        self._stamp = self._unreadable = stamp
        try:
            self._value = self._parse(content)
        except ValueError as error:
            self._warn(error)
        else:
            _log.info("file loaded", setting=self._setting)
        return self._value

    def _warn(self, error: OSError | ValueError) -> None:
        _log.warning(
            "file refused, the last good one stays", setting=self._setting, reason=self._describe(error)
        )

    def _look(self) -> tuple[int, int, int] | None:
        """What changes when the file is written or replaced; None while there is none."""
        try:
            entry = os.stat(self._file)
        except OSError:
            return None
        return entry.st_mtime_ns, entry.st_size, entry.st_ino

    def _describe(self, error: OSError | ValueError) -> str:
        return f"{self._file}: {error.strerror if isinstance(error, OSError) else error}"
