"""The `photon-grpc` command. Turns flags into settings and settings into calls; owns no logic.

Generated text goes to standard output and everything else to standard error, so that output can be
piped. Exit codes: 0 done, 1 a request failed, 2 the command or the settings are wrong or the model
cannot be loaded, 130 interrupted. Runs on the main thread.

`app`, `llm` and what imports torch are imported by the commands that need them: help and calls to a
running server answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from photon_grpc import __version__
from photon_grpc.batch_file import chunks, read_entries, render
from photon_grpc.bench import LoadReport, percentile, run_load
from photon_grpc.client import CallError, Client, ControlClient, Ending, Request, ServerState, Tls, Tokens
from photon_grpc.config import (
    TOKEN_VARIABLE,
    Override,
    load_options,
    parse_assignment,
    token_from_environment,
)
from photon_grpc.errors import ConfigError, PhotonError, RequestError, StartupError
from photon_grpc.options import Options
from photon_grpc.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from photon_grpc.engine.process import SpawnedChild

__all__ = ["app", "main"]

DEFAULT_MAX_TOKENS = 256
INTERRUPTED = 130
# Half of what a server takes as one message.
_MAX_BATCH_BYTES = 512 << 10

app = typer.Typer(
    name="photon-grpc",
    help="A gRPC inference microservice for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_err = Console(stderr=True)
_out = Console()

# The setting behind each flag. A value of None means that the flag was not given.
_FLAGS = {
    "model": ("model.path", "--model"),
    "dtype": ("model.dtype", "--dtype"),
    "backend": ("model.backend", "--backend"),
    "max_model_len": ("model.max_model_len", "--max-model-len"),
    "kv_cache_memory": ("cache.kv_cache_memory_bytes", "--kv-cache-memory"),
    "gpu_memory_utilization": ("cache.gpu_memory_utilization", "--gpu-memory-utilization"),
    "prefix_caching": ("cache.prefix_caching", "--no-prefix-caching"),
    "max_num_seqs": ("scheduler.max_num_seqs", "--max-num-seqs"),
    "host": ("server.host", "--host"),
    "port": ("server.port", "--port"),
    "reflection": ("server.reflection", "--dev"),
}

_SETTINGS_PANEL = "Settings (others through --config, --set and PHOTON_* variables)"
_SAMPLING_PANEL = "Generation"
_CALL_PANEL = "Calls to a server"


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    """An option in a panel of its own in --help, whose default says nothing to a reader."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


