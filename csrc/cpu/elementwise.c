/*
** elementwise.c: EMBED, ADD, MUL, SILU: one rounding per element.  A missing input (-1 in the step) reads as zero.
*/
#include "cpu.h"
#include "../base/math.h"
#include <string.h>

int cpu_EMBED(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const ap_weight *w = &d->w[s->part[0].w];
    float *out = cpu_place(d, s);
    (void)p; (void)e;
    for (int t = 0; t < s->rows; t++)
        ap_format_row(w->fmt, w->data, w->cols, d->tokens[t], out + (size_t)t * (size_t)s->cols);
    return AP_OK;
}

typedef struct { const float *a, *b; float *out; int act; } el_job;

static void el_add(void *ctx, int first, int last, float *scratch) {
    const el_job *j = ctx;
    (void)scratch;
    for (int i = first; i < last; i++) j->out[i] = (j->a ? j->a[i] : 0.0f) + (j->b ? j->b[i] : 0.0f);
}

static void el_mul(void *ctx, int first, int last, float *scratch) {
    const el_job *j = ctx;
    (void)scratch;
    for (int i = first; i < last; i++) j->out[i] = (j->a ? j->a[i] : 0.0f) * (j->b ? j->b[i] : 0.0f);
}

/* Every activation is x times the sigmoid of something; tanh(y) = 2 sigmoid(2 y) - 1. */
static double el_inside(double x, int act) {
    if (act == 1) return 2 * 0.79788456080286541 * (x + 0.044715 * x * x * x);    /* sqrt(2 / pi) */
    return act == 2 ? 1.702 * x : x;
}

static void el_silu(void *ctx, int first, int last, float *scratch) {
    const el_job *j = ctx;
    (void)scratch;
    for (int i = first; i < last; i++) {
        double x = j->a ? (double)j->a[i] : 0.0;
        j->out[i] = (float)(x / (1 + ap_exp(-el_inside(x, j->act))));
    }
}

static int el_run(ap_dev *d, const ap_plan *p, const ap_step *s, double cost, cpu_task task, ap_err *e) {
    el_job j = { cpu_a(d, p, s), cpu_b(d, p, s), cpu_place(d, s), s->act };
    return cpu_split(d, s->rows * s->cols, cost, task, &j, e);
}

int cpu_ADD (ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, 1, el_add, e); }
int cpu_MUL (ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, 1, el_mul, e); }
int cpu_SILU(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, 60, el_silu, e); }
