/*
** json.c: the pull parser of json.h.  It owns nothing (the text and the struct are the caller's) and refuses whatever RFC 8259 does not allow, so that
** two readers cannot understand one file differently.  Strings are fully checked when they are passed, also the ones that are skipped.
** file/safetensors.c calls it, and so may anything that is handed JSON.
*/
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "json.h"

enum { JSON_VALUE, JSON_FIRST_ITEM, JSON_FIRST_KEY, JSON_AFTER };      /* what may come next: a value; or ]; a key or }; a comma or a closing bracket */
enum { JSON_NUMBER = 128 };     /* bytes of a number: the longest that a float64 prints as has 25, an exact one in a config is never near */

void ap_json_init(ap_json *j, const char *p, uint64_t n) { *j = (ap_json){ .p = p, .n = n, .state = JSON_VALUE }; }

static int json_peek(const ap_json *j) { return j->pos < j->n ? (unsigned char)j->p[j->pos] : -1; }

static int json_bad(ap_json *j, const char *wanted, ap_err *e) {
    char shown[132];
    if (j->pos >= j->n) return ap_fail_at(e, AP_JSON, (int64_t)j->pos, NULL, "JSON ends at byte %llu, expected %s", (unsigned long long)j->pos, wanted);
    return ap_fail_at(e, AP_JSON, (int64_t)j->pos, NULL, "JSON byte %llu: expected %s, found '%s'", (unsigned long long)j->pos, wanted, ap_show(shown, j->p + j->pos, 1));
}

static void json_blank(ap_json *j) {
    while (j->pos < j->n && (j->p[j->pos] == ' ' || j->p[j->pos] == '\n' || j->p[j->pos] == '\r' || j->p[j->pos] == '\t')) j->pos++;
}

/* --- strings --------------------------------------------------------------------------------------------------------------------------- */

static int json_hex4(const char *p, uint32_t *out) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (d < 0) return 0;
        v = v * 16 + (uint32_t)d;
    }
    *out = v;
    return 1;
}

/* The escape at p[0] == '\\', n bytes left: code point and length.  AP_OK, AP_JSON for a form that does not exist, AP_UTF8 for half a pair. */
static int json_escape(const char *p, uint64_t n, uint32_t *cp, uint64_t *len) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (n < 2) return AP_JSON;
    *len = 2;
    if (p[1] != 'u') {
        const char *at = p[1] ? strchr(from, p[1]) : NULL;
        if (!at) return AP_JSON;
        *cp = (unsigned char)to[at - from];
        return AP_OK;
    }
    uint32_t low;
    if (n < 6 || !json_hex4(p + 2, cp)) return AP_JSON;
    *len = 6;
    if (*cp < 0xD800 || *cp > 0xDFFF) return AP_OK;
    if (*cp > 0xDBFF || n < 12 || p[6] != '\\' || p[7] != 'u' || !json_hex4(p + 8, &low) || low < 0xDC00 || low > 0xDFFF) return AP_UTF8;
    *cp = 0x10000 + ((*cp - 0xD800) << 10) + (low - 0xDC00);
    *len = 12;
    return AP_OK;
}

static int json_escape_fails(int kind, int64_t at, ap_err *e) {
    if (kind == AP_UTF8) return ap_fail_at(e, AP_UTF8, at, NULL, "JSON byte %lld: half of a surrogate pair", (long long)at);
    return ap_fail_at(e, AP_JSON, at, NULL, "JSON byte %lld: no such escape", (long long)at);
}

static int json_string(ap_json *j, ap_err *e) {
    uint64_t from = ++j->pos;
    for (; j->pos < j->n && j->p[j->pos] != '"'; ) {
        unsigned char c = (unsigned char)j->p[j->pos];
        uint32_t cp;
        uint64_t len = 1;
        if (c < 0x20) return json_bad(j, "a string without control characters", e);
        if (c == '\\') {
            int kind = json_escape(j->p + j->pos, j->n - j->pos, &cp, &len);
            if (kind) return json_escape_fails(kind, (int64_t)j->pos, e);
        }
        j->pos += len;
    }
    if (j->pos >= j->n) return json_bad(j, "the end of a string", e);
    j->span = (ap_str){ j->p + from, j->pos - from };
    if (!ap_utf8_ok(j->span.p, j->span.n)) return ap_fail_at(e, AP_UTF8, (int64_t)from, NULL, "JSON byte %llu: a string that is not UTF-8", (unsigned long long)from);
    j->pos++;
    return AP_OK;
}

