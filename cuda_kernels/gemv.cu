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
// warp order. A CTA walks tiles blockIdx.x, blockIdx.x + gridDim.x, ... Lane (g, t) of a warp loads the 16
// bytes at 8 t and 32 + 8 t of the chunk from rows g and g + 8: the contraction has an order of its own, and x
// is read alike. So no weight passes through shared memory, and a thread requests its next chunk as soon as
// it has used one: 256 bytes of each thread are always under way, 64 KB of a multiprocessor. The result of a
// token depends on the weight's shape alone, not on the grid and not on other tokens.
//
// The first tile's chunks are requested before the kernel before this one has finished; the next kernel may
// start at once, since two of these CTAs fit into a multiprocessor.
//
// Launch: grid of any size (one CTA per multiprocessor keeps room for the next kernel), kThreads threads,
// PHOTON_SHARED_BYTES of dynamic shared memory: the x of all tokens for staged and normed, none for direct,
// which reads x from L2 again for every tile: for kernels of one or two tiles a CTA.
// Preconditions: 1 <= tokens <= PHOTON_TOKENS; k a multiple of 8, n * k below 2^32; input, weight, norm 16-byte aligned, and
// input_row_stride a multiple of 16 bytes.
// Arithmetic: products of 16-bit values, sums in float32. In bf16 a normed x is input * norm, rounded, and the
// root of the mean divides the sum: relative errors are the same, and no thread waits for the mean. f16 would
// overflow, and takes a second pass over the input.
// Bound by reading the weight; below 10 MB by latency.
#include "photon/attention_mma.cuh"
#include "photon/dependent_launch.cuh"
#include "photon/linear_output.cuh"
#include "photon/reduce.cuh"

#if !defined(PHOTON_K) || !defined(PHOTON_TOKENS) || !defined(PHOTON_INPUT) || !defined(PHOTON_SHARED_BYTES)
#error "PHOTON_K, PHOTON_TOKENS, PHOTON_INPUT and PHOTON_SHARED_BYTES must be defined"
#endif

