/*
** mutate_json.c: JSON as a run of tokens.  A value is a token, or a bracket up to its partner; an edit replaces, copies, moves, wraps or breaks one.  Also the
** safetensors file, which is a length, JSON and data.
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "mutate.h"

enum { TOKENS = 4096 };
typedef struct { uint32_t at, n; char kind; } js_token;         /* kind: " string, 0 number or word, else the character itself; '?' anything else */
typedef struct { const uint8_t *p; size_t n; js_token t[TOKENS]; size_t nt; } js_doc;

static int js_word(uint8_t c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '+' || c == '.'; }

static void js_tokens(js_doc *d, const uint8_t *p, size_t n) {
    d->p = p; d->n = n; d->nt = 0;
    for (size_t i = 0; i < n && d->nt < TOKENS; ) {
        size_t from = i;
        char kind = (char)p[i];
        if (p[i] == ' ' || p[i] == '\n' || p[i] == '\t' || p[i] == '\r') { i++; continue; }
        if (p[i] == '"') { for (i++; i < n && p[i] != '"'; i++) if (p[i] == '\\') i++; i = i < n ? i + 1 : n; }
        else if (js_word(p[i])) { while (i < n && js_word(p[i])) i++; kind = 0; }
        else { if (!strchr("{}[]:,", kind) || !kind) kind = '?'; i++; }
        d->t[d->nt++] = (js_token){ (uint32_t)from, (uint32_t)(i - from), kind };
    }
}

/* The last token of the value that begins at token i. */
static size_t js_value_end(const js_doc *d, size_t i) {
    int depth = 0;
    if (d->t[i].kind != '{' && d->t[i].kind != '[') return i;
    for (size_t j = i; j < d->nt; j++) {
        if (d->t[j].kind == '{' || d->t[j].kind == '[') depth++;
        if (d->t[j].kind == '}' || d->t[j].kind == ']') depth--;
        if (depth <= 0) return j;
    }
    return d->nt - 1;
}

/* A random value; with its key when it is a member's and key is set. */
static int js_pick(mut_rng *r, const js_doc *d, int key, size_t *from, size_t *to) {
    for (int tries = 0; tries < 20; tries++) {
        size_t i = mut_below(r, d->nt);
        if (!strchr("\"{[", d->t[i].kind) && d->t[i].kind) continue;
        int is_key = d->t[i].kind == '"' && i + 2 < d->nt && d->t[i + 1].kind == ':';
        size_t end = is_key ? (key ? js_value_end(d, i + 2) : i) : js_value_end(d, i);
        if (key && !is_key && i >= 2 && d->t[i - 1].kind == ':') i -= 2;
        *from = d->t[i].at;
        *to = d->t[end].at + d->t[end].n;
        return 1;
    }
    return 0;
}

static mut_span js_number(mut_rng *r, mut_span was, uint64_t left) {
    static const char *const odd[] = { "-0", "1e2", "1.0", "0x10", "00", "-1", "18446744073709551615", "18446744073709551616", "9223372036854775807", "9223372036854775808",
        "-9223372036854775808", "-9223372036854775809", "1e308", "1e309", "1e-400", "NaN", "Infinity", "1.", ".5", "1e", "+1", "null", "true", "false", "nul", "0.5", "1e-6", "10000.0" };
    char text[200];
    if (mut_chance(r, 40)) { const char *z = odd[mut_below(r, sizeof odd / sizeof *odd)]; return mut_keep(z, strlen(z)); }
    if (mut_chance(r, 4)) { memset(text, '1', sizeof text); return mut_keep(text, 126 + mut_below(r, 5)); }
    size_t n = was.n < 40 ? was.n : 40;
    memcpy(text, was.p, n);
    text[n] = 0;
    int len = sprintf(text, "%llu", (unsigned long long)mut_number(r, strtoull(text, NULL, 10), left));
    return mut_keep(text, (size_t)len);
}

static mut_span js_quoted(mut_rng *r) {
    uint8_t text[200];
    mut_span w = mut_word(r);
    if (mut_chance(r, 20)) w = mut_bend(r, w);
    size_t n = w.n < 190 ? w.n : 190, at = 0;
    text[at++] = '"';
    if (n && w.p[0] >= 0x20 && w.p[0] < 0x7f && mut_chance(r, 10)) { at += (size_t)sprintf((char *)text + at, "\\u%04x", w.p[0]); w.p++; n--; }  /* the same name, spelled otherwise */
    memcpy(text + at, w.p, n);
    at += n;
    text[at++] = '"';
    return mut_keep(text, at);
}

