"""tools/test: every stage runs, any failure fails, and workers are used where they save time."""

from __future__ import annotations

import sys

import pytest

from tools import run_checks

SAYS = [sys.executable, "-c", "print('said')"]
FAILS = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]


@pytest.mark.parametrize(
    ("check", "kernels", "tests", "code", "verdict"),
    [
        (SAYS, SAYS, SAYS, 0, "all 2 passed"),
        (FAILS, SAYS, SAYS, 1, "failed: style"),
        (SAYS, FAILS, SAYS, 1, "failed: kernels"),
        (FAILS, FAILS, SAYS, 1, "failed: style, kernels"),
        (SAYS, SAYS, FAILS, 3, "all 2 passed"),
        (FAILS, SAYS, FAILS, 3, "failed: style"),
    ],
)
def test_every_stage_runs_and_any_failure_fails(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    check: list[str],
    kernels: list[str],
    tests: list[str],
    code: int,
    verdict: str,
) -> None:
    monkeypatch.setattr(run_checks, "CHECKS", {"style": check})
    monkeypatch.setattr(run_checks, "KERNELS", ("kernels", kernels))
    monkeypatch.setattr(run_checks, "TESTS", tests)
    assert run_checks.main([]) == code
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    before = next(line for line in lines if line.startswith("=== checks before the tests"))
    assert verdict in before
    lines.remove(before)
    assert lines == ["=== style", "said", "=== kernels", "said", "=== pytest", "said"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-x"],
        ["-k", "drain"],
        ["tests/e2e", "-k", "drain"],
        ["tests/e2e", "tests/photon_grpc/test_app.py"],
        ["--durations", "20"],
    ],
)
def test_many_tests_are_spread_over_workers(arguments: list[str]) -> None:
    assert run_checks.workers(arguments) == run_checks.WORKERS


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n0"],
        ["-n", "4"],
        ["--numprocesses=4"],
        ["-p", "no:xdist"],
        ["tests/e2e", "--pdb"],
        ["-s"],
        ["tests/photon_grpc/test_app.py"],
        ["tests/photon_grpc/test_app.py::test_something", "-x"],
    ],
)
def test_a_person_s_own_number_a_few_files_and_a_debugger_have_no_workers(arguments: list[str]) -> None:
    assert run_checks.workers(arguments) == []
