/*
** run.c: the type Run: one mutable timeline.  Arguments are read with the GIL held, the core runs without it, and the kept arena comes back as read-only
** arrays over one capsule.  A second concurrent call raises at once.
*/
#include "py.h"
#include "../run/run.h"
#include "../run/plugin.h"
#include "../base/tiers.h"
#include "../base/mem.h"
#include <stdatomic.h>

typedef struct { PyObject_HEAD PyObject *model, *overrides; ap_run *r; atomic_int busy; int main, mode; } py_run;     /* main: called by the main thread */

/* ---- keys and small arguments ---- */

int ap_key_parse(ap_state *st, PyObject *key, int layers, int *stage, int *layer) {
    const char *name;
    PyObject *layer_o;
    ap_err e = AP_ERR_INIT;
    if (!PyTuple_Check(key)) { PyErr_SetString(PyExc_TypeError, "a stage key is a tuple (name, layer or None)"); return -1; }
    if (!PyArg_ParseTuple(key, "sO;a stage key is (name, layer or None)", &name, &layer_o)) return -1;
    *stage = ap_stage_find(name);
    if (*stage < 0) { if (ap_fail_at(&e, AP_LOOKUP, -1, name, "no stage is called %.60s", name)) ap_raise(st, &e, NULL); return -1; }
    int whole = ap_stages[*stage].span != AP_SPAN_LAYER;
    if (layer_o == Py_None) { *layer = whole ? -1 : -2; return 0; }           /* None for a layer stage: every layer */
    long n = PyLong_AsLong(layer_o);
    if (n == -1 && PyErr_Occurred()) return -1;
    if (whole || n < 0 || n >= layers) { if (ap_fail_at(&e, AP_LOOKUP, -1, name, "this model has no stage %s in layer %ld", name, n)) ap_raise(st, &e, NULL); return -1; }
    *layer = (int)n;
    return 0;
}

PyObject *ap_key_new(int stage, int layer) {
    return layer < 0 ? Py_BuildValue("(sO)", ap_stages[stage].name, Py_None) : Py_BuildValue("(si)", ap_stages[stage].name, layer);
}

static int run_int_option(PyObject *o, int otherwise, int *out) {
    if (!o || o == Py_None) { *out = otherwise; return 0; }
    long v = PyLong_AsLong(o);
    if (v == -1 && PyErr_Occurred()) return -1;
    *out = v < 0 ? 0 : v > 4096 ? 4096 : (int)v;
    return 0;
}

static int run_tier_option(ap_state *st, PyObject *o, int *out) {
    *out = -1;
    if (!o || o == Py_None) return 0;
    const char *name = PyUnicode_AsUTF8(o);
    if (!name) return -1;
    *out = ap_tier_find(name);
    if (*out >= 0 && ap_tier_available(*out)) return 0;
    ap_err e = AP_ERR_INIT;
    if (ap_fail_at(&e, AP_LOOKUP, -1, "tier", "CPU tier %.40s is %s here", name, *out < 0 ? "unknown" : "not available")) ap_raise(st, &e, NULL);
    return -1;
}

/* "cpu" is linked in; "cuda" is the library that is opened now, or an error: never another device than the one asked for. */
static int run_backend_option(ap_state *st, PyObject *o, const ap_backend **out) {
    ap_err e = AP_ERR_INIT;
    const ap_plugin *plugin;
    *out = &ap_cpu;
    if (!o || o == Py_None) return 0;
    const char *name = PyUnicode_AsUTF8(o);
    if (!name) return -1;
    if (!strcmp(name, ap_cpu.name)) return 0;
    int rc = strcmp(name, "cuda") ? ap_fail_at(&e, AP_LOOKUP, -1, "backend", "there is no backend %.40s, one of cpu, cuda is needed", name) : ap_cuda_open(&plugin, NULL, &e);
    if (rc) { ap_raise(st, &e, NULL); return -1; }
    *out = plugin->backend;
    return 0;
}

static const char *const run_modes[AP_MODE_N] = { "auto", "eager", "checked" };

