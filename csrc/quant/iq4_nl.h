/* iq4_nl.h: 32 nibbles, each the number of one of sixteen unevenly spaced levels, under one half scale.  value = d * level[q].  Nibbles lie as in q4_0. */
#ifndef AP_IQ4_NL_H
#define AP_IQ4_NL_H
#include "format.h"
typedef struct { uint8_t d[2]; uint8_t q[16]; } ap_iq4_nl;
AP_ASSERT(sizeof(ap_iq4_nl) == 18, "iq4_nl is 18 bytes on disk");
AP_HD int ap_iq4_level(int q) {         /* the format's own sixteen levels: dense near zero, and none of them zero */
    const int8_t level[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    return level[q];
}
AP_HD int ap_iq4_nl_q(const ap_iq4_nl *b, int i) { return ap_iq4_level(i < 16 ? b->q[i] & 15 : b->q[i - 16] >> 4); }
void ap_iq4_nl_decode(const void *src, float *dst, size_t n);
#endif
