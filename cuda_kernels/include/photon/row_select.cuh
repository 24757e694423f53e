// Ranks the entries of one row that the CTAs of a cluster share: histograms over keys, the boundary at a
// count or a mass, and the few best entries in order.
//
// Entries and their ranks are those of photon/rank.cuh: every order here is total. Sums are integers, so neither
// the order of atomics nor the number of CTAs can change a result.
//
// All functions are for whole CTAs of kThreads; those named `cluster_` for all CTAs of the row.
#pragma once

#include "photon/rank.cuh"
#include "photon/row_cluster.cuh"
#include "photon/types.cuh"

namespace photon {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 1024;
constexpr int kCountBins = 256;
constexpr int kCandidates = 1024;
constexpr u32 kFull = 0xFFFFFFFFu;
static_assert(kBins <= 2 * kThreads && kCandidates <= 2 * kThreads, "two per thread in every scan");
static_assert(kBins >= 256, "a radix digit has eight bits");

// Where a running count or mass, in rank order, reaches its target.
struct Crossing {
    u64 before;    // the sum of the bins before `bin`
    u64 target;
    u32 bin;
    u32 reached;   // 0 if the whole histogram sums to less than the target
};

struct SelectStorage {
    union {
        struct {
            u32 low[kBins], high[kBins];   // of 64-bit sums
        } histogram;
        u64 candidates[kCandidates];
    };
    u32 counts[kCountBins];   // a histogram of its own, so that it can be read while candidates come in
    u64 warp_sums[kWarps];
    Crossing crossing;
    u32 num_candidates[2];
};

// What has to be clear before the first use. The caller synchronizes.
__device__ __forceinline__ void prepare(SelectStorage& storage) {
    if (threadIdx.x < kCountBins) storage.counts[threadIdx.x] = 0;
    if (threadIdx.x < 2) storage.num_candidates[threadIdx.x] = 0;
}
static_assert(kCountBins <= kThreads, "one per thread");

// Exclusive sum over the threads of a CTA; `total` is that over all of them.
__device__ __forceinline__ u64 exclusive_sum(u64 value, u64* warp_sums, u64& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 inclusive = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const u64 other = __shfl_up_sync(kFull, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i == warp) before = total;
        total += warp_sums[i];
    }
    return before + inclusive - value;
}

__device__ __forceinline__ void clear_histogram(SelectStorage& storage, int num_bins) {
    for (int bin = threadIdx.x; bin < num_bins; bin += kThreads) {
        storage.histogram.low[bin] = 0;
        storage.histogram.high[bin] = 0;
    }
    __syncthreads();
}

// Adds the weights of a warp; all its lanes must be there. Rows of equal entries would send all of them to
// one address, so a warp of many that agree on the bin adds once.
__device__ __forceinline__ void add_to_histogram(SelectStorage& storage, u32 bin, u64 weight) {
    const u32 active = __ballot_sync(kFull, weight != 0);
    if (active == 0) return;
    const int leader = __ffs(active) - 1;
    const u32 common = __shfl_sync(kFull, bin, leader);
    if (__popc(active) > 8 && __all_sync(kFull, weight == 0 || bin == common)) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            weight += __shfl_xor_sync(kFull, weight, distance);
        }
        if ((threadIdx.x & 31) != leader) weight = 0;
    }
    if (weight != 0) {
        const u32 low = static_cast<u32>(weight);
        const u32 old = atomicAdd(&storage.histogram.low[bin], low);
        const u32 high = static_cast<u32>(weight >> 32) + (old + low < low);
        if (high != 0) atomicAdd(&storage.histogram.high[bin], high);
    }
}

// Sums the histograms of all CTAs and finds the first bin at which `before` plus the running sum reaches
// the target: `target`, or with `fraction` > 0 that part of the whole sum, rounded up. All CTAs get the
// result in `storage.crossing`.
__device__ inline void cluster_find(SelectStorage& storage, int num_bins, u64 before, u64 target,
                                    double fraction) {
    cluster_sync();
    if (blockIdx.x == 0) {
        const int first = 2 * threadIdx.x;
        u64 sums[2] = {0, 0};
        if (first < num_bins) {
#pragma unroll
            for (int rank = 0; rank < kCluster; ++rank) {
                const SelectStorage* other = peer(&storage, rank);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    sums[i] += other->histogram.low[first + i] +
                               (static_cast<u64>(other->histogram.high[first + i]) << 32);
                }
            }
        }
        u64 total;
        u64 running = before + exclusive_sum(sums[0] + sums[1], storage.warp_sums, total);
        // Sums are below 2^63 and the product is at most the sum, so the cast is defined. A mass before
        // an entry is less than the product just when it is less than the product rounded up.
        if (fraction > 0) target = static_cast<u64>(ceil(fraction * static_cast<double>(total)));
        if (threadIdx.x == 0) storage.crossing = {before, target, static_cast<u32>(num_bins - 1), 0};
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (running < target && target <= running + sums[i]) {
                storage.crossing = {running, target, static_cast<u32>(first + i), 1};
            }
            running += sums[i];
        }
        __syncthreads();
        if (threadIdx.x > 0 && threadIdx.x < kCluster) {
            peer(&storage, threadIdx.x)->crossing = storage.crossing;
        }
    }
    cluster_sync();
}

