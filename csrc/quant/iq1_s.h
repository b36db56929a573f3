/*
** iq1_s.h: a super-block of 256 values: 32 points of eight values -1, 0, 1, each a byte of its number; for every 32 values 16 bits: four times three more bits
** of the numbers, a three-bit scale, and whether all values are an eighth less or an eighth more.  value = (d * (2 sc + 1)) * (level +- 1/8).
*/
#ifndef AP_IQ1_S_H
#define AP_IQ1_S_H
#include "iq_grids.h"
typedef struct { uint8_t d[2]; uint8_t q[32], h[16]; } ap_iq1_s;
AP_ASSERT(sizeof(ap_iq1_s) == 50, "iq1_s is 50 bytes on disk");
/* k: point 0 .. 31; g: group of 32 values 0 .. 7. */
AP_HD int ap_iq1_s_point(const ap_iq1_s *b, int k) { return b->q[k] | (ap_le16(b->h + (k >> 2) * 2) >> 3 * (k & 3) & 7) << 8; }
AP_HD int ap_iq1_s_scale(const ap_iq1_s *b, int g) { return b->h[g * 2 + 1] >> 4 & 7; }
AP_HD float ap_iq1_s_shift(const ap_iq1_s *b, int g) { return b->h[g * 2 + 1] >> 7 ? -0.125f : 0.125f; }
void ap_iq1_s_decode(const void *src, float *dst, size_t n);
#endif
