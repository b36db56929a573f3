/*
** iq4_xs.h: a super-block of 256 nibbles, levels as in iq4_nl: 8 groups of 32, each with a six-bit scale less 32 under one half scale.
** value = (d * sc) * level[q].  Scale g: four bits from the nibbles l, the even one low, and two bits at 2 g of the 16-bit h.  Each group has 16 bytes of q,
** its first 16 values low, its last 16 high.
*/
#ifndef AP_IQ4_XS_H
#define AP_IQ4_XS_H
#include "iq4_nl.h"
typedef struct { uint8_t d[2], h[2], l[4], q[128]; } ap_iq4_xs;
AP_ASSERT(sizeof(ap_iq4_xs) == 136, "iq4_xs is 136 bytes on disk");
AP_HD int ap_iq4_xs_q(const ap_iq4_xs *b, int i) { return ap_iq4_level(b->q[(i >> 5) * 16 + (i & 15)] >> (i >> 4 & 1) * 4 & 15); }
AP_HD int ap_iq4_xs_scale(const ap_iq4_xs *b, int g) { return ((b->l[g >> 1] >> (g & 1) * 4 & 15) | (ap_le16(b->h) >> 2 * g & 3) << 4) - 32; }
void ap_iq4_xs_decode(const void *src, float *dst, size_t n);
#endif
