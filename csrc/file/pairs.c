/*
** pairs.c: a JSON object becomes a file's key-value pairs; the members of an object inside it get dotted keys: rope_parameters.rope_theta.  Arrays stay text.
** It refuses a key given twice, or, where the container's readers take the last one, takes the last one and says so.  The containers with JSON metadata
** call it: config.json beside safetensors, and the metadata of APR.
*/
#include <string.h>
#include "../base/json.h"
#include "../base/mem.h"
#include "file.h"

/* One walk, done twice: first to count (kv NULL), then to fill.  path holds the dotted key of the member being read; len[d] is how much of it belongs to
** the d objects around.  An object is a pair too while we read, so that giving it twice is seen; only an empty one stays.  Of an array the text is kept. */
enum { PAIRS_KEY = 255 };
typedef struct {
    ap_json j;
    const char *what;                           /* for messages: config.json */
    ap_kv *kv; int n;
    char *out; uint64_t text;                   /* un-escaped keys and strings, and how much of it is used */
    char path[PAIRS_KEY + 1];
    uint64_t len[AP_JSON_DEPTH + 1];
} pairs_walk;

static int pairs_key(pairs_walk *c, ap_err *e) {
    uint64_t at = c->len[c->j.depth - 1], n;
    char part[PAIRS_KEY];
    ap_err quiet = AP_ERR_INIT;
    if (at) c->path[at++] = '.';
    if (at > PAIRS_KEY || ap_json_text(&c->j, c->j.span, part, PAIRS_KEY - at, &n, &quiet))
        return ap_fail_at(e, AP_NAME, (int64_t)c->j.pos, c->what, "%s, byte %llu: a key of more than %d bytes", c->what, (unsigned long long)c->j.pos, (int)PAIRS_KEY);
    AP_TRY(ap_file_name_ok((ap_str){ part, n }, PAIRS_KEY, "key", (int64_t)c->j.pos, e));
    memcpy(c->path + at, part, n);
    c->len[c->j.depth] = at + n;
    return AP_OK;
}

static void pairs_number(const ap_json *j, ap_jkind kind, ap_kv *kv) {
    if (kind == AP_J_NUM) { kv->kind = AP_V_FLOAT; kv->v.f = j->num; return; }
    kv->kind = j->negative || j->mag <= INT64_MAX ? AP_V_INT : AP_V_UINT;
    kv->v.u = j->negative ? 0 - j->mag : j->mag;        /* two's complement: also right for -2^63 */
}

static int pairs_empty_object(const ap_json *j, uint64_t from, ap_str *s) {
    uint64_t i = j->pos;
    while (i < j->n && (j->p[i] == ' ' || j->p[i] == '\n' || j->p[i] == '\r' || j->p[i] == '\t')) i++;
    *s = (ap_str){ j->p + from, i + 1 - from };
    return i < j->n && j->p[i] == '}';
}

static int pairs_string(pairs_walk *c, ap_str span, ap_str *out, ap_err *e) {
    out->p = c->out + c->text;
    AP_TRY(ap_json_text(&c->j, span, c->out + c->text, span.n, &out->n, e));      /* never longer than it was */
    c->text += out->n;
    return AP_OK;
}

/* The arrays and objects inside the array that begins at `from`: how many keys they have and how long these are. */
static int pairs_array_size(ap_json j, uint64_t *keys, uint64_t *bytes, ap_err *e) {
    ap_jkind kind;
    *keys = *bytes = 0;
    do {
        AP_TRY(ap_json_next(&j, &kind, e));
        if (kind == AP_J_KEY) { ++*keys; *bytes += j.span.n; }
    } while (j.depth);
    return AP_OK;
}

