"""The kernels that promise something against eager torch: `tools.bench.kernels`, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools.bench.gpu.cases import Case, Plan
from tools.bench.gpu.workers import Outcome
from tools.bench.report import ROOT

__all__ = ["run_cases"]

_LIMIT_S = 120.0
_ERROR_CHARS = 4000


def run_cases(
    plan: Plan, model: str, cases: Sequence[Case], progress: Callable[[str], None]
) -> Iterator[Outcome]:
    """One process per kernel; compiling takes most of its time, once."""
    for case in cases:
        progress(case.label)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tools.bench.kernels", "edges", "--only", case.variant]
            command += ["--output", folder, "--name", "one"]
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S)
            except subprocess.TimeoutExpired:
                yield Outcome(case, error=f"took longer than {_LIMIT_S:g} s")
                continue
            written = Path(folder) / "one.json"
            # 1 is a promise that is not kept: that is a figure too.
            if done.returncode not in (0, 1) or not written.exists():
                yield Outcome(case, error=(done.stdout + done.stderr)[-_ERROR_CHARS:])
                continue
            rows = json.loads(written.read_text())["rows"]
            # A longer name may contain this one.
            yield Outcome(case, next(row for row in rows if row["name"] == case.variant))
