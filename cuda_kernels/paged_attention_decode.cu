// One new token per row against its paged K/V cache, split over the sequence (flash-decoding).
//
//     out[row, h] = softmax(scale * q[row, h] . K[row]) V[row],  kv head = h / PHOTON_GROUP
//
// Layouts: q [rows][heads][head_dim] with q_row_stride elements between rows, out [rows][heads][head_dim];
// kv_cache [blocks][kv_heads][K, V][block_size][head_dim]; block_tables [rows][block_table_stride].
//
// Work: a row's context is cut into splits of kChunk tokens, or into kMaxSplits longer ones. Where a row is
// cut depends on its own length alone, and how its tokens are added on that and on PHOTON_SHARERS: a result does
// not depend on the other rows, the grid or the device. An item is (row, split, kv head), and a team of
// PHOTON_SHARERS warps takes one at a time: all eight of a CTA where items are few, fewer where they would fill
// the machine without, since warps that share nothing wait for nobody. Every CTA sums the rows' splits from
// context_lens, and teams walk items a grid's worth of teams apart: any grid is right, and a captured launch needs
// no host knowledge of the lengths. A row of one split is finished by its team; else partial results go to a
// workspace and the last arriver of (row, kv head) folds them in split order. It also sets the counter back to
// zero, so counters are cleared once, when they are allocated.
//
// With reads_early, all that a row sees but its newest token, and the tables, were written before the kernel that
// writes that token began, and before those that let it begin ahead of their own wait (photon/dependent_launch.cuh;
// back to the step's embedding, which does not): they are read while those run. That needs more than the order of
// the launches: a row that begins in this step may share blocks that another row fills in it.
//
// With PHOTON_HEADS raw, q, k and v of the newest token are as their product leaves them, side by side in rows
// of [q heads, k heads, v heads][head_dim], and this kernel does what rope_store_kv.cu does (photon/rotary.cuh,
// the same bits): every warp norms and rotates the query heads of its item, rather than wait for another to do
// it. The one warp whose tile has the newest token finishes k and v too, stores them in slots[row] (-1: nowhere),
// and has them from shared memory for its own scores. So a slot has one writer and no reader in a launch, and no
// kernel stands between the product and attention.
//
// Launch: grid of any size (multiprocessors * kCtasPerSm fills the machine), kThreads threads, no dynamic
// shared memory. Two launches that share workspace and counters must not overlap.
//
// Preconditions: rows <= kMaxRows; pointers 16-byte aligned, q_row_stride a multiple of 8; block ids are
// valid for positions below context_lens[row] (no other entry is read, and no cache slot behind the context).
// context_lens[row] == 0 marks an idle row: its output is zero. Raw heads: no row's context has another's newest
// token; positions lie in the table, slots in the cache.
//
// A warp takes 16 cached tokens at a time, as the M operand; the query heads of one kv head are N = 8, so the
// whole group shares one read of K and V. Both go from memory to registers 16 bytes a lane, straight into mma
// operands: for K by giving the contraction over head_dim an order of its own (lane t of four holds 8
// neighbouring dims, and q is read alike), for V by interleaving two tokens' words. Neither is staged in
// shared memory; the query heads are, since a read of them from the L2 in every step is one more latency in each,
// behind keys and values. A warp requests two tiles at once, so that kCtasPerSm CTAs have 128 KB in flight per SM,
// of which 26 KB cover the latency; the first tiles of the next item are requested before the current one is
// combined. The raw heads of the next item are not, for want of registers.
//
// float32: scores, softmax, sums, accumulators. Probabilities are rounded to the storage type for the second
// product. Bound by: reading K and V once; by latency below about 100 items; and by what follows an item of more
// than one split, a fence, an arrival and in the end the fold: 10 to 40 % of the time ("Decode attention at long
// contexts" in tools/bench/results/gpu.md).
#include "photon/attention_mma.cuh"
#include "photon/decode_heads.cuh"
#include "photon/decode_items.cuh"
#include "photon/dependent_launch.cuh"

namespace photon {

struct KeyTile {
    uint4 words[2][kSpans];
};

struct ValueTile {
    uint4 words[4][kPasses];
};

// Slots behind the context are not read: they count as zero, so nothing in them reaches a product.
__device__ __forceinline__ void load_keys(KeyTile& keys, const Storage* __restrict__ source, int num_tokens) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
            const bool is_dim = 32 * (span + 1) <= kHeadDim || 32 * span + 8 * t < kHeadDim;
            keys.words[half][span] =
                load_streaming(source + g * kHeadDim + 8 * t + half * 8 * kHeadDim + 32 * span, 8 * half,
                               is_dim ? num_tokens - g : 0);
        }
    }
}