ModelFlag = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="DIR", help="Model folder; `demo` is the embedded model.", show_default=False
    ),
]
AddressFlag = Annotated[
    str | None,
    typer.Option("--address", "-a", metavar="HOST:PORT", help="Call the server there.", show_default=False),
]
AdminAddressFlag = Annotated[
    str, typer.Option("--address", "-a", metavar="HOST:PORT", help="The server's admin listener.")
]
TlsCaFlag = Annotated[
    Path | None,
    _option(
        _CALL_PANEL,
        "--tls-ca",
        metavar="FILE",
        help="Call over TLS and believe servers of these authorities (PEM).",
    ),
]
TlsCertFlag = Annotated[
    Path | None,
    _option(_CALL_PANEL, "--tls-cert", metavar="FILE", help="Client certificate to show, with --tls-key."),
]
TokenFlag = Annotated[
    Path | None,
    _option(
        _CALL_PANEL,
        "--token-file",
        metavar="FILE",
        help="Send the bearer token in this file; else that of PHOTON_TOKEN.",
    ),
]
TlsKeyFlag = Annotated[
    Path | None,
    _option(_CALL_PANEL, "--tls-key", metavar="FILE", help="Private key of --tls-cert."),
]
DtypeFlag = Annotated[
    str | None,
    _option(_SETTINGS_PANEL, "--dtype", help="auto, float32, bfloat16 or float16."),
]
BackendFlag = Annotated[
    str | None,
    _option(_SETTINGS_PANEL, "--backend", help="auto, cpu or cuda."),
]
KVMemoryFlag = Annotated[
    str | None,
    _option(
        _SETTINGS_PANEL,
        "--kv-cache-memory",
        metavar="SIZE",
        help="Size of the KV pool, such as 2GiB; else a share of the free memory.",
    ),
]
GpuMemoryFlag = Annotated[
    float | None,
    _option(
        _SETTINGS_PANEL,
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="Share of the GPU's memory that is in use once the KV pool is made.",
    ),
]
MaxModelLenFlag = Annotated[
    int | None,
    _option(_SETTINGS_PANEL, "--max-model-len", help="Longest prompt plus output, in tokens."),
]
MaxNumSeqsFlag = Annotated[
    int | None,
    _option(_SETTINGS_PANEL, "--max-num-seqs", help="Sequences that run at the same time."),
]
PrefixCachingFlag = Annotated[
    bool | None,
    _option(
        _SETTINGS_PANEL,
        "--prefix-caching/--no-prefix-caching",
        help="Share KV blocks between requests with equal prefixes.",
    ),
]
ConfigFlag = Annotated[
    Path | None,
    _option(_SETTINGS_PANEL, "--config", metavar="FILE", help="TOML file of settings; also PHOTON_CONFIG."),
]
SetFlag = Annotated[
    list[str] | None,
    _option(
        _SETTINGS_PANEL,
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting of README's table; may be repeated.",
    ),
]
MaxTokensFlag = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Longest output.", rich_help_panel=_SAMPLING_PANEL)
]
TemperatureFlag = Annotated[
    float | None,
    _option(_SAMPLING_PANEL, "--temperature", "-t", help="0 is greedy; default: the model's own."),
]
TopPFlag = Annotated[
    float | None,
    _option(_SAMPLING_PANEL, "--top-p", help="Nucleus sampling."),
]
TopKFlag = Annotated[
    int | None,
    _option(_SAMPLING_PANEL, "--top-k", help="0 is off."),
]
SeedFlag = Annotated[
    int | None,
    _option(_SAMPLING_PANEL, "--seed", help="Equal seeds give equal tokens."),
]
StopFlag = Annotated[
    list[str] | None,
    _option(_SAMPLING_PANEL, "--stop", metavar="TEXT", help="End before this text; may be repeated."),
]
IgnoreEosFlag = Annotated[
    bool,
    _option(_SAMPLING_PANEL, "--ignore-eos", help="Go on past the end-of-sequence token."),
]


class TextSource(Protocol):
    """Where text comes from: a server, or the model in this process."""

    def stream(self, request: Request) -> Generator[str | Ending]: ...


