/*
** model.c: file -> model.  Reads hyper-parameters by the rows of hparams.def, then weights by the rows of weights.def, then looks at what is left over.
** Refuses: unknown architectures, unknown keys, values that this engine would not compute, wrong shapes, tensors that no row reads.
*/
#include "model.h"
#include "../base/mem.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static int mdl_is_gguf(const ap_file *f) { return !strcmp(f->kind->name, "gguf"); }

/* Does the key match a pattern of hparams.def?  "%s" is the architecture, a trailing * any rest. */
static int mdl_match(ap_str key, const char *pattern, const char *arch) {
    char want[160];
    if (!*pattern) return 0;
    snprintf(want, sizeof want, pattern[0] == '%' ? "%s%s" : "%.0s%s", arch, pattern[0] == '%' ? pattern + 2 : pattern);
    size_t n = strlen(want);
    if (want[n - 1] == '*') return key.n >= n - 1 && !memcmp(key.p, want, n - 1);
    return key.n == n && !memcmp(key.p, want, n);
}

static const ap_kv *mdl_key(const ap_file *f, const char *pattern, const char *arch) {
    char want[160];
    if (!*pattern) return NULL;
    snprintf(want, sizeof want, pattern[0] == '%' ? "%s%s" : "%.0s%s", arch, pattern[0] == '%' ? pattern + 2 : pattern);
    const ap_kv *kv = ap_file_kv(f, want);
    return kv && kv->kind != AP_V_NULL ? kv : NULL;
}

/* ---- numbers out of keys ---- */

static int mdl_int(const ap_kv *kv, const char *name, int64_t max, int *out, ap_err *e) {
    char shown[132];
    if (kv->kind == AP_V_UINT && kv->v.u <= (uint64_t)max) { *out = (int)kv->v.u; return AP_OK; }
    if (kv->kind == AP_V_INT && kv->v.i >= 0 && kv->v.i <= max) { *out = (int)kv->v.i; return AP_OK; }
    if (kv->kind != AP_V_INT && kv->kind != AP_V_UINT)
        return ap_fail_at(e, AP_KV_TYPE, -1, name, "%s must be an integer", ap_show(shown, name, strlen(name)));
    if (kv->kind == AP_V_UINT) return ap_fail_at(e, AP_CONFIG, -1, name, "%s = %llu is outside 0..%lld", name, (unsigned long long)kv->v.u, (long long)max);
    return ap_fail_at(e, AP_CONFIG, -1, name, "%s = %lld is outside 0..%lld", name, (long long)kv->v.i, (long long)max);
}

static int mdl_num(const ap_kv *kv, const char *name, double *out, ap_err *e) {
    if (kv->kind == AP_V_FLOAT) *out = kv->v.f;
    else if (kv->kind == AP_V_UINT) *out = (double)kv->v.u;
    else if (kv->kind == AP_V_INT) *out = (double)kv->v.i;
    else return ap_fail_at(e, AP_KV_TYPE, -1, name, "%s must be a number", name);
    *out = (double)(float)*out;     /* GGUF stores float32 and Hugging Face's float32 arithmetic rounds to it: so every container gives the same number */
    return AP_OK;
}

static int *mdl_field(ap_hparams *h, int row) {
    int *ints[] = { &h->layers, &h->dim, &h->ffn, &h->heads, &h->kv_heads, &h->head, &h->vocab, &h->context };
    return row < (int)(sizeof ints / sizeof ints[0]) ? ints[row] : NULL;
}
enum { MDL_KV_HEADS = 4, MDL_HEAD, MDL_VOCAB, MDL_CONTEXT, MDL_EPS, MDL_THETA };   /* rows of hparams.def with a rule of their own */

