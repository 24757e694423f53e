// From logits to tokens, one row per cluster of CTAs. The steps and their numbers are those of
// photon_grpc/runner/sampler.py, which is the definition.
//
//     l'    = logits after bias, penalties, allowed and banned ids            float32, as IEEE rounds
//     token = argmax l'                                                       temperature 0
//     s     = (l' - max l') / T
//     token = argmax of s + Gumbel noise over what top-k, top-p, min-p keep   float64
//
// Grid (PHOTON_CLUSTER, rows), kThreads threads. Dynamic shared memory: the CTA's piece of the row, four
// bytes an entry, where PHOTON_RESIDENT is 1; else the pieces lie in `scratch`.
//
// May start before the kernel ahead of it has ended; all that it reads is written by others, so nothing is
// read before the wait and inputs are not __restrict__, which would allow non-coherent loads.
//
// Preconditions: vocab_size < 2^18 (the fixed-point mass of a row stays below 2^63); row_slots[row] is a slot
// that no other row has, or -1 for an idle row; a row of marks is 16-byte aligned and padded to four ids.
//
// Ranks, counts and masses are integers: a mass is exp(s) in units of 2^-45, from float64. Nothing here
// depends on the other rows, on the order of atomics or on the cluster size.
//
// Bound by: latency (launch, one load of the row, two to five cluster barriers) at few rows; by reading the
// logits once at many.
#include "photon/dependent_launch.cuh"
#include "photon/ieee.cuh"
#include "photon/logits_row.cuh"
#include "photon/philox.cuh"
#include "photon/row_cluster.cuh"
#include "photon/row_select.cuh"
#include "photon/sampling_state.cuh"

namespace photon {

constexpr float kFloatMax = 3.402823466e+38f;
constexpr float kMassUnit = 0x1p45f;
// Entries from this bin on are worth less than half a unit of mass and can never win a draw.
constexpr u32 kLastBin = kBins - 1;
constexpr float kBinsPerUnit = 32.0f;

struct Draw {
    double value;
    u32 token_id;
};

struct Shared {
    SelectStorage select;
    RowCheck warps[kWarps];
    RowCheck pieces[kCluster];
    Draw warp_draws[kWarps];
    Draw piece_draws[kCluster];
    SlotParams params;
};

__device__ __forceinline__ bool better(Draw a, Draw b) {
    return a.value > b.value || (a.value == b.value && a.token_id < b.token_id);
}

__device__ __forceinline__ Draw best_of_warp(Draw draw) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const Draw other = {__shfl_xor_sync(kFull, draw.value, distance),
                            __shfl_xor_sync(kFull, draw.token_id, distance)};
        if (better(other, draw)) draw = other;
    }
    return draw;
}

// The result is good in the first warp.
__device__ __forceinline__ Draw best_of_block(Draw draw, Draw (&warps)[kWarps]) {
    const int lane = threadIdx.x & 31;
    draw = best_of_warp(draw);
    if (lane == 0) warps[threadIdx.x >> 5] = draw;
    __syncthreads();
    if (threadIdx.x < 32) draw = best_of_warp(warps[lane % kWarps]);
    return draw;
}

__device__ __forceinline__ float bias_of(u32 token_id, float value, const int* ids, const float* values,
                                         int count) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (static_cast<u32>(ids[middle]) < token_id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < count && static_cast<u32>(ids[low]) == token_id; ++low) {
        value = ieee_add(value, values[low]);
    }
    return value;
}

// Steps 3 to 7 for one entry.
__device__ __forceinline__ float process(float value, u32 token_id, u32 mark, const SlotParams& params,
                                         bool ban, const int* bias_ids, const float* bias_values) {
    if (mark & kMarkBiased) value = bias_of(token_id, value, bias_ids, bias_values, params.num_biases);
    if ((params.flags & kRepetition) && (mark & kMarkSeen)) {
        value = __float_as_uint(value) & 0x80000000u ? ieee_mul(value, params.repetition_penalty)
                                                     : ieee_div(value, params.repetition_penalty);
    }
    const u32 count = mark & kMarkCount;
    if ((params.flags & kCounted) && count != 0) {
        value = ieee_sub(value, ieee_mul(params.frequency_penalty, static_cast<float>(count)));
        value = ieee_sub(value, params.presence_penalty);
    }
    if (((params.flags & kAllowedOnly) && !(mark & kMarkAllowed)) || (ban && (mark & kMarkBanned))) {
        return minus_infinity();
    }
    return __float_as_uint(value) == 0x7F800000u ? kFloatMax : value;
}

__device__ __forceinline__ u64 mass_of(u32 key) {
    if (key >= __float_as_uint(kBins / kBinsPerUnit)) return 0;
    return __double2ull_rn(exp(-static_cast<double>(__uint_as_float(key))) * kMassUnit);
}

