/*
** norm.cu: RMSNORM, a block for each row or head (k is the length that is normalised).  The mean square is summed in float64 in 16 lanes by the first 16 threads,
** the rest is float64 too, and each output is rounded once: cpu/norm.c, bit for bit.
*/
#include "cuda.cuh"

typedef struct { const float *w, *x; float *out; int x_stride, k, groups; double eps; AP_FAULT_FIELD } norm_args;

__global__ void norm_kernel(const norm_args a) {
    double *shared = (double *)ap_shared;               /* 1 / the root mean square */
    int g = (int)blockIdx.x, lane = (int)threadIdx.x;
    const float *x = a.x + (int64_t)(g / a.groups) * a.x_stride + (int64_t)(g % a.groups) * a.k;
    double sum = 0;
    if (lane < AP_LANES)
        for (int i = lane; i < a.k; i += AP_LANES) sum += (double)x[i] * (double)x[i];
    sum = ap_lane_tree(sum);
    if (lane == 0) shared[0] = 1.0 / sqrt(sum / a.k + a.eps);
    if (!AP_FAULT(a, race)) __syncthreads();
    double r = shared[0];
    for (int i = lane; i < a.k; i += AP_THREADS) a.out[(int64_t)g * a.k + i] = (float)((double)x[i] * r * (double)a.w[i]);
}

int cuda_RMSNORM(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    int groups = s->cols / s->k;
    norm_args a = { cuda_vector(d, s->part[0].w), cuda_a(d, p, s), cuda_place(d, s), s->a_stride, s->k, groups, s->eps };
    return cuda_start(d, s, AP_ENTRY(norm_args, norm_kernel), (int64_t)s->rows * groups, 1, sizeof(double), 1, a, e);
}
