// skinny_gemm.cu's product on sm_90a: the copy engine brings weights and x, and wgmma multiplies them.
//
//     y[t, r] = sum over k of x[t, k] * weight[r, k]                        and on to photon/linear_output.cuh
//
// Layouts: x [tokens][k], weight [n][k], both behind tensor maps that photon_grpc/kernels/skinny_gemm_tma.py
// makes: a tile is PHOTON_ROWS rows in the order of linear_output.cuh's pairs, a box of the weight all of it, or
// PHOTON_BOX_ROWS where whole heads and tiles end in different places.
//
// Work: a warp of its own has the copy engine fill PHOTON_STAGES stages of shared memory, each with 64 k of a
// tile and of all tokens; the other warps, four for every 64 rows, multiply them. A cluster has PHOTON_SPLITS
// parts of k times PHOTON_SHARERS tiles:
//   - CTAs of the same part of k need the same x. Each has the copy engine send its share of the tokens to all.
//   - CTAs of the same tile send their sums to one another, each part to who will finish it, which adds them in
//     the order of k. Nobody waits but for what it needs.
// Without splits a cluster walks groups of tiles blockIdx.y, blockIdx.y + gridDim.y, ..., and the stages of the
// next group fill while it finishes one.
//
// The first stages of weights are requested before the kernel before this one has finished.
//
// The result of a token is the same whatever the other tokens, their number and PHOTON_TOKENS: k runs in the
// same order, and which part of it a CTA takes follows from the weight's shape alone.
//
// best_rows: a part is a CTA, whose number is blockIdx.y * gridDim.x + blockIdx.x; without splits alone.
//
// Launch: grid (PHOTON_CLUSTER, groups of tiles), without splits any number of groups up to that; kThreads
// threads; PHOTON_SHARED_BYTES of dynamic shared memory.
// Preconditions: 1 <= tokens <= PHOTON_TOKENS; k a multiple of 8. Compute capability 9.0 alone; elsewhere it is
// empty, for the check that compiles it.
// Arithmetic: products of 16-bit values, sums in float32.
// Bound by reading the weight; below 20 MB by the way to the first x and back from the last sum. Predicted on an
// H100 (3.05 TB/s), Llama 3.2 1B at 64 tokens, µs: qkv 6.6, o 5.1, gate_up 24, down 13.5.
#include "photon/tensor_copy.cuh"
#include "photon/dependent_launch.cuh"
#include "photon/linear_output.cuh"
#include "photon/row_cluster.cuh"
#include "photon/warpgroup_mma.cuh"

#if !defined(PHOTON_ROWS) || !defined(PHOTON_TOKENS) || !defined(PHOTON_SPLITS) || !defined(PHOTON_SHARERS) || \
    !defined(PHOTON_RESIDENTS) || !defined(PHOTON_STAGES) || !defined(PHOTON_SHARED_BYTES) || !defined(PHOTON_BOX_ROWS)
#error "a macro of photon_grpc/kernels/skinny_gemm_tma.py is not defined"
#endif

