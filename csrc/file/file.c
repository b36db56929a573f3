/*
** file.c: a path becomes a container that understands its bytes, an index, and lookups; several files of one model become one.  Of a large file only the part
** that describes it is read at first; a tensor's bytes come when somebody wants them.  It refuses names inside files that lead out of the folder, and bytes
** that no row of containers.def claims; it never interprets a byte itself.  plan/model.c and py/file.c open and look up here; the parsers use the helpers at
** the end.
*/
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "../base/mem.h"
#include "../base/num.h"
#include "bytes.h"
#include "file.h"

#define C(name, verify) int ap_##name##_sniff(const uint8_t *p, uint64_t n); int ap_##name##_parse(ap_file *f, ap_err *e);
#include "containers.def"
int ap_apr_verify(const ap_file *f, int *checked, ap_err *e);
const ap_container ap_containers[] = {
#define C(name, verify) { #name, ap_##name##_sniff, ap_##name##_parse, verify },
#include "containers.def"
};
const int ap_containers_n = sizeof ap_containers / sizeof *ap_containers;

/* --- opening --------------------------------------------------------------------------------------------------------------------------- */

/* What a folder stands for, in this order. */
static const char *const file_models[] = { "model.safetensors", "model.safetensors.index.json" };

/* The path of the model in a folder: *path is the caller's to free. */
static int file_in_folder(const char *folder, char **path, ap_err *e) {
    char shown[132];
    for (size_t i = 0; i < sizeof file_models / sizeof *file_models; i++) {
        if (!(*path = ap_path_join(folder, strlen(folder), file_models[i]))) return ap_no_memory(strlen(folder), e);
        if (!access(*path, F_OK) || errno != ENOENT) return AP_OK;
        ap_free(*path);
        *path = NULL;
    }
    e->sys = ENOENT;
    return ap_fail(e, AP_IO, "no model.safetensors and no model.safetensors.index.json in the folder '%s' (a GGUF or APR file is opened by its own path)",
                   ap_show(shown, folder, strlen(folder)));
}

/* The first `have` bytes of f, and a zero byte after them. */
static int file_have(ap_file *f, uint64_t have, ap_err *e) {
    uint8_t *p = ap_alloc(have + 1, 1);
    if (!p) return ap_no_memory(have, e);
    int rc = ap_source_read(f->src, 0, p, have, e);
    if (rc) { ap_free(p); return rc; }
    ap_free((void *)f->p);                      /* const for everybody else */
    f->p = p;
    f->have = have;
    return AP_OK;
}

/* A small file is read whole and closed; of a large one its beginning, where it describes itself. */
static int file_load(ap_file *f, ap_err *e) {
    f->n = ap_source_size(f->src);
    if (f->mapped) AP_TRY(ap_source_map(f->src, e));
    AP_TRY(file_have(f, f->n < AP_FILE_WHOLE ? f->n : AP_FILE_WHOLE, e));
    if (f->have < f->n || f->mapped) return AP_OK;
    ap_source_close(f->src);
    f->src = NULL;
    return AP_OK;
}

int ap_file_beside(const ap_file *f, const char *name, char **p, uint64_t *n, ap_err *e) {
    uint8_t *bytes = NULL;
    if (!f->path) return AP_OK;                 /* opened from memory: it stands beside nothing */
    const char *slash = strrchr(f->path, '/');
    char *path = ap_path_join(f->path, slash ? (size_t)(slash - f->path) + 1 : 0, name);
    if (!path) return ap_no_memory(strlen(f->path), e);
    int rc = access(path, F_OK) && errno == ENOENT ? AP_OK : ap_read_whole(path, AP_LIMIT_HEADER, &bytes, n, e);
    ap_free(path);
    *p = (char *)bytes;
    return rc;
}

static int file_begins(const ap_file *f, const char *z) { return f->n >= strlen(z) && !memcmp(f->p, z, strlen(z)); }

