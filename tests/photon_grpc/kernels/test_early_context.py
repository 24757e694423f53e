"""A context that is begun ahead of torch, or quietly is not."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from photon_grpc.kernels import early_context
from photon_grpc.kernels.early_context import begin_context


class Driver:
    """Stands in for `cuda.bindings.driver`: `fails` is the call that brings an error."""

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self._fails = fails
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def call(argument: int) -> tuple[int, ...]:
            self.calls.append((name, argument))
            if name == self._fails and self._error is not None:
                raise self._error
            return (999 if name == self._fails else 0, 0)

        call.__name__ = name
        return call


def begun(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> list[tuple[str, int]]:
    """The calls to the driver."""
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]  # a stand-in for the real package
    namespace = ModuleType("cuda")
    namespace.bindings = bindings  # type: ignore[attr-defined]  # likewise
    for module in (namespace, bindings):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(early_context, "_is_installed", lambda package: package == "cupy")
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    thread = begin_context()
    assert thread is not None
    thread.join()
    return driver.calls


def test_it_is_the_context_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert begun(monkeypatch, Driver()) == [
        ("cuInit", 0),
        ("cuDeviceGet", 0),
        ("cuDevicePrimaryCtxRetain", 0),
    ]


def test_a_machine_without_a_device_says_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    assert begun(monkeypatch, Driver("cuInit")) == [("cuInit", 0)]
    missing = RuntimeError("Failed to dlopen libcuda.so.1")
    assert begun(monkeypatch, Driver("cuInit", missing)) == [("cuInit", 0)]
    assert len(begun(monkeypatch, Driver("cuDevicePrimaryCtxRetain"))) == 3


@pytest.mark.parametrize("missing", ["cupy", "cuda.bindings"])
def test_an_installation_without_the_packages_leaves_the_device_alone(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    driver = Driver()
    monkeypatch.setattr(early_context, "_is_installed", lambda package: package != missing)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]  # a stand-in for the real package
    monkeypatch.setitem(sys.modules, "cuda.bindings", None if missing == "cuda.bindings" else bindings)
    assert begin_context() is None
    assert driver.calls == []


def test_it_imports_no_torch() -> None:
    source = "import photon_grpc.kernels.early_context, sys; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


@pytest.mark.gpu
def test_torch_finds_it() -> None:
    """In a process of its own: this one has its context already."""
    source = """
from photon_grpc.kernels.early_context import begin_context
begin_context().join()
from cuda.bindings import driver
assert int(driver.cuDevicePrimaryCtxGetState(0)[2]) == 1, "it is active before torch is imported"
import torch
assert torch.ones(3, device="cuda").sum().item() == 3
assert torch.cuda.current_device() == 0
(_, context) = driver.cuCtxGetCurrent()
(_, primary) = driver.cuDevicePrimaryCtxRetain(0)
assert int(context) == int(primary), "torch has made no other one"
"""
    assert torch.cuda.is_available()
    subprocess.run([sys.executable, "-c", source], check=True, timeout=100)
