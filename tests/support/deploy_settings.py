"""Environments of deploy/ as the server would read them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from photon_grpc.config import load_options
from photon_grpc.options import Options


def options_of(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Options:
    """The settings of a process with these variables and no other `PHOTON_*`. Raises ConfigError."""
    for name in list(os.environ):
        if name.startswith("PHOTON_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        assert isinstance(value, str), f"{name}: {value!r} is no string"
        monkeypatch.setenv(name, value)
    return load_options()
