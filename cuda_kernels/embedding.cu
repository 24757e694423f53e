// Rows of the embedding table.
//
//     out[t] = weight[token_ids[t]]
//
// Types: PHOTON_STORAGE (bf16, f16, f32) of weight; PHOTON_RESIDUAL (the same, or f32) of out;
// PHOTON_INDEX (int, i64) of token_ids.
//
// Launch: grid (tokens, ceil(hidden / 8 / kThreads)), kThreads threads, eight values each.
// Preconditions: hidden a multiple of 8, rows 16-byte aligned and contiguous. An id outside of the table
// gives a row of zeros and reads nothing. No arithmetic. Bound by latency, then by the reads and writes.
#include "photon/dependent_launch.cuh"
#include "photon/vec.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_RESIDUAL) || !defined(PHOTON_INDEX)
#error "PHOTON_STORAGE, PHOTON_RESIDUAL and PHOTON_INDEX must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;
typedef PHOTON_RESIDUAL Residual;
typedef PHOTON_INDEX Index;

constexpr int kThreads = 128;

extern "C" __global__ void __launch_bounds__(kThreads)
    embedding(Residual* __restrict__ out, const Index* __restrict__ token_ids,
              const Storage* __restrict__ weight, int hidden, i64 vocab_size) {
    wait_for_previous();
    // Behind the wait, and it has to be: kernels further on let the next one start ahead of theirs, so
    // that attention may read the step's tables (reads_early) as soon as every CTA is here. What made them is
    // over then.
    let_next_start();
    const int start = kVec * static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
    if (start >= hidden) return;
    const i64 id = load_index(token_ids + blockIdx.x);
    float values[kVec] = {};
    if (id >= 0 && id < vocab_size) unpack(load_weights(weight + id * hidden + start), values);
    store(out + static_cast<i64>(blockIdx.x) * hidden + start, pack<Residual>(values));
}

}  // namespace photon
