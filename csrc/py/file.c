/*
** file.c: the type File: an opened container.  Arrays over its bytes keep it alive.
*/
#include "py.h"
#include "../file/file.h"
#include "../base/mem.h"

typedef struct { PyObject_HEAD ap_file *f; } py_file;

static PyStructSequence_Field file_info_fields[] = {
    { "name", "tensor name" }, { "format", "number format, as in FORMATS" }, { "shape", "outermost first" },
    { "nbytes", "bytes in the file" }, { "offset", "offset of the data in its file" }, { "part", "index in File.parts: the file that holds it" }, { NULL, NULL },
};
enum { FILE_INFO_N = sizeof file_info_fields / sizeof *file_info_fields - 1 };
PyStructSequence_Desc ap_tensor_info_desc = { "aprender._core.TensorInfo", "A tensor of a file.", file_info_fields, FILE_INFO_N };

const ap_file *ap_file_of(PyObject *o) { return ((py_file *)o)->f; }

PyObject *ap_view(PyObject *owner, const void *p, int type, int nd, const npy_intp *dim) {
    static const char nothing[8] = { 0 };                    /* NumPy wants an address even for no values */
    PyObject *a = PyArray_New(&PyArray_Type, nd, dim, type, NULL, (void *)(uintptr_t)(p ? p : nothing), 0, NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED, NULL);
    if (!a) return NULL;
    Py_INCREF(owner);
    if (PyArray_SetBaseObject((PyArrayObject *)a, owner) < 0) { Py_DECREF(a); return NULL; }      /* steals owner even when it fails */
    return a;
}

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
    static char *names[] = { "path", "mmap", NULL };
    PyObject *path = NULL;
    int mapped = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O&|$p:File", names, PyUnicode_FSConverter, &path, &mapped)) return NULL;
    py_file *self = (py_file *)type->tp_alloc(type, 0);
    if (!self) { Py_DECREF(path); return NULL; }
    ap_err e = AP_ERR_INIT;
    const char *name = PyBytes_AS_STRING(path);
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = ap_file_open(&self->f, name, mapped, &e);
    Py_END_ALLOW_THREADS
    if (rc) { ap_raise(ap_state_of(type), &e, name); Py_CLEAR(self); }
    Py_DECREF(path);
    return (PyObject *)self;
}

static void file_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ap_file_close(((py_file *)self)->f);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- metadata ---- */

static PyObject *file_text(ap_str s) { return PyUnicode_DecodeUTF8(s.p, (Py_ssize_t)s.n, "strict"); }

static PyObject *file_strings(const ap_kv *kv) {
    ap_cur c = { (const uint8_t *)kv->s.p, kv->s.n, 0, 0 };
    PyObject *list = PyList_New((Py_ssize_t)kv->n);
    for (uint64_t i = 0; list && i < kv->n; i++) {
        uint64_t n;
        const uint8_t *p = NULL;
        PyObject *s = ap_u64(&c, &n) && ap_take(&c, n, &p) ? PyUnicode_DecodeUTF8((const char *)p, (Py_ssize_t)n, "strict") : NULL;
        if (!s) Py_CLEAR(list); else PyList_SET_ITEM(list, (Py_ssize_t)i, s);
    }
    return list;
}

static PyObject *file_array(const ap_kv *kv) {
    static const int types[] = { NPY_UINT8, NPY_INT8, NPY_UINT16, NPY_INT16, NPY_UINT32, NPY_INT32, NPY_FLOAT32, NPY_BOOL, -1, -1, NPY_UINT64, NPY_INT64, NPY_FLOAT64 };
    if (kv->elem == AP_V_STR) return file_strings(kv);
    int type = kv->raw_type < sizeof types / sizeof types[0] ? types[kv->raw_type] : -1;
    if (type < 0) { PyErr_SetString(PyExc_RuntimeError, "array of an unknown kind"); return NULL; }
    npy_intp n = (npy_intp)kv->n;
    PyObject *a = PyArray_SimpleNew(1, &n, type);
    if (a && kv->s.n) memcpy(PyArray_DATA((PyArrayObject *)a), kv->s.p, (size_t)kv->s.n);
    return a;
}

