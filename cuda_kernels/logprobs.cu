// Log-probabilities of given tokens under raw logits, with the most probable alternatives.
//
//     chosen[row]  = l[token] - max l - log sum exp(l - max l)                       float64
//     top_*[row]   = the `top` greatest l, the lower id first among equals, and the same of them
//
// The first pass leaves the largest l of every batch of 16 entries in shared memory. At least `top` entries
// lie above the top-th largest of those, and only their batches are looked at again. Another pass sums.
//
// Grid (PHOTON_CLUSTER, rows), kThreads threads. Dynamic shared memory: a float for each thread and batch.
//
// Preconditions: top <= top_capacity, top <= kCandidates; a row whose token is kNoToken is left alone. A row
// with a NaN, +inf or nothing finite gets NaN throughout and the ids 0, 1, ...
//
// Waits for the kernel ahead of it before it reads anything, as sampling.cu does. The sum runs in float64
// in an order that depends on the cluster size alone. Bound by: latency and, at many rows, by the float64
// exponentials and by reading the logits twice.
#include "photon/dependent_launch.cuh"
#include "photon/logits_row.cuh"
#include "photon/row_cluster.cuh"
#include "photon/row_select.cuh"
#include "photon/sampling_state.cuh"

namespace photon {

constexpr float kCountBinsPerUnit = 8.0f;

struct Shared {
    SelectStorage select;
    Summary warps[kWarps];
    Summary pieces[kCluster];
    double warp_sums[kWarps];
    double piece_sums[kCluster];
    BatchList list;
    Piece piece;
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

__device__ __forceinline__ u32 count_bin_of(float value, float highest) {
    const float position = ieee_sub(highest, value) * kCountBinsPerUnit;
    return position < static_cast<float>(kCountBins - 1) ? static_cast<u32>(position) : kCountBins - 1u;
}

// The ranks of a group of four, -0.0 with 0.0; kNoRank behind the end of the piece and of the row.
__device__ __forceinline__ void rank_group(const Piece& piece, int group, const float (&values)[4],
                                           u64 (&ranks)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int id = piece.first_id(group) + j;
        const bool inside = group < piece.num_groups && id < piece.vocab_size;
        ranks[j] = inside ? rank_of(descending_key(ieee_add(values[j], 0.0f)), id) : kNoRank;
    }
}

// Makes a candidate of every entry of the group that `stays(value, rank)`.
template <typename Stays>
__device__ __forceinline__ void add_group(Shared& shared, int counter, const Piece& piece, int group,
                                          const float (&values)[4], Stays stays) {
    u64 ranks[4];
    bool wanted[4];
    rank_group(piece, group, values, ranks);
#pragma unroll
    for (int j = 0; j < 4; ++j) wanted[j] = ranks[j] != kNoRank && stays(values[j], ranks[j]);
    add_candidates(shared.select, counter, ranks, wanted);
}

// Collects the `top` best ranks, and perhaps others, in the first CTA; figures are the largest entries of
// each batch. Returns the number of candidates, which fit.
__device__ __forceinline__ u32 gather_top(Shared& shared, const float* figures, float highest, u32 top) {
    const Piece& piece = shared.piece;
    for (int i = threadIdx.x; i < piece.num_batches * kThreads; i += kThreads) {
        atomicAdd(&shared.select.counts[count_bin_of(figures[i], highest)], 1u);
    }
    cluster_find_count(shared.select, top);
    const u32 last = shared.select.crossing.bin;
    visit_where(
        figures, piece, shared.list, [=](float figure) { return count_bin_of(figure, highest) <= last; },
        [&](int group) {
            float values[4];
            piece.load(group, values);
            add_group(shared, 0, piece, group, values,
                      [=](float value, u64) { return count_bin_of(value, highest) <= last; });
        });
    cluster_sync();
    const u32 count = peer(&shared.select, 0)->num_candidates[0];
    if (count <= kCandidates) return count;

    cluster_sync();
    const auto visit_ranks = [&](auto visit) {
        piece.visit([&](int group, const float (&values)[4]) {
            u64 ranks[4];
            rank_group(piece, group, values, ranks);
#pragma unroll
            for (int j = 0; j < 4; ++j) visit(ranks[j]);
        });
    };
    const u64 boundary =
        cluster_boundary(shared.select, kNoRank, top, 0, visit_ranks, [](u32) { return u64{1}; });
    piece.visit([&](int group, const float (&values)[4]) {
        add_group(shared, 1, piece, group, values, [=](float, u64 rank) { return rank <= boundary; });
    });
    cluster_sync();
    return peer(&shared.select, 0)->num_candidates[1];
}

}  // namespace photon

