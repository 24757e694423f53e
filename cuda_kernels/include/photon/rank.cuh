// The order of a row's entries: greater values first, the lower id among equals.
//
// An entry is a 32-bit key, where less is better, and its id; `rank = key << 24 | id` is unique, so the order is
// total, and the least of some ranks does not depend on who compares them when. NaN and +inf come before all that
// is finite: what has one of them among its entries shows it.
#pragma once

#include "photon/ieee.cuh"
#include "photon/types.cuh"

namespace photon {

constexpr int kIdBits = 24;
constexpr u32 kNoId = (1u << kIdBits) - 1;
constexpr u64 kNoRank = ~0ull;
constexpr int kNoToken = -1;   // of a row that has none

// Keys of float32 values, greater values first; -0.0 must have been made 0.0 before.
__device__ __forceinline__ u32 descending_key(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
}

__device__ __forceinline__ float value_of_key(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7FFFFFFFu);
}

constexpr u32 kKeyOfInfinity = 0x007FFFFFu;         // and everything below is +NaN
constexpr u32 kKeyOfMinusInfinity = 0xFF800000u;    // and everything above is -NaN

__device__ __forceinline__ u64 rank_of(u32 key, u32 id) {
    return static_cast<u64>(key) << kIdBits | id;
}

__device__ __forceinline__ u32 key_of_rank(u64 rank) { return static_cast<u32>(rank >> kIdBits); }

__device__ __forceinline__ u32 id_of_rank(u64 rank) { return static_cast<u32>(rank) & kNoId; }

// The best of entries that are seen in the order of their ids.
struct BestEntry {
    float value = minus_infinity();   // or NaN, once there was one
    u32 id = kNoId;

    __device__ __forceinline__ void see(float entry, u32 entry_id) {
        if (ieee_greater(entry, value)) id = entry_id;
        value = ieee_max_or_nan(value, entry);
    }

    __device__ __forceinline__ u64 rank() const { return rank_of(descending_key(ieee_add(value, 0.0f)), id); }
};

}  // namespace photon
