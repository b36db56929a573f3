/*
** mxfp4.h: 32 four-bit floats (1 sign, 2 exponent, 1 mantissa bit) under a power of two.  value = 2^(e - 128) * q, with q twice the four-bit float, so that
** it is whole: 0 1 2 3 4 6 8 12 and their negatives; there is no -0, and e = 255 is 2^127 and not the NaN of the OCP paper, as GGUF's readers have it.
** Nibbles lie as in q4_0.
*/
#ifndef AP_MXFP4_H
#define AP_MXFP4_H
#include "format.h"
typedef struct { uint8_t e; uint8_t q[16]; } ap_mxfp4;
AP_ASSERT(sizeof(ap_mxfp4) == 17, "mxfp4 is 17 bytes on disk");
AP_HD int ap_twice_e2m1(int bits) {
    int exponent = bits >> 1 & 3, mantissa = bits & 1, size = exponent ? (2 | mantissa) << (exponent - 1) : mantissa;
    return bits & 8 ? -size : size;
}
AP_HD int ap_mxfp4_q(const ap_mxfp4 *b, int i) { return ap_twice_e2m1(i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4); }
void ap_mxfp4_decode(const void *src, float *dst, size_t n);
#endif
