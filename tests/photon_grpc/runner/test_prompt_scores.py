"""Prompts' own tokens scored in pieces, padded or not, against one log_softmax over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.runner.prompt_scores import num_scored, score_prompt
from photon_grpc.runner.sampler import Sampler

HIDDEN, VOCAB, CHUNK = 12, 50, 64


class Head:
    """The part of a decoder that is asked: [rows, HIDDEN] -> [rows, VOCAB]."""

    def __init__(self) -> None:
        self.weight = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(1))
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: set[int] = set()

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.shapes.append(tuple(hidden.shape))
        self.addresses.add(hidden.data_ptr())
        return hidden @ self.weight


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 200])
def test_scores_are_those_of_log_softmax(count: int, pads: bool) -> None:
    head = Head()
    hidden = torch.randn(count + 3, HIDDEN, generator=torch.Generator().manual_seed(2))[1 : count + 1]
    targets = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(3))
    sampler = Sampler(VOCAB, torch.device("cpu"))
    entries = score_prompt(head, sampler, hidden, targets, 2, pads=pads)  # type: ignore[arg-type]  # a part
    exact = torch.log_softmax((hidden @ head.weight).double(), -1)
    assert len(entries) == count
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(exact[row, targets[row]]), abs=1e-5)
        best = exact[row].sort(descending=True, stable=True).indices[:2].tolist()
        assert [token_id for token_id, _ in entry.top] == best
    if pads:
        assert set(head.shapes) <= {(CHUNK, HIDDEN)}
        rows = range(hidden.data_ptr(), hidden.data_ptr() + hidden.numel() * 4 + 1)
        assert not any(address in rows for address in head.addresses), "a piece of the step, not a copy"
    else:
        assert sum(shape[0] for shape in head.shapes) == count


def test_only_tokens_of_the_prompt_are_foretold() -> None:
    # A prompt of ten tokens: positions 0 to 8 foretell 1 to 9.
    assert [num_scored(4, start, 10) for start in (0, 4, 6, 8, 9, 10)] == [4, 4, 3, 1, 0, 0]
