/* plain.h: numbers stored one by one.  F32 as IEEE binary32, F16 as binary16, BF16 as the upper half of binary32, F64 as binary64, I8 to I64 in two's
** complement, U8 to U64 without a sign; all little-endian.  BOOL is a byte: 0 is 0, anything else 1. */
#ifndef AP_PLAIN_H
#define AP_PLAIN_H
#include "format.h"
void ap_f32_decode (const void *src, float *dst, size_t n);
void ap_f16_decode (const void *src, float *dst, size_t n);
void ap_bf16_decode(const void *src, float *dst, size_t n);
void ap_f64_decode (const void *src, float *dst, size_t n);
void ap_i8_decode  (const void *src, float *dst, size_t n);
void ap_i16_decode (const void *src, float *dst, size_t n);
void ap_i32_decode (const void *src, float *dst, size_t n);
void ap_i64_decode (const void *src, float *dst, size_t n);
void ap_u8_decode  (const void *src, float *dst, size_t n);
void ap_u16_decode (const void *src, float *dst, size_t n);
void ap_u32_decode (const void *src, float *dst, size_t n);
void ap_u64_decode (const void *src, float *dst, size_t n);
void ap_bool_decode(const void *src, float *dst, size_t n);
void ap_f32_encode (const float *src, void *dst, size_t n);
void ap_f16_encode (const float *src, void *dst, size_t n);
void ap_bf16_encode(const float *src, void *dst, size_t n);
#endif
