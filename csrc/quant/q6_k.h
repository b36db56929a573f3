/*
** q6_k.h: a super-block of 256 six-bit numbers: 16 groups of 16, each with a signed byte as scale under one half scale.  value = (d * sc) * (q - 32).
** Each half of 128 values has 64 bytes of nibbles l (its first 64 values low, its last 64 high) and 32 bytes h of four two-bit tops, value by value 32 apart.
*/
#ifndef AP_Q6_K_H
#define AP_Q6_K_H
#include "format.h"
typedef struct { uint8_t l[128], h[64]; int8_t s[16]; uint8_t d[2]; } ap_q6_k;
AP_ASSERT(sizeof(ap_q6_k) == 210, "q6_k is 210 bytes on disk");
AP_HD int ap_q6_k_q(const ap_q6_k *b, int i) {
    int half = i >> 7, low = b->l[half * 64 + (i & 63)] >> (i >> 6 & 1) * 4 & 15, top = b->h[half * 32 + (i & 31)] >> (i >> 5 & 3) * 2 & 3;
    return (low | top << 4) - 32;
}
void ap_q6_k_decode(const void *src, float *dst, size_t n);
void ap_q6_k_encode(const float *src, void *dst, size_t n);
#endif