static mut_span js_escapes(mut_rng *r, mut_span s) {
    static const char *const e[] = { "\\u0061", "\\ud83d\\ude00", "\\ud800", "\\udc00", "\\ud800\\u0041", "\\u0000", "\\n", "\\/", "\\\"", "\\x", "\\u12", "\\u00e9", "\\u20ac", "\\", "\\b\\f\\r\\t\\\\", "\\uDBFF\\uDFFF", "\x01", "\xe2\x82\xac", "\xff" };
    const char *z = e[mut_below(r, sizeof e / sizeof *e)];
    size_t m = strlen(z), cut = s.n > 2 ? 1 + mut_below(r, s.n - 1) : 1;
    uint8_t *q = mut_scratch(s.n + m);
    if (!q || s.n < 2) return s;
    memcpy(q, s.p, cut);
    memcpy(q + cut, z, m);
    memcpy(q + cut + m, s.p + cut, s.n - cut);
    return (mut_span){ q, s.n + m };
}

static mut_span js_wrapped(mut_rng *r, mut_span s) {
    static const int deep[] = { 1, 2, 3, 8, 61, 62, 63, 64, 65 };
    int n = deep[mut_below(r, sizeof deep / sizeof *deep)], object = mut_chance(r, 40);
    uint8_t *q = mut_scratch(s.n + (size_t)n * 6);
    size_t at = 0;
    if (!q) return s;
    for (int i = 0; i < n; i++) { memcpy(q + at, object ? "{\"a\":" : "[", object ? 5 : 1); at += object ? 5 : 1; }
    memcpy(q + at, s.p, s.n);
    at += s.n;
    for (int i = 0; i < n; i++) q[at++] = object ? '}' : ']';
    return (mut_span){ q, at };
}

/* text with [from, to) replaced. */
static size_t js_splice(const js_doc *d, size_t from, size_t to, mut_span by, uint8_t *out, size_t room) {
    mut_out o = { out, 0, room };
    mut_put(&o, d->p, from);
    mut_put(&o, by.p, by.n);
    mut_put(&o, d->p + to, d->n - to);
    return o.n;
}

/* One value instead of another, or after it, or after a copy of itself, or gone with its comma. */
static size_t js_move(mut_rng *r, const js_doc *d, uint8_t *out, size_t room) {
    size_t a, b, c, e;
    int key = mut_chance(r, 70);
    if (!js_pick(r, d, key, &a, &b) || !js_pick(r, d, key, &c, &e)) return 0;
    switch (mut_below(r, 4)) {
    case 0:  return js_splice(d, a, b, (mut_span){ d->p + c, e - c }, out, room);
    case 1:                                     /* gone */
        while (b < d->n && d->p[b] == ' ') b++;
        if (b < d->n && d->p[b] == ',') b++;
        else if (a && d->p[a - 1] == ',') a--;
        return js_splice(d, a, b, (mut_span){ d->p, 0 }, out, room);
    default: {                                  /* a second one, most often without changes: duplicates are what readers disagree about */
        mut_span copy = { d->p + (mut_chance(r, 50) ? c : a), 0 };
        copy.n = copy.p == d->p + a ? b - a : e - c;
        uint8_t *q = mut_scratch(copy.n + 1);
        if (!q) return 0;
        q[0] = ',';
        memcpy(q + 1, copy.p, copy.n);
        return js_splice(d, b, b, (mut_span){ q, copy.n + 1 }, out, room);
    }
    }
}

static size_t js_new_member(mut_rng *r, const js_doc *d, uint8_t *out, size_t room) {
    mut_span key = js_quoted(r), value = mut_chance(r, 50) ? js_number(r, (mut_span){ (const uint8_t *)"64", 2 }, d->n) : mut_chance(r, 50) ? js_quoted(r) : mut_keep("{}", 2);
    uint8_t *q = mut_scratch(key.n + value.n + 2);
    if (!q) return 0;
    memcpy(q, key.p, key.n);
    q[key.n] = ':';
    memcpy(q + key.n + 1, value.p, value.n);
    q[key.n + 1 + value.n] = ',';
    for (int tries = 0; tries < 20; tries++) {
        const js_token *t = &d->t[mut_below(r, d->nt)];
        if (t->kind != '{' && t->kind != ',') continue;
        return js_splice(d, t->at + 1, t->at + 1, (mut_span){ q, key.n + value.n + 2 }, out, room);
    }
    return 0;
}

