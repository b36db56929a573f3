/*
** plain.c: the formats without blocks, and what a half means.  Every value of F16, BF16, I8 and I16 is a float32; F64 and I32 are rounded
** once, to nearest even.  Owns nothing.  The block formats call the half conversion for their scales, the CPU operations for embeddings and norms.
*/
#include <string.h>
#include "plain.h"

static float plain_float(uint32_t bits) { float f; memcpy(&f, &bits, sizeof f); return f; }

/* binary16 is 1 sign, 5 exponent (bias 15), 10 mantissa bits; binary32 is 1, 8 (bias 127), 23: the mantissa moves up by 13, the exponent grows by 112. */
float ap_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    if (exponent == 31) return plain_float(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x00400000u : 0));        /* Inf; NaN, made quiet as F16C does */
    if (exponent) return plain_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * 0x1p-24f;                                    /* subnormal: mantissa * 2^-24 is exact and normal in float32 */
    return sign ? -tiny : tiny;
}

float ap_bf16_to_f32(uint16_t h) { return plain_float((uint32_t)h << 16); }

void ap_f32_decode(const void *src, float *dst, size_t n) { if (n) memcpy(dst, src, n * sizeof *dst); }

void ap_f16_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = ap_f16_to_f32(ap_le16(p + 2 * i));
}

void ap_bf16_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = ap_bf16_to_f32(ap_le16(p + 2 * i));
}

void ap_f64_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) { double v; memcpy(&v, p + 8 * i, sizeof v); dst[i] = (float)v; }
}

void ap_i8_decode(const void *src, float *dst, size_t n) {
    const int8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = (float)p[i];
}

void ap_i16_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = (float)(int16_t)ap_le16(p + 2 * i);
}

void ap_i32_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) { int32_t v; memcpy(&v, p + 4 * i, sizeof v); dst[i] = (float)v; }
}
