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

__device__ __forceinline__ double gumbel(unsigned word) {
    const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
    return -log(-log(uniform));
}

__device__ __forceinline__ double gumbel_at(unsigned token_id, NoiseKey key) {
    const uint4 words = philox4x32(token_id >> 2, key);
    const unsigned low = token_id & 1 ? words.y : words.x;
    const unsigned high = token_id & 1 ? words.w : words.z;
    return gumbel(token_id & 2 ? high : low);
}

// Bounds of `gumbel` and of the distance of `gumbel_approximate` from it, both rounded up. The error is
// that of __logf: near u = 1, where it would be large relative to -log(u), a series stands instead.
constexpr float kGumbelMax = 22.8808f;
constexpr float kGumbelError = 1e-4f;

__device__ __forceinline__ float gumbel_approximate(unsigned word) {
    const unsigned complement = ~word;
    float minus_log;
    if (complement < 1u << 27) {
        const float t = (static_cast<float>(complement) + 0.5f) * 0x1p-32f;
        minus_log = t * (1.0f + t * (0.5f + t * (0.33333333f + t * 0.25f)));
    } else {
        minus_log = -__logf((static_cast<float>(word) + 0.5f) * 0x1p-32f);
    }
    return -__logf(minus_log);
}

}  // namespace photon