__device__ __forceinline__ void load_values(ValueTile& values, const Storage* __restrict__ source,
                                            int num_tokens) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
        const int token = (slot & 1) + 8 * (slot >> 1);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const bool is_dim = 64 * (pass + 1) <= kHeadDim || 64 * pass + 8 * g < kHeadDim;
            values.words[slot][pass] =
                load_streaming(source + 2 * t * kHeadDim + 8 * g + token * kHeadDim + 64 * pass, token,
                               is_dim ? num_tokens - 2 * t : 0);
        }
    }
}

// One token of a tile anew; nothing where `token` is none of it.
__device__ __forceinline__ void reload_keys(KeyTile& keys, const Storage* __restrict__ source, int token) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
            const bool is_dim = 32 * (span + 1) <= kHeadDim || 32 * span + 8 * t < kHeadDim;
            reload_streaming(keys.words[half][span], source + token * kHeadDim + 8 * t + 32 * span,
                             is_dim && token == g + 8 * half);
        }
    }
}

__device__ __forceinline__ void reload_values(ValueTile& values, const Storage* __restrict__ source, int token) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const bool is_dim = 64 * (pass + 1) <= kHeadDim || 64 * pass + 8 * g < kHeadDim;
            reload_streaming(values.words[slot][pass], source + token * kHeadDim + 8 * g + 64 * pass,
                             is_dim && token == 2 * t + (slot & 1) + 8 * (slot >> 1));
        }
    }
}

// The newest token into a tile that was requested without it; nothing where `token` is none of it.
__device__ __forceinline__ void take_newest(KeyTile& keys, const Shared& shared, int token) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const uint4* const source = shared.newest[my_team()][0] + t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
            const bool is_dim = 32 * (span + 1) <= kHeadDim || 32 * span + 8 * t < kHeadDim;
            load_piece(keys.words[half][span], source + 4 * span, is_dim && token == g + 8 * half);
        }
    }
}

__device__ __forceinline__ void take_newest(ValueTile& values, const Shared& shared, int token) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const uint4* const source = shared.newest[my_team()][kIsRaw ? 1 : 0] + g;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const bool is_dim = 64 * (pass + 1) <= kHeadDim || 64 * pass + 8 * g < kHeadDim;
            load_piece(values.words[slot][pass], source + 8 * pass,
                       is_dim && token == 2 * t + (slot & 1) + 8 * (slot >> 1));
        }
    }
}

__device__ __forceinline__ u32 word(const uint4& value, int index) {
    return index == 0 ? value.x : index == 1 ? value.y : index == 2 ? value.z : value.w;
}

// The item's query heads, into the room that the warp's partial results will have; take_queries gets them from there.
__device__ __forceinline__ void copy_queries(Shared& shared, const Storage* __restrict__ q, i64 q_row_stride,
                                             const Item& item) {
    const int thread = thread_anew(), g = (thread & 31) >> 2, t = thread & 3;
    if (g < kGroup) {
        const Storage* const source = q + item.row * q_row_stride + (item.kv_head() * kGroup + g) * kHeadDim + 8 * t;
        const u32 target = static_cast<u32>(__cvta_generic_to_shared(query_row(shared, thread >> 5, g) + t));
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
            const bool is_dim = 32 * (span + 1) <= kHeadDim || 32 * span + 8 * t < kHeadDim;
            if (is_dim) copy_async(target + 64 * span, source + 32 * span, true);
        }
    }
    commit_copies();
}

// Scores of 16 tokens: (token g, heads 2t, 2t+1), then token g+8.
__device__ __forceinline__ void multiply_keys(float (&scores)[4], const KeyTile& keys,
                                              const uint4 (&queries)[kSpans]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
        const uint4 low = keys.words[0][span], high = keys.words[1][span], query = queries[span];
        mma_16x8x16<Storage>(scores, low.x, high.x, low.y, high.y, query.x, query.y);
        mma_16x8x16<Storage>(scores, low.z, high.z, low.w, high.w, query.z, query.w);
    }
}

// acc[pass][i] += V^T P: (dim 64 pass + 8g + 2i, heads 2t, 2t+1), then the next dim.
__device__ __forceinline__ void multiply_values(float (&acc)[kPasses][4][4], const ValueTile& values,
                                                u32 probabilities_low, u32 probabilities_high) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 words[4];