namespace photon {

constexpr int kRows = PHOTON_ROWS;
constexpr int kTokens = PHOTON_TOKENS;
constexpr int kSplits = PHOTON_SPLITS;
constexpr int kSharers = PHOTON_SHARERS;
constexpr int kStages = PHOTON_STAGES;
constexpr int kBoxRows = PHOTON_BOX_ROWS;

constexpr int kWarpgroupRows = 64;
constexpr int kMultipliers = kRows / kWarpgroupRows * 128;
constexpr int kThreads = kMultipliers + 32;

constexpr int kDepth = 64;  // of k in a stage
constexpr int kRowBytes = 2 * kDepth;
constexpr int kWeightBytes = kRows * kRowBytes;
constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
constexpr int kSharedTokens = kTokens / kSharers;

// A thread's sums are of two rows, a pair, and two tokens in every eighth.
constexpr int kFragments = kTokens / 8;
// Of a tile's fragments, those that a CTA finishes; the last one of a cluster may have fewer.
constexpr int kAllFragments = kFragments * kMultipliers;
constexpr int kShare = (kAllFragments / 32 + kSplits - 1) / kSplits * 32;
constexpr int kSumsBytes = kSplits > 1 ? kSplits * kShare * 16 : 0;

// Behind the stages lie the sums of all splits, and the barriers: of full stages, of free ones, of the sums.
constexpr int kSumsStart = kStages * kStageBytes;
constexpr int kBarriersStart = kSumsStart + kSumsBytes;
constexpr int kBarriers = 2 * kStages + 1;

static_assert(kRows % kWarpgroupRows == 0 && kTokens % 16 == 0, "what wgmma takes");
static_assert(kSharedTokens % 8 == 0, "whole blocks of the swizzle");
static_assert(kRows % kBoxRows == 0 && kBoxRows % 16 == 0, "whole boxes of whole pairs");
static_assert(PHOTON_OUTPUT != best_rows || (kSplits == 1 && kTokens <= kMultipliers), "whole sums; a thread a token");
static_assert(PHOTON_OUTPUT != best_rows || kMultipliers / 4 * kTokens <= kStageBytes, "room for the ranks");
static_assert(kBarriersStart + 8 * kBarriers == PHOTON_SHARED_BYTES, "Python and the kernel disagree");
#if __CUDA_ARCH__ >= 900
static_assert(kCluster == kSplits * kSharers, "Python and the kernel disagree");
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kMultiplierWarps = kMultipliers / 32;
// Fragments that a thread finishes.
constexpr int kItems = (kShare + kMultipliers - 1) / kMultipliers;

typedef float Sums[kFragments][4];

__device__ __forceinline__ u32 full_barrier(u32 shared, int stage) {
    return shared + kBarriersStart + 8 * stage;
}

__device__ __forceinline__ u32 free_barrier(u32 shared, int stage) {
    return shared + kBarriersStart + 8 * (kStages + stage);
}

__device__ __forceinline__ u32 sums_barrier(u32 shared) {
    return shared + kBarriersStart + 8 * (2 * kStages);
}

// This CTA's place in its cluster.
__device__ __forceinline__ int my_split() {
    return kSplits == 1 ? 0 : blockIdx.x % kSplits;
}

__device__ __forceinline__ int my_sharer() {
    return kSharers == 1 ? 0 : blockIdx.x / kSplits;
}

__device__ __forceinline__ u32 cta_of(int split, int sharer) {
    return split + kSplits * sharer;
}

// A stage in use, and the parity of the phase of its barriers.
struct Turn {
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Where the copies are: 64 k of a tile.
struct Cursor {
    int tile, block;

    __device__ __forceinline__ void advance(int first_block, int end_block) {
        if (++block < end_block) return;
        block = first_block;
        tile += static_cast<int>(gridDim.y) * kSharers;
    }
};

__device__ __forceinline__ void copy_weights(const TensorMap& weight, const Output& output, u32 shared, int stage,
                                             Cursor at) {
    const u32 target = shared + stage * kStageBytes, barrier = full_barrier(shared, stage);
    if (kOutput == silu_and_mul) {
        copy_box(target, weight, at.block * kDepth, 0, 0, at.tile * (kRows / 16), 0, barrier, kReadOnce);
    } else if (kOutput == rope_and_store) {
        const int groups_of_head = output.head_dim / 16;
#pragma unroll
        for (int row = 0; row < kRows; row += kBoxRows) {
            const int group = (at.tile * kRows + row) / 16;
            copy_box(target + row * kRowBytes, weight, at.block * kDepth, 0, 0, group % groups_of_head,
                     group / groups_of_head, barrier, kReadOnce);
        }
    } else {
        copy_box(target, weight, at.block * kDepth, at.tile * kRows, barrier, kReadOnce);
    }
}

__device__ __forceinline__ void copy_tokens(const TensorMap& x, u32 shared, int stage, Cursor at) {
    const int first = kSharers == 1 ? 0 : my_sharer() * kSharedTokens;
    const u32 target = shared + stage * kStageBytes + kWeightBytes + first * kRowBytes;
    if (kSharers == 1) {
        copy_box(target, x, at.block * kDepth, first, full_barrier(shared, stage));
        return;
    }
    u32 ranks = 0;
#pragma unroll
    for (int sharer = 0; sharer < kSharers; ++sharer) ranks |= 1u << cta_of(my_split(), sharer);
    copy_box_to(static_cast<unsigned short>(ranks), target, x, at.block * kDepth, first,
                full_barrier(shared, stage));
}

__device__ __forceinline__ void pin(Sums& sums) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int one = 0; one < 4; ++one) pin(sums[j][one]);
    }
}

