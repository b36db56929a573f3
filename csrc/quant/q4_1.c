/* q4_1.c: the reference decode of q4_1.h: d * q is exact (11 and 4 bits), the sum with m rounds once.  Owns nothing; the whole-tensor readers and the
** tests call it. */
#include "q4_1.h"

void ap_q4_1_decode(const void *src, float *dst, size_t n) {
    const ap_q4_1 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d)), m = ap_f16_to_f32(ap_le16(b->m));
        for (int i = 0; i < 32; i++) dst[i] = d * (float)ap_q4_1_q(b, i) + m;
    }
}
