"""The digest of a source sees every edit that a compiler would."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.kernels import sources
from photon_grpc.kernels.registry import SPECS
from photon_grpc.kernels.sources import load_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photon = tmp_path / "include" / "photon"
    photon.mkdir(parents=True)
    (photon / "leaf.cuh").write_text("#pragma once\n#define LEAF 1\n")
    (photon / "middle.cuh").write_text('#pragma once\n  #  include "photon/leaf.cuh"\n')
    (tmp_path / "one.cu").write_text('#include "photon/middle.cuh"\nint one = LEAF;\n')
    return tmp_path


def test_the_digest_is_a_function_of_the_text(folder: Path) -> None:
    assert load_source("one", folder).digest == load_source("one", folder).digest


@pytest.mark.parametrize("name", ["one.cu", "include/photon/middle.cuh", "include/photon/leaf.cuh"])
def test_an_edit_of_any_included_file_changes_the_digest(folder: Path, name: str) -> None:
    before = load_source("one", folder).digest
    path = folder / name
    path.write_text(path.read_text() + "// more\n")
    assert load_source("one", folder).digest != before


def test_text_that_moves_between_files_changes_the_digest(folder: Path) -> None:
    before = load_source("one", folder).digest
    leaf, middle = folder / "include/photon/leaf.cuh", folder / "include/photon/middle.cuh"
    middle.write_text(middle.read_text() + "#define LEAF 1\n")
    leaf.write_text("#pragma once\n")
    assert load_source("one", folder).digest != before


def test_headers_that_include_each_other_end(folder: Path) -> None:
    leaf = folder / "include/photon/leaf.cuh"
    leaf.write_text('#include "photon/middle.cuh"\n')
    assert load_source("one", folder).digest


def test_a_missing_header_is_named(folder: Path) -> None:
    (folder / "include/photon/leaf.cuh").unlink()
    with pytest.raises(BackendUnavailableError, match=r"leaf\.cuh"):
        load_source("one", folder)


def test_sources_are_found_in_the_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "photon_grpc"
    monkeypatch.setattr(sources, "_PACKAGE", package)
    find = sources.source_folder.__wrapped__
    with pytest.raises(BackendUnavailableError, match="missing from this installation"):
        find()
    (package / "_cuda_kernels" / "include" / "photon").mkdir(parents=True)
    assert find() == package / "_cuda_kernels"
    # Somebody else's folder of that name beside the package is not ours.
    (package.parent / "cuda_kernels").mkdir()
    assert find() == package / "_cuda_kernels"
    (package.parent / "cuda_kernels" / "include" / "photon").mkdir(parents=True)
    assert find() == package.parent / "cuda_kernels"


def test_every_kernel_has_its_source_and_every_source_a_kernel() -> None:
    found = {path.stem for path in sources.source_folder().glob("*.cu")}
    assert {spec.source for spec in SPECS} == found


def test_no_source_includes_a_header_of_the_toolkit() -> None:
    """They would have to match CuPy's, torch's and the driver's CUDA."""
    folder = sources.source_folder()
    for path in (*folder.glob("*.cu"), *folder.rglob("*.cuh")):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#") and "include" in line.split("//")[0]:
                assert '"photon/' in line, f"{path.name}: {line}"
