"""A file that changes under a running server: what is good counts at once, what is bad changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from photon_grpc.errors import ConfigError
from photon_grpc.watched_file import WatchedFile


def write(folder: Path, text: str) -> str:
    """Replaces the file in one step, as an editor or a mounted Secret does."""
    new = folder / "new"
    new.write_text(text)
    os.replace(new, folder / "file")
    return str(folder / "file")


def number(content: bytes) -> int:
    return int(content)


def test_a_change_counts_with_the_next_question(tmp_path: Path) -> None:
    watched = WatchedFile("a.file", write(tmp_path, "1"), number)
    assert watched.current() == 1
    write(tmp_path, "2")
    with capture_logs() as logs:
        assert [watched.current() for _ in range(3)] == [2, 2, 2]
    assert [(entry["event"], entry["setting"]) for entry in logs] == [("file loaded", "a.file")]


def test_nothing_is_parsed_again_while_nothing_changes(tmp_path: Path) -> None:
    parsed: list[bytes] = []

    def counting(content: bytes) -> list[bytes]:
        parsed.append(content)
        return [content]

    watched = WatchedFile("a.file", write(tmp_path, "1"), counting)
    assert watched.current() is watched.current()
    assert parsed == [b"1"]


def test_what_could_not_be_read_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchanged: what was missing was a descriptor."""
    watched = WatchedFile("a.file", write(tmp_path, "1"), number)
    write(tmp_path, "2")

    def exhausted(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(Path, "read_bytes", exhausted)
        assert [watched.current() for _ in range(3)] == [1, 1, 1]
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert watched.current() == 2


def test_what_is_bad_or_gone_leaves_the_last_good_one(tmp_path: Path) -> None:
    watched = WatchedFile("a.file", write(tmp_path, "1"), number)
    write(tmp_path, "x")
    with capture_logs() as logs:
        assert [watched.current() for _ in range(3)] == [1, 1, 1]
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert str(tmp_path / "file") in logs[0]["reason"]
    (tmp_path / "file").unlink()
    assert watched.current() == 1
    write(tmp_path, "3")
    assert watched.current() == 3


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), ("x", "invalid literal")])
def test_the_start_is_refused_with_the_setting_and_the_file(
    tmp_path: Path, text: str | None, words: str
) -> None:
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        WatchedFile("a.file", str(tmp_path / "file"), number)
    assert caught.value.message.startswith(f"a.file: {tmp_path / 'file'}: ")
