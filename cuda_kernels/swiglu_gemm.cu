// The first half of a gated MLP for many tokens: two products and what becomes of them (Shazeer, 2020), by wgmma.
// For sm_90a; on other architectures the kernel is empty.
//
//     out[t, i] = gate / (1 + exp(-gate)) * up,  gate = x[t] . weight[i],  up = x[t] . weight[inner + i]
//
// Layouts: x [tokens][k], weight [2 * inner][k] as in the checkpoint, out [tokens][inner], a map of boxes of 64 rows of
// 64. The products are those of photon/wide_gemm.cuh: the two boxes of a tile are 128 gate rows and the 128 up rows that
// belong to them, so that one thread has both sums of an output. What comes of a warpgroup's tile is written by
// way of shared memory.
//
// Launch: grid 2 * clusters, in clusters of two; kThreads threads; PHOTON_SHARED_BYTES of dynamic shared memory.
// Preconditions: inner a multiple of 128, k of 8; all rows 16-byte aligned; out overlaps neither x nor weight.
// Arithmetic: products of 16-bit values, sums and all that follows in float32, rounded once.
// Bound by the tensor cores.
#include "photon/approximate.cuh"
#include "photon/wide_gemm.cuh"

#ifndef PHOTON_SHARED_BYTES
#error "PHOTON_SHARED_BYTES must be defined"
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace photon {

constexpr int kTileInner = kHalfRows;
// Of the output, 64 columns to a slice; each warpgroup has 64 rows.
constexpr int kSlices = kTileInner / 64, kSliceBytes = 64 * 128;
constexpr int kOutputBytes = kWarpgroups * kSlices * kSliceBytes;
constexpr int kBarriers = kStages * kStageBytes + kOutputBytes;
static_assert(kBarriers + kBarrierBytes == PHOTON_SHARED_BYTES, "Python and the kernel disagree");

__device__ __forceinline__ float silu(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return x * reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
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

}  // namespace photon

#endif

extern "C" __global__ void PHOTON_PAIR __launch_bounds__(photon::kThreads, 1)
    swiglu_gemm(int tokens, int inner, int k, const __grid_constant__ photon::TensorMap out_map,
                const __grid_constant__ photon::TensorMap x_map,
                const __grid_constant__ photon::TensorMap weight_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace photon;
    extern __shared__ __align__(1024) uint4 shared[];
    const u32 stages = shared_address(shared);
    const int token_tiles = (tokens + 2 * kTileTokens - 1) / (2 * kTileTokens);
    const Product product = {stages, stages + kBarriers, static_cast<int>(blockIdx.x % 2), token_tiles,
                             inner / kTileInner, k};
    if (threadIdx.x == 32 * kConsumerWarps) prefetch_map(out_map);
    run_product(
        product, x_map, weight_map, [&](int tile, int box) { return tile * kTileInner + box * inner; },
        [&](const Sums& sums, int token, int tile) {
            const int group = threadIdx.x / 128;
            const u32 staging = stages + kStages * kStageBytes + group * (kSlices * kSliceBytes);
            write_outputs(sums, out_map, staging, token, tile * kTileInner);
        });
    // Shared memory has to stay until it is read.
    if (threadIdx.x % 128 == 0) wait_for_boxes();
#endif
}
