"""The table of the CUDA backend: its arithmetic, its files, and whole rows on the CPU with a tiny model."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from photon_grpc.errors import ConfigError
from photon_grpc.frontend.detokenizer import Detokenizer
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.models.registry import load_config
from photon_grpc.options import Options
from tools.bench import random_models
from tools.bench.gpu import command, start
from tools.bench.gpu.cases import BARS, LLAMA_1B, LLAMA_8B, SECTIONS, Case, Plan, cases_of
from tools.bench.gpu.engine import Engine, Stopwatch, engine_options, kernel_figures
from tools.bench.gpu.results import ResultFile, print_tables
from tools.bench.gpu.worker import Job
from tools.bench.gpu.workers import Outcome, run_cases
from tools.bench.settings import with_assignments

TINY = Plan(
    models=("tiny",),
    batches=(1, 3),
    prompt_tokens=9,
    new_tokens=6,
    repeats=1,
    quick=True,
    backend="cpu",
    max_num_seqs=4,
    max_num_batched_tokens=64,
)

# As published, a tied head counted once.
NUM_PARAMETERS = {
    "llama2-7b": 6.738e9,
    "llama31-8b": 8.03e9,
    "llama32-1b": 1.236e9,
    "llama32-3b": 3.213e9,
    "qwen25-0.5b": 0.494e9,
    "qwen25-1.5b": 1.544e9,
    "qwen25-3b": 3.086e9,
    "qwen25-7b": 7.616e9,
    "qwen25-14b": 14.77e9,
    "qwen3-0.6b": 0.596e9,
    "qwen3-1.7b": 1.721e9,
    "qwen3-4b": 4.022e9,
    "qwen3-8b": 8.191e9,
    "smollm2-135m": 134.5e6,
    "smollm2-360m": 361.8e6,
    "tinyllama-1.1b": 1.1e9,
}


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("name", random_models.names())
def test_every_configuration_is_one_that_is_served(name: str) -> None:
    config = load_config(random_models.config_folder(name))
    assert config.vocab_size == random_models.vocab_size(name)
    if name in NUM_PARAMETERS:
        assert config.num_parameters == pytest.approx(NUM_PARAMETERS[name], rel=1e-3)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="llama32-1b"):
        random_models.config_folder(str(tmp_path))


def test_text_of_ids_beyond_the_tokenizer_is_empty() -> None:
    with random_models.servable_folder("tiny") as folder:
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.vocab_size < random_models.vocab_size("tiny")
    known = tokenizer.encode("def value")
    detokenizer = Detokenizer(tokenizer, True)
    pieces = [detokenizer.push([token_id]) for token_id in (1000, *known, 1023)]
    assert "".join([*pieces, detokenizer.flush()]) == "def value"
    assert tokenizer.decode([1000, *known, 1023]) == "def value"


def test_the_whole_table_has_a_row_for_every_bar() -> None:
    cases = cases_of(Plan())
    assert len(set(cases)) == len(cases)
    assert {bar.case for bar in BARS} <= set(cases)
    assert {case.section for case in cases} == set(SECTIONS)
    assert {case.model for case in cases if case.section == "serving"} == {LLAMA_1B}
    greedy = {(c.model, c.batch) for c in cases if c.section == "engine" and c.sampling == "greedy"}
    sampled = {(c.model, c.batch) for c in cases if c.section == "engine" and c.sampling == "sampled"}
    assert greedy == sampled


def test_vllm_is_behind_every_bar() -> None:
    for bar in BARS:
        if bar.vllm is not None:
            assert not bar.is_reached(bar.vllm), bar.what
        assert bar.is_reached(bar.target), bar.what


def test_parts_and_models_are_chosen() -> None:
    cases = cases_of(Plan(sections=("start",), models=(LLAMA_8B,)))
    assert {(case.section, case.model) for case in cases} == {("start", LLAMA_8B)}
    with pytest.raises(ValueError, match="no such section"):
        cases_of(Plan(sections=("everything",)))


def test_settings_come_on_top_and_are_checked() -> None:
    options = replace(Options(), cache=replace(Options().cache, kv_cache_memory_bytes=12345))
    changed = with_assignments(options, ["scheduler.max_num_seqs=7", "model.dtype=float16"])
    assert (changed.scheduler.max_num_seqs, changed.model.dtype) == (7, "float16")
    assert changed.cache.kv_cache_memory_bytes == 12345
    assert with_assignments(options, []) is options
    with pytest.raises(ConfigError, match="no such setting"):
        with_assignments(options, ["scheduler.max_seqs=7"])


def test_the_pool_of_an_engine_holds_every_case() -> None:
    folder = random_models.config_folder(LLAMA_1B)
    cases = [Case("engine", LLAMA_1B, 256, 128, 256), Case("context", LLAMA_1B, 16, 8192, 128)]
    options = engine_options(replace(TINY, backend="cuda", max_num_seqs=256), folder, cases)
    # 16 layers of 8 kv heads of 64, keys and values in two bytes.
    per_token = 16 * 8 * 64 * 2 * 2
    assert options.cache.kv_cache_memory_bytes >= per_token * max(256 * 384, 16 * 8320)
    assert options.cache.kv_cache_memory_bytes < 1.3 * per_token * 16 * 8320
    assert options.scheduler.max_num_seqs == 256
    assert options.model.load_format == "random"


def test_kernels_are_summed_by_name_and_overlap_counts_once() -> None:
    spans = [("a", 0.0, 10.0), ("b", 8.0, 12.0), ("a", 20.0, 24.0), ("b", 21.0, 23.0)]
    found = kernel_figures(spans, steps=2)
    assert [(k["name"], k["calls_per_step"], k["us_per_step"]) for k in found["kernels"]] == [
        ("a", 1.0, 7.0),
        ("b", 1.0, 3.0),
    ]
    assert (found["sum_us"], found["busy_us"], found["span_us"]) == (10.0, 8.0, 12.0)


def test_a_stopwatch_leaves_no_trace() -> None:
    class Thing:
        def act(self, value: int, *, twice: bool = False) -> int:
            time.sleep(0.002)
            return 2 * value if twice else value

    thing, watch = Thing(), Stopwatch()
    watch.watch(thing, "act")
    assert thing.act(3, twice=True) == 6
    assert watch.seconds["act"] >= 0.002
    watch.stop()
    assert vars(thing) == {}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(TINY, "tiny", cases_of(replace(TINY, sections=("engine", "ttft", "kernels"))))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_generation_counts_what_came_after_the_prefill(engine: Engine, batch: int) -> None:
    found = engine.generate(Case("engine", "tiny", batch, 9, 6), 6)
    assert len(found.first_token_s) == batch
    assert found.first_token_s == sorted(found.first_token_s)
    # All prompts fit into one step, and every row then needs five more.
    assert found.tokens_after_prefill == 5 * batch
    assert len(found.step_ends) == 6
    assert found.decode_tokens_per_second == pytest.approx(5 * batch / found.decode_s)


def test_prompts_that_need_several_steps_are_prefill_to_the_last(engine: Engine) -> None:
    found = engine.generate(Case("engine", "tiny", 4, 40, 6), 6)
    assert len(set(found.first_token_s)) > 1
    assert found.tokens_after_prefill < 5 * 4
    assert engine._core.scheduler.stats().kv_blocks_used == 0


def test_rows_of_an_engine(engine: Engine) -> None:
    row = engine.measure(Case("engine", "tiny", 3, 9, 6, "sampled"))
    assert row["decode_tokens_per_second"]["median"] > 0
    assert set(row["host_us_per_step"]) == {"schedule", "launch", "update", "collect", "elsewhere"}
    assert all(value >= 0 for value in row["host_us_per_step"].values())
    assert row["first_token_s"]["p50"] <= row["first_token_s"]["max"]
    first = engine.measure(Case("ttft", "tiny", 3, 9, 1))
    assert 0 < first["first_token_s"]["mean"] <= first["first_token_s"]["max"]


def test_the_profile_has_kernels_of_every_step(engine: Engine) -> None:
    row = engine.measure(Case("kernels", "tiny", 3, 9, 6))
    assert row["steps"] == 20
    assert row["busy_us"] <= row["span_us"]
    assert row["kernels"][0]["us_per_step"] >= row["kernels"][-1]["us_per_step"]
    assert any(kernel["calls_per_step"] >= 1 for kernel in row["kernels"])


class FakeWorker:
    """Answers from a script: a result, or an error that ends it."""

    started: list[tuple[Case, ...]] = []  # noqa: RUF012 - set anew by each test

    def __init__(self, script: dict[int, str], job: Job) -> None:
        FakeWorker.started.append(job.cases)
        self._script, self._cases, self._standing = script, list(job.cases), False

    def next_line(self, timeout_s: float) -> dict[str, Any]:
        if not self._standing:
            self._standing = True
            return {"case": None, "error": "no memory"} if -1 in self._script else {"result": {}}
        batch = self._cases.pop(0).batch
        return {"error": self._script[batch]} if batch in self._script else {"result": {"batch": batch}}

    def end(self) -> None:
        pass


def _with(script: dict[int, str]) -> Callable[[Job], FakeWorker]:
    FakeWorker.started = []
    return lambda job: FakeWorker(script, job)


def test_a_fault_costs_its_own_row_and_a_process() -> None:
    cases = [Case("engine", "tiny", batch) for batch in (1, 2, 3)]
    outcomes = list(run_cases(TINY, "tiny", cases, quiet, _with({2: "illegal address"})))
    assert [outcome.case for outcome in outcomes] == cases
    assert [outcome.error for outcome in outcomes] == ["", "illegal address", ""]
    assert [len(started) for started in FakeWorker.started] == [3, 1]


def test_an_engine_that_does_not_stand_fails_its_rows_once() -> None:
    cases = [Case("engine", "tiny", batch) for batch in (1, 2)]
    outcomes = list(run_cases(TINY, "tiny", cases, quiet, _with({-1: ""})))
    assert all("no memory" in outcome.error for outcome in outcomes)
    assert len(FakeWorker.started) == 1


def test_a_real_process_reports_rows_and_dies_of_an_error() -> None:
    cases = [
        Case("ttft", "tiny", 1, 9, 1),
        Case("none", "tiny", 1, 9, 1),
        Case("ttft", "tiny", 2, 9, 1),
    ]
    first, second, third = run_cases(TINY, "tiny", cases, quiet)
    assert first.result is not None
    assert first.result["first_token_s"]["max"] > 0
    assert "none is not measured in an engine" in second.error
    assert third.result is not None


def test_a_backend_that_is_not_there_is_told_in_every_row() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = replace(TINY, backend="cuda")
    (outcome,) = run_cases(plan, "tiny", [Case("ttft", "tiny", 1, 9, 1)], quiet)
    assert "cuda" in outcome.error


def test_parts_make_one_file_and_each_row_names_its_run(tmp_path: Path) -> None:
    one, two = Case("engine", "tiny", 1), Case("engine", "tiny", 2)
    first = ResultFile(tmp_path, "gpu", {"commit": "a"})
    first.add(Outcome(one, {"value": 1}))
    first.add(Outcome(two, error="boom"))
    assert first.num_failed == 1
    second = ResultFile(tmp_path, "gpu", {"commit": "b"})
    second.add(Outcome(two, {"value": 2}))
    assert second.num_failed == 0

    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["case"]["batch"]: row for row in found["rows"]}
    assert (rows[1]["result"], rows[2]["result"]) == ({"value": 1}, {"value": 2})
    assert [found["runs"][rows[batch]["run"]]["commit"] for batch in (1, 2)] == ["a", "b"]

    third = ResultFile(tmp_path, "gpu", {"commit": "c"})
    third.add(Outcome(one, {"value": 3}))
    third.add(Outcome(two, {"value": 4}))
    assert [run["commit"] for run in third.content()["runs"]] == ["c"]


def test_bars_are_judged_by_the_rows_of_their_case(tmp_path: Path) -> None:
    results = ResultFile(tmp_path, "gpu", {})
    speed = {"median": 1500.0, "min": 1400.0, "max": 1600.0}
    results.add(Outcome(Case("engine", LLAMA_1B, 1, 128, 256), {"decode_tokens_per_second": speed}))
    results.add(Outcome(Case("ttft", LLAMA_1B, 64, 128, 1), {"first_token_s": {"max": 0.030}}))
    results.add(Outcome(Case("engine", LLAMA_1B, 4, 128, 128), {"decode_tokens_per_second": speed}))
    judged = {
        bar["what"]: (bar["measured"], bar["reached"])
        for bar in results.content()["bars"]
        if bar["measured"] is not None
    }
    assert judged == {
        f"{LLAMA_1B} decode, batch 1": (1500.0, True),
        f"{LLAMA_1B} last first token, batch 64": (pytest.approx(30.0), False),
    }


def test_the_start_of_a_command_that_fails_says_why() -> None:
    import sys

    with pytest.raises(RuntimeError, match="no such model"):
        start.start_once([sys.executable, "-c", "import sys; sys.exit('no such model')"])
    assert start.start_once([sys.executable, "-c", "print('serving')"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)  # Five processes that import torch, on whatever machine there is.
def test_the_command_measures_and_writes_every_section(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=300)
    plan = replace(TINY, sections=("ttft", "serving", "start"), batches=(2,))
    assert command.run(plan, tmp_path, "gpu", console) == 0, output.getvalue()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["case"]["section"] for row in found["rows"]} == {"ttft", "serving", "start"}
    assert all(row["result"] for row in found["rows"])
    assert (tmp_path / "gpu.png").stat().st_size > 0
    assert "through gRPC" in output.getvalue()
    served = [row for row in found["rows"] if row["case"]["section"] == "serving"]
    assert {row["case"]["variant"] for row in served} == {"", "one channel"}
    assert all(row["result"]["tokens_per_second"]["median"] > 0 for row in served)


def test_a_failed_row_makes_the_command_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan, model: str, cases: list[Case], progress: object) -> list[Outcome]:
        return [Outcome(case, error="boom [at] 7") for case in cases]

    monkeypatch.setattr(start, "run_cases", fail)
    output = io.StringIO()
    assert command.run(replace(TINY, sections=("start",)), tmp_path, "gpu", Console(file=output)) == 1
    assert "boom [at] 7" in output.getvalue()
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["error"] == "boom [at] 7"


def test_streams_of_one_message_have_no_pauses(tmp_path: Path) -> None:
    """A server that is held up may send all tokens of a short answer together."""
    spread = {"p50": 0.5, "p99": 0.75}
    served = {
        "tokens_per_second": {"median": 10.0, "min": 10.0, "max": 10.0},
        "tokens_per_message": 4.0,
        "first_token_s": spread,
        "token_gap_s": spread,
        "pause_s": {},
        "server_cores": 1.0,
        "client_processes": 1,
    }
    results = ResultFile(tmp_path, "gpu", {})
    results.add(Outcome(Case("serving", "tiny", 2, 8, 4), served))
    output = io.StringIO()
    print_tables(Console(file=output, width=300), results, SECTIONS)
    line = next(line for line in output.getvalue().splitlines() if "tiny" in line)
    assert [cell.strip() for cell in line.split("│")[8:11]] == ["500.00 / 750.00", "500.00 / 750.00", "-"]


def test_tables_have_a_line_for_every_row(tmp_path: Path) -> None:
    results = ResultFile(tmp_path, "gpu", {})
    edges = {"median_us": 2.0, "eager_us": 20.0, "speedup_over_eager": 10.0}
    results.add(Outcome(Case("edges", "", variant="rms_norm [256, 2048]"), edges))
    results.add(Outcome(Case("kernels", "tiny", 1, 128, 256), {"unavailable": "CUPTI does not work here"}))
    output = io.StringIO()
    print_tables(Console(file=output, width=200), results, SECTIONS)
    assert "rms_norm [256, 2048]" in output.getvalue()
    assert "CUPTI does not work here" in output.getvalue()
