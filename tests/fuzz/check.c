/*
** check.c: the promises of check.h.  It owns the allocator under csrc/base/mem.c (mem.c is compiled with calloc renamed to check_calloc), so that a block
** ends where its last byte ends and AddressSanitizer sees the first byte read beyond it, and so that the peak is known without a counter in the product.
*/
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"

void check_broken(const char *file, int line, const char *cond, const char *fmt, ...) {
    va_list ap;
    fprintf(stderr, "%s:%d: broken promise: %s: ", file, line, cond);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    abort();
}

/* --- memory ---------------------------------------------------------------------------------------------------------------------------- */

enum { CACHE_LINE = 64, HEADER = 2 * CACHE_LINE };
static uint64_t check_peak;                     /* most bytes asked for at one time since it was last set */

void *check_calloc(size_t count, size_t size);
void *check_calloc(size_t count, size_t size) {
    size_t bytes = count * size;                /* mem.c has multiplied them already: count is 1 */
    void *p = NULL;
    uint64_t now = ap_mem_live() + bytes - HEADER;
    if (now > check_peak) check_peak = now;     /* also when it is refused below: an absurd request is the fault, not its refusal */
    if (bytes > (size_t)1 << 31 || posix_memalign(&p, CACHE_LINE, bytes)) return NULL;
    return memset(p, 0, bytes);
}

/* --- errors ---------------------------------------------------------------------------------------------------------------------------- */

static void check_plain(const char *s, size_t room, const char *what, int need) {
    size_t n = strnlen(s, room);
    CHECK(n < room, "%s does not end", what);
    CHECK(n || !need, "an empty %s", what);
    for (size_t i = 0; i < n; i++) CHECK((unsigned char)s[i] >= 0x20 && (unsigned char)s[i] < 0x7f, "byte %d in the %s '%s'", (unsigned char)s[i], what, s);
}

static void check_error(int rc, const ap_err *e) {
    if (!rc) return;
    CHECK(rc == e->kind, "returned %d, says %d", rc, e->kind);
    CHECK(rc > 0 && rc < AP_ERR_N, "kind %d is none of errors.def", rc);
    check_plain(e->msg, sizeof e->msg, "message", 1);
    check_plain(e->field, sizeof e->field, "field", 0);
    CHECK(e->at >= -1, "offset %lld", (long long)e->at);
}

/* --- an action ------------------------------------------------------------------------------------------------------------------------- */

static uint64_t check_hash(const check_input *in) {
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < in->n; i++) h = (h ^ in->p[i]) * 1099511628211u;
    for (size_t i = 0; i < in->config_n; i++) h = (h ^ (unsigned char)in->config[i]) * 1099511628211u;
    return h ^ h >> 29;
}

static int check_once(check_fn fn, const check_input *in, int64_t fail_at) {
    ap_err e = AP_ERR_INIT;
    uint64_t live = ap_mem_live();
    ap_mem_fail_at(fail_at);
    int rc = fn(in, &e);
    ap_mem_fail_at(-1);
    check_error(rc, &e);
    CHECK(ap_mem_live() == live, "%lld bytes were not given back (allocation %lld failed)", (long long)(ap_mem_live() - live), (long long)fail_at);
    CHECK(fail_at < 0 || rc == AP_MEMORY, "allocation %lld failed and the error was %s: %s", (long long)fail_at, ap_err_code(rc), e.msg);
    return rc;
}

void check_action(check_fn fn, const check_input *in) {
    static int sweep = -1;
    if (sweep < 0) sweep = getenv("CHECK_SWEEP") != NULL;
    uint64_t before = ap_mem_calls(), h = check_hash(in);
    check_once(fn, in, -1);
    uint64_t calls = ap_mem_calls() - before;
    if (sweep) for (uint64_t n = 1; n <= calls; n++) check_once(fn, in, (int64_t)n);
    else if (calls && h % 8 == 0) check_once(fn, in, (int64_t)(1 + (h >> 3) % calls));
}

/* --- files ----------------------------------------------------------------------------------------------------------------------------- */

const ap_container *check_container(const char *name) {
    for (int i = 0; i < ap_containers_n; i++) if (!strcmp(ap_containers[i].name, name)) return &ap_containers[i];
    return NULL;
}

