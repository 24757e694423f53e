"""tests/README.md says by which tests each kernel is held to what: all kernels are there, all tests exist."""

from __future__ import annotations

import re
from pathlib import Path

from photon_grpc.kernels.registry import SPECS

TESTS = Path(__file__).resolve().parents[1]
KERNELS = TESTS / "photon_grpc" / "kernels"


def section() -> str:
    text = (TESTS / "README.md").read_text()
    return text[text.index("## On a GPU") : text.index("## Bugs of the ancestors")]


def test_every_kernel_is_in_the_table() -> None:
    first_cells = " ".join(line.split("|")[1] for line in section().splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", first_cells)) == {spec.name for spec in SPECS}


def test_every_test_exists() -> None:
    files = [*KERNELS.glob("test_*.py"), TESTS / "photon_grpc" / "runner" / "test_cuda_sampler.py"]
    text = "".join(path.read_text() for path in files)
    named = re.findall(r"`(test_\w+)`", section())
    assert named
    assert [name for name in named if f"def {name}(" not in text] == []


def test_every_file_exists() -> None:
    named = re.findall(r"`((?:kernels|runner|reference|support)/\w+\.py)`", section())
    assert named
    folders = (TESTS, TESTS / "photon_grpc")
    assert [name for name in named if not any((folder / name).is_file() for folder in folders)] == []
