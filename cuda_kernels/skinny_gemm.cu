// A product of 9 to 128 tokens: the rows of the weight are the M of the tensor cores, the tokens their N.
//
//     y[t, r] = sum over k of x[t, k] * weight[r, k]                        and on to photon/linear_output.cuh
//
// Layouts: x [tokens][k] with x_row_stride elements between tokens; weight [n][k] as in the checkpoint.
//
// Work: a CTA multiplies PHOTON_ROWS rows of the weight (a tile, in the order of linear_output.cuh's pairs) with
// all tokens, 64 k at a time. Weights and x pass through PHOTON_STAGES stages of shared memory, filled
// asynchronously, so that up to 64 KB of weights of each CTA are under way. PHOTON_CLUSTER CTAs share a tile by
// k where a weight has few rows: they read each other's sums, add them in the order of their ranks, and each
// finishes its part of the tile. Without a cluster a CTA walks tiles blockIdx.y, blockIdx.y + gridDim.y, ...,
// and the stages of the next one fill while it finishes one.
//
// The first stages of weights are requested before the kernel before this one has finished.
//
// The result of a token is the same whatever the other tokens, their number and PHOTON_TOKENS: k runs in the
// same order, and which part of it a CTA takes follows from the weight's shape alone.
//
// Launch: grid (PHOTON_CLUSTER, tiles), without a cluster any number of CTAs up to that; kThreads threads;
// PHOTON_SHARED_BYTES of dynamic shared memory: with a cluster half of a multiprocessor's at most, so that two
// CTAs hide each other's waiting; without one more than half, see photon_grpc/kernels/skinny_gemm.py.
// Preconditions: 1 <= tokens <= PHOTON_TOKENS; k a multiple of 8; x and weight 16-byte aligned, x_row_stride a
// multiple of 8; n * k below 2^32.
// Arithmetic: products of 16-bit values, sums in float32. PHOTON_WARPGROUP is 1 for wgmma (sm_90a; elsewhere it
// means nothing), 0 for mma.sync; the two add in different orders.
// Bound by reading the weight up to 64 tokens. At 128 a CTA reads as many bytes of x from L2 as of the weight,
// and mma.sync keeps tensor cores and shared memory as busy as the memory. Predicted on an H200, Llama 3.2 1B at
// 16 / 64 / 128 tokens, µs: qkv 3.9 / 4.6 / 6.2, o 2.9 / 3.7 / 5.3, gate_up 16.7 / 18.4 / 23.7,
// down 8.9 / 10.2 / 13.7, head 126 / 141 / 188; 8B: tools/bench/kernel_cases/skinny_gemm.py.
#include "photon/attention_mma.cuh"
#include "photon/dependent_launch.cuh"
#include "photon/linear_output.cuh"
#include "photon/row_cluster.cuh"

#ifndef PHOTON_WARPGROUP
#error "PHOTON_WARPGROUP must be defined"
#endif
#if PHOTON_WARPGROUP && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "photon/warpgroup_mma.cuh"
#define PHOTON_HAS_WGMMA 1
#else
#define PHOTON_HAS_WGMMA 0
#endif
#if !defined(PHOTON_ROWS) || !defined(PHOTON_TOKENS) || !defined(PHOTON_STAGES) || !defined(PHOTON_SHARED_BYTES)
#error "PHOTON_ROWS, PHOTON_TOKENS, PHOTON_STAGES and PHOTON_SHARED_BYTES must be defined"
#endif

