"""Compile every kernel for every architecture we promise, on a machine without a GPU.

    python tools/check_kernels.py [--report] [source ...]

Fails on errors, warnings, spilled registers, more registers than a kernel's budget, and more shared memory
than an architecture has. Each source compiles in a process of its own, since some mistakes in inline PTX
end NVRTC's. Needs NVRTC's wheels (the `dev` extra brings them), no toolkit and no driver.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
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
    if shared > SHARED_BYTES[arch]:
        found.append(f"{shared} bytes of shared memory, {arch} has {SHARED_BYTES[arch]}")
    return found


def check_source(stem: str) -> list[dict[str, object]]:
    """One entry per variant and architecture, in this process."""
    source = load_source(stem)
    results: list[dict[str, object]] = []
    variants = sorted((one for one in checked_variants() if one.spec.source == stem), key=_macros_text)
    for _, group in groupby(variants, key=_macros_text):
        same = list(group)
        macros = dict(same[0].macros)
        for arch in ARCHITECTURES:
            try:
                compiled = compile_source(source, macros, arch)
            except StartupError as error:
                found = {one: [error.message] for one in same}
                reports: dict[str, FunctionReport] = {}
            else:
                found = {one: problems(one.spec, macros, compiled, arch) for one in same}
                reports = compiled.functions
            for one in same:
                report = reports.get(one.spec.name)
                results.append(
                    {
                        "variant": str(one),
                        "arch": arch,
                        "registers": report.registers if report else None,
                        "problems": found[one],
                    }
                )
    return results


def _macros_text(variant: Variant) -> str:
    return repr(variant.items)


def run_worker(stem: str) -> list[dict[str, object]]:
    """`check_source` in a process of its own; its death is a problem like any other."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", stem], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        text = f"the compiler's process ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        return [{"variant": stem, "arch": "any", "registers": None, "problems": [text]}]
    parsed: list[dict[str, object]] = json.loads(done.stdout)
    return parsed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sources", nargs="*", help="stems; all by default")
    parser.add_argument("--report", action="store_true", help="print registers of every variant")
    parser.add_argument("--worker", metavar="STEM", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        json.dump(check_source(options.worker), sys.stdout)
        return 0
    if not sys.platform.startswith("linux"):
        print("kernels not checked: there is no NVRTC wheel with these options but for Linux")
        return 0
    stems = sorted({one.spec.source for one in checked_variants()})
    wanted = [stem for stem in stems if not options.sources or stem in options.sources]
    if options.sources and set(options.sources) - set(stems):
        parser.error(f"no such source; there are {', '.join(stems)}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = [result for part in pool.map(run_worker, wanted) for result in part]
    bad = 0
    for result in results:
        texts = result["problems"]
        assert isinstance(texts, list)
        bad += bool(texts)
        if texts or options.report:
            print(f"{result['variant']} {result['arch']}: {result['registers']} registers")
        for text in texts:
            print(f"    {text}")
    print(f"{len(results)} kernels compiled for {', '.join(ARCHITECTURES)}: {bad} with problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
