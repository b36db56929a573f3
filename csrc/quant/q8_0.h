/* q8_0.h: 32 signed bytes under one half scale.  value = d * q. */
#ifndef AP_Q8_0_H
#define AP_Q8_0_H
#include "format.h"
typedef struct { uint8_t d[2]; int8_t q[32]; } ap_q8_0;
AP_ASSERT(sizeof(ap_q8_0) == 34, "q8_0 is 34 bytes on disk");
void ap_q8_0_decode(const void *src, float *dst, size_t n);
void ap_q8_0_encode(const float *src, void *dst, size_t n);
#endif
