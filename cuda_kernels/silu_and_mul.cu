// The gated activation of an MLP.
//
//     out[t, i] = gate * up / (1 + exp(-gate)),  gate = gate_up[t, i], up = gate_up[t, inner + i]
//
// Types: PHOTON_STORAGE (bf16, f16, f32) of gate_up and out.
//
// Launch: grid (tokens, ceil(inner / 8 / kThreads)), kThreads threads, eight values each.
// Preconditions: inner a multiple of 8; rows 16-byte aligned and contiguous; out does not overlap gate_up.
// Arithmetic: float32, rounded once. Bound by the reads and writes, 6 bytes per value in 16-bit types.
#include "photon/dependent_launch.cuh"
#include "photon/vec.cuh"

#ifndef PHOTON_STORAGE
#error "PHOTON_STORAGE must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    silu_and_mul(Storage* __restrict__ out, const Storage* __restrict__ gate_up, int inner) {
    wait_for_previous();
    let_next_start();
    const int start = kVec * static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
    if (start >= inner) return;
    const i64 row = static_cast<i64>(blockIdx.x) * inner;
    const Raw<Storage> raw_gate = load_activations(gate_up + 2 * row + start);
    const Raw<Storage> raw_up = load_activations(gate_up + 2 * row + inner + start);
    float gate[kVec], up[kVec];
    unpack(raw_gate, gate);
    unpack(raw_up, up);
#pragma unroll
    for (int i = 0; i < kVec; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    store(out + row + start, pack<Storage>(gate));
}

}  // namespace photon