namespace photon {

constexpr int kRows = PHOTON_ROWS;
constexpr int kTokens = PHOTON_TOKENS;
constexpr int kStages = PHOTON_STAGES;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Of k in a stage: 128 bytes of a row, eight accesses of 16. Access c of row r lies at place c ^ (r % 8), so
// that eight rows of one c, and one row of eight c, each touch every bank once.
constexpr int kDepth = 64;
constexpr int kRowBytes = 2 * kDepth;
constexpr int kAccesses = kDepth / kVec;
// Rows that all threads copy at a time: sixteen, a tile of linear_output.cuh.
constexpr int kCopiedRows = kThreads / kAccesses;
constexpr int kRowCopies = kRows / kCopiedRows, kTokenCopies = kTokens / kCopiedRows;
constexpr int kWeightBytes = kRows * kRowBytes;
constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;

// Four warps as one read each side from shared memory once for every 64 rows.
constexpr bool kByWarpgroup = PHOTON_HAS_WGMMA;

// A warp's part of a tile: as square as can be, since both sides are read from shared memory once per warp.
constexpr int kWarpsOnTokens =
    !kByWarpgroup && kTokens % 32 == 0 && kTokens > (kRows > 64 ? 64 : 16) ? 2 : 1;
constexpr int kWarpRows = kRows / (kWarps / kWarpsOnTokens);
constexpr int kWarpTokens = kTokens / kWarpsOnTokens;
constexpr int kRowFragments = kWarpRows / 16, kTokenFragments = kWarpTokens / 8;

// Sums that a CTA of a cluster finishes, four at a time: those of a fragment that one thread holds.
constexpr int kFragments = kRowFragments * kTokenFragments;
constexpr int kShare = kFragments * kThreads / kCluster;
constexpr int kItems = (kShare + kThreads - 1) / kThreads;
// Items of a thread that are requested together.
constexpr int kTogether = kItems % 4 == 0 ? 4 : kItems % 3 == 0 ? 3 : kItems % 2 == 0 ? 2 : 1;

static_assert(kCopiedRows == 16 && kRows % 16 == 0 && kTokens % 16 == 0, "whole tiles of linear_output.cuh");
static_assert(kStages >= 3, "one stage in use, and more under way");
static_assert(kWarpRows % 16 == 0 && kWarpTokens % 16 == 0, "whole fragments, two of tokens at a time");
static_assert(kStages * kStageBytes == PHOTON_SHARED_BYTES, "Python and the kernel disagree");
static_assert(kCluster == 1 || kRows * kTokens * 4 <= PHOTON_SHARED_BYTES, "sums take the place of stages");

typedef float Sums[kRowFragments][kTokenFragments][4];

#if PHOTON_HAS_WGMMA
__device__ __forceinline__ void pin(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kTokenFragments; ++j) {
#pragma unroll
            for (int one = 0; one < 4; ++one) pin(sums[i][j][one]);
        }
    }
}
#endif

// Sixteen bytes of a weight to shared memory, and the line after them to L2; zeros where index >= limit.
__device__ __forceinline__ void copy_weight(u32 target, const Storage* source, int index, int limit) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;"
                 :
                 : "r"(target), "l"(source), "r"(index < limit ? 16 : 0)
                 : "memory");
}

// All but the latest `kNewer` groups of copies have arrived, this thread's.
template <int kNewer>
__device__ __forceinline__ void wait_for_older_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory");
}

// What a thread copies: its 16 bytes of a stage in every sixteenth row.
struct Copier {
    const Storage* weight;
    const Storage* x;
    i64 x_row_stride;
    int tokens, k;
    u32 target;            // of the first row in the first stage
    u32 rows[kRowCopies];  // of the weight: where they start, in units of kVec elements

    __device__ __forceinline__ static int row() { return threadIdx.x / kAccesses; }
    __device__ __forceinline__ static int access() { return threadIdx.x % kAccesses; }
    __device__ __forceinline__ static int depth(int block) { return block * kDepth + access() * kVec; }

    // Rows past the end read the last one, and nothing comes of them.
    __device__ __forceinline__ void set_tile(const Output& output, int tile) {
#pragma unroll
        for (int i = 0; i < kRowCopies; ++i) {
            const int pair = tile * (kRows / 2) + 8 * i + row() % 8;
            const int wanted = row() < 8 ? low_row(output, pair) : high_row(output, pair);
            rows[i] = static_cast<u32>(min(wanted, output.n - 1)) * static_cast<u32>(k / kVec);
        }
    }

