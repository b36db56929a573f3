/*
** safetensors.c: eight bytes of header length, a JSON header, the data; the config.json beside it, whose members become the file's key-value pairs; and the
** index of a model in several such files.  It refuses whatever the reference reader refuses (holes, overlaps, bytes after the last tensor) and also what JSON readers disagree about: a name, field or
** key given twice, escapes included.  file.c calls it through containers.def.
*/
#include <stdlib.h>
#include <string.h>
#include "../base/json.h"
#include "../base/mem.h"
#include "../base/num.h"
#include "file.h"

enum { ST_LENGTH = 8, ST_NAME = 255 };
/* data: where the data section begins; n, dims: tensors so far and dimensions of all of them */
typedef struct { ap_file *f; ap_json j; uint64_t data, dims; int n; } st_reader;

int ap_safetensors_sniff(const uint8_t *p, uint64_t n);
int ap_safetensors_parse(ap_file *f, ap_err *e);

int ap_safetensors_sniff(const uint8_t *p, uint64_t n) { return n > ST_LENGTH && (p[ST_LENGTH] == '{' || (p[0] == '{' && !memchr(p, 0, ST_LENGTH))); }

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
    if (!r->f->src) t->data = r->f->p + t->offset;
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
    int64_t dim[AP_MAX_DIMS];
    ap_tensor t = { .name = name, .dim = dim };
    AP_TRY(st_tensor(r, &t, e));
    r->n++;
    r->dims += (uint64_t)t.nd;
    if (f->t) ap_file_keep(f, &t);
    return AP_OK;
}

/* --- the header ------------------------------------------------------------------------------------------------------------------------ */

/* Finds the header and reads it once for its grammar, so that broken JSON is called that whatever it would have meant.  It begins with '{', ends with '}',
** and only blanks may fill it up to an aligned length. */
static int st_frame(st_reader *r, ap_err *e) {
    ap_file *f = r->f;
    ap_cur c = { f->p, f->have, 0, f->n };
    ap_jkind kind;
    uint64_t n;
    if (!ap_u64(&c, &n)) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "the file has %llu bytes, a safetensors file begins with 8 bytes of header length", (unsigned long long)f->n);
    if (n > AP_LIMIT_HEADER) return ap_fail_at(e, AP_LIMIT, 0, NULL, "a header of %llu bytes declared, at most %u are read: is this a safetensors file?", (unsigned long long)n, (unsigned)AP_LIMIT_HEADER);
    if (n > ap_left(&c)) return ap_fail_at(e, AP_TRUNCATED, 0, NULL, "a header of %llu bytes declared, the file has %llu left", (unsigned long long)n, (unsigned long long)(f->n - ST_LENGTH));
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
    AP_TRY(ap_file_reserve(f, (uint64_t)r->n, r->dims, e));
    AP_TRY(st_header(&again, e));
    if (f->nt) qsort(f->t, (size_t)f->nt, sizeof *f->t, st_by_place);
    return AP_OK;
}

/* --- the index of a sharded model -------------------------------------------------------------------------------------------------------- */

/* model.safetensors.index.json: "weight_map" says in which shard each tensor lies.  It is believed only as far as the shards agree. */
typedef struct { ap_str tensor, shard; } st_place;
typedef struct { st_place *place; int n; uint64_t cap; } st_map;

static int st_is_index(const ap_file *f) { return f->n >= ST_LENGTH && f->p[0] == '{' && !memchr(f->p, 0, ST_LENGTH); }     /* a header length has zero bytes */

static int st_map_row(st_reader *r, st_map *m, ap_err *e) {
    st_place *more = ap_file_room(m->place, m->n, &m->cap, sizeof *more);
    if (!more) return st_memory(e);
    m->place = more;
    AP_TRY(st_text(r->f, &r->j, r->j.span, &more[m->n].tensor, e));
    AP_TRY(ap_file_name_ok(more[m->n].tensor, ST_NAME, "tensor", (int64_t)r->j.pos, e));
    AP_TRY(st_expect(r, AP_J_STR, "in weight_map the name of a file", e));
    AP_TRY(st_text(r->f, &r->j, r->j.span, &more[m->n].shard, e));
    AP_TRY(ap_file_plain_name(more[m->n].shard, (int64_t)r->j.pos, e));
    m->n++;
    return AP_OK;
}

static int st_map_rows(st_reader *r, st_map *m, ap_err *e) {
    ap_jkind kind;
    AP_TRY(st_expect(r, AP_J_OBJ, "weight_map, an object,", e));
    for (;;) {
        AP_TRY(ap_json_next(&r->j, &kind, e));
        if (kind == AP_J_OBJ_END) return AP_OK;
        if (m->n == (int)AP_LIMIT_TENSORS) return ap_fail_at(e, AP_LIMIT, (int64_t)r->j.pos, "weight_map", "weight_map has more than %u tensors", (unsigned)AP_LIMIT_TENSORS);
        AP_TRY(st_map_row(r, m, e));
    }
}

