/*
** err.h: how the core fails.  The caller owns an ap_err on its stack; every fallible function takes it last and returns the kind (0 is
** success), so `return ap_fail(e, AP_SHAPE, ...)` and AP_TRY are the whole vocabulary.  Nothing here prints, exits or allocates; py/errors.c
** turns the struct into an exception.  Text from a file goes through ap_show, which escapes it and cuts it at 128 bytes.
*/
#ifndef AP_ERR_H
#define AP_ERR_H
#include <stddef.h>
#include <stdint.h>

typedef enum {
    AP_OK,
#define X(kind, code, class) AP_##kind,
#include "errors.def"
    AP_ERR_N
} ap_kind;

typedef struct {
    int kind;
    int layer, stage;       /* -1 when the failure has no place in the forward pass       */
    int sys;                /* errno of an IO failure, else 0                             */
    int64_t at;             /* byte offset in the file, -1 when there is none             */
    char field[128];        /* key, tensor or argument concerned; "" when there is none   */
    char msg[480];
} ap_err;

#define AP_ERR_INIT { 0, -1, -1, 0, -1, "", "" }
#define AP_TRY(x) do { int rc_ = (x); if (rc_) return rc_; } while (0)

int ap_fail(ap_err *e, int kind, const char *fmt, ...) __attribute__((format(printf, 3, 4), warn_unused_result, cold));
int ap_fail_at(ap_err *e, int kind, int64_t at, const char *field, const char *fmt, ...)
    __attribute__((format(printf, 5, 6), warn_unused_result, cold));     /* field may be NULL: keep what is there */
const char *ap_err_code(int kind);
char *ap_show(char out[132], const char *s, size_t n);                   /* printable, escaped, at most 128 bytes + NUL */
#endif
