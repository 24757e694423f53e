"""The packed record and marks against what `sampling_state.cuh` reads."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import numpy as np
import pytest

from photon_grpc.kernels import sampling_state as layout
from photon_grpc.kernels.sources import source_folder

_C_TYPES: dict[str, Any] = {
    "u32*": ctypes.c_uint64,
    "double": ctypes.c_double,
    "u32": ctypes.c_uint32,
    "float": ctypes.c_float,
    "int": ctypes.c_int32,
}


def test_the_record_is_the_struct_of_the_kernels() -> None:
    """Field by field: name, offset and size as a C compiler lays the struct out."""
    text = (source_folder() / "include" / "photon" / "sampling_state.cuh").read_text()
    body = re.search(r"struct SlotParams \{(.*?)\n\};", text, re.DOTALL)
    assert body is not None
    members = re.findall(r"^\s*([\w*]+) (\w+);", body[1], re.MULTILINE)
    struct = type(
        "SlotParams", (ctypes.Structure,), {"_fields_": [(name, _C_TYPES[kind]) for kind, name in members]}
    )
    fields = layout.SLOT_DTYPE.fields
    assert fields is not None
    assert list(fields) == [name for _, name in members]
    for kind, name in members:
        dtype, offset = fields[name][:2]
        assert (offset, dtype.itemsize) == (getattr(struct, name).offset, ctypes.sizeof(_C_TYPES[kind])), name
    assert layout.SLOT_DTYPE.itemsize == ctypes.sizeof(struct)


def test_every_define_of_the_kernels_is_given() -> None:
    include = source_folder() / "include" / "photon"
    used = set(re.findall(r"\bPHOTON_(?:FLAG|MARK|SLOT)_\w+", (include / "sampling_state.cuh").read_text()))
    assert used == set(layout.DEFINES)


def test_flags_and_marks_do_not_overlap() -> None:
    flags = [value for name, value in vars(layout).items() if name.startswith("FLAG_")]
    marks = [value for name, value in vars(layout).items() if name.startswith("MARK_")]
    for bits in (flags, marks):
        assert len(bits) > 3
        assert sum(bits) == np.bitwise_or.reduce(bits)


def test_marks_of_every_kind_meet_in_one_word() -> None:
    token_ids, words = layout.pack_marks(
        seen=np.array([9, 5, 9]),
        outputs=np.array([5, 7, 5, 5]),
        allowed=np.array([7, 7]),
        banned=np.array([2, 5]),
        biased=np.array([2]),
    )
    assert dict(zip(token_ids.tolist(), words.tolist(), strict=True)) == {
        2: layout.MARK_BANNED | layout.MARK_BIASED,
        5: layout.MARK_SEEN | layout.MARK_BANNED | 3,
        7: layout.MARK_ALLOWED | 1,
        9: layout.MARK_SEEN,
    }


def test_no_marks() -> None:
    token_ids, words = layout.pack_marks()
    assert (len(token_ids), len(words)) == (0, 0)


def test_biases_are_sorted_and_equal_ids_keep_their_order() -> None:
    bias = layout.pack_bias(((7, 1.0), (3, 2.0), (7, -4.0), (0, 0.5)))
    assert bias.token_ids.tolist() == [0, 3, 7, 7]
    assert bias.values.tolist() == [0.5, 2.0, 1.0, -4.0]
    assert bias.token_ids.dtype == np.int32
    assert layout.pack_bias(()).token_ids.shape == (0,)


@pytest.mark.parametrize("floor", [0.0, -0.0, math.log(0.3), math.log(0.1), -26.003851, -5e-324, -1e-46])
def test_the_floor_key_divides_float32_as_the_float64_floor_does(floor: float) -> None:
    key = layout.floor_key(floor)
    lowest = -np.uint32(key).view(np.float32)
    assert float(lowest) >= floor
    assert float(np.nextafter(lowest, np.float32(-math.inf))) < floor
