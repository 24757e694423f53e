// Products of many tokens by wgmma, in tiles of two times 128 tokens and 256 rows of a weight; what becomes of the sums
// is the kernel's that includes this. For sm_90a, whose kernels alone may use it.
//
//     sums[t, r] = x[t] . weight[r]
//
// Layouts: x [tokens][k] and weight [n][k], maps of boxes of 64 k: kTileTokens of x, kHalfRows of the weight.
//
// Work: a tile of a cluster is two CTAs, with kTileTokens tokens each, times two boxes of the weight's rows, which lie
// where the kernel says. Each CTA brings its own tokens, and one of the boxes for both. One warp of a CTA brings 64 of
// k at a time through kStages stages; two warpgroups multiply 64 tokens each, and finish their sums while the first
// stages of the next tile fill. Clusters take tiles c, c + clusters, ...; kBand tiles of tokens go through all of
// the weight together, so that both sides are read from the L2 more often than from memory.
//
// The first stages of weights are requested before the kernel before this one has finished.
//
// The result of a token is the same whatever the other tokens and their number: k runs in one order.
#pragma once

#include "photon/dependent_launch.cuh"
#include "photon/tensor_copy.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "photon/warpgroup_mma.cuh"
#endif

#ifndef PHOTON_STORAGE
#error "PHOTON_STORAGE must be defined"
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PHOTON_PAIR __cluster_dims__(2, 1, 1)
#else
#define PHOTON_PAIR
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;

constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * (kWarpgroups + 1);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kTileTokens = 64 * kWarpgroups, kHalfRows = 128;
constexpr int kDepth = 64;
constexpr int kRowBytes = 2 * kDepth;
constexpr int kStages = 4;
constexpr int kBand = 8;
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kRegisters = 240, kOtherRegisters = 24;

constexpr int kTokenBytes = kTileTokens * kRowBytes;
constexpr int kHalfBytes = kHalfRows * kRowBytes;
constexpr int kStageBytes = kTokenBytes + 2 * kHalfBytes;
constexpr int kBarrierBytes = 64;
static_assert(16 * kStages <= kBarrierBytes, "a full and an empty one for each stage");

// Of a thread: fragment j has columns 8 j + 2 t and 8 j + 2 t + 1 of the two boxes, for row g and then g + 8 of its
// warp's 16 tokens; lane = 4 g + t.
typedef float Sums[2 * kHalfRows / 8][4];

// The stage that comes next, and the parity to wait for there.
struct Turn {
    int stage;
    u32 parity;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Where a CTA's stages lie, and what it multiplies.
struct Product {
    u32 stages, barriers;  // addresses in shared memory
    int rank;              // of the CTA in its cluster
    int token_tiles, row_tiles;
    int k;

