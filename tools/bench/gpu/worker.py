"""The process that holds one engine: `python -m tools.bench.gpu.worker JOB`, JOB as JSON.

Writes one line of JSON per case to standard output: `{"case": index, "result": ...}` or `"error"`. The
first line, with `"case": null`, says how long the engine took to stand. An error ends the process, since
nothing is known of an engine after one. Whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import TextIO

from tools.bench.gpu.cases import Case, Plan

__all__ = ["Job"]


@dataclass(frozen=True, slots=True)
class Job:
    """Cases of one model, in order."""

    plan: Plan
    model: str
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """A job that `to_json` wrote."""
        found = json.loads(text)
        plan = Plan(**{name: _frozen(value) for name, value in found["plan"].items()})
        return cls(plan, found["model"], tuple(Case(**case) for case in found["cases"]))


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def work(job: Job, out: TextIO) -> int:
    """Build the engine and measure the cases; 1 after an error."""

    def say(**line: object) -> None:
        print(json.dumps(line), file=out, flush=True)

    index: int | None = None
    try:
        start = time.perf_counter()
        from tools.bench.gpu.engine import Engine

        imported = time.perf_counter()
        engine = Engine(job.plan, job.model, job.cases)
        say(case=None, result={"import_s": imported - start, "build_s": time.perf_counter() - imported})
        for index, case in enumerate(job.cases):
            say(case=index, result=engine.measure(case))
        engine.close()
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        say(case=index, error=traceback.format_exc(limit=-12))
        return 1
    return 0


def main() -> int:
    job = Job.from_json(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    # Libraries print; the lines are for the parent alone.
    os.dup2(2, 1)
    from photon_grpc.options import TelemetryOptions
    from photon_grpc.telemetry.logging import configure_logging

    configure_logging(TelemetryOptions(log_level="warning"))
    return work(job, out)


if __name__ == "__main__":
    sys.exit(main())
