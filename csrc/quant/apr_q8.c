/*
** apr_q8.c: the reference decode of apr_q8.h; the product rounds once.  Owns nothing; format.h's row reader and the tests call it.
*/
#include <string.h>
#include "apr_q8.h"

void ap_apr_q8_values(const uint8_t *tensor, int64_t first, float *dst, size_t n) {
    const int8_t *q = (const int8_t *)tensor + AP_APR_Q8_SCALE + first;
    float scale;
    memcpy(&scale, tensor, sizeof scale);
    for (size_t i = 0; i < n; i++) dst[i] = (float)q[i] * scale;
}

void ap_apr_q8_decode(const void *src, float *dst, size_t n) { ap_apr_q8_values(src, 0, dst, n); }
