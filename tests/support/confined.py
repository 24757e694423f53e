"""Programs that may not change files which nobody may change, also where root runs the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["read_only", "without_override"]

# Root may write where nobody may, by a capability that a program can give up (prctl: PR_CAPBSET_DROP,
# CAP_DAC_OVERRIDE) before it begins. Other users have none, and the call fails.
_PROGRAM = (
    "import ctypes, os, sys\nctypes.CDLL(None).prctl(24, 1, 0, 0, 0)\nos.execv(sys.argv[1], sys.argv[1:])"
)


def without_override(command: Sequence[str]) -> list[str]:
    """`command`, with an absolute path to its program, bound by the permissions of files even as root."""
    return [sys.executable, "-c", _PROGRAM, *command]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write into `folder` or what it holds."""
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        os.chmod(path, mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            os.chmod(path, mode)
