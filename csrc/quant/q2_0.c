/* q2_0.c: the reference decode of q2_0.h: every product is exact.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q2_0.h"

void ap_q2_0_decode(const void *src, float *dst, size_t n) {
    const ap_q2_0 *b = src;
    for (; n >= 64; n -= 64, dst += 64, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 64; i++) dst[i] = d * (float)ap_q2_0_q(b, i);
    }
}