static int mdl_hparam(ap_model *m, int row, ap_err *e) {
    const ap_hparam_row *r = &ap_hparam_rows[row];
    const char *arch = ap_archs[m->arch].name;
    int gguf = mdl_is_gguf(m->file);
    const ap_kv *kv = mdl_key(m->file, gguf ? r->gguf : r->hf, arch);
    if (!kv && !gguf) kv = mdl_key(m->file, r->hf_old, arch);
    char name[128];
    snprintf(name, sizeof name, r->gguf[0] == '%' && gguf ? "%s%s" : "%.0s%s", arch, gguf ? r->gguf + 2 : r->hf);
    if (!kv) {
        if (r->required) return ap_fail_at(e, AP_MISSING, -1, name, "the file does not give %s, which %s models must have", name, arch);
        return AP_OK;
    }
    snprintf(m->source[row], sizeof m->source[row], "%s %.*s", gguf ? "GGUF" : "config.json", (int)(kv->key.n < 70 ? kv->key.n : 70), kv->key.p);
    int *field = mdl_field(&m->h, row);
    if (field) return mdl_int(kv, name, row == MDL_CONTEXT ? INT32_MAX : AP_MAX_WIDTH, field, e);
    return mdl_num(kv, name, row == MDL_EPS ? &m->h.eps : &m->h.theta, e);
}

/* What a DERIVED hyper-parameter is when the file does not give it; always said, never silent. */
static int mdl_derive(ap_model *m, ap_err *e) {
    ap_hparams *h = &m->h;
    if (!*m->source[MDL_KV_HEADS]) { h->kv_heads = h->heads; strcpy(m->source[MDL_KV_HEADS], "not given: as many as heads"); }
    if (!*m->source[MDL_HEAD]) {
        if (h->heads <= 0 || h->dim % h->heads)
            return ap_fail_at(e, AP_CONFIG, -1, "heads", "width %d is not a multiple of %d heads, and no head size is given", h->dim, h->heads);
        h->head = h->dim / h->heads;
        strcpy(m->source[MDL_HEAD], "not given: width / heads");
    }
    if (!*m->source[MDL_VOCAB]) {
        const char *name = mdl_is_gguf(m->file) ? ap_weights[AP_W_token_embd].gguf : ap_weights[AP_W_token_embd].hf;
        const ap_tensor *t = ap_file_tensor(m->file, (ap_str){ name, strlen(name) });
        if (!t || t->nd < 1 || t->dim[0] > AP_MAX_VOCAB) return ap_fail_at(e, AP_MISSING, -1, name, "no %s, so the vocabulary size is unknown", name);
        h->vocab = (int)t->dim[0];
        strcpy(m->source[MDL_VOCAB], "not given: rows of the token table");
    }
    if (!*m->source[MDL_CONTEXT]) strcpy(m->source[MDL_CONTEXT], "not given");
    if (!*m->source[MDL_THETA]) { h->theta = 10000; strcpy(m->source[MDL_THETA], "not given: 10000, the default of the format"); }
    return AP_OK;
}

static int mdl_range(const ap_model *m, ap_err *e) {
    const ap_hparams *h = &m->h;
    const struct { const char *name; int v, min, max; } t[] = {
        { "layers", h->layers, 1, AP_MAX_LAYERS }, { "width", h->dim, 1, AP_MAX_WIDTH }, { "feed-forward width", h->ffn, 1, AP_MAX_WIDTH },
        { "heads", h->heads, 1, AP_MAX_HEADS }, { "kv heads", h->kv_heads, 1, h->heads }, { "head size", h->head, 2, 65536 },
        { "vocabulary", h->vocab, 1, AP_MAX_VOCAB },
    };
    for (size_t i = 0; i < sizeof t / sizeof t[0]; i++)
        if (t[i].v < t[i].min || t[i].v > t[i].max)
            return ap_fail_at(e, AP_CONFIG, -1, t[i].name, "%s = %d is outside %d..%d", t[i].name, t[i].v, t[i].min, t[i].max);
    if (h->heads % h->kv_heads) return ap_fail_at(e, AP_CONFIG, -1, "kv heads", "%d heads cannot share %d kv heads evenly", h->heads, h->kv_heads);
    if (h->head % 2) return ap_fail_at(e, AP_CONFIG, -1, "head size", "head size %d is odd: RoPE needs pairs", h->head);
    if ((int64_t)h->heads * h->head > AP_MAX_WIDTH) return ap_fail_at(e, AP_CONFIG, -1, "heads", "%d heads of %d are wider than %d", h->heads, h->head, AP_MAX_WIDTH);
    if (!(h->eps >= 0 && h->eps <= 1)) return ap_fail_at(e, AP_CONFIG, -1, "eps", "RMSNorm eps = %g is outside 0..1", h->eps);
    if (!(h->theta > 0 && h->theta <= 1e12)) return ap_fail_at(e, AP_CONFIG, -1, "theta", "RoPE base = %g is outside (0, 1e12]", h->theta);
    return AP_OK;
}

