/*
** model.c: file -> model.  Reads hyper-parameters by the rows of hparams.def, then weights by the rows of weights.def, then looks at what is left over.
** Refuses: unknown architectures, unknown keys, values that this engine would not compute, wrong shapes, tensors that no row reads.
*/
#include "model.h"
#include "../base/mem.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const mdl_spelled[AP_IN_N] = { "gguf", "safetensors", "apr" }, *const mdl_source[AP_IN_N] = { "GGUF", "config.json", "APR" };

static ap_spelling mdl_spelling(const ap_file *f) {
    int i = 0;
    while (i < AP_IN_N - 1 && strcmp(f->kind->name, mdl_spelled[i])) i++;
    return (ap_spelling)i;
}

/* The next of several spellings, with the architecture's name put in; what is left of them is returned, NULL after the last. */
static const char *mdl_next(const char *spellings, const char *arch, char want[160]) {
    while (*spellings == ' ') spellings++;
    int n = (int)strcspn(spellings, " ");
    if (!n) return NULL;
    if (spellings[0] == '%') snprintf(want, 160, "%s%.*s", arch, n - 2, spellings + 2);
    else snprintf(want, 160, "%.*s", n, spellings);
    return spellings + n;
}

/* Does the key match a pattern of hparams.def?  "%s" is the architecture, a trailing * any rest. */
static int mdl_match(ap_str key, const char *patterns, const char *arch) {
    char want[160];
    while ((patterns = mdl_next(patterns, arch, want))) {
        size_t n = strlen(want);
        int any = want[n - 1] == '*';
        if ((any ? key.n >= n - 1 : key.n == n) && !memcmp(key.p, want, any ? n - 1 : n)) return 1;
    }
    return 0;
}

static const ap_kv *mdl_present(const ap_file *f, const char *key) {
    const ap_kv *kv = ap_file_kv(f, key);
    return kv && kv->kind != AP_V_NULL ? kv : NULL;
}

/* The tensor of a weight; name is its usual spelling, for messages.  APR has Hugging Face's names, and writers that kept GGUF's or dropped "model.". */
static const ap_tensor *mdl_tensor(const ap_file *f, int row, int layer, char name[128]) {
    const ap_weight_row *r = &ap_weights[row];
    char other[128];
    ap_spelling in = mdl_spelling(f);
    snprintf(name, 128, in == AP_IN_GGUF ? r->gguf : r->hf, layer);
    const ap_tensor *t = ap_file_tensor(f, (ap_str){ name, strlen(name) });
    if (t || in != AP_IN_APR) return t;
    snprintf(other, sizeof other, r->gguf, layer);
    if ((t = ap_file_tensor(f, (ap_str){ other, strlen(other) }))) return t;
    return strncmp(name, "model.", 6) ? NULL : ap_file_tensor(f, (ap_str){ name + 6, strlen(name + 6) });
}

/* ---- numbers out of keys ---- */

static int mdl_int(const ap_kv *kv, const char *name, int64_t max, int *out, ap_err *e) {
    if (kv->kind == AP_V_UINT && kv->v.u <= (uint64_t)max) { *out = (int)kv->v.u; return AP_OK; }
    if (kv->kind == AP_V_INT && kv->v.i >= 0 && kv->v.i <= max) { *out = (int)kv->v.i; return AP_OK; }
    if (kv->kind != AP_V_INT && kv->kind != AP_V_UINT)
        return ap_fail_at(e, kv->raw_type || kv->kind == AP_V_ARR ? AP_KV_TYPE : AP_CONFIG, -1, name, "%s must be a whole number", name);
    if (kv->kind == AP_V_UINT) return ap_fail_at(e, AP_CONFIG, -1, name, "%s = %llu is outside 0..%lld", name, (unsigned long long)kv->v.u, (long long)max);
    return ap_fail_at(e, AP_CONFIG, -1, name, "%s = %lld is outside 0..%lld", name, (long long)kv->v.i, (long long)max);
}

static int mdl_num(const ap_kv *kv, const char *name, double *out, ap_err *e) {
    if (kv->kind == AP_V_FLOAT) *out = kv->v.f;
    else if (kv->kind == AP_V_UINT) *out = (double)kv->v.u;
    else if (kv->kind == AP_V_INT) *out = (double)kv->v.i;
    else return ap_fail_at(e, kv->raw_type || kv->kind == AP_V_ARR ? AP_KV_TYPE : AP_CONFIG, -1, name, "%s must be a number", name);
    *out = (double)(float)*out;     /* GGUF stores float32 and Hugging Face's float32 arithmetic rounds to it: so every container gives the same number */
    return AP_OK;
}

static int *mdl_field(ap_hparams *h, int row) {
    int *ints[] = { &h->layers, &h->dim, &h->ffn, &h->heads, &h->kv_heads, &h->head, &h->vocab, &h->context };
    return row < (int)(sizeof ints / sizeof ints[0]) ? ints[row] : NULL;
}
enum { MDL_KV_HEADS = 4, MDL_HEAD, MDL_VOCAB, MDL_CONTEXT, MDL_EPS, MDL_THETA };   /* rows of hparams.def with a rule of their own */