/* The bytes decide; when no container knows them the name does, so that a damaged file is told what is damaged. */
static int file_kind(ap_file *f, ap_err *e) {
    char shown[132];
    if (file_begins(f, "version https://git-lfs"))
        return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "this is a Git LFS pointer of %llu bytes, not the model: fetch it with 'git lfs pull'", (unsigned long long)f->n);
    for (int i = 0; i < ap_containers_n; i++)
        if (ap_containers[i].sniff(f->p, f->have)) { f->kind = &ap_containers[i]; return AP_OK; }
    const char *dot = f->path ? strrchr(f->path, '.') : NULL;
    for (int i = 0; dot && i < ap_containers_n; i++)
        if (!strcmp(dot + 1, ap_containers[i].name)) { f->kind = &ap_containers[i]; return AP_OK; }
    if (f->n < 8) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "%llu bytes are no model file", (unsigned long long)f->n);
    return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the file begins with '%s', which is none of:"
#define C(name, verify) " " #name
#include "containers.def"
        , ap_show(shown, (const char *)f->p, 8));
}

/* What parsing leaves, so that it can begin again. */
static void file_forget(ap_file *f) {
    void *all[] = { f->text, f->kv_text, f->t, f->dims, f->kv, f->by_name };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ap_free(all[i]);
    f->text = f->kv_text = NULL;
    f->t = NULL;
    f->dims = NULL;
    f->kv = NULL;
    f->by_name = NULL;
    f->nt = f->nkv = f->nnotes = 0;
    f->text_n = f->ndims = 0;
}

/* A file that ends too early for its description may only have been read too little: then twice as much is read, up to the most that may describe a model. */
static int file_parse(ap_file *f, ap_err *e) {
    const uint64_t most = (uint64_t)AP_LIMIT_METADATA + AP_FILE_WHOLE;
    if (!f->kind) AP_TRY(file_kind(f, e));
    for (;;) {
        int rc = f->kind->parse(f, e);
        uint64_t have = f->n - f->have > f->have ? 2 * f->have : f->n;
        if (rc != AP_TRUNCATED || !f->src || f->nshard || f->have >= f->n || have > most) return rc;
        file_forget(f);
        *e = (ap_err)AP_ERR_INIT;
        AP_TRY(file_have(f, have, e));
    }
}

/* --- bytes ----------------------------------------------------------------------------------------------------------------------------- */

int ap_file_peek(const ap_file *f, uint64_t at, void *p, uint64_t n, ap_err *e) {
    if (at > f->have || n > f->have - at) return ap_source_read(f->src, at, p, n, e);
    if (n) memcpy(p, f->p + at, (size_t)n);
    return AP_OK;
}

int ap_file_zeros(const ap_file *f, uint64_t from, uint64_t to, uint64_t *odd, ap_err *e) {
    uint8_t piece[512];
    for (*odd = from; from < to; ) {
        uint64_t n = to - from < sizeof piece ? to - from : sizeof piece;
        AP_TRY(ap_file_peek(f, from, piece, n, e));
        for (uint64_t i = 0; i < n; i++, (*odd)++) if (piece[i]) return AP_OK;
        from += n;
    }
    return AP_OK;
}

static int file_fetch(const ap_file *home, ap_tensor *t, ap_err *e) {
    if (home->mapped) { t->data = ap_source_mapped(home->src) + t->offset; return AP_OK; }
    uint8_t *p = ap_alloc(t->bytes, 1);
    if (!p) return ap_no_memory(t->bytes, e);
    int rc = ap_source_read(home->src, t->offset, p, t->bytes, e);
    if (rc) ap_free(p);
    else t->data = t->own = p;
    return rc;
}

