/* iq2_xxs.c: the reference decode of iq2_xxs.h: every product is exact (11, 5 and 6 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq2_xxs.h"

void ap_iq2_xxs_decode(const void *src, float *dst, size_t n) {
    const ap_iq2_xxs *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int k = 0; k < 32; k++) {
            int point = ap_iq2_xxs_grid[ap_iq2_xxs_point(b, k)], signs = ap_iq2_xxs_signs(b, k);
            float scale = d * (0.5f + (float)ap_iq2_xxs_scale(b, k >> 2)) * 0.25f;
            for (int j = 0; j < 8; j++) dst[k * 8 + j] = scale * (float)ap_iq_signed(ap_iq2_level(point, j), signs, j);
        }
    }
}
