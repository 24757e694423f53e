// The CTAs that share one row: a thread block cluster, or one CTA alone where PHOTON_CLUSTER is 1.
//
// The cluster size comes from Python as -D PHOTON_CLUSTER=n, up to 8. Before sm_90 there are no
// clusters: it is 1 there, and a launch of any other variant would be wrong.
// Grid: (PHOTON_CLUSTER, rows), so that blockIdx.x is the rank in the cluster and blockIdx.y the row.
#pragma once

#ifndef PHOTON_CLUSTER
#error "PHOTON_CLUSTER must be defined"
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#undef PHOTON_CLUSTER
#define PHOTON_CLUSTER 1
#endif

namespace photon {

constexpr int kCluster = PHOTON_CLUSTER;
static_assert(1 <= kCluster && kCluster <= 8, "portable cluster sizes");

#if PHOTON_CLUSTER > 1
#define PHOTON_ROW_CLUSTER __cluster_dims__(PHOTON_CLUSTER, 1, 1)
#else
#define PHOTON_ROW_CLUSTER
#endif

// Arrive and wait are separate so that work may stand between them. What a thread wrote before arriving,
// here or in a peer's shared memory, is seen by every thread that has waited. Threads that have exited
// are not waited for.
__device__ __forceinline__ void cluster_arrive() {
#if PHOTON_CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Arrives without a word on what was written: to know that all CTAs run. A wait follows as ever.
__device__ __forceinline__ void cluster_announce() {
#if PHOTON_CLUSTER > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if PHOTON_CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The same shared variable in the CTA of `rank`, as a generic pointer.
template <typename T>
__device__ __forceinline__ T* peer(T* shared, int rank) {
#if PHOTON_CLUSTER > 1
    unsigned long long address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<unsigned long long>(shared)), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    return shared;
#endif
}

}  // namespace photon
