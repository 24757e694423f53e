"""The sampler against a float64 oracle of its own, against transformers' processors, and by counting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from photon_grpc.runner import sampler as module
from photon_grpc.runner.philox import NoiseKeys
from photon_grpc.runner.sampler import NO_TOKEN, SampledRows, Sampler
from photon_grpc.scheduler.output import RowFault, SamplerSpec
from photon_grpc.types import EffectiveSampling

CPU = torch.device("cpu")
NEUTRAL = EffectiveSampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    seed=0,
    n=1,
)
GREEDY = replace(NEUTRAL, temperature=0.0)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A sequence as a test describes it."""

    sampling: EffectiveSampling = NEUTRAL
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    spec: dict[str, object] = field(default_factory=dict)

    @property
    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(self.sampling, **self.spec)  # type: ignore[arg-type]


def _sample(rows: list[Row], logits: torch.Tensor) -> SampledRows:
    sampler = Sampler(logits.shape[-1], CPU)
    for seq_id, row in enumerate(rows):
        sampler.add(seq_id, row.sampler_spec, row.prompt + row.output, len(row.prompt))
    return sampler.sample(range(len(rows)), logits)


# --- the oracle: one row, plain loops, float64 --------------------------------------------------


def _oracle_logits(row: Row, logits: torch.Tensor) -> list[float]:
    p = row.sampling
    values = [float(x) for x in logits]
    for token, bias in p.logit_bias:
        values[token] += bias
    for token in set(row.prompt + row.output):
        values[token] *= p.repetition_penalty if values[token] < 0 else 1 / p.repetition_penalty
    for token in set(row.output):
        values[token] -= p.frequency_penalty * row.output.count(token) + p.presence_penalty
    allowed = set(p.allowed_token_ids or range(len(values)))
    spec = row.sampler_spec
    if len(row.output) < spec.min_tokens and allowed - set(spec.banned_token_ids):
        allowed -= set(spec.banned_token_ids)
    return [value if token in allowed else -math.inf for token, value in enumerate(values)]


