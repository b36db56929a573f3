/*
** backend.h: what a device must offer.  cpu/ and cuda/ each export one of these; run/ drives it and knows nothing else about them.  Operations are one
** per row of ops.def, so a backend that lacks one does not link.
*/
#ifndef AP_BACKEND_H
#define AP_BACKEND_H
#include "plan.h"

typedef struct ap_dev ap_dev;
/* How a device is driven; the CPU has one way only.  AUTO: single tokens as a graph, longer pieces kernel by kernel.  EAGER: kernel by kernel.
** CHECKED: the same, and after each kernel its errors and the guards round every buffer are looked at, so that a fault is tied to its stage. */
typedef enum { AP_MODE_AUTO, AP_MODE_EAGER, AP_MODE_CHECKED, AP_MODE_N } ap_mode;
typedef struct {
    int threads;                        /* 0: as many as there are cores                              */
    int tier;                           /* row of tiers.def, -1: the best that this CPU has           */
    int mode;                           /* an ap_mode                                                 */
    int (*poll)(void *ctx);             /* called at least every 50 ms while an operation runs; non-zero stops it; may be NULL */
    void *poll_ctx;
} ap_backend_options;
typedef struct {
    const char *name;
    int  (*open )(ap_dev **dev, const ap_model *m, const ap_weight *w, const ap_backend_options *o, ap_err *e);  /* w: the slots of m, possibly with values put in their places; borrowed */
    int  (*arena)(ap_dev *dev, const ap_plan *p, const int32_t *tokens, float *keep, ap_err *e);  /* places for one run; keep is the host's kept arena */
    int  (*put  )(ap_dev *dev, const ap_plan *p, int step, const float *host, ap_err *e);         /* the step's value is this                          */
    int  (*op[AP_OP_N])(ap_dev *dev, const ap_plan *p, const ap_step *s, ap_err *e);
    int  (*fetch)(ap_dev *dev, const ap_plan *p, float *keep, ap_err *e);                         /* CPU: nothing to do.  CUDA: one copy               */
    void (*close)(ap_dev *dev);
    const char *(*tier)(const ap_dev *dev);     /* instruction set, or name of the device             */
    const char *(*path)(const ap_dev *dev);     /* what really ran for the last request, in words; NULL: the backend has one way only */
} ap_backend;
extern const ap_backend ap_cpu;
#endif
