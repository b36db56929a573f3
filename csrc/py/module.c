/*
** module.c: assembles aprender._core: types, tables, constants.  Nothing else lives here.
*/
#define AP_PY_MODULE_C
#include "py.h"
#include "../base/mem.h"

ap_state *ap_state_of(PyTypeObject *type) { return PyModule_GetState(PyType_GetModuleByDef(type, &ap_module_def)); }

static PyObject *module_fail_at(PyObject *self, PyObject *arg) {
    long long n = PyLong_AsLongLong(arg);
    (void)self;
    if (n == -1 && PyErr_Occurred()) return NULL;
    ap_mem_fail_at(n);
    Py_RETURN_NONE;
}
static PyObject *module_live(PyObject *self, PyObject *unused) { (void)self; (void)unused; return PyLong_FromUnsignedLongLong(ap_mem_live()); }
static PyObject *module_peak(PyObject *self, PyObject *unused) { (void)self; (void)unused; return PyLong_FromUnsignedLongLong(ap_mem_peak()); }
static PyObject *module_calls(PyObject *self, PyObject *unused) { (void)self; (void)unused; return PyLong_FromUnsignedLongLong(ap_mem_calls()); }

static PyMethodDef module_methods[] = {
    { "encode", (PyCFunction)(void (*)(void))ap_encode, METH_VARARGS | METH_KEYWORDS, "encode($module, format, values, /, *, pad=False, threads=0)\n--\n\nThe bytes of float32 values in a format." },
    { "dequantize", (PyCFunction)(void (*)(void))ap_dequantize, METH_VARARGS | METH_KEYWORDS, "dequantize($module, format, data, shape, /, *, tier=None)\n--\n\nThe float32 values that bytes mean in a format." },
    { "compare", (PyCFunction)(void (*)(void))ap_measure_compare, METH_VARARGS | METH_KEYWORDS, "compare($module, a, b, /, *, limit=0, threads=0, tier=None)\n--\n\nWhat one pass over two float32 arrays says of them." },
    { "estimate_sums", (PyCFunction)(void (*)(void))ap_measure_estimate, METH_VARARGS | METH_KEYWORDS, "estimate_sums($module, x, w, /, *, lanes=0, block=0, threads=0)\n--\n\nVariance that float32 leaves of dot products, from their segments." },
    { "exact_sums", (PyCFunction)(void (*)(void))ap_measure_exact, METH_VARARGS | METH_KEYWORDS, "exact_sums($module, x, w, flat, /, *, lanes=0, block=0, threads=0)\n--\n\nVariance that float32 leaves of some dot products, from all partial sums." },
    { "lane_dots", (PyCFunction)(void (*)(void))ap_measure_lanes, METH_VARARGS | METH_KEYWORDS, "lane_dots($module, x, w, flat=None, /, *, lanes=16, threads=0)\n--\n\nDot products by float32 fused multiply-adds in lanes and a rounded tree." },
    { "read_aprt", ap_read_aprt, METH_O, "read_aprt($module, path, /)\n--\n\nOne APRT file: its layer (None: the whole model) and its values, a read-only view." },
    { "cuda", ap_cuda_state, METH_NOARGS, "cuda($module, /)\n--\n\nWhat there is of CUDA: whether its library is built, which devices are present, and why not." },
    { "_fail_allocation", module_fail_at, METH_O, "_fail_allocation($module, n, /)\n--\n\nFor tests: the nth allocation of the core from now fails; -1 never." },
    { "_live_bytes", module_live, METH_NOARGS, "_live_bytes($module)\n--\n\nFor tests: bytes that the core holds." },
    { "_peak_bytes", module_peak, METH_NOARGS, "_peak_bytes($module)\n--\n\nFor tests: most bytes that the core held at once since the last call of this." },
    { "_allocations", module_calls, METH_NOARGS, "_allocations($module)\n--\n\nFor tests: allocations of the core so far." },
    { NULL, NULL, 0, NULL },
};

static int module_add_type(PyObject *m, PyType_Spec *spec, PyTypeObject **out) {
    *out = (PyTypeObject *)PyType_FromModuleAndSpec(m, spec, NULL);
    return *out ? PyModule_AddType(m, *out) : -1;
}

static int module_add_record(PyObject *m, PyStructSequence_Desc *desc, PyTypeObject **out) {
    *out = PyStructSequence_NewType(desc);
    return *out ? PyModule_AddType(m, *out) : -1;
}

static int module_exec(PyObject *m) {
    ap_state *st = PyModule_GetState(m);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    st->errors = PyImport_ImportModule("aprender.errors");
    if (!st->errors) return -1;
    if (module_add_type(m, &ap_file_spec, &st->file) || module_add_type(m, &ap_model_spec, &st->model) || module_add_type(m, &ap_run_spec, &st->run)) return -1;
    if (module_add_record(m, &ap_tensor_info_desc, &st->tensor_info) || module_add_record(m, &ap_weight_info_desc, &st->weight_info)) return -1;
    return ap_add_tables(m);
}

static int module_traverse(PyObject *m, visitproc visit, void *arg) {
    ap_state *st = PyModule_GetState(m);
    if (!st) return 0;
    Py_VISIT(st->errors); Py_VISIT(st->file); Py_VISIT(st->model); Py_VISIT(st->run); Py_VISIT(st->tensor_info); Py_VISIT(st->weight_info);
    return 0;
}

static int module_clear(PyObject *m) {
    ap_state *st = PyModule_GetState(m);
    if (!st) return 0;
    Py_CLEAR(st->errors); Py_CLEAR(st->file); Py_CLEAR(st->model); Py_CLEAR(st->run); Py_CLEAR(st->tensor_info); Py_CLEAR(st->weight_info);
    return 0;
}

static PyModuleDef_Slot module_slots[] = { { Py_mod_exec, module_exec }, { 0, NULL } };
PyModuleDef ap_module_def = {
    PyModuleDef_HEAD_INIT, .m_name = "aprender._core", .m_doc = "The native core: files, models, runs, and the tables that describe them.",
    .m_size = sizeof(ap_state), .m_methods = module_methods, .m_slots = module_slots, .m_traverse = module_traverse, .m_clear = module_clear,
};
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&ap_module_def); }
