/*
** f8.h: the eight-bit floats.  E4M3: 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinities, only 0x7F and 0xFF are NaN.  E5M2: the upper byte of a half.
** E8M0: a power of two, 2^(e - 127), 0xFF is NaN; no sign and no zero.
*/
#ifndef AP_F8_H
#define AP_F8_H
#include "format.h"
void ap_f8_e4m3_decode(const void *src, float *dst, size_t n);
void ap_f8_e5m2_decode(const void *src, float *dst, size_t n);
void ap_f8_e8m0_decode(const void *src, float *dst, size_t n);
#endif