    __device__ __forceinline__ void copy_weights(int stage, int block) const {
        const int start = depth(block);
#pragma unroll
        for (int i = 0; i < kRowCopies; ++i) {
            copy_weight(target + stage * kStageBytes + i * (kCopiedRows * kRowBytes),
                        weight + static_cast<i64>(rows[i]) * kVec + start, start, k);
        }
    }

    __device__ __forceinline__ const Storage* token_row(int i) const {
        return x + (row() + i * kCopiedRows) * x_row_stride;
    }

    __device__ __forceinline__ bool has_token(int i) const { return row() + i * kCopiedRows < tokens; }

    // Zeros for tokens that are not there.
    __device__ __forceinline__ void copy_tokens(int stage, int block) const {
        const int start = depth(block);
#pragma unroll
        for (int i = 0; i < kTokenCopies; ++i) {
            copy_async(target + stage * kStageBytes + kWeightBytes + i * (kCopiedRows * kRowBytes),
                       token_row(i) + start, has_token(i) && start < k);
        }
    }
};

// How far the copies have come: a block of kDepth k of a tile.
struct Cursor {
    int tile, block;

    // The block after this one; whether it is of another tile.
    __device__ __forceinline__ bool advance(int first_block, int end_block) {
        if (++block < end_block) return false;
        block = first_block;
        tile += static_cast<int>(gridDim.y);
        return true;
    }
};

// Where the part of a fragment that thread `owner` holds lies: its pair in the tile, and the first of its two
// tokens.
__device__ __forceinline__ int pair_of(int owner, int row_fragment) {
    const int warp = owner / 32 / kWarpsOnTokens, g = owner % 32 / 4;
    const int row = kByWarpgroup ? row_fragment * 64 + warp * 16 : warp * kWarpRows + row_fragment * 16;
    return row / 2 + g;
}

__device__ __forceinline__ int token_of(int owner, int token_fragment) {
    const int warp = owner / 32 % kWarpsOnTokens, t = owner % 4;
    return warp * kWarpTokens + token_fragment * 8 + 2 * t;
}

