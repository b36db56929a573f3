/*
** iq2_s.h: a super-block of 256 values: 32 points of eight values, each a byte of its number, a byte of signs and two more bits of the number in h; 16
** four-bit scales as in iq2_xs.  value = (d * (sc + 1/2) / 4) * (sign) level.
*/
#ifndef AP_IQ2_S_H
#define AP_IQ2_S_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[32], signs[32], h[8], s[8]; } ap_iq2_s;
AP_ASSERT(sizeof(ap_iq2_s) == 82, "iq2_s is 82 bytes on disk");
/* k: point 0 .. 31; g: pair of points 0 .. 15. */
AP_HD int ap_iq2_s_point(const ap_iq2_s *b, int k) { return b->q[k] | (b->h[k >> 2] >> 2 * (k & 3) & 3) << 8; }
AP_HD int ap_iq2_s_scale(const ap_iq2_s *b, int g) { return b->s[g >> 1] >> (g & 1) * 4 & 15; }
void ap_iq2_s_decode(const void *src, float *dst, size_t n);
#endif
