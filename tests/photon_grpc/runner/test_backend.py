"""Which backend is chosen, and what is said when it cannot be had."""

from __future__ import annotations

import pytest
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.options import ModelOptions, Options
from photon_grpc.runner import backend
from photon_grpc.runner.backend import choose_backend, explain_backend, resolve_dtype


def options(name: str) -> Options:
    return Options(model=ModelOptions(backend=name))


def unavailable(_: Options) -> backend.Backend:
    raise BackendUnavailableError("backend cuda: CuPy is missing")


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend(options("auto")).name == "cpu"
    assert explain_backend(options("auto"))[1] == "torch finds no GPU"


def test_auto_beside_a_gpu_without_its_libraries_serves_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_cuda", unavailable)
    assert choose_backend(options("auto")).name == "cpu"
    assert explain_backend(options("auto"))[1] == "backend cuda: CuPy is missing"


def test_cuda_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_cuda", unavailable)
    with pytest.raises(BackendUnavailableError, match="CuPy"):
        choose_backend(options("cuda"))


def test_auto_types() -> None:
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert resolve_dtype("auto", "cuda") is torch.bfloat16
    assert resolve_dtype("float16", "cuda") is torch.float16


@pytest.mark.gpu
def test_auto_takes_a_gpu() -> None:
    assert choose_backend(options("auto")).device.type == "cuda"
