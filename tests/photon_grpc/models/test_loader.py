"""Safetensors files, honest and hostile. Files are built byte by byte where the library would refuse to."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from photon_grpc.errors import ModelLoadError
from photon_grpc.models import loader
from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.loader import load_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.torch_ops import TorchOps
from tests.support.tiny_model import make_config, make_weights, tiny_model_folder, write_weights

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Sink:
    """A model of two tensors, `a` [4, 6] and `b` [6], that keeps what it is given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.tensors = {"a": torch.zeros(4, 6, dtype=dtype), "b": torch.zeros(6, dtype=dtype)}
        self.packed = False

    def checkpoint_tensors(self) -> list[tuple[str, Tensor]]:
        return list(self.tensors.items())

    def pack(self) -> None:
        self.packed = True


def _tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(24.0).view(4, 6), "b": -torch.arange(6.0)}


def _entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _good_header() -> dict[str, Any]:
    return {"a": _entry([4, 6], 0, 96), "b": _entry([6], 96, 120)}


def _write(folder: Path, header: Any, data: bytes = bytes(120), *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as raised:
        load_weights(Sink(), folder)
    return raised.value.message


def _empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return build_model(load_config(folder), TorchOps(), dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_reaches_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, shards: int
) -> None:
    """Slices far smaller than a tensor, so that their borders are crossed."""
    monkeypatch.setattr(loader, "_SLICE_BYTES", 1000)
    monkeypatch.setattr(DecoderModel, "pack", lambda self: None)
    folder = tiny_model_folder(tmp_path, family, shards=shards, tokenizer=False)
    model = _empty_model(folder)
    load_weights(model, folder)
    expected = make_weights(make_config(family))
    loaded = dict(model.checkpoint_tensors())

    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_converted(tmp_path: Path, stored: torch.dtype, served: torch.dtype) -> None:
    tensors = {name: (tensor / 7).to(stored) for name, tensor in _tensors().items()}
    save_file(tensors, tmp_path / WEIGHTS)
    sink = Sink(served)
    load_weights(sink, tmp_path)

    assert sink.packed
    for name, tensor in tensors.items():
        assert torch.equal(sink.tensors[name], tensor.to(served))


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_values_outside_float16_are_refused(tmp_path: Path, value: float) -> None:
    tensors = _tensors()
    tensors["b"][3] = value
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelLoadError, match=r"^model\.safetensors: b: .*float16"):
        load_weights(Sink(torch.float16), tmp_path)


def test_unaligned_data(tmp_path: Path) -> None:
    header = json.dumps(_good_header()).encode()
    header += b" " * ((1 - len(header)) % 8)
    data = b"".join(tensor.numpy().tobytes() for tensor in _tensors().values())
    _write(tmp_path, header, data)
    sink = Sink()
    load_weights(sink, tmp_path)

    assert torch.equal(sink.tensors["a"], _tensors()["a"])
    assert torch.equal(sink.tensors["b"], _tensors()["b"])


def test_the_hand_made_file_is_good(tmp_path: Path) -> None:
    """Otherwise the refusals below would prove nothing."""
    _write(tmp_path, _good_header() | {"__metadata__": {"format": "pt"}})
    load_weights(Sink(), tmp_path)


def test_progress_ends_at_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_SLICE_BYTES", 40)
    save_file(_tensors(), tmp_path / WEIGHTS)
    seen: list[tuple[int, int]] = []
    load_weights(Sink(), tmp_path, progress=lambda done, total: seen.append((done, total)))

    assert {total for _, total in seen} == {120}
    assert [done for done, _ in seen] == [40, 80, 96, 120]


def test_tied_head_and_old_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama", tokenizer=False)
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.rotary_emb.inv_freq"] = torch.ones(8)
    write_weights(folder, weights)
    load_weights(_empty_model(folder), folder)


