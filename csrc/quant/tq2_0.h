/* tq2_0.h: a super-block of 256 numbers -1 .. 2 in two bits under one half scale.  value = d * (q - 1).  Each half of 128 values has 32 bytes, value by value 32
** apart, the first lowest. */
#ifndef AP_TQ2_0_H
#define AP_TQ2_0_H
#include "format.h"
typedef struct { uint8_t q[64]; uint8_t d[2]; } ap_tq2_0;
AP_ASSERT(sizeof(ap_tq2_0) == 66, "tq2_0 is 66 bytes on disk");
AP_HD int ap_tq2_0_q(const ap_tq2_0 *b, int i) { return (b->q[(i >> 7) * 32 + (i & 31)] >> (i >> 5 & 3) * 2 & 3) - 1; }
void ap_tq2_0_decode(const void *src, float *dst, size_t n);
#endif
