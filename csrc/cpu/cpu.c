/*
** cpu.c: the CPU as a backend: its memory, its cache, its threads.  The operations are in the files beside it.  Weights stay where the file put them,
** still quantised; kept values are written straight into the caller's arena.
*/
#include "cpu.h"
#include "../base/mem.h"
#include "../base/threads.h"
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static void cpu_close(ap_dev *d) {
    if (!d) return;
    ap_free(d->scratch); ap_free(d->worker); ap_free(d->cache[0]); ap_free(d->cache[1]);
    ap_free(d);
}

/* One worker's scratch: CPU_GROUP decoded rows of the widest weight, or 16 lanes of one head. */
static size_t cpu_worker_size(const ap_model *m, const ap_weight *w) {
    size_t n = (size_t)CPU_LANES * (size_t)m->h.head;
    for (int i = 0; i < (m->h.layers + 1) * AP_W_N; i++)
        if (w[i].fmt && CPU_GROUP * (size_t)w[i].cols > n) n = CPU_GROUP * (size_t)w[i].cols;
    return (n + 15) & ~(size_t)15;
}

static int cpu_open(ap_dev **out, const ap_model *m, const ap_weight *w, const ap_backend_options *o, ap_err *e) {
    ap_dev *d = ap_alloc(1, sizeof *d);
    if (!d) return ap_fail(e, AP_MEMORY, "no memory for the CPU backend");
    d->m = m; d->w = w; d->o = *o;
    if (d->o.threads < 1) d->o.threads = ap_cores();
    if (d->o.threads > AP_MAX_THREADS) d->o.threads = AP_MAX_THREADS;
    if (d->o.tier < 0) d->o.tier = ap_tier_best();
    d->lanes = &cpu_lanes_of[d->o.tier];
    d->worker_n = cpu_worker_size(m, w);
    d->worker = ap_alloc((uint64_t)d->worker_n * (uint64_t)d->o.threads, sizeof(float));
    if (d->worker) { *out = d; return AP_OK; }
    int rc = ap_fail(e, AP_MEMORY, "no memory for %d threads of %zu values", d->o.threads, d->worker_n);
    cpu_close(d);
    return rc;
}

static size_t cpu_kd(const ap_dev *d) { return (size_t)d->m->h.kv_heads * (size_t)d->m->h.head; }

static int cpu_grow_cache(ap_dev *d, int keys, ap_err *e) {
    if (keys <= d->capacity) return AP_OK;
    int capacity = d->capacity ? d->capacity : 64;
    while (capacity < keys) capacity *= 2;
    size_t row = cpu_kd(d) * sizeof(float), was = (size_t)d->capacity * row, now = (size_t)capacity * row;
    char *grown[2];
    for (int c = 0; c < 2; c++) grown[c] = ap_alloc((uint64_t)d->m->h.layers * (uint64_t)capacity, row);
    if (!grown[0] || !grown[1]) {               /* both or neither: the two share one capacity */
        ap_free(grown[0]); ap_free(grown[1]);
        return ap_fail(e, AP_MEMORY, "no memory for a cache of %d keys", capacity);
    }
    for (int c = 0; c < 2; c++) {
        for (int layer = 0; layer < d->m->h.layers && was; layer++) memcpy(grown[c] + (size_t)layer * now, (char *)d->cache[c] + (size_t)layer * was, was);
        ap_free(d->cache[c]);
        d->cache[c] = (float *)(void *)grown[c];
    }
    d->capacity = capacity;
    return AP_OK;
}

float *cpu_cache(const ap_dev *d, const ap_step *s) {
    int which = ap_stages[s->stage].out == AP_WIRE_VCACHE;
    return d->cache[which] + (size_t)s->layer * (size_t)d->capacity * cpu_kd(d);
}

static int cpu_arena(ap_dev *d, const ap_plan *p, const int32_t *tokens, float *keep, ap_err *e) {
    d->tokens = tokens; d->keep = keep; d->stop = 0;
    AP_TRY(cpu_grow_cache(d, p->pos + p->T, e));
    if (p->scratch_n <= d->scratch_n) return AP_OK;
    ap_free(d->scratch);
    d->scratch_n = 0;
    d->scratch = ap_alloc(p->scratch_n, sizeof(float));
    if (!d->scratch) return ap_fail(e, AP_MEMORY, "no memory for %zu working values", p->scratch_n);
    d->scratch_n = p->scratch_n;
    return AP_OK;
}

static int cpu_put(ap_dev *d, const ap_plan *p, int step, const float *host, ap_err *e) {
    const ap_step *s = &p->s[step];
    size_t bytes = (size_t)s->rows * (size_t)s->cols * sizeof(float);
    (void)e;
    if (s->op == AP_OP_CACHE) memcpy(cpu_cache(d, s), host, bytes);
    if (s->op != AP_OP_CACHE || s->kept) memcpy(cpu_place(d, s), host, bytes);
    return AP_OK;
}

static int cpu_fetch(ap_dev *d, const ap_plan *p, float *keep, ap_err *e) { (void)d; (void)p; (void)keep; (void)e; return AP_OK; }
static const char *cpu_tier(const ap_dev *d) { return ap_tier_name(d->o.tier); }

/* ---- threads ---- */

static int64_t cpu_now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

typedef struct { ap_dev *d; cpu_task task; void *ctx; int n, piece; atomic_int stop; } cpu_job;

static void cpu_piece(void *ctx, int i, int worker) {
    cpu_job *j = ctx;
    if (atomic_load_explicit(&j->stop, memory_order_relaxed)) return;
    if (worker == 0 && j->d->o.poll && cpu_now() - j->d->polled > 20000000) {     /* worker 0 is the caller: signals are looked at every 20 ms */
        j->d->polled = cpu_now();
        if (j->d->o.poll(j->d->o.poll_ctx)) { atomic_store(&j->stop, 1); return; }
    }
    int first = i * j->piece, last = j->n - first > j->piece ? first + j->piece : j->n;
    j->task(j->ctx, first, last, j->d->worker + (size_t)worker * j->d->worker_n);
}

int cpu_split(ap_dev *d, int n, double cost, cpu_task task, void *ctx, ap_err *e) {
    int piece = (int)(65536.0 / (cost > 1 ? cost : 1)) + 1;                       /* a piece is worth tens of microseconds, far more than handing it out */
    piece = (piece + CPU_GROUP - 1) / CPU_GROUP * CPU_GROUP;
    cpu_job j = { .d = d, .task = task, .ctx = ctx, .n = n, .piece = piece };
    ap_pool_run(d->o.threads, n / piece + (n % piece != 0), cpu_piece, &j);
    if (!atomic_load(&j.stop)) return AP_OK;
    return ap_fail(e, AP_INTERRUPTED, "interrupted");
}

const float *cpu_vector(const ap_weight *w, float *buffer) {
    ap_format_row(w->fmt, w->data, w->cols, 0, buffer);
    return buffer;
}

const ap_backend ap_cpu = {
    .name = "cpu", .open = cpu_open, .arena = cpu_arena, .put = cpu_put, .fetch = cpu_fetch, .close = cpu_close, .tier = cpu_tier,
    .op = {
#define O(name, text) [AP_OP_##name] = cpu_##name,
#include "../plan/ops.def"
    },
};
