/* q8_0.c: the reference decode and the encoder of q8_0.h: one rounding per value, that of d * q.
** Owns nothing; the whole-tensor readers and writers and the tests call it. */
#include <math.h>
#include "q8_0.h"

void ap_q8_0_decode(const void *src, float *dst, size_t n) {
    const ap_q8_0 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int i = 0; i < 32; i++) dst[i] = d * (float)b->q[i];
    }
}

/* As ggml quantises: the largest magnitude becomes 127, halves are rounded away from zero by the unrounded scale.  A scale whose inverse overflows is
** far below the least half: all such values are zero. */
void ap_q8_0_encode(const float *src, void *dst, size_t n) {
    ap_q8_0 *b = dst;
    for (; n >= 32; n -= 32, src += 32, b++) {
        float most = 0;
        for (int i = 0; i < 32; i++) if (fabsf(src[i]) > most) most = fabsf(src[i]);
        float d = most / 127, inverse = d ? 1 / d : 0;
        if (isinf(inverse)) inverse = 0;
        ap_put_le16(b->d, ap_f32_to_f16(d));
        for (int i = 0; i < 32; i++) b->q[i] = (int8_t)roundf(src[i] * inverse);
    }
}
