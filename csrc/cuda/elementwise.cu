/*
** elementwise.cu: EMBED, ADD, MUL, SILU, a thread for each element: one rounding per element.  A missing input (-1 in the step) reads as zero.
*/
#include "cuda.cuh"
#include "values.cuh"

typedef struct { cuda_weight w; const int32_t *tokens; float *out; int rows, cols; AP_FAULT_FIELD } embed_args;
__global__ void embed_kernel(const embed_args a) {
    int64_t at = cuda_thread();
    if (at >= (int64_t)a.rows * a.cols) return;
    a.out[at] = cuda_value_of(a.w.format, a.w, a.tokens[at / a.cols], at % a.cols);
}

int cuda_EMBED(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    embed_args a = { cuda_weight_of(d, s->part[0].w), (const int32_t *)d->tokens.p, cuda_place(d, s), s->rows, s->cols };
    (void)p;
    return CUDA_EACH(d, s, embed_args, embed_kernel, (int64_t)s->rows * s->cols, a, e);
}

typedef struct { const float *a, *b; float *out; int64_t n; int act; AP_FAULT_FIELD } el_args;

__global__ void el_add_kernel(const el_args j) {
    int64_t i = cuda_thread();
    if (i < j.n) j.out[i] = (j.a ? j.a[i] : 0.0f) + (j.b ? j.b[i] : 0.0f);
}

__global__ void el_mul_kernel(const el_args j) {
    int64_t i = cuda_thread();
    if (i < j.n) j.out[i] = (j.a ? j.a[i] : 0.0f) * (j.b ? j.b[i] : 0.0f);
}

/* As in cpu/elementwise.c: every activation is x times the sigmoid of something. */
AP_KFUN double el_inside(double x, int act) {
    if (act == 1) return 2 * 0.79788456080286541 * (x + 0.044715 * x * x * x);
    return act == 2 ? 1.702 * x : x;
}

__global__ void el_silu_kernel(const el_args j) {
    int64_t i = cuda_thread();
    if (i >= j.n) return;
    double x = j.a ? (double)j.a[i] : 0.0;
    j.out[i] = (float)(x / (1 + ap_exp(-el_inside(x, j.act))));
}

static int el_run(ap_dev *d, const ap_plan *p, const ap_step *s, const void *entry, ap_err *e) {
    el_args a = { cuda_a(d, p, s), cuda_b(d, p, s), cuda_place(d, s), (int64_t)s->rows * s->cols, s->act };
    return cuda_start(d, s, entry, (a.n + AP_THREADS - 1) / AP_THREADS, 1, 0, 0, a, e);
}

int cuda_ADD (ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, AP_ENTRY(el_args, el_add_kernel), e); }
int cuda_MUL (ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, AP_ENTRY(el_args, el_mul_kernel), e); }
int cuda_SILU(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) { return el_run(d, p, s, AP_ENTRY(el_args, el_silu_kernel), e); }
