/*
** cursor.h: the only way to read bytes of a parsed file.  A cursor is base, length, position; every reader checks `n <= len - pos` and
** copies with memcpy, so alignment and aliasing cannot matter.  Readers return 1, or 0 and leave the position alone.
*/
#ifndef AP_CURSOR_H
#define AP_CURSOR_H
#include <stddef.h>
#include <stdint.h>
typedef struct { const uint8_t *base; uint64_t len, pos, whole; } ap_cur;  /* whole: bytes of the file, of which the first len are here; 0: no matter */
typedef struct { const char *p; uint64_t n; } ap_str;           /* not NUL-terminated; points into memory that the file owns */
static inline uint64_t ap_left(const ap_cur *c) { return c->len - c->pos; }
int ap_u8 (ap_cur *c, uint8_t  *out);
int ap_u16(ap_cur *c, uint16_t *out);
int ap_u32(ap_cur *c, uint32_t *out);
int ap_u64(ap_cur *c, uint64_t *out);
int ap_take(ap_cur *c, uint64_t n, const uint8_t **out);        /* n bytes, borrowed */
int ap_utf8_ok(const char *p, uint64_t n);                      /* strict: no overlongs, no surrogates, <= U+10FFFF */
int ap_str_is(ap_str s, const char *z);
#endif
