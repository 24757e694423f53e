// Programmatic dependent launch: a kernel that starts while the one before it in the stream still runs.
//
// Every CTA calls `wait_for_previous`. Before that it reads only what no kernel of the stream writes
// (weights, tables), and writes nothing. From there on everything that earlier kernels wrote is visible:
// the one before has finished, and so have those before it, because its CTAs waited too.
// `let_next_start` is a hint that the next grid may take up free room; it promises nothing about data. Before the
// wait it lets several kernels stand in a row, each with its weights requested: no CTA of one starts before all of
// the one before it have said so or are gone, so none takes room that an earlier one still needs.
// Both are empty before sm_90.
#pragma once

namespace photon {

#if __CUDA_ARCH__ >= 900
constexpr bool kOverlaps = true;
#else
constexpr bool kOverlaps = false;
#endif

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace photon
