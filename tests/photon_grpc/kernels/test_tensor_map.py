"""What the driver is asked for a tensor map, by one that only records; users of maps try the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda.bindings import driver

from photon_grpc.kernels import tensor_map as module
from photon_grpc.kernels.launcher import TENSOR_MAP_BYTES, _argument_slots
from photon_grpc.kernels.tensor_map import tensor_map

Asked = list[tuple[Any, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Every request's arguments, plain; the maps have the number of the request in them."""
    requests: Asked = []

    def encode(kind: Any, rank: int, address: int, *rest: Any) -> tuple[Any, Any]:
        lists = [[int(value) for value in one] for one in rest[:4]]
        requests.append((kind, rank, address, *lists))
        made = driver.CUtensorMap()
        made.opaque = [driver.cuuint64_t(len(requests))] * 16
        refused = lists[0][0] == 63
        return driver.CUresult(int(refused)), made

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    module._encode.cache_clear()
    yield requests
    module._encode.cache_clear()


def test_strides_are_bytes_and_equal_maps_are_made_once(asked: Asked) -> None:
    tensor = torch.zeros(6, 72, dtype=torch.bfloat16)
    first = tensor_map(tensor, (64, 6), (72,), (64, 2))
    assert asked == [
        (
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            tensor.data_ptr(),
            [64, 6],
            [144],
            [64, 2],
            [1, 1],
        )
    ]
    assert first.tobytes() == (1).to_bytes(8, "little") * 16
    assert tensor_map(tensor, (64, 6), (72,), (64, 2)) is first
    assert tensor_map(tensor, (64, 5), (72,), (64, 2)) is not first
    assert tensor_map(tensor.half(), (64, 6), (72,), (64, 2)).tobytes() == (3).to_bytes(8, "little") * 16
    assert asked[2][0] == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16


def test_what_a_long_run_keeps_is_bounded_and_the_weights_are_in_it(asked: Asked) -> None:
    weights = [torch.zeros(2, 64, dtype=torch.bfloat16) for _ in range(400)]
    of_weights = [tensor_map(weight, (64, 2), (64,), (64, 2)) for weight in weights]
    activations = torch.zeros(1200, 64, dtype=torch.bfloat16)
    for tokens in range(1, 1200):
        tensor_map(activations, (64, tokens), (64,), (64, 2))
        tensor_map(weights[tokens % 400], (64, 2), (64,), (64, 2))
    assert len(asked) == 400 + 1199
    assert all(tensor_map(weights[i], (64, 2), (64,), (64, 2)) is of_weights[i] for i in range(400))
    assert module._encode.cache_info().currsize <= 1024


def test_it_is_passed_by_value(asked: Asked) -> None:
    made = tensor_map(torch.zeros(2, 64, dtype=torch.float16), (64, 2), (64,), (64, 2))
    slots, addresses = _argument_slots((int, type(made), int))
    slots[()] = (7, made, 9)
    raw = slots.tobytes()
    assert (addresses - addresses[0]).tolist() == [0, 8, 8 + TENSOR_MAP_BYTES]
    assert raw[8 : 8 + TENSOR_MAP_BYTES] == made.tobytes()


def test_a_refusal_says_of_what(asked: Asked) -> None:
    with pytest.raises(RuntimeError, match=r"tensor map of \(63, 6\).*CUDA_ERROR_INVALID_VALUE"):
        tensor_map(torch.zeros(6, 72, dtype=torch.bfloat16), (63, 6), (72,), (64, 2))


@pytest.mark.gpu
def test_a_map_is_made_once() -> None:
    tensor = torch.zeros(64, 128, dtype=torch.bfloat16, device="cuda")
    encoded = tensor_map(tensor, (128, 64), (128,), (64, 16))
    assert len(encoded.tobytes()) == TENSOR_MAP_BYTES
    assert any(encoded.tobytes())
    assert tensor_map(tensor, (128, 64), (128,), (64, 16)) is encoded
    assert tensor_map(tensor, (128, 64), (128,), (64, 32)).tobytes() != encoded.tobytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tensor": torch.zeros(600, dtype=torch.bfloat16)[1:]}, "not aligned"),
        ({"strides": (129,)}, "not aligned"),
        ({"strides": ()}, "2 sizes, 0 strides"),
        ({"box": (64,)}, "a box of 1"),
        ({"box": (32, 8)}, "no box"),
        ({"box": (64, 257)}, "no box"),
        ({"sizes": (128, 0)}, "no box"),
    ],
)
def test_what_the_engine_cannot_copy_is_refused(changes: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {
        "tensor": torch.zeros(4, 128, dtype=torch.bfloat16),
        "sizes": (128, 4),
        "strides": (128,),
        "box": (64, 8),
    }
    with pytest.raises(ValueError, match=match):
        tensor_map(**{**arguments, **changes})  # type: ignore[arg-type]
