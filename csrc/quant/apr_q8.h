/*
** apr_q8.h: one float32 scale for a whole tensor, then a signed byte per value.  value = q * scale.  No blocks: a row is found by counting values.
*/
#ifndef AP_APR_Q8_H
#define AP_APR_Q8_H
#include "format.h"
enum { AP_APR_Q8_SCALE = 4 };                   /* bytes of the scale before the values */
void ap_apr_q8_values(const uint8_t *tensor, int64_t first, float *dst, size_t n);
void ap_apr_q8_decode(const void *src, float *dst, size_t n);  /* the first n values of a tensor */
void ap_apr_q8_encode(const float *src, void *dst, size_t n);  /* n: the whole tensor */
#endif
