"""What is no tensor map; what one brings is seen by the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from photon_grpc.kernels.tensor_map import MAP_BYTES, tensor_map


@pytest.mark.gpu
def test_a_map_is_made_once() -> None:
    tensor = torch.zeros(64, 128, dtype=torch.bfloat16, device="cuda")
    arguments = (tensor.data_ptr(), "bf16", (128, 64), (128,), (64, 16))
    encoded = tensor_map(*arguments)
    assert len(encoded.tobytes()) == MAP_BYTES
    assert any(encoded.tobytes())
    assert tensor_map(*arguments) is encoded
    assert tensor_map(*arguments[:4], (64, 32)).tobytes() != encoded.tobytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"address": 8}, "not aligned"),
        ({"strides": (129,)}, "not aligned"),
        ({"strides": ()}, "2 sizes, 0 strides"),
        ({"box": (64,)}, "a box of 1"),
        ({"box": (32, 8)}, "no box"),
        ({"box": (64, 257)}, "no box"),
        ({"sizes": (128, 0)}, "no box"),
    ],
)
def test_what_the_engine_cannot_copy_is_refused(changes: dict[str, object], match: str) -> None:
    arguments = {"address": 16, "storage": "bf16", "sizes": (128, 4), "strides": (128,), "box": (64, 8)}
    with pytest.raises(ValueError, match=match):
        tensor_map(**{**arguments, **changes})  # type: ignore[arg-type]