__device__ __forceinline__ u32 bin_of(u32 key) {
    const float position = __uint_as_float(key) * kBinsPerUnit;
    return position < static_cast<float>(kLastBin) ? static_cast<u32>(position) : kLastBin;
}

// Step 14 over the entries of a piece whose rank is at most `limit`. Noise is first taken roughly, in
// float32, and exactly only where that leaves the larger of two open. Not inlined, or `sample` spills.
__device__ __noinline__ Draw draw_from_piece(const Piece& piece, u64 limit, NoiseKey noise) {
    constexpr float kOpen = 2 * kGumbelError;
    float best_rough = minus_infinity(), best_score = 0;
    u32 best_word = 0, best_id = ~0u;
#pragma unroll 1
    for (int first = 4 * threadIdx.x; first < piece.num_keys; first += 4 * kThreads) {
        float scores[4];
        float highest = minus_infinity();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 key = first + j < piece.num_keys ? piece.keys[first + j] : kFull;
            const bool stays = key != kFull && rank_of(key, piece.first_id + first + j) <= limit;
            scores[j] = stays ? -__uint_as_float(key) : minus_infinity();
            highest = fmaxf(highest, scores[j]);
        }
        if (highest == minus_infinity() || highest + kGumbelMax < best_rough - kOpen) continue;
        const uint4 block = philox4x32(static_cast<u32>(piece.first_id + first) >> 2, noise);
        const u32 words[4] = {block.x, block.y, block.z, block.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (scores[j] == minus_infinity()) continue;
            const float rough = scores[j] + gumbel_approximate(words[j]);
            if (rough < best_rough - kOpen) continue;
            // Ids ascend, so the earlier of two equals stays.
            if (rough > best_rough + kOpen || static_cast<double>(scores[j]) + gumbel(words[j]) >
                                                  static_cast<double>(best_score) + gumbel(best_word)) {
                best_score = scores[j];
                best_word = words[j];
                best_id = piece.first_id + first + j;
                best_rough = rough;
            }
        }
    }
    if (best_id == ~0u) return {minus_infinity(), ~0u};
    return {static_cast<double>(best_score) + gumbel(best_word), best_id};
}

// Steps 11 to 14 over the candidates, which hold every entry that 11 and 12 may keep. One CTA alone; the
// result is good in the first warp.
__device__ __forceinline__ Draw draw_from_candidates(Shared& shared, u32 count, const SlotParams& params,
                                                     u64 floor, NoiseKey noise) {
    u64* const candidates = shared.select.candidates;
    sort_candidates(candidates, count);
    if (params.top_k > 0) count = min(count, static_cast<u32>(params.top_k));
    const u32 first = 2 * threadIdx.x;
    u64 before = 0, mass = 0, limit = kNoRank;
    if (params.top_p < 1) {
        const u64 next = first + 1 < count ? mass_of(static_cast<u32>(candidates[first + 1] >> kIdBits)) : 0;
        if (first < count) mass = mass_of(static_cast<u32>(candidates[first] >> kIdBits));
        u64 total;
        before = exclusive_sum(mass + next, shared.select.warp_sums, total);
        limit = params.top_k > 0 ? static_cast<u64>(ceil(params.top_p * static_cast<double>(total)))
                                 : shared.select.crossing.target;
    }
    Draw draw = {minus_infinity(), ~0u};
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        if (first + i < count && (before < limit || first + i == 0) && candidates[first + i] <= floor) {
            const u32 key = static_cast<u32>(candidates[first + i] >> kIdBits);
            const u32 id = static_cast<u32>(candidates[first + i]) & ((1u << kIdBits) - 1);
            const Draw other = {gumbel_at(id, noise) - static_cast<double>(__uint_as_float(key)), id};
            if (better(other, draw)) draw = other;
        }
        before += mass;
    }
    return best_of_block(draw, shared.warp_draws);
}

// By the whole CTA, into shared memory.
__device__ __forceinline__ void load_params(SlotParams& params, const SlotParams* source) {
    constexpr int kWords = sizeof(SlotParams) / sizeof(u32);
    if (threadIdx.x < kWords) {
        reinterpret_cast<u32*>(&params)[threadIdx.x] = reinterpret_cast<const u32*>(source)[threadIdx.x];
    }
    __syncthreads();
}

// Everything that a kernel needs of its row before it looks at the logits.
struct Row {
    int slot;
    int num_outputs;
    int first_group, num_groups;
    bool ban;
};

__device__ __forceinline__ Row describe_row(const SlotParams& params, int slot, int num_outputs,
                                            int vocab_size) {
    const int per_piece = groups_per_piece(vocab_size);
    const int first_group = static_cast<int>(blockIdx.x) * per_piece;
    const int num_groups = min(per_piece, (vocab_size + 3) / 4 - first_group);
    return {slot, num_outputs, first_group, max(num_groups, 0),
            (params.flags & kBan) && num_outputs < params.min_tokens};
}