namespace photon {

enum InputKind { direct, staged, normed };
constexpr InputKind kInput = PHOTON_INPUT;

constexpr int kK = PHOTON_K;
constexpr int kTokens = PHOTON_TOKENS;
constexpr int kGroups = kTokens / 8;  // of eight tokens, the N of an mma
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kCtasPerSm = kInput == direct && kGroups > 1 ? 1 : 2;
constexpr int kPairs = 8;  // of weight rows in a tile

constexpr int kChunk = 64;
constexpr int kChunks = (kK + kChunk - 1) / kChunk;
constexpr int kChunksPerWarp = (kChunks + kWarps - 1) / kWarps;
// Chunks that a thread has under way.
constexpr int kDepth = kChunksPerWarp < 4 ? kChunksPerWarp : 4;
constexpr int kRounds = (kChunksPerWarp + kDepth - 1) / kDepth;
// Chunks of x that are requested before the first is used: from L2 several, from shared memory one.
constexpr int kTogether = kInput == direct && kDepth == 4 ? 4 / kGroups : 1;

// Of a token in shared memory. Two neighbouring rows differ by 64 bytes modulo 128, so that eight lanes of
// two tokens read every bank once.
constexpr int kChunkStep = kWarps * kChunk;
constexpr int kRoundStep = kDepth * kChunkStep;
constexpr int kStagedK = kRounds * kRoundStep;
constexpr int kStagedStride = kStagedK + 32;

// Vectors of the residual that a thread requests together, beside the ring.
constexpr int kTokensTogether = 4;

static_assert(kTokens == 8 || kTokens == 16, "one or two mma results");
static_assert(kK % 8 == 0, "16-byte loads");
// Staged tokens, and behind them the norm.
constexpr int kNormStart = kTokens * kStagedStride;
constexpr int kSharedValues = kInput == direct ? 0 : kNormStart + (kInput == normed ? kStagedK : 0);
static_assert(kSharedValues * 2 == PHOTON_SHARED_BYTES, "Python and the kernel disagree");

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

// The part of a chunk that one lane holds of two rows.
struct WeightChunk {
    uint4 low[2], high[2];
};

struct TokenChunk {
    uint4 words[2];
};

// Sixteen bytes of a weight, which is read once; zeros and no read where not present.
__device__ __forceinline__ uint4 load_weight(const Storage* address, bool is_present) {
    uint4 words;
    asm volatile(
        "{ .reg .pred present;\n"
        "  setp.ne.s32 present, %5, 0;\n"
        "  mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "  @present ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
        : "l"(address), "r"(static_cast<int>(is_present)));
    return words;
}

// Where the lane's first eight values of its warp's first chunk stand. Those of chunk `i` of a round are
// i * kChunkStep further, so that all loads of a round share one address.
__device__ __forceinline__ int lane_start() {
    return static_cast<int>(threadIdx.x >> 5) * kChunk + 8 * static_cast<int>(threadIdx.x & 3);
}

// Whether 16 bytes of a round are inside of the row; `round_start` is where the lane begins in it.
__device__ __forceinline__ bool is_inside(int round_start, int offset) {
    return kStagedK == kK || round_start + offset < kK;
}

// The two rows of a tile that a lane reads, from where it begins: elements from the weight's start, since
// registers are short.
struct Rows {
    u32 low, high;
};

__device__ __forceinline__ Rows tile_rows(const Output& output, int tile) {
    const int pair = tile * kPairs + static_cast<int>((threadIdx.x & 31) >> 2);
    // Rows past the end read the last one: nothing comes of them.
    const u32 low = min(low_row(output, pair), output.n - 1), high = min(high_row(output, pair), output.n - 1);
    return {low * kK + lane_start(), high * kK + lane_start()};
}

// Chunk `i` of the round that begins `round * kRoundStep` into the rows.
__device__ __forceinline__ void request_weights(WeightChunk& chunk, const Storage* weight, const Rows& rows,
                                                int round, int i, bool is_present) {
    const Storage* const low = weight + (rows.low + round * kRoundStep);
    const Storage* const high = weight + (rows.high + round * kRoundStep);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = i * kChunkStep + 32 * half;
        const bool present = is_present && is_inside(lane_start() + round * kRoundStep, offset);
        chunk.low[half] = load_weight(low + offset, present);
        chunk.high[half] = load_weight(high + offset, present);
    }
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
__device__ __forceinline__ void stage_norm(Storage* staged_norm, const Storage* norm) {
    for (int start = threadIdx.x * kVec; start < kStagedK; start += kThreads * kVec) {
        Raw<Storage> raw{};
        if (start < kK) raw = load_weights(norm + start);
        store(staged_norm + start, raw);
    }
}

__device__ __forceinline__ void load_staged(float (&values)[kVec], const Storage* address) {
    Raw<Storage> raw;
    raw.words[0] = *reinterpret_cast<const uint4*>(address);
    unpack(raw, values);
}

// The residual's squares, and in bf16 input * norm to shared memory in the same pass.
__device__ __forceinline__ void stage_residual(Storage* staged_tokens, Shared& shared, const float* input,
                                               const Storage* staged_norm, i64 row_stride, int tokens) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sharers = num_sharers(tokens);
    const int step = sharers * 32 * kVec;
    for (int token = warp / sharers; token < tokens; token += kWarps / sharers) {
        const float* row = input + token * row_stride;
        Storage* const target = staged_row(staged_tokens, token);
        float sum = 0.0f;
        for (int first = (warp % sharers * 32 + lane) * kVec; first < kStagedK; first += kTokensTogether * step) {
            Raw<float> raw[kTokensTogether];
#pragma unroll
            for (int i = 0; i < kTokensTogether; ++i) {
                if (first + i * step < kK) raw[i] = load_activations(row + first + i * step);
            }
#pragma unroll
            for (int i = 0; i < kTokensTogether; ++i) {
                const int start = first + i * step;
                float values[kVec] = {};
                if (start < kK) unpack(raw[i], values);
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

// The part of x that the lane multiplies chunk `i` of a round with. `x` is where the lane begins in its token
// of the group, in memory or staged.
__device__ __forceinline__ TokenChunk load_tokens(const Storage* x, int round, int i) {
    TokenChunk chunk;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = i * kChunkStep + 32 * half;
        const Storage* const address = x + round * kRoundStep + offset;
        if (kInput == direct) {
            const bool present = is_inside(lane_start() + round * kRoundStep, offset);
            chunk.words[half] = load_streaming(address, 0, static_cast<int>(present));
        } else {
            chunk.words[half] = *reinterpret_cast<const uint4*>(address);
        }
    }
    return chunk;
}

__device__ __forceinline__ void multiply(float (&sums)[4], const WeightChunk& weights, const TokenChunk& tokens) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 low = weights.low[half], high = weights.high[half], x = tokens.words[half];
        mma_16x8x16<Storage>(sums, low.x, high.x, low.y, high.y, x.x, x.y);
        mma_16x8x16<Storage>(sums, low.z, high.z, low.w, high.w, x.z, x.w);
    }
}

}  // namespace photon

