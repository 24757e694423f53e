"""Command line of the benchmarks; see `python -m tools.bench --help`.

Option lists take one value per use: `--batch 1 --batch 16`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from photon_grpc.errors import StartupError
from tools.bench import report, serving
from tools.bench.figures import Objective
from tools.bench.server_process import ServerSpec

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
# A file or a pipe has no width of its own; the tables need this much to stay in one line.
console = Console(width=None if sys.stdout.isatty() else 230)

Model = Annotated[str, typer.Option("--model", help="Model folder; `demo` is the embedded model.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; both sides use it.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="torch threads; 0: torch's own choice.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1)]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2)]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="Counted rounds of everything.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts and arrivals.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for JSON and plot.")]
Name = Annotated[str, typer.Option("--name", help="Stem of the files; empty: after what was run.")]


@dataclass(frozen=True, slots=True)
class Bar:
    """What this release promises, as a ratio or a cost that hardly depends on the machine."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@app.command()
def engine(
    model: Model,
    dtype: Dtype = "float32",
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Rows at a time; may be repeated.")] = [  # noqa: B006
        1,
        4,
        16,
    ],
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 128,
    threads: Threads = 0,
    repeat: Repeat = 5,
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "",
) -> None:
    """Decode in one process against Hugging Face `generate`."""
    run_engine(model, dtype, tuple(batch), prompt_tokens, new_tokens, threads, repeat, seed, output, name)


def run_engine(
    model: str,
    dtype: str,
    batches: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
    repeat: int,
    seed: int,
    output: Path,
    name: str,
) -> dict[int, float]:
    """Run, print and write; the median decode ratio by batch size."""
    from tools.bench import engine as engine_bench

    plan = engine_bench.EnginePlan(
        model, dtype, batches, prompt_tokens, new_tokens, num_threads=threads, repeats=repeat, seed=seed
    )
    with console.status("engine") as status:
        rows = engine_bench.run(plan, lambda text: status.update(f"engine: {text}"))
    engine_bench.print_table(
        console, rows, f"engine: {model}, {dtype}, {prompt_tokens} + {new_tokens} tokens"
    )
    result = engine_bench.to_result(plan, rows)
    stem = name or f"engine-{Path(model).name}"
    path = report.write(output, stem, result, lambda figure: engine_bench.draw(figure, rows))
    console.print(f"wrote {path}")
    return {row.batch: median(row.decode_ratios) for row in rows}


@app.command(name="serving")
def serve(
    model: Annotated[str, typer.Option("--model", help="Model folder; `demo` is the embedded model.")] = "",
    fake_engine: Annotated[
        bool, typer.Option("--fake-engine", help="No model: scripted tokens, everything else real.")
    ] = False,
    step_ms: Annotated[
        float, typer.Option("--step-ms", min=0, help="With --fake-engine: time asleep in each step.")
    ] = 20.0,
    engine_process: Annotated[
        str, typer.Option("--engine-process", help="auto, own or shared, as the setting engine.process.")
    ] = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    concurrency: Annotated[
        list[int], typer.Option("--concurrency", "--streams", min=1, help="Closed loop; may be repeated.")
    ] = [],  # noqa: B006
    rate: Annotated[
        list[float], typer.Option("--rate", min=0.001, help="Open loop, calls/s; may be repeated.")
    ] = [],  # noqa: B006
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds of sending.")] = 10.0,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 128,
    compare_sequential: Annotated[
        int,
        typer.Option(
            "--compare-sequential", min=0, help="Only: the same requests singly and this many together."
        ),
    ] = 0,
    requests: Annotated[int, typer.Option("--requests", min=1, help="With --compare-sequential.")] = 32,
    clients: Annotated[
        int, typer.Option("--clients", min=0, help="Client processes; 0: half of the cores.")
    ] = 0,
    max_num_seqs: Annotated[
        int,
        typer.Option("--max-num-seqs", min=0, help="Of the server; 0: room for the widest loop."),
    ] = 0,
    slo_ttft_ms: Annotated[float, typer.Option("--slo-ttft-ms", min=0)] = 500.0,
    slo_tpot_ms: Annotated[float, typer.Option("--slo-tpot-ms", min=0)] = 50.0,
    repeat: Repeat = 1,
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "",
) -> None:
    """The whole service under streaming load from other processes."""
    if bool(model) == fake_engine:
        raise typer.BadParameter("give either --model or --fake-engine")
    if not (concurrency or rate or compare_sequential):
        concurrency = [1, 16]
    most = max([*concurrency, compare_sequential, 64])
    spec = replace(server_spec(model, dtype, threads, step_ms, max_num_seqs or most), process=engine_process)
    plan = serving.ServingPlan(
        spec,
        tuple(concurrency),
        tuple(rate),
        duration,
        prompt_tokens,
        new_tokens,
        Objective(slo_ttft_ms / 1e3, slo_tpot_ms / 1e3),
        num_client_processes=clients or serving.default_processes(),
        repeats=repeat,
        seed=seed,
    )
    run_serving(plan, compare_sequential, requests, output, name)