/* ---- keys that only one value may have ---- */

static double mdl_value(const ap_kv *kv) {
    switch (kv->kind) {
        case AP_V_INT: return (double)kv->v.i;
        case AP_V_UINT: return (double)kv->v.u;
        case AP_V_FLOAT: return kv->v.f;
        case AP_V_BOOL: return kv->v.b;
        default: return NAN;
    }
}

static int mdl_word_is(const ap_kv *kv, const char *a, const char *b) { return kv->kind == AP_V_STR && (ap_str_is(kv->s, a) || ap_str_is(kv->s, b)); }

static int mdl_rule_holds(const ap_model *m, const ap_kv *kv, int rule) {
    switch (rule) {
        case AP_RULE_HEAD:      return mdl_value(kv) == m->h.head;
        case AP_RULE_FALSE:     return mdl_value(kv) == 0;
        case AP_RULE_TRUE:
        case AP_RULE_ONE:       return mdl_value(kv) == 1;
        case AP_RULE_SILU:      return mdl_word_is(kv, "silu", "swish");
        case AP_RULE_DEFAULT:   return mdl_word_is(kv, "default", "none");
        case AP_RULE_FULL:      return kv->kind == AP_V_JSON && !memmem(kv->s.p, kv->s.n, "sliding", 7) && !memmem(kv->s.p, kv->s.n, "chunked", 7) && !memmem(kv->s.p, kv->s.n, "linear", 6);
        case AP_RULE_OPTION:    return kv->kind == AP_V_BOOL;
        default:                return 0;
    }
}

static int mdl_known(const ap_model *m, ap_str key, int gguf, const char *arch) {
    (void)m;
    for (int i = 0; i < ap_hparam_rows_n; i++) {
        const ap_hparam_row *r = &ap_hparam_rows[i];
        if (gguf ? mdl_match(key, r->gguf, arch) : mdl_match(key, r->hf, arch) || mdl_match(key, r->hf_old, arch)) return 1;
    }
    for (int i = 0; i < ap_ignored_n; i++) if (mdl_match(key, gguf ? ap_ignored[i].gguf : ap_ignored[i].hf, arch)) return 1;
    return 0;
}

static int mdl_keys(const ap_model *m, ap_err *e) {
    const char *arch = ap_archs[m->arch].name;
    int gguf = mdl_is_gguf(m->file);
    for (int i = 0; i < m->file->nkv; i++) {
        const ap_kv *kv = &m->file->kv[i];
        if (kv->kind == AP_V_NULL || mdl_known(m, kv->key, gguf, arch)) continue;
        char shown[132], value[132] = "";
        ap_show(shown, kv->key.p, kv->key.n);
        if (kv->kind == AP_V_STR) ap_show(value, kv->s.p, kv->s.n); else snprintf(value, sizeof value, "%g", mdl_value(kv));
        int row = 0;
        while (row < ap_checks_n && !mdl_match(kv->key, gguf ? ap_checks[row].gguf : ap_checks[row].hf, arch)) row++;
        if (row == ap_checks_n)
            return ap_fail_at(e, AP_UNSUPPORTED, -1, shown, "the file gives %s = %s, which this engine does not know and will not ignore", shown, value);
        if (!mdl_rule_holds(m, kv, ap_checks[row].rule))
            return ap_fail_at(e, AP_UNSUPPORTED, -1, shown, "%s = %s means %s, which this engine does not compute", shown, value, ap_checks[row].meaning);
    }
    return AP_OK;
}

/* ---- architecture ---- */

static int mdl_arch(ap_model *m, ap_err *e) {
    int gguf = mdl_is_gguf(m->file);
    const char *key = gguf ? "general.architecture" : "model_type";
    const ap_kv *kv = ap_file_kv(m->file, key);
    if (!kv) {
        if (!gguf && !m->file->config) return ap_fail_at(e, AP_MISSING, -1, "config.json", "no config.json beside the safetensors file: give the folder that holds both");
        return ap_fail_at(e, AP_MISSING, -1, key, "the file does not give %s", key);
    }
    if (kv->kind != AP_V_STR) return ap_fail_at(e, AP_KV_TYPE, -1, key, "%s must be a string", key);
    for (m->arch = 0; m->arch < AP_ARCH_N; m->arch++) if (ap_str_is(kv->s, ap_archs[m->arch].name)) break;
    char shown[132];
    if (m->arch == AP_ARCH_N) return ap_fail_at(e, AP_UNSUPPORTED, -1, key, "architecture %s is not supported", ap_show(shown, kv->s.p, kv->s.n));
    m->flags = ap_archs[m->arch].flags;
    for (int i = 0; i < ap_quirks_n; i++)
        if (ap_quirks[i].arch == m->arch && !strcmp(ap_quirks[i].container, m->file->kind->name)) m->quirks |= ap_quirks[i].quirk;
    return AP_OK;
}

