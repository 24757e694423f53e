"""From CUDA C to a cubin: NVRTC, its log, and a cache of cubins on disk.

The same function compiles at run time and in the check that needs no GPU, so what the check accepts is
what a device gets. NVRTC comes from `cuda.bindings`, which finds it where CuPy 14 does (the wheels that
torch depends on, or a toolkit). The sources include no toolkit header, so that none of another version
can get in. Knows nothing of devices, arguments or tensors. Any thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from photon_grpc.errors import BackendUnavailableError, KernelCompileError
from photon_grpc.kernels.sources import KernelSource, load_source

Macros = Mapping[str, int | str]

_log = structlog.get_logger(__name__)

# -ftz as CuPy compiles; where a result must keep subnormals, photon/ieee.cuh does.
_OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")

# Bump when the meaning of a cached file changes.
_CACHE_FORMAT = 1

# cuda.bindings fills the `bytes` object that it is given. Python shares short ones, and an empty log
# would overwrite a shared one; a longer buffer is always fresh.
_FRESH_BYTES = 8


@dataclass(frozen=True, slots=True)
class FunctionReport:
    """What ptxas says of one `__global__` function."""

    name: str
    registers: int
    static_shared_bytes: int
    spill_bytes: int
    """Stores and loads together."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and the compiler's log."""

    cubin: bytes
    log: str

    @property
    def functions(self) -> dict[str, FunctionReport]:
        """By name; mangled names for functions that are not extern "C"."""
        return {report.name: report for report in _parse_ptxas(self.log)}

    @property
    def warnings(self) -> list[str]:
        """Lines of the log that warn, ptxas's included."""
        return [line for line in self.log.splitlines() if _WARNING.search(line)]


def architecture(major: int, minor: int) -> str:
    """NVRTC's name of a compute capability; on 9.0 the variant that has `wgmma` and `setmaxnreg`."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def compile_source(source: KernelSource, macros: Macros, arch: str) -> Compiled:
    """Compile for `arch` ("sm_90a"). Raises KernelCompileError with the log, BackendUnavailableError
    where NVRTC cannot be loaded.
    """
    nvrtc = _nvrtc()
    options = [option.encode() for option in _options(macros, arch)]
    options.append(f"-I{source.include_folder}".encode())
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(source.text.encode(), source.path.name.encode(), 0, [], []),
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc, program)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(source.path.name, arch, dict(macros), log or str(result))
        size = _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        cubin = b" " * (size + _FRESH_BYTES)
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return Compiled(cubin[:size], log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@contextmanager
def cubin_file(stem: str, macros: Macros, arch: str, folder: Path | None = None) -> Iterator[Path]:
    """A file with the cubin of `<stem>.cu`: the cache's in `folder`, compiled and put there if need be.

    Where the cache cannot be written it is a temporary one, gone afterwards: every process compiles for
    itself, and a warning says so once. Raises as `compile_source` does.
    """
    source = load_source(stem)
    path = (folder or cache_folder()) / f"{stem}-{_key(source, macros, arch)}.cubin"
    if path.is_file():
        yield path
        return
    cubin = compile_source(source, macros, arch).cubin
    if _publish(path, cubin):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="photon_grpc-") as temporary:
        path = Path(temporary) / path.name
        path.write_bytes(cubin)
        yield path


def cache_folder() -> Path:
    """`photon_grpc/kernels` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(stated) if stated else Path.home() / ".cache") / "photon_grpc" / "kernels"


@cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC in use."""
    nvrtc = _nvrtc()
    result, major, minor = nvrtc.nvrtcVersion()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendUnavailableError(f"backend cuda: NVRTC does not answer: {result}")
    return major, minor


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendUnavailableError("backend cuda: the package cuda-bindings is missing") from error
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise BackendUnavailableError(f"backend cuda: the library NVRTC is missing: {error}") from error
    return nvrtc


def _options(macros: Macros, arch: str) -> list[str]:
    defined = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return [f"-arch={arch}", *_OPTIONS, *defined]


def _checked(nvrtc: Any, answer: Sequence[Any]) -> Any:
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendUnavailableError(f"backend cuda: NVRTC failed: {result}")
    return values[0] if values else None


def _text(nvrtc: Any, program: Any) -> str:
    size: int = _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
    buffer = b" " * (size + _FRESH_BYTES)
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, buffer))
    return buffer[:size].decode(errors="replace").rstrip("\0 \n")


def _key(source: KernelSource, macros: Macros, arch: str) -> str:
    parts = (_CACHE_FORMAT, nvrtc_version(), _options(macros, arch), source.digest)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def _publish(path: Path, cubin: bytes) -> bool:
    """Whether the file is there now. Whoever reads sees all of it or none, also after a power cut; of two
    writers either wins, with the same content.
    """
    temporary = ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(cubin)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Read-only or full.
        _warn_of_cache(path.parent, error.strerror or type(error).__name__)
        with suppress(OSError):
            if temporary:
                os.unlink(temporary)
        return False
    return True


@cache
def _warn_of_cache(folder: Path, reason: str) -> None:
    """Once per process, not once per kernel."""
    _log.warning(
        "the kernel cache cannot be written, each start compiles anew", folder=str(folder), reason=reason
    )


# The second is how ptxas says that it ignores an instruction that was meant to help.
_WARNING = re.compile(r"\bwarning\s*[#:]|Potential Performance Loss", re.IGNORECASE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _parse_ptxas(log: str) -> list[FunctionReport]:
    """ptxas writes three lines per function: its name, its spills, its registers."""
    reports = []
    name, spilled = "", 0
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name, spilled = entry[1], 0
        elif spills := _SPILLS.search(line):
            spilled = int(spills[1]) + int(spills[2])
        elif (used := _USED.search(line)) and name:
            shared = _SHARED.search(line)
            reports.append(FunctionReport(name, int(used[1]), int(shared[1]) if shared else 0, spilled))
            name = ""
    return reports