// Adds a stage's products; the operands are where those of this warpgroup start.
__device__ __forceinline__ void multiply(Sums& sums, u64 rows, u64 tokens) {
    pin(sums);
    begin_warpgroup_mma();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) WarpgroupMma<Storage>::add(sums, rows + 2 * step, tokens + 2 * step);
    finish_warpgroup_mma();
    pin(sums);
}

// Where the sums that thread `owner` holds belong: its pair in the tile, and the first of its two tokens.
__device__ __forceinline__ int pair_of(int owner) {
    return owner / 32 * 8 + owner % 32 / 4;
}

__device__ __forceinline__ int token_of(int owner, int fragment) {
    return fragment * 8 + owner % 4 * 2;
}

// The sums that this thread holds, to where they go; zeros take their place. They move past one copy of the
// code, since all of it for each of them would not fit the instruction cache.
__device__ __forceinline__ void finish_own(const Output& output, Sums& sums, int tile, int tokens) {
    const int pair = tile * (kRows / 2) + pair_of(threadIdx.x);
#pragma unroll 1
    for (int fragment = 0; fragment < kFragments; ++fragment) {
        Place places[2];
        float2 operands[2];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int token = token_of(threadIdx.x, fragment) + odd;
            if (token >= tokens) continue;
            places[odd] = find_place(output, token);
            operands[odd] = request_pair(output, pair, token, places[odd]);
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int token = token_of(threadIdx.x, fragment) + odd;
            if (token >= tokens) continue;
            finish_pair(output, pair, token, places[odd], operands[odd], sums[0][odd], sums[0][odd + 2]);
        }
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
            for (int one = 0; one < 4; ++one) {
                sums[j][one] = j + 1 < kFragments ? sums[(j + 1) % kFragments][one] : 0.0f;
            }
        }
    }
}

// The best of the rows that this thread has seen, for each token whose sums it holds.
typedef BestEntry Bests[kFragments][2];

// The sums that this thread holds, seen; zeros take their place.
__device__ __forceinline__ void see_own(Bests& bests, const Output& output, Sums& sums, int tile) {
    const int pair = tile * (kRows / 2) + pair_of(threadIdx.x);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            see_pair(bests[j][odd], output, pair, sums[j][odd], sums[j][odd + 2]);
            sums[j][odd] = sums[j][odd + 2] = 0.0f;
        }
    }
}

__device__ __forceinline__ void sync_multipliers() {
    asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");
}

// A rank for each token of all that this CTA's threads have seen, by way of the stages, which are used up.
__device__ __forceinline__ void write_bests(const Output& output, const Bests& bests, uint4* memory, int tokens) {
    u64(*const ranks)[kTokens] = reinterpret_cast<u64(*)[kTokens]>(memory);
    sync_multipliers();
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            u64 rank = bests[j][odd].rank();
            // Lanes that hold the same tokens.
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                rank = min(rank, __shfl_xor_sync(0xffffffffu, rank, distance));
            }
            if (threadIdx.x % 32 < 4) ranks[threadIdx.x / 32][token_of(threadIdx.x, j) + odd] = rank;
        }
    }
    sync_multipliers();
    if (static_cast<int>(threadIdx.x) >= tokens) return;
    u64 rank = ranks[0][threadIdx.x];
