"""The commands that put a server under stress: `overload`, `control`, `soak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tools.bench import bars, report
from tools.bench.command_options import Dtype, Model, Name, NewTokens, Output, Seed, Threads, console

# A longer soak is looked at less often.
_MAX_SAMPLES = 360

__all__ = ["control_a_server", "overload_a_server", "soak_a_server"]

Settings = Annotated[
    list[str], typer.Option("--set", help="section.key=value of the server; may be repeated.")
]


def overload_a_server(
    factor: Annotated[
        list[float], typer.Option("--factor", min=0.1, help="Multiple of the peak; may be repeated.")
    ] = [0.9, 2.0, 10.0],  # noqa: B006
    duration: Annotated[float, typer.Option("--duration", min=1, help="Seconds of sending, each.")] = 60.0,
    step_ms: Annotated[float, typer.Option("--step-ms", min=0, help="Time asleep in each step.")] = 25.0,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1)] = 32,
    max_queued: Annotated[int, typer.Option("--max-queued", min=1, help="limits.max_queued_requests.")] = 32,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 16,
    new_tokens: NewTokens = 50,
    spread: Annotated[
        int, typer.Option("--spread", min=0, help="Outputs have that many tokens more or less.")
    ] = 25,
    engine_process: Annotated[
        str, typer.Option("--engine-process", help="auto, own or shared, as the setting engine.process.")
    ] = "auto",
    settings: Settings = [],  # noqa: B006
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "overload",
) -> None:
    """Two tenants ask a scripted engine for multiples of its peak: goodput, refusals, fairness, health.

    Exit code 1 when a promise is not kept.
    """
    from tools.bench import overload

    plan = overload.OverloadPlan(
        factors=tuple(factor),
        duration_s=duration,
        step_s=step_ms / 1e3,
        max_num_seqs=max_num_seqs,
        max_queued_requests=max_queued,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        spread=spread,
        engine_process=engine_process,
        settings=tuple(settings),
        seed=seed,
    )
    with console.status("overload") as status:
        peak, rows = overload.run(plan, lambda text: status.update(f"overload: {text}"))
    title = (
        f"overload: {plan.max_num_seqs} places, {plan.max_queued_requests} may wait, steps of {step_ms:g} ms"
    )
    overload.print_table(console, peak, rows, title)
    promises = overload.promises(rows)
    result = {**overload.to_result(plan, peak, rows), "bars": bars.to_result(promises)}
    path = report.write(output, name, result, lambda figure: overload.draw(figure, rows))
    judge(promises, "overload", path)


def control_a_server(
    only: Annotated[
        list[str], typer.Option("--only", help="drain, cancel, frozen or steps; all by default.")
    ] = [],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, to try the command.")] = False,
    seed: Seed = 0,
    output: Output = report.RESULTS,
    name: Name = "control",
) -> None:
    """SIGTERM, cancels, frozen clients, and what the engine loses to calls. Takes some minutes.

    Exit code 1 when a promise is not kept.
    """
    from tools.bench.control import command

    for part in only:
        if part not in command.PARTS:
            raise typer.BadParameter(f"--only {part}: there are {', '.join(command.PARTS)}")
    parts = tuple(part for part in command.PARTS if part in only) or command.PARTS
    with console.status("control") as status:
        found = command.run(parts, quick, seed, lambda text: status.update(f"control: {text}"))
    for part in found:
        console.print(f"{part.name}: {part.headline}", highlight=False)
    promises = [bar for part in found for bar in part.bars]
    result = {
        "parts": {part.name: part.to_dict() for part in found},
        "bars": bars.to_result(promises),
    }
    path = report.write(output, name, result, lambda figure: command.draw(figure, found))
    judge(promises, "control", path)


def judge(promises: list[bars.Bar], title: str, path: Path) -> None:
    """Print which promises hold. Exits with 1 when one does not."""
    bars.print_table(console, promises, title)
    console.print(f"wrote {path}", highlight=False)
    if not all(bar.passed for bar in promises):
        raise typer.Exit(1)


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
    threads: Threads = 0,
    settings: Settings = [],  # noqa: B006
    faults: Annotated[
        bool,
        typer.Option("--faults", help="Rows that fail, slow steps, drains, aborts, clients that vanish."),
    ] = False,
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
    if faults and address:
        raise typer.BadParameter("--faults needs a server of its own: leave out --address")
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
        num_threads=threads,
        settings=tuple(settings),
        period_s=max(1.0, minutes * 60 / _MAX_SAMPLES),
        faults=faults,
        seed=seed,
    )
    console.print(f"seed {seed}", highlight=False)
    with console.status("soak") as status:
        result = soak.run(plan, lambda text: status.update(f"soak: {text}"))
    codes = ", ".join(f"{code} {count}" for code, count in result.tally.codes.most_common())
    console.print(f"{result.tally.ended} calls ({codes}), {result.tally.tokens} tokens", highlight=False)
    if result.disturbances:
        done = ", ".join(f"{kind} {count}" for kind, count in result.disturbances.most_common())
        console.print(f"disturbances: {done}", highlight=False)
    slope = soak.mib_per_hour(result.samples)
    if slope is not None:
        slopes = ((kind, soak.bytes_per_call(result.samples, kind)) for kind in soak.PROCESS_KINDS)
        told = "".join(f", {kind} {value:+.1f}" for kind, value in slopes if value is not None)
        console.print(
            f"resident memory over the second half: {slope:+.1f} MiB/h; bytes per call{told}", highlight=False
        )
    stem = name or f"soak-{Path(model).name}"
    path = report.write(output, stem, result.to_dict(plan), lambda figure: soak.draw(figure, result))
    console.print(f"wrote {path}", highlight=False)
    for problem in result.problems:
        console.print("[red]FAIL", escape(problem), highlight=False)
    if result.problems:
        raise typer.Exit(1)
    console.print("[green]passed")
