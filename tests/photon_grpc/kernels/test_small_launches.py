"""Every kernel in the smallest launches that take each of its paths: what compute-sanitizer runs.

racecheck slows a kernel down a hundred times, so shapes are tiny and the device is said to have two
multiprocessors: a few CTAs then have all that a full grid has, several tiles or rows each, a ring that turns
over, splits, teams, clusters of every size. Results are judged on the CPU, since kernels of torch are not
what is looked at. `tools/sanitize` picks by kernel; by tools/gpu_test they run as any other test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import gemv as gemv_module
from photon_grpc.kernels import head_gemm as head_module
from photon_grpc.kernels import launcher
from photon_grpc.kernels import paged_attention_decode as decode_module
from photon_grpc.kernels import paged_attention_prefill as prefill_module
from photon_grpc.kernels import sampling as sampling_module
from photon_grpc.kernels import skinny_gemm as skinny_module
from photon_grpc.kernels import skinny_gemm_tma as tma_module
from photon_grpc.kernels.apply_updates import SEGMENT_DTYPE, apply_updates
from photon_grpc.kernels.best_token import best_token
from photon_grpc.kernels.embedding import embedding
from photon_grpc.kernels.launcher import Variant
from photon_grpc.kernels.linear_output import OUTPUTS, LinearOutput, best_rows
from photon_grpc.kernels.registry import SPECS
from photon_grpc.kernels.rmsnorm import add_rms_norm, rms_norm
from photon_grpc.kernels.rope_store_kv import qk_norm_rope, rope_store_kv, store_kv
from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.kernels.silu_and_mul import silu_and_mul
from photon_grpc.kernels.skinny_gemm_tma import Cut, skinny_gemm_tma
from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows, step_inputs
from photon_grpc.kernels.swiglu_gemm import swiglu_gemm
from photon_grpc.runner.cuda_sampler import CudaSampler, pack_sequence
from photon_grpc.runner.sampler import Sampler
from photon_grpc.scheduler.output import SamplerSpec
from tests.support import linear
from tests.support.builders import sampling
from tests.support.kernels import ALL_TYPES, Fenced, assert_ulps, randn
from tests.support.linear import Heads, make_weight
from tests.support.paged_attention import Rows, Shape, assert_close, attend, make_rows
from tests.support.raw_heads import RawStep
from tests.support.rotary import CANCELLED, EPS, Case, rotated
from tests.support.step_device import step_inputs_oracle

BF16, F16 = torch.bfloat16, torch.float16
NUM_MULTIPROCESSORS = 2

Launch = Callable[[pytest.MonkeyPatch], None]
LAUNCHES: dict[str, dict[str, Launch]] = {spec.name: {} for spec in SPECS}
"""Of each kernel, by what is special about it."""


def case(kernel: str, name: str, launch: Launch) -> None:
    assert name not in LAUNCHES[kernel]
    LAUNCHES[kernel][name] = launch


# --- products -----------------------------------------------------------------------------------

SMALL_HEADS = Heads(2, 1, 16)


def run_product(
    kind: str, n: int, k: int, tokens: int, dtype: torch.dtype, multiply: Callable[..., None], *, bias: bool
) -> None:
    heads = SMALL_HEADS if kind == "rope_and_store" else None
    weight = make_weight(heads.n if heads else n, k, dtype)
    chosen = randn(weight.shape[0], dtype=dtype, seed=4) if bias and kind != "float_rows" else None
    product = linear.Case(kind, randn(tokens, k, dtype=dtype, seed=2), weight, chosen, heads)
    memory = Fenced()
    x, on_device = memory.copy(product.x), memory.copy(weight)
    linear.check(product, lambda output: multiply(output, x, on_device))
    memory.check()


def gemv_case(kind: str, tokens: int, dtype: torch.dtype, staged: bool) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        # Six tiles, of which each CTA has several: x is staged, unless that never pays.
        patch.setattr(gemv_module, "_MIN_STAGED_TILES", 1 if staged else 1 << 20)
        run_product(kind, 96, 1096, tokens, dtype, gemv_module.gemv, bias=tokens % 2 == 1)

    return launch


def best_case(tokens: int, dtype: torch.dtype, by: Cut | str, *, staged: bool = False) -> Launch:
    """The best row of a product by parts, and the token of all of them."""

    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(gemv_module, "_MIN_STAGED_TILES", 1 if staged else 1 << 20)
        n, k = {"gemv": (90, 1096), "head_gemm": (700, 328)}.get(str(by), (0, 0))
        if isinstance(by, Cut):
            n, k = 4 * by.rows * by.sharers + 24, 200
        weight = make_weight(n, k, dtype)
        weight[n - 1] = weight[5]
        x = randn(tokens, k, dtype=dtype, seed=2)
        x[tokens - 1] = weight[5] * 8
        if by == "gemv":
            num_parts = gemv_module.num_parts(tokens, n)
        elif by == "head_gemm":
            num_parts = head_module.num_parts(n)
        else:
            patch.setattr(tma_module, "cut", lambda n, k: by)
            num_parts = tma_module.num_parts(n, k)
        memory = Fenced()
        ranks = memory.empty(tokens, num_parts, dtype=torch.int64)
        output = best_rows(ranks, n)
        arguments = memory.copy(x), memory.copy(weight)
        multiply = {"gemv": gemv_module.gemv, "head_gemm": head_module.head_gemm}.get(
            str(by), skinny_gemm_tma
        )
        multiply(output, *arguments)
        state = SamplingState.allocate(tokens, 4, torch.device("cuda"))
        slots = memory.copy(torch.arange(tokens, dtype=torch.int32))
        token_ids = memory.empty(tokens, dtype=torch.int32)
        best_token(token_ids, ranks, slots, state)
        memory.check()
        exact = x.double() @ weight.double().T
        found = token_ids.cpu().long()
        assert int(found[tokens - 1]) == 5
        assert bool((exact.max(-1).values - exact.gather(1, found[:, None])[:, 0] < 1e-3).all())

    return launch


def logits_case(tokens: int, n: int, k: int, dtype: torch.dtype) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        run_product("float_rows", n, k, tokens, dtype, head_module.head_gemm, bias=False)

    return launch


def normed_gemv_case(kind: str, tokens: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        heads = SMALL_HEADS if kind == "rope_and_store" else None
        residual = randn(tokens, 1096, dtype=torch.float32, seed=5) * 20
        norm, weight = randn(1096, dtype=BF16, seed=6), make_weight(heads.n if heads else 96, 1096, BF16)
        scale = (residual.double().square().mean(-1) + EPS).rsqrt()
        product = linear.Case(kind, (residual * norm.float()).to(BF16), weight, None, heads, scale)
        on_device = [tensor.cuda() for tensor in (residual, norm, weight)]
        linear.check(
            product,
            lambda out: gemv_module.normed_gemv(out, on_device[0], on_device[1], EPS, on_device[2]),
        )

    return launch


def swiglu_case(dtype: torch.dtype, tokens: int, inner: int, k: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        weight = make_weight(2 * inner, k, dtype)
        product = linear.Case("silu_and_mul", randn(tokens, k, dtype=dtype, seed=2), weight, None)
        memory = Fenced()
        x, on_device = memory.copy(product.x), memory.copy(weight)
        linear.check(product, lambda output: swiglu_gemm(output.out, x, on_device))
        memory.check()

    return launch


def skinny_case(
    kind: str, tokens: int, dtype: torch.dtype, rows: int, cluster: int, warpgroup: bool
) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(skinny_module, "tiling", lambda n, k: skinny_module.Tiling(rows, cluster))

        def multiply(output: LinearOutput, x: Tensor, weight: Tensor) -> None:
            skinny_module.skinny_gemm(output, x, weight, warpgroup=warpgroup)

        # Rows that fill no last tile, more tiles than CTAs where there is no cluster, and k with a tail.
        run_product(kind, 4 * rows + 32, 192 * cluster + 8, tokens, dtype, multiply, bias=tokens % 2 == 1)

    return launch


def skinny_tma_case(kind: str, tokens: int, dtype: torch.dtype, by: Cut) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        def multiply(output: LinearOutput, x: Tensor, weight: Tensor) -> None:
            skinny_gemm_tma(output, x, weight, by=by)

        n, k = 4 * by.rows * by.sharers + 32, 192 * by.splits + 8
        run_product(kind, n, k, tokens, dtype, multiply, bias=tokens % 2 == 1)

    return launch


CUTS = (Cut(128, 1, 2), Cut(128, 8, 1), Cut(64, 4, 1, 2), Cut(64, 1, 2, 2), Cut(256, 1, 2), Cut(64, 2, 2))
for i, kind in enumerate(OUTPUTS):
    for j, by in enumerate(CUTS):
        tokens = skinny_module.TOKEN_TILES[(i + j) % 6] - (i + j) % 2
        dtype = F16 if (i + j) % 4 == 3 else BF16
        name = f"{kind}-{tokens}-{by.rows}x{by.splits}x{by.sharers}x{by.residents}"
        case("skinny_gemm_tma", name, skinny_tma_case(kind, tokens, dtype, by))
for tokens, dtype, by in ((16, BF16, CUTS[0]), (61, BF16, CUTS[0]), (128, F16, CUTS[3]), (3, BF16, CUTS[3])):
    case("skinny_gemm_tma", f"best_rows-{tokens}-{by.rows}x{by.residents}", best_case(tokens, dtype, by))
case("gemv", "best_rows-3-direct", best_case(3, BF16, "gemv"))
case("gemv", "best_rows-16-staged", best_case(16, F16, "gemv", staged=True))
# Both CTAs with tokens, one of them without, several tiles a cluster and a last one that is not full.
case("head_gemm", "best_rows-3", best_case(3, F16, "head_gemm"))
case("head_gemm", "best_rows-300", best_case(300, BF16, "head_gemm"))
case("head_gemm", "float_rows-130", logits_case(130, 700, 328, BF16))
case("best_token", "behind-gemv", best_case(8, BF16, "gemv", staged=True))
# Of two CTAs that share tiles: both full and one empty, several rounds, k with a tail and less than a stage.
case("swiglu_gemm", "one-cta", swiglu_case(F16, 3, 128, 72))
case("swiglu_gemm", "rounds", swiglu_case(BF16, 300, 256, 1032))
for i, kind in enumerate(OUTPUTS):
    case("gemv", f"{kind}-3-direct", gemv_case(kind, 3, BF16, staged=False))
    case("gemv", f"{kind}-9-staged", gemv_case(kind, 9, BF16, staged=True))
    case("gemv", f"{kind}-f16", gemv_case(kind, (1, 8, 16)[i % 3], F16, staged=i % 2 == 0))
    case("gemv", f"{kind}-3-normed", normed_gemv_case(kind, 3))
    case("gemv", f"{kind}-16-normed", normed_gemv_case(kind, 16))
    for warpgroup in (False, True):
        unit = "wgmma" if warpgroup else "mma"
        for j, cluster in enumerate((1, 2, 4, 8)):
            number = i + j + 2 * warpgroup
            tokens = skinny_module.TOKEN_TILES[number % 6] - number % 2
            rows = (64, 128)[(i + j) % 2]
            case(
                "skinny_gemm",
                f"{kind}-{tokens}-{rows}x{cluster}-{unit}",
                skinny_case(kind, tokens, F16 if number % 4 == 3 else BF16, rows, cluster, warpgroup),
            )


# --- attention ----------------------------------------------------------------------------------


def check_attention(rows: Rows, starts: tuple[int, ...], q: Tensor, out: Tensor) -> None:
    for row, context in enumerate(rows.contexts):
        new = slice(starts[row], starts[row + 1])
        if context.shape[0] == 0:
            assert not out[new].any()
        elif new.start < new.stop:
            assert_close(out[new], attend(q[new], context, rows.shape.scale), context)


def decode_case(shape: Shape, lens: tuple[int, ...], sharers: int, reads_early: bool) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(decode_module, "num_sharers", lambda *_: sharers)
        rows = make_rows(shape, lens, "cuda")
        memory = Fenced()
        q = randn(len(lens), shape.num_heads, shape.head_dim, dtype=shape.dtype, seed=7)
        # As the engine has it: nobody has written it, so that initcheck sees what is read unwritten.
        workspace = decode_module.allocate_workspace(
            len(lens), shape.num_heads, shape.num_kv_heads, shape.head_dim, "cuda"
        )
        on_device = memory.copy(q)
        for _ in range(2):
            out = memory.empty(*q.shape, dtype=shape.dtype)
            decode_module.paged_attention_decode(
                out,
                workspace,
                on_device,
                rows.kv_cache,
                rows.block_tables,
                rows.context_lens,
                shape.scale,
                reads_early=reads_early,
            )
            check_attention(rows, tuple(range(len(lens) + 1)), q, out.cpu())
        memory.check()

    return launch


def raw_case(shape: Shape, sharers: int, normed: bool, reads_early: bool) -> Launch:
    """q, k and v finished by attention."""

    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(decode_module, "num_sharers", lambda *_: sharers)
        step = RawStep(make_rows(shape, LENS, "cuda"), normed)
        for _ in range(2):
            step.check(step.together(reads_early=reads_early)[0])

    return launch


def prefill_case(shape: Shape, pairs: tuple[tuple[int, int], ...], *, wgmma: bool) -> Launch:
    """`pairs` are new tokens and context length of each row."""

    def launch(patch: pytest.MonkeyPatch) -> None:
        if not wgmma:
            patch.setattr(prefill_module, "WGMMA_TILINGS", {})
        query_lens, lens = zip(*pairs, strict=True)
        starts = (0, *accumulate(query_lens))
        rows = make_rows(shape, lens, "cuda")
        memory = Fenced()
        q = randn(starts[-1], shape.num_heads, shape.head_dim, dtype=shape.dtype, seed=7)
        out = memory.empty(*q.shape, dtype=shape.dtype)
        prefill_module.paged_attention_prefill(
            out,
            memory.copy(q),
            rows.kv_cache,
            rows.block_tables,
            rows.context_lens,
            memory.copy(torch.tensor(starts, dtype=torch.int32)),
            shape.scale,
        )
        check_attention(rows, starts, q, out.cpu())
        memory.check()

    return launch


# Of one chunk of 512 tokens and of several; small teams have room for the splits of eight kv heads.
LENS = (1, 0, 17, 512, 513, 1100)
for sharers in (8, 4, 2, 1):
    plain = decode_case(Shape(8, 2, 64, 16), LENS, sharers, False)
    early = decode_case(Shape(1, 4, 128, 32), (1, 33, 520), sharers, True)
    case("paged_attention_decode", f"teams-of-{sharers}", plain)
    case("paged_attention_decode", f"teams-of-{sharers}-early", early)
for shape in (Shape(1, 7, 64, 16, F16), Shape(1, 8, 128, 32), Shape(1, 1, 16, 16), Shape(1, 5, 80, 64)):
    case("paged_attention_decode", str(shape), decode_case(shape, (2, 300), 8, False))
case("paged_attention_decode", "long-splits", decode_case(Shape(32, 1, 16, 16), (4200, 3), 8, False))
for sharers in (8, 4, 2, 1):
    normed = raw_case(Shape(1, 2, 128, 16), sharers, True, sharers % 4 == 0)
    case("paged_attention_decode", f"raw-teams-of-{sharers}", normed)
for shape in (Shape(1, 7, 64, 16, F16), Shape(1, 1, 16, 16), Shape(2, 3, 80, 64)):
    case("paged_attention_decode", f"raw-{shape}", raw_case(shape, 8, shape.head_dim == 64, True))
PAIRS = ((17, 17), (0, 40), (33, 97), (1, 70), (64, 64), (0, 0), (130, 300))
for shape in (Shape(2, 4, 64, 16), Shape(1, 7, 128, 32, F16), Shape(1, 1, 16, 16), Shape(1, 16, 80, 64)):
    case("paged_attention_prefill", str(shape), prefill_case(shape, PAIRS, wgmma=False))
for shape in (Shape(2, 4, 64, 16), Shape(1, 7, 128, 32, F16), Shape(1, 1, 64, 64), Shape(1, 16, 128, 16)):
    case("paged_attention_prefill_wgmma", str(shape), prefill_case(shape, PAIRS, wgmma=True))


# --- norms, rotation, elementwise ---------------------------------------------------------------


def rms_norm_case(dtype: torch.dtype, hidden: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        memory = Fenced()
        x, weight = randn(3, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
        out = memory.empty(3, hidden, dtype=dtype)
        rms_norm(out, memory.copy(x), memory.copy(weight), EPS)
        assert_ulps(out, norm_oracle(x, weight))
        memory.check()

    return launch


def add_rms_norm_case(dtype: torch.dtype, hidden: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        memory = Fenced()
        x, weight = randn(3, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
        residual = randn(3, hidden, dtype=torch.float32, seed=2)
        out, kept = memory.empty(3, hidden, dtype=dtype), memory.copy(residual)
        add_rms_norm(out, kept, memory.copy(x), memory.copy(weight), EPS)
        assert torch.equal(kept.cpu(), residual + x.float())
        assert_ulps(out, norm_oracle(residual + x.float(), weight))
        memory.check()

    return launch


def norm_oracle(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rope_case(dtype: torch.dtype, heads: tuple[int, int, int], index: torch.dtype, normed: bool) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        given = Case(5, *heads, block_size=16, dtype=dtype)
        memory = Fenced()
        weights = (randn(given.head_dim, dtype=dtype, seed=5), randn(given.head_dim, dtype=dtype, seed=6))
        norms = (memory.copy(weights[0]), memory.copy(weights[1])) if normed else None
        q, k, v = given.parts()
        q_out, cache = memory.empty(*q.shape, dtype=dtype), memory.empty(*given.cache_shape, dtype=dtype)
        table, positions = memory.copy(given.table), memory.copy(given.positions.to(index))
        slots = memory.copy(given.slots)
        rope_store_kv(q_out, cache, memory.copy(given.qkv), norms, EPS, table, positions, slots)
        q_weight, k_weight = weights if normed else (None, None)
        turned = rotated(q, q_weight, given.table, given.positions)
        assert_ulps(q_out, turned, floor=CANCELLED)
        given.check_cache(cache, rotated(k, k_weight, given.table, given.positions), v)
        alone = memory.copy(q.contiguous())
        qk_norm_rope(alone, None if norms is None else norms[0], EPS, table, positions)
        assert_ulps(alone, turned, floor=CANCELLED)
        memory.check()

    return launch


def store_kv_case(dtype: torch.dtype) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        given = Case(5, 0, 3, 80, block_size=16, dtype=dtype)
        memory = Fenced()
        cache = memory.empty(*given.cache_shape, dtype=dtype)
        kv = given.qkv.view(5, 2, 3, 80)
        store_kv(cache, memory.copy(kv), memory.copy(given.slots))
        given.check_cache(cache, kv[:, 0].double(), kv[:, 1])
        memory.check()

    return launch


def silu_case(dtype: torch.dtype, inner: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        memory = Fenced()
        gate_up = randn(3, 2 * inner, dtype=dtype)
        out = memory.empty(3, inner, dtype=dtype)
        silu_and_mul(out, memory.copy(gate_up))
        gate, up = gate_up.double().chunk(2, -1)
        assert_ulps(out, torch.nn.functional.silu(gate) * up, floor=torch.finfo(dtype).tiny)
        memory.check()

    return launch


def embedding_case(dtype: torch.dtype, index: torch.dtype) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        memory = Fenced()
        weight, ids = randn(10, 328, dtype=dtype), torch.tensor([9, 0, 3], dtype=index)
        out = memory.empty(3, 328, dtype=torch.float32)
        embedding(out, memory.copy(ids), memory.copy(weight))
        assert torch.equal(out.cpu(), weight[ids.long()].float())
        memory.check()

    return launch


for dtype in ALL_TYPES:
    word = str(dtype).removeprefix("torch.")
    for hidden in (8, 520, 2048):
        case("rms_norm", f"{word}-{hidden}", rms_norm_case(dtype, hidden))
        if dtype is not torch.float32:
            case("add_rms_norm", f"{word}-{hidden}", add_rms_norm_case(dtype, hidden))
    for heads in ((4, 2, 64), (3, 1, 80), (2, 1, 512)):
        for normed in (False, True):
            index = torch.int32 if normed else torch.int64
            name = f"{word}-{heads[2]}-{'normed' if normed else 'plain'}"
            case("rope_store_kv", name, rope_case(dtype, heads, index, normed))
    case("store_kv", word, store_kv_case(dtype))
    for inner in (8, 2056):
        case("silu_and_mul", f"{word}-{inner}", silu_case(dtype, inner))
    for index in (torch.int32, torch.int64):
        case("embedding", f"{word}-{index}", embedding_case(dtype, index))
case("rms_norm", "all-threads", rms_norm_case(BF16, 16384))
case("add_rms_norm", "all-threads", add_rms_norm_case(BF16, 16384))


# --- the step's own ------------------------------------------------------------------------------


def apply_updates_case(patch: pytest.MonkeyPatch) -> None:
    memory = Fenced()
    counts = [1, 130, 0, 5]
    targets = [memory.empty(count, dtype=torch.int32) for count in counts]
    starts = [0, *accumulate(counts[:-1])]
    segments = np.array(
        [(target.data_ptr(), start, len(target)) for target, start in zip(targets, starts, strict=True)],
        dtype=SEGMENT_DTYPE,
    )
    first = -(-sum(counts) // 4) * 4
    message = np.zeros(first + 4 * len(segments), dtype=np.int32)
    message[: sum(counts)] = np.arange(sum(counts))
    message[first:] = segments.view(np.int32)
    apply_updates(memory.copy(torch.from_numpy(message)), first, len(segments))
    for target, start in zip(targets, starts, strict=True):
        assert target.tolist() == list(range(start, start + len(target)))
    memory.check()


def step_inputs_case(num_decodes: int, counts: tuple[int, ...], idle: int, spare: int) -> Launch:
    def launch(patch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(1)
        state = SequenceState(
            num_computed=torch.randint(300, (8,), generator=generator, dtype=torch.int32),
            tables=torch.randint(1 << 20, (8, 64), generator=generator, dtype=torch.int32),
            last_token_ids=torch.randint(1000, (8,), generator=generator, dtype=torch.int32),
        )
        starts = [0, *accumulate(counts)] + [sum(counts)] * idle
        rows = StepRows(
            slots=torch.tensor([*range(num_decodes + len(counts)), *[-1] * idle], dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32) if counts else None,
            prompt_tokens=torch.arange(sum(counts) + spare, dtype=torch.int32),
        )
        num_rows, num_tokens = len(rows.slots), num_decodes + sum(counts) + spare

        def blank(memory: Fenced) -> StepInputs:
            tokens = (memory.empty(num_tokens, dtype=torch.int64) for _ in range(3))
            context_lens = memory.empty(num_rows, dtype=torch.int32)
            tables = memory.empty(num_rows, 64, dtype=torch.int32)
            return StepInputs(*tokens, context_lens, tables, memory.empty(num_rows, dtype=torch.int64))

        def copied(part: Any, memory: Fenced) -> Any:
            held = {name: getattr(part, name) for name in part.__dataclass_fields__}
            return replace(part, **{name: memory.copy(v) for name, v in held.items() if v is not None})

        memory = Fenced()
        expected, actual = blank(Fenced("cpu")), blank(memory)
        step_inputs(actual, copied(state, memory), copied(rows, memory), num_decodes, 16)
        step_inputs_oracle(expected, state, rows, num_decodes, 16)
        for name in ("token_ids", "positions", "slot_mapping", "context_lens", "last_tokens"):
            assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
        memory.check()

    return launch


case("apply_updates", "words", apply_updates_case)
case("step_inputs", "decodes", step_inputs_case(3, (), 0, 0))
case("step_inputs", "mixed", step_inputs_case(2, (1, 140, 3), 2, 5))


# --- sampling -----------------------------------------------------------------------------------

GREEDY = (
    {},
    {"frequency_penalty": 0.7},
    {"logit_bias": ((0, 3.0), (77, -4.0))},
    {"allowed_token_ids": (3, 99)},
)
DRAWN = (
    {},
    {"top_k": 50, "top_p": 0.95},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"top_k": 1200, "top_p": 0.9},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": ((5, 2.0),)},
    {"allowed_token_ids": (3, 99, 300), "top_k": 2},
)


def sampling_case(greedy: bool, cluster: int, vocab: int, dtype: torch.dtype) -> Launch:
    """Rows of all kinds of parameters."""

    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(sampling_module, "cluster_size", lambda device, rows: cluster)
        changes: tuple[dict[str, Any], ...] = GREEDY if greedy else DRAWN
        if cluster == 8:
            # Under racecheck a row of these takes ten seconds.
            changes = changes[1::2]
        temperature = 0.0 if greedy else 0.8
        on_cpu = Sampler(vocab, torch.device("cpu"))
        on_gpu = CudaSampler(vocab, torch.device("cuda"), max_num_seqs=len(changes))
        for row, change in enumerate(changes):
            spec = SamplerSpec(sampling(temperature=temperature, seed=row, **change))
            for sampler in (on_cpu, on_gpu):
                sampler.add(row, spec, (1, 2, 9), 2)
        plain = torch.randn(len(changes), vocab, generator=torch.Generator().manual_seed(vocab)) * 3
        # In ties, or so near to level that a bin has more than there is room for in a list.
        for logits in (plain.round() if cluster == 2 else plain, plain * 1e-3)[cluster == 8 :]:
            given = logits.to(dtype)
            expected = on_cpu.sample(range(len(changes)), given.float())
            on_gpu.set_rows(range(len(changes)))
            on_gpu.launch(given.cuda(), greedy=greedy)
            result = on_gpu.collect(range(len(changes)))
            assert result.token_ids == expected.token_ids
            assert result.faults == expected.faults

    return launch


def logprobs_case(cluster: int, vocab: int, dtype: torch.dtype) -> Launch:
    """No alternatives and some, the number in the arguments and by row; nothing else that has clusters."""

    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(sampling_module, "cluster_size", lambda device, rows: cluster)
        memory = Fenced()
        plain = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
        token_ids = torch.tensor([3, vocab - 1, 0], dtype=torch.int32)
        state = SamplingState.allocate(3, 4, torch.device("cuda"))
        asked = (None, 0, 5)
        for slot, count in enumerate(asked):
            record = pack_sequence(SamplerSpec(sampling(), top_logprobs=count), (1,), 1, vocab).record
            state.params[slot] = torch.from_numpy(record.view("u1")).cuda()
        slots = memory.copy(torch.arange(3, dtype=torch.int32))
        for logits in (plain, plain * 1e-3):
            given = logits.to(dtype)
            expected = torch.log_softmax(given.double(), -1)
            on_device = memory.copy(given)
            for tops, how in (((5, 5, 5), 5), (asked, (slots, state))):
                chosen = memory.empty(3, dtype=torch.float64)
                top_ids = memory.empty(3, 5, dtype=torch.int32)
                values = memory.empty(3, 5, dtype=torch.float64)
                sampling_module.logprobs(chosen, top_ids, values, on_device, memory.copy(token_ids), how)
                for row, top in enumerate(tops):
                    if top is None:
                        assert bool(chosen[row].isnan())
                        continue
                    assert abs(float(chosen[row]) - float(expected[row, token_ids[row]])) < 1e-11
                    order = expected[row].sort(descending=True, stable=True).indices[:top]
                    assert top_ids[row, :top].tolist() == order.tolist()
                    assert bool((values[row, :top].cpu() - expected[row, order]).abs().lt(1e-11).all())
                    assert bool(values[row, top:].isnan().all())
        memory.check()

    return launch


for cluster, dtype in ((1, torch.float32), (2, BF16), (8, torch.float32)):
    case("sample", f"shared-by-{cluster}", sampling_case(False, cluster, 2101, dtype))
    case("sample_greedy", f"shared-by-{cluster}", sampling_case(True, cluster, 2101, dtype))
    case("logprobs", f"shared-by-{cluster}", logprobs_case(cluster, 2101, dtype))


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the kernels that are launched; they believe in a device of `NUM_MULTIPROCESSORS`."""
    device = replace(launcher.require_cuda(), num_multiprocessors=NUM_MULTIPROCESSORS)
    monkeypatch.setattr(launcher, "require_cuda", lambda: device)
    load, names = launcher.load, set()

    def noted(variant: Variant, shared_bytes: int = 0) -> launcher.Kernel:
        names.add(variant.spec.name)
        return load(variant, shared_bytes)

    monkeypatch.setattr(launcher, "load", noted)
    load.cache_clear()
    yield names
    load.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for kernel, launches in LAUNCHES.items() for name in launches]
)
def test_small_launch(kernel: str, name: str, launched: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    LAUNCHES[kernel][name](monkeypatch)
    torch.cuda.synchronize()
    assert kernel in launched, "another kernel took its place"


def test_every_kernel_has_small_launches() -> None:
    assert [kernel for kernel, launches in LAUNCHES.items() if not launches] == []
