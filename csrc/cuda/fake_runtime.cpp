/*
** fake_runtime.cpp: the part of the CUDA runtime that device_cuda.cu calls, on the fake device: so every line of device_cuda.cu runs where no GPU is.
**
** CUDA's own header declares the functions, so none can have another signature; the library is therefore built only where that header is.  It refuses what the
** runtime's manual forbids: a copy between memories of other kinds than it says, memory or streams that are not held, a node of another graph, another kernel for
** a node.  A copy from host memory reads it when the stream comes to it, not before, and a stream that has work is not idle at the first question.
*/
#define AP_FAKE_TABLE fake_device
#include "fake.cpp"
#include <cuda_runtime_api.h>
#include <algorithm>

struct CUstream_st { void *of; };
struct CUgraphNode_st { CUgraph_st *graph; ap_launch k; };
struct CUgraph_st { std::vector<CUgraphNode_st *> nodes; };
struct CUgraphExec_st { void *of; CUgraph_st *graph; };

namespace {

std::vector<CUstream_st *> streams;
cudaError_t last;                                       /* what cudaGetLastError gives, once */
int asked;

cudaError_t told(int code) {
    if (code) last = (cudaError_t)code;
    return (cudaError_t)code;
}

bool known(CUstream_st *s) { return std::find(streams.begin(), streams.end(), s) != streams.end(); }

/* Whether all of the bytes are in one piece of device memory, and whether none is in any. */
bool on_device(const void *p, size_t n) {
    for (const memory &m : memories) if ((const char *)p >= m.p && (const char *)p + n <= m.p + m.n) return true;
    return false;
}
bool off_device(const void *p, size_t n) {
    for (const memory &m : memories) if ((const char *)p < m.p + m.mapped && (const char *)p + n > m.p) return false;
    return true;
}

const char *copy_name(cudaMemcpyKind kind) { return kind == cudaMemcpyHostToDevice ? "upload" : kind == cudaMemcpyDeviceToHost ? "fetch" : "move"; }

bool copy_right(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    switch (kind) {
        case cudaMemcpyHostToDevice: return on_device(to, n) && off_device(from, n);
        case cudaMemcpyDeviceToHost: return off_device(to, n) && on_device(from, n);
        case cudaMemcpyDeviceToDevice: return on_device(to, n) && on_device(from, n);
        default: return false;
    }
}

/* A kernel's one argument is copied here; how long it is, only the compiler of a kernel knows: the caller's buffer has AP_ARGS_MAX bytes. */
int launch_of(const void *f, dim3 grid, dim3 block, void **args, size_t shared, ap_launch *k) {
    if (!f || !args || !args[0] || block.x != AP_THREADS || block.y != 1 || block.z != 1 || grid.z != 1) return INVALID;
    memset(k, 0, sizeof *k);
    k->entry = f; k->gx = grid.x; k->gy = grid.y; k->shared = (unsigned)shared; k->meets = 1; k->bytes = AP_ARGS_MAX;
    memcpy(k->args, args[0], AP_ARGS_MAX);
    return OK;
}
int launch_of(const cudaKernelNodeParams *p, ap_launch *k) { return p->extra ? INVALID : launch_of(p->func, p->gridDim, p->blockDim, p->kernelParams, p->sharedMemBytes, k); }

int call(const char *name) { locked hold; return enter_call(name); }

}  // namespace

/* ---- device and memory ---- */

cudaError_t cudaGetDeviceCount(int *n) { return told(fake_device.count(n)); }
cudaError_t cudaSetDevice(int device) { return told(fake_device.select(device, NULL)); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *all, int device) {
    ap_properties p;
    int code = fake_device.select(device, &p);
    if (code) return told(code);
    memset(all, 0, sizeof *all);
    memcpy(all->name, p.name, sizeof p.name);
    all->multiProcessorCount = p.processors; all->totalGlobalMem = p.memory;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) { return told(fake_device.room(free_bytes, all)); }
