// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) and the Gumbel noise of the sampler.
//
//     key     = (seed mod 2^32, seed div 2^32)
//     counter = (v div 4, position, index, 0)
//     x       = word (v mod 4) of philox(counter, key)
//     u       = (x + 0.5) / 2^32
//     noise   = -log(-log(u))          float64
//
// photon_grpc/runner/philox.py is the definition.
#pragma once

namespace photon {

struct NoiseKey {
    unsigned seed_low, seed_high, position, index;
};

__device__ __forceinline__ uint4 philox4x32(unsigned block, NoiseKey key) {
    unsigned c0 = block, c1 = key.position, c2 = key.index, c3 = 0;
    unsigned k0 = key.seed_low, k1 = key.seed_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = static_cast<unsigned long long>(c0) * 0xD2511F53u;
        const unsigned long long p1 = static_cast<unsigned long long>(c2) * 0xCD9E8D57u;
        c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(p1);
        c3 = static_cast<unsigned>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// Not inlined: two logarithms in float64, for the few entries that need them.
__device__ __noinline__ double gumbel(unsigned word) {
    const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
    return -log(-log(uniform));
}

__device__ __forceinline__ unsigned word_at(unsigned token_id, NoiseKey key) {
    const uint4 words = philox4x32(token_id >> 2, key);
    const unsigned low = token_id & 1 ? words.y : words.x;
    const unsigned high = token_id & 1 ? words.w : words.z;
    return token_id & 2 ? high : low;
}

// A cheap bound of `gumbel` from above: -log(1 - u), because -log(u) >= 1 - u. The bound itself is off by
// kCeilingError at most, in either direction, and above the noise by kCeilingGap at most.
constexpr float kCeilingError = 5e-5f;
constexpr float kCeilingGap = 3.1302f;   // log(33 log 2), at the smallest u

__device__ __forceinline__ float noise_ceiling(unsigned word) {
    constexpr float kLog2 = 0.69314718f;
    return fmaf(-kLog2, __log2f(static_cast<float>(~word) + 0.5f), 32 * kLog2);
}

}  // namespace photon
