/*
** err.c: fills the caller's ap_err.  It owns no memory and no state, and it is the one place where text from a file is made fit to print.
** Every floor calls it; nothing below it can fail.
*/
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "err.h"

int ap_fail(ap_err *e, int kind, const char *fmt, ...) {
    va_list ap;
    e->kind = kind;
    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    return kind;
}

int ap_fail_at(ap_err *e, int kind, int64_t at, const char *field, const char *fmt, ...) {
    va_list ap;
    e->kind = kind;
    e->at = at;
    if (field && field != e->field) snprintf(e->field, sizeof e->field, "%s", field);
    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    return kind;
}

const char *ap_err_code(int kind) {
    static const char *const code[AP_ERR_N] = {
        "OK",
#define X(kind, code, class) code,
#include "errors.def"
    };
    return kind >= 0 && kind < AP_ERR_N ? code[kind] : "?";
}

/* Only printable ASCII survives: a name from a file can neither move the cursor nor reorder the line it is printed in (bidi overrides are
** valid UTF-8).  An escape is never cut in half, and a cut is shown as "...". */
char *ap_show(char out[132], const char *s, size_t n) {
    enum { ROOM = 128, DOTS = 3 };
    static const char hex[] = "0123456789abcdef";
    size_t at = 0, i = 0, fits = 0;             /* fits: where to cut so that the dots still have room */
    for (; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        int plain = c >= 0x20 && c < 0x7f && c != '\\';
        size_t need = plain ? 1 : c == '\\' ? 2 : 4;
        if (at + need > ROOM) break;
        if (plain) out[at++] = (char)c;
        else if (c == '\\') { out[at++] = '\\'; out[at++] = '\\'; }
        else { out[at++] = '\\'; out[at++] = 'x'; out[at++] = hex[c >> 4]; out[at++] = hex[c & 15]; }
        if (at <= ROOM - DOTS) fits = at;
    }
    if (i < n) { memcpy(out + fits, "...", DOTS); at = fits + DOTS; }
    out[at] = 0;
    return out;
}