// Arguments from `out` to `out_row_stride` are those of struct Output.
extern "C" __global__ void __launch_bounds__(photon::kThreads, photon::kCtasPerSm)
    gemv(void* out, photon::Storage* kv_cache, const void* input, const photon::Storage* __restrict__ weight,
         const photon::Storage* __restrict__ norm, const photon::Storage* __restrict__ bias,
         const float* __restrict__ angles, const photon::Index* positions, const photon::i64* slots, int tokens,
         int n, int num_heads, int num_kv_heads, int head_dim, int block_size, photon::i64 input_row_stride,
         photon::i64 out_row_stride, float eps) {
    using namespace photon;
    extern __shared__ uint4 dynamic_shared[];
    __shared__ Shared shared;
    Storage* const staged_tokens = reinterpret_cast<Storage*>(dynamic_shared);
    const Output output = {out, bias, kv_cache, angles, positions, slots, n, num_heads, num_kv_heads, head_dim,
                           block_size, out_row_stride};
    const int num_tiles = (num_pairs(output) + kPairs - 1) / kPairs;
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;

    int tile = blockIdx.x;
    WeightChunk ring[kDepth];
    {
        const Rows rows = tile_rows(output, tile);
#pragma unroll
        for (int i = 0; i < kDepth; ++i) request_weights(ring[i], weight, rows, 0, i, tile < num_tiles);
    }
    let_next_start();
    if (kInput == normed) {
        stage_norm(staged_tokens + kNormStart, norm);
        __syncthreads();
    }
    wait_for_previous();
    if (tile >= num_tiles) return;

    if (kInput == staged) {
        stage_tokens(staged_tokens, static_cast<const Storage*>(input), input_row_stride, tokens);
    }
    if (kInput == normed) {
        const float* residual = static_cast<const float*>(input);
        const Storage* const staged_norm = staged_tokens + kNormStart;
        stage_residual(staged_tokens, shared, residual, staged_norm, input_row_stride, tokens);
        if (!kDividesSums) {
            __syncthreads();
            stage_normed(staged_tokens, shared, residual, staged_norm, input_row_stride, tokens, eps);
        }
    }

    // Who finishes what: thread i a token and one of the eight pairs, the same for every tile.
    const int my_token = threadIdx.x % kTokens, my_pair = threadIdx.x / kTokens;
    const bool finishes = my_pair < kPairs && my_token < tokens;
    Place place{};
    if (finishes) place = find_place(output, my_token);
    if (kInput != direct) __syncthreads();
    const float divisor_inverse = kInput == normed && kDividesSums && finishes
                                      ? inverse_root(shared, my_token, num_sharers(tokens), eps)
                                      : 1.0f;

    // Tokens past the last one repeat it, and nothing comes of them.
    const Storage* x[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const int token = min(8 * group + g, tokens - 1);
        x[group] = (kInput == direct ? static_cast<const Storage*>(input) + token * input_row_stride
                                     : staged_row(staged_tokens, token)) +
                   lane_start();
    }

    for (int parity = 0; tile < num_tiles; parity ^= 1) {
        const int next_tile = tile + static_cast<int>(gridDim.x);
        const Rows rows = tile_rows(output, tile), next_rows = tile_rows(output, next_tile);
        float2 operands = make_float2(0.0f, 0.0f);
        if (finishes) operands = request_pair(output, tile * kPairs + my_pair, my_token, place);

        float sums[kGroups][4] = {};
#pragma unroll 1
        for (int round = 0; round < kRounds; ++round) {
            const bool goes_on = round + 1 < kRounds;
            const Rows source = goes_on ? rows : next_rows;
            const bool is_present = goes_on || next_tile < num_tiles;
            const int next_round = goes_on ? round + 1 : 0;
#pragma unroll
            for (int first = 0; first < kDepth; first += kTogether) {
                TokenChunk chunks[kTogether][kGroups];
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                    for (int group = 0; group < kGroups; ++group) {
                        chunks[i][group] = load_tokens(x[group], round, first + i);
                    }
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                    for (int group = 0; group < kGroups; ++group) {
                        multiply(sums[group], ring[first + i], chunks[i][group]);
                    }
                    request_weights(ring[first + i], weight, source, next_round, first + i, is_present);
                }
            }
        }

#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float* const low = &shared.sums[parity][warp][g][8 * group + 2 * t];
            float* const high = &shared.sums[parity][warp][g + 8][8 * group + 2 * t];
            *reinterpret_cast<float2*>(low) = make_float2(sums[group][0], sums[group][1]);
            *reinterpret_cast<float2*>(high) = make_float2(sums[group][2], sums[group][3]);
        }
        __syncthreads();
        if (finishes) {
            float low = 0.0f, high = 0.0f;
#pragma unroll
            for (int other = 0; other < kWarps; ++other) {
                low += shared.sums[parity][other][my_pair][my_token];
                high += shared.sums[parity][other][my_pair + kPairs][my_token];
            }
            finish_pair(output, tile * kPairs + my_pair, my_token, place, operands, low * divisor_inverse,
                        high * divisor_inverse);
        }
        tile = next_tile;
    }
}
