"""Kernels as Python sees them: what a kernel is, which device there is, and a launch.

A launch takes pointers as ints and the declared numpy scalars, allocates no device memory, reads torch's
current stream each time (so it can be captured in a CUDA graph) and never waits for the device. torch
owns every tensor. Knows nothing of operations. Engine thread only: argument slots are reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.kernels.compiler import Macros, architecture, cubin_file, nvrtc_version

Pointer = int
"""The declared type of a device address, `tensor.data_ptr()`; 0 where the kernel allows none."""

TensorMap = np.void
"""The declared type of a tensor map by value, the bytes that `tensor_map.tensor_map` makes."""
TENSOR_MAP_BYTES = 128

Argument = int | np.int32 | np.int64 | np.float32 | TensorMap

_NUMPY_TYPES: dict[type, str] = {
    Pointer: "u8",
    np.int32: "i4",
    np.int64: "i8",
    np.float32: "f4",
    TensorMap: f"V{TENSOR_MAP_BYTES}",
}

_MIN_COMPUTE_CAPABILITY = (8, 0)
# A CTA gets more than this only after the function's limit is raised.
_DEFAULT_SHARED_BYTES = 48 << 10


@dataclass(frozen=True, slots=True, eq=False)
class KernelSpec:
    """One `extern "C" __global__` function, and all that Python has to know of it. Equal to itself alone.

    `macros` are the names that every variant defines. `checked` are the variants that the check without a
    GPU compiles: all, or where the values are a model's own sizes, those of models we name. Dynamic shared
    memory, where there is any, is the macro PHOTON_SHARED_BYTES, so that the check sees its size.
    `max_registers` is the budget that the check holds every one of them to, with no more than
    `max_spill_bytes` of spills.
    """

    name: str
    source: str
    """Stem of the file in `cuda_kernels`."""
    parameters: tuple[type, ...]
    """`Pointer`, np.int32, np.int64, np.float32 or `TensorMap`, in order."""
    max_threads: int
    """Of a CTA; what the source's __launch_bounds__ says."""
    macros: tuple[str, ...] = ()
    checked: tuple[Mapping[str, int | str], ...] = ({},)
    max_registers: int = 64
    max_spill_bytes: int = 0
    chosen_by_room: bool = False
    """Whether its Python twin takes only variants that fit the device's shared memory: then not every
    architecture needs to have room for every one of them."""
    overlaps: bool = False
    """Whether it may start while the kernel before it still runs (programmatic dependent launch). Its
    source then waits (photon/dependent_launch.cuh) before it touches anything that another kernel
    writes, or writes anything that another reads."""

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            assert parameter in _NUMPY_TYPES, f"{self.name}: {parameter} cannot be a kernel's parameter"
        for macros in self.checked:
            assert set(macros) == set(self.macros), f"{self.name}: {macros} is no variant"

    def variant(self, **macros: int | str) -> Variant:
        """The variant with these macros, all of those declared."""
        return _variant(self, **macros)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with every macro fixed: one cubin per architecture."""

    spec: KernelSpec
    items: tuple[tuple[str, int | str], ...]

    @property
    def macros(self) -> Macros:
        return dict(self.items)

    def __str__(self) -> str:
        return f"{self.spec.name}({', '.join(f'{name}={value}' for name, value in self.items)})"


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that kernels are launched on."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    max_shared_bytes: int
    """Of one CTA, once asked for."""
    arch: str = field(init=False)
    """NVRTC's name of the architecture, such as sm_90a."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", architecture(*self.compute_capability))

    @property
    def can_overlap(self) -> bool:
        """Whether programmatic dependent launch does anything here."""
        return self.compute_capability >= (9, 0)


@cache
def _variant(spec: KernelSpec, **macros: int | str) -> Variant:
    """Kept, since every launch names its kernel so."""
    assert set(macros) == set(spec.macros), f"{spec.name}: {macros} is no variant"
    return Variant(spec, tuple(sorted(macros.items())))


