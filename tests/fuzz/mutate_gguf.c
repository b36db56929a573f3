/*
** mutate_gguf.c: a GGUF file as a header, key-value pairs, tensor infos and data.  Changes fall 35 % on metadata, 35 % on tensor infos, 10 % on the header,
** 10 % on two places at once, 5 % on alignment, 5 % on data.  Counts, lengths and padding are written anew; after most changes of shapes the offsets are
** laid out again and the data section made as long as they say, so that the change itself is what the reader meets.
*/
#include <string.h>
#include "mutate.h"

enum { KVS = 256, INFOS = 256, DIMS = 8 };
typedef struct { mut_span s; uint64_t said; int lies; } gg_str;                 /* said: the length that is written when it lies */
typedef struct { gg_str key; uint32_t type; mut_span value; } gg_kv;            /* value: the bytes after the type */
typedef struct { gg_str name; uint32_t nd, type; uint64_t dim[DIMS], offset; } gg_info;
typedef struct {
    uint8_t magic[4];
    uint32_t version;
    uint64_t nt_more, nkv_more;                 /* added to the true counts as they are written */
    gg_kv kv[KVS]; size_t nkv;
    gg_info t[INFOS]; size_t nt;
    mut_span data;
    size_t pad;                                 /* bytes too many before the data */
} gg_file;

/* The walker's own table of widths: value types 0 to 12; 0 where the width is not fixed. */
static const uint8_t gg_width[13] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

/* --- apart ----------------------------------------------------------------------------------------------------------------------------- */

typedef struct { const uint8_t *p; size_t n, at; int bad; } gg_cur;

static uint64_t gg_get(gg_cur *c, int bytes) {
    if (c->bad || c->n - c->at < (size_t)bytes) { c->bad = 1; return 0; }
    c->at += (size_t)bytes;
    return mut_read(c->p + c->at - bytes, bytes);
}

static mut_span gg_take(gg_cur *c, uint64_t n) {
    if (c->bad || n > c->n - c->at) { c->bad = 1; return (mut_span){ c->p, 0 }; }
    c->at += (size_t)n;
    return (mut_span){ c->p + c->at - n, (size_t)n };
}

static mut_span gg_value(gg_cur *c, uint32_t type) {
    size_t from = c->at;
    if (type < 13 && gg_width[type]) gg_take(c, gg_width[type]);
    else if (type == 8) gg_take(c, gg_get(c, 8));
    else if (type == 9) {
        uint64_t elem = gg_get(c, 4), n = gg_get(c, 8);
        if (elem == 8) while (n-- && !c->bad) gg_take(c, gg_get(c, 8));
        else if (elem < 13 && gg_width[elem] && n < c->n) gg_take(c, n * gg_width[elem]);
        else c->bad = 1;
    } else c->bad = 1;
    return (mut_span){ c->p + from, c->at - from };
}

static uint32_t gg_alignment(const gg_file *f) {
    for (size_t i = 0; i < f->nkv; i++)
        if (f->kv[i].key.s.n == 17 && !memcmp(f->kv[i].key.s.p, "general.alignment", 17) && f->kv[i].value.n == 4) {
            uint32_t a = (uint32_t)mut_read(f->kv[i].value.p, 4);
            if (a && !(a & (a - 1)) && a <= 4096) return a;
        }
    return 32;
}

