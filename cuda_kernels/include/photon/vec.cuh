// Eight neighbouring values of a tensor as float32, by 16-byte accesses: one for 16-bit types, two for f32.
//
// All addresses are 16-byte aligned. Activations and weights are read differently: another kernel writes
// activations while this grid may already be resident (photon/dependent_launch.cuh), so their loads are
// volatile, and stay behind `wait_for_previous`. A plain load through a const __restrict__ pointer may be
// made a non-coherent one and be moved before the wait. Weights do not change and may be read at any time.
#pragma once

#include "photon/types.cuh"

namespace photon {

constexpr int kVec = 8;

// Eight values as they lie in memory.
template <typename T>
struct Raw {
    uint4 words[sizeof(T) * kVec / 16];
};

template <typename T>
__device__ __forceinline__ Raw<T> load_activations(const T* address) {
    Raw<T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); ++i) {
        uint4& w = raw.words[i];
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                     : "l"(reinterpret_cast<const char*>(address) + 16 * i)
                     : "memory");
    }
    return raw;
}

template <typename T>
__device__ __forceinline__ Raw<T> load_weights(const T* address) {
    Raw<T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); ++i) {
        uint4& w = raw.words[i];
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
            : "l"(reinterpret_cast<const char*>(address) + 16 * i));
    }
    return raw;
}

template <typename T>
__device__ __forceinline__ void store(T* address, const Raw<T>& raw) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); ++i) {
        reinterpret_cast<uint4*>(address)[i] = raw.words[i];
    }
}

template <typename T>
__device__ __forceinline__ void unpack(const Raw<T>& raw, float (&values)[kVec]) {
    const u32 words[4] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

template <>
__device__ __forceinline__ void unpack<f32>(const Raw<f32>& raw, float (&values)[kVec]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        values[4 * i] = __uint_as_float(raw.words[i].x);
        values[4 * i + 1] = __uint_as_float(raw.words[i].y);
        values[4 * i + 2] = __uint_as_float(raw.words[i].z);
        values[4 * i + 3] = __uint_as_float(raw.words[i].w);
    }
}

template <typename T>
__device__ __forceinline__ Raw<T> pack(const float (&values)[kVec]) {
    Raw<T> raw;
    raw.words[0] = make_uint4(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                              pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7]));
    return raw;
}

template <>
__device__ __forceinline__ Raw<f32> pack<f32>(const float (&values)[kVec]) {
    Raw<f32> raw;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        raw.words[i] = make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                                  __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3]));
    }
    return raw;
}

// One element that another kernel writes, such as a position.
__device__ __forceinline__ int load_index(const int* address) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ i64 load_index(const i64* address) {
    i64 value;
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

}  // namespace photon
