/*
** sums.c: four dot products side by side in the lanes of a vector, each of them added in its own order and by nobody else, so no bit depends on the number of
** threads or on the instruction set.  It owns the three loops that are too slow in NumPy and refuses whatever needs to know a model.  py/measure.c calls it.
**
** Each fused multiply-add rounds the running sum S once: variance step(S)^2 / 12.  The exact form walks over all partial sums; the cheap one knows them at the
** ends of segments and takes a random walk between, pinned at both ends.
*/
#include "sums.h"
#include <math.h>
#include <string.h>
#include "../base/mem.h"
#include "../base/threads.h"
#include "../base/tiers.h"

enum { SUMS_WIDE = 4, SUMS_CHUNK = 64 };
typedef double  sums_v __attribute__((vector_size(8 * SUMS_WIDE)));
typedef int64_t sums_l __attribute__((vector_size(8 * SUMS_WIDE)));
#define SUMS_INLINE static inline __attribute__((always_inline))
#define SUMS_EXPONENT(e) ((int64_t)(e) << 52)

/* Relative variance of one float32 rounding, averaged over log-uniform mantissas: (1/3) E[(ulp / 2y)^2] = 0.18 u^2 with u = 2^-24. */
static const double sums_mean_rounding = 0.18 * 0x1p-48;

/* Add 12 times the variance of rounding y to float32, where `where` is all ones.  The step is 2^(e - 24), e as frexp counts, from 2^-149 up; below half a step
** the result is 0 and the error -y, which is not uniform. */
SUMS_INLINE void sums_rounding(const sums_v *y, const sums_l *where, sums_v *twelve) {
    sums_l size = (sums_l)*y & INT64_MAX, top = size & SUMS_EXPONENT(0x7FF), small = top < SUMS_EXPONENT(1022 - 125);
    top = (top & ~small) | (SUMS_EXPONENT(1022 - 125) & small);
    sums_v step = (sums_v)(top - SUMS_EXPONENT(23)), half = (sums_v)(top - SUMS_EXPONENT(24)), even = step * step, own = *y * *y * 12.0;
    sums_l tiny = ((sums_v)size < half) & (own < even);
    *twelve += (sums_v)((((sums_l)own & tiny) | ((sums_l)even & ~tiny)) & *where);
}

/* The fixed tree over lanes: l with l + half, halving; every sum of it is rounded. */
SUMS_INLINE void sums_tree(sums_v *s, int lanes, sums_v *twelve) {
    const sums_l all = (sums_l){ 0 } - 1;
    for (int half = lanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) { s[i] += s[i + half]; sums_rounding(&s[i], &all, twelve); }
}

/* --- from every partial sum ------------------------------------------------------------------------------------------------------------ */

typedef struct { const double *x[SUMS_WIDE], *wide[SUMS_WIDE]; const float *w[SUMS_WIDE]; int n; } sums_rows;

static void sums_find(const ap_dots *d, const int64_t *flat, int n, sums_rows *r) {
    *r = (sums_rows){ .n = n };
    for (int j = 0; j < n; j++) {
        uint64_t i = (uint64_t)flat[j], row = i / d->n, column = (row / d->t * d->n + i % d->n) * d->k;
        r->x[j] = d->x + row * d->k;
        if (d->w) r->w[j] = d->w + column; else r->wide[j] = d->wide + column;
    }
}

/* Products first .. first + m - 1 of each row, side by side; rows that are missing give products of 0, which round nothing. */
SUMS_INLINE void sums_products(const sums_rows *r, uint64_t first, int m, double p[][SUMS_WIDE]) {
    for (int j = 0; j < r->n; j++) {
        const double *x = r->x[j] + first;
        if (r->w[j]) for (int i = 0; i < m; i++) p[i][j] = x[i] * (double)r->w[j][first + (uint64_t)i];
        else for (int i = 0; i < m; i++) p[i][j] = x[i] * r->wide[j][first + (uint64_t)i];
    }
}

