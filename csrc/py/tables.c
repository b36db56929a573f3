/*
** tables.c: exports the row files as tuples, so that Python never spells a list of stages, operations, weights or formats again.
** Column order is documented in aprender/_core.pyi.
*/
#include "py.h"
#include "../file/file.h"
#include "../base/tiers.h"

static PyObject *tab_weight_name(int w) {
    if (w < 0) Py_RETURN_NONE;
    return PyUnicode_FromString(ap_weights[w].name);
}

static const char *tab_wire(int w) { return w < 0 ? "NONE" : ap_wire_names[w]; }

static const char *tab_flag(uint32_t flag) {
    for (int i = 0; i < AP_FLAG_N; i++) if (flag == (1u << i)) return ap_flags[i].name;
    return "ALWAYS";
}

PyObject *ap_flag_names(uint32_t flags) {
    PyObject *set = PyFrozenSet_New(NULL);
    for (int i = 0; set && i < AP_FLAG_N; i++) {
        if (!(flags & (1u << i))) continue;
        PyObject *s = PyUnicode_FromString(ap_flags[i].name);
        if (!s || PySet_Add(set, s) < 0) Py_CLEAR(set);
        Py_XDECREF(s);
    }
    return set;
}

static PyObject *tab_stage(int i) {
    const ap_stage_row *r = &ap_stages[i];
    return Py_BuildValue("(sssssssNNsssss)", r->name, ap_span_names[r->span], ap_ops[r->op].name, tab_wire(r->out), tab_wire(r->a), tab_wire(r->b),
                         r->shape, tab_weight_name(r->weight), tab_weight_name(r->bias), tab_flag(r->flag), r->lanes, r->hf, r->node, r->population);
}
static PyObject *tab_op(int i)   { return Py_BuildValue("(ss)", ap_ops[i].name, ap_ops[i].text); }
static PyObject *tab_flag_row(int i) { return Py_BuildValue("(ss)", ap_flags[i].name, ap_flags[i].text); }
static PyObject *tab_weight(int i) {
    const ap_weight_row *r = &ap_weights[i];
    return Py_BuildValue("(ssssssNs)", r->name, ap_weights[r->group].name, r->gguf, r->hf, r->shape, ap_form_names[r->form], tab_weight_name(r->otherwise), tab_flag(r->flag));
}
static PyObject *tab_arch(int i) {
    return Py_BuildValue("(ssNN)", ap_archs[i].name, ap_archs[i].hf_class, ap_flag_names(ap_archs[i].flags), ap_flag_names(ap_archs[i].optional));
}
static PyObject *tab_quirk(int i) { return Py_BuildValue("(sss)", ap_archs[ap_quirks[i].arch].name, ap_quirks[i].container, "ROPE_PAIRS"); }
static PyObject *tab_hparam(int i) {
    const ap_hparam_row *r = &ap_hparam_rows[i];
    return Py_BuildValue("(ssssss)", r->field, r->is_int ? "INT" : "NUM", r->key[AP_IN_GGUF], r->key[AP_IN_HF], r->key[AP_IN_APR], r->required ? "REQUIRED" : "DERIVED");
}
static PyObject *tab_format(int i) {
    const ap_format *f = &ap_formats[i];
    static const char *const packing[] = { "ROWS", "FLAT", "WHOLE" };
    return Py_BuildValue("(sisiiNisN)", f->name, f->gguf, f->safetensors, f->block, f->bytes, PyBool_FromLong(f->decode != NULL),
                         f->apr, packing[f->packing], PyBool_FromLong(f->encode != NULL));
}
static PyObject *tab_container(int i) { return PyUnicode_FromString(ap_containers[i].name); }
static PyObject *tab_tier(int i) { return Py_BuildValue("(sN)", ap_tier_name(i), PyBool_FromLong(ap_tier_available(i))); }

static const struct { const char *kind, *code, *class; } tab_errors[] = {
#define X(kind, code, class) { #kind, code, #class },
#include "../base/errors.def"
};
static PyObject *tab_error(int i) { return Py_BuildValue("(sss)", tab_errors[i].kind, tab_errors[i].code, tab_errors[i].class); }

int ap_add_tables(PyObject *module) {
    const struct { const char *name; int n; PyObject *(*row)(int); } tables[] = {
        { "STAGES", AP_S_N, tab_stage }, { "OPS", AP_OP_N, tab_op }, { "FLAGS", AP_FLAG_N, tab_flag_row }, { "WEIGHTS", AP_W_N, tab_weight },
        { "ARCHS", AP_ARCH_N, tab_arch }, { "QUIRKS", ap_quirks_n, tab_quirk }, { "HPARAMS", ap_hparam_rows_n, tab_hparam },
        { "FORMATS", AP_F_N, tab_format }, { "CONTAINERS", ap_containers_n, tab_container }, { "TIERS", AP_TIER_N, tab_tier },
        { "ERRORS", (int)(sizeof tab_errors / sizeof tab_errors[0]), tab_error },
    };
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        PyObject *t = PyTuple_New(tables[i].n);
        for (int j = 0; t && j < tables[i].n; j++) {
            PyObject *row = tables[i].row(j);
            if (!row) Py_CLEAR(t); else PyTuple_SET_ITEM(t, j, row);
        }
        int rc = t ? PyModule_AddObjectRef(module, tables[i].name, t) : -1;
        Py_XDECREF(t);
        if (rc < 0) return -1;
    }
    return 0;
}
