/*
** model.c: the type Model: a File bound to an architecture.  Immutable; keeps its File alive.
*/
#include "py.h"
#include "../plan/model.h"

typedef struct { PyObject_HEAD PyObject *file; ap_model *m; } py_model;

static PyStructSequence_Field model_info_fields[] = {
    { "name", "row of WEIGHTS" }, { "layer", "layer, None outside the layers" }, { "tensor", "its name in the file" },
    { "format", "number format" }, { "shape", "Hugging Face order: [out, in] or [n]" }, { NULL, NULL },
};
PyStructSequence_Desc ap_weight_info_desc = { "aprender._core.WeightInfo", "A weight of a model.", model_info_fields, 5 };

const ap_model *ap_model_of(PyObject *o) { return ((py_model *)o)->m; }
PyObject *ap_model_file(PyObject *o) { return ((py_model *)o)->file; }

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
    static char *names[] = { "file", NULL };
    ap_state *st = ap_state_of(type);
    PyObject *file;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O!:Model", names, st->file, &file)) return NULL;
    py_model *self = (py_model *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    ap_err e = AP_ERR_INIT;
    self->file = Py_NewRef(file);
    if (ap_model_bind(&self->m, ap_file_of(file), &e)) { ap_raise(st, &e, ap_file_of(file)->path); Py_CLEAR(self); }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *o) {
    py_model *self = (py_model *)o;
    PyTypeObject *type = Py_TYPE(o);
    ap_model_free(self->m);
    Py_XDECREF(self->file);
    type->tp_free(o);
    Py_DECREF(type);
}

static PyObject *model_hparam(const ap_hparams *h, int i) {
    const int ints[] = { h->layers, h->dim, h->ffn, h->heads, h->kv_heads, h->head, h->vocab, h->context };
    int n = (int)(sizeof ints / sizeof ints[0]);
    if (ap_hparam_rows[i].is_int) return PyLong_FromLong(i < n ? ints[i] : 0);
    return PyFloat_FromDouble(i == n ? h->eps : h->theta);
}

static PyObject *model_hparams(PyObject *o, void *sources) {
    const ap_model *m = ap_model_of(o);
    PyObject *d = PyDict_New();
    for (int i = 0; d && i < ap_hparam_rows_n; i++) {
        PyObject *v = sources ? PyUnicode_DecodeUTF8(m->source[i], (Py_ssize_t)strlen(m->source[i]), "replace") : model_hparam(&m->h, i);
        if (!v || PyDict_SetItemString(d, ap_hparam_rows[i].field, v) < 0) Py_CLEAR(d);
        Py_XDECREF(v);
    }
    return d;
}

static PyObject *model_shape(const ap_weight *w, int row) {
    return ap_weights[row].form == AP_FORM_MATRIX ? Py_BuildValue("(LL)", (long long)w->rows, (long long)w->cols) : Py_BuildValue("(L)", (long long)w->cols);
}

static PyObject *model_weight_info(ap_state *st, const ap_model *m, int row, int layer) {
    const ap_weight *w = &m->w[ap_slot(row, layer)];
    const ap_str name = m->file->t[w->tensor].name;
    PyObject *info = PyStructSequence_New(st->weight_info);
    if (!info) return NULL;
    PyStructSequence_SET_ITEM(info, 0, PyUnicode_FromString(ap_weights[row].name));
    PyStructSequence_SET_ITEM(info, 1, layer < 0 ? Py_NewRef(Py_None) : PyLong_FromLong(layer));
    PyStructSequence_SET_ITEM(info, 2, PyUnicode_DecodeUTF8(name.p, (Py_ssize_t)name.n, "strict"));
    PyStructSequence_SET_ITEM(info, 3, PyUnicode_FromString(w->fmt->name));
    PyStructSequence_SET_ITEM(info, 4, model_shape(w, row));
    for (int i = 0; i < 5; i++) if (!PyStructSequence_GET_ITEM(info, i)) { Py_DECREF(info); return NULL; }
    return info;
}

static PyObject *model_weights(PyObject *o, void *unused) {
    const ap_model *m = ap_model_of(o);
    PyObject *list = PyList_New(0);
    (void)unused;
    for (int layer = -1; list && layer < m->h.layers; layer++)
        for (int row = 0; list && row < AP_W_N; row++) {
            if (!m->w[ap_slot(row, layer)].fmt) continue;
            PyObject *info = model_weight_info(ap_state_of(Py_TYPE(o)), m, row, layer);
            if (!info || PyList_Append(list, info) < 0) Py_CLEAR(list);
            Py_XDECREF(info);
        }
    PyObject *t = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return t;
}

