"""Settings: the order of the sources, and that nothing wrong gets past the start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from photon_grpc.config import (
    CHOICES,
    RANGES,
    Override,
    known_fields,
    load_options,
    parse_assignment,
    token_from_environment,
)
from photon_grpc.errors import ConfigError
from photon_grpc.options import Options, describe


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("PHOTON_"):
            monkeypatch.delenv(name)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "photon.toml"
    path.write_text(text)
    return path


def refusal(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_options(**{"require_model": False, **arguments})  # type: ignore[arg-type]
    return caught.value.message


def test_defaults_are_those_of_the_options() -> None:
    assert load_options(require_model=False) == Options()


def test_each_source_overrides_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "[server]\nport = 1001\nadmin_port = 1002\nmetrics_port = 1003\n")
    monkeypatch.setenv("PHOTON_SERVER__ADMIN_PORT", "2002")
    monkeypatch.setenv("PHOTON_SERVER__METRICS_PORT", "2003")
    flag = Override("server.metrics_port", 3003, "--metrics-port")
    server = load_options(config_file=file, overrides=[flag], require_model=False).server
    assert (server.port, server.admin_port, server.metrics_port) == (1001, 2002, 3003)
    assert server.probe_port == Options().server.probe_port


def test_the_last_flag_wins() -> None:
    flags = [Override("server.port", 1, "--port"), parse_assignment("server.port=2")]
    assert load_options(overrides=flags, require_model=False).server.port == 2


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTON_CONFIG", str(write(tmp_path, "[server]\nport = 7\n")))
    assert load_options(require_model=False).server.port == 7
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 8\n")
    assert load_options(config_file=other, require_model=False).server.port == 8


@pytest.mark.parametrize(("path", "kind"), known_fields().items())
def test_every_field_can_be_set_from_every_source(
    path: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, name = path.split(".")
    default = getattr(getattr(Options(), section), name)
    spelled = json.dumps(default)  # JSON scalars are TOML scalars
    file = write(tmp_path, f"[{section}]\n{name} = {spelled}\n")
    assert load_options(config_file=file, require_model=False) == Options()
    text = default if kind is str else spelled
    monkeypatch.setenv(f"PHOTON_{section}__{name}".upper(), text)
    assert load_options(require_model=False) == Options()
    monkeypatch.undo()
    assert load_options(overrides=[parse_assignment(f"{path}={text}")], require_model=False) == Options()


def test_every_field_is_either_free_or_bounded() -> None:
    fields = known_fields()
    numbers = {path for path, kind in fields.items() if kind in (int, float)}
    assert set(RANGES) == numbers
    assert {fields[path] for path in CHOICES} == {str}
    assert set(fields.values()) <= {int, float, bool, str}


@pytest.mark.parametrize("text", ["2GiB", "2 GiB", "2147483648", "2048MiB"])
def test_sizes_may_carry_a_unit(text: str, tmp_path: Path) -> None:
    overrides = [parse_assignment(f"cache.kv_cache_memory_bytes={text}")]
    value = load_options(overrides=overrides, require_model=False).cache.kv_cache_memory_bytes
    assert value == 2 << 30
    assert type(value) is int
    file = write(tmp_path, f'[cache]\nkv_cache_memory_bytes = "{text}"\n')
    assert load_options(config_file=file, require_model=False).cache.kv_cache_memory_bytes == 2 << 30


class TestUnknownKeys:
    def test_in_the_file(self, tmp_path: Path) -> None:
        message = refusal(config_file=write(tmp_path, "[server]\nprot = 1\n"))
        assert "server.prot: no such setting" in message
        assert "photon.toml" in message
        assert "did you mean server.port" in message

    def test_a_section_in_the_file(self, tmp_path: Path) -> None:
        assert "servre: no such setting" in refusal(config_file=write(tmp_path, "[servre]\nport = 1\n"))

    def test_a_top_level_key_in_the_file(self, tmp_path: Path) -> None:
        assert "port: no such setting" in refusal(config_file=write(tmp_path, "port = 1\n"))

    @pytest.mark.parametrize("path", ["server.prot", "servre.port"])
    def test_on_the_command_line(self, path: str) -> None:
        message = refusal(overrides=[parse_assignment(f"{path}=1")])
        assert "no such setting (from --set" in message

    @pytest.mark.parametrize(
        "name",
        ["PHOTON_SERVRE__PORT", "PHOTON_SERVER__PROT", "PHOTON_SERVER_PORT", "PHOTON_SERVER", "PHOTON_PORT"],
    )
    def test_in_the_environment(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "1")
        assert f"{name}: no such setting" in refusal()

    def test_other_programs_variables_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PHOTONICS_LAB", "1")
        assert load_options(require_model=False) == Options()


class TestErrorsNameTheSource:
    def test_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, '[server]\nport = "abc"\n')
        message = refusal(config_file=file)
        assert "server.port = 'abc'" in message
        assert str(file) in message

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PHOTON_SERVER__PORT", "abc")
        assert "server.port = 'abc' (from PHOTON_SERVER__PORT)" in refusal()

    def test_flag_over_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PHOTON_SERVER__PORT", "1")
        assert "(from --port)" in refusal(overrides=[Override("server.port", "abc", "--port")])

    def test_several_at_once(self) -> None:
        flags = [parse_assignment("server.port=x"), parse_assignment("cache.block_size=0")]
        message = refusal(overrides=flags)
        assert "server.port" in message
        assert "cache.block_size" in message


def test_a_stated_budget_must_let_every_stated_row_decode() -> None:
    budget = parse_assignment("scheduler.max_num_batched_tokens=63")
    message = refusal(overrides=[parse_assignment("scheduler.max_num_seqs=64"), budget])
    assert "scheduler.max_num_batched_tokens = 63" in message


@pytest.mark.parametrize(
    "assignment",
    [
        "cache.block_size=0",
        "cache.block_size=257",
        "cache.free_memory_fraction=0",
        "cache.free_memory_fraction=1.01",
        "cache.free_memory_fraction=nan",
        "cache.gpu_memory_utilization=0",
        "cache.gpu_memory_utilization=1.01",
        "cache.kv_cache_memory_bytes=-1",
        "cache.kv_cache_memory_bytes=2 sheep",
        "cache.prefix_caching=maybe",
        "model.dtype=int8",
        "model.backend=tpu",
        "model.max_model_len=1",
        "scheduler.max_num_seqs=-1",
        "scheduler.max_num_batched_tokens=-1",
        "scheduler.mixed_chunk_tokens=-1",
        "server.port=65536",
        "server.port=-1",
        "server.admin_port=-2",
        "server.port=50053",
        "server.keepalive_time_s=inf",
        "server.reflection=yes",
        "server.host=0.0.0.0",
        "server.host=example",
        "server.admin_host=0.0.0.0",
        "tls.cert_file=server.crt",
        "tls.key_file=server.key",
        "tls.client_ca_file=ca.crt",
        "tls.require_client_cert=true",
        "limits.default_deadline_s=901",
        "limits.max_text_bytes=2MiB",
        "telemetry.log_level=loud",
        "telemetry.otlp_endpoint=collector:4317",
    ],
)
def test_values_out_of_range_are_refused(assignment: str) -> None:
    assert assignment.split("=")[0] in refusal(overrides=[parse_assignment(assignment)])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_leave(host: str) -> None:
    assert load_options(overrides=[parse_assignment(f"server.host={host}")], require_model=False)


def test_plaintext_off_loopback_on_request() -> None:
    flags = [parse_assignment("server.host=0.0.0.0"), parse_assignment("server.allow_plaintext=true")]
    assert load_options(overrides=flags, require_model=False).server.host == "0.0.0.0"


def test_tls_off_loopback() -> None:
    pair = [parse_assignment("tls.cert_file=server.crt"), parse_assignment("tls.key_file=server.key")]
    everywhere = parse_assignment("server.host=0.0.0.0")
    assert load_options(overrides=[*pair, everywhere], require_model=False).server.host == "0.0.0.0"
    admin = [*pair, parse_assignment("server.admin_host=0.0.0.0")]
    assert "server.admin_host = '0.0.0.0'" in refusal(overrides=admin)
    client_ca = parse_assignment("tls.client_ca_file=ca.crt")
    assert "server.admin_host = '0.0.0.0'" in refusal(overrides=[*admin, client_ca])
    callers = parse_assignment("auth.callers_file=callers")
    assert (
        load_options(overrides=[*admin, client_ca, callers], require_model=False).server.admin_host
        == "0.0.0.0"
    )
    assert "tls.client_ca_file = 'ca.crt'" in refusal(overrides=[*pair, client_ca])


def test_the_client_s_token_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTON_TOKEN", "correct-horse-battery")
    assert load_options(require_model=False) == Options()
    assert token_from_environment() == "correct-horse-battery"
    monkeypatch.setenv("PHOTON_TOKENS", "x")
    assert "PHOTON_TOKENS: no such setting" in refusal()
    monkeypatch.delenv("PHOTON_TOKENS")
    monkeypatch.delenv("PHOTON_TOKEN")
    assert token_from_environment() == ""


def test_a_trusted_hop_is_a_caller_of_the_file() -> None:
    hops = parse_assignment("auth.trusted_hops=gateway")
    assert "auth.trusted_hops = 'gateway'" in refusal(overrides=[hops])
    callers = parse_assignment("auth.callers_file=callers")
    assert load_options(overrides=[hops, callers], require_model=False).auth.trusted_hops == "gateway"


def test_a_boolean_is_no_number(tmp_path: Path) -> None:
    assert "server.port = True" in refusal(config_file=write(tmp_path, "[server]\nport = true\n"))


def test_two_free_ports_do_not_collide() -> None:
    flags = [parse_assignment(f"server.{name}=0") for name in ("port", "admin_port", "metrics_port")]
    assert load_options(overrides=flags, require_model=False).server.admin_port == 0


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert "no such file" in refusal(config_file=tmp_path / "absent.toml")


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    assert "not valid TOML" in refusal(config_file=write(tmp_path, "[server\n"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal(config_file=binary)


def test_a_section_must_be_a_table(tmp_path: Path) -> None:
    assert "server = 3" in refusal(config_file=write(tmp_path, "server = 3\n"))


@pytest.mark.parametrize("text", ["server.port", "port=1", "a.b.c=1", "=1"])
def test_assignments_must_be_whole(text: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_assignment(text)


def test_the_model_is_required() -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_options()


def test_every_field_is_described() -> None:
    for section in known_fields():
        name = section.split(".")[0]
        for field, _, text in describe(type(getattr(Options(), name))):
            assert text, field
