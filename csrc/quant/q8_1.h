/* q8_1.h: 32 signed bytes under one half scale.  value = d * q.  The second half, s, is d times the sum of all q: dot products use it, values do not. */
#ifndef AP_Q8_1_H
#define AP_Q8_1_H
#include "format.h"
typedef struct { uint8_t d[2], s[2]; int8_t q[32]; } ap_q8_1;
AP_ASSERT(sizeof(ap_q8_1) == 36, "q8_1 is 36 bytes on disk");
void ap_q8_1_decode(const void *src, float *dst, size_t n);
#endif
