/*
** safetensors.c: eight bytes of header length, a JSON header, the data; and the config.json beside it, whose members become the file's key-value pairs.
** It refuses whatever the reference reader refuses (holes, overlaps, bytes after the last tensor) and also what JSON readers disagree about: a name, field or
** key given twice, escapes included.  file.c calls it through containers.def.
*/
#include <stdlib.h>
#include <string.h>
#include "../base/json.h"
#include "../base/mem.h"
#include "../base/num.h"
#include "file.h"

enum { ST_LENGTH = 8, ST_NAME = 255, ST_KEY = 255 };
/* data: where the data section begins; n: entries so far */
typedef struct { ap_file *f; ap_json j; uint64_t data; int n; } st_reader;

int ap_safetensors_sniff(const uint8_t *p, uint64_t n);
int ap_safetensors_parse(ap_file *f, ap_err *e);

int ap_safetensors_sniff(const uint8_t *p, uint64_t n) { return n > ST_LENGTH && p[ST_LENGTH] == '{'; }

static int st_memory(ap_err *e) { return ap_fail(e, AP_MEMORY, "no memory for the index of the file"); }

/* Un-escapes span to the end of f->text, which was made large enough: un-escaped text is never longer. */
static int st_text(ap_file *f, const ap_json *j, ap_str span, ap_str *out, ap_err *e) {
    out->p = f->text + f->text_n;
    AP_TRY(ap_json_text(j, span, f->text + f->text_n, span.n, &out->n, e));
    f->text_n += out->n;
    return AP_OK;
}

static int st_expect(st_reader *r, ap_jkind want, const char *what, ap_err *e) {
    ap_jkind kind;
    AP_TRY(ap_json_next(&r->j, &kind, e));
    return kind == want ? AP_OK : ap_fail_at(e, AP_JSON, (int64_t)r->j.pos, NULL, "%s was expected before byte %llu", what, (unsigned long long)r->j.pos);
}

/* --- the header's entries -------------------------------------------------------------------------------------------------------------- */

/* An array of at most max whole numbers, none negative. */
static int st_numbers(st_reader *r, const char *name, const char *field, uint64_t *v, int max, int *n, ap_err *e) {
    ap_jkind kind;
    AP_TRY(st_expect(r, AP_J_ARR, "an array of whole numbers", e));
    for (*n = 0; ; (*n)++) {
        AP_TRY(ap_json_next(&r->j, &kind, e));
        if (kind == AP_J_ARR_END) return AP_OK;
        if (kind != AP_J_INT || r->j.negative) return ap_fail_at(e, AP_JSON, (int64_t)r->j.pos, name, "tensor '%s': %s holds something else than whole numbers from 0 up", name, field);
        if (*n == max) return ap_fail_at(e, max == 2 ? AP_JSON : AP_SHAPE, (int64_t)r->j.pos, name, "tensor '%s': %s has more than %d numbers", name, field, max);
        v[*n] = r->j.mag;
    }
}

static int st_shape(st_reader *r, const char *name, ap_tensor *t, ap_err *e) {
    uint64_t v[AP_MAX_DIMS];
    AP_TRY(st_numbers(r, name, "shape", v, AP_MAX_DIMS, &t->nd, e));
    for (int i = 0; i < t->nd; i++) {
        if (v[i] > INT64_MAX) return ap_fail_at(e, AP_SHAPE, (int64_t)r->j.pos, name, "tensor '%s' has a dimension of %llu", name, (unsigned long long)v[i]);
        t->dim[i] = (int64_t)v[i];
    }
    return AP_OK;
}

