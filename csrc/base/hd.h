/*
** hd.h: AP_HD marks a function of a header that both compilers share: C for the CPU, nvcc for the GPU, where it exists on host and device.  Such functions
** are plain arithmetic on their arguments, and give the same bits in both places: the GPU build switches contraction off, as the CPU's does.
*/
#ifndef AP_HD_H
#define AP_HD_H
#ifdef __CUDACC__
#define AP_HD static __host__ __device__ inline
#else
#define AP_HD static inline
#endif
#endif
