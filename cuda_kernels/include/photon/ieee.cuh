// float32 arithmetic that rounds as IEEE 754 says, subnormals included.
//
// CuPy compiles with -ftz=true, which changes the plain operators and the __f*_rn intrinsics alike and
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

}  // namespace photon
