"""The kernels under the tools of compute-sanitizer, a process for each tool and kernel, and a verdict.

- memcheck: accesses out of bounds or misaligned. PyTorch's caching allocator is switched off for it: inside
  one large cached block nothing would be out of bounds.
- racecheck: hazards between threads in shared memory.
- synccheck: barriers that not all threads reach, and the like.
- initcheck: reads of device memory that nobody wrote. What tests poisoned counts as written (a poison that
  is read shows in the results instead), so this is about inputs, tables and workspaces.

What runs are the small launches (`tests/photon_grpc/kernels/test_small_launches.py`), which take every path
of every kernel in a few CTAs, and only the one kernel is instrumented: torch's own products and reductions,
which tests judge by, would take a hundred times as long as well. initcheck has to see all that writes, and
instruments everything. Under racecheck a kernel of clusters that it does not instrument ends with an illegal
address (2025.3.1, compute capability 9.0), so no small launch may need another such kernel. With --tests it
is a few parametrisations of every GPU test of kernels instead, the long ones left out, in one process a tool.
Before that each tool has to find a planted error.

Exit code 0 when every process found nothing and every test passed, 1 otherwise, 2 where the GPU, a library
or compute-sanitizer is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from photon_grpc.kernels.registry import SPECS  # noqa: E402 - needs the line above when run as a file
from tools import run_gpu_tests  # noqa: E402 - likewise

__all__ = [
    "KERNELS",
    "TOOLS",
    "Verdict",
    "canary_command",
    "main",
    "read_log",
    "small_command",
    "tests_command",
]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNELS = tuple(spec.name for spec in SPECS)
UNCACHED = ("memcheck", "initcheck")
UNFILTERED = ("initcheck",)
SMALL = "tests/photon_grpc/kernels/test_small_launches.py"
KERNEL_SOURCES = ROOT / "cuda_kernels"

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

# Of a tool and a kernel the statement whose reports are false.
FALSE_REPORTS = {
    # By the memory model of PTX it is ordered both ways. Who stores a tile arrives itself (release) at the
    # mbarrier that readers wait for (acquire). A reading warp meets (__syncwarp) before one of its lanes
    # arrives for all at the mbarrier that the next store waits for. That meeting is probably what racecheck
    # misses: ptxas makes no instruction of it where a warp has not diverged. Not established.
    ("racecheck", "paged_attention_prefill_wgmma"): "const Tile tile = shared.tiles[stage];",
}

_REPORT = re.compile(r"Race reported between .*?(?=\n=+ *\n|\Z)", re.DOTALL)
_PLACE = re.compile(r"access at .* in (\S+\.cuh?):(\d+)")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_LINES_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one process came to. `num_found` is None where the tool never summed up."""

    tool: str
    kernel: str
    num_found: int | None
    tests_passed: bool
    seconds: float
    log: str

    @property
    def passed(self) -> bool:
        """Nothing found, and nothing failed."""
        return self.num_found == 0 and self.tests_passed

    def __str__(self) -> str:
        found = "no summary" if self.num_found is None else f"{self.num_found} errors"
        tests = "tests passed" if self.tests_passed else "tests FAILED"
        word = "pass" if self.passed else "FAIL"
        return f"{self.tool:10} {self.kernel:24} {word}  {found}, {tests}, {self.seconds:.0f} s"


def read_log(text: str) -> int | None:
    """Errors or hazards that the summaries of a log add up to; None without a summary."""
    found = [int(number) for number in _SUMMARY.findall(text)]
    return sum(found) if found else None


def num_false(text: str, statement: str) -> int:
    """Reports of racecheck in a log in which `statement` is what races with all the rest."""
    return sum(
        places[0] == statement or {*places[1:]} == {statement}
        for places in ([_statement(*place) for place in _PLACE.findall(one)] for one in _REPORT.findall(text))
        if len(places) > 1
    )


def _statement(file: str, line: str) -> str:
    """The line of a source; empty where there is none."""
    for path in (KERNEL_SOURCES / file, KERNEL_SOURCES / "include" / "photon" / Path(file).name):
        if path.is_file():
            lines = path.read_text().splitlines()
            return lines[int(line) - 1].strip() if int(line) <= len(lines) else ""
    return ""


def targets() -> list[str]:
    """The files with GPU tests of kernels."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("test_*.py")]
    files = [*inside, *(ROOT / name for name in FILES)]
    return sorted(str(path.relative_to(ROOT)) for path in files if run_gpu_tests.MARK in path.read_text())


def small_command(tool: str, kernel: str, log: Path) -> list[str]:
    """compute-sanitizer over the small launches of one kernel."""
    selection = ["-q", "-p", "tools.sanitizer_selection", f"--kernel={kernel}", "--line-info", SMALL]
    return [*_program(tool, [kernel], log), *run_gpu_tests.pytest_command(selection)]


def tests_command(tool: str, log: Path, most: int, arguments: Sequence[str]) -> list[str]:
    """The same over a few of every test; `arguments` are pytest's, and name no file to have all of them."""
    words = [*LONG, *EXPECTED_ERRORS, *(NEED_CACHING if tool in UNCACHED else ())]
    named = [argument for argument in arguments if (ROOT / argument.split("::")[0]).exists()]
    selection = ["-p", "tools.sanitizer_selection", f"--most-per-test={most}", "--line-info"]
    selection += [f"--leave-out={word}" for word in words]
    selection += [*arguments, *([] if named else targets())]
    # All of ours: see above.
    return [*_program(tool, KERNELS, log), *run_gpu_tests.pytest_command(selection)]


