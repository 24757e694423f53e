// A product of few tokens: the weight is read once, at the speed of memory, straight into mma operands.
//
//     y[t, r] = sum over k of x[t, k] * weight[r, k]                        and on to photon/linear_output.cuh
//     x[t, k] = input[t, k]                                                 PHOTON_INPUT direct or staged
//     x[t, k] = input[t, k] / sqrt(mean(input[t]^2) + eps) * norm[k]        PHOTON_INPUT normed (RMSNorm)
//
// Layouts: input [tokens][k] with input_row_stride elements between tokens, PHOTON_STORAGE, or float32 for
// normed (the residual); weight [n][k] as in the checkpoint; norm [k].
//
// Work: sixteen rows of the weight (a tile, eight pairs of linear_output.cuh) times all tokens are one mma
// result. The warps of a CTA share a tile by k, in chunks of 64 taken in turn, and their sums are added in
// warp order. A CTA walks tiles blockIdx.x, blockIdx.x + gridDim.x, ... Lane (g, t) of a warp takes the 16
// bytes at 8 t and 32 + 8 t of the chunk from rows g and g + 8: the contraction has an order of its own, and x
// is read alike. So no thread needs what another one loads: each has a ring of its own in shared memory, which
// it fills by cp.async kDepth - 1 chunks ahead, across tiles, without a barrier: 80 KB of a multiprocessor are
// under way, where 26 KB cover the latency. (With the ring in registers ptxas waits for all of it before it
// requests anything: a third slower.) The result of a token depends on the weight's shape alone, not on the grid
// and not on other tokens.
//
// The rings take more than half of the shared memory, so that a multiprocessor has one of these CTAs at a time.
// Where two fit, those of the next kernel gather where this one leaves room, and whoever shares a multiprocessor
// is late by as much as the overlap gains, and more. kEarly chunks are requested before the kernel before
// this one has finished. The others come behind the first reads of x, which would queue behind them otherwise.
//
// Launch: grid of any size (one CTA per multiprocessor keeps room for the next kernel), kThreads threads,
// PHOTON_SHARED_BYTES of dynamic shared memory: the rings, and the x of all tokens for staged and normed. direct
// has x in the rings instead, read from L2 again for every tile: for kernels of one or two tiles a CTA.
// Preconditions: 1 <= tokens <= PHOTON_TOKENS, which is 8 or 16; k a multiple of 8, n * k below 2^32; input, weight, norm 16-byte aligned, and
// input_row_stride a multiple of 16 bytes.
// Arithmetic: products of 16-bit values, sums in float32. In bf16 a normed x is input * norm, rounded, and the
// root of the mean divides the sum: relative errors are the same, and no thread waits for the mean. f16 would
// overflow, and takes a second pass over the input.
// Bound by reading the weight; below 10 MB by latency.
#include "photon/attention_mma.cuh"
#include "photon/dependent_launch.cuh"
#include "photon/linear_output.cuh"
#include "photon/reduce.cuh"

#if !defined(PHOTON_K) || !defined(PHOTON_INPUT) || !defined(PHOTON_TOKENS) || !defined(PHOTON_DEPTH) || \
    !defined(PHOTON_SHARED_BYTES)
#error "PHOTON_K, PHOTON_INPUT, PHOTON_TOKENS, PHOTON_DEPTH and PHOTON_SHARED_BYTES must be defined"
#endif

