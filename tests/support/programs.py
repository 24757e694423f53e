"""Programs that are no Python packages: where a test finds them, and what it does without them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FETCHED = ROOT / ".cache" / "programs" / "usr"
_FOLDERS = (_FETCHED / "sbin", _FETCHED / "bin", Path("/usr/sbin"), Path("/usr/local/sbin"))


def program(name: str) -> str:
    """The path of a program that `.ci/programs` fetches. Without it the test is skipped, under CI fails."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _FOLDERS)])
    found = shutil.which(name, path=path)
    if found is not None:
        return found
    message = f"{name} is not installed; .ci/programs fetches it where apt-get is"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
