"""What a server's log says of a soak: how each call ended, which faults were injected, how many tasks lived.

The server writes one line per finished call, so its log and what the clients saw can be held against each
other: each call has one end, and it is the same on both sides.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tools.bench.fault_runner import INJECTED
from tools.bench.mixed_load import Tally, request_id

__all__ = ["TASKS", "ServerLog", "audit", "read"]

TASKS = "tasks"
_CALL = "call finished"
_METHODS = ("photon.v1.InferenceService/Generate", "photon.v1.InferenceService/StreamGenerate")
_UNHEARD = "ExecuteBatchError raised in core by servicer method"
_FAILED_BATCH = 'Failed "execute_batch"'
_STATUS = "SendStatusFromServerOperation"
_MAX_KEPT_ERRORS = 20


@dataclass(slots=True)
class ServerLog:
    """`ends` has `(status, reason)` of each line about a generation, by request id; `tasks` of the event loop
    are `(monotonic moment, number)`; `injected` counts faults by kind; `errors` are lines of that level.

    `num_unheard` counts statuses that were sent to a client that left in the same moment: grpc calls that an
    error. A client that had not left would have missed its status, and that shows in its own account.
    """

    ends: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    tasks: list[tuple[float, int]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    num_unheard: int = 0
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)

    def counted_ends(self) -> dict[str, int]:
        """How many generations ended with each status and reason."""
        ends = (end for of_call in self.ends.values() for end in of_call)
        return dict(Counter(f"{code} {reason}".strip() for code, reason in ends))


def read(lines: Iterable[str]) -> ServerLog:
    """The log of a server, JSON by line; other lines are not ours."""
    log = ServerLog()
    for line in lines:
        if not line.startswith("{"):
            continue
        record = json.loads(line)
        event = record.get("event")
        if event == _CALL and record["method"] in _METHODS:
            log.ends[record["request_id"]].append((record["code"], record.get("reason", "")))
        elif event == TASKS:
            log.tasks.append((record["moment"], record["tasks"]))
        elif event == INJECTED:
            log.injected[record["kind"]] += 1
        if _is_unheard(record):
            log.num_unheard += 1
        elif record.get("level") in ("error", "critical"):
            log.num_errors += 1
            if len(log.errors) < _MAX_KEPT_ERRORS:
                log.errors.append(line.strip())
    return log


def _is_unheard(record: dict[str, Any]) -> bool:
    """Whether a batch of operations was taken by grpc and failed; one that was never taken is our mistake."""
    if not record.get("event", "").startswith(_UNHEARD):
        return False
    message = record["exception"][0]["exc_value"]
    return message.startswith(_FAILED_BATCH) and _STATUS in message


def audit(log: ServerLog, tally: Tally) -> list[str]:
    """Where log and clients disagree, or the server says that something is wrong."""
    problems = []
    twice = [name for name, ends in log.ends.items() if len(ends) > 1]
    if twice:
        problems.append(f"{len(twice)} calls ended more than once; {twice[0]}: {log.ends[twice[0]]}")
    unlike = []
    for number, (code, reason) in tally.ends.items():
        told = log.ends.get(request_id(number), [])
        # Who leaves, or whose time is up, does not hear what the server made of it, or whether it knew.
        if (code == "OK" or reason) and told[:1] != [(code, reason)]:
            unlike.append(f"{request_id(number)}: the client saw {code} {reason}, the log has {told}")
    if unlike:
        problems.append(f"{len(unlike)} calls ended unlike the log says; {unlike[0]}")
    faults = sum(end == ("INTERNAL", "REQUEST_FAULT") for ends in log.ends.values() for end in ends)
    if faults > log.injected["row"]:
        problems.append(f"{faults} calls failed by {log.injected['row']} faults of a row")
    if log.num_errors:
        problems.append(f"{log.num_errors} errors in the server's log; the first: {log.errors[0]}")
    return problems
