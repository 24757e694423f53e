// What stands between the q, k, v projection and attention: per-head RMSNorm of q and k where the model
// has it (Qwen3), rotary embedding (Su et al., 2021), and the write of k and v into the paged cache.
//
//     x' = x / sqrt(mean(x^2) + eps) * weight            q and k, with a norm
//     y[i]         = x'[i] * cos - x'[i + d/2] * sin     q and k; cos, sin = table[positions[t]][i]
//     y[i + d/2]   = x'[i + d/2] * cos + x'[i] * sin
//
// Layouts: qkv [tokens][q heads, k heads, v heads][d] and q_out [tokens][q heads][d] with strides between
// tokens, q_out free to be the part of qkv that it comes from; kv_cache
// [blocks][kv heads][K, V][block_size][d]; table [positions][d] float32, cos of all d/2 pairs, then sin.
// A token goes to slot block * block_size + offset; slot -1 is stored nowhere (an idle row).
//
// Types: PHOTON_STORAGE (bf16, f16, f32) of qkv, outputs, cache and norm weights; PHOTON_INDEX (int, i64)
// of positions. Slots are int64.
//
// Launch: grid (tokens, ceil(heads / (kThreads / lanes))), kThreads threads; `lanes` threads share a head,
// the power of two at or above d / 16. With num_kv_heads = 0 only q is rotated.
// Preconditions: d a multiple of 16, at most 512; rows 16-byte aligned; positions inside the table, slots
// inside the cache.
// Arithmetic: photon/rotary.cuh, in float32, rounded once. A thread holds eight pairs, so nothing goes through
// shared memory.
// Bound by latency at decode sizes, above by the reads and writes.
#include "photon/dependent_launch.cuh"
#include "photon/rotary.cuh"

#if !defined(PHOTON_STORAGE) || !defined(PHOTON_INDEX)
#error "PHOTON_STORAGE and PHOTON_INDEX must be defined"
#endif

namespace photon {

typedef PHOTON_STORAGE Storage;
typedef PHOTON_INDEX Index;

constexpr int kThreads = 128;

extern "C" __global__ void __launch_bounds__(kThreads)
    rope_store_kv(Storage* q_out, Storage* kv_cache, const Storage* qkv,
                  const Storage* __restrict__ q_weight, const Storage* __restrict__ k_weight,
                  const float* __restrict__ table, const Index* __restrict__ positions,
                  const i64* __restrict__ slots, int num_heads, int num_kv_heads, int head_dim,
                  int block_size, int lanes, i64 qkv_row_stride, i64 q_row_stride, float eps) {
    const int token = blockIdx.x;
    const int head = blockIdx.y * (kThreads / lanes) + threadIdx.x / lanes;
    const int start = kVec * (threadIdx.x % lanes);
    const int half_dim = head_dim / 2;
    const bool is_q = head < num_heads, is_k = !is_q && head < num_heads + num_kv_heads;
    // Threads past the last head or the head's end still take part in the sums of their warp.
    const bool active = head < num_heads + 2 * num_kv_heads && start < half_dim;
    const Storage* norm = is_q ? q_weight : k_weight;

    Halves<Storage> weight{};
    if (norm != nullptr && active) weight = load_halves(norm, start, half_dim);
    wait_for_previous();
    let_next_start();

    Halves<Storage> raw{};
    Angles angles{};
    if (active) {
        raw = load_new_halves(qkv + token * qkv_row_stride + static_cast<i64>(head) * head_dim, start, half_dim);
        angles = load_halves(table + static_cast<i64>(load_index(positions + token)) * head_dim, start, half_dim);
    }
    const Halves<Storage> rotated = rotate(raw, weight, norm != nullptr, angles, head_dim, lanes, eps);
    if (!active) return;
    if (is_q) {
        store_halves(q_out + token * q_row_stride + static_cast<i64>(head) * head_dim, rotated, start,
                     half_dim);
        return;
    }
    const int kv_head = head - num_heads - (is_k ? 0 : num_kv_heads);
    const i64 slot = load_index(slots + token);
    if (slot < 0) return;
    store_halves(cache_head(kv_cache, slot, kv_head, is_k ? 0 : 1, num_kv_heads, block_size, head_dim),
                 is_k ? rotated : raw, start, half_dim);
}

// The write alone, for keys that are final: kv [tokens][K heads, V heads][d]. Launch and preconditions as
// above, heads = 2 * num_kv_heads.
extern "C" __global__ void __launch_bounds__(kThreads)
    store_kv(Storage* kv_cache, const Storage* kv, const i64* __restrict__ slots, int num_kv_heads,
             int head_dim, int block_size, int lanes, i64 kv_row_stride) {
    wait_for_previous();
    let_next_start();
    const int token = blockIdx.x;
    const int head = blockIdx.y * (kThreads / lanes) + threadIdx.x / lanes;
    const int start = kVec * (threadIdx.x % lanes);
    const int half_dim = head_dim / 2;
    if (head >= 2 * num_kv_heads || start >= half_dim) return;
    const i64 slot = load_index(slots + token);
    if (slot < 0) return;
    const Storage* in = kv + token * kv_row_stride + static_cast<i64>(head) * head_dim;
    const Halves<Storage> raw = load_new_halves(in, start, half_dim);
    const int value = head >= num_kv_heads;
    store_halves(
        cache_head(kv_cache, slot, head - value * num_kv_heads, value, num_kv_heads, block_size, head_dim), raw,
        start, half_dim);
}

}  // namespace photon