def _oracle_probs(row: Row, logits: torch.Tensor) -> Floats:
    p = row.sampling
    values = _oracle_logits(row, logits)
    top = max(values)
    probs = np.zeros(len(values))
    if p.temperature == 0:
        probs[values.index(top)] = 1.0
        return probs
    weights = [math.exp((value - top) / max(p.temperature, 1e-6)) for value in values]
    order = sorted(range(len(values)), key=lambda token: (-weights[token], token))
    if p.top_k:
        order = order[: p.top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if p.top_p < 1 and mass >= p.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    for token in kept:
        if weights[token] >= p.min_p:
            probs[token] = weights[token]
    return probs / probs.sum()


def _oracle_token(row: Row, logits: torch.Tensor) -> int:
    probs = _oracle_probs(row, logits)
    keys = NoiseKeys(
        np.array([row.sampling.seed], dtype=np.uint64), [row.sampler_spec.index], [len(row.output)]
    )
    noise = keys.gumbel_all(len(probs))[0].numpy()
    with np.errstate(divide="ignore"):
        return int((np.log(probs) + noise).argmax())


def _logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


_VOCAB = 24
_ids = st.integers(0, _VOCAB - 1)
_params = st.builds(
    replace,
    st.just(NEUTRAL),
    temperature=st.sampled_from([0.0, 1e-4, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    top_k=st.sampled_from([0, 1, 3, 10, _VOCAB]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(_ids, st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    allowed_token_ids=st.one_of(st.just(()), st.sets(_ids, min_size=1, max_size=6).map(tuple)),
)
_rows = st.builds(
    Row,
    _params,
    prompt=st.lists(_ids, max_size=6).map(tuple),
    output=st.lists(_ids, max_size=6).map(tuple),
    spec=st.fixed_dictionaries(
        {
            "index": st.integers(0, 7),
            "min_tokens": st.integers(0, 5),
            "banned_token_ids": st.sets(_ids, max_size=4).map(tuple),
            "top_logprobs": st.sampled_from([None, 0, 3]),
        }
    ),
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(_rows, min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_random_mixes_of_parameters_draw_the_oracles_tokens(rows: list[Row], seed: int) -> None:
    logits = _logits(len(rows), _VOCAB, seed)
    expected = [_oracle_token(row, values) for row, values in zip(rows, logits, strict=True)]
    result = _sample(rows, logits)
    assert result.token_ids == expected
    assert not result.faults
    # Alone, each row draws what it drew in company.
    assert [_sample([row], logits[i : i + 1]).token_ids[0] for i, row in enumerate(rows)] == expected


# --- frequencies --------------------------------------------------------------------------------


def _chi_square(row: Row, logits: torch.Tensor, draws: int = 20_000, seqs: int = 2_000) -> None:
    """Counts of many draws against the oracle; the seeds are fixed, so the outcome is too."""
    vocab = logits.shape[-1]
    sampler = Sampler(vocab, CPU)
    for seq_id in range(seqs):
        sampling = replace(row.sampling, seed=seq_id * 0x1_0000_0001)
        sampler.add(seq_id, SamplerSpec(sampling), row.prompt + row.output, len(row.prompt))
    counts = np.zeros(vocab)
    batch = logits.expand(seqs, -1).contiguous()
    for _ in range(draws // seqs):
        np.add.at(counts, sampler.sample(range(seqs), batch).token_ids, 1)
    expected = _oracle_probs(row, logits) * draws
    assert counts[expected == 0].sum() == 0
    # Cells too small for the approximation are counted as one.
    large = expected >= 5
    seen = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    statistic = (((seen - wanted) ** 2)[wanted > 0] / wanted[wanted > 0]).sum()
    freedom = (wanted > 0).sum() - 1
    # The 99.9 % point by Wilson and Hilferty (1931).
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
        {"allowed_token_ids": (3, 5, 8, 30), "logit_bias": ((3, 3.0), (5, -2.0))},
    ],
    ids=str,
)
def test_draws_have_the_right_frequencies(change: dict[str, object]) -> None:
    _chi_square(Row(replace(NEUTRAL, **change)), _logits(1, 40, seed=1, spread=1.5)[0])


def test_wide_nuclei_are_found_at_every_ranked_width() -> None:
    """Nearly flat rows whose nuclei are wider than each width that is tried before a full sort."""
    vocab = 4096
    logits = _logits(3, vocab, spread=0.01)
    rows = [Row(replace(NEUTRAL, top_p=p, seed=5)) for p in (0.02, 0.2, 0.9)]
    sizes = [int((_oracle_probs(row, logits[0]) > 0).sum()) for row in rows]
    first, second = module._RANKED_WIDTHS
    assert sizes[0] < first < sizes[1] < second < sizes[2]
    for seed in range(5):
        seeded = [replace(row, sampling=replace(row.sampling, seed=seed)) for row in rows]
        expected = [_oracle_token(row, values) for row, values in zip(seeded, logits, strict=True)]
        assert _sample(seeded, logits).token_ids == expected


# --- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.001}, TopPLogitsWarper(0.001)),
        ({"min_p": 0.15}, MinPLogitsWarper(0.15)),
    ],
    ids=["top_k", "top_p", "tiny top_p", "min_p"],
)
def test_survivors_are_those_of_transformers(change: dict[str, object], warper: object) -> None:
    for seed in range(10):
        logits = _logits(1, 64, seed)
        kept = set(torch.nonzero(warper(None, logits.clone())[0] > -math.inf).flatten().tolist())  # type: ignore[operator]
        rows = [Row(replace(NEUTRAL, seed=s, temperature=1.0, **change)) for s in range(300)]
        drawn = set(_sample(rows, logits.expand(300, -1)).token_ids)
        assert drawn <= kept
        oracle = _oracle_probs(rows[0], logits[0])
        assert set(np.flatnonzero(oracle).tolist()) == kept
        likely = {token for token in kept if oracle[token] > 0.05}
        assert likely <= drawn


def test_repetition_penalty_is_that_of_transformers() -> None:
    for seed in range(20):
        logits = _logits(1, 32, seed, spread=1.0)
        sampling = replace(GREEDY, repetition_penalty=1.8)
        prompt, output = (1, 2, 3), tuple(range(10, 20))
        expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + output]), logits.clone())
        assert _sample([Row(sampling, prompt, output)], logits).token_ids == expected.argmax(-1).tolist()


# --- single parameters --------------------------------------------------------------------------


def test_fault_20_greedy_is_the_lowest_index_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    assert _sample([Row(GREEDY), Row(GREEDY)], logits).token_ids == [1, 0]
    top_1 = Row(replace(NEUTRAL, top_k=1, seed=9))
    assert _sample([top_1, top_1], logits).token_ids == [1, 0]


def test_a_tiny_temperature_is_greedy_without_a_fault() -> None:
    logits = _logits(4, 100)
    for temperature in (1e-4, 1e-30, 5e-324):
        rows = [Row(replace(NEUTRAL, temperature=temperature, seed=s)) for s in range(4)]
        result = _sample(rows, logits)
        assert result.token_ids == logits.argmax(-1).tolist()
        assert not result.faults


def test_the_token_that_crosses_p_is_kept() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, kept in ((0.4, {0}), (0.5001, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (0.96, {0, 1, 2, 3})):
        rows = [Row(replace(NEUTRAL, top_p=p, seed=s)) for s in range(400)]
        assert set(_sample(rows, logits.expand(400, -1)).token_ids) == kept


def test_equal_logits_rank_by_id() -> None:
    rows = [Row(replace(NEUTRAL, top_k=3, seed=s)) for s in range(200)]
    assert set(_sample(rows, torch.zeros(200, 300)).token_ids) == {0, 1, 2}
    rows = [Row(replace(NEUTRAL, top_p=0.5, seed=s)) for s in range(300)]
    assert set(_sample(rows, torch.zeros(300, 8)).token_ids) == {0, 1, 2, 3}
    signed_zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0]).expand(100, -1)
    rows = [Row(replace(NEUTRAL, top_k=2, seed=s)) for s in range(100)]
    assert set(_sample(rows, signed_zeros).token_ids) == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.2},
        {"top_p": 0.3},
        {"top_k": 2},
        {"min_p": 0.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"seed": 1},
        {"logit_bias": ((7, 20.0),)},
        {"allowed_token_ids": (2, 4)},
    ],
    ids=str,
)
def test_fault_20_each_parameter_changes_the_result(change: dict[str, object]) -> None:
    logits = _logits(64, 50, spread=1.0)

    def tokens(sampling: EffectiveSampling) -> list[int]:
        rows = [
            Row(replace(sampling, seed=sampling.seed * 1000 + i), (1, 2), tuple(range(3, 30)))
            for i in range(64)
        ]
        return _sample(rows, logits).token_ids

    assert tokens(replace(NEUTRAL, **change)) != tokens(NEUTRAL)


