/* target_apr.c: the bytes are an APR file.  A core without that container has nothing to test: the target says so and ends well. */
#include <stdio.h>
#include <unistd.h>
#include "check.h"
#include "mutate.h"

static int apr_use(const check_input *in, ap_err *e) {
    ap_file *f;
    AP_TRY(check_open(&f, in, e));
    int rc = check_file(f, e);
    ap_file_close(f);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    const ap_container *kind = check_container("apr");
    if (!kind) { fputs("target apr: the container is not built in\n", stderr); _exit(0); }   /* exit would be taken for a crash */
    check_action(apr_use, &(check_input){ .p = p, .n = n, .kind = kind });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_apr(p, n, room, seed); }