/* Whatever cannot be read any more is the data section. */
static int gg_apart(gg_file *f, const uint8_t *p, size_t n) {
    gg_cur c = { p, n, 0, 0 };
    memset(f, 0, sizeof *f);
    if (n < 24) return 0;
    memcpy(f->magic, gg_take(&c, 4).p, 4);
    f->version = (uint32_t)gg_get(&c, 4);
    uint64_t nt = gg_get(&c, 8), nkv = gg_get(&c, 8);
    size_t good = c.at;
    for (; f->nkv < nkv && f->nkv < KVS; f->nkv++, good = c.at) {
        gg_kv *kv = &f->kv[f->nkv];
        kv->key.s = gg_take(&c, gg_get(&c, 8));
        kv->type = (uint32_t)gg_get(&c, 4);
        kv->value = gg_value(&c, kv->type);
        if (c.bad) break;
    }
    for (; !c.bad && f->nt < nt && f->nt < INFOS; f->nt++, good = c.at) {
        gg_info *t = &f->t[f->nt];
        t->name.s = gg_take(&c, gg_get(&c, 8));
        t->nd = (uint32_t)gg_get(&c, 4);
        if (t->nd > DIMS) c.bad = 1;
        for (uint32_t i = 0; i < t->nd && !c.bad; i++) t->dim[i] = gg_get(&c, 8);
        t->type = (uint32_t)gg_get(&c, 4);
        t->offset = gg_get(&c, 8);
        if (c.bad) break;
    }
    size_t a = gg_alignment(f), start = (good + a - 1) & ~(a - 1);
    if (start > n || c.bad) start = good;
    f->data = (mut_span){ p + start, n - start };
    return 1;
}

/* --- together -------------------------------------------------------------------------------------------------------------------------- */

static void gg_put_str(mut_out *o, const gg_str *s) {
    mut_u64(o, s->lies ? s->said : s->s.n, 8);
    mut_put(o, s->s.p, s->s.n);
}

static size_t gg_together(const gg_file *f, uint8_t *p, size_t room) {
    static uint8_t made[MUT_ROOM * 2];
    mut_out o = { made, 0, room < sizeof made ? room : sizeof made };
    mut_put(&o, f->magic, 4);
    mut_u64(&o, f->version, 4);
    mut_u64(&o, f->nt + f->nt_more, 8);
    mut_u64(&o, f->nkv + f->nkv_more, 8);
    for (size_t i = 0; i < f->nkv; i++) {
        gg_put_str(&o, &f->kv[i].key);
        mut_u64(&o, f->kv[i].type, 4);
        mut_put(&o, f->kv[i].value.p, f->kv[i].value.n);
    }
    for (size_t i = 0; i < f->nt; i++) {
        const gg_info *t = &f->t[i];
        gg_put_str(&o, &t->name);
        mut_u64(&o, t->nd, 4);
        for (uint32_t d = 0; d < t->nd && d < DIMS; d++) mut_u64(&o, t->dim[d], 8);
        mut_u64(&o, t->type, 4);
        mut_u64(&o, t->offset, 8);
    }
    size_t a = gg_alignment(f);
    mut_fill(&o, (a - o.n % a) % a + f->pad);
    mut_put(&o, f->data.p, f->data.n);
    memcpy(p, made, o.n);
    return o.n;
}

/* --- layout ---------------------------------------------------------------------------------------------------------------------------- */

/* ggml's types: id, values and bytes of a block. */
static const struct { uint8_t id; uint16_t block, bytes; } gg_types[] = {
    { 0, 1, 4 }, { 1, 1, 2 }, { 2, 32, 18 }, { 3, 32, 20 }, { 6, 32, 22 }, { 7, 32, 24 }, { 8, 32, 34 }, { 9, 32, 36 }, { 10, 256, 84 }, { 11, 256, 110 }, { 12, 256, 144 },
    { 13, 256, 176 }, { 14, 256, 210 }, { 15, 256, 292 }, { 16, 256, 66 }, { 17, 256, 74 }, { 18, 256, 98 }, { 19, 256, 50 }, { 20, 32, 18 }, { 21, 256, 110 }, { 22, 256, 82 },
    { 23, 256, 136 }, { 24, 1, 1 }, { 25, 1, 2 }, { 26, 1, 4 }, { 27, 1, 8 }, { 28, 1, 8 }, { 29, 256, 56 }, { 30, 1, 2 }, { 34, 256, 54 }, { 35, 256, 66 }, { 39, 32, 17 },
    { 40, 64, 36 }, { 41, 128, 18 }, { 42, 64, 18 },
};
enum { GG_TYPES = sizeof gg_types / sizeof *gg_types };

