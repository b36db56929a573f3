/*
** apr.c: APR version 2: a header of 64 bytes with its own CRC, metadata as one JSON object, an index sorted by name, the tensors, and a CRC of everything.
** It refuses what is malformed, compressed, encrypted, stored by columns or spread over several files, and bytes that belong to nothing.  What other readers
** let pass and no number depends on (reserved bytes, a key twice, odd alignment) is noted.  file.c calls it through containers.def.
*/
#include <stdlib.h>
#include <string.h>
#include "../base/crc.h"
#include "../base/mem.h"
#include "../base/num.h"
#include "file.h"

enum { APR_HEADER = 64, APR_CRC_AT = 40, APR_RESERVED_AT = 44, APR_ALIGN = 64, APR_FOOTER = 4, APR_NAME = 256, APR_DIMS = 8 };
enum { APR_ENTRY_MIN = 2 + 1 + 1 + 8 + 8 };     /* name length, format, rank, offset, size: what makes a declared count believable */
enum { APR_LZ4 = 1, APR_ZSTD = 2, APR_ENCRYPTED = 4, APR_SHARDED = 16, APR_COLUMNS = 0x800, APR_FLAGS = 0xFFF };

typedef struct { uint16_t flags; uint32_t tensors, metadata_n; uint64_t metadata, index, data; } apr_head;

int ap_apr_sniff(const uint8_t *p, uint64_t n);
int ap_apr_parse(ap_file *f, ap_err *e);
int ap_apr_verify(const ap_file *f, int *checked, ap_err *e);

int ap_apr_sniff(const uint8_t *p, uint64_t n) { return n >= 4 && !memcmp(p, "APR", 3); }

/* --- header ---------------------------------------------------------------------------------------------------------------------------- */

static int apr_magic(const uint8_t *p, ap_err *e) {
    static const struct { char magic[5]; const char *is; } other[] = {
        { "APRN", "APR version 1, which holds no language model" }, { "APR1", "APR version 1, which holds no language model" },
        { "APR2", "an early APR version 2 without checksums; write it again with today's tools" },
        { "APRT", "a stage of a trace: compare it with aprender.diff" }, { "GGUF", "GGUF" },
    };
    char shown[132];
    if (!memcmp(p, "APR", 4)) return AP_OK;     /* the fourth byte is the terminating zero */
    for (size_t i = 0; i < sizeof other / sizeof *other; i++)
        if (!memcmp(p, other[i].magic, 4)) return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the magic is '%s': this is %s", other[i].magic, other[i].is);
    return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the magic is '%s', 'APR\\x00' was expected", ap_show(shown, (const char *)p, 4));
}

/* The field itself is left out, not zeroed. */
static uint32_t apr_header_crc(const uint8_t *p) {
    return ap_crc32(ap_crc32(0, p, APR_CRC_AT), p + APR_RESERVED_AT, APR_HEADER - APR_RESERVED_AT);
}