/* GGUF has no key for a shared head: the absence of the tensor is the only sign there is.  config.json says it. */
static void mdl_options(ap_model *m) {
    uint32_t may = ap_archs[m->arch].optional;
    int untied, biased = 0;
    if (mdl_is_gguf(m->file)) {
        const char *name = ap_weights[AP_W_output].gguf;
        untied = ap_file_tensor(m->file, (ap_str){ name, strlen(name) }) != NULL;
    } else {
        const ap_kv *tie = ap_file_kv(m->file, "tie_word_embeddings"), *bias = ap_file_kv(m->file, "attention_bias");
        untied = !(tie && tie->kind == AP_V_BOOL && tie->v.b);
        biased = bias && bias->kind == AP_V_BOOL && bias->v.b;
    }
    if (untied) m->flags |= may & AP_FLAG_UNTIED;
    if (biased) m->flags |= may & (AP_FLAG_QKV_BIAS | AP_FLAG_O_BIAS);
}

/* ---- weights ---- */

static int64_t mdl_symbol(const ap_model *m, const char *s, size_t n, int T, int J) {
    const ap_hparams *h = &m->h;
    const struct { const char *name; int64_t v; } t[] = {
        { "T", T }, { "J", J }, { "D", h->dim }, { "H", h->heads }, { "h", h->head }, { "F", h->ffn }, { "V", h->vocab },
        { "Qd", (int64_t)h->heads * h->head }, { "Kd", (int64_t)h->kv_heads * h->head }, { "QKV", (int64_t)(h->heads + 2 * h->kv_heads) * h->head },
    };
    for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) if (strlen(t[i].name) == n && !memcmp(t[i].name, s, n)) return t[i].v;
    return -1;
}

int ap_shape(const ap_model *m, const char *shape, int T, int J, int64_t *rows, int64_t *cols) {
    int nd = 0;
    *rows = 1; *cols = 1;
    for (const char *s = shape; *s; nd++) {
        size_t n = strcspn(s, " ");
        *rows *= *cols;
        *cols = mdl_symbol(m, s, n, T, J);
        s += n + (s[n] == ' ');
    }
    return nd;
}

static void mdl_dims_text(char out[64], const int64_t *dim, int nd) {
    int at = 0;
    out[0] = 0;
    for (int i = 0; i < nd && at < 48; i++) at += snprintf(out + at, 64 - (size_t)at, i ? ", %lld" : "%lld", (long long)dim[i]);
}

/* These can be shown, but float32 would round them, or they are codes whose scales lie in some tensor that this engine does not know. */
static int mdl_no_weight(const ap_format *f) {
    return f == &ap_formats[AP_F_F64] || f == &ap_formats[AP_F_I8] || f == &ap_formats[AP_F_I16] || f == &ap_formats[AP_F_I32];
}