def _program(tool: str, kernels: Sequence[str], log: Path) -> list[str]:
    """What stands before a command line. Our kernels are extern "C": their names are not mangled."""
    filters = [word for kernel in kernels for word in ("--kernel-name", f"kernel_name={kernel}")]
    return [
        *("compute-sanitizer", "--tool", tool, "--log-file", str(log), "--print-limit", "20"),
        # cuda-bindings asks the driver for symbols of newer versions, and is told that there are none.
        *("--report-api-errors", "no"),
        # What the tests copy back is theirs.
        *(["--check-api-memory-access", "no"] if tool == "initcheck" else []),
        *([] if tool in UNFILTERED else filters),
    ]


def canary_command(tool: str, log: Path) -> list[str]:
    """The same over a launch in which the tool has to find an error."""
    return [
        *_program(tool, ["planted"], log),
        sys.executable,
        str(ROOT / "tools" / "sanitizer_canary.py"),
        tool,
    ]


def run(tool: str, kernel: str, make: Sequence[str], log: Path, timeout_s: float) -> Verdict:
    """One process, `make` its command line; what it printed stands in the log of a verdict that failed."""
    environment = run_gpu_tests.environment()
    if tool in UNCACHED:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    # A session of its own, since the tests are a child of the tool, and both have to go in the end.
    process = subprocess.Popen(
        make,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = f"{process.communicate()[0]}\nnot done after {timeout_s:g} s"
    passed = process.returncode == 0
    seconds = time.monotonic() - start
    said = log.read_text(errors="replace") if log.exists() else ""
    parts = [*said.splitlines()[:_LINES_SHOWN], *printed.splitlines()[-_LINES_SHOWN:]]
    found = read_log(said)
    if found and (tool, kernel) in FALSE_REPORTS:
        found -= num_false(said, FALSE_REPORTS[tool, kernel])
    return Verdict(tool, kernel, found, passed, seconds, "\n".join(parts))


def main(arguments: Sequence[str]) -> int:
    own, pytests = list(arguments), []
    if "--" in own:
        place = own.index("--")
        own, pytests = own[:place], own[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="What follows -- goes to pytest: tools/sanitize memcheck --tests -- -k rms_norm",
    )
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; default: all")
    parser.add_argument("--kernel", action="append", choices=KERNELS, metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="processes at the same time")
    parser.add_argument("--tests", action="store_true", help="a few of every test, not the small launches")
    parser.add_argument("--most-per-test", type=int, default=4, metavar="N", help="parametrisations; 0: all")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="where logs stay; default: nowhere")
    parser.add_argument("--timeout", type=float, default=540.0, metavar="SECONDS", help="for each process")
    options = parser.parse_args(own)
    unknown = [name for name in options.tools if name not in TOOLS]
    if unknown:
        parser.error(f"{unknown[0]}: no such tool; there are {', '.join(TOOLS)}")
    if pytests and not options.tests:
        parser.error("-- is for --tests; --kernel picks small launches")
    problem = run_gpu_tests.missing()
    if shutil.which("compute-sanitizer") is None:
        problem = "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max(1, options.jobs)) as pool:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tools = options.tools or TOOLS
        canaries = []
        for tool in tools:
            log = folder / f"{tool}-planted.log"
            canaries.append(
                pool.submit(run, tool, "planted", canary_command(tool, log), log, options.timeout)
            )
        runs = []
        for tool in tools:
            for kernel in ("all",) if options.tests else options.kernel or KERNELS:
                log = folder / f"{tool}-{kernel}.log"
                make = (
                    tests_command(tool, log, options.most_per_test, pytests)
                    if options.tests
                    else small_command(tool, kernel, log)
                )
                runs.append(pool.submit(run, tool, kernel, make, log, options.timeout))
        verdicts = []
        for one in as_completed(runs):
            verdicts.append(one.result())
            print(verdicts[-1], flush=True)
        blind = [verdict for verdict in (one.result() for one in canaries) if not verdict.num_found]
    for verdict in verdicts:
        if not verdict.passed:
            print(f"\n=== {verdict}\n{verdict.log}")
    for verdict in blind:
        print(f"\n=== {verdict.tool} does not find a planted error: what it says of kernels means nothing")
        print(verdict.log)
    print(f"\n{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} processes passed")
    return int(bool(blind) or not all(verdict.passed for verdict in verdicts))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
