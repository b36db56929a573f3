/*
** plan.h: the forward pass of one model for T tokens at a position, as a flat array of steps.  Pure data: the same array drives the CPU, CUDA and the
** printout.  An operation reads its step and never the model, so nearly every fault can be planted by editing a field here.
*/
#ifndef AP_PLAN_H
#define AP_PLAN_H
#include "model.h"

enum { AP_MAX_PARTS = 3 };
typedef struct { int32_t w, bias, cols; } ap_part;      /* slots of model.w (-1 none) and the columns that they fill */

typedef struct {
    uint8_t stage, op, kept, needed, nparts;
    int16_t layer;                  /* -1 outside the layers                                   */
    int32_t a_col, b_col;           /* first column of the input inside its step's rows        */
    int32_t a_stride, b_stride;     /* values between rows of the input                        */
    ap_part part[AP_MAX_PARTS];
    int32_t rows, cols, k;          /* out is [rows, cols]; k is what a reduction sums over    */
    size_t at;                      /* value offset in its arena: kept, or scratch             */
#define M(field, type, edit, text) type field;
#include "params.def"
} ap_step;

typedef struct {
    ap_step *s;
    int n, T, pos;
    size_t keep_n, scratch_n;       /* values in each arena */
} ap_plan;

typedef struct { int stage, layer; } ap_key;            /* layer -1 outside the layers */
typedef struct { int stage, layer, field; double value; } ap_edit;  /* layer -2: every layer; field: row of params.def */
typedef struct { const char *name, *text; int is_int, editable; size_t offset; } ap_param;
extern const ap_param ap_params[];
extern const int ap_params_n;
double ap_param_get(const ap_step *s, int field);
void   ap_param_set(ap_step *s, int field, double value);

/* keep[i] says whether step i's value must outlive the run; NULL keeps nothing. */
int  ap_plan_build(ap_plan *p, const ap_model *m, int T, int pos, ap_err *e);
int  ap_plan_edit(ap_plan *p, const ap_edit *edit, ap_err *e);
/* Marks what must run for the roots, given which steps are fed, then gives every needed value a place. */
int  ap_plan_place(ap_plan *p, const uint8_t *fed, const uint8_t *root, ap_err *e);
int  ap_plan_find(const ap_plan *p, int stage, int layer);   /* -1 when the model has no such step */
void ap_plan_free(ap_plan *p);
#endif
