/* target_safetensors.c: the bytes are a safetensors file without a config.json, whatever they begin with. */
#include "check.h"
#include "mutate.h"

static int st_use(const check_input *in, ap_err *e) {
    ap_file *f;
    AP_TRY(check_open(&f, in, e));
    int rc = check_file(f, e);
    ap_file_close(f);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    check_action(st_use, &(check_input){ .p = p, .n = n, .kind = check_container("safetensors") });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_safetensors(p, n, room, seed); }