static PyObject *file_json(ap_str text) {
    PyObject *json = PyImport_ImportModule("json");
    PyObject *value = json ? PyObject_CallMethod(json, "loads", "s#", text.p, (Py_ssize_t)text.n) : NULL;
    Py_XDECREF(json);
    return value;
}

static PyObject *file_value(const ap_kv *kv) {
    switch (kv->kind) {
        case AP_V_INT:   return PyLong_FromLongLong(kv->v.i);
        case AP_V_UINT:  return PyLong_FromUnsignedLongLong(kv->v.u);
        case AP_V_FLOAT: return PyFloat_FromDouble(kv->v.f);
        case AP_V_BOOL:  return PyBool_FromLong(kv->v.b);
        case AP_V_STR:   return file_text(kv->s);
        case AP_V_ARR:   return file_array(kv);
        case AP_V_JSON:  return file_json(kv->s);
        default:         Py_RETURN_NONE;
    }
}

static PyObject *file_metadata(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    PyObject *d = PyDict_New();
    (void)unused;
    for (int i = 0; d && i < f->nkv; i++) {
        PyObject *k = file_text(f->kv[i].key), *v = k ? file_value(&f->kv[i]) : NULL;
        if (!v || PyDict_SetItem(d, k, v) < 0) Py_CLEAR(d);
        Py_XDECREF(k); Py_XDECREF(v);
    }
    return d;
}

static PyObject *file_get(PyObject *self, PyObject *args) {
    const char *key;
    PyObject *otherwise = Py_None;
    if (!PyArg_ParseTuple(args, "s|O:get", &key, &otherwise)) return NULL;
    const ap_kv *kv = ap_file_kv(ap_file_of(self), key);
    return kv ? file_value(kv) : Py_NewRef(otherwise);
}

static PyObject *file_keys(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    PyObject *t = PyTuple_New(f->nkv);
    (void)unused;
    for (int i = 0; t && i < f->nkv; i++) {
        PyObject *k = file_text(f->kv[i].key);
        if (!k) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, k);
    }
    return t;
}

/* ---- tensors ---- */

static PyObject *file_shape(const ap_tensor *t) {
    PyObject *s = PyTuple_New(t->nd);
    for (int i = 0; s && i < t->nd; i++) {
        PyObject *d = PyLong_FromLongLong(t->dim[i]);
        if (!d) Py_CLEAR(s); else PyTuple_SET_ITEM(s, i, d);
    }
    return s;
}

static PyObject *file_info(ap_state *st, const ap_tensor *t) {
    PyObject *info = PyStructSequence_New(st->tensor_info);
    if (!info) return NULL;
    PyStructSequence_SET_ITEM(info, 0, file_text(t->name));
    PyStructSequence_SET_ITEM(info, 1, PyUnicode_FromString(t->fmt->name));
    PyStructSequence_SET_ITEM(info, 2, file_shape(t));
    PyStructSequence_SET_ITEM(info, 3, PyLong_FromUnsignedLongLong(t->bytes));
    PyStructSequence_SET_ITEM(info, 4, PyLong_FromUnsignedLongLong(t->offset));
    PyStructSequence_SET_ITEM(info, 5, PyLong_FromLong(t->part));
    for (int i = 0; i < FILE_INFO_N; i++) if (!PyStructSequence_GET_ITEM(info, i)) { Py_DECREF(info); return NULL; }
    return info;
}

static PyObject *file_tensors(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    PyObject *t = PyTuple_New(f->nt);
    (void)unused;
    for (int i = 0; t && i < f->nt; i++) {
        PyObject *info = file_info(ap_state_of(Py_TYPE(self)), &f->t[i]);
        if (!info) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, info);
    }
    return t;
}

