// float32 arithmetic that rounds as IEEE 754 says, subnormals included.
//
// CuPy compiles with -ftz=true, which changes the plain operators, comparisons and the __f*_rn intrinsics alike and
// lets a * b - c contract to one rounding. Where a result has to equal the CPU's bit for bit, these do.
#pragma once

namespace photon {

__device__ __forceinline__ float ieee_add(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float ieee_sub(float a, float b) {
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float ieee_mul(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float ieee_div(float a, float b) {
    float result;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float ieee_fma(float a, float b, float c) {
    float result;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

// NaN is neither greater than nor equal to anything.
__device__ __forceinline__ bool ieee_greater(float a, float b) {
    int result;
    asm("{ .reg .pred p;\n  setp.gt.f32 p, %1, %2;\n  selp.s32 %0, 1, 0, p; }"
        : "=r"(result)
        : "f"(a), "f"(b));
    return result != 0;
}

__device__ __forceinline__ bool ieee_equal(float a, float b) {
    int result;
    asm("{ .reg .pred p;\n  setp.eq.f32 p, %1, %2;\n  selp.s32 %0, 1, 0, p; }"
        : "=r"(result)
        : "f"(a), "f"(b));
    return result != 0;
}

// The larger one, or NaN if either is.
__device__ __forceinline__ float ieee_max_or_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

}  // namespace photon
