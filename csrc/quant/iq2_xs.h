/*
** iq2_xs.h: a super-block of 256 values: 32 points of eight values, each 16 bits: nine of its number and seven signs; 16 four-bit scales, one for two points,
** the even one low, under one half scale.  value = (d * (sc + 1/2) / 4) * (sign) level.
*/
#ifndef AP_IQ2_XS_H
#define AP_IQ2_XS_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[64]; uint8_t s[8]; } ap_iq2_xs;
AP_ASSERT(sizeof(ap_iq2_xs) == 74, "iq2_xs is 74 bytes on disk");
/* k: point 0 .. 31; g: pair of points 0 .. 15. */
AP_HD int ap_iq2_xs_point(const ap_iq2_xs *b, int k) { return ap_le16(b->q + 2 * k) & 511; }
AP_HD int ap_iq2_xs_signs(const ap_iq2_xs *b, int k) { return ap_iq_signs(b->q[2 * k + 1] >> 1); }
AP_HD int ap_iq2_xs_scale(const ap_iq2_xs *b, int g) { return b->s[g >> 1] >> (g & 1) * 4 & 15; }
void ap_iq2_xs_decode(const void *src, float *dst, size_t n);
#endif
