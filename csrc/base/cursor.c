/*
** cursor.c: bounded reads of little-endian bytes, and what counts as UTF-8.  Owns nothing; a read that does not fit says 0 and moves nothing.
** The containers call it for every byte that they interpret.
*/
#include <string.h>
#include "cursor.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian and are read by memcpy: a big-endian host needs swaps here");

static int cur_copy(ap_cur *c, void *out, uint64_t n) {
    if (n > ap_left(c)) return 0;
    memcpy(out, c->base + c->pos, (size_t)n);
    c->pos += n;
    return 1;
}

int ap_u8 (ap_cur *c, uint8_t  *out) { return cur_copy(c, out, sizeof *out); }
int ap_u16(ap_cur *c, uint16_t *out) { return cur_copy(c, out, sizeof *out); }
int ap_u32(ap_cur *c, uint32_t *out) { return cur_copy(c, out, sizeof *out); }
int ap_u64(ap_cur *c, uint64_t *out) { return cur_copy(c, out, sizeof *out); }

int ap_take(ap_cur *c, uint64_t n, const uint8_t **out) {
    if (n > ap_left(c)) return 0;
    *out = c->base + c->pos;
    c->pos += n;
    return 1;
}

/* Table 3-7 of the Unicode standard: the first byte fixes the length and the range of the second; all others are 80..BF.  That rules out
** overlong forms (C0, C1, E0 80, F0 80), surrogates (ED A0) and everything above U+10FFFF (F4 90, F5). */
int ap_utf8_ok(const char *p, uint64_t n) {
    const uint8_t *s = (const uint8_t *)p;
    uint64_t i = 0;
    while (i < n) {
        uint64_t eight;
        if (n - i >= 8 && (memcpy(&eight, s + i, 8), !(eight & 0x8080808080808080u))) { i += 8; continue; }
        uint8_t c = s[i];
        if (c < 0x80) { i++; continue; }
        int more = c >= 0xC2 && c <= 0xDF ? 1 : c >= 0xE0 && c <= 0xEF ? 2 : c >= 0xF0 && c <= 0xF4 ? 3 : 0;
        if (!more || n - i <= (uint64_t)more) return 0;
        uint8_t lo = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, hi = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
        if (s[i + 1] < lo || s[i + 1] > hi) return 0;
        for (int k = 2; k <= more; k++) if ((s[i + (uint64_t)k] & 0xC0) != 0x80) return 0;
        i += 1 + (uint64_t)more;
    }
    return 1;
}

int ap_str_is(ap_str s, const char *z) {
    size_t n = strlen(z);
    return s.n == n && !memcmp(s.p, z, n);
}
