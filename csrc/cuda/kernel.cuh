/*
** kernel.cuh: the language of the kernels: CUDA, less whatever a host compiler cannot be taught in a page.  nvcc sees CUDA; g++ sees the same words, and fake.cpp
** runs each thread of a block in turn up to its next meeting point.  The rules that make this possible, which the fake checks:
**
**   - one argument, a struct by value; blocks of AP_THREADS threads; the only shared memory is ap_shared, whose size is the launch's
**   - __syncthreads and the shuffles are meeting points: all threads of a block come to each of them, in the same order
**   - shuffles stay within the 16 lanes of a dot product
**   - no atomics, no printf, no recursion; fused multiply-adds are written out (the build has -fmad=false, as the CPU's has -ffp-contract=off)
*/
#ifndef AP_KERNEL_CUH
#define AP_KERNEL_CUH
#include "device.h"
#include <math.h>

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char ap_shared[];
#define AP_KFUN static __device__ __forceinline__
#define AP_ENTRY(Args, ...) ((const void *)(void (*)(Args))__VA_ARGS__)
template <typename V> AP_KFUN V ap_lane_down(V v, int by) { return __shfl_down_sync(0xffffffffu, v, by, 16); }
#else
struct ap_index { unsigned x, y; };
extern ap_index threadIdx, blockIdx, gridDim, blockDim;
extern unsigned char *ap_shared;
void ap_fake_meet(int place);
void *ap_fake_exchange(const void *v, size_t n, int by, int place);     /* of the thread `by` lanes up, or one's own where there is none */
#define __global__ static
#define AP_KFUN static inline
#define __launch_bounds__(n)
#define __syncthreads() ap_fake_meet(__LINE__)
#define __fmaf_rn fmaf
template <typename V> static inline V ap_lane_down_at(V v, int by, int place) { return *(V *)ap_fake_exchange(&v, sizeof v, by, place); }
#define ap_lane_down(v, by) ap_lane_down_at(v, by, __LINE__)
template <typename Args, void (*Kernel)(const Args)> static void ap_enter(const void *args) { Kernel(*(const Args *)args); }
#define AP_ENTRY(Args, ...) ((const void *)&ap_enter<Args, __VA_ARGS__>)
#endif

static constexpr int AP_LANES = 16;                              /* virtual lanes of a dot product: DESIGN of the arithmetic in cpu/cpu.h */

/* The fixed tree l + (l+8), + (l+4), + (l+2), + (l+1); lane 0 has the sum. */
template <typename V> AP_KFUN V ap_lane_tree(V v) {
    for (int half = AP_LANES / 2; half; half /= 2) v += ap_lane_down(v, half);
    return v;
}
#endif
