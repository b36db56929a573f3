/* f8.c: the eight-bit floats of f8.h; every value of theirs is a float32.  Owns nothing; the whole-tensor readers and the tests call it. */
#include <math.h>
#include "f8.h"

static float f8_e4m3(uint8_t bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float size = exponent ? ldexpf((float)(8 | mantissa), exponent - 10) : (float)mantissa * 0x1p-9f;
    if ((bits & 127) == 127) size = NAN;
    return bits & 128 ? -size : size;
}

void ap_f8_e4m3_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = f8_e4m3(p[i]);
}

void ap_f8_e5m2_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = ap_f16_to_f32((uint16_t)(p[i] << 8));
}

void ap_f8_e8m0_decode(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (size_t i = 0; i < n; i++) dst[i] = p[i] == 255 ? NAN : ldexpf(1, p[i] - 127);
}
