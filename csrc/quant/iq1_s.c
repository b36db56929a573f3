/* iq1_s.c: the reference decode of iq1_s.h: every product is exact (11, 4 and 4 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq1_s.h"

void ap_iq1_s_decode(const void *src, float *dst, size_t n) {
    const ap_iq1_s *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int k = 0; k < 32; k++) {
            int point = ap_iq1_s_grid[ap_iq1_s_point(b, k)];
            float scale = d * (float)(2 * ap_iq1_s_scale(b, k >> 2) + 1), shift = ap_iq1_s_shift(b, k >> 2);
            for (int j = 0; j < 8; j++) dst[k * 8 + j] = scale * ((float)ap_iq1_level(point, j) + shift);
        }
    }
}
