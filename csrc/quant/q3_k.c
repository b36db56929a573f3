/* q3_k.c: the reference decode of q3_k.h: d * sc and its product with q are exact (11, 5 and 2 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q3_k.h"

void ap_q3_k_decode(const void *src, float *dst, size_t n) {
    const ap_q3_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int g = 0; g < 16; g++) {
            float scale = d * (float)ap_q3_k_scale(b, g);
            for (int i = g * 16; i < g * 16 + 16; i++) dst[i] = scale * (float)ap_q3_k_q(b, i);
        }
    }
}
