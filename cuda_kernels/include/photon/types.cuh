// Storage types and their conversion to float32, two values at a time.
//
// Types come from Python by name, as -D PHOTON_STORAGE=bf16. Ours rather than cuda_bf16.h's: no toolkit
// header takes part in a compilation. Conversion to 16 bits rounds to nearest even.
#pragma once

namespace photon {

typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};
typedef float f32;

// The values of a 32-bit word; the one at the lower address first.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(u32 word);

template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(u32 word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}

template <>
__device__ __forceinline__ float2 unpack_pair<f16>(u32 word) {
    float2 pair;
    asm("{ .reg .f16 low, high;\n"
        "  mov.b32 {low, high}, %2;\n"
        "  cvt.f32.f16 %0, low;\n"
        "  cvt.f32.f16 %1, high; }"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(word));
    return pair;
}

template <typename T>
__device__ __forceinline__ u32 pack_pair(float first, float second);

template <>
__device__ __forceinline__ u32 pack_pair<bf16>(float first, float second) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

template <>
__device__ __forceinline__ u32 pack_pair<f16>(float first, float second) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

__device__ __forceinline__ float minus_infinity() {
    return __uint_as_float(0xFF800000u);
}

}  // namespace photon