#pragma unroll
    for (int warp = 1; warp < kMultiplierWarps; ++warp) rank = min(rank, ranks[warp][threadIdx.x]);
    store_rank(output, threadIdx.x, blockIdx.y * gridDim.x + blockIdx.x, rank);
}

// What this CTA finishes of a tile that it shares: fragments whose sums come from every split.
struct Share {
    Place places[kItems][2];
    float2 operands[kItems][2];

    __device__ __forceinline__ static bool is_there(int item) {
        return (kShare % kMultipliers == 0 || item * kMultipliers + threadIdx.x < kShare) &&
               (kAllFragments % kSplits == 0 || index(item) < kAllFragments);
    }

    // Of its sums, from all splits.
    __device__ __forceinline__ static u32 num_bytes() {
        return max(0, min(kShare, kAllFragments - my_split() * kShare)) * (kSplits * 16);
    }

    __device__ __forceinline__ static int index(int item) {
        return my_split() * kShare + item * kMultipliers + threadIdx.x;
    }

    __device__ __forceinline__ static int pair(int item, int tile) {
        return tile * (kRows / 2) + pair_of(index(item) % kMultipliers);
    }

    __device__ __forceinline__ static int token(int item) {
        return token_of(index(item) % kMultipliers, index(item) / kMultipliers);
    }

    __device__ __forceinline__ void request(const Output& output, int tile, int tokens) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                if (!is_there(item) || token(item) + odd >= tokens) continue;
                places[item][odd] = find_place(output, token(item) + odd);
                operands[item][odd] = request_pair(output, pair(item, tile), token(item) + odd, places[item][odd]);
            }
        }
    }

    // To every CTA what it finishes of this one's sums.
    __device__ __forceinline__ static void send(const Sums& sums, u32 shared) {
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
            const int all = j * kMultipliers + threadIdx.x, split = all / kShare;
            const u32 place = shared + kSumsStart + (my_split() * kShare + all % kShare) * 16;
            const u32 rank = cta_of(split, my_sharer());
            store_counted(peer_address(place, rank), peer_address(sums_barrier(shared), rank), sums[j]);
        }
    }

    __device__ __forceinline__ void finish(const Output& output, const float4* parts, u32 shared, int tile,
                                           int tokens) const {
        wait_for_stores(sums_barrier(shared), 0);
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            if (!is_there(item)) continue;
            float4 total = parts[item * kMultipliers + threadIdx.x];
#pragma unroll
            for (int split = 1; split < kSplits; ++split) {
                const float4 part = parts[split * kShare + item * kMultipliers + threadIdx.x];
                total.x += part.x;
                total.y += part.y;
                total.z += part.z;
                total.w += part.w;
            }
            if (token(item) < tokens) {
                finish_pair(output, pair(item, tile), token(item), places[item][0], operands[item][0], total.x,
                            total.z);
            }
            if (token(item) + 1 < tokens) {
                finish_pair(output, pair(item, tile), token(item) + 1, places[item][1], operands[item][1], total.y,
                            total.w);
            }
        }
    }
};

#endif

}  // namespace photon