static int mdl_weight(ap_model *m, int row, int layer, char *used, ap_err *e) {
    const ap_weight_row *r = &ap_weights[row];
    char name[128];
    snprintf(name, sizeof name, mdl_is_gguf(m->file) ? r->gguf : r->hf, layer);
    const ap_tensor *t = ap_file_tensor(m->file, (ap_str){ name, strlen(name) });
    e->layer = layer;
    if (!t) return ap_fail_at(e, AP_MISSING, -1, name, "tensor %s is missing: %s models need it", name, ap_archs[m->arch].name);
    int64_t rows, cols, want[2];
    int nd = ap_shape(m, r->shape, 0, 0, &rows, &cols);
    want[0] = nd == 2 ? rows : cols; want[1] = cols;
    if (t->nd != nd || t->dim[0] != want[0] || (nd == 2 && t->dim[1] != cols)) {
        char a[64], b[64];
        mdl_dims_text(a, t->dim, t->nd); mdl_dims_text(b, want, nd);
        return ap_fail_at(e, AP_CONFIG, -1, name, "%s has shape [%s], the hyper-parameters demand [%s]", name, a, b);
    }
    if (!t->fmt->decode || mdl_no_weight(t->fmt))
        return ap_fail_at(e, AP_UNSUPPORTED, -1, name, "%s is stored as %s, which this engine cannot compute with yet", name, t->fmt->name);
    if (r->form != AP_FORM_MATRIX && t->fmt->block != 1)
        return ap_fail_at(e, AP_CONFIG, -1, name, "%s is stored as %s; a norm weight or bias must be F32, F16 or BF16", name, t->fmt->name);
    int pairs = (m->quirks & AP_QUIRK_ROPE_PAIRS) && (row == AP_W_attn_q || row == AP_W_attn_k) ? m->h.head : 0;
    m->w[ap_slot(row, layer)] = (ap_weight){ t->data, t->fmt, nd == 2 ? rows : 1, cols, pairs, (int)(t - m->file->t) };
    used[t - m->file->t] = 1;
    return AP_OK;
}

static int mdl_weights(ap_model *m, char *used, ap_err *e) {
    for (int layer = -1; layer < m->h.layers; layer++)
        for (int row = 0; row < AP_W_N; row++) {
            if (ap_in_layer(row) != (layer >= 0)) continue;
            if (ap_on(m->flags, ap_weights[row].flag)) AP_TRY(mdl_weight(m, row, layer, used, e));
            else if (ap_weights[row].otherwise >= 0) m->w[ap_slot(row, layer)] = m->w[ap_slot(ap_weights[row].otherwise, layer)];
        }
    e->layer = -1;
    for (int i = 0; i < m->file->nt; i++) {
        char shown[132];
        if (used[i]) continue;
        ap_show(shown, m->file->t[i].name.p, m->file->t[i].name.n);
        return ap_fail_at(e, AP_LEFTOVER, -1, shown, "tensor %s is read by no step of a %s model; it will not be ignored", shown, ap_archs[m->arch].name);
    }
    return AP_OK;
}

static int mdl_tokens(const ap_model *m, ap_err *e) {
    const ap_kv *kv = ap_file_kv(m->file, "tokenizer.ggml.tokens");
    if (kv && kv->kind == AP_V_ARR && kv->n != (uint64_t)m->h.vocab)
        return ap_fail_at(e, AP_CONFIG, -1, "tokenizer.ggml.tokens", "%llu tokens, but the token table has %d rows", (unsigned long long)kv->n, m->h.vocab);
    return AP_OK;
}

static int mdl_bind(ap_model *m, ap_err *e) {
    AP_TRY(mdl_arch(m, e));
    for (int row = 0; row < ap_hparam_rows_n; row++) AP_TRY(mdl_hparam(m, row, e));
    AP_TRY(mdl_derive(m, e));
    AP_TRY(mdl_range(m, e));
    AP_TRY(mdl_keys(m, e));
    AP_TRY(mdl_tokens(m, e));
    mdl_options(m);
    if (m->h.layers > m->file->nt)              /* before memory is taken for them */
        return ap_fail_at(e, AP_MISSING, -1, "layers", "%d layers are declared, the file has %d tensors in all", m->h.layers, m->file->nt);
    m->w = ap_alloc((uint64_t)(m->h.layers + 1) * AP_W_N, sizeof *m->w);
    char *used = ap_alloc((uint64_t)m->file->nt + 1, 1);
    int rc = m->w && used ? mdl_weights(m, used, e) : ap_fail(e, AP_MEMORY, "no memory for %d layers of weights", m->h.layers);
    ap_free(used);
    return rc;
}

int ap_model_bind(ap_model **out, const ap_file *file, ap_err *e) {
    *out = NULL;
    ap_model *m = ap_alloc(1, sizeof *m);
    if (!m) return ap_fail(e, AP_MEMORY, "no memory for a model");
    m->file = file;
    int rc = mdl_bind(m, e);
    if (rc) { ap_model_free(m); return rc; }
    *out = m;
    return AP_OK;
}

void ap_model_free(ap_model *m) {
    if (!m) return;
    ap_free(m->w);
    ap_free(m);
}
