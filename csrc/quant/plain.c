/*
** plain.c: the formats without blocks, and what a half means.  Every value of F16, BF16 and of the integers up to 16 bits is a float32; the
** wider ones are rounded once, to nearest even.  Encoding rounds to nearest even, what is too large to an infinity, and keeps a NaN.  Owns nothing.  The block formats call the half conversion for their scales, the CPU operations for embeddings and norms.
*/
#include <string.h>
#include "plain.h"

/* To nearest even twice over: of a normal by adding half of what is cut off (less one when the kept part is even), of a subnormal by a float addition. */
uint16_t ap_f32_to_f16(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, sizeof bits);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x3FF));                         /* NaN: quiet, the top of its payload kept */
    if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);                                               /* 65520 and up round to infinity */
    if (bits >= 0x38800000) return (uint16_t)(sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13); /* normal: a carry moves into the exponent */
    float sum = ap_float_of(bits) + 0.5f;                                                                   /* subnormal: the last bit of 0.5f is 2^-24 */
    memcpy(&bits, &sum, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3F000000));
}

uint16_t ap_f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

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

void ap_i64_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) { int64_t v; memcpy(&v, p + 8 * i, sizeof v); dst[i] = (float)v; }
}

void ap_u8_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = (float)p[i];
}

void ap_u16_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = (float)ap_le16(p + 2 * i);
}

void ap_u32_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = (float)ap_le32(p + 4 * i);
}

void ap_u64_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) { uint64_t v; memcpy(&v, p + 8 * i, sizeof v); dst[i] = (float)v; }
}

void ap_bool_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = p[i] != 0;
}

void ap_f32_encode(const float *src, void *dst, size_t n) { if (n) memcpy(dst, src, n * sizeof *src); }

void ap_f16_encode(const float *src, void *dst, size_t n) {
    uint8_t *p = dst;
    for (size_t i = 0; i < n; i++) ap_put_le16(p + 2 * i, ap_f32_to_f16(src[i]));
}

void ap_bf16_encode(const float *src, void *dst, size_t n) {
    uint8_t *p = dst;
    for (size_t i = 0; i < n; i++) ap_put_le16(p + 2 * i, ap_f32_to_bf16(src[i]));
}