int ap_file_data(const ap_file *f, const ap_tensor *wanted, const uint8_t **data, ap_err *e) {
    const ap_file *home = wanted->part ? f->shard[wanted->part - 1] : f;
    ap_tensor *t = (ap_tensor *)(uintptr_t)wanted;      /* const for everybody else; the lock makes it safe */
    int rc = AP_OK;
    if (home->src) {
        ap_source_lock(home->src);
        if (!t->data) rc = file_fetch(home, t, e);
        ap_source_unlock(home->src);
    }
    *data = t->data;
    return rc;
}

/* --- shards ---------------------------------------------------------------------------------------------------------------------------- */

int ap_file_plain_name(ap_str s, int64_t at, ap_err *e) {
    char shown[132];
    ap_show(shown, s.p, s.n);
    int dots = (s.n == 1 && s.p[0] == '.') || (s.n == 2 && s.p[0] == '.' && s.p[1] == '.');
    if (s.n && s.n <= 255 && !dots && !memchr(s.p, '/', s.n) && !memchr(s.p, '\\', s.n) && !memchr(s.p, 0, s.n)) return AP_OK;
    return ap_fail_at(e, AP_PATH, at, shown, "the file name '%s' is not a plain name: files of a model lie side by side in one folder", shown);
}

static int file_shard_read(ap_file *s, ap_err *e) {
    AP_TRY(ap_source_open_link(&s->src, s->path, e));
    AP_TRY(file_load(s, e));
    return file_parse(s, e);
}

/* What goes wrong inside a shard is told with its name. */
static int file_shard_fails(int rc, ap_str name, ap_err *e) {
    char shown[132], why[sizeof e->msg];
    memcpy(why, e->msg, sizeof why);
    snprintf(e->msg, sizeof e->msg, "%s: %.*s", ap_show(shown, name.p, name.n), (int)(sizeof e->msg - sizeof shown - 3), why);
    return rc;
}

int ap_file_open_shard(ap_file *f, ap_str name, ap_err *e) {
    char plain[256], shown[132];
    AP_TRY(ap_file_plain_name(name, -1, e));
    ap_show(shown, name.p, name.n);
    snprintf(plain, sizeof plain, "%.*s", (int)name.n, name.p);
    if (!f->path) return ap_fail_at(e, AP_MISSING, -1, shown, "a model in several files cannot be read from memory: '%s' is missing", shown);
    ap_file *s = ap_alloc(1, sizeof *s), **more = ap_grow(f->shard, (uint64_t)f->nshard, (uint64_t)f->nshard + 1, sizeof *more);
    if (more) f->shard = more;
    if (!s || !more) { ap_free(s); return ap_no_memory(sizeof *s, e); }
    f->shard[f->nshard++] = s;
    const char *slash = strrchr(f->path, '/');
    s->is_shard = 1;
    s->mapped = f->mapped;
    s->kind = f->kind;
    s->path = ap_path_join(f->path, slash ? (size_t)(slash - f->path) + 1 : 0, plain);
    int rc = s->path ? file_shard_read(s, e) : ap_no_memory(strlen(f->path), e);
    return rc ? file_shard_fails(rc, name, e) : AP_OK;
}

int ap_file_adopt(ap_file *f, ap_err *e) {
    uint64_t total = (uint64_t)f->nt;
    for (int i = 0; i < f->nshard; i++) total += (uint64_t)f->shard[i]->nt;
    if (total > AP_LIMIT_TENSORS) return ap_fail(e, AP_LIMIT, "the files hold %llu tensors, at most %u are read", (unsigned long long)total, (unsigned)AP_LIMIT_TENSORS);
    ap_tensor *all = ap_grow(f->t, (uint64_t)f->nt, total, sizeof *all);
    if (!all) return ap_no_memory(total * sizeof *all, e);
    f->t = all;
    for (int i = 0; i < f->nshard; i++)
        for (int k = 0; k < f->shard[i]->nt; k++) {
            all[f->nt] = f->shard[i]->t[k];
            all[f->nt++].part = i + 1;
        }
    ap_free(f->by_name);
    f->by_name = NULL;
    return ap_file_index(f, e);
}

