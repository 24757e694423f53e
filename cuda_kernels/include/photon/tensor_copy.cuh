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

// For a box that is read once, so that it does not push others' out of L2.
constexpr u64 kReadOnce = 0x12F0000000000000;

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

// The same place in shared memory of the CTA of `rank` in the cluster.
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Arrives at the barrier that lies at this address in the CTA of `rank`, to say that boxes were read. Orders no
// writes outside of the CTA: a release in the cluster is a fence of the whole GPU, half a microsecond each time.
__device__ __forceinline__ void arrive_at_peer(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_address(barrier, rank)) : "memory");
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

// What others in the cluster stored, counted by the barrier, is seen behind this.
__device__ __forceinline__ void wait_for_stores(u32 barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile(
            "{ .reg .pred over;\n"
            "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
            "  selp.u32 %0, 1, 0, over; }"
            : "=r"(is_over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (is_over == 0);
}

// Sixteen bytes to shared memory of any CTA of the cluster, counted by a barrier of the same CTA.
__device__ __forceinline__ void store_counted(u32 target, u32 barrier, const float (&values)[4]) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
                 :
                 : "r"(target), "r"(barrier), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
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

// The same with what L2 is to make of it, of two and of five dimensions.
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int x, int y, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int c0, int c1, int c2, int c3, int c4,
                                         u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(target),
        "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "l"(policy)
        : "memory");
}

// A box to this address in every CTA of the cluster whose bit is set in `ranks`, and to its barrier.
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
