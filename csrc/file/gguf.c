/*
** gguf.c: GGUF versions 2 and 3, little-endian.  Four parts in the order of the file: header, key-value pairs, tensor infos, data.  Nothing is copied: names,
** strings and arrays point into the file's bytes.  It refuses, besides what is malformed, whatever two readers could see differently: a key or tensor given
** twice, overlaps, gaps, bytes after the last tensor.  file.c calls it through containers.def.
*/
#include <stdio.h>
#include <string.h>
#include "../base/mem.h"
#include "../base/num.h"
#include "file.h"

enum { GGUF_DIMS = 4, GGUF_KEY = 65535, GGUF_NAME = 64, GGUF_ALIGNMENT = 32, GGUF_ALIGNMENT_MAX = 65536 };
enum { GGUF_U32 = 4, GGUF_STR = 8, GGUF_ARR = 9, GGUF_TYPES = 13 };
enum {                                          /* fewest bytes that an entry takes: what makes a declared count believable */
    GGUF_KV_MIN = 8 + 1 + 4 + 1,                /* key length, one letter, type, one byte                                    */
    GGUF_TENSOR_MIN = 8 + 1 + 4 + 4 + 8         /* name length, one letter, rank 0, format, offset                           */
};

/* The metadata value types by id.  bytes 0: not a number. */
static const struct { uint8_t bytes; ap_vkind kind; } gguf_type[GGUF_TYPES] = {
    { 1, AP_V_UINT }, { 1, AP_V_INT }, { 2, AP_V_UINT }, { 2, AP_V_INT }, { 4, AP_V_UINT }, { 4, AP_V_INT }, { 4, AP_V_FLOAT },
    { 1, AP_V_BOOL }, { 0, AP_V_STR }, { 0, AP_V_ARR }, { 8, AP_V_UINT }, { 8, AP_V_INT }, { 8, AP_V_FLOAT },
};

int ap_gguf_sniff(const uint8_t *p, uint64_t n);
int ap_gguf_parse(ap_file *f, ap_err *e);

static int64_t gguf_at(const ap_cur *c) { return (int64_t)c->pos; }

/* Bytes that the file has left: what a count or a length is held against.  Fewer may be in memory. */
static uint64_t gguf_left(const ap_cur *c) { return c->whole - c->pos; }

static int gguf_short(const ap_cur *c, const char *what, ap_err *e) {
    return ap_fail_at(e, AP_TRUNCATED, gguf_at(c), NULL, "the file ends inside %s: %llu bytes left at byte %llu", what, (unsigned long long)gguf_left(c), (unsigned long long)c->pos);
}

static int gguf_memory(ap_err *e) { return ap_fail(e, AP_MEMORY, "no memory for the index of the file"); }

/* --- header ---------------------------------------------------------------------------------------------------------------------------- */

/* The formats before GGUF, as their magic lies on disk. */
static const char *gguf_legacy(const uint8_t *p) {
    static const struct { char magic[5], name[5]; } old[] = { { "lmgg", "GGML" }, { "tjgg", "GGJT" }, { "fmgg", "GGMF" }, { "algg", "GGLA" } };
    for (size_t i = 0; i < sizeof old / sizeof *old; i++) if (!memcmp(p, old[i].magic, 4)) return old[i].name;
    return NULL;
}

int ap_gguf_sniff(const uint8_t *p, uint64_t n) { return n >= 4 && (!memcmp(p, "GGUF", 4) || gguf_legacy(p)); }

static int gguf_version(ap_cur *c, uint32_t *version, ap_err *e) {
    const uint8_t *magic;
    char shown[132];
    if (!ap_take(c, 4, &magic)) return gguf_short(c, "the magic", e);
    const char *old = gguf_legacy(magic);
    if (old) return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "this is the old format %s; convert it to GGUF", old);
    if (memcmp(magic, "GGUF", 4)) return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the magic is '%s', GGUF was expected", ap_show(shown, (const char *)magic, 4));
    if (!ap_u32(c, version)) return gguf_short(c, "the version", e);
    uint32_t swapped = __builtin_bswap32(*version);
    if (swapped >= 1 && swapped <= 3) return ap_fail_at(e, AP_BAD_ENDIAN, 4, NULL, "version %u in big-endian: big-endian GGUF is not read", (unsigned)swapped);
    if (*version < 2 || *version > 3) return ap_fail_at(e, AP_BAD_VERSION, 4, NULL, "GGUF version %u, only 2 and 3 are read", (unsigned)*version);
    return AP_OK;
}