/* One chain per lane, from 0, over products first .. end - 1. */
SUMS_INLINE void sums_chains(const sums_rows *r, uint64_t first, uint64_t end, int lanes, sums_v *s, sums_v *squares, sums_v *twelve) {
    double p[SUMS_CHUNK][SUMS_WIDE] = { { 0 } };
    memset(s, 0, (size_t)lanes * sizeof *s);
    for (uint64_t at = first; at < end; at += SUMS_CHUNK) {                     /* a chunk holds every lane equally often */
        int m = end - at < SUMS_CHUNK ? (int)(end - at) : SUMS_CHUNK;
        sums_products(r, at, m, p);
        for (int i = 0; i < m; i++) {
            sums_v product, *sum = &s[i & (lanes - 1)];
            memcpy(&product, p[i], sizeof product);
            sums_l rounded = product != 0.0;
            *sum += product;
            *squares += product * product;
            sums_rounding(sum, &rounded, twelve);
        }
    }
}

SUMS_INLINE double sums_larger(double a, double b) { return isnan(a) || a > b ? a : b; }        /* NaN if one is */

SUMS_INLINE void sums_exact_all(const ap_dots *d, const int64_t *flat, int n, double *out) {
    const sums_l all = (sums_l){ 0 } - 1;
    uint64_t block = d->lanes || !d->block || d->block > d->k ? d->k : d->block;
    sums_v s[AP_MAX_LANES], twelve = { 0 }, squares = { 0 }, total = { 0 };
    sums_rows r;
    sums_find(d, flat, n, &r);
    for (uint64_t first = 0; first < d->k; first += block) {
        uint64_t end = d->k - first < block ? d->k : first + block;
        sums_chains(&r, first, end, d->lanes ? d->lanes : 1, s, &squares, &twelve);
        if (d->lanes) sums_tree(s, d->lanes, &twelve);
        total += s[0];
        if (first) sums_rounding(&total, &all, &twelve);
    }
    for (int j = 0; j < n; j++) {
        out[j] = twelve[j] / 12.0;
        if (!d->lanes && !d->block) out[j] = sums_larger(out[j], sums_mean_rounding * ((double)d->k / 2) * squares[j]);
    }
}

/* --- from the ends of segments --------------------------------------------------------------------------------------------------------- */

/* A segment of one row of x: how many of its products are not 0, and what follows from that. */
typedef struct { double m, inverse, path, spread; } sums_weight;
typedef struct {
    const ap_dots *d;
    const double *x;                            /* rows in the order of the segments                               */
    sums_weight *weight;                        /* [b, t, segments]                                                */
    uint64_t segments, block, panels;           /* panels of SUMS_WIDE columns in a matrix                         */
    double *panel;                              /* [threads, k, SUMS_WIDE]                                         */
    double *out;
    int tier;
} sums_plan;

/* Length of segment i: a lane, or a piece of a block. */
static inline uint64_t sums_length(const sums_plan *p, uint64_t i) {
    const ap_dots *d = p->d;
    if (d->lanes) return i < d->k ? (d->k - i + (uint64_t)d->lanes - 1) / (uint64_t)d->lanes : 0;
    uint64_t per = (p->block + AP_SEGMENT - 1) / AP_SEGMENT, from = i % per * AP_SEGMENT, left = d->k - i / per * p->block;
    if (left > p->block) left = p->block;
    return left - from < AP_SEGMENT ? left - from : AP_SEGMENT;
}

/* Where element i of a row in the order of the segments comes from is a walk: lane 0's elements, lane 1's, ... */
#define SUMS_WALK(d, i, from) \
    for (uint64_t lane_ = 0, step_ = (d)->lanes ? (uint64_t)(d)->lanes : 1, i = 0; lane_ < step_; lane_++) for (uint64_t from = lane_; from < (d)->k; from += step_, i++)

