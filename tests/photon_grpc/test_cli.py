"""The command as a person meets it: a process, its output, its exit code."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import photon_grpc.app
from photon_grpc import cli
from photon_grpc.errors import FieldViolation, InvalidRequestError, OverloadedError
from photon_grpc.options import AuthOptions, Options, TlsOptions
from photon_grpc.types import ChatInput
from tests.support.certificates import Authority
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import Harness, quick_options, running_server
from tests.support.tiny_model import tiny_model_folder

COMMANDS = (
    *("serve", "generate", "chat", "batch", "tokenize", "info", "bench", "health"),
    *("drain", "watch", "flush-cache", "version"),
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def environment(token: str = "") -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PHOTON_")}
    if token:
        kept["PHOTON_TOKEN"] = token
    return {**kept, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}


async def start(*arguments: str, token: str = "") -> asyncio.subprocess.Process:
    """`token` stands in PHOTON_TOKEN."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "photon_grpc", *arguments)
    return await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(token)
    )


async def run(*arguments: str, stdin: bytes = b"", token: str = "") -> Result:
    process = await start(*arguments, token=token)
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


@pytest.fixture
def door() -> FakeFrontDoor:
    return FakeFrontDoor()


@pytest.fixture
async def server(door: FakeFrontDoor) -> AsyncIterator[Harness]:
    async with running_server(door) as harness:
        yield harness


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models"))


class TestHelp:
    async def test_every_command_is_listed(self) -> None:
        result = await run("--help")
        assert result.code == 0
        for command in COMMANDS:
            assert re.search(rf"^│ {command} +\S", result.out, re.MULTILINE), command

    @pytest.mark.parametrize("command", COMMANDS)
    async def test_every_option_is_explained(self, command: str) -> None:
        result = await run(command, "--help")
        assert result.code == 0
        for line in re.findall(r"^│ (?:\* +)?(--\S+.*?) *│$", result.out, re.MULTILINE):
            assert re.search(r"  +\S.*[.\])]$", line), line

    async def test_no_command_shows_the_help(self) -> None:
        assert "serve" in (await run()).out

    async def test_the_version(self) -> None:
        assert (await run("version")).out == f"photon-grpc {photon_grpc.__version__}\n"


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), "model.path: missing"),
            (("--model", "demo", "--dtype", "int8"), "model.dtype = 'int8' (from --dtype)"),
            (
                ("--model", "demo", "--set", "servre.port=1"),
                "servre: no such setting (from --set servre.port)",
            ),
            (("--model", "demo", "--set", "nonsense"), "expected section.key=value"),
            (("--model", "demo", "--kv-cache-memory", "2 sheep"), "(from --kv-cache-memory)"),
            (("--model", "demo", "--host", "0.0.0.0"), "server.host = '0.0.0.0' (from --host)"),
            (("--model", "demo", "--config", "absent.toml"), "absent.toml: no such file"),
            (("--model", "absent-folder"), "absent-folder: no such folder"),
        ],
    )
    async def test_a_wrong_one_ends_the_start_with_code_2(self, arguments: Sequence[str], words: str) -> None:
        result = await run("serve", *arguments)
        assert result.code == 2
        assert words in result.err
        assert "Traceback" not in result.err
        assert result.out == ""

    async def test_flags_reach_their_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Options] = []

        def fake_run(options: Options, **_: object) -> int:
            seen.append(options)
            return 0

        monkeypatch.setattr(photon_grpc.app, "run", fake_run)
        monkeypatch.setattr(cli, "configure_logging", lambda options: None)
        flags = "--model demo --host 127.0.0.2 --port 7 --dev --dtype bfloat16 --backend cpu"
        flags += " --kv-cache-memory 1MiB --max-num-seqs 3 --max-model-len 99 --no-prefix-caching"
        flags += " --gpu-memory-utilization 0.5"
        flags += " --set scheduler.max_num_batched_tokens=17"
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", *flags.split()])
        assert caught.value.code == 0
        (options,) = seen
        assert (options.model.path, options.model.dtype, options.model.backend) == ("demo", "bfloat16", "cpu")
        assert (options.server.host, options.server.port, options.server.reflection) == (
            "127.0.0.2",
            7,
            "public",
        )
        assert (options.cache.kv_cache_memory_bytes, options.cache.prefix_caching) == (1 << 20, False)
        assert options.cache.gpu_memory_utilization == 0.5
        assert (options.scheduler.max_num_seqs, options.model.max_model_len) == (3, 99)
        assert options.scheduler.max_num_batched_tokens == 17


