/*
** run.c: the step loop.  Knows a plan and a backend; computes nothing itself.
*/
#include "run.h"
#include "../base/mem.h"
#include <fenv.h>
#include <string.h>

int ap_run_open(ap_run **out, const ap_model *m, const ap_backend *be, const ap_backend_options *o, const ap_override *ov, int nov, ap_err *e) {
    int slots = (m->h.layers + 1) * AP_W_N;
    ap_run *r = ap_alloc(1, sizeof *r);
    *out = NULL;
    if (!r) return ap_fail(e, AP_MEMORY, "no memory for a run");
    r->m = m; r->be = be;
    r->w = ap_alloc((uint64_t)slots, sizeof *r->w);
    if (!r->w) { ap_run_close(r); return ap_fail(e, AP_MEMORY, "no memory for a run"); }
    memcpy(r->w, m->w, (size_t)slots * sizeof *r->w);
    for (int i = 0; i < nov; i++) {
        ap_weight *w = &r->w[ap_slot(ov[i].weight, ov[i].layer)];
        *w = (ap_weight){ (const uint8_t *)ov[i].value, &ap_formats[AP_F_F32], w->rows, w->cols, 0, -1 };
    }
    int rc = be->open(&r->dev, m, r->w, o, e);
    if (rc) { ap_run_close(r); return rc; }
    *out = r;
    return AP_OK;
}

void ap_run_close(ap_run *r) {
    if (!r) return;
    if (r->dev) r->be->close(r->dev);
    ap_free(r->w); ap_free(r->edits); ap_free(r);
}

int ap_run_edit(ap_run *r, const ap_edit *edits, int n, ap_err *e) {
    ap_plan trial;
    AP_TRY(ap_plan_build(&trial, r->m, 1, 0, e));
    int rc = AP_OK;
    for (int i = 0; i < n && !rc; i++) rc = ap_plan_edit(&trial, &edits[i], e);      /* a bad edit is refused now, not at the first token */
    ap_plan_free(&trial);
    AP_TRY(rc);
    ap_edit *copy = n ? ap_alloc((uint64_t)n, sizeof *copy) : NULL;
    if (n && !copy) return ap_fail(e, AP_MEMORY, "no memory for %d edits", n);
    if (n) memcpy(copy, edits, (size_t)n * sizeof *copy);
    ap_free(r->edits);
    r->edits = copy; r->nedits = n;
    return AP_OK;
}

/* ---- one request ---- */

typedef struct { uint8_t *fed, *root; const float **value; } run_marks;

static int run_check(const ap_run *r, const ap_request *q, ap_err *e) {
    if (q->T < 1) return ap_fail_at(e, AP_ARGUMENT, -1, "tokens", "no tokens: give at least one");
    if (q->T > AP_MAX_POSITION - r->pos) return ap_fail_at(e, AP_LIMIT, -1, "tokens", "position %d + %d tokens is beyond %d", r->pos, q->T, AP_MAX_POSITION);
    for (int i = 0; i < q->T; i++)
        if (q->tokens[i] < 0 || q->tokens[i] >= r->m->h.vocab)
            return ap_fail_at(e, AP_ARGUMENT, -1, "tokens", "token %d at position %d is outside the vocabulary 0..%d", q->tokens[i], r->pos + i, r->m->h.vocab - 1);
    return AP_OK;
}

static int run_mark_kept(const ap_request *q, ap_plan *p, run_marks *k, ap_err *e) {
    for (int i = 0; i < p->n; i++) {
        p->s[i].kept = (uint8_t)q->keep_all;
        k->root[i] = (uint8_t)(q->keep_all || (q->advance && p->s[i].op == AP_OP_CACHE));    /* the cache must advance whatever is kept */
    }
    for (int j = 0; j < q->nkeep; j++) {
        int found = 0;
        for (int i = 0; i < p->n; i++) {
            if (p->s[i].stage != q->keep[j].stage || (q->keep[j].layer != -2 && q->keep[j].layer != p->s[i].layer)) continue;
            p->s[i].kept = k->root[i] = 1;
            found = 1;
        }
        if (!found) return ap_fail_at(e, AP_LOOKUP, -1, ap_stages[q->keep[j].stage].name, "this model has no stage %s%s to keep", ap_stages[q->keep[j].stage].name, q->keep[j].layer >= 0 ? " in that layer" : "");
    }
    return AP_OK;
}