using namespace photon;

extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(kThreads, 2)
    logprobs(double* __restrict__ chosen,            // [rows]
             int* __restrict__ top_ids,              // [rows, top_capacity]
             double* __restrict__ top_values,        // [rows, top_capacity]
             const Logit* logits,                    // [rows, vocab_size], rows `stride` apart
             const int* token_ids,                   // [rows]
             const int* row_slots,                   // [rows], or null: `top` alternatives for every row
             const SlotParams* slots, i64 stride, int vocab_size, int top,
             int top_capacity) {
    extern __shared__ float figures[];
    __shared__ Shared shared;
    wait_for_previous();
    const int token_id = token_ids[blockIdx.y];
    if (token_id == kNoToken) return;
    if (row_slots != nullptr) top = slots[row_slots[blockIdx.y]].top_logprobs;
    if (top < 0) return;
    top = min(top, vocab_size);
    prepare(shared.select);
    const Piece piece = piece_of(logits + blockIdx.y * stride, vocab_size);
    if (threadIdx.x == 0) {
        shared.list.count = 0;
        shared.piece = piece;
    }
    cluster_announce();

    Best best = {minus_infinity(), kNoId};
    float raw = minus_infinity();
#pragma unroll 1
    for (int batch = 0; batch < piece.num_batches; ++batch) {
        Batch loaded;
        piece.load(batch, loaded);
        const float largest = largest_or_nan(loaded);
        raw = ieee_max_or_nan(raw, largest);
        best.see(piece, batch, loaded, largest);
        figures[batch * kThreads + threadIdx.x] = largest;
    }
    const Summary summary = cluster_summary(best, 0, raw, shared.warps, shared.pieces);
    const bool leads = blockIdx.x == 0;
    const auto write_top = [&](int i, int id, double value) {
        const i64 place = static_cast<i64>(blockIdx.y) * top_capacity + i;
        top_ids[place] = id;
        top_values[place] = value;
    };
    if (is_fault(summary)) {
        if (leads) {
            const double nan = __longlong_as_double(0x7FF8000000000000ll);
            if (threadIdx.x == 0) chosen[blockIdx.y] = nan;
            for (int i = threadIdx.x; i < top; i += kThreads) write_top(i, i, nan);
        }
        return;
    }

    const float highest = value_of_key(static_cast<u32>(summary.best >> kIdBits));
    double sum = 0;
    shared.piece.visit([&](int, const float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += exp(static_cast<double>(values[j]) - static_cast<double>(highest));
    });
    sum = block_sum(sum, shared.warp_sums);
    if (threadIdx.x == 0) peer(&shared.piece_sums[blockIdx.x], 0)[0] = sum;
    const u32 count = top > 0 ? gather_top(shared, figures, highest, top) : 0;
    cluster_arrive();
    if (!leads) return;
    if (top > 0) sort_candidates(shared.select.candidates, count);
    cluster_wait();
    double whole_sum = 0;
    for (int i = 0; i < kCluster; ++i) whole_sum += shared.piece_sums[i];
    const double log_sum = log(whole_sum);
    if (threadIdx.x == 0) {
        const float value = load_logit(shared.piece.row + token_id);
        chosen[blockIdx.y] = static_cast<double>(value) - static_cast<double>(highest) - log_sum;
    }
    for (int i = threadIdx.x; i < top; i += kThreads) {
        const u64 rank = shared.select.candidates[i];
        const double value = static_cast<double>(value_of_key(static_cast<u32>(rank >> kIdBits)));
        write_top(i, static_cast<int>(rank & kNoId), value - static_cast<double>(highest) - log_sum);
    }
}
