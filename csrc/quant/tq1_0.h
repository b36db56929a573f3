/*
** tq1_0.h: a super-block of 256 numbers -1, 0, 1 under one half scale, five to a byte: a byte is the fraction 0.t0 t1 t2 t3 t4 in base three, rounded up to
** 256ths, so that multiplying by 3^k moves digit k to the top.  value = d * (t - 1).
** 32 bytes q hold values 0 .. 159, digit by digit, 32 apart; 16 bytes hold 160 .. 239, 16 apart; the four bytes h hold 240 .. 255, 4 apart, four digits each.
*/
#ifndef AP_TQ1_0_H
#define AP_TQ1_0_H
#include "format.h"
typedef struct { uint8_t q[48], h[4]; uint8_t d[2]; } ap_tq1_0;
AP_ASSERT(sizeof(ap_tq1_0) == 54, "tq1_0 is 54 bytes on disk");
AP_HD int ap_tq1_0_digit(uint8_t byte, int k) {
    const uint8_t power[5] = { 1, 3, 9, 27, 81 };
    return (uint8_t)(byte * power[k]) * 3 >> 8;
}
AP_HD int ap_tq1_0_q(const ap_tq1_0 *b, int i) {
    if (i < 160) return ap_tq1_0_digit(b->q[i & 31], i >> 5) - 1;
    if (i < 240) return ap_tq1_0_digit(b->q[32 + (i & 15)], (i - 160) >> 4) - 1;
    return ap_tq1_0_digit(b->h[i & 3], (i - 240) >> 2) - 1;
}
void ap_tq1_0_decode(const void *src, float *dst, size_t n);
#endif
