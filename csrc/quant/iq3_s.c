/* iq3_s.c: the reference decode of iq3_s.h: every product is exact (11, 5 and 4 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq3_s.h"

void ap_iq3_s_decode(const void *src, float *dst, size_t n) {
    const ap_iq3_s *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int k = 0; k < 64; k++) {                         /* the signs of two points share a byte */
            int point = ap_iq3_s_grid[ap_iq3_s_point(b, k)], signs = b->signs[k >> 1] >> (k & 1) * 4;
            float scale = d * (float)(2 * ap_iq3_s_scale(b, k >> 3) + 1);
            for (int j = 0; j < 4; j++) dst[k * 4 + j] = scale * (float)ap_iq_signed(ap_iq3_s_level(point, j), signs, j);
        }
    }
}