namespace photon {

enum InputKind { direct, staged, normed };
constexpr InputKind kInput = PHOTON_INPUT;

constexpr int kK = PHOTON_K;
constexpr int kTokens = PHOTON_TOKENS;
constexpr int kMmaTokens = 8;  // the N of an mma
constexpr int kTokenTiles = kTokens / kMmaTokens;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPairs = 8;  // of weight rows in a tile

constexpr int kChunk = 64;
constexpr int kChunksPerWarp = ((kK + kChunk - 1) / kChunk + kWarps - 1) / kWarps;
constexpr int kChunkStep = kWarps * kChunk;
constexpr int kStagedK = kChunksPerWarp * kChunkStep;
// Of a token in shared memory. Two neighbouring rows differ by 64 bytes modulo 128, so that eight lanes of
// two tokens read every bank once.
constexpr int kStagedStride = kStagedK + 32;
// Vectors of the residual that a thread requests together.
constexpr int kTokensTogether = 4;

// A thread's pieces of 16 bytes in a slot of the ring: of two weight rows, and of its x for direct.
constexpr int kWeightPieces = 4;
constexpr int kPieces = kWeightPieces + (kInput == direct ? 2 * kTokenTiles : 0);
constexpr int kDepth = PHOTON_DEPTH;
constexpr int kEarly = 2;
constexpr int kPieceBytes = 16 * kThreads;
constexpr int kSlotBytes = kPieces * kPieceBytes;
constexpr int kRingBytes = kDepth * kSlotBytes;

// Behind the rings the staged tokens, and behind those the norm.
constexpr int kNormStart = kTokens * kStagedStride;
constexpr int kStagedValues = kInput == direct ? 0 : kNormStart + (kInput == normed ? kStagedK : 0);
static_assert(kRingBytes + 2 * kStagedValues == PHOTON_SHARED_BYTES, "Python and the kernel disagree");
static_assert(kK % 8 == 0, "16-byte loads");
// The warps that finish tiles; for best_rows each of them has a part, its number is blockIdx.x * kBestWarps + warp.
constexpr int kBestWarps = kTokens * kPairs / 32;
static_assert(kTokens % kMmaTokens == 0 && kTokens * kPairs <= kThreads, "whole mma tiles; a thread for each pair");
static_assert(kEarly < kDepth, "one slot is in use");

template <typename T>
struct Divides {
    static constexpr bool kSums = true;
};
template <>
struct Divides<f16> {
    static constexpr bool kSums = false;
};
// Whether the root of the mean divides the sums rather than x; see the arithmetic above.
constexpr bool kDividesSums = Divides<Storage>::kSums;

struct Shared {
    // One for tiles of even number, one for those of odd: a tile needs one barrier.
    float sums[2][kWarps][2 * kPairs][kTokens];
    float squares[kTokens][kWarps];
};

// Where the lane's first eight values of its warp's first chunk stand. Those of the next chunk are kChunkStep
// further.
__device__ __forceinline__ int lane_start() {
    return static_cast<int>(threadIdx.x >> 5) * kChunk + 8 * static_cast<int>(threadIdx.x & 3);
}

// Sixteen bytes into a ring; zeros and no read where not present. A weight's neighbours are wanted too.
__device__ __forceinline__ void request(u32 target, const Storage* source, bool is_present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(target), "l"(source), "r"(is_present ? 16 : 0)
                 : "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_requests() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
    return words;
}

// The chunk that is requested next: of which tile, where in the rows, and into which slot.
struct Cursor {
    u32 low, high;  // elements from the weight's start to where the lane begins in its two rows
    int tile;
    int k;          // of the chunk, counted from lane_start
    u32 slot;       // address in shared memory of the thread's first piece
};

__device__ __forceinline__ void enter_tile(Cursor& cursor, const Output& output, int tile) {
    const int pair = tile * kPairs + static_cast<int>((threadIdx.x & 31) >> 2);
    // Rows past the end read the last one: nothing comes of them.
    const u32 low = min(low_row(output, pair), output.n - 1), high = min(high_row(output, pair), output.n - 1);
    cursor.low = low * kK + lane_start();
    cursor.high = high * kK + lane_start();
    cursor.tile = tile;
    cursor.k = 0;
}

__device__ __forceinline__ u32 next_slot(u32 slot, u32 ring) {
    return slot + kSlotBytes == ring + kRingBytes ? ring : slot + kSlotBytes;
}

__device__ __forceinline__ bool is_inside(int k, int half) {
    return kStagedK == kK || lane_start() + k + 32 * half < kK;
}

__device__ __forceinline__ void request_weights(const Cursor& cursor, const Storage* weight, int num_tiles) {
    const bool is_tile = cursor.tile < num_tiles;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool present = is_tile && is_inside(cursor.k, half);
        const u32 target = cursor.slot + 2 * half * kPieceBytes;
        request(target, weight + cursor.low + (cursor.k + 32 * half), present);
        request(target + kPieceBytes, weight + cursor.high + (cursor.k + 32 * half), present);
    }
}

