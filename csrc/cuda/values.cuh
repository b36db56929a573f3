/*
** values.cuh: what one value of a weight is, for every row of formats.def, from the bytes as the file has them.  The formulas round where those of quant/ round
** (tests hold every pair together, bit for bit); the fields of a block are read by the functions of its header, which both compilers share.
*/
#ifndef AP_VALUES_CUH
#define AP_VALUES_CUH
#include "cuda.cuh"
#include "../quant/apr_q4.h"
#include "../quant/apr_q8.h"
#include "../quant/iq1_m.h"
#include "../quant/iq1_s.h"
#include "../quant/iq2_s.h"
#include "../quant/iq2_xs.h"
#include "../quant/iq2_xxs.h"
#include "../quant/iq3_s.h"
#include "../quant/iq3_xxs.h"
#include "../quant/iq4_nl.h"
#include "../quant/iq4_xs.h"
#include "../quant/nvfp4.h"
#include "../quant/q1_0.h"
#include "../quant/q2_0.h"
#include "../quant/q2_k.h"
#include "../quant/q3_k.h"
#include "../quant/q4_0.h"
#include "../quant/q4_1.h"
#include "../quant/q5_0.h"
#include "../quant/q5_1.h"
#include "../quant/q5_k.h"
#include "../quant/q6_k.h"
#include "../quant/q8_0.h"
#include "../quant/q8_1.h"
#include "../quant/q8_k.h"
#include "../quant/tq1_0.h"
#include "../quant/tq2_0.h"

namespace grids {                                       /* the codebooks, in the device's memory */
#undef AP_GRID
#ifdef __CUDACC__
#define AP_GRID static __device__ const
#else
#define AP_GRID static const
#endif
#include "../quant/iq_grids.c"
}

/* p: the block, or the tensor of a format without blocks; i: the value's place in it.  Weights lie at multiples of 256 bytes, so plain numbers are aligned. */
#define VALUE(name) AP_KFUN float value_##name(const uint8_t *p, int64_t i)
#define BLOCK(type) const type *b = (const type *)p; int k = (int)i
#define D ap_f16_to_f32(ap_le16(b->d))

VALUE(F32)  { return ((const float *)p)[i]; }
VALUE(F16)  { return ap_f16_to_f32(((const uint16_t *)p)[i]); }
VALUE(BF16) { return ap_bf16_to_f32(((const uint16_t *)p)[i]); }
VALUE(F64)  { return (float)((const double *)p)[i]; }
VALUE(I8)   { return (float)((const int8_t *)p)[i]; }
VALUE(I16)  { return (float)((const int16_t *)p)[i]; }
VALUE(I32)  { return (float)((const int32_t *)p)[i]; }
VALUE(I64)  { return (float)((const int64_t *)p)[i]; }
VALUE(U8)   { return (float)p[i]; }
VALUE(U16)  { return (float)((const uint16_t *)p)[i]; }
VALUE(U32)  { return (float)((const uint32_t *)p)[i]; }
VALUE(U64)  { return (float)((const uint64_t *)p)[i]; }
VALUE(BOOL) { return p[i] != 0; }

VALUE(F8_E4M3) {
    int bits = p[i], exponent = bits >> 3 & 15, mantissa = bits & 7;
    float size = exponent ? ldexpf((float)(8 | mantissa), exponent - 10) : (float)mantissa * (1.0f / 512);
    if ((bits & 127) == 127) size = ap_float_of(0x7FC00000u);
    return bits & 128 ? -size : size;
}
VALUE(F8_E5M2) { return ap_f16_to_f32((uint16_t)(p[i] << 8)); }
VALUE(F8_E8M0) { return p[i] == 255 ? ap_float_of(0x7FC00000u) : ldexpf(1, p[i] - 127); }

