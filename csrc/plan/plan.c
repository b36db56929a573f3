/*
** plan.c: model -> plan.  Walks rows x layers once; a wire is resolved to the step that wrote it last, so the table's re-used names become single-assignment
** values.  Then every needed value gets a place: kept, its own offset in the keep arena; otherwise the smallest free scratch slot that fits.
** Linear in the number of steps: the free list is as long as the number of values that live at once.
*/
#include "plan.h"
#include "../base/mem.h"
#include <math.h>
#include <stddef.h>
#include <string.h>

const ap_param ap_params[] = {
#define double 0
#define int32_t 1
#define YES 1
#define NO 0
#define M(field, type, edit, text) { #field, text, type, edit, offsetof(ap_step, field) },
#include "params.def"
#undef YES
#undef NO
#undef double
#undef int32_t
};
const int ap_params_n = (int)(sizeof ap_params / sizeof ap_params[0]);

double ap_param_get(const ap_step *s, int field) {
    const char *p = (const char *)s + ap_params[field].offset;
    if (!ap_params[field].is_int) { double v; memcpy(&v, p, sizeof v); return v; }
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

void ap_param_set(ap_step *s, int field, double value) {
    char *p = (char *)s + ap_params[field].offset;
    if (!ap_params[field].is_int) { memcpy(p, &value, sizeof value); return; }
    int32_t v = (int32_t)value;
    memcpy(p, &v, sizeof v);
}

/* ---- rows -> steps ---- */

typedef struct { int step, col, stride; } plan_wire;         /* which step holds it, where in its rows, and how far its rows are apart */
typedef struct { const ap_model *m; ap_plan *p; plan_wire wire[AP_WIRE_N]; } plan_walk;

/* The parts of a buffer: every active row of the weight's group, side by side. */
static void plan_parts(const ap_model *m, const ap_stage_row *r, int layer, ap_step *s) {
    int group = r->weight >= 0 ? r->weight : r->bias;
    if (group < 0) return;
    for (int row = 0; row < AP_W_N && s->nparts < AP_MAX_PARTS; row++) {
        const ap_weight_row *w = &ap_weights[row];
        if (w->group != group || (!ap_on(m->flags, w->flag) && w->otherwise < 0)) continue;
        int64_t rows, cols;
        int nd = ap_shape(m, w->shape, 0, 0, &rows, &cols);
        int slot = ap_slot(row, layer), bias = -1;
        if (r->weight < 0) { bias = slot; slot = -1; }
        else if (r->bias >= 0 && ap_on(m->flags, ap_weights[r->bias].flag)) bias = ap_slot(r->bias, layer);
        s->part[s->nparts++] = (ap_part){ slot, bias, (int32_t)(nd == 2 ? rows : cols) };
        s->k = (int32_t)cols;
    }
}

static void plan_params(const ap_model *m, ap_step *s, int T, int pos) {
    const ap_hparams *h = &m->h;
    s->eps = h->eps; s->theta = h->theta; s->scale = 1.0 / sqrt((double)h->head);
    s->kv_div = h->heads / h->kv_heads; s->kv_mod = h->kv_heads;
    s->heads = h->heads; s->head = h->head; s->pos = pos; s->keys = pos + T;
    s->pos_scale = s->pos_step = 1;
}

static void plan_step(plan_walk *w, int stage, int layer) {
    const ap_stage_row *r = &ap_stages[stage];
    const ap_hparams *h = &w->m->h;
    ap_plan *p = w->p;
    int i = p->n++;
    ap_step *s = &p->s[i];
    int64_t rows, cols;
    *s = (ap_step){ .stage = (uint8_t)stage, .op = (uint8_t)r->op, .layer = (int16_t)layer, .a = -1, .b = -1 };
    ap_shape(w->m, r->shape, p->T, p->pos + p->T, &rows, &cols);
    s->rows = (int32_t)rows; s->cols = (int32_t)cols;
    plan_params(w->m, s, p->T, p->pos);
    plan_parts(w->m, r, layer, s);
    if (r->a >= 0) { s->a = w->wire[r->a].step; s->a_col = w->wire[r->a].col; s->a_stride = w->wire[r->a].stride; }
    if (r->b >= 0) { s->b = w->wire[r->b].step; s->b_col = w->wire[r->b].col; s->b_stride = w->wire[r->b].stride; }
    w->wire[r->out] = (plan_wire){ i, 0, s->cols };
    if (r->out == AP_WIRE_QKV) {                              /* one buffer, three views */
        int qd = h->heads * h->head, kd = h->kv_heads * h->head;
        w->wire[AP_WIRE_Q] = (plan_wire){ i, 0, s->cols };
        w->wire[AP_WIRE_K] = (plan_wire){ i, qd, s->cols };
        w->wire[AP_WIRE_V] = (plan_wire){ i, qd + kd, s->cols };
    }
}

static void plan_span(plan_walk *w, int span, int layer) {
    for (int stage = 0; stage < AP_S_N; stage++)
        if (ap_stages[stage].span == span && ap_on(w->m->flags, ap_stages[stage].flag)) plan_step(w, stage, layer);
}

int ap_plan_build(ap_plan *p, const ap_model *m, int T, int pos, ap_err *e) {
    int64_t scores = (int64_t)m->h.heads * T * ((int64_t)pos + T);
    if (T < 1 || scores > INT32_MAX)
        return ap_fail_at(e, AP_LIMIT, -1, "tokens", "%d tokens at position %d make %lld scores in one piece: give fewer tokens at once", T, pos, (long long)scores);
    *p = (ap_plan){ .T = T, .pos = pos };
    p->s = ap_alloc((uint64_t)AP_S_N * (uint64_t)(m->h.layers + 2), sizeof *p->s);
    if (!p->s) return ap_fail(e, AP_MEMORY, "no memory for the plan of %d layers", m->h.layers);
    plan_walk w = { .m = m, .p = p };
    plan_span(&w, AP_SPAN_ONCE, -1);
    for (int layer = 0; layer < m->h.layers; layer++) plan_span(&w, AP_SPAN_LAYER, layer);
    plan_span(&w, AP_SPAN_TAIL, -1);
    for (int i = 0; i < p->n; i++)                            /* elements are counted in int32 */
        if ((int64_t)p->s[i].rows * p->s[i].cols > INT32_MAX) {
            int stage = p->s[i].stage;
            ap_plan_free(p);
            return ap_fail_at(e, AP_LIMIT, -1, "tokens", "%d tokens make more than 2^31 values of %s in one piece: give fewer tokens at once", T, ap_stages[stage].name);
        }
    return AP_OK;
}

int ap_plan_find(const ap_plan *p, int stage, int layer) {
    for (int i = 0; i < p->n; i++) if (p->s[i].stage == stage && p->s[i].layer == layer) return i;
    return -1;
}

/* May step i read `in` where it read `was`?  An earlier value of the same shape; or nothing, if its operation takes nothing for zero. */
static int plan_input_ok(const ap_plan *p, int i, int was, int in) {
    int op = p->s[i].op;
    if (in == was) return 1;
    if (in == -1) return op == AP_OP_ADD || op == AP_OP_MUL || op == AP_OP_SILU || op == AP_OP_MATMUL || op == AP_OP_BIAS;
    return in >= 0 && in < i && was >= 0 && p->s[in].rows == p->s[was].rows && p->s[in].cols == p->s[was].cols && (p->s[in].op == AP_OP_CACHE) == (p->s[was].op == AP_OP_CACHE);
}

/* Whatever an edit says, no operation may be led out of its arrays. */
static int plan_step_ok(const ap_plan *p, int i, const ap_step *was) {
    const ap_step *s = &p->s[i];
    return plan_input_ok(p, i, was->a, s->a) && plan_input_ok(p, i, was->b, s->b) && s->kv_div >= 1 && s->kv_mod >= 1 && s->kv_mod <= was->kv_mod
        && s->window >= 0 && s->act >= 0 && s->act <= 2 && (s->pairing == 0 || s->pairing == 1) && s->theta >= 1 && isfinite(s->theta);
}

int ap_plan_edit(ap_plan *p, const ap_edit *edit, ap_err *e) {
    const ap_param *param = &ap_params[edit->field];
    int found = 0;
    for (int i = 0; i < p->n; i++) {
        ap_step *s = &p->s[i], was = *s;
        if (s->stage != edit->stage || (edit->layer != -2 && s->layer != edit->layer)) continue;
        if (param->editable && (!param->is_int || (edit->value >= INT32_MIN && edit->value <= INT32_MAX && edit->value == floor(edit->value)))) {
            ap_param_set(s, edit->field, edit->value);
            found = 1;
        }
        if (!found || !plan_step_ok(p, i, &was))
            return ap_fail_at(e, AP_ARGUMENT, -1, param->name, "%s = %g would break the plan at %s", param->name, edit->value, ap_stages[s->stage].name);
    }
    if (!found) return ap_fail_at(e, AP_LOOKUP, -1, ap_stages[edit->stage].name, "this model has no stage %s in layer %d to edit", ap_stages[edit->stage].name, edit->layer);
    return AP_OK;
}

/* ---- liveness and places ---- */

static void plan_need(ap_plan *p, const uint8_t *fed, const uint8_t *root) {
    for (int i = 0; i < p->n; i++) p->s[i].needed = root[i];
    for (int i = p->n - 1; i >= 0; i--) {                     /* inputs stand before their readers, so one pass backwards is enough */
        const ap_step *s = &p->s[i];
        if (!s->needed || fed[i]) continue;
        if (s->a >= 0) p->s[s->a].needed = 1;
        if (s->b >= 0) p->s[s->b].needed = 1;
    }
}

typedef struct { size_t at, n; } plan_slot;

static size_t plan_take(plan_slot *list, int *n, size_t size, size_t *end) {
    int best = -1;
    for (int i = 0; i < *n; i++) if (list[i].n >= size && (best < 0 || list[i].n < list[best].n)) best = i;
    if (best < 0) { *end += size; return *end - size; }
    size_t at = list[best].at;
    list[best].at += size; list[best].n -= size;
    if (!list[best].n) list[best] = list[--*n];
    return at;
}

/* Neighbours that are free become one slot, so that a deep model needs no more than a shallow one. */
static void plan_give(plan_slot *list, int *n, plan_slot back) {
    for (int i = 0; i < *n; ) {
        int before = list[i].at + list[i].n == back.at, after = back.at + back.n == list[i].at;
        if (!before && !after) { i++; continue; }
        back = (plan_slot){ before ? list[i].at : back.at, back.n + list[i].n };
        list[i] = list[--*n];
    }
    list[(*n)++] = back;
}

static size_t plan_size(const ap_step *s) { return ((size_t)s->rows * (size_t)s->cols + 15) & ~(size_t)15; }   /* 64-byte rows for the kernels */

int ap_plan_place(ap_plan *p, const uint8_t *fed, const uint8_t *root, ap_err *e) {
    int *last = ap_alloc((uint64_t)p->n, sizeof *last);
    plan_slot *list = ap_alloc((uint64_t)p->n, sizeof *list);
    int free_n = 0;
    if (!last || !list) { ap_free(last); ap_free(list); return ap_fail(e, AP_MEMORY, "no memory for the plan"); }
    plan_need(p, fed, root);
    for (int i = 0; i < p->n; i++) {
        last[i] = i;
        if (!p->s[i].needed || fed[i]) continue;
        if (p->s[i].a >= 0) last[p->s[i].a] = i;
        if (p->s[i].b >= 0) last[p->s[i].b] = i;
    }
    for (int i = 0; i < p->n; i++) {
        ap_step *s = &p->s[i];
        if (!s->needed) continue;
        if (s->kept) { s->at = p->keep_n; p->keep_n += plan_size(s); }
        else if (s->op != AP_OP_CACHE) s->at = plan_take(list, &free_n, plan_size(s), &p->scratch_n);
        int in[2] = { s->a, s->b != s->a ? s->b : -1 };       /* a value whose last reader this is gives its place back */
        for (int j = 0; j < 2; j++) {
            if (in[j] < 0 || last[in[j]] != i || p->s[in[j]].kept || p->s[in[j]].op == AP_OP_CACHE || fed[i]) continue;
            plan_give(list, &free_n, (plan_slot){ p->s[in[j]].at, plan_size(&p->s[in[j]]) });
        }
    }
    ap_free(last); ap_free(list);
    return AP_OK;
}

void ap_plan_free(ap_plan *p) { ap_free(p->s); *p = (ap_plan){ 0 }; }