    __device__ __forceinline__ u32 full_barrier(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ u32 empty_barrier(int stage) const { return barriers + 8 * (kStages + stage); }
    __device__ __forceinline__ int num_tiles() const { return token_tiles * row_tiles; }
};

struct Place {
    int token;     // the first one of the cluster's tile
    int row_tile;
};

// Tiles of two times kTileTokens tokens, kBand of them beside each other for every tile of rows.
__device__ __forceinline__ Place find_place(const Product& product, int tile) {
    const int band = tile / (kBand * product.row_tiles), in_band = tile % (kBand * product.row_tiles);
    const int height = min(kBand, product.token_tiles - band * kBand);
    return {(band * kBand + in_band % height) * (2 * kTileTokens), in_band / height};
}

// By one thread, ahead of `sync_pair`.
__device__ __forceinline__ void init_barriers(const Product& product) {
    for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(product.full_barrier(stage), 1);
        init_barrier(product.empty_barrier(stage), 2 * kConsumerWarps);
    }
    publish_barriers();
}

__device__ __forceinline__ void sync_pair() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n  barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// By one thread. `first_row(tile, box)` is where in the weight a box of a tile begins.
template <typename FirstRow>
__device__ __forceinline__ void bring_stages(const Product& product, const TensorMap& x_map,
                                             const TensorMap& weight_map, FirstRow first_row) {
    const int rank = product.rank;
    const auto bring_weights = [&](int stage, int start, int row_tile) {
        copy_box_to(3, product.stages + stage * kStageBytes + kTokenBytes + rank * kHalfBytes, weight_map, start,
                    first_row(row_tile, rank), product.full_barrier(stage));
    };
    // The first weights come while the kernel before this one still runs.
    int num_ahead = min(kStages, (product.k + kDepth - 1) / kDepth);
    const Place first = find_place(product, blockIdx.x / 2);
    for (int stage = 0; stage < num_ahead; ++stage) {
        arrive_expecting(product.full_barrier(stage), kStageBytes);
        bring_weights(stage, stage * kDepth, first.row_tile);
    }
    wait_for_previous();
    Turn turn = {0, 1};
    for (int tile = blockIdx.x / 2; tile < product.num_tiles(); tile += gridDim.x / 2) {
        const Place place = find_place(product, tile);
        for (int start = 0; start < product.k; start += kDepth) {
            const u32 full = product.full_barrier(turn.stage);
            if (--num_ahead < 0) {
                // Both CTAs are done with it: what this one brings comes to both.
                wait_at(product.empty_barrier(turn.stage), turn.parity);
                arrive_expecting(full, kStageBytes);
                bring_weights(turn.stage, start, place.row_tile);
            }
            copy_box(product.stages + turn.stage * kStageBytes, x_map, start, place.token + rank * kTileTokens, full);
            turn.advance();
        }
    }
}

// By the warpgroups. `finish(sums, token, row_tile)` takes the sums of the warpgroup's 64 tokens from `token` on.
template <typename Finish>
__device__ __forceinline__ void multiply(const Product& product, Finish finish) {
    // The same for a whole warp, which the compiler cannot know.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const auto release = [&](int stage) {
        __syncwarp();
        if (threadIdx.x % 32 < 2) arrive_at_peer(product.empty_barrier(stage), threadIdx.x % 32);
    };
    Turn turn = {0, 0};
    for (int tile = blockIdx.x / 2; tile < product.num_tiles(); tile += gridDim.x / 2) {
        const Place place = find_place(product, tile);
        Sums sums = {};
        int before = -1;
        for (int start = 0; start < product.k; start += kDepth) {
            const u32 stage = product.stages + turn.stage * kStageBytes;
            wait_at(product.full_barrier(turn.stage), turn.parity);
            pin(sums);
            begin_warpgroup_mma();
#pragma unroll
            for (int step = 0; step < kDepth / 16; ++step) {
                const u64 tokens = matrix_descriptor(stage + group * (64 * kRowBytes) + step * 32);
                const u64 weights = matrix_descriptor(stage + kTokenBytes + step * 32);
                WarpgroupMma<Storage>::add(sums, tokens, weights);
            }
            commit_warpgroup_mma();
            wait_for_warpgroup_mma<1>();
            if (before >= 0) release(before);
            before = turn.stage;
            turn.advance();
        }
        wait_for_warpgroup_mma<0>();
        pin(sums);
        release(before);
        finish(sums, place.token + product.rank * kTileTokens + group * 64, place.row_tile);
    }
}

// The whole of a kernel: barriers, then one warp that brings and two warpgroups that multiply, then the end of both
// CTAs together, since either may still arrive at barriers of the other, and copy into it.
template <typename FirstRow, typename Finish>
__device__ __forceinline__ void run_product(const Product& product, const TensorMap& x_map,
                                            const TensorMap& weight_map, FirstRow first_row, Finish finish) {
    const bool brings = threadIdx.x == 32 * kConsumerWarps;
    if (brings) {
        prefetch_map(x_map);
        prefetch_map(weight_map);
        init_barriers(product);
    }
    __syncwarp();
    sync_pair();
    let_next_start();
    if (threadIdx.x / 32 >= kConsumerWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kOtherRegisters));
        if (brings) bring_stages(product, x_map, weight_map, first_row);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
        wait_for_previous();
        multiply(product, finish);
    }
    sync_pair();
}

#endif

}  // namespace photon
