"""Fault 46: mixed load with random faults, for seconds here and for half an hour by `tools/bench`."""

from __future__ import annotations

import pytest

from tools.bench import soak
from tools.bench.soak import SoakPlan


@pytest.mark.slow
def test_fault_46_a_soak_with_random_faults_loses_no_block_and_ends_each_call_once() -> None:
    """Growth says nothing in so short a time; all else has to hold, `soak.judge` says what."""
    seed = 46
    plan = SoakPlan(
        model="tiny",
        minutes=0.25,
        concurrency=8,
        backend="cpu",
        num_threads=1,
        max_new_tokens=60,
        max_growth_bytes=1 << 40,
        period_s=0.5,
        faults=True,
        disturbance_s=0.5,
        seed=seed,
    )
    found = soak.run(plan, lambda text: None)
    assert found.problems == [], f"seed {seed}"
    assert found.tally.codes["OK"] > 0
    assert found.disturbances.total() > 0
    assert found.log is not None
    assert found.log.injected.total() > 0
    assert max(one.used_blocks for one in found.samples) > 0
