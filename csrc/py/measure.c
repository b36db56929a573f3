/*
** measure.c: arrays to what the core says of them: compare, estimate_sums, exact_sums, lane_dots.  It checks types, shapes and indices, brings arrays into row
** order, and calls the core without the GIL.  judge/elements.py and judge/sums.py give the numbers their meaning.
*/
#include "py.h"
#include "../base/mem.h"
#include "../base/tiers.h"
#include "../measure/compare.h"
#include "../measure/sums.h"

static PyArrayObject *measure_floats(PyObject *o) {
    if (PyArray_Check(o) && PyArray_TYPE((PyArrayObject *)o) == NPY_FLOAT32) return (PyArrayObject *)PyArray_FROM_OTF(o, NPY_FLOAT32, NPY_ARRAY_IN_ARRAY);
    PyErr_SetString(PyExc_TypeError, "compare wants float32 arrays: the caller rounds, and knows it");
    return NULL;
}

static PyObject *measure_places(const ap_place *top, int found) {
    PyObject *t = PyTuple_New(found);
    for (int i = 0; t && i < found; i++) {
        PyObject *p = Py_BuildValue("(Ld)", (long long)top[i].at, top[i].gap);
        if (!p) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, p);
    }
    return t;
}

static PyObject *measure_result(const ap_comparison *c, const ap_place *top, int found) {
    PyObject *places = measure_places(top, found);
    if (!places) return NULL;
    return Py_BuildValue("{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:I,s:L,s:L,s:(KKKK),s:N}",
        "bits_equal", (unsigned long long)c->bits_equal, "value_equal", (unsigned long long)c->value_equal, "nan_a", (unsigned long long)c->nan_a,
        "nan_b", (unsigned long long)c->nan_b, "nan_both", (unsigned long long)c->nan_both, "inf_unlike", (unsigned long long)c->inf_unlike,
        "finite", (unsigned long long)c->finite, "a", c->a, "b", c->b, "aa", c->aa, "bb", c->bb, "dd", c->dd, "ab", c->ab, "max_abs", c->max_abs,
        "max_ulp", (unsigned)c->max_ulp, "first", (long long)c->first, "max_at", (long long)c->max_at,
        "over", (unsigned long long)c->over[0], (unsigned long long)c->over[1], (unsigned long long)c->over[2], (unsigned long long)c->over[3], "top", places);
}

static PyObject *measure_run(PyObject *module, PyArrayObject *a, PyArrayObject *b, int limit, int tier, int threads) {
    ap_err e = AP_ERR_INIT;
    ap_comparison c;
    int found = 0, rc;
    uint64_t n = (uint64_t)PyArray_SIZE(a);
    if (PyArray_SIZE(a) != PyArray_SIZE(b)) return PyErr_Format(PyExc_ValueError, "arrays of %zd and %zd values cannot be compared", PyArray_SIZE(a), PyArray_SIZE(b));
    if (limit < 0 || limit > 1000000 || threads < 0) return PyErr_Format(PyExc_ValueError, "limit %d or threads %d is out of range", limit, threads);
    ap_place *top = ap_alloc((uint64_t)limit, sizeof *top);
    if (!top) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    rc = ap_compare(PyArray_DATA(a), PyArray_DATA(b), n, tier, threads, &c, top, limit, &found, &e);
    Py_END_ALLOW_THREADS
    PyObject *result = rc ? ap_raise(PyModule_GetState(module), &e, NULL) : measure_result(&c, top, found);
    ap_free(top);
    return result;
}

PyObject *ap_measure_compare(PyObject *module, PyObject *args, PyObject *kw) {
    static char *names[] = { "", "", "limit", "threads", "tier", NULL };
    PyObject *x, *y, *result = NULL;
    const char *name = NULL;
    int limit = 0, threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|$iiz:compare", names, &x, &y, &limit, &threads, &name)) return NULL;
    int tier = name ? ap_tier_find(name) : ap_tier_best();
    if (!ap_tier_available(tier)) return PyErr_Format(PyExc_ValueError, "CPU tier %s is %s here", name, tier < 0 ? "unknown" : "not available");
    PyArrayObject *a = measure_floats(x), *b = a ? measure_floats(y) : NULL;
    if (b) result = measure_run(module, a, b, limit, tier, threads);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return result;
}

/* --- dot products ---------------------------------------------------------------------------------------------------------------------- */

/* x [b, t, k], w [b, n, k] and, perhaps, places in [b, t, n]: owned references in row order. */
typedef struct { PyArrayObject *x, *w, *flat; uint64_t b, t, n, k; } measure_stack;

