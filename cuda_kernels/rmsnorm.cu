// RMSNorm (Zhang and Sennrich, 2019) of rows, plain and with the residual added first.
//
//     rms_norm:       out = x / sqrt(mean(x^2) + eps) * weight
//     add_rms_norm:   residual = residual + x, rounded to the residual's type;  out = rms_norm(residual)
//
// Types: PHOTON_STORAGE (bf16, f16, f32) of x, weight and out; PHOTON_RESIDUAL (the same, or f32) of the
// residual, which is also what rms_norm reads.
//
// Launch: one CTA per row (grid.x = rows), whole warps, kVec * kChunks * threads >= hidden.
// Preconditions: hidden a multiple of 8; all rows 16-byte aligned; out overlaps no input.
// Accumulation: float32, each thread its own values in order, then a fixed tree. A row is read once and
// held in registers. Bound by latency below about 1,000 rows, above by the reads and writes.
#include "photon/dependent_launch.cuh"
#include "photon/reduce.cuh"
#include "photon/vec.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_RESIDUAL)
#error "PHOTON_STORAGE and PHOTON_RESIDUAL must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;
typedef PHOTON_RESIDUAL Residual;

// Chunks of kVec values that a thread holds: two loads in flight. 1,024 threads leave 64 registers to each,
// which float32 would not fit.
constexpr int kChunks = 2;
constexpr int kMaxThreads = sizeof(Storage) == 2 ? 1024 : 512;

__device__ __forceinline__ int chunk_start(int chunk) {
    return kVec * (threadIdx.x + chunk * static_cast<int>(blockDim.x));
}

// Weights may be read before the kernel before this one has finished.
__device__ __forceinline__ void load_weight_row(Raw<Storage> (&raw)[kChunks], const Storage* weight,
                                                int hidden) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int start = chunk_start(chunk);
        if (start < hidden) raw[chunk] = load_weights(weight + start);
    }
}

__device__ __forceinline__ void normalize_row(Storage* out, const float (&values)[kChunks][kVec],
                                              const Raw<Storage> (&weight)[kChunks], int hidden, float eps) {
    __shared__ float partials[32];
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum += values[chunk][i] * values[chunk][i];
    }
    const float mean = block_sum(sum, partials) / static_cast<float>(hidden);
    const float scale = 1.0f / sqrtf(mean + eps);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int start = chunk_start(chunk);
        if (start < hidden) {
            float factors[kVec];
            unpack(weight[chunk], factors);
#pragma unroll
            for (int i = 0; i < kVec; ++i) factors[i] *= values[chunk][i] * scale;
            store(out + start, pack<Storage>(factors));
        }
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    rms_norm(Storage* __restrict__ out, const Residual* __restrict__ x, const Storage* __restrict__ weight,
             int hidden, i64 x_row_stride, float eps) {
    Raw<Storage> weights[kChunks];
    load_weight_row(weights, weight, hidden);
    // Before the wait: the product behind this then requests its weights as soon as there is room.
    let_next_start();
    wait_for_previous();
    const Residual* row = x + blockIdx.x * x_row_stride;
    Raw<Residual> raw[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int start = chunk_start(chunk);
        if (start < hidden) raw[chunk] = load_activations(row + start);
    }
    float values[kChunks][kVec] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk_start(chunk) < hidden) unpack(raw[chunk], values[chunk]);
    }
    normalize_row(out + static_cast<i64>(blockIdx.x) * hidden, values, weights, hidden, eps);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    add_rms_norm(Storage* __restrict__ out, Residual* __restrict__ residual, const Storage* __restrict__ x,
                 const Storage* __restrict__ weight, int hidden, float eps) {
    Raw<Storage> weights[kChunks];
    load_weight_row(weights, weight, hidden);
    // Before the wait: the product behind this then requests its weights as soon as there is room.
    let_next_start();
    wait_for_previous();
    const i64 row = static_cast<i64>(blockIdx.x) * hidden;
    Raw<Storage> updates[kChunks];
    Raw<Residual> sums[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int start = chunk_start(chunk);
        if (start < hidden) {
            updates[chunk] = load_activations(x + row + start);
            sums[chunk] = load_activations(const_cast<const Residual*>(residual) + row + start);
        }
    }
    float values[kChunks][kVec] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int start = chunk_start(chunk);
        if (start < hidden) {
            float update[kVec];
            unpack(updates[chunk], update);
            unpack(sums[chunk], values[chunk]);
#pragma unroll
            for (int i = 0; i < kVec; ++i) values[chunk][i] += update[i];
            // The norm is that of the residual as the next layer will read it.
            const Raw<Residual> rounded = pack<Residual>(values[chunk]);
            store(residual + row + start, rounded);
            unpack(rounded, values[chunk]);
        }
    }
    normalize_row(out + row, values, weights, hidden, eps);
}

}  // namespace photon
