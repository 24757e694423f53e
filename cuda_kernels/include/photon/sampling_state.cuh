// What a sequence asks of the sampler, as photon_grpc/kernels/sampling.py packs it; the PHOTON_ macros come
// from there.
#pragma once

#include "photon/row_select.cuh"

namespace photon {

// What a sequence asks for: written by the host when it takes a slot, never by a kernel.
struct SlotParams {
    u32* marks;           // [vocab] or null, see below
    double top_p;         // 1 and above: off
    u32 flags;
    float temperature;
    int top_k;            // 0: off
    u32 floor_key;        // bits of -s of the lowest s that may be drawn
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    u32 seed_low;
    u32 seed_high;
    u32 index;
    int min_tokens;
    int num_biases;
    int top_logprobs;     // -1: none asked for
    u32 padding;
};
static_assert(sizeof(SlotParams) == PHOTON_SLOT_BYTES, "packed by photon_grpc/kernels/sampling.py");

// Bits of `flags`.
constexpr u32 kGreedy = PHOTON_FLAG_GREEDY;
constexpr u32 kRepetition = PHOTON_FLAG_REPETITION;
constexpr u32 kCounted = PHOTON_FLAG_COUNTED;
constexpr u32 kAllowedOnly = PHOTON_FLAG_ALLOWED_ONLY;
constexpr u32 kBan = PHOTON_FLAG_BAN;

// One word per vocabulary entry, for sequences that ask for anything that differs by entry: how often the
// entry is in the output, and what else is to be done to it.
constexpr u32 kMarkCount = PHOTON_MARK_COUNT;
constexpr u32 kMarkSeen = PHOTON_MARK_SEEN;
constexpr u32 kMarkAllowed = PHOTON_MARK_ALLOWED;
constexpr u32 kMarkBanned = PHOTON_MARK_BANNED;
constexpr u32 kMarkBiased = PHOTON_MARK_BIASED;


}  // namespace photon
