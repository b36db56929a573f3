/* target_bind.c: the bytes are a model in any container; they are opened by what they begin with, bound, planned and run. */
#include "mutate.h"
#include "use.h"

static int bind_use(const check_input *in, ap_err *e) {
    ap_file *f;
    AP_TRY(check_open(&f, in, e));
    int rc = use_file(f, e);
    ap_file_close(f);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    check_action(bind_use, &(check_input){ .p = p, .n = n });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_model(p, n, room, seed); }
