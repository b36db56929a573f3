/*
** q3_k.h: a super-block of 256 three-bit numbers: 16 groups of 16, each with a six-bit scale less 32 under one half scale.  value = (d * sc) * (q - 4).
** The lower two bits lie as in q2_k; bit k of byte j of h is the upper bit of value 32 k + j.  Of the twelve scale bytes the first eight hold the low
** nibbles of scales 0..7 (low) and 8..15 (high); each of the last four holds the upper two bits of four scales, four apart, the first lowest.
*/
#ifndef AP_Q3_K_H
#define AP_Q3_K_H
#include "format.h"
typedef struct { uint8_t h[32], q[64], s[12], d[2]; } ap_q3_k;
AP_ASSERT(sizeof(ap_q3_k) == 110, "q3_k is 110 bytes on disk");
AP_HD int ap_q3_k_q(const ap_q3_k *b, int i) {
    int low = b->q[(i >> 7) * 32 + (i & 31)] >> (i >> 5 & 3) * 2 & 3, top = b->h[i & 31] >> (i >> 5) & 1;
    return (low | top << 2) - 4;
}
AP_HD int ap_q3_k_scale(const ap_q3_k *b, int g) { return ((b->s[g & 7] >> (g >> 3) * 4 & 15) | (b->s[8 + (g & 3)] >> (g >> 2) * 2 & 3) << 4) - 32; }
void ap_q3_k_decode(const void *src, float *dst, size_t n);
#endif