#pragma unroll
            for (int slot = 0; slot < 4; ++slot) words[slot] = word(values.words[slot][pass], i);
            mma_16x8x16<Storage>(
                acc[pass][i], __byte_perm(words[0], words[1], 0x5410),
                __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x5410),
                __byte_perm(words[2], words[3], 0x7632), probabilities_low, probabilities_high);
        }
    }
}

// Folds the partial results of one (row, kv head) in split order. `scratch` holds (max, sum) of each split.
__device__ void fold_splits(float* scratch, Storage* __restrict__ out, const float* __restrict__ partial_acc,
                            const float* __restrict__ partial_stats, i64 row_head, int num_splits) {
    const i64 slot = row_head * kMaxSplits;
    for (int i = thread_in_team(); i < num_splits * kGroup * 2; i += kTeamThreads) {
        scratch[i] = __ldcg(partial_stats + slot * kGroup * 2 + i);
    }
    sync_team();
    for (int pair = thread_in_team(); pair < kPairs; pair += kTeamThreads) {
        const int head = pair / (kHeadDim / 2);
        float max = kLowest;
        for (int split = 0; split < num_splits; ++split) {
            max = fmaxf(max, scratch[(split * kGroup + head) * 2]);
        }
        const float2* source = reinterpret_cast<const float2*>(partial_acc) + slot * kPairs + pair;
        float sum = 0.0f, low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (int split = 0; split < num_splits; ++split) {
            const float2 acc = __ldcg(source + split * kPairs);
            const float weight = exp2_approx(scratch[(split * kGroup + head) * 2] - max);
            sum += weight * scratch[(split * kGroup + head) * 2 + 1];
            low += weight * acc.x;
            high += weight * acc.y;
        }
        reinterpret_cast<u32*>(out)[row_head * kPairs + pair] =
            pack_pair<Storage>(low * reciprocal_approx(sum), high * reciprocal_approx(sum));
    }
    sync_team();
}

}  // namespace photon

