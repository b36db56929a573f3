/*
** cpu.h: what the CPU's operations share: the device, where a step's value lies, the lanes of a dot product, and the way rows are split over threads.
**
** Arithmetic ("exact"): activations are float32.  A dot product runs in 16 virtual lanes: lane i takes elements i, i+16, i+32 ... in order, each by
** one fused multiply-add, then the lanes are summed by the tree l + (l+8), + (l+4), + (l+2), + (l+1).  Everything else is computed in float64 in a fixed
** order and rounded once to float32.  So the bits do not depend on the tier, the thread count or how tokens were batched.
*/
#ifndef AP_CPU_H
#define AP_CPU_H
#include "../plan/backend.h"
#include "../base/tiers.h"

enum { CPU_LANES = 16, CPU_GROUP = 4 };                     /* lanes of a dot product; weight rows decoded and multiplied together */

typedef struct {
    void (*dot4)(const float *const a[CPU_GROUP], const float *b, int n, float out[CPU_GROUP]);   /* four dot products with one b       */
    void (*axpy)(float *acc, float p, const float *v, int n);                                     /* acc[i] = fma(p, v[i], acc[i])      */
} cpu_lanes;
extern const cpu_lanes cpu_lanes_of[AP_TIER_N];

struct ap_dev {
    const ap_model *m;
    const ap_weight *w;
    ap_backend_options o;
    const cpu_lanes *lanes;
    float *keep, *scratch, *worker;                         /* worker: per thread, CPU_GROUP decoded rows or the lanes of one head      */
    size_t scratch_n, worker_n;
    float *cache[2];                                        /* K and V: [layers][capacity][Kd]                                          */
    int capacity;
    const int32_t *tokens;
    int stop;                                               /* a poll asked to stop                                                     */
    int64_t polled;                                         /* when it was last asked, ns                                               */
};

static inline float *cpu_place(const ap_dev *d, const ap_step *s) { return (s->kept ? d->keep : d->scratch) + s->at; }
float *cpu_cache(const ap_dev *d, const ap_step *s);         /* this layer's rows of the cache that the step writes */
/* The value that step i left; NULL for -1. */
static inline const float *cpu_value(const ap_dev *d, const ap_plan *p, int i) {
    if (i < 0) return NULL;
    return p->s[i].op == AP_OP_CACHE ? cpu_cache(d, &p->s[i]) : cpu_place(d, &p->s[i]);
}
static inline const float *cpu_a(const ap_dev *d, const ap_plan *p, const ap_step *s) { const float *v = cpu_value(d, p, s->a); return v ? v + s->a_col : NULL; }
static inline const float *cpu_b(const ap_dev *d, const ap_plan *p, const ap_step *s) { const float *v = cpu_value(d, p, s->b); return v ? v + s->b_col : NULL; }

/* Calls task(ctx, first, last, worker) over [0, n) in pieces whose size does not matter for the result; cost: operations per item, to size the pieces. */
typedef void (*cpu_task)(void *ctx, int first, int last, float *scratch);
int cpu_split(ap_dev *d, int n, double cost, cpu_task task, void *ctx, ap_err *e);

/* Keys that a query at position `at` may see: [*lo, *hi). */
static inline void cpu_visible(const ap_step *s, int at, int *lo, int *hi) {
    int64_t last = (int64_t)at + s->mask_offset + 1;
    *hi = last < 0 ? 0 : last > s->keys ? s->keys : (int)last;
    *lo = s->window && *hi > s->window ? *hi - s->window : 0;
}
const float *cpu_vector(const ap_weight *w, float *buffer);   /* a one-row weight as float32: in place, or decoded into buffer */

#define O(name, text) int cpu_##name(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e);
#include "../plan/ops.def"
#endif
