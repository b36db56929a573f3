/*
** math.h: exp, log, sine and cosine of our own, in plain float64 without contraction, because libm gives different bits on different CPUs.  Good to about
** 1e-15 relative over the ranges stated; callers round once to float32, so the result is the correctly rounded one but for about one in 10^7.  The GPU runs the same lines.
** Series are Taylor's; the degree is the first whose next term is below 1e-17 at the edge of the reduced range.
*/
#ifndef AP_MATH_H
#define AP_MATH_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "hd.h"

/* Nearest integer of |x| < 2^51, by the rounding of the addition itself. */
AP_HD double ap_rint(double x) {
    const double magic = 6755399441055744.0;                  /* 1.5 * 2^52 */
    volatile double y = x + magic;                            /* volatile: the pair must not be folded away */
    return y - magic;
}

AP_HD double ap_two_to(int k) {                       /* 2^k, -1022 <= k <= 1023 */
    uint64_t bits = (uint64_t)(k + 1023) << 52;
    double y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* exp(x); 0 below -708, inf above 709: far outside what float32 holds. */
AP_HD double ap_exp(double x) {
    if (x != x) return x;
    if (x < -708) return 0;
    if (x > 709) return (double)INFINITY;
    double k = ap_rint(x * 1.4426950408889634);
    double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;     /* ln 2 in two parts: the first has 32 bits, so k times it is exact */
    double p = 1.0 / 6227020800.0;                                                         /* 1/13! */
    p = p * r + 1.0 / 479001600.0; p = p * r + 1.0 / 39916800.0; p = p * r + 1.0 / 3628800.0; p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;     p = p * r + 1.0 / 5040.0;     p = p * r + 1.0 / 720.0;     p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;        p = p * r + 1.0 / 6.0;        p = p * r + 0.5;
    return (1 + (r + r * r * p)) * ap_two_to((int)k);
}

/* log(x) of a positive normal x: mantissa in [sqrt 1/2, sqrt 2), then the odd series of (m-1)/(m+1) to s^23. */
AP_HD double ap_log(double x) {
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752) { m *= 2; e--; }
    double s = (m - 1) / (m + 1), z = s * s, p = 1.0 / 23;
    for (int n = 21; n >= 1; n -= 2) p = p * z + 1.0 / n;
    return e * 6.93147180369123816490e-01 + (2 * s * p + e * 1.90821492927058770002e-10);
}

/* sin and cos of |x| < 2^20: pi/2 in three parts of 33 bits, so that the multiples are exact. */
AP_HD void ap_sincos(double x, double *sin_x, double *cos_x) {
    double q = ap_rint(x * 0.63661977236758134308);
    double r = ((x - q * 1.57079632673412561417e+00) - q * 6.07710050630396597660e-11) - q * 2.02226624879595063154e-21;
    double z = r * r, s = 1.0 / 355687428096000.0, c = 1.0 / 6402373705728000.0;           /* 1/17!, 1/18! */
    s = s * z - 1.0 / 1307674368000.0; s = s * z + 1.0 / 6227020800.0; s = s * z - 1.0 / 39916800.0; s = s * z + 1.0 / 362880.0;
    s = s * z - 1.0 / 5040.0;          s = s * z + 1.0 / 120.0;        s = s * z - 1.0 / 6.0;
    s = r + r * z * s;
    c = -c * z + 1.0 / 20922789888000.0; c = c * z - 1.0 / 87178291200.0; c = c * z + 1.0 / 479001600.0; c = c * z - 1.0 / 3628800.0;
    c = c * z + 1.0 / 40320.0;           c = c * z - 1.0 / 720.0;         c = c * z + 1.0 / 24.0;        c = c * z - 0.5;
    c = 1 + z * c;
    switch ((int64_t)q & 3) {
        case 0:  *sin_x = s;  *cos_x = c;  break;
        case 1:  *sin_x = c;  *cos_x = -s; break;
        case 2:  *sin_x = -s; *cos_x = -c; break;
        default: *sin_x = -c; *cos_x = s;  break;
    }
}
#endif
