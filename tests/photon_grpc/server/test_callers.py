"""The file of callers: what it may say, and that a bad one never replaces a good one."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from photon_grpc.errors import ConfigError
from photon_grpc.server.callers import Caller, Callers

TOKEN = "correct-horse-battery"
OTHER = "another-token-altogether"
ALICE = Caller("alice", frozenset({"infer", "inspect"}))


def write(folder: Path, text: str) -> Path:
    """Replaces the file in one step, as an editor or a mounted Secret does."""
    new = folder / "new"
    new.write_text(text)
    os.replace(new, folder / "callers")
    return folder / "callers"


def load(folder: Path, text: str) -> Callers:
    return Callers(str(write(folder, text)))


def test_a_token_may_stand_there_itself_or_as_its_hash(tmp_path: Path) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    for credential in (f"token:{TOKEN}", f"sha256:{digest}"):
        callers = load(tmp_path, f"# who may call\n\nalice infer,inspect {credential}\n")
        assert callers.by_token(TOKEN) == ALICE
        for wrong in ("", TOKEN[:-1], TOKEN + "x", digest, OTHER):
            assert callers.by_token(wrong) is None


def test_names_of_certificates_are_no_tokens_and_tokens_no_names(tmp_path: Path) -> None:
    name = "spiffe://example/ns/default"
    callers = load(tmp_path, f"alice infer,inspect san:{name}\nbob control token:{TOKEN}\n")
    assert callers.by_sans(["unknown", name]) == ALICE
    assert callers.by_token(name) is None
    assert callers.by_sans([TOKEN]) is None
    assert callers.by_sans([]) is None


def test_each_token_of_the_file_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of them, whichever it is: how long a refusal takes tells of no token, known or guessed."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def overheard(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    callers = load(tmp_path, f"alice infer token:{TOKEN}\nbob infer token:{OTHER}\ncarol infer san:c\n")
    monkeypatch.setattr(hmac, "compare_digest", overheard)
    for token in (TOKEN, OTHER, "no such token", ""):
        compared.clear()
        callers.by_token(token)
        # Hashes, so that nothing depends on the length of a token either.
        assert compared == [(32, 32), (32, 32)]


def test_whose_names_stand_in_the_file(tmp_path: Path) -> None:
    callers = load(tmp_path, f"alice infer token:{TOKEN}\npod inspect san:localhost\n")
    assert callers.has("alice")
    assert callers.has("pod")
    assert not any(callers.has(name) for name in ("", "localhost", "infer", TOKEN, "Alice"))


BAD = [
    ("alice infer\n", "line 1: expected"),
    ("alice infer token: x\n", "line 1: expected"),
    (f"# note\nalice admin token:{TOKEN}\n", "line 2: a role is one of control, infer, inspect"),
    (f"alice infer, token:{TOKEN}\n", "line 1: a role"),
    ("alice infer token:short\n", "line 1: a token has at least 16"),
    (f"alice infer {TOKEN}\n", "line 1: a credential is"),
    ("alice infer san:\n", "line 1: a credential is"),
    ("alice infer sha256:abcd\n", "line 1: sha256 has 64"),
    ("alice infer sha256:" + "x" * 64 + "\n", "line 1: sha256 has 64"),
    (f"alice infer token:{TOKEN}\nbob control token:{TOKEN}\n", "line 2: an earlier line has this token"),
    ("alice infer san:a\nbob control san:a\n", "line 2: an earlier line has this name"),
    (f"alice infer token:{TOKEN}", "the last line does not end"),
    ("", "names no caller"),
    ("# nobody yet\n", "names no caller"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_bad_file_refuses_the_start_and_shows_no_token(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"auth.callers_file: {tmp_path / 'callers'}: {words}" in caught.value.message
    assert TOKEN not in caught.value.message


def test_a_missing_file_refuses_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Callers(str(tmp_path / "absent"))


@pytest.mark.parametrize("text", [text for text, _ in BAD])
def test_a_bad_file_leaves_the_last_good_one(tmp_path: Path, text: str) -> None:
    callers = load(tmp_path, f"alice infer,inspect token:{TOKEN}\n")
    write(tmp_path, text)
    with capture_logs() as logs:
        for _ in range(3):
            assert callers.by_token(TOKEN) == ALICE
    assert len(logs) == 1
    assert TOKEN not in str(logs)
    write(tmp_path, f"bob control token:{OTHER}\n")
    assert callers.by_token(TOKEN) is None
    assert callers.by_token(OTHER) == Caller("bob", frozenset({"control"}))


def test_a_file_that_is_gone_leaves_the_last_good_one(tmp_path: Path) -> None:
    callers = load(tmp_path, f"alice infer,inspect token:{TOKEN}\n")
    (tmp_path / "callers").unlink()
    assert callers.by_token(TOKEN) == ALICE
    write(tmp_path, f"bob control token:{OTHER}\n")
    assert callers.by_token(TOKEN) is None