// Outputs and workspaces: out; partial_acc [rows][kv_heads][kMaxSplits][group][head_dim]; partial_stats
// [rows][kv_heads][kMaxSplits][group][max, sum]; counters [rows][kv_heads], zero between launches.
extern "C" __global__ void __launch_bounds__(photon::kThreads, photon::kCtasPerSm)
    paged_attention_decode(photon::Storage* __restrict__ out, float* __restrict__ partial_acc,
                           float* __restrict__ partial_stats, int* __restrict__ counters,
                           const photon::Storage* __restrict__ q, photon::Storage* kv_cache,
                           const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                           const photon::Storage* __restrict__ q_weight,
                           const photon::Storage* __restrict__ k_weight, const float* __restrict__ table,
                           const photon::i64* __restrict__ positions, const photon::i64* __restrict__ slots,
                           int rows, int block_table_stride, photon::i64 q_row_stride, float scale_log2,
                           int reads_early, float eps) {
    using namespace photon;
    __shared__ Shared shared;
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;

    const Finish finish = {q_weight, k_weight, table, positions, slots, eps};

    const bool early = kOverlaps && reads_early;
    // Before the wait: the product behind this requests its weights wherever there is room.
    let_next_start();
    if (!early) wait_for_previous();
    sum_splits(shared, context_lens, rows);
    // Read anew for every item: registers are short.
    const auto num_items = [&] { return shared.first_split[rows] * kKvHeads; };
    // Neighbouring items go to different multiprocessors.
    const int first_item = my_team() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    if (first_item >= num_items()) {
        // Its room goes to the next kernel, which has weights to request.
        if (early) wait_for_previous();
        return;
    }

    Item item = locate(shared, rows, first_item);
    int block_ids = load_block_ids(item, 0, block_tables, block_table_stride);
    KeyTile keys[kStepTiles];
    ValueTile values[kStepTiles];

    // What raw heads become is not in the cache: take_newest puts it where it belongs.
    const auto stored_stop = [&](const Item& of) { return of.stop - (kIsRaw && has_newest(shared, of)); };
    const auto request_keys = [&](const Item& of, int step) {
        const int stop = stored_stop(of);
#pragma unroll
        for (int i = 0; i < kStepTiles; ++i) {
            const int tile = step * kStepTiles + i;
            load_keys(keys[i], tile_keys(kv_cache, of, tile, block_ids), stop - tile_start(of, tile));
        }
    };
    const auto request_values = [&](const Item& of, int step) {
        const int stop = stored_stop(of);
#pragma unroll
        for (int i = 0; i < kStepTiles; ++i) {
            const int tile = step * kStepTiles + i;
            load_values(values[i], tile_keys(kv_cache, of, tile, block_ids) + kBlockSize * kHeadDim,
                        stop - tile_start(of, tile));
        }
    };

    Place place{};
    if (kIsRaw) place = find_place(finish, item.row);
    // Less the newest token of the row, where the item has it: it is the last.
    const bool waits_for_newest = !kIsRaw && early && item.stop == shared.context_lens[item.row];
    if (waits_for_newest) --item.stop;
    request_keys(item, 0);
    request_values(item, 0);
    if (early) {
        wait_for_previous();
        if (waits_for_newest) {
            // Which of this warp's tiles the newest token is in, and where.
            const int tile = (item.stop - item.start) / kTile / kSharers;
            const Storage* const source = tile_keys(kv_cache, item, tile, block_ids);
            const int token = item.stop - tile_start(item, tile);
#pragma unroll
            for (int i = 0; i < kStepTiles; ++i) {
                reload_keys(keys[i], source, i == tile ? token : -1);
                reload_values(values[i], source + kBlockSize * kHeadDim, i == tile ? token : -1);
            }
            ++item.stop;
        }
    }

    while (true) {
        if (!kIsRaw) copy_queries(shared, q, q_row_stride, item);
        const bool has_next = item.index + static_cast<int>(gridDim.x) * kTeams < num_items();
        int next_block_ids = 0;
        if (has_next) {
            const Item next = locate(shared, rows, item.index + static_cast<int>(gridDim.x) * kTeams);
            next_block_ids = load_block_ids(next, 0, block_tables, block_table_stride);
            shared.next[warp] = next;
        }
        // Kept here because registers are short in the loop. Every lane stores the same.
        shared.current[warp] = item;
        if (!kIsRaw) wait_for_copies();
        __syncwarp();
        if (kIsRaw && tile_start(item, 0) < item.stop) {
            finish_heads(shared, finish, place, kv_cache, q, q_row_stride, item);
        }

        float max_low = kLowest, max_high = kLowest;  // heads 2t and 2t+1
        float sum_low = 0.0f, sum_high = 0.0f;
        float acc[kPasses][4][4] = {};
        for (int step = 0; tile_start(item, step * kStepTiles) < item.stop; ++step) {
            const bool has_step = tile_start(item, (step + 1) * kStepTiles) < item.stop;
            // Every step anew: registers are short behind the scores.
            uint4 queries[kSpans];
            take_queries(queries, shared);
            if (kIsRaw) {
#pragma unroll
                for (int i = 0; i < kStepTiles; ++i) {
                    const int newest = newest_in_tile(shared, item, step * kStepTiles + i);
                    if (newest < 0 || newest >= kTile) continue;
                    take_newest(keys[i], shared, newest);
                    take_newest(values[i], shared, newest);
                }
            }
            float scores[kStepTiles][4];
#pragma unroll
            for (int i = 0; i < kStepTiles; ++i) multiply_keys(scores[i], keys[i], queries);
            if (has_step) {
                if ((step + 1) * kStepTiles % 32 == 0) {
                    block_ids = load_block_ids(shared.current[warp], (step + 1) * kStepTiles, block_tables,
                                               block_table_stride);
                }
                request_keys(item, step + 1);
            }

            float new_low = max_low, new_high = max_high;
#pragma unroll
            for (int i = 0; i < kStepTiles; ++i) {
                const int num_tokens = item.stop - tile_start(item, step * kStepTiles + i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool is_visible = g + 8 * half < num_tokens;
                    float& low = scores[i][2 * half];
                    float& high = scores[i][2 * half + 1];
                    low = is_visible ? low * scale_log2 : minus_infinity();
                    high = is_visible ? high * scale_log2 : minus_infinity();
                    new_low = fmaxf(new_low, low);
                    new_high = fmaxf(new_high, high);
                }
            }
            new_low = max_over_g(new_low);
            new_high = max_over_g(new_high);
            const float decay_low = exp2_approx(max_low - new_low);
            const float decay_high = exp2_approx(max_high - new_high);
            max_low = new_low;
            max_high = new_high;
            sum_low *= decay_low;
            sum_high *= decay_high;
            u32 probabilities[kStepTiles][2];
#pragma unroll
            for (int i = 0; i < kStepTiles; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 pair = pack_pair<Storage>(exp2_approx(scores[i][2 * half] - new_low),
                                                        exp2_approx(scores[i][2 * half + 1] - new_high));
                    // The sums are of what the product sees: the weights add up to one, rounded or not.
                    const float2 rounded = unpack_pair<Storage>(pair);
                    sum_low += rounded.x;
                    sum_high += rounded.y;
                    probabilities[i][half] = transpose_8x8(pair);
                }
            }
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[pass][i][0] *= decay_low;
                    acc[pass][i][1] *= decay_high;
                    acc[pass][i][2] *= decay_low;
                    acc[pass][i][3] *= decay_high;
                }
            }
