// Who does what in paged_attention_decode.cu: the sizes of a variant, items and teams, and what a CTA shares.
#pragma once

#include "photon/attention_mma.cuh"
#include "photon/vec.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_HEAD_DIM) || !defined(PHOTON_KV_HEADS) || \
    !defined(PHOTON_GROUP) || !defined(PHOTON_BLOCK_SIZE) || !defined(PHOTON_CHUNK) ||    \
    !defined(PHOTON_MAX_SPLITS) || !defined(PHOTON_MAX_ROWS) || !defined(PHOTON_SHARERS) || \
    !defined(PHOTON_HEADS)
#error "shape constants must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;

// What q is, and whether the newest token is in the cache: see the head of paged_attention_decode.cu.
enum Heads { finished, raw };
constexpr bool kIsRaw = PHOTON_HEADS == raw;

constexpr int kHeadDim = PHOTON_HEAD_DIM;
constexpr int kKvHeads = PHOTON_KV_HEADS;
constexpr int kGroup = PHOTON_GROUP;
constexpr int kBlockSize = PHOTON_BLOCK_SIZE;
constexpr int kChunk = PHOTON_CHUNK;
constexpr int kMaxSplits = PHOTON_MAX_SPLITS;
constexpr int kMaxRows = PHOTON_MAX_ROWS;

constexpr int kTile = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
// Warps that share an item, a team.
constexpr int kSharers = PHOTON_SHARERS;
constexpr int kTeams = kWarps / kSharers;
constexpr int kTeamThreads = 32 * kSharers;
// Raw heads take more registers than two leave to each.
constexpr int kCtasPerSm = kHeadDim == 64 && !kIsRaw ? 2 : 1;
// Tiles that a warp requests and reduces together; more would not fit its registers.
constexpr int kStepTiles = 2;
constexpr int kStepTokens = kStepTiles * kSharers * kTile;
// Lane t of four takes 8 dims of each span of 32; lane g of eight takes 8 dims of each pass of 64.
constexpr int kSpans = (kHeadDim + 31) / 32;
constexpr int kPasses = (kHeadDim + 63) / 64;
constexpr int kPairs = kGroup * kHeadDim / 2;
// Of a row in shared memory; the 8 keep two of four lanes' stores in different banks.
constexpr int kPartialStride = kHeadDim + 8;
// Lanes that share a head while it is finished (photon/rotary.cuh), heads that a warp finishes at once, and how often
// it takes some: the query heads, then k and v of the newest token.
constexpr int kHeadLanes = kHeadDim <= 16 ? 1 : kHeadDim <= 32 ? 2 : kHeadDim <= 64 ? 4 : 8;
constexpr int kHeadsAtOnce = 32 / kHeadLanes;
constexpr int kHeadRounds = (kGroup + 2 + kHeadsAtOnce - 1) / kHeadsAtOnce;

static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128, "16-byte loads; registers");
static_assert(kGroup >= 1 && kGroup <= 8, "query heads are N = 8");
static_assert(kBlockSize % kTile == 0, "a tile lies in one block");
static_assert(kWarps % kSharers == 0, "whole teams");
static_assert(kChunk % kStepTokens == 0, "a chunk is whole steps of a team");
static_assert(kMaxSplits * 2 <= kSharers * kPartialStride, "the fold reuses the partials' room");

// Aligned, so that a load of 16 bytes from shared memory has none of its neighbour's, which another warp writes.
struct alignas(16) Item {
    int index;
    int row;
    int start;
    int stop;

    __device__ __forceinline__ int kv_head() const { return index % kKvHeads; }
    __device__ __forceinline__ i64 row_head() const { return static_cast<i64>(row) * kKvHeads + kv_head(); }
};

