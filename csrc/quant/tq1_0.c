/* tq1_0.c: the reference decode of tq1_0.h: every product is exact.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "tq1_0.h"

void ap_tq1_0_decode(const void *src, float *dst, size_t n) {
    const ap_tq1_0 *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 256; i++) dst[i] = d * (float)ap_tq1_0_q(b, i);
    }
}
