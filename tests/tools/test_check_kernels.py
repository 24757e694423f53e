"""The check without a GPU finds what it is there to find."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import pytest

from photon_grpc.kernels.compiler import Compiled
from photon_grpc.kernels.launcher import KernelSpec, Pointer
from tools import check_kernels

SPEC = KernelSpec(name="f", source="f", parameters=(Pointer,), max_threads=32, max_registers=40)


def log(name: str = "f", registers: int = 40, spills: int = 0, shared: int = 0, extra: str = "") -> Compiled:
    return Compiled(
        b"",
        f"{extra}\n"
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"ptxas         .     0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem\n",
    )


def test_nothing_is_wrong_at_the_limits() -> None:
    macros: dict[str, int | str] = {"PHOTON_SHARED_BYTES": (163 << 10) - 1024}
    assert check_kernels.problems(SPEC, macros, log(shared=1024), "sm_80") == []


@pytest.mark.parametrize(
    ("compiled", "macros", "message"),
    [
        (log(name="g"), {}, "no extern"),
        (log(registers=41), {}, "41 registers, budget 40"),
        (log(spills=4), {}, "spills 8 bytes"),
        (log(shared=49153), {}, "49153 bytes of static shared memory"),
        (log(shared=1), {"PHOTON_SHARED_BYTES": 163 << 10}, "bytes of shared memory, sm_80 has"),
        (log(extra='f.cu(5): warning #177-D: variable "x" was declared'), {}, "#177-D"),
        (log(extra="ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored"), {}, "C7508"),
    ],
)
def test_what_is_wrong_is_named(compiled: Compiled, macros: dict[str, int | str], message: str) -> None:
    (found,) = check_kernels.problems(SPEC, macros, compiled, "sm_80")
    assert message in found


def end_for_one_architecture(work: check_kernels.Compilation) -> list[check_kernels.Checked]:
    if work.arch == "sm_90a":
        os.kill(os.getpid(), signal.SIGKILL)
    return [check_kernels.Checked(str(work), 7, [])]


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are checked on Linux alone")
def test_a_compiler_that_dies_is_a_problem() -> None:
    works = check_kernels.compilations([SPEC.variant()])
    assert check_kernels.check_apart(works, end_for_one_architecture) == [
        check_kernels.Checked("f() sm_80", 7, []),
        check_kernels.Checked("f() sm_90a", None, ["the compiler's process ended with -9"]),
        check_kernels.Checked("f() sm_100", 7, []),
    ]


def test_every_variant_is_compiled_for_every_architecture_and_the_same_macros_once() -> None:
    same = replace(SPEC, name="g")
    other = KernelSpec(
        name="h", source="h", parameters=(), max_threads=32, macros=("N",), checked=({"N": 1}, {"N": 2})
    )
    work = check_kernels.compilations(
        [SPEC.variant(), *(other.variant(**macros) for macros in other.checked), same.variant()]
    )
    assert [str(one) for one in work] == [
        f"{name} {arch}" for name in ("f()", "h(N=1)", "h(N=2)") for arch in check_kernels.ARCHITECTURES
    ]
    assert [len(one.variants) for one in work] == [2, 2, 2, 1, 1, 1, 1, 1, 1]


def test_one_source_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the dev extra brings cuda-bindings on Linux alone")
    assert check_kernels.main(["silu_and_mul", "--report"]) == 0
    assert "silu_and_mul(PHOTON_STORAGE=bf16) sm_90a: " in capsys.readouterr().out
