// Where the results of a product with few tokens go, and which rows of the weight belong together.
//
// A kernel of this kind computes pairs: pair p is two rows of the weight [n][k], low_row(p) and high_row(p),
// times every token. Eight neighbouring pairs make the sixteen rows of one mma tile (low rows are its rows
// 0..7, high rows 8..15), so one thread holds both products of a pair, and what needs two rows of the
// weight at once needs no second kernel and no other order of the weight in memory:
//
//     store_rows       out[token][row] = y + bias                          rows 16 i + g and 16 i + 8 + g
//     add_rows         residual[token][row] += y + bias, float32           the same
//     float_rows       out[token][row] = y, float32 (logits)               the same
//     silu_and_mul     out[token][p] = silu(y_low) * y_high                gate row p, up row p + n / 2
//     rope_and_store   q heads to q[token], k and v heads to their slots   dimensions i and i + d / 2 of a head
//     best_rows        out[token][part] = rank of the largest y of a part  rows 16 i + g and 16 i + 8 + g
//
// The last one rotates q and k as photon_grpc/kernels/rope_store_kv.py says, and has its layouts; there is
// no q/k norm here. best_rows is for a head whose logits nobody needs: a kernel keeps the best of the rows that
// come by (`see_pair`) and writes one rank (photon/rank.cuh) for each token and each part of the rows, which are
// its own affair. Everything is computed in float32 and rounded once. PHOTON_OUTPUT is one of the names,
// PHOTON_STORAGE bf16 or f16, PHOTON_INDEX (int, i64) the type of positions.
#pragma once

#include "photon/rank.cuh"
#include "photon/vec.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_OUTPUT) || !defined(PHOTON_INDEX)
#error "PHOTON_STORAGE, PHOTON_OUTPUT and PHOTON_INDEX must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;
typedef PHOTON_INDEX Index;

enum OutputKind { store_rows, add_rows, float_rows, silu_and_mul, rope_and_store, best_rows };
constexpr OutputKind kOutput = PHOTON_OUTPUT;

// Arguments of the kernel that are the output's business, gathered in one place. Pointers that a kind does
// not need are null.
struct Output {
    void* out;                // [tokens] rows, row_stride elements apart: results, residual, q or ranks
    const Storage* bias;      // [n] or null
    Storage* kv_cache;        // [blocks][kv heads][K, V][block_size][d]
    const float* angles;      // [positions][d]: cos of all d / 2 pairs, then sin
    const Index* positions;   // [tokens]
    const i64* slots;         // [tokens], -1: stored nowhere
    int n;                    // rows of the weight
    int num_heads, num_kv_heads, head_dim, block_size;
    i64 row_stride;
};

// What is known of a token before its products are.
struct Place {
    const float* angles;
    i64 slot;
};

__device__ __forceinline__ int num_pairs(const Output& output) {
    return (output.n + 1) / 2;
}

// May be at or past n in the last tile: read another row then, and finish_pair drops the result.
__device__ __forceinline__ int low_row(const Output& output, int pair) {
    if (kOutput == silu_and_mul) return pair;
    if (kOutput == rope_and_store) {
        const int half_dim = output.head_dim / 2;
        return pair / half_dim * output.head_dim + pair % half_dim;
    }
    return pair / 8 * 16 + pair % 8;
}

__device__ __forceinline__ int high_row(const Output& output, int pair) {
    if (kOutput == silu_and_mul) return pair + output.n / 2;
    if (kOutput == rope_and_store) return low_row(output, pair) + output.head_dim / 2;
    return low_row(output, pair) + 8;
}

// Behind wait_for_previous: positions and slots are written by another kernel.
__device__ __forceinline__ Place find_place(const Output& output, int token) {
    Place place = {nullptr, -1};
    if (kOutput == rope_and_store) {
        place.angles = output.angles + static_cast<i64>(load_index(output.positions + token)) * output.head_dim;
        place.slot = load_index(output.slots + token);
    }
    return place;
}

__device__ __forceinline__ float* residual_at(const Output& output, int token, int row) {
    return static_cast<float*>(output.out) + token * output.row_stride + row;
}

__device__ __forceinline__ float load_residual(const float* address) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_value(Storage* address, float value) {
    *reinterpret_cast<unsigned short*>(address) = static_cast<unsigned short>(pack_pair<Storage>(value, 0.0f));
}

