/* q4_0.c: the reference decode and the encoder of q4_0.h: one rounding per value, that of d * q.
** Owns nothing; the whole-tensor readers and writers and the tests call it. */
#include <math.h>
#include "q4_0.h"

void ap_q4_0_decode(const void *src, float *dst, size_t n) {
    const ap_q4_0 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 32; i++) dst[i] = d * (float)ap_q4_0_q(b, i);
    }
}

/* As ggml quantises: the value of the largest magnitude, the first of them, becomes -8, so its sign is the opposite of the scale's.  A scale whose inverse
** overflows is far below the least half: all such values are zero. */
void ap_q4_0_encode(const float *src, void *dst, size_t n) {
    ap_q4_0 *b = dst;
    for (; n >= 32; n -= 32, src += 32, b++) {
        float most = 0;
        for (int i = 0; i < 32; i++) if (fabsf(src[i]) > fabsf(most)) most = src[i];
        float d = most / -8, inverse = d ? 1 / d : 0;
        uint8_t q[32];
        if (isinf(inverse)) inverse = 0;
        ap_put_le16(b->d, ap_f32_to_f16(d));
        for (int i = 0; i < 32; i++) {
            int v = (int)(src[i] * inverse + 8.5f);
            q[i] = (uint8_t)(v > 15 ? 15 : v);
        }
        for (int i = 0; i < 16; i++) b->q[i] = (uint8_t)(q[i] | q[i + 16] << 4);
    }
}