static int st_dtype(st_reader *r, const char *name, ap_tensor *t, ap_err *e) {
    char shown[132];
    ap_jkind kind;
    AP_TRY(ap_json_next(&r->j, &kind, e));
    int64_t at = (int64_t)r->j.pos;
    if (kind != AP_J_STR) return ap_fail_at(e, AP_TYPE, at, name, "tensor '%s': its dtype is not a string", name);
    ap_str s = r->j.span;
    t->fmt = ap_format_by_safetensors(s.p, s.n);
    if (t->fmt) return AP_OK;
    ap_show(shown, s.p, s.n);
    if (s.n >= 2 && s.p[0] == 'F' && (s.p[1] == '4' || (s.p[1] == '6' && s.n > 3)))
        return ap_fail_at(e, AP_UNSUPPORTED, at, name, "tensor '%s': numbers smaller than a byte (dtype '%s') are not read", name, shown);
    return ap_fail_at(e, AP_TYPE, at, name, "tensor '%s' has the unknown dtype '%s'", name, shown);
}

static int st_offsets(st_reader *r, const char *name, uint64_t v[2], ap_err *e) {
    int n;
    AP_TRY(st_numbers(r, name, "data_offsets", v, 2, &n, e));
    return n == 2 ? AP_OK : ap_fail_at(e, AP_JSON, (int64_t)r->j.pos, name, "tensor '%s': data_offsets has %d numbers, 2 were expected", name, n);
}

/* The range must lie in the data section and have the size that shape and dtype say. */
static int st_range(const st_reader *r, const char *name, ap_tensor *t, const uint64_t v[2], ap_err *e) {
    int64_t at = (int64_t)r->j.pos;
    uint64_t room = r->f->n - r->data;
    AP_TRY(ap_file_tensor_bytes(t, at, e));
    if (v[0] > v[1] || v[1] > room)
        return ap_fail_at(e, AP_OFFSET, at, name, "tensor '%s' is at data_offsets [%llu, %llu], the file has %llu bytes of data", name, (unsigned long long)v[0], (unsigned long long)v[1], (unsigned long long)room);
    if (v[1] - v[0] != t->bytes)
        return ap_fail_at(e, AP_SIZE, at, name, "tensor '%s' has %llu bytes by its data_offsets, %llu by its shape and dtype", name, (unsigned long long)(v[1] - v[0]), (unsigned long long)t->bytes);
    t->offset = r->data + v[0];
    t->data = r->f->p + t->offset;
    return AP_OK;
}

static int st_tensor(st_reader *r, ap_tensor *t, ap_err *e) {
    static const char *const field[3] = { "dtype", "shape", "data_offsets" };
    char name[132];
    uint64_t offsets[2] = { 0, 0 };
    int seen = 0, i;
    ap_show(name, t->name.p, t->name.n);
    AP_TRY(st_expect(r, AP_J_OBJ, "a tensor's entry, an object,", e));
    for (;;) {
        ap_jkind kind;
        AP_TRY(ap_json_next(&r->j, &kind, e));
        int64_t at = (int64_t)r->j.pos;
        if (kind == AP_J_OBJ_END) break;
        for (i = 0; i < 3 && !ap_str_is(r->j.span, field[i]); i++) {}
        if (i == 3) return ap_fail_at(e, AP_JSON, at, name, "tensor '%s' has a field besides dtype, shape and data_offsets", name);
        if (seen & 1 << i) return ap_fail_at(e, AP_DUPLICATE, at, name, "tensor '%s' has two %s", name, field[i]);
        seen |= 1 << i;
        AP_TRY(i == 0 ? st_dtype(r, name, t, e) : i == 1 ? st_shape(r, name, t, e) : st_offsets(r, name, offsets, e));
    }
    for (i = 0; i < 3; i++) if (!(seen & 1 << i)) return ap_fail_at(e, AP_JSON, (int64_t)r->j.pos, name, "tensor '%s' has no %s", name, field[i]);
    return st_range(r, name, t, offsets, e);
}

