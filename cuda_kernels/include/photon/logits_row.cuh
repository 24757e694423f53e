// Reads one CTA's piece of a row of logits, whatever their storage type and alignment.
//
// The storage type comes from Python as -D PHOTON_STORAGE=f32, bf16 or f16. The loads are volatile, so that
// they stay behind `wait_for_previous`: another kernel writes the logits.
//
// An entry's neighbours make groups of four, and thread t of a CTA has the groups t, t + kThreads, ... of its
// piece: the first kQuads of them are its batch 0, and so on. All threads of a CTA count as many groups, so
// that whole warps go through every loop together. A row is not kept anywhere: what has to look at it again
// reads it again, mostly a few batches, out of the L2.
#pragma once

#include "photon/ieee.cuh"
#include "photon/row_select.cuh"
#include "photon/types.cuh"

#ifndef PHOTON_STORAGE
#error "PHOTON_STORAGE must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Logit;

constexpr int kQuads = 4;

// Each CTA has whole groups of four entries, the last one of the row may be cut short.
__device__ __forceinline__ int groups_per_piece(int vocab_size) {
    return ((vocab_size + 3) / 4 + kCluster - 1) / kCluster;
}

__device__ __forceinline__ float load_logit(const f32* address) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
    return value;
}

template <typename T>
__device__ __forceinline__ float load_logit(const T* address) {
    unsigned short bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    return unpack_pair<T>(bits).x;
}

// Four neighbours, aligned to their size.
__device__ __forceinline__ void load_group(const f32* address, float (&values)[4]) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "l"(address));
}

template <typename T>
__device__ __forceinline__ void load_group(const T* address, float (&values)[4]) {
    u32 low, high;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"(address));
    const float2 first = unpack_pair<T>(low), second = unpack_pair<T>(high);
    values[0] = first.x;
    values[1] = first.y;
    values[2] = second.x;
    values[3] = second.y;
}

struct Batch {
    float values[kQuads][4];
};

// One CTA's piece of a row.
struct Piece {
    const Logit* row;
    int vocab_size;
    int first_group;
    int num_groups;
    int num_batches;    // of a thread; the same in all CTAs of the row
    int whole_groups;   // how many, from the first on, one load can read

    __device__ __forceinline__ int first_id(int group) const { return 4 * (first_group + group); }

    // Entries behind the end of the piece or of the row are -inf.
    __device__ __forceinline__ void load(int group, float (&values)[4]) const {
        const int id = first_id(group);
        if (group < whole_groups) {
            load_group(row + id, values);
        } else {
            const int end = group < num_groups ? vocab_size : 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = id + j < end ? load_logit(row + id + j) : minus_infinity();
        }
    }

    __device__ __forceinline__ void load(int batch, Batch& loaded) const {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) load(group_of(batch, i), loaded.values[i]);
    }

    // The group of this thread's batch.
    __device__ __forceinline__ int group_of(int batch, int quad) const {
        return (batch * kQuads + quad) * kThreads + static_cast<int>(threadIdx.x);
    }

    // Calls visit(group, values) for every group of every thread, the next one being under way.
    template <typename Visit>
    __device__ __forceinline__ void visit(Visit visit) const {
        float values[4];
        load(threadIdx.x, values);
#pragma unroll 1
        for (int i = 0; i < num_batches * kQuads; ++i) {
            const int group = group_of(0, i);
            float next[4];
            load(group + kThreads, next);
            visit(group, values);
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = next[j];
        }
    }
};

__device__ __forceinline__ Piece piece_of(const Logit* row, int vocab_size) {
    const int per_piece = groups_per_piece(vocab_size);
    const int first_group = static_cast<int>(blockIdx.x) * per_piece;
    const bool aligned = reinterpret_cast<unsigned long long>(row) % (4 * sizeof(Logit)) == 0;
    return {row,
            vocab_size,
            first_group,
            max(min(per_piece, (vocab_size + 3) / 4 - first_group), 0),
            (per_piece + kQuads * kThreads - 1) / (kQuads * kThreads),
            aligned ? min(per_piece, vocab_size / 4 - first_group) : 0};
}

// The largest entry, or NaN if there is one.
__device__ __forceinline__ float largest_or_nan(const Batch& batch) {
    float largest[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const float (&v)[4] = batch.values[i];
        largest[i] = ieee_max_or_nan(ieee_max_or_nan(v[0], v[1]), ieee_max_or_nan(v[2], v[3]));
    }
    return ieee_max_or_nan(ieee_max_or_nan(largest[0], largest[1]),
                           ieee_max_or_nan(largest[2], largest[3]));
}
static_assert(kQuads == 4, "above");

