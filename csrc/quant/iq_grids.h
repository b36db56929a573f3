/*
** iq_grids.h: the codebooks that the IQ formats share: constant arrays, and what their points mean.  A point of IQ2 and IQ1 is eight values of two bits, one
** of IQ3 four of three bits, the first value lowest; each is the number of a level.  IQ2 and IQ3 keep the signs apart.  The decoders of those formats use it.
*/
#ifndef AP_IQ_GRIDS_H
#define AP_IQ_GRIDS_H
#include "format.h"
/* The GPU has the arrays in its own memory: it includes iq_grids.c once more with another word here. */
#ifndef AP_GRID
#define AP_GRID const
#endif
extern const uint16_t ap_iq2_xxs_grid[256], ap_iq2_xs_grid[512], ap_iq2_s_grid[1024], ap_iq3_xxs_grid[256], ap_iq3_s_grid[512];
extern const uint16_t ap_iq1_s_grid[2048];                                              /* IQ1_M uses it too */
AP_HD int ap_iq2_level(int point, int j) { int n = point >> 2 * j & 3; return 8 + 17 * n + (n >> 1); }         /* 8, 25, 43 */
AP_HD int ap_iq1_level(int point, int j) { return (point >> 2 * j & 3) - 1; }
AP_HD int ap_iq3_xxs_level(int point, int j) { int n = point >> 3 * j & 7; return 4 + 8 * n + (n == 7) * 2; }   /* 4, 12 .. 52, 62 */
AP_HD int ap_iq3_s_level(int point, int j) { return 1 + 2 * (point >> 3 * j & 7); }
/* Eight signs of which seven are stored, the first one lowest: the number of minuses is even. */
AP_HD int ap_iq_signs(int seven) {
    int odd = seven ^ seven >> 4;
    odd ^= odd >> 2;
    return seven | ((odd ^ odd >> 1) & 1) << 7;
}
AP_HD int ap_iq_signed(int level, int signs, int j) { return signs >> j & 1 ? -level : level; }
#endif
