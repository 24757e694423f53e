"""Where the CUDA C sources lie, and what a source consists of once its includes are counted in.

Knows nothing of compilers and devices. Any thread.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from photon_grpc.errors import BackendUnavailableError

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One `.cu` file with everything that it includes."""

    path: Path
    text: str
    include_folder: Path
    digest: str
    """Of the text and of every included header, by name and content: any edit changes it."""


@cache
def source_folder() -> Path:
    """The folder of the `.cu` files: the checkout's, else the one that the wheel carries.

    Raises BackendUnavailableError where neither is there.
    """
    for folder in (_PACKAGE.parent / "cuda_kernels", _PACKAGE / "_cuda_kernels"):
        # A folder next to an installed package can be anybody's; ours has the headers.
        if (folder / "include" / "photon").is_dir():
            return folder
    raise BackendUnavailableError("backend cuda: the kernel sources are missing from this installation")


def load_source(stem: str, folder: Path | None = None) -> KernelSource:
    """Read `<stem>.cu` and its headers from `folder` or the package's own sources.

    Raises BackendUnavailableError where a file is missing.
    """
    folder = folder or source_folder()
    path = folder / f"{stem}.cu"
    include_folder = folder / "include"
    texts: dict[str, str] = {}
    _collect(path, path.name, include_folder, texts)
    digest = hashlib.sha256()
    for name in sorted(texts):
        for part in (name, texts[name]):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return KernelSource(path, texts[path.name], include_folder, digest.hexdigest())


def _collect(path: Path, name: str, include_folder: Path, texts: dict[str, str]) -> None:
    try:
        texts[name] = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BackendUnavailableError(f"backend cuda: cannot read the kernel source {path}") from error
    for included in _INCLUDE.findall(texts[name]):
        if included not in texts:
            _collect(include_folder / included, included, include_folder, texts)
