/*
** apr_q4.c: the reference decode of apr_q4.h; exact, an 11-bit scale times a 4-bit number fits float32.  A scale that is NaN, infinite or subnormal reads as
** zero, as in the format's own reader.  Owns nothing; the whole-tensor readers and the tests call it.
*/
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
