// Words of one message, each run to the place that it is for: how the host changes state on the device.
//
//     *(segments[s].address + 4 * i) = words[segments[s].start + i]     i < segments[s].count
//
// Launch: grid (segments), kThreads threads. Preconditions: addresses are multiples of 4; no two segments
// overlap, since nothing orders them. Bound by latency.
#include "photon/dependent_launch.cuh"
#include "photon/types.cuh"

namespace photon {

constexpr int kThreads = 128;

// As photon_grpc/kernels/apply_updates.py packs it.
struct Segment {
    u32* address;
    int start;
    int count;
};
static_assert(sizeof(Segment) == 16, "SEGMENT_DTYPE");

extern "C" __global__ void __launch_bounds__(kThreads)
    apply_updates(const u32* words, const Segment* segments) {
    wait_for_previous();
    let_next_start();
    const Segment segment = segments[blockIdx.x];
    for (int i = threadIdx.x; i < segment.count; i += kThreads) segment.address[i] = words[segment.start + i];
}

}  // namespace photon