void ap_file_note(ap_file *f, const char *fmt, ...) {
    if (f->nnotes == AP_NOTES) return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->note[f->nnotes++], AP_NOTE, fmt, ap);
    va_end(ap);
}

/* --------------------------------------------------------------------------------------------------------------------------------------- */

static int file_done(ap_file **out, ap_file *f, int rc) {
    if (rc) ap_file_close(f);
    else *out = f;
    return rc;
}

static int file_open(ap_file *f, const char *path, ap_err *e) {
    if (ap_is_folder(path)) AP_TRY(file_in_folder(path, &f->path, e));
    else if (!(f->path = ap_path_join("", 0, path))) return ap_no_memory(strlen(path), e);
    AP_TRY(ap_source_open(&f->src, f->path, e));
    AP_TRY(file_load(f, e));
    return file_parse(f, e);
}

int ap_file_same(const ap_file *f, ap_err *e) {
    if (f->mapped) AP_TRY(ap_source_same(f->src, e));
    for (int i = 0; i < f->nshard; i++) AP_TRY(ap_file_same(f->shard[i], e));
    return AP_OK;
}

int ap_file_open(ap_file **out, const char *path, int mapped, ap_err *e) {
    *out = NULL;
    ap_file *f = ap_alloc(1, sizeof *f);
    if (f) f->mapped = mapped;
    return f ? file_done(out, f, file_open(f, path, e)) : ap_no_memory(sizeof *f, e);
}

static void *file_copy(const void *p, uint64_t n) {
    uint64_t room;
    void *q = ap_add_ok(n, 1, &room) ? ap_alloc(room, 1) : NULL;
    if (q && n) memcpy(q, p, (size_t)n);
    return q;
}

int ap_file_open_bytes(ap_file **out, const uint8_t *p, uint64_t n, const ap_container *kind, const char *config, uint64_t config_n, ap_err *e) {
    *out = NULL;
    ap_file *f = ap_alloc(1, sizeof *f);
    if (!f) return ap_no_memory(sizeof *f, e);
    f->kind = kind;
    f->p = file_copy(p, n);
    f->n = f->have = n;
    if (config) f->config = file_copy(config, config_n);
    f->config_n = config ? config_n : 0;
    if (!f->p || (config && !f->config)) return file_done(out, f, ap_no_memory(n, e));
    return file_done(out, f, file_parse(f, e));
}

int ap_file_verify(const ap_file *f, int *checked, ap_err *e) {
    *checked = 0;
    return f->kind->verify ? f->kind->verify(f, checked, e) : AP_OK;
}

void ap_file_close(ap_file *f) {
    if (!f) return;
    for (int i = 0; i < f->nt; i++) ap_free(f->t[i].own);
    for (int i = 0; i < f->nshard; i++) ap_file_close(f->shard[i]);
    file_forget(f);
    ap_source_close(f->src);
    ap_free(f->shard);
    ap_free(f->path);
    ap_free((void *)f->p);                      /* const for everybody else */
    ap_free(f->config);
    ap_free(f);
}

/* --- lookups --------------------------------------------------------------------------------------------------------------------------- */

static int file_order(ap_str a, ap_str b) {
    uint64_t n = a.n < b.n ? a.n : b.n;
    int d = n ? memcmp(a.p, b.p, (size_t)n) : 0;
    return d ? d : (a.n > b.n) - (a.n < b.n);
}

const ap_tensor *ap_file_tensor(const ap_file *f, ap_str name) {
    int lo = 0, hi = f->nt;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, d = file_order(name, f->t[f->by_name[mid]].name);
        if (!d) return &f->t[f->by_name[mid]];
        if (d < 0) hi = mid;
        else lo = mid + 1;
    }
    return NULL;
}

const ap_kv *ap_file_kv(const ap_file *f, const char *key) {
    for (int i = 0; i < f->nkv; i++) if (ap_str_is(f->kv[i].key, key)) return &f->kv[i];
    return NULL;
}

