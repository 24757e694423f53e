"""compute-sanitizer is driven as it should be, and its word counts; over a stand-in for the program."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_gpu_tests, run_sanitizer
from tools.sanitizer_selection import select

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
DIRTY = (
    "========= Invalid __global__ read of size 16 bytes\n"
    "=========     at rms_norm+0x1a0\n"
    "========= ERROR SUMMARY: 3 errors\n"
)
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CLEAN, 0),
        (DIRTY, 3),
        (RACES, 2),
        (CLEAN + DIRTY, 3),
        ("========= COMPUTE-SANITIZER\n", None),
        ("", None),
    ],
)
def test_summaries_add_up_and_silence_is_no_pass(text: str, found: int | None) -> None:
    assert run_sanitizer.read_log(text) == found
    verdict = run_sanitizer.Verdict("memcheck", "gemv", found, tests_passed=True, seconds=1.0, log="")
    assert verdict.passed is (found == 0)
    assert not run_sanitizer.Verdict("memcheck", "gemv", found, False, 1.0, "").passed


def test_a_few_of_every_test_and_none_of_the_left_out() -> None:
    names = [f"a.py::test_one[{i}]" for i in range(100)] + ["a.py::test_two", "a.py::test_long_one[0]"]
    kept = select(names, 6, ["long"])
    assert len(kept) == 7
    assert kept == [name for name in names if name in kept]
    assert "a.py::test_two" in kept
    assert kept == select(names, 6, ["long"]), "the same each time"
    assert select(names, 0, []) == names


def test_a_word_in_a_parameter_leaves_nothing_out() -> None:
    assert select(["a.py::test_one[long]"], 1, ["long"]) == ["a.py::test_one[long]"]


def test_words_left_out_are_of_tests_that_exist() -> None:
    """One that matches nothing any more would keep a long test in."""
    words = (*run_sanitizer.LONG, *run_sanitizer.NEED_CACHING, *run_sanitizer.EXPECTED_ERRORS)
    text = "".join((run_sanitizer.ROOT / name).read_text() for name in run_sanitizer.targets())
    tests = [line for line in text.splitlines() if line.startswith("def test_")]
    assert [word for word in words if not any(word in test for test in tests)] == []


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH: writes `said` into the log, and what it was called with beside it. Of the planted
    errors it finds those of the tools that `blind` does not name.
    """
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "arguments = sys.argv[1:]\n"
        "tool = arguments[arguments.index('--tool') + 1]\n"
        "log = pathlib.Path(arguments[arguments.index('--log-file') + 1])\n"
        "planted = log.name.endswith('-planted.log') and tool not in (here / 'blind').read_text()\n"
        f"log.write_text({DIRTY!r} if planted else (here / 'said').read_text())\n"
        "cached = 'PYTORCH_NO_CUDA_MEMORY_CACHING' not in os.environ\n"
        "(here / f'{log.stem}.json').write_text(json.dumps([cached, arguments]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "blind").write_text("")
    (tmp_path / "said").write_text(CLEAN)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(run_gpu_tests, "missing", lambda: "")
    return tmp_path


def called(sanitizer: Path) -> dict[str, tuple[bool, list[str]]]:
    """By tool and kernel: whether torch cached memory, and the arguments."""
    return {path.stem: tuple(json.loads(path.read_text())) for path in sanitizer.glob("*.json")}


