"""The kernels' GPU tests under the tools of compute-sanitizer, one after the other, and a verdict.

- memcheck: accesses out of bounds or misaligned, by any kernel. PyTorch's caching allocator is switched off
  for it: inside one large cached block nothing would be out of bounds.
- racecheck: hazards between threads in shared memory.
- synccheck: barriers that not all threads reach, and the like.
- initcheck: reads of device memory that nobody wrote; only when named, since the tests themselves compare
  memory that they poisoned.

Of every test a few parametrisations run, and the long ones none: the tools slow a kernel down ten to a
hundred times. Exit code 0 when every tool found nothing and every test passed, 1 otherwise, 2 where the
GPU, a library or compute-sanitizer is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import run_gpu_tests  # noqa: E402 - needs the line above when run as a file

__all__ = ["TOOLS", "Verdict", "command", "main", "read_log"]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEFAULT_TOOLS = TOOLS[:3]
UNCACHED = ("memcheck", "initcheck")

# Tests of what a small launch shows as well: long contexts, tables of gigabytes, thousands of launches.
LONG = (
    *("long", "32k", "gibibytes", "31_elements", "large_vocabulary", "more_tokens_than_a_grid"),
    *("many_launches", "frequencies", "neighbours", "stream"),
)
# A graph's memory comes from the caching allocator, and launches that overlap are ordered by the tool.
NEED_CACHING = ("captured", "graph", "no_device_memory")
# The error is what these tests are about, and the tools count it.
EXPECTED_ERRORS = ("driver_refuses", "more_shared_memory")

FOLDERS = ("tests/photon_grpc/kernels", "tests/photon_grpc/ops")
FILES = ("tests/photon_grpc/runner/test_cuda_sampler.py",)

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_LINES_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one tool and the tests under it came to. `num_found` is None where the tool never summed up."""

    tool: str
    num_found: int | None
    tests_passed: bool
    seconds: float

    @property
    def passed(self) -> bool:
        """Nothing found, and nothing failed."""
        return self.num_found == 0 and self.tests_passed

    def __str__(self) -> str:
        found = "no summary" if self.num_found is None else f"{self.num_found} errors"
        tests = "tests passed" if self.tests_passed else "tests FAILED"
        return f"{self.tool:10} {'pass' if self.passed else 'FAIL'}  {found}, {tests}, {self.seconds:.0f} s"


def read_log(text: str) -> int | None:
    """Errors or hazards that the summaries of a log add up to; None without a summary."""
    found = [int(number) for number in _SUMMARY.findall(text)]
    return sum(found) if found else None


def targets() -> list[str]:
    """The files with GPU tests of kernels."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("test_*.py")]
    files = [*inside, *(ROOT / name for name in FILES)]
    return sorted(str(path.relative_to(ROOT)) for path in files if run_gpu_tests.MARK in path.read_text())


def command(tool: str, log: Path, most: int, arguments: Sequence[str]) -> list[str]:
    """compute-sanitizer over pytest; `arguments` are pytest's, and name no file to have all of them."""
    words = [*LONG, *EXPECTED_ERRORS, *(NEED_CACHING if tool in UNCACHED else ())]
    named = [argument for argument in arguments if (ROOT / argument.split("::")[0]).exists()]
    selection = ["-p", "tools.sanitizer_selection", f"--most-per-test={most}"]
    selection += [f"--leave-out={word}" for word in words]
    return [
        *("compute-sanitizer", "--tool", tool, "--log-file", str(log), "--print-limit", "20"),
        # cuda-bindings asks the driver for symbols of newer versions, and is told that there are none.
        *("--report-api-errors", "no"),
        *run_gpu_tests.pytest_command([*selection, *arguments, *([] if named else targets())]),
    ]


def run(tool: str, most: int, timeout_s: float, arguments: Sequence[str]) -> Verdict:
    """One tool over the selection; its log is shown when it found something."""
    print(f"=== {tool}", flush=True)
    environment = run_gpu_tests.environment()
    if tool in UNCACHED:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / f"{tool}.log"
        start = time.monotonic()
        try:
            done = subprocess.run(
                command(tool, log, most, arguments), cwd=ROOT, env=environment, check=False, timeout=timeout_s
            )
            passed = done.returncode == 0
        except subprocess.TimeoutExpired:
            print(f"{tool}: not done after {timeout_s:g} s", flush=True)
            passed = False
        seconds = time.monotonic() - start
        text = log.read_text(errors="replace") if log.exists() else ""
    verdict = Verdict(tool, read_log(text), passed, seconds)
    if not verdict.passed:
        print("\n".join(text.splitlines()[:_LINES_SHOWN]), flush=True)
    return verdict


def main(arguments: Sequence[str]) -> int:
    own, pytests = list(arguments), []
    if "--" in own:
        place = own.index("--")
        own, pytests = own[:place], own[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="What follows -- goes to pytest: tools/sanitize memcheck -- -k rms_norm",
    )
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--most-per-test", type=int, default=4, metavar="N", help="parametrisations; 0: all")
    parser.add_argument("--timeout", type=float, default=540.0, metavar="SECONDS", help="for each tool")
    options = parser.parse_args(own)
    unknown = [name for name in options.tools if name not in TOOLS]
    if unknown:
        parser.error(f"{unknown[0]}: no such tool; there are {', '.join(TOOLS)}")
    problem = run_gpu_tests.missing()
    if shutil.which("compute-sanitizer") is None:
        problem = "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    verdicts = [
        run(tool, options.most_per_test, options.timeout, pytests) for tool in options.tools or DEFAULT_TOOLS
    ]
    print("\n".join(["", *map(str, verdicts)]))
    return int(not all(verdict.passed for verdict in verdicts))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