static void sums_pack(const ap_dots *d, uint64_t b, uint64_t column, int n, double (*panel)[SUMS_WIDE]) {
    if (n < SUMS_WIDE) memset(panel, 0, (size_t)d->k * sizeof *panel);
    for (int j = 0; j < n; j++) {
        uint64_t row = (b * d->n + column + (uint64_t)j) * d->k;
        if (d->w) SUMS_WALK(d, i, from) panel[i][j] = d->w[row + from];
        else SUMS_WALK(d, i, from) panel[i][j] = d->wide[row + from];
    }
}

/* Variance of a chain of m additions from `start`: with end - start = sum and q the sum of squared products, the mean path is start + (k/m) sum, and a walk
** pinned at both ends has variance s2 k (m - k) / m around it, s2 = q/m - (sum/m)^2; summed over k = 1 .. m. */
SUMS_INLINE void sums_segment(const sums_weight *c, const sums_v *start, const sums_v *sum, const sums_v *q, sums_v *left) {
    sums_v mean = *sum * c->inverse, spread = *q * c->inverse - mean * mean;
    spread = (sums_v)((sums_l)spread & ~(sums_l)(spread < 0.0));
    *left += sums_mean_rounding * (*start * *start * c->m + *start * *sum * (c->m + 1) + *sum * *sum * c->path + spread * c->spread);
}

/* One token against a panel of columns. */
SUMS_INLINE void sums_estimate_one(const sums_plan *p, uint64_t row, const double (*panel)[SUMS_WIDE], int n, double *out) {
    const sums_l all = (sums_l){ 0 } - 1;
    const ap_dots *d = p->d;
    const double *x = p->x + row * d->k;
    const sums_weight *weight = p->weight + row * p->segments;
    sums_v ends[AP_MAX_LANES], left = { 0 }, twelve = { 0 }, squares = { 0 }, start = { 0 }, total = { 0 };
    uint64_t at = 0;
    for (uint64_t i = 0; i < p->segments; i++) {
        sums_v sum = { 0 }, q = { 0 };
        for (uint64_t end = at + sums_length(p, i); at < end; at++) {
            sums_v product;
            memcpy(&product, panel[at], sizeof product);
            product *= x[at];
            sum += product;
            q += product * product;
        }
        sums_segment(&weight[i], &start, &sum, &q, &left);
        squares += q;
        if (d->lanes) { ends[i] = sum; continue; }
        start += sum;
        if (at % p->block && at < d->k) continue;
        total += start;
        start = (sums_v){ 0 };
        if (at > p->block) sums_rounding(&total, &all, &twelve);
    }
    if (d->lanes) sums_tree(ends, d->lanes, &twelve);
    left += twelve / 12.0;
    for (int j = 0; j < n; j++) out[j] = d->lanes || d->block ? left[j] : sums_larger(left[j], sums_mean_rounding * ((double)d->k / 2) * squares[j]);
}

SUMS_INLINE void sums_estimate_all(const sums_plan *p, uint64_t b, uint64_t column, int n, const double (*panel)[SUMS_WIDE]) {
    for (uint64_t row = b * p->d->t; row < (b + 1) * p->d->t; row++) sums_estimate_one(p, row, panel, n, p->out + row * p->d->n + column);
}

/* --- bits ------------------------------------------------------------------------------------------------------------------------------ */

