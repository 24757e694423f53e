// What a forward pass reads of its rows, made from the state of their sequences; then the state moves on.
//
// Row r is the sequence in slot s = row_slots[r]. It has n tokens, t = first(r) .. first(r) + n - 1:
//
//     r < num_decodes    n = 1, first(r) = r; the token is the sequence's newest, last_token_ids[s]
//     behind them        j = r - num_decodes: n = query_starts[j + 1] - query_starts[j], first(r) =
//                        num_decodes + query_starts[j]; the tokens are prompt_tokens[query_starts[j] ..]
//
//     positions[t]    = num_computed[s] + t - first(r)
//     slot_mapping[t] = tables[s][positions[t] / block_size] * block_size + positions[t] % block_size
//     context_lens[r] = num_computed[s] + n,  block_tables[r] = tables[s] as far as that context goes
//     last_tokens[r]  = first(r) + n - 1
//     num_computed[s] += n
//
// An idle row has slot -1 and, behind the decodes, no token: context 0, last token 0; an idle decode row's
// token is 0, at position 0, with slot_mapping -1. So are the tokens behind the last row's.
//
// Layouts: tables [slots][max_blocks], block_tables [rows][max_blocks], of which entries behind a row's
// context are void.
//
// Launch: grid (rows + 1), kThreads threads; a CTA a row, the last one for the tokens of no row.
// Preconditions: max_blocks a multiple of 4, both tables on 16 bytes; no two rows have one slot; slots of a
// pool below 2^31. Everything here is written by others, so nothing is read before the wait, and inputs are
// not __restrict__, which would allow non-coherent loads. Bound by latency.
#include "photon/dependent_launch.cuh"
#include "photon/types.cuh"

namespace photon {

constexpr int kThreads = 128;

extern "C" __global__ void __launch_bounds__(kThreads)
    step_inputs(i64* __restrict__ token_ids,     // [num_tokens]
                i64* __restrict__ positions,     // [num_tokens]
                i64* __restrict__ slot_mapping,  // [num_tokens]
                int* __restrict__ context_lens,  // [rows]
                int* __restrict__ block_tables,  // [rows, max_blocks]
                i64* __restrict__ last_tokens,   // [rows]
                int* num_computed,               // [slots], read too
                const int* last_token_ids,       // [slots]
                const int* tables,               // [slots, max_blocks]
                const int* row_slots,            // [rows]
                const int* query_starts,         // [rows - num_decodes + 1]; null without such rows
                const int* prompt_tokens,        // [num_tokens - num_decodes]
                int rows, int num_decodes, int num_tokens, int max_blocks, int block_size) {
    wait_for_previous();
    let_next_start();
    const int row = blockIdx.x;
    if (row == rows) {
        if (query_starts == nullptr) return;
        const int end = num_decodes + query_starts[rows - num_decodes];
        for (int t = end + static_cast<int>(threadIdx.x); t < num_tokens; t += kThreads) {
            token_ids[t] = 0;
            positions[t] = 0;
            slot_mapping[t] = -1;
        }
        return;
    }
    const bool is_decode = row < num_decodes;
    const int slot = row_slots[row];
    if (slot < 0) {
        if (threadIdx.x != 0) return;
        context_lens[row] = 0;
        last_tokens[row] = 0;
        if (is_decode) {
            token_ids[row] = 0;
            positions[row] = 0;
            slot_mapping[row] = -1;
        }
        return;
    }
    const int query_start = is_decode ? 0 : query_starts[row - num_decodes];
    const int query_len = is_decode ? 1 : query_starts[row - num_decodes + 1] - query_start;
    const int first = is_decode ? row : num_decodes + query_start;
    const int start = num_computed[slot];
    const int context_len = start + query_len;
    const int* const table = tables + static_cast<i64>(slot) * max_blocks;
    // Every thread has read the count before one moves it.
    __syncthreads();
    if (threadIdx.x == 0) {
        context_lens[row] = context_len;
        last_tokens[row] = first + query_len - 1;
        num_computed[slot] = context_len;
    }
    for (int i = threadIdx.x; i < query_len; i += kThreads) {
        const int position = start + i;
        const int block = position / block_size;
        token_ids[first + i] = is_decode ? last_token_ids[slot] : prompt_tokens[query_start + i];
        positions[first + i] = position;
        slot_mapping[first + i] =
            static_cast<i64>(table[block]) * block_size + (position - block * block_size);
    }
    // Whole vectors: what they bring from behind the context is void too.
    const int num_vectors = ((context_len + block_size - 1) / block_size + 3) / 4;
    const int4* const source = reinterpret_cast<const int4*>(table);
    int4* const target = reinterpret_cast<int4*>(block_tables + static_cast<i64>(row) * max_blocks);
    for (int i = threadIdx.x; i < num_vectors; i += kThreads) target[i] = source[i];
}

}  // namespace photon
