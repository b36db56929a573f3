/*
** file.c: a path becomes bytes that we own, a container that understands them, and lookups; several files of one model become one.  It refuses what is not a
** regular file, what changes while it is read, names inside files that lead out of the folder, and bytes that no row of containers.def claims; it never
** interprets a byte itself.  plan/model.c and py/file.c open and look up here; the
** parsers use the helpers at the end.
*/
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "../base/mem.h"
#include "../base/num.h"
#include "file.h"

#define C(name, verify) int ap_##name##_sniff(const uint8_t *p, uint64_t n); int ap_##name##_parse(ap_file *f, ap_err *e);
#include "containers.def"
int ap_apr_verify(const ap_file *f, int *checked, ap_err *e);
const ap_container ap_containers[] = {
#define C(name, verify) { #name, ap_##name##_sniff, ap_##name##_parse, verify },
#include "containers.def"
};
const int ap_containers_n = sizeof ap_containers / sizeof *ap_containers;

/* --- bytes ----------------------------------------------------------------------------------------------------------------------------- */

static int file_memory(uint64_t bytes, ap_err *e) { return ap_fail(e, AP_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes); }

/* %m is errno in words; unlike strerror it needs no shared buffer. */
static int file_io(const char *doing, const char *path, ap_err *e) {
    char shown[132];
    int sys = errno;
    ap_show(shown, path, strlen(path));
    errno = sys;
    e->sys = sys;
    return ap_fail(e, AP_IO, "cannot %s '%s': %m", doing, shown);
}

/* O_NONBLOCK so that a FIFO opens at once and can be refused; it means nothing for regular files. */
static int file_descriptor(const char *path, int *fd, struct stat *st, ap_err *e) {
    do *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); while (*fd < 0 && errno == EINTR);
    if (*fd < 0) return file_io("open", path, e);
    if (!fstat(*fd, st)) return AP_OK;
    int rc = file_io("look at", path, e);
    close(*fd);
    return rc;
}

static int file_same(const struct stat *a, const struct stat *b) {
    return a->st_size == b->st_size && a->st_ino == b->st_ino && a->st_dev == b->st_dev
        && a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

typedef struct { uint8_t *p; uint64_t n; } file_buf;

static int file_fill(int fd, const char *path, file_buf b, ap_err *e) {
    enum { PIECE = 1 << 30 };                   /* Linux reads at most 0x7ffff000 bytes in one call */
    for (uint64_t got = 0; got < b.n; ) {
        ssize_t k = pread(fd, b.p + got, (size_t)(b.n - got < PIECE ? b.n - got : PIECE), (off_t)got);
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) return file_io("read", path, e);
        if (k == 0) return ap_fail_at(e, AP_CHANGED, (int64_t)got, NULL, "the file shrank from %llu to %llu bytes while it was read", (unsigned long long)b.n, (unsigned long long)got);
        got += (uint64_t)k;
    }
    return AP_OK;
}

/* The whole of fd, with a zero byte after it; st is what fstat said before. */
static int file_bytes(int fd, const struct stat *st, const char *path, uint64_t limit, file_buf *out, ap_err *e) {
    char shown[132];
    struct stat after;
    file_buf b = { NULL, (uint64_t)st->st_size };
    uint64_t room;
    ap_show(shown, path, strlen(path));
    if (!S_ISREG(st->st_mode)) return ap_fail(e, AP_NOT_REGULAR, "'%s' is not a regular file", shown);
    if (b.n > limit) return ap_fail(e, AP_LIMIT, "'%s' has %llu bytes, at most %llu are read", shown, (unsigned long long)b.n, (unsigned long long)limit);
    if (!ap_add_ok(b.n, 1, &room) || !(b.p = ap_alloc(room, 1))) return file_memory(b.n, e);
    int rc = file_fill(fd, path, b, e);
    if (!rc && fstat(fd, &after)) rc = file_io("look at", path, e);
    if (!rc && !file_same(st, &after)) rc = ap_fail(e, AP_CHANGED, "'%s' was written to while it was read", shown);
    if (rc) ap_free(b.p);
    else *out = b;
    return rc;
}

static int file_read(const char *path, uint64_t limit, file_buf *out, ap_err *e) {
    struct stat st;
    int fd;
    AP_TRY(file_descriptor(path, &fd, &st, e));
    int rc = file_bytes(fd, &st, path, limit, out, e);
    close(fd);
    return rc;
}

int ap_file_read_whole(const char *path, uint64_t limit, uint8_t **p, uint64_t *n, ap_err *e) {
    file_buf b = { NULL, 0 };
    AP_TRY(file_read(path, limit, &b, e));
    *p = b.p;
    *n = b.n;
    return AP_OK;
}

/* The first n bytes of folder, a slash if it lacks one, and a name: the caller's to free, NULL without memory. */
static char *file_join(const char *folder, size_t n, const char *name) {
    size_t m = strlen(name), slash = n && folder[n - 1] != '/';
    char *path = ap_alloc(n + slash + m + 1, 1);
    if (!path) return NULL;
    memcpy(path, folder, n);
    if (slash) path[n] = '/';
    memcpy(path + n + slash, name, m);
    return path;
}

