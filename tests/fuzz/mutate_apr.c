/*
** mutate_apr.c: an APR 2 file as a header, JSON metadata, an index, data and a footer.  Changes fall as in mutate_gguf.c: 35 % on the metadata, 35 % on the
** index, 10 % on the header, 10 % on two places at once, 5 % on padding, 5 % on data.  Sizes and offsets of the parts and both CRC-32 are written anew, but
** for the few that are meant to be wrong.
*/
#include <string.h>
#include "mutate.h"

enum { ENTRIES = 256, APR_DIMS = 16, APR_HEADER = 64, APR_ALIGN = 64 };
typedef struct { mut_span name; uint16_t said; int lies; uint8_t dtype, nd; uint64_t dim[APR_DIMS], offset, size; } ap_entry;
typedef struct {
    uint8_t head[APR_HEADER];
    mut_span meta;
    ap_entry t[ENTRIES]; size_t nt;
    uint8_t *data; size_t data_n;
    size_t pad;                                 /* bytes too many between the parts */
    size_t cut;                                 /* bytes that the index lacks */
    int wrong;                                  /* bits: header CRC, footer CRC, no footer */
    uint64_t count_more;
    struct { int at, bytes; uint64_t v; } set;  /* a header field that is written over at the end; bytes 0: none */
} apr_image;

/* --- apart ----------------------------------------------------------------------------------------------------------------------------- */

static size_t apr_entry_apart(ap_entry *t, const uint8_t *p, size_t n) {
    if (n < 4) return 0;
    size_t name = (size_t)mut_read(p, 2), at = 2 + name;
    if (n < at + 2) return 0;
    *t = (ap_entry){ .name = { p + 2, name }, .dtype = p[at], .nd = p[at + 1] };
    at += 2;
    if (t->nd > APR_DIMS || n < at + 8u * t->nd + 16) return 0;
    for (int i = 0; i < t->nd; i++, at += 8) t->dim[i] = mut_read(p + at, 8);
    t->offset = mut_read(p + at, 8);
    t->size = mut_read(p + at + 8, 8);
    return at + 16;
}

static int apr_apart(apr_image *f, const uint8_t *p, size_t n) {
    memset(f, 0, sizeof *f);
    if (n < APR_HEADER + 4) return 0;
    memcpy(f->head, p, APR_HEADER);
    uint64_t count = mut_read(p + 8, 4), meta = mut_read(p + 12, 8), meta_n = mut_read(p + 20, 4), index = mut_read(p + 24, 8), data = mut_read(p + 32, 8);
    if (meta > n || meta_n > n - meta) meta = meta_n = 0;
    f->meta = (mut_span){ p + meta, (size_t)meta_n };
    if (index > n) index = n;
    for (size_t at = (size_t)index, took; f->nt < count && f->nt < ENTRIES && (took = apr_entry_apart(&f->t[f->nt], p + at, n - at)); at += took) f->nt++;
    if (data > n - 4) data = n - 4;
    f->data_n = n - 4 - (size_t)data;
    f->data = mut_scratch(f->data_n + 4096);
    if (!f->data) return 0;
    memcpy(f->data, p + data, f->data_n);
    memset(f->data + f->data_n, 0, 4096);
    return 1;
}

/* --- together -------------------------------------------------------------------------------------------------------------------------- */

static void apr_put_entry(mut_out *o, const ap_entry *t) {
    mut_u64(o, t->lies ? t->said : t->name.n, 2);
    mut_put(o, t->name.p, t->name.n);
    mut_u64(o, t->dtype, 1);
    mut_u64(o, t->nd, 1);
    for (int i = 0; i < t->nd && i < APR_DIMS; i++) mut_u64(o, t->dim[i], 8);
    mut_u64(o, t->offset, 8);
    mut_u64(o, t->size, 8);
}

static void apr_set(uint8_t *head, int at, uint64_t v, int bytes) { memcpy(head + at, &v, (size_t)bytes); }

static void apr_pad(mut_out *o, size_t more) { mut_fill(o, (APR_ALIGN - o->n % APR_ALIGN) % APR_ALIGN + more); }

static size_t apr_together(apr_image *f, uint8_t *p, size_t room) {
    static uint8_t made[MUT_ROOM * 2];
    mut_out o = { made, 0, room < sizeof made ? room : sizeof made };
    if (o.room < APR_HEADER) return 0;
    mut_put(&o, f->head, APR_HEADER);
    apr_set(made, 8, f->nt + f->count_more, 4);
    apr_set(made, 12, o.n, 8);
    apr_set(made, 20, f->meta.n, 4);
    mut_put(&o, f->meta.p, f->meta.n);
    apr_pad(&o, f->pad);
    apr_set(made, 24, o.n, 8);
    for (size_t i = 0; i < f->nt; i++) apr_put_entry(&o, &f->t[i]);
    if (f->cut) o.n -= f->cut < o.n - (size_t)mut_read(made + 24, 8) ? f->cut : 0;
    if (!f->cut) apr_pad(&o, f->pad);
    apr_set(made, 32, o.n, 8);
    mut_put(&o, f->data, f->data_n);
    if (f->set.bytes) apr_set(made, f->set.at, f->set.v, f->set.bytes);
    uint32_t crc = mut_crc32(mut_crc32(0, made, 40), made + 44, 20);
    if (!(f->wrong & 1)) apr_set(made, 40, crc, 4);
    crc = mut_crc32(0, made, o.n) ^ (f->wrong & 2 ? 1u : 0u);
    if (!(f->wrong & 4)) mut_u64(&o, crc, 4);
    memcpy(p, made, o.n);
    return o.n;
}

