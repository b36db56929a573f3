/* q2_k.c: the reference decode of q2_k.h: d * sc, dmin * m and the product with q are exact (11, 4 and 2 bits), the difference rounds once.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q2_k.h"

void ap_q2_k_decode(const void *src, float *dst, size_t n) {
    const ap_q2_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d)), dmin = ap_f16_to_f32(ap_le16(b->dmin));
        for (int g = 0; g < 16; g++) {
            float scale = d * (float)(b->s[g] & 15), min = dmin * (float)(b->s[g] >> 4);
            for (int i = g * 16; i < g * 16 + 16; i++) dst[i] = scale * (float)ap_q2_k_q(b, i) - min;
        }
    }
}