static int gguf_count(const ap_cur *c, uint64_t count, uint64_t least, uint64_t limit, const char *what, ap_err *e) {
    if (count > gguf_left(c) / least)
        return ap_fail_at(e, AP_COUNT, gguf_at(c), NULL, "%llu %s declared, the %llu bytes left hold at most %llu", (unsigned long long)count, what,
                          (unsigned long long)gguf_left(c), (unsigned long long)(gguf_left(c) / least));
    if (count > limit) return ap_fail_at(e, AP_LIMIT, gguf_at(c), NULL, "%llu %s declared, at most %llu are read", (unsigned long long)count, what, (unsigned long long)limit);
    return AP_OK;
}

/* --- strings and key-value pairs ------------------------------------------------------------------------------------------------------- */

static int gguf_span(ap_cur *c, const char *what, ap_str *out, ap_err *e) {
    const uint8_t *p;
    uint64_t n;
    int64_t at = gguf_at(c);
    if (!ap_u64(c, &n)) return gguf_short(c, what, e);
    if (n > gguf_left(c))
        return ap_fail_at(e, AP_STRING, at, NULL, "%s: a string of %llu bytes declared, the file has %llu left", what, (unsigned long long)n, (unsigned long long)gguf_left(c));
    if (!ap_take(c, n, &p)) return gguf_short(c, what, e);
    *out = (ap_str){ (const char *)p, n };
    return AP_OK;
}

/* seen: it has been read once and found good. */
static int gguf_text(ap_cur *c, int seen, ap_str *out, ap_err *e) {
    int64_t at = gguf_at(c);
    AP_TRY(gguf_span(c, "a value", out, e));
    if (out->n > AP_LIMIT_STRING) return ap_fail_at(e, AP_LIMIT, at, NULL, "a string of %llu bytes, at most %u are read", (unsigned long long)out->n, (unsigned)AP_LIMIT_STRING);
    if (!seen && !ap_utf8_ok(out->p, out->n)) return ap_fail_at(e, AP_UTF8, at, NULL, "a string that is not UTF-8");
    return AP_OK;
}

static int gguf_bool(uint8_t b, int64_t at, ap_err *e) {
    return b > 1 ? ap_fail_at(e, AP_VALUE, at, NULL, "a bool of %u, only 0 and 1 are defined", (unsigned)b) : AP_OK;
}

static int gguf_scalar(ap_cur *c, uint32_t type, ap_kv *kv, ap_err *e) {
    const uint8_t *p;
    unsigned bytes = gguf_type[type].bytes, spare = 64 - 8 * bytes;
    uint64_t u = 0;
    float f;
    if (!ap_take(c, bytes, &p)) return gguf_short(c, "a value", e);
    memcpy(&u, p, bytes);
    switch (kv->kind) {
    case AP_V_UINT: kv->v.u = u; return AP_OK;
    case AP_V_INT:  kv->v.i = (int64_t)(u << spare) >> spare; return AP_OK;    /* moves the sign bit up and back: gcc and clang shift signed values arithmetically */
    case AP_V_BOOL: kv->v.b = u != 0; return gguf_bool(p[0], gguf_at(c) - 1, e);
    default: break;                             /* AP_V_FLOAT */
    }
    memcpy(&f, p, sizeof f);
    if (bytes == 4) kv->v.f = (double)f;
    else memcpy(&kv->v.f, p, sizeof kv->v.f);
    return AP_OK;
}

