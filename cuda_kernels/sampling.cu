// From logits to tokens, one row per cluster of CTAs. The steps and their numbers are those of
// photon_grpc/runner/sampler.py, which is the definition.
//
//     l'    = logits after bias, penalties, allowed and banned ids            float32, as IEEE rounds
//     token = argmax l'                                                       temperature 0
//     s     = (l' - max l') / T
//     token = argmax of s + Gumbel noise over what top-k, top-p, min-p keep   float64
//
// The first pass over a row leaves, for every batch of 16 entries, the largest of one figure (`figures`, in
// shared memory). What comes after looks again at those batches alone whose figure says that they may matter:
//
//     top-k        The figure is l'. At least k entries lie above the k-th largest figure; those that do are
//                  the candidates, few more than k. Sorted, they give what top-p keeps of them.
//     otherwise    The figure bounds s + noise from above, up to a constant. It tells where the winner of the
//                  draw over the whole row is, and the ones after it.
//     top-p alone  A second pass sums the mass of the row and of what ranks before the winner. Mostly the
//                  winner stays. If not, its bin gives the boundary, and the figures the next that stays.
//
// What does not fit (more than kCandidates in a row of equals; logits so large that rounding leaves the
// figures worthless) goes a slow way: radix passes for the boundaries, and one more pass for the draw.
//
// Grid (PHOTON_CLUSTER, rows), kThreads threads. Dynamic shared memory of `sample`: `figures`, a float for
// each thread and batch.
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
// Bound by: latency (launch, one load of the row, three to five cluster barriers) at few rows. At many, by
// reading the logits once; without top-k also by the multiplications of Philox, and with top-p alone by a
// second reading and the float64 exponentials.
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
constexpr u32 kBinsPerCountBin = kBins / kCountBins;
constexpr u32 kLastCountBin = kLastBin / kBinsPerCountBin;
// A floor from here on is that of the noise, which drops nothing that could win.
constexpr float kNoiseRange = 26.0f;
// How far below the best figure to look where the winner may not be among what stays: some e^6 entries.
constexpr float kDeep = 6.0f;

struct Draw {
    double value;
    u32 token_id;
    u32 key;
};

__device__ __forceinline__ Draw no_draw() { return {minus_infinity(), kFull, kFull}; }

__device__ __forceinline__ bool better(const Draw& a, const Draw& b) {
    return a.value > b.value || (a.value == b.value && a.token_id < b.token_id);
}

__device__ __forceinline__ Draw best_of_warp(Draw draw) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const Draw other = {__shfl_xor_sync(kFull, draw.value, distance),
                            __shfl_xor_sync(kFull, draw.token_id, distance),
                            __shfl_xor_sync(kFull, draw.key, distance)};
        if (better(other, draw)) draw = other;
    }
    return draw;
}