/* Beside one copy of the file, memory is a fixed multiple of the bytes that were read, never of a number that they declare.  A GGUF entry of at least 14
** (25) bytes becomes a row of 64 (128).  In JSON a member takes 6 bytes, and its row, with the dotted key that it stands for, over 300. */
static uint64_t check_may(const check_input *in) {
    enum { FIXED = 32 << 10, GGUF_RATIO = 5, JSON_RATIO = 60 };
    uint64_t n = in->n + in->config_n, ratio = in->kind && !strcmp(in->kind->name, "gguf") ? GGUF_RATIO : JSON_RATIO;
    return n + ratio * n + FIXED;
}

int check_open(ap_file **f, const check_input *in, ap_err *e) {
    uint64_t live = ap_mem_live();
    check_peak = live;
    *f = (ap_file *)(void *)f;                  /* anything but NULL: a failed open must clear it */
    int rc = ap_file_open_bytes(f, in->p, in->n, in->kind, in->config, in->config_n, e);
    uint64_t peak = check_peak - live, may = check_may(in);
    CHECK(peak <= may, "%llu bytes of memory to open %zu + %zu bytes, at most %llu are promised", (unsigned long long)peak, in->n, in->config_n, (unsigned long long)may);
    CHECK(!rc == (*f != NULL), "returned %d and %s file", rc, *f ? "a" : "no");
    return rc;
}

/* Written for this check and not taken from cursor.c: decodes instead of matching ranges. */
static int check_utf8(ap_str s) {
    for (uint64_t i = 0; i < s.n; ) {
        unsigned char c = (unsigned char)s.p[i];
        int more = c < 0x80 ? 0 : c >> 5 == 6 ? 1 : c >> 4 == 14 ? 2 : c >> 3 == 30 ? 3 : -1;
        static const uint32_t least[4] = { 0, 0x80, 0x800, 0x10000 };
        if (more < 0 || i + (uint64_t)more >= s.n) return 0;
        uint32_t cp = more ? c & (0x3fu >> more) : c;
        for (int k = 1; k <= more; k++) {
            unsigned char d = (unsigned char)s.p[i + (uint64_t)k];
            if (d >> 6 != 2) return 0;
            cp = cp << 6 | (d & 63);
        }
        if (cp < least[more] || cp > 0x10ffff || (cp >= 0xd800 && cp <= 0xdfff)) return 0;
        i += 1 + (uint64_t)more;
    }
    return 1;
}

static int check_within(const void *p, uint64_t n, const void *base, uint64_t size) {
    const char *a = p, *b = base;
    return b && a >= b && (uint64_t)(a - b) <= size && n <= size - (uint64_t)(a - b);
}

static void check_text(const ap_file *f, ap_str s, const char *what) {
    int inside = check_within(s.p, s.n, f->p, f->have) || check_within(s.p, s.n, f->config, f->config_n) || check_within(s.p, s.n, f->text, f->text_n);
    CHECK(inside || f->kv_text || !s.n, "%s of %llu bytes lies in no memory of the file", what, (unsigned long long)s.n);
    CHECK(check_utf8(s), "%s is not UTF-8", what);
}

static void check_name(const ap_file *f, ap_str s, const char *what) {
    check_text(f, s, what);
    CHECK(s.n, "an empty %s", what);
    for (uint64_t i = 0; i < s.n; i++) CHECK((unsigned char)s.p[i] >= 0x20 && s.p[i] != 0x7f, "a control character in a %s", what);
}

/* The first and the last row go to a buffer of their exact size. */
static void check_rows(const ap_tensor *t, const uint8_t *data) {
    uint64_t rows = 1;
    int64_t cols = t->nd ? t->dim[t->nd - 1] : 1;
    if (!t->bytes || !t->fmt->decode || cols > 4096) return;
    for (int i = 0; i + 1 < t->nd; i++) rows *= (uint64_t)t->dim[i];
    float *out = malloc((size_t)cols * sizeof *out);
    if (!out) return;
    ap_format_row(t->fmt, data, cols, 0, out);
    ap_format_row(t->fmt, data, cols, (int64_t)rows - 1, out);
    free(out);
}