/* An array's elements stay where they are: one pass proves that they can be walked later without a check. */
static int gguf_array(ap_cur *c, int seen, ap_kv *kv, ap_err *e) {
    uint32_t type;
    uint64_t n;
    int64_t at = gguf_at(c);
    if (!ap_u32(c, &type) || !ap_u64(c, &n)) return gguf_short(c, "an array", e);
    if (type == GGUF_ARR) return ap_fail_at(e, AP_UNSUPPORTED, at, NULL, "an array of arrays: no reader of GGUF models takes one");
    if (type >= GGUF_TYPES) return ap_fail_at(e, AP_TYPE, at, NULL, "array elements of type %u, the last type is %d", (unsigned)type, GGUF_TYPES - 1);
    unsigned bytes = gguf_type[type].bytes;
    AP_TRY(gguf_count(c, n, bytes ? bytes : 8, UINT64_MAX, "array elements", e));
    kv->raw_type = type;
    kv->elem = gguf_type[type].kind;
    kv->n = n;
    kv->s.p = (const char *)c->base + c->pos;
    const uint8_t *p;
    ap_str s;
    if (type == GGUF_STR) for (uint64_t i = 0; i < n; i++) AP_TRY(gguf_text(c, seen, &s, e));
    else if (!ap_take(c, n * bytes, &p)) return gguf_short(c, "an array", e);          /* n <= left / bytes: the product fits */
    if (kv->elem == AP_V_BOOL) for (uint64_t i = 0; i < n; i++) AP_TRY(gguf_bool((uint8_t)kv->s.p[i], at + 12 + (int64_t)i, e));
    kv->s.n = (uint64_t)((const char *)c->base + c->pos - kv->s.p);
    return AP_OK;
}

static int gguf_value(ap_cur *c, int seen, ap_kv *kv, ap_err *e) {
    int64_t at = gguf_at(c);
    uint32_t type;
    if (!ap_u32(c, &type)) return gguf_short(c, "a value's type", e);
    if (type >= GGUF_TYPES) return ap_fail_at(e, AP_TYPE, at, NULL, "a value of type %u, the last type is %d", (unsigned)type, GGUF_TYPES - 1);
    kv->raw_type = type;
    kv->kind = gguf_type[type].kind;
    return type == GGUF_ARR ? gguf_array(c, seen, kv, e) : type == GGUF_STR ? gguf_text(c, seen, &kv->s, e) : gguf_scalar(c, type, kv, e);
}

/* A failure inside a value is told with the key it belongs to. */
static int gguf_kv(ap_cur *c, int seen, ap_kv *kv, ap_err *e) {
    char shown[132];
    int64_t at = gguf_at(c);
    AP_TRY(gguf_span(c, "a key", &kv->key, e));
    AP_TRY(ap_file_name_ok(kv->key, GGUF_KEY, "key", at, e));
    int rc = gguf_value(c, seen, kv, e);
    if (!rc) return AP_OK;
    size_t n = strlen(ap_show(shown, kv->key.p, kv->key.n));
    if (n >= sizeof e->field) n = sizeof e->field - 1;
    memcpy(e->field, shown, n);
    e->field[n] = 0;
    return rc;
}

/* How much of the file may be something else than tensors. */
static int gguf_metadata(const ap_cur *c, ap_err *e) {
    if (c->pos <= AP_LIMIT_METADATA) return AP_OK;
    return ap_fail_at(e, AP_LIMIT, gguf_at(c), NULL, "%llu bytes of metadata so far, at most %u are read", (unsigned long long)c->pos, (unsigned)AP_LIMIT_METADATA);
}

/* Looks ahead before it takes memory: a count is believed when that many pairs have been seen, and then the memory is exactly theirs. */
static int gguf_kvs(ap_file *f, ap_cur *c, uint64_t count, ap_err *e) {
    ap_cur ahead = *c;
    for (uint64_t i = 0; i < count; i++) {
        ap_kv kv = { .n = 0 };
        AP_TRY(gguf_kv(&ahead, 0, &kv, e));
        AP_TRY(gguf_metadata(&ahead, e));
    }
    f->kv = ap_alloc(count, sizeof *f->kv);
    if (!f->kv) return gguf_memory(e);
    for (; (uint64_t)f->nkv < count; f->nkv++) AP_TRY(gguf_kv(c, 1, &f->kv[f->nkv], e));
    return AP_OK;
}