// Sums `counts` of all CTAs and finds the first bin at which the running sum reaches the target. Every CTA
// does so for itself and has the result in `storage.crossing`.
__device__ inline void cluster_find_count(SelectStorage& storage, u32 target) {
    cluster_sync();
    u32 count = 0;
    if (threadIdx.x < kCountBins) {
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) count += peer(&storage, rank)->counts[threadIdx.x];
    }
    u64 total;
    const u64 running = exclusive_sum(count, storage.warp_sums, total);
    if (threadIdx.x == 0) storage.crossing = {0, target, kCountBins - 1, 0};
    __syncthreads();
    if (running < target && target <= running + count) {
        storage.crossing = {running, target, threadIdx.x, 1};
    }
    __syncthreads();
}

// Adds to the candidates of the first CTA those of a group of ranks that are `wanted`. `counter` is 0 or 1,
// each good for one use. There may be more than the kCandidates that there is room for: they are counted
// and left out. The caller then synchronizes the cluster; from there on only the first CTA may use its
// storage until the others have arrived at another barrier.
template <int kSize>
__device__ __forceinline__ void add_candidates(SelectStorage& storage, int counter, const u64 (&ranks)[kSize],
                                               const bool (&wanted)[kSize]) {
    u32 count = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) count += wanted[i];
    if (count == 0) return;
    SelectStorage* target = peer(&storage, 0);
    u32 position = atomicAdd(&target->num_candidates[counter], count);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        if (!wanted[i]) continue;
        if (position < kCandidates) target->candidates[position] = ranks[i];
        ++position;
    }
}

// The rank at which the running sum of `weight(key)` reaches the target, among the ranks up to `limit`:
// with it the ranks up to the result are those that stay. Seven radix digits, the best one first: four of
// the key and three of the id. kNoRank if the sum stays below the target. `visit_ranks(visit)` calls
// visit(rank) for the CTA's entries, with whole warps.
template <typename VisitRanks, typename Weight>
__device__ __forceinline__ u64 cluster_boundary(SelectStorage& storage, u64 limit, u64 target, double fraction,
                                                VisitRanks visit_ranks, Weight weight) {
    u64 prefix = 0, before = 0;
#pragma unroll 1
    for (int shift = 48; shift >= 0; shift -= 8) {
        clear_histogram(storage, 256);
        visit_ranks([&](u64 rank) {
            const bool here = rank <= limit && rank >> (shift + 8) == prefix >> (shift + 8);
            add_to_histogram(storage, static_cast<u32>(rank >> shift) & 255,
                             here ? weight(static_cast<u32>(rank >> kIdBits)) : 0);
        });
        cluster_find(storage, 256, before, target, shift == 48 ? fraction : 0);
        const Crossing crossing = storage.crossing;
        if (!crossing.reached) return kNoRank;
        target = crossing.target;
        before = crossing.before;
        prefix |= static_cast<u64>(crossing.bin) << shift;
    }
    return prefix;
}

// Sorts the first `count` candidates, at most kCandidates, of one CTA; the best comes first.
__device__ inline void sort_candidates(u64* candidates, u32 count) {
    u32 size = 2;
    while (size < count) size *= 2;
    for (u32 i = count + threadIdx.x; i < size; i += kThreads) candidates[i] = kNoRank;
    __syncthreads();
    // Pairs at a distance of up to 32 lie within the 64 entries of one warp.
    for (u32 run = 2; run <= size; run *= 2) {
        for (u32 distance = run / 2; distance > 0; distance /= 2) {
            const u32 low = 2 * distance * (threadIdx.x / distance) + threadIdx.x % distance;
            if (low < size) {
                const u64 a = candidates[low], b = candidates[low + distance];
                if ((a > b) == ((low & run) == 0)) {
                    candidates[low] = b;
                    candidates[low + distance] = a;
                }
            }
            const u32 next = distance > 1 ? distance / 2 : run;
            if (distance > 32 || next > 32) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

}  // namespace photon
