/* iq4_nl.c: the reference decode of iq4_nl.h: d times the level is exact (11 and 7 bits).  Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq4_nl.h"

void ap_iq4_nl_decode(const void *src, float *dst, size_t n) {
    const ap_iq4_nl *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 32; i++) dst[i] = d * (float)ap_iq4_nl_q(b, i);
    }
}