static int gguf_alignment(ap_file *f, ap_err *e) {
    static const char key[] = "general.alignment";
    const ap_kv *kv = ap_file_kv(f, key);
    f->alignment = GGUF_ALIGNMENT;
    if (!kv) return AP_OK;
    if (kv->kind != AP_V_UINT || kv->raw_type != GGUF_U32) return ap_fail_at(e, AP_KV_TYPE, -1, key, "%s is not a 32-bit unsigned number", key);
    uint64_t a = kv->v.u;
    if (!a || (a & (a - 1)) || a > GGUF_ALIGNMENT_MAX)
        return ap_fail_at(e, AP_ALIGN, -1, key, "%s is %llu, a power of two from 1 to %d was expected", key, (unsigned long long)a, (int)GGUF_ALIGNMENT_MAX);
    f->alignment = (uint32_t)a;
    return AP_OK;
}

/* --- tensors --------------------------------------------------------------------------------------------------------------------------- */

/* The file gives the innermost dimension first. */
static int gguf_dims(ap_cur *c, ap_tensor *t, ap_err *e) {
    char shown[132];
    int64_t at = gguf_at(c);
    uint32_t nd;
    ap_show(shown, t->name.p, t->name.n);
    if (!ap_u32(c, &nd)) return gguf_short(c, "a tensor's rank", e);
    if (nd > GGUF_DIMS) return ap_fail_at(e, AP_SHAPE, at, shown, "tensor '%s' has %u dimensions, at most %d are allowed", shown, (unsigned)nd, (int)GGUF_DIMS);
    t->nd = (int)nd;
    for (int i = t->nd - 1; i >= 0; i--) {
        uint64_t d;
        if (!ap_u64(c, &d)) return gguf_short(c, "a tensor's shape", e);
        if (d > INT64_MAX) return ap_fail_at(e, AP_SHAPE, at, shown, "tensor '%s' has a dimension of %llu", shown, (unsigned long long)d);
        t->dim[i] = (int64_t)d;
    }
    return AP_OK;
}

static int gguf_tensor(ap_cur *c, ap_tensor *t, ap_err *e) {
    char shown[132];
    int64_t at = gguf_at(c);
    uint32_t type;
    AP_TRY(gguf_span(c, "a tensor's name", &t->name, e));
    AP_TRY(ap_file_name_ok(t->name, GGUF_NAME, "tensor", at, e));
    AP_TRY(gguf_dims(c, t, e));
    at = gguf_at(c);
    if (!ap_u32(c, &type) || !ap_u64(c, &t->offset)) return gguf_short(c, "a tensor's format and offset", e);
    t->fmt = ap_format_by_gguf(type);
    ap_show(shown, t->name.p, t->name.n);
    if (!t->fmt) return ap_fail_at(e, AP_TYPE, at, shown, "tensor '%s' has the unknown format id %u", shown, (unsigned)type);
    return ap_file_tensor_bytes(t, at, e);
}

static int gguf_tensors(ap_file *f, ap_cur *c, uint64_t count, ap_err *e) {
    ap_cur ahead = *c;
    int64_t dim[GGUF_DIMS];
    uint64_t dims = 0;
    for (uint64_t i = 0; i < count; i++) {
        ap_tensor t = { .dim = dim };
        AP_TRY(gguf_tensor(&ahead, &t, e));
        AP_TRY(gguf_metadata(&ahead, e));
        dims += (uint64_t)t.nd;
    }
    AP_TRY(ap_file_reserve(f, count, dims, e));
    for (uint64_t i = 0; i < count; i++) {
        ap_tensor t = { .dim = dim };
        AP_TRY(gguf_tensor(c, &t, e));
        ap_file_keep(f, &t);
    }
    return AP_OK;
}

/* --- data ------------------------------------------------------------------------------------------------------------------------------ */

