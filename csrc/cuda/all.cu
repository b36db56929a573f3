/*
** all.cu: the whole library in one translation unit, in reading order; with it are linked base/err.c, base/mem.c and, where no GPU is wanted, fake.cpp.
*/
#include "elementwise.cu"
#include "norm.cu"
#include "matmul.cu"
#include "rope.cu"
#include "attention.cu"
#include "cuda.cu"
#ifdef __CUDACC__
#include "device_cuda.cu"
#endif