class Kernel:
    """A variant, loaded on a device."""

    def __init__(self, variant: Variant, device: Device, shared_bytes: int) -> None:
        import cupy
        from cuda.bindings import driver

        spec = variant.spec
        if shared_bytes > device.max_shared_bytes:
            raise BackendUnavailableError(
                f"backend cuda: {variant} needs {shared_bytes} bytes of shared memory per CTA; "
                f"{device.name} has {device.max_shared_bytes}"
            )
        with cubin_file(spec.source, variant.macros, device.arch) as path, cupy.cuda.Device(device.index):
            # Kept, since a launch or a graph must not outlive the module.
            self._function = cupy.RawModule(path=str(path)).get_function(spec.name)
            self._handle = driver.CUfunction(self._function.kernel.ptr)
            if shared_bytes > _DEFAULT_SHARED_BYTES:
                # CuPy hands out one function per cubin, and kernels of several sizes share it: the limit of
                # one must not be too small for another.
                static_bytes = self._function.shared_size_bytes
                self._function.max_dynamic_shared_size_bytes = device.max_shared_bytes - static_bytes
        self.variant = variant
        self.device = device
        self._slots, self._addresses = _argument_slots(spec.parameters)
        self._arguments = int(self._addresses.ctypes.data)
        self._config = driver.CUlaunchConfig()
        self._config.sharedMemBytes = shared_bytes
        self._config.blockDimY = self._config.blockDimZ = 1
        if spec.overlaps and device.can_overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs = [attribute]
            self._config.numAttrs = 1
        self._launch = driver.cuLaunchKernelEx

    def __call__(self, grid: tuple[int, int, int], num_threads: int, *arguments: Argument) -> None:
        """Launch `grid` CTAs on torch's current stream. An empty grid launches nothing.

        Raises TypeError for an argument that is not of its declared type (a Python float would arrive as
        something else) and RuntimeError for sizes that the driver refuses.
        """
        if 0 in grid:
            return
        spec = self.variant.spec
        if tuple(map(type, arguments)) != spec.parameters:
            raise TypeError(
                f"{spec.name} takes {_names(spec.parameters)}, not {_names(map(type, arguments))}"
            )
        self._slots[()] = arguments
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX = num_threads
        # torch.cuda.current_stream makes an object for it, a tenth of what a launch costs the host.
        config.hStream = torch._C._cuda_getCurrentRawStream(self.device.index)
        # The driver copies the arguments before it returns.
        (result,) = self._launch(config, self._handle, self._arguments, 0)
        if int(result) != 0:
            raise RuntimeError(f"launch of {self.variant}, grid {grid}, {num_threads} threads: {result}")


@cache
def load(variant: Variant, shared_bytes: int = 0) -> Kernel:
    """The kernel on the current device, with `shared_bytes` of dynamic shared memory per CTA.

    Compiles and loads at its first use, which has to come before a graph is captured; later calls are a
    look-up. Raises BackendUnavailableError and KernelCompileError.
    """
    return Kernel(variant, require_cuda(), shared_bytes)


@cache
def require_cuda() -> Device:
    """The current CUDA device, once everything that the kernels need is there.

    Raises BackendUnavailableError that names what is missing.
    """
    toolkit = torch.version.cuda
    if toolkit is None:
        raise BackendUnavailableError("backend cuda: this torch is built without CUDA; install a CUDA build")
    major = int(toolkit.split(".")[0])
    extra = f'pip install "photon-grpc[cuda{major}]"'
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"backend cuda: torch {torch.__version__} finds no usable NVIDIA GPU or driver; "
            "see what nvidia-smi says, and whether the driver is recent enough for CUDA " + toolkit
        )
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend cuda: CuPy is missing or broken ({error}): {extra} (cupy-cuda{major}x)"
        ) from error
    try:
        import cuda.bindings
        from cuda.bindings import driver  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend cuda: cuda-bindings is missing or broken ({error}): {extra}"
        ) from error
    versions = {
        f"CuPy {cupy.__version__}": cupy.cuda.runtime.runtimeGetVersion() // 1000,
        f"cuda-bindings {cuda.bindings.__version__}": int(cuda.bindings.__version__.split(".")[0]),
        "NVRTC": nvrtc_version()[0],
    }
    for library, found in versions.items():
        if found != major:
            raise BackendUnavailableError(
                f"backend cuda: {library} is made for CUDA {found} and torch for CUDA {toolkit}: {extra} "
                f"(cupy-cuda{major}x and cuda-bindings {major}.x, and no other cupy wheel beside it)"
            )
    return _device(torch.cuda.current_device())


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < _MIN_COMPUTE_CAPABILITY:
        raise BackendUnavailableError(
            f"backend cuda: {properties.name} has compute capability {capability[0]}.{capability[1]}; "
            f"the kernels need {_MIN_COMPUTE_CAPABILITY[0]}.{_MIN_COMPUTE_CAPABILITY[1]}"
        )
    from cuda.bindings import driver

    # torch makes its context on first use; modules are loaded into it.
    torch.zeros(1, device=f"cuda:{index}")
    limit = _driver(
        driver.cuDeviceGetAttribute(
            driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, index
        )
    )
    return Device(index, properties.name, capability, properties.multi_processor_count, int(limit))


def _argument_slots(parameters: tuple[type, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Memory for one launch's arguments, and the addresses of them that the driver wants."""
    layout = np.dtype(
        [(f"argument{i}", _NUMPY_TYPES[parameter]) for i, parameter in enumerate(parameters)], align=True
    )
    slots = np.zeros((), dtype=layout)
    offsets = [layout.fields[name][1] for name in layout.names or ()] if layout.fields else []
    return slots, np.array([slots.ctypes.data + offset for offset in offsets], dtype=np.uint64)


def _driver(answer: tuple[Any, ...]) -> Any:
    result, value = answer
    if int(result) != 0:
        raise BackendUnavailableError(f"backend cuda: the driver failed: {result}")
    return value


def _names(types: Iterable[type]) -> str:
    return "(" + ", ".join("pointer" if one is Pointer else one.__name__ for one in types) + ")"