static void measure_drop(measure_stack *s) { Py_CLEAR(s->x); Py_CLEAR(s->w); Py_CLEAR(s->flat); }

static PyArrayObject *measure_matrix(PyObject *o, const char *name, int wide, int narrow) {
    int type = PyArray_Check(o) ? PyArray_TYPE((PyArrayObject *)o) : -1;
    if (PyArray_Check(o) && ((wide && type == NPY_FLOAT64) || (narrow && type == NPY_FLOAT32))) {
        if (PyArray_NDIM((PyArrayObject *)o) == 3) return (PyArrayObject *)PyArray_FROM_OTF(o, type, NPY_ARRAY_IN_ARRAY);
        return (PyArrayObject *)PyErr_Format(PyExc_ValueError, "%s has %d axes, 3 are needed: a stack of matrices", name, PyArray_NDIM((PyArrayObject *)o));
    }
    return (PyArrayObject *)PyErr_Format(PyExc_TypeError, "%s is no array of %s", name, wide && narrow ? "float64 or float32" : wide ? "float64" : "float32");
}

static int measure_flat(measure_stack *s, PyObject *o) {
    if (!PyArray_Check(o) || PyArray_TYPE((PyArrayObject *)o) != NPY_INT64 || PyArray_NDIM((PyArrayObject *)o) != 1) {
        PyErr_SetString(PyExc_TypeError, "flat is no one-dimensional array of int64");
        return -1;
    }
    s->flat = (PyArrayObject *)PyArray_FROM_OTF(o, NPY_INT64, NPY_ARRAY_IN_ARRAY);
    if (!s->flat) return -1;
    const int64_t *at = PyArray_DATA(s->flat);
    for (npy_intp i = 0; i < PyArray_SIZE(s->flat); i++)
        if (at[i] < 0 || (uint64_t)at[i] >= s->b * s->t * s->n) {
            PyErr_Format(PyExc_IndexError, "flat[%zd] is %lld, there are %llu dot products", (Py_ssize_t)i, (long long)at[i], (unsigned long long)(s->b * s->t * s->n));
            return -1;
        }
    return 0;
}

static int measure_stacked(measure_stack *s, PyObject *x, PyObject *w, PyObject *flat, int narrow) {
    s->x = measure_matrix(x, "x", !narrow, narrow);
    s->w = s->x ? measure_matrix(w, "w", !narrow, 1) : NULL;
    if (!s->w) return -1;
    const npy_intp *a = PyArray_DIMS(s->x), *b = PyArray_DIMS(s->w);
    npy_intp rows;
    if (a[0] != b[0] || a[2] != b[2]) {
        PyErr_Format(PyExc_ValueError, "x [%zd, %zd, %zd] and w [%zd, %zd, %zd] are not stacks of rows of one length",
            (Py_ssize_t)a[0], (Py_ssize_t)a[1], (Py_ssize_t)a[2], (Py_ssize_t)b[0], (Py_ssize_t)b[1], (Py_ssize_t)b[2]);
        return -1;
    }
    if (__builtin_mul_overflow(a[0], a[1], &rows) || __builtin_mul_overflow(rows, b[1], &rows)) {
        PyErr_Format(PyExc_ValueError, "%zd x %zd x %zd dot products are too many", (Py_ssize_t)a[0], (Py_ssize_t)a[1], (Py_ssize_t)b[1]);
        return -1;
    }
    s->b = (uint64_t)a[0]; s->t = (uint64_t)a[1]; s->n = (uint64_t)b[1]; s->k = (uint64_t)a[2];
    return flat == Py_None ? 0 : measure_flat(s, flat);
}

static int measure_order(int lanes, int least, long long block, int threads) {
    if (lanes >= least && lanes <= AP_MAX_LANES && !(lanes & (lanes - 1)) && block >= 0 && threads >= 0) return 0;
    PyErr_Format(PyExc_ValueError, "lanes %d (a power of two from %d to %d), block %lld or threads %d is out of range", lanes, least, (int)AP_MAX_LANES, block, threads);
    return -1;
}

/* A new array [b, t, n], or one number per place. */
static PyArrayObject *measure_out(const measure_stack *s, int type) {
    npy_intp dim[3] = { (npy_intp)s->b, (npy_intp)s->t, (npy_intp)s->n }, some = s->flat ? PyArray_SIZE(s->flat) : 0;
    return (PyArrayObject *)(s->flat ? PyArray_SimpleNew(1, &some, type) : PyArray_SimpleNew(3, dim, type));
}

