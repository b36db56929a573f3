/*
** tables.c: the row files, expanded.  No code but look-up by name.  Every row macro is undefined by its own file.
*/
#include "tables.h"
#include <string.h>

#define COUNT(a) ((int)(sizeof(a) / sizeof(a)[0]))

const ap_stage_row ap_stages[AP_S_N] = {
#define S(name_, span_, op_, out_, a_, b_, weight_, bias_, shape_, flag_, lanes_, hf_, node_, pop_) { \
    .name = #name_, .shape = shape_, .lanes = lanes_, .hf = hf_, .node = node_, .population = #pop_, .flag = AP_FLAG_##flag_, \
    .span = AP_SPAN_##span_, .op = AP_OP_##op_, .out = AP_WIRE_##out_, .a = AP_WIRE_##a_, .b = AP_WIRE_##b_, .weight = AP_W_##weight_, .bias = AP_W_##bias_ },
#include "stages.def"
};
const ap_named_row ap_ops[AP_OP_N] = {
#define O(name, text) { #name, text },
#include "ops.def"
};
const ap_named_row ap_flags[AP_FLAG_N] = {
#define G(name, text) { #name, text },
#include "flags.def"
};
const ap_weight_row ap_weights[AP_W_N] = {
#define W(name_, group_, gguf_, hf_, shape_, form_, flag_, otherwise_) { \
    .name = #name_, .gguf = gguf_, .hf = hf_, .shape = shape_, .group = AP_W_##group_, .form = AP_FORM_##form_, .otherwise = AP_W_##otherwise_, .flag = AP_FLAG_##flag_ },
#include "weights.def"
};

#define DENSE     AP_FLAG_DENSE
#define QKV_BIAS  AP_FLAG_QKV_BIAS
#define QK_NORM   AP_FLAG_QK_NORM
#define UNTIED    AP_FLAG_UNTIED
#define ATTN_BIAS (AP_FLAG_QKV_BIAS | AP_FLAG_O_BIAS)
const ap_arch_row ap_archs[AP_ARCH_N] = {
#define A(name, hf_class, flags, optional) { #name, hf_class, flags, optional },
#include "archs.def"
};
#undef DENSE
#undef QKV_BIAS
#undef QK_NORM
#undef UNTIED
#undef ATTN_BIAS

const ap_quirk_row ap_quirks[] = {
#define K(arch, container, quirk) { AP_ARCH_##arch, #container, AP_QUIRK_##quirk },
#include "quirks.def"
};
const int ap_quirks_n = COUNT(ap_quirks);

#define INT 1
#define NUM 0
#define REQUIRED 1
#define DERIVED 0
const ap_hparam_row ap_hparam_rows[] = {
#define P(field, kind, gguf, hf, apr, need) { #field, kind, need, { gguf, hf, apr } },
#define C(...)
#define N(...)
#include "hparams.def"
};
const int ap_hparam_rows_n = COUNT(ap_hparam_rows);
#undef INT
#undef NUM
#undef REQUIRED
#undef DERIVED
const ap_check_row ap_checks[] = {
#define P(...)
#define C(gguf, hf, apr, rule, meaning) { { gguf, hf, apr }, AP_RULE_##rule, meaning },
#define N(...)
#include "hparams.def"
};
const int ap_checks_n = COUNT(ap_checks);
const ap_ignored_row ap_ignored[] = {
#define P(...)
#define C(...)
#define N(gguf, hf, apr) { { gguf, hf, apr } },
#include "hparams.def"
};
const int ap_ignored_n = COUNT(ap_ignored);

const char *const ap_wire_names[AP_WIRE_N] = {
#define X(name) #name,
    AP_WIRES(X)
#undef X
};
const char *const ap_span_names[3] = { "ONCE", "LAYER", "TAIL" };
const char *const ap_form_names[AP_FORM_N] = {
#define X(name) #name,
    AP_FORMS(X)
#undef X
};

int ap_stage_find(const char *name) {
    for (int i = 0; i < AP_S_N; i++) if (!strcmp(ap_stages[i].name, name)) return i;
    return -1;
}

int ap_weight_find(const char *name) {
    for (int i = 0; i < AP_W_N; i++) if (!strcmp(ap_weights[i].name, name)) return i;
    return -1;
}