/* --- opening --------------------------------------------------------------------------------------------------------------------------- */

/* What a folder stands for, in this order. */
static const char *const file_models[] = { "model.safetensors", "model.safetensors.index.json" };

/* The path of the model in a folder: *path is the caller's to free. */
static int file_in_folder(const char *folder, char **path, ap_err *e) {
    char shown[132];
    for (size_t i = 0; i < sizeof file_models / sizeof *file_models; i++) {
        if (!(*path = file_join(folder, strlen(folder), file_models[i]))) return file_memory(strlen(folder), e);
        if (!access(*path, F_OK) || errno != ENOENT) return AP_OK;
        ap_free(*path);
        *path = NULL;
    }
    e->sys = ENOENT;
    return ap_fail(e, AP_IO, "no model.safetensors and no model.safetensors.index.json in the folder '%s' (a GGUF or APR file is opened by its own path)",
                   ap_show(shown, folder, strlen(folder)));
}

/* Sets f->path and reads the model's bytes. */
static int file_load(ap_file *f, const char *path, ap_err *e) {
    struct stat st;
    file_buf b = { NULL, 0 };
    int fd, rc = AP_OK;
    AP_TRY(file_descriptor(path, &fd, &st, e));
    int folder = S_ISDIR(st.st_mode);
    if (folder) rc = file_in_folder(path, &f->path, e);
    else if (!(f->path = file_join("", 0, path))) rc = file_memory(strlen(path), e);
    else rc = file_bytes(fd, &st, path, UINT64_MAX, &b, e);
    close(fd);
    if (!rc && folder) rc = file_read(f->path, UINT64_MAX, &b, e);
    f->p = b.p;
    f->n = b.n;
    return rc;
}

int ap_file_beside(const ap_file *f, const char *name, char **p, uint64_t *n, ap_err *e) {
    file_buf b = { NULL, 0 };
    if (!f->path) return AP_OK;                 /* opened from memory: it stands beside nothing */
    const char *slash = strrchr(f->path, '/');
    char *path = file_join(f->path, slash ? (size_t)(slash - f->path) + 1 : 0, name);
    if (!path) return file_memory(strlen(f->path), e);
    int rc = access(path, F_OK) && errno == ENOENT ? AP_OK : file_read(path, AP_LIMIT_HEADER, &b, e);
    ap_free(path);
    *p = (char *)b.p;
    *n = b.n;
    return rc;
}

static int file_begins(const ap_file *f, const char *z) { return f->n >= strlen(z) && !memcmp(f->p, z, strlen(z)); }

/* The bytes decide; when no container knows them the name does, so that a damaged file is told what is damaged. */
static int file_kind(ap_file *f, ap_err *e) {
    char shown[132];
    if (file_begins(f, "version https://git-lfs"))
        return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "this is a Git LFS pointer of %llu bytes, not the model: fetch it with 'git lfs pull'", (unsigned long long)f->n);
    for (int i = 0; i < ap_containers_n; i++)
        if (ap_containers[i].sniff(f->p, f->n)) { f->kind = &ap_containers[i]; return AP_OK; }
    const char *dot = f->path ? strrchr(f->path, '.') : NULL;
    for (int i = 0; dot && i < ap_containers_n; i++)
        if (!strcmp(dot + 1, ap_containers[i].name)) { f->kind = &ap_containers[i]; return AP_OK; }
    if (f->n < 8) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "%llu bytes are no model file", (unsigned long long)f->n);
    return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the file begins with '%s', which is none of:"
#define C(name, verify) " " #name
#include "containers.def"
        , ap_show(shown, (const char *)f->p, 8));
}

static int file_parse(ap_file *f, ap_err *e) {
    if (!f->kind) AP_TRY(file_kind(f, e));
    return f->kind->parse(f, e);
}

/* --- shards ---------------------------------------------------------------------------------------------------------------------------- */

int ap_file_plain_name(ap_str s, int64_t at, ap_err *e) {
    char shown[132];
    ap_show(shown, s.p, s.n);
    int dots = (s.n == 1 && s.p[0] == '.') || (s.n == 2 && s.p[0] == '.' && s.p[1] == '.');
    if (s.n && s.n <= 255 && !dots && !memchr(s.p, '/', s.n) && !memchr(s.p, '\\', s.n) && !memchr(s.p, 0, s.n)) return AP_OK;
    return ap_fail_at(e, AP_PATH, at, shown, "the file name '%s' is not a plain name: files of a model lie side by side in one folder", shown);
}

/* The cache of the Hugging Face hub keeps each file as ../../blobs/<hash>: the one symbolic link that is followed, and only to a plain name there. */
static int file_hub_blob(const char *link) {
    static const char blobs[] = "../../blobs/";
    const char *name = link + sizeof blobs - 1;
    return !strncmp(link, blobs, sizeof blobs - 1) && *name && !strchr(name, '/') && name[0] != '.';
}

