/*
** apr_q4.h: 32 values: a half scale and 32 nibbles, low nibble first.  value = (q - 8) * scale.  The blocks of a tensor run on over the ends of its rows,
** and the last one is filled with zeros.
*/
#ifndef AP_APR_Q4_H
#define AP_APR_Q4_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t q[16]; } ap_apr_q4;
AP_ASSERT(sizeof(ap_apr_q4) == 18, "apr_q4 is 18 bytes on disk");
/* Byte i holds values 2i (low) and 2i + 1 (high): neighbours, unlike q4_0. */
AP_HD int ap_apr_q4_q(const ap_apr_q4 *b, int i) { return b->q[i >> 1] >> (i & 1) * 4 & 15; }
void ap_apr_q4_decode(const void *src, float *dst, size_t n);
void ap_apr_q4_encode(const float *src, void *dst, size_t n);
#endif