/* UINT64_MAX: not to be laid out. */
static uint64_t gg_bytes(const gg_info *t) {
    size_t k = 0;
    unsigned __int128 n = 1;
    while (k < GG_TYPES && gg_types[k].id != t->type) k++;
    if (k == GG_TYPES) return UINT64_MAX;
    for (uint32_t i = 0; i < t->nd && i < DIMS; i++) { n *= t->dim[i]; if (n > MUT_ROOM * 8) return UINT64_MAX; }
    n = n / gg_types[k].block * gg_types[k].bytes;
    return n > MUT_ROOM ? UINT64_MAX : (uint64_t)n;
}

/* Every tensor behind the one before it; the data section as long as that. */
static void gg_lay_out(gg_file *f) {
    uint64_t a = gg_alignment(f), at = 0, end = 0;
    for (size_t i = 0; i < f->nt; i++) {
        uint64_t bytes = gg_bytes(&f->t[i]);
        if (bytes == UINT64_MAX) continue;
        f->t[i].offset = at;
        end = at + bytes;
        at = (end + a - 1) / a * a;
        if (end > MUT_ROOM) return;
    }
    uint8_t *q = mut_scratch((size_t)end);
    if (!q) return;
    size_t have = f->data.n < end ? f->data.n : (size_t)end;
    if (have) memcpy(q, f->data.p, have);
    memset(q + have, 0, (size_t)end - have);
    f->data = (mut_span){ q, (size_t)end };
}

/* --- changes --------------------------------------------------------------------------------------------------------------------------- */

static void gg_remove(void *rows, size_t *n, size_t size, size_t i) {
    memmove((char *)rows + i * size, (char *)rows + (i + 1) * size, (*n - i - 1) * size);
    --*n;
}

static void gg_copy(void *rows, size_t *n, size_t most, size_t size, size_t from, size_t to) {
    if (*n == most) return;
    uint8_t *q = mut_scratch(size);
    if (!q) return;
    memcpy(q, (char *)rows + from * size, size);
    memmove((char *)rows + (to + 1) * size, (char *)rows + to * size, (*n - to) * size);
    memcpy((char *)rows + to * size, q, size);
    ++*n;
}

static void gg_swap(void *rows, size_t size, size_t i, size_t j) {
    uint8_t a[sizeof(gg_info) > sizeof(gg_kv) ? sizeof(gg_info) : sizeof(gg_kv)];
    char *x = (char *)rows + i * size, *y = (char *)rows + j * size;
    memcpy(a, x, size); memmove(x, y, size); memcpy(y, a, size);
}

static void gg_lie(mut_rng *r, gg_str *s, size_t left) { s->lies = 1; s->said = mut_number(r, s->s.n, left); }

/* A value of the type: mostly plain, so that binding goes on. */
static mut_span gg_make(mut_rng *r, uint32_t type) {
    uint8_t *q = mut_scratch(1024);
    if (!q) return mut_keep("", 0);
    mut_out o = { q, 0, 1024 };
    static const float f[] = { 0, 1, -1, 1e-6f, 1e-5f, 10000, 1e6f, 1e30f, -0.0f, 0.5f };
    uint32_t nan = 0x7fc00001, inf = 0x7f800000;
    double d = f[mut_below(r, 10)];
    uint64_t small = mut_below(r, 2) ? mut_below(r, 40) : mut_number(r, 8, 100);
    if (type == 6) mut_put(&o, mut_chance(r, 20) ? (void *)&nan : mut_chance(r, 10) ? (void *)&inf : (void *)&f[mut_below(r, 10)], 4);
    else if (type == 12) mut_put(&o, &d, 8);
    else if (type == 7) mut_u64(&o, mut_chance(r, 90) ? mut_below(r, 2) : mut_next(r), 1);
    else if (type == 8) { mut_span w = mut_chance(r, 50) ? mut_word(r) : mut_bend(r, mut_word(r)); mut_u64(&o, w.n, 8); mut_put(&o, w.p, w.n); }
    else if (type == 9) {
        uint32_t elem = (uint32_t)mut_below(r, 14);
        size_t n = mut_below(r, 9);
        mut_u64(&o, elem, 4);
        mut_u64(&o, mut_chance(r, 85) ? n : mut_number(r, n, 100), 8);
        for (size_t i = 0; i < n && elem < 13 && elem != 9; i++) { mut_span v = gg_make(r, elem); mut_put(&o, v.p, v.n); }
    } else mut_u64(&o, small, type < 13 ? gg_width[type] : 8);
    return (mut_span){ q, o.n };
}