def test_penalties_count_what_they_should() -> None:
    """Presence once, frequency per occurrence, both over the output alone; repetition over all."""
    logits = torch.zeros(1, 6)
    prompt, output = (0, 0, 1), (2, 3, 3)
    cases = [
        ({"presence_penalty": 1.0}, [0.0, 0.0, -1.0, -1.0, 0.0, 0.0]),
        ({"frequency_penalty": 0.5}, [0.0, 0.0, -0.5, -1.0, 0.0, 0.0]),
        ({"repetition_penalty": 2.0}, [-2.0, -2.0, -2.0, -2.0, -1.0, -1.0]),
    ]
    for change, expected in cases:
        base = logits - 1 if "repetition_penalty" in change else logits
        row = Row(replace(NEUTRAL, **change), prompt, output)
        sampler = Sampler(6, CPU)
        sampler.add(0, row.sampler_spec, prompt + output, len(prompt))
        assert sampler._sequences[0].process(base[0].numpy()).tolist() == expected


def test_penalties_follow_the_tokens_as_they_come() -> None:
    row = Row(replace(GREEDY, frequency_penalty=0.6, repetition_penalty=1.2, presence_penalty=0.1))
    logits = torch.tensor([[3.0, 2.9, 2.5, -1.0]])
    sampler = Sampler(4, CPU)
    sampler.add(0, row.sampler_spec, (), 0)
    output: tuple[int, ...] = ()
    for _ in range(12):
        expected = _oracle_token(replace(row, output=output), logits[0])
        assert sampler.sample([0], logits).token_ids == [expected]
        output += (expected,)
    assert len(set(output)) > 1


def test_banned_ids_wait_for_min_tokens() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0]])
    row = Row(GREEDY, spec={"min_tokens": 2, "banned_token_ids": (1, 2)})
    sampler = Sampler(3, CPU)
    sampler.add(0, row.sampler_spec, (), 0)
    assert [sampler.sample([0], logits).token_ids[0] for _ in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("sampling", [GREEDY, NEUTRAL])
def test_a_ban_on_everything_allowed_does_not_apply(sampling: EffectiveSampling) -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0]])
    spec = {"min_tokens": 5, "banned_token_ids": (1, 2)}
    result = _sample([Row(replace(sampling, allowed_token_ids=(2, 1)), spec=spec)], logits)
    assert not result.faults
    assert result.token_ids[0] in (1, 2)
    everything = {"min_tokens": 5, "banned_token_ids": (0, 1, 2)}
    assert not _sample([Row(sampling, spec=everything)], logits).faults


def test_an_allowed_set_is_never_left() -> None:
    rows = [Row(replace(NEUTRAL, allowed_token_ids=(5, 9), temperature=2.0, seed=s)) for s in range(100)]
    logits = _logits(100, 64)
    logits[:, 0] = 1e4
    assert set(_sample(rows, logits).token_ids) == {5, 9}