VALUE(Q4_0) { BLOCK(ap_q4_0); return D * (float)ap_q4_0_q(b, k); }
VALUE(Q5_0) { BLOCK(ap_q5_0); return D * (float)ap_q5_0_q(b, k); }
VALUE(Q8_0) { BLOCK(ap_q8_0); return D * (float)b->q[k]; }
VALUE(Q8_1) { BLOCK(ap_q8_1); return D * (float)b->q[k]; }
VALUE(Q1_0) { BLOCK(ap_q1_0); return D * (float)ap_q1_0_q(b, k); }
VALUE(Q2_0) { BLOCK(ap_q2_0); return D * (float)ap_q2_0_q(b, k); }
VALUE(Q4_1) { BLOCK(ap_q4_1); return D * (float)ap_q4_1_q(b, k) + ap_f16_to_f32(ap_le16(b->m)); }
VALUE(Q5_1) { BLOCK(ap_q5_1); return D * (float)ap_q5_1_q(b, k) + ap_f16_to_f32(ap_le16(b->m)); }
VALUE(IQ4_NL) { BLOCK(ap_iq4_nl); return D * (float)ap_iq4_nl_q(b, k); }
VALUE(TQ1_0)  { BLOCK(ap_tq1_0); return D * (float)ap_tq1_0_q(b, k); }
VALUE(TQ2_0)  { BLOCK(ap_tq2_0); return D * (float)ap_tq2_0_q(b, k); }
VALUE(MXFP4)  { BLOCK(ap_mxfp4); return ldexpf(1, b->e - 128) * (float)ap_mxfp4_q(b, k); }
VALUE(NVFP4) {
    BLOCK(ap_nvfp4);
    int bits = b->d[k >> 4], exponent = bits >> 3 & 15, mantissa = bits & 7;
    float half = exponent ? ldexpf((float)(8 | mantissa), exponent - 11) : (float)mantissa * (1.0f / 1024);
    return (bits == 0x7F ? 0.0f : half) * (float)ap_nvfp4_q(b, k);
}

VALUE(Q2_K) {
    BLOCK(ap_q2_k);
    int s = b->s[k >> 4];
    return D * (float)(s & 15) * (float)ap_q2_k_q(b, k) - ap_f16_to_f32(ap_le16(b->dmin)) * (float)(s >> 4);
}
VALUE(Q3_K) { BLOCK(ap_q3_k); return D * (float)ap_q3_k_scale(b, k >> 4) * (float)ap_q3_k_q(b, k); }
VALUE(Q4_K) {
    BLOCK(ap_q4_k);
    return D * (float)ap_q4_k_scale(b->s, k >> 5) * (float)ap_q4_k_q(b, k) - ap_f16_to_f32(ap_le16(b->dmin)) * (float)ap_q4_k_min(b->s, k >> 5);
}
VALUE(Q5_K) {
    BLOCK(ap_q5_k);
    return D * (float)ap_q4_k_scale(b->s, k >> 5) * (float)ap_q5_k_q(b, k) - ap_f16_to_f32(ap_le16(b->dmin)) * (float)ap_q4_k_min(b->s, k >> 5);
}
VALUE(Q6_K) { BLOCK(ap_q6_k); return D * (float)b->s[k >> 4] * (float)ap_q6_k_q(b, k); }
VALUE(Q8_K) { BLOCK(ap_q8_k); return ap_float_of(ap_le32(b->d)) * (float)b->q[k]; }
VALUE(IQ4_XS) { BLOCK(ap_iq4_xs); return D * (float)ap_iq4_xs_scale(b, k >> 5) * (float)ap_iq4_xs_q(b, k); }