// The result is good in the first warp.
__device__ __forceinline__ Draw best_of_block(Draw draw, Draw (&warps)[kWarps]) {
    const int lane = threadIdx.x & 31;
    if (__any_sync(kFull, draw.token_id != kFull)) draw = best_of_warp(draw);
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

// Step 9, rounded as IEEE says. A key is the bits of -s; no s is above 0.
struct Scale {
    float highest;
    float temperature;
    float reciprocal;   // of the temperature

    __device__ __forceinline__ u32 key_of(float value) const {
        const float below = ieee_sub(highest, value);
        float score;
        if (below > 0x1p-60f && below < 0x1p60f) {
            // From a rounded reciprocal two corrections give the rounded quotient (Markstein, 1990).
            score = ieee_mul(below, reciprocal);
            score = ieee_fma(ieee_fma(-score, temperature, below), reciprocal, score);
            score = ieee_fma(ieee_fma(-score, temperature, below), reciprocal, score);
        } else {
            score = ieee_div(below, temperature);
        }
        return __float_as_uint(score) & 0x7FFFFFFFu;
    }
};

__device__ __forceinline__ u64 mass_of(u32 key) {
    if (key >= __float_as_uint(kBins / kBinsPerUnit)) return 0;
    return __double2ull_rn(exp(-static_cast<double>(__uint_as_float(key))) * kMassUnit);
}

__device__ __forceinline__ u32 bin_of(u32 key) {
    const float position = __uint_as_float(key) * kBinsPerUnit;
    return position < static_cast<float>(kLastBin) ? static_cast<u32>(position) : kLastBin;
}

struct Row;

// Steps 3 to 7 for one entry that has a mark.
__device__ float process(float value, u32 token_id, u32 mark, const Row& row);

// A row as all threads of a CTA see it, in shared memory.
struct Row {
    SlotParams params;
    Piece piece;
    Scale scale;   // once the best entry is known
    NoiseKey noise;
    const int* bias_ids;
    const float* bias_values;
    int slot;
    int num_outputs;

    // Steps 3 to 7 for the entries of a group that have marks, or for all where others are not allowed.
    __device__ __forceinline__ void process_group(int group, uint4 marks, float (&values)[4]) const {
        const u32 mark[4] = {marks.x, marks.y, marks.z, marks.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (mark[j] != 0) {
                values[j] = process(values[j], piece.first_id(group) + j, mark[j], *this);
            } else if (params.flags & kAllowedOnly) {
                values[j] = minus_infinity();
            }
        }
    }

    __device__ __forceinline__ uint4 marks_of(int group) const {
        if (group >= piece.num_groups) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(params.marks + piece.first_id(group));
    }

    // Makes logits l'.
    __device__ __forceinline__ void process_group(int group, float (&values)[4]) const {
        if (params.marks != nullptr) process_group(group, marks_of(group), values);
    }

    __device__ __forceinline__ void process_batch(int batch, Batch& loaded) const {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) process_group(piece.group_of(batch, i), loaded.values[i]);
    }

    // Calls visit(group, values) for every group of l'; for whole warps.
    template <typename Visit>
    __device__ __forceinline__ void visit(Visit visit) const {
        piece.visit([&](int group, float (&values)[4]) {
            process_group(group, values);
            visit(group, values);
        });
    }

    // The same for the groups of the batches whose figure `matters`.
    template <typename Matters, typename Visit>
    __device__ __forceinline__ void visit_where(const float* figures, BatchList& list, Matters matters,
                                                Visit visit) const {
        photon::visit_where(figures, piece, list, matters, [&](int group) {
            float values[4];
            piece.load(group, values);
            process_group(group, values);
            visit(group, values);
        });
    }
};

// Few entries have a mark, and every pass over a row calls this: not inlined.
__device__ __noinline__ float process(float value, u32 token_id, u32 mark, const Row& row) {
    const SlotParams& params = row.params;
    if (mark & kMarkBiased) {
        value = bias_of(token_id, value, row.bias_ids, row.bias_values, params.num_biases);
    }
    if ((params.flags & kRepetition) && (mark & kMarkSeen)) {
        value = __float_as_uint(value) & 0x80000000u ? ieee_mul(value, params.repetition_penalty)
                                                     : ieee_div(value, params.repetition_penalty);
    }
    const u32 count = mark & kMarkCount;
    if ((params.flags & kCounted) && count != 0) {
        value = ieee_sub(value, ieee_mul(params.frequency_penalty, static_cast<float>(count)));
        value = ieee_sub(value, params.presence_penalty);
    }
    const bool ban = (params.flags & kBan) && row.num_outputs < params.min_tokens;
    if (((params.flags & kAllowedOnly) && !(mark & kMarkAllowed)) || (ban && (mark & kMarkBanned))) {
        return minus_infinity();
    }
    return __float_as_uint(value) == 0x7F800000u ? kFloatMax : value;
}

// By the whole CTA.
__device__ __forceinline__ void load_row(Row& row, const Piece& piece, int slot, const SlotParams* slots,
                                         const int* bias_ids, const float* bias_values, int bias_capacity,
                                         const int* num_outputs) {
    constexpr int kWords = sizeof(SlotParams) / sizeof(u32);
    if (threadIdx.x < kWords) {
        const u32* source = reinterpret_cast<const u32*>(slots + slot);
        reinterpret_cast<u32*>(&row.params)[threadIdx.x] = source[threadIdx.x];
    } else if (threadIdx.x == 32) {
        row.piece = piece;
        row.bias_ids = bias_ids + static_cast<i64>(slot) * bias_capacity;
        row.bias_values = bias_values + static_cast<i64>(slot) * bias_capacity;
        row.slot = slot;
        row.num_outputs = num_outputs[slot];
        const SlotParams& params = slots[slot];
        row.noise = {params.seed_low, params.seed_high, static_cast<u32>(row.num_outputs), params.index};
    }
    __syncthreads();
}