static const ap_tensor *file_find(PyObject *self, PyObject *name) {
    Py_ssize_t n;
    const char *p = PyUnicode_AsUTF8AndSize(name, &n);
    if (!p) return NULL;
    const ap_tensor *t = ap_file_tensor(ap_file_of(self), (ap_str){ p, (uint64_t)n });
    ap_err e = AP_ERR_INIT;
    if (!t && ap_fail_at(&e, AP_LOOKUP, -1, p, "no tensor named %.80s in this file", p)) ap_raise(ap_state_of(Py_TYPE(self)), &e, ap_file_of(self)->path);
    return t;
}

/* Of a mapped file: were the bytes that were just used those of the file?  0 with an exception set if not. */
static int file_whole(PyObject *self) {
    ap_err e = AP_ERR_INIT;
    if (!ap_file_same(ap_file_of(self), &e)) return 1;
    ap_raise(ap_state_of(Py_TYPE(self)), &e, ap_file_of(self)->path);
    return 0;
}

PyObject *ap_file_array(PyObject *self, const uint8_t *data, int nd, const npy_intp *dim) {
    PyObject *a = ap_file_of(self)->mapped ? PyArray_SimpleNew(nd, dim, NPY_UINT8) : ap_view(self, data, NPY_UINT8, nd, dim);
    if (!a || !ap_file_of(self)->mapped) return a;
    memcpy(PyArray_DATA((PyArrayObject *)a), data, (size_t)PyArray_SIZE((PyArrayObject *)a));
    PyArray_CLEARFLAGS((PyArrayObject *)a, NPY_ARRAY_WRITEABLE);
    if (!file_whole(self)) Py_CLEAR(a);
    return a;
}

/* The bytes of a tensor, NULL with an exception set. */
static const uint8_t *file_data(PyObject *self, const ap_tensor *t) {
    static const uint8_t nothing[1] = { 0 };
    const uint8_t *data = NULL;
    ap_err e = AP_ERR_INIT;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = ap_file_data(ap_file_of(self), t, &data, &e);
    Py_END_ALLOW_THREADS
    if (rc) { ap_raise(ap_state_of(Py_TYPE(self)), &e, ap_file_of(self)->path); return NULL; }
    return data ? data : nothing;
}

static PyObject *file_raw(PyObject *self, PyObject *name) {
    const ap_tensor *t = file_find(self, name);
    const uint8_t *data = t ? file_data(self, t) : NULL;
    npy_intp n = t ? (npy_intp)t->bytes : 0;
    return data ? ap_file_array(self, data, 1, &n) : NULL;
}

static PyObject *file_dequantize(PyObject *self, PyObject *name) {
    const ap_tensor *t = file_find(self, name);
    if (!t) return NULL;
    npy_intp dim[AP_MAX_DIMS];
    for (int i = 0; i < t->nd; i++) dim[i] = (npy_intp)t->dim[i];
    ap_err e = AP_ERR_INIT;
    if (!t->fmt->decode) {
        if (ap_fail_at(&e, AP_UNSUPPORTED, -1, NULL, "%s cannot be read yet", t->fmt->name)) return ap_raise(ap_state_of(Py_TYPE(self)), &e, ap_file_of(self)->path);
    }
    const uint8_t *data = file_data(self, t);
    PyObject *a = data ? PyArray_SimpleNew(t->nd, dim, NPY_FLOAT32) : NULL;
    if (!a) return NULL;
    float *out = PyArray_DATA((PyArrayObject *)a);
    int64_t n = PyArray_SIZE((PyArrayObject *)a), cols = t->nd ? t->dim[t->nd - 1] : 1;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t row = 0; n && row < n / cols; row++) ap_format_row(t->fmt, data, cols, row, out + row * cols);
    Py_END_ALLOW_THREADS
    if (!file_whole(self)) Py_CLEAR(a);
    return a;
}