def server_spec(model: str, dtype: str, threads: int, step_ms: float, max_num_seqs: int) -> ServerSpec:
    """A scripted engine has the budget to begin every stream in a step or two; a real one, the default."""
    if model:
        folder = model if model == "demo" else os.path.abspath(model)
        return ServerSpec(folder, dtype, threads, 0.0, max_num_seqs, max_num_batched_tokens=0)
    return ServerSpec(
        step_s=step_ms / 1e3, max_num_seqs=max_num_seqs, max_num_batched_tokens=64 * max_num_seqs
    )


def run_serving(
    plan: serving.ServingPlan, compare_sequential: int, num_requests: int, output: Path, name: str
) -> tuple[list[serving.ServingRow], serving.Comparison | None]:
    """Run, print and write."""
    comparison: serving.Comparison | None = None
    rows: list[serving.ServingRow] = []
    with console.status("serving: starting") as status:
        if compare_sequential:
            status.update(f"serving: one at a time and {compare_sequential} at a time")
            comparison, rows = serving.compare_sequential(plan, compare_sequential, num_requests)
        else:
            for row in serving.run(plan):
                rows.append(row)
                status.update(f"serving: {row.label} done")
    what = plan.server.model or f"fake engine, steps of {plan.server.step_s * 1e3:g} ms"
    serving.print_table(console, rows, f"serving: {what}, {plan.prompt_tokens} + {plan.new_tokens} tokens")
    if comparison is not None:
        ratios = comparison.ratios
        console.print(
            f"{compare_sequential} at a time / one at a time: median {median(ratios):.2f}, "
            f"min {min(ratios):.2f}, max {max(ratios):.2f}"
        )
    stem = name or serving.results_name(plan) + ("-compare" if comparison else "")
    result = serving.to_result(plan, rows, comparison)
    path = report.write(output, stem, result, lambda figure: serving.draw(figure, rows))
    console.print(f"wrote {path}")
    return rows, comparison


@app.command(name="host")
def time_host(
    rows: Annotated[list[int], typer.Option("--rows", min=1, help="Decoding rows; may be repeated.")] = [  # noqa: B006
        1,
        16,
        64,
        256,
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps per round.")] = 1000,
    prefix_caching: Annotated[bool, typer.Option(help="Name full blocks, as a server does.")] = True,
    repeat: Repeat = 5,
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "host",
) -> None:
    """Python of the engine thread per decode step: planning, tokens, the message to the event loop."""
    from tools.bench import host

    plan = host.HostPlan(tuple(rows), steps, repeat, prefix_caching, seed)
    with console.status("host") as status:
        measured = host.run(plan, lambda text: status.update(f"host: {text}"))
    host.print_table(console, measured, "host: decoding rows, two steps under way, no runner")
    path = report.write(
        output, name, host.to_result(plan, measured), lambda figure: host.draw(figure, measured)
    )
    console.print(f"wrote {path}")


@app.command(name="kernels")
def time_kernels(
    modules: Annotated[
        list[str] | None, typer.Argument(help="Of tools/bench/kernel_cases; all by default.")
    ] = None,
    only: Annotated[str, typer.Option("--only", help="Cases with this text in their name.")] = "",
    output: Output = report.RESULTS,
    name: Name = "kernels",
) -> None:
    """Every CUDA kernel in a graph, beside its floor and its prediction. Needs a GPU."""
    from tools.bench import kernels

    raise typer.Exit(kernels.main(modules or [], only, output, name))


@app.command(name="gpu")
def table_of_the_gpu(
    only: Annotated[
        list[str],
        typer.Option(
            "--only", help="engine, ttft, context, kernels, edges, serving or start; all by default."
        ),
    ] = [],  # noqa: B006
    models: Annotated[
        list[str], typer.Option("--model", help="Of tools/bench/models, or a folder with config.json.")
    ] = [],  # noqa: B006
    batch: Annotated[
        list[int], typer.Option("--batch", min=1, help="Rows, or streams; may be repeated.")
    ] = [],  # noqa: B006
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 256,
    repeat: Repeat = 3,
    quick: Annotated[bool, typer.Option("--quick", help="The ends of every list, one round.")] = False,
    backend: Annotated[str, typer.Option("--backend", help="cuda; or cpu, to try the command.")] = "cuda",
    dtype: Dtype = "auto",
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1)] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option("--max-num-batched-tokens", min=1)] = 8192,
    settings: Annotated[
        list[str], typer.Option("--set", help="section.key=value of engine and server; may be repeated.")
    ] = [],  # noqa: B006
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "gpu",
) -> None:
    """Decode, first tokens, kernels, serving and start on random weights, beside the bars. Needs a GPU.

    Rows of parts run apart, or again, go into one file: `gpu --only engine`, then `gpu --only serving`.
    """
    from tools.bench.gpu import command
    from tools.bench.gpu.cases import SECTIONS, Plan

    for section in only:
        if section not in SECTIONS:
            raise typer.BadParameter(f"--only {section}: there are {', '.join(SECTIONS)}")
    plan = Plan(
        sections=tuple(section for section in SECTIONS if section in only) or SECTIONS,
        models=tuple(models),
        batches=tuple(batch),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=1 if quick else repeat,
        quick=quick,
        backend=backend,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        settings=tuple(settings),
        seed=seed,
    )
    try:
        raise typer.Exit(command.run(plan, output, name, console))
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None