# --- seeds --------------------------------------------------------------------------------------


def _stream(company: int, steps: int = 40, preempt_at: int = -1, where: int = 0) -> list[int]:
    """Tokens of one sequence whose logits depend on its own history, beside `company` other rows."""
    vocab = 300
    table = _logits(vocab, vocab, seed=3, spread=2.0)
    mine = Row(
        replace(NEUTRAL, temperature=0.9, top_p=0.97, frequency_penalty=0.3, seed=2**63 + 17), prompt=(4, 5)
    )
    sampler = Sampler(vocab, CPU)
    sampler.add(1000, mine.sampler_spec, mine.prompt, 2)
    for seq_id in range(company):
        sampling = [NEUTRAL, GREEDY, replace(NEUTRAL, top_k=40), replace(NEUTRAL, min_p=0.1)][seq_id % 4]
        sampler.add(seq_id, SamplerSpec(replace(sampling, seed=seq_id)), (), 0)
    history = list(mine.prompt)
    for step in range(steps):
        if step == preempt_at:
            sampler.remove(1000)
            sampler.sample(range(company), _logits(company, vocab, seed=step))
            sampler.add(1000, mine.sampler_spec, history, 2)
        others = _logits(company, vocab, seed=step)
        seq_ids = list(range(company))
        seq_ids.insert(where, 1000)
        logits = torch.cat([others[:where], table[history[-1]][None], others[where:]])
        history.append(sampler.sample(seq_ids, logits).token_ids[where])
    return history


def test_fault_20_a_seed_gives_the_same_tokens_in_any_company_and_after_preemption() -> None:
    alone = _stream(company=0)
    assert len(set(alone)) > 10
    assert _stream(company=7, where=3) == alone
    assert _stream(company=16, where=16) == alone
    assert _stream(company=3, preempt_at=13) == alone


def test_completions_of_one_seed_differ() -> None:
    rows = [Row(replace(NEUTRAL, seed=5), spec={"index": index}) for index in range(8)]
    logits = torch.zeros(8, 1000)
    assert len(set(_sample(rows, logits).token_ids)) > 4


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    """Scores, noise and log-probabilities, not only the tokens they lead to; sizes around SIMD widths."""
    for vocab in (37, 1000, 4099):
        logits = _logits(9, vocab)
        rows = [Row(replace(NEUTRAL, seed=i), spec={"top_logprobs": 5}) for i in range(9)]
        together = _sample(rows, logits)
        for i, row in enumerate(rows):
            alone = _sample([row], logits[i : i + 1])
            assert alone.token_ids == together.token_ids[i : i + 1]
            assert alone.logprobs[0] == together.logprobs[i]


# --- faults and extremes ------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, NEUTRAL, replace(NEUTRAL, top_p=0.5, repetition_penalty=1.5)])
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf", "one nan among -inf"])
def test_fault_06_a_non_finite_row_fails_alone(sampling: EffectiveSampling, poison: str) -> None:
    rows = [Row(replace(sampling, seed=i), (1,), (2, 3), {"top_logprobs": 1}) for i in range(3)]
    logits = _logits(3, 40)
    clean = _sample(rows, logits)
    bad = logits.clone()
    if poison == "nan":
        bad[1, 7] = math.nan
    elif poison == "inf":
        bad[1, 39] = math.inf
    else:
        bad[1] = -math.inf
        if poison != "all -inf":
            bad[1, 3] = math.nan
    result = _sample(rows, bad)
    assert result.faults == {1: RowFault.NON_FINITE_LOGITS}
    assert result.token_ids == [clean.token_ids[0], NO_TOKEN, clean.token_ids[2]]
    assert result.logprobs == {i: clean.logprobs[i] for i in (0, 2)}


def test_a_faulted_row_does_not_advance() -> None:
    row = Row(replace(NEUTRAL, seed=3))
    logits = _logits(2, 200)
    sampler = Sampler(200, CPU)
    sampler.add(0, row.sampler_spec, (), 0)
    assert sampler.sample([0], torch.full((1, 200), math.nan)).token_ids == [NO_TOKEN]
    assert sampler.sample([0], logits[:1]).token_ids == _sample([row], logits[:1]).token_ids


