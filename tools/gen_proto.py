#!/usr/bin/env python3
"""Generates `photon_grpc/v1` from `proto/photon/v1`; with `--check` only says whether it is current.

protoc maps the virtual path `photon_grpc/v1` onto the proto folder, so the modules import each other
under our package's name and no text is patched. That holds only while no file of ours imports another
of ours. grpcio-tools is pinned to the oldest grpcio that the project supports, because generated code
refuses a runtime older than itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto" / "photon" / "v1"
TARGET = ROOT / "photon_grpc" / "v1"
PINNED = "1.84.0"
PACKAGE_DOC = (
    '"""Generated from `proto/photon/v1` by `tools/gen_proto.py`; never edited by hand."""\n'
    "\n"
    "from __future__ import annotations\n"
)


class GenerationError(Exception):
    """The generator is missing, of the wrong version, or protoc refused the sources."""


def sources() -> list[str]:
    """Names of the proto files, sorted."""
    return sorted(path.name for path in SOURCE.glob("*.proto"))


def generate(target: Path) -> None:
    """Write all generated modules into `target`. Raises GenerationError."""
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise GenerationError(f"grpcio-tools=={PINNED} is not installed") from error
    installed = importlib.metadata.version("grpcio-tools")
    if installed != PINNED:
        raise GenerationError(f"grpcio-tools {installed} is installed, {PINNED} is asked for")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "protoc",
            f"-Iphoton_grpc/v1={SOURCE}",
            # For what is vendored there; its Python modules come from googleapis-common-protos.
            f"-I{SOURCE.parents[1]}",
            f"-I{Path(protoc.__file__).parent / '_proto'}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--grpc_python_out={folder}",
            *(f"photon_grpc/v1/{name}" for name in sources()),
        ]
        if protoc.main(arguments) != 0:
            raise GenerationError("protoc failed")
        target.mkdir(parents=True, exist_ok=True)
        for module in sorted(Path(folder, "photon_grpc", "v1").iterdir()):
            (target / module.name).write_bytes(module.read_bytes())
    (target / "__init__.py").write_text(PACKAGE_DOC, encoding="utf-8")


def stale(target: Path = TARGET) -> list[str]:
    """Names under `target` that differ from what would be generated now, missing and extra ones included."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        wanted = {path.name: path.read_bytes() for path in fresh.iterdir()}
    found = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            generate(TARGET)
            return 0
        names = stale()
    except GenerationError as error:
        print(f"gen_proto: {error}", file=sys.stderr)
        return 2
    for name in names:
        print(f"gen_proto: photon_grpc/v1/{name} is stale; run tools/gen_proto.py", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
