/*
** target_folder.c: the bytes are a folder: a choice of what is opened, then up to eight entries of name, kind, length and content.  The folder is made in
** memory, as the one snapshot of a hub's cache, opened by path and bound; so that what is spread over files (shards, splits, a configuration beside the
** weights) and what is no file (folders, pipes, links) is met as it comes.
** It owns a temporary folder, which it empties after each run and removes at the end.
*/
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "mutate.h"
#include "use.h"
#include "../../csrc/file/aprt.h"

enum { ENTRIES = 8, HEAD = 4, NAMES = 12, LINKS = 10 };
static const char *const folder_name[NAMES] = {
    "model.safetensors", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m.apr", "m.bin", "\x1b[31mred", "../../blobs/b0", "../../blobs/b1",
};
enum { AS_TRACE = 128 };                        /* added to the choice: it is read as an APRT file */
static const char *const folder_link[LINKS] = { "../../blobs/b0", "../../blobs/b1", "../../blobs/../x", "model.safetensors", "nothing", "/dev/zero", ".", "m.bin", "../../blobs/.b", "../../blobs/" };
typedef enum { REGULAR, FOLDER, PIPE, LINK, KINDS } folder_kind;
typedef struct { uint8_t name, kind; const uint8_t *p; size_t n; } folder_entry;
typedef struct { uint8_t open; folder_entry e[ENTRIES]; int n; } folder_tree;

static char folder_base[64], folder_path[128];

static void folder_apart(folder_tree *t, const uint8_t *p, size_t n) {
    memset(t, 0, sizeof *t);
    if (n) t->open = p[0];
    for (size_t at = 1; at + HEAD <= n && t->n < ENTRIES; ) {
        folder_entry *e = &t->e[t->n++];
        size_t size = (size_t)mut_read(p + at + 2, 2);
        *e = (folder_entry){ p[at] % NAMES, p[at + 1] % KINDS, p + at + HEAD, size < n - at - HEAD ? size : n - at - HEAD };
        at += HEAD + e->n;
    }
}

static size_t folder_together(const folder_tree *t, uint8_t *p, size_t room) {
    static uint8_t made[MUT_ROOM];
    mut_out o = { made, 0, room < sizeof made ? room : sizeof made };
    mut_u64(&o, t->open, 1);
    for (int i = 0; i < t->n; i++) {
        mut_u64(&o, t->e[i].name, 1);
        mut_u64(&o, t->e[i].kind, 1);
        mut_u64(&o, t->e[i].n, 2);
        mut_put(&o, t->e[i].p, t->e[i].n);
    }
    memcpy(p, made, o.n);
    return o.n;
}

/* --- the folder on disk ---------------------------------------------------------------------------------------------------------------- */

static void folder_of(char out[256], int name) { snprintf(out, 256, "%s/%s", folder_path, folder_name[name]); }

static void folder_empty(void) {
    char path[256];
    for (int i = 0; i < NAMES; i++) { folder_of(path, i); if (unlink(path)) rmdir(path); }
}

static void folder_end(void) {
    char path[256];
    folder_empty();
    rmdir(folder_path);
    snprintf(path, sizeof path, "%s/snapshots", folder_base); rmdir(path);
    snprintf(path, sizeof path, "%s/blobs", folder_base); rmdir(path);
    rmdir(folder_base);
}

static void folder_begin(void) {
    char path[256];
    snprintf(folder_base, sizeof folder_base, "%s/fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    CHECK(mkdtemp(folder_base), "no temporary folder for the test itself");
    snprintf(path, sizeof path, "%s/snapshots", folder_base); mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/blobs", folder_base); mkdir(path, 0700);
    snprintf(folder_path, sizeof folder_path, "%s/snapshots/s", folder_base); mkdir(folder_path, 0700);
    atexit(folder_end);
}

static void folder_write(const folder_entry *e) {
    char path[256];
    folder_of(path, e->name);
    if (e->kind == FOLDER) mkdir(path, 0700);
    else if (e->kind == PIPE) { if (mkfifo(path, 0600)) return; }
    else if (e->kind == LINK) { if (symlink(folder_link[e->n ? e->p[0] % LINKS : 0], path)) return; }
    else {
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
        if (fd < 0) return;
        CHECK(write(fd, e->p, e->n) == (ssize_t)e->n, "the temporary folder is full");
        close(fd);
    }
}

/* --- the target ------------------------------------------------------------------------------------------------------------------------ */

static int folder_use(const check_input *in, ap_err *e) {
    char path[256];
    ap_file *f;
    if (in->p[0] % (NAMES + 1) == NAMES) snprintf(path, sizeof path, "%s", folder_path);
    else folder_of(path, in->p[0] % (NAMES + 1));
    if (in->p[0] >= AS_TRACE) {
        ap_aprt a = { .v = NULL };
        AP_TRY(ap_aprt_read(&a, path, e));
        ap_free(a.memory);
        return AP_OK;
    }
    AP_TRY(ap_file_open(&f, path, (int)(in->n & 1), e));        /* odd: mapped */
    int rc = check_file(f, e);
    if (!rc) rc = use_file(f, e);
    ap_file_close(f);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    folder_tree t;
    if (!n) return 0;
    if (!folder_base[0]) folder_begin();
    folder_apart(&t, p, n);
    for (int i = 0; i < t.n; i++) folder_write(&t.e[i]);
    check_action(folder_use, &(check_input){ .p = p, .n = n });
    folder_empty();
    return 0;
}

static void folder_mutate_entry(folder_entry *e, size_t room, unsigned seed) {
    uint8_t *q = mut_scratch(room);
    if (!q || e->n > room) return;
    if (e->n) memcpy(q, e->p, e->n);
    int json = e->n && (e->p[0] == '{' || e->name == 1 || e->name == 2);
    uint8_t keep[MUT_ROOM / 8];                 /* the mutators empty the arena */
    if (room > sizeof keep) return;
    memcpy(keep, q, e->n);
    size_t n = json ? mutate_json(keep, e->n, room, seed) : mutate_model(keep, e->n, room, seed);
    *e = (folder_entry){ e->name, e->kind, mut_keep(keep, n).p, n };
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) {
    static uint8_t before[MUT_ROOM];
    folder_tree t;
    mut_rng r = { seed * 0x9E3779B97F4A7C15u + 7 };
    if (n > sizeof before || mut_chance(&r, 5)) return LLVMFuzzerMutate(p, n, room);
    memcpy(before, p, n);
    folder_apart(&t, before, n);
    if (!t.n) return LLVMFuzzerMutate(p, n, room);
    folder_entry *e = &t.e[mut_below(&r, (size_t)t.n)];
    switch (mut_below(&r, 12)) {
    case 0: t.open = (uint8_t)mut_next(&r); break;
    case 1: e->name = (uint8_t)mut_below(&r, NAMES); break;
    case 2: e->kind = (uint8_t)(mut_chance(&r, 50) ? REGULAR : mut_below(&r, KINDS)); break;
    case 3: *e = t.e[--t.n]; break;
    case 4: if (t.n < ENTRIES) { t.e[t.n] = *e; t.e[t.n++].name = (uint8_t)mut_below(&r, NAMES); } break;
    default: folder_mutate_entry(e, room < 8192 ? room : 8192, (unsigned)mut_next(&r));
    }
    return folder_together(&t, p, room);
}