def test_minus_infinity_among_finite_logits_is_never_drawn() -> None:
    logits = torch.full((50, 30), -math.inf)
    logits[:, 11] = 0.0
    logits[:, 12] = -1.0
    rows = [Row(replace(NEUTRAL, seed=s, top_k=(0, 5)[s % 2])) for s in range(50)]
    result = _sample(rows, logits)
    assert set(result.token_ids) == {11, 12}
    # Nothing that the caller allows can be drawn: that row's fault.
    only = Row(replace(NEUTRAL, allowed_token_ids=(1, 2)))
    assert _sample([only], logits[:1]).faults == {0: RowFault.NON_FINITE_LOGITS}


@pytest.mark.parametrize("scale", [1e4, 1e38])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 1e-4},
        {"top_k": 3, "top_p": 0.9},
        {"min_p": 0.5},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 2.0},
    ],
    ids=str,
)
def test_extreme_logits_give_valid_tokens(scale: float, change: dict[str, object]) -> None:
    logits = torch.tensor([[scale, -scale, 0.0, scale, -scale, 1.0]])
    result = _sample([Row(replace(NEUTRAL, **change), (0, 1), (3,), {"top_logprobs": 6})], logits)
    assert not result.faults
    assert 0 <= result.token_ids[0] < 6
    assert all(not math.isnan(value) for _, value in result.logprobs[0].top)


def test_logits_are_left_as_they_were() -> None:
    logits = _logits(2, 50)
    before = logits.clone()
    row = Row(replace(NEUTRAL, logit_bias=((1, 5.0),), allowed_token_ids=(1, 2), top_k=1), (1,), (2,))
    _sample([row, Row(NEUTRAL)], logits)
    assert torch.equal(logits, before)


# --- log-probabilities --------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = _logits(3, 60)
    sampling = replace(NEUTRAL, temperature=0.1, top_k=2, logit_bias=((5, 100.0),), seed=1)
    rows = [Row(sampling, spec={"top_logprobs": top}) for top in (None, 0, 4)]
    result = _sample(rows, logits)
    assert result.token_ids == [5, 5, 5]
    expected = logits.numpy().astype(np.float64)
    expected -= np.log(np.exp(expected).sum(axis=-1, keepdims=True))
    assert set(result.logprobs) == {1, 2}
    assert result.logprobs[1].logprob == pytest.approx(expected[1, 5], abs=1e-12)
    assert result.logprobs[1].top == ()
    top = result.logprobs[2].top
    order = np.argsort(-expected[2], kind="stable")[:4]
    assert [token for token, _ in top] == order.tolist()
    assert [value for _, value in top] == pytest.approx(expected[2, order].tolist(), abs=1e-12)


def test_equal_logprobs_come_in_order_of_id() -> None:
    row = Row(GREEDY, spec={"top_logprobs": 3})
    result = _sample([row], torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]))
    assert [token for token, _ in result.logprobs[0].top] == [1, 3, 0]
    signed_zeros = _sample([row], torch.tensor([[-0.0, 0.0, -0.0, 0.0]]))
    assert [token for token, _ in signed_zeros.logprobs[0].top] == [0, 1, 2]


def test_more_alternatives_than_entries() -> None:
    assert len(_sample([Row(GREEDY, spec={"top_logprobs": 20})], _logits(1, 4)).logprobs[0].top) == 4


@pytest.mark.parametrize("top", [0, 5])
def test_prompt_logprobs(top: int) -> None:
    logits = _logits(7, 33)
    targets = torch.arange(7) * 3
    entries = Sampler(33, CPU).prompt_logprobs(logits, targets, top)
    expected = torch.log_softmax(logits.double(), dim=-1)
    values, ids = expected.topk(5)
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[i, targets[i]].item(), abs=1e-12)
        assert [token for token, _ in entry.top] == ids[i, :top].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values[i, :top].tolist(), abs=1e-12)


# --- what is not computed -----------------------------------------------------------------------


def test_plain_greedy_rows_cost_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "_choose", None)
    monkeypatch.setattr(Sampler, "_logprobs", None)
    logits = _logits(3, 40)
    assert _sample([Row(GREEDY)] * 3, logits).token_ids == logits.argmax(-1).tolist()


def test_truncated_rows_draw_noise_for_survivors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseKeys, "gumbel_all", None)
    drawn: list[int] = []
    original = NoiseKeys.gumbel_at

    def counting(self: NoiseKeys, token_ids: torch.Tensor) -> torch.Tensor:
        drawn.append(token_ids.numel())
        return original(self, token_ids)

    monkeypatch.setattr(NoiseKeys, "gumbel_at", counting)
    for change in ({"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.5}, {"allowed_token_ids": tuple(range(9))}):
        drawn.clear()
        _sample([Row(replace(NEUTRAL, **change))], _logits(1, 2000))  # type: ignore[arg-type]
        assert sum(drawn) < 200
