// Raw heads in paged_attention_decode.cu: q, k and v as their product leaves them, finished where they are needed.
#pragma once

#include "photon/decode_items.cuh"
#include "photon/rotary.cuh"

namespace photon {

// What raw heads become what they should be by; null and unused where they are finished.
struct Finish {
    const Storage* q_weight;  // [head_dim] each, null where there is no norm
    const Storage* k_weight;
    const float* table;
    const i64* positions;
    const i64* slots;
    float eps;
};

// What the newest token's place has to do with it, requested ahead of the token.
struct Place {
    Angles angles;
    i64 slot;
};

// Whether the row's newest token is the item's last.
__device__ __forceinline__ bool has_newest(const Shared& shared, const Item& item) {
    return item.stop > 0 && item.stop == shared.context_lens[item.row];
}

// Where in the warp's tile the newest token is; outside of 0 .. kTile - 1 where it is not.
__device__ __forceinline__ int newest_in_tile(const Shared& shared, const Item& item, int tile) {
    return has_newest(shared, item) ? item.stop - 1 - tile_start(item, tile) : -1;
}

// Where the lane begins in the half of a head that it has a part of.
__device__ __forceinline__ int half_start() {
    return kVec * (static_cast<int>(threadIdx.x) % kHeadLanes);
}

__device__ __forceinline__ Place find_place(const Finish& finish, int row) {
    Place place{};
    place.slot = load_index(finish.slots + row);
    const i64 position = load_index(finish.positions + row);
    if (half_start() < kHeadDim / 2) {
        place.angles = load_halves(finish.table + position * kHeadDim, half_start(), kHeadDim / 2);
    }
    return place;
}

__device__ __forceinline__ void store_piece(uint4* target, const Raw<Storage>& piece) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(static_cast<u32>(__cvta_generic_to_shared(target))),
                 "r"(piece.words[0].x), "r"(piece.words[0].y), "r"(piece.words[0].z), "r"(piece.words[0].w)
                 : "memory");
}

// In place of what is there, or nothing.
__device__ __forceinline__ void load_piece(uint4& words, const uint4* source, bool is_wanted) {
    asm volatile(
        "{ .reg .pred wanted;\n"
        "  setp.ne.s32 wanted, %5, 0;\n"
        "  @wanted ld.shared.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(source))), "r"(static_cast<int>(is_wanted))
        : "memory");
}

// A finished query head of a warp's item, in the room of the partial result that it will have.
__device__ __forceinline__ uint4* query_row(Shared& shared, int warp, int head) {
    return reinterpret_cast<uint4*>(&shared.acc[warp][head][0]);
}

// Norms and rotates the item's query heads for this warp, and the newest token for all: its k and v go to the
// team's room for the warp that has it in a tile, and to the cache, which nobody reads them from in this launch.
__device__ __forceinline__ void finish_heads(Shared& shared, const Finish& finish, const Place& place,
                                             Storage* kv_cache, const Storage* heads, i64 row_stride,
                                             const Item& item) {
    constexpr int kHalfDim = kHeadDim / 2, kNumHeads = kKvHeads * kGroup;
    const int tile = (item.stop - 1 - item.start) / kTile / kSharers;
    const int in_tile = newest_in_tile(shared, item, tile);
    const bool takes_newest = in_tile >= 0 && in_tile < kTile;
    const int start = half_start(), kv_head = item.kv_head();
    const Storage* const row = heads + item.row * row_stride;
    Halves<Storage> halves[kHeadRounds] = {}, weights[kHeadRounds] = {};
#pragma unroll
    for (int i = 0; i < kHeadRounds; ++i) {
        const int head = i * kHeadsAtOnce + static_cast<int>(threadIdx.x & 31) / kHeadLanes;
        const int in_row = head < kGroup ? kv_head * kGroup + head : kNumHeads + (head - kGroup) * kKvHeads + kv_head;
        const bool is_wanted = start < kHalfDim && head < kGroup + (takes_newest ? 2 : 0);
        if (is_wanted) halves[i] = load_new_halves(row + in_row * kHeadDim, start, kHalfDim);
        if (is_wanted && finish.q_weight != nullptr) {
            weights[i] = load_halves(head < kGroup ? finish.q_weight : finish.k_weight, start, kHalfDim);
        }
    }
#pragma unroll
    for (int i = 0; i < kHeadRounds; ++i) {
        const int head = i * kHeadsAtOnce + static_cast<int>(threadIdx.x & 31) / kHeadLanes;
        Halves<Storage> done = rotate(halves[i], weights[i], finish.q_weight != nullptr, place.angles, kHeadDim,
                                      kHeadLanes, finish.eps);
        const int value = head - kGroup;  // 0 for K, 1 for V
        if (value == 1) done = halves[i];
        if (start < kHalfDim && head < kGroup + (takes_newest ? 2 : 0)) {
            uint4* const target =
                value < 0 ? query_row(shared, threadIdx.x >> 5, head) : shared.newest[my_team()][value];
            store_piece(target + start / kVec, done.low);
            store_piece(target + (start + kHalfDim) / kVec, done.high);
            if (value >= 0 && place.slot >= 0) {
                store_halves(cache_head(kv_cache, place.slot, kv_head, value, kKvHeads, kBlockSize, kHeadDim), done,
                             start, kHalfDim);
            }
        }
    }
    __syncwarp();
}

// threadIdx.x, for addresses that are cheaper to find anew than to keep.
__device__ __forceinline__ int thread_anew() {
    int thread = static_cast<int>(threadIdx.x);
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
#endif
    return thread;
}

__device__ __forceinline__ void take_queries(uint4 (&queries)[kSpans], Shared& shared) {
    const int thread = thread_anew(), g = (thread & 31) >> 2, t = thread & 3;
    const uint4* const source = query_row(shared, thread >> 5, g < kGroup ? g : 0) + t;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
        const bool is_dim = 32 * (span + 1) <= kHeadDim || 32 * span + 8 * t < kHeadDim;
        queries[span] = make_uint4(0, 0, 0, 0);
        load_piece(queries[span], source + 4 * span, is_dim && g < kGroup);
    }
}

}  // namespace photon
