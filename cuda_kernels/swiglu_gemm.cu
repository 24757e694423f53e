// The first half of a gated MLP for many tokens: two products and what becomes of them (Shazeer, 2020), by wgmma.
// For sm_90a; on other architectures the kernel is empty.
//
//     out[t, i] = gate / (1 + exp(-gate)) * up,  gate = x[t] . weight[i],  up = x[t] . weight[inner + i]
//
// Layouts: x [tokens][k], weight [2 * inner][k] as in the checkpoint, out [tokens][inner]; each a map of boxes of
// rows of 64: kTileTokens of x, kTileInner of the weight, 64 of out.
//
// Work: a tile is 128 tokens times 128 gate rows and the 128 up rows that belong to them, so that one thread has
// both sums of an output. Two CTAs of a cluster take neighbouring tiles of the same rows of the weight: each brings
// its own tokens, and half of the weight for both. One warp of a CTA brings 64 of k at a time through kStages stages;
// two warpgroups multiply 64 tokens each, and write what comes of them by way of shared memory while the first stages
// of the next tile fill. Clusters take tiles c, c + clusters, ...; kBand tiles of tokens go through all of the
// weight together, so that both sides are read from the L2 more often than from memory.
//
// The first stages of weights are requested before the kernel before this one has finished.
//
// The result of a token is the same whatever the other tokens and their number: k runs in one order.
//
// Launch: grid 2 * clusters, in clusters of two; kThreads threads; PHOTON_SHARED_BYTES of dynamic shared memory.
// Preconditions: inner a multiple of 128, k of 8; all rows 16-byte aligned; out overlaps neither x nor weight.
// Arithmetic: products of 16-bit values, sums and all that follows in float32, rounded once.
// Bound by the tensor cores.
#include "photon/approximate.cuh"
#include "photon/dependent_launch.cuh"
#include "photon/tensor_copy.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "photon/warpgroup_mma.cuh"
#endif

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_SHARED_BYTES)
#error "PHOTON_STORAGE and PHOTON_SHARED_BYTES must be defined"
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

constexpr int kTileTokens = 64 * kWarpgroups, kTileInner = 128;
constexpr int kDepth = 64;
constexpr int kRowBytes = 2 * kDepth;
constexpr int kStages = 4;
constexpr int kBand = 8;
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kRegisters = 240, kOtherRegisters = 24;

constexpr int kTokenBytes = kTileTokens * kRowBytes;
constexpr int kHalfBytes = kTileInner * kRowBytes;  // gate or up
constexpr int kStageBytes = kTokenBytes + 2 * kHalfBytes;
// Of the output, 64 columns to a slice; each warpgroup has 64 rows.
constexpr int kSlices = kTileInner / 64, kSliceBytes = 64 * 128;
constexpr int kOutputBytes = kWarpgroups * kSlices * kSliceBytes;
constexpr int kBarriers = kStages * kStageBytes + kOutputBytes;
static_assert(kBarriers + 64 == PHOTON_SHARED_BYTES && 16 * kStages <= 64, "Python and the kernel disagree");

typedef float Sums[2 * kTileInner / 8][4];

__device__ __forceinline__ float silu(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return x * reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}

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

__device__ __forceinline__ u32 full_barrier(u32 barriers, int stage) {
    return barriers + 8 * stage;
}

__device__ __forceinline__ u32 empty_barrier(u32 barriers, int stage) {
    return barriers + 8 * (kStages + stage);
}

struct Place {
    int token, inner;  // where the cluster's tile begins
};

// Tiles of two times kTileTokens tokens, kBand of them beside each other for every kTileInner of inner.
__device__ __forceinline__ Place find_place(int tile, int token_tiles, int inner_tiles) {
    const int band = tile / (kBand * inner_tiles), in_band = tile % (kBand * inner_tiles);
    const int height = min(kBand, token_tiles - band * kBand);
    return {(band * kBand + in_band % height) * (2 * kTileTokens), in_band / height * kTileInner};
}

// The half of a stage's weights that this CTA brings for both.
__device__ __forceinline__ void bring_weights(const TensorMap& weight_map, u32 stages, u32 barriers,
                                              int stage, int rank, int start, int row) {
    copy_box_to(3, stages + stage * kStageBytes + kTokenBytes + rank * kHalfBytes, weight_map, start, row,
                full_barrier(barriers, stage));
}