static int file_shard_descriptor(const char *path, int *fd, ap_err *e) {
    char link[512], shown[132];
    const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW;
    ap_show(shown, path, strlen(path));
    do *fd = open(path, flags); while (*fd < 0 && errno == EINTR);
    if (*fd >= 0) return AP_OK;
    if (errno == ENOENT) return ap_fail_at(e, AP_MISSING, -1, shown, "the file '%s' of this model is missing", shown);
    if (errno != ELOOP) return file_io("open", path, e);
    ssize_t n = readlink(path, link, sizeof link - 1);
    link[n < 0 ? 0 : n] = 0;
    if (!file_hub_blob(link)) return ap_fail_at(e, AP_PATH, -1, shown, "'%s' is a symbolic link, which is not followed: it may lead out of the folder", shown);
    const char *slash = strrchr(path, '/');
    char *blob = file_join(path, slash ? (size_t)(slash - path) + 1 : 0, link);
    if (!blob) return file_memory(sizeof link, e);
    do *fd = open(blob, flags); while (*fd < 0 && errno == EINTR);
    int rc = *fd < 0 ? file_io("open", blob, e) : AP_OK;
    ap_free(blob);
    return rc;
}

static int file_shard_read(ap_file *s, ap_err *e) {
    struct stat st;
    file_buf b = { NULL, 0 };
    int fd;
    AP_TRY(file_shard_descriptor(s->path, &fd, e));
    int rc = fstat(fd, &st) ? file_io("look at", s->path, e) : file_bytes(fd, &st, s->path, UINT64_MAX, &b, e);
    close(fd);
    s->p = b.p;
    s->n = b.n;
    return rc ? rc : file_parse(s, e);
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
    if (!s || !more) { ap_free(s); return file_memory(sizeof *s, e); }
    f->shard[f->nshard++] = s;
    const char *slash = strrchr(f->path, '/');
    s->is_shard = 1;
    s->kind = f->kind;
    s->path = file_join(f->path, slash ? (size_t)(slash - f->path) + 1 : 0, plain);
    int rc = s->path ? file_shard_read(s, e) : file_memory(strlen(f->path), e);
    return rc ? file_shard_fails(rc, name, e) : AP_OK;
}

int ap_file_adopt(ap_file *f, ap_err *e) {
    uint64_t total = (uint64_t)f->nt;
    for (int i = 0; i < f->nshard; i++) total += (uint64_t)f->shard[i]->nt;
    if (total > AP_LIMIT_TENSORS) return ap_fail(e, AP_LIMIT, "the files hold %llu tensors, at most %u are read", (unsigned long long)total, (unsigned)AP_LIMIT_TENSORS);
    ap_tensor *all = ap_grow(f->t, (uint64_t)f->nt, total, sizeof *all);
    if (!all) return file_memory(total * sizeof *all, e);
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

int ap_file_open(ap_file **out, const char *path, ap_err *e) {
    *out = NULL;
    ap_file *f = ap_alloc(1, sizeof *f);
    if (!f) return file_memory(sizeof *f, e);
    int rc = file_load(f, path, e);
    return file_done(out, f, rc ? rc : file_parse(f, e));
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
    if (!f) return file_memory(sizeof *f, e);
    f->kind = kind;
    f->p = file_copy(p, n);
    f->n = n;
    if (config) f->config = file_copy(config, config_n);
    f->config_n = config ? config_n : 0;
    if (!f->p || (config && !f->config)) return file_done(out, f, file_memory(n, e));
    return file_done(out, f, file_parse(f, e));
}

int ap_file_verify(const ap_file *f, int *checked, ap_err *e) {
    *checked = 0;
    return f->kind->verify ? f->kind->verify(f, checked, e) : AP_OK;
}

void ap_file_close(ap_file *f) {
    if (!f) return;
    for (int i = 0; i < f->nshard; i++) ap_file_close(f->shard[i]);
    ap_free(f->shard);
    ap_free(f->path);
    ap_free((void *)f->p);                      /* const for everybody else */
    ap_free(f->config);
    ap_free(f->text);
    ap_free(f->kv_text);
    ap_free(f->t);
    ap_free(f->kv);
    ap_free(f->by_name);
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

int ap_file_index(ap_file *f, ap_err *e) {
    int *order = ap_alloc((uint64_t)f->nkv, sizeof *order);
    if (!order) return file_memory((uint64_t)f->nkv * sizeof *order, e);
    int key = ap_file_twice(f->kv, f->nkv, sizeof *f->kv, order), rc = AP_OK;
    if (key) rc = file_refuse_twice(f, "key", f->kv[order[key]].key, e);
    ap_free(order);
    if (rc) return rc;
    f->by_name = ap_alloc((uint64_t)f->nt, sizeof *f->by_name);
    if (!f->by_name) return file_memory((uint64_t)f->nt * sizeof *f->by_name, e);
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