static int run_mode_option(ap_state *st, PyObject *o, int *out) {
    *out = AP_MODE_AUTO;
    if (!o || o == Py_None) return 0;
    const char *name = PyUnicode_AsUTF8(o);
    if (!name) return -1;
    for (*out = 0; *out < AP_MODE_N; ++*out) if (!strcmp(name, run_modes[*out])) return 0;
    ap_err e = AP_ERR_INIT;
    if (ap_fail_at(&e, AP_LOOKUP, -1, "mode", "there is no mode %.40s, one of auto, eager, checked is needed", name)) ap_raise(st, &e, NULL);
    return -1;
}

/* What there is of CUDA, without asking for it: library, how it was built, devices, and why not. */
PyObject *ap_cuda_state(PyObject *module, PyObject *unused) {
    ap_err e = AP_ERR_INIT;
    const ap_plugin *plugin = NULL;
    char path[4096], names[2048] = "";
    int n = 0, built, present;
    (void)module; (void)unused;
    Py_BEGIN_ALLOW_THREADS
    built = !ap_cuda_open(&plugin, path, &e);
    present = built && !plugin->devices(names, sizeof names, &n, &e) && n > 0;
    Py_END_ALLOW_THREADS
    PyObject *text = PyUnicode_FromString(names), *list = text ? PyUnicode_Splitlines(text, 0) : NULL, *said = NULL;
    if (list) said = Py_BuildValue("{s:N,s:N,s:z,s:O,s:z}", "built", PyBool_FromLong(built), "library", PyUnicode_DecodeFSDefault(path), "compiler", built ? plugin->built : NULL,
                                   "devices", list, "reason", present ? NULL : e.msg[0] ? e.msg : "no CUDA device is there");
    Py_XDECREF(text); Py_XDECREF(list);
    return said;
}

/* A float32, C-contiguous copy or view of what float32 can hold (float64 arrays are refused: the caller rounds, and knows it); a new reference. */
static PyArrayObject *run_floats(PyObject *o) {
    return (PyArrayObject *)PyArray_FROMANY(o, NPY_FLOAT32, 0, 8, NPY_ARRAY_CARRAY_RO);
}

static int run_parse_edit(ap_state *st, PyObject *item, int layers, ap_edit *out) {
    PyObject *layer_o;
    const char *stage, *field;
    if (!PyTuple_Check(item)) { PyErr_SetString(PyExc_TypeError, "an edit is a tuple (stage, layer or None, field, value)"); return -1; }
    if (!PyArg_ParseTuple(item, "sOsd;an edit is (stage, layer or None, field, value)", &stage, &layer_o, &field, &out->value)) return -1;
    PyObject *key = Py_BuildValue("(sO)", stage, layer_o);
    int rc = key ? ap_key_parse(st, key, layers, &out->stage, &out->layer) : -1;
    Py_XDECREF(key);
    if (rc) return -1;
    for (out->field = 0; out->field < ap_params_n; out->field++) if (!strcmp(field, ap_params[out->field].name)) return 0;
    ap_err e = AP_ERR_INIT;
    if (ap_fail_at(&e, AP_LOOKUP, -1, field, "a step has no field %.60s", field)) ap_raise(st, &e, NULL);
    return -1;
}

static int run_set_edits(ap_state *st, py_run *self, PyObject *edits) {
    PyObject *seq = PySequence_Fast(edits, "edits must be a sequence of (stage, layer, field, value)");
    if (!seq) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(seq);
    ap_edit *list = PyMem_Calloc((size_t)n + 1, sizeof *list);
    int rc = list ? 0 : -1;
    for (Py_ssize_t i = 0; i < n && !rc; i++) rc = run_parse_edit(st, PySequence_Fast_GET_ITEM(seq, i), self->r->m->h.layers, &list[i]);
    ap_err e = AP_ERR_INIT;
    if (!list) PyErr_NoMemory();
    else if (!rc && ap_run_edit(self->r, list, (int)n, &e)) { ap_raise(st, &e, NULL); rc = -1; }
    PyMem_Free(list);
    Py_DECREF(seq);
    return rc;
}