/* Each key behind the number of its object: two equal ones are one object's key given twice. */
static int pairs_array_keys(ap_json j, ap_str *key, char *text, uint64_t room, ap_err *e) {
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
static int pairs_array_twice(const pairs_walk *c, uint64_t from, ap_err *e) {
    ap_json j;
    uint64_t keys, bytes, room;
    ap_json_init(&j, c->j.p, c->j.pos);
    j.pos = from;
    AP_TRY(pairs_array_size(j, &keys, &bytes, e));
    if (keys < 2) return AP_OK;
    if (keys > AP_LIMIT_KV) return ap_fail_at(e, AP_LIMIT, (int64_t)from, c->what, "%s has more than %u keys in an array", c->what, (unsigned)AP_LIMIT_KV);
    room = bytes + keys * sizeof(uint32_t);     /* of a text of at most AP_LIMIT_HEADER bytes */
    ap_str *key = ap_alloc(keys, sizeof *key);
    char *text = ap_alloc(room, 1);
    int *order = ap_alloc(keys, sizeof *order);
    int rc = key && text && order ? pairs_array_keys(j, key, text, room, e) : ap_fail(e, AP_MEMORY, "no memory for %llu keys", (unsigned long long)keys);
    if (!rc && ap_file_twice(key, (int)keys, sizeof *key, order))
        rc = ap_fail_at(e, AP_DUPLICATE, (int64_t)from, c->what, "%s: an object in the array at byte %llu has a key twice", c->what, (unsigned long long)from);
    ap_free(order);
    ap_free(text);
    ap_free(key);
    return rc;
}

/* The value that was just begun, as a pair.  n of an object says, until pairs_drop_objects, that it has members. */
static int pairs_value(pairs_walk *c, ap_jkind kind, ap_err *e) {
    uint64_t from = c->j.pos - 1, n = c->len[c->j.depth - (kind == AP_J_OBJ || kind == AP_J_ARR)];
    ap_str span = c->j.span;
    ap_kv kv = { .kind = AP_V_JSON };
    if (c->n == (int)AP_LIMIT_KV) return ap_fail_at(e, AP_LIMIT, (int64_t)from, c->what, "%s has more than %u members", c->what, (unsigned)AP_LIMIT_KV);
    if (kind == AP_J_ARR) {
        for (int depth = c->j.depth; c->j.depth >= depth; ) AP_TRY(ap_json_next(&c->j, &kind, e));
        kv.s = (ap_str){ c->j.p + from, c->j.pos - from };
        if (c->kv) AP_TRY(pairs_array_twice(c, from, e));
    }
    if (kind == AP_J_OBJ) kv.n = !pairs_empty_object(&c->j, from, &kv.s);
    if (kind == AP_J_NULL) kv.kind = AP_V_NULL;
    if (kind == AP_J_TRUE || kind == AP_J_FALSE) { kv.kind = AP_V_BOOL; kv.v.b = kind == AP_J_TRUE; }
    if (kind == AP_J_INT || kind == AP_J_NUM) pairs_number(&c->j, kind, &kv);
    if (!c->kv) { c->n++; c->text += n + (kind == AP_J_STR ? span.n : 0); return AP_OK; }
    kv.key = (ap_str){ memcpy(c->out + c->text, c->path, n), n };
    c->text += n;
    if (kind == AP_J_STR) { kv.kind = AP_V_STR; AP_TRY(pairs_string(c, span, &kv.s, e)); }
    c->kv[c->n++] = kv;
    return AP_OK;
}

static int pairs_read(pairs_walk *c, const char *p, uint64_t n, ap_err *e) {
    ap_jkind kind;
    ap_json_init(&c->j, p, n);
    c->n = 0;
    c->text = 0;
    c->len[0] = 0;
    AP_TRY(ap_json_next(&c->j, &kind, e));
    if (kind != AP_J_OBJ) return ap_fail_at(e, AP_JSON, 0, c->what, "%s is not a JSON object", c->what);
    while (c->j.depth) {
        AP_TRY(ap_json_next(&c->j, &kind, e));
        if (kind == AP_J_OBJ_END) continue;
        AP_TRY(pairs_key(c, e));
        AP_TRY(ap_json_next(&c->j, &kind, e));
        AP_TRY(pairs_value(c, kind, e));
    }
    return ap_json_next(&c->j, &kind, e);
}

/* order sorts the pairs by key, equal ones as they came.  Of two equal keys the first is marked (n of a null) and said, or refused. */
static int pairs_twice(ap_file *f, const char *what, int last_wins, int *order, ap_err *e) {
    char shown[132];
    int at = ap_file_twice(f->kv, f->nkv, sizeof *f->kv, order);
    for (int i = at; at && i < f->nkv; i++) {
        ap_kv *a = &f->kv[order[i - 1]], *b = &f->kv[order[i]];
        if (a->key.n != b->key.n || memcmp(a->key.p, b->key.p, (size_t)a->key.n)) continue;
        int object = (a->kind == AP_V_JSON && a->n) || (b->kind == AP_V_JSON && b->n);
        ap_show(shown, a->key.p, a->key.n);
        if (!last_wins || object) return ap_fail_at(e, AP_DUPLICATE, -1, shown, "%s: the key '%s' is there twice", what, shown);
        a->kind = AP_V_JSON;
        a->n = 1;
        ap_file_note(f, "%s: the key '%s' is there twice, the last one counts", what, shown);
    }
    return AP_OK;
}

/* An object that has members is known by them; a pair that a later one replaced is marked like one. */
static void pairs_drop_objects(ap_file *f) {
    int kept = 0;
    for (int i = 0; i < f->nkv; i++)
        if (!(f->kv[i].kind == AP_V_JSON && f->kv[i].n)) f->kv[kept++] = f->kv[i];
    f->nkv = kept;
}

static int pairs_fill(ap_file *f, pairs_walk *c, const char *p, uint64_t n, int last_wins, ap_err *e) {
    AP_TRY(pairs_read(c, p, n, e));
    f->kv_text = c->out = ap_alloc(c->text, 1);
    f->kv = c->kv = ap_alloc((uint64_t)c->n, sizeof *c->kv);
    int *order = ap_alloc((uint64_t)c->n, sizeof *order);
    int rc = c->out && c->kv && order ? pairs_read(c, p, n, e) : ap_fail(e, AP_MEMORY, "no memory for %d keys", c->n);
    if (!rc) {
        f->nkv = c->n;
        rc = pairs_twice(f, c->what, last_wins, order, e);
    }
    ap_free(order);
    if (!rc) pairs_drop_objects(f);
    return rc;
}

int ap_file_pairs(ap_file *f, const char *what, const char *p, uint64_t n, int last_wins, ap_err *e) {
    pairs_walk c = { .what = what };
    int rc = pairs_fill(f, &c, p, n, last_wins, e);
    if (rc && !e->field[0]) { strncpy(e->field, what, sizeof e->field - 1); e->field[sizeof e->field - 1] = 0; }
    return rc;
}
