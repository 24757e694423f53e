"""What `photon-grpc info` says of the backend, and of the sizes that follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.model_report import describe_model
from photon_grpc.options import KVCacheOptions, ModelOptions, Options
from photon_grpc.runner import backend
from tests.support.tiny_model import tiny_model_folder

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def report(folder: Path, name: str, **cache: int) -> dict[str, str]:
    return dict(
        describe_model(folder, Options(model=ModelOptions(backend=name), cache=KVCacheOptions(**cache)))
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 16 GiB, of which 15 are free, as torch tells it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15 * GIB, 16 * GIB))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_a_gpu_says_so(folder: Path) -> None:
    rows = report(folder, "auto")
    assert rows["backend"] == "cpu (torch finds no GPU)"
    assert rows["weights in memory"].endswith("(float32)")


@pytest.mark.usefixtures("gpu")
def test_auto_beside_a_gpu_says_what_cuda_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(options: Options) -> backend.Backend:
        raise BackendUnavailableError("backend cuda: CuPy is missing")

    monkeypatch.setattr(backend, "_cuda", missing)
    rows = report(folder, "auto")
    assert rows["backend"] == "cpu (backend cuda: CuPy is missing)"
    assert rows["weights in memory"].endswith("(float32)")


@pytest.mark.usefixtures("gpu")
def test_auto_with_all_that_cuda_needs_has_its_types_and_its_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_cuda", lambda options: replace(backend._cpu(options), name="cuda"))
    rows = report(folder, "auto")
    assert rows["backend"] == "cuda"
    assert rows["weights in memory"].endswith("(bfloat16)")
    # 256 sequences of the longest context, which is the most that is ever used.
    context = int(rows["longest context"].split()[0].replace(",", ""))
    assert int(rows["tokens that fit"].replace(",", "")) == 256 * context


@pytest.mark.usefixtures("gpu")
def test_the_pool_of_a_gpu_is_what_the_weights_leave_of_its_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0.9 of 16 GiB, less the one in use, less these weights: a card so full that a few blocks fit.
    weights = int(report(folder, "cuda")["parameters"].replace(",", "")) * 2
    per_token = int(report(folder, "cuda")["KV cache per token"].removesuffix(" bytes").replace(",", ""))
    free = int(16 * GIB * 0.1) + 1 + weights + 64 * per_token
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 16 * GIB))
    assert report(folder, "cuda")["tokens that fit"] == "64"
    assert report(folder, "cuda", kv_cache_memory_bytes=32 * per_token)["tokens that fit"] == "32"


@pytest.mark.usefixtures("no_gpu")
def test_cuda_by_name_is_taken_at_its_word(folder: Path) -> None:
    rows = report(folder, "cuda")
    assert rows["backend"] == "cuda (torch finds no GPU: sizes are of this machine's memory)"
    assert rows["weights in memory"].endswith("(bfloat16)")
