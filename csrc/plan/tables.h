/*
** tables.h: the row files as C: enums, structs, and the arrays that everything else reads.  Pure data.  Below the planner and both backends;
** py/tables.c exports the same rows to Python, so no list of stages, operations, weights or architectures exists twice.
*/
#ifndef AP_TABLES_H
#define AP_TABLES_H
#include <stdint.h>
#include "../base/err.h"

typedef enum {
#define O(name, text) AP_OP_##name,
#include "ops.def"
    AP_OP_N
} ap_op;

typedef enum {
#define S(name, ...) AP_S_##name,
#include "stages.def"
    AP_S_N
} ap_stage;

typedef enum {
    AP_W_NONE = -1,
#define W(name, ...) AP_W_##name,
#include "weights.def"
    AP_W_N
} ap_weight_id;

enum {
#define G(name, text) AP_FLAGBIT_##name,
#include "flags.def"
    AP_FLAG_N
};
enum {
    AP_FLAG_ALWAYS = 0,
#define G(name, text) AP_FLAG_##name = 1 << AP_FLAGBIT_##name,
#include "flags.def"
};

typedef enum {
#define A(name, ...) AP_ARCH_##name,
#include "archs.def"
    AP_ARCH_N
} ap_arch_id;

/* A wire is "the latest value of this kind": see stages.def. */
#define AP_WIRES(X) X(HIDDEN) X(TABLE) X(NORMED) X(QKV) X(Q) X(K) X(V) X(KCACHE) X(VCACHE) X(SCORES) X(PROBS) X(ATT) X(BRANCH) X(GATE) X(UP) X(ACT) X(LOGITS)
typedef enum {
    AP_WIRE_NONE = -1,
#define X(name) AP_WIRE_##name,
    AP_WIRES(X)
#undef X
    AP_WIRE_N
} ap_wire;

typedef enum { AP_SPAN_ONCE, AP_SPAN_LAYER, AP_SPAN_TAIL } ap_span;
#define AP_FORMS(X) X(MATRIX) X(VECTOR) X(BIAS)
typedef enum {
#define X(name) AP_FORM_##name,
    AP_FORMS(X)
#undef X
    AP_FORM_N
} ap_form;

typedef struct {
    const char *name, *shape, *lanes, *hf, *node, *population;
    uint32_t flag;
    int span, op, out, a, b, weight, bias;
} ap_stage_row;
typedef struct { const char *name, *text; } ap_named_row;
typedef struct { const char *name, *gguf, *hf, *shape; int group, form, otherwise; uint32_t flag; } ap_weight_row;
typedef struct { const char *name, *hf_class; uint32_t flags, optional; } ap_arch_row;
typedef struct { int arch; const char *container; uint32_t quirk; } ap_quirk_row;
typedef enum { AP_IN_GGUF, AP_IN_HF, AP_IN_APR, AP_IN_N } ap_spelling;      /* whose names a container uses: a column of hparams.def */
typedef struct { const char *field; int is_int, required; const char *key[AP_IN_N]; } ap_hparam_row;
typedef enum { AP_RULE_HEAD, AP_RULE_FALSE, AP_RULE_TRUE, AP_RULE_ONE, AP_RULE_SILU, AP_RULE_DEFAULT, AP_RULE_FULL, AP_RULE_NULL_ONLY, AP_RULE_OPTION, AP_RULE_ABSENT } ap_rule;
typedef struct { const char *key[AP_IN_N]; int rule; const char *meaning; } ap_check_row;
typedef struct { const char *key[AP_IN_N]; } ap_ignored_row;

enum { AP_QUIRK_ROPE_PAIRS = 1 };

extern const ap_stage_row   ap_stages[AP_S_N];
extern const ap_named_row   ap_ops[AP_OP_N], ap_flags[AP_FLAG_N];
extern const ap_weight_row  ap_weights[AP_W_N];
extern const ap_arch_row    ap_archs[AP_ARCH_N];
extern const ap_quirk_row   ap_quirks[];
extern const ap_hparam_row  ap_hparam_rows[];
extern const ap_check_row   ap_checks[];
extern const ap_ignored_row ap_ignored[];
extern const int ap_quirks_n, ap_hparam_rows_n, ap_checks_n, ap_ignored_n;
extern const char *const ap_wire_names[AP_WIRE_N], *const ap_span_names[3], *const ap_form_names[AP_FORM_N];

static inline int ap_on(uint32_t flags, uint32_t flag) { return (flags & flag) == flag; }
int ap_stage_find(const char *name);                    /* -1 when there is no such stage */
int ap_weight_find(const char *name);
#endif
