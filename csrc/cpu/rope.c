/*
** rope.c: ROPE_TABLE and ROPE.  The table follows the float32 recipe that Hugging Face uses: the exponent, the power, its reciprocal and the product with the
** position are each rounded to float32; cosine and sine of that angle are rounded once.  The rotation is float64, rounded once.
*/
#include "cpu.h"
#include "../base/math.h"

static float rope_frequency(int i, int head, double log_theta) {
    float exponent = (float)(2 * i) / (float)head;
    return 1.0f / (float)ap_exp((double)exponent * log_theta);
}

int cpu_ROPE_TABLE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    float *out = cpu_place(d, s);
    int half = s->head / 2;
    double log_theta = ap_log(s->theta);
    (void)p; (void)e;
    for (int i = 0; i < half; i++) {
        float frequency = rope_frequency(i, s->head, log_theta);
        for (int t = 0; t < s->rows; t++) {
            double at = (double)s->pos * s->pos_scale + (double)t * s->pos_step + s->pos_shift;
            float angle = (float)at * frequency;
            double sn, cs;
            ap_sincos((double)angle, &sn, &cs);
            out[(size_t)t * (size_t)s->cols + i] = (float)cs;
            out[(size_t)t * (size_t)s->cols + half + i] = (float)sn;
        }
    }
    return AP_OK;
}

typedef struct { const ap_step *s; const float *x, *table; float *out; } rope_job;

/* Cosine and sine of pair i of a row of the table, turned on by pos_shift positions. */
static void rope_turn(const ap_step *s, const float *table, int i, double *c, double *sn) {
    double c0 = (double)table[i], s0 = (double)table[s->head / 2 + i], c1, s1;
    *c = c0; *sn = s0;
    if (!s->pos_shift) return;
    ap_sincos((double)s->pos_shift * (double)rope_frequency(i, s->head, ap_log(s->theta)), &s1, &c1);
    *c = c0 * c1 - s0 * s1;
    *sn = s0 * c1 + c0 * s1;
}

static void rope_piece(void *ctx, int first, int last, float *scratch) {
    const rope_job *j = ctx;
    const ap_step *s = j->s;
    int half = s->head / 2, apart = s->pairing ? 1 : half, step = s->pairing ? 2 : 1;
    (void)scratch;
    for (int t = first; t < last; t++) {
        const float *x = j->x + (size_t)t * (size_t)s->a_stride;
        float *y = j->out + (size_t)t * (size_t)s->cols;
        for (int i = 0; i < half; i++) {
            double c, sn;
            rope_turn(s, j->table + (size_t)t * (size_t)s->b_stride, i, &c, &sn);
            for (int at = i * step; at < s->cols; at += s->head) {
                double x0 = x[at], x1 = x[at + apart];
                y[at]         = (float)(x0 * c - x1 * sn);
                y[at + apart] = (float)(x1 * c + x0 * sn);
            }
        }
    }
}

int cpu_ROPE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    rope_job j = { s, cpu_a(d, p, s), cpu_b(d, p, s), cpu_place(d, s) };
    return cpu_split(d, s->rows, 4.0 * s->cols, rope_piece, &j, e);
}
