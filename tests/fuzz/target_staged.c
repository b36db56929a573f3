/*
** target_staged.c: the bytes are a model file, opened from memory and by path.  By path only the first AP_FILE_WHOLE bytes are read, then twice as many for as
** long as the description does not end, and a tensor's bytes when they are wanted, or mapped when the size is odd (scripts/fuzz.py makes that number small).  All ways must see the same.
*/
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "check.h"
#include "mutate.h"

static char staged_folder[64], staged_path[96];

static void staged_end(void) { unlink(staged_path); rmdir(staged_folder); }

static void staged_begin(void) {
    snprintf(staged_folder, sizeof staged_folder, "%s/fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    CHECK(mkdtemp(staged_folder), "no temporary folder for the test itself");
    snprintf(staged_path, sizeof staged_path, "%s/model", staged_folder);
    atexit(staged_end);
}

static int staged_same_tensor(const ap_file *f, const ap_tensor *t, const ap_file *g, const ap_tensor *u, ap_err *e) {
    const uint8_t *p = NULL, *q = NULL;
    CHECK(t->name.n == u->name.n && !memcmp(t->name.p, u->name.p, t->name.n) && t->fmt == u->fmt && t->nd == u->nd && t->bytes == u->bytes && t->offset == u->offset, "another tensor");
    for (int d = 0; d < t->nd; d++) CHECK(t->dim[d] == u->dim[d], "dimension %d", d);
    AP_TRY(ap_file_data(f, t, &p, e));
    AP_TRY(ap_file_data(g, u, &q, e));
    CHECK(!t->bytes || !memcmp(p, q, t->bytes), "other bytes");
    return AP_OK;
}

static int staged_same(const ap_file *f, const ap_file *g, ap_err *e) {
    CHECK(f->kind == g->kind && f->nt == g->nt && f->nkv == g->nkv && f->nnotes == g->nnotes, "%d or %d tensors, %d or %d keys", f->nt, g->nt, f->nkv, g->nkv);
    for (int i = 0; i < f->nt; i++) AP_TRY(staged_same_tensor(f, &f->t[i], g, &g->t[i], e));
    for (int i = 0; i < f->nkv; i++) {
        const ap_kv *a = &f->kv[i], *b = &g->kv[i];
        CHECK(a->kind == b->kind && a->n == b->n && a->key.n == b->key.n && !memcmp(a->key.p, b->key.p, a->key.n), "another key");
        CHECK(a->s.n == b->s.n && (!a->s.n || !memcmp(a->s.p, b->s.p, a->s.n)) && !memcmp(&a->v, &b->v, sizeof a->v), "another value");
    }
    return AP_OK;
}

static int staged_use(const check_input *in, ap_err *e) {
    ap_file *f, *g = NULL;
    ap_err other = AP_ERR_INIT;
    int rc = ap_file_open(&f, staged_path, (int)(in->n & 1), e), again = ap_file_open_bytes(&g, in->p, in->n, NULL, NULL, 0, &other);
    int memory = rc == AP_MEMORY || again == AP_MEMORY, parts = !rc != !again && (e->kind == AP_MISSING || other.kind == AP_MISSING || e->kind == AP_CONFIG || other.kind == AP_CONFIG);
    CHECK(rc == again || memory || parts, "by path: %s: %s; from memory: %s: %s", ap_err_code(rc), e->msg, ap_err_code(again), other.msg);
    if (again == AP_MEMORY) { rc = again; *e = other; }
    else if (!rc && !again) rc = staged_same(f, g, e);
    if (!rc) rc = check_file(f, e);
    ap_file_close(f);
    ap_file_close(g);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    if (!staged_folder[0]) staged_begin();
    int fd = open(staged_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, p, n) == (ssize_t)n, "the temporary folder is full");
    close(fd);
    check_action(staged_use, &(check_input){ .p = p, .n = n });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_model(p, n, room, seed); }
