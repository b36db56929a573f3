/*
** q2_k.h: a super-block of 256 two-bit numbers: 16 groups of 16, each with a four-bit scale (low nibble of s) and a four-bit minimum (high nibble) under two
** half scales.  value = (d * sc) * q - (dmin * m).  Each half of 128 values has 32 bytes, each of which holds four values, 32 apart, the first lowest.
*/
#ifndef AP_Q2_K_H
#define AP_Q2_K_H
#include "format.h"
typedef struct { uint8_t s[16], q[64], d[2], dmin[2]; } ap_q2_k;
AP_ASSERT(sizeof(ap_q2_k) == 84, "q2_k is 84 bytes on disk");
AP_HD int ap_q2_k_q(const ap_q2_k *b, int i) { return b->q[(i >> 7) * 32 + (i & 31)] >> (i >> 5 & 3) * 2 & 3; }
void ap_q2_k_decode(const void *src, float *dst, size_t n);
#endif
