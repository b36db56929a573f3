/*
** sums.h: what adding dot products in float32 leaves: a variance, cheap or from every partial sum, and the bits where the order is declared.  Arrays in,
** numbers out: which order an engine has, and what a variance means, is the caller's.  judge/sums.py calls it by py/measure.c.  It judges the engine, so it
** shares no code with csrc/cpu.
*/
#ifndef AP_SUMS_H
#define AP_SUMS_H
#include <stdint.h>
#include "../base/err.h"

enum { AP_MAX_LANES = 64, AP_SEGMENT = 32 };    /* AP_SEGMENT: longest stretch of a chain over which ap_sums_estimate interpolates */

/* A stack of dot products, result [b, t, n], and the order in which each is added by fused multiply-adds. */
typedef struct {
    const double *x;                            /* [b, t, k]                                                       */
    const float *w;                             /* [b, n, k], or NULL                                              */
    const double *wide;                         /* the same as doubles, where w is NULL                            */
    uint64_t b, t, n, k;                        /* whoever fills this in knows that the arrays have these sizes    */
    int lanes;                                  /* a power of two up to AP_MAX_LANES: in lanes, then the tree; 0:  */
    uint64_t block;                             /* in order in blocks of so many, block sums in order; 0: unknown  */
} ap_dots;

/* threads 0: as many as there are CPUs.  They split the results and never a sum. */
int ap_sums_estimate(const ap_dots *d, int threads, double *out, ap_err *e);                                        /* out [b, t, n]               */
int ap_sums_exact(const ap_dots *d, const int64_t *flat, uint64_t count, int threads, double *out, ap_err *e);      /* out [count], flat in [b, t, n] */
/* x [b, t, k] and w [b, n, k] to the float32 bits of lanes and tree; flat NULL: all of [b, t, n]. */
typedef struct { const float *x, *w; uint64_t b, t, n, k; int lanes; } ap_lanes;
int ap_sums_lanes(const ap_lanes *d, const int64_t *flat, uint64_t count, int threads, float *out, ap_err *e);
#endif