/* "__metadata__" is text about the file and no part of the model: checked, then dropped. */
static int st_metadata(st_reader *r, ap_err *e) {
    ap_str *key = NULL, *more;
    uint64_t cap = 0;
    int n = 0, rc, *order = NULL;
    ap_jkind kind;
    if ((rc = st_expect(r, AP_J_OBJ, "__metadata__, an object,", e))) return rc;
    for (;;) {
        if ((rc = ap_json_next(&r->j, &kind, e)) || kind == AP_J_OBJ_END) break;
        if (n == (int)AP_LIMIT_KV) { rc = ap_fail(e, AP_LIMIT, "__metadata__ has more than %u keys", (unsigned)AP_LIMIT_KV); break; }
        if (!(more = ap_file_room(key, n, &cap, sizeof *key))) { rc = st_memory(e); break; }
        key = more;
        if ((rc = st_text(r->f, &r->j, r->j.span, &key[n++], e))) break;
        if ((rc = st_expect(r, AP_J_STR, "in __metadata__ a string", e))) break;
    }
    if (!rc && !(order = ap_alloc((uint64_t)n, sizeof *order))) rc = st_memory(e);
    if (!rc && ap_file_twice(key, n, sizeof *key, order)) rc = ap_fail_at(e, AP_DUPLICATE, -1, "__metadata__", "__metadata__ has a key twice");
    ap_free(order);
    ap_free(key);
    return rc;
}

static int st_entry(st_reader *r, int *metadata, ap_err *e) {
    ap_file *f = r->f;
    ap_str name;
    int64_t at = (int64_t)r->j.pos;
    AP_TRY(st_text(f, &r->j, r->j.span, &name, e));
    if (ap_str_is(name, "__metadata__")) {
        if ((*metadata)++) return ap_fail_at(e, AP_DUPLICATE, at, "__metadata__", "__metadata__ is there twice");
        return st_metadata(r, e);
    }
    AP_TRY(ap_file_name_ok(name, ST_NAME, "tensor", at, e));
    if (r->n == (int)AP_LIMIT_TENSORS) return ap_fail_at(e, AP_LIMIT, at, NULL, "more than %u tensors", (unsigned)AP_LIMIT_TENSORS);
    ap_tensor ahead = { .nd = 0 }, *t = f->t ? &f->t[r->n] : &ahead;
    t->name = name;
    r->n++;
    return st_tensor(r, t, e);
}

/* --- the header ------------------------------------------------------------------------------------------------------------------------ */

/* Finds the header and reads it once for its grammar, so that broken JSON is called that whatever it would have meant.  It begins with '{', ends with '}',
** and only blanks may fill it up to an aligned length. */
static int st_frame(st_reader *r, ap_err *e) {
    ap_file *f = r->f;
    ap_cur c = { f->p, f->n, 0 };
    ap_jkind kind;
    uint64_t n;
    if (!ap_u64(&c, &n)) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "the file has %llu bytes, a safetensors file begins with 8 bytes of header length", (unsigned long long)f->n);
    if (n > AP_LIMIT_HEADER) return ap_fail_at(e, AP_LIMIT, 0, NULL, "a header of %llu bytes declared, at most %u are read: is this a safetensors file?", (unsigned long long)n, (unsigned)AP_LIMIT_HEADER);
    if (n > ap_left(&c)) return ap_fail_at(e, AP_TRUNCATED, 0, NULL, "a header of %llu bytes declared, the file has %llu left", (unsigned long long)n, (unsigned long long)ap_left(&c));
    uint64_t end = ST_LENGTH + n;
    r->data = end;
    while (end > ST_LENGTH && f->p[end - 1] == ' ') end--;
    ap_json_init(&r->j, (const char *)f->p, end);
    r->j.pos = ST_LENGTH;                       /* so that every offset in a message is one in the file */
    ap_json whole = r->j;
    AP_TRY(ap_json_skip(&whole, e));
    AP_TRY(ap_json_next(&whole, &kind, e));     /* the end, or bytes after the value */
    if (f->p[ST_LENGTH] == '{' && f->p[end - 1] == '}') return AP_OK;
    return ap_fail_at(e, AP_JSON, ST_LENGTH, NULL, "the header of %llu bytes is not one JSON object from '{' to '}'", (unsigned long long)n);
}

