/*
** matmul.cu: MATMUL and BIAS.  A block has 16 weight rows and a few tokens; 16 threads share a row, each the lane of a dot product, and decode the weights where
** they use them: weights stay as the file has them.  Tokens pass through shared memory, AP_CHUNK columns at a time.  Which tokens share a block changes nothing:
** each sum is one thread group's, in the order of cpu/cpu.h.
*/
#include "cuda.cuh"
#include "values.cuh"

enum { MM_ROWS = AP_THREADS / AP_LANES, MM_CHUNK = 256, MM_TILE = 8 };    /* rows of a block; columns in shared memory; tokens of a block in a longer piece */

typedef struct { cuda_weight w; const float *bias, *x; float *out; int x_stride, out_stride, T, k; AP_FAULT_FIELD } matmul_args;

template <int FORMAT> AP_KFUN float matmul_weight(const matmul_args &a, int64_t row, int64_t col) {
    if (FORMAT == AP_F_F32 && AP_FAULT(a, transposed)) return ((const float *)a.w.data)[col * a.w.rows + row];
    return cuda_value<FORMAT>(a.w, row, col);
}

template <int FORMAT, int TILE> __global__ void __launch_bounds__(AP_THREADS) matmul_kernel(const matmul_args a) {
    float *tile = (float *)ap_shared;                   /* [TILE][MM_CHUNK] */
    int lane = (int)threadIdx.x % AP_LANES, n = (int)blockIdx.x * MM_ROWS + (int)threadIdx.x / AP_LANES;
    int t0 = (int)blockIdx.y * TILE, live = a.T - t0 < TILE ? a.T - t0 : TILE;
    int64_t row = ap_paired_row(n < a.w.rows ? n : a.w.rows - 1, a.w.pairs);    /* past the end the last one again: its result is not stored */
    float acc[TILE] = { 0 };
    for (int k0 = 0; k0 < a.k; k0 += MM_CHUNK) {
        int wide = a.k - k0 < MM_CHUNK ? a.k - k0 : MM_CHUNK, stride = AP_FAULT(a, stride) ? wide : MM_CHUNK;
        for (int t = 0; t < live; t++)
            for (int i = (int)threadIdx.x; i < wide; i += AP_THREADS) tile[t * MM_CHUNK + i] = a.x[(int64_t)(t0 + t) * a.x_stride + k0 + i];
        if (!AP_FAULT(a, race)) __syncthreads();
        for (int i = lane; i < wide; i += AP_LANES) {
            float w = matmul_weight<FORMAT>(a, row, k0 + i);
#pragma unroll
            for (int t = 0; t < TILE; t++) if (t < live) acc[t] = __fmaf_rn(w, tile[t * stride + i], acc[t]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        if (t >= live) break;                           /* all threads of the block leave here together */
        float y = ap_lane_tree(acc[t]);
        if (lane || n >= a.w.rows) continue;
        a.out[(int64_t)(t0 + t) * a.out_stride + n] = a.bias ? y + a.bias[n] : y;
    }
}

static const struct { const void *one, *many; } matmul_kernels[] = {
#define F(name, ...) { AP_ENTRY(matmul_args, matmul_kernel<AP_F_##name, 1>), AP_ENTRY(matmul_args, matmul_kernel<AP_F_##name, MM_TILE>) },
#include "../quant/formats.def"
};

/* out[t] = x[t] + bias; x NULL reads as zero. */
typedef struct { const float *bias, *x; float *out; int wide, x_stride, out_stride, T; AP_FAULT_FIELD } bias_args;
__global__ void bias_kernel(const bias_args a) {
    int64_t at = cuda_thread(), t = at / a.wide, i = at % a.wide;
    if (t < a.T) a.out[t * a.out_stride + i] = (a.x ? a.x[t * a.x_stride + i] : 0.0f) + a.bias[i];
}

typedef struct { float *out; int64_t n; AP_FAULT_FIELD } zero_args;
__global__ void zero_kernel(const zero_args a) {
    int64_t i = cuda_thread();
    if (i < a.n) a.out[i] = 0;
}

int cuda_MATMUL(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const float *x = cuda_a(d, p, s);
    float *out = cuda_place(d, s);
    if (!x) {
        zero_args z = { out, (int64_t)s->rows * s->cols };
        return CUDA_EACH(d, s, zero_args, zero_kernel, z.n, z, e);
    }
    for (int i = 0; i < s->nparts; out += s->part[i++].cols) {
        matmul_args a = { cuda_weight_of(d, s->part[i].w), cuda_vector(d, s->part[i].bias), x, out, s->a_stride, s->cols, s->rows, s->k };
        int tile = s->rows == 1 ? 1 : MM_TILE;
        const void *entry = tile == 1 ? matmul_kernels[a.w.format].one : matmul_kernels[a.w.format].many;
        AP_TRY(cuda_start(d, s, entry, (a.w.rows + MM_ROWS - 1) / MM_ROWS, (s->rows + tile - 1) / tile, (size_t)tile * MM_CHUNK * sizeof(float), 1, a, e));
    }
    return AP_OK;
}

int cuda_BIAS(ap_dev *d, const ap_plan *p, const ap_step *s, ap_err *e) {
    const float *x = cuda_a(d, p, s);
    float *out = cuda_place(d, s);
    for (int i = 0, col = 0; i < s->nparts; col += s->part[i++].cols) {
        bias_args a = { cuda_vector(d, s->part[i].bias), x ? x + col : NULL, out + col, s->part[i].cols, s->a_stride, s->cols, s->rows };
        AP_TRY(CUDA_EACH(d, s, bias_args, bias_kernel, (int64_t)s->rows * a.wide, a, e));
    }
    return AP_OK;
}
