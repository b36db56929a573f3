/*
** apr_q4.c: the reference decode and the encoder of apr_q4.h; exact, an 11-bit scale times a 4-bit number fits float32.  A scale that is NaN, infinite or subnormal reads as
** zero, as in the format's own reader.  Owns nothing; the whole-tensor readers and writers and the tests call it.
*/
#include <math.h>
#include "apr_q4.h"

static int apr_q4_normal(uint16_t h) { return (h >> 10 & 31) != 0 && (h >> 10 & 31) != 31; }

void ap_apr_q4_decode(const void *src, float *dst, size_t n) {
    const ap_apr_q4 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        uint16_t h = ap_le16(b->d);
        float d = apr_q4_normal(h) ? ap_f16_to_f32(h) : 0.0f;
        for (int i = 0; i < 32; i++) dst[i] = (float)(ap_apr_q4_q(b, i) - 8) * d;
    }
}

/* The largest magnitude becomes 7, by the scale as it is stored.  A scale that would read as zero is written as one, with the quants of zeros. */
void ap_apr_q4_encode(const float *src, void *dst, size_t n) {
    ap_apr_q4 *b = dst;
    for (; n >= 32; n -= 32, src += 32, b++) {
        float most = 0;
        for (int i = 0; i < 32; i++) if (fabsf(src[i]) > most) most = fabsf(src[i]);
        uint16_t h = ap_f32_to_f16(most / 7);
        if (!apr_q4_normal(h)) h = 0;
        float d = ap_f16_to_f32(h);
        uint8_t q[32];
        for (int i = 0; i < 32; i++) {
            float v = h ? roundf(src[i] / d) + 8 : 8;
            q[i] = (uint8_t)(v < 0 ? 0 : v > 15 ? 15 : v);
        }
        ap_put_le16(b->d, h);
        for (int i = 0; i < 16; i++) b->q[i] = (uint8_t)(q[2 * i] | q[2 * i + 1] << 4);
    }
}