static int run_parse_override(ap_state *st, const ap_model *m, PyObject *key, PyArrayObject *a, ap_override *out) {
    const char *name;
    PyObject *layer_o;
    if (!PyTuple_Check(key) || !PyArg_ParseTuple(key, "sO;an override's key is (weight, layer or None)", &name, &layer_o)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "an override's key is a tuple (weight, layer or None)");
        return -1;
    }
    long layer = layer_o == Py_None ? -1 : PyLong_AsLong(layer_o);
    if (layer == -1 && PyErr_Occurred()) return -1;
    ap_err e = AP_ERR_INIT;
    out->weight = ap_weight_find(name); out->layer = (int)layer; out->value = PyArray_DATA(a);
    const ap_weight *w = out->weight >= 0 && layer >= -1 && layer < m->h.layers ? &m->w[ap_slot(out->weight, (int)layer)] : NULL;
    int bad = 0;
    if (!w || !w->fmt) bad = ap_fail_at(&e, AP_LOOKUP, -1, name, "this model has no weight %.60s in layer %ld to override", name, layer);
    else if (PyArray_SIZE(a) != (npy_intp)(w->rows * w->cols))
        bad = ap_fail_at(&e, AP_ARGUMENT, -1, name, "the override of %s has %lld values, the weight has %lld x %lld", name, (long long)PyArray_SIZE(a), (long long)w->rows, (long long)w->cols);
    if (bad) ap_raise(st, &e, NULL);
    return bad ? -1 : 0;
}

/* Copies the overrides, so that nobody can change them under a running kernel; self->overrides keeps the copies alive. */
static int run_read_overrides(ap_state *st, py_run *self, PyObject *given, const ap_model *m, ap_override **list, int *n) {
    *n = 0;
    *list = NULL;
    self->overrides = PyList_New(0);
    if (!self->overrides || !given || given == Py_None) return self->overrides ? 0 : -1;
    if (!PyDict_Check(given)) { PyErr_SetString(PyExc_TypeError, "overrides must be a dict {(weight, layer): array}"); return -1; }
    *list = PyMem_Calloc((size_t)PyDict_Size(given) + 1, sizeof **list);
    if (!*list) { PyErr_NoMemory(); return -1; }
    PyObject *key, *value;
    for (Py_ssize_t pos = 0; PyDict_Next(given, &pos, &key, &value);) {
        PyArrayObject *view = run_floats(value), *a = view ? (PyArrayObject *)PyArray_NewCopy(view, NPY_CORDER) : NULL;
        Py_XDECREF(view);
        int rc = a ? PyList_Append(self->overrides, (PyObject *)a) : -1;
        Py_XDECREF(a);
        if (rc || run_parse_override(st, m, key, a, &(*list)[*n])) return -1;
        ++*n;
    }
    return 0;
}

/* ---- life ---- */

/* Signal handlers run in the main thread only, so only there is anything to look at.  Any other thread must not ask for the GIL here: when the interpreter
** is ending, asking ends the thread, and with it the stack on which the pool's job lies. */
static int run_poll(void *ctx) {
    if (!((py_run *)ctx)->main) return 0;
    PyGILState_STATE g = PyGILState_Ensure();
    int rc = PyErr_CheckSignals();                  /* an exception that a handler raises stays set in this thread and ap_raise leaves it alone */
    PyGILState_Release(g);
    return rc;
}

static int run_in_main_thread(void) {
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL, *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    int yes = ident && PyLong_Check(ident) && PyLong_AsUnsignedLong(ident) == PyThread_get_thread_ident();
    Py_XDECREF(ident); Py_XDECREF(thread); Py_XDECREF(threading);
    PyErr_Clear();
    return yes;
}

