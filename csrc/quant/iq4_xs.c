/* iq4_xs.c: the reference decode of iq4_xs.h: d * sc and its product with the level are exact (11, 5 and 7 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq4_xs.h"

void ap_iq4_xs_decode(const void *src, float *dst, size_t n) {
    const ap_iq4_xs *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int g = 0; g < 8; g++) {
            float scale = d * (float)ap_iq4_xs_scale(b, g);
            for (int i = g * 32; i < g * 32 + 32; i++) dst[i] = scale * (float)ap_iq4_xs_q(b, i);
        }
    }
}
