/*
** cuda.cuh: what the GPU's operations share: the device, where a step's value lies, and how a kernel is launched.  The twin of cpu/cpu.h.
**
** Arithmetic: `exact`, as defined there, and the same bits.  A dot product's 16 lanes are 16 neighbouring threads; float64 elsewhere, by the functions of
** base/math.h; no fused multiply-add that is not written out, no atomics, and no split of a sum that depends on how many tokens or blocks there are.  The one
** thing that may differ is which NaN a NaN is: the GPU has only one.
*/
#ifndef AP_CUDA_CUH
#define AP_CUDA_CUH
#include "../base/math.h"
extern "C" {
#include "../base/mem.h"
#include "plugin.h"
}
#include "kernel.cuh"

#ifdef AP_CUDA_FAULTS
#include "faults.cuh"
#else
#define AP_FAULT(args, name) 0                          /* the library that is shipped holds no fault */
#define AP_FAULT_FIELD
#define AP_FAULT_SET(args, d, s)
#define AP_FAULT_AT(d, name, stage) 0
#endif

typedef struct { const uint8_t *data; int64_t cols, rows; int pairs, format; } cuda_weight;  /* on the device, as the file has it */
typedef struct { float *p; size_t n; char *base; const char *what; } cuda_buffer;           /* n: bytes between the guards */
typedef struct cuda_store cuda_store;                   /* a model's weights on the device, shared by its runs */

struct ap_dev {
    const ap_model *m;
    ap_backend_options o;
    const ap_device *api;
    void *stream;
    cuda_store *store;
    cuda_buffer keep, scratch, tokens, cache[2];
    size_t keep_n;                                      /* bytes of keep that the last plan uses */
    int capacity;                                       /* keys in cache                                      */
    int drawing;                                        /* launches are collected for a graph, not run        */
    ap_launch *node; int nnodes, room;                  /* collected since the request began                  */
    ap_launch *drawn; int ndrawn, drawn_room; void *graph;  /* what the graph was made of                     */
    int launched, graphed;                              /* kernels of the last request: one by one, by the graph */
    int stage, layer;                                   /* breadcrumb: the step whose kernel was launched last */
    int64_t polled;
    char tier[192], path[128];
};

int cuda_failed(ap_dev *d, int code, const char *what, ap_err *e);      /* an error of the device as ours; 0 stays 0 */
#define CUDA_TRY(d, call, e) do { int code_ = (d)->api->call; if (code_) return cuda_failed(d, code_, #call, e); } while (0)
const char *cuda_stage_name(int stage);

static inline float *cuda_place(const ap_dev *d, const ap_step *s) { return (s->kept ? d->keep.p : d->scratch.p) + s->at; }
float *cuda_cache(const ap_dev *d, const ap_step *s);   /* this layer's rows of the cache that the step writes */
static inline const float *cuda_input(const ap_dev *d, const ap_plan *p, int i) {
    if (i < 0) return NULL;
    return p->s[i].op == AP_OP_CACHE ? cuda_cache(d, &p->s[i]) : cuda_place(d, &p->s[i]);
}
static inline const float *cuda_a(const ap_dev *d, const ap_plan *p, const ap_step *s) { const float *v = cuda_input(d, p, s->a); return v ? v + s->a_col : NULL; }
static inline const float *cuda_b(const ap_dev *d, const ap_plan *p, const ap_step *s) { const float *v = cuda_input(d, p, s->b); return v ? v + s->b_col : NULL; }
cuda_weight cuda_weight_of(const ap_dev *d, int slot);
const float *cuda_vector(const ap_dev *d, int slot);    /* a norm weight or bias; slot -1: NULL */

/* Runs or collects one launch.  The first kernel of a request that is no graph is run at once; those of a graph when all are known. */
int cuda_submit(ap_dev *d, const ap_launch *k, ap_err *e);
template <typename Args>
int cuda_start(ap_dev *d, const ap_step *s, const void *entry, int64_t gx, int64_t gy, size_t shared, int meets, Args a, ap_err *e) {
    static_assert(sizeof(Args) <= AP_ARGS_MAX, "a kernel's argument must fit a launch");
    if (gx < 1 || gy < 1) return AP_OK;
    ap_launch k;
    memset(&k, 0, sizeof k);                            /* padding too: launches are compared byte by byte */
    AP_FAULT_SET(a, d, s);
    k.entry = entry; k.gx = (unsigned)gx; k.gy = (unsigned)gy; k.shared = (unsigned)shared; k.meets = meets; k.stage = s->stage; k.layer = s->layer; k.bytes = sizeof a;
    memcpy(k.args, &a, sizeof a);
    return cuda_submit(d, &k, e);
}
/* One thread for each of n elements. */
#define CUDA_EACH(d, s, Args, kernel, n, a, e) cuda_start(d, s, AP_ENTRY(Args, kernel), ((int64_t)(n) + AP_THREADS - 1) / AP_THREADS, 1, 0, 0, a, e)

/* Keys that a query at position `at` may see: [*lo, *hi). */
typedef struct { int mask_offset, window, keys; } cuda_mask;
static inline cuda_mask cuda_mask_of(const ap_step *s) { cuda_mask m = { s->mask_offset, s->window, s->keys }; return m; }
AP_KFUN void cuda_visible(const cuda_mask &m, int at, int *lo, int *hi) {
    int64_t last = (int64_t)at + m.mask_offset + 1;
    *hi = last < 0 ? 0 : last > m.keys ? m.keys : (int)last;
    *lo = m.window && *hi > m.window ? *hi - m.window : 0;
}
AP_KFUN int64_t cuda_thread() { return (int64_t)blockIdx.x * AP_THREADS + threadIdx.x; }

#define O(name, text) int cuda_##name(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e);
#include "../plan/ops.def"
#endif
