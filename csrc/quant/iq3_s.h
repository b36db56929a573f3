/*
** iq3_s.h: a super-block of 256 values: 64 points of four values, each a byte of its number and one more bit in h; a sign bit for every value; 8 four-bit
** scales, one for 32 values, the even one low, under one half scale.  value = (d * (2 sc + 1)) * (sign) level.
*/
#ifndef AP_IQ3_S_H
#define AP_IQ3_S_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[64], h[8], signs[32], s[4]; } ap_iq3_s;
AP_ASSERT(sizeof(ap_iq3_s) == 110, "iq3_s is 110 bytes on disk");
/* k: point 0 .. 63; g: group of 32 values 0 .. 7. */
AP_HD int ap_iq3_s_point(const ap_iq3_s *b, int k) { return b->q[k] | (b->h[k >> 3] >> (k & 7) & 1) << 8; }
AP_HD int ap_iq3_s_scale(const ap_iq3_s *b, int g) { return b->s[g >> 1] >> (g & 1) * 4 & 15; }
void ap_iq3_s_decode(const void *src, float *dst, size_t n);
#endif