__device__ __forceinline__ void bring_stages(const TensorMap& x_map, const TensorMap& weight_map, u32 stages,
                                             u32 barriers, int rank, int token_tiles, int inner, int k) {
    const int inner_tiles = inner / kTileInner;
    // The first weights come while the kernel before this one still runs.
    int num_ahead = min(kStages, (k + kDepth - 1) / kDepth);
    const Place first = find_place(blockIdx.x / 2, token_tiles, inner_tiles);
    for (int stage = 0; stage < num_ahead; ++stage) {
        arrive_expecting(full_barrier(barriers, stage), kStageBytes);
        bring_weights(weight_map, stages, barriers, stage, rank, stage * kDepth, first.inner + rank * inner);
    }
    wait_for_previous();
    Turn turn = {0, 1};
    for (int tile = blockIdx.x / 2; tile < token_tiles * inner_tiles; tile += gridDim.x / 2) {
        const Place place = find_place(tile, token_tiles, inner_tiles);
        for (int start = 0; start < k; start += kDepth) {
            const u32 stage = stages + turn.stage * kStageBytes, full = full_barrier(barriers, turn.stage);
            if (--num_ahead < 0) {
                // Both CTAs are done with it: what this one brings comes to both.
                wait_at(empty_barrier(barriers, turn.stage), turn.parity);
                arrive_expecting(full, kStageBytes);
                bring_weights(weight_map, stages, barriers, turn.stage, rank, start,
                              place.inner + rank * inner);
            }
            copy_box(stage, x_map, start, place.token + rank * kTileTokens, full);
            turn.advance();
        }
    }
}

__device__ __forceinline__ void sync_warpgroup(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

// Outputs of one warpgroup: to shared memory, and on from there.
__device__ __forceinline__ void write_outputs(const Sums& sums, const TensorMap& out_map, u32 staging, int token,
                                              int inner) {
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128, lane = thread % 32, warp = thread / 32;
    const int g = lane / 4, t = lane % 4;
    // What was written of the last tile has been read.
    if (thread == 0) wait_for_box_reads();
    sync_warpgroup(group);
#pragma unroll
    for (int j = 0; j < kTileInner / 8; ++j) {
        const float(&gate)[4] = sums[j];
        const float(&up)[4] = sums[kTileInner / 8 + j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 pair = pack_pair<Storage>(silu(gate[2 * half]) * up[2 * half],
                                                silu(gate[2 * half + 1]) * up[2 * half + 1]);
            const u32 row = staging + j / 8 * kSliceBytes + (warp * 16 + half * 8 + g) * 128;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + ((j % 8) ^ g) * 16 + 4 * t), "r"(pair) : "memory");
        }
    }
    publish_to_copies();
    sync_warpgroup(group);
    if (thread == 0) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            write_box(out_map, inner + slice * 64, token, staging + slice * kSliceBytes);
        }
        commit_boxes();
    }
}

__device__ __forceinline__ void multiply(const TensorMap& out_map, u32 stages, u32 barriers, int rank,
                                         int token_tiles, int inner, int k) {
    // The same for a whole warp, which the compiler cannot know.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int inner_tiles = inner / kTileInner;
    const u32 staging = stages + kStages * kStageBytes + group * (kSlices * kSliceBytes);
    const auto release = [&](int stage) {
        __syncwarp();
        if (threadIdx.x % 32 < 2) arrive_at_peer(empty_barrier(barriers, stage), threadIdx.x % 32);
    };
    Turn turn = {0, 0};
    for (int tile = blockIdx.x / 2; tile < token_tiles * inner_tiles; tile += gridDim.x / 2) {
        const Place place = find_place(tile, token_tiles, inner_tiles);
        Sums sums = {};
        int before = -1;
        for (int start = 0; start < k; start += kDepth) {
            const u32 stage = stages + turn.stage * kStageBytes;
            wait_at(full_barrier(barriers, turn.stage), turn.parity);
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
        const int token = place.token + rank * kTileTokens + group * 64;
        write_outputs(sums, out_map, staging, token, place.inner);
    }
    // Shared memory has to stay until it is read.
    if (threadIdx.x % 128 == 0) wait_for_boxes();
}

#endif

}  // namespace photon

extern "C" __global__ void PHOTON_PAIR __launch_bounds__(photon::kThreads, 1)
    swiglu_gemm(int tokens, int inner, int k, const __grid_constant__ photon::TensorMap out_map,
                const __grid_constant__ photon::TensorMap x_map,
                const __grid_constant__ photon::TensorMap weight_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace photon;
    extern __shared__ __align__(1024) uint4 shared[];
    const u32 stages = shared_address(shared), barriers = stages + kBarriers;
    const int warp = threadIdx.x / 32, rank = blockIdx.x % 2;
    const int token_tiles = (tokens + 2 * kTileTokens - 1) / (2 * kTileTokens);

    if (threadIdx.x == 32 * kConsumerWarps) {
        prefetch_map(x_map);
        prefetch_map(weight_map);
        prefetch_map(out_map);
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(full_barrier(barriers, stage), 1);
            init_barrier(empty_barrier(barriers, stage), 2 * kConsumerWarps);
        }
        publish_barriers();
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\n  barrier.cluster.wait.acquire.aligned;" ::: "memory");
    let_next_start();
    if (warp >= kConsumerWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kOtherRegisters));
        if (threadIdx.x == 32 * kConsumerWarps) {
            bring_stages(x_map, weight_map, stages, barriers, rank, token_tiles, inner, k);
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
        wait_for_previous();
        multiply(out_map, stages, barriers, rank, token_tiles, inner, k);
    }
    // The other CTA may still arrive at barriers of this one, and copy into it.
    asm volatile("barrier.cluster.arrive.release.aligned;\n  barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
