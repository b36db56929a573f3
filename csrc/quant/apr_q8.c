/*
** apr_q8.c: the reference decode and the encoder of apr_q8.h; the product rounds once.  Owns nothing; format.h's row reader, the writers and the tests call it.
*/
#include <math.h>
#include <string.h>
#include "apr_q8.h"

void ap_apr_q8_values(const uint8_t *tensor, int64_t first, float *dst, size_t n) {
    const int8_t *q = (const int8_t *)tensor + AP_APR_Q8_SCALE + first;
    float scale;
    memcpy(&scale, tensor, sizeof scale);
    for (size_t i = 0; i < n; i++) dst[i] = (float)q[i] * scale;
}

void ap_apr_q8_decode(const void *src, float *dst, size_t n) { ap_apr_q8_values(src, 0, dst, n); }

/* The largest magnitude of the tensor becomes 127; where even the scale is zero, all is. */
void ap_apr_q8_encode(const float *src, void *dst, size_t n) {
    int8_t *q = (int8_t *)dst + AP_APR_Q8_SCALE;
    float most = 0;
    for (size_t i = 0; i < n; i++) if (fabsf(src[i]) > most) most = fabsf(src[i]);
    float scale = most / 127;
    memcpy(dst, &scale, sizeof scale);
    for (size_t i = 0; i < n; i++) {
        float v = scale ? roundf(src[i] / scale) : 0;
        q[i] = (int8_t)(v < -127 ? -127 : v > 127 ? 127 : v);   /* beyond 127 only where the scale itself is rounded to few bits */
    }
}