struct Shared {
    SelectStorage select;
    Summary warps[kWarps];
    Summary pieces[kCluster];
    Draw warp_draws[kWarps];
    Draw piece_draws[kCluster];
    u64 boundary;
    BatchList list;
    Row row;
};

// Every thread of the cluster has the result. All have passed a cluster barrier since the last call.
__device__ __forceinline__ Draw best_of_cluster(Draw draw, Shared& shared) {
    draw = best_of_block(draw, shared.warp_draws);
    if (threadIdx.x < kCluster) peer(&shared.piece_draws[blockIdx.x], threadIdx.x)[0] = draw;
    cluster_sync();
    Draw best = shared.piece_draws[0];
#pragma unroll
    for (int i = 1; i < kCluster; ++i) {
        if (better(shared.piece_draws[i], best)) best = shared.piece_draws[i];
    }
    return best;
}

// The last rank that step 13 leaves.
__device__ __forceinline__ u64 floor_of(const SlotParams& params) { return rank_of(params.floor_key, kNoId); }

__device__ __forceinline__ int best_token(const Summary& summary) {
    return static_cast<int>(summary.best & kNoId);
}

// One thread of the first CTA. A row without a token keeps its state.
__device__ __forceinline__ void finish(int token_id, const Row& row, int* token_ids, int* last_token_ids,
                                       int* num_outputs) {
    token_ids[blockIdx.y] = token_id;
    if (token_id == kNoToken) return;
    last_token_ids[row.slot] = token_id;
    num_outputs[row.slot] = row.num_outputs + 1;
    u32* const marks = row.params.marks;
    if (marks != nullptr) marks[token_id] = (marks[token_id] + 1) | kMarkSeen;
}

// Steps 1 and 3 to 8, the first pass; `loaded` is the piece's first batch. `figure(batch, loaded, largest)`
// hears of every batch of l' and its largest entry; `Summary.figure` is the largest of what it gives.
template <typename Figure>
__device__ __forceinline__ Summary look_at_row(const Piece& piece, Batch& loaded, Shared& shared, Figure figure) {
    const Row& row = shared.row;
    Best best = {minus_infinity(), kNoId};
    float raw = minus_infinity(), largest_figure = minus_infinity();
#pragma unroll 1
    for (int batch = 0; batch < piece.num_batches; ++batch) {
        if (batch > 0) piece.load(batch, loaded);
        float largest = largest_or_nan(loaded);
        raw = ieee_max_or_nan(raw, largest);
        if (row.params.marks != nullptr) {
            row.process_batch(batch, loaded);
            largest = largest_or_nan(loaded);
        }
        best.see(piece, batch, loaded, largest);
        largest_figure = fmaxf(largest_figure, figure(batch, loaded, largest));
    }
    return cluster_summary(best, largest_figure, raw, shared.warps, shared.pieces);
}

// l' / T + noise, never too small but for rounding.
__device__ __forceinline__ float figure_of(float value, float reciprocal, u32 word) {
    return fmaf(value, reciprocal, noise_ceiling(word));
}

__device__ __forceinline__ float largest_figure(const Piece& piece, int batch, const Batch& loaded,
                                                float reciprocal, NoiseKey noise) {
    float largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const uint4 words = philox4x32(piece.first_group + piece.group_of(batch, i), noise);
        const float(&v)[4] = loaded.values[i];
        largest = fmaxf(largest, figure_of(v[0], reciprocal, words.x));
        largest = fmaxf(largest, figure_of(v[1], reciprocal, words.y));
        largest = fmaxf(largest, figure_of(v[2], reciprocal, words.z));
        largest = fmaxf(largest, figure_of(v[3], reciprocal, words.w));
    }
    return largest;
}

// Where to look for the winner: a draw whose figure is below `figure` has a value below `value`.
struct Threshold {
    float figure;
    double value;
    bool usable;   // whether rounding leaves figures that tell something
};

// A figure is l' / T + noise to within a few roundings of numbers up to |max l'| / T + 64: entries further
// below the best can neither win nor have the largest figure.
__device__ __forceinline__ Threshold threshold(const Scale& scale, float largest_figure, float depth) {
    const float shift = ieee_mul(scale.highest, scale.reciprocal);
    const float error = kCeilingError + 0x1p-20f * (fabsf(shift) + 64);
    const float figure = largest_figure - kCeilingGap - depth - 3 * error;
    return {figure, static_cast<double>(figure) - static_cast<double>(shift) + static_cast<double>(error),
            error < 1};
}