cudaError_t cudaMalloc(void **p, size_t n) { return told(fake_device.get(p, n)); }
cudaError_t cudaFree(void *p) { return told(p ? fake_device.release(p) : OK); }
cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t stream) {
    return told(known(stream) && on_device(p, n) ? fake_device.fill(p, byte, n, stream->of) : INVALID);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
    int code = call(copy_name(kind));
    if (code) return told(code);
    locked hold;
    if (!known(stream) || !copy_right(to, from, n, kind)) return told(INVALID);
    queue.push_back({ COPY, to, from, {}, n, {} });
    return cudaSuccess;
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    void *of = NULL;
    int code = flags <= cudaStreamNonBlocking ? fake_device.stream_new(&of) : INVALID;
    if (code) return told(code);
    streams.push_back(*stream = new CUstream_st{ of });
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!known(stream)) return told(cudaErrorInvalidResourceHandle);
    int code = fake_device.stream_free(stream->of);
    if (code) return told(code);
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    int code = known(stream) ? fake_device.wait(stream->of) : (int)cudaErrorInvalidResourceHandle;
    locked hold;
    if (code) queue.clear();                            /* what failed is not done later, from host memory that is the caller's again */
    return told(code);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    int yes;
    if (!known(stream)) return told(cudaErrorInvalidResourceHandle);
    if (!queue.empty() && ++asked % 2) return cudaErrorNotReady;
    return told(fake_device.done(stream->of, &yes));
}

/* ---- kernels and graphs ---- */

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    ap_launch k;
    int code = known(stream) ? launch_of(f, grid, block, args, shared, &k) : (int)cudaErrorInvalidResourceHandle;
    return told(code ? code : fake_device.launch(&k, stream->of));
}
cudaError_t cudaGraphCreate(cudaGraph_t *g, unsigned flags) {
    int code = flags ? INVALID : call("graph_new");
    if (!code) { *g = new CUgraph_st; locked hold; handles++; }
    return told(code);
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t *node, cudaGraph_t g, const cudaGraphNode_t *after, size_t n, const cudaKernelNodeParams *p) {
    ap_launch k;
    int code = call("graph_new");
    if (!code) code = launch_of(p, &k);
    /* A chain: this fake runs the nodes in the order in which they came. */
    if (!code && (n != !g->nodes.empty() || (n && after[0] != g->nodes.back()))) code = INVALID;
    if (!code) g->nodes.push_back(*node = new CUgraphNode_st{ g, k });
    return told(code);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long flags) {
    std::vector<ap_launch> k;
    void *of = NULL;
    for (const CUgraphNode_st *node : g->nodes) k.push_back(node->k);
    int code = flags ? INVALID : fake_device.graph_new(&of, k.data(), (int)k.size());
    if (!code) *exec = new CUgraphExec_st{ of, g };
    return told(code);
}
cudaError_t cudaGraphExecKernelNodeSetParams(cudaGraphExec_t exec, cudaGraphNode_t node, const cudaKernelNodeParams *p) {
    ap_launch k;
    int code = launch_of(p, &k);
    const auto &nodes = exec->graph->nodes;
    if (!code && (node->graph != exec->graph || node->k.entry != k.entry)) code = INVALID;
    return told(code ? code : fake_device.graph_set(exec->of, (int)(std::find(nodes.begin(), nodes.end(), node) - nodes.begin()), &k));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return told(known(stream) ? fake_device.graph_run(exec->of, stream->of) : (int)cudaErrorInvalidResourceHandle);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    int code = fake_device.graph_free(exec->of);
    if (!code) delete exec;
    return told(code);
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    for (CUgraphNode_st *node : g->nodes) delete node;
    delete g;
    locked hold;
    handles--;
    return cudaSuccess;
}

/* ---- errors ---- */

cudaError_t cudaGetLastError(void) { cudaError_t was = last; last = cudaSuccess; return was; }
const char *cudaGetErrorString(cudaError_t code) { return fake_error(code); }
EXPORT int ap_fake_last(void) { return last; }