static PyObject *measure_done(PyObject *module, measure_stack *s, PyArrayObject *out, int rc, const ap_err *e) {
    measure_drop(s);
    if (!rc) return (PyObject *)out;
    Py_XDECREF(out);
    return e->kind ? ap_raise(PyModule_GetState(module), e, NULL) : NULL;
}

static PyObject *measure_variance(PyObject *module, measure_stack *s, int lanes, long long block, int threads) {
    ap_err e = AP_ERR_INIT;
    int rc = -1, wide = PyArray_TYPE(s->w) == NPY_FLOAT64;
    PyArrayObject *out = measure_out(s, NPY_FLOAT64);
    if (!out) return measure_done(module, s, NULL, rc, &e);
    const void *w = PyArray_DATA(s->w);
    const int64_t *flat = s->flat ? PyArray_DATA(s->flat) : NULL;
    uint64_t count = s->flat ? (uint64_t)PyArray_SIZE(s->flat) : 0;
    double *to = PyArray_DATA(out);
    ap_dots d = { PyArray_DATA(s->x), wide ? NULL : w, wide ? w : NULL, s->b, s->t, s->n, s->k, lanes, (uint64_t)block };
    Py_BEGIN_ALLOW_THREADS
    rc = flat ? ap_sums_exact(&d, flat, count, threads, to, &e) : ap_sums_estimate(&d, threads, to, &e);
    Py_END_ALLOW_THREADS
    return measure_done(module, s, out, rc, &e);
}

static char *measure_sum_names[] = { "", "", "lanes", "block", "threads", NULL }, *measure_exact_names[] = { "", "", "", "lanes", "block", "threads", NULL };

PyObject *ap_measure_estimate(PyObject *module, PyObject *args, PyObject *kw) {
    PyObject *x, *w;
    int lanes = 0, threads = 0;
    long long block = 0;
    measure_stack s = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|$iLi:estimate_sums", measure_sum_names, &x, &w, &lanes, &block, &threads) || measure_order(lanes, 0, block, threads)) return NULL;
    if (!measure_stacked(&s, x, w, Py_None, 0)) return measure_variance(module, &s, lanes, block, threads);
    measure_drop(&s);
    return NULL;
}

PyObject *ap_measure_exact(PyObject *module, PyObject *args, PyObject *kw) {
    PyObject *x, *w, *flat;
    int lanes = 0, threads = 0;
    long long block = 0;
    measure_stack s = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOO|$iLi:exact_sums", measure_exact_names, &x, &w, &flat, &lanes, &block, &threads) || measure_order(lanes, 0, block, threads)) return NULL;
    if (flat == Py_None) return PyErr_Format(PyExc_TypeError, "flat is no one-dimensional array of int64");
    if (!measure_stacked(&s, x, w, flat, 0)) return measure_variance(module, &s, lanes, block, threads);
    measure_drop(&s);
    return NULL;
}

static PyObject *measure_bits(PyObject *module, measure_stack *s, int lanes, int threads) {
    ap_err e = AP_ERR_INIT;
    int rc = -1;
    PyArrayObject *out = measure_out(s, NPY_FLOAT32);
    if (!out) return measure_done(module, s, NULL, rc, &e);
    const int64_t *flat = s->flat ? PyArray_DATA(s->flat) : NULL;
    uint64_t count = s->flat ? (uint64_t)PyArray_SIZE(s->flat) : 0;
    float *to = PyArray_DATA(out);
    ap_lanes d = { PyArray_DATA(s->x), PyArray_DATA(s->w), s->b, s->t, s->n, s->k, lanes };
    Py_BEGIN_ALLOW_THREADS
    rc = ap_sums_lanes(&d, flat, count, threads, to, &e);
    Py_END_ALLOW_THREADS
    return measure_done(module, s, out, rc, &e);
}

PyObject *ap_measure_lanes(PyObject *module, PyObject *args, PyObject *kw) {
    static char *names[] = { "", "", "", "lanes", "threads", NULL };
    PyObject *x, *w, *flat = Py_None;
    int lanes = 16, threads = 0;
    measure_stack s = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|O$ii:lane_dots", names, &x, &w, &flat, &lanes, &threads) || measure_order(lanes, 1, 0, threads)) return NULL;
    if (!measure_stacked(&s, x, w, flat, 1)) return measure_bits(module, &s, lanes, threads);
    measure_drop(&s);
    return NULL;
}
