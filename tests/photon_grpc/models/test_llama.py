"""The decoder: a row's result depends on that row alone, however it is cut and whoever is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.torch_ops import TorchOps
from tests.support.paged_model import CPU, PagedModel, TransformersModel, random_prompt
from tests.support.tiny_model import tiny_model_folder

# Summation order differs between one product over many rows and many over few.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), request.param, tokenizer=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> PagedModel:
    return PagedModel(folder, num_blocks=96)


def _alone(model: PagedModel, tokens: list[int]) -> Tensor:
    (logits,) = model.step([("alone", tokens)])
    model.release("alone")
    return logits


@pytest.mark.parametrize("chunks", [(1, 99), (16, 16, 68), (50, 1, 1, 48), (99, 1), (7,) * 14 + (2,)])
def test_chunked_equals_unchunked(model: PagedModel, chunks: tuple[int, ...]) -> None:
    tokens = random_prompt(100)
    parts = []
    start = 0
    for size in chunks:
        parts.extend(model.step([("chunked", tokens[start : start + size])]))
        start += size
    model.release("chunked")

    torch.testing.assert_close(torch.cat(parts), _alone(model, tokens), rtol=0, atol=TOLERANCE)


def test_fault_13_mixed_batch_equals_each_alone(model: PagedModel) -> None:
    """Decode rows of several lengths, a chunk with a cached prefix, whole prompts and a prompt of one."""
    cached = {"a": 3, "b": 47, "c": 16, "d": 120, "e": 31, "f": 0, "g": 0, "h": 0}
    new = {"a": 1, "b": 1, "c": 1, "d": 1, "e": 20, "f": 45, "g": 1, "h": 16}
    tokens = {name: random_prompt(cached[name] + new[name], seed=ord(name)) for name in cached}
    for name, length in cached.items():
        if length:
            model.step([(name, tokens[name][:length])])

    logits = model.step([(name, tokens[name][length:]) for name, length in cached.items()])

    for name, row in zip(cached, logits, strict=True):
        model.release(name)
        expected = _alone(model, tokens[name])[cached[name] :]
        torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE, msg=f"row {name}")


def test_fault_16_batch_shrinks_and_grows(model: PagedModel) -> None:
    tokens = {name: random_prompt(40, seed=ord(name)) for name in "abc"}
    parts: dict[str, list[Tensor]] = {name: [] for name in tokens}
    # Prefill to decode, down to one row, up again: each entry is the rows of a step and their sizes.
    steps = [{"a": 5, "b": 5, "c": 5}, {"a": 1}, {"a": 1, "b": 30}, {"c": 35}, {"b": 5, "a": 33}]
    place = dict.fromkeys(tokens, 0)
    for step in steps:
        rows = [(name, tokens[name][place[name] : place[name] + size]) for name, size in step.items()]
        for (name, _), logits in zip(rows, model.step(rows), strict=True):
            parts[name].append(logits)
            place[name] += step[name]
    assert set(place.values()) == {40}
    for name in tokens:
        model.release(name)
        torch.testing.assert_close(
            torch.cat(parts[name]), _alone(model, tokens[name]), rtol=0, atol=TOLERANCE
        )


def test_wanted_tokens_alone_have_the_states_that_all_would_have(
    model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.model.forward
    num_compared = 0

    def both(*arguments: Any) -> Tensor:
        nonlocal num_compared
        hidden = forward(*arguments)
        for tokens in ([], [len(hidden) - 1], [5, 0, 21, 5]):
            wanted = torch.tensor(tokens, dtype=torch.int64)
            found = forward(*arguments, wanted=wanted)
            torch.testing.assert_close(found, hidden[wanted], rtol=0, atol=TOLERANCE)
            num_compared += len(found)
        return hidden

    model.step([("decodes", random_prompt(20, seed=1))])
    monkeypatch.setattr(model.model, "forward", both)
    model.step([("decodes", random_prompt(1, seed=2)), ("whole", random_prompt(40, seed=3))])
    assert num_compared == 5
    for name in ("decodes", "whole"):
        model.release(name)


def test_fault_14_exactly_the_slots_of_the_tokens_are_written(folder: Path) -> None:
    model = PagedModel(folder, block_size=8, num_blocks=16)
    model.step([("a", random_prompt(13)), ("b", random_prompt(8, seed=1))])
    model.step([("a", [5]), ("b", [6])])

    assert [model.written_slots(layer) for layer in range(2)] == [23, 23]


def test_the_first_layers_alone_are_those_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = PagedModel(tiny_model_folder(tmp_path, tokenizer=False, num_hidden_layers=4), block_size=8)
    forward = deep.model.forward
    hidden = []

    def first_layers(*inputs: Any) -> Tensor:
        hidden.append(forward(*inputs, num_layers=2))
        return hidden[-1]

    monkeypatch.setattr(deep.model, "forward", first_layers)
    prompt = random_prompt(13)
    ((found, logits),) = deep.states([("a", prompt)])
    assert [deep.written_slots(layer) for layer in range(4)] == [13, 13, 0, 0]
    # What a checkpoint of those layers alone makes of it.
    monkeypatch.setattr(deep.model, "forward", forward)
    monkeypatch.setattr(deep.model, "_layers", deep.model._layers[:2])
    monkeypatch.setattr(deep.cache, "layers", deep.cache.layers[:2])
    deep.release("a")
    ((expected, expected_logits),) = deep.states([("a", prompt)])
    assert torch.equal(found, expected)
    assert torch.equal(logits, expected_logits)


class CopyingOps(TorchOps):
    """A packed weight is a copy; notes those, and what layers multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: list[Tensor] = []
        self.used: list[Tensor] = []

    def pack_linear(self, weight: Tensor) -> Tensor:
        self.packed.append(weight.clone())
        return self.packed[-1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.used.append(weight)
        return torch.nn.functional.linear(x, weight, bias)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, weight)


