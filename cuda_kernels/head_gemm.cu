// The head of a model for more rows than skinny_gemm_tma takes: logits, or the best of each row by parts.
// For sm_90a; on other architectures the kernel is empty.
//
//     float_rows   out[t][v] = x[t] . weight[v]                                                    float32
//     best_rows    out[t][part] = rank (photon/rank.cuh) of the largest of 256 of them, v / 256 = part
//
// Layouts: x [tokens][k], weight [n][k], out rows of `row_stride` elements. The products are those of
// photon/wide_gemm.cuh: the two boxes of a tile are neighbours. Four lanes share a token of a tile.
//
// Launch: grid 2 * clusters, in clusters of two; kThreads threads; PHOTON_SHARED_BYTES of dynamic shared memory.
// Preconditions: k a multiple of 8; rows of x and weight 16-byte aligned.
// Arithmetic: products of 16-bit values, sums in float32.
// Bound by reading the weight up to 256 tokens, beyond by the tensor cores: there both take as long. Predicted on an
// H100 (3.05 TB/s), head of Llama 3.2 1B at 256 tokens: 195 us for the best rows.
#include "photon/rank.cuh"
#include "photon/wide_gemm.cuh"

#if !defined(PHOTON_SHARED_BYTES) || !defined(PHOTON_OUTPUT)
#error "PHOTON_SHARED_BYTES and PHOTON_OUTPUT must be defined"
#endif

namespace photon {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum OutputKind { float_rows, best_rows };
constexpr OutputKind kOutput = PHOTON_OUTPUT;

constexpr int kTileRows = 2 * kHalfRows;
constexpr int kBarriers = kStages * kStageBytes;
static_assert(kBarriers + kBarrierBytes == PHOTON_SHARED_BYTES, "Python and the kernel disagree");

struct Output {
    void* out;
    int tokens, n;
    i64 row_stride;
};

// Sums of one token: `half` is 0 for the warp's row g, 1 for g + 8.
__device__ __forceinline__ void store_row(const Output& output, const Sums& sums, int half, int token, int first) {
    float* const row = static_cast<float*>(output.out) + token * output.row_stride + first;
    // Rows of an odd stride are not aligned for two at once.
    const bool together = output.row_stride % 2 == 0 && reinterpret_cast<u64>(output.out) % 8 == 0;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
        const int id = first + 8 * j;
        const float2 pair = make_float2(sums[j][2 * half], sums[j][2 * half + 1]);
        if (together && id + 1 < output.n) {
            *reinterpret_cast<float2*>(row + 8 * j) = pair;
        } else {
            if (id < output.n) row[8 * j] = pair.x;
            if (id + 1 < output.n) row[8 * j + 1] = pair.y;
        }
    }
}

// The rank of the best of the tile's rows; every lane of the token has it.
__device__ __forceinline__ u64 best_of_row(const Sums& sums, int half, int first, int n) {
    BestEntry best;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int id = first + 8 * j + odd;
            best.see(id < n ? sums[j][2 * half + odd] : minus_infinity(), id);
        }
    }
    u64 rank = best.rank();
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        rank = min(rank, __shfl_xor_sync(0xffffffffu, rank, distance));
    }
    return rank;
}

__device__ __forceinline__ void finish(const Output& output, const Sums& sums, int first_token, int tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = first_token + warp * 16 + half * 8 + lane / 4;
        if (kOutput == float_rows) {
            if (token < output.tokens) store_row(output, sums, half, token, tile * kTileRows + 2 * t);
        } else {
            const u64 rank = best_of_row(sums, half, tile * kTileRows + 2 * t, output.n);
            if (t == 0 && token < output.tokens) {
                static_cast<u64*>(output.out)[token * output.row_stride + tile] = rank;
            }
        }
    }
}

#endif

}  // namespace photon

extern "C" __global__ void PHOTON_PAIR __launch_bounds__(photon::kThreads, 1)
    head_gemm(void* out, int tokens, int n, int k, photon::i64 row_stride,
              const __grid_constant__ photon::TensorMap x_map,
              const __grid_constant__ photon::TensorMap weight_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace photon;
    extern __shared__ __align__(1024) uint4 shared[];
    const u32 stages = shared_address(shared);
    const Output output = {out, tokens, n, row_stride};
    const Product product = {stages, stages + kBarriers, static_cast<int>(blockIdx.x % 2),
                             (tokens + 2 * kTileTokens - 1) / (2 * kTileTokens), (n + kTileRows - 1) / kTileRows, k};
    run_product(
        product, x_map, weight_map, [](int tile, int box) { return tile * kTileRows + box * kHalfRows; },
        [&](const Sums& sums, int token, int tile) { finish(output, sums, token, tile); });
#endif
}
