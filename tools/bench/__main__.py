"""Command line of the benchmarks; see `python -m tools.bench --help`.

Option lists take one value per use: `--batch 1 --batch 16`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from photon_grpc.errors import StartupError
from tools.bench import bars, report, serving, stress_commands
from tools.bench.bars import Bar
from tools.bench.command_options import (
    Dtype,
    Model,
    Name,
    NewTokens,
    Output,
    PromptTokens,
    Repeat,
    Seed,
    Threads,
    console,
)
from tools.bench.figures import Objective
from tools.bench.server_process import ServerSpec

# As the default on CUDA.
_DEVICE_BATCHED_TOKENS = 8192

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command(name="overload")(stress_commands.overload_a_server)
app.command(name="control")(stress_commands.control_a_server)
app.command(name="soak")(stress_commands.soak_a_server)


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
    step_row_us: Annotated[
        float, typer.Option("--step-row-us", min=0, help="The same: on top, for each sequence in it.")
    ] = 0.0,
    prefill_ms: Annotated[
        float, typer.Option("--prefill-ms", min=0, help="The same: on top, with prompts in the step.")
    ] = 0.0,
    prompt_token_us: Annotated[
        float, typer.Option("--prompt-token-us", min=0, help="The same: on top, for each prompt token.")
    ] = 0.0,
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
    if step_row_us or prefill_ms or prompt_token_us:
        spec = replace(
            spec,
            pace=(step_ms / 1e3, step_row_us / 1e6, prefill_ms / 1e3, prompt_token_us / 1e6),
            max_num_batched_tokens=_DEVICE_BATCHED_TOKENS,
        )
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
    max_num_batched_tokens: Annotated[int, typer.Option("--max-num-batched-tokens", min=1)] = 2048,
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


def judge(promises: list[Bar], output: Path) -> None:
    """Print and write which bars hold. Exits with 1 when one does not."""
    bars.print_table(console, promises, "bars of this release; medians over the rounds")
    report.write(
        output, "bars", {"bars": bars.to_result(promises)}, lambda figure: bars.draw(figure, promises)
    )
    if not all(bar.passed for bar in promises):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        app()
    except StartupError as error:
        console.print(f"[red]{error.message}")
        raise SystemExit(2) from None
