/*
** attention.cu: CACHE, SCORES, SOFTMAX, MIX.  Scores and probabilities are [H, T, J]; keys that the mask forbids hold 0 and are never read.  Lanes are counted
** from key 0, as in cpu/attention.c, so the bits are the same and do not depend on how many keys came in one call.
*/
#include "cuda.cuh"

typedef struct { const float *x; float *out; int rows, cols, x_stride; AP_FAULT_FIELD } copy_args;
__global__ void copy_kernel(const copy_args a) {
    int64_t at = cuda_thread(), t = at / a.cols, i = at % a.cols;
    if (t < a.rows) a.out[at] = a.x[t * a.x_stride + i];
}

int cuda_CACHE(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    float *cache = cuda_cache(d, s);
    copy_args a = { cuda_a(d, p, s), cache + (size_t)s->pos * (size_t)s->cols, p->T, s->cols, s->a_stride };
    AP_TRY(CUDA_EACH(d, s, copy_args, copy_kernel, (int64_t)a.rows * a.cols, a, e));
    if (!s->kept) return AP_OK;
    copy_args whole = { cache, cuda_place(d, s), s->rows, s->cols, s->cols };
    return CUDA_EACH(d, s, copy_args, copy_kernel, (int64_t)whole.rows * whole.cols, whole, e);
}

typedef struct { const float *a, *b; float *out; cuda_mask mask; int T, pos, head, heads, kv_div, kv_mod, a_stride, b_stride, out_stride; double scale; AP_FAULT_FIELD } attn_args;

static attn_args attn_args_of(const ap_dev *d, const ap_plan *p, const ap_step *s) {
    attn_args a = { cuda_a(d, p, s), cuda_b(d, p, s), cuda_place(d, s), cuda_mask_of(s), p->T, s->pos, s->head, s->heads, s->kv_div, s->kv_mod, s->a_stride, s->b_stride, s->cols, s->scale };
    return a;
}

AP_KFUN int attn_kv_head(const attn_args &a, int head) { return head / a.kv_div % a.kv_mod; }

enum { ATTN_KEYS = 64 };                                /* keys of a block of SCORES */

/* 16 threads to a key: the lanes of its dot product with the query of this block. */
__global__ void attn_scores_kernel(const attn_args a) {
    int row = (int)blockIdx.x, head = row / a.T, t = row % a.T, lane = (int)threadIdx.x % AP_LANES, lo, hi;
    const float *q = a.a + (int64_t)t * a.a_stride + (int64_t)head * a.head;
    cuda_visible(a.mask, a.pos + t, &lo, &hi);
    for (int round = 0; round < ATTN_KEYS; round += AP_THREADS / AP_LANES) {
        int key = (int)blockIdx.y * ATTN_KEYS + round + (int)threadIdx.x / AP_LANES, seen = key >= lo && key < hi;
        const float *k = a.b + (int64_t)(seen ? key : 0) * a.b_stride + (int64_t)attn_kv_head(a, head) * a.head;
        float dot = 0;
        for (int i = lane; seen && i < a.head; i += AP_LANES) dot = __fmaf_rn(k[i], q[i], dot);
        dot = ap_lane_tree(dot);
        if (lane == 0 && key < a.mask.keys) a.out[(int64_t)row * a.mask.keys + key] = seen ? (float)((double)dot * a.scale) : 0.0f;
    }
}

int cuda_SCORES(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    return cuda_start(d, s, AP_ENTRY(attn_args, attn_scores_kernel), (int64_t)s->heads * p->T, (s->keys + ATTN_KEYS - 1) / ATTN_KEYS, 0, 1, attn_args_of(d, p, s), e);
}

/* The greater of two, where a NaN is greater than all. */
AP_KFUN float attn_top(float a, float b) { return b > a || b != b ? b : a; }

/* A block to a row.  Exponentials are made by all threads, AP_THREADS keys at a time; the first 16 add them, each its lane, in the order of the keys. */
__global__ void attn_softmax_kernel(const attn_args a) {
    double *shared = (double *)ap_shared;
    float *tops = (float *)ap_shared;
    int row = (int)blockIdx.x, me = (int)threadIdx.x, lo, hi;
    const float *x = a.a + (int64_t)row * a.mask.keys;
    float *out = a.out + (int64_t)row * a.mask.keys, top = -INFINITY;
    cuda_visible(a.mask, a.pos + row % a.T, &lo, &hi);
    for (int i = lo + me; i < hi; i += AP_THREADS) top = attn_top(top, x[i]);
    tops[me] = top;
    __syncthreads();
    for (int half = AP_THREADS / 2; half; half /= 2) {
        if (me < half) tops[me] = attn_top(tops[me], tops[me + half]);
        __syncthreads();
    }
    top = tops[0];
    double sum = 0;
    for (int base = lo - lo % AP_LANES; base < hi; base += AP_THREADS) {
        int i = base + me;
        __syncthreads();
        shared[me] = i >= lo && i < hi ? ap_exp((double)x[i] - (double)top) : 0;
        __syncthreads();
        for (int j = me; me < AP_LANES && j < AP_THREADS; j += AP_LANES)
            if (base + j >= lo && base + j < hi) sum += shared[j];
    }
    sum = ap_lane_tree(sum);
    __syncthreads();
    if (me == 0) shared[0] = sum;
    if (!AP_FAULT(a, race)) __syncthreads();
    sum = shared[0];
    for (int i = me; i < a.mask.keys; i += AP_THREADS) out[i] = i >= lo && i < hi ? (float)(ap_exp((double)x[i] - (double)top) / sum) : 0.0f;
}

int cuda_SOFTMAX(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    return cuda_start(d, s, AP_ENTRY(attn_args, attn_softmax_kernel), (int64_t)s->heads * p->T, 1, AP_THREADS * sizeof(double), 1, attn_args_of(d, p, s), e);
}

/* A thread to an output: its 16 lanes are 16 registers, key by key. */
__global__ void attn_mix_kernel(const attn_args a) {
    int64_t thread = cuda_thread(), wide = (int64_t)a.heads * a.head, t = thread / wide;
    if (t >= a.T) return;
    int at = (int)(thread % wide), head = at / a.head, lo, hi;
    const float *prob = a.a + ((int64_t)head * a.T + t) * a.mask.keys;
    const float *v = a.b + (int64_t)attn_kv_head(a, head) * a.head + at % a.head;
    float lanes[AP_LANES] = { 0 };
    cuda_visible(a.mask, a.pos + (int)t, &lo, &hi);
    for (int base = lo - lo % AP_LANES; base < hi; base += AP_LANES)
#pragma unroll
        for (int l = 0; l < AP_LANES; l++) {
            int key = base + l;
            if (key >= lo && key < hi) lanes[l] = __fmaf_rn(prob[key], v[(int64_t)key * a.b_stride], lanes[l]);
        }
#pragma unroll
    for (int half = AP_LANES / 2; half; half /= 2)
#pragma unroll
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    a.out[t * a.out_stride + at] = lanes[0];
}

int cuda_MIX(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    return CUDA_EACH(d, s, attn_args, attn_mix_kernel, (int64_t)p->T * s->heads * s->head, attn_args_of(d, p, s), e);
}