static int st_by_place(const void *a, const void *b) {
    const ap_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    uint64_t n = x->name.n < y->name.n ? x->name.n : y->name.n;        /* empty tensors may share a place: then by name */
    int d = memcmp(x->name.p, y->name.p, (size_t)n);
    return d ? d : (x->name.n > y->name.n) - (x->name.n < y->name.n);
}

/* The tensors, in order of their place, cover the data section exactly. */
static int st_cover(const st_reader *r, ap_err *e) {
    const ap_file *f = r->f;
    char name[132];
    uint64_t next = r->data;
    for (int i = 0; i < f->nt; i++) {
        const ap_tensor *t = &f->t[i];
        unsigned long long at = t->offset - r->data, want = next - r->data;
        ap_show(name, t->name.p, t->name.n);
        if (t->offset > next) return ap_fail_at(e, AP_GAP, (int64_t)next, name, "tensor '%s' begins at data offset %llu, %llu was expected: bytes that belong to no tensor", name, at, want);
        if (t->offset < next) return ap_fail_at(e, AP_OVERLAP, (int64_t)t->offset, name, "tensor '%s' begins at data offset %llu, the one before it ends at %llu", name, at, want);
        next = t->offset + t->bytes;            /* inside the file: st_range has seen to it */
    }
    if (next == f->n) return AP_OK;
    return ap_fail_at(e, AP_GAP, (int64_t)next, NULL, "%llu bytes after the last tensor belong to nothing", (unsigned long long)(f->n - next));
}

/* One walk, done twice: first to count (f->t NULL), then to fill memory that is exactly large enough. */
static int st_header(st_reader *r, ap_err *e) {
    ap_jkind kind;
    int metadata = 0;
    AP_TRY(st_expect(r, AP_J_OBJ, "the header, an object,", e));
    for (;;) {
        AP_TRY(ap_json_next(&r->j, &kind, e));
        if (kind == AP_J_OBJ_END) break;
        AP_TRY(st_entry(r, &metadata, e));
    }
    return AP_OK;
}

static int st_tensors(st_reader *r, ap_err *e) {
    st_reader again = *r;
    ap_file *f = r->f;
    AP_TRY(st_header(r, e));
    f->text_n = 0;
    f->t = ap_alloc((uint64_t)r->n, sizeof *f->t);
    if (!f->t) return st_memory(e);
    AP_TRY(st_header(&again, e));
    f->nt = again.n;
    if (f->nt) qsort(f->t, (size_t)f->nt, sizeof *f->t, st_by_place);
    return AP_OK;
}

/* --- config.json ----------------------------------------------------------------------------------------------------------------------- */

/* One walk, done twice: first to count (kv NULL), then to fill.  path holds the dotted key of the member being read; len[d] is how much of it belongs to
** the d objects around.  An object is a pair too while we read, so that giving it twice is seen; only an empty one stays (st_drop_objects).  Of an
** array the text is kept. */
typedef struct { ap_json j; ap_kv *kv; int n; uint64_t text; char path[ST_KEY + 1]; uint64_t len[AP_JSON_DEPTH + 1]; } st_config;

static int st_config_key(st_config *c, ap_err *e) {
    uint64_t at = c->len[c->j.depth - 1], n;
    char part[ST_KEY];
    ap_err quiet = AP_ERR_INIT;
    if (at) c->path[at++] = '.';
    if (at > ST_KEY || ap_json_text(&c->j, c->j.span, part, ST_KEY - at, &n, &quiet))
        return ap_fail_at(e, AP_NAME, (int64_t)c->j.pos, "config.json", "config.json, byte %llu: a key of more than %d bytes", (unsigned long long)c->j.pos, (int)ST_KEY);
    AP_TRY(ap_file_name_ok((ap_str){ part, n }, ST_KEY, "config.json key", (int64_t)c->j.pos, e));
    memcpy(c->path + at, part, n);
    c->len[c->j.depth] = at + n;
    return AP_OK;
}

