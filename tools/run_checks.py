"""The stages of tools/test: every one runs whatever became of those before, pytest last.

Runs in the environment that tools/test has made; standard library only. Exit code 0 when every stage
passed, pytest's own when only the tests failed, else 1.
"""

from __future__ import annotations

import subprocess
import sys
import time
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
    "kernels": [PYTHON, "tools/check_kernels.py"],
}


def run(name: str, command: list[str]) -> int:
    """One stage, its output going straight through; its exit code."""
    print(f"\n=== {name}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    failed = [name for name, command in CHECKS.items() if run(name, command) != 0]
    verdict = f"failed: {', '.join(failed)}" if failed else f"all {len(CHECKS)} passed"
    print(f"\n=== checks before the tests: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    tests = run("pytest", [PYTHON, "-m", "pytest", "-m", "not gpu", *arguments])
    if failed:
        print(f"failed before the tests: {', '.join(failed)}", file=sys.stderr)
    return tests or int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