static const ap_weight *model_find(PyObject *o, PyObject *args, int *row) {
    const char *name;
    PyObject *layer_o = Py_None;
    if (!PyArg_ParseTuple(args, "s|O:weight", &name, &layer_o)) return NULL;
    const ap_model *m = ap_model_of(o);
    long layer = layer_o == Py_None ? -1 : PyLong_AsLong(layer_o);
    if (layer == -1 && PyErr_Occurred()) return NULL;
    *row = ap_weight_find(name);
    const ap_weight *w = *row >= 0 && layer >= -1 && layer < m->h.layers ? &m->w[ap_slot(*row, (int)layer)] : NULL;
    ap_err e = AP_ERR_INIT;
    if ((!w || !w->fmt) && ap_fail_at(&e, AP_LOOKUP, -1, name, "this model has no weight %.60s in layer %ld", name, layer)) {
        ap_raise(ap_state_of(Py_TYPE(o)), &e, NULL);
        return NULL;
    }
    return w;
}

static PyObject *model_weight(PyObject *o, PyObject *args) {
    int row = 0;
    const ap_weight *w = model_find(o, args, &row);
    if (!w) return NULL;
    npy_intp dim[2] = { (npy_intp)w->rows, (npy_intp)w->cols };
    int matrix = ap_weights[row].form == AP_FORM_MATRIX;
    PyObject *a = PyArray_SimpleNew(matrix ? 2 : 1, matrix ? dim : dim + 1, NPY_FLOAT32);
    if (!a) return NULL;
    float *out = PyArray_DATA((PyArrayObject *)a);
    Py_BEGIN_ALLOW_THREADS
    for (int64_t n = 0; n < w->rows; n++)
        ap_format_row(w->fmt, w->data, w->cols, ap_weight_row_at(w, n), out + n * w->cols);
    Py_END_ALLOW_THREADS
    ap_err e = AP_ERR_INIT;
    const ap_file *f = ap_model_of(o)->file;
    if (ap_file_same(f, &e)) { Py_DECREF(a); return ap_raise(ap_state_of(Py_TYPE(o)), &e, f->path); }
    return a;
}

static PyObject *model_weight_raw(PyObject *o, PyObject *args) {
    int row = 0;
    const ap_weight *w = model_find(o, args, &row);
    if (!w) return NULL;
    int rows = w->fmt->packing == AP_PACK_ROWS;
    npy_intp dim[2] = { (npy_intp)w->rows, (npy_intp)ap_format_row_bytes(w->fmt, w->cols) }, whole = (npy_intp)ap_model_of(o)->file->t[w->tensor].bytes;
    return ap_file_array(ap_model_file(o), w->data, rows ? 2 : 1, rows ? dim : &whole);
}

static PyObject *model_arch(PyObject *o, void *unused) { (void)unused; return PyUnicode_FromString(ap_archs[ap_model_of(o)->arch].name); }
static PyObject *model_flags(PyObject *o, void *unused) { (void)unused; return ap_flag_names(ap_model_of(o)->flags); }
static PyObject *model_quirks(PyObject *o, void *unused) {
    (void)unused;
    return ap_model_of(o)->quirks & AP_QUIRK_ROPE_PAIRS ? Py_BuildValue("(s)", "ROPE_PAIRS") : PyTuple_New(0);
}
static PyObject *model_tied(PyObject *o, void *unused) { (void)unused; return PyBool_FromLong(!(ap_model_of(o)->flags & AP_FLAG_UNTIED)); }
static PyObject *model_file_get(PyObject *o, void *unused) { (void)unused; return Py_NewRef(ap_model_file(o)); }
static PyObject *model_repr(PyObject *o) {
    const ap_model *m = ap_model_of(o);
    return PyUnicode_FromFormat("<aprender.Model %s: %d layers, width %d, vocabulary %d>", ap_archs[m->arch].name, m->h.layers, m->h.dim, m->h.vocab);
}

static PyGetSetDef model_getset[] = {
    { "file", model_file_get, NULL, "File: where the weights lie", NULL },
    { "arch", model_arch, NULL, "str: a row of ARCHS", NULL },
    { "flags", model_flags, NULL, "frozenset[str]: rows of FLAGS that are on", NULL },
    { "quirks", model_quirks, NULL, "tuple[str, ...]: what the container did to the weights, undone when they are read", NULL },
    { "tied", model_tied, NULL, "bool: the head is the token table", NULL },
    { "hparams", model_hparams, NULL, "dict: rows of HPARAMS", NULL },
    { "sources", model_hparams, NULL, "dict: where each hyper-parameter came from", (void *)1 },
    { "weights", model_weights, NULL, "tuple[WeightInfo, ...]", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef model_methods[] = {
    { "weight", model_weight, METH_VARARGS, "weight($self, name, layer=None, /)\n--\n\nValues as float32 in Hugging Face lane order, [out, in] or [n]." },
    { "weight_raw", model_weight_raw, METH_VARARGS, "weight_raw($self, name, layer=None, /)\n--\n\nThe file's bytes, one row per weight row: uint8 view, read-only, in the file's lane order." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot model_slots[] = {
    { Py_tp_new, model_new }, { Py_tp_dealloc, model_dealloc }, { Py_tp_repr, model_repr }, { Py_tp_getset, model_getset }, { Py_tp_methods, model_methods },
    { Py_tp_doc, "Model(file)\n--\n\nA file bound strictly to its architecture: nothing missing, nothing left over." }, { 0, NULL },
};
PyType_Spec ap_model_spec = { "aprender._core.Model", sizeof(py_model), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, model_slots };
