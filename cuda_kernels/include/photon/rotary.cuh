// RMSNorm of a head and its rotation, and where a head lies in the paged cache: for every kernel that finishes q,
// k and v behind their product.
//
// A head of d values is shared by neighbouring lanes, a power of two at or above d / 16 of them: each holds eight
// pairs, values start .. start + 7 and those d/2 later. What rounds is spelt out, so that one token comes out with
// the same bits from every kernel: a compiler may contract a sum of two products in two ways.
#pragma once

#include "photon/reduce.cuh"
#include "photon/vec.cuh"

namespace photon {

template <typename T>
struct Halves {
    Raw<T> low, high;
};

// Cosines and sines of the eight pairs.
typedef Halves<float> Angles;

// Rows of weights: they may be read before the kernel before this one has finished.
template <typename T>
__device__ __forceinline__ Halves<T> load_halves(const T* row, int start, int half_dim) {
    return {load_weights(row + start), load_weights(row + start + half_dim)};
}

template <typename T>
__device__ __forceinline__ Halves<T> load_new_halves(const T* head, int start, int half_dim) {
    return {load_activations(head + start), load_activations(head + start + half_dim)};
}

template <typename T>
__device__ __forceinline__ void store_halves(T* head, const Halves<T>& halves, int start, int half_dim) {
    store(head + start, halves.low);
    store(head + start + half_dim, halves.high);
}

// The head of `slot` in the cache [blocks][kv heads][K, V][block_size][d]: `value` 0 for K, 1 for V.
template <typename T>
__device__ __forceinline__ T* cache_head(T* kv_cache, i64 slot, int head, int value, int num_kv_heads,
                                         int block_size, int head_dim) {
    // There are fewer than 2^31 slots, and a 64-bit division is slow.
    const u32 block = static_cast<u32>(slot) / static_cast<u32>(block_size);
    const u32 offset = static_cast<u32>(slot) % static_cast<u32>(block_size);
    return kv_cache + (((static_cast<i64>(block) * num_kv_heads + head) * 2 + value) * block_size + offset) *
                          head_dim;
}

// Called by whole warps; lanes that are no part of a head have zeros, and get what nobody wants.
template <typename T>
__device__ __forceinline__ Halves<T> rotate(const Halves<T>& raw, const Halves<T>& weight, bool normed,
                                            const Angles& angles, int head_dim, int lanes, float eps) {
    float low[kVec], high[kVec];
    unpack(raw.low, low);
    unpack(raw.high, high);
    if (normed) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum = __fmaf_rn(high[i], high[i], __fmaf_rn(low[i], low[i], sum));
        const float scale = 1.0f / sqrtf(__fadd_rn(warp_sum(sum, lanes) / static_cast<float>(head_dim), eps));
        float factors[kVec];
        unpack(weight.low, factors);
#pragma unroll
        for (int i = 0; i < kVec; ++i) low[i] *= scale * factors[i];
        unpack(weight.high, factors);
#pragma unroll
        for (int i = 0; i < kVec; ++i) high[i] *= scale * factors[i];
    }
    float cosines[kVec], sines[kVec];
    unpack(angles.low, cosines);
    unpack(angles.high, sines);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const float first = __fmaf_rn(low[i], cosines[i], -__fmul_rn(high[i], sines[i]));
        high[i] = __fmaf_rn(high[i], cosines[i], __fmul_rn(low[i], sines[i]));
        low[i] = first;
    }
    return {pack<T>(low), pack<T>(high)};
}

}  // namespace photon
