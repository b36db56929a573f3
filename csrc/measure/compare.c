/*
** compare.c: blocks of a fixed size are gone over by whichever thread is free; what a block gives is put together in the order of the blocks, sums with
** Neumaier's compensation.  So no bit depends on the number of threads, and none on the instruction set: inside a block eight lanes of doubles, in order.
** A block of numbers alone, which nearly every one is, has a shorter way with AVX2: first what whole numbers say of it, then its sums, so that all that is
** added up stays in registers.  It makes the same sums in the same order, and hands a block with a NaN or an infinity to the general way.
*/
#include "compare.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "../base/mem.h"
#include "../base/threads.h"
#include "../base/tiers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { CMP_BLOCK = 4096, CMP_LANES = 8, CMP_SUMS = 6, CMP_GROUP = 16 };
typedef struct {
    uint32_t bits_equal, value_equal, nan_a, nan_b, nan_both, inf_unlike, finite, max_ulp, over[AP_STEPS];
    double sum[CMP_SUMS], max_abs, worst;       /* worst: largest gap of all places, with AP_GAP_INF and AP_GAP_NAN */
} cmp_block;

/* --- a block --------------------------------------------------------------------------------------------------------------------------- */

/* Eight lanes as vectors of the compiler: one source, whatever registers the tier has. */
typedef uint32_t cmp_u __attribute__((vector_size(4 * CMP_LANES)));
typedef int32_t  cmp_i __attribute__((vector_size(4 * CMP_LANES)));
typedef float    cmp_f __attribute__((vector_size(4 * CMP_LANES)));
typedef double   cmp_d __attribute__((vector_size(8 * CMP_LANES)));
typedef int64_t  cmp_l __attribute__((vector_size(8 * CMP_LANES)));

enum { CMP_EQUAL, CMP_VALUE, CMP_NAN_A, CMP_NAN_B, CMP_NAN_BOTH, CMP_INF, CMP_FINITE, CMP_COUNTS };
typedef struct { cmp_u count[CMP_COUNTS], over[AP_STEPS], ulp; cmp_d sum[CMP_SUMS], gap; } cmp_lanes;