// Steps 1 and 3 to 8: the best entry of l' and whether the row is sound. With `values` the float32 bits of
// l' are left there.
__device__ __forceinline__ RowCheck process_row(u32* values, const Row& row, const SlotParams& params,
                                                const Logit* logits, int vocab_size, const int* bias_ids,
                                                const float* bias_values, Shared& shared) {
    RowCheck check = {kNoRank, 0};
    visit_logits(logits, vocab_size, row.first_group, row.num_groups, [&](int id, float (&group)[4]) {
        uint4 marks = {0, 0, 0, 0};
        if (params.marks != nullptr) marks = *reinterpret_cast<const uint4*>(params.marks + id);
        const u32 mark[4] = {marks.x, marks.y, marks.z, marks.w};
        u32 stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float value = group[j];
            const u32 bits = __float_as_uint(value);
            check.non_finite |= (bits & 0x7FFFFFFFu) >= 0x7F800000u && bits != 0xFF800000u;
            if (params.marks != nullptr) {
                value = process(value, id + j, mark[j], params, row.ban, bias_ids, bias_values);
            }
            value = ieee_add(value, 0.0f);   // -0.0 is 0.0 from here on
            check.best = min(check.best, rank_of(descending_key(value), id + j));
            stored[j] = __float_as_uint(value);
        }
        if (values != nullptr) {
            *reinterpret_cast<uint4*>(values + (id - 4 * row.first_group)) =
                make_uint4(stored[0], stored[1], stored[2], stored[3]);
        }
    });
    return cluster_check(check, shared.warps, shared.pieces, blockIdx.x);
}

__device__ __forceinline__ bool is_fault(const RowCheck& check) {
    return check.non_finite || static_cast<u32>(check.best >> kIdBits) >= kKeyOfMinusInfinity;
}

__device__ __forceinline__ int best_token(const RowCheck& check) {
    return static_cast<int>(check.best & ((1u << kIdBits) - 1));
}

// One thread of the first CTA. A row without a token keeps its state.
__device__ __forceinline__ void finish(int token_id, const Row& row, const SlotParams& params,
                                       int* token_ids, int* last_token_ids, int* num_outputs) {
    token_ids[blockIdx.y] = token_id;
    if (token_id == kNoToken) return;
    last_token_ids[row.slot] = token_id;
    num_outputs[row.slot] = row.num_outputs + 1;
    if (params.marks != nullptr) params.marks[token_id] = (params.marks[token_id] + 1) | kMarkSeen;
}

}  // namespace photon

using namespace photon;

// Rows of temperature 0 only: steps 1 and 3 to 8.
extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(kThreads, 2)
    sample_greedy(int* __restrict__ token_ids,        // [rows]; kNoToken marks a fault or an idle row
                  int* __restrict__ last_token_ids,   // [slots]
                  int* num_outputs,                   // [slots], read too
                  const Logit* logits,                // [rows, vocab_size], rows `stride` apart
                  const int* row_slots,               // [rows]
                  const SlotParams* slots, const int* bias_ids,
                  const float* bias_values,           // both [slots, bias_capacity], ids ascending
                  i64 stride, int vocab_size, int bias_capacity) {
    __shared__ Shared shared;
    wait_for_previous();
    const int slot = row_slots[blockIdx.y];
    if (slot < 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) token_ids[blockIdx.y] = kNoToken;
        return;
    }
    cluster_arrive();
    load_params(shared.params, slots + slot);
    const SlotParams& params = shared.params;
    const Row row = describe_row(params, slot, num_outputs[slot], vocab_size);
    const RowCheck check = process_row(nullptr, row, params, logits + blockIdx.y * stride, vocab_size,
                                       bias_ids + static_cast<i64>(slot) * bias_capacity,
                                       bias_values + static_cast<i64>(slot) * bias_capacity, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        finish(is_fault(check) ? kNoToken : best_token(check), row, params, token_ids, last_token_ids,
               num_outputs);
    }
}

// Rows of any parameters. Arguments as above, and `scratch` [rows, 4 * kCluster * groups_per_piece] where
// pieces do not lie in shared memory, else null.
extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(kThreads, 2)
    sample(int* __restrict__ token_ids, int* __restrict__ last_token_ids, int* num_outputs,
           u32* __restrict__ scratch, const Logit* logits, const int* row_slots,
           const SlotParams* slots, const int* bias_ids,
           const float* bias_values, i64 stride, int vocab_size, int bias_capacity) {
    __shared__ Shared shared;
    wait_for_previous();
    const int slot = row_slots[blockIdx.y];
    if (slot < 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) token_ids[blockIdx.y] = kNoToken;
        return;
    }
    if (threadIdx.x < 2) shared.select.num_candidates[threadIdx.x] = 0;
    cluster_arrive();
