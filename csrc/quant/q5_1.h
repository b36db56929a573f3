/* q5_1.h: 32 five-bit numbers under a half scale and a half minimum.  value = d * q + m.  Nibbles and fifth bits lie as in q5_0. */
#ifndef AP_Q5_1_H
#define AP_Q5_1_H
#include "format.h"
typedef struct { uint8_t d[2], m[2]; uint8_t h[4]; uint8_t q[16]; } ap_q5_1;
AP_ASSERT(sizeof(ap_q5_1) == 24, "q5_1 is 24 bytes on disk");
AP_HD int ap_q5_1_q(const ap_q5_1 *b, int i) { return (i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4) | (b->h[i >> 3] >> (i & 7) & 1) << 4; }
void ap_q5_1_decode(const void *src, float *dst, size_t n);
#endif
