/*
** q4_k.h: a super-block of 256 nibbles: 8 groups of 32, each with a 6-bit scale and a 6-bit minimum under two half scales.
** value = (d * sc) * q - (dmin * m).  Groups come in pairs that share 32 bytes: the even one is the low nibbles, the odd one the high.
*/
#ifndef AP_Q4_K_H
#define AP_Q4_K_H
#include "format.h"
typedef struct { uint8_t d[2], dmin[2]; uint8_t s[12]; uint8_t q[128]; } ap_q4_k;
AP_ASSERT(sizeof(ap_q4_k) == 144, "q4_k is 144 bytes on disk");
AP_HD int ap_q4_k_q(const ap_q4_k *b, int i) { return b->q[(i >> 6) * 32 + (i & 31)] >> (i >> 5 & 1) * 4 & 15; }
/* The twelve bytes: 0..3 hold the scales of groups 0..3 in six bits, 4..7 their minima; 8..11 hold the low four bits of scale and minimum of groups
** 4..7, whose upper two bits are the ones left over at the top of bytes 0..7.  q5_k packs its own the same way. */
AP_HD int ap_q4_k_scale(const uint8_t *s, int g) { return g < 4 ? s[g] & 63     : (s[g + 4] & 15) | s[g - 4] >> 6 << 4; }
AP_HD int ap_q4_k_min  (const uint8_t *s, int g) { return g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4   | s[g] >> 6 << 4; }
void ap_q4_k_decode(const void *src, float *dst, size_t n);
void ap_q4_k_encode(const float *src, void *dst, size_t n);
#endif
