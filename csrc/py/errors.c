/*
** errors.c: an ap_err becomes a Python exception of the class that its row names.  The classes live in aprender/errors.py; OSError and the builtins
** MemoryError and KeyboardInterrupt are raised as themselves.
*/
#include "py.h"
#include <string.h>

static const char *const err_class[AP_ERR_N] = {
    "Error",
#define X(kind, code, class) #class,
#include "../base/errors.def"
};

static PyObject *err_fields(const ap_err *e, const char *path) {
    PyObject *kw = Py_BuildValue("{s:s}", "code", ap_err_code(e->kind));
    if (!kw) return NULL;
    const struct { const char *name; PyObject *value; } items[] = {
        { "path",   path ? PyUnicode_DecodeFSDefault(path) : NULL },
        { "offset", e->at >= 0 ? PyLong_FromLongLong(e->at) : NULL },
        { "field",  e->field[0] ? PyUnicode_DecodeUTF8(e->field, (Py_ssize_t)strlen(e->field), "replace") : NULL },
        { "layer",  e->layer >= 0 ? PyLong_FromLong(e->layer) : NULL },
        { "stage",  e->stage >= 0 ? PyUnicode_FromString(ap_stages[e->stage].name) : NULL },
    };
    int bad = 0;
    for (size_t i = 0; i < sizeof items / sizeof items[0]; i++) {
        if (items[i].value && PyDict_SetItemString(kw, items[i].name, items[i].value) < 0) bad = 1;
        Py_XDECREF(items[i].value);
    }
    if (bad || PyErr_Occurred()) Py_CLEAR(kw);
    return kw;
}

PyObject *ap_raise(ap_state *st, const ap_err *e, const char *path) {
    if (PyErr_Occurred()) return NULL;                              /* a signal handler raised while the core ran */
    if (e->kind == AP_MEMORY) return PyErr_NoMemory();
    if (e->kind == AP_INTERRUPTED) { PyErr_SetNone(PyExc_KeyboardInterrupt); return NULL; }
    PyObject *msg = path ? PyUnicode_FromFormat("%s: %s", path, e->msg) : PyUnicode_FromString(e->msg);
    if (!msg) return NULL;
    if (e->kind == AP_IO) {                                         /* OSError picks its subclass from errno */
        PyObject *args = Py_BuildValue("(iOs)", e->sys, msg, path ? path : "");
        if (args) PyErr_SetObject(PyExc_OSError, args);
        Py_XDECREF(args); Py_DECREF(msg);
        return NULL;
    }
    PyObject *cls = PyObject_GetAttrString(st->errors, err_class[e->kind < AP_ERR_N ? e->kind : 0]);
    PyObject *kw = err_fields(e, path), *args = PyTuple_Pack(1, msg);
    PyObject *exc = cls && kw && args ? PyObject_Call(cls, args, kw) : NULL;
    if (exc) PyErr_SetObject(cls, exc);
    Py_XDECREF(exc); Py_XDECREF(args); Py_XDECREF(kw); Py_XDECREF(cls); Py_DECREF(msg);
    return NULL;
}
