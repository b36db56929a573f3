/*
** compare.c: blocks of a fixed size are gone over by whichever thread is free; what a block gives is put together in the order of the blocks, sums with
** Neumaier's compensation.  So no bit depends on the number of threads, and none on the instruction set: inside a block eight lanes of doubles, in order.
*/
#include "compare.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "../base/mem.h"
#include "../base/threads.h"
#include "../base/tiers.h"

enum { CMP_BLOCK = 4096, CMP_LANES = 8, CMP_SUMS = 6, CMP_GROUP = 16 };
typedef struct {
    uint32_t bits_equal, value_equal, nan_a, nan_b, nan_both, inf_unlike, finite, max_ulp;
    double sum[CMP_SUMS], max_abs, worst;       /* worst: largest gap of all places, with AP_GAP_INF and AP_GAP_NAN */
} cmp_block;

/* --- a block --------------------------------------------------------------------------------------------------------------------------- */

static inline uint32_t cmp_bits(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

/* Whole numbers in the order of the values, neighbours one apart; both zeros are 0. */
static inline int32_t cmp_rank(uint32_t u) { int32_t m = (int32_t)(u & 0x7FFFFFFFu); return u >> 31 ? -m : m; }

typedef struct { uint32_t bits_equal, value_equal, nan_a, nan_b, nan_both, inf_unlike, finite, max_ulp; double sum[CMP_SUMS], max_abs; } cmp_lane;

/* Without a branch, so that a compiler can take the lanes together. */
static inline __attribute__((always_inline)) void cmp_pair(float fa, float fb, cmp_lane *l) {
    uint32_t ua = cmp_bits(fa), ub = cmp_bits(fb), ma = ua & 0x7FFFFFFFu, mb = ub & 0x7FFFFFFFu;
    uint32_t nan_a = ma > 0x7F800000u, nan_b = mb > 0x7F800000u, finite = (ma < 0x7F800000u) & (mb < 0x7F800000u);
    uint32_t same = ua == ub, zeros = (ma | mb) == 0, equal = same | zeros | (nan_a & nan_b);
    int32_t ra = cmp_rank(finite ? ua : 0), rb = cmp_rank(finite ? ub : 0);
    uint32_t ulp = ra > rb ? (uint32_t)ra - (uint32_t)rb : (uint32_t)rb - (uint32_t)ra;
    double a = finite ? (double)fa : 0.0, b = finite ? (double)fb : 0.0, d = a - b, gap = d < 0 ? -d : d;
    l->bits_equal += same;
    l->value_equal += equal;
    l->nan_a += nan_a & ~nan_b & 1u;
    l->nan_b += nan_b & ~nan_a & 1u;
    l->nan_both += nan_a & nan_b;
    l->inf_unlike += (finite | nan_a | nan_b | equal) ^ 1u;
    l->finite += finite;
    l->max_ulp = ulp > l->max_ulp ? ulp : l->max_ulp;
    l->max_abs = gap > l->max_abs ? gap : l->max_abs;
    const double term[CMP_SUMS] = { a, b, a * a, b * b, d * d, d * (a + b) };
    for (int k = 0; k < CMP_SUMS; k++) l->sum[k] += term[k];
}

static inline __attribute__((always_inline)) void cmp_lanes(const float *a, const float *b, int n, cmp_block *out) {
    cmp_lane l[CMP_LANES];
    memset(l, 0, sizeof l);
    int whole = n - n % CMP_LANES;
    for (int i = 0; i < whole; i += CMP_LANES)
        for (int k = 0; k < CMP_LANES; k++) cmp_pair(a[i + k], b[i + k], &l[k]);
    for (int i = whole; i < n; i++) cmp_pair(a[i], b[i], &l[i - whole]);
    memset(out, 0, sizeof *out);
    for (int k = 0; k < CMP_LANES; k++) {
        out->bits_equal += l[k].bits_equal; out->value_equal += l[k].value_equal; out->finite += l[k].finite;
        out->nan_a += l[k].nan_a; out->nan_b += l[k].nan_b; out->nan_both += l[k].nan_both; out->inf_unlike += l[k].inf_unlike;
        if (l[k].max_ulp > out->max_ulp) out->max_ulp = l[k].max_ulp;
        if (l[k].max_abs > out->max_abs) out->max_abs = l[k].max_abs;
        for (int s = 0; s < CMP_SUMS; s++) out->sum[s] += l[k].sum[s];
    }
    out->worst = out->nan_a || out->nan_b ? AP_GAP_NAN : out->inf_unlike ? AP_GAP_INF : out->max_abs;
}

/* The same source for each tier: more lanes in a register, the same operations in the same order. */
static void cmp_block_generic(const float *a, const float *b, int n, cmp_block *out) { cmp_lanes(a, b, n, out); }
#if defined(__x86_64__)
__attribute__((target("avx2"), optimize("O3"))) static void cmp_block_avx2(const float *a, const float *b, int n, cmp_block *out) { cmp_lanes(a, b, n, out); }
#endif
static void (*const cmp_block_of[AP_TIER_N])(const float *, const float *, int, cmp_block *) = {
#define T(name, cond) [AP_TIER_##name] = cmp_block_##name,
#include "../base/tiers.def"
};

/* --- all blocks ------------------------------------------------------------------------------------------------------------------------ */

typedef struct { const float *a, *b; uint64_t n; cmp_block *block; int tier; } cmp_job;

static int cmp_size(uint64_t n, uint64_t i) { return n - i * CMP_BLOCK < CMP_BLOCK ? (int)(n - i * CMP_BLOCK) : CMP_BLOCK; }

static void cmp_task(void *ctx, int group, int worker) {
    const cmp_job *j = ctx;
    (void)worker;
    for (uint64_t i = (uint64_t)group * CMP_GROUP; i < (uint64_t)(group + 1) * CMP_GROUP && i * CMP_BLOCK < j->n; i++)
        cmp_block_of[j->tier](j->a + i * CMP_BLOCK, j->b + i * CMP_BLOCK, cmp_size(j->n, i), &j->block[i]);
}

/* Neumaier: what an addition loses is kept beside the sum. */
static void cmp_add(double *sum, double *lost, double x) {
    double t = *sum + x;
    *lost += fabs(*sum) >= fabs(x) ? (*sum - t) + x : (x - t) + *sum;
    *sum = t;
}

/* The first place in block i where the two differ by `gap`, or, gap below 0, in their bits. */
static int64_t cmp_find(const cmp_job *j, uint64_t i, double gap) {
    for (uint64_t k = i * CMP_BLOCK, end = k + (uint64_t)cmp_size(j->n, i); k < end; k++) {
        if (gap < 0 ? cmp_bits(j->a[k]) != cmp_bits(j->b[k]) : isfinite(j->a[k]) && isfinite(j->b[k]) && fabs((double)j->a[k] - (double)j->b[k]) == gap) return (int64_t)k;
    }
    return -1;
}

static void cmp_gather(const cmp_job *j, uint64_t blocks, ap_comparison *out) {
    double *sum[CMP_SUMS] = { &out->a, &out->b, &out->aa, &out->bb, &out->dd, &out->ab }, lost[CMP_SUMS] = { 0 };
    uint64_t first = blocks, worst = blocks;
    for (uint64_t i = 0; i < blocks; i++) {
        const cmp_block *x = &j->block[i];
        out->bits_equal += x->bits_equal; out->value_equal += x->value_equal; out->finite += x->finite;
        out->nan_a += x->nan_a; out->nan_b += x->nan_b; out->nan_both += x->nan_both; out->inf_unlike += x->inf_unlike;
        if (x->max_ulp > out->max_ulp) out->max_ulp = x->max_ulp;
        if (x->max_abs > out->max_abs) { out->max_abs = x->max_abs; worst = i; }
        if (first == blocks && x->bits_equal < (uint32_t)cmp_size(j->n, i)) first = i;
        for (int s = 0; s < CMP_SUMS; s++) cmp_add(sum[s], &lost[s], x->sum[s]);
    }
    for (int s = 0; s < CMP_SUMS; s++) *sum[s] += lost[s];
    out->first = first < blocks ? cmp_find(j, first, -1) : -1;
    out->max_at = worst < blocks ? cmp_find(j, worst, out->max_abs) : -1;
}

/* --- the places that differ most ------------------------------------------------------------------------------------------------------- */

static double cmp_gap(float a, float b) {
    if (isnan(a) || isnan(b)) return isnan(a) && isnan(b) ? 0 : AP_GAP_NAN;
    if (!isfinite(a) || !isfinite(b)) return a == b ? 0 : AP_GAP_INF;
    return fabs((double)a - (double)b);
}

/* Into a list that is kept sorted by gap, then by place; a full one drops its last. */
static void cmp_offer(ap_place *top, int limit, int *found, ap_place p) {
    int i = *found < limit ? (*found)++ : limit - 1;
    if (i == limit - 1 && *found == limit && top[i].at >= 0 && (top[i].gap > p.gap || (top[i].gap == p.gap && top[i].at < p.at))) return;
    for (; i > 0 && (top[i - 1].gap < p.gap || (top[i - 1].gap == p.gap && top[i - 1].at > p.at)); i--) top[i] = top[i - 1];
    top[i] = p;
}

/* A block whose largest gap is below the last of a full list holds none of them. */
static void cmp_top(const cmp_job *j, uint64_t blocks, ap_place *top, int limit, int *found) {
    for (int i = 0; i < limit; i++) top[i] = (ap_place){ -1, -1 };
    for (uint64_t i = 0; i < blocks; i++) {
        int n = cmp_size(j->n, i);
        if (j->block[i].bits_equal == (uint32_t)n || (*found == limit && j->block[i].worst < top[limit - 1].gap)) continue;
        for (uint64_t k = i * CMP_BLOCK, end = k + (uint64_t)n; k < end; k++)
            if (cmp_bits(j->a[k]) != cmp_bits(j->b[k])) cmp_offer(top, limit, found, (ap_place){ (int64_t)k, cmp_gap(j->a[k], j->b[k]) });
    }
}

int ap_compare(const float *a, const float *b, uint64_t n, int threads, ap_comparison *out, ap_place *top, int limit, int *found, ap_err *e) {
    uint64_t blocks = n / CMP_BLOCK + (n % CMP_BLOCK != 0), groups = blocks / CMP_GROUP + (blocks % CMP_GROUP != 0);
    cmp_job j = { a, b, n, ap_alloc(blocks, sizeof *j.block), ap_tier_best() };
    if (!j.block || groups > INT32_MAX) { ap_free(j.block); return ap_fail(e, AP_MEMORY, "no memory to compare %llu values", (unsigned long long)n); }
    *out = (ap_comparison){ .first = -1, .max_at = -1 };
    *found = 0;
    ap_pool_run(threads ? threads : ap_cores(), (int)groups, cmp_task, &j);
    cmp_gather(&j, blocks, out);
    if (limit > 0) cmp_top(&j, blocks, top, limit, found);
    ap_free(j.block);
    return AP_OK;
}