/* Sixteen lanes have a loop of their own, with a length that the compiler knows. */
SUMS_INLINE float sums_lane_dot(const float *x, const float *w, uint64_t k, int lanes) {
    float s[AP_MAX_LANES] = { 0 };
    uint64_t i = 0;
    if (lanes == 16) for (; k - i >= 16; i += 16) for (int l = 0; l < 16; l++) s[l] = __builtin_fmaf(x[i + (uint64_t)l], w[i + (uint64_t)l], s[l]);
    for (; i < k; i++) s[i & (uint64_t)(lanes - 1)] = __builtin_fmaf(x[i], w[i], s[i & (uint64_t)(lanes - 1)]);
    for (int half = lanes / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

/* --- the same source for each tier: more lanes in a register, the same operations in the same order -------------------------------------- */

typedef struct {
    void (*exact)(const ap_dots *, const int64_t *, int, double *);
    void (*estimate)(const sums_plan *, uint64_t, uint64_t, int, const double (*)[SUMS_WIDE]);
    float (*lane_dot)(const float *, const float *, uint64_t, int);
} sums_kernels;
#define SUMS_TIER(tier, target) \
    target static void sums_exact_##tier(const ap_dots *d, const int64_t *flat, int n, double *out) { sums_exact_all(d, flat, n, out); } \
    target static void sums_estimate_##tier(const sums_plan *p, uint64_t b, uint64_t column, int n, const double (*panel)[SUMS_WIDE]) { sums_estimate_all(p, b, column, n, panel); } \
    target static float sums_lane_dot_##tier(const float *x, const float *w, uint64_t k, int lanes) { return sums_lane_dot(x, w, k, lanes); }
SUMS_TIER(generic, )
#if defined(__x86_64__)
SUMS_TIER(avx2, AP_TARGET_AVX2)
#endif
static const sums_kernels sums_of[AP_TIER_N] = {
#define T(name, cond) [AP_TIER_##name] = { sums_exact_##name, sums_estimate_##name, sums_lane_dot_##name },
#include "../base/tiers.def"
};

/* --- all of them ----------------------------------------------------------------------------------------------------------------------- */

static int sums_tasks(uint64_t n, int size, int *tasks, ap_err *e) {
    uint64_t found = n / (uint64_t)size + (n % (uint64_t)size != 0);
    if (found > INT32_MAX) return ap_fail(e, AP_ARGUMENT, "%llu dot products are too many for one call", (unsigned long long)n);
    *tasks = (int)found;
    return AP_OK;
}

typedef struct { const ap_dots *d; const int64_t *flat; uint64_t count; double *out; int tier; } sums_exact_job;

static void sums_exact_task(void *ctx, int i, int worker) {
    const sums_exact_job *j = ctx;
    uint64_t first = (uint64_t)i * SUMS_WIDE, left = j->count - first;
    (void)worker;
    sums_of[j->tier].exact(j->d, j->flat + first, left < SUMS_WIDE ? (int)left : SUMS_WIDE, j->out + first);
}

int ap_sums_exact(const ap_dots *d, const int64_t *flat, uint64_t count, int threads, double *out, ap_err *e) {
    sums_exact_job j = { d, flat, count, out, ap_tier_best() };
    int tasks = 0;
    AP_TRY(sums_tasks(count, SUMS_WIDE, &tasks, e));
    ap_pool_run(threads ? threads : ap_cores(), tasks, sums_exact_task, &j);
    return AP_OK;
}

static void sums_estimate_task(void *ctx, int i, int worker) {
    const sums_plan *p = ctx;
    const ap_dots *d = p->d;
    uint64_t b = (uint64_t)i / p->panels, column = (uint64_t)i % p->panels * SUMS_WIDE;
    int n = d->n - column < SUMS_WIDE ? (int)(d->n - column) : SUMS_WIDE;
    double (*panel)[SUMS_WIDE] = (double (*)[SUMS_WIDE])(p->panel + (uint64_t)worker * d->k * SUMS_WIDE);
    sums_pack(d, b, column, n, panel);
    sums_of[p->tier].estimate(p, b, column, n, (const double (*)[SUMS_WIDE])panel);
}

/* Products that are exactly 0 add nothing, and they are counted by x alone. */
static void sums_weigh(sums_plan *p) {
    const ap_dots *d = p->d;
    const double *x = p->x;
    sums_weight *c = p->weight;
    for (uint64_t row = 0; row < d->b * d->t; row++)
        for (uint64_t i = 0; i < p->segments; i++, c++) {
            uint64_t m = 0;
            for (uint64_t left = sums_length(p, i); left; left--) m += *x++ != 0.0;
            double v = m ? (double)m : 1.0;
            *c = (sums_weight){ v, 1.0 / v, (v + 1) * (2 * v + 1) / (6.0 * v), (v * v - 1) / 6.0 };
        }
}

static void sums_reorder(const ap_dots *d, double *x) {
    for (uint64_t row = 0; row < d->b * d->t; row++) SUMS_WALK(d, i, from) x[row * d->k + i] = d->x[row * d->k + from];
}

int ap_sums_estimate(const ap_dots *d, int threads, double *out, ap_err *e) {
    uint64_t block = d->block && d->block < d->k ? d->block : d->k, rows = d->b * d->t, whole = block ? d->k / block : 0, rest = block ? d->k % block : 0;
    uint64_t segments = d->lanes ? (uint64_t)d->lanes : whole * ((block + AP_SEGMENT - 1) / AP_SEGMENT) + (rest + AP_SEGMENT - 1) / AP_SEGMENT;
    uint64_t panels = d->n / SUMS_WIDE + (d->n % SUMS_WIDE != 0);
    int tasks = 0, failed = 0;
    memset(out, 0, rows * d->n * sizeof *out);
    if (!rows || !d->n || !d->k) return AP_OK;
    AP_TRY(sums_tasks(d->b * panels, 1, &tasks, e));
    if (!threads) threads = ap_cores();
    if (threads > AP_MAX_THREADS) threads = AP_MAX_THREADS;
    if (threads > tasks) threads = tasks;
    sums_plan p = { d, d->x, ap_alloc(rows * segments, sizeof *p.weight), segments, block, panels, ap_alloc(d->k * SUMS_WIDE, (uint64_t)threads * sizeof *p.panel), out, ap_tier_best() };
    double *x = d->lanes ? ap_alloc(rows * d->k, sizeof *x) : NULL;
    if (!p.weight || !p.panel || (d->lanes && !x)) {
        failed = ap_fail(e, AP_MEMORY, "no memory for the segments of %llu sums", (unsigned long long)(rows * d->n));
    } else {
        if (x) { sums_reorder(d, x); p.x = x; }
        sums_weigh(&p);
        ap_pool_run(threads, tasks, sums_estimate_task, &p);
    }
    ap_free(x);
    ap_free(p.weight);
    ap_free(p.panel);
    return failed;
}

typedef struct { const ap_lanes *d; const int64_t *flat; uint64_t count, panels; float *out; int tier; } sums_lanes_job;

static float sums_at(const sums_lanes_job *j, uint64_t row, uint64_t column) {
    const ap_lanes *d = j->d;
    return sums_of[j->tier].lane_dot(d->x + row * d->k, d->w + (row / d->t * d->n + column) * d->k, d->k, d->lanes);
}

static void sums_flat_task(void *ctx, int i, int worker) {
    const sums_lanes_job *j = ctx;
    (void)worker;
    for (uint64_t k = (uint64_t)i * SUMS_CHUNK; k < (uint64_t)(i + 1) * SUMS_CHUNK && k < j->count; k++)
        j->out[k] = sums_at(j, (uint64_t)j->flat[k] / j->d->n, (uint64_t)j->flat[k] % j->d->n);
}

/* All tokens against a few columns: a large matrix is read once. */
static void sums_panel_task(void *ctx, int i, int worker) {
    const sums_lanes_job *j = ctx;
    const ap_lanes *d = j->d;
    uint64_t b = (uint64_t)i / j->panels, column = (uint64_t)i % j->panels * SUMS_WIDE;
    (void)worker;
    for (uint64_t row = b * d->t; row < (b + 1) * d->t; row++)
        for (uint64_t n = column; n < column + SUMS_WIDE && n < d->n; n++) j->out[row * d->n + n] = sums_at(j, row, n);
}

int ap_sums_lanes(const ap_lanes *d, const int64_t *flat, uint64_t count, int threads, float *out, ap_err *e) {
    sums_lanes_job j = { d, flat, count, d->n / SUMS_WIDE + (d->n % SUMS_WIDE != 0), out, ap_tier_best() };
    int tasks = 0;
    AP_TRY(sums_tasks(flat ? count : d->b * j.panels, flat ? SUMS_CHUNK : 1, &tasks, e));
    ap_pool_run(threads ? threads : ap_cores(), tasks, flat ? sums_flat_task : sums_panel_task, &j);
    return AP_OK;
}