def test_every_tool_runs_over_every_kernel_and_one_error_fails_them_all(
    sanitizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_sanitizer.main([]) == 0
    kernels = [*run_sanitizer.KERNELS, "planted"]
    assert called(sanitizer).keys() == {f"{t}-{k}" for t in run_sanitizer.TOOLS for k in kernels}
    (sanitizer / "said").write_text(DIRTY)
    assert run_sanitizer.main(["memcheck", "--kernel", "gemv"]) == 1
    said = capfd.readouterr().out
    assert "Invalid __global__ read" in said
    assert "FAIL" in said


def test_a_tool_that_misses_a_planted_error_fails(sanitizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sanitizer / "blind").write_text("racecheck")
    assert run_sanitizer.main(["memcheck", "--kernel", "gemv"]) == 0
    assert run_sanitizer.main(["racecheck", "--kernel", "gemv"]) == 1
    assert "racecheck does not find a planted error" in capfd.readouterr().out


def test_only_the_kernel_is_instrumented_but_for_initcheck(sanitizer: Path) -> None:
    run_sanitizer.main(["racecheck", "initcheck", "--kernel", "sample"])
    found = called(sanitizer)
    arguments = found["racecheck-sample"][1]
    assert arguments[arguments.index("--kernel-name") + 1] == "kernel_name=sample"
    assert "--kernel=sample" in arguments
    assert run_sanitizer.SMALL in arguments
    assert "--kernel-name" not in found["initcheck-sample"][1]


def test_small_launches_are_chosen_by_their_kernel_and_by_no_other_of_its_name() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n0"]
    command += ["-p", "tools.sanitizer_selection", "--kernel=sample", run_sanitizer.SMALL]
    shown = subprocess.run(command, cwd=run_sanitizer.ROOT, check=True, capture_output=True, text=True).stdout
    chosen = [line for line in shown.splitlines() if "::" in line]
    assert chosen
    assert all("[sample-" in line for line in chosen)


def test_memcheck_sees_every_allocation_and_the_others_keep_graphs(sanitizer: Path) -> None:
    run_sanitizer.main(["memcheck", "racecheck", "--tests", "--", "-k", "rms_norm"])
    found = called(sanitizer)
    assert found["memcheck-all"][0] is False
    assert found["racecheck-all"][0] is True
    assert "--leave-out=graph" in found["memcheck-all"][1]
    assert "--leave-out=graph" not in found["racecheck-all"][1]
    for tool in ("memcheck", "racecheck"):
        arguments = found[f"{tool}-all"][1]
        assert arguments[arguments.index("-k") + 1] == "rms_norm"
        assert any(argument.endswith("test_rmsnorm.py") for argument in arguments)


def test_named_files_come_in_the_place_of_all(sanitizer: Path) -> None:
    named = "tests/photon_grpc/kernels/test_rmsnorm.py"
    arguments = run_sanitizer.tests_command("memcheck", Path("log"), 4, [named])
    assert [argument for argument in arguments if argument.startswith("tests/")] == [named]


def test_what_goes_to_pytest_needs_the_tests(sanitizer: Path) -> None:
    with pytest.raises(SystemExit):
        run_sanitizer.main(["memcheck", "--", "-k", "rms_norm"])


def test_a_process_that_does_not_end_is_ended(sanitizer: Path, tmp_path: Path) -> None:
    hung = [sys.executable, "-c", "import time; time.sleep(600)"]
    verdict = run_sanitizer.run("memcheck", "gemv", hung, tmp_path / "log", 0.5)
    assert not verdict.passed
    assert "not done after 0.5 s" in verdict.log


TILES = ("racecheck", "paged_attention_prefill_wgmma")


def report(*places: tuple[str, int]) -> str:
    first, *others = [f"access at f(int, int)+0x560 in {file}:{line}" for file, line in places]
    return "\n".join(
        [
            f"========= Error: Race reported between Read {first}",
            *(f"=========     and Write {other} [8 hazards]" for other in others),
            "========= ",
        ]
    )


def place_of(statement: str) -> tuple[str, int]:
    name = f"{TILES[1]}.cu"
    lines = (run_sanitizer.KERNEL_SOURCES / name).read_text().splitlines()
    return name, 1 + [line.strip() for line in lines].index(statement)


def test_a_report_is_false_for_the_statement_that_is_named_and_for_no_other(
    sanitizer: Path,
) -> None:
    known, other = place_of(run_sanitizer.FALSE_REPORTS[TILES]), (f"{TILES[1]}.cu", 1)
    summary = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    both_false = "\n".join([report(known, other), report(other, known, known), summary])
    one_true = "\n".join([report(known, other), report(other, known, other), summary])
    arguments = [TILES[0], "--kernel", TILES[1]]
    (sanitizer / "said").write_text(both_false)
    assert run_sanitizer.main(arguments) == 0
    assert run_sanitizer.main([TILES[0], "--kernel", "gemv"]) == 1, "another kernel's are not"
    (sanitizer / "said").write_text(one_true)
    assert run_sanitizer.main(arguments) == 1


def test_an_unknown_tool_is_refused(sanitizer: Path) -> None:
    with pytest.raises(SystemExit):
        run_sanitizer.main(["helgrind"])


def test_without_the_program_nothing_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(run_gpu_tests, "missing", lambda: "")
    assert run_sanitizer.main([]) == 2
    assert "compute-sanitizer" in capsys.readouterr().err