/* t->offset is still relative to the data section, which begins at `start` and has `room` bytes; `next` is where this tensor must begin: the aligned
** end of the one before it. */
static int gguf_place(ap_file *f, ap_tensor *t, uint64_t start, uint64_t room, uint64_t next, ap_err *e) {
    char shown[132];
    unsigned long long off = t->offset, want = next, has = room, need = t->bytes;
    uint64_t end;
    ap_show(shown, t->name.p, t->name.n);
    if (t->offset & (f->alignment - 1)) return ap_fail_at(e, AP_ALIGN, -1, shown, "tensor '%s' is at offset %llu, not a multiple of %u", shown, off, (unsigned)f->alignment);
    if (!ap_add_ok(t->offset, t->bytes, &end) || end > room)
        return ap_fail_at(e, AP_OFFSET, -1, shown, "tensor '%s' needs %llu bytes at offset %llu, the data section has %llu: a wrong offset, or the file was cut short", shown, need, off, has);
    if (t->offset > next) return ap_fail_at(e, AP_GAP, -1, shown, "tensor '%s' is at offset %llu, %llu was expected: bytes that belong to no tensor, or tensors out of order", shown, off, want);
    if (t->offset < next) return ap_fail_at(e, AP_OVERLAP, -1, shown, "tensor '%s' is at offset %llu, the tensors before it reach to %llu", shown, off, want);
    t->offset += start;                         /* both lie inside the file */
    if (!f->src) t->data = f->p + t->offset;
    return AP_OK;
}

/* Padding is zeros, so that nothing can be hidden in it; the file may end inside it. */
static int gguf_padding(const ap_file *f, uint64_t from, uint64_t to, ap_err *e) {
    uint64_t odd, end = to < f->n ? to : f->n;
    AP_TRY(ap_file_zeros(f, from, end, &odd, e));
    return odd >= end ? AP_OK : ap_fail_at(e, AP_GAP, (int64_t)odd, NULL, "byte %llu is padding and not zero", (unsigned long long)odd);
}

/* What follows the last tensor may be one alignment unit of zeros and nothing else. */
static int gguf_tail(const ap_file *f, uint64_t end, ap_err *e) {
    uint64_t spare = f->n - end, odd = end;
    if (spare <= f->alignment) AP_TRY(ap_file_zeros(f, end, f->n, &odd, e));
    if (odd == f->n) return AP_OK;
    return ap_fail_at(e, AP_GAP, (int64_t)end, NULL, "%llu bytes after the last tensor belong to nothing (at most %u zeros are allowed)", (unsigned long long)spare, (unsigned)f->alignment);
}

static int gguf_data(ap_file *f, const ap_cur *c, ap_err *e) {
    uint64_t start, next = 0, end = 0;
    int wanted = 0;
    for (int i = 0; i < f->nt; i++) wanted |= f->t[i].bytes != 0;
    if (!ap_align_ok(c->pos, f->alignment, &start) || (wanted && start >= f->n))
        return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "the file has %llu bytes and ends before the tensors' data", (unsigned long long)f->n);
    if (start > f->n) start = f->n;             /* no data at all: the padding before it may be missing */
    AP_TRY(gguf_padding(f, c->pos, start, e));
    for (int i = 0; i < f->nt; i++) {
        AP_TRY(gguf_place(f, &f->t[i], start, f->n - start, next, e));
        end = next + f->t[i].bytes;             /* gguf_place has seen that this lies inside the file */
        if (!ap_align_ok(end, f->alignment, &next)) return ap_fail(e, AP_OFFSET, "the data section is too large");
        if (i + 1 < f->nt) AP_TRY(gguf_padding(f, start + end, start + next, e));
    }
    return gguf_tail(f, start + end, e);
}

/* --- models in several files ------------------------------------------------------------------------------------------------------------- */

/* A count of the split; absent is 0. */
static int gguf_split_number(const ap_file *f, const char *key, uint64_t *out, ap_err *e) {
    const ap_kv *kv = ap_file_kv(f, key);
    *out = 0;
    if (!kv) return AP_OK;
    if (kv->kind != AP_V_UINT && kv->kind != AP_V_INT) return ap_fail_at(e, AP_KV_TYPE, -1, key, "%s is not a whole number", key);
    if (kv->kind == AP_V_INT && kv->v.i < 0) return ap_fail_at(e, AP_CONFIG, -1, key, "%s is %lld", key, (long long)kv->v.i);
    *out = kv->v.u;
    return AP_OK;
}