/* --- for the parsers ------------------------------------------------------------------------------------------------------------------- */

void *ap_file_room(void *rows, int n, uint64_t *cap, uint64_t size) {
    if ((uint64_t)n < *cap) return rows;
    uint64_t want = *cap ? *cap * 2 : 64;       /* cap counts rows in memory: it cannot be near 2^63 */
    void *more = ap_grow(rows, *cap, want, size);
    if (more) *cap = want;
    return more;
}

typedef struct { const char *rows; size_t stride; } file_rows;

static ap_str file_name(const file_rows *r, int i) {
    ap_str s;
    memcpy(&s, r->rows + (size_t)i * r->stride, sizeof s);
    return s;
}

static int file_compare(const void *a, const void *b, void *ctx) {
    int i, j;
    memcpy(&i, a, sizeof i);
    memcpy(&j, b, sizeof j);
    int d = file_order(file_name(ctx, i), file_name(ctx, j));
    return d ? d : (i > j) - (i < j);           /* equal names in their order, so that the second one is the one reported */
}

int ap_file_twice(const void *rows, int n, size_t stride, int *order) {
    file_rows r = { rows, stride };
    for (int i = 0; i < n; i++) order[i] = i;
    qsort_r(order, (size_t)n, sizeof *order, file_compare, &r);
    for (int i = 1; i < n; i++) if (!file_order(file_name(&r, order[i - 1]), file_name(&r, order[i]))) return i;
    return 0;
}

static int file_refuse_twice(const ap_file *f, const char *what, ap_str s, ap_err *e) {
    char shown[132];
    ap_show(shown, s.p, s.n);
    const uint8_t *at = (const uint8_t *)s.p;
    int inside = at >= f->p && at < f->p + f->n;
    return ap_fail_at(e, AP_DUPLICATE, inside ? (int64_t)(at - f->p) : -1, shown, "the %s '%s' is there twice", what, shown);
}

int ap_file_reserve(ap_file *f, uint64_t tensors, uint64_t dims, ap_err *e) {
    f->t = ap_alloc(tensors, sizeof *f->t);
    f->dims = ap_alloc(dims, sizeof *f->dims);
    return f->t && f->dims ? AP_OK : ap_fail(e, AP_MEMORY, "no memory for %llu tensors", (unsigned long long)tensors);
}

void ap_file_keep(ap_file *f, const ap_tensor *t) {
    ap_tensor *kept = &f->t[f->nt++];
    *kept = *t;
    kept->dim = f->dims + f->ndims;
    for (int i = 0; i < t->nd; i++) f->dims[f->ndims++] = t->dim[i];
}

int ap_file_index(ap_file *f, ap_err *e) {
    int *order = ap_alloc((uint64_t)f->nkv, sizeof *order);
    if (!order) return ap_no_memory((uint64_t)f->nkv * sizeof *order, e);
    int key = ap_file_twice(f->kv, f->nkv, sizeof *f->kv, order), rc = AP_OK;
    if (key) rc = file_refuse_twice(f, "key", f->kv[order[key]].key, e);
    ap_free(order);
    if (rc) return rc;
    f->by_name = ap_alloc((uint64_t)f->nt, sizeof *f->by_name);
    if (!f->by_name) return ap_no_memory((uint64_t)f->nt * sizeof *f->by_name, e);
    int name = ap_file_twice(f->t, f->nt, sizeof *f->t, f->by_name);
    return name ? file_refuse_twice(f, "tensor", f->t[f->by_name[name]].name, e) : AP_OK;
}

/* C0, DEL and C1: nothing that a terminal would obey. */
static int file_has_control(ap_str s) {
    for (uint64_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (c < 0x20 || c == 0x7f || (c == 0xC2 && i + 1 < s.n && (unsigned char)s.p[i + 1] < 0xA0)) return 1;
    }
    return 0;
}

