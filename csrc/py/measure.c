/*
** measure.c: the function compare: two float32 arrays to a dictionary of what one pass says of them.  It checks that they are alike and calls the core without
** the GIL.  judge/elements.py gives the numbers their names and meaning.
*/
#include "py.h"
#include "../base/mem.h"
#include "../measure/compare.h"

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
    return Py_BuildValue("{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:I,s:L,s:L,s:N}",
        "bits_equal", (unsigned long long)c->bits_equal, "value_equal", (unsigned long long)c->value_equal, "nan_a", (unsigned long long)c->nan_a,
        "nan_b", (unsigned long long)c->nan_b, "nan_both", (unsigned long long)c->nan_both, "inf_unlike", (unsigned long long)c->inf_unlike,
        "finite", (unsigned long long)c->finite, "a", c->a, "b", c->b, "aa", c->aa, "bb", c->bb, "dd", c->dd, "ab", c->ab, "max_abs", c->max_abs,
        "max_ulp", (unsigned)c->max_ulp, "first", (long long)c->first, "max_at", (long long)c->max_at, "top", places);
}

static PyObject *measure_run(PyObject *module, PyArrayObject *a, PyArrayObject *b, int limit, int threads) {
    ap_err e = AP_ERR_INIT;
    ap_comparison c;
    int found = 0, rc;
    uint64_t n = (uint64_t)PyArray_SIZE(a);
    if (PyArray_SIZE(a) != PyArray_SIZE(b)) return PyErr_Format(PyExc_ValueError, "arrays of %zd and %zd values cannot be compared", PyArray_SIZE(a), PyArray_SIZE(b));
    if (limit < 0 || limit > 1000000 || threads < 0) return PyErr_Format(PyExc_ValueError, "limit %d or threads %d is out of range", limit, threads);
    ap_place *top = ap_alloc((uint64_t)limit, sizeof *top);
    if (!top) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    rc = ap_compare(PyArray_DATA(a), PyArray_DATA(b), n, threads, &c, top, limit, &found, &e);
    Py_END_ALLOW_THREADS
    PyObject *result = rc ? ap_raise(PyModule_GetState(module), &e, NULL) : measure_result(&c, top, found);
    ap_free(top);
    return result;
}

PyObject *ap_measure_compare(PyObject *module, PyObject *args, PyObject *kw) {
    static char *names[] = { "", "", "limit", "threads", NULL };
    PyObject *x, *y, *result = NULL;
    int limit = 0, threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|$ii:compare", names, &x, &y, &limit, &threads)) return NULL;
    PyArrayObject *a = measure_floats(x), *b = a ? measure_floats(y) : NULL;
    if (b) result = measure_run(module, a, b, limit, threads);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return result;
}
