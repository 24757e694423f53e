"""From safetensors files into a model's storage.

Owns reading and distrusting checkpoint files: nothing is unpickled, no path leaves the model folder, a
header is checked in full before a byte of a tensor is used, and every refusal is a ModelLoadError that
names file and tensor. Knows no model; it fills whatever `checkpoint_tensors()` asks for.

Files are memory-mapped and copied in slices whose pages are given back at once, so that loading needs
little more memory than the weights, also when it converts their type. Any thread; usually the engine's.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from photon_grpc.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in all."""

_MAX_HEADER_BYTES = 25_000_000
_MAX_INDEX_BYTES = 25_000_000
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8

_SLICE_BYTES = 16 << 20

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}

# Buffers that older exports wrote beside the weights and that are computed from config.json.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Loadable(Protocol):
    """A model that says which tensors it wants and where they go."""

    def checkpoint_tensors(self) -> Iterable[tuple[str, Tensor]]: ...

    def pack(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a file; `start` and `stop` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def load_weights(model: Loadable, folder: Path, *, progress: Progress | None = None) -> None:
    """Fill every tensor of `model` from the safetensors in `folder`, converting floating types.

    The folder holds model.safetensors, or an index and its shards. Names and shapes must be exactly
    those the model wants. Two kinds of extra are passed over: `rotary_emb.inv_freq` buffers, and
    `lm_head.weight` for a model whose head is tied to its embedding. Files may be symbolic links, as in
    a Hugging Face cache. A model is loaded once. Raises ModelLoadError; its contents are then undefined.
    """
    wanted = dict(model.checkpoint_tensors())
    files = _locate(folder)
    headers = {name: _read_header(folder / name) for name in files}
    _check_placement(files, headers)
    _check_names(wanted, headers)
    total = sum(
        entry.stop - entry.start
        for header in headers.values()
        for name, entry in header.items()
        if name in wanted
    )
    done = 0
    for file_name, header in headers.items():
        # In file order, so that the disk reads ahead.
        entries = sorted(
            ((name, entry) for name, entry in header.items() if name in wanted),
            key=lambda item: item[1].start,
        )
        if not entries:
            continue
        with _map(folder / file_name) as mapping:
            # The file may have changed since its header was read.
            last_name, last = entries[-1]
            if len(mapping) < last.stop:
                raise ModelLoadError(
                    f"{file_name}: {last_name}: truncated: ends at {last.stop}, the file at {len(mapping)}"
                )
            for name, entry in entries:
                target = wanted[name]
                dtype = _check_tensor(file_name, name, entry, target)
                for size in _copy(mapping, entry, dtype, target, f"{file_name}: {name}"):
                    done += size
                    if progress is not None:
                        progress(done, total)
    # The views would keep every weight alive beside its packed form.
    wanted.clear()
    model.pack()


def _locate(folder: Path) -> dict[str, frozenset[str] | None]:
    """File names, each with the tensors that the index puts there; None without an index."""
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).exists():
        raise ModelLoadError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; no other format is read")
    index = _read_index(folder / INDEX_FILE)
    files: dict[str, set[str]] = {}
    for tensor, file_name in index.items():
        files.setdefault(file_name, set()).add(tensor)
    return {file_name: frozenset(files[file_name]) for file_name in sorted(files)}