int ap_file_name_ok(ap_str s, uint64_t max, const char *what, int64_t at, ap_err *e) {
    char shown[132];
    ap_show(shown, s.p, s.n);
    if (!s.n) return ap_fail_at(e, AP_NAME, at, NULL, "an empty %s name", what);
    if (s.n > max) return ap_fail_at(e, AP_NAME, at, shown, "a %s name of %llu bytes, at most %llu are allowed", what, (unsigned long long)s.n, (unsigned long long)max);
    if (!ap_utf8_ok(s.p, s.n)) return ap_fail_at(e, AP_UTF8, at, shown, "the %s name '%s' is not UTF-8", what, shown);
    if (file_has_control(s)) return ap_fail_at(e, AP_NAME, at, shown, "the %s name '%s' has control characters", what, shown);
    return AP_OK;
}

/* Blocks that run on over the ends of rows, or rows that end in a block that is not full: what APR has and GGUF has not. */
int ap_file_packed_bytes(ap_tensor *t, int64_t at, ap_err *e) {
    char shown[132];
    uint64_t rows = 1, cols = t->nd ? (uint64_t)t->dim[t->nd - 1] : 1, values, blocks, bytes;
    int fits = 1, empty = !cols;
    for (int i = 0; i + 1 < t->nd; i++) {
        empty |= !t->dim[i];
        fits = fits && ap_mul_ok(rows, t->dim[i] ? (uint64_t)t->dim[i] : 1, &rows);
    }
    uint64_t block = (uint64_t)t->fmt->block, size = (uint64_t)t->fmt->bytes;
    fits = fits && ap_mul_ok(rows, cols ? cols : 1, &values) && values <= INT64_MAX && ap_add_ok(values, block - 1, &blocks);
    if (fits && t->fmt->packing == AP_PACK_ROWS) fits = ap_mul_ok(rows, (cols + block - 1) / block, &blocks);
    else blocks = fits ? blocks / block : 0;
    if (!fits || !ap_mul_ok(blocks, size, &bytes) || bytes > INT64_MAX - 64)
        return ap_fail_at(e, AP_SHAPE, at, ap_show(shown, t->name.p, t->name.n), "the shape of tensor '%s' has more than 2^63 bytes", shown);
    t->bytes = empty ? 0 : bytes + (t->fmt->packing == AP_PACK_WHOLE ? sizeof(float) : 0);
    return AP_OK;
}

/* Zeros count as ones while we multiply, so that whether a shape overflows does not depend on where its zero stands.  The product with the block's
** bytes is formed before it is divided, as ggml does it: a shape that any reader's arithmetic would wrap is refused here. */
int ap_file_tensor_bytes(ap_tensor *t, int64_t at, ap_err *e) {
    char shown[132];
    uint64_t values = 1, scaled;
    int empty = 0, fits = 1;
    ap_show(shown, t->name.p, t->name.n);
    for (int i = 0; i < t->nd; i++) {
        empty |= !t->dim[i];
        fits = fits && ap_mul_ok(values, t->dim[i] ? (uint64_t)t->dim[i] : 1, &values);
    }
    if (!fits || !ap_mul_ok(values, (uint64_t)t->fmt->bytes, &scaled) || values > INT64_MAX || scaled > INT64_MAX)
        return ap_fail_at(e, AP_SHAPE, at, shown, "the shape of tensor '%s' has more than 2^63 bytes", shown);
    int64_t inner = t->nd ? t->dim[t->nd - 1] : 1;
    if (inner % t->fmt->block)
        return ap_fail_at(e, AP_BLOCK, at, shown, "tensor '%s' has rows of %lld values, %s stores them in blocks of %d", shown, (long long)inner, t->fmt->name, t->fmt->block);
    t->bytes = empty ? 0 : scaled / (uint64_t)t->fmt->block;
    return AP_OK;
}