/* --- layout ---------------------------------------------------------------------------------------------------------------------------- */

static const struct { uint8_t id; uint16_t block, bytes; } apr_types[] = {
    { 0, 1, 4 }, { 1, 1, 2 }, { 3, 1, 8 }, { 4, 1, 4 }, { 5, 1, 8 }, { 6, 1, 1 }, { 7, 1, 1 }, { 12, 256, 144 }, { 14, 256, 210 }, { 30, 1, 2 }, { 128, 32, 18 }, { 129, 1, 1 }, { 8, 32, 18 }, { 9, 1, 1 },
};
enum { APR_TYPES = sizeof apr_types / sizeof *apr_types };

static uint64_t apr_bytes(const ap_entry *t) {
    size_t k = 0;
    unsigned __int128 rows = 1, n;
    while (k < APR_TYPES && apr_types[k].id != t->dtype) k++;
    if (k == APR_TYPES) return UINT64_MAX;
    uint64_t cols = t->nd ? t->dim[(t->nd - 1) % APR_DIMS] : 1;
    for (int i = 0; i + 1 < t->nd && i < APR_DIMS; i++) { rows *= t->dim[i]; if (rows > MUT_ROOM) return UINT64_MAX; }
    if (cols > MUT_ROOM) return UINT64_MAX;
    if (apr_types[k].block == 32) n = (rows * cols + 31) / 32 * 18;            /* its blocks run on over the ends of rows */
    else n = rows * ((cols + apr_types[k].block - 1) / apr_types[k].block) * apr_types[k].bytes;
    if (t->dtype == 129 || t->dtype == 9) n += 4;
    return n > MUT_ROOM ? UINT64_MAX : (uint64_t)n;
}

static void apr_lay_out(apr_image *f) {
    uint64_t at = 0;
    for (size_t i = 0; i < f->nt; i++) {
        uint64_t bytes = apr_bytes(&f->t[i]);
        if (bytes == UINT64_MAX) continue;
        f->t[i].offset = at;
        f->t[i].size = bytes;
        at = (at + bytes + APR_ALIGN - 1) / APR_ALIGN * APR_ALIGN;
        if (at > MUT_ROOM) return;
    }
    uint8_t *q = mut_scratch((size_t)at + 4096);
    if (!q) return;
    size_t have = f->data_n < at ? f->data_n : (size_t)at;
    memcpy(q, f->data, have);
    memset(q + have, 0, (size_t)at + 4096 - have);
    f->data = q;
    f->data_n = (size_t)at;
}

static int apr_before(mut_span a, mut_span b) {
    size_t n = a.n < b.n ? a.n : b.n;
    int d = n ? memcmp(a.p, b.p, n) : 0;
    return d ? d < 0 : a.n < b.n;
}

static void apr_sort(apr_image *f) {
    for (size_t i = 1; i < f->nt; i++)
        for (size_t j = i; j && apr_before(f->t[j].name, f->t[j - 1].name); j--) { ap_entry x = f->t[j]; f->t[j] = f->t[j - 1]; f->t[j - 1] = x; }
}

/* --- changes --------------------------------------------------------------------------------------------------------------------------- */

static void apr_metadata(mut_rng *r, apr_image *f) {
    enum { MORE = 4096 };
    uint8_t *q = mut_scratch(f->meta.n + MORE);
    size_t n = q ? mut_json_text(r, f->meta.p, f->meta.n, q, f->meta.n + MORE) : 0;
    if (n) f->meta = (mut_span){ q, n };
    else if (!f->meta.n) f->meta = mut_keep("{}", 2);
}

static uint8_t apr_any_type(mut_rng *r) { return mut_chance(r, 80) ? apr_types[mut_below(r, APR_TYPES)].id : (uint8_t)mut_next(r); }

static void apr_new_entry(mut_rng *r, apr_image *f) {
    if (f->nt == ENTRIES) return;
    ap_entry *t = &f->t[f->nt++];
    *t = (ap_entry){ .name = mut_word(r), .nd = (uint8_t)mut_below(r, 5), .dtype = apr_any_type(r), .offset = f->data_n };
    for (int i = 0; i < t->nd; i++) t->dim[i] = mut_below(r, 40);
}

