/*
** py.h: what the files of the binding share.  This floor knows Python and NumPy, holds no arithmetic and parses nothing: it checks arguments with the GIL
** held, calls the core without it, and wraps what comes back.  module.c assembles; tables.c, errors.c, file.c, quant.c, model.c and run.c are one type or idea
** held, calls the core without it, and wraps what comes back.  module.c assembles; tables.c, errors.c, file.c, quant.c, aprt.c, model.c and run.c are one type
** or idea each.
*/
#ifndef AP_PY_H
#define AP_PY_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#ifndef AP_PY_MODULE_C
#define NO_IMPORT_ARRAY
#endif
#define PY_ARRAY_UNIQUE_SYMBOL ap_numpy_api
#include <numpy/arrayobject.h>
#include "../plan/tables.h"
#include "../base/err.h"

typedef struct {
    PyObject *errors;                                   /* the module aprender.errors                  */
    PyTypeObject *file, *model, *run;
    PyTypeObject *tensor_info, *weight_info;            /* struct sequences                            */
} ap_state;
extern PyModuleDef ap_module_def;
ap_state *ap_state_of(PyTypeObject *type);              /* of a type of this module, or of a subclass  */

PyObject *ap_raise(ap_state *st, const ap_err *e, const char *path);     /* sets the exception, returns NULL */
int ap_add_tables(PyObject *module);
PyObject *ap_flag_names(uint32_t flags);                /* frozenset of str */
int ap_key_parse(ap_state *st, PyObject *key, int layers, int *stage, int *layer);   /* (stage, layer or None) */
PyObject *ap_key_new(int stage, int layer);
PyObject *ap_view(PyObject *owner, const void *p, int type, int nd, const npy_intp *dim); /* read-only array over memory that owner keeps alive */
PyObject *ap_encode(PyObject *module, PyObject *args, PyObject *kw);
PyObject *ap_dequantize(PyObject *module, PyObject *args, PyObject *kw);

PyObject *ap_measure_compare(PyObject *module, PyObject *args, PyObject *kw);
PyObject *ap_measure_estimate(PyObject *module, PyObject *args, PyObject *kw);
PyObject *ap_measure_exact(PyObject *module, PyObject *args, PyObject *kw);
PyObject *ap_measure_lanes(PyObject *module, PyObject *args, PyObject *kw);
PyObject *ap_cuda_state(PyObject *module, PyObject *unused);
PyObject *ap_read_aprt(PyObject *module, PyObject *path);

PyObject *ap_file_array(PyObject *file, const uint8_t *data, int nd, const npy_intp *dim);   /* bytes of a tensor: a view, or of a mapped file a copy */
extern PyType_Spec ap_file_spec, ap_model_spec, ap_run_spec;
extern PyStructSequence_Desc ap_tensor_info_desc, ap_weight_info_desc;
struct ap_file; struct ap_model;
const struct ap_file *ap_file_of(PyObject *file);
const struct ap_model *ap_model_of(PyObject *model);
PyObject *ap_model_file(PyObject *model);               /* borrowed */
#endif
