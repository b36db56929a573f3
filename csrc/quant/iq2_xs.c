/* iq2_xs.c: the reference decode of iq2_xs.h: every product is exact (11, 5 and 6 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq2_xs.h"

void ap_iq2_xs_decode(const void *src, float *dst, size_t n) {
    const ap_iq2_xs *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int k = 0; k < 32; k++) {
            int point = ap_iq2_xs_grid[ap_iq2_xs_point(b, k)], signs = ap_iq2_xs_signs(b, k);
            float scale = d * (0.5f + (float)ap_iq2_xs_scale(b, k >> 1)) * 0.25f;
            for (int j = 0; j < 8; j++) dst[k * 8 + j] = scale * (float)ap_iq_signed(ap_iq2_level(point, j), signs, j);
        }
    }
}
