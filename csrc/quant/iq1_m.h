/*
** iq1_m.h: a super-block of 256 values: 32 points as in iq1_s, each a byte of its number and a nibble in h: three more bits, and its own eighth less or more.
** The 8 bytes s are four 16-bit numbers: four times three bits of scale, each for 16 values, and at the top four bits of the half d, its lowest first.
** value = (d * (2 sc + 1)) * (level +- 1/8).
*/
#ifndef AP_IQ1_M_H
#define AP_IQ1_M_H
#include "iq_grids.h"
typedef struct { uint8_t q[32], h[16], s[8]; } ap_iq1_m;
AP_ASSERT(sizeof(ap_iq1_m) == 56, "iq1_m is 56 bytes on disk");
/* k: point 0 .. 31; g: pair of points 0 .. 15. */
AP_HD int ap_iq1_m_nibble(const ap_iq1_m *b, int k) { return b->h[k >> 1] >> (k & 1) * 4 & 15; }
AP_HD int ap_iq1_m_point(const ap_iq1_m *b, int k) { return b->q[k] | (ap_iq1_m_nibble(b, k) & 7) << 8; }
AP_HD float ap_iq1_m_shift(const ap_iq1_m *b, int k) { return ap_iq1_m_nibble(b, k) >> 3 ? -0.125f : 0.125f; }
AP_HD int ap_iq1_m_scale(const ap_iq1_m *b, int g) { return ap_le16(b->s + (g >> 2) * 2) >> 3 * (g & 3) & 7; }
AP_HD uint16_t ap_iq1_m_half(const ap_iq1_m *b) { return (uint16_t)(b->s[1] >> 4 | b->s[3] >> 4 << 4 | b->s[5] >> 4 << 8 | b->s[7] >> 4 << 12); }
void ap_iq1_m_decode(const void *src, float *dst, size_t n);
#endif