static void st_config_number(const ap_json *j, ap_jkind kind, ap_kv *kv) {
    if (kind == AP_J_NUM) { kv->kind = AP_V_FLOAT; kv->v.f = j->num; return; }
    kv->kind = j->negative || j->mag <= INT64_MAX ? AP_V_INT : AP_V_UINT;
    kv->v.u = j->negative ? 0 - j->mag : j->mag;        /* two's complement: also right for -2^63 */
}

static int st_empty_object(const ap_json *j, uint64_t from, ap_str *s) {
    uint64_t i = j->pos;
    while (i < j->n && (j->p[i] == ' ' || j->p[i] == '\n' || j->p[i] == '\r' || j->p[i] == '\t')) i++;
    *s = (ap_str){ j->p + from, i + 1 - from };
    return i < j->n && j->p[i] == '}';
}

/* The arrays and objects inside the array that begins at `from`: how many keys they have and how long these are. */
static int st_array_size(ap_json j, uint64_t *keys, uint64_t *bytes, ap_err *e) {
    ap_jkind kind;
    *keys = *bytes = 0;
    do {
        AP_TRY(ap_json_next(&j, &kind, e));
        if (kind == AP_J_KEY) { ++*keys; *bytes += j.span.n; }
    } while (j.depth);
    return AP_OK;
}

/* Each key behind the number of its object: two equal ones are one object's key given twice. */
static int st_array_keys(ap_json j, ap_str *key, char *text, uint64_t room, ap_err *e) {
    uint32_t object[AP_JSON_DEPTH + 1], objects = 0;
    ap_jkind kind;
    uint64_t at = 0;
    do {
        AP_TRY(ap_json_next(&j, &kind, e));
        if (kind == AP_J_OBJ) object[j.depth] = ++objects;
        if (kind != AP_J_KEY) continue;
        key->p = text + at;
        memcpy(text + at, &object[j.depth], sizeof *object);
        at += sizeof *object;
        AP_TRY(ap_json_text(&j, j.span, text + at, room - at, &key->n, e));
        at += key->n;
        key++->n += sizeof *object;
    } while (j.depth);
    return AP_OK;
}

/* Nothing of an array is read here, but an object in it that has a key twice would be read differently by two readers. */
static int st_array_twice(const ap_json *around, uint64_t from, ap_err *e) {
    ap_json j;
    uint64_t keys, bytes, room;
    ap_json_init(&j, around->p, around->pos);
    j.pos = from;
    AP_TRY(st_array_size(j, &keys, &bytes, e));
    if (keys < 2) return AP_OK;
    if (keys > AP_LIMIT_KV) return ap_fail_at(e, AP_LIMIT, (int64_t)from, "config.json", "config.json has more than %u keys in an array", (unsigned)AP_LIMIT_KV);
    room = bytes + keys * sizeof(uint32_t);     /* of a text of at most AP_LIMIT_HEADER bytes */
    ap_str *key = ap_alloc(keys, sizeof *key);
    char *text = ap_alloc(room, 1);
    int *order = ap_alloc(keys, sizeof *order);
    int rc = key && text && order ? st_array_keys(j, key, text, room, e) : st_memory(e);
    if (!rc && ap_file_twice(key, (int)keys, sizeof *key, order))
        rc = ap_fail_at(e, AP_DUPLICATE, (int64_t)from, "config.json", "config.json: an object in the array at byte %llu has a key twice", (unsigned long long)from);
    ap_free(order);
    ap_free(text);
    ap_free(key);
    return rc;
}

