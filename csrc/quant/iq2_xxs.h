/*
** iq2_xxs.h: a super-block of 256 values: 8 groups of 32 under one half scale, each with 8 bytes: four numbers of points of eight values, then 32 bits: four
** times seven signs, and at the top the four-bit scale.  value = (d * (sc + 1/2) / 4) * (sign) level.
*/
#ifndef AP_IQ2_XXS_H
#define AP_IQ2_XXS_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[64]; } ap_iq2_xxs;
AP_ASSERT(sizeof(ap_iq2_xxs) == 66, "iq2_xxs is 66 bytes on disk");
/* k: point 0 .. 31; g: group 0 .. 7. */
AP_HD int ap_iq2_xxs_point(const ap_iq2_xxs *b, int k) { return b->q[(k >> 2) * 8 + (k & 3)]; }
AP_HD int ap_iq2_xxs_signs(const ap_iq2_xxs *b, int k) { return ap_iq_signs((int)(ap_le32(b->q + (k >> 2) * 8 + 4) >> 7 * (k & 3) & 127)); }
AP_HD int ap_iq2_xxs_scale(const ap_iq2_xxs *b, int g) { return b->q[g * 8 + 7] >> 4; }
void ap_iq2_xxs_decode(const void *src, float *dst, size_t n);
#endif
