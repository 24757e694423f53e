// Tensor-core fragments of the attention kernels: 16-bit storage, float32 accumulation.
//
// Values travel as pairs in 32-bit words, the one at the lower address in the lower half.
// mma m16n8k16, lane = 4g + t: A words hold rows g, g+8, g, g+8 at k = 2t, 2t+1 (the first two) and
// 2t+8, 2t+9; B words hold column g at the same k; C holds (row g, columns 2t, 2t+1), then row g+8.
#pragma once

#include "photon/approximate.cuh"
#include "photon/types.cuh"

namespace photon {

constexpr u32 kAllLanes = 0xffffffffu;

// Where a running maximum starts: finite, so that no exponent becomes -inf + inf while all scores are -inf.
constexpr float kLowest = -3.402823466e+38f;

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                                  u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                                 u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit values whose row g is spread over lanes 4g .. 4g+3.
__device__ __forceinline__ u32 transpose_8x8(u32 pair) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// Sixteen bytes that this kernel reads once, so they take no room in L1; zeros where index >= limit, and no
// read then. The comparison is in here so that no lane holds its outcome in a register. Volatile, so that the
// load stays behind `wait_for_previous` (photon/dependent_launch.cuh).
template <typename T>
__device__ __forceinline__ uint4 load_streaming(const T* address, int index, int limit) {
    uint4 words;
    asm volatile(
        "{ .reg .pred present;\n"
        "  setp.lt.s32 present, %5, %6;\n"
        "  mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "  @present ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
        : "l"(address), "r"(index), "r"(limit));
    return words;
}

// The same in place of what is there, or nothing.
template <typename T>
__device__ __forceinline__ void reload_streaming(uint4& words, const T* address, bool is_wanted) {
    asm volatile(
        "{ .reg .pred wanted;\n"
        "  setp.ne.s32 wanted, %5, 0;\n"
        "  @wanted ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
        : "l"(address), "r"(static_cast<int>(is_wanted)));
}

// Counts an arrival: what the CTA wrote before a barrier is seen by whoever sees the count, and the other
// way.
__device__ __forceinline__ int arrive(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Four 8 x 8 matrices from shared memory; lanes 8i .. 8i+7 give the addresses of the rows of matrix i, and
// lane 4g + t gets elements 2t, 2t+1 of row g (transposed: of column g) of each.
__device__ __forceinline__ void load_matrices(u32 (&matrices)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&matrices)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// Sixteen bytes to shared memory, asynchronously; zeros where `is_present` is false, and no read then.
template <typename T>
__device__ __forceinline__ void copy_async(u32 target, const T* source, bool is_present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(target), "l"(source), "r"(is_present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Maximum and sum over the eight lanes that share t.
__device__ __forceinline__ float max_over_g(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 4));
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 8));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 16));
}

__device__ __forceinline__ float sum_over_g(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 4);
    x += __shfl_xor_sync(kAllLanes, x, 8);
    return x + __shfl_xor_sync(kAllLanes, x, 16);
}

// The same over the four lanes that share g.
__device__ __forceinline__ float max_over_t(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float sum_over_t(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace photon
