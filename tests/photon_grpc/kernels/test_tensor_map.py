"""What is no tensor map; what one brings is seen by the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from photon_grpc.kernels.launcher import TENSOR_MAP_BYTES
from photon_grpc.kernels.tensor_map import tensor_map


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
