"""Settings as frozen dataclasses, one per section; standard library only.

`config.py` composes them from a TOML file, `PHOTON_*` variables and flags, and checks them. Here are
only names, defaults and one-line descriptions (`help` in the field metadata; README's settings table
is generated from it). Units stand in the names: `_s` seconds, `_bytes` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _opt(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    path: str = _opt("", "model folder with config.json and safetensors; `demo` is the embedded model")
    served_name: str = _opt("", "name that requests may use; empty: the folder's name")
    dtype: str = _opt("auto", "auto, float32, bfloat16 or float16; auto is float32 on the CPU")
    backend: str = _opt("auto", "auto, cpu or cuda; auto takes a GPU where there is one")
    load_format: str = _opt(
        "safetensors", "safetensors, or random: weights drawn by chance, for benchmarks only"
    )
    max_model_len: int = _opt(0, "longest prompt plus output in tokens; 0: what the model allows")


@dataclass(frozen=True, slots=True)
class KVCacheOptions:
    block_size: int = _opt(16, "tokens per KV block")
    kv_cache_memory_bytes: int = _opt(
        0, "KV pool size; 0: from free memory, up to a full batch of longest contexts"
    )
    free_memory_fraction: float = _opt(0.3, "CPU: share of free memory for the KV pool when no size is given")
    max_kv_cache_bytes: int = _opt(4 << 30, "CPU: upper bound on a pool sized from free memory")
    gpu_memory_utilization: float = _opt(
        0.9, "CUDA: share of the GPU's memory in use, by whomever, once a pool without a stated size is made"
    )
    prefix_caching: bool = _opt(True, "share KV blocks between requests with equal prefixes")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    max_num_seqs: int = _opt(0, "sequences that run at the same time; 0: 64 on the CPU, 256 on CUDA")
    max_num_batched_tokens: int = _opt(
        0, "tokens computed in one step, prefill and decode together; 0: 512 on the CPU, 2048 on CUDA"
    )
    mixed_chunk_tokens: int = _opt(
        0,
        "prompt tokens of a step beside sequences that decode already, as many again for each 128 of these, "
        "and more where more have come than those; 0: no such limit; 512 shortens pauses of some 64 streams "
        "on a GPU",
    )
    priority_boost_s: float = _opt(30.0, "one priority step counts as having arrived this much earlier")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    num_threads: int = _opt(0, "torch CPU threads; 0: one per physical core but one")
    warmup: bool = _opt(True, "generate a token before the server says SERVING")
    step_timeout_s: float = _opt(
        30.0, "a step that takes longer ends the engine; a full step may take 4 times as long; 0: no limit"
    )
    process: str = _opt("auto", "own or shared with the event loop; auto is own where a GPU may be used")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    host: str = _opt("127.0.0.1", "address of the public listener")
    port: int = _opt(50051, "port of the public listener; 0: a free one")
    admin_host: str = _opt(
        "127.0.0.1", "address of the admin listener; off loopback it needs client certificates"
    )
    admin_port: int = _opt(50053, "port of the admin listener; 0: a free one, -1: none")
    probe_host: str = _opt("0.0.0.0", "address of the health-only listener")
    probe_port: int = _opt(-1, "port of the health-only listener; 0: a free one, -1: none")
    metrics_host: str = _opt("127.0.0.1", "address of the Prometheus endpoint")
    metrics_port: int = _opt(-1, "port of the Prometheus endpoint; 0: a free one, -1: none")
    reflection: str = _opt("admin", "where reflection is served: admin, public or off")
    allow_plaintext: bool = _opt(False, "allow a plaintext public listener off loopback")
    keepalive_time_s: float = _opt(20.0, "idle time before the server pings a client")
    keepalive_timeout_s: float = _opt(10.0, "time a client has to answer a ping")
    min_ping_interval_s: float = _opt(10.0, "client pings closer together than this end the connection")
    max_connection_age_s: float = _opt(1800.0, "age at which a connection is asked to reconnect")
    max_connections: int = _opt(
        4096, "connections that may be open at the same time; each acceptor takes its share of them"
    )
    handshake_timeout_s: float = _opt(10.0, "time a client has to finish its HTTP/2 handshake")
    drain_propagation_s: float = _opt(10.0, "time between NOT_SERVING and refusing new requests")
    drain_max_s: float = _opt(120.0, "time in-flight requests have to finish at shutdown")
    text_threads: int = _opt(2, "threads that tokenise and render chat templates")
    acceptors: int = _opt(
        0,
        "processes that take the public listener's connections; -1: none, the event loop does; 0: a quarter "
        "of the cores, at most 4, where the engine has a process of its own and there are 8 cores, else none",
    )


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """PEM files; looked at with each handshake, and read again when they changed."""

    cert_file: str = _opt("", "certificate chain of the public listener, and of an admin one off loopback")
    key_file: str = _opt("", "private key of tls.cert_file, without a password")
    client_ca_file: str = _opt("", "authorities whose client certificates are accepted")
    require_client_cert: bool = _opt(False, "refuse clients of the public listener without a certificate")


@dataclass(frozen=True, slots=True)
class AuthOptions:
    callers_file: str = _opt(
        "", "who may call and in which roles, one `name role[,role] credential` a line; empty: everybody"
    )
    trusted_hops: str = _opt(
        "", "callers, separated by commas, that may state photon-tenant and photon-priority in the metadata"
    )


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """What one request may ask for; `engine/validation.py` enforces them."""

    max_message_bytes: int = _opt(1 << 20, "largest request message")
    max_text_bytes: int = _opt(512 << 10, "UTF-8 bytes of text or chat content in all")
    max_chat_messages: int = _opt(256, "messages in a chat")
    max_template_args_bytes: int = _opt(16 << 10, "size of chat.template_args as JSON")
    max_template_args_depth: int = _opt(8, "nesting of chat.template_args")
    max_stop_strings: int = _opt(16, "stop strings")
    max_stop_string_bytes: int = _opt(128, "UTF-8 bytes of one stop string")
    max_stop_token_ids: int = _opt(64, "stop token ids")
    max_logit_bias: int = _opt(300, "entries of logit_bias")
    max_allowed_token_ids: int = _opt(1024, "entries of allowed_token_ids")
    max_n: int = _opt(8, "completions of one prompt")
    max_top_logprobs: int = _opt(20, "alternatives per output token")
    max_prompt_top_logprobs: int = _opt(20, "alternatives per prompt token")
    max_request_id_chars: int = _opt(128, "characters of a request_id")
    max_cache_salt_chars: int = _opt(64, "characters of a cache_salt")
    max_priority: int = _opt(9, "highest priority")
    max_chunk_tokens: int = _opt(256, "chunk_policy.max_tokens")
    max_chunk_delay_s: float = _opt(1.0, "chunk_policy.max_delay")
    max_queued_requests: int = _opt(
        1024, "completions waiting for a place in the batch; twice as many of several tenants"
    )
    max_queued_tokens: int = _opt(
        1 << 20, "prompt tokens of requests whose first token has not come; twice as many of several tenants"
    )
    max_batch_items: int = _opt(128, "specs of one BatchGenerate")
    max_batch_tokens: int = _opt(1 << 20, "prompts and max_tokens of one BatchGenerate in all")
    max_batch_concurrency: int = _opt(32, "specs of one BatchGenerate that run at the same time")
    default_deadline_s: float = _opt(300.0, "deadline of a call that brings none")
    max_deadline_s: float = _opt(900.0, "longest that any call may run")
    slow_consumer_timeout_s: float = _opt(30.0, "a single write pending for longer ends the call")


@dataclass(frozen=True, slots=True)
class TenantOptions:
    """What each tenant may use; `frontend/tenants.py` keeps the books. 0 is no limit."""

    file: str = _opt("", "TOML with weights, quotas and caps of single tenants; empty: all are equal")
    max_concurrent_requests: int = _opt(0, "generations of one tenant at the same time; 0: any number")
    requests_per_s: float = _opt(0.0, "generations of one tenant per second; 0: any number")
    request_burst: int = _opt(100, "generations that a tenant who was idle may begin at once")
    tokens_per_s: float = _opt(0.0, "prompt and output tokens of one tenant per second; 0: any number")
    token_burst: int = _opt(1 << 20, "tokens that an idle tenant may use at once; no request gets more")


@dataclass(frozen=True, slots=True)
class TelemetryOptions:
    log_level: str = _opt("info", "debug, info, warning or error")
    log_format: str = _opt("auto", "json, console or auto (console on a terminal)")
    otlp_endpoint: str = _opt(
        "", "collector that gets spans and metrics by OTLP/gRPC, as http://HOST:4317; empty: none"
    )


@dataclass(frozen=True, slots=True)
class Options:
    """All sections, as `app.py` takes them."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: KVCacheOptions = field(default_factory=KVCacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    tls: TlsOptions = field(default_factory=TlsOptions)
    auth: AuthOptions = field(default_factory=AuthOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    tenants: TenantOptions = field(default_factory=TenantOptions)
    telemetry: TelemetryOptions = field(default_factory=TelemetryOptions)


def describe(section: type) -> list[tuple[str, Any, str]]:
    """`(name, default, help)` of each field of a section dataclass, for tables and flags."""
    return [(f.name, f.default, f.metadata["help"]) for f in fields(section)]