static int st_map_read(st_reader *r, st_map *m, ap_err *e) {
    ap_jkind kind;
    int seen = 0;
    if (r->f->have < r->f->n) return ap_fail_at(e, AP_TRUNCATED, (int64_t)r->f->have, NULL, "the index goes on");      /* file.c reads on */
    ap_json_init(&r->j, (const char *)r->f->p, r->f->n);
    AP_TRY(st_expect(r, AP_J_OBJ, "an object with weight_map", e));
    for (;;) {
        AP_TRY(ap_json_next(&r->j, &kind, e));
        if (kind == AP_J_OBJ_END) break;
        int map = ap_str_is(r->j.span, "weight_map");
        if (map && seen++) return ap_fail_at(e, AP_DUPLICATE, (int64_t)r->j.pos, "weight_map", "weight_map is there twice");
        AP_TRY(map ? st_map_rows(r, m, e) : ap_json_skip(&r->j, e));
    }
    AP_TRY(ap_json_next(&r->j, &kind, e));
    return seen ? AP_OK : ap_fail_at(e, AP_JSON, -1, "weight_map", "the index has no weight_map");
}

static int st_by_shard(const void *a, const void *b) {
    const st_place *x = a, *y = b;
    uint64_t n = x->shard.n < y->shard.n ? x->shard.n : y->shard.n;
    int d = memcmp(x->shard.p, y->shard.p, (size_t)n);
    return d ? d : (x->shard.n > y->shard.n) - (x->shard.n < y->shard.n);
}

/* Opens every shard that the map names, once, in order of their names. */
static int st_open_shards(ap_file *f, const st_map *m, ap_err *e) {
    int shards = 0;
    for (int i = 0; i < m->n; i++) shards += !i || st_by_shard(&m->place[i - 1], &m->place[i]);
    if (shards > AP_LIMIT_SHARDS) return ap_fail_at(e, AP_LIMIT, -1, "weight_map", "weight_map names %d files, at most %d are read", shards, (int)AP_LIMIT_SHARDS);
    for (int i = 0; i < m->n; i++)
        if (!i || st_by_shard(&m->place[i - 1], &m->place[i])) AP_TRY(ap_file_open_shard(f, m->place[i].shard, e));
    return ap_file_adopt(f, e);
}

/* Each tensor lies in the shard that the map names, and the shards hold no other. */
static int st_map_agrees(const ap_file *f, const st_map *m, ap_err *e) {
    char name[132], file[132];
    int shard = -1;
    for (int i = 0; i < m->n; i++) {
        shard += !i || st_by_shard(&m->place[i - 1], &m->place[i]);
        const ap_tensor *t = ap_file_tensor(f, m->place[i].tensor);
        ap_show(name, m->place[i].tensor.p, m->place[i].tensor.n);
        ap_show(file, m->place[i].shard.p, m->place[i].shard.n);
        if (!t) return ap_fail_at(e, AP_MISSING, -1, name, "the index places tensor '%s' in '%s', no shard holds it", name, file);
        if (t->part != shard + 1)
            return ap_fail_at(e, AP_MISSING, -1, name, "the index places tensor '%s' in '%s', it lies in another shard", name, file);
    }
    if (f->nt == m->n) return AP_OK;
    return ap_fail_at(e, AP_COUNT, -1, "weight_map", "the index places %d tensors, its shards hold %d", m->n, f->nt);
}

static int st_parse_index(st_reader *r, ap_err *e) {
    ap_file *f = r->f;
    st_map m = { NULL, 0, 0 };
    char name[132];
    int *order = NULL, rc, twice = 0;
    if (!(f->text = ap_alloc(f->n, 1))) return st_memory(e);
    rc = st_map_read(r, &m, e);
    if (!rc && !(order = ap_alloc((uint64_t)m.n, sizeof *order))) rc = st_memory(e);
    if (!rc && (twice = ap_file_twice(m.place, m.n, sizeof *m.place, order)))
        rc = ap_fail_at(e, AP_DUPLICATE, -1, "weight_map", "weight_map has the tensor '%s' twice", ap_show(name, m.place[order[twice]].tensor.p, m.place[order[twice]].tensor.n));
    if (!rc && m.n) qsort(m.place, (size_t)m.n, sizeof *m.place, st_by_shard);
    if (!rc) rc = st_open_shards(f, &m, e);
    if (!rc) rc = st_map_agrees(f, &m, e);
    ap_free(order);
    ap_free(m.place);
    return rc;
}

/* --- the file ---------------------------------------------------------------------------------------------------------------------------- */

/* A shard's configuration is that of the model, which is read once. */
static int st_config(ap_file *f, ap_err *e) {
    if (f->is_shard) return AP_OK;
    if (!f->config) AP_TRY(ap_file_beside(f, "config.json", &f->config, &f->config_n, e));
    return f->config ? ap_file_pairs(f, "config.json", f->config, f->config_n, 0, e) : AP_OK;
}

int ap_safetensors_parse(ap_file *f, ap_err *e) {
    st_reader r = { .f = f };
    if (!f->is_shard && st_is_index(f)) {
        AP_TRY(st_config(f, e));
        return st_parse_index(&r, e);
    }
    AP_TRY(st_frame(&r, e));
    AP_TRY(st_config(f, e));
    if (!(f->text = ap_alloc(r.j.n, 1))) return st_memory(e);
    AP_TRY(st_tensors(&r, e));
    AP_TRY(ap_file_index(f, e));
    return st_cover(&r, e);
}
