// Causal attention of new tokens over their row's paged K/V cache by wgmma: see paged_attention_prefill.cu, whose
// formula and layouts are these. For head_dim 64 and 128 on sm_90a; on other architectures the kernel is empty.
//
// Work: a tile is kTileTokens tokens of a row, with all query heads of one kv head: kQueryTile rows of S or a few
// less, 64 to each of kWarpgroups warpgroups. A CTA takes tile after tile. One more warp brings q of a tile, then K
// and V in tiles of kKeyTile keys, through kStages stages each (it is of a warpgroup whose registers the others take
// over), and goes on with the next tile while this one is finished; the tensor copy engine reads whole parts of
// cache blocks. Keys are walked from position 0, and a tile of keys that a query sees nothing of changes no bit of
// its result: a query's result is the same whatever chunk, tile or batch it comes in. Tiles of one row start with
// the last, which has most keys to see; CTAs take them forth and back, so that each gets as much.
//
// While a warpgroup takes the exponentials of one tile of scores, its second product of the tile before runs
// (PHOTON_LOOKAHEAD), or another warpgroup's does: with PHOTON_IN_TURN they start their products in a fixed order.
//
// Launch: any grid; num_items at least kv_heads times the sum over rows of ceil(query_len / kTileTokens). kThreads
// threads; PHOTON_SHARED_BYTES of dynamic shared memory. q_map: q as [tokens][heads][head_dim],
// boxes [kTileTokens][group][64]; kv_map: the cache as rows of head_dim, boxes [kBoxKeys][64].
//
// Preconditions: those of paged_attention_prefill.cu. Slots behind the context may come along with a block, and
// only with the context's last one; nothing becomes of them.
//
// float32: scores, softmax, sums, accumulators. Probabilities are rounded to the storage type for the second
// product. Bound by the tensor cores at head_dim 128, by them and the exponentials alike at 64.
#include "photon/attention_mma.cuh"
#include "photon/tensor_copy.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "photon/warpgroup_mma.cuh"
#endif

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_HEAD_DIM) || !defined(PHOTON_KV_HEADS) ||          \
    !defined(PHOTON_GROUP) || !defined(PHOTON_BLOCK_SIZE) || !defined(PHOTON_BOX_KEYS) ||          \
    !defined(PHOTON_WARPGROUPS) || !defined(PHOTON_KEY_TILE) || !defined(PHOTON_STAGES) ||         \
    !defined(PHOTON_CTAS) || !defined(PHOTON_REGISTERS) || !defined(PHOTON_LOOKAHEAD) ||           \
    !defined(PHOTON_IN_TURN)
#error "shape constants must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;

constexpr int kThreads = 128 * (PHOTON_WARPGROUPS + 1);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kHeadDim = PHOTON_HEAD_DIM;
constexpr int kKvHeads = PHOTON_KV_HEADS;
constexpr int kGroup = PHOTON_GROUP;
constexpr int kBlockSize = PHOTON_BLOCK_SIZE;
constexpr int kBoxKeys = PHOTON_BOX_KEYS;
constexpr int kWarpgroups = PHOTON_WARPGROUPS;
constexpr int kKeyTile = PHOTON_KEY_TILE;
constexpr int kStages = PHOTON_STAGES;
// Of a thread that computes; those that do not leave theirs to them.
constexpr int kRegisters = PHOTON_REGISTERS, kOtherRegisters = 24;
constexpr bool kLooksAhead = PHOTON_LOOKAHEAD;
constexpr bool kInTurn = PHOTON_IN_TURN;

constexpr int kQueryTile = 64 * kWarpgroups;
constexpr int kTileTokens = kQueryTile / kGroup;
constexpr int kConsumerWarps = 4 * kWarpgroups;

// Rows of 128 bytes: a tile has kSlices of them side by side, one after the other in shared memory.
constexpr int kSliceDims = 64;
constexpr int kSlices = kHeadDim / kSliceDims;
constexpr int kRowBytes = 2 * kSliceDims;
constexpr int kQuerySliceBytes = kQueryTile * kRowBytes;
constexpr int kKeySliceBytes = kKeyTile * kRowBytes;
constexpr int kTileBytes = kSlices * kKeySliceBytes;
constexpr int kKeyBoxes = kKeyTile / kBoxKeys;
constexpr int kBoxBytes = kBoxKeys * kRowBytes;

// The queries of a tile and of the next one.
constexpr int kQueryStages = 2;
constexpr int kQueryBytes = kSlices * kQuerySliceBytes;
constexpr int kBarriers = kQueryStages * kQueryBytes + 2 * kStages * kTileBytes;
constexpr int kSharedBytes = kBarriers + 256;