/* This file's name without its folder must end in -00001-of-<count>.gguf; stem gets what stands before. */
static int gguf_split_stem(const ap_file *f, uint64_t count, char stem[256], ap_err *e) {
    char tail[40], shown[132];
    const char *slash = f->path ? strrchr(f->path, '/') : NULL, *name = slash ? slash + 1 : f->path ? f->path : "";
    size_t n = strlen(name), m = (size_t)snprintf(tail, sizeof tail, "-00001-of-%05llu.gguf", (unsigned long long)count);
    if (n > 255 || n <= m || strcmp(name + n - m, tail))
        return ap_fail_at(e, AP_CONFIG, -1, "split.count", "split.count is %llu, so the first file's name must end in '%s', not be '%s'", (unsigned long long)count, tail, ap_show(shown, name, n));
    memcpy(stem, name, n - m);
    stem[n - m] = 0;
    return AP_OK;
}

static int gguf_open_part(ap_file *f, const char *stem, uint64_t i, uint64_t count, ap_err *e) {
    char name[300], shown[132];
    uint64_t no, of;
    int n = snprintf(name, sizeof name, "%s-%05llu-of-%05llu.gguf", stem, (unsigned long long)i + 1, (unsigned long long)count);
    AP_TRY(ap_file_open_shard(f, (ap_str){ name, (uint64_t)n }, e));
    const ap_file *s = f->shard[f->nshard - 1];
    AP_TRY(gguf_split_number(s, "split.no", &no, e));
    AP_TRY(gguf_split_number(s, "split.count", &of, e));
    if (no == i && of == count) return AP_OK;
    return ap_fail_at(e, AP_CONFIG, -1, "split.no", "'%s' says that it is part %llu of %llu (counted from 0), part %llu of %llu was expected", ap_show(shown, name, (size_t)n),
                      (unsigned long long)no, (unsigned long long)of, (unsigned long long)i, (unsigned long long)count);
}

/* The first part holds the metadata; the others, found by their names, hold more tensors. */
static int gguf_split(ap_file *f, ap_err *e) {
    char stem[256];
    uint64_t count, no, tensors;
    AP_TRY(gguf_split_number(f, "split.count", &count, e));
    AP_TRY(gguf_split_number(f, "split.no", &no, e));
    AP_TRY(gguf_split_number(f, "split.tensors.count", &tensors, e));
    if (count <= 1 && !no) return AP_OK;
    if (no) return ap_fail_at(e, AP_CONFIG, -1, "split.no", "this is part %llu of %llu of a model (counted from 0): open its first part, *-00001-of-%05llu.gguf", (unsigned long long)no, (unsigned long long)count, (unsigned long long)count);
    if (count > AP_LIMIT_SHARDS) return ap_fail_at(e, AP_CONFIG, -1, "split.count", "split.count is %llu, at most %d parts are read", (unsigned long long)count, (int)AP_LIMIT_SHARDS);
    AP_TRY(gguf_split_stem(f, count, stem, e));
    for (uint64_t i = 1; i < count; i++) AP_TRY(gguf_open_part(f, stem, i, count, e));
    AP_TRY(ap_file_adopt(f, e));
    if (!tensors || tensors == (uint64_t)f->nt) return AP_OK;
    return ap_fail_at(e, AP_CONFIG, -1, "split.tensors.count", "split.tensors.count is %llu, the parts hold %d tensors", (unsigned long long)tensors, f->nt);
}

int ap_gguf_parse(ap_file *f, ap_err *e) {
    ap_cur c = { f->p, f->have, 0, f->n };
    uint64_t tensors, kvs;
    AP_TRY(gguf_version(&c, &f->version, e));
    if (!ap_u64(&c, &tensors) || !ap_u64(&c, &kvs)) return gguf_short(&c, "the header", e);
    AP_TRY(gguf_count(&c, tensors, GGUF_TENSOR_MIN, AP_LIMIT_TENSORS, "tensors", e));
    AP_TRY(gguf_count(&c, kvs, GGUF_KV_MIN, AP_LIMIT_KV, "key-value pairs", e));
    AP_TRY(gguf_kvs(f, &c, kvs, e));
    AP_TRY(gguf_tensors(f, &c, tensors, e));
    AP_TRY(ap_file_index(f, e));                /* before any key is trusted: a second general.alignment is a duplicate, not a choice */
    AP_TRY(gguf_alignment(f, e));
    AP_TRY(gguf_data(f, &c, e));
    return f->is_shard ? AP_OK : gguf_split(f, e);
}