// The x of the same chunk, for direct; `x` is where the lane begins in the first of its tokens, which are
// kMmaTokens apart. Tokens past the last one are zeros: reading one of the others again would be as slow as
// reading another.
__device__ __forceinline__ void request_tokens(const Cursor& cursor, const Storage* x, i64 row_stride, int tokens) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
        const bool is_token = tile * kMmaTokens + static_cast<int>((threadIdx.x & 31) >> 2) < tokens;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            request(cursor.slot + (kWeightPieces + 2 * tile + half) * kPieceBytes,
                    x + tile * kMmaTokens * row_stride + cursor.k + 32 * half,
                    is_token && is_inside(cursor.k, half));
        }
    }
}

__device__ __forceinline__ void advance(Cursor& cursor, const Output& output, u32 ring) {
    cursor.k += kChunkStep;
    if (cursor.k == kStagedK) enter_tile(cursor, output, cursor.tile + static_cast<int>(gridDim.x));
    cursor.slot = next_slot(cursor.slot, ring);
}

__device__ __forceinline__ Storage* staged_row(Storage* staged_tokens, int token) {
    return staged_tokens + token * kStagedStride;
}

// Copies x to shared memory, zeros behind k.
__device__ __forceinline__ void stage_tokens(Storage* staged_tokens, const Storage* input, i64 row_stride,
                                             int tokens) {
    constexpr int kVectors = kStagedK / kVec;
    for (int i = threadIdx.x; i < tokens * kVectors; i += kThreads) {
        const int token = i / kVectors, start = i % kVectors * kVec;
        Raw<Storage> raw{};
        if (start < kK) raw = load_activations(input + token * row_stride + start);
        store(staged_row(staged_tokens, token) + start, raw);
    }
}

// How many warps share one token of the residual: all tokens at once where there are few, so none waits long.
__device__ __forceinline__ int num_sharers(int tokens) {
    int sharers = kWarps;
    while (sharers > 1 && sharers * tokens > kWarps) sharers /= 2;
    return sharers;
}

// 1 / root of the mean square of a token; behind a barrier after stage_residual.
__device__ __forceinline__ float inverse_root(const Shared& shared, int token, int sharers, float eps) {
    float sum = 0.0f;
    for (int i = 0; i < sharers; ++i) sum += shared.squares[token][i];
    return 1.0f / sqrtf(sum / static_cast<float>(kK) + eps);
}

// The norm's weight, zeros behind k. It may be read before the kernel before this one has finished.
__device__ __forceinline__ void request_norm(const Storage* staged_norm, const Storage* norm) {
    const u32 target = static_cast<u32>(__cvta_generic_to_shared(staged_norm));
    for (int start = threadIdx.x * kVec; start < kStagedK; start += kThreads * kVec) {
        request(target + 2 * start, norm + start, start < kK);
    }
}

__device__ __forceinline__ void load_staged(float (&values)[kVec], const Storage* address) {
    Raw<Storage> raw;
    raw.words[0] = *reinterpret_cast<const uint4*>(address);
    unpack(raw, values);
}

// Several vectors of one token of the residual, `step` values apart.
struct ResidualPart {
    Raw<float> raw[kTokensTogether];
};

__device__ __forceinline__ void load_part(ResidualPart& part, const float* row, int start, int step) {
#pragma unroll
    for (int i = 0; i < kTokensTogether; ++i) {
        if (start + i * step < kK) part.raw[i] = load_activations(row + start + i * step);
    }
}

// The residual's squares, and in bf16 input * norm to shared memory in the same pass. `part` holds the first
// vectors of the thread already.
__device__ __forceinline__ void stage_residual(Storage* staged_tokens, Shared& shared, ResidualPart& part,
                                               const float* input, const Storage* staged_norm, i64 row_stride,
                                               int tokens) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sharers = num_sharers(tokens);
    const int step = sharers * 32 * kVec;
    bool is_loaded = true;
    for (int token = warp / sharers; token < tokens; token += kWarps / sharers) {
        Storage* const target = staged_row(staged_tokens, token);
        float sum = 0.0f;
        for (int first = (warp % sharers * 32 + lane) * kVec; first < kStagedK; first += kTokensTogether * step) {
            if (!is_loaded) load_part(part, input + token * row_stride, first, step);
            is_loaded = false;
#pragma unroll
            for (int i = 0; i < kTokensTogether; ++i) {
                const int start = first + i * step;
                float values[kVec] = {};
                if (start < kK) unpack(part.raw[i], values);
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum += values[j] * values[j];
                if (kDividesSums && start < kStagedK) {
                    float factors[kVec];
                    load_staged(factors, staged_norm + start);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) values[j] *= factors[j];
                    store(target + start, pack<Storage>(values));
                }
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) shared.squares[token][warp % sharers] = sum;
    }
}

