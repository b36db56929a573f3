/*
** map.c: the table of our maps and the handler of SIGBUS that looks into it.  A handler cannot be given an argument, so the table is the one global of the core:
** a slot is taken and freed by its atomic `from`.  A fault outside our maps goes to whoever handled it before us.
*/
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "map.h"

struct ap_map { _Atomic uintptr_t from, to; _Atomic int lost; uint64_t n; };
static ap_map map_table[AP_MAPS];
static struct sigaction map_before;
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;
static uintptr_t map_page;

static ap_map *map_around(uintptr_t at) {
    for (int i = 0; i < AP_MAPS; i++) {
        uintptr_t from = atomic_load(&map_table[i].from);
        if (from > 1 && at >= from && at < atomic_load(&map_table[i].to)) return &map_table[i];
    }
    return NULL;
}

/* Zeros take the place of all that follows, since a file is cut from behind; then the instruction that failed is run again.  mmap is a system call and
** nothing else: it may be used here. */
static void map_fault(int signal, siginfo_t *info, void *context) {
    int sys = errno;
    uintptr_t at = (uintptr_t)info->si_addr & ~(map_page - 1);
    ap_map *m = map_around((uintptr_t)info->si_addr);
    (void)context;
    if (m) {
        void *zeros = mmap((void *)at, atomic_load(&m->to) - at, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        atomic_store(&m->lost, 1);
        if (zeros != MAP_FAILED) { errno = sys; return; }
    }
    sigaction(signal, &map_before, NULL);       /* the instruction fails once more, and they handle it */
    errno = sys;
}

/* Others may have put their handler over ours since; then ours goes on top again. */
static int map_watch(ap_err *e) {
    struct sigaction now, ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = map_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    map_page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (sigaction(SIGBUS, NULL, &now)) return ap_fail(e, AP_IO, "cannot watch a mapped file: %m");
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == map_fault) return AP_OK;
    map_before = now;
    return sigaction(SIGBUS, &ours, NULL) ? ap_fail(e, AP_IO, "cannot watch a mapped file: %m") : AP_OK;
}

static ap_map *map_slot(void) {
    for (int i = 0; i < AP_MAPS; i++) {
        uintptr_t nothing = 0;
        if (atomic_compare_exchange_strong(&map_table[i].from, &nothing, 1)) return &map_table[i];
    }
    return NULL;
}

static int map_fill(ap_map *m, int fd, uint64_t n, ap_err *e) {
    AP_TRY(map_watch(e));
    void *p = n ? mmap(NULL, (size_t)n, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
    if (n && p == MAP_FAILED) { e->sys = errno; return ap_fail(e, errno == ENOMEM ? AP_MEMORY : AP_IO, "cannot map %llu bytes: %m", (unsigned long long)n); }
    m->n = n;
    atomic_store(&m->lost, 0);
    atomic_store(&m->to, n ? (uintptr_t)p + n : 2);
    atomic_store(&m->from, n ? (uintptr_t)p : 2);
    return AP_OK;
}

int ap_map_open(ap_map **out, int fd, uint64_t n, ap_err *e) {
    ap_map *m = map_slot();
    if (!m) return ap_fail(e, AP_LIMIT, "more than %d files are mapped", (int)AP_MAPS);
    pthread_mutex_lock(&map_lock);
    int rc = map_fill(m, fd, n, e);
    pthread_mutex_unlock(&map_lock);
    if (rc) atomic_store(&m->from, 0);
    else *out = m;
    return rc;
}

const uint8_t *ap_map_bytes(const ap_map *m) { return (const uint8_t *)atomic_load(&m->from); }
int ap_map_lost(const ap_map *m) { return atomic_load(&m->lost); }

void ap_map_close(ap_map *m) {
    if (!m) return;
    uintptr_t from = atomic_load(&m->from);
    atomic_store(&m->to, 0);
    if (m->n) munmap((void *)from, (size_t)m->n);
    atomic_store(&m->from, 0);
}
