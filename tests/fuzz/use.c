/* use.c: see use.h.  A bound model must also plan and run: after ap_model_bind nothing but memory may be missing for a few tokens. */
#include <math.h>
#include "use.h"
#include "../../csrc/run/run.h"

enum { USE_VALUES = 1 << 21 };                  /* multiplications of one pass, about: more is no better test */

static int use_plan(const ap_model *m, ap_err *e) {
    ap_plan p;
    AP_TRY(ap_plan_build(&p, m, 3, 0, e));
    for (int i = 0; i < p.n; i++) {
        const ap_step *s = &p.s[i];
        CHECK(s->a < i && s->b < i && s->rows >= 0 && s->cols >= 0 && s->nparts <= AP_MAX_PARTS, "step %d reads what comes later", i);
        for (int k = 0; k < s->nparts; k++) if (s->part[k].w >= 0) CHECK(m->w[s->part[k].w].fmt, "step %d reads a weight that is not there", i);
    }
    for (int field = 0; field < ap_params_n; field++) {          /* an edit that is refused must leave a plan that can be freed, and no more */
        ap_err quiet = AP_ERR_INIT;
        ap_edit edit = { p.s[p.n / 2].stage, -2, field, field % 3 ? -1 : 2 };
        if (ap_plan_edit(&p, &edit, &quiet)) break;
    }
    ap_plan_free(&p);
    return AP_OK;
}

static int use_forward(ap_run *r, int T, int keep_all, ap_err *e) {
    int32_t tokens[2] = { 0, r->m->h.vocab - 1 };
    ap_request q = { .tokens = tokens, .T = T, .keep_all = keep_all, .advance = 1 };
    ap_plan p;
    float *keep;
    AP_TRY(ap_run_forward(r, &q, &p, &keep, e));
    CHECK(!keep_all == !keep, "kept values are %s", keep ? "there" : "missing");
    ap_free(keep);
    ap_plan_free(&p);
    return AP_OK;
}

static int use_run(const ap_model *m, ap_err *e) {
    ap_backend_options o = { .threads = 1, .tier = -1 };
    ap_run *r;
    AP_TRY(ap_run_open(&r, m, &ap_cpu, &o, NULL, 0, e));
    int rc = use_forward(r, 2, 1, e);
    if (!rc) rc = use_forward(r, 1, 0, e);
    ap_run_close(r);
    return rc;
}

static double use_cost(const ap_model *m) {
    const ap_hparams *h = &m->h;
    return h->layers * (3.0 * h->dim * h->ffn + 4.0 * h->dim * h->heads * h->head) + (double)h->dim * h->vocab + 64.0 * h->layers * h->kv_heads * h->head;
}

int use_file(const ap_file *f, ap_err *e) {
    ap_model *m;
    AP_TRY(ap_model_bind(&m, f, e));
    int rc = use_plan(m, e);
    if (!rc && use_cost(m) < USE_VALUES) rc = use_run(m, e);
    CHECK(!rc || rc == AP_MEMORY, "a bound model does not run: %s: %s", ap_err_code(rc), e->msg);
    ap_model_free(m);
    return rc;
}
