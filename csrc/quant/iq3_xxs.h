/*
** iq3_xxs.h: a super-block of 256 values: 64 points of four values, a byte each; then for every 32 values 32 bits as in iq2_xxs: four times seven signs, each
** for two points, and the four-bit scale.  value = (d * (sc + 1/2) / 2) * (sign) level.
*/
#ifndef AP_IQ3_XXS_H
#define AP_IQ3_XXS_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[64]; uint8_t s[32]; } ap_iq3_xxs;
AP_ASSERT(sizeof(ap_iq3_xxs) == 98, "iq3_xxs is 98 bytes on disk");
/* k: pair of points 0 .. 31; g: group of 32 values 0 .. 7. */
AP_HD int ap_iq3_xxs_signs(const ap_iq3_xxs *b, int k) { return ap_iq_signs((int)(ap_le32(b->s + (k >> 2) * 4) >> 7 * (k & 3) & 127)); }
AP_HD int ap_iq3_xxs_scale(const ap_iq3_xxs *b, int g) { return b->s[g * 4 + 3] >> 4; }
void ap_iq3_xxs_decode(const void *src, float *dst, size_t n);
#endif