struct Tile {
    int row;  // -1: there are no more
    int first_token;  // of q
    int num_tokens;   // of this tile
    int first_position;
    int num_keys;
    int kv_head;
};

static_assert(kHeadDim % kSliceDims == 0 && kHeadDim <= 128, "whole slices; registers");
static_assert(kBlockSize % kBoxKeys == 0 && kKeyTile % kBoxKeys == 0 && kBoxKeys % 8 == 0, "whole boxes");
static_assert(kKeyBoxes * kSlices <= 32, "one box to a lane");
static_assert(kGroup >= 1 && kGroup <= 64, "query heads per kv head");
static_assert((2 * kQueryStages + 4 * kStages) * 8 + kQueryStages * sizeof(Tile) <= 256, "barriers and tiles");
static_assert(kSharedBytes == PHOTON_SHARED_BYTES, "Python and the kernel disagree");


// Finds tiles by their index, which may only grow. One warp, all lanes.
struct Finder {
    int base, before;  // rows that were passed, and their tiles

    __device__ __forceinline__ Tile find(const int* __restrict__ query_starts, const int* __restrict__ context_lens,
                                         int rows, int tile_index, int kv_head) {
        const int lane = threadIdx.x & 31;
        for (; base < rows; base += 32) {
            const int row = base + lane;
            int tiles = 0;
            if (row < rows) {
                tiles = (query_starts[row + 1] - query_starts[row] + kTileTokens - 1) / kTileTokens;
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
                const int index = __shfl_sync(kAllLanes, before + sum, owner) - 1 - tile_index;
                const int start = query_starts[base + owner], end = query_starts[base + owner + 1];
                const int first = start + index * kTileTokens;
                const int count = min(kTileTokens, end - first);
                const int position = context_lens[base + owner] - (end - first);
                return {base + owner, first, count, position, position + count, kv_head};
            }
            before += __shfl_sync(kAllLanes, sum, 31);
        }
        return {-1, 0, 0, 0, 0, 0};
    }
};

// What this CTA takes in a round of all CTAs: forth, then back.
__device__ __forceinline__ int item_of(int round) {
    const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
    return round * ctas + (round & 1 ? ctas - 1 - cta : cta);
}

typedef float Scores[kKeyTile / 8][4];
typedef float Output[kHeadDim / 8][4];
typedef u32 Probabilities[kKeyTile / 16][4];

__device__ __forceinline__ void sync_warpgroups(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_warpgroups(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The barriers of a ring of stages; `round` counts what went through it.
template <int kSize>
struct Ring {
    u32 full, empty;

    __device__ __forceinline__ static int stage(int round) { return round % kSize; }
    __device__ __forceinline__ static u32 parity(int round) { return (round / kSize) & 1; }
    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < kSize; ++stage) {
            init_barrier(full + 8 * stage, 1);
            init_barrier(empty + 8 * stage, kConsumerWarps);
        }
    }
    __device__ __forceinline__ u32 full_at(int round) const { return full + 8 * stage(round); }
    __device__ __forceinline__ void wait_full(int round) const { wait_at(full_at(round), parity(round)); }
    __device__ __forceinline__ void wait_empty(int round) const {
        wait_at(empty + 8 * stage(round), parity(round) ^ 1);
    }
    // One lane of every warp says that it is done.
    __device__ __forceinline__ void release(int round) const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) arrive_at(empty + 8 * stage(round));
    }
};

// Where everything lies in shared memory.
struct Shared {
    u32 queries, keys, values;
    Ring<kQueryStages> query_ring;
    Ring<kStages> key_ring, value_ring;
    Tile* tiles;  // of query_ring's stages

    __device__ __forceinline__ explicit Shared(uint4* shared) {
        queries = shared_address(shared);
        keys = queries + kQueryStages * kQueryBytes;
        values = keys + kStages * kTileBytes;
        const u32 barriers = queries + kBarriers;
        query_ring = {barriers, barriers + 8 * kQueryStages};
        key_ring = {barriers + 16 * kQueryStages, barriers + 16 * kQueryStages + 8 * kStages};
        value_ring = {key_ring.full + 16 * kStages, key_ring.empty + 16 * kStages};
        tiles = reinterpret_cast<Tile*>(reinterpret_cast<char*>(shared) + kBarriers + 16 * kQueryStages +
                                        32 * kStages);
    }
};