static mut_span gg_bent_value(mut_rng *r, const gg_kv *kv, size_t left) {
    mut_span s = mut_keep(kv->value.p, kv->value.n);
    uint8_t *q = (uint8_t *)s.p;
    uint64_t v;
    if (kv->type == 9 && s.n >= 12) {           /* element type, count, or an element */
        uint32_t elem = (uint32_t)mut_number(r, mut_read(q, 4), 13);
        v = mut_number(r, mut_read(q + 4, 8), left);
        if (mut_chance(r, 30)) memcpy(q, &elem, 4);
        else if (mut_chance(r, 50)) memcpy(q + 4, &v, 8);
        else if (s.n > 12) q[12 + mut_below(r, s.n - 12)] = (uint8_t)mut_next(r);
    } else if (kv->type == 8 && s.n >= 8) {
        v = mut_number(r, s.n - 8, left);
        if (mut_chance(r, 40)) memcpy(q, &v, 8);
        else if (s.n > 8) q[8 + mut_below(r, s.n - 8)] ^= (uint8_t)(1u << mut_below(r, 8));
    } else if (s.n) {
        v = mut_number(r, mut_read(q, s.n < 8 ? (int)s.n : 8), left);
        memcpy(q, &v, s.n < 8 ? s.n : 8);
    }
    return s;
}

static void gg_metadata(mut_rng *r, gg_file *f, size_t left) {
    size_t i = mut_below(r, f->nkv), j = mut_below(r, f->nkv);
    gg_kv *kv = &f->kv[i];
    size_t what = f->nkv ? mut_below(r, 10) : 9;
    switch (what) {
    case 0: case 1: kv->value = gg_bent_value(r, kv, left); break;
    case 2: kv->value = gg_make(r, kv->type); break;
    case 3: kv->type = (uint32_t)mut_below(r, 14); if (mut_chance(r, 80)) kv->value = gg_make(r, kv->type); break;
    case 4: kv->type = (uint32_t)mut_number(r, kv->type, 12); break;
    case 5: gg_copy(f->kv, &f->nkv, KVS, sizeof *kv, i, mut_below(r, f->nkv + 1)); break;
    case 6: gg_remove(f->kv, &f->nkv, sizeof *kv, i); break;
    case 7: if (mut_chance(r, 50)) gg_swap(f->kv, sizeof *kv, i, j); else kv->key.s = mut_chance(r, 50) ? f->kv[j].key.s : mut_word(r); break;
    case 8: if (mut_chance(r, 30)) gg_lie(r, &kv->key, left); else kv->key.s = mut_bend(r, kv->key.s); break;
    default:
        if (f->nkv == KVS) return;
        kv = &f->kv[f->nkv++];
        *kv = (gg_kv){ .key = { .s = mut_word(r) }, .type = (uint32_t)mut_below(r, 13) };
        kv->value = gg_make(r, kv->type);
    }
}

static uint32_t gg_any_type(mut_rng *r, uint32_t was) { return mut_chance(r, 80) ? gg_types[mut_below(r, GG_TYPES)].id : (uint32_t)mut_number(r, was, 42); }

static void gg_new_info(mut_rng *r, gg_file *f) {
    if (f->nt == INFOS) return;
    gg_info *t = &f->t[f->nt++];
    *t = (gg_info){ .name = { .s = mut_word(r) }, .nd = (uint32_t)mut_below(r, 5), .type = gg_any_type(r, 0), .offset = f->data.n };
    for (uint32_t i = 0; i < t->nd; i++) t->dim[i] = i ? mut_below(r, 4) : (uint64_t)(1 + mut_below(r, 3)) * (mut_chance(r, 50) ? 32 : 1);
}