def _read_index(path: Path) -> dict[str, str]:
    content = _read_regular(path, 0, _MAX_INDEX_BYTES)
    index = _parse_json(path.name, content)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{path.name}: weight_map is no JSON object with entries")
    for tensor, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", file_name):
            raise ModelLoadError(
                f"{path.name}: {tensor}: {file_name!r} is not the plain name of a .safetensors file"
            )
    return weight_map


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one file, after every check that needs no model."""
    name = path.name
    file_size = _regular_size(path)
    length = int.from_bytes(_read_regular(path, 0, _LENGTH_BYTES, exactly=True), "little")
    if length > _MAX_HEADER_BYTES:
        raise ModelLoadError(f"{name}: header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
    data_start = _LENGTH_BYTES + length
    if data_start > file_size:
        raise ModelLoadError(f"{name}: truncated: the header ends at {data_start}, the file at {file_size}")
    header = _parse_json(name, _read_regular(path, _LENGTH_BYTES, length, exactly=True))
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ModelLoadError(f"{name}: {len(header)} tensors, at most {_MAX_TENSORS} are read")
    entries = {tensor: _parse_entry(name, tensor, value, data_start) for tensor, value in header.items()}
    _check_layout(name, entries, data_start, file_size)
    return entries


def _parse_entry(file_name: str, tensor: str, value: Any, data_start: int) -> _Entry:
    where = f"{file_name}: {tensor}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where}: the header entry does not have dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise ModelLoadError(f"{where}: unknown dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ModelLoadError(f"{where}: {shape!r} is no shape")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ModelLoadError(f"{where}: {offsets!r} are no data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise ModelLoadError(f"{where}: data_offsets {offsets} do not fit shape {shape} of {dtype}")
    return _Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(file_name: str, entries: Mapping[str, _Entry], data_start: int, file_size: int) -> None:
    """The tensors must tile the data exactly: no overlap, no gap, no end outside the file."""
    position = data_start
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > file_size:
            raise ModelLoadError(
                f"{file_name}: {tensor}: truncated: ends at {entry.stop}, the file at {file_size}"
            )
        if entry.start != position:
            problem = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise ModelLoadError(f"{file_name}: {tensor}: {problem}")
        position = entry.stop
    if position != file_size:
        raise ModelLoadError(f"{file_name}: {file_size - position} bytes after the last tensor")


def _check_placement(
    files: Mapping[str, frozenset[str] | None], headers: Mapping[str, Mapping[str, _Entry]]
) -> None:
    """Each file holds what the index says, and no tensor is in two files."""
    for file_name, indexed in files.items():
        if indexed is None:
            continue
        found = headers[file_name].keys()
        if missing := sorted(indexed - found):
            raise ModelLoadError(f"{file_name}: missing {_list(missing)}, which {INDEX_FILE} puts there")
        if unexpected := sorted(found - indexed):
            raise ModelLoadError(
                f"{file_name}: unexpected {_list(unexpected)}: {INDEX_FILE} has it elsewhere"
            )


def _check_names(wanted: Mapping[str, Tensor], headers: Mapping[str, Mapping[str, _Entry]]) -> None:
    found = {tensor: file_name for file_name, header in headers.items() for tensor in header}
    where = SINGLE_FILE if SINGLE_FILE in headers else INDEX_FILE
    missing = [tensor for tensor in wanted if tensor not in found]
    if missing:
        raise ModelLoadError(f"{where}: missing {_list(missing)}")
    unexpected = [
        f"{file_name}: {tensor}"
        for tensor, file_name in found.items()
        if tensor not in wanted and tensor != "lm_head.weight" and not _DERIVED.fullmatch(tensor)
    ]
    if unexpected:
        raise ModelLoadError(f"unexpected {_list(unexpected)}")


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _check_tensor(file_name: str, tensor: str, entry: _Entry, target: Tensor) -> torch.dtype:
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ModelLoadError(f"{file_name}: {tensor}: dtype {entry.dtype}, only {known} are loaded")
    if entry.shape != tuple(target.shape):
        raise ModelLoadError(
            f"{file_name}: {tensor}: shape {list(entry.shape)}, config.json asks for {list(target.shape)}"
        )
    return _DTYPES[entry.dtype]


def _map(path: Path) -> closing[mmap.mmap]:
    # A private mapping counts as writable, which torch wants of a buffer; nothing is ever written.
    try:
        with path.open("rb") as file:
            return closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise ModelLoadError(f"{path.name}: cannot be mapped: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path.name}: is empty") from error


def _copy(mapping: mmap.mmap, entry: _Entry, dtype: torch.dtype, target: Tensor, where: str) -> Iterable[int]:
    """Copy one tensor in slices and yield the bytes of each. `target` is contiguous."""
    flat = target.view(-1)
    step = _SLICE_BYTES // dtype.itemsize
    for first in range(0, flat.numel(), step):
        count = min(step, flat.numel() - first)
        offset = entry.start + first * dtype.itemsize
        part = flat[first : first + count]
        part.copy_(_view(mapping, dtype, offset, count))
        # Only float16 has a range that other types exceed.
        if target.dtype is torch.float16 and not bool(part.isfinite().all()):
            raise ModelLoadError(f"{where}: has values that are not finite in float16")
        _release(mapping, offset, count * dtype.itemsize)
        yield count * dtype.itemsize


def _view(mapping: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    if offset % dtype.itemsize:
        # The format does not promise aligned data; torch needs it.
        content = bytearray(mapping[offset : offset + count * dtype.itemsize])
        return torch.frombuffer(content, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)


def _release(mapping: mmap.mmap, offset: int, size: int) -> None:
    """Take pages that were read out of this process; the kernel's file cache keeps them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = offset - offset % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def _regular_size(path: Path) -> int:
    """Size of a regular file; a pipe or device in its place would block or never end."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelLoadError(f"{path.name}: is no regular file")
    return status.st_size


def _read_regular(path: Path, offset: int, limit: int, *, exactly: bool = False) -> bytes:
    """From `offset`: `limit` bytes exactly, or a whole file of at most as many."""
    size = _regular_size(path) - offset
    if not exactly and size > limit:
        raise ModelLoadError(f"{path.name}: larger than {limit} bytes")
    try:
        with path.open("rb") as file:
            file.seek(offset, os.SEEK_SET)
            content = file.read(limit)
    except OSError as error:
        raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror}") from error
    if exactly and len(content) != limit:
        raise ModelLoadError(f"{path.name}: truncated: {len(content)} of {limit} bytes of its header")
    return content


def _parse_json(file_name: str, content: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise ModelLoadError(f"{file_name}: {name}: duplicated")
            result[name] = value
        return result

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file_name}: is no valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelLoadError(f"{file_name}: is no JSON object")
    return parsed
