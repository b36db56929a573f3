/* q1_0.h: 128 signs under one half scale: value = d where the bit is set, else -d; eight to a byte, the first lowest. */
#ifndef AP_Q1_0_H
#define AP_Q1_0_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t q[16]; } ap_q1_0;
AP_ASSERT(sizeof(ap_q1_0) == 18, "q1_0 is 18 bytes on disk");
AP_HD int ap_q1_0_q(const ap_q1_0 *b, int i) { return (b->q[i >> 3] >> (i & 7) & 1) * 2 - 1; }
void ap_q1_0_decode(const void *src, float *dst, size_t n);
#endif
