/*
** device_cuda.cu: the table of device.h from the CUDA runtime, which is linked in statically.  Each function is one call or a few; nothing is decided here.
** Host code only: tests have g++ compile it against a runtime of host memory, fake_runtime.cpp.
*/
#include "device.h"
extern "C" {
#include "../base/mem.h"
}
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

static cudaStream_t rt_stream(void *s) { return (cudaStream_t)s; }

static int rt_count(int *n) { *n = 0; return cudaGetDeviceCount(n); }

static int rt_select(int device, ap_properties *p) {
    cudaDeviceProp all;
    cudaError_t code = cudaSetDevice(device);
    if (code || !p) return code;
    code = cudaGetDeviceProperties(&all, device);
    if (code) return code;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%.127s", all.name);
    p->major = all.major; p->minor = all.minor; p->processors = all.multiProcessorCount; p->memory = all.totalGlobalMem;
    return 0;
}

static int rt_room(size_t *free_bytes, size_t *total) { return cudaMemGetInfo(free_bytes, total); }

static int rt_get(void **p, size_t n) {
    cudaError_t code = cudaMalloc(p, n);
    if (code == cudaErrorMemoryAllocation) (void)cudaGetLastError();       /* not sticky: the context goes on */
    return code;
}

static int rt_release(void *p) { return cudaFree(p); }
static int rt_fill(void *p, int byte, size_t n, void *stream) { return cudaMemsetAsync(p, byte, n, rt_stream(stream)); }
static int rt_upload(void *p, const void *host, size_t n, void *stream) {
    cudaError_t code = cudaMemcpyAsync(p, host, n, cudaMemcpyHostToDevice, rt_stream(stream));
    return code ? code : cudaStreamSynchronize(rt_stream(stream));         /* the host's memory is the caller's again */
}
static int rt_fetch(void *host, const void *p, size_t n, void *stream) { return cudaMemcpyAsync(host, p, n, cudaMemcpyDeviceToHost, rt_stream(stream)); }
static int rt_move(void *to, const void *from, size_t n, void *stream) { return cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, rt_stream(stream)); }

static int rt_launch(const ap_launch *k, void *stream) {
    void *args[] = { (void *)k->args };
    return cudaLaunchKernel(k->entry, dim3(k->gx, k->gy), dim3(AP_THREADS), args, k->shared, rt_stream(stream));
}

static int rt_stream_new(void **stream) {
    cudaStream_t made = NULL;
    cudaError_t code = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    *stream = made;
    return code;
}
static int rt_stream_free(void *stream) { return cudaStreamDestroy(rt_stream(stream)); }
static int rt_wait(void *stream) { return cudaStreamSynchronize(rt_stream(stream)); }
static int rt_done(void *stream, int *yes) {
    cudaError_t code = cudaStreamQuery(rt_stream(stream));
    *yes = code == cudaSuccess;
    return code == cudaErrorNotReady ? cudaSuccess : code;
}

/* ---- graphs: a chain of kernel nodes ---- */

typedef struct { cudaGraph_t graph; cudaGraphExec_t exec; int n; cudaGraphNode_t node[]; } rt_graph;

static cudaKernelNodeParams rt_params(const ap_launch *k, void **args) {
    cudaKernelNodeParams p = {};
    args[0] = (void *)k->args;
    p.func = (void *)k->entry; p.gridDim = dim3(k->gx, k->gy); p.blockDim = dim3(AP_THREADS); p.sharedMemBytes = k->shared; p.kernelParams = args;
    return p;
}

static int rt_graph_free(void *graph) {
    rt_graph *g = (rt_graph *)graph;
    cudaError_t code = cudaSuccess, second = cudaSuccess;
    if (g->exec) code = cudaGraphExecDestroy(g->exec);
    if (g->graph) second = cudaGraphDestroy(g->graph);
    ap_free(g);
    return code ? code : second;
}

static int rt_graph_new(void **graph, const ap_launch *k, int n) {
    rt_graph *g = (rt_graph *)ap_alloc(1, sizeof *g + (size_t)n * sizeof g->node[0]);
    if (!g) return cudaErrorMemoryAllocation;
    g->n = n;
    cudaError_t code = cudaGraphCreate(&g->graph, 0);
    for (int i = 0; i < n && !code; i++) {
        void *args[1];
        cudaKernelNodeParams p = rt_params(&k[i], args);
        code = cudaGraphAddKernelNode(&g->node[i], g->graph, i ? &g->node[i - 1] : NULL, i != 0, &p);
    }
    if (!code) code = cudaGraphInstantiate(&g->exec, g->graph, 0);
    if (code) (void)rt_graph_free(g);
    else *graph = g;
    return code;
}

static int rt_graph_set(void *graph, int i, const ap_launch *k) {
    rt_graph *g = (rt_graph *)graph;
    void *args[1];
    cudaKernelNodeParams p = rt_params(k, args);
    return cudaGraphExecKernelNodeSetParams(g->exec, g->node[i], &p);
}

static int rt_graph_run(void *graph, void *stream) { return cudaGraphLaunch(((rt_graph *)graph)->exec, rt_stream(stream)); }

/* ---- errors ---- */

/* After these the context is gone until the process ends. */
static int rt_lost(int code) {
    static const cudaError_t lost[] = {
        cudaErrorIllegalAddress, cudaErrorLaunchTimeout, cudaErrorHardwareStackError, cudaErrorIllegalInstruction, cudaErrorMisalignedAddress, cudaErrorInvalidAddressSpace,
        cudaErrorInvalidPc, cudaErrorLaunchFailure, cudaErrorAssert, cudaErrorECCUncorrectable, cudaErrorNvlinkUncorrectable, cudaErrorUnknown,
    };
    for (cudaError_t l : lost) if (code == l) return 1;
    return 0;
}
static int rt_full(int code) { return code == cudaErrorMemoryAllocation; }
static const char *rt_error(int code) {
    if (code == cudaErrorInsufficientDriver) return "no NVIDIA driver is installed, or it is too old for this CUDA runtime";     /* CUDA's own words know the second only */
    return cudaGetErrorString((cudaError_t)code);
}

const ap_device cuda_device = {
    "cuda", rt_count, rt_select, rt_room, rt_get, rt_release, rt_fill, rt_upload, rt_fetch, rt_move, rt_launch, rt_stream_new, rt_stream_free, rt_wait, rt_done,
    rt_graph_new, rt_graph_set, rt_graph_run, rt_graph_free, rt_lost, rt_full, rt_error,
};