/* A point is eight values (n = k >> 3) of IQ2 and IQ1, four of IQ3. */
VALUE(IQ2_XXS) {
    BLOCK(ap_iq2_xxs);
    int n = k >> 3, point = grids::ap_iq2_xxs_grid[ap_iq2_xxs_point(b, n)];
    return D * (0.5f + (float)ap_iq2_xxs_scale(b, n >> 2)) * 0.25f * (float)ap_iq_signed(ap_iq2_level(point, k & 7), ap_iq2_xxs_signs(b, n), k & 7);
}
VALUE(IQ2_XS) {
    BLOCK(ap_iq2_xs);
    int n = k >> 3, point = grids::ap_iq2_xs_grid[ap_iq2_xs_point(b, n)];
    return D * (0.5f + (float)ap_iq2_xs_scale(b, n >> 1)) * 0.25f * (float)ap_iq_signed(ap_iq2_level(point, k & 7), ap_iq2_xs_signs(b, n), k & 7);
}
VALUE(IQ2_S) {
    BLOCK(ap_iq2_s);
    int n = k >> 3, point = grids::ap_iq2_s_grid[ap_iq2_s_point(b, n)];
    return D * (0.5f + (float)ap_iq2_s_scale(b, n >> 1)) * 0.25f * (float)ap_iq_signed(ap_iq2_level(point, k & 7), b->signs[n], k & 7);
}
VALUE(IQ3_XXS) {
    BLOCK(ap_iq3_xxs);
    int n = k >> 2, point = grids::ap_iq3_xxs_grid[b->q[n]], signs = ap_iq3_xxs_signs(b, n >> 1) >> (n & 1) * 4;
    return D * (0.5f + (float)ap_iq3_xxs_scale(b, n >> 3)) * 0.5f * (float)ap_iq_signed(ap_iq3_xxs_level(point, k & 3), signs, k & 3);
}
VALUE(IQ3_S) {
    BLOCK(ap_iq3_s);
    int n = k >> 2, point = grids::ap_iq3_s_grid[ap_iq3_s_point(b, n)], signs = b->signs[n >> 1] >> (n & 1) * 4;
    return D * (float)(2 * ap_iq3_s_scale(b, n >> 3) + 1) * (float)ap_iq_signed(ap_iq3_s_level(point, k & 3), signs, k & 3);
}
VALUE(IQ1_S) {
    BLOCK(ap_iq1_s);
    int n = k >> 3, point = grids::ap_iq1_s_grid[ap_iq1_s_point(b, n)];
    return D * (float)(2 * ap_iq1_s_scale(b, n >> 2) + 1) * ((float)ap_iq1_level(point, k & 7) + ap_iq1_s_shift(b, n >> 2));
}
VALUE(IQ1_M) {
    BLOCK(ap_iq1_m);
    int n = k >> 3, point = grids::ap_iq1_s_grid[ap_iq1_m_point(b, n)];
    return ap_f16_to_f32(ap_iq1_m_half(b)) * (float)(2 * ap_iq1_m_scale(b, n >> 1) + 1) * ((float)ap_iq1_level(point, k & 7) + ap_iq1_m_shift(b, n));
}
VALUE(APR_Q4) {
    BLOCK(ap_apr_q4);
    int h = ap_le16(b->d), exponent = h >> 10 & 31;     /* a scale that is NaN, infinite or subnormal reads as zero */
    return (float)(ap_apr_q4_q(b, k) - 8) * (exponent && exponent != 31 ? ap_f16_to_f32((uint16_t)h) : 0.0f);
}
VALUE(APR_Q8) { return (float)((const int8_t *)p)[AP_APR_Q8_SCALE + i] * *(const float *)p; }
#undef D
#undef BLOCK
#undef VALUE

typedef struct { const uint8_t *p; int64_t i; } cuda_cell;
AP_KFUN cuda_cell cell_ROWS(const cuda_weight &w, int64_t row, int64_t col, int block, int bytes) {
    const uint8_t *p = w.data + row * ((w.cols + block - 1) / block * bytes);
    if (block == 1) return { p, col };
    return { p + col / block * bytes, col % block };
}
AP_KFUN cuda_cell cell_FLAT(const cuda_weight &w, int64_t row, int64_t col, int block, int bytes) {
    int64_t at = row * w.cols + col;
    return { w.data + at / block * bytes, at % block };
}
AP_KFUN cuda_cell cell_WHOLE(const cuda_weight &w, int64_t row, int64_t col, int block, int bytes) { (void)block; (void)bytes; return { w.data, row * w.cols + col }; }

/* The value of a weight at a row and column of the file.  The format is known when a matmul is compiled, and looked up elsewhere. */
AP_KFUN float cuda_value_of(int format, const cuda_weight &w, int64_t row, int64_t col) {
    switch (format) {
#define F(name, gguf, st, apr, block, bytes, packing, ...) case AP_F_##name: { cuda_cell c = cell_##packing(w, row, col, block, bytes); return value_##name(c.p, c.i); }
#include "../quant/formats.def"
    }
    return 0;
}
template <int FORMAT> AP_KFUN float cuda_value(const cuda_weight &w, int64_t row, int64_t col) { return cuda_value_of(FORMAT, w, row, col); }
#endif