__device__ __forceinline__ float load_value(const Storage* address) {
    return unpack_pair<Storage>(*reinterpret_cast<const unsigned short*>(address)).x;
}

// What finish_pair will need from memory, requested while the products are under way: the residual of both
// rows, or cosine and sine. Behind wait_for_previous.
__device__ __forceinline__ float2 request_pair(const Output& output, int pair, int token, const Place& place) {
    float2 operands = make_float2(0.0f, 0.0f);
    if (kOutput == add_rows) {
        const int low = low_row(output, pair), high = high_row(output, pair);
        if (low < output.n) operands.x = load_residual(residual_at(output, token, low));
        if (high < output.n) operands.y = load_residual(residual_at(output, token, high));
    }
    if (kOutput == rope_and_store) {
        const int half_dim = output.head_dim / 2;
        if (pair < (output.num_heads + output.num_kv_heads) * half_dim) {
            operands.x = place.angles[pair % half_dim];
            operands.y = place.angles[half_dim + pair % half_dim];
        }
    }
    return operands;
}

__device__ __forceinline__ void finish_pair(const Output& output, int pair, int token, const Place& place,
                                            float2 operands, float low, float high) {
    const int low_index = low_row(output, pair), high_index = high_row(output, pair);
    const i64 row = token * output.row_stride;
    if (output.bias != nullptr) {
        if (low_index < output.n) low += load_value(output.bias + low_index);
        if (high_index < output.n) high += load_value(output.bias + high_index);
    }
    if (kOutput == store_rows) {
        Storage* out = static_cast<Storage*>(output.out) + row;
        if (low_index < output.n) store_value(out + low_index, low);
        if (high_index < output.n) store_value(out + high_index, high);
    }
    if (kOutput == float_rows) {
        float* out = static_cast<float*>(output.out) + row;
        if (low_index < output.n) out[low_index] = low;
        if (high_index < output.n) out[high_index] = high;
    }
    if (kOutput == add_rows) {
        if (low_index < output.n) *residual_at(output, token, low_index) = operands.x + low;
        if (high_index < output.n) *residual_at(output, token, high_index) = operands.y + high;
    }
    if (kOutput == silu_and_mul) {
        if (pair < output.n / 2) {
            store_value(static_cast<Storage*>(output.out) + row + pair, low / (1.0f + expf(-low)) * high);
        }
    }
    if (kOutput == rope_and_store) {
        const int head_dim = output.head_dim, half_dim = head_dim / 2;
        const int head = pair / half_dim, dim = pair % half_dim;
        if (head < output.num_heads + output.num_kv_heads) {
            const float first = low * operands.x - high * operands.y;
            high = high * operands.x + low * operands.y;
            low = first;
        }
        if (head < output.num_heads) {
            Storage* q = static_cast<Storage*>(output.out) + row + head * head_dim + dim;
            store_value(q, low);
            store_value(q + half_dim, high);
        } else if (place.slot >= 0 && head < output.num_heads + 2 * output.num_kv_heads) {
            const int stored = head - output.num_heads;
            const int value = stored >= output.num_kv_heads;
            const int kv_head = stored - value * output.num_kv_heads;
            // There are fewer than 2^31 slots, and a 64-bit division is slow.
            const u32 slot = static_cast<u32>(place.slot), size = static_cast<u32>(output.block_size);
            const i64 head_start =
                ((static_cast<i64>(slot / size) * output.num_kv_heads + kv_head) * 2 + value) * size + slot % size;
            Storage* target = output.kv_cache + head_start * head_dim + dim;
            store_value(target, low);
            store_value(target + half_dim, high);
        }
    }
}

// For best_rows in the place of finish_pair, pair after pair in ascending order.
__device__ __forceinline__ void see_pair(BestEntry& best, const Output& output, int pair, float low, float high) {
    const int low_index = low_row(output, pair), high_index = high_row(output, pair);
    best.see(low_index < output.n ? low : minus_infinity(), low_index);
    best.see(high_index < output.n ? high : minus_infinity(), high_index);
}

__device__ __forceinline__ void store_rank(const Output& output, int token, int part, u64 rank) {
    static_cast<u64*>(output.out)[token * output.row_stride + part] = rank;
}

}  // namespace photon
