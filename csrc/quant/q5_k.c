/* q5_k.c: the reference decode of q5_k.h: d * sc, dmin * m and the product with q are exact (11, 6 and 5 bits), the difference rounds once.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q5_k.h"

void ap_q5_k_decode(const void *src, float *dst, size_t n) {
    const ap_q5_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d)), dmin = ap_f16_to_f32(ap_le16(b->dmin));
        for (int g = 0; g < 8; g++) {
            float scale = d * (float)ap_q4_k_scale(b->s, g), min = dmin * (float)ap_q4_k_min(b->s, g);
            for (int i = g * 32; i < g * 32 + 32; i++) dst[i] = scale * (float)ap_q5_k_q(b, i) - min;
        }
    }
}
