/* q2_0.h: 64 numbers -1 .. 2 in two bits under one half scale.  value = d * (q - 1).  Neighbours share a byte, the first lowest. */
#ifndef AP_Q2_0_H
#define AP_Q2_0_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t q[16]; } ap_q2_0;
AP_ASSERT(sizeof(ap_q2_0) == 18, "q2_0 is 18 bytes on disk");
AP_HD int ap_q2_0_q(const ap_q2_0 *b, int i) { return (b->q[i >> 2] >> 2 * (i & 3) & 3) - 1; }
void ap_q2_0_decode(const void *src, float *dst, size_t n);
#endif