static void gg_tensors(mut_rng *r, gg_file *f, size_t left) {
    size_t i = mut_below(r, f->nt), j = mut_below(r, f->nt), what = f->nt ? mut_below(r, 13) : 12;
    gg_info *t = &f->t[i];
    uint32_t d = t->nd ? (uint32_t)mut_below(r, t->nd < DIMS ? t->nd : DIMS) : 0;
    switch (what) {
    case 0: case 1: t->dim[d] = mut_number(r, t->dim[d], left); break;
    case 2: t->nd = mut_chance(r, 80) ? (uint32_t)mut_below(r, 6) : (uint32_t)mut_number(r, t->nd, 4); break;
    case 3: { uint64_t x = t->dim[0]; t->dim[0] = t->dim[1]; t->dim[1] = x; break; }
    case 4: case 5: t->type = gg_any_type(r, t->type); break;
    case 6: case 7: t->offset = mut_chance(r, 50) ? mut_number(r, t->offset, f->data.n) : t->offset + 32 * (mut_below(r, 5) - 2); break;
    case 8: gg_copy(f->t, &f->nt, INFOS, sizeof *t, i, mut_below(r, f->nt + 1)); break;
    case 9: gg_remove(f->t, &f->nt, sizeof *t, i); break;
    case 10: gg_swap(f->t, sizeof *t, i, j); break;
    case 11: if (mut_chance(r, 30)) gg_lie(r, &t->name, left); else t->name.s = mut_chance(r, 30) ? f->t[j].name.s : mut_chance(r, 50) ? mut_word(r) : mut_bend(r, t->name.s); break;
    default: gg_new_info(r, f);
    }
}

static void gg_header(mut_rng *r, gg_file *f, size_t left) {
    static const char *const magic[] = { "lmgg", "tjgg", "fmgg", "algg", "FUGG", "GGUF" };
    switch (mut_below(r, 4)) {
    case 0: f->version = mut_chance(r, 50) ? (uint32_t)mut_below(r, 5) : mut_chance(r, 50) ? f->version << 24 : (uint32_t)mut_number(r, 3, 3); break;
    case 1: f->nt_more = mut_chance(r, 50) ? mut_below(r, 3) - 1 : mut_number(r, f->nt, left / 25) - f->nt; break;
    case 2: f->nkv_more = mut_chance(r, 50) ? mut_below(r, 3) - 1 : mut_number(r, f->nkv, left / 14) - f->nkv; break;
    default: memcpy(f->magic, magic[mut_below(r, 6)], 4);
    }
}

/* Every number x of the file becomes y: dimensions and counts together, as if the model had another size. */
static void gg_resize(gg_file *f, uint64_t x, uint64_t y) {
    for (size_t i = 0; i < f->nt; i++) for (uint32_t d = 0; d < f->t[i].nd && d < DIMS; d++) if (f->t[i].dim[d] == x) f->t[i].dim[d] = y;
    for (size_t i = 0; i < f->nkv; i++)
        if (f->kv[i].value.n == 4 && f->kv[i].type < 6 && mut_read(f->kv[i].value.p, 4) == x) f->kv[i].value = mut_keep(&y, 4);
}