static void apr_index(mut_rng *r, apr_image *f, size_t left) {
    size_t i = mut_below(r, f->nt), j = mut_below(r, f->nt), what = f->nt ? mut_below(r, 13) : 12;
    ap_entry *t = &f->t[i], other = f->t[j];
    int d = t->nd ? (int)mut_below(r, t->nd < APR_DIMS ? t->nd : APR_DIMS) : 0;
    switch (what) {
    case 0: case 1: t->dim[d] = mut_number(r, t->dim[d], left); break;
    case 2: t->nd = mut_chance(r, 80) ? (uint8_t)mut_below(r, 10) : (uint8_t)mut_next(r); break;
    case 3: t->size = mut_number(r, t->size, f->data_n); break;
    case 4: case 5: t->dtype = apr_any_type(r); break;
    case 6: case 7: t->offset = mut_chance(r, 50) ? mut_number(r, t->offset, f->data_n) : t->offset + 4 * (mut_below(r, 5) - 2); break;
    case 8: if (f->nt < ENTRIES) f->t[f->nt++] = other; break;
    case 9: *t = f->t[--f->nt]; break;
    case 10: f->t[j] = *t; *t = other; break;
    case 11:
        if (mut_chance(r, 30)) { t->lies = 1; t->said = (uint16_t)mut_number(r, t->name.n, left); }
        else t->name = mut_chance(r, 30) ? other.name : mut_chance(r, 50) ? mut_word(r) : mut_bend(r, t->name);
        break;
    default: apr_new_entry(r, f);
    }
}

static void apr_header(mut_rng *r, apr_image *f, size_t left) {
    static const struct { int at, bytes; } field[] = { { 6, 2 }, { 8, 4 }, { 12, 8 }, { 20, 4 }, { 24, 8 }, { 32, 8 }, { 44, 8 }, { 60, 4 } };
    static const char *const magic[] = { "APR1", "APRN", "APR2", "GGUF" };
    size_t k = mut_below(r, 8);
    switch (mut_below(r, 7)) {
    case 5: f->cut = 1 + mut_below(r, 60); break;
    case 0: memcpy(f->head, magic[mut_below(r, 4)], 4); break;
    case 1: f->head[4 + mut_below(r, 2)] = (uint8_t)mut_below(r, 5); break;
    case 2: apr_set(f->head, 6, (uint64_t)1 << mut_below(r, 16), 2); break;
    case 3: f->count_more = mut_chance(r, 50) ? mut_below(r, 3) - 1 : mut_number(r, f->nt, left / 20) - f->nt; break;
    case 4: f->wrong = 1 << mut_below(r, 3); break;
    default:
        f->set.at = field[k].at;
        f->set.bytes = field[k].bytes;
        f->set.v = mut_number(r, mut_read(f->head + field[k].at, field[k].bytes), left);
    }
}

static void apr_cross(mut_rng *r, apr_image *f) {
    size_t i = mut_below(r, f->nt), j = mut_below(r, f->nt);
    if (!f->nt) return;
    ap_entry *t = &f->t[i], *u = &f->t[j];
    uint64_t x;
    switch (mut_below(r, 4)) {
    case 0: x = t->offset; t->offset = u->offset; u->offset = x; break;
    case 1: u->offset = t->offset; break;
    case 2: t->nd = 3; for (int d = 0; d < 3; d++) t->dim[d] = (uint64_t)1 << mut_below(r, 64); break;
    default: x = mut_next(r); for (size_t k = 0; k < f->nt; k++) if (f->t[k].nd == t->nd) f->t[k].dtype = apr_types[x % APR_TYPES].id;
    }
}

static void apr_data(mut_rng *r, apr_image *f) {
    if (mut_chance(r, 50) && f->data_n) f->data[mut_below(r, f->data_n)] ^= (uint8_t)(1u << mut_below(r, 8));
    else if (mut_chance(r, 20) && f->data_n) f->data_n--;
    else f->data_n = mut_chance(r, 50) ? mut_below(r, f->data_n + 1) : f->data_n + mut_below(r, 129);      /* apr_apart left room behind */
}

size_t mutate_apr(uint8_t *p, size_t n, size_t room, unsigned seed) {
    static apr_image f;
    mut_rng r;
    mut_begin(&r, seed);
    if (mut_chance(&r, 10) || n > MUT_ROOM || !apr_apart(&f, p, n)) return LLVMFuzzerMutate(p, n, room);
    int shapes = 0, data = 0;
    for (size_t k = 1 + mut_below(&r, 3); k; k--) {
        size_t part = mut_below(&r, 100);
        if (part < 35) apr_metadata(&r, &f);
        else if (part < 70) { apr_index(&r, &f, n); shapes = 1; }
        else if (part < 80) apr_header(&r, &f, n);
        else if (part < 90) { apr_cross(&r, &f); shapes = 1; }
        else if (part < 95) f.pad = mut_below(&r, 70);
        else data = 1;
    }
    if (shapes && mut_chance(&r, 60)) apr_lay_out(&f);
    if (shapes && mut_chance(&r, 70)) apr_sort(&f);
    if (data) apr_data(&r, &f);
    return apr_together(&f, p, room);
}