@app.command(rich_help_panel="Serve")
def serve(
    context: typer.Context,
    model: ModelFlag = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on [127.0.0.1].", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", help="Port; 0 is a free one [50051].", show_default=False)
    ] = None,
    dev: Annotated[
        bool, typer.Option("--dev", help="Serve reflection on the public listener, for grpcurl.")
    ] = False,
    dtype: DtypeFlag = None,
    backend: BackendFlag = None,
    kv_cache_memory: KVMemoryFlag = None,
    gpu_memory_utilization: GpuMemoryFlag = None,
    max_num_seqs: MaxNumSeqsFlag = None,
    max_model_len: MaxModelLenFlag = None,
    prefix_caching: PrefixCachingFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Serve a model over gRPC until SIGTERM or Ctrl-C.

    Prints one line with the address to standard output once the model answers.
    """
    options = _load(
        config,
        assignments,
        model=model,
        dtype=dtype,
        backend=backend,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=prefix_caching,
        host=host,
        port=port,
        reflection="public" if dev else None,
    )
    configure_logging(options.telemetry)
    from photon_grpc.engine_place import early_engine

    with early_engine(options, context.obj) as engine:
        code = _serve(options, engine)
    raise typer.Exit(code)


def _serve(options: Options, engine: SpawnedChild | None) -> int:
    """Run the service; the exit code."""
    # With the engine's process under way, which takes longer than all of this.
    from photon_grpc.app import RunningService, run

    def announce(service: RunningService) -> None:
        loading.close()
        server, ports = options.server, service.ports
        places = {"admin": (server.admin_host, ports.admin), "probe": (server.probe_host, ports.probe)}
        places["metrics"] = (server.metrics_host, service.metrics_port)
        others = [f"{name} {host}:{port}" for name, (host, port) in places.items() if port is not None]
        also = f" ({', '.join(others)})" if others else ""
        print(f"serving {service.engine.model.name} at {server.host}:{ports.public}{also}", flush=True)

    with ExitStack() as loading:
        progress = loading.enter_context(_loading_bar())
        return run(options, ready=announce, progress=progress, spawned_engine=engine)


@app.command(rich_help_panel="Generate")
def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")
    ],
    model: ModelFlag = None,
    address: AddressFlag = None,
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    max_tokens: MaxTokensFlag = DEFAULT_MAX_TOKENS,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    seed: SeedFlag = None,
    stop: StopFlag = None,
    ignore_eos: IgnoreEosFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no figures.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    dtype: DtypeFlag = None,
    backend: BackendFlag = None,
    kv_cache_memory: KVMemoryFlag = None,
    max_model_len: MaxModelLenFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Continue a text, printed as it is generated: in this process (--model), or by a server (--address)."""
    text = _text(prompt)
    request = Request(
        text=text,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos or None,
    )
    with _source(
        address,
        _tls(tls_ca, tls_cert, tls_key),
        token_file,
        config,
        assignments,
        model=model,
        dtype=dtype,
        backend=backend,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
    ) as source:
        if echo:
            _write(text)
        ending, _ = _print_stream(source.stream(request))
    if ending is None:
        raise typer.Exit(INTERRUPTED)
    if not quiet:
        _print_ending(ending)


