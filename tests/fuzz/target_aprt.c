/* target_aprt.c: the bytes are an APRT file, the values of one stage. */
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "mutate.h"
#include "../../csrc/file/aprt.h"

static int aprt_use(const check_input *in, ap_err *e) {
    ap_aprt a = { .v = NULL };
    AP_TRY(ap_aprt_parse(&a, in->p, in->n, e));
    CHECK(in->n == AP_APRT_HEADER + a.n * sizeof *a.v, "%llu values in %zu bytes", (unsigned long long)a.n, in->n);
    CHECK(!a.n || (const uint8_t *)a.v == in->p + AP_APRT_HEADER, "the values lie somewhere else");
    CHECK(a.layer == mut_read(in->p + 4, 4), "layer %u", (unsigned)a.layer);
    return AP_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    uint8_t *aligned = malloc(n ? n : 1);       /* as the parser wants it, and as long as it says */
    CHECK(aligned, "no memory for the test itself");
    if (n) memcpy(aligned, p, n);
    check_action(aprt_use, &(check_input){ .p = aligned, .n = n });
    free(aligned);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_aprt(p, n, room, seed); }
