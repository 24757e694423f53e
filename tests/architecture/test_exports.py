"""Public names exist, the layout is kept, and the tree speaks of the project alone."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import photon_grpc

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "photon_grpc"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "proto", "photon_grpc", "cuda_kernels"}
TOP_LEVEL |= {"tests", "deploy", "tools"}


def tracked_files() -> list[Path]:
    """What the repository holds; the test is about a checkout and says so elsewhere."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported), f"{name}.{exported}"


def test_exports_are_unique() -> None:
    for name in MODULES:
        exported = list(getattr(importlib.import_module(name), "__all__", ()))
        assert len(exported) == len(set(exported)), name


def test_the_package_offers_its_python_api() -> None:
    assert {"LLM", "GenerationParams", "Options", "__version__"} <= set(photon_grpc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = photon_grpc.nonsense


def test_importing_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, photon_grpc.cli; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_owns(name: str) -> None:
    module = importlib.import_module(name)
    if name.startswith("photon_grpc.v1") or not Path(str(module.__file__)).read_text().strip():
        return
    assert module.__doc__, name


def test_nothing_is_evaluated_and_nothing_is_swallowed_whole() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"


def test_the_top_level_is_the_one_of_the_layout() -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_names_a_machine() -> None:
    """Absolute paths of somebody's machine do not travel."""
    folders = "|".join(("/home" + "/", "/wor" + "k/", "/Us" + "ers/", "/op" + "t/", "/roo" + "t/"))
    pattern = re.compile(rf"(?<![\w.)}}\]/$*-])({folders})")
    found = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".png", ".svg") or path.name == "tokenizer.json":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