@app.command(rich_help_panel="Generate")
def chat(
    model: ModelFlag = None,
    address: AddressFlag = None,
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message to begin with.", show_default=False)
    ] = None,
    max_tokens: MaxTokensFlag = DEFAULT_MAX_TOKENS,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    seed: SeedFlag = None,
    stop: StopFlag = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no figures.")] = False,
    dtype: DtypeFlag = None,
    backend: BackendFlag = None,
    kv_cache_memory: KVMemoryFlag = None,
    max_model_len: MaxModelLenFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Talk to a model, one line per turn: in this process (--model), or through a server (--address).

    /reset forgets the conversation, /exit or the end of input leaves. Ctrl-C cuts an answer short.
    """
    beginning = [("system", system)] if system else []
    with _source(
        address,
        _tls(tls_ca, tls_cert, tls_key),
        token_file,
        config,
        assignments,
        model=model,
        dtype=dtype,
        backend=backend,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
    ) as source:
        messages = list(beginning)
        failed = False
        for line in _read_turns():
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(beginning)
                _err.print("[dim]The conversation begins anew.[/dim]")
                continue
            if line.startswith("/"):
                _err.print("[dim]/reset forgets the conversation, /exit leaves.[/dim]")
                continue
            request = Request(
                messages=(*messages, ("user", line)),
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=tuple(stop or ()),
            )
            try:
                ending, answer = _print_stream(source.stream(request))
            except (CallError, RequestError) as error:
                # A turn that failed is not part of the conversation; the next may succeed.
                _print_failure(error)
                failed = True
                continue
            messages += [("user", line), ("assistant", answer)]
            if ending is None:
                _err.print("[dim]cut short[/dim]")
            elif not quiet:
                _print_ending(ending)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel="Generate")
def batch(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Requests, one JSON object a line; - is standard input.")
    ] = "-",
    address: Annotated[
        str, typer.Option("--address", "-a", metavar="HOST:PORT", help="The server to call.")
    ] = "127.0.0.1:50051",
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    size: Annotated[int, typer.Option("--size", min=1, help="Requests of one call, at most.")] = 64,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0.001, help="Seconds a call may take; else the server's.", show_default=False
        ),
    ] = None,
    max_tokens: MaxTokensFlag = DEFAULT_MAX_TOKENS,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    seed: SeedFlag = None,
    stop: StopFlag = None,
    ignore_eos: IgnoreEosFlag = False,
) -> None:
    """Run many requests through a server; prints one JSON object a line for each, as they end.

    A line of FILE has `text` or `messages`, and may have `id`, which its answer repeats, max_tokens,
    temperature, top_p, top_k, seed, stop and ignore_eos; the flags are for lines that do not say. An answer
    has `item`, the number of the request from 0, and `text` or `error`. Exit code 1 if any failed.
    """
    default = Request(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos or None,
    )
    raw = sys.stdin.buffer.read() if file == "-" else _read_file("FILE", Path(file))
    try:
        # Not splitlines, which ends a line at separators that JSON may hold as they are.
        entries = read_entries(raw.decode().split("\n"), default)
    except UnicodeDecodeError:
        raise typer.BadParameter("the requests are not valid UTF-8") from None
    num_failed = 0
    with Client(address, tls=_tls(tls_ca, tls_cert, tls_key), token=_token(token_file)) as client:
        for chunk in chunks(entries, size, _MAX_BATCH_BYTES):
            requests = [entry.request for entry in chunk]
            with closing(client.batch(requests, timeout_s=timeout_s)) as answers:
                for answer in answers:
                    num_failed += answer.error is not None
                    _write(render(chunk[answer.item], answer) + "\n")
    if num_failed:
        _err.print(f"{num_failed} of {len(entries)} requests failed", style="red", highlight=False)
        raise typer.Exit(1)


@app.command(rich_help_panel="Inspect")
def tokenize(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text; - reads standard input.")],
    model: ModelFlag = None,
    address: AddressFlag = None,
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens/--no-special-tokens", help="Add what the model begins with.")
    ] = True,
    ids_only: Annotated[bool, typer.Option("--ids", help="Print the ids alone, on one line.")] = False,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Show how a text becomes tokens. Loads no weights."""
    text = _text(text)
    tls = _tls(tls_ca, tls_cert, tls_key)
    if address is None:
        _refuse_without_address(tls, token_file)
        from photon_grpc.engine_place import model_folder
        from photon_grpc.frontend.tokenizer import Tokenizer

        folder = model_folder(_load(config, assignments, model=model).model)
        tokenizer = Tokenizer.load(folder, spare_torch=True)
        ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=special_tokens)
        tokens = Tokens(ids, offsets)
    else:
        with Client(address, tls=tls, token=_token(token_file)) as client:
            tokens = client.tokenize(text, add_special_tokens=special_tokens)
    if ids_only:
        print(*tokens.ids)
        return
    encoded = text.encode()
    table = Table("id", "text", box=None)
    for token_id, (start, end) in zip(tokens.ids, tokens.offsets, strict=True):
        # A token may be a part of a character.
        table.add_row(str(token_id), Text(repr(encoded[start:end].decode(errors="replace"))))
    _out.print(table)
    _err.print(f"{len(tokens.ids)} tokens", style="dim")


