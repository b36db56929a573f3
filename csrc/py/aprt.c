/*
** aprt.c: the function read_aprt: an APRT file as its layer and an array over the bytes that were read.
*/
#include "py.h"
#include "../file/aprt.h"
#include "../base/mem.h"

static void aprt_capsule_free(PyObject *capsule) { ap_free(PyCapsule_GetPointer(capsule, "aprender.aprt")); }

static PyObject *aprt_result(const ap_aprt *a) {
    PyObject *capsule = PyCapsule_New(a->memory, "aprender.aprt", aprt_capsule_free);
    if (!capsule) { ap_free(a->memory); return NULL; }
    npy_intp n = (npy_intp)a->n;
    PyObject *values = ap_view(capsule, a->v, NPY_FLOAT32, 1, &n);
    Py_DECREF(capsule);
    PyObject *layer = values ? (a->layer == AP_APRT_WHOLE ? Py_NewRef(Py_None) : PyLong_FromUnsignedLong(a->layer)) : NULL;
    PyObject *pair = layer ? PyTuple_Pack(2, layer, values) : NULL;
    Py_XDECREF(layer); Py_XDECREF(values);
    return pair;
}

PyObject *ap_read_aprt(PyObject *module, PyObject *arg) {
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(arg, &path)) return NULL;
    ap_err e = AP_ERR_INIT;
    ap_aprt a = { 0 };
    const char *name = PyBytes_AS_STRING(path);
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = ap_aprt_read(&a, name, &e);
    Py_END_ALLOW_THREADS
    PyObject *pair = rc ? ap_raise(PyModule_GetState(module), &e, name) : aprt_result(&a);
    Py_DECREF(path);
    return pair;
}