static size_t js_edit(mut_rng *r, const js_doc *d, uint8_t *out, size_t room) {
    const js_token *t = &d->t[mut_below(r, d->nt)];
    mut_span s = { d->p + t->at, t->n };
    size_t a, b;
    switch (mut_below(r, 10)) {
    case 0: case 1: case 2:                     /* this token by one of its kind */
        if (t->kind == '"') s = mut_chance(r, 40) ? js_escapes(r, s) : js_quoted(r);
        else if (!t->kind) s = js_number(r, s, d->n);
        else s = mut_keep(&"{}[]:,\" \n\t"[mut_below(r, 10)], 1);
        return js_splice(d, t->at, t->at + t->n, s, out, room);
    case 3:                                     /* by one of another kind */
        s = mut_chance(r, 50) ? js_number(r, s, d->n) : js_quoted(r);
        return js_splice(d, t->at, t->at + t->n, s, out, room);
    case 4: case 5: case 6: return js_move(r, d, out, room);
    case 7: return js_new_member(r, d, out, room);
    case 8:
        if (!js_pick(r, d, 0, &a, &b)) return 0;
        return js_splice(d, a, b, js_wrapped(r, (mut_span){ d->p + a, b - a }), out, room);
    default: return mut_chance(r, 50) ? js_splice(d, t->at, t->at + t->n, s = mut_keep("", 0), out, room) : js_splice(d, t->at + t->n, mut_chance(r, 70) ? t->at + t->n : d->n, mut_keep(" ", 1), out, room);
    }
}

size_t mut_json_text(mut_rng *r, const uint8_t *p, size_t n, uint8_t *out, size_t room) {
    static js_doc d;
    js_tokens(&d, p, n);
    return d.nt ? js_edit(r, &d, out, room) : 0;
}

/* One to three edits; 0 when the text has no token or an edit came to nothing. */
static size_t js_edits(mut_rng *r, uint8_t *p, size_t n, size_t room) {
    static uint8_t other[MUT_ROOM];
    size_t limit = room < MUT_ROOM ? room : MUT_ROOM;
    for (size_t k = 1 + mut_below(r, 3); k && n; k--) {
        n = mut_json_text(r, p, n, other, limit);
        memcpy(p, other, n);
    }
    return n;
}

size_t mutate_json(uint8_t *p, size_t n, size_t room, unsigned seed) {
    mut_rng r;
    mut_begin(&r, seed);
    if (mut_chance(&r, 15) || n > MUT_ROOM) return LLVMFuzzerMutate(p, n, room);
    size_t m = js_edits(&r, p, n, room);
    return m ? m : LLVMFuzzerMutate(p, n, room);
}

/* --- safetensors ----------------------------------------------------------------------------------------------------------------------- */

static size_t st_bytes(const char *dtype) {
    size_t n = strlen(dtype);
    return strstr(dtype, "64") ? 8 : strstr(dtype, "32") ? 4 : n > 2 && strstr(dtype, "16") ? 2 : 1;
}

/* A tensor that fits, behind all others: the only change that needs the header and the data at once. */
static size_t st_append(mut_rng *r, uint8_t *text, size_t n, size_t room, size_t data, size_t *more) {
    static const char *const dtype[] = { "F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "U16" };
    const char *d = dtype[mut_below(r, sizeof dtype / sizeof *dtype)];
    char entry[200], name[20];
    size_t a = mut_below(r, 4), b = mut_below(r, 4), size = a * b * st_bytes(d);
    sprintf(name, "t%d", (int)mut_below(r, 30));
    int len = sprintf(entry, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]}}", n > 2 ? "," : "", name, d, a, b, data, data + size);
    while (n && text[n - 1] != '}') n--;
    if (!n || n + (size_t)len > room) return n;
    memcpy(text + n - 1, entry, (size_t)len);
    *more = size;
    return n - 1 + (size_t)len;
}

size_t mutate_safetensors(uint8_t *p, size_t n, size_t room, unsigned seed) {
    static uint8_t text[MUT_ROOM], data[MUT_ROOM];
    mut_rng r;
    mut_begin(&r, seed);
    uint64_t said = n < 8 ? 0 : mut_read(p, 8);
    if (mut_chance(&r, 10) || n < 10 || n > MUT_ROOM / 2 || said > n - 8) return LLVMFuzzerMutate(p, n, room);
    size_t header = (size_t)said, body = n - 8 - header, more = 0, m = header;
    memcpy(text, p + 8, header);
    memcpy(data, p + 8 + header, body);
    memset(data + body, 0, 4096);
    if (mut_chance(&r, 80)) m = mut_chance(&r, 15) ? st_append(&r, text, header, sizeof text / 2, body, &more) : js_edits(&r, text, header, sizeof text / 2);
    if (mut_chance(&r, 5)) { memset(text + m, mut_chance(&r, 80) ? ' ' : '\n', 8); m += mut_below(&r, 9); }
    body += more;
    if (mut_chance(&r, 6)) body = mut_chance(&r, 50) ? mut_below(&r, body + 1) : body + 1 + mut_below(&r, 8);
    if (mut_chance(&r, 5) && body) body = LLVMFuzzerMutate(data, body, body + 1 < sizeof data ? body + 1 : body);
    mut_out o = { p, 0, room };
    mut_u64(&o, mut_chance(&r, 4) ? mut_number(&r, m, n) : m, 8);
    mut_put(&o, text, m);
    mut_put(&o, data, body);
    return o.n;
}
