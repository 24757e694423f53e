"""Compile every kernel for every architecture we promise, on a machine without a GPU.

    python tools/check_kernels.py [--report] [source ...]

Fails on errors, warnings, spilled registers, more registers than a kernel's budget, and more shared memory
than an architecture has. Each compilation has a process of its own, since some mistakes in inline PTX end
NVRTC's; all are forks of one that has imported everything, as many at a time as there are processors.
Needs NVRTC's wheels (the `dev` extra brings them), no toolkit and no driver.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from photon_grpc.errors import StartupError  # noqa: E402
from photon_grpc.kernels.compiler import Compiled, FunctionReport, compile_source  # noqa: E402
from photon_grpc.kernels.launcher import KernelSpec, Variant  # noqa: E402
from photon_grpc.kernels.registry import checked_variants  # noqa: E402
from photon_grpc.kernels.sources import load_source  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Of one CTA, with what the driver keeps for itself taken off.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}
# Beyond this, shared memory has to be dynamic.
STATIC_SHARED_BYTES = 48 << 10
# What the process that the others are forked from imports, once.
_PRELOADED = ["photon_grpc.kernels.registry", "cuda.bindings.nvrtc"]


def problems(spec: KernelSpec, macros: dict[str, int | str], compiled: Compiled, arch: str) -> list[str]:
    """What is wrong with one compiled function; empty when nothing is."""
    found = list(compiled.warnings)
    report = compiled.functions.get(spec.name)
    if report is None:
        return [*found, f'no extern "C" function {spec.name}']
    if report.spill_bytes > spec.max_spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes")
    if report.registers > spec.max_registers:
        found.append(f"{report.registers} registers, budget {spec.max_registers}")
    if report.static_shared_bytes > STATIC_SHARED_BYTES:
        found.append(f"{report.static_shared_bytes} bytes of static shared memory")
    shared = report.static_shared_bytes + int(macros.get("PHOTON_SHARED_BYTES", 0))
    # Some are for GPUs that have the room.
    where = max(SHARED_BYTES, key=SHARED_BYTES.__getitem__) if spec.chosen_by_room else arch
    if shared > SHARED_BYTES[where]:
        found.append(f"{shared} bytes of shared memory, {where} has {SHARED_BYTES[where]}")
    return found


@dataclass(frozen=True, slots=True)
class Compilation:
    """Variants that one call of the compiler gives: functions of one source, with the same macros."""

    variants: tuple[Variant, ...]
    arch: str

    def __str__(self) -> str:
        return f"{self.variants[0]} {self.arch}"


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one variant for one architecture; `registers` is None where nothing was compiled."""

    name: str
    registers: int | None
    problems: list[str]


def compilations(variants: Iterable[Variant]) -> list[Compilation]:
    """Every call of the compiler that the variants need, those of one source together."""
    same: defaultdict[tuple[str, str], list[Variant]] = defaultdict(list)
    for one in variants:
        same[one.spec.source, repr(one.items)].append(one)
    return [Compilation(tuple(group), arch) for _, group in sorted(same.items()) for arch in ARCHITECTURES]


def check(work: Compilation) -> list[Checked]:
    """One entry per variant, in this process."""
    first = work.variants[0]
    macros = dict(first.macros)
    reports: dict[str, FunctionReport] = {}
    try:
        compiled = compile_source(load_source(first.spec.source), macros, work.arch)
    except StartupError as error:
        found = [[error.message] for _ in work.variants]
    else:
        found = [problems(one.spec, macros, compiled, work.arch) for one in work.variants]
        reports = compiled.functions
    return [
        Checked(f"{one} {work.arch}", report.registers if report else None, texts)
        for one, texts in zip(work.variants, found, strict=True)
        for report in [reports.get(one.spec.name)]
    ]


def check_apart(
    works: Sequence[Compilation], checker: Callable[[Compilation], list[Checked]] = check
) -> list[Checked]:
    """`check` of each in a process of its own, whose death is a problem like any other; in their order."""
    # From one thread: starting a process of `multiprocessing` reaps others, which is no work for two.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results: list[list[Checked]] = [[] for _ in works]
    waiting = deque(enumerate(works))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            index, work = waiting.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, checker, work))
            process.start()
            sender.close()
            running[receiver] = (index, process)
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            index, ended = running.pop(ready)
            with ready, suppress(EOFError):
                results[index] = ready.recv()
            ended.join()
            if ended.exitcode != 0:
                text = f"the compiler's process ended with {ended.exitcode}"
                results[index] = [Checked(str(works[index]), None, [text])]
    return [result for part in results for result in part]


def _send(sender: Connection, checker: Callable[[Compilation], list[Checked]], work: Compilation) -> None:
    sender.send(checker(work))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="*", help="stems; all by default")
    parser.add_argument("--report", action="store_true", help="print registers of every variant")
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        print("kernels not checked: there is no NVRTC wheel with these options but for Linux")
        return 0
    variants = list(checked_variants())
    stems = sorted({one.spec.source for one in variants})
    if set(options.sources) - set(stems):
        parser.error(f"no such source; there are {', '.join(stems)}")
    wanted = [one for one in variants if not options.sources or one.spec.source in options.sources]
    results = check_apart(compilations(wanted))
    bad = sum(bool(result.problems) for result in results)
    for result in results:
        if result.problems or options.report:
            print(f"{result.name}: {result.registers} registers")
        for text in result.problems:
            print(f"    {text}")
    print(f"{len(results)} kernels compiled for {', '.join(ARCHITECTURES)}: {bad} with problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
