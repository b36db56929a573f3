/*
** compare.h: everything that one pass over two arrays can say of them.  NaN and infinities are counted first and never enter a sum; the sums are those of the
** pairs in which both are finite.  py/measure.c calls it.  Arrays in, numbers out: no stage, no model, no verdict.
*/
#ifndef AP_COMPARE_H
#define AP_COMPARE_H
#include <stdint.h>
#include "../base/err.h"

/* Steps of float32: how many finite pairs are more than so many apart is counted. */
enum { AP_STEPS = 4 };
static const uint32_t ap_steps[AP_STEPS] = { 1, 16, 256, 65536 };

typedef struct {
    uint64_t bits_equal, value_equal;           /* the second: 0 and -0 are equal, and two NaN                       */
    uint64_t nan_a, nan_b, nan_both;            /* NaN in a alone, in b alone, in both                                */
    uint64_t inf_unlike;                        /* an infinity that meets another value than itself, and no NaN       */
    uint64_t finite;                            /* pairs of finite values: those of the sums below                    */
    double a, b, aa, bb, dd, ab;                /* sums of a, b, a^2, b^2, (a - b)^2 and (a - b)(a + b)                */
    double max_abs;                             /* largest |a - b|                                                    */
    uint64_t over[AP_STEPS];                    /* finite pairs more than ap_steps[i] float32 steps apart             */
    uint32_t max_ulp;                           /* largest distance in float32 steps                                  */
    int64_t first, max_at;                      /* first place whose bits differ; first place of max_abs; -1: none    */
} ap_comparison;

/* One of the places that differ most.  gap: |a - b|; of an infinity that meets something else AP_GAP_INF, where one is NaN AP_GAP_NAN. */
typedef struct { int64_t at; double gap; } ap_place;
#define AP_GAP_INF 1e300
#define AP_GAP_NAN 2e300

int ap_compare(const float *a, const float *b, uint64_t n, int tier, int threads, ap_comparison *out, ap_place *top, int limit, int *found, ap_err *e);
#endif