def test_lm_head_of_an_untied_model_is_not_optional(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama-untied", tokenizer=False)
    weights = load_file(folder / WEIGHTS)
    del weights["lm_head.weight"]
    write_weights(folder, weights)
    with pytest.raises(ModelLoadError, match=r"^model\.safetensors: missing lm_head\.weight$"):
        load_weights(_empty_model(folder), folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    save_file({"a": _tensors()["a"]}, tmp_path / WEIGHTS)
    assert _refusal(tmp_path) == "model.safetensors: missing b"
    save_file(_tensors() | {"c": torch.ones(1), "model.layers.x.inv_freq": torch.ones(1)}, tmp_path / WEIGHTS)
    message = _refusal(tmp_path)
    assert "unexpected" in message
    assert "model.safetensors: c" in message
    assert "model.layers.x.inv_freq" in message


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.ones(6, 4), "shape [6, 4], config.json asks for [4, 6]"),
        (torch.ones(24), "shape [24]"),
        (torch.ones(4, 6, dtype=torch.int32), "dtype I32"),
        (torch.ones(4, 6, dtype=torch.float64), "dtype F64"),
        (torch.ones(4, 6).to(torch.float8_e4m3fn), "dtype F8_E4M3"),
    ],
)
def test_wrong_shape_and_type(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    save_file({"a": tensor, "b": _tensors()["b"]}, tmp_path / WEIGHTS)
    assert _refusal(tmp_path).startswith(f"model.safetensors: a: {problem}")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"a": _entry([4, 6], 0, 96), "b": _entry([6], 72, 96)}, "b: overlaps"),
        ({"a": _entry([4, 6], 0, 96), "b": _entry([5], 100, 120)}, "b: leaves a gap"),
        ({"a": _entry([4, 6], 8, 104), "b": _entry([6], 104, 128)}, "a: leaves a gap"),
        ({"a": _entry([4, 6], 0, 96), "b": _entry([7], 96, 124)}, "b: truncated"),
        ({"a": _entry([4, 6], 0, 96)}, "24 bytes after"),
        ({"a": _entry([4, 6], 0, 95), "b": _entry([6], 95, 119)}, "a: data_offsets"),
        ({"a": _entry([4, 6], 96, 0)}, "a: data_offsets"),
        ({"a": _entry([4, 6], -96, 0)}, "a: [-96, 0] are no data_offsets"),
        ({"a": _entry([1 << 62, 1 << 62], 0, 96)}, "a: data_offsets"),
        ({"a": _entry([1 << 64], 0, 96)}, "is no shape"),
        ({"a": _entry([4, True], 0, 16)}, "a: [4, True] is no shape"),
        ({"a": _entry([4.0, 6], 0, 96)}, "is no shape"),
        ({"a": _entry([1] * 9, 0, 4)}, "is no shape"),
        ({"a": {"dtype": "F32", "shape": "46", "data_offsets": [0, 96]}}, "is no shape"),
        ({"a": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0]}}, "are no data_offsets"),
        ({"a": {"dtype": "F32", "shape": [4, 6]}}, "a: the header entry"),
        ({"a": _entry([4, 6], 0, 96) | {"strides": [6, 1]}}, "a: the header entry"),
        ({"a": 7}, "a: the header entry"),
        ({"a": _entry([4, 6], 0, 96, dtype="Q4")}, "a: unknown dtype 'Q4'"),
        ({"a": _entry([4, 6], 0, 96) | {"dtype": ["F32"]}}, "a: unknown dtype"),
        (b'{"a": 1, "a": 2}', "a: duplicated"),
        (b"[1]", "is no JSON object"),
        (b"{", "is no valid JSON"),
        (b"\xff", "is no valid JSON"),
        (b"[" * 200_000, "is no valid JSON"),
        ({str(i): 0 for i in range(100_001)}, "100001 tensors"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, problem: str) -> None:
    _write(tmp_path, header)
    message = _refusal(tmp_path)
    assert message.startswith("model.safetensors: ")
    assert problem in message


@pytest.mark.parametrize("length", [25_000_001, 1 << 40, (1 << 64) - 1])
def test_huge_header_is_not_read(tmp_path: Path, length: int) -> None:
    _write(tmp_path, b"{}", length=length)
    assert f"header of {length} bytes" in _refusal(tmp_path)


