"""What can be passed to a kernel, what a machine lacks, and on a GPU: streams, graphs, overlap."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.kernels import launcher
from photon_grpc.kernels.launcher import KernelSpec, Pointer, load, require_cuda
from photon_grpc.kernels.registry import SPECS, checked_variants
from photon_grpc.kernels.rmsnorm import RMS_NORM, rms_norm
from photon_grpc.kernels.silu_and_mul import SILU_AND_MUL, silu_and_mul


def test_arguments_lie_as_c_lays_out_parameters() -> None:
    slots, addresses = launcher._argument_slots((Pointer, np.int32, np.int64, np.float32, np.int32))
    slots[()] = (1 << 45, np.int32(-3), np.int64(-(1 << 40)), np.float32(0.1), np.int32(7))
    raw = slots.tobytes()

    assert (addresses - addresses[0]).tolist() == [0, 8, 16, 24, 28]
    assert int.from_bytes(raw[0:8], "little") == 1 << 45
    assert int.from_bytes(raw[8:12], "little", signed=True) == -3
    assert int.from_bytes(raw[16:24], "little", signed=True) == -(1 << 40)
    assert np.frombuffer(raw[24:28], np.float32)[0] == np.float32(0.1)


def test_a_variant_has_every_macro_and_no_other() -> None:
    assert str(SILU_AND_MUL.variant(PHOTON_STORAGE="bf16")) == "silu_and_mul(PHOTON_STORAGE=bf16)"
    for macros in ({}, {"PHOTON_STORAGE": "bf16", "OTHER": 1}):
        with pytest.raises(AssertionError, match="no variant"):
            SILU_AND_MUL.variant(**macros)
    with pytest.raises(AssertionError, match="cannot be a kernel's parameter"):
        KernelSpec(name="f", source="f", parameters=(float,), max_threads=1)


def test_names_are_unique_and_variants_hash() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    assert len(set(checked_variants())) == len(list(checked_variants()))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that has everything; tests take something away."""
    cupy = ModuleType("cupy")
    cupy.__version__ = "14.0.0"  # type: ignore[attr-defined]  # a stand-in for the real package
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 13000)
    cupy.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]  # likewise
    bindings = ModuleType("cuda.bindings")
    bindings.__version__ = "13.0.3"  # type: ignore[attr-defined]  # likewise
    bindings.driver = ModuleType("cuda.bindings.driver")  # type: ignore[attr-defined]  # likewise
    namespace = ModuleType("cuda")
    namespace.bindings = bindings  # type: ignore[attr-defined]  # likewise
    for module in (cupy, bindings, namespace):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "nvrtc_version", lambda: (13, 0))
    device = launcher.Device(0, "GPU", (9, 0), 132, 227 << 10)
    monkeypatch.setattr(launcher, "_device", lambda index: device)
    return SimpleNamespace(runtime=runtime, bindings=bindings, device=device)


def missing() -> str:
    with pytest.raises(BackendUnavailableError) as caught:
        require_cuda.__wrapped__()
    assert caught.value.message.startswith("backend cuda: ")
    return caught.value.message


def test_a_machine_with_everything(machine: Any) -> None:
    assert require_cuda.__wrapped__() is machine.device


