// Log-probabilities of given tokens under raw logits, with the most probable alternatives.
//
//     chosen[row]  = l[token] - max l - log sum exp(l - max l)                       float64
//     top_*[row]   = the `top` greatest l, the lower id first among equals, and the same of them
//
// Grid (PHOTON_CLUSTER, rows), kThreads threads. Dynamic shared memory: the CTA's piece of the row, four
// bytes an entry, where PHOTON_RESIDENT is 1; else the pieces lie in `scratch`.
//
// Preconditions: top <= top_capacity, top <= kCandidates; a row whose token is kNoToken is left alone. A row
// with a NaN, +inf or nothing finite gets NaN throughout and the ids 0, 1, ...
//
// Waits for the kernel ahead of it before it reads anything, as sampling.cu does. The sum runs in float64 in an order that depends on the cluster size alone. Bound by: latency and, at
// many rows, by the float64 exponentials.
#include "photon/dependent_launch.cuh"
#include "photon/logits_row.cuh"
#include "photon/row_cluster.cuh"
#include "photon/row_select.cuh"
#include "photon/sampling_state.cuh"

namespace photon {

constexpr float kBinsPerUnit = 32.0f;

struct Shared {
    SelectStorage select;
    RowCheck warps[kWarps];
    RowCheck pieces[kCluster];
    double warp_sums[kWarps];
    double piece_sums[kCluster];
};

__device__ __forceinline__ double block_sum(double value, double (&warps)[kWarps]) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kFull, value, distance);
    }
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += warps[i];
    return sum;
}

}  // namespace photon

using namespace photon;

extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(kThreads, 2)
    logprobs(double* __restrict__ chosen,            // [rows]
             int* __restrict__ top_ids,              // [rows, top_capacity]
             double* __restrict__ top_values,        // [rows, top_capacity]
             u32* __restrict__ scratch,              // as in sampling.cu
             const Logit* logits,                    // [rows, vocab_size], rows `stride` apart
             const int* token_ids,                   // [rows]
             const int* row_slots,                   // [rows], or null: `top` alternatives for every row
             const SlotParams* slots, i64 stride, int vocab_size, int top,
             int top_capacity) {
    __shared__ Shared shared;
    wait_for_previous();
    const int token_id = token_ids[blockIdx.y];
    if (token_id == kNoToken) return;
    if (row_slots != nullptr) top = slots[row_slots[blockIdx.y]].top_logprobs;
    if (top < 0) return;
    top = min(top, vocab_size);
    if (threadIdx.x < 2) shared.select.num_candidates[threadIdx.x] = 0;
    cluster_arrive();
#if PHOTON_RESIDENT
    extern __shared__ uint4 resident[];
    u32* const keys = reinterpret_cast<u32*>(resident);
#else
    u32* const keys =
        scratch + (static_cast<i64>(blockIdx.y) * kCluster + blockIdx.x) * 4 * groups_per_piece(vocab_size);
#endif
    const Logit* const row = logits + blockIdx.y * stride;
    const int per_piece = groups_per_piece(vocab_size);
    const int first_group = static_cast<int>(blockIdx.x) * per_piece;
    const int num_groups = max(min(per_piece, (vocab_size + 3) / 4 - first_group), 0);
    Piece piece = {keys, 4 * first_group, 0};
    piece.num_keys = max(min(4 * num_groups, vocab_size - piece.first_id), 0);

    RowCheck check = {kNoRank, 0};
    visit_logits(row, vocab_size, first_group, num_groups, [&](int id, float (&group)[4]) {
        u32 stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 bits = __float_as_uint(group[j]);
            check.non_finite |= (bits & 0x7FFFFFFFu) >= 0x7F800000u && bits != 0xFF800000u;
            if (bits == 0x80000000u) bits = 0;   // -0.0 ranks with 0.0
            stored[j] = descending_key(__uint_as_float(bits));
            check.best = min(check.best, rank_of(stored[j], id + j));
        }
        *reinterpret_cast<uint4*>(keys + (id - 4 * first_group)) =
            make_uint4(stored[0], stored[1], stored[2], stored[3]);
    });
    const RowCheck whole = cluster_check(check, shared.warps, shared.pieces, blockIdx.x);
    const bool leads = blockIdx.x == 0;
    double* const values = top_values + static_cast<i64>(blockIdx.y) * top_capacity;
    int* const ids = top_ids + static_cast<i64>(blockIdx.y) * top_capacity;
    const u32 best_key = static_cast<u32>(whole.best >> kIdBits);
    if (whole.non_finite || best_key >= kKeyOfMinusInfinity) {
        if (leads) {
            const double nan = __longlong_as_double(0x7FF8000000000000ll);
            if (threadIdx.x == 0) chosen[blockIdx.y] = nan;
            for (int i = threadIdx.x; i < top; i += kThreads) {
                ids[i] = i;
                values[i] = nan;
            }
        }
        return;
    }

    const float highest = value_of_key(best_key);
    const auto bin_of = [=](u32 key) {
        const float position = (highest - value_of_key(key)) * kBinsPerUnit;
        return position < static_cast<float>(kBins - 1) ? static_cast<u32>(position) : kBins - 1u;
    };
    clear_histogram(shared.select, kBins);
    double sum = 0;
    for (int start = 0; start < piece.num_keys; start += kThreads) {
        const int i = start + threadIdx.x;
        const bool inside = i < piece.num_keys;
        const u32 key = inside ? keys[i] : kFull;
        if (inside) sum += exp(static_cast<double>(value_of_key(key)) - static_cast<double>(highest));
        if (top > 0) add_to_histogram(shared.select, inside ? bin_of(key) : 0, inside ? 1 : 0);
    }
    sum = block_sum(sum, shared.warp_sums);
    if (threadIdx.x == 0) peer(&shared.piece_sums[blockIdx.x], 0)[0] = sum;

    u32 count = 0;
    if (top > 0) {
        cluster_find(shared.select, kBins, 0, top, 0, blockIdx.x);
        const u32 last = shared.select.crossing.bin;
        count = cluster_gather(shared.select, piece, 0, [=](u32 key, u32) { return bin_of(key) <= last; });
        if (count > kCandidates) {
            cluster_sync();
            const u64 boundary = cluster_boundary(shared.select, piece, kNoRank, top, 0, blockIdx.x,
                                                  [](u32) { return u64{1}; });
            count = cluster_gather(shared.select, piece, 1,
                                   [=](u32 key, u32 id) { return rank_of(key, id) <= boundary; });
        }
    }
    cluster_arrive();
    if (!leads) return;
    if (top > 0) sort_candidates(shared.select.candidates, count);
    cluster_wait();
    double whole_sum = 0;
    for (int i = 0; i < kCluster; ++i) whole_sum += shared.piece_sums[i];
    const double log_sum = log(whole_sum);
    if (threadIdx.x == 0) {
        const float value = load_logit(row + token_id);
        chosen[blockIdx.y] = static_cast<double>(value) - static_cast<double>(highest) - log_sum;
    }
    for (int i = threadIdx.x; i < top; i += kThreads) {
        const u64 rank = shared.select.candidates[i];
        ids[i] = static_cast<int>(rank & ((1u << kIdBits) - 1));
        values[i] = static_cast<double>(value_of_key(static_cast<u32>(rank >> kIdBits))) -
                    static_cast<double>(highest) - log_sum;
    }
}
