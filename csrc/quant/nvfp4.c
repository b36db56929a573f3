/* nvfp4.c: the reference decode of nvfp4.h: every product is exact.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include <math.h>
#include "nvfp4.h"

static float nvfp4_half_scale(uint8_t bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (bits == 0x7F) return 0;
    return exponent ? ldexpf((float)(8 | mantissa), exponent - 11) : (float)mantissa * 0x1p-10f;
}

void ap_nvfp4_decode(const void *src, float *dst, size_t n) {
    const ap_nvfp4 *b = src;
    for (; n >= 64; n -= 64, dst += 64, b++) {
        for (int i = 0; i < 64; i++) dst[i] = nvfp4_half_scale(b->d[i >> 4]) * (float)ap_nvfp4_q(b, i);
    }
}
