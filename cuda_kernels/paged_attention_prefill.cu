// Causal attention of new tokens over their row's paged K/V cache, cached prefix included.
//
//     out[i, h] = softmax(scale * q[i, h] . K[row, 0..pos(i)]) V[row, 0..pos(i)],  kv head = h / PHOTON_GROUP
//     pos(i) = context_lens[row] - query_len(row) + (i - query_starts[row])
//
// For every head_dim and architecture; on sm_90a paged_attention_prefill_wgmma.cu has head_dim 64 and 128.
//
// Layouts: q [tokens][heads][head_dim] with q_token_stride elements between tokens, out
// [tokens][heads][head_dim]; kv_cache [blocks][kv_heads][K, V][block_size][head_dim]; block_tables
// [rows][block_table_stride]; query_starts [rows + 1].
//
// Work: the queries of one kv head and row, flattened to (token, head of the group), are the rows of S; a CTA
// takes kQueryTile of them, so a group shares its reads of K and V whatever the group's size, and a short
// query wastes no tile. It walks the keys in tiles of kKeyTile, always from position 0: a query's result is
// the same whatever chunk, tile or batch it comes in. Tiles of one row start with the last, which has most
// keys to see.
//
// Launch: grid kv_heads * T, T at least sum over rows of ceil(query_len * group / kQueryTile); CTAs beyond
// the last tile leave, so a captured launch needs only a bound. kThreads threads; kSharedBytes of dynamic
// shared memory.
//
// Preconditions: pointers 16-byte aligned, q_token_stride a multiple of 8; query_len <= context_len; block
// ids are valid for positions below context_lens[row] (no other entry is read, and no cache slot behind the
// context).
//
// Eight warps of 16 queries each; Q in registers, K and V tiles double-buffered in shared memory by cp.async,
// rows padded by 16 bytes so that ldmatrix meets no bank twice.
//
// float32: scores, softmax, sums, accumulators. Probabilities are rounded to the storage type for the second
// product. Bound by: mma.sync and shared-memory reads at long contexts, latency at short ones.
#include "photon/attention_mma.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_HEAD_DIM) || !defined(PHOTON_KV_HEADS) ||   \
    !defined(PHOTON_GROUP) || !defined(PHOTON_BLOCK_SIZE) || !defined(PHOTON_QUERY_TILE) || \
    !defined(PHOTON_KEY_TILE)
#error "shape constants must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;

constexpr int kHeadDim = PHOTON_HEAD_DIM;
constexpr int kKvHeads = PHOTON_KV_HEADS;
constexpr int kGroup = PHOTON_GROUP;
constexpr int kBlockSize = PHOTON_BLOCK_SIZE;
constexpr int kQueryTile = PHOTON_QUERY_TILE;
constexpr int kKeyTile = PHOTON_KEY_TILE;

constexpr int kWarps = kQueryTile / 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kCtasPerSm = kHeadDim <= 64 ? 2 : 1;
constexpr int kVectors = kHeadDim / 8;  // of 16 bytes, in a row
constexpr int kRowBytes = 2 * kHeadDim + 16;
constexpr int kTileBytes = kKeyTile * kRowBytes;
constexpr int kLoads = (kKeyTile * kVectors + kThreads - 1) / kThreads;
constexpr int kDimSteps = kHeadDim / 16;
constexpr int kKeySteps = kKeyTile / 16;
// Two stages of K and V; Python asks for as many bytes.
constexpr int kSharedBytes = 4 * kTileBytes;

static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128, "mma depth; registers");
static_assert(kQueryTile % 16 == 0 && kKeyTile % 16 == 0, "mma shapes");
static_assert(kGroup >= 1, "query heads per kv head");
static_assert(kSharedBytes == PHOTON_SHARED_BYTES, "Python and the kernel disagree");

struct Tile {
    int row;  // -1: none
    int index;
    int first_token;
    int query_len;
    int first_position;

    // Of a flat index, its query token; behind the last one, the last: it sees what that sees.
    __device__ __forceinline__ int token(int flat) const { return min(flat / kGroup, query_len - 1); }
};

// The tile_index-th query tile of the batch. One warp, all lanes.
__device__ __forceinline__ Tile find_tile(const int* __restrict__ query_starts, int rows, int tile_index) {
    const int lane = threadIdx.x & 31;
    int before = 0;
    for (int base = 0; base < rows; base += 32) {
        const int row = base + lane;
        int tiles = 0;
        if (row < rows) {
            tiles = ((query_starts[row + 1] - query_starts[row]) * kGroup + kQueryTile - 1) / kQueryTile;
        }
        int sum = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(kAllLanes, sum, distance);
            if (lane >= distance) sum += below;
        }
        const u32 beyond = __ballot_sync(kAllLanes, before + sum > tile_index);
        if (beyond != 0) {
            const int owner = __ffs(static_cast<int>(beyond)) - 1;
            return {base + owner, __shfl_sync(kAllLanes, before + sum, owner) - 1 - tile_index, 0, 0, 0};
        }
        before += __shfl_sync(kAllLanes, sum, 31);
    }
    return {-1, 0, 0, 0, 0};
}