static uint64_t json_utf8(uint32_t cp, char out[4]) {
    if (cp < 0x80) { out[0] = (char)cp; return 1; }
    if (cp < 0x800) { out[0] = (char)(0xC0 | cp >> 6); out[1] = (char)(0x80 | (cp & 63)); return 2; }
    if (cp < 0x10000) { out[0] = (char)(0xE0 | cp >> 12); out[1] = (char)(0x80 | (cp >> 6 & 63)); out[2] = (char)(0x80 | (cp & 63)); return 3; }
    out[0] = (char)(0xF0 | cp >> 18); out[1] = (char)(0x80 | (cp >> 12 & 63)); out[2] = (char)(0x80 | (cp >> 6 & 63)); out[3] = (char)(0x80 | (cp & 63));
    return 4;
}

/* The text never grows: the shortest escape of a code point is at least as long as its UTF-8. */
int ap_json_text(const ap_json *j, ap_str span, char *out, uint64_t cap, uint64_t *len, ap_err *e) {
    uint64_t at = 0;
    for (uint64_t i = 0; i < span.n; ) {
        char utf8[4];
        uint64_t take = 1, put = 1;
        utf8[0] = span.p[i];
        if (span.p[i] == '\\') {
            uint32_t cp = 0;
            int kind = json_escape(span.p + i, span.n - i, &cp, &take);
            if (kind) return json_escape_fails(kind, (int64_t)(span.p - j->p) + (int64_t)i, e);
            put = json_utf8(cp, utf8);
        }
        if (put > cap - at) return ap_fail_at(e, AP_LIMIT, span.p - j->p, NULL, "a JSON string of %llu bytes does not fit into %llu", (unsigned long long)span.n, (unsigned long long)cap);
        memcpy(out + at, utf8, put);
        at += put;
        i += take;
    }
    if (!ap_utf8_ok(out, at)) return ap_fail_at(e, AP_UTF8, span.p - j->p, NULL, "a JSON string that is not UTF-8");
    *len = at;
    return AP_OK;
}

/* --- numbers --------------------------------------------------------------------------------------------------------------------------- */

static int json_digits(ap_json *j) {
    uint64_t from = j->pos;
    while (j->pos < j->n && j->p[j->pos] >= '0' && j->p[j->pos] <= '9') j->pos++;
    return j->pos > from;
}

/* strtod reads the decimal point of the user's locale, which a library may neither know nor change: hence strtod_l in "C". */
static int json_double(const char *p, uint64_t n, double *out) {
    char z[JSON_NUMBER + 1];
    locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!c) return 0;
    memcpy(z, p, n);
    z[n] = 0;
    *out = strtod_l(z, NULL, c);
    freelocale(c);
    return 1;
}

static int json_number(ap_json *j, ap_jkind *kind, ap_err *e) {
    uint64_t from = j->pos;
    int whole = 1, fits = 1;
    j->negative = json_peek(j) == '-';
    j->mag = 0;
    j->pos += (uint64_t)j->negative;
    uint64_t first = j->pos;
    if (!json_digits(j)) return json_bad(j, "a digit", e);
    if (j->p[first] == '0' && j->pos - first > 1) { j->pos = first + 1; return json_bad(j, "a number without leading zeros", e); }
    for (uint64_t i = first; i < j->pos; i++) {
        uint64_t ten;
        fits = fits && !__builtin_mul_overflow(j->mag, (uint64_t)10, &ten) && !__builtin_add_overflow(ten, (uint64_t)(j->p[i] - '0'), &j->mag);
    }
    if (json_peek(j) == '.') { whole = 0; j->pos++; if (!json_digits(j)) return json_bad(j, "a digit after the point", e); }
    if (json_peek(j) == 'e' || json_peek(j) == 'E') {
        whole = 0;
        j->pos++;
        if (json_peek(j) == '+' || json_peek(j) == '-') j->pos++;
        if (!json_digits(j)) return json_bad(j, "a digit in the exponent", e);
    }
    j->span = (ap_str){ j->p + from, j->pos - from };
    if (j->span.n > JSON_NUMBER)
        return ap_fail_at(e, AP_JSON, (int64_t)from, NULL, "JSON byte %llu: a number of %llu digits, at most %d are read", (unsigned long long)from, (unsigned long long)j->span.n, (int)JSON_NUMBER);
    if (!json_double(j->span.p, j->span.n, &j->num)) return ap_fail(e, AP_MEMORY, "no memory to read a number");
    if (!isfinite(j->num)) return ap_fail_at(e, AP_JSON, (int64_t)from, NULL, "JSON byte %llu: a number beyond float64", (unsigned long long)from);
    *kind = whole && fits && (!j->negative || j->mag <= (uint64_t)1 << 63) ? AP_J_INT : AP_J_NUM;
    return AP_OK;
}

