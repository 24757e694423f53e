// Boxes of a tensor to shared memory by the tensor copy engine (sm_90 and newer), and the barriers that tell
// of their arrival.
//
// A barrier has phases. A phase is over when its arrivals have come and all bytes that were announced; who waits
// names the parity of the phase, 0 for the first, and sees everything that came. Addresses of shared memory are
// 32-bit.
//
// A box arrives as rows of 128 bytes, eight to a block of 1,024, the 16 bytes c of row r at place c ^ (r % 8):
// as photon/warpgroup_mma.cuh reads it. What of it lies outside of the tensor arrives as zeros, and counts.
#pragma once

#include "photon/types.cuh"

namespace photon {

// What photon_grpc/kernels/tensor_map.py encodes: 128 bytes that only the copy engine reads.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that this thread made are seen by the copy engine and the cluster, once a barrier is behind them.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(u32 barrier) {
    asm volatile("{ .reg .b64 state;\n  mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier)
                 : "memory");
}

// Arrives, and announces bytes that will come.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("{ .reg .b64 state;\n  mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
                     barrier),
                 "r"(bytes)
                 : "memory");
}

// Arrives at the barrier that lies at this address in the CTA of `rank` in the cluster, to say that boxes were
// read. Orders no writes outside of the CTA: that would wait for memory.
__device__ __forceinline__ void arrive_at_peer(u32 barrier, u32 rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "  mapa.shared::cluster.u32 remote, %0, %1;\n"
        "  mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void wait_at(u32 barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile(
            "{ .reg .pred over;\n"
            "  mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "  selp.u32 %0, 1, 0, over; }"
            : "=r"(is_over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (is_over == 0);
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box whose first element has these coordinates, the innermost first.
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int x, int y, int z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// The same to this address in every CTA of the cluster whose bit is set in `ranks`, and to its barrier.
__device__ __forceinline__ void copy_box_to(unsigned short ranks, u32 target, const TensorMap& map, int x, int y,
                                            u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(ranks)
        : "memory");
}

// A box from shared memory to the tensor, one thread for all; what lies outside of the tensor is dropped. Who
// wrote it calls `publish_to_copies` first, and a barrier. `wait_for_box_reads`: what this thread's copies read
// may be written again.
__device__ __forceinline__ void publish_to_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void write_box(const TensorMap& map, int x, int y, u32 source) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(source)
                 : "memory");
}

__device__ __forceinline__ void commit_boxes() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_for_box_reads() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void wait_for_boxes() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace photon