// Looks at one entry for step 14. `most` is what its value can be at most.
__device__ __forceinline__ void draw_entry(Draw& best, float value, u32 token_id, u32 word, u64 limit,
                                           const Scale& scale) {
    const u32 key = scale.key_of(value);
    const float most = noise_ceiling(word) - __uint_as_float(key) + 2 * kCeilingError;
    if (rank_of(key, token_id) > limit || static_cast<double>(most) < best.value) return;
    const Draw draw = {gumbel(word) - static_cast<double>(__uint_as_float(key)), token_id, key};
    if (better(draw, best)) best = draw;
}

__device__ __forceinline__ void draw_group(Draw& best, const Row& row, int group, const float (&values)[4],
                                           u64 limit) {
    const u32 first = row.piece.first_id(group);
    const uint4 block = philox4x32(first >> 2, row.noise);
    const u32 words[4] = {block.x, block.y, block.z, block.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) draw_entry(best, values[j], first + j, words[j], limit, row.scale);
}

// Step 14 over the ranks up to `limit` in the batches whose figure is at least `least`; with `figures` null
// in the whole piece.
__device__ __noinline__ Draw draw_from_piece(Shared& shared, const float* figures, float least, u64 limit) {
    const Row& row = shared.row;
    Draw best = no_draw();
    const auto draw = [&](int group, const float (&values)[4]) {
        draw_group(best, row, group, values, limit);
    };
    if (figures != nullptr) {
        if (threadIdx.x == 0) shared.list.count = 0;
        __syncthreads();
        row.visit_where(figures, shared.list, [=](float figure) { return figure >= least; }, draw);
    } else {
        row.visit(draw);
    }
    return best;
}

// Steps 11 to 14 over the candidates, which hold every entry that 11 may keep. One CTA alone; the result is
// good in the first warp.
__device__ __forceinline__ Draw draw_from_candidates(Shared& shared, u32 count) {
    const NoiseKey noise = shared.row.noise;
    const SlotParams& params = shared.row.params;
    const u64 floor = floor_of(params);
    u64* const candidates = shared.select.candidates;
    sort_candidates(candidates, count);
    count = min(count, static_cast<u32>(params.top_k));
    const u32 first = 2 * threadIdx.x;
    u64 before = 0, mass = 0, limit = kNoRank;
    if (params.top_p < 1) {
        const u64 next = first + 1 < count ? mass_of(static_cast<u32>(candidates[first + 1] >> kIdBits)) : 0;
        if (first < count) mass = mass_of(static_cast<u32>(candidates[first] >> kIdBits));
        u64 total;
        before = exclusive_sum(mass + next, shared.select.warp_sums, total);
        limit = static_cast<u64>(ceil(params.top_p * static_cast<double>(total)));
    }
    Draw best = no_draw();
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
        if (first + i < count && (before < limit || first + i == 0) && candidates[first + i] <= floor) {
            const u32 key = static_cast<u32>(candidates[first + i] >> kIdBits);
            const u32 id = static_cast<u32>(candidates[first + i]) & kNoId;
            const Draw draw = {gumbel(word_at(id, noise)) - static_cast<double>(__uint_as_float(key)), id, key};
            if (better(draw, best)) best = draw;
        }
        before += mass;
    }
    return best_of_block(best, shared.warp_draws);
}

// Makes a candidate of every entry of the group whose key `stays`.
template <typename Stays>
__device__ __forceinline__ void add_group(Shared& shared, int group, const float (&values)[4], Stays stays) {
    const Row& row = shared.row;
    u64 ranks[4];
    bool wanted[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 key = row.scale.key_of(values[j]);
        ranks[j] = rank_of(key, row.piece.first_id(group) + j);
        wanted[j] = stays(key);
    }
    add_candidates(shared.select, 0, ranks, wanted);
}

