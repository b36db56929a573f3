/*
** quant.c: the functions encode and dequantize: arrays to the bytes of a format and back, without a file.  It checks names, shapes, sizes and that every
** value can be written, refuses with both numbers, and shares the rows out over the pool without the GIL.  The Python writers and the tests call it.
*/
#include "py.h"
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "../base/num.h"
#include "../base/threads.h"
#include "../base/tiers.h"
#include "../quant/format.h"

enum { QUANT_PIECE = 1 << 16 };                          /* values of one task, about; a multiple of every block */

/* The format of that name if `can` says yes; else the exception names those that can. */
static const ap_format *quant_format(ap_state *st, const char *name, const char *verb, int (*can)(const ap_format *)) {
    const ap_format *f = ap_format_by_name(name);
    if (f && can(f)) return f;
    char list[440];
    size_t at = 0;
    list[0] = 0;
    for (int i = 0; i < AP_F_N && at < sizeof list - 16; i++)
        if (can(&ap_formats[i])) at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at ? " " : "", ap_formats[i].name);
    ap_err e = AP_ERR_INIT;
    if (ap_fail_at(&e, AP_ARGUMENT, -1, "format", "%s %.24s cannot be %s; these can: %s", f ? "format" : "unknown format", name, verb, list)) ap_raise(st, &e, NULL);
    return NULL;
}
static int quant_can_read(const ap_format *f) { return f->decode != NULL; }
static int quant_can_write(const ap_format *f) { return f->encode != NULL; }

static PyObject *quant_refuse(PyObject *module, int kind, const char *field, const char *text) {
    ap_err e = AP_ERR_INIT;
    return ap_fail_at(&e, kind, -1, field, "%s", text) ? ap_raise(PyModule_GetState(module), &e, NULL) : NULL;
}

/* ---- encode ---- */

typedef struct {
    const ap_format *f;
    const float *src; uint8_t *dst;
    int64_t rows, cols, piece;                           /* piece: rows of one task, or values of it where the blocks run on from row to row */
    uint64_t row_bytes;
    int by_row;
} quant_writing;

static void quant_write(void *ctx, int i, int worker) {
    const quant_writing *w = ctx;
    int64_t n = w->by_row ? w->rows : w->rows * w->cols, first = i * w->piece, count = n - first < w->piece ? n - first : w->piece;
    (void)worker;
    if (w->by_row)
        for (int64_t row = first; row < first + count; row++) ap_format_encode(w->f, w->src + row * w->cols, w->cols, w->dst + (uint64_t)row * w->row_bytes);
    else
        ap_format_encode(w->f, w->src + first, count, w->dst + (uint64_t)(first / w->f->block) * (uint64_t)w->f->bytes);
}

/* Rows that fill their blocks lie as one long row would; only rows that end inside a block are encoded one by one. */
static void quant_write_all(quant_writing *w, int threads) {
    int64_t n = w->rows * w->cols;
    if (!n) { ap_format_encode(w->f, w->src, 0, w->dst); return; }     /* a scale for the whole tensor there may be all the same */
    w->by_row = w->f->packing == AP_PACK_ROWS && w->cols % w->f->block;
    w->piece = w->f->packing == AP_PACK_WHOLE ? n : w->by_row ? QUANT_PIECE / w->cols + 1 : QUANT_PIECE;
    int64_t items = w->by_row ? w->rows : n;
    ap_pool_run(threads, (int)(items / w->piece + (items % w->piece != 0)), quant_write, w);
}

/* The index of the first value that the format cannot hold, -1 when there is none. */
static int64_t quant_unfit(const ap_format *f, const float *v, int64_t n) {
    if (isinf(f->limit)) return -1;
    for (int64_t at = 0; at < n; at += QUANT_PIECE) {
        int64_t end = n - at < QUANT_PIECE ? n : at + QUANT_PIECE;
        int bad = 0;
        for (int64_t i = at; i < end; i++) bad |= !(fabsf(v[i]) <= f->limit);
        for (int64_t i = at; bad && i < end; i++) if (!(fabsf(v[i]) <= f->limit)) return i;
    }
    return -1;
}