static inline uint32_t cmp_bits(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

/* Whole numbers in the order of the values, neighbours one apart; both zeros are 0. */
#define CMP_RANK(u, m) (((cmp_i)(m) ^ ((cmp_i)(u) >> 31)) - ((cmp_i)(u) >> 31))

/* A mask is all ones where it holds, so that subtracting it counts. */
static inline __attribute__((always_inline)) void cmp_eight(const float *pa, const float *pb, cmp_lanes *l) {
    cmp_u ua, ub;
    memcpy(&ua, pa, sizeof ua);
    memcpy(&ub, pb, sizeof ub);
    cmp_i ma = (cmp_i)(ua & 0x7FFFFFFFu), mb = (cmp_i)(ub & 0x7FFFFFFFu);
    cmp_i nan_a = ma > 0x7F800000, nan_b = mb > 0x7F800000, finite = (ma < 0x7F800000) & (mb < 0x7F800000);
    cmp_i same = ua == ub, equal = same | ((ma | mb) == 0) | (nan_a & nan_b);
    const cmp_i mask[CMP_COUNTS] = { same, equal, nan_a & ~nan_b, nan_b & ~nan_a, nan_a & nan_b, ~(finite | nan_a | nan_b | equal), finite };
    for (int k = 0; k < CMP_COUNTS; k++) l->count[k] -= (cmp_u)mask[k];
    cmp_i ra = CMP_RANK(ua, ma) & finite, rb = CMP_RANK(ub, mb) & finite, up = ra > rb;
    cmp_u steps = (((cmp_u)ra - (cmp_u)rb) & (cmp_u)up) | (((cmp_u)rb - (cmp_u)ra) & (cmp_u)~up);
    cmp_u more = (cmp_u)((cmp_i)(steps ^ 0x80000000u) > (cmp_i)(l->ulp ^ 0x80000000u));       /* an unsigned comparison */
    l->ulp = (steps & more) | (l->ulp & ~more);
    for (int k = 0; k < AP_STEPS; k++) l->over[k] -= (cmp_u)((cmp_i)(steps ^ 0x80000000u) > (cmp_i)((cmp_u){ 0 } + (ap_steps[k] ^ 0x80000000u)));
    cmp_d a = __builtin_convertvector((cmp_f)(ua & (cmp_u)finite), cmp_d), b = __builtin_convertvector((cmp_f)(ub & (cmp_u)finite), cmp_d), d = a - b;
    cmp_d gap = (cmp_d)((cmp_l)d & INT64_MAX);
    cmp_l wider = gap > l->gap;
    l->gap = (cmp_d)(((cmp_l)gap & wider) | ((cmp_l)l->gap & ~wider));
    const cmp_d term[CMP_SUMS] = { a, b, a * a, b * b, d * d, d * (a + b) };
    for (int k = 0; k < CMP_SUMS; k++) l->sum[k] += term[k];
}

/* The last lanes of a block that eight do not divide are pairs of zeros, which only the counts see. */
static inline __attribute__((always_inline)) void cmp_rest(const float *a, const float *b, int n, cmp_lanes *l) {
    float rest[2][CMP_LANES] = { { 0 } };
    int whole = n - n % CMP_LANES;
    if (whole == n) return;
    memcpy(rest[0], a + whole, (size_t)(n - whole) * sizeof *a);
    memcpy(rest[1], b + whole, (size_t)(n - whole) * sizeof *b);
    cmp_eight(rest[0], rest[1], l);
}

static inline __attribute__((always_inline)) void cmp_any(const float *a, const float *b, int n, cmp_lanes *l) {
    memset(l, 0, sizeof *l);
    for (int i = 0; i + CMP_LANES <= n; i += CMP_LANES) cmp_eight(a + i, b + i, l);
    cmp_rest(a, b, n, l);
}

static void cmp_fold(const cmp_lanes *l, int n, cmp_block *out) {
    uint32_t count[CMP_COUNTS] = { 0 }, missing = (uint32_t)((CMP_LANES - n % CMP_LANES) % CMP_LANES);
    memset(out, 0, sizeof *out);
    for (int i = 0; i < CMP_LANES; i++) {
        for (int k = 0; k < CMP_COUNTS; k++) count[k] += l->count[k][i];
        for (int k = 0; k < AP_STEPS; k++) out->over[k] += l->over[k][i];
        for (int k = 0; k < CMP_SUMS; k++) out->sum[k] += l->sum[k][i];
        if (l->ulp[i] > out->max_ulp) out->max_ulp = l->ulp[i];
        if (l->gap[i] > out->max_abs) out->max_abs = l->gap[i];
    }
    out->bits_equal = count[CMP_EQUAL] - missing;
    out->value_equal = count[CMP_VALUE] - missing;
    out->finite = count[CMP_FINITE] - missing;
    out->nan_a = count[CMP_NAN_A];
    out->nan_b = count[CMP_NAN_B];
    out->nan_both = count[CMP_NAN_BOTH];
    out->inf_unlike = count[CMP_INF];
    out->worst = out->nan_a || out->nan_b ? AP_GAP_NAN : out->inf_unlike ? AP_GAP_INF : out->max_abs;
}

static void cmp_block_generic(const float *a, const float *b, int n, cmp_block *out) {
    cmp_lanes l;
    cmp_any(a, b, n, &l);
    cmp_fold(&l, n, out);
}

#if defined(__x86_64__)
AP_TARGET_AVX2 static inline __m256i cmp_rank8(__m256i u, __m256i m) {
    __m256i sign = _mm256_srai_epi32(u, 31);
    return _mm256_sub_epi32(_mm256_xor_si256(m, sign), sign);
}

AP_TARGET_AVX2 static inline __m256i cmp_least(int k) { return _mm256_set1_epi32((int)ap_steps[k] + 1); }
AP_TARGET_AVX2 static inline __m256i cmp_reaches(__m256i steps, __m256i least) { return _mm256_cmpeq_epi32(_mm256_max_epu32(steps, least), steps); }

/* Counts and steps of n pairs, eight divide n; 0 if one is no number. */
AP_TARGET_AVX2 static int cmp_whole_avx2(const float *pa, const float *pb, int n, cmp_lanes *l) {
    const __m256i size = _mm256_set1_epi32(0x7FFFFFFF), zero = _mm256_setzero_si256();
    const __m256i least0 = cmp_least(0), least1 = cmp_least(1), least2 = cmp_least(2), least3 = cmp_least(3);
    __m256i same = zero, equal = zero, largest = zero, ulp = zero, over0 = zero, over1 = zero, over2 = zero, over3 = zero;
    for (int i = 0; i < n; i += CMP_LANES) {
        __m256i a = _mm256_loadu_si256((const void *)(pa + i)), b = _mm256_loadu_si256((const void *)(pb + i));
        __m256i ma = _mm256_and_si256(a, size), mb = _mm256_and_si256(b, size), bits = _mm256_cmpeq_epi32(a, b);
        largest = _mm256_max_epi32(largest, _mm256_max_epi32(ma, mb));
        same = _mm256_sub_epi32(same, bits);
        equal = _mm256_sub_epi32(equal, _mm256_or_si256(bits, _mm256_cmpeq_epi32(_mm256_or_si256(ma, mb), zero)));
        __m256i ra = cmp_rank8(a, ma), rb = cmp_rank8(b, mb), steps = _mm256_sub_epi32(_mm256_max_epi32(ra, rb), _mm256_min_epi32(ra, rb));
        ulp = _mm256_max_epu32(ulp, steps);
        over0 = _mm256_sub_epi32(over0, cmp_reaches(steps, least0)); over1 = _mm256_sub_epi32(over1, cmp_reaches(steps, least1));
        over2 = _mm256_sub_epi32(over2, cmp_reaches(steps, least2)); over3 = _mm256_sub_epi32(over3, cmp_reaches(steps, least3));
    }
    if (_mm256_movemask_epi8(_mm256_cmpgt_epi32(largest, _mm256_set1_epi32(0x7F7FFFFF)))) return 0;
    memset(l, 0, sizeof *l);
    memcpy(&l->count[CMP_EQUAL], &same, sizeof same);
    memcpy(&l->count[CMP_VALUE], &equal, sizeof equal);
    l->count[CMP_FINITE] += (uint32_t)(n / CMP_LANES);
    memcpy(&l->ulp, &ulp, sizeof ulp);
    const __m256i over[AP_STEPS] = { over0, over1, over2, over3 };
    memcpy(l->over, over, sizeof over);
    return 1;
}

AP_TARGET_AVX2 static inline __m256d cmp_wide4(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }

/* The sums of n pairs of numbers and their largest gap: of each by itself, then of both; lanes 0 to 3 and 4 to 7. */
AP_TARGET_AVX2 static void cmp_sums_avx2(const float *pa, const float *pb, int n, cmp_lanes *l) {
    const __m256d none = _mm256_setzero_pd();
    __m256d a0 = none, a1 = none, b0 = none, b1 = none, aa0 = none, aa1 = none, bb0 = none, bb1 = none;
    for (int i = 0; i < n; i += CMP_LANES) {
        __m256d x = cmp_wide4(pa + i), y = cmp_wide4(pb + i);
        a0 = _mm256_add_pd(a0, x); aa0 = _mm256_add_pd(aa0, _mm256_mul_pd(x, x));
        b0 = _mm256_add_pd(b0, y); bb0 = _mm256_add_pd(bb0, _mm256_mul_pd(y, y));
        x = cmp_wide4(pa + i + 4); y = cmp_wide4(pb + i + 4);
        a1 = _mm256_add_pd(a1, x); aa1 = _mm256_add_pd(aa1, _mm256_mul_pd(x, x));
        b1 = _mm256_add_pd(b1, y); bb1 = _mm256_add_pd(bb1, _mm256_mul_pd(y, y));
    }
    const __m256d size = _mm256_castsi256_pd(_mm256_set1_epi64x(INT64_MAX));
    __m256d dd0 = none, dd1 = none, ab0 = none, ab1 = none, gap0 = none, gap1 = none;
    for (int i = 0; i < n; i += CMP_LANES) {
        __m256d x = cmp_wide4(pa + i), y = cmp_wide4(pb + i), d = _mm256_sub_pd(x, y);
        gap0 = _mm256_max_pd(gap0, _mm256_and_pd(d, size));
        dd0 = _mm256_add_pd(dd0, _mm256_mul_pd(d, d)); ab0 = _mm256_add_pd(ab0, _mm256_mul_pd(d, _mm256_add_pd(x, y)));
        x = cmp_wide4(pa + i + 4); y = cmp_wide4(pb + i + 4); d = _mm256_sub_pd(x, y);
        gap1 = _mm256_max_pd(gap1, _mm256_and_pd(d, size));
        dd1 = _mm256_add_pd(dd1, _mm256_mul_pd(d, d)); ab1 = _mm256_add_pd(ab1, _mm256_mul_pd(d, _mm256_add_pd(x, y)));
    }
    const __m256d sum[CMP_SUMS][2] = { { a0, a1 }, { b0, b1 }, { aa0, aa1 }, { bb0, bb1 }, { dd0, dd1 }, { ab0, ab1 } }, gap[2] = { gap0, gap1 };
    memcpy(l->sum, sum, sizeof sum);
    memcpy(&l->gap, gap, sizeof gap);
}

AP_TARGET_AVX2 static void cmp_block_avx2(const float *a, const float *b, int n, cmp_block *out) {
    cmp_lanes l;
    int whole = n - n % CMP_LANES;
    if (cmp_whole_avx2(a, b, whole, &l)) {
        cmp_sums_avx2(a, b, whole, &l);
        cmp_rest(a, b, n, &l);
    } else {
        cmp_any(a, b, n, &l);
    }
    cmp_fold(&l, n, out);
}
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
        for (int k = 0; k < AP_STEPS; k++) out->over[k] += x->over[k];
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

int ap_compare(const float *a, const float *b, uint64_t n, int tier, int threads, ap_comparison *out, ap_place *top, int limit, int *found, ap_err *e) {
    uint64_t blocks = n / CMP_BLOCK + (n % CMP_BLOCK != 0), groups = blocks / CMP_GROUP + (blocks % CMP_GROUP != 0);
    cmp_job j = { a, b, n, ap_alloc(blocks, sizeof *j.block), tier };
    if (!j.block || groups > INT32_MAX) { ap_free(j.block); return ap_fail(e, AP_MEMORY, "no memory to compare %llu values", (unsigned long long)n); }
    *out = (ap_comparison){ .first = -1, .max_at = -1 };
    *found = 0;
    ap_pool_run(threads ? threads : ap_cores(), (int)groups, cmp_task, &j);
    cmp_gather(&j, blocks, out);
    if (limit > 0) cmp_top(&j, blocks, top, limit, found);
    ap_free(j.block);
    return AP_OK;
}
