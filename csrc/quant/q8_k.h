/*
** q8_k.h: 256 signed bytes under one float32 scale.  value = d * q.  The sixteen 16-bit sums at the end are those of each 16 q: dot products use them,
** values do not.
*/
#ifndef AP_Q8_K_H
#define AP_Q8_K_H
#include "format.h"
typedef struct { uint8_t d[4]; int8_t q[256]; uint8_t sums[32]; } ap_q8_k;
AP_ASSERT(sizeof(ap_q8_k) == 292, "q8_k is 292 bytes on disk");
void ap_q8_k_decode(const void *src, float *dst, size_t n);
#endif