static PyObject *file_path(PyObject *self, void *unused) { (void)unused; return PyUnicode_DecodeFSDefault(ap_file_of(self)->path); }
static PyObject *file_container(PyObject *self, void *unused) { (void)unused; return PyUnicode_FromString(ap_file_of(self)->kind->name); }
static PyObject *file_version(PyObject *self, void *unused) { (void)unused; return PyLong_FromUnsignedLong(ap_file_of(self)->version); }
static PyObject *file_nbytes(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    uint64_t n = f->n;
    (void)unused;
    for (int i = 0; i < f->nshard; i++) n += f->shard[i]->n;
    return PyLong_FromUnsignedLongLong(n);
}
static PyObject *file_parts(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    PyObject *t = PyTuple_New(f->nshard + 1);
    (void)unused;
    for (int i = 0; t && i <= f->nshard; i++) {
        PyObject *path = PyUnicode_DecodeFSDefault(i ? f->shard[i - 1]->path : f->path);
        if (!path) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, path);
    }
    return t;
}
static PyObject *file_notes(PyObject *self, void *unused) {
    const ap_file *f = ap_file_of(self);
    PyObject *t = PyTuple_New(f->nnotes);
    (void)unused;
    for (int i = 0; t && i < f->nnotes; i++) {
        PyObject *s = PyUnicode_DecodeUTF8(f->note[i], (Py_ssize_t)strlen(f->note[i]), "replace");     /* a note may be cut inside a character */
        if (!s) Py_CLEAR(t); else PyTuple_SET_ITEM(t, i, s);
    }
    return t;
}
static PyObject *file_verify(PyObject *self, PyObject *unused) {
    const ap_file *f = ap_file_of(self);
    ap_err e = AP_ERR_INIT;
    int checked = 0, rc;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    rc = ap_file_verify(f, &checked, &e);
    Py_END_ALLOW_THREADS
    return rc ? ap_raise(ap_state_of(Py_TYPE(self)), &e, f->path) : PyBool_FromLong(checked);
}
static PyObject *file_repr(PyObject *self) {
    const ap_file *f = ap_file_of(self);
    return PyUnicode_FromFormat("<aprender.File %s: %s, %d tensors, %llu bytes>", f->path, f->kind->name, f->nt, (unsigned long long)f->n);
}

static PyGetSetDef file_getset[] = {
    { "path", file_path, NULL, "str: the file that was opened; for a folder, its model.safetensors", NULL },
    { "container", file_container, NULL, "str: a row of CONTAINERS", NULL },
    { "version", file_version, NULL, "int: version of the container, 0 where it has none", NULL },
    { "nbytes", file_nbytes, NULL, "int: size of the file, of all parts together", NULL },
    { "parts", file_parts, NULL, "tuple[str, ...]: the files of the model, the opened one first", NULL },
    { "notes", file_notes, NULL, "tuple[str, ...]: what is odd about the file and no error", NULL },
    { "metadata", file_metadata, NULL, "dict: every key and value; config.json is flattened with dots", NULL },
    { "keys", file_keys, NULL, "tuple[str, ...]: the metadata keys, in file order", NULL },
    { "tensors", file_tensors, NULL, "tuple[TensorInfo, ...]: the tensors, in file order", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyMethodDef file_methods[] = {
    { "get", file_get, METH_VARARGS, "get($self, key, default=None, /)\n--\n\nThe value of one metadata key, without building the others." },
    { "raw", file_raw, METH_O, "raw($self, name, /)\n--\n\nThe bytes of a tensor: uint8 view, read-only, not copied." },
    { "verify", file_verify, METH_NOARGS, "verify($self, /)\n--\n\nRead every byte against the checksum of the container; False where it has none." },
    { "dequantize", file_dequantize, METH_O, "dequantize($self, name, /)\n--\n\nThe values of a tensor as float32, by the reference decoder." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot file_slots[] = {
    { Py_tp_new, file_new }, { Py_tp_dealloc, file_dealloc }, { Py_tp_repr, file_repr }, { Py_tp_getset, file_getset }, { Py_tp_methods, file_methods },
    { Py_tp_doc, "File(path, *, mmap=False)\n--\n\nAn opened container: GGUF, APR, safetensors, or a folder with model.safetensors (or its shards' index) and config.json." }, { 0, NULL },
};
PyType_Spec ap_file_spec = { "aprender._core.File", sizeof(py_file), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, file_slots };