struct Shared {
    float acc[kWarps][kGroup][kPartialStride];
    float max[kWarps][8];
    float sum[kWarps][8];
    int first_split[kMaxRows + 1];
    int context_lens[kMaxRows];
    int warp_totals[kWarps];
    Item current[kWarps];
    Item next[kWarps];
    int is_last[kTeams];
    // Of raw heads: k and v of the newest token of the team's item. Its q is where its partial results will be.
    uint4 newest[kTeams][kIsRaw ? 2 : 1][kIsRaw ? kHeadDim / kVec : 1];
};

__device__ __forceinline__ int split_tokens(int context_len) {
    if (context_len <= kMaxSplits * kChunk) return kChunk;
    return ((context_len + kMaxSplits - 1) / kMaxSplits + kTile - 1) / kTile * kTile;
}

// At least one, so that an idle row has an item that writes its zeros.
__device__ __forceinline__ int count_splits(int context_len) {
    const int tokens = split_tokens(context_len);
    return max((context_len + tokens - 1) / tokens, 1);
}

// Fills first_split (prefix sums) and context_lens.
__device__ void sum_splits(Shared& shared, const int* __restrict__ context_lens, int rows) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int before = 0;
    for (int base = 0; base < rows; base += kThreads) {
        const int row = base + static_cast<int>(threadIdx.x);
        const int context_len = row < rows ? load_index(context_lens + row) : 0;
        const int splits = row < rows ? count_splits(context_len) : 0;
        int sum = splits;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(kAllLanes, sum, distance);
            if (lane >= distance) sum += below;
        }
        if (lane == 31) shared.warp_totals[warp] = sum;
        __syncthreads();
        int total = 0;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            if (other == warp) sum += total;
            total += shared.warp_totals[other];
        }
        if (row < rows) {
            shared.first_split[row] = before + sum - splits;
            shared.context_lens[row] = context_len;
        }
        before += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) shared.first_split[rows] = before;
    __syncthreads();
}

__device__ __forceinline__ Item locate(const Shared& shared, int rows, int index) {
    const int global_split = index / kKvHeads;
    int low = 0, high = rows - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (shared.first_split[middle] <= global_split) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int context_len = shared.context_lens[low];
    const int tokens = split_tokens(context_len);
    Item item;
    item.index = index;
    item.row = low;
    item.start = (global_split - shared.first_split[low]) * tokens;
    item.stop = min(item.start + tokens, context_len);
    return item;
}

__device__ __forceinline__ int my_team() {
    return kTeams == 1 ? 0 : static_cast<int>(threadIdx.x) / kTeamThreads;
}

// Its first warp.
__device__ __forceinline__ int my_first_warp() {
    return my_team() * kSharers;
}

__device__ __forceinline__ int thread_in_team() {
    return static_cast<int>(threadIdx.x) % kTeamThreads;
}

// Barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_team() {
    if (kSharers == 1) {
        __syncwarp();
    } else if (kTeams == 1) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + my_team()), "n"(kTeamThreads) : "memory");
    }
}

// First token of a warp's tile: the warps of a team take the tiles of an item in turn.
__device__ __forceinline__ int tile_start(const Item& item, int tile) {
    return item.start + (tile * kSharers + static_cast<int>(threadIdx.x >> 5) % kSharers) * kTile;
}

// Lane i gets the block id of the warp's tile first_tile + i.
__device__ __forceinline__ int load_block_ids(const Item& item, int first_tile,
                                              const int* __restrict__ block_tables, int block_table_stride) {
    const int token = tile_start(item, first_tile + static_cast<int>(threadIdx.x & 31));
    if (token >= item.stop) return 0;
    return load_index(block_tables + static_cast<i64>(item.row) * block_table_stride + token / kBlockSize);
}

__device__ __forceinline__ const Storage* tile_keys(const Storage* __restrict__ kv_cache, const Item& item,
                                                    int tile, int block_ids) {
    const i64 block_id = __shfl_sync(kAllLanes, block_ids, tile & 31);
    return kv_cache + (block_id * kKvHeads + item.kv_head()) * (2 * kBlockSize * kHeadDim) +
           tile_start(item, tile) % kBlockSize * kHeadDim;
}

}  // namespace photon
