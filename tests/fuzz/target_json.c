/*
** target_json.c: the bytes are JSON.  Every token is taken, every string un-escaped into a buffer of exactly its size, and the same text is skipped as a
** whole: both ways must come to the same end.
*/
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "mutate.h"
#include "../../csrc/base/json.h"

static int json_unescape(const ap_json *j, ap_err *e) {
    uint64_t n = 0, less = 0;
    ap_err quiet = AP_ERR_INIT;
    char *out = malloc(j->span.n ? (size_t)j->span.n : 1);
    CHECK(out, "no memory for the test itself");
    int rc = ap_json_text(j, j->span, out, j->span.n, &n, e);
    CHECK(!rc, "a string that was passed cannot be un-escaped: %s", e->msg);
    CHECK(n <= j->span.n, "%llu bytes of text from %llu", (unsigned long long)n, (unsigned long long)j->span.n);
    if (n) CHECK(ap_json_text(j, j->span, out, n - 1, &less, &quiet) == AP_LIMIT, "text of %llu bytes went into %llu", (unsigned long long)n, (unsigned long long)n - 1);
    free(out);
    return rc;
}

static void json_token(const ap_json *j, ap_jkind kind) {
    CHECK(j->pos <= j->n && j->depth >= 0 && j->depth <= AP_JSON_DEPTH, "byte %llu of %llu, depth %d", (unsigned long long)j->pos, (unsigned long long)j->n, j->depth);
    if (kind != AP_J_INT && kind != AP_J_NUM) return;
    char *end, number[256];
    CHECK(j->span.n && j->span.n < sizeof number, "a number of %llu digits", (unsigned long long)j->span.n);
    memcpy(number, j->span.p, (size_t)j->span.n);
    number[j->span.n] = 0;
    CHECK(strtod(number, &end) == j->num && !*end && isfinite(j->num), "'%s' was read as %g", number, j->num);
    if (kind == AP_J_INT) CHECK(strtoull(number + j->negative, NULL, 10) == j->mag, "'%s' was read as %llu", number, (unsigned long long)j->mag);
}

static int json_walk(ap_json *j, ap_err *e) {
    ap_jkind kind;
    uint64_t last = 0;
    do {
        AP_TRY(ap_json_next(j, &kind, e));
        CHECK(j->pos > last || kind == AP_J_END, "token %d at byte %llu takes no bytes", kind, (unsigned long long)j->pos);
        last = j->pos;
        json_token(j, kind);
        if (kind == AP_J_STR || kind == AP_J_KEY) AP_TRY(json_unescape(j, e));
    } while (kind != AP_J_END);
    return AP_OK;
}

static int json_use(const check_input *in, ap_err *e) {
    ap_json walked, skipped;
    ap_err other = AP_ERR_INIT;
    ap_jkind kind;
    ap_json_init(&walked, (const char *)in->p, in->n);
    skipped = walked;
    int rc = json_walk(&walked, e), again = ap_json_skip(&skipped, &other);
    if (!again) again = ap_json_next(&skipped, &kind, &other);
    CHECK(rc == again && e->at == other.at && !strcmp(e->msg, other.msg), "walked: %s; skipped: %s", e->msg, other.msg);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    check_action(json_use, &(check_input){ .p = p, .n = n });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_json(p, n, room, seed); }