static PyObject *run_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
    static char *names[] = { "model", "threads", "tier", "edits", "overrides", "backend", "mode", NULL };
    ap_state *st = ap_state_of(type);
    PyObject *model, *threads = NULL, *tier = NULL, *edits = NULL, *overrides = NULL, *device = NULL, *mode = NULL;
    const ap_backend *backend;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O!|$OOOOOO:Run", names, st->model, &model, &threads, &tier, &edits, &overrides, &device, &mode)) return NULL;
    ap_backend_options o = { .poll = run_poll };
    if (run_int_option(threads, 0, &o.threads) || run_tier_option(st, tier, &o.tier) || run_mode_option(st, mode, &o.mode)) return NULL;
    if (run_backend_option(st, device, &backend)) return NULL;
    py_run *self = (py_run *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = Py_NewRef(model);
    self->mode = o.mode;
    o.poll_ctx = self;
    ap_override *list = NULL;
    int n = 0;
    ap_err e = AP_ERR_INIT;
    if (run_read_overrides(st, self, overrides, ap_model_of(model), &list, &n)) Py_CLEAR(self);
    else if (ap_run_open(&self->r, ap_model_of(model), backend, &o, list, n, &e)) { ap_raise(st, &e, NULL); Py_CLEAR(self); }
    else if (edits && edits != Py_None && run_set_edits(st, self, edits)) Py_CLEAR(self);
    PyMem_Free(list);
    return (PyObject *)self;
}

static void run_dealloc(PyObject *o) {
    py_run *self = (py_run *)o;
    PyTypeObject *type = Py_TYPE(o);
    ap_run_close(self->r);
    Py_XDECREF(self->overrides);
    Py_XDECREF(self->model);
    type->tp_free(o);
    Py_DECREF(type);
}

static int run_enter(py_run *self) {
    int idle = 0;
    if (atomic_compare_exchange_strong(&self->busy, &idle, 1)) return 0;
    ap_err e = AP_ERR_INIT;
    if (ap_fail(&e, AP_BUSY, "this Run is already running in another thread: open one Run per thread")) ap_raise(ap_state_of(Py_TYPE(self)), &e, NULL);
    return -1;
}
static void run_leave(py_run *self) { atomic_store(&self->busy, 0); }

/* ---- a request ---- */

typedef struct { ap_request q; int32_t *tokens; ap_key *keep; ap_feed *feeds; PyObject *held; } run_args;

static void run_args_free(run_args *a) {
    PyMem_Free(a->tokens); PyMem_Free(a->keep); PyMem_Free(a->feeds);
    Py_XDECREF(a->held);
}

static int run_read_tokens(ap_state *st, PyObject *o, run_args *a) {
    PyObject *seq = PySequence_Fast(o, "tokens must be a sequence of integers");
    if (!seq) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(seq);
    a->tokens = PyMem_Calloc((size_t)n + 1, sizeof *a->tokens);
    int rc = a->tokens ? 0 : -1;
    if (rc) PyErr_NoMemory();
    ap_err e = AP_ERR_INIT;
    for (Py_ssize_t i = 0; i < n && !rc; i++) {
        long long v = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(seq, i));
        if (v == -1 && PyErr_Occurred()) rc = -1;
        else if (v < 0 || v > INT32_MAX) { if (ap_fail_at(&e, AP_ARGUMENT, -1, "tokens", "token %lld at index %zd cannot be an id", v, i)) ap_raise(st, &e, NULL); rc = -1; }
        else a->tokens[i] = (int32_t)v;
    }
    if (!rc && n > INT32_MAX) { PyErr_SetString(PyExc_OverflowError, "too many tokens"); rc = -1; }
    a->q.tokens = a->tokens; a->q.T = (int)n;
    Py_DECREF(seq);
    return rc;
}

static int run_read_keep(ap_state *st, PyObject *o, int layers, run_args *a) {
    if (!o || o == Py_None) return 0;
    if (PyUnicode_Check(o) && PyUnicode_CompareWithASCIIString(o, "all") == 0) { a->q.keep_all = 1; return 0; }
    PyObject *seq = PySequence_Fast(o, "keep must be \"all\" or a sequence of (stage, layer or None)");
    if (!seq) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(seq);
    a->keep = PyMem_Calloc((size_t)n + 1, sizeof *a->keep);
    int rc = a->keep ? 0 : -1;
    if (rc) PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n && !rc; i++) rc = ap_key_parse(st, PySequence_Fast_GET_ITEM(seq, i), layers, &a->keep[i].stage, &a->keep[i].layer);
    a->q.keep = a->keep; a->q.nkeep = (int)n;
    Py_DECREF(seq);
    return rc;
}