@app.command(rich_help_panel="Inspect")
def info(
    model: ModelFlag = None,
    dtype: DtypeFlag = None,
    backend: BackendFlag = None,
    kv_cache_memory: KVMemoryFlag = None,
    max_model_len: MaxModelLenFlag = None,
    config: ConfigFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Describe a model folder and what of it fits into the memory that is free now. Loads no weights."""
    from photon_grpc.engine_place import model_folder
    from photon_grpc.model_report import describe_model

    options = _load(
        config,
        assignments,
        model=model,
        dtype=dtype,
        backend=backend,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
    )
    table = Table(box=None, show_header=False)
    for name, value in describe_model(model_folder(options.model), options):
        table.add_row(name, Text(value))
    _out.print(table)


@app.command(rich_help_panel="Inspect")
def bench(
    address: Annotated[
        str, typer.Option("--address", "-a", metavar="HOST:PORT", help="The server to load.")
    ] = "127.0.0.1:50051",
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Calls under way.")] = 8,
    num_requests: Annotated[int, typer.Option("--requests", "-r", min=1, help="Calls in all.")] = 32,
    prompt: Annotated[str, typer.Option("--prompt", help="Text that every call continues.")] = "def main(",
    max_tokens: MaxTokensFlag = 64,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds a call may take.")
    ] = 300.0,
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
) -> None:
    """Load a running server with concurrent streams and print latencies and throughput.

    Every call generates --max-tokens tokens greedily, past any end-of-sequence token. For rates,
    several processes and comparisons see tools/bench in the repository.
    """
    request = Request(text=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        task = progress.add_task("calls", total=num_requests)
        report = run_load(
            address,
            request,
            concurrency=concurrency,
            num_requests=num_requests,
            timeout_s=timeout_s,
            tls=_tls(tls_ca, tls_cert, tls_key),
            token=_token(token_file),
            progress=lambda: progress.advance(task),
        )
    if report.measurements:
        _out.print(_load_table(report))
    _out.print(
        f"{len(report.measurements)} calls, {report.output_tokens} tokens in {report.elapsed_s:.2f} s: "
        f"{report.tokens_per_second:.1f} tokens/s",
        highlight=False,
    )
    if report.errors:
        _err.print(f"{len(report.errors)} calls failed; the first:", style="red")
        _print_failure(report.errors[0])
        raise typer.Exit(1)


@app.command(rich_help_panel="Inspect")
def health(
    address: Annotated[
        str, typer.Option("--address", "-a", metavar="HOST:PORT", help="The server to ask.")
    ] = "127.0.0.1:50051",
    wait_s: Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for SERVING.")] = 0.0,
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
) -> None:
    """Ask a server whether it takes requests: exit code 0 if it does, 1 if not."""
    tls = _tls(tls_ca, tls_cert, tls_key)
    with Client(address, tls=tls, token=_token(token_file)) as client:
        if not client.wait_until_serving(wait_s):
            _err.print(f"{address} is not serving", markup=False, highlight=False)
            raise typer.Exit(1)
        served = client.served_model()
    print(f"{address} serves {served.model} (photon-grpc {served.version})")


@app.command(rich_help_panel="Operate")
def drain(
    address: AdminAddressFlag = "127.0.0.1:50053",
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    grace_s: Annotated[
        float | None,
        typer.Option(
            "--grace",
            min=0.0,
            help="End calls still in flight this many seconds after new ones are refused.",
            show_default=False,
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take a drain back.")] = False,
) -> None:
    """Take a server out of service without ending it: not ready, then, after a while, refusing new calls."""
    if undo and grace_s is not None:
        raise typer.BadParameter("has no meaning with --undo", param_hint="--grace")
    with _control(address, tls_ca, tls_cert, tls_key, token_file) as client:
        in_flight = client.undo_drain() if undo else client.drain(grace_s)
    print(f"{address} {'takes calls' if undo else 'drains'}, {in_flight} in flight")


@app.command(rich_help_panel="Operate")
def watch(
    address: AdminAddressFlag = "127.0.0.1:50053",
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    interval_s: Annotated[
        float | None,
        typer.Option(
            "--interval", min=0.1, help="Also print the load every so many seconds.", show_default=False
        ),
    ] = None,
) -> None:
    """Print a server's state and load now and at every change, one line each, until it leaves."""
    with (
        _control(address, tls_ca, tls_cert, tls_key, token_file) as client,
        closing(client.watch(interval_s)) as states,
    ):
        try:
            for state in states:
                _write(_state_line(state) + "\n")
        except KeyboardInterrupt:
            return


@app.command(name="flush-cache", rich_help_panel="Operate")
def flush_cache(
    address: AdminAddressFlag = "127.0.0.1:50053",
    tls_ca: TlsCaFlag = None,
    tls_cert: TlsCertFlag = None,
    tls_key: TlsKeyFlag = None,
    token_file: TokenFlag = None,
    wait_idle: Annotated[
        bool, typer.Option("--wait-idle", help="First wait until no request lives.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds to wait for that.")
    ] = 300.0,
) -> None:
    """Make a server forget every cached prefix."""
    with _control(address, tls_ca, tls_cert, tls_key, token_file) as client:
        blocks_freed = client.flush_cache(wait_idle=wait_idle, timeout_s=timeout_s)
    print(f"{blocks_freed} blocks freed")


@app.command(rich_help_panel="Inspect")
def version() -> None:
    """Print the version."""
    print(f"photon-grpc {__version__}")


def main(arguments: Sequence[str] | None = None, *, engine: SpawnedChild | None = None) -> None:
    """Run a command and end the process with its exit code.

    `engine` is a process that `engine_ahead.begin` has begun for these arguments.
    """
    try:
        app(arguments, obj=engine)
    except StartupError as error:
        _print_red(f"photon-grpc: {error.message}")
        sys.exit(2)
    except (CallError, PhotonError) as error:
        _print_failure(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader has enough. Standard output is gone; closing it must not complain at exit.
        sys.stderr.close()
        sys.exit(0)


def _load(config: Path | None, assignments: Sequence[str] | None, **flags: object) -> Options:
    overrides = [
        Override(path, value, flag)
        for (path, flag), value in ((_FLAGS[name], value) for name, value in flags.items())
        if value is not None
    ]
    overrides += [parse_assignment(text) for text in assignments or ()]
    return load_options(config_file=config, overrides=overrides)


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> Tls | None:
    """The files of the --tls flags; None without any. Raises ConfigError."""
    if ca is None:
        if certificate is not None or key is not None:
            raise ConfigError("--tls-cert and --tls-key need --tls-ca: whom the client believes")
        return None
    if (certificate is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if certificate is None or key is None:
        return Tls(_read_file("--tls-ca", ca))
    return Tls(
        _read_file("--tls-ca", ca), _read_file("--tls-cert", certificate), _read_file("--tls-key", key)
    )


def _read_file(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def _token(file: Path | None) -> str:
    """The token in the file of --token-file, else in PHOTON_TOKEN; empty for none. Raises ConfigError."""
    if file is None:
        source, token = TOKEN_VARIABLE, token_from_environment().strip()
        if not token:
            return ""
    else:
        source = f"--token-file {file}"
        token = _read_file("--token-file", file).decode(errors="replace").strip()
    # What metadata may hold, so that a wrong file is an error here and not inside grpc.
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{source}: holds no token")
    return token


def _control(
    address: str, ca: Path | None, certificate: Path | None, key: Path | None, token_file: Path | None
) -> ControlClient:
    return ControlClient(address, tls=_tls(ca, certificate, key), token=_token(token_file))


def _refuse_without_address(tls: Tls | None, token_file: Path | None) -> None:
    # Not PHOTON_TOKEN: it is there for whichever command needs it.
    given = ["--tls-ca"] * (tls is not None) + ["--token-file"] * (token_file is not None)
    if given:
        raise ConfigError(f"{', '.join(given)}: has no effect without --address")


@contextmanager
def _source(
    address: str | None,
    tls: Tls | None,
    token_file: Path | None,
    config: Path | None,
    assignments: Sequence[str] | None,
    **flags: object,
) -> Iterator[TextSource]:
    """The server at `address`, or else the model loaded into this process."""
    if address is None:
        _refuse_without_address(tls, token_file)
        from photon_grpc.offline import OfflineSource

        options = _load(config, assignments, **flags)
        # What a server logs about itself is noise beside a text.
        telemetry = options.telemetry
        if telemetry.log_level == "info":
            telemetry = replace(telemetry, log_level="warning")
        configure_logging(telemetry)
        with _loading_bar() as progress:
            source = OfflineSource(options, progress)
        with closing(source):
            yield source
        return
    given = [_FLAGS[name][1] for name, value in flags.items() if value is not None]
    given += ["--config"] if config else []
    given += ["--set"] if assignments else []
    if given:
        raise ConfigError(f"{', '.join(given)}: has no effect on the server at --address")
    with Client(address, tls=tls, token=_token(token_file)) as client:
        yield client


@contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, fed with bytes done and bytes in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _text(argument: str) -> str:
    """The argument itself, or standard input for `-`. Raises BadParameter for what is not UTF-8."""
    try:
        raw = sys.stdin.buffer.read() if argument == "-" else argument.encode()
        return raw.decode()
    except UnicodeError:
        raise typer.BadParameter("the text is not valid UTF-8") from None


def _read_turns() -> Iterator[str]:
    """Lines of standard input that hold something; a prompt is shown on a terminal only."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _print_stream(pieces: Generator[str | Ending]) -> tuple[Ending | None, str]:
    """Write text as it comes; its ending (None after Ctrl-C, which ends the call) and the whole of it."""
    text: list[str] = []
    ending: Ending | None = None
    with closing(pieces) as stream:
        try:
            for piece in stream:
                if isinstance(piece, Ending):
                    ending = piece
                else:
                    text.append(piece)
                    _write(piece)
        except KeyboardInterrupt:
            ending = None
    _write("\n")
    return ending, "".join(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_ending(ending: Ending) -> None:
    # The first token is the prefill's; the rest came in the decode time.
    after_first = max(ending.output_tokens - 1, 0)
    rate = (
        f"{after_first / ending.decode_s:.1f} tokens/s" if after_first and ending.decode_s else "- tokens/s"
    )
    cached = f" ({ending.cached_prompt_tokens} cached)" if ending.cached_prompt_tokens else ""
    _err.print(
        f"{ending.prompt_tokens} prompt tokens{cached}, {ending.output_tokens} output tokens, "
        f"first token after {ending.first_token_s * 1e3:.1f} ms, {rate}, finish: {ending.finish_reason}",
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _state_line(state: ServerState) -> str:
    detail = f" ({state.detail})" if state.detail else ""
    load = " ".join(f"{name}={value:.6g}" for name, value in state.load.items())
    return f"{state.instance_id[:8]} {state.revision} {state.state}{detail} {load}".rstrip()


def _print_failure(error: CallError | PhotonError) -> None:
    """An error as a person reads it: what, which fields, when to come back."""
    violations: list[tuple[str, str]] = []
    lines = [error.message]
    if isinstance(error, RequestError):
        violations = [(violation.field, violation.description) for violation in error.violations]
    if isinstance(error, CallError):
        violations = list(error.violations)
        lines = [f"{error.status}{f' ({error.reason})' if error.reason else ''}: {error.message}"]
    # The message of an invalid request already lists its fields.
    lines += [f"  {field}: {text}" for field, text in violations if text not in error.message]
    if isinstance(error, CallError) and error.retry_after_s is not None:
        lines.append(f"  try again in {error.retry_after_s:g} s")
    _print_red("\n".join(lines))


def _print_red(text: str) -> None:
    _err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _load_table(report: LoadReport) -> Table:
    table = Table("milliseconds", *("p50", "p90", "p99", "max"), box=None)
    rows = {
        "time to first token": report.first_token_s(),
        "between tokens": report.gaps_s(),
        "whole call": report.total_s(),
    }
    for name, values in rows.items():
        shares = (0.5, 0.9, 0.99, 1.0)
        table.add_row(name, *(f"{percentile(values, share) * 1e3:.2f}" for share in shares))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
