"""NVRTC without a GPU: logs, reports, and a cache that never lies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from photon_grpc.errors import KernelCompileError, StartupError
from photon_grpc.kernels import compiler
from photon_grpc.kernels.compiler import architecture, compile_source, cubin_file
from photon_grpc.kernels.sources import KernelSource, load_source

pytest.importorskip("cuda.bindings.nvrtc", reason="the dev extra brings cuda-bindings on Linux alone")

SOURCE = """
#include "photon/types.cuh"
extern "C" __global__ void scale(float* values) {
    __shared__ float staged[64];
    staged[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = FACTOR * staged[63 - threadIdx.x];
}
"""


def source_of(text: str) -> KernelSource:
    return KernelSource(Path("scale.cu"), text, load_source("rmsnorm").include_folder, "digest")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_a_cubin_and_what_ptxas_says_of_it(arch: str) -> None:
    compiled = compile_source(source_of(SOURCE), {"FACTOR": 2}, arch)

    assert compiled.cubin.startswith(b"\x7fELF")
    (report,) = compiled.functions.values()
    assert report.name == "scale"
    assert 0 < report.registers <= 32
    assert report.static_shared_bytes == 256
    assert report.spill_bytes == 0
    assert compiled.warnings == []


def test_spills_are_seen() -> None:
    text = SOURCE.replace("void scale", "void __launch_bounds__(1024, 2) scale").replace(
        "FACTOR * staged", "many(values) * staged"
    )
    many = """
    __device__ float many(float* v) {
        float kept[96], sum = 0;
        for (int i = 0; i < 96; ++i) kept[i] = v[i * 3];
        __syncthreads();
        for (int i = 0; i < 96; ++i) sum += kept[i] * v[i * 7 + (int)kept[95 - i]];
        return sum;
    }"""
    compiled = compile_source(source_of(many + text), {}, "sm_90a")
    assert compiled.functions["scale"].spill_bytes > 0


def test_warnings_are_seen() -> None:
    text = SOURCE.replace("__shared__", "int unused; __shared__")
    (warning,) = compile_source(source_of(text), {"FACTOR": 2}, "sm_90a").warnings
    assert "unused" in warning


def test_an_error_carries_the_compilers_log() -> None:
    with pytest.raises(KernelCompileError) as caught:
        compile_source(source_of(SOURCE.replace("staged[63", "stagged[63")), {"FACTOR": 2}, "sm_90a")

    assert isinstance(caught.value, StartupError)
    assert "stagged" in caught.value.log
    for part in ("scale.cu", "sm_90a", "-DFACTOR=2", caught.value.log):
        assert part in caught.value.message


def test_hopper_gets_the_architecture_with_its_own_instructions() -> None:
    assert [architecture(8, 0), architecture(8, 9), architecture(9, 0), architecture(10, 0)] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100",
    ]


MACROS = {"PHOTON_STORAGE": "bf16"}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was compiled rather than found."""
    done: list[str] = []
    real = compiler.compile_source

    def count(source: KernelSource, macros: compiler.Macros, arch: str) -> compiler.Compiled:
        done.append(source.path.stem)
        return real(source, macros, arch)

    monkeypatch.setattr(compiler, "compile_source", count)
    return done


def test_a_second_use_is_found_in_the_cache(tmp_path: Path, compilations: list[str]) -> None:
    with cubin_file("silu_and_mul", MACROS, "sm_90a", tmp_path) as path:
        first = path.read_bytes()
    with cubin_file("silu_and_mul", MACROS, "sm_90a", tmp_path) as path:
        assert path.read_bytes() == first
    assert compilations == ["silu_and_mul"]
    assert [one.suffix for one in tmp_path.iterdir()] == [".cubin"]


def test_whatever_changes_the_cubin_changes_its_name(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()

    def add(macros: dict[str, str], arch: str) -> None:
        with cubin_file("silu_and_mul", macros, arch, tmp_path) as path:
            names.add(path.name)

    add(MACROS, "sm_90a")
    add({"PHOTON_STORAGE": "f16"}, "sm_90a")
    add(MACROS, "sm_80")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    add(MACROS, "sm_90a")
    changed = load_source("silu_and_mul")
    monkeypatch.setattr(
        compiler,
        "load_source",
        lambda stem: KernelSource(changed.path, changed.text, changed.include_folder, "another digest"),
    )
    add(MACROS, "sm_90a")
    assert len(names) == 5
    assert len(compilations) == 5


def test_a_cache_that_cannot_be_written_costs_time_and_one_warning(
    tmp_path: Path, compilations: list[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("where a folder should be")
    with capture_logs() as logs:
        for _ in range(2):
            with cubin_file("silu_and_mul", MACROS, "sm_90a", blocked) as path:
                assert path.read_bytes().startswith(b"\x7fELF")
            assert not path.exists()
    assert len(compilations) == 2
    (warning,) = [log for log in logs if log["log_level"] == "warning"]
    assert warning["folder"] == str(blocked)
    assert warning["reason"]


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "fsync", full)
    with cubin_file("silu_and_mul", MACROS, "sm_90a", tmp_path) as path:
        assert path.parent != tmp_path
        assert path.read_bytes().startswith(b"\x7fELF")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "photon_grpc" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "photon_grpc" / "kernels"


def test_importing_needs_nothing_of_cuda() -> None:
    code = (
        "import sys\n"
        "sys.modules.update({'cupy': None, 'cuda.bindings': None})\n"
        "import photon_grpc.kernels.registry, photon_grpc.ops.cuda_ops\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