/* ArgumentError with the code VALUE, which as a kind of the core belongs to files. */
static PyObject *quant_refuse_value(PyObject *module, const ap_format *f, PyArrayObject *a, int64_t at) {
    char where[200];
    int nd = PyArray_NDIM(a), end = (int)sizeof where - 1;
    float v = ((const float *)PyArray_DATA(a))[at];
    where[end] = 0;
    for (int d = nd - 1; d >= 0 && end > 24; d--) {      /* the last index changes fastest */
        char digits[24];
        int n = snprintf(digits, sizeof digits, "%s%lld", d ? ", " : "", (long long)(at % PyArray_DIM(a, d)));
        memcpy(where + (end -= n), digits, (size_t)n);
        at /= PyArray_DIM(a, d);
    }
    char text[480], limit[64] = "finite numbers only";
    if (isfinite(v)) snprintf(limit, sizeof limit, "magnitudes up to %g", (double)f->limit);
    snprintf(text, sizeof text, "values[%s] is %g: %s takes %s", where + end, (double)v, f->name, limit);
    ap_state *st = PyModule_GetState(module);
    PyObject *cls = PyObject_GetAttrString(st->errors, "ArgumentError"), *args = Py_BuildValue("(s)", text);
    PyObject *kw = Py_BuildValue("{s:s,s:s}", "code", "VALUE", "field", "values");
    PyObject *error = cls && args && kw ? PyObject_Call(cls, args, kw) : NULL;
    if (error) PyErr_SetObject(cls, error);
    Py_XDECREF(error); Py_XDECREF(kw); Py_XDECREF(args); Py_XDECREF(cls);
    return NULL;
}

static PyObject *quant_encode_array(PyObject *module, const ap_format *f, PyArrayObject *a, int pad, int threads) {
    int nd = PyArray_NDIM(a);
    quant_writing w = { .f = f, .src = PyArray_DATA(a), .rows = 1, .cols = nd ? (int64_t)PyArray_DIM(a, nd - 1) : 1 };
    for (int d = 0; d < nd - 1; d++) w.rows *= (int64_t)PyArray_DIM(a, d);
    char text[200];
    if (f->packing == AP_PACK_ROWS && w.cols % f->block && !pad) {
        snprintf(text, sizeof text, "rows of %lld values do not fill the %d-value blocks of %s: pad=True fills up each row with zeros", (long long)w.cols, f->block, f->name);
        return quant_refuse(module, AP_BLOCK, "values", text);
    }
    int64_t unfit = quant_unfit(f, w.src, w.rows * w.cols);
    if (unfit >= 0) return quant_refuse_value(module, f, a, unfit);
    npy_intp dim[NPY_MAXDIMS] = { 0 };
    uint64_t bytes;
    if (!ap_format_bytes(f, w.rows, w.cols, &bytes) || bytes > (uint64_t)NPY_MAX_INTP) return PyErr_NoMemory();
    w.row_bytes = ap_format_row_bytes(f, w.cols);
    int by_rows = f->packing == AP_PACK_ROWS;
    for (int d = 0; by_rows && d < nd - 1; d++) dim[d] = PyArray_DIM(a, d);
    int out_nd = by_rows && nd ? nd : 1;
    dim[out_nd - 1] = (npy_intp)(by_rows ? w.row_bytes : bytes);
    PyObject *out = PyArray_SimpleNew(out_nd, dim, NPY_UINT8);
    if (!out) return NULL;
    w.dst = PyArray_DATA((PyArrayObject *)out);
    Py_BEGIN_ALLOW_THREADS
    quant_write_all(&w, threads);
    Py_END_ALLOW_THREADS
    return out;
}

