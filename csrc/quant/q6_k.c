/* q6_k.c: the reference decode of q6_k.h, rounded where ggml rounds: d * sc is exact (11 and 7 bits), its product with q rounds once.
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "q6_k.h"

void ap_q6_k_decode(const void *src, float *dst, size_t n) {
    const ap_q6_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int g = 0; g < 16; g++) {
            float scale = d * (float)b->s[g];
            for (int i = g * 16; i < g * 16 + 16; i++) dst[i] = scale * (float)ap_q6_k_q(b, i);
        }
    }
}
