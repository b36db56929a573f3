/*
** rope.c: ROPE_TABLE and ROPE.  The table follows the float32 recipe that Hugging Face uses: the exponent, the power, its reciprocal and the product with the
** position are each rounded to float32; cosine and sine of that angle are rounded once.  The rotation is float64, rounded once.
*/
#include "cpu.h"
#include "../base/math.h"

int cpu_ROPE_TABLE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    float *out = cpu_place(d, s);
    int half = s->head / 2;
    double log_theta = ap_log(s->theta);
    (void)p; (void)e;
    for (int i = 0; i < half; i++) {
        float exponent = (float)(2 * i) / (float)s->head;
        float frequency = 1.0f / (float)ap_exp((double)exponent * log_theta);
        for (int t = 0; t < s->rows; t++) {
            float angle = (float)(s->pos + t) * frequency;
            double sn, cs;
            ap_sincos((double)angle, &sn, &cs);
            out[(size_t)t * (size_t)s->cols + i] = (float)cs;
            out[(size_t)t * (size_t)s->cols + half + i] = (float)sn;
        }
    }
    return AP_OK;
}

typedef struct { const ap_step *s; const float *x, *table; float *out; } rope_job;

static void rope_piece(void *ctx, int first, int last, float *scratch) {
    const rope_job *j = ctx;
    const ap_step *s = j->s;
    int half = s->head / 2, apart = s->pairing ? 1 : half, step = s->pairing ? 2 : 1;
    (void)scratch;
    for (int t = first; t < last; t++) {
        const float *c = j->table + (size_t)t * (size_t)s->b_stride, *sn = c + half;
        for (int head = 0; head < s->cols / s->head; head++) {
            const float *x = j->x + (size_t)t * (size_t)s->a_stride + (size_t)head * (size_t)s->head;
            float *y = j->out + (size_t)t * (size_t)s->cols + (size_t)head * (size_t)s->head;
            for (int i = 0; i < half; i++) {
                double x0 = x[i * step], x1 = x[i * step + apart];
                y[i * step]         = (float)(x0 * (double)c[i] - x1 * (double)sn[i]);
                y[i * step + apart] = (float)(x1 * (double)c[i] + x0 * (double)sn[i]);
            }
        }
    }
}

int cpu_ROPE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    rope_job j = { s, cpu_a(d, p, s), cpu_b(d, p, s), cpu_place(d, s) };
    return cpu_split(d, s->rows, 4.0 * s->cols, rope_piece, &j, e);
}
