"""Send hostile messages to a server (tests/fuzzing); each finding is printed with the command for it.

    tools/fuzz [--messages N] [--seed S]     many messages, over a real channel to a server in this process
    tools/fuzz --seed S --only 17,18         these messages again, at the same time

Exit code 0 when nothing was found, else 1. The seed is drawn and printed where none is given.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import structlog  # noqa: E402

from tests.fuzzing.fuzzer import fuzzed_service  # noqa: E402

MAX_REPORTS = 20


async def fuzz(seed: int, numbers: Sequence[int]) -> int:
    """Send the messages of these numbers; the exit code."""
    began = time.monotonic()
    done = 0
    # Of use on a terminal only.
    shows_progress = sys.stderr.isatty()

    def tell(sent: int) -> None:
        nonlocal done
        done += sent
        rate = done / (time.monotonic() - began)
        found = len(fuzzer.findings)
        if shows_progress:
            text = f"\r{done}/{len(numbers)} messages, {rate:.0f}/s, {found} findings"
            print(text, end="", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        async with fuzzed_service(Path(folder)) as fuzzer:
            await fuzzer.run(seed, numbers, tell)
            await fuzzer.check_rest()
    if shows_progress:
        print(file=sys.stderr)
    for status in sorted({status for _, status in fuzzer.ends}):
        kinds = {kind: count for (kind, other), count in sorted(fuzzer.ends.items()) if other == status}
        of_kinds = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        print(f"{status:20} {sum(kinds.values()):8}  ({of_kinds})")
    for finding in fuzzer.findings[:MAX_REPORTS]:
        print(f"\n{finding}")
    verdict = f"{len(fuzzer.findings)} findings" if fuzzer.findings else "nothing found"
    print(f"{len(numbers)} messages, seed {seed}: {verdict} ({time.monotonic() - began:.0f} s)")
    return 1 if fuzzer.findings else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=10_000, help="how many messages to send")
    parser.add_argument("--seed", type=int, help="what the messages are made from")
    parser.add_argument("--only", help="numbers of the messages to send, as in 17,18")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"tools/fuzz --messages {options.messages} --seed {seed}", flush=True)
    # One line per call would be the most of the work; errors of ours stay.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    numbers = range(options.messages)
    if options.only is not None:
        return asyncio.run(fuzz(seed, [int(number) for number in options.only.split(",")]))
    return asyncio.run(fuzz(seed, numbers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