__device__ __forceinline__ u32 load_pair(const Storage* __restrict__ source, bool is_present) {
    return is_present ? *reinterpret_cast<const u32*>(source) : 0u;
}

}  // namespace photon

extern "C" __global__ void __launch_bounds__(photon::kThreads, photon::kCtasPerSm)
    paged_attention_prefill(photon::Storage* __restrict__ out, const photon::Storage* __restrict__ q,
                            const photon::Storage* __restrict__ kv_cache,
                            const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                            const int* __restrict__ query_starts, int rows, int block_table_stride,
                            photon::i64 q_token_stride, float scale_log2) {
    using namespace photon;
    extern __shared__ uint4 stages[];
    __shared__ Tile tile;  // read again where it is needed: registers are short in the loop
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int g = lane >> 2, t = lane & 3;

    if (warp == 0) {
        Tile found = find_tile(query_starts, rows, blockIdx.x / kKvHeads);
        if (found.row >= 0) {
            found.first_token = query_starts[found.row];
            found.query_len = query_starts[found.row + 1] - found.first_token;
            found.first_position = context_lens[found.row] - found.query_len;
        }
        if (lane == 0) tile = found;
    }
    __syncthreads();
    if (tile.row < 0) return;

    const int kv_head = blockIdx.x % kKvHeads;
    const int* __restrict__ table = block_tables + static_cast<i64>(tile.row) * block_table_stride;

    // The warp's rows of S are those from first_flat on; a lane has rows g and g + 8.
    const int first_flat = tile.index * kQueryTile + warp * 16;
    const int num_keys = tile.first_position + tile.token(tile.index * kQueryTile + kQueryTile - 1) + 1;
    const int num_key_tiles = (num_keys + kKeyTile - 1) / kKeyTile;
    const int warp_first = tile.first_position + tile.token(first_flat);
    const int warp_last = tile.first_position + tile.token(first_flat + 15);

    const u32 stage_base = static_cast<u32>(__cvta_generic_to_shared(stages));
    int block_ids[kLoads];
    const auto load_block_ids = [&](int key_tile) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int position =
                key_tile * kKeyTile + (i * kThreads + static_cast<int>(threadIdx.x)) / kVectors;
            block_ids[i] = position < num_keys ? __ldg(table + position / kBlockSize) : 0;
        }
    };
    const auto request_tile = [&](int key_tile) {
        const u32 target = stage_base + (key_tile & 1) * (2 * kTileBytes);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int vector = i * kThreads + static_cast<int>(threadIdx.x);
            const int key = vector / kVectors, part = vector % kVectors;
            if ((i + 1) * kThreads > kKeyTile * kVectors && key >= kKeyTile) break;
            const int position = key_tile * kKeyTile + key;
            const Storage* source =
                kv_cache +
                (static_cast<i64>(block_ids[i]) * kKvHeads + kv_head) * (2 * kBlockSize * kHeadDim) +
                position % kBlockSize * kHeadDim + part * 8;
            const bool is_present = position < num_keys;
            copy_async(target + key * kRowBytes + part * 16, source, is_present);
            copy_async(target + kTileBytes + key * kRowBytes + part * 16, source + kBlockSize * kHeadDim,
                       is_present);
        }
        commit_copies();
    };

    load_block_ids(0);
    request_tile(0);
    load_block_ids(1);

    u32 queries[kDimSteps][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int flat = first_flat + half * 8 + g;
        const bool is_query = flat / kGroup < tile.query_len;
        const Storage* source = q + (tile.first_token + flat / kGroup) * q_token_stride +
                                (kv_head * kGroup + flat % kGroup) * kHeadDim + 2 * t;
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step) {
            queries[step][half] = load_pair(source + 16 * step, is_query);
            queries[step][half + 2] = load_pair(source + 16 * step + 8, is_query);
        }
    }

    float max_low = kLowest, max_high = kLowest;  // rows g and g+8
    float sum_low = 0.0f, sum_high = 0.0f;        // of this lane's keys
    float acc[kHeadDim / 8][4] = {};

    // Row addresses of ldmatrix: K has keys 8 apart in matrices 0,1 and 2,3, V in 0,2 and 1,3.
    const u32 key_offset = ((lane >> 4) * 8 + (lane & 7)) * kRowBytes + ((lane >> 3) & 1) * 16;
    const u32 value_offset = kTileBytes + (((lane >> 3) & 1) * 8 + (lane & 7)) * kRowBytes + (lane >> 4) * 16;

    for (int key_tile = 0; key_tile < num_key_tiles; ++key_tile) {
        wait_for_copies();
        __syncthreads();
        if (key_tile + 1 < num_key_tiles) {
            request_tile(key_tile + 1);
            load_block_ids(key_tile + 2);
        }
        const int first_key = key_tile * kKeyTile;
        if (first_key > warp_last) continue;
        const u32 stage = stage_base + (key_tile & 1) * (2 * kTileBytes);

        float scores[kKeyTile / 8][4] = {};
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
            for (int keys = 0; keys < kKeySteps; ++keys) {
                u32 matrices[4];
                load_matrices(matrices, stage + key_offset + keys * (16 * kRowBytes) + step * 32);
                mma_16x8x16<Storage>(scores[2 * keys], queries[step][0], queries[step][1], queries[step][2],
                                     queries[step][3], matrices[0], matrices[1]);
                mma_16x8x16<Storage>(scores[2 * keys + 1], queries[step][0], queries[step][1],
                                     queries[step][2], queries[step][3], matrices[2], matrices[3]);
            }
        }

        if (first_key + kKeyTile - 1 > warp_first) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int position = tile.first_position + tile.token(first_flat + half * 8 + g);
                const int visible = position + 1 - first_key - 2 * t;