static int check_tensor(const ap_file *whole, const ap_tensor *t, ap_err *e) {
    CHECK(t->part >= 0 && t->part <= whole->nshard, "part %d of %d", t->part, whole->nshard);
    const ap_file *f = t->part ? whole->shard[t->part - 1] : whole;
    check_name(f, t->name, "tensor name");
    CHECK(t->name.n <= (strcmp(whole->kind->name, "gguf") ? 256 : 64), "a tensor name of %llu bytes", (unsigned long long)t->name.n);
    CHECK(t->fmt && t->nd >= 0 && t->nd <= AP_MAX_DIMS, "a tensor of no format or %d dimensions", t->nd);
    for (int i = 0; i < t->nd; i++) CHECK(t->dim[i] >= 0, "a dimension of %lld", (long long)t->dim[i]);
    CHECK(!t->bytes || (t->offset <= f->n && t->bytes <= f->n - t->offset), "the data of a tensor are outside the file");
    CHECK(ap_file_tensor(whole, t->name) == t, "a tensor is not found by its name");
    const uint8_t *data = NULL;
    int rc = ap_file_data(whole, t, &data, e);
    if (rc) return rc;
    int here = check_within(data, t->bytes, f->p, f->have);
    CHECK(here || data == t->own || f->mapped || !t->bytes, "the data of a tensor lie in no memory of the file");
    CHECK(!here || !t->bytes || t->offset == (uint64_t)(data - f->p), "offset %llu, data at %lld", (unsigned long long)t->offset, (long long)(data - f->p));
    check_rows(t, data);
    return AP_OK;
}

/* Elements of an array: the index says that they can be walked without a look at the end. */
static void check_array(const ap_file *f, const ap_kv *kv) {
    static const uint8_t width[13] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    uint64_t at = 0;
    CHECK(kv->raw_type < sizeof width, "elements of type %u", (unsigned)kv->raw_type);
    unsigned bytes = width[kv->raw_type];
    if (bytes) CHECK(kv->s.n % bytes == 0 && kv->s.n / bytes == kv->n, "%llu elements of %u bytes in %llu", (unsigned long long)kv->n, bytes, (unsigned long long)kv->s.n);
    if (kv->elem != AP_V_STR || !kv->n) return;
    for (uint64_t i = 0; i < kv->n; i++) {
        uint64_t n;
        CHECK(kv->s.n - at >= sizeof n, "an array of strings ends before its element %llu", (unsigned long long)i);
        memcpy(&n, kv->s.p + at, sizeof n);
        at += sizeof n;
        CHECK(n <= kv->s.n - at, "element %llu of an array of strings is longer than the array", (unsigned long long)i);
        check_text(f, (ap_str){ kv->s.p + at, n }, "an element");
        at += n;
    }
    CHECK(at == kv->s.n, "%llu bytes after the last element of an array", (unsigned long long)(kv->s.n - at));
}

static void check_kv(const ap_file *f, const ap_kv *kv) {
    char key[256];
    check_name(f, kv->key, "key");
    if (kv->kind == AP_V_STR || kv->kind == AP_V_JSON) check_text(f, kv->s, "a value");
    if (kv->kind == AP_V_ARR) {
        CHECK(check_within(kv->s.p, kv->s.n, f->p, f->have), "an array outside the file");
        check_array(f, kv);
    }
    if (kv->kind == AP_V_BOOL) CHECK(kv->v.b == 0 || kv->v.b == 1, "a bool of %d", kv->v.b);
    if (kv->key.n >= sizeof key) return;
    memcpy(key, kv->key.p, (size_t)kv->key.n);
    key[kv->key.n] = 0;
    CHECK(ap_file_kv(f, key) == kv, "the key '%s' is not found by its name", key);
}

int check_file(const ap_file *f, ap_err *e) {
    enum { SOME = 64 };                         /* of what is compared with everything else */
    int checked;
    ap_err quiet = AP_ERR_INIT;
    CHECK(f->kind && f->nt >= 0 && f->nkv >= 0, "%d tensors, %d keys", f->nt, f->nkv);
    for (int i = 0; i < f->nt; i++) AP_TRY(check_tensor(f, &f->t[i], e));
    for (int i = 0; i < f->nkv && i < SOME; i++) check_kv(f, &f->kv[i]);
    for (int i = 0; i < f->nt && i < SOME; i++)
        for (int j = 0; j < i; j++) {
            const ap_tensor *a = &f->t[i], *b = &f->t[j];
            CHECK(a->part != b->part || !a->bytes || !b->bytes || a->offset + a->bytes <= b->offset || b->offset + b->bytes <= a->offset, "two tensors share bytes");
        }
    for (int i = 0; i < f->nnotes; i++) check_plain(f->note[i], AP_NOTE, "note", 1);
    int rc = ap_file_verify(f, &checked, &quiet);
    check_error(rc, &quiet);
    CHECK(!rc || rc == AP_CHECKSUM || rc == AP_MEMORY, "verifying an open file: %s", quiet.msg);
    if (rc == AP_MEMORY) return *e = quiet, rc;
    CHECK(!ap_file_tensor(f, (ap_str){ "no such name \x01", 14 }) && !ap_file_kv(f, "no such key \x01"), "what is not there was found");
    return AP_OK;
}
