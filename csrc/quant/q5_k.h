/*
** q5_k.h: q4_k with a fifth bit: 256 five-bit numbers in 8 groups of 32, whose 6-bit scales and minima are packed as in q4_k, and so are the nibbles.
** value = (d * sc) * q - (dmin * m).  Bit g of byte j of h is the fifth bit of value j of group g.
*/
#ifndef AP_Q5_K_H
#define AP_Q5_K_H
#include "q4_k.h"
typedef struct { uint8_t d[2], dmin[2]; uint8_t s[12]; uint8_t h[32], q[128]; } ap_q5_k;
AP_ASSERT(sizeof(ap_q5_k) == 176, "q5_k is 176 bytes on disk");
AP_HD int ap_q5_k_q(const ap_q5_k *b, int i) { return (b->q[(i >> 6) * 32 + (i & 31)] >> (i >> 5 & 1) * 4 & 15) | (b->h[i & 31] >> (i >> 5) & 1) << 4; }
void ap_q5_k_decode(const void *src, float *dst, size_t n);
#endif