#if PHOTON_RESIDENT
    extern __shared__ uint4 resident[];
    u32* const values = reinterpret_cast<u32*>(resident);
#else
    u32* const values =
        scratch + (static_cast<i64>(blockIdx.y) * kCluster + blockIdx.x) * 4 * groups_per_piece(vocab_size);
#endif
    load_params(shared.params, slots + slot);
    const SlotParams& params = shared.params;
    const Row row = describe_row(params, slot, num_outputs[slot], vocab_size);
    const RowCheck check = process_row(params.flags & kGreedy ? nullptr : values, row, params,
                                       logits + blockIdx.y * stride, vocab_size,
                                       bias_ids + static_cast<i64>(slot) * bias_capacity,
                                       bias_values + static_cast<i64>(slot) * bias_capacity, shared);
    const bool leads = blockIdx.x == 0;
    if (is_fault(check) || params.flags & kGreedy) {
        if (leads && threadIdx.x == 0) {
            finish(is_fault(check) ? kNoToken : best_token(check), row, params, token_ids, last_token_ids,
                   num_outputs);
        }
        return;
    }

    // Step 9: -s, whose bits are the keys; no s is above 0. Behind the row's end they are left out.
    Piece piece = {values, 4 * row.first_group, 0};
    piece.num_keys = max(min(4 * row.num_groups, vocab_size - piece.first_id), 0);
    const float highest = value_of_key(static_cast<u32>(check.best >> kIdBits));
    const bool by_count = params.top_k > 0, by_mass = params.top_p < 1;
    const bool truncated = by_count || by_mass;
    if (truncated) clear_histogram(shared.select, kBins);
    __syncthreads();
#pragma unroll 1
    for (int start = 0; start < piece.num_keys; start += kThreads) {
        const int i = start + threadIdx.x;
        u32 key = kFull;
        if (i < piece.num_keys) {
            const float score = ieee_div(ieee_sub(__uint_as_float(values[i]), highest), params.temperature);
            key = __float_as_uint(score) & 0x7FFFFFFFu;
            values[i] = key;
        }
        if (truncated) {
            const u32 bin = key == kFull ? kLastBin : bin_of(key);
            add_to_histogram(shared.select, bin, bin == kLastBin ? 0 : by_count ? 1 : mass_of(key));
        }
    }
    __syncthreads();

    const NoiseKey noise = {params.seed_low, params.seed_high, static_cast<u32>(row.num_outputs), params.index};
    const u64 floor = rank_of(params.floor_key, (1u << kIdBits) - 1);
    u64 limit = floor;
    if (truncated) {
        cluster_find(shared.select, kBins, 0, params.top_k, by_count ? 0 : params.top_p, blockIdx.x);
        // Without a crossing everything but the worthless stays.
        const Crossing crossing = shared.select.crossing;
        const u32 last = min(crossing.bin, kLastBin - 1);
        const u32 count = cluster_gather(shared.select, piece, 0,
                                         [=](u32 key, u32) { return bin_of(key) <= last; });
        if (count <= kCandidates) {
            // The others' only business left is to have read the count before this CTA exits.
            cluster_arrive();
            if (!leads) return;
            const Draw draw = draw_from_candidates(shared, count, params, floor, noise);
            if (threadIdx.x == 0) {
                finish(static_cast<int>(draw.token_id), row, params, token_ids, last_token_ids, num_outputs);
            }
            cluster_wait();
            return;
        }
        cluster_sync();
        u64 boundary = kNoRank;
        if (by_count && crossing.reached) {
            boundary = cluster_boundary(shared.select, piece, kNoRank, params.top_k, 0, blockIdx.x,
                                        [](u32) { return u64{1}; });
        }
        if (by_mass) {
            boundary = min(boundary, cluster_boundary(shared.select, piece, boundary, 0, params.top_p, blockIdx.x,
                                                      [](u32 key) { return mass_of(key); }));
        }
        limit = min(limit, boundary);
    }

    const Draw draw = best_of_block(draw_from_piece(piece, limit, noise), shared.warp_draws);
    if (threadIdx.x == 0) peer(&shared.piece_draws[blockIdx.x], 0)[0] = draw;
    cluster_arrive();
    if (!leads) return;
    cluster_wait();
    if (threadIdx.x == 0) {
        Draw best = shared.piece_draws[0];
        for (int i = 1; i < kCluster; ++i) {
            if (better(shared.piece_draws[i], best)) best = shared.piece_draws[i];
        }
        finish(static_cast<int>(best.token_id), row, params, token_ids, last_token_ids, num_outputs);
    }
}