def test_layers_multiply_by_weights_as_they_were_packed(folder: Path) -> None:
    ops = CopyingOps()
    model = PagedModel(folder, ops=ops)
    model.step([("a", random_prompt(5))])

    per_layer = 4  # heads, output, gate and up, down
    assert len(ops.used) == per_layer * model.config.num_layers
    for weight, packed in zip(ops.used, ops.packed, strict=False):
        assert weight is packed


def test_result_does_not_depend_on_what_freed_blocks_hold(folder: Path) -> None:
    """A faulty row leaves NaN behind; the next owner of its blocks must not notice."""
    model = PagedModel(folder, block_size=8, num_blocks=4)
    tokens = random_prompt(12)
    clean = model.step([("first", tokens), ("short", [9, 8])])
    model.release("first")
    model.release("short")
    for layer in model.cache.layers:
        layer.fill_(float("inf"))
    for dirty, expected in zip(model.step([("second", tokens), ("short", [9, 8])]), clean, strict=True):
        torch.testing.assert_close(dirty, expected, rtol=0, atol=TOLERANCE)
    # A decode row that is padded to its neighbour's length.
    long, short = model.step([("second", [7]), ("short", [7])])
    assert bool(long.isfinite().all())
    assert bool(short.isfinite().all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_16_bit_types_stay_close_to_float32(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    """In units of the logits' own spread; each type has 8 and 11 significant bits."""
    tokens = random_prompt(60)
    expected = TransformersModel(folder).logits(tokens)
    model = PagedModel(folder, dtype=dtype)
    parts = model.step([("row", tokens[:40])]) + model.step([("row", tokens[40:59])])
    logits = torch.cat([*parts, *model.step([("row", tokens[59:])])])

    assert logits.dtype is torch.float32
    assert float((logits - expected).std() / expected.std()) < tolerance


def test_parameter_count_is_what_the_checkpoint_holds(folder: Path) -> None:
    config = load_config(folder)
    model = build_model(config, TorchOps(), dtype=torch.float32, device=CPU)

    assert sum(tensor.numel() for _, tensor in model.checkpoint_tensors()) == config.num_parameters


def test_max_positions_bounds_the_rotary_table(folder: Path) -> None:
    config = load_config(folder)
    model = build_model(config, TorchOps(), dtype=torch.float32, device=CPU, max_positions=10)
    assert model._rotary_table.shape == (10, config.head_dim)
