"""The order in which sequences are served.

A priority step is worth a head start of `boost_s` seconds: whoever arrived that much earlier goes
first all the same. Inside the window a higher priority always wins; outside it, age does, so nobody
starves. The rank never changes while a sequence lives, so queues stay sorted without being sorted
again.
"""

from __future__ import annotations

from photon_grpc.scheduler.request import Request

Rank = tuple[float, int]


def rank(request: Request, boost_s: float) -> Rank:
    """Smaller is served first; ties go to the lower `seq_id`, the one that came first."""
    return (request.arrival_time - request.priority * boost_s, request.seq_id)