// Brings the queries of a tile, then its keys and values; `round` counts tiles of keys. One warp: a lane for each
// box of a tile.
__device__ __forceinline__ void bring_tile(const TensorMap& q_map, const TensorMap& kv_map, const Tile& tile,
                                           const int* __restrict__ table, const Shared& shared, int query_round,
                                           int& round) {
    const int lane = threadIdx.x & 31;
    const int query_stage = shared.query_ring.stage(query_round);
    shared.query_ring.wait_empty(query_round);
    if (lane == 0) {
        const u32 full = shared.query_ring.full_at(query_round);
        shared.tiles[query_stage] = tile;
        arrive_expecting(full, kSlices * kTileTokens * kGroup * kRowBytes);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            copy_box(shared.queries + query_stage * kQueryBytes + slice * kQuerySliceBytes, q_map,
                     slice * kSliceDims, tile.kv_head * kGroup, tile.first_token, full);
        }
    }
    const int box = lane % kKeyBoxes, slice = lane / kKeyBoxes;
    const int num_tiles = (tile.num_keys + kKeyTile - 1) / kKeyTile;
    const u32 target = slice * kKeySliceBytes + box * kBoxBytes;
    int position = box * kBoxKeys;
    bool is_present = slice < kSlices && position < tile.num_keys;
    int block = is_present ? __ldg(table + position / kBlockSize) : 0;
    for (int i = 0; i < num_tiles; ++i, ++round) {
        const int row = ((block * kKvHeads + tile.kv_head) * 2) * kBlockSize + position % kBlockSize;
        const bool is_wanted = is_present;
        const int boxes = min(kKeyBoxes, (tile.num_keys - i * kKeyTile + kBoxKeys - 1) / kBoxKeys);
        const u32 bytes = boxes * (kSlices * kBoxBytes);
        // The next block's number is on its way while this tile waits for its place.
        position += kKeyTile;
        is_present = slice < kSlices && position < tile.num_keys;
        block = is_present ? __ldg(table + position / kBlockSize) : 0;

        const u32 stage = shared.key_ring.stage(round) * kTileBytes + target;
        const u32 keys_full = shared.key_ring.full_at(round), values_full = shared.value_ring.full_at(round);
        shared.key_ring.wait_empty(round);
        if (lane == 0) arrive_expecting(keys_full, bytes);
        __syncwarp();
        if (is_wanted) copy_box(shared.keys + stage, kv_map, slice * kSliceDims, row, keys_full);
        shared.value_ring.wait_empty(round);
        if (lane == 0) arrive_expecting(values_full, bytes);
        __syncwarp();
        if (is_wanted) copy_box(shared.values + stage, kv_map, slice * kSliceDims, row + kBlockSize, values_full);
    }
}

// Begins scores = 64 queries times the keys of a stage.
__device__ __forceinline__ void begin_scores(Scores& scores, u32 queries, u32 keys) {
    pin(scores);
    begin_warpgroup_mma();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
        const int slice = step / 4, part = step % 4 * 32;
        const u64 a = matrix_descriptor(queries + slice * kQuerySliceBytes + part);
        const u64 b = matrix_descriptor(keys + slice * kKeySliceBytes + part);
        if (step == 0) {
            WarpgroupMma<Storage>::start(scores, a, b);
        } else {
            WarpgroupMma<Storage>::add(scores, a, b);
        }
    }
    commit_warpgroup_mma();
}

// Begins output += probabilities times the values of a stage.
__device__ __forceinline__ void begin_values(Output& output, const Probabilities& probabilities, u32 values) {
    pin(output);
    begin_warpgroup_mma();
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
        WarpgroupMma<Storage>::add_rows(output, probabilities[step],
                                        column_descriptor(values + step * (16 * kRowBytes), kKeySliceBytes));
    }
    commit_warpgroup_mma();
}

// Slots behind the context, where anything may be: a probability of zero times that must be zero. Every warpgroup
// writes the same.
__device__ __forceinline__ void clear_values(u32 values, int first_key) {
    const int thread = threadIdx.x % 128;
    for (int i = first_key * 8 + thread; i < kKeyTile * 8; i += 128) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(values + slice * kKeySliceBytes + i * 16),
                         "r"(0)
                         : "memory");
        }
    }
    publish_to_warpgroups();
    sync_warpgroups(1 + kWarpgroups + threadIdx.x / 128, 128);
}

// The running maximum and sum of the two rows of S that a thread has a part of: g and g + 8.
struct Softmax {
    float highest[2], sums[2];

