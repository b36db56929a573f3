/*
** rope.cu: ROPE_TABLE and ROPE, a thread for each angle, a thread for each pair: cpu/rope.c, bit for bit.
*/
#include "cuda.cuh"

typedef struct { float *out; int head, rows, cols, pos, pos_scale, pos_step, pos_shift; double log_theta; AP_FAULT_FIELD } table_args;

AP_KFUN float rope_frequency(int i, int head, double log_theta) {
    float exponent = (float)(2 * i) / (float)head;
    return 1.0f / (float)ap_exp((double)exponent * log_theta);
}

__global__ void rope_table_kernel(const table_args a) {
    int64_t thread = cuda_thread();
    int half = a.head / 2, i = (int)(thread % half), t = (int)(thread / half);
    if (t >= a.rows) return;
    double at = (double)a.pos * a.pos_scale + (double)t * a.pos_step + a.pos_shift, sn, cs;
    float angle = (float)at * rope_frequency(i, a.head, a.log_theta);
    ap_sincos((double)angle, &sn, &cs);
    a.out[(int64_t)t * a.cols + i] = (float)cs;
    a.out[(int64_t)t * a.cols + half + i] = (float)sn;
}

int cuda_ROPE_TABLE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    table_args a = { cuda_place(d, s), s->head, s->rows, s->cols, s->pos, s->pos_scale, s->pos_step, s->pos_shift, ap_log(s->theta) };
    (void)p;
    return CUDA_EACH(d, s, table_args, rope_table_kernel, (int64_t)s->rows * (s->head / 2), a, e);
}

typedef struct { const float *x, *table; float *out; int x_stride, table_stride, rows, cols, head, pairing, pos_shift; double log_theta; AP_FAULT_FIELD } rope_args;

/* Cosine and sine of pair i of a row of the table, turned on by pos_shift positions. */
AP_KFUN void rope_turn(const rope_args &a, const float *table, int i, double *c, double *sn) {
    double c0 = (double)table[i], s0 = (double)table[a.head / 2 + i], c1, s1;
    *c = c0; *sn = s0;
    if (!a.pos_shift) return;
    ap_sincos((double)a.pos_shift * (double)rope_frequency(i, a.head, a.log_theta), &s1, &c1);
    *c = c0 * c1 - s0 * s1;
    *sn = s0 * c1 + c0 * s1;
}

__global__ void rope_kernel(const rope_args a) {
    int half = a.head / 2, apart = a.pairing ? 1 : half, step = a.pairing ? 2 : 1, pairs = a.cols / 2;
    int64_t thread = cuda_thread(), t = thread / pairs;
    if (t >= a.rows) return;
    int pair = (int)(thread % pairs), i = pair % half, at = pair / half * a.head + i * step;
    const float *x = a.x + t * a.x_stride;
    float *y = a.out + t * a.cols;
    double c, sn, x0 = x[at], x1 = x[at + apart];
    rope_turn(a, a.table + t * a.table_stride, i, &c, &sn);
    y[at]         = (float)(x0 * c - x1 * sn);
    y[at + apart] = (float)(x1 * c + x0 * sn);
}

int cuda_ROPE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    rope_args a = { cuda_a(d, p, s), cuda_b(d, p, s), cuda_place(d, s), s->a_stride, s->b_stride, s->rows, s->cols, s->head, s->pairing, s->pos_shift, ap_log(s->theta) };
    return CUDA_EACH(d, s, rope_args, rope_kernel, (int64_t)s->rows * (s->cols / 2), a, e);
}