@app.command(name="soak")
def soak_a_server(
    model: Model = "demo",
    minutes: Annotated[float, typer.Option("--minutes", min=0.01)] = 10.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Calls at a time.")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1)] = 512,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    max_growth_mib: Annotated[
        int, typer.Option("--max-growth-mib", min=0, help="Memory that may be taken after the first third.")
    ] = 64,
    address: Annotated[
        str, typer.Option("--address", help="A server that runs; empty: one is started.")
    ] = "",
    admin_address: Annotated[str, typer.Option("--admin-address", help="With --address.")] = "",
    pid: Annotated[int, typer.Option("--pid", help="With --address: the process whose memory counts.")] = 0,
    backend: Annotated[str, typer.Option("--backend", help="auto, cpu or cuda.")] = "auto",
    dtype: Dtype = "auto",
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1)] = 64,
    kv_cache_mib: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-mib", min=0, help="Little makes it preempt, as 64 do on the CPU by default."
        ),
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="section.key=value of the server; may be repeated.")
    ] = [],  # noqa: B006
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "",
) -> None:
    """Mixed load for some minutes: no error, no leak; exit code 1 when there is one.

    --model is the embedded model, a folder, or one of tools/bench/models with random weights.
    """
    from tools.bench import soak

    if bool(address) != bool(admin_address):
        raise typer.BadParameter("give --address and --admin-address together")
    plan = soak.SoakPlan(
        model=model,
        minutes=minutes,
        concurrency=concurrency,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_growth_bytes=max_growth_mib << 20,
        address=address,
        admin_address=admin_address,
        pid=pid,
        backend=backend,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=None if kv_cache_mib is None else kv_cache_mib << 20,
        settings=tuple(settings),
        seed=seed,
    )
    with console.status("soak") as status:
        result = soak.run(plan, lambda text: status.update(f"soak: {text}"))
    codes = ", ".join(f"{code} {count}" for code, count in result.tally.codes.most_common())
    console.print(f"{result.tally.ended} calls ({codes}), {result.tally.tokens} tokens", highlight=False)
    stem = name or f"soak-{Path(model).name}"
    path = report.write(output, stem, result.to_dict(plan), lambda figure: soak.draw(figure, result))
    console.print(f"wrote {path}", highlight=False)
    for problem in result.problems:
        console.print("[red]FAIL", problem, highlight=False, markup=True)
    if result.problems:
        raise typer.Exit(1)
    console.print("[green]passed")


