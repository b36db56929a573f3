/* mxfp4.c: the reference decode of mxfp4.h: every product is exact, or infinite.  Owns nothing; the whole-tensor readers and the tests call it. */
#include <math.h>
#include "mxfp4.h"

void ap_mxfp4_decode(const void *src, float *dst, size_t n) {
    const ap_mxfp4 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ldexpf(1, b->e - 128);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)ap_mxfp4_q(b, i);
    }
}
