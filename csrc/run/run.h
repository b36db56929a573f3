/*
** run.h: one mutable timeline of a model: arenas, cache, position.  ap_run_forward builds a plan for the tokens, applies the edits, places values, and walks the
** steps: a step is fed, run, or not needed.  That one loop is prefill, decode, capture, injection, replay of one stage and planted faults, on any backend.
** A second concurrent call is refused by the caller (py/run.c).
*/
#ifndef AP_RUN_H
#define AP_RUN_H
#include "../plan/backend.h"

typedef struct { ap_key key; const float *value; size_t n; } ap_feed;
typedef struct { int weight, layer; const float *value; } ap_override;      /* replaces a weight by float32 values in Hugging Face lane order; borrowed */

typedef struct {
    const ap_model *m;
    const ap_backend *be;
    ap_dev *dev;
    ap_weight *w;                   /* the model's slots, with the overrides in their places */
    ap_edit *edits; int nedits;
    int pos;
} ap_run;

typedef struct {
    const int32_t *tokens; int T;
    const ap_key *keep; int nkeep;          /* layer -2: in every layer */
    int keep_all;
    const ap_feed *feeds; int nfeeds;
    int advance;                            /* 0: a replay; only what the kept values need is run and the position stays */
} ap_request;

enum { AP_MAX_POSITION = 1 << 20 };         /* the sine's range reduction is exact up to here */

int  ap_run_open(ap_run **out, const ap_model *m, const ap_backend *be, const ap_backend_options *o, const ap_override *ov, int nov, ap_err *e);
int  ap_run_edit(ap_run *r, const ap_edit *edits, int n, ap_err *e);
/* On success plan holds the steps (free it with ap_plan_free) and *keep the kept arena (ap_free it), NULL when nothing was kept. */
int  ap_run_forward(ap_run *r, const ap_request *q, ap_plan *plan, float **keep, ap_err *e);
void ap_run_close(ap_run *r);
#endif