    // Turns scores into exponentials, and gives what the output so far is to be multiplied with. A key counts
    // for row `half` where its number in the tile is below visible[half].
    __device__ __forceinline__ void take(Scores& scores, float (&decays)[2], bool is_masked,
                                         const int (&visible)[2], float scale_log2) {
        if (is_masked) {
#pragma unroll
            for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (8 * n >= visible[half]) scores[n][2 * half] = minus_infinity();
                    if (8 * n + 1 >= visible[half]) scores[n][2 * half + 1] = minus_infinity();
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < kKeyTile / 8; ++n) {
                most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            }
            most = fmaxf(highest[half], max_over_t(most) * scale_log2);
            decays[half] = exp2_approx(highest[half] - most);
            highest[half] = most;
            float sum = sums[half] * decays[half];
#pragma unroll
            for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
                for (int one = 2 * half; one < 2 * half + 2; ++one) {
                    scores[n][one] = exp2_approx(fmaf(scores[n][one], scale_log2, -most));
                    sum += scores[n][one];
                }
            }
            sums[half] = sum;
        }
    }
};

__device__ __forceinline__ void round_scores(Probabilities& probabilities, const Scores& scores) {
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const float(&part)[4] = scores[2 * step + word / 2];
            probabilities[step][word] = pack_pair<Storage>(part[word % 2 * 2], part[word % 2 * 2 + 1]);
        }
    }
}

__device__ __forceinline__ void scale_output(Output& output, const float (&decays)[2]) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int one = 0; one < 4; ++one) output[n][one] *= decays[one / 2];
    }
}

// Rows of the output to where they go, by way of the shared memory that this warpgroup's queries were in.
__device__ __forceinline__ void write_output(Storage* __restrict__ out, const Output& output, const Softmax& softmax,
                                             const Tile& tile, u32 staging) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float inverse = reciprocal_approx(sum_over_t(softmax.sums[half]));
        const u32 row = staging + (warp * 16 + half * 8 + g) * kRowBytes + 4 * t;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const u32 pair =
                pack_pair<Storage>(output[n][2 * half] * inverse, output[n][2 * half + 1] * inverse);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + n / 8 * kQuerySliceBytes + ((n % 8) ^ g) * 16),
                         "r"(pair)
                         : "memory");
        }
    }
    // Each warp has rows of its own.
    __syncwarp();
    const int num_rows = tile.num_tokens * kGroup;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        const int slice = i / 4, index = i % 4 * 32 + lane, row = warp * 16 + index / 8, part = index % 8;
        const int flat = group * 64 + row;
        if (flat >= num_rows) continue;
        uint4 words;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "r"(staging + slice * kQuerySliceBytes + row * kRowBytes + (part ^ (row % 8)) * 16)
                     : "memory");
        const i64 head = static_cast<i64>(tile.first_token + flat / kGroup) * (kKvHeads * kGroup) +
                         tile.kv_head * kGroup + flat % kGroup;
        *reinterpret_cast<uint4*>(out + head * kHeadDim + slice * kSliceDims + part * 8) = words;
    }
}