/* One spelling's value into the field; of a second spelling the value must be the same. */
static int mdl_take(ap_model *m, int row, const ap_kv *kv, const char *name, ap_err *e) {
    ap_hparams *h = &m->h;
    int *field = mdl_field(h, row), whole = 0, again = *m->source[row] != 0;
    double *real = row == MDL_EPS ? &h->eps : &h->theta, number = 0;
    if (field) AP_TRY(mdl_int(kv, name, row == MDL_CONTEXT ? INT32_MAX : AP_MAX_WIDTH, &whole, e));
    else AP_TRY(mdl_num(kv, name, &number, e));
    if (again && field ? whole != *field : again && number != *real)
        return ap_fail_at(e, AP_CONFIG, -1, name, "%s = %g contradicts %s = %g", name, field ? whole : number, strchr(m->source[row], ' ') + 1, field ? *field : *real);
    if (again) return AP_OK;
    snprintf(m->source[row], sizeof m->source[row], "%s %.70s", mdl_source[mdl_spelling(m->file)], name);
    if (field) *field = whole;
    else *real = number;
    return AP_OK;
}

static int mdl_hparam(ap_model *m, int row, ap_err *e) {
    const ap_hparam_row *r = &ap_hparam_rows[row];
    const char *arch = ap_archs[m->arch].name, *spellings = r->key[mdl_spelling(m->file)], *rest;
    char name[160], usual[160];
    mdl_next(spellings, arch, usual);
    for (rest = spellings; (rest = mdl_next(rest, arch, name)); ) {
        const ap_kv *kv = mdl_present(m->file, name);
        if (kv) AP_TRY(mdl_take(m, row, kv, name, e));
    }
    if (*m->source[row] || !r->required) return AP_OK;
    return ap_fail_at(e, AP_MISSING, -1, usual, "the file does not give %s, which %s models must have", usual, arch);
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
        char name[128];
        const ap_tensor *t = mdl_tensor(m->file, AP_W_token_embd, -1, name);
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
    if (!(h->theta >= 1 && h->theta <= 1e12)) return ap_fail_at(e, AP_CONFIG, -1, "theta", "RoPE base = %g is outside [1, 1e12]", h->theta);   /* below 1 the angles outgrow the sine's range */
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

static int mdl_known(ap_str key, ap_spelling in, const char *arch) {
    for (int i = 0; i < ap_hparam_rows_n; i++) if (mdl_match(key, ap_hparam_rows[i].key[in], arch)) return 1;
    for (int i = 0; i < ap_ignored_n; i++) if (mdl_match(key, ap_ignored[i].key[in], arch)) return 1;
    return 0;
}

static int mdl_key(const ap_model *m, const ap_kv *kv, ap_spelling in, ap_err *e) {
    const char *arch = ap_archs[m->arch].name;
    if (kv->kind == AP_V_NULL || mdl_known(kv->key, in, arch)) return AP_OK;
    char shown[132], value[132] = "";
    ap_show(shown, kv->key.p, kv->key.n);
    if (kv->kind == AP_V_STR) ap_show(value, kv->s.p, kv->s.n); else snprintf(value, sizeof value, "%g", mdl_value(kv));
    int row = 0;
    while (row < ap_checks_n && !mdl_match(kv->key, ap_checks[row].key[in], arch)) row++;
    if (row == ap_checks_n)
        return ap_fail_at(e, AP_UNSUPPORTED, -1, shown, "the file gives %s = %s, which this engine does not know and will not ignore", shown, value);
    if (mdl_rule_holds(m, kv, ap_checks[row].rule)) return AP_OK;
    return ap_fail_at(e, AP_UNSUPPORTED, -1, shown, "%s = %s means %s, which this engine does not compute", shown, value, ap_checks[row].meaning);
}

static int mdl_keys(const ap_model *m, ap_err *e) {
    ap_spelling in = mdl_spelling(m->file);
    for (int i = 0; i < m->file->nkv; i++) AP_TRY(mdl_key(m, &m->file->kv[i], in, e));
    return AP_OK;
}

/* ---- architecture ---- */

/* The keys that may name the architecture, by its own name or by Hugging Face's class.  Two that name different ones are refused; in APR, where any of
** them may hold something else, one that is known is enough. */
static const char *const mdl_arch_keys[AP_IN_N] = { "general.architecture", "model_type", "architecture hf_model_type model_type hf_architecture" };

static int mdl_arch_of(ap_str s) {
    int i = 0;
    while (i < AP_ARCH_N && !ap_str_is(s, ap_archs[i].name) && !ap_str_is(s, ap_archs[i].hf_class)) i++;
    return i;
}

static int mdl_arch(ap_model *m, ap_err *e) {
    ap_spelling in = mdl_spelling(m->file);
    char key[160], usual[160], shown[132] = "";
    int given = 0;
    const char *rest = mdl_arch_keys[in];
    m->arch = AP_ARCH_N;
    mdl_next(rest, "", usual);
    while ((rest = mdl_next(rest, "", key))) {
        const ap_kv *kv = ap_file_kv(m->file, key);
        if (!kv) continue;
        if (kv->kind != AP_V_STR) return ap_fail_at(e, in == AP_IN_GGUF ? AP_KV_TYPE : AP_CONFIG, -1, key, "%s must be a string", key);
        int found = mdl_arch_of(kv->s);
        if (!given++) ap_show(shown, kv->s.p, kv->s.n);
        if (found == AP_ARCH_N) continue;
        if (m->arch != AP_ARCH_N && m->arch != found) return ap_fail_at(e, AP_CONFIG, -1, key, "%s names %s, another key %s", key, ap_archs[found].name, ap_archs[m->arch].name);
        m->arch = found;
    }
    if (m->arch < AP_ARCH_N) return AP_OK;
    if (given) return ap_fail_at(e, AP_UNSUPPORTED, -1, usual, "architecture %s is not supported", shown);
    if (in == AP_IN_HF && !m->file->config) return ap_fail_at(e, AP_MISSING, -1, "config.json", "no config.json beside the safetensors file: give the folder that holds both");
    return ap_fail_at(e, AP_MISSING, -1, usual, "the file does not give %s", usual);
}

/* What the container did to the weights: a row of quirks.def, and in APR what rope_type says: 2 halves, as Hugging Face has them, 0 neighbours, whose weights
** are those of a GGUF. */
static int mdl_quirks(ap_model *m, ap_err *e) {
    static const char key[] = "rope_type";
    m->flags = ap_archs[m->arch].flags;
    for (int i = 0; i < ap_quirks_n; i++)
        if (ap_quirks[i].arch == m->arch && !strcmp(ap_quirks[i].container, m->file->kind->name)) m->quirks |= ap_quirks[i].quirk;
    const ap_kv *kv = mdl_spelling(m->file) == AP_IN_APR ? mdl_present(m->file, key) : NULL;
    if (!kv || mdl_value(kv) == 2) return AP_OK;
    if (mdl_value(kv) != 0) return ap_fail_at(e, AP_CONFIG, -1, key, "%s is %g, 0 (neighbours) or 2 (halves) was expected", key, mdl_value(kv));
    if (m->flags & (AP_FLAG_QKV_BIAS | AP_FLAG_QK_NORM)) return ap_fail_at(e, AP_UNSUPPORTED, -1, key, "%s 0 in a %s model: its biases and norms would have to be interleaved too", key, ap_archs[m->arch].name);
    m->quirks |= AP_QUIRK_ROPE_PAIRS;
    return AP_OK;
}

/* GGUF has no key for a shared head, and in APR it may be missing: then the absence of the tensor is the only sign there is.  config.json says it. */
static void mdl_options(ap_model *m) {
    uint32_t may = ap_archs[m->arch].optional;
    ap_spelling in = mdl_spelling(m->file);
    char name[128];
    const ap_kv *tie = in == AP_IN_GGUF ? NULL : ap_file_kv(m->file, "tie_word_embeddings"), *bias = in == AP_IN_GGUF ? NULL : ap_file_kv(m->file, "attention_bias");
    int said = tie && tie->kind == AP_V_BOOL;
    int untied = said || in == AP_IN_HF ? !(said && tie->v.b) : mdl_tensor(m->file, AP_W_output, -1, name) != NULL;
    if (untied) m->flags |= may & AP_FLAG_UNTIED;
    if (bias && bias->kind == AP_V_BOOL && bias->v.b) m->flags |= may & (AP_FLAG_QKV_BIAS | AP_FLAG_O_BIAS);
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

static int mdl_weight(ap_model *m, int row, int layer, char *used, ap_err *e) {
    const ap_weight_row *r = &ap_weights[row];
    char name[128];
    const ap_tensor *t = mdl_tensor(m->file, row, layer, name);
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
    if (!t->fmt->decode)
        return ap_fail_at(e, AP_UNSUPPORTED, -1, name, "%s is stored as %s, which this engine cannot compute with yet", name, t->fmt->name);
    if (r->form != AP_FORM_MATRIX && t->fmt->block != 1)
        return ap_fail_at(e, AP_CONFIG, -1, name, "%s is stored as %s; a norm weight or bias must be F32, F16 or BF16", name, t->fmt->name);
    int pairs = (m->quirks & AP_QUIRK_ROPE_PAIRS) && (row == AP_W_attn_q || row == AP_W_attn_k) ? m->h.head : 0;
    const uint8_t *data;
    AP_TRY(ap_file_data(m->file, t, &data, e));
    m->w[ap_slot(row, layer)] = (ap_weight){ data, t->fmt, nd == 2 ? rows : 1, cols, pairs, (int)(t - m->file->t) };
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
    AP_TRY(mdl_quirks(m, e));
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