static int run_read_feed(ap_state *st, PyObject *o, int layers, run_args *a) {
    if (!o || o == Py_None) return 0;
    if (!PyDict_Check(o)) { PyErr_SetString(PyExc_TypeError, "feed must be a dict {(stage, layer): array}"); return -1; }
    a->feeds = PyMem_Calloc((size_t)PyDict_Size(o) + 1, sizeof *a->feeds);
    a->held = PyList_New(0);
    if (!a->feeds || !a->held) { PyErr_NoMemory(); return -1; }
    PyObject *key, *value;
    for (Py_ssize_t pos = 0; PyDict_Next(o, &pos, &key, &value);) {
        ap_feed *f = &a->feeds[a->q.nfeeds];
        if (ap_key_parse(st, key, layers, &f->key.stage, &f->key.layer)) return -1;
        if (f->key.layer == -2) { PyErr_SetString(PyExc_ValueError, "feed one layer at a time: give the layer in the key"); return -1; }
        PyArrayObject *v = run_floats(value);
        int rc = v ? PyList_Append(a->held, (PyObject *)v) : -1;
        Py_XDECREF(v);
        if (rc) return -1;
        f->value = PyArray_DATA(v); f->n = (size_t)PyArray_SIZE(v);
        a->q.nfeeds++;
    }
    a->q.feeds = a->feeds;
    return 0;
}

static void run_capsule_free(PyObject *capsule) { ap_free(PyCapsule_GetPointer(capsule, "aprender.arena")); }

static PyObject *run_array(const ap_step *s, PyObject *capsule, const float *keep, const ap_model *m) {
    npy_intp dim[3] = { s->rows, s->cols, 0 };
    int three = s->op == AP_OP_SCORES || s->op == AP_OP_SOFTMAX;
    if (three) { dim[0] = m->h.heads; dim[1] = s->rows / m->h.heads; dim[2] = s->cols; }
    return ap_view(capsule, keep + s->at, NPY_FLOAT32, three ? 3 : 2, dim);
}

/* The kept values as {key: array}; takes over `keep`. */
static PyObject *run_result(const ap_plan *p, float *keep, const ap_model *m) {
    PyObject *d = PyDict_New();
    if (!keep) return d;
    PyObject *capsule = PyCapsule_New(keep, "aprender.arena", run_capsule_free);
    if (!capsule) { ap_free(keep); Py_XDECREF(d); return NULL; }
    for (int i = 0; d && i < p->n; i++) {
        if (!p->s[i].kept) continue;
        PyObject *k = ap_key_new(p->s[i].stage, p->s[i].layer), *v = k ? run_array(&p->s[i], capsule, keep, m) : NULL;
        if (!v || PyDict_SetItem(d, k, v) < 0) Py_CLEAR(d);
        Py_XDECREF(k); Py_XDECREF(v);
    }
    Py_DECREF(capsule);
    return d;
}

/* Where the values of a request lay, a tuple per step: needed, kept, place, size. */
static PyObject *run_places(const ap_plan *p) {
    PyObject *t = PyTuple_New(p->n);
    for (int i = 0; t && i < p->n; i++) {
        const ap_step *s = &p->s[i];
        PyObject *row = Py_BuildValue("(NNnn)", PyBool_FromLong(s->needed), PyBool_FromLong(s->kept), (Py_ssize_t)s->at, (Py_ssize_t)s->rows * s->cols);
        if (!row) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, row);
    }
    return t;
}

enum { RUN_REPLAY, RUN_FORWARD, RUN_PLACES };

