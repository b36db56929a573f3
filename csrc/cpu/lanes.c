/*
** lanes.c: the dot product in 16 virtual lanes, once per tier.  Every version gives the same bits: the order is the definition (cpu.h), the instruction set
** is only how fast it goes.  Callers: matmul.c, attention.c.
*/
#include "cpu.h"
#include <math.h>

static float lanes_tree(float s[CPU_LANES]) {
    for (int half = CPU_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

static void lanes_dot4_generic(const float *const a[CPU_GROUP], const float *b, int n, float out[CPU_GROUP]) {
    for (int r = 0; r < CPU_GROUP; r++) {
        float s[CPU_LANES] = { 0 };
        for (int i = 0; i < n; i++) s[i % CPU_LANES] = fmaf(a[r][i], b[i], s[i % CPU_LANES]);
        out[r] = lanes_tree(s);
    }
}

static void lanes_axpy_generic(float *acc, float p, const float *v, int n) {
    for (int i = 0; i < n; i++) acc[i] = fmaf(p, v[i], acc[i]);
}

#if defined(__x86_64__)
#include <immintrin.h>

AP_TARGET_AVX2 static float lanes_finish_avx2(__m256 lo, __m256 hi, const float *a, const float *b, int n) {
    float s[CPU_LANES];
    _mm256_storeu_ps(s, lo);
    _mm256_storeu_ps(s + 8, hi);
    for (int i = 0; i < n; i++) s[i] = __builtin_fmaf(a[i], b[i], s[i]);      /* the last n < 16 elements go to lanes 0 .. n-1 */
    return lanes_tree(s);
}

AP_TARGET_AVX2 static void lanes_dot4_avx2(const float *const a[CPU_GROUP], const float *b, int n, float out[CPU_GROUP]) {
    __m256 lo[CPU_GROUP], hi[CPU_GROUP];
    int whole = n - n % CPU_LANES;
    for (int r = 0; r < CPU_GROUP; r++) lo[r] = hi[r] = _mm256_setzero_ps();
    for (int i = 0; i < whole; i += CPU_LANES) {
        __m256 b_lo = _mm256_loadu_ps(b + i), b_hi = _mm256_loadu_ps(b + i + 8);
        for (int r = 0; r < CPU_GROUP; r++) {                                 /* eight independent chains hide the latency */
            lo[r] = _mm256_fmadd_ps(_mm256_loadu_ps(a[r] + i), b_lo, lo[r]);
            hi[r] = _mm256_fmadd_ps(_mm256_loadu_ps(a[r] + i + 8), b_hi, hi[r]);
        }
    }
    for (int r = 0; r < CPU_GROUP; r++) out[r] = lanes_finish_avx2(lo[r], hi[r], a[r] + whole, b + whole, n - whole);
}

AP_TARGET_AVX2 static void lanes_axpy_avx2(float *acc, float p, const float *v, int n) {
    __m256 pp = _mm256_set1_ps(p);
    int i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(acc + i, _mm256_fmadd_ps(pp, _mm256_loadu_ps(v + i), _mm256_loadu_ps(acc + i)));
    for (; i < n; i++) acc[i] = __builtin_fmaf(p, v[i], acc[i]);
}
#endif

const cpu_lanes cpu_lanes_of[AP_TIER_N] = {
#define T(name, cond) [AP_TIER_##name] = { lanes_dot4_##name, lanes_axpy_##name },
#include "../base/tiers.def"
};