/* --- structure ------------------------------------------------------------------------------------------------------------------------- */

static int json_open(ap_json *j, int state, ap_jkind is, ap_jkind *kind, ap_err *e) {
    if (j->depth == AP_JSON_DEPTH) return ap_fail_at(e, AP_DEPTH, (int64_t)j->pos, NULL, "JSON byte %llu: nested deeper than %d", (unsigned long long)j->pos, (int)AP_JSON_DEPTH);
    j->stack[j->depth++] = (uint8_t)is;
    j->state = state;
    j->pos++;
    *kind = is;
    return AP_OK;
}

static int json_close(ap_json *j, ap_jkind is, ap_jkind *kind) {
    j->depth--;
    j->state = JSON_AFTER;
    j->pos++;
    *kind = is;
    return AP_OK;
}

static int json_word(ap_json *j, const char *word, ap_jkind is, ap_jkind *kind, ap_err *e) {
    uint64_t n = strlen(word);
    if (j->n - j->pos < n || memcmp(j->p + j->pos, word, n)) return json_bad(j, "a value", e);
    j->span = (ap_str){ j->p + j->pos, n };
    j->pos += n;
    *kind = is;
    return AP_OK;
}

static int json_value(ap_json *j, ap_jkind *kind, ap_err *e) {
    int c = json_peek(j);
    if (c == '{') return json_open(j, JSON_FIRST_KEY, AP_J_OBJ, kind, e);
    if (c == '[') return json_open(j, JSON_FIRST_ITEM, AP_J_ARR, kind, e);
    j->state = JSON_AFTER;
    *kind = AP_J_STR;
    switch (c) {
    case '"': return json_string(j, e);
    case 't': return json_word(j, "true", AP_J_TRUE, kind, e);
    case 'f': return json_word(j, "false", AP_J_FALSE, kind, e);
    case 'n': return json_word(j, "null", AP_J_NULL, kind, e);
    default:  return c == '-' || (c >= '0' && c <= '9') ? json_number(j, kind, e) : json_bad(j, "a value", e);
    }
}

static int json_key(ap_json *j, ap_jkind *kind, ap_err *e) {
    if (json_peek(j) != '"') return json_bad(j, "a key", e);
    AP_TRY(json_string(j, e));
    json_blank(j);
    if (json_peek(j) != ':') return json_bad(j, "':' after a key", e);
    j->pos++;
    j->state = JSON_VALUE;
    *kind = AP_J_KEY;
    return AP_OK;
}

int ap_json_next(ap_json *j, ap_jkind *kind, ap_err *e) {
    json_blank(j);
    int c = json_peek(j);
    int object = j->depth && j->stack[j->depth - 1] == AP_J_OBJ;
    switch (j->state) {
    case JSON_VALUE:      return json_value(j, kind, e);
    case JSON_FIRST_ITEM: return c == ']' ? json_close(j, AP_J_ARR_END, kind) : json_value(j, kind, e);
    case JSON_FIRST_KEY:  return c == '}' ? json_close(j, AP_J_OBJ_END, kind) : json_key(j, kind, e);
    }
    if (!j->depth) {
        if (c >= 0) return json_bad(j, "nothing after the value", e);
        *kind = AP_J_END;
        return AP_OK;
    }
    if (c == (object ? '}' : ']')) return json_close(j, object ? AP_J_OBJ_END : AP_J_ARR_END, kind);
    if (c != ',') return json_bad(j, object ? "',' or '}'" : "',' or ']'", e);
    j->pos++;
    json_blank(j);
    return object ? json_key(j, kind, e) : json_value(j, kind, e);
}

int ap_json_skip(ap_json *j, ap_err *e) {
    int depth = j->depth;
    ap_jkind kind;
    do AP_TRY(ap_json_next(j, &kind, e)); while (j->depth > depth);
    return AP_OK;
}