static PyObject *run_with(py_run *self, PyObject *args, PyObject *kw, int what) {
    static char *names[] = { "tokens", "keep", "feed", NULL };
    ap_state *st = ap_state_of(Py_TYPE(self));
    PyObject *tokens, *keep = NULL, *feed = NULL, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|OO", names, &tokens, &keep, &feed)) return NULL;
    if (run_enter(self)) return NULL;
    self->main = run_in_main_thread();
    run_args a = { .q = { .advance = what == RUN_FORWARD } };
    int layers = self->r->m->h.layers;
    if (!run_read_tokens(st, tokens, &a) && !run_read_keep(st, keep, layers, &a) && !run_read_feed(st, feed, layers, &a)) {
        ap_err e = AP_ERR_INIT;
        ap_plan plan;
        float *arena = NULL;
        int rc;
        Py_BEGIN_ALLOW_THREADS
        rc = ap_run_forward(self->r, &a.q, &plan, &arena, &e);
        Py_END_ALLOW_THREADS
        if (rc) ap_raise(st, &e, NULL);
        else if (what == RUN_PLACES) { result = run_places(&plan); ap_free(arena); ap_plan_free(&plan); }
        else { result = run_result(&plan, arena, self->r->m); ap_plan_free(&plan); }
    }
    run_args_free(&a);
    run_leave(self);
    return result;
}

static PyObject *run_forward(PyObject *self, PyObject *args, PyObject *kw) { return run_with((py_run *)self, args, kw, RUN_FORWARD); }
static PyObject *run_replay(PyObject *self, PyObject *args, PyObject *kw) { return run_with((py_run *)self, args, kw, RUN_REPLAY); }
static PyObject *run_where(PyObject *self, PyObject *args, PyObject *kw) { return run_with((py_run *)self, args, kw, RUN_PLACES); }

static PyObject *run_reset(PyObject *o, PyObject *unused) {
    py_run *self = (py_run *)o;
    (void)unused;
    if (run_enter(self)) return NULL;
    self->r->pos = 0;
    run_leave(self);
    Py_RETURN_NONE;
}

/* ---- the plan as data ---- */

static PyObject *run_weight_name(int slot) {
    if (slot < 0) Py_RETURN_NONE;
    return PyUnicode_FromString(ap_weights[slot % AP_W_N].name);
}

static PyObject *run_step_dict(const ap_plan *p, int i) {
    const ap_step *s = &p->s[i];
    PyObject *d = Py_BuildValue("{s:s,s:N,s:s,s:i,s:i,s:i}", "stage", ap_stages[s->stage].name, "layer", s->layer < 0 ? Py_NewRef(Py_None) : PyLong_FromLong(s->layer),
                                "op", ap_ops[s->op].name, "rows", s->rows, "cols", s->cols, "k", s->k);
    PyObject *w = PyList_New(0);
    for (int j = 0; d && w && j < s->nparts; j++) {
        PyObject *part = Py_BuildValue("(NNi)", run_weight_name(s->part[j].w), run_weight_name(s->part[j].bias), s->part[j].cols);
        if (!part || PyList_Append(w, part) < 0) Py_CLEAR(w);
        Py_XDECREF(part);
    }
    if (!w || !d || PyDict_SetItemString(d, "weights", w) < 0) Py_CLEAR(d);
    Py_XDECREF(w);
    for (int f = 0; d && f < ap_params_n; f++) {
        double v = ap_param_get(s, f);
        PyObject *o = ap_params[f].is_int ? PyLong_FromDouble(v) : PyFloat_FromDouble(v);
        if (!o || PyDict_SetItemString(d, ap_params[f].name, o) < 0) Py_CLEAR(d);
        Py_XDECREF(o);
    }
    return d;
}

static PyObject *run_plan(PyObject *o, PyObject *args) {
    py_run *self = (py_run *)o;
    int T = 1;
    if (!PyArg_ParseTuple(args, "|i:plan", &T)) return NULL;
    ap_state *st = ap_state_of(Py_TYPE(o));
    ap_err e = AP_ERR_INIT;
    ap_plan p = { 0 };
    int rc = ap_plan_build(&p, self->r->m, T, self->r->pos, &e);
    for (int i = 0; i < self->r->nedits && !rc; i++) rc = ap_plan_edit(&p, &self->r->edits[i], &e);
    PyObject *t = rc ? ap_raise(st, &e, NULL) : PyTuple_New(p.n);
    for (int i = 0; t && i < p.n; i++) {
        PyObject *d = run_step_dict(&p, i);
        if (!d) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, d);
    }
    ap_plan_free(&p);
    return t;
}