static void gg_cross(mut_rng *r, gg_file *f) {
    size_t i = mut_below(r, f->nt), j = mut_below(r, f->nt);
    if (!f->nt) return;
    gg_info *t = &f->t[i], *u = &f->t[j];
    uint64_t x;
    switch (mut_below(r, 6)) {
    case 0: x = t->offset; t->offset = u->offset; u->offset = x; break;
    case 1: u->offset = t->offset; break;
    case 2: gg_resize(f, t->dim[0], mut_chance(r, 60) ? mut_below(r, 70) : mut_number(r, t->dim[0], f->data.n)); break;
    case 3: t->nd = 2 + (uint32_t)mut_below(r, 3); for (uint32_t d = 0; d < t->nd; d++) t->dim[d] = (uint64_t)1 << mut_below(r, 64); break;
    case 4: t->type = gg_types[mut_below(r, GG_TYPES)].id; for (size_t k = 0; k < f->nt; k++) if (f->t[k].nd == t->nd) f->t[k].type = t->type; break;
    default:                                    /* another architecture, its keys with it */
        for (size_t k = 0; k < f->nkv; k++) {
            mut_span *s = &f->kv[k].key.s;
            if (s->n > 6 && (!memcmp(s->p, "llama.", 6) || !memcmp(s->p, "qwen", 4))) { *s = mut_keep(s->p, s->n); memcpy((uint8_t *)s->p, i & 1 ? "qwen2." : "qwen3.", 6); }
            if (f->kv[k].type == 8 && f->kv[k].value.n == 13) { f->kv[k].value = mut_keep(f->kv[k].value.p, 13); memcpy((uint8_t *)f->kv[k].value.p + 8, i & 1 ? "qwen2" : "qwen3", 5); }
        }
    }
}

static void gg_align(mut_rng *r, gg_file *f) {
    uint32_t a = mut_chance(r, 70) ? 1u << mut_below(r, 12) : (uint32_t)mut_number(r, 32, 65536);
    if (mut_chance(r, 20)) { f->pad = 1 + mut_below(r, 40); return; }
    size_t k = 0;
    while (k < f->nkv && !(f->kv[k].key.s.n == 17 && !memcmp(f->kv[k].key.s.p, "general.alignment", 17))) k++;
    if (k == KVS) return;
    if (k == f->nkv) f->nkv++;
    f->kv[k] = (gg_kv){ .key = { .s = mut_keep("general.alignment", 17) }, .type = mut_chance(r, 90) ? 4 : (uint32_t)mut_below(r, 13), .value = mut_keep(&a, 4) };
}

static void gg_data(mut_rng *r, gg_file *f) {
    mut_span s = mut_keep(f->data.p, f->data.n);
    if (mut_chance(r, 50) && s.n) {
        static const uint8_t odd[] = { 0, 0xff, 0x7f, 0x80, 0x7c, 0x7e };
        for (int k = 0; k < 4; k++) ((uint8_t *)s.p)[mut_below(r, s.n)] = odd[mut_below(r, 6)];
    } else if (mut_chance(r, 50)) s.n = mut_chance(r, 40) && s.n ? s.n - 1 : mut_below(r, s.n + 1);
    else {
        uint8_t *q = mut_scratch(s.n + 64);
        if (!q) return;
        if (s.n) memcpy(q, s.p, s.n);
        memset(q + s.n, mut_chance(r, 80) ? 0 : 1, 64);
        s = (mut_span){ q, s.n + mut_below(r, 65) };
    }
    f->data = s;
}

size_t mutate_gguf(uint8_t *p, size_t n, size_t room, unsigned seed) {
    static gg_file f;
    mut_rng r;
    mut_begin(&r, seed);
    if (mut_chance(&r, 10) || n > MUT_ROOM || !gg_apart(&f, p, n)) return LLVMFuzzerMutate(p, n, room);
    int shapes = 0, data = 0;
    for (size_t k = 1 + mut_below(&r, 3); k; k--) {
        size_t part = mut_below(&r, 100);
        if (part < 35) gg_metadata(&r, &f, n);
        else if (part < 70) { gg_tensors(&r, &f, n); shapes = 1; }
        else if (part < 80) gg_header(&r, &f, n);
        else if (part < 90) { gg_cross(&r, &f); shapes = 1; }
        else if (part < 95) { gg_align(&r, &f); shapes = 1; }
        else data = 1;
    }
    if (shapes && mut_chance(&r, 60)) gg_lay_out(&f);
    if (data) gg_data(&r, &f);
    return gg_together(&f, p, room);
}