static int run_mark_fed(const ap_request *q, ap_plan *p, run_marks *k, ap_err *e) {
    for (int j = 0; j < q->nfeeds; j++) {
        const ap_feed *f = &q->feeds[j];
        int i = ap_plan_find(p, f->key.stage, f->key.layer);
        const char *name = ap_stages[f->key.stage].name;
        if (i < 0) return ap_fail_at(e, AP_LOOKUP, -1, name, "this model has no stage %s in layer %d to feed", name, f->key.layer);
        if (f->n != (size_t)p->s[i].rows * (size_t)p->s[i].cols)
            return ap_fail_at(e, AP_ARGUMENT, -1, name, "%s was fed %zu values, the stage has %d x %d", name, f->n, p->s[i].rows, p->s[i].cols);
        k->fed[i] = 1; k->value[i] = f->value;
    }
    return AP_OK;
}

static int run_steps(ap_run *r, const ap_plan *p, const run_marks *k, ap_err *e) {
    for (int i = 0; i < p->n; i++) {
        const ap_step *s = &p->s[i];
        if (!s->needed) continue;
        e->stage = s->stage; e->layer = s->layer;
        if (k->fed[i]) AP_TRY(r->be->put(r->dev, p, i, k->value[i], e));
        else AP_TRY(r->be->op[s->op](r->dev, p, s, e));
    }
    e->stage = e->layer = -1;
    return AP_OK;
}

static int run_request(ap_run *r, const ap_request *q, ap_plan *p, run_marks *k, float **keep, ap_err *e) {
    for (int i = 0; i < r->nedits; i++) AP_TRY(ap_plan_edit(p, &r->edits[i], e));
    AP_TRY(run_mark_kept(q, p, k, e));
    AP_TRY(run_mark_fed(q, p, k, e));
    AP_TRY(ap_plan_place(p, k->fed, k->root, e));
    if (p->keep_n && !(*keep = ap_alloc(p->keep_n, sizeof(float))))
        return ap_fail(e, AP_MEMORY, "no memory to keep %zu values: keep fewer stages or fewer tokens", p->keep_n);
    AP_TRY(r->be->arena(r->dev, p, q->tokens, *keep, e));
    fenv_t env;                                     /* another library may have switched denormals off in this thread */
    fegetenv(&env);
    fesetenv(FE_DFL_ENV);
    int rc = run_steps(r, p, k, e);
    fesetenv(&env);
    AP_TRY(rc);
    AP_TRY(ap_file_same(r->m->file, e));            /* of a mapped model: were these the weights? */
    AP_TRY(r->be->fetch(r->dev, p, *keep, e));
    if (q->advance) r->pos += q->T;
    return AP_OK;
}

int ap_run_forward(ap_run *r, const ap_request *q, ap_plan *p, float **keep, ap_err *e) {
    *keep = NULL;
    *p = (ap_plan){ 0 };
    AP_TRY(run_check(r, q, e));
    AP_TRY(ap_plan_build(p, r->m, q->T, r->pos, e));
    run_marks k = { ap_alloc((uint64_t)p->n, 1), ap_alloc((uint64_t)p->n, 1), ap_alloc((uint64_t)p->n, sizeof *k.value) };
    int rc = k.fed && k.root && k.value ? run_request(r, q, p, &k, keep, e) : ap_fail(e, AP_MEMORY, "no memory for a plan of %d steps", p->n);
    ap_free(k.fed); ap_free(k.root); ap_free(k.value);
    if (rc) { ap_free(*keep); *keep = NULL; ap_plan_free(p); }
    return rc;
}