// Adds a stage's products; `stage` is its address in shared memory.
#if PHOTON_HAS_WGMMA
__device__ __forceinline__ void multiply(Sums& sums, u32 stage) {
    pin(sums);
    begin_warpgroup_mma();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        const u64 tokens = matrix_descriptor(stage + kWeightBytes + step * 32);
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i) {
            const u64 weights = matrix_descriptor(stage + i * (64 * kRowBytes) + step * 32);
            WarpgroupMma<Storage>::add(sums[i], weights, tokens);
        }
    }
    finish_warpgroup_mma();
    pin(sums);
}
#else
__device__ __forceinline__ void multiply(Sums& sums, u32 stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // ldmatrix takes the address of row lane % 8 of matrix lane / 8. Weights: rows 0..7 and 8..15, then the
    // same at the next eight k. Tokens: eight at both k, then the next eight.
    const int row = warp / kWarpsOnTokens * kWarpRows + lane % 16;
    const int token = warp % kWarpsOnTokens * kWarpTokens + lane / 16 * 8 + lane % 8;
    const u32 weights = stage + row * kRowBytes;
    const u32 tokens = stage + kWeightBytes + token * kRowBytes;
    const u32 weight_place = ((lane / 16) ^ (lane % 8)) * 16, token_place = ((lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        u32 a[kRowFragments][4];
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i) {
            load_matrices(a[i], weights + i * (16 * kRowBytes) + (weight_place ^ (step * 32)));
        }
#pragma unroll
        for (int j = 0; j < kTokenFragments; j += 2) {
            u32 b[4];
            load_matrices(b, tokens + j * (8 * kRowBytes) + (token_place ^ (step * 32)));
#pragma unroll
            for (int i = 0; i < kRowFragments; ++i) {
                mma_16x8x16<Storage>(sums[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                mma_16x8x16<Storage>(sums[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
            }
        }
    }
}
#endif

// The sums that this thread holds, to where they go; zeros take their place. They move past one copy of the
// code, since all of it for each of them would not fit the instruction cache.
__device__ __forceinline__ void finish_own(const Output& output, Sums& sums, int tile, int tokens) {
#pragma unroll 1
    for (int fragment = 0; fragment < kTokenFragments; ++fragment) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int token = token_of(threadIdx.x, fragment) + odd;
            if (token >= tokens) continue;
            const Place place = find_place(output, token);
            float2 operands[kRowFragments];
#pragma unroll
            for (int i = 0; i < kRowFragments; ++i) {
                operands[i] = request_pair(output, tile * (kRows / 2) + pair_of(threadIdx.x, i), token, place);
            }
#pragma unroll
            for (int i = 0; i < kRowFragments; ++i) {
                const int pair = tile * (kRows / 2) + pair_of(threadIdx.x, i);
                finish_pair(output, pair, token, place, operands[i], sums[i][0][odd], sums[i][0][odd + 2]);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
            for (int j = 0; j < kTokenFragments; ++j) {
#pragma unroll
                for (int one = 0; one < 4; ++one) {
                    sums[i][j][one] = j + 1 < kTokenFragments ? sums[i][(j + 1) % kTokenFragments][one] : 0.0f;
                }
            }
        }
    }
}

// Four sums of a fragment: of two rows, a pair, and two tokens.
struct Item {
    int pair, token;
    bool is_there;
};

// Number `local` of this CTA's share of the sums of a tile.
__device__ __forceinline__ Item find_item(int local, int tile) {
    const int index = blockIdx.x * kShare + local, fragment = index / kThreads, owner = index % kThreads;
    return {tile * (kRows / 2) + pair_of(owner, fragment / kTokenFragments),
            token_of(owner, fragment % kTokenFragments), local < kShare};
}

// This CTA's share of the sums of the whole cluster, to where they go. `partials` takes the place of the stages.
__device__ __forceinline__ void finish_share(const Output& output, const Sums& sums, float4* partials, int tile,
                                             int tokens) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kTokenFragments; ++j) {
            const float(&part)[4] = sums[i][j];
            partials[(i * kTokenFragments + j) * kThreads + threadIdx.x] =
                make_float4(part[0], part[1], part[2], part[3]);
        }
    }
    cluster_arrive();

#pragma unroll 1
    for (int first = threadIdx.x; first < kItems * kThreads; first += kTogether * kThreads) {
        Place places[kTogether][2];
        float2 operands[kTogether][2];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const Item item = find_item(first + i * kThreads, tile);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                if (!item.is_there || item.token + odd >= tokens) continue;
                places[i][odd] = find_place(output, item.token + odd);
                operands[i][odd] = request_pair(output, item.pair, item.token + odd, places[i][odd]);
            }
        }

        if (first < kThreads) cluster_wait();
        float4 totals[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int local = first + i * kThreads;
            if (local >= kShare) continue;
            float4 parts[kCluster];
#pragma unroll
            for (int rank = 0; rank < kCluster; ++rank) {
                parts[rank] = *peer(partials + blockIdx.x * kShare + local, rank);
            }
            totals[i] = parts[0];
#pragma unroll
            for (int rank = 1; rank < kCluster; ++rank) {
                totals[i].x += parts[rank].x;
                totals[i].y += parts[rank].y;
                totals[i].z += parts[rank].z;
                totals[i].w += parts[rank].w;
            }
        }
        if (first >= (kItems - kTogether) * kThreads) cluster_arrive();

#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const Item item = find_item(first + i * kThreads, tile);
            const float4 total = totals[i];
            if (item.is_there && item.token < tokens) {
                finish_pair(output, item.pair, item.token, places[i][0], operands[i][0], total.x, total.z);
            }
            if (item.is_there && item.token + 1 < tokens) {
                finish_pair(output, item.pair, item.token + 1, places[i][1], operands[i][1], total.y, total.w);
            }
        }
    }
    // Peers may still read the partial sums of a CTA that has finished.
    cluster_wait();
}

}  // namespace photon

extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(photon::kThreads, 2)
    skinny_gemm(void* out, photon::Storage* kv_cache, const photon::Storage* x,
                const photon::Storage* __restrict__ weight, const photon::Storage* __restrict__ bias,
                const float* __restrict__ angles, const photon::Index* positions, const photon::i64* slots,
                int tokens, int n, int num_heads, int num_kv_heads, int head_dim, int block_size, int k,
                photon::i64 x_row_stride, photon::i64 out_row_stride) {
    using namespace photon;
    extern __shared__ __align__(1024) uint4 shared[];
    const u32 stages = static_cast<u32>(__cvta_generic_to_shared(shared));
    const Output output = {out, bias, kv_cache, angles, positions, slots, n, num_heads, num_kv_heads, head_dim,
                           block_size, out_row_stride};

    const int num_blocks = (k + kDepth - 1) / kDepth, rank = kCluster == 1 ? 0 : blockIdx.x;
    const int first_block = num_blocks * rank / kCluster, end_block = num_blocks * (rank + 1) / kCluster;
    const int num_tiles = (n + kRows - 1) / kRows;
    const int my_tiles = kCluster == 1 ? (num_tiles - 1 - blockIdx.y) / gridDim.y + 1 : 1;
    const int total = my_tiles * (end_block - first_block);

    Copier copier = {weight, x, x_row_stride, tokens, k};
    copier.target = stages + Copier::row() * kRowBytes + (Copier::access() ^ (Copier::row() % 8)) * 16;
    Cursor copied = {static_cast<int>(blockIdx.y), first_block};
    copier.set_tile(output, copied.tile);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (i < total) {
            copier.copy_weights(i, copied.block);
            if (copied.advance(first_block, end_block)) copier.set_tile(output, copied.tile);
        }
        commit_copies();
    }
    wait_for_previous();
    let_next_start();

    // Their x in ordinary loads: as a later group of copies it would wait for all of these weights.
    uint4 early[kStages - 1][kTokenCopies];
    Cursor read = {0, first_block};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        const int start = Copier::depth(read.block);
#pragma unroll
        for (int j = 0; j < kTokenCopies; ++j) {
            const int limit = i < total && copier.has_token(j) ? k : 0;
            early[i][j] = load_streaming(copier.token_row(j) + start, start, limit);
        }
        read.advance(first_block, end_block);
    }
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
#pragma unroll
        for (int j = 0; j < kTokenCopies; ++j) {
            const u32 place = copier.target + i * kStageBytes + kWeightBytes + j * (kCopiedRows * kRowBytes);
            shared[(place - stages) / 16] = early[i][j];
        }
    }

    Sums sums = {};
    int tile = blockIdx.y, done = 0, stage = 0, free_stage = kStages - 1;
#pragma unroll 1
    for (int i = 0; i < total; ++i) {
        wait_for_older_copies<kStages - 2>();
#if PHOTON_HAS_WGMMA
        publish_to_warpgroups();
#endif
        // Everybody's copies of this stage have arrived, and nobody reads the one before it any more.
        __syncthreads();
        if (i + kStages - 1 < total) {
            copier.copy_weights(free_stage, copied.block);
            copier.copy_tokens(free_stage, copied.block);
            if (copied.advance(first_block, end_block)) copier.set_tile(output, copied.tile);
        }
        commit_copies();
        multiply(sums, stages + stage * kStageBytes);
        free_stage = stage;
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (kCluster == 1 && ++done == end_block - first_block) {
            finish_own(output, sums, tile, tokens);
            done = 0;
            tile += static_cast<int>(gridDim.y);
        }
    }
    if (kCluster > 1) finish_share(output, sums, reinterpret_cast<float4*>(shared), tile, tokens);
}
