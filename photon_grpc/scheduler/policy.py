"""The order in which sequences are served.

Every request is taken to be due a window after its arrival, or when the first of its clocks that would end
it with an error runs out, if that is sooner: of requests that came together, those with the least slack go
first, and those whose clocks are further off than the window in the order of arrival. A priority step is
worth a head start of `boost_s` seconds, the window is half of one: two requests of different priority that
came within the other half are in the order of priority, whatever their clocks say.

The rank never changes while a sequence lives, so queues stay sorted without being sorted again. And it is
never later than a window after the arrival: whoever comes `boost_s` per step of priority and a window later
ranks behind, so nobody starves.
"""

from __future__ import annotations

from photon_grpc.scheduler.request import Request

Rank = tuple[float, int]

# Of `boost_s`; below one, or slack could outweigh a step of priority between requests that came together.
WINDOW_SHARE = 0.5


def rank(request: Request, boost_s: float) -> Rank:
    """Smaller is served first; ties go to the lower `seq_id`, the one that came first."""
    clocks, arrival = request.deadlines, request.arrival_time
    due = arrival + WINDOW_SHARE * boost_s
    for moment in (clocks.start_by, clocks.first_token_by, clocks.end_by):
        if moment is not None and moment < due:
            due = moment
    return (max(due, arrival) - request.priority * boost_s, request.seq_id)
