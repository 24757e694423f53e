"""The stages of tools/test: every one runs whatever became of those before, pytest last.

Runs in the environment that tools/test has made; standard library only. Exit code 0 when every stage
passed, pytest's own when only the tests failed, else 1.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable

CHECKS: dict[str, list[str]] = {
    "ruff check": [PYTHON, "-m", "ruff", "check", "."],
    "ruff format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "mypy": [PYTHON, "-m", "mypy"],
    "proto modules": [PYTHON, "tools/gen_proto.py", "--check"],
    "proto rules": [PYTHON, "tools/check_proto.py"],
    "settings table": [PYTHON, "tools/settings_table.py", "--check"],
}
# Most of the time before the tests, and work for every processor: begun first, beside the others.
KERNELS = ("kernels", [PYTHON, "tools/check_kernels.py"])

TESTS = [PYTHON, "-m", "pytest", "-m", "not gpu"]
# A worker is a process that imports torch: beyond these the memory grows and the time hardly shrinks.
WORKERS = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]
# What these show or ask goes to a worker, which nobody sees.
_NOT_IN_WORKERS = ("-s", "--capture=no", "--pdb", "--trace", "--co", "--collect-only", "no:xdist")


def workers(arguments: Sequence[str]) -> list[str]:
    """pytest-xdist's options beside a person's: none where theirs say how, or name nothing but files and
    tests, which are done before the workers have started.
    """
    if any(one in _NOT_IN_WORKERS or one.startswith(("-n", "--numprocesses")) for one in arguments):
        return []
    paths = [ROOT / one.split("::")[0] for one in arguments if not one.startswith("-")]
    named = [path for path in paths if path.exists()]
    return WORKERS if not named or any(path.is_dir() for path in named) else []


def run(name: str, command: list[str]) -> int:
    """One stage, its output going straight through; its exit code."""
    print(f"\n=== {name}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def run_checks() -> list[str]:
    """Every check; the names of those that failed."""
    name, command = KERNELS
    with ThreadPoolExecutor(1) as beside:
        kernels = beside.submit(
            subprocess.run,
            command,
            cwd=ROOT,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        failed = [each for each in CHECKS if run(each, CHECKS[each]) != 0]
        done = kernels.result()
    print(f"\n=== {name}\n{done.stdout}", end="", flush=True)
    return failed + [name] * (done.returncode != 0)


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    failed = run_checks()
    verdict = f"failed: {', '.join(failed)}" if failed else f"all {len(CHECKS) + 1} passed"
    print(f"\n=== checks before the tests: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    tests = run("pytest", [*TESTS, *workers(arguments), *arguments])
    if failed:
        print(f"failed before the tests: {', '.join(failed)}", file=sys.stderr)
    return tests or int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