PyObject *ap_encode(PyObject *module, PyObject *args, PyObject *kw) {
    static char *names[] = { "", "", "pad", "threads", NULL };
    const char *name;
    PyObject *values;
    int pad = 0, threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "sO|$pi:encode", names, &name, &values, &pad, &threads)) return NULL;
    const ap_format *f = quant_format(PyModule_GetState(module), name, "written", quant_can_write);
    if (!f) return NULL;
    PyArrayObject *a = (PyArrayObject *)PyArray_FROMANY(values, NPY_FLOAT32, 0, 0, NPY_ARRAY_CARRAY_RO);
    if (!a) return NULL;
    PyObject *out = quant_encode_array(module, f, a, pad, threads > 0 ? threads : ap_cores());
    Py_DECREF(a);
    return out;
}

/* ---- dequantize ---- */

typedef struct { const ap_format *f; const uint8_t *src; float *dst; int64_t rows, cols, piece; int tier; } quant_reading;     /* tier -1: the reference */

static void quant_read(void *ctx, int i, int worker) {
    const quant_reading *r = ctx;
    int64_t first = i * r->piece, end = r->rows - first < r->piece ? r->rows : first + r->piece;
    (void)worker;
    for (int64_t row = first; row < end; row++) {
        float *out = r->dst + row * r->cols;
        if (r->tier < 0) ap_format_row(r->f, r->src, r->cols, row, out);
        else ap_format_row_fast(r->f, r->tier, r->src, r->cols, row, out);
    }
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
        if (dim[d] && (!ap_mul_ok(all, (uint64_t)dim[d], &all) || all > (uint64_t)NPY_MAX_INTP)) {
            quant_refuse(module, AP_ARGUMENT, "shape", "the float32 values of that shape exceed any memory");
            return -1;
        }
        if (d < nd - 1) *rows *= (int64_t)dim[d]; else *cols = (int64_t)dim[d];
    }
    return 0;
}

static PyObject *quant_read_array(PyObject *module, const ap_format *f, const Py_buffer *data, PyObject *shape, int tier) {
    npy_intp dim[NPY_MAXDIMS];
    quant_reading r = { .f = f, .src = data->buf, .tier = tier };
    uint64_t bytes;
    char text[200];
    if (quant_shape(module, shape, dim, &r.rows, &r.cols)) return NULL;
    if (!ap_format_bytes(f, r.rows, r.cols, &bytes) || bytes != (uint64_t)data->len) {
        snprintf(text, sizeof text, "%lld rows of %lld values in %s take %llu bytes, data has %lld", (long long)r.rows, (long long)r.cols, f->name,
                 (unsigned long long)bytes, (long long)data->len);
        return quant_refuse(module, AP_SIZE, "data", text);
    }
    PyObject *out = PyArray_SimpleNew((int)PyTuple_GET_SIZE(shape), dim, NPY_FLOAT32);
    if (!out || !r.cols || !r.rows) return out;
    r.dst = PyArray_DATA((PyArrayObject *)out);
    r.piece = QUANT_PIECE / r.cols + 1;
    Py_BEGIN_ALLOW_THREADS
    ap_pool_run(ap_cores(), (int)(r.rows / r.piece + (r.rows % r.piece != 0)), quant_read, &r);
    Py_END_ALLOW_THREADS
    return out;
}

PyObject *ap_dequantize(PyObject *module, PyObject *args, PyObject *kw) {
    static char *names[] = { "", "", "", "tier", NULL };
    const char *name, *tier_name = NULL;
    Py_buffer data;
    PyObject *shape, *out = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "sy*O!|$z:dequantize", names, &name, &data, &PyTuple_Type, &shape, &tier_name)) return NULL;
    int tier = tier_name ? ap_tier_find(tier_name) : -1;
    const ap_format *f = NULL;
    if (tier_name && !ap_tier_available(tier)) quant_refuse(module, AP_LOOKUP, "tier", tier < 0 ? "no CPU tier of that name" : "this CPU does not have that tier");
    else f = quant_format(PyModule_GetState(module), name, "read", quant_can_read);
    if (f) out = quant_read_array(module, f, &data, shape, tier);
    PyBuffer_Release(&data);
    return out;
}
