// Sums over a warp and over a CTA, in an order that depends on the CTA's size alone.
#pragma once

namespace photon {

// Over `width` neighbouring lanes, a power of two; all of them get the sum.
__device__ __forceinline__ float warp_sum(float value, int width = 32) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
    }
    return value;
}

// Over a CTA of whole warps; all threads get the sum. `partials` is shared, of 32 floats, and good for one
// call.
__device__ __forceinline__ float block_sum(float value, float* partials) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
    value = warp_sum(value);
    if (num_warps == 1) return value;
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    return warp_sum(lane < num_warps ? partials[lane] : 0.0f);
}

}  // namespace photon
