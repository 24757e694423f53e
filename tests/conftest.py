"""What holds for every test.

GPU tests run where there is a GPU; elsewhere each says that it was skipped, and why. A worker of
pytest-xdist computes on one thread, since there is a worker for every processor.
"""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, which reads it once; servers that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU"))