// A warpgroup's part of a tile; `first_round` counts the tiles of keys before it.
__device__ __forceinline__ void attend(Storage* __restrict__ out, const Tile& tile, const Shared& shared,
                                       u32 queries, int group, int first_round, float scale_log2) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    const int t = lane & 3;
    const int num_tiles = (tile.num_keys + kKeyTile - 1) / kKeyTile;
    const int last_key = tile.num_keys - (num_tiles - 1) * kKeyTile;

    // Behind the last token, the last: it sees what that sees.
    int seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int flat = group * 64 + warp * 16 + half * 8 + lane / 4;
        seen[half] = tile.first_position + min(flat / kGroup, tile.num_tokens - 1) + 1 - 2 * t;
    }
    // Keys that every query of the warpgroup sees.
    const int seen_by_all = tile.first_position + min(group * 64 / kGroup, tile.num_tokens - 1) + 1;

    queries += group * (64 * kRowBytes);
    Softmax softmax = {{kLowest, kLowest}, {0.0f, 0.0f}};
    Output output = {};
    Probabilities probabilities;
    float decays[2];

    const auto request_scores = [&](Scores& scores, int i) {
        shared.key_ring.wait_full(first_round + i);
        if (kInTurn) sync_warpgroups(1 + group, 256);
        begin_scores(scores, queries, shared.keys + shared.key_ring.stage(first_round + i) * kTileBytes);
    };
    const auto request_values = [&](int i) {
        shared.value_ring.wait_full(first_round + i);
        const u32 stage = shared.values + shared.value_ring.stage(first_round + i) * kTileBytes;
        if (i == num_tiles - 1 && last_key < kKeyTile) clear_values(stage, last_key);
        begin_values(output, probabilities, stage);
    };
    const auto let_next = [&](int i) {
        if (kInTurn && (i + 1 < num_tiles || group + 1 < kWarpgroups)) {
            arrive_warpgroups(1 + (group + 1) % kWarpgroups, 256);
        }
    };
    const auto take_scores = [&](Scores& scores, int i) {
        const int visible[2] = {seen[0] - i * kKeyTile, seen[1] - i * kKeyTile};
        softmax.take(scores, decays, (i + 1) * kKeyTile > seen_by_all, visible, scale_log2);
    };

    if (kInTurn && group == kWarpgroups - 1) arrive_warpgroups(1, 256);
    if (kLooksAhead) {
        {
            Scores scores;
            request_scores(scores, 0);
            let_next(0);
            wait_for_warpgroup_mma<0>();
            pin(scores);
            shared.key_ring.release(first_round + 0);
            take_scores(scores, 0);
            round_scores(probabilities, scores);
        }
        for (int i = 1; i < num_tiles; ++i) {
            Scores scores;
            request_scores(scores, i);
            request_values(i - 1);
            let_next(i);
            wait_for_warpgroup_mma<1>();
            pin(scores);
            shared.key_ring.release(first_round + i);
            take_scores(scores, i);
            wait_for_warpgroup_mma<0>();
            pin(output);
            shared.value_ring.release(first_round + i - 1);
            scale_output(output, decays);
            round_scores(probabilities, scores);
        }
        request_values(num_tiles - 1);
        wait_for_warpgroup_mma<0>();
        pin(output);
        shared.value_ring.release(first_round + num_tiles - 1);
    } else {
        for (int i = 0; i < num_tiles; ++i) {
            Scores scores;
            request_scores(scores, i);
            let_next(i);
            wait_for_warpgroup_mma<0>();
            pin(scores);
            shared.key_ring.release(first_round + i);
            take_scores(scores, i);
            round_scores(probabilities, scores);
            scale_output(output, decays);
            request_values(i);
            wait_for_warpgroup_mma<0>();
            pin(output);
            shared.value_ring.release(first_round + i);
        }
    }
    write_output(out, output, softmax, tile, queries);
}

#endif

}  // namespace photon

extern "C" __global__ void __launch_bounds__(photon::kThreads, PHOTON_CTAS)
    paged_attention_prefill_wgmma(photon::Storage* __restrict__ out, const int* __restrict__ block_tables,
                                  const int* __restrict__ context_lens, const int* __restrict__ query_starts,
                                  int rows, int block_table_stride, int num_items, float scale_log2,
                                  const __grid_constant__ photon::TensorMap q_map,
                                  const __grid_constant__ photon::TensorMap kv_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace photon;
    extern __shared__ __align__(1024) uint4 memory[];
    const Shared shared(memory);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 32 * kConsumerWarps) {
        prefetch_map(q_map);
        prefetch_map(kv_map);
        shared.query_ring.init();
        shared.key_ring.init();
        shared.value_ring.init();
        publish_barriers();
    }
    __syncthreads();

    if (warp >= kConsumerWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kOtherRegisters));
        if (warp > kConsumerWarps) return;
        Finder finder = {0, 0};
        int query_round = 0, round = 0;
        for (int i = 0; i * static_cast<int>(gridDim.x) < num_items; ++i) {
            const int item = item_of(i);
            const Tile tile = finder.find(query_starts, context_lens, rows, item / kKvHeads, item % kKvHeads);
            // Items grow from round to round: nothing comes after one that is beyond the last.
            if (tile.row < 0) break;
            bring_tile(q_map, kv_map, tile, block_tables + static_cast<i64>(tile.row) * block_table_stride, shared,
                       query_round, round);
            ++query_round;
        }
        shared.query_ring.wait_empty(query_round);
        if (threadIdx.x % 32 == 0) {
            shared.tiles[shared.query_ring.stage(query_round)].row = -1;
            arrive_at(shared.query_ring.full_at(query_round));
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
        // The same for a whole warp, which the compiler cannot know.
        const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
        for (int query_round = 0, round = 0;; ++query_round) {
            shared.query_ring.wait_full(query_round);
            const int stage = shared.query_ring.stage(query_round);
            const Tile tile = shared.tiles[stage];
            if (tile.row < 0) break;
            attend(out, tile, shared, shared.queries + stage * kQueryBytes, group, round, scale_log2);
            // What was written there is behind the copies that come now.
            publish_to_warpgroups();
            shared.query_ring.release(query_round);
            round += (tile.num_keys + kKeyTile - 1) / kKeyTile;
        }
    }
#endif
}
