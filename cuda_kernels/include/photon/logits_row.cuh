// Reads one CTA's piece of a row of logits, whatever their storage type and alignment.
//
// The storage type comes from Python as -D PHOTON_STORAGE=f32, bf16 or f16. The loads are volatile, so that
// they stay behind `wait_for_previous`: another kernel writes the logits.
//
// A thread reads in batches of kQuads groups of four neighbours. The batches of all threads of a CTA are
// counted alike, so that whole warps go through every loop together. A row is not kept anywhere: what has
// to look at it again reads it again, mostly a few batches, out of the L2.
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
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}

template <typename T>
__device__ __forceinline__ float load_logit(const T* address) {
    unsigned short bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(address) : "memory");
    return unpack_pair<T>(bits).x;
}

// Four neighbours, aligned to their size.
__device__ __forceinline__ void load_group(const f32* address, float (&values)[4]) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "l"(address)
                 : "memory");
}

template <typename T>
__device__ __forceinline__ void load_group(const T* address, float (&values)[4]) {
    u32 low, high;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"(address) : "memory");
    const float2 first = unpack_pair<T>(low), second = unpack_pair<T>(high);
    values[0] = first.x;
    values[1] = first.y;
    values[2] = second.x;
    values[3] = second.y;
}

// What a thread holds of a row at a time.
struct Batch {
    float values[kQuads][4];
};

// One CTA's piece of a row.
struct Piece {
    const Logit* row;
    int vocab_size;
    int first_group;
    int num_groups;
    int num_batches;    // the same in all CTAs of the row
    int whole_groups;   // how many, from the first on, one load can read

    // The first id of a group of a batch of this thread; from the end of the piece on, if it has none.
    __device__ __forceinline__ int first_id(int batch, int quad) const {
        return 4 * (first_group + group(batch, quad));
    }

    __device__ __forceinline__ bool has(int batch, int quad) const { return group(batch, quad) < num_groups; }

    // Entries behind the end of the piece or of the row are -inf.
    __device__ __forceinline__ void load(int batch, Batch& loaded) const {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const int id = first_id(batch, i);
            if (group(batch, i) < whole_groups) {
                load_group(row + id, loaded.values[i]);
            } else {
                const bool inside = has(batch, i);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    loaded.values[i][j] =
                        inside && id + j < vocab_size ? load_logit(row + id + j) : minus_infinity();
                }
            }
        }
    }

private:
    __device__ __forceinline__ int group(int batch, int quad) const {
        return (batch * kQuads + quad) * kThreads + static_cast<int>(threadIdx.x);
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

// Calls visit(batch, loaded) for every batch, the next one being under way. `loaded` is batch 0, which the
// caller has loaded. Ids ascend within a thread.
template <typename Visit>
__device__ __forceinline__ void visit_batches(const Piece& piece, Batch& loaded, Visit visit) {
#pragma unroll 1
    for (int batch = 0; batch < piece.num_batches; ++batch) {
        Batch next;
        if (batch + 1 < piece.num_batches) piece.load(batch + 1, next);
        visit(batch, loaded);
        loaded = next;
    }
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
                    token_id = piece.first_id(batch, i) + j;
                    found = true;
                }
            }
        }
    }
};

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
// caller has arrived at the cluster barrier once before, so that all CTAs run when the first one writes to
// the others.
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