extern "C" __global__ void PHOTON_ROW_CLUSTER __launch_bounds__(photon::kThreads, PHOTON_RESIDENTS)
    skinny_gemm_tma(void* out, photon::Storage* kv_cache, const __grid_constant__ photon::TensorMap x,
                    const __grid_constant__ photon::TensorMap weight, const photon::Storage* __restrict__ bias,
                    const float* __restrict__ angles, const photon::Index* positions, const photon::i64* slots,
                    int tokens, int n, int num_heads, int num_kv_heads, int head_dim, int block_size, int k,
                    photon::i64 out_row_stride) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace photon;
    extern __shared__ __align__(1024) uint4 memory[];
    const u32 shared = static_cast<u32>(__cvta_generic_to_shared(memory));
    const Output output = {out, bias, kv_cache, angles, positions, slots, n, num_heads, num_kv_heads, head_dim,
                           block_size, out_row_stride};

    const int num_blocks = (k + kDepth - 1) / kDepth;
    const int first_block = num_blocks * my_split() / kSplits, end_block = num_blocks * (my_split() + 1) / kSplits;
    const int num_groups = (n + kRows * kSharers - 1) / (kRows * kSharers);
    const int my_groups = kSplits == 1 ? (num_groups - 1 - static_cast<int>(blockIdx.y)) / gridDim.y + 1 : 1;
    const int total = my_groups * (end_block - first_block), first_fill = min(kStages, total);
    const Cursor start = {static_cast<int>(blockIdx.y) * kSharers + my_sharer(), first_block};
    const bool copies = threadIdx.x == kMultipliers;

    Cursor weights = start;
    if (copies) {
        prefetch_map(weight);
        prefetch_map(x);
#pragma unroll 1
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(full_barrier(shared, stage), 1);
            init_barrier(free_barrier(shared, stage), kSharers * kMultiplierWarps);
        }
        init_barrier(sums_barrier(shared), 1);
        publish_barriers();
#pragma unroll 1
        for (int i = 0; i < first_fill; ++i) {
            arrive_expecting(full_barrier(shared, i), kStageBytes);
            copy_weights(weight, output, shared, i, weights);
            weights.advance(first_block, end_block);
        }
        if (kSplits > 1) arrive_expecting(sums_barrier(shared), Share::num_bytes());
    }
    __syncwarp();
    cluster_announce();
    cluster_wait();
    // Before the wait: a norm behind this may take its places, and the product behind that request weights.
    let_next_start();
    wait_for_previous();

    if (threadIdx.x >= kMultipliers) {
        if (!copies) return;
        Cursor tokens_at = start;
#pragma unroll 1
        for (int i = 0; i < first_fill; ++i) {
            copy_tokens(x, shared, i, tokens_at);
            tokens_at.advance(first_block, end_block);
        }
        Turn turn;
#pragma unroll 1
        for (int i = kStages; i < total; ++i) {
            wait_at(free_barrier(shared, turn.stage), turn.parity);
            arrive_expecting(full_barrier(shared, turn.stage), kStageBytes);
            copy_weights(weight, output, shared, turn.stage, weights);
            copy_tokens(x, shared, turn.stage, weights);
            weights.advance(first_block, end_block);
            turn.advance();
        }
        return;
    }

    Share share;
    if (kSplits > 1) share.request(output, start.tile, tokens);
    // The same in all lanes, and known to be.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const u64 rows = matrix_descriptor(shared + warpgroup * (kWarpgroupRows * kRowBytes));
    const u64 columns = matrix_descriptor(shared + kWeightBytes);
    Sums sums = {};
    Bests bests;
    Turn turn;
    int tile = start.tile, done = 0;
#pragma unroll 1
    for (int i = 0; i < total; ++i) {
        wait_at(full_barrier(shared, turn.stage), turn.parity);
        const u32 offset = turn.stage * (kStageBytes / 16);
        multiply(sums, rows + offset, columns + offset);
        // Not where nobody waits for it: the CTA may be gone.
        if (i + kStages < total && threadIdx.x % 32 < kSharers) {
            arrive_at_peer(free_barrier(shared, turn.stage), cta_of(my_split(), threadIdx.x % 32));
        }
        turn.advance();
        if (kSplits == 1 && ++done == end_block - first_block) {
            if (kOutput == best_rows) {
                see_own(bests, output, sums, tile);
            } else {
                finish_own(output, sums, tile, tokens);
            }
            done = 0;
            tile += static_cast<int>(gridDim.y) * kSharers;
        }
    }
    if (kOutput == best_rows) write_bests(output, bests, memory, tokens);
    if (kSplits > 1) {
        Share::send(sums, shared);
        share.finish(output, reinterpret_cast<const float4*>(memory) + kSumsStart / 16, shared, tile, tokens);
    }
#endif
}
