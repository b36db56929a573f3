/*
** num.h: arithmetic on sizes that came from a file.  Every sum and product of such values goes through these, so that no check can be
** bypassed by one more addition between the test and the use.  All return 1 when the result is exact and 0 when it overflowed.
*/
#ifndef AP_NUM_H
#define AP_NUM_H
#include <stdint.h>
#include <stddef.h>
static inline int ap_add_ok(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_add_overflow(a, b, out); }
static inline int ap_mul_ok(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_mul_overflow(a, b, out); }
/* Round a up to a multiple of `to`, a power of two. */
static inline int ap_align_ok(uint64_t a, uint64_t to, uint64_t *out) {
    uint64_t up;
    if (!ap_add_ok(a, to - 1, &up)) return 0;
    *out = up & ~(to - 1);
    return 1;
}
#endif