def test_a_torch_without_cuda(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch is built without CUDA" in missing()


def test_no_device_or_driver(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable NVIDIA GPU or driver" in missing()


@pytest.mark.parametrize(("toolkit", "wheel"), [("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x")])
def test_no_cupy(machine: Any, monkeypatch: pytest.MonkeyPatch, toolkit: str, wheel: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = missing()
    assert wheel in message
    assert f"photon-grpc[cuda{toolkit[:2]}]" in message


def test_no_bindings(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-bindings is missing" in missing()


def test_a_cupy_of_another_cuda(machine: Any) -> None:
    machine.runtime.runtimeGetVersion = lambda: 12090
    message = missing()
    assert "CuPy 14.0.0 is made for CUDA 12 and torch for CUDA 13.0" in message
    assert "cupy-cuda13x" in message


def test_bindings_of_another_cuda(machine: Any) -> None:
    machine.bindings.__version__ = "12.9.1"
    assert "cuda-bindings 12.9.1 is made for CUDA 12" in missing()


def test_an_nvrtc_of_another_cuda(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "nvrtc_version", lambda: (12, 9))
    assert "NVRTC is made for CUDA 12" in missing()


@pytest.mark.gpu
def test_wrong_argument_types_are_refused() -> None:
    kernel = load(SILU_AND_MUL.variant(PHOTON_STORAGE="bf16"))
    x = torch.zeros(64, device="cuda", dtype=torch.bfloat16)
    for count in (32, 32.0, np.int64(32), np.float32(32)):
        with pytest.raises(TypeError, match="silu_and_mul takes"):
            kernel((1, 1, 1), 256, x.data_ptr(), x.data_ptr(), count)
    with pytest.raises(TypeError, match="silu_and_mul takes"):
        kernel((1, 1, 1), 256, x.data_ptr(), np.int32(32))


@pytest.mark.gpu
def test_a_launch_that_the_driver_refuses_says_which() -> None:
    kernel = load(SILU_AND_MUL.variant(PHOTON_STORAGE="bf16"))
    x = torch.zeros(64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"silu_and_mul.*4096 threads"):
        kernel((1, 1, 1), 4096, x.data_ptr(), x.data_ptr(), np.int32(32))


@pytest.mark.gpu
def test_more_shared_memory_than_the_device_has() -> None:
    with pytest.raises(BackendUnavailableError, match="shared memory"):
        load(SILU_AND_MUL.variant(PHOTON_STORAGE="bf16"), shared_bytes=1 << 20)


@pytest.mark.gpu
def test_an_empty_grid_launches_nothing() -> None:
    silu_and_mul(
        torch.empty(0, 32, device="cuda", dtype=torch.bfloat16),
        torch.empty(0, 64, device="cuda", dtype=torch.bfloat16),
    )
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_launches_go_to_the_stream_that_is_current() -> None:
    """A sleep on a side stream delays what is launched there and nothing else."""
    side = torch.cuda.Stream()
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(4, 32, device="cuda", dtype=torch.bfloat16)
    silu_and_mul(out, x)
    expected = out.clone()
    out.zero_()
    # Loading a kernel waits for the whole device, so torch's has to be there before the sleep begins.
    assert int(out.count_nonzero()) == 0
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        silu_and_mul(out, x)
    torch.cuda.current_stream().synchronize()
    assert not side.query(), "the sleep is over too early to tell"
    assert int(out.count_nonzero()) == 0
    side.synchronize()
    assert torch.equal(out, expected)


def chain(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, length: int) -> None:
    """Each launch reads what the one before it wrote."""
    source = x
    for i in range(length):
        target = out[i]
        rms_norm(target, source, weight, 1e-5)
        source = target


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 700])
def test_overlapping_launches_in_a_graph_give_the_bits_of_plain_ones(rows: int) -> None:
    """A kernel that read before the one before it had finished would read NaN or stale values."""
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    expected = torch.empty(40, rows, 2048, device="cuda", dtype=torch.bfloat16)
    source = x
    for i in range(40):
        rms_norm(expected[i], source, weight, 1e-5)
        torch.cuda.synchronize()
        source = expected[i]
    out = torch.full_like(expected, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(out, x, weight, 40)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_overlap_is_an_attribute_of_the_launch() -> None:
    kernel = load(RMS_NORM.variant(PHOTON_STORAGE="bf16", PHOTON_RESIDUAL="bf16"))
    assert kernel._config.numAttrs == (1 if kernel.device.can_overlap else 0)


@pytest.mark.gpu
def test_a_launch_takes_no_device_memory() -> None:
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(4, 32, device="cuda", dtype=torch.bfloat16)
    silu_and_mul(out, x)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        silu_and_mul(out, x)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