// f16: the normed values themselves, once the squares are known.
__device__ __forceinline__ void stage_normed(Storage* staged_tokens, const Shared& shared, const float* input,
                                             const Storage* staged_norm, i64 row_stride, int tokens, float eps) {
    constexpr int kVectors = kStagedK / kVec;
    for (int i = threadIdx.x; i < tokens * kVectors; i += kThreads) {
        const int token = i / kVectors, start = i % kVectors * kVec;
        const float scale = inverse_root(shared, token, num_sharers(tokens), eps);
        float values[kVec] = {}, factors[kVec];
        if (start < kK) unpack(load_activations(input + token * row_stride + start), values);
        load_staged(factors, staged_norm + start);
#pragma unroll
        for (int j = 0; j < kVec; ++j) values[j] *= scale * factors[j];
        store(staged_row(staged_tokens, token) + start, pack<Storage>(values));
    }
}

// Sums of one mma tile of tokens, of the two halves of chunks apart: one mma need not wait for the one before.
typedef float Sums[kTokenTiles][2][4];

// Adds the products of one chunk. `token_rows` are where the lane's x stands in shared memory.
__device__ __forceinline__ void multiply(Sums& sums, u32 slot, const u32 (&token_rows)[kTokenTiles], int k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 low = load_shared(slot + 2 * half * kPieceBytes);
        const uint4 high = load_shared(slot + (2 * half + 1) * kPieceBytes);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            const uint4 x = kInput == direct
                                ? load_shared(slot + (kWeightPieces + 2 * tile + half) * kPieceBytes)
                                : load_shared(token_rows[tile] + 2 * (k + 32 * half));
            mma_16x8x16<Storage>(sums[tile][half], low.x, high.x, low.y, high.y, x.x, x.y);
            mma_16x8x16<Storage>(sums[tile][half], low.z, high.z, low.w, high.w, x.z, x.w);
        }
    }
}

}  // namespace photon

// Arguments from `out` to `out_row_stride` are those of struct Output.
extern "C" __global__ void __launch_bounds__(photon::kThreads, 1)
    gemv(void* out, photon::Storage* kv_cache, const void* input, const photon::Storage* __restrict__ weight,
         const photon::Storage* __restrict__ norm, const photon::Storage* __restrict__ bias,
         const float* __restrict__ angles, const photon::Index* positions, const photon::i64* slots, int tokens,
         int n, int num_heads, int num_kv_heads, int head_dim, int block_size, photon::i64 input_row_stride,
         photon::i64 out_row_stride, float eps) {
    using namespace photon;
    extern __shared__ uint4 dynamic_shared[];
    __shared__ Shared shared;
    const u32 ring = static_cast<u32>(__cvta_generic_to_shared(dynamic_shared)) + 16 * threadIdx.x;
    Storage* const staged_tokens = reinterpret_cast<Storage*>(dynamic_shared) + kRingBytes / 2;
    const Output output = {out, bias, kv_cache, angles, positions, slots, n, num_heads, num_kv_heads, head_dim,
                           block_size, out_row_stride};
    const int num_tiles = (num_pairs(output) + kPairs - 1) / kPairs;
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;

    Cursor cursor;
    cursor.slot = ring;
    enter_tile(cursor, output, blockIdx.x);
    const Cursor start = cursor;
    const Storage* const staged_norm = staged_tokens + kNormStart;
    if (kInput == normed) {
        request_norm(staged_norm, norm);
        commit_copies();
    }
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
        request_weights(cursor, weight, num_tiles);
        commit_copies();
        advance(cursor, output, ring);
    }
    let_next_start();
    wait_for_previous();
    if (static_cast<int>(blockIdx.x) >= num_tiles) return;

    const Storage* x = nullptr;
    ResidualPart part;
    if (kInput == direct) {
        x = static_cast<const Storage*>(input) + g * input_row_stride + lane_start();
        // Each in a group of its own, so that the count of groups below is right for them.
        Cursor late = start;
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            request_tokens(late, x, input_row_stride, tokens);
            commit_copies();
            advance(late, output, ring);
        }
    }
    if (kInput == staged) {
        stage_tokens(staged_tokens, static_cast<const Storage*>(input), input_row_stride, tokens);
    }
    if (kInput == normed) {
        const int sharers = num_sharers(tokens), token = warp / sharers;
        if (token < tokens) {
            const float* const row = static_cast<const float*>(input) + token * input_row_stride;
            load_part(part, row, (warp % sharers * 32 + static_cast<int>(threadIdx.x & 31)) * kVec,
                      sharers * 32 * kVec);
        }
    }
