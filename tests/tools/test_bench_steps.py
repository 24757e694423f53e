"""Steps beside their floors: the arithmetic and the inputs anywhere, a whole measurement on a GPU."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from photon_grpc.models.registry import load_config
from photon_grpc.ops.torch_ops import TorchOps
from tools.bench import steps
from tools.bench.random_models import config_folder
from tools.bench.steps import DECODES, PROMPTS, Decode, Prompt, StepModel, StepRow

TINY = load_config(config_folder("tiny"))
LLAMA = load_config(config_folder("llama31-8b"))
# q and o of 4096 x 4096, k and v of 1024 x 4096, three of 14336 x 4096, two norms.
LLAMA_LAYER = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096)


def test_a_decode_step_reads_its_weights_and_its_contexts() -> None:
    assert steps.layer_bytes(LLAMA) == LLAMA_LAYER
    kv = 16 * 1000 * 2 * 8 * 128 * 2
    assert steps.floor_us(LLAMA, Decode(16, 1000)) == pytest.approx((LLAMA_LAYER + kv) / 3.05e6)


def test_a_long_prompt_is_bound_by_its_products_and_a_short_one_by_its_weights() -> None:
    # The last 3 of 10 tokens see 8, 9 and 10.
    flop = 3 * LLAMA_LAYER + 4 * 4096 * (8 + 9 + 10)
    weights = (LLAMA_LAYER + 10 * 2 * 8 * 128 * 2) / 3.05e6
    assert flop / 750e6 < weights
    assert steps.floor_us(LLAMA, Prompt(3, 10)) == pytest.approx(weights)
    visible = sum(range(6145, 8193))
    flop = 2048 * LLAMA_LAYER + 4 * 4096 * visible
    assert steps.floor_us(LLAMA, Prompt(2048, 8192)) == pytest.approx(flop / 750e6)


@pytest.mark.parametrize("name", ["llama31-8b", "qwen25-0.5b", "qwen3-1.7b"])
def test_layers_are_few_and_do_not_fit_the_l2(name: str) -> None:
    config = load_config(config_folder(name))
    few = steps.few_layers(config)
    assert 4 <= few.num_layers < config.num_layers
    assert few.num_layers * steps.layer_bytes(few) > 6 * (50 << 20)
    assert steps.layer_bytes(few) == steps.layer_bytes(config)
    # A small model is taken whole.
    assert steps.few_layers(TINY) == TINY


@pytest.mark.parametrize("case", [Decode(5, 40), Decode(8, 16), Prompt(17, 17), Prompt(20, 50)])
def test_rows_have_the_last_places_of_their_own_blocks(case: Decode | Prompt) -> None:
    model = StepModel(TINY, [case], TorchOps(), torch.device("cpu"))
    shape = model.shape(case)
    ids, positions, metadata = model.inputs(case, shape)
    assert len(ids) == len(positions) == shape.num_tokens
    rows, new = (case.rows, 1) if isinstance(case, Decode) else (1, case.tokens)
    assert metadata.context_lens.tolist() == [case.context] * rows + [0] * (shape.num_rows - rows)
    assert positions.tolist()[: rows * new] == [*range(case.context - new, case.context)] * rows
    slots = metadata.slot_mapping.tolist()
    expected = [
        int(metadata.block_tables[row, position // 16]) * 16 + position % 16
        for row in range(rows)
        for position in range(case.context - new, case.context)
    ]
    assert slots == expected + [-1] * (shape.num_tokens - rows * new)
    used = metadata.block_tables[:rows].flatten().tolist()
    assert len(set(used)) == len(used) == rows * -(-case.context // 16)
    if isinstance(case, Prompt):
        assert metadata.query_starts_device is not None
        assert metadata.query_starts_device.tolist() == [0] + [new] * shape.num_prefills


def test_every_case_is_a_step_that_is_captured() -> None:
    for case in (*DECODES, *PROMPTS):
        model = StepModel(TINY, [Decode(1, 1)], TorchOps(), torch.device("cpu"))
        shape = model.shape(case)
        assert shape.num_tokens >= (case.rows if isinstance(case, Decode) else case.tokens)


def test_the_table_has_the_share_of_the_floor() -> None:
    rows = [
        StepRow("a", Decode(16, 128), 50.0, 40.0, 20.0, 15.0),
        StepRow("a", Prompt(17, 17), 60.0, 30.0, None, 15.0),
        StepRow("b", Decode(16, 128), 40.0, 10.0, 30.0, 15.0),
    ]
    assert steps.table(rows).splitlines()[2:] == [
        "| 16 rows | 80% (50.0) 75% | 25% (40.0) 50% |",
        "| 17 tokens | 50% (60.0) |  |",
    ]
    steps.draw(Figure(), rows)
    assert [row["share"] for row in steps.to_result(rows)["rows"]] == [0.8, 0.5, 0.25]


@pytest.mark.gpu
def test_a_model_is_measured() -> None:
    cases: list[Decode | Prompt] = [Decode(3, 128), Prompt(17, 17)]
    decode, prompt = steps.measure("llama32-1b", cases)
    assert decode.case == cases[0]
    assert prompt.case == cases[1]
    # No GPU reads faster than three of those that the floor is of.
    assert decode.layer_us > decode.layer_floor_us / 3
    assert decode.head_us is not None
    assert decode.head_us > decode.head_floor_us / 3
    assert prompt.head_us is None
