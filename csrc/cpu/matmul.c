/*
** matmul.c: MATMUL and BIAS.  A group of weight rows is decoded once and multiplied with every token, so a weight is read once per block of tokens and no
** row is decoded twice within a matmul.  Threads split output columns, never a sum.
*/
#include "cpu.h"
#include <string.h>

typedef struct {
    const ap_dev *d; const ap_step *s;
    const ap_weight *w;
    const float *x; float *out;                              /* out: first column of this part */
    int T;
} matmul_job;

/* Rows first .. first + CPU_GROUP - 1 as float32; past the end the last one again, its result is not stored. */
static void matmul_rows(const ap_weight *w, int tier, int first, float *scratch, const float *row[CPU_GROUP]) {
    for (int r = 0; r < CPU_GROUP; r++) {
        int64_t n = ap_weight_row_at(w, first + r < w->rows ? first + r : w->rows - 1);
        const float *floats = (const float *)(const void *)w->data;
        if (w->fmt == &ap_formats[AP_F_F32] && ((uintptr_t)floats & 3) == 0) { row[r] = floats + n * w->cols; continue; }
        float *dst = scratch + (size_t)r * (size_t)w->cols;
        ap_format_row_fast(w->fmt, tier, w->data, w->cols, n, dst);
        row[r] = dst;
    }
}

static void matmul_piece(void *ctx, int first, int last, float *scratch) {
    const matmul_job *j = ctx;
    for (int n = first; n < last; n += CPU_GROUP) {
        const float *row[CPU_GROUP];
        matmul_rows(j->w, j->d->o.tier, n, scratch, row);
        int live = last - n < CPU_GROUP ? last - n : CPU_GROUP;
        for (int t = 0; t < j->T; t++) {
            float y[CPU_GROUP];
            j->d->lanes->dot4(row, j->x + (size_t)t * (size_t)j->s->a_stride, j->s->k, y);
            memcpy(j->out + (size_t)t * (size_t)j->s->cols + n, y, (size_t)live * sizeof(float));
        }
    }
}

/* out[t] = x[t] + bias, in place when x is out; x NULL reads as zero. */
static void matmul_add_bias(const ap_dev *d, const ap_weight *w, const float *x, int x_stride, float *out, int out_stride, int T) {
    const float *bias = cpu_vector(w, d->worker);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < (int)w->cols; i++)
            out[(size_t)t * (size_t)out_stride + i] = (x ? x[(size_t)t * (size_t)x_stride + i] : 0.0f) + bias[i];
}

int cpu_MATMUL(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const float *x = cpu_a(d, p, s);
    float *out = cpu_place(d, s);
    if (!x) { memset(out, 0, (size_t)s->rows * (size_t)s->cols * sizeof(float)); return AP_OK; }
    for (int i = 0; i < s->nparts; out += s->part[i++].cols) {
        const ap_weight *w = &d->w[s->part[i].w];
        matmul_job j = { d, s, w, x, out, s->rows };
        AP_TRY(cpu_split(d, (int)w->rows, (double)s->k * s->rows, matmul_piece, &j, e));
        if (s->part[i].bias >= 0) matmul_add_bias(d, &d->w[s->part[i].bias], out, s->cols, out, s->cols, s->rows);
    }
    return AP_OK;
}

int cpu_BIAS(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const float *x = cpu_a(d, p, s);
    float *out = cpu_place(d, s);
    (void)e;
    for (int i = 0, col = 0; i < s->nparts; col += s->part[i++].cols)
        matmul_add_bias(d, &d->w[s->part[i].bias], x ? x + col : NULL, s->a_stride, out + col, s->cols, s->rows);
    return AP_OK;
}