// Collects in the first CTA every entry that top-k may keep and whose noise could lift it to the top;
// figures are the largest l' of each batch. Returns their number, which may be more than there is room for.
__device__ __forceinline__ u32 gather_top_k(Shared& shared, const float* figures) {
    const Row& row = shared.row;
    for (int i = threadIdx.x; i < row.piece.num_batches * kThreads; i += kThreads) {
        const u32 bin = bin_of(row.scale.key_of(figures[i])) / kBinsPerCountBin;
        if (bin < kLastCountBin) atomicAdd(&shared.select.counts[bin], 1u);
    }
    cluster_find_count(shared.select, shared.row.params.top_k);
    // Without a crossing everything but the worthless stays.
    const u32 last = min((shared.select.crossing.bin + 1) * kBinsPerCountBin - 1, kLastBin - 1);
    const auto stays = [=](u32 key) { return bin_of(key) <= last; };
    row.visit_where(
        figures, shared.list, [&](float figure) { return stays(row.scale.key_of(figure)); },
        [&](int group, const float (&values)[4]) { add_group(shared, group, values, stays); });
    cluster_sync();
    return peer(&shared.select, 0)->num_candidates[0];
}

// The rank up to which entries stay, by count or by mass, among those up to `limit`: the slow way.
__device__ __noinline__ u64 boundary_by_radix(Shared& shared, bool by_mass, u64 limit) {
    const Row& row = shared.row;
    const u64 target = by_mass ? 0 : shared.row.params.top_k;
    const double fraction = by_mass ? shared.row.params.top_p : 0;
    const auto visit_ranks = [&](auto visit) {
        row.visit([&](int group, const float (&values)[4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) visit(rank_of(row.scale.key_of(values[j]), row.piece.first_id(group) + j));
        });
    };
    return cluster_boundary(shared.select, limit, target, fraction, visit_ranks,
                            [&](u32 key) { return by_mass ? mass_of(key) : u64{1}; });
}

// The rank up to which entries stay, when it lies in the bin that `find_nucleus` found.
__device__ __noinline__ u64 boundary_in_bin(Shared& shared) {
    const Crossing crossing = shared.select.crossing;
    shared.row.visit([&](int group, const float (&values)[4]) {
        add_group(shared, group, values, [&](u32 key) { return bin_of(key) == crossing.bin; });
    });
    cluster_sync();
    const u32 count = peer(&shared.select, 0)->num_candidates[0];
    if (count > kCandidates) {
        cluster_sync();
        return boundary_by_radix(shared, true, kNoRank);
    }
    if (blockIdx.x == 0) {
        const u64* const candidates = shared.select.candidates;
        sort_candidates(shared.select.candidates, count);
        const u32 first = 2 * threadIdx.x;
        u64 masses[2] = {0, 0};
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            if (first + i < count) masses[i] = mass_of(static_cast<u32>(candidates[first + i] >> kIdBits));
        }
        u64 total;
        u64 before = crossing.before + exclusive_sum(masses[0] + masses[1], shared.select.warp_sums, total);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            if (before < crossing.target && crossing.target <= before + masses[i]) {
                for (int rank = 0; rank < kCluster; ++rank) {
                    peer(&shared.boundary, rank)[0] = candidates[first + i];
                }
            }
            before += masses[i];
        }
    }
    cluster_sync();
    return shared.boundary;
}

// Finds where the mass of a row, when top-p alone drops entries, reaches its target: `crossing` of the
// storage. Bins after `last` are not told apart: a crossing there is in the last bin of all.
__device__ __noinline__ void find_nucleus(Shared& shared, u32 last) {
    const Row& row = shared.row;
    const Scale scale = row.scale;
    clear_histogram(shared.select, kBins);
    u64 rest = 0;
    row.visit([&](int, const float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 key = scale.key_of(values[j]);
            const u32 bin = bin_of(key);
            u64 mass = mass_of(key);
            if (bin > last) {
                rest += mass;
                mass = 0;
            }
            add_to_histogram(shared.select, bin, mass);
        }
    });
    add_to_histogram(shared.select, kLastBin, rest);
    cluster_find(shared.select, kBins, 0, 0, shared.row.params.top_p);
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
    const Piece piece = piece_of(logits + blockIdx.y * stride, vocab_size);
    Batch loaded;
    piece.load(0, loaded);
    const int slot = row_slots[blockIdx.y];
    if (slot < 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) token_ids[blockIdx.y] = kNoToken;
        return;
    }
    cluster_announce();
    load_row(shared.row, piece, slot, slots, bias_ids, bias_values, bias_capacity, num_outputs);
    const Row& row = shared.row;
    const Summary summary = look_at_row(piece, loaded, shared, [](int, const Batch&, float) { return 0.0f; });
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        finish(is_fault(summary) ? kNoToken : best_token(summary), row, token_ids, last_token_ids, num_outputs);
    }
}

