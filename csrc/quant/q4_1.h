/* q4_1.h: 32 nibbles under a half scale and a half minimum.  value = d * q + m.  Nibbles lie as in q4_0: the first 16 values low, the last 16 high. */
#ifndef AP_Q4_1_H
#define AP_Q4_1_H
#include "format.h"
typedef struct { uint8_t d[2], m[2]; uint8_t q[16]; } ap_q4_1;
AP_ASSERT(sizeof(ap_q4_1) == 20, "q4_1 is 20 bytes on disk");
AP_HD int ap_q4_1_q(const ap_q4_1 *b, int i) { return i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4; }
void ap_q4_1_decode(const void *src, float *dst, size_t n);
#endif
