"""What the wheel carries: an installed package must serve, compile kernels and type-check."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
# Names that many distributions share, so that an import of one would name them all: those of protobuf and
# google.rpc, OpenTelemetry's API, SDK and exporters.
SHARED_NAMES = {"google", "opentelemetry"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target), str(ROOT)]
    done = subprocess.run(command, cwd=target, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def extras(*names: str) -> list[Requirement]:
    return [Requirement(text) for name in names for text in project()["optional-dependencies"][name]]


def requirements(*names: str) -> list[Requirement]:
    return [*map(Requirement, project()["dependencies"]), *extras(*names)]


def canonical(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def below(folder: str, *patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}


def test_every_module_is_in_it(wheel: zipfile.ZipFile) -> None:
    assert below("photon_grpc", "*.py", "*.pyi") <= set(wheel.namelist())
    assert "photon_grpc/py.typed" in wheel.namelist()


def test_the_cuda_sources_travel_under_the_package(wheel: zipfile.ZipFile) -> None:
    wanted = below("cuda_kernels", "*.cu", "*.cuh", "README.md")
    assert wanted
    names = set(wheel.namelist())
    assert {"photon_grpc/_" + name for name in wanted} <= names
    assert not any(name.startswith("cuda_kernels/") for name in names)


def test_the_demo_model_is_in_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {f"photon_grpc/demo_model/{name}" for name in wanted} <= names
    assert any(name.startswith("photon_grpc/demo_model/") and name.endswith(".safetensors") for name in names)


def test_nothing_else_is_in_it(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"photon_grpc"}
    assert not any("__pycache__" in name for name in wheel.namelist())
    # A package index refuses files above 100 MB by default, and nobody waits for one.
    assert sum(item.compress_size for item in wheel.infolist()) < 24 << 20


def test_its_metadata_says_how_to_run_it(wheel: zipfile.ZipFile) -> None:
    (metadata_name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(metadata_name).decode())
    assert metadata["Name"] == "photon-grpc"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cuda12", "cuda13", "dev", "otlp"}
    (entry_name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "photon-grpc = photon_grpc.__main__:main" in wheel.read(entry_name).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    home = packages_distributions()
    imported: set[str] = set()
    for path in (ROOT / "photon_grpc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - SHARED_NAMES:
                imported.update(canonical(name) for name in home.get(top, []))
    declared = {canonical(requirement.name) for requirement in requirements()}
    # What only one backend imports is an extra, and comes with a package that shares its name `cuda`.
    optional = {canonical(requirement.name) for requirement in extras("cuda12", "cuda13")}
    imported -= optional | {"cuda-pathfinder"}
    # transformers reads weights with safetensors wherever it is the judge of ours.
    declared_only = {"protobuf", "opentelemetry-api", "opentelemetry-sdk", "safetensors"}
    assert imported - {"photon-grpc"} <= declared
    assert declared - imported <= declared_only


def test_every_pinned_version_satisfies_what_is_declared() -> None:
    pins = dict(
        canonical(line).split("==")
        for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for requirement in requirements("dev"):
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement
