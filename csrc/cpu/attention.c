/*
** attention.c: CACHE, SCORES, SOFTMAX, MIX.  Scores and probabilities are [H, T, J]; keys that the mask forbids hold 0 and are never read.  Lanes are
** counted from key 0, so a query's result does not depend on how many keys came in the same call.
*/
#include "cpu.h"
#include "../base/math.h"
#include <string.h>

int cpu_CACHE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const float *x = cpu_a(d, p, s);
    float *cache = cpu_cache(d, s);
    size_t row = (size_t)s->cols * sizeof(float);
    (void)e;
    for (int t = 0; t < p->T; t++) memcpy(cache + (size_t)(s->pos + t) * (size_t)s->cols, x + (size_t)t * (size_t)s->a_stride, row);
    if (s->kept) memcpy(cpu_place(d, s), cache, row * (size_t)s->rows);
    return AP_OK;
}

typedef struct { const ap_dev *d; const ap_step *s; const float *a, *b; float *out; int T, b_cols; } attn_job;

static int attn_kv_head(const ap_step *s, int head) { return head / s->kv_div % s->kv_mod; }

static void attn_scores_piece(void *ctx, int first, int last, float *scratch) {
    const attn_job *j = ctx;
    const ap_step *s = j->s;
    (void)scratch;
    for (int row = first; row < last; row++) {
        int head = row / j->T, t = row % j->T, lo, hi;
        const float *q = j->a + (size_t)t * (size_t)s->a_stride + (size_t)head * (size_t)s->head;
        const float *k = j->b + (size_t)attn_kv_head(s, head) * (size_t)s->head;
        float *out = j->out + (size_t)row * (size_t)s->keys;
        memset(out, 0, (size_t)s->keys * sizeof(float));
        cpu_visible(s, s->pos + t, &lo, &hi);
        for (int key = lo; key < hi; key += CPU_GROUP) {
            const float *rows[CPU_GROUP];
            float y[CPU_GROUP];
            int live = hi - key < CPU_GROUP ? hi - key : CPU_GROUP;
            for (int r = 0; r < CPU_GROUP; r++) rows[r] = k + (size_t)(key + (r < live ? r : live - 1)) * (size_t)j->b_cols;
            j->d->lanes->dot4(rows, q, s->head, y);
            for (int r = 0; r < live; r++) out[key + r] = (float)((double)y[r] * s->scale);
        }
    }
}

int cpu_SCORES(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    attn_job j = { d, s, cpu_a(d, p, s), cpu_b(d, p, s), cpu_place(d, s), p->T, s->b_stride };
    return cpu_split(d, s->heads * p->T, (double)s->keys * s->head, attn_scores_piece, &j, e);
}

static double attn_lane_sum(double lane[CPU_LANES]) {
    for (int half = CPU_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static void attn_softmax_piece(void *ctx, int first, int last, float *scratch) {
    const attn_job *j = ctx;
    (void)scratch;
    for (int row = first; row < last; row++) {
        const float *x = j->a + (size_t)row * (size_t)j->s->keys;
        float *out = j->out + (size_t)row * (size_t)j->s->keys;
        double lane[CPU_LANES] = { 0 };
        int lo, hi;
        memset(out, 0, (size_t)j->s->keys * sizeof(float));
        cpu_visible(j->s, j->s->pos + row % j->T, &lo, &hi);
        float top = -INFINITY;
        for (int i = lo; i < hi; i++) if (x[i] > top || x[i] != x[i]) top = x[i];       /* a NaN stays */
        for (int i = lo; i < hi; i++) lane[i % CPU_LANES] += ap_exp((double)x[i] - (double)top);
        double sum = attn_lane_sum(lane);
        for (int i = lo; i < hi; i++) out[i] = (float)(ap_exp((double)x[i] - (double)top) / sum);
    }
}

int cpu_SOFTMAX(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    attn_job j = { d, s, cpu_a(d, p, s), NULL, cpu_place(d, s), p->T, 0 };
    return cpu_split(d, s->heads * p->T, 60.0 * s->keys, attn_softmax_piece, &j, e);
}

static void attn_mix_piece(void *ctx, int first, int last, float *scratch) {
    const attn_job *j = ctx;
    const ap_step *s = j->s;
    for (int row = first; row < last; row++) {
        int head = row / j->T, t = row % j->T, lo, hi;
        const float *prob = j->a + (size_t)row * (size_t)s->keys;
        const float *v = j->b + (size_t)attn_kv_head(s, head) * (size_t)s->head;
        float *out = j->out + (size_t)t * (size_t)s->cols + (size_t)head * (size_t)s->head;
        memset(scratch, 0, (size_t)CPU_LANES * (size_t)s->head * sizeof(float));
        cpu_visible(s, s->pos + t, &lo, &hi);
        for (int key = lo; key < hi; key++)
            j->d->lanes->axpy(scratch + (size_t)(key % CPU_LANES) * (size_t)s->head, prob[key], v + (size_t)key * (size_t)j->b_cols, s->head);
        for (int half = CPU_LANES / 2; half; half /= 2)
            for (int i = 0; i < half * s->head; i++) scratch[i] += scratch[i + half * s->head];
        memcpy(out, scratch, (size_t)s->head * sizeof(float));
    }
}

int cpu_MIX(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    attn_job j = { d, s, cpu_a(d, p, s), cpu_b(d, p, s), cpu_place(d, s), p->T, s->b_stride };
    return cpu_split(d, s->heads * p->T, (double)s->keys * s->head, attn_mix_piece, &j, e);
}
