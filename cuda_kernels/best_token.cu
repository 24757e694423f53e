// The token of every row from the best entries of its parts: greedy sampling where a product has already looked at
// the logits (best_rows of photon/linear_output.cuh), which nobody has written then.
//
//     token = id of the least rank of the row        -1 where it is that of NaN, +inf or -inf, or the row is idle
//
// The rows' slots have no marks: nothing changes their logits. Otherwise as sample_greedy (sampling.cu), whose tokens
// and state these are.
//
// Launch: one warp for each row, kWarps to a CTA. Bound by latency.
#include "photon/dependent_launch.cuh"
#include "photon/rank.cuh"

namespace photon {

constexpr int kWarps = 4;
constexpr int kTogether = 4;   // ranks that a lane requests at once

__device__ __forceinline__ u64 load_rank(const u64* address) {
    u64 rank;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(rank) : "l"(address));
    return rank;
}

}  // namespace photon

extern "C" __global__ void __launch_bounds__(32 * photon::kWarps)
    best_token(int* __restrict__ token_ids,        // [rows]
               int* __restrict__ last_token_ids,   // [slots]
               int* __restrict__ num_outputs,      // [slots], counted up
               const photon::u64* ranks,           // [rows, num_parts]
               const int* row_slots,               // [rows]
               int rows, int num_parts) {
    using namespace photon;
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous();
    if (row >= rows) return;
    const int slot = row_slots[row];
    u64 best = kNoRank;
    const u64* const parts = ranks + static_cast<i64>(row) * num_parts;
#pragma unroll 1
    for (int first = lane; first < num_parts; first += 32 * kTogether) {
        u64 loaded[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            loaded[i] = first + 32 * i < num_parts ? load_rank(parts + first + 32 * i) : kNoRank;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) best = min(best, loaded[i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        best = min(best, __shfl_xor_sync(0xffffffffu, best, distance));
    }
    if (lane != 0) return;
    const u32 key = key_of_rank(best);
    const bool is_token = slot >= 0 && key > kKeyOfInfinity && key < kKeyOfMinusInfinity;
    token_ids[row] = is_token ? static_cast<int>(id_of_rank(best)) : kNoToken;
    if (!is_token) return;
    last_token_ids[slot] = static_cast<int>(id_of_rank(best));
    num_outputs[slot] += 1;
}
