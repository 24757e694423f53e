// Bulk tensor copies of sm_90: one thread has the copy engine bring a box of a tensor to shared memory, and
// an mbarrier counts its bytes. Everything here is for that architecture alone.
//
// The tensor map (photon_grpc/kernels/tensor_map.py) is a `const __grid_constant__ TensorMap` parameter. Boxes
// of 64 16-bit values by rows come in the 128-byte swizzle that photon/warpgroup_mma.cuh reads; what lies
// outside of the tensor arrives as zeros, and counts.
//
// Barriers and boxes are given by their addresses in shared memory, those in other CTAs of the cluster by `peer`
// of them. A barrier's phases are waited for by their parity, the first is 0.
#pragma once

#include "photon/types.cuh"

namespace photon {

struct alignas(64) TensorMap {
    u64 words[16];
};

// For a box that is read once, so that it does not push others' out of L2.
constexpr u64 kReadOnce = 0x12F0000000000000;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Behind init_barrier: copies that this thread starts see the barriers, and who has synchronised with it does.
__device__ __forceinline__ void publish_barriers() {
    asm volatile(
        "fence.mbarrier_init.release.cluster;\n"
        "fence.proxy.async.shared::cta;" ::
            : "memory");
}

// Arrives, and has the phase wait for this many bytes more.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes)
                 : "memory");
}

// The same place in shared memory of the CTA of `rank`.
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// `barrier` in any CTA of the cluster: this thread has read what copies brought. Says nothing of what it wrote,
// since a release in the cluster is a fence of the whole GPU, half a microsecond each time.
__device__ __forceinline__ void arrive_at(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// What copies brought that the barrier counted is seen behind this.
__device__ __forceinline__ void wait_for_copies(u32 barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile(
            "{ .reg .pred over;\n"
            "  mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "  selp.u32 %0, 1, 0, over; }"
            : "=r"(is_over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!is_over);
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
    } while (!is_over);
}

// Sixteen bytes to shared memory of any CTA of the cluster, counted by a barrier of the same CTA.
__device__ __forceinline__ void store_counted(u32 target, u32 barrier, const float (&values)[4]) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
                 :
                 : "r"(target), "r"(barrier), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
}

// A box of a map of two dimensions, the innermost coordinate first.
__device__ __forceinline__ void copy_box(u32 target, u32 barrier, const TensorMap& map, int c0, int c1,
                                         u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%2, {%3, %4}], [%1], %5;"
        :
        : "r"(target), "r"(barrier), "l"(&map), "r"(c0), "r"(c1), "l"(policy)
        : "memory");
}

// Of five dimensions.
__device__ __forceinline__ void copy_box(u32 target, u32 barrier, const TensorMap& map, int c0, int c1, int c2,
                                         int c3, int c4, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%2, {%3, %4, %5, %6, %7}], [%1], %8;"
        :
        : "r"(target), "r"(barrier), "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}

// To the same place in every CTA of `ranks`, a bit for each, and counted by each one's barrier.
__device__ __forceinline__ void copy_box_to_all(u32 target, u32 barrier, const TensorMap& map, int c0, int c1,
                                                unsigned short ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%2, {%3, %4}], [%1], %5;"
        :
        : "r"(target), "r"(barrier), "l"(&map), "r"(c0), "r"(c1), "h"(ranks)
        : "memory");
}

// The same of this CTA alone.
__device__ __forceinline__ void copy_box(u32 target, u32 barrier, const TensorMap& map, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%2, {%3, %4}], [%1];"
        :
        : "r"(target), "r"(barrier), "l"(&map), "r"(c0), "r"(c1)
        : "memory");
}

}  // namespace photon