// The best of some entries; the lowest id among equals.
struct Best {
    float value;
    u32 token_id;

    __device__ __forceinline__ void see(const Piece& piece, int batch, const Batch& loaded, float largest) {
        if (!ieee_greater(largest, value)) return;
        value = largest;
        bool found = false;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (!found && ieee_equal(loaded.values[i][j], largest)) {
                    token_id = piece.first_id(piece.group_of(batch, i)) + j;
                    found = true;
                }
            }
        }
    }
};

// Room to list the batches that matter.
constexpr int kListed = 1024;

struct BatchList {
    u32 count;
    unsigned short batches[kListed];
};
static_assert((1 << 18) / 16 <= 1 << 16, "a batch of a CTA has a number of 16 bits");

// Calls visit(group) for the groups of all batches whose figure `matters`; a figure lies at the place of its
// batch and thread. The groups are shared out anew, so that each thread has one where a few batches matter.
// The figures have been written before a barrier; `list.count` is 0 and stays as it is not.
template <typename Matters, typename Visit>
__device__ __forceinline__ void visit_where(const float* figures, const Piece& piece, BatchList& list,
                                            Matters matters, Visit visit) {
    const u32 num_figures = piece.num_batches * kThreads;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < num_figures; i += kThreads) {
        if (!matters(figures[i])) continue;
        const u32 place = atomicAdd(&list.count, 1u);
        if (place < kListed) list.batches[place] = static_cast<unsigned short>(i);
    }
    __syncthreads();
    const bool listed = list.count <= kListed;
    const u32 num_batches = listed ? list.count : num_figures;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < num_batches * kQuads; i += kThreads) {
        const u32 place = listed ? list.batches[i / kQuads] : i / kQuads;
        if (!listed && !matters(figures[place])) continue;
        visit(static_cast<int>((place / kThreads * kQuads + i % kQuads) * kThreads + place % kThreads));
    }
}

// What the first look at a row brings: its best entry, the largest of another figure, and whether there
// is a NaN or +inf in it.
struct Summary {
    u64 best;         // a rank
    float figure;
    u32 non_finite;
};

__device__ __forceinline__ Summary join(const Summary& a, const Summary& b) {
    return {min(a.best, b.best), fmaxf(a.figure, b.figure), a.non_finite | b.non_finite};
}

// Reduces over all CTAs of the row; every thread has the result. `raw` is the largest logit, or NaN. The
// caller has announced itself to the cluster, so that all CTAs run when the first one writes to the others.
__device__ __forceinline__ Summary cluster_summary(const Best& best, float figure, float raw,
                                                   Summary (&warps)[kWarps], Summary (&pieces)[kCluster]) {
    const u32 key = descending_key(ieee_add(best.value, 0.0f));   // of -0.0 as of 0.0
    const u32 best_key = __reduce_min_sync(kFull, key);
    const u32 best_id = __reduce_min_sync(kFull, key == best_key ? best.token_id : kNoId);
    const u32 figure_key = __reduce_min_sync(kFull, descending_key(ieee_add(figure, 0.0f)));
    const u32 bits = __float_as_uint(raw);
    const bool non_finite = (bits & 0x7FFFFFFFu) >= 0x7F800000u && bits != 0xFF800000u;
    const u32 lanes = __ballot_sync(kFull, non_finite);
    if ((threadIdx.x & 31) == 0) {
        warps[threadIdx.x >> 5] = {rank_of(best_key, best_id), value_of_key(figure_key), lanes};
    }
    __syncthreads();
    cluster_wait();
    if (threadIdx.x < kCluster) {
        Summary piece = warps[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) piece = join(piece, warps[i]);
        peer(&pieces[blockIdx.x], threadIdx.x)[0] = piece;
    }
    cluster_sync();
    Summary whole = pieces[0];
#pragma unroll
    for (int i = 1; i < kCluster; ++i) whole = join(whole, pieces[i]);
    return whole;
}

// Whether no token can come of the row.
__device__ __forceinline__ bool is_fault(const Summary& summary) {
    return summary.non_finite != 0 || static_cast<u32>(summary.best >> kIdBits) >= kKeyOfMinusInfinity;
}

}  // namespace photon
