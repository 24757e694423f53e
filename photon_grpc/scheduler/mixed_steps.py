"""How many prompt tokens a step may have beside sequences that decode.

A step of prompts makes everyone wait: sequences that decode for their next token, those behind in the prompt
for their first. Prompts cost the device the same in large steps as in small ones, so decodes lose the same
time in all; what a small step changes is how long one of its pauses is. Its price is one more decode step for
each piece, for which the rest of the prompts waits.

With pieces of p tokens, a step of c + a * p seconds and D sequences that decode, the squares of the pauses
that P prompt tokens bring add up to D * P / p * (c + a * p)^2, which is least where a * p = c: where the
prompts take as long as the decodes beside them, and what every step of prompts costs on top. That is one
piece of `chunk_tokens`, of device and model, and one more for every `SEQUENCES_PER_PIECE` of the D. It need
not be exact, twice or half as many bring a quarter more, but it should be the tokens of a captured step: what
those lack is computed all the same.

That is the limit in a step which holds sequences up. Held up are those whose first token had come before the
present wait began. Whoever came together with those that wait, and had its first token before them, has
nothing to complain of: prompts that come together to an idle engine take full steps to the last. And a few do
not hold up many: where k times as many have come since the wait began, those counted that have their first
token by now, a step has k times as many tokens of prompts, to the last of them.

The wait begins when the earliest of those who wait arrives, or with the last step that had room to spare if
that is later: until then they waited for a place in the batch or for blocks. So a queue that never empties
does not make everyone look as if they had come together.
"""

from __future__ import annotations

from collections.abc import Iterable

from photon_grpc.scheduler.request import Request

# About half of a piece's tokens: one of a sequence that decodes, with its attention, takes as long as two.
SEQUENCES_PER_PIECE = 128


class MixedSteps:
    """The limit on the prompt tokens of a step. `chunk_tokens` 0: there is none."""

    def __init__(self, chunk_tokens: int) -> None:
        if chunk_tokens < 0:
            raise ValueError("chunk_tokens must not be negative")
        self.chunk_tokens = chunk_tokens
        self._had_room_at = float("-inf")

    def limit(self, most: int, running: Iterable[Request], num_admissible: int, arrival: float | None) -> int:
        """Prompt tokens of the next step, from 1 to `most`.

        `num_admissible` are those that could enter the batch now, and `arrival` is the earliest of all that
        wait to; None where nobody does.
        """
        if not self.chunk_tokens:
            return most
        since = float("inf") if arrival is None else arrival
        num_all = num_admissible
        begun: list[float] = []
        for request in running:
            num_all += 1
            if request.num_computed_tokens >= request.steady_until and not request.decodes:
                since = min(since, request.arrival_time)
            elif request.first_token_time is not None:
                begun.append(request.first_token_time)
        since = max(since, self._had_room_at)
        num_held_up = sum(moment < since for moment in begun)
        if not num_held_up:
            return most
        num_pieces = 1 + num_held_up // SEQUENCES_PER_PIECE
        num_pieces *= max(1, (num_all - num_held_up) // num_held_up)
        return min(most, self.chunk_tokens * num_pieces)

    def had_room(self, now: float) -> None:
        """A step planned at `now` had room for more prompt tokens: nobody waits for that."""
        self._had_room_at = now
