/* q8_1.c: the reference decode of q8_1.h: d * q is exact (11 and 7 bits).  Owns nothing; the whole-tensor readers and the tests call it. */
#include "q8_1.h"

void ap_q8_1_decode(const void *src, float *dst, size_t n) {
    const ap_q8_1 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 32; i++) dst[i] = d * (float)b->q[i];
    }
}
