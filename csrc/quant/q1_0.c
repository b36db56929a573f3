/* q1_0.c: the reference decode of q1_0.h: every product is exact.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q1_0.h"

void ap_q1_0_decode(const void *src, float *dst, size_t n) {
    const ap_q1_0 *b = src;
    for (; n >= 128; n -= 128, dst += 128, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 128; i++) dst[i] = d * (float)ap_q1_0_q(b, i);
    }
}