def test_file_cut_at_any_byte(tmp_path: Path) -> None:
    _write(tmp_path, _good_header())
    whole = (tmp_path / WEIGHTS).read_bytes()
    for size in (0, 1, 7, 8, 9, 50, len(whole) - 120, len(whole) - 25, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:size])
        assert "truncated" in _refusal(tmp_path), size


@pytest.mark.parametrize("left", [0, 500])
def test_file_cut_after_its_header_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """A page behind the end of a mapped file would kill the process."""
    _write(tmp_path, _good_header())
    check = loader._check_names

    def cut(*arguments: Any) -> None:
        check(*arguments)
        os.truncate(tmp_path / WEIGHTS, min(left, (tmp_path / WEIGHTS).stat().st_size - 1))

    monkeypatch.setattr(loader, "_check_names", cut)
    assert re.search(r"^model\.safetensors: (is empty|b: truncated)", _refusal(tmp_path))


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "has neither model.safetensors nor model.safetensors.index.json" in _refusal(tmp_path)


def test_pipe_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    assert _refusal(tmp_path) == "model.safetensors: is no regular file"


def _index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/part.safetensors",
        "..\\part.safetensors",
        "..",
        "",
        ".safetensors",
        "part.bin",
        "part.safetensors\x00.bin",
        "part.safetensors\n",
        7,
        None,
        ["part.safetensors"],
    ],
)
def test_index_names_that_leave_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(_tensors(), tmp_path / "secret.safetensors")
    _index(folder, {"a": name, "b": name})
    message = _refusal(folder)
    assert message.startswith(f"{INDEX}: a: ")
    assert "is not the plain name" in message


def _split(folder: Path, change: Callable[[dict[str, str]], object] = lambda weight_map: None) -> None:
    save_file({"a": _tensors()["a"]}, folder / "one.safetensors")
    save_file({"b": _tensors()["b"]}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    change(weight_map)
    _index(folder, weight_map)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    _split(tmp_path)
    load_weights(Sink(), tmp_path)
    _split(tmp_path, lambda weight_map: weight_map.update(b="one.safetensors"))
    assert _refusal(tmp_path).startswith("one.safetensors: missing b")
    _split(tmp_path, lambda weight_map: weight_map.update(c="two.safetensors"))
    assert _refusal(tmp_path).startswith("two.safetensors: missing c")
    _split(tmp_path, lambda weight_map: weight_map.update(b="three.safetensors"))
    assert _refusal(tmp_path).startswith("three.safetensors: cannot be read: No such file")
    _split(tmp_path, lambda weight_map: weight_map.pop("b"))
    assert _refusal(tmp_path) == f"{INDEX}: missing b"


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    _split(tmp_path)
    save_file(_tensors(), tmp_path / "two.safetensors")
    assert _refusal(tmp_path).startswith("two.safetensors: unexpected a")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}'],
)
def test_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert _refusal(tmp_path).startswith(f"{INDEX}: ")


def test_links_as_in_a_hugging_face_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file(_tensors(), tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    load_weights(Sink(), folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "gone")
    assert "has neither" in _refusal(folder)


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from photon_grpc.models.loader import load_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.torch_ops import TorchOps

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
config, ops = load_config(folder), TorchOps()
before = status("VmRSS")
model = build_model(config, ops, dtype=dtype, device=torch.device("cpu"), max_positions=16)
load_weights(model, folder)
print(status("VmHWM") - before, config.num_parameters * dtype.itemsize)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("stored", "served"), [("float32", "float32"), ("bfloat16", "float32")])
def test_peak_memory_stays_below_1_3_of_the_weights(tmp_path: Path, stored: str, served: str) -> None:
    """Also counts the mapped pages of the file and the packing of the loaded weights."""
    folder = tiny_model_folder(
        tmp_path,
        "llama",
        tokenizer=False,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=5,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=8192,
        dtype=stored,
    )
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), served],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    peak, weights = map(int, output.split())

    assert weights > 100 << 20
    assert weights < peak < 1.3 * weights