@app.command(name="overload")
def overload_a_server(
    factor: Annotated[
        list[float], typer.Option("--factor", min=0.1, help="Multiple of the peak; may be repeated.")
    ] = [2.0, 10.0],  # noqa: B006
    duration: Annotated[float, typer.Option("--duration", min=1, help="Seconds of sending, each.")] = 10.0,
    step_ms: Annotated[float, typer.Option("--step-ms", min=0, help="Time asleep in each step.")] = 20.0,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1)] = 16,
    max_queued: Annotated[int, typer.Option("--max-queued", min=1, help="limits.max_queued_requests.")] = 32,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 50,
    clients: Annotated[
        int, typer.Option("--clients", min=0, help="Client processes; 0: half of the cores.")
    ] = 0,
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "overload",
) -> None:
    """A scripted engine under multiples of its peak: goodput, refusals, health."""
    from tools.bench import overload

    plan = overload.OverloadPlan(
        factors=tuple(factor),
        duration_s=duration,
        step_s=step_ms / 1e3,
        max_num_seqs=max_num_seqs,
        max_queued_requests=max_queued,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        num_client_processes=clients or serving.default_processes(),
        seed=seed,
    )
    with console.status("overload") as status:
        peak, rows = overload.run(plan, lambda text: status.update(f"overload: {text}"))
    title = (
        f"overload: {plan.max_num_seqs} places, {plan.max_queued_requests} may wait, steps of {step_ms:g} ms"
    )
    overload.print_table(console, peak, rows, title)
    result = overload.to_result(plan, peak, rows)
    path = report.write(output, name, result, lambda figure: overload.draw(figure, rows))
    console.print(f"wrote {path}", highlight=False)


@app.command(name="all")
def every(
    model: Model = "demo",
    threads: Threads = 0,
    seed: Seed = 0,
    output: Output = report.RESULTS,
) -> None:
    """The bars of this release, each from a short run; exit code 1 when one is missed."""
    ratios = run_engine(model, "float32", (1, 4, 16), 64, 128, threads, 5, seed, output, "")
    clients = serving.default_processes()
    objective = Objective(0.5, 0.05)
    together = serving.ServingPlan(
        server_spec(model, "float32", threads, 0.0, 64), (), (), 0.0, 64, 128, objective, clients, 3, seed
    )
    _, comparison = run_serving(together, 16, 32, output, "")
    sweep = serving.ServingPlan(
        together.server, (1, 16), (2.0, 4.0), 8.0, 64, 128, objective, clients, 1, seed
    )
    run_serving(sweep, 0, 0, output, "")
    front = serving.ServingPlan(
        server_spec("", "auto", 0, 20.0, 256), (64, 256), (), 6.0, 64, 128, objective, clients, 3, seed
    )
    rows, _ = run_serving(front, 0, 0, output, "")
    # Steps far shorter than the front end can follow: what it does when it has no idle moment.
    saturated = replace(front, server=replace(front.server, step_s=0.005), concurrencies=(256,), repeats=1)
    run_serving(saturated, 0, 0, output, "serving-fake-engine-saturated")
    assert comparison is not None
    many = [row for row in rows if row.concurrency == 256]
    judge(
        [
            Bar("batch 1 decode / Hugging Face generate", ratios[1], 1.5, at_least=True),
            Bar("16 streams / one at a time, tokens/s", median(comparison.ratios), 3.0, at_least=True),
            Bar(
                "256 streams, fake engine: tokens per core-second",
                median(row.tokens_per_core_second for row in many),
                12_000,
                at_least=True,
            ),
            Bar(
                "256 streams, fake engine: us of server CPU per token",
                median(row.cpu_us_per_token for row in many),
                100,
                at_least=False,
            ),
        ],
        output,
    )


def judge(bars: list[Bar], output: Path) -> None:
    """Print and write which bars hold. Exits with 1 when one does not."""
    table = Table(title="bars of this release; medians over the rounds")
    for column in ("bar", "required", "measured", ""):
        table.add_column(column)
    for bar in bars:
        table.add_row(
            bar.name,
            f"{'>=' if bar.at_least else '<='} {bar.bound:g}",
            f"{bar.value:,.2f}",
            "[green]pass" if bar.passed else "[red]FAIL",
        )
    console.print(table)
    verdicts = [
        {
            "bar": bar.name,
            "bound": bar.bound,
            "at_least": bar.at_least,
            "value": bar.value,
            "passed": bar.passed,
        }
        for bar in bars
    ]
    report.write(output, "bars", {"bars": verdicts}, lambda figure: _draw_bars(figure, bars))
    if not all(bar.passed for bar in bars):
        raise typer.Exit(1)


def _draw_bars(figure: Figure, bars: list[Bar]) -> None:
    axes = figure.subplots()
    margins = [bar.value / bar.bound if bar.at_least else bar.bound / bar.value for bar in bars]
    axes.barh([bar.name for bar in bars], margins, color=["C2" if bar.passed else "C3" for bar in bars])
    axes.axvline(1.0, color="black")
    axes.set_xlabel("margin: 1 is the bar, more is better")
    axes.invert_yaxis()


if __name__ == "__main__":
    try:
        app()
    except StartupError as error:
        console.print(f"[red]{error.message}")
        raise SystemExit(2) from None
