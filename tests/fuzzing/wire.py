"""Protobuf's wire format by hand, for what no library would write.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor

__all__ = ["LENGTH", "MUTATIONS", "mutate", "random_message", "tagged", "varint"]

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)

_Field = FieldDescriptor
_FLOATS = [
    0.0,
    -0.0,
    0.5,
    1.0,
    2.0,
    -2.0,
    2.0001,
    100.0,
    1e-45,
    3e38,
    float("nan"),
    float("inf"),
    -float("inf"),
]
_INTEGERS = [0, 1, 2, 3, 7, 8, 9, 20, 21, 64, 65, 255, 256, 257, 512, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
_INTEGERS += [2**63 - 1, 2**63, 2**64 - 1]
_STRINGS = [
    b"",
    b"hello",
    b"a" * 65,
    b"a" * 129,
    "ünïcödé ☃ 😀".encode(),
    b"\x00",
    b"a\nb",
    b"{{ 7 * 7 }}{% for x in y %}",
    b"<|im_end|>",
    b"k",
    b"photon.v1.InferenceService",
]
# A lone surrogate, an overlong slash, a byte that begins nothing, a character that is cut off.
_NOT_UTF8 = [b"\xed\xa0\x80", b"\xc0\xaf", b"\xff", b"abc\xe2\x98"]
_MAX_DEPTH = 6


def varint(number: int) -> bytes:
    """Of the number's low 64 bits."""
    number &= 2**64 - 1
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def tagged(number: int, wire_type: int, payload: bytes = b"") -> bytes:
    """One field: its tag, its length where it has one, its bytes."""
    tag = varint(number << 3 | wire_type)
    return tag + (varint(len(payload)) if wire_type == LENGTH else b"") + payload


def random_message(rng: random.Random, descriptor: Descriptor, depth: int = 0) -> bytes:
    """Some fields of a message, mostly as its descriptor says, in any order."""
    fields = list(descriptor.fields)
    wanted = min(len(fields), rng.choice((0, 1, 1, 2, 2, 3, 4, 8)))
    parts = [_field(rng, field, depth) for field in rng.sample(fields, wanted)]
    if rng.random() < 0.06:
        parts.append(_unknown(rng))
    rng.shuffle(parts)
    return b"".join(parts)


def _field(rng: random.Random, field: FieldDescriptor, depth: int) -> bytes:
    number = field.number
    if rng.random() < 0.02:
        return _of_type(rng, number, rng.randrange(8))
    if not field.is_repeated:
        return tagged(number, *_value(rng, field, depth))
    count = rng.choice((0, 1, 1, 2, 3, 8, 17))
    if field.message_type is None and rng.random() < 0.03:
        count = rng.choice((65, 301, 1025))
    values = [_value(rng, field, depth) for _ in range(count)]
    # Scalars come packed or one by one; a parser must take both.
    if values and values[0][0] != LENGTH and rng.random() < 0.7:
        return tagged(number, LENGTH, b"".join(payload for _, payload in values))
    return b"".join(tagged(number, *value) for value in values)


def _value(rng: random.Random, field: FieldDescriptor, depth: int) -> tuple[int, bytes]:
    match field.type:
        case _Field.TYPE_MESSAGE:
            message = b"" if depth >= _MAX_DEPTH else random_message(rng, field.message_type, depth + 1)
            return LENGTH, message
        case _Field.TYPE_STRING | _Field.TYPE_BYTES:
            return LENGTH, rng.choice(_NOT_UTF8 if rng.random() < 0.03 else _STRINGS)
        case _Field.TYPE_FLOAT:
            return FIXED32, struct.pack("<f", rng.choice(_FLOATS))
        case _Field.TYPE_DOUBLE:
            return FIXED64, struct.pack("<d", rng.choice(_FLOATS))
        case _Field.TYPE_BOOL:
            return VARINT, varint(rng.choice((0, 1, 1, 2, 2**64 - 1)))
        case _Field.TYPE_ENUM:
            known = [value.number for value in field.enum_type.values]
            return VARINT, varint(rng.choice(known if rng.random() < 0.9 else [99, -1, 2**31 - 1, -(2**31)]))
        case _:
            # Small numbers are those that get anywhere.
            small = rng.random() < 0.6
            return VARINT, varint(rng.randrange(12) if small else rng.choice(_INTEGERS))


def _unknown(rng: random.Random) -> bytes:
    return _of_type(rng, rng.choice((15, 16, 99, 2047, 19_000, 2**29 - 1)), rng.randrange(6))


def _of_type(rng: random.Random, number: int, wire_type: int) -> bytes:
    payload = rng.randbytes({FIXED64: 8, FIXED32: 4, LENGTH: rng.randrange(9)}.get(wire_type, 0))
    if wire_type == VARINT:
        payload = varint(rng.getrandbits(64))
    if wire_type == START_GROUP and rng.random() < 0.7:
        payload = tagged(number, END_GROUP)
    return tagged(number, wire_type, payload)


# --- bytes that were a message ----------------------------------------------------------------------


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 16)))


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 16))]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = bytes(data[at : at + rng.randrange(1, 40)]) * rng.choice((1, 2, 30))


def _lie_about_a_length(rng: random.Random, data: bytearray) -> None:
    """Any byte may be one; a length of a message's first levels often is its second."""
    at = rng.choice((1, 3, 5, rng.randrange(len(data)))) % len(data)
    data[at : at + 1] = varint(rng.choice((0, 1, 0x7F, 0x80, 0x4000, 2**31 - 1, 2**32, 2**63, 2**64 - 1)))


def _open_group(rng: random.Random, data: bytearray) -> None:
    number = rng.choice((1, 2, 5, 15, 2**29 - 1))
    data[0:0] = tagged(number, rng.choice((START_GROUP, END_GROUP))) * rng.choice((1, 1, 2, 120, 5000))


def _close_groups(rng: random.Random, data: bytearray) -> None:
    """Groups that end as they should, around everything."""
    number, depth = rng.choice((1, 15, 2047)), rng.choice((1, 90, 110, 4000))
    data[:] = tagged(number, START_GROUP) * depth + data + tagged(number, END_GROUP) * depth


def _nest(rng: random.Random, data: bytearray) -> None:
    """Everything inside fields inside fields. A number that the schema knows makes the parser follow."""
    number = rng.choice((1, 2, 4, 5, 6))
    for _ in range(rng.choice((1, 5, 60, 101, 400))):
        data[:] = tagged(number, LENGTH, bytes(data))


def _long_varint(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = b"\x80" * rng.choice((5, 9, 10, 11, 300)) + rng.choice((b"", b"\x01", b"\x7f"))


def _noise(rng: random.Random, data: bytearray) -> None:
    data[:] = rng.randbytes(rng.choice((1, 4, 32, 400)))


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _truncate,
    _insert,
    _remove,
    _repeat,
    _lie_about_a_length,
    _open_group,
    _close_groups,
    _nest,
    _long_varint,
    _noise,
)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three mutations, mostly one."""
    mutated = bytearray(data or b"\x0a\x00")
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, mutated)
        if not mutated:
            break
    return bytes(mutated)
