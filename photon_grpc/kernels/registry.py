"""Every kernel there is, for whoever has to see them all: the check without a GPU, and the tests.

Knows the operations' modules and nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator

from photon_grpc.kernels import (
    apply_updates,
    best_token,
    embedding,
    gemv,
    head_gemm,
    paged_attention_decode,
    paged_attention_prefill,
    rmsnorm,
    rope_store_kv,
    sampling,
    silu_and_mul,
    skinny_gemm,
    skinny_gemm_tma,
    step_inputs,
    swiglu_gemm,
)
from photon_grpc.kernels.launcher import KernelSpec, Variant

SPECS: tuple[KernelSpec, ...] = (
    *apply_updates.SPECS,
    *best_token.SPECS,
    *embedding.SPECS,
    *gemv.SPECS,
    *head_gemm.SPECS,
    *paged_attention_decode.SPECS,
    *paged_attention_prefill.SPECS,
    *rmsnorm.SPECS,
    *rope_store_kv.SPECS,
    *sampling.SPECS,
    *silu_and_mul.SPECS,
    *skinny_gemm.SPECS,
    *skinny_gemm_tma.SPECS,
    *step_inputs.SPECS,
    *swiglu_gemm.SPECS,
)


def checked_variants() -> Iterator[Variant]:
    """What the check without a GPU compiles."""
    for spec in SPECS:
        for macros in spec.checked:
            yield spec.variant(**macros)