static int apr_flags(const apr_head *h, ap_err *e) {
    static const struct { int bit; const char *is; } refused[] = {
        { APR_LZ4, "compressed with LZ4" }, { APR_ZSTD, "compressed with Zstandard" }, { APR_ENCRYPTED, "encrypted" },
        { APR_COLUMNS, "stored by columns (LAYOUT-002 demands rows)" }, { APR_SHARDED, "one of several shards" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (h->flags & refused[i].bit) return ap_fail_at(e, AP_UNSUPPORTED, 6, "flags", "the file is %s (flags 0x%04x), which is not read", refused[i].is, (unsigned)h->flags);
    if (h->flags & ~APR_FLAGS) return ap_fail_at(e, AP_UNSUPPORTED, 6, "flags", "flags 0x%04x have bits that no version 2 defines", (unsigned)h->flags);
    return AP_OK;
}

static int apr_header(ap_file *f, apr_head *h, ap_err *e) {
    ap_cur c = { f->p, f->have, 4, f->n };
    uint8_t major, minor;
    uint32_t crc;
    if (f->n < APR_HEADER) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->n, NULL, "the file has %llu bytes, the header takes %d", (unsigned long long)f->n, (int)APR_HEADER);
    AP_TRY(apr_magic(f->p, e));
    if (!ap_u8(&c, &major) || !ap_u8(&c, &minor) || !ap_u16(&c, &h->flags) || !ap_u32(&c, &h->tensors) || !ap_u64(&c, &h->metadata) || !ap_u32(&c, &h->metadata_n)
        || !ap_u64(&c, &h->index) || !ap_u64(&c, &h->data) || !ap_u32(&c, &crc))
        return ap_fail_at(e, AP_TRUNCATED, (int64_t)c.pos, NULL, "the file ends inside the header");
    uint32_t found = apr_header_crc(f->p);
    if (found != crc) return ap_fail_at(e, AP_CHECKSUM, APR_CRC_AT, "header", "the header's CRC is %08x, it says %08x: the file is damaged", (unsigned)found, (unsigned)crc);
    if (major != 2 || minor != 0) return ap_fail_at(e, AP_BAD_VERSION, 4, NULL, "APR version %u.%u, only 2.0 is read", (unsigned)major, (unsigned)minor);
    f->version = major;
    AP_TRY(apr_flags(h, e));
    uint64_t most = (f->n - APR_HEADER) / APR_ENTRY_MIN;
    if (h->tensors > most) return ap_fail_at(e, AP_COUNT, 8, NULL, "%u tensors declared, the %llu bytes after the header hold at most %llu", (unsigned)h->tensors, (unsigned long long)(f->n - APR_HEADER), (unsigned long long)most);
    if (h->tensors > AP_LIMIT_TENSORS) return ap_fail_at(e, AP_LIMIT, 8, NULL, "%u tensors declared, at most %u are read", (unsigned)h->tensors, (unsigned)AP_LIMIT_TENSORS);
    for (int i = APR_RESERVED_AT; i < APR_HEADER; i++) if (f->p[i]) { ap_file_note(f, "reserved bytes of the header are not zero"); break; }
    return AP_OK;
}

/* The parts follow each other as header, metadata, index, data.  *end is that of the metadata. */
static int apr_places(const ap_file *f, const apr_head *h, uint64_t *end, ap_err *e) {
    unsigned long long n = f->n;
    if (!ap_add_ok(h->metadata, h->metadata_n, end) || *end > f->n)
        return ap_fail_at(e, AP_OFFSET, 12, "metadata_offset", "the metadata lie at %llu and have %u bytes, the file has %llu", (unsigned long long)h->metadata, (unsigned)h->metadata_n, n);
    if (h->metadata < APR_HEADER) return ap_fail_at(e, AP_OVERLAP, 12, "metadata_offset", "the metadata lie at %llu, inside the header of %d bytes", (unsigned long long)h->metadata, (int)APR_HEADER);
    if (h->metadata_n > AP_LIMIT_HEADER) return ap_fail_at(e, AP_LIMIT, 20, "metadata_size", "%u bytes of metadata, at most %u are read", (unsigned)h->metadata_n, (unsigned)AP_LIMIT_HEADER);
    if (h->index > f->n || h->index < APR_HEADER)
        return ap_fail_at(e, AP_OFFSET, 24, "tensor_index_offset", "the index lies at %llu, the file has %llu bytes and a header of %d", (unsigned long long)h->index, n, (int)APR_HEADER);
    if (h->index < *end) return ap_fail_at(e, AP_OVERLAP, 24, "tensor_index_offset", "the index lies at %llu, the metadata reach to %llu", (unsigned long long)h->index, (unsigned long long)*end);
    if (h->data <= f->n && h->data > f->have) return ap_fail_at(e, AP_TRUNCATED, (int64_t)f->have, NULL, "the index goes on");      /* file.c reads on */
    if (h->data > f->n || h->data < h->index)
        return ap_fail_at(e, AP_OFFSET, 32, "data_offset", "the data lie at %llu, the index at %llu, the file has %llu bytes", (unsigned long long)h->data, (unsigned long long)h->index, n);
    return AP_OK;
}

/* Bytes from..to may only be padding: less than `most` zeros. */
static int apr_padding(const ap_file *f, uint64_t from, uint64_t to, uint64_t most, const char *before, ap_err *e) {
    uint64_t odd = from;
    if (to - from < most) AP_TRY(ap_file_zeros(f, from, to, &odd, e));
    if (odd == to) return AP_OK;
    return ap_fail_at(e, AP_GAP, (int64_t)from, NULL, "%llu bytes before %s belong to nothing (fewer than %llu zeros may pad)", (unsigned long long)(to - from), before, (unsigned long long)most);
}

/* --- index ----------------------------------------------------------------------------------------------------------------------------- */

static int apr_short(const ap_cur *c, ap_err *e) { return ap_fail_at(e, AP_TRUNCATED, (int64_t)c->pos, NULL, "the index ends inside an entry, at byte %llu", (unsigned long long)c->pos); }

static int apr_dims(ap_cur *c, ap_tensor *t, int rank, const char *name, ap_err *e) {
    int64_t at = (int64_t)c->pos;
    if (rank > APR_DIMS) return ap_fail_at(e, AP_SHAPE, at, name, "tensor '%s' has %d dimensions, at most %d are allowed", name, rank, (int)APR_DIMS);
    for (t->nd = 0; t->nd < rank; t->nd++) {
        uint64_t d;
        if (!ap_u64(c, &d)) return apr_short(c, e);
        if (d > INT64_MAX) return ap_fail_at(e, AP_SHAPE, at, name, "tensor '%s' has a dimension of %llu", name, (unsigned long long)d);
        t->dim[t->nd] = (int64_t)d;
    }
    return AP_OK;
}

/* The writers sort the index, so that a reader may search it. */
static int apr_order(const ap_file *f, const ap_tensor *t, int64_t at, const char *name, ap_err *e) {
    if (!f->nt) return AP_OK;
    ap_str a = f->t[f->nt - 1].name, b = t->name;
    int d = memcmp(a.p, b.p, (size_t)(a.n < b.n ? a.n : b.n));
    if (d < 0 || (!d && a.n < b.n)) return AP_OK;
    if (!d && a.n == b.n) return ap_fail_at(e, AP_DUPLICATE, at, name, "the tensor '%s' is there twice", name);
    return ap_fail_at(e, AP_NAME, at, name, "the index is not sorted: '%s' comes after a larger name", name);
}

static int apr_entry(ap_file *f, ap_cur *c, ap_tensor *t, ap_err *e) {
    char name[132];
    int64_t at = (int64_t)c->pos;
    uint16_t n;
    uint8_t type, rank;
    uint64_t size;
    const uint8_t *p;
    if (!ap_u16(c, &n)) return apr_short(c, e);
    if (!ap_take(c, n, &p)) return ap_fail_at(e, AP_STRING, at, NULL, "a name of %u bytes declared, the index has %llu left", (unsigned)n, (unsigned long long)ap_left(c));
    t->name = (ap_str){ (const char *)p, n };
    AP_TRY(ap_file_name_ok(t->name, APR_NAME, "tensor", at, e));
    ap_show(name, t->name.p, t->name.n);
    AP_TRY(apr_order(f, t, at, name, e));
    if (!ap_u8(c, &type) || !ap_u8(c, &rank)) return apr_short(c, e);
    if (!(t->fmt = ap_format_by_apr(type))) return ap_fail_at(e, AP_TYPE, at, name, "tensor '%s' has the unknown dtype %u", name, (unsigned)type);
    AP_TRY(apr_dims(c, t, rank, name, e));
    if (!ap_u64(c, &t->offset) || !ap_u64(c, &size)) return apr_short(c, e);
    AP_TRY(ap_file_packed_bytes(t, at, e));
    if (t->bytes == size) return AP_OK;
    return ap_fail_at(e, AP_SIZE, at, name, "tensor '%s' has %llu bytes by its entry, %llu by its shape and dtype %s", name, (unsigned long long)size, (unsigned long long)t->bytes, t->fmt->name);
}

/* Looks ahead before it takes memory, as in gguf.c. */
static int apr_index(ap_file *f, const apr_head *h, ap_err *e) {
    ap_cur c = { f->p, h->data, h->index, f->n }, ahead = c;
    int64_t dim[APR_DIMS];
    uint64_t dims = 0;
    for (uint32_t i = 0; i < h->tensors; i++) {
        ap_tensor t = { .dim = dim };
        AP_TRY(apr_entry(f, &ahead, &t, e));
        dims += (uint64_t)t.nd;
    }
    AP_TRY(ap_file_reserve(f, h->tensors, dims, e));
    for (uint32_t i = 0; i < h->tensors; i++) {
        ap_tensor t = { .dim = dim };
        AP_TRY(apr_entry(f, &c, &t, e));
        ap_file_keep(f, &t);
    }
    return apr_padding(f, c.pos, h->data, APR_ALIGN, "the data", e);
}

/* --- data ------------------------------------------------------------------------------------------------------------------------------ */

static int apr_by_place(const void *a, const void *b) {
    const ap_tensor *x = *(ap_tensor *const *)a, *y = *(ap_tensor *const *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes != y->bytes ? x->bytes < y->bytes ? -1 : 1 : x < y ? -1 : 1;
}

static int apr_place(ap_file *f, ap_tensor *t, uint64_t data, ap_err *e) {
    char name[132];
    uint64_t at, end;
    ap_show(name, t->name.p, t->name.n);
    if (!ap_add_ok(data, t->offset, &at) || !ap_add_ok(at, t->bytes, &end) || end > f->n)
        return ap_fail_at(e, AP_OFFSET, -1, name, "tensor '%s' needs %llu bytes at offset %llu, the data section has %llu", name, (unsigned long long)t->bytes, (unsigned long long)t->offset, (unsigned long long)(f->n - data));
    if (t->offset % APR_ALIGN) ap_file_note(f, "tensor '%.100s' is not aligned to %d bytes", name, (int)APR_ALIGN);
    t->offset = at;
    if (!f->src) t->data = f->p + at;
    return AP_OK;
}

/* After the last tensor: padding, then the checksum, which early writers left out. */
static int apr_tail(ap_file *f, uint64_t end, ap_err *e) {
    uint64_t aligned;
    if (!ap_align_ok(end, APR_ALIGN, &aligned)) return ap_fail(e, AP_OFFSET, "the data section is too large");
    int footer = f->n == aligned + APR_FOOTER;
    if (!footer && f->n != aligned && f->n != end)
        return ap_fail_at(e, AP_GAP, (int64_t)end, NULL, "%llu bytes after the last tensor belong to nothing (padding to %d and %d bytes of checksum were expected)", (unsigned long long)(f->n - end), (int)APR_ALIGN, (int)APR_FOOTER);
    if (!footer) ap_file_note(f, "the file has no checksum at its end");
    return apr_padding(f, end, f->n - (footer ? APR_FOOTER : 0), APR_ALIGN, "the checksum", e);
}

static int apr_cover(ap_file *f, uint64_t data, ap_tensor **order, ap_err *e) {
    uint64_t next = data;
    char name[132];
    for (int i = 0; i < f->nt; i++) {
        const ap_tensor *t = order[i];
        if (!t->bytes) continue;
        ap_show(name, t->name.p, t->name.n);
        if (t->offset < next) return ap_fail_at(e, AP_OVERLAP, (int64_t)t->offset, name, "tensor '%s' begins at byte %llu, the one before it ends at %llu", name, (unsigned long long)t->offset, (unsigned long long)next);
        AP_TRY(apr_padding(f, next, t->offset, 2 * APR_ALIGN, name, e));
        next = t->offset + t->bytes;            /* inside the file: apr_place has seen to it */
    }
    return apr_tail(f, next, e);
}

static int apr_data(ap_file *f, const apr_head *h, ap_err *e) {
    for (int i = 0; i < f->nt; i++) AP_TRY(apr_place(f, &f->t[i], h->data, e));
    ap_tensor **order = ap_alloc((uint64_t)f->nt, sizeof *order);
    if (!order) return ap_fail(e, AP_MEMORY, "no memory for the index of the file");
    for (int i = 0; i < f->nt; i++) order[i] = &f->t[i];
    if (f->nt) qsort(order, (size_t)f->nt, sizeof *order, apr_by_place);
    int rc = apr_cover(f, h->data, order, e);
    ap_free(order);
    return rc;
}

/* --- metadata -------------------------------------------------------------------------------------------------------------------------- */

static int apr_whole(const ap_kv *kv, const char *key, uint64_t *out, ap_err *e) {
    *out = 0;
    if (!kv || kv->kind == AP_V_NULL) return AP_OK;
    if ((kv->kind != AP_V_INT && kv->kind != AP_V_UINT) || (kv->kind == AP_V_INT && kv->v.i < 0)) return ap_fail_at(e, AP_CONFIG, -1, key, "%s is no count", key);
    *out = kv->v.u;
    return AP_OK;
}

static int apr_sharding(const ap_file *f, ap_err *e) {
    static const char pattern[] = "sharding.pattern", of[] = "sharding.shard_count", number[] = "sharding.shard_index";
    uint64_t count, index;
    const ap_kv *names = ap_file_kv(f, pattern);
    if (names && names->kind == AP_V_STR) AP_TRY(ap_file_plain_name(names->s, -1, e));
    AP_TRY(apr_whole(ap_file_kv(f, of), of, &count, e));
    AP_TRY(apr_whole(ap_file_kv(f, number), number, &index, e));
    if (index && index >= count) return ap_fail_at(e, AP_CONFIG, -1, number, "%s is %llu of %llu, counted from 0", number, (unsigned long long)index, (unsigned long long)count);
    if (count > 1) return ap_fail_at(e, AP_UNSUPPORTED, -1, of, "shard %llu of %llu: APR models in several files are not read; join them", (unsigned long long)index, (unsigned long long)count);
    return AP_OK;
}

static int apr_metadata(ap_file *f, const apr_head *h, ap_err *e) {
    int rc = ap_file_pairs(f, "metadata", (const char *)f->p + h->metadata, h->metadata_n, 1, e);
    if (rc && e->at >= 0) e->at += (int64_t)h->metadata;
    return rc ? rc : apr_sharding(f, e);
}

int ap_apr_parse(ap_file *f, ap_err *e) {
    apr_head h;
    uint64_t end;
    AP_TRY(apr_header(f, &h, e));
    AP_TRY(apr_places(f, &h, &end, e));
    AP_TRY(apr_padding(f, end, h.index, APR_ALIGN, "the index", e));
    AP_TRY(apr_metadata(f, &h, e));
    AP_TRY(apr_index(f, &h, e));
    AP_TRY(ap_file_index(f, e));
    f->alignment = APR_ALIGN;
    return apr_data(f, &h, e);
}

/* Of the first n bytes, piece by piece: the file need not fit into memory. */
static int apr_crc(const ap_file *f, uint64_t n, uint32_t *crc, ap_err *e) {
    enum { PIECE = 1 << 20 };
    uint8_t *piece = ap_alloc(PIECE, 1);
    int rc = piece ? AP_OK : ap_fail(e, AP_MEMORY, "no memory to read the file");
    *crc = 0;
    for (uint64_t at = 0; !rc && at < n; at += PIECE) {
        uint64_t k = n - at < PIECE ? n - at : PIECE;
        rc = ap_file_peek(f, at, piece, k, e);
        if (!rc) *crc = ap_crc32(*crc, piece, k);
    }
    ap_free(piece);
    return rc;
}

int ap_apr_verify(const ap_file *f, int *checked, ap_err *e) {
    uint32_t said, found;
    uint64_t end = APR_HEADER, aligned;
    for (int i = 0; i < f->nt; i++) if (f->t[i].offset + f->t[i].bytes > end) end = f->t[i].offset + f->t[i].bytes;
    *checked = ap_align_ok(end, APR_ALIGN, &aligned) && f->n >= aligned + APR_FOOTER;
    if (!*checked) return AP_OK;
    AP_TRY(ap_file_peek(f, f->n - APR_FOOTER, &said, sizeof said, e));
    AP_TRY(apr_crc(f, f->n - APR_FOOTER, &found, e));
    if (found == said) return AP_OK;
    return ap_fail_at(e, AP_CHECKSUM, (int64_t)(f->n - APR_FOOTER), "footer", "the CRC of the file is %08x, its end says %08x: the file is damaged", (unsigned)found, (unsigned)said);
}
