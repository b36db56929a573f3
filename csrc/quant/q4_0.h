/* q4_0.h: 32 nibbles under one half scale.  value = d * (q - 8).  The low nibbles are values 0..15, the high ones 16..31. */
#ifndef AP_Q4_0_H
#define AP_Q4_0_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t q[16]; } ap_q4_0;
AP_ASSERT(sizeof(ap_q4_0) == 18, "q4_0 is 18 bytes on disk");
AP_HD int ap_q4_0_q(const ap_q4_0 *b, int i) { return (i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4) - 8; }
void ap_q4_0_decode(const void *src, float *dst, size_t n);
void ap_q4_0_encode(const float *src, void *dst, size_t n);
#endif