#pragma unroll
                for (int n = 0; n < kKeyTile / 8; ++n) {
                    if (8 * n >= visible) scores[n][2 * half] = minus_infinity();
                    if (8 * n + 1 >= visible) scores[n][2 * half + 1] = minus_infinity();
                }
            }
        }

        float new_low = minus_infinity(), new_high = minus_infinity();
#pragma unroll
        for (int n = 0; n < kKeyTile / 8; ++n) {
            new_low = fmaxf(new_low, fmaxf(scores[n][0], scores[n][1]));
            new_high = fmaxf(new_high, fmaxf(scores[n][2], scores[n][3]));
        }
        new_low = fmaxf(max_low, max_over_t(new_low) * scale_log2);
        new_high = fmaxf(max_high, max_over_t(new_high) * scale_log2);
        const float decay_low = exp2_approx(max_low - new_low);
        const float decay_high = exp2_approx(max_high - new_high);
        max_low = new_low;
        max_high = new_high;
        sum_low *= decay_low;
        sum_high *= decay_high;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            acc[n][0] *= decay_low;
            acc[n][1] *= decay_low;
            acc[n][2] *= decay_high;
            acc[n][3] *= decay_high;
        }
#pragma unroll
        for (int keys = 0; keys < kKeySteps; ++keys) {
            u32 probabilities[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float(&part)[4] = scores[2 * keys + n];
                const float p0 = exp2_approx(fmaf(part[0], scale_log2, -new_low));
                const float p1 = exp2_approx(fmaf(part[1], scale_log2, -new_low));
                const float p2 = exp2_approx(fmaf(part[2], scale_log2, -new_high));
                const float p3 = exp2_approx(fmaf(part[3], scale_log2, -new_high));
                sum_low += p0 + p1;
                sum_high += p2 + p3;
                probabilities[2 * n] = pack_pair<Storage>(p0, p1);
                probabilities[2 * n + 1] = pack_pair<Storage>(p2, p3);
            }
#pragma unroll
            for (int dims = 0; dims < kDimSteps; ++dims) {
                u32 matrices[4];
                load_matrices_transposed(matrices,
                                         stage + value_offset + keys * (16 * kRowBytes) + dims * 32);
                mma_16x8x16<Storage>(acc[2 * dims], probabilities[0], probabilities[1], probabilities[2],
                                     probabilities[3], matrices[0], matrices[1]);
                mma_16x8x16<Storage>(acc[2 * dims + 1], probabilities[0], probabilities[1], probabilities[2],
                                     probabilities[3], matrices[2], matrices[3]);
            }
        }
    }

    const float inverses[2] = {reciprocal_approx(sum_over_t(sum_low)),
                               reciprocal_approx(sum_over_t(sum_high))};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int flat = first_flat + half * 8 + g;
        if (flat / kGroup >= tile.query_len) continue;
        const i64 row = static_cast<i64>(tile.first_token + flat / kGroup) * (kKvHeads * kGroup);
        Storage* target = out + (row + kv_head * kGroup + flat % kGroup) * kHeadDim + 2 * t;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            *reinterpret_cast<u32*>(target + 8 * n) =
                pack_pair<Storage>(acc[n][2 * half] * inverses[half], acc[n][2 * half + 1] * inverses[half]);
        }
    }
}
