/*
** norm.c: RMSNORM, over whole rows or over every head of a row (k is the length that is normalised).  The mean square is summed in float64 in 16 lanes, the
** rest is float64 too, and each output is rounded once.
*/
#include "cpu.h"
#include <math.h>

typedef struct { const ap_step *s; const float *x, *w; float *out; int groups; } norm_job;

static double norm_mean_square(const float *x, int n) {
    double s[CPU_LANES] = { 0 };
    for (int i = 0; i < n; i++) s[i % CPU_LANES] += (double)x[i] * (double)x[i];
    for (int half = CPU_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0] / n;
}

static void norm_piece(void *ctx, int first, int last, float *scratch) {
    const norm_job *j = ctx;
    int k = j->s->k;
    (void)scratch;
    for (int g = first; g < last; g++) {
        const float *x = j->x + (size_t)(g / j->groups) * (size_t)j->s->a_stride + (size_t)(g % j->groups) * (size_t)k;
        float *out = j->out + (size_t)g * (size_t)k;
        double r = 1.0 / sqrt(norm_mean_square(x, k) + j->s->eps);
        for (int i = 0; i < k; i++) out[i] = (float)((double)x[i] * r * (double)j->w[i]);
    }
}

int cpu_RMSNORM(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    int groups = s->cols / s->k;
    /* The weight is decoded into scratch, which no piece of this operation uses. */
    norm_job j = { s, cpu_a(d, p, s), cpu_vector(&d->w[s->part[0].w], d->worker), cpu_place(d, s), groups };
    return cpu_split(d, s->rows * groups, 4.0 * s->k, norm_piece, &j, e);
}
