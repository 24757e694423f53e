"""Where settings come from and what they may be; the only reader of the environment.

Defaults < TOML file < `PHOTON_SECTION__FIELD` variables < flags, merged field by field and checked
once. The names and defaults are those of `options.py`; here are the ranges. An unknown key stops the
start wherever it comes from, because a mistyped option that is silently ignored is found in
production. Every error is a ConfigError that names the field, the value and the source.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from photon_grpc.errors import ConfigError
from photon_grpc.options import Options

ENV_PREFIX = "PHOTON_"
CONFIG_VARIABLE = "PHOTON_CONFIG"
# What the commands that call a server send as a bearer token; no setting, and a server does nothing with it.
TOKEN_VARIABLE = "PHOTON_TOKEN"

_POSITIVE = Field(gt=0)
_AT_LEAST_ZERO = Field(ge=0)
_OPTIONAL_PORT = Field(ge=-1, le=65535)

# The choices of each enumerated field and the range of each number; a field in neither is free text
# or a flag. A test holds this table and options.py together.
CHOICES: Mapping[str, Any] = {
    "model.dtype": Literal["auto", "float32", "bfloat16", "float16"],
    "model.backend": Literal["auto", "cpu", "cuda"],
    "model.load_format": Literal["safetensors", "random"],
    "engine.process": Literal["auto", "own", "shared"],
    "server.reflection": Literal["admin", "public", "off"],
    "telemetry.log_level": Literal["debug", "info", "warning", "error"],
    "telemetry.log_format": Literal["auto", "json", "console"],
}
RANGES: Mapping[str, Any] = {
    "model.max_model_len": _AT_LEAST_ZERO,
    "cache.block_size": Field(ge=1, le=256),
    "cache.kv_cache_memory_bytes": _AT_LEAST_ZERO,
    "cache.free_memory_fraction": Field(gt=0, le=1),
    "cache.max_kv_cache_bytes": _POSITIVE,
    "cache.gpu_memory_utilization": Field(gt=0, le=1),
    "scheduler.max_num_seqs": _AT_LEAST_ZERO,
    "scheduler.max_num_batched_tokens": _AT_LEAST_ZERO,
    "scheduler.mixed_chunk_tokens": _AT_LEAST_ZERO,
    "scheduler.priority_boost_s": _AT_LEAST_ZERO,
    "engine.num_threads": _AT_LEAST_ZERO,
    "engine.step_timeout_s": _AT_LEAST_ZERO,
    "server.port": Field(ge=0, le=65535),
    "server.admin_port": _OPTIONAL_PORT,
    "server.probe_port": _OPTIONAL_PORT,
    "server.metrics_port": _OPTIONAL_PORT,
    "server.keepalive_time_s": _POSITIVE,
    "server.keepalive_timeout_s": _POSITIVE,
    "server.min_ping_interval_s": _POSITIVE,
    "server.max_connection_age_s": _POSITIVE,
    "server.max_connections": _POSITIVE,
    "server.handshake_timeout_s": _POSITIVE,
    "server.drain_propagation_s": _AT_LEAST_ZERO,
    "server.drain_max_s": _AT_LEAST_ZERO,
    "server.text_threads": _POSITIVE,
    "server.acceptors": Field(ge=-1, le=64),
    "limits.max_message_bytes": _POSITIVE,
    "limits.max_text_bytes": _POSITIVE,
    "limits.max_chat_messages": _POSITIVE,
    "limits.max_template_args_bytes": _POSITIVE,
    "limits.max_template_args_depth": _POSITIVE,
    "limits.max_stop_strings": _AT_LEAST_ZERO,
    "limits.max_stop_string_bytes": _POSITIVE,
    "limits.max_stop_token_ids": _AT_LEAST_ZERO,
    "limits.max_logit_bias": _AT_LEAST_ZERO,
    "limits.max_allowed_token_ids": _AT_LEAST_ZERO,
    "limits.max_n": _POSITIVE,
    "limits.max_top_logprobs": _AT_LEAST_ZERO,
    "limits.max_prompt_top_logprobs": _AT_LEAST_ZERO,
    "limits.max_request_id_chars": _POSITIVE,
    "limits.max_cache_salt_chars": _POSITIVE,
    "limits.max_priority": _AT_LEAST_ZERO,
    "limits.max_chunk_tokens": _POSITIVE,
    "limits.max_chunk_delay_s": _POSITIVE,
    "limits.max_queued_requests": _POSITIVE,
    "limits.max_queued_tokens": _POSITIVE,
    "limits.max_batch_items": _POSITIVE,
    "limits.max_batch_tokens": _POSITIVE,
    "limits.max_batch_concurrency": _POSITIVE,
    "limits.default_deadline_s": _POSITIVE,
    "limits.max_deadline_s": _POSITIVE,
    "limits.slow_consumer_timeout_s": _POSITIVE,
    "tenants.max_concurrent_requests": _AT_LEAST_ZERO,
    "tenants.requests_per_s": _AT_LEAST_ZERO,
    "tenants.request_burst": _POSITIVE,
    "tenants.tokens_per_s": _AT_LEAST_ZERO,
    "tenants.token_burst": _POSITIVE,
}


@dataclass(frozen=True, slots=True)
class Override:
    """One value of the command line: `path` is `section.field`, `flag` names it in errors."""

    path: str
    value: object
    flag: str


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )


def load_options(
    *,
    config_file: Path | None = None,
    overrides: Sequence[Override] = (),
    require_model: bool = True,
) -> Options:
    """Merge every source and check the result.

    `config_file` falls back to the file that PHOTON_CONFIG names. A relative `model.path` is relative
    to the working directory. Raises ConfigError.
    """
    from_flags = _tree(overrides)
    from_environment = _environment()
    file = config_file or _file_from_environment()
    from_file = _read_toml(file) if file is not None else {}
    origins = _Origins(file=file, file_values=from_file, env_values=from_environment, overrides=overrides)

    class Sourced(_SETTINGS):  # type: ignore[misc, valid-type]  # made by create_model
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, init_kwargs=from_flags),
                InitSettingsSource(settings_cls, init_kwargs=from_environment),
                InitSettingsSource(settings_cls, init_kwargs=from_file),
            )

    try:
        settings = Sourced()
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None
    options = _to_options(settings)
    problems = _cross_checks(options, origins)
    if require_model and not options.model.path:
        problems.append("model.path: missing; give --model DIR, or --model demo for the embedded model")
    if problems:
        raise ConfigError("; ".join(problems))
    return options


def known_fields() -> dict[str, type]:
    """Every `section.field` and its plain type, in the order of `options.py`."""
    return {
        f"{section}.{name}": hint
        for section, section_type in get_type_hints(Options).items()
        for name, hint in get_type_hints(section_type).items()
    }


def parse_assignment(text: str) -> Override:
    """`section.key=value`, as `--set` takes it. Raises ConfigError."""
    path, separator, value = text.partition("=")
    if not separator or path.count(".") != 1:
        raise ConfigError(f"--set {text!r}: expected section.key=value")
    return Override(path.strip(), value.strip(), f"--set {path.strip()}")


def _refuse_bool(value: object) -> object:
    # Lax validation takes True for 1; in a file that is a mistake, and in text it cannot occur.
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


def _section_model(section: str, section_type: type) -> type[BaseModel]:
    hints = get_type_hints(section_type)
    members: dict[str, Any] = {}
    for field in dataclasses.fields(section_type):
        path = f"{section}.{field.name}"
        annotation: Any = CHOICES.get(path, hints[field.name])
        if path in RANGES:
            if field.name.endswith("_bytes"):
                annotation = ByteSize
            annotation = Annotated[annotation, BeforeValidator(_refuse_bool), RANGES[path]]
        if annotation is float or hints[field.name] is float:
            annotation = Annotated[annotation, Field(allow_inf_nan=False)]
        members[field.name] = (annotation, field.default)
    config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    return create_model(section_type.__name__, __config__=config, **members)


def _settings_model() -> type[_Settings]:
    members: dict[str, Any] = {}
    for section, section_type in get_type_hints(Options).items():
        model = _section_model(section, section_type)
        members[section] = (model, Field(default_factory=model))
    return create_model("Settings", __base__=_Settings, **members)


_SETTINGS = _settings_model()


def _to_options(settings: BaseSettings) -> Options:
    sections: dict[str, Any] = {}
    for section, section_type in get_type_hints(Options).items():
        values = getattr(settings, section).model_dump()
        plain = {name: int(value) if isinstance(value, ByteSize) else value for name, value in values.items()}
        sections[section] = section_type(**plain)
    return Options(**sections)


def _tree(overrides: Sequence[Override]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        section, _, name = override.path.partition(".")
        tree.setdefault(section, {})[name] = override.value
    return tree


def _environment() -> dict[str, Any]:
    """The `PHOTON_*` variables as a tree.

    pydantic-settings refuses an unknown key inside a section and silently ignores a variable that
    names no section, so the names are checked here first.
    """
    known = {f"{ENV_PREFIX}{path.replace('.', '__')}".upper(): path for path in known_fields()}
    for variable in os.environ:
        upper = variable.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known or upper in (CONFIG_VARIABLE, TOKEN_VARIABLE):
            continue
        raise ConfigError(f"{variable}: no such setting{_suggest(upper, list(known))}")
    return dict(EnvSettingsSource(_SETTINGS)())


def token_from_environment() -> str:
    """What PHOTON_TOKEN holds; empty where it is not set."""
    return os.environ.get(TOKEN_VARIABLE, "")


def _file_from_environment() -> Path | None:
    name = os.environ.get(CONFIG_VARIABLE)
    return Path(name) if name else None


def _read_toml(file: Path) -> dict[str, Any]:
    # The library treats a missing file as an empty one.
    if not file.is_file():
        raise ConfigError(f"configuration file {file}: no such file")
    try:
        return dict(TomlConfigSettingsSource(_SETTINGS, file)())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"configuration file {file}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Origins:
    """Which source the effective value of a field came from."""

    file: Path | None
    file_values: Mapping[str, Any]
    env_values: Mapping[str, Any]
    overrides: Sequence[Override]

    def of(self, path: str) -> str:
        """How a reader finds the place to correct, for a `section.field` or a bare section."""
        for override in reversed(self.overrides):
            if path in (override.path, override.path.partition(".")[0]):
                return f" (from {override.flag})"
        section, _, name = path.partition(".")
        if name in _mapping(self.env_values.get(section)):
            return f" (from {ENV_PREFIX}{section.upper()}__{name.upper()})"
        if section in self.file_values and (not name or name in _mapping(self.file_values[section])):
            return f" (from {self.file})"
        return ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _suggest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _explain(error: ValidationError, origins: _Origins) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"][:2])
        source = origins.of(path)
        if problem["type"] == "extra_forbidden":
            known = list(known_fields()) if "." in path else list(get_type_hints(Options))
            lines.append(f"{path}: no such setting{source}{_suggest(path, known)}")
        else:
            rule = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path} = {problem['input']!r}{source}: {rule}")
    return "; ".join(lines)


def _cross_checks(options: Options, origins: _Origins) -> list[str]:
    problems: list[str] = []

    def refuse(path: str, rule: str) -> None:
        section, _, name = path.partition(".")
        value = getattr(getattr(options, section), name)
        problems.append(f"{path} = {value!r}{origins.of(path)}: {rule}")

    scheduler, server, tls, limits = options.scheduler, options.server, options.tls, options.limits
    if 0 < scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        refuse(
            "scheduler.max_num_batched_tokens",
            f"must be at least scheduler.max_num_seqs ({scheduler.max_num_seqs}), "
            "or not every running sequence could decode in one step",
        )
    if options.model.max_model_len == 1:
        refuse("model.max_model_len", "must leave room for a prompt token and an output token")
    if limits.default_deadline_s > limits.max_deadline_s:
        refuse(
            "limits.default_deadline_s", f"must not exceed limits.max_deadline_s ({limits.max_deadline_s})"
        )
    if limits.max_text_bytes > limits.max_message_bytes:
        refuse(
            "limits.max_text_bytes", f"must not exceed limits.max_message_bytes ({limits.max_message_bytes})"
        )
    admin_is_exposed = server.admin_port >= 0 and not _is_loopback(server.admin_host)
    if admin_is_exposed and not (tls.client_ca_file and options.auth.callers_file):
        refuse(
            "server.admin_host",
            "off loopback it needs tls.client_ca_file, and auth.callers_file for its roles",
        )
    if options.auth.trusted_hops and not options.auth.callers_file:
        refuse("auth.trusted_hops", "needs auth.callers_file, which names callers")
    if not _is_loopback(server.host) and not tls.cert_file and not server.allow_plaintext:
        refuse("server.host", "off loopback it needs tls.cert_file, or server.allow_plaintext")
    if bool(tls.cert_file) != bool(tls.key_file):
        refuse("tls.cert_file" if tls.cert_file else "tls.key_file", "certificate and key go together")
    if tls.client_ca_file and not tls.cert_file:
        refuse("tls.client_ca_file", "needs tls.cert_file: without TLS no client shows a certificate")
    elif tls.client_ca_file and not tls.require_client_cert and not admin_is_exposed:
        refuse("tls.client_ca_file", "has no effect without tls.require_client_cert")
    if tls.require_client_cert and not tls.client_ca_file:
        refuse("tls.require_client_cert", "needs tls.client_ca_file")
    otlp_endpoint = options.telemetry.otlp_endpoint
    if otlp_endpoint and not otlp_endpoint.startswith(("http://", "https://")):
        refuse("telemetry.otlp_endpoint", "must begin with http:// or https://")
    listeners = [("server.port", server.port), ("server.admin_port", server.admin_port)]
    listeners += [("server.probe_port", server.probe_port), ("server.metrics_port", server.metrics_port)]
    for position, (path, port) in enumerate(listeners):
        for other, other_port in listeners[:position]:
            if port > 0 and port == other_port:
                refuse(path, f"is also {other}")
    return problems


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
