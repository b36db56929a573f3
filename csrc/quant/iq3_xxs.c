/* iq3_xxs.c: the reference decode of iq3_xxs.h: every product is exact (11, 5 and 6 bits).
** Owns nothing; the whole-tensor readers and the tests call it. */
#include "iq3_xxs.h"

void ap_iq3_xxs_decode(const void *src, float *dst, size_t n) {
    const ap_iq3_xxs *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int k = 0; k < 64; k++) {                         /* the signs of two points share a byte */
            int point = ap_iq3_xxs_grid[b->q[k]], signs = ap_iq3_xxs_signs(b, k >> 1) >> (k & 1) * 4;
            float scale = d * (0.5f + (float)ap_iq3_xxs_scale(b, k >> 3)) * 0.5f;
            for (int j = 0; j < 4; j++) dst[k * 4 + j] = scale * (float)ap_iq_signed(ap_iq3_xxs_level(point, j), signs, j);
        }
    }
}
