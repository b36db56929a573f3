/*
** nvfp4.h: 64 four-bit floats as in mxfp4 in four groups of 16, each under an eight-bit float without a sign (4 exponent bits, bias 7, 3 mantissa bits; its top
** bit is not looked at, but that only 0x7F, the NaN, reads as zero).  value = (scale / 2) * q, q twice the four-bit float.  Each group has 8 bytes, its first 8
** values low, its last 8 high.
*/
#ifndef AP_NVFP4_H
#define AP_NVFP4_H
#include "mxfp4.h"
typedef struct { uint8_t d[4]; uint8_t q[32]; } ap_nvfp4;
AP_ASSERT(sizeof(ap_nvfp4) == 36, "nvfp4 is 36 bytes on disk");
AP_HD int ap_nvfp4_q(const ap_nvfp4 *b, int i) { return ap_twice_e2m1(b->q[(i >> 4) * 8 + (i & 7)] >> (i >> 3 & 1) * 4 & 15); }
void ap_nvfp4_decode(const void *src, float *dst, size_t n);
#endif