/* The value that was just begun, as a pair.  n of an object says, until st_drop_objects, that it has members. */
static int st_config_value(st_config *c, ap_jkind kind, ap_file *f, ap_err *e) {
    uint64_t from = c->j.pos - 1, n = c->len[c->j.depth - (kind == AP_J_OBJ || kind == AP_J_ARR)];
    ap_str span = c->j.span;
    ap_kv kv = { .kind = AP_V_JSON };
    if (c->n == (int)AP_LIMIT_KV) return ap_fail_at(e, AP_LIMIT, (int64_t)from, "config.json", "config.json has more than %u members", (unsigned)AP_LIMIT_KV);
    if (kind == AP_J_ARR) {
        for (int depth = c->j.depth; c->j.depth >= depth; ) AP_TRY(ap_json_next(&c->j, &kind, e));
        kv.s = (ap_str){ c->j.p + from, c->j.pos - from };
        if (c->kv) AP_TRY(st_array_twice(&c->j, from, e));
    }
    if (kind == AP_J_OBJ) kv.n = !st_empty_object(&c->j, from, &kv.s);
    if (kind == AP_J_NULL) kv.kind = AP_V_NULL;
    if (kind == AP_J_TRUE || kind == AP_J_FALSE) { kv.kind = AP_V_BOOL; kv.v.b = kind == AP_J_TRUE; }
    if (kind == AP_J_INT || kind == AP_J_NUM) st_config_number(&c->j, kind, &kv);
    c->text += n + (kind == AP_J_STR ? span.n : 0);
    if (!c->kv) { c->n++; return AP_OK; }
    kv.key = (ap_str){ memcpy(f->text + f->text_n, c->path, n), n };
    f->text_n += n;
    if (kind == AP_J_STR) { kv.kind = AP_V_STR; AP_TRY(st_text(f, &c->j, span, &kv.s, e)); }
    c->kv[c->n++] = kv;
    return AP_OK;
}

static int st_config_walk(st_config *c, ap_file *f, ap_err *e) {
    ap_jkind kind;
    ap_json_init(&c->j, f->config, f->config_n);
    c->n = 0;
    c->text = 0;
    c->len[0] = 0;
    AP_TRY(ap_json_next(&c->j, &kind, e));
    if (kind != AP_J_OBJ) return ap_fail_at(e, AP_JSON, 0, "config.json", "config.json is not a JSON object");
    while (c->j.depth) {
        AP_TRY(ap_json_next(&c->j, &kind, e));
        if (kind == AP_J_OBJ_END) continue;
        AP_TRY(st_config_key(c, e));
        AP_TRY(ap_json_next(&c->j, &kind, e));
        AP_TRY(st_config_value(c, kind, f, e));
    }
    return ap_json_next(&c->j, &kind, e);
}

/* An object that has members is known by them. */
static void st_drop_objects(ap_file *f) {
    int kept = 0;
    for (int i = 0; i < f->nkv; i++)
        if (!(f->kv[i].kind == AP_V_JSON && f->kv[i].n)) f->kv[kept++] = f->kv[i];
    f->nkv = kept;
}

static int st_config_read(st_config *c, ap_file *f, ap_err *e) {
    int rc = f->config ? st_config_walk(c, f, e) : AP_OK;
    if (rc && !e->field[0]) memcpy(e->field, "config.json", sizeof "config.json");
    return rc;
}

int ap_safetensors_parse(ap_file *f, ap_err *e) {
    st_reader r = { .f = f };
    st_config c = { .n = 0 };
    uint64_t room;
    AP_TRY(st_frame(&r, e));
    if (!f->config) AP_TRY(ap_file_beside(f, "config.json", &f->config, &f->config_n, e));
    AP_TRY(st_config_read(&c, f, e));
    if (!ap_add_ok(r.j.n, c.text, &room) || !(f->text = ap_alloc(room, 1)) || !(f->kv = c.kv = ap_alloc((uint64_t)c.n, sizeof *c.kv))) return st_memory(e);
    AP_TRY(st_tensors(&r, e));
    AP_TRY(st_config_read(&c, f, e));
    f->nkv = c.n;
    AP_TRY(ap_file_index(f, e));
    st_drop_objects(f);
    return st_cover(&r, e);
}