// Rows of any parameters; arguments as above.
extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(kThreads, 2)
    sample(int* __restrict__ token_ids, int* __restrict__ last_token_ids, int* num_outputs,
           const Logit* logits, const int* row_slots, const SlotParams* slots, const int* bias_ids,
           const float* bias_values, i64 stride, int vocab_size, int bias_capacity) {
    extern __shared__ float figures[];
    __shared__ Shared shared;
    wait_for_previous();
    const Piece piece = piece_of(logits + blockIdx.y * stride, vocab_size);
    Batch loaded;
    piece.load(0, loaded);
    const int slot = row_slots[blockIdx.y];
    const bool leads = blockIdx.x == 0;
    if (slot < 0) {
        if (leads && threadIdx.x == 0) token_ids[blockIdx.y] = kNoToken;
        return;
    }
    prepare(shared.select);
    if (threadIdx.x == 0) shared.list.count = 0;
    cluster_announce();
    load_row(shared.row, piece, slot, slots, bias_ids, bias_values, bias_capacity, num_outputs);
    const SlotParams& params = shared.row.params;
    const Row& row = shared.row;
    const bool greedy = params.flags & kGreedy;
    const bool by_count = params.top_k > 0;
    const bool noisy = !(by_count && params.top_k <= kCandidates);
    const float reciprocal = ieee_div(1.0f, params.temperature);
    const Summary summary =
        look_at_row(piece, loaded, shared, [&](int batch, const Batch& current, float largest) {
            if (greedy) return largest;
            const float figure = noisy ? largest_figure(piece, batch, current, reciprocal, row.noise) : largest;
            figures[batch * kThreads + threadIdx.x] = figure;
            return figure;
        });
    const auto finish_row = [&](u32 token_id) {
        if (leads && threadIdx.x == 0) {
            finish(static_cast<int>(token_id), row, token_ids, last_token_ids, num_outputs);
        }
    };
    if (is_fault(summary) || greedy) {
        finish_row(is_fault(summary) ? kNoToken : best_token(summary));
        return;
    }

    if (threadIdx.x == 0) {
        shared.row.scale = {value_of_key(static_cast<u32>(summary.best >> kIdBits)), params.temperature, reciprocal};
    }
    __syncthreads();
    if (!noisy) {
        const u32 count = gather_top_k(shared, figures);
        if (count <= kCandidates) {
            // The others' only business left is to have read the count before this CTA exits.
            cluster_arrive();
            if (!leads) return;
            finish_row(draw_from_candidates(shared, count).token_id);
            cluster_wait();
            return;
        }
        cluster_sync();
    }
    const bool by_mass = params.top_p < 1;
    u64 limit = floor_of(params);
    if (by_count) {
        u64 boundary = boundary_by_radix(shared, false, kNoRank);
        if (by_mass) boundary = min(boundary, boundary_by_radix(shared, true, boundary));
        limit = min(limit, boundary);
    }
    if (noisy) {
        const bool nothing_dropped = !by_count && __uint_as_float(params.floor_key) >= kNoiseRange;
        float depth = nothing_dropped ? 0 : kDeep;
        // Twice where top-p alone drops the first winner.
        bool by_nucleus = by_mass && !by_count;
        while (true) {
            const Threshold least = threshold(row.scale, summary.figure, depth);
            Draw winner = no_draw();
            if (least.usable) {
                winner = best_of_cluster(draw_from_piece(shared, figures, least.figure, limit), shared);
            }
            const bool known = winner.value > least.value;
            const u32 last = known ? bin_of(winner.key) : kLastBin - 1;
            if (by_nucleus) find_nucleus(shared, last);
            if (known && (!by_nucleus || shared.select.crossing.bin > last)) {
                finish_row(winner.token_id);
                return;
            }
            if (!by_nucleus) break;
            limit = min(limit, boundary_in_bin(shared));
            by_nucleus = false;
            depth = kDeep;
        }
        cluster_sync();
    }
    const Draw winner = best_of_cluster(draw_from_piece(shared, nullptr, 0, limit), shared);
    finish_row(winner.token_id);
}
