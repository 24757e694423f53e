"""A wall clock that jumps, for other processes: what `settimeofday` would do to them, without the machine."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from tests.support.programs import program

__all__ = ["WallClock"]

_SOURCE = Path(__file__).with_name("clock_offset.c")
_OFFSET = struct.Struct("@l")


class WallClock:
    """The clock of all processes that begin with `environment`; those that run see it jump."""

    def __init__(self, folder: Path) -> None:
        """Compile into `folder`; the test is skipped without a C compiler, and fails under CI."""
        library = folder / "clock_offset.so"
        command = [program("cc"), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library)]
        subprocess.run([*command, str(_SOURCE), "-ldl"], check=True)
        self._file = folder / "clock_offset"
        self._file.write_bytes(_OFFSET.pack(0))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}

    def set(self, seconds: int) -> None:
        """Ahead of this process's clock by so much, from now on."""
        # In place: the processes have it mapped.
        with self._file.open("r+b") as file:
            file.write(_OFFSET.pack(seconds))