#pragma unroll
    for (int i = kEarly; i < kDepth - 1; ++i) {
        request_weights(cursor, weight, num_tiles);
        if (kInput == direct) request_tokens(cursor, x, input_row_stride, tokens);
        commit_copies();
        advance(cursor, output, ring);
    }
    if (kInput == normed) {
        // The norm is the oldest request.
        wait_for_requests<kDepth - 1>();
        __syncthreads();
        const float* const residual = static_cast<const float*>(input);
        stage_residual(staged_tokens, shared, part, residual, staged_norm, input_row_stride, tokens);
        if (!kDividesSums) {
            __syncthreads();
            stage_normed(staged_tokens, shared, residual, staged_norm, input_row_stride, tokens, eps);
        }
    }
    // Staged tokens past the last one repeat it, and nothing comes of them.
    u32 token_rows[kTokenTiles];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
        Storage* const row = staged_row(staged_tokens, min(i * kMmaTokens + g, tokens - 1));
        token_rows[i] = static_cast<u32>(__cvta_generic_to_shared(row + lane_start()));
    }

    // Who finishes what: thread i a token and one of the eight pairs, the same for every tile.
    const int my_token = threadIdx.x % kTokens, my_pair = threadIdx.x / kTokens;
    const bool finishes = my_pair < kPairs && my_token < tokens;
    Place place{};
    if (finishes) place = find_place(output, my_token);
    if (kInput != direct) __syncthreads();
    const float factor = kInput == normed && kDividesSums && finishes
                             ? inverse_root(shared, my_token, num_sharers(tokens), eps)
                             : 1.0f;

    BestEntry best;
    u32 slot = ring;
    int parity = 0;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        float2 operands = make_float2(0.0f, 0.0f);
        if (finishes) operands = request_pair(output, tile * kPairs + my_pair, my_token, place);

        Sums sums = {};
#pragma unroll 4
        for (int i = 0; i < kChunksPerWarp; ++i) {
            // Into the slot whose chunk was used last.
            request_weights(cursor, weight, num_tiles);
            if (kInput == direct) request_tokens(cursor, x, input_row_stride, tokens);
            commit_copies();
            advance(cursor, output, ring);
            wait_for_requests<kDepth - 1>();
            multiply(sums, slot, token_rows, i * kChunkStep);
            slot = next_slot(slot, ring);
        }

#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
            const float(&even)[4] = sums[i][0], (&odd)[4] = sums[i][1];
            float* const partials = &shared.sums[parity][warp][g][i * kMmaTokens + 2 * t];
            *reinterpret_cast<float2*>(partials) = make_float2(even[0] + odd[0], even[1] + odd[1]);
            *reinterpret_cast<float2*>(partials + kPairs * kTokens) =
                make_float2(even[2] + odd[2], even[3] + odd[3]);
        }
        __syncthreads();
        if (finishes) {
            float low = 0.0f, high = 0.0f;
#pragma unroll
            for (int other = 0; other < kWarps; ++other) {
                low += shared.sums[parity][other][my_pair][my_token];
                high += shared.sums[parity][other][my_pair + kPairs][my_token];
            }
            if (kOutput == best_rows) {
                see_pair(best, output, tile * kPairs + my_pair, low * factor, high * factor);
            } else {
                finish_pair(output, tile * kPairs + my_pair, my_token, place, operands, low * factor, high * factor);
            }
        }
        parity ^= 1;
    }
    // Whole warps finish, or none of their lanes; the tokens of a warp stand in its first kTokens lanes.
    if (kOutput == best_rows && my_pair < kPairs) {
        u64 rank = best.rank();
#pragma unroll
        for (int distance = kTokens; distance < 32; distance *= 2) {
            rank = min(rank, __shfl_xor_sync(0xffffffffu, rank, distance));
        }
        if (finishes && threadIdx.x % 32 < kTokens) store_rank(output, my_token, blockIdx.x * kBestWarps + warp, rank);
    }
}