#pragma unroll
            for (int i = 0; i < kStepTiles; ++i) {
                multiply_values(acc, values[i], probabilities[i][0], probabilities[i][1]);
            }
            if (has_step) request_values(item, step + 1);
        }

        sum_low = sum_over_g(sum_low);
        sum_high = sum_over_g(sum_high);
        if (g == 0) {
            shared.max[warp][2 * t] = max_low;
            shared.max[warp][2 * t + 1] = max_high;
            shared.sum[warp][2 * t] = sum_low;
            shared.sum[warp][2 * t + 1] = sum_high;
        }
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int dim = 64 * pass + 8 * g;
            if (64 * (pass + 1) <= kHeadDim || dim < kHeadDim) {
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    if (2 * t + odd < kGroup) {
                        float4* target = reinterpret_cast<float4*>(&shared.acc[warp][2 * t + odd][dim]);
                        target[0] = make_float4(acc[pass][0][odd], acc[pass][0][odd + 2], acc[pass][1][odd],
                                                acc[pass][1][odd + 2]);
                        target[1] = make_float4(acc[pass][2][odd], acc[pass][2][odd + 2], acc[pass][3][odd],
                                                acc[pass][3][odd + 2]);
                    }
                }
            }
        }
        // The next item's first tiles travel while this one is combined.
        if (has_next) {
            const Item next = shared.next[warp];
            block_ids = next_block_ids;
            request_keys(next, 0);
            request_values(next, 0);
        }
        sync_team();

        item = shared.current[warp];
        const i64 row_head = item.row_head();
        const int first_split = shared.first_split[item.row];
        const int num_splits = shared.first_split[item.row + 1] - first_split;
#pragma unroll 1
        for (int pair = thread_in_team(); pair < kPairs; pair += kTeamThreads) {
            const int head = pair / (kHeadDim / 2), dim = pair % (kHeadDim / 2) * 2;
            float max = kLowest;
#pragma unroll
            for (int other = 0; other < kSharers; ++other) max = fmaxf(max, shared.max[my_first_warp() + other][head]);
            float sum = 0.0f, low = 0.0f, high = 0.0f;
#pragma unroll
            for (int other = 0; other < kSharers; ++other) {
                const float weight = exp2_approx(shared.max[my_first_warp() + other][head] - max);
                const float2 part = *reinterpret_cast<const float2*>(&shared.acc[my_first_warp() + other][head][dim]);
                sum += weight * shared.sum[my_first_warp() + other][head];
                low += weight * part.x;
                high += weight * part.y;
            }
            if (num_splits == 1) {
                const bool is_idle = item.stop == 0;
                const float inverse = reciprocal_approx(sum);
                reinterpret_cast<u32*>(out)[row_head * kPairs + pair] =
                    is_idle ? 0u : pack_pair<Storage>(low * inverse, high * inverse);
            } else {
                const i64 slot = row_head * kMaxSplits + item.index / kKvHeads - first_split;
                reinterpret_cast<float2*>(partial_acc)[slot * kPairs + pair] = make_float2(low, high);
                if (dim == 0) {
                    reinterpret_cast<float2*>(partial_stats)[slot * kGroup + head] = make_float2(max, sum);
                }
            }
        }
        sync_team();

        if (num_splits > 1) {
            int& is_last = shared.is_last[my_team()];
            if (thread_in_team() == 0) {
                is_last = arrive(counters + row_head) == num_splits - 1;
                if (is_last) counters[row_head] = 0;
            }
            sync_team();
            if (is_last) {
                fold_splits(&shared.acc[my_first_warp()][0][0], out, partial_acc, partial_stats, row_head, num_splits);
            }
        }
        if (!has_next) return;
        item = shared.next[warp];
        if (kIsRaw) place = find_place(finish, item.row);
        __syncwarp();
    }
}
