/*
** quant.c: the function dequantize: bytes of a format to an array, without a file.  It checks the name, the shape and the size, refuses with both numbers, and
** reads the rows without the GIL.  The comparison of weights and the tests call it.
*/
#include "py.h"
#include <stdio.h>
#include <string.h>
#include "../base/num.h"
#include "../quant/format.h"

static PyObject *quant_refuse(PyObject *module, int kind, const char *field, const char *text) {
    ap_err e = AP_ERR_INIT;
    return ap_fail_at(&e, kind, -1, field, "%s", text) ? ap_raise(PyModule_GetState(module), &e, NULL) : NULL;
}

static const ap_format *quant_format(PyObject *module, const char *name) {
    char text[120];
    for (int i = 0; i < AP_F_N; i++)
        if (!strcmp(ap_formats[i].name, name) && ap_formats[i].decode) return &ap_formats[i];
    snprintf(text, sizeof text, "format %.24s cannot be read", name);
    quant_refuse(module, AP_ARGUMENT, "format", text);
    return NULL;
}

/* The shape as dimensions, its rows and columns; -1 with an exception when it is none. */
static int quant_shape(PyObject *module, PyObject *shape, npy_intp dim[NPY_MAXDIMS], int64_t *rows, int64_t *cols) {
    Py_ssize_t nd = PyTuple_GET_SIZE(shape);
    uint64_t all = sizeof(float);
    *rows = *cols = 1;
    if (nd > NPY_MAXDIMS) { quant_refuse(module, AP_ARGUMENT, "shape", "a shape has at most 64 dimensions"); return -1; }
    for (Py_ssize_t d = 0; d < nd; d++) {
        dim[d] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, d));
        if (dim[d] == -1 && PyErr_Occurred()) return -1;
        if (dim[d] < 0) { quant_refuse(module, AP_ARGUMENT, "shape", "a shape has no negative dimensions"); return -1; }
        if (dim[d] && (!ap_mul_ok(all, (uint64_t)dim[d], &all) || all > (uint64_t)NPY_MAX_INTP)) { PyErr_NoMemory(); return -1; }
        if (d < nd - 1) *rows *= (int64_t)dim[d]; else *cols = (int64_t)dim[d];
    }
    return 0;
}

/* Bytes of rows x cols values; 0 when the size overflows. */
static int quant_bytes(const ap_format *f, int64_t rows, int64_t cols, uint64_t *bytes) {
    uint64_t n, block = (uint64_t)f->block;
    if (!ap_mul_ok((uint64_t)rows, (uint64_t)cols, &n)) return 0;
    int ok = f->packing == AP_PACK_ROWS ? ap_mul_ok((uint64_t)rows, ap_format_row_bytes(f, cols), bytes)
           : f->packing == AP_PACK_WHOLE ? ap_add_ok(n, sizeof(float), bytes)
           : ap_mul_ok(n / block + (n % block != 0), (uint64_t)f->bytes, bytes);
    return ok;
}

static PyObject *quant_read_array(PyObject *module, const ap_format *f, const Py_buffer *data, PyObject *shape) {
    npy_intp dim[NPY_MAXDIMS];
    int64_t rows, cols;
    uint64_t bytes = 0;
    char text[200];
    if (quant_shape(module, shape, dim, &rows, &cols)) return NULL;
    if (!quant_bytes(f, rows, cols, &bytes) || bytes != (uint64_t)data->len) {
        snprintf(text, sizeof text, "%lld rows of %lld values in %s take %llu bytes, data has %lld", (long long)rows, (long long)cols, f->name,
                 (unsigned long long)bytes, (long long)data->len);
        return quant_refuse(module, AP_SIZE, "data", text);
    }
    PyObject *out = PyArray_SimpleNew((int)PyTuple_GET_SIZE(shape), dim, NPY_FLOAT32);
    if (!out || !rows || !cols) return out;
    float *to = PyArray_DATA((PyArrayObject *)out);
    Py_BEGIN_ALLOW_THREADS
    for (int64_t row = 0; row < rows; row++) ap_format_row(f, data->buf, cols, row, to + row * cols);
    Py_END_ALLOW_THREADS
    return out;
}

PyObject *ap_dequantize(PyObject *module, PyObject *args) {
    const char *name;
    Py_buffer data;
    PyObject *shape, *out = NULL;
    if (!PyArg_ParseTuple(args, "sy*O!:dequantize", &name, &data, &PyTuple_Type, &shape)) return NULL;
    const ap_format *f = quant_format(module, name);
    if (f) out = quant_read_array(module, f, &data, shape);
    PyBuffer_Release(&data);
    return out;
}