class TestAgainstAServer:
    async def test_generate_streams_text_and_reports_on_standard_error(self, server: Harness) -> None:
        result = await run("generate", "hi", "--address", server.target, "--echo")
        assert (result.code, result.out) == (0, "hi tok tok tok\n")
        assert "4 prompt tokens (1 cached), 3 output tokens" in result.err
        assert "first token after 500.0 ms, 2.0 tokens/s, finish: STOP 'stop'" in result.err

    async def test_generate_quietly(self, server: Harness) -> None:
        result = await run("generate", "hi", "--address", server.target, "--quiet")
        assert (result.out, result.err) == (" tok tok tok\n", "")

    async def test_generate_writes_each_piece_at_once(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(num_deltas=None, interval_s=0.001)
        process = await start("generate", "hi", "--address", server.target)
        assert process.stdout is not None
        assert await process.stdout.readexactly(8) == b" tok tok"
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130
        await asyncio.wait_for(door.streams[0].left.wait(), 10)

    async def test_a_reader_that_leaves_ends_the_command_quietly(
        self, server: Harness, door: FakeFrontDoor
    ) -> None:
        door.script = Script(num_deltas=None, interval_s=0.001)
        command = f"{sys.executable} -m photon_grpc generate hi --address {server.target} | head -c 8"
        process = await asyncio.create_subprocess_shell(
            command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment()
        )
        out, err = await process.communicate()
        assert (out, err) == (b" tok tok", b"")
        await asyncio.wait_for(door.streams[0].left.wait(), 10)

    async def test_the_prompt_may_come_from_standard_input(
        self, server: Harness, door: FakeFrontDoor
    ) -> None:
        await run("generate", "-", "--address", server.target, stdin="gr\u00fcn\n".encode())
        assert door.requests[0].prompt == "gr\u00fcn\n"

    async def test_a_prompt_that_is_no_text_is_refused(self, server: Harness, door: FakeFrontDoor) -> None:
        result = await run("generate", "-", "--address", server.target, stdin=b"\xff\xfe")
        assert result.code == 2
        assert "not valid UTF-8" in result.err
        assert door.requests == []

    async def test_an_error_shows_its_fields(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(
            error=InvalidRequestError([FieldViolation("spec.sampling.top_p", "must be > 0")])
        )
        result = await run("generate", "hi", "--address", server.target)
        assert result.code == 1
        assert result.err.startswith("INVALID_ARGUMENT (INVALID_FIELD): ")
        assert result.err.count("spec.sampling.top_p: must be > 0") == 1
        assert "Traceback" not in result.err

    async def test_an_error_says_when_to_come_back(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(error=OverloadedError("the queue is full", retry_after_s=2.0))
        result = await run("generate", "hi", "--address", server.target)
        assert result.code == 1
        assert re.search(r"try again in [\d.]+ s", result.err)

    async def test_engine_settings_have_no_place_beside_an_address(self, server: Harness) -> None:
        result = await run("generate", "hi", "--address", server.target, "--dtype", "float16")
        assert result.code == 2
        assert "--dtype: has no effect on the server at --address" in result.err

    async def test_chat_keeps_the_conversation_until_reset(
        self, server: Harness, door: FakeFrontDoor
    ) -> None:
        lines = b"one\n\ntwo\n/what\n/reset\nthree\n/exit\nnever\n"
        result = await run("chat", "--address", server.target, "--system", "be brief", stdin=lines)
        assert (result.code, result.out) == (0, " tok tok tok\n" * 3)
        conversations = []
        for request in door.requests:
            assert isinstance(request.prompt, ChatInput)
            conversations.append([f"{m.role.value}: {m.content}" for m in request.prompt.messages])
        assert conversations == [
            ["system: be brief", "user: one"],
            ["system: be brief", "user: one", "assistant:  tok tok tok", "user: two"],
            ["system: be brief", "user: three"],
        ]

    async def test_a_failed_turn_leaves_the_conversation(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(error=OverloadedError("the queue is full", retry_after_s=1.0))
        result = await run("chat", "--address", server.target, stdin=b"one\ntwo\n")
        assert result.code == 1
        assert result.err.count("the queue is full") == 2
        last = door.requests[-1].prompt
        assert isinstance(last, ChatInput)
        assert len(last.messages) == 1

    async def test_tokenize(self, server: Harness) -> None:
        result = await run("tokenize", "h\u00e9llo", "--address", server.target)
        assert re.findall(r"(\d+) +('.*?')", result.out) == [("1", "'h\u00e9'"), ("2", "'ll'")]
        assert (await run("tokenize", "x", "--ids", "--address", server.target)).out == "1 2\n"

    async def test_bench_runs_every_call(self, server: Harness, door: FakeFrontDoor) -> None:
        result = await run("bench", "--address", server.target, "-c", "3", "-r", "7", "-n", "5")
        assert result.code == 0
        assert re.search(r"7 calls, 21 tokens in [\d.]+ s: [\d.]+ tokens/s", result.out)
        for row in ("time to first token", "between tokens", "whole call"):
            assert re.search(rf"{row}(\s+\d+\.\d\d){{4}}", result.out), row
        assert len(door.requests) == 7
        assert len({str(request.prompt) for request in door.requests}) == 7
        assert {request.stop.max_tokens for request in door.requests} == {5}

    async def test_bench_reports_failures(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(error=OverloadedError("the queue is full", retry_after_s=1.0))
        result = await run("bench", "--address", server.target, "-r", "3")
        assert result.code == 1
        assert "3 calls failed; the first:" in result.err
        assert "OVERLOADED" in result.err

    async def test_drain_and_back(self, server: Harness) -> None:
        admin = f"127.0.0.1:{server.ports.admin}"
        assert (await run("drain", "-a", admin)).out == f"{admin} drains, 0 in flight\n"
        assert (await run("health", "-a", server.target)).code == 1
        assert (await run("drain", "-a", admin, "--undo")).out == f"{admin} takes calls, 0 in flight\n"
        assert (await run("health", "-a", server.target)).code == 0
        assert (await run("drain", "-a", admin, "--undo", "--grace", "1")).code == 2
        result = await run("drain", "-a", admin, "--grace", "1e6")
        assert result.code == 1
        assert "grace: is more than" in result.err

    async def test_watch_prints_every_change_and_ends_with_the_server(self, server: Harness) -> None:
        process = await start("watch", "-a", f"127.0.0.1:{server.ports.admin}")
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert re.match(r"[0-9a-f]{8} 2 READY running=2 queued=3 ", line)
        await server.server.drain()
        rest = (await process.stdout.read()).decode().splitlines()
        assert rest[0].split()[1:3] == ["3", "DRAINING"]
        assert await process.wait() == 0

    async def test_flush_cache(self, server: Harness, door: FakeFrontDoor) -> None:
        admin = f"127.0.0.1:{server.ports.admin}"
        assert (await run("flush-cache", "-a", admin)).out == "7 blocks freed\n"
        assert (await run("flush-cache", "-a", admin, "--wait-idle")).code == 0
        assert door.calls == [("flush_cache", False), ("flush_cache", True)]

    async def test_health(self, server: Harness) -> None:
        result = await run("health", "--address", server.target)
        assert (result.code, result.out) == (0, f"{server.target} serves fake (photon-grpc 0.1.0)\n")
        server.server.set_dead()
        assert (await run("health", "--address", server.target)).code == 1


class TestOffline:
    """In this process, which has torch already; one test goes through processes."""

    @pytest.fixture(autouse=True)
    def own_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in set(os.environ) - set(environment()):
            monkeypatch.delenv(name)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(cli, "configure_logging", lambda options: None)

    def call(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    def test_info(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = self.call(capsys, "info", "--model", str(model), "--kv-cache-memory", "768KiB")
        assert result.code == 0
        rows = dict(re.findall(r"^ (\S.*?)  +(\S.*?) *$", result.out, re.MULTILINE))
        assert rows["architecture"] == "LlamaForCausalLM"
        per_token = int(rows["KV cache per token"].removesuffix(" bytes").replace(",", ""))
        num_tokens = int(rows["tokens that fit"].replace(",", ""))
        assert num_tokens == (768 << 10) // (16 * per_token) * 16
        # Its header aside, the file is its parameters.
        size = (model / "model.safetensors").stat().st_size
        assert 0 <= size - 4 * int(rows["parameters"].replace(",", "")) < 8192

    def test_tokenize(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = "def read(x): na\u00efve"
        wanted = AutoTokenizer.from_pretrained(model).encode(text)
        result = self.call(capsys, "tokenize", text, "--ids", "--model", str(model))
        assert [int(word) for word in result.out.split()] == wanted

    def test_a_damaged_folder_ends_with_code_2(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text((model / "config.json").read_text())
        result = self.call(capsys, "generate", "x", "--model", str(tmp_path))
        assert result.code == 2
        assert str(tmp_path) in result.err

    def test_a_request_that_is_refused_ends_with_code_1(
        self, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--model", str(model), "--kv-cache-memory", "4MiB")
        result = self.call(capsys, "generate", "x", "-n", "0", *flags)
        assert result.code == 1
        assert "stop.max_tokens" in result.err

    def test_chat(
        self, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nwho\n"))
        flags = ("--model", str(model), "--kv-cache-memory", "4MiB", "-n", "5", "-t", "0")
        result = self.call(capsys, "chat", *flags)
        assert result.code == 0
        assert result.err.count("output tokens") == 2

    async def test_generate_is_what_the_server_generates(self, model: Path) -> None:
        common = ("def read", "--max-tokens", "12", "--temperature", "0", "--ignore-eos")
        offline = await run("generate", *common, "--model", str(model), "--kv-cache-memory", "4MiB")
        assert offline.code == 0
        assert "12 output tokens" in offline.err
        assert "finish: MAX_TOKENS" in offline.err

        settings = ("--set", "server.admin_port=0", "--set", "server.drain_propagation_s=0")
        server = await start(
            *("serve", "--model", str(model), "--port", "0", "--kv-cache-memory", "4MiB"), *settings
        )
        try:
            assert server.stdout is not None
            line = (await server.stdout.readline()).decode()
            match = re.fullmatch(r"serving llama at (127\.0\.0\.1:\d+) \(admin 127\.0\.0\.1:\d+\)\n", line)
            assert match is not None, line
            online = await run("generate", *common, "--address", match[1])
        finally:
            server.terminate()
            _, log = await server.communicate()
        assert online.out == offline.out
        assert server.returncode == 0, log.decode()


class TestWithAToken:
    @pytest.fixture
    async def guarded(self, tmp_path: Path) -> AsyncIterator[Harness]:
        (tmp_path / "callers").write_text("alice infer,inspect token:correct-horse-battery\n")
        auth = AuthOptions(str(tmp_path / "callers"))
        async with running_server(FakeFrontDoor(), replace(quick_options(), auth=auth)) as harness:
            yield harness

    async def test_every_command_that_calls(self, guarded: Harness, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("correct-horse-battery\n")
        flags = ("--address", guarded.target, "--token-file", str(tmp_path / "token"))
        assert (await run("generate", "hi", "-q", *flags)).out == " tok tok tok\n"
        assert (await run("tokenize", "ab", "--ids", *flags)).code == 0
        assert (await run("bench", "-c", "1", "-r", "1", *flags)).code == 0
        assert "serves" in (await run("health", *flags)).out

    async def test_it_may_stand_in_the_environment(self, guarded: Harness, tmp_path: Path) -> None:
        token, flags = "correct-horse-battery", ("--address", guarded.target)
        assert (await run("generate", "hi", "-q", *flags, token=token)).out == " tok tok tok\n"
        assert (await run("tokenize", "ab", "--ids", *flags, token=token)).code == 0
        assert (await run("bench", "-c", "1", "-r", "1", *flags, token=token)).code == 0
        assert "serves" in (await run("health", *flags, token=token)).out
        # The file is the nearer of the two.
        (tmp_path / "token").write_text("another-token-altogether")
        refused = await run(
            "generate", "hi", *flags, "--token-file", str(tmp_path / "token"), token="correct-horse-battery"
        )
        assert refused.err.startswith("UNAUTHENTICATED")

    async def test_a_token_in_the_environment_bothers_no_command_that_has_no_use_for_it(
        self, model: Path
    ) -> None:
        for arguments in (
            ("tokenize", "ab", "--ids", "--model", str(model)),
            ("generate", "ab", "-q", "-n", "2", "--model", str(model)),
            ("info", "--model", str(model)),
        ):
            result = await run(*arguments, token="correct-horse-battery")
            assert result.code == 0, result.err
            assert "correct-horse" not in result.out + result.err

    async def test_a_variable_without_a_token(self, guarded: Harness) -> None:
        result = await run("health", "--address", guarded.target, token="two\nlines")
        assert result.code == 2
        assert "PHOTON_TOKEN: holds no token" in result.err
        assert "two" not in result.err

    async def test_without_one_the_server_refuses(self, guarded: Harness) -> None:
        result = await run("generate", "hi", "--address", guarded.target)
        assert result.code == 1
        assert result.err.startswith("UNAUTHENTICATED (UNAUTHENTICATED): ")

    @pytest.mark.parametrize("content", [b"", b" \n", b"two\nlines", b"\xff\xfe"])
    async def test_a_file_without_a_token(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "token").write_bytes(content)
        result = await run("health", "--token-file", str(tmp_path / "token"))
        assert result.code == 2
        assert "holds no token" in result.err


class TestOverTls:
    AUTHORITY = Authority("photon test authority")

    @pytest.fixture
    async def files(self, tmp_path: Path) -> AsyncIterator[tuple[str, ...]]:
        """A server that wants client certificates: its address, and the flags that satisfy it."""
        certificate, key = self.AUTHORITY.issue().write(tmp_path, "server")
        own = self.AUTHORITY.issue(for_client=True).write(tmp_path, "client")
        ca = tmp_path / "ca.crt"
        ca.write_bytes(self.AUTHORITY.pem)
        tls = TlsOptions(str(certificate), str(key), str(ca), require_client_cert=True)
        async with running_server(FakeFrontDoor(), replace(quick_options(), tls=tls)) as harness:
            flags = ("--tls-ca", str(ca), "--tls-cert", str(own[0]), "--tls-key", str(own[1]))
            yield ("--address", harness.target, *flags)

    async def test_every_command_that_calls(self, files: tuple[str, ...]) -> None:
        assert (await run("generate", "hi", "-q", *files)).out == " tok tok tok\n"
        assert (await run("chat", "-q", *files, stdin=b"hi\n")).out.strip() == "tok tok tok"
        assert (await run("tokenize", "ab", "--ids", *files)).code == 0
        assert (await run("bench", "-c", "1", "-r", "1", *files)).code == 0
        assert "serves" in (await run("health", *files)).out

    async def test_without_a_certificate_or_in_plaintext_there_is_no_answer(
        self, files: tuple[str, ...]
    ) -> None:
        for flags in (files[:4], files[:2]):
            result = await run("generate", "hi", *flags)
            assert (result.code, result.out.strip()) == (1, "")
            assert result.err.startswith("UNAVAILABLE")
            assert (await run("health", *flags)).code == 1

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--tls-ca", "absent.crt"), "--tls-ca absent.crt: No such file"),
            (("--tls-cert", "a", "--tls-key", "b"), "need --tls-ca"),
            (("--tls-ca", "a", "--tls-cert", "b"), "go together"),
        ],
    )
    async def test_flags_that_do_not_fit(self, flags: Sequence[str], words: str) -> None:
        result = await run("health", *flags)
        assert result.code == 2
        assert words in result.err

    async def test_tls_without_an_address_is_refused(self, files: tuple[str, ...], model: Path) -> None:
        result = await run("generate", "hi", "--model", str(model), *files[2:4])
        assert result.code == 2
        assert "no effect without --address" in result.err

    async def test_an_operator_from_afar_shows_a_certificate_and_a_token(self, tmp_path: Path) -> None:
        certificate, key = self.AUTHORITY.issue().write(tmp_path, "server")
        own = self.AUTHORITY.issue(for_client=True).write(tmp_path, "client")
        ca, callers, token = tmp_path / "ca.crt", tmp_path / "callers", tmp_path / "token"
        ca.write_bytes(self.AUTHORITY.pem)
        callers.write_text("oncall control,inspect token:correct-horse-battery\n")
        token.write_text("correct-horse-battery\n")
        options = replace(
            quick_options({"admin_host": "0.0.0.0"}),
            tls=TlsOptions(str(certificate), str(key), str(ca), require_client_cert=True),
            auth=AuthOptions(str(callers)),
        )
        async with running_server(FakeFrontDoor(), options) as harness:
            admin = f"127.0.0.1:{harness.ports.admin}"
            flags = ("-a", admin, "--tls-ca", str(ca), "--tls-cert", str(own[0]), "--tls-key", str(own[1]))
            refused = await run("drain", *flags)
            assert (refused.code, refused.err[:15]) == (1, "UNAUTHENTICATED")
            flags = (*flags, "--token-file", str(token))
            assert (await run("flush-cache", *flags)).out == "7 blocks freed\n"
            assert (await run("drain", *flags)).out == f"{admin} drains, 0 in flight\n"
            watching = await start("watch", *flags)
            assert watching.stdout is not None
            assert b"draining" in (await watching.stdout.readline()).lower()
            await harness.server.stop()
            await watching.communicate()


class TestBatch:
    LINES = b'{"id": "a", "text": "one"}\n\n{"text": "two", "max_tokens": 5}\n{"id": "c", "text": "three"}\n'

    async def test_every_line_gets_its_answer(self, server: Harness, door: FakeFrontDoor) -> None:
        arguments = ("--address", server.target, "--size", "2", "--temperature", "0", "--seed", "7")
        result = await run("batch", *arguments, stdin=self.LINES)
        assert result.code == 0, result.err
        answers = {line["item"]: line for line in map(json.loads, result.out.splitlines())}
        assert sorted(answers) == [0, 1, 2]
        assert [answers[item].get("id") for item in range(3)] == ["a", None, "c"]
        assert {line["text"] for line in answers.values()} == {" tok tok tok"}
        assert answers[0]["output_tokens"] == 3
        ran = {request.prompt: request for request in door.requests}
        assert [ran[prompt].stop.max_tokens for prompt in ("one", "two", "three")] == [256, 5, 256]
        assert {(r.sampling.temperature, r.sampling.seed) for r in ran.values()} == {(0.0, 7)}
        # Two calls: the last line is the first of its own.
        assert [r.request_id.rpartition(".")[2] for r in ran.values()] == ["0", "1", "0"]

    async def test_a_file_and_no_file(self, server: Harness, tmp_path: Path) -> None:
        file = tmp_path / "requests.jsonl"
        file.write_bytes(self.LINES)
        result = await run("batch", str(file), "--address", server.target)
        assert (result.code, len(result.out.splitlines())) == (0, 3)
        missing = await run("batch", str(tmp_path / "none"), "--address", server.target)
        assert missing.code == 2
        assert "No such file" in missing.err

    async def test_an_item_that_the_server_refuses(self, server: Harness, door: FakeFrontDoor) -> None:
        door.script = Script(error=OverloadedError("the queue is full", retry_after_s=1.0))
        result = await run("batch", "--address", server.target, stdin=self.LINES)
        assert result.code == 1
        lines = [json.loads(line) for line in result.out.splitlines()]
        assert [line["error"]["reason"] for line in lines] == ["OVERLOADED"] * 3
        assert "3 of 3 requests failed" in result.err

    @pytest.mark.parametrize(
        ("stdin", "words"), [(b'{"text": 3}\n', "line 1.text"), (b"\xff\n", "not valid UTF-8")]
    )
    async def test_what_is_no_request_is_refused_before_any_call(
        self, server: Harness, door: FakeFrontDoor, stdin: bytes, words: str
    ) -> None:
        result = await run("batch", "--address", server.target, stdin=self.LINES + stdin)
        assert result.code in (1, 2)
        assert words.replace("line 1", "line 5") in result.err
        assert not door.requests
