/* q5_0.h: 32 five-bit numbers under one half scale.  value = d * (q - 16).  Nibbles lie as in q4_0; bit i of h, little-endian, is the fifth bit of value i. */
#ifndef AP_Q5_0_H
#define AP_Q5_0_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t h[4]; uint8_t q[16]; } ap_q5_0;
AP_ASSERT(sizeof(ap_q5_0) == 22, "q5_0 is 22 bytes on disk");
AP_HD int ap_q5_0_q(const ap_q5_0 *b, int i) { return ((i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4) | (b->h[i >> 3] >> (i & 7) & 1) << 4) - 16; }
void ap_q5_0_decode(const void *src, float *dst, size_t n);
#endif