static PyObject *run_position(PyObject *o, void *unused) { (void)unused; return PyLong_FromLong(((py_run *)o)->r->pos); }
static PyObject *run_backend(PyObject *o, void *unused) { (void)unused; return PyUnicode_FromString(((py_run *)o)->r->be->name); }
static PyObject *run_tier(PyObject *o, void *unused) { (void)unused; const ap_run *r = ((py_run *)o)->r; return PyUnicode_FromString(r->be->tier(r->dev)); }
static PyObject *run_path(PyObject *o, void *unused) {
    const ap_run *r = ((py_run *)o)->r;
    (void)unused;
    if (!r->be->path) Py_RETURN_NONE;
    return PyUnicode_FromString(r->be->path(r->dev));
}
static PyObject *run_mode(PyObject *o, void *unused) { (void)unused; return PyUnicode_FromString(run_modes[((py_run *)o)->mode]); }
static PyObject *run_model(PyObject *o, void *unused) { (void)unused; return Py_NewRef(((py_run *)o)->model); }

static PyGetSetDef run_getset[] = {
    { "model", run_model, NULL, "Model: what is run", NULL },
    { "position", run_position, NULL, "int: tokens seen so far", NULL },
    { "backend", run_backend, NULL, "str: device", NULL },
    { "tier", run_tier, NULL, "str: instruction set in use, or the device's name", NULL },
    { "mode", run_mode, NULL, "str: auto, eager or checked", NULL },
    { "path", run_path, NULL, "str or None: what ran for the last request; None where there is one way only", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef run_methods[] = {
    { "forward", (PyCFunction)(void (*)(void))run_forward, METH_VARARGS | METH_KEYWORDS,
      "forward($self, tokens, keep=None, feed=None)\n--\n\nRun the next tokens and return the kept stages.\n\n`keep` is \"all\" or a sequence of (stage, layer); None as the layer of a layer\nstage means every layer. `feed` {(stage, layer): array} replaces values. Only what\nthe kept stages and the cache need is computed." },
    { "replay", (PyCFunction)(void (*)(void))run_replay, METH_VARARGS | METH_KEYWORDS,
      "replay($self, tokens, keep=None, feed=None)\n--\n\nLike forward, but the position stays and only what `keep` needs is run: with the inputs\nof one stage fed, exactly that stage. A fed k_cache or v_cache replaces the cache." },
    { "reset", run_reset, METH_NOARGS, "reset($self)\n--\n\nForget all tokens." },
    { "plan", run_plan, METH_VARARGS, "plan($self, tokens=1, /)\n--\n\nThe steps that a forward of so many tokens would take, with every parameter, as dicts." },
    { "_places", (PyCFunction)(void (*)(void))run_where, METH_VARARGS | METH_KEYWORDS,
      "_places($self, tokens, keep=None, feed=None)\n--\n\nFor tests: replay, and say where each step's value was put: (needed, kept, place, size) in values." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot run_slots[] = {
    { Py_tp_new, run_new }, { Py_tp_dealloc, run_dealloc }, { Py_tp_getset, run_getset }, { Py_tp_methods, run_methods },
    { Py_tp_doc, "Run(model, *, threads=None, tier=None, edits=None, overrides=None, backend=None, mode=None)\n--\n\nOne timeline of a model: cache and position.\n\n`edits` is a sequence of (stage, layer or None, field, value) that change the plan;\n`overrides` {(weight, layer or None): array} put other values in place of weights. `backend` is \"cpu\" or \"cuda\"; `mode`, of cuda,\n\"auto\", \"eager\" or \"checked\"." }, { 0, NULL },
};
PyType_Spec ap_run_spec = { "aprender._core.Run", sizeof(py_run), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, run_slots };
