// Reads one CTA's piece of a row of logits, whatever their storage type and alignment.
//
// The storage type comes from Python as -D PHOTON_STORAGE=f32, bf16 or f16. The loads are volatile, so that
// they stay behind `wait_for_previous`: another kernel writes the logits.
#pragma once

#include "photon/row_select.cuh"
#include "photon/types.cuh"

#ifndef PHOTON_STORAGE
#error "PHOTON_STORAGE must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Logit;

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

// Calls visit(first id of a group, its values) for every group of the piece, ids ascending within a
// thread. Entries behind the end of the row are -inf.
template <typename Visit>
__device__ __forceinline__ void visit_logits(const Logit* row, int vocab_size, int first_group,
                                             int num_groups, Visit visit) {
    constexpr int kInFlight = 4;
    const bool aligned = reinterpret_cast<unsigned long long>(row) % (4 * sizeof(Logit)) == 0;
    for (int start = threadIdx.x; start < num_groups; start += kInFlight * kThreads) {
        float values[kInFlight][4];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int id = 4 * (first_group + start + i * kThreads);
            const bool inside = start + i * kThreads < num_groups;
            if (inside && aligned && id + 4 <= vocab_size) {
                load_group(row + id, values[i]);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    values[i][j] =
                        inside && id + j < vocab_size ? load_logit(row + id + j) : minus_infinity();
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (start + i * kThreads < num_groups) visit(4 * (first_group + start + i * kThreads), values[i]);
        }
    }
}

// The best rank of a CTA's threads and whether any of them saw a NaN or +inf.
struct RowCheck {
    u64 best;
    u32 non_finite;
};

// Reduces over all CTAs of the row; every thread has the result. The caller has arrived at the cluster
// barrier once before, so that all CTAs run when the first one writes to the others.
__device__ __forceinline__ RowCheck cluster_check(RowCheck mine, RowCheck (&warps)[kWarps],
                                                  RowCheck (&pieces)[kCluster], u32 rank_in_cluster) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        mine.best = min(mine.best, __shfl_xor_sync(kFull, mine.best, distance));
        mine.non_finite |= __shfl_xor_sync(kFull, mine.non_finite, distance);
    }
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = mine;
    __syncthreads();
    cluster_wait();
    if (threadIdx.x < kCluster) {
        RowCheck piece = warps[0];
        for (int i = 1; i < kWarps; ++i) {
            piece.best = min(piece.best, warps[i].best);
            piece.non_finite |= warps[i].non_finite;
        }
        peer(&pieces[rank_in_cluster], threadIdx.x)[0] = piece;
    }
    cluster_sync();
    RowCheck whole = pieces[0];
#pragma unroll
    for (int i = 1; i < kCluster; ++i) {
        whole.best = min(whole.best, pieces[i].best);
        whole.non_finite |= pieces[i].non_finite;
    }
    return whole;
}

}  // namespace photon
