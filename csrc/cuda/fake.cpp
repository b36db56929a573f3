/*
** fake.cpp: a device made of host memory, for tests where no GPU is: fills the table of device.h and runs the same kernels, compiled by a host compiler.
**
** Each thread of a block is a fiber that runs up to its next meeting point (a barrier or a shuffle); all threads must come to the same one.  Work is queued and
** done when somebody waits, as on a GPU, so pointers must live and errors surface as they do there.  Fresh memory and shared memory are poisoned with NaN, graphs
** keep their launches by value, threads and blocks can be run in reverse order (a result that changes is a race), device memory can be locked while no kernel
** runs, and any function can be told to fail.  Refuses to be fast.  Tests call the ap_fake_ functions by ctypes; cuda.cu calls the table.
*/
#include "device.h"
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

struct ap_index { unsigned x, y; };
ap_index threadIdx, blockIdx, gridDim, blockDim = { AP_THREADS, 1 };
unsigned char *ap_shared;
#ifndef AP_FAKE_TABLE
#define AP_FAKE_TABLE cuda_device                       /* fake_runtime.cpp has it stand behind the CUDA runtime instead */
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

enum { OK = 0, INVALID = 1, FULL = 2, NO_DEVICE = 100, ILLEGAL = 700, FAILED = 719 };      /* numbers as in the CUDA runtime */

namespace {

struct memory { char *p; size_t n, mapped; };
struct work { int kind; void *to; const void *from; std::vector<char> bytes; size_t n; std::vector<ap_launch> kernels; };
struct graph { std::vector<ap_launch> kernels; };
enum { FILL, COPY, KERNELS };

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
std::vector<memory> memories;
std::vector<work> queue;
size_t total = (size_t)1 << 30, used;
long handles;                                           /* streams and graphs that are held */
int devices = 1, lost, reversed, locking, kernels_run;
std::string complaint;

/* ---- failures to order, and counts ---- */

enum { CALLS = 20 };
const char *const call_name[CALLS] = { "count", "select", "room", "get", "release", "fill", "upload", "fetch", "move", "launch", "stream_new", "stream_free", "wait", "done",
                                       "graph_new", "graph_set", "graph_run", "graph_free", "kernel", "" };
long calls[CALLS];
long fail_in[CALLS];
int fail_code[CALLS];

int call_of(const char *name) { int i = 0; while (i < CALLS - 1 && strcmp(call_name[i], name)) i++; return i; }

/* Counts a call; the code that it was told to fail with, or that of a device that is lost. */
int enter_call(const char *name) {
    int i = call_of(name);
    calls[i]++;
    if (fail_in[i] > 0 && --fail_in[i] == 0) {
        if (fail_code[i] >= ILLEGAL) lost = fail_code[i];
        return fail_code[i];
    }
    return lost;
}

/* ---- threads of a block ---- */

enum { STACK = 128 << 10, SHARED_MAX = 48 << 10, SHARED_GUARD = 64 };
struct fiber { jmp_buf at; int started, done, place, turn; char value[2][16]; };
fiber fibers[AP_THREADS];
ucontext_t first[AP_THREADS];
jmp_buf home;
int now, alone;
const ap_launch *running;
alignas(16) unsigned char shared_bytes[SHARED_MAX + SHARED_GUARD];

void run_kernel() { ((void (*)(const void *))running->entry)(running->args); }

void yield() { if (!_setjmp(fibers[now].at)) _longjmp(home, 1); }

void fiber_main() {
    for (;;) { run_kernel(); fibers[now].done = 1; yield(); }
}

void resume(int i) {
    now = i;
    threadIdx.x = (unsigned)i;
    if (_setjmp(home)) return;
    if (fibers[i].started) _longjmp(fibers[i].at, 1);
    fibers[i].started = 1;
    getcontext(&first[i]);
    first[i].uc_stack.ss_sp = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    first[i].uc_stack.ss_size = STACK - (size_t)i * 192;             /* else all tops fall into the same sets of the cache */
    first[i].uc_link = NULL;
    makecontext(&first[i], fiber_main, 0);
    setcontext(&first[i]);
}

int thread_at(int i) { return reversed ? AP_THREADS - 1 - i : i; }

int complain(const char *what) {
    if (complaint.empty()) complaint = what;
    lost = FAILED;
    return FAILED;
}

/* Rounds: every thread once, up to where it meets the others; all must be at one place, or all at the end. */
int run_together() {
    for (int i = 0; i < AP_THREADS; i++) fibers[i].done = fibers[i].place = 0;
    for (;;) {
        int ended = 0;
        for (int i = 0; i < AP_THREADS; i++) { resume(thread_at(i)); ended += fibers[thread_at(i)].done; }
        if (ended == AP_THREADS) return OK;
        for (int i = 0; i < AP_THREADS; i++)
            if (fibers[i].done || fibers[i].place != fibers[0].place) return complain("threads of a block meet at different places");
    }
}

int run_block() {
    memset(shared_bytes, 0xFF, running->shared);
    memset(shared_bytes + running->shared, 0xA5, SHARED_GUARD);
    ap_shared = shared_bytes;
    alone = !running->meets;
    int code = OK;
    if (!alone) code = run_together();
    for (int i = 0; alone && i < AP_THREADS; i++) { threadIdx.x = (unsigned)thread_at(i); run_kernel(); }
    for (int i = 0; i < SHARED_GUARD && !code; i++)
        if (shared_bytes[running->shared + i] != 0xA5) code = complain("a kernel wrote behind its shared memory");
    return code ? code : lost;
}

int run_launch(const ap_launch &k) {
    kernels_run++;
    int code = enter_call("kernel");
    if (code) return code;
    running = &k;
    gridDim = { k.gx, k.gy };
    unsigned long blocks = (unsigned long)k.gx * k.gy;
    for (unsigned long i = 0; i < blocks && !code; i++) {
        unsigned long at = reversed ? blocks - 1 - i : i;
        blockIdx = { (unsigned)(at % k.gx), (unsigned)(at / k.gx) };
        code = run_block();
    }
    return code;
}

/* ---- memory and the queue ---- */

void set_lock(int on) { for (const memory &m : memories) if (locking) mprotect(m.p, m.mapped, on ? PROT_NONE : PROT_READ | PROT_WRITE); }

int do_work(work &w) {
    if (w.kind == FILL) { memset(w.to, (int)(intptr_t)w.from, w.n); return OK; }
    if (w.kind == COPY) { memcpy(w.to, w.bytes.empty() ? w.from : w.bytes.data(), w.n); return OK; }
    for (const ap_launch &k : w.kernels) { int code = run_launch(k); if (code) return code; }
    return OK;
}

int drain() {
    fenv_t env;
    fegetenv(&env);
    fesetenv(FE_DFL_ENV);
    set_lock(0);
    int code = lost;
    for (size_t i = 0; i < queue.size() && !code; i++) code = do_work(queue[i]);
    queue.clear();
    set_lock(1);
    fesetenv(&env);
    return code;
}

struct locked { locked() { pthread_mutex_lock(&lock); } ~locked() { pthread_mutex_unlock(&lock); } };
#define CALL(name) locked hold; int code = enter_call(name); if (code) return code

/* ---- the table ---- */

int fake_count(int *n) { *n = 0; CALL("count"); *n = devices; return devices ? OK : NO_DEVICE; }
int fake_select(int device, ap_properties *p) {
    CALL("select");
    if (device >= devices) return NO_DEVICE;
    if (p) { memset(p, 0, sizeof *p); snprintf(p->name, sizeof p->name, "fake device in host memory"); p->processors = 1; p->memory = total; }
    return OK;
}
int fake_room(size_t *free_bytes, size_t *all) { CALL("room"); *free_bytes = total - used; *all = total; return OK; }
int fake_get(void **p, size_t n) {
    CALL("get");
    if (n > total - used) return FULL;
    size_t mapped = (n + 4095) & ~(size_t)4095;
    void *made = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) return FULL;
    memset(made, 0xFF, n);
    if (locking) mprotect(made, mapped, PROT_NONE);
    memories.push_back({ (char *)made, n, mapped });
    used += n;
    *p = made;
    return OK;
}
int fake_release(void *p) {
    CALL("release");
    code = drain();                                     /* as cudaFree, which waits */
    for (size_t i = 0; i < memories.size(); i++)
        if (memories[i].p == p) { munmap(p, memories[i].mapped); used -= memories[i].n; memories.erase(memories.begin() + (long)i); return code; }
    return INVALID;
}
int fake_fill(void *p, int byte, size_t n, void *) { CALL("fill"); queue.push_back({ FILL, p, (void *)(intptr_t)byte, {}, n, {} }); return OK; }
int fake_upload(void *p, const void *host, size_t n, void *) {
    CALL("upload");
    queue.push_back({ COPY, p, NULL, std::vector<char>((const char *)host, (const char *)host + n), n, {} });
    return OK;
}
int fake_fetch(void *host, const void *p, size_t n, void *) { CALL("fetch"); queue.push_back({ COPY, host, p, {}, n, {} }); return OK; }
int fake_move(void *to, const void *from, size_t n, void *) { CALL("move"); queue.push_back({ COPY, to, from, {}, n, {} }); return OK; }
int fake_launch(const ap_launch *k, void *) {
    CALL("launch");
    if (k->shared > SHARED_MAX || !k->gx || !k->gy || k->gy > 65535) return INVALID;
    queue.push_back({ KERNELS, NULL, NULL, {}, 0, { *k } });
    return OK;
}
int fake_stream_new(void **stream) { CALL("stream_new"); *stream = malloc(1); handles++; return OK; }
int fake_stream_free(void *stream) { CALL("stream_free"); free(stream); handles--; return OK; }
int fake_wait(void *) { CALL("wait"); return drain(); }
int fake_done(void *, int *yes) { CALL("done"); code = drain(); *yes = !code; return code; }
int fake_graph_new(void **g, const ap_launch *k, int n) { CALL("graph_new"); *g = new graph{ std::vector<ap_launch>(k, k + n) }; handles++; return OK; }
int fake_graph_set(void *g, int i, const ap_launch *k) { CALL("graph_set"); ((graph *)g)->kernels[(size_t)i] = *k; return OK; }
int fake_graph_run(void *g, void *) { CALL("graph_run"); queue.push_back({ KERNELS, NULL, NULL, {}, 0, ((graph *)g)->kernels }); return OK; }
int fake_graph_free(void *g) { CALL("graph_free"); delete (graph *)g; handles--; return OK; }
int fake_lost(int code) { return code >= ILLEGAL; }
int fake_full(int code) { return code == FULL; }
const char *fake_error(int code) {
    if (code == FAILED && !complaint.empty()) return complaint.c_str();
    switch (code) {
        case INVALID: return "invalid argument"; case FULL: return "out of memory"; case NO_DEVICE: return "no CUDA-capable device is detected";
        case ILLEGAL: return "an illegal memory access was encountered"; case FAILED: return "unspecified launch failure";
        default: return "unknown error";
    }
}

}  // namespace

/* ---- what kernels call ---- */

void ap_fake_meet(int place) {
    if (alone) { complain("a kernel without meeting points has one"); return; }
    fibers[now].place = place;
    yield();
}

void *ap_fake_exchange(const void *v, size_t n, int by, int place) {
    fiber *me = &fibers[now];
    int turn = me->turn ^= 1, lane = now % 16;          /* two slots in turn: what others have yet to read is not overwritten */
    memcpy(me->value[turn], v, n);
    int from = lane + by < 16 ? now + by : now;
    ap_fake_meet(-place);
    return fibers[from].value[turn];
}

/* ---- what tests call ---- */

EXPORT void ap_fake_fail(const char *name, long nth, int code) { locked hold; fail_in[call_of(name)] = nth; fail_code[call_of(name)] = code; }
EXPORT long ap_fake_calls(const char *name) { locked hold; return calls[call_of(name)]; }
EXPORT void ap_fake_reset(void) { locked hold; memset(calls, 0, sizeof calls); memset(fail_in, 0, sizeof fail_in); lost = reversed = locking = 0; total = (size_t)1 << 30; devices = 1; complaint.clear(); }
EXPORT void ap_fake_reverse(int on) { locked hold; reversed = on; }
EXPORT void ap_fake_lock(int on) { locked hold; set_lock(0); locking = on; set_lock(on); }
EXPORT void ap_fake_memory(size_t bytes) { locked hold; total = bytes; }
EXPORT void ap_fake_devices(int n) { locked hold; devices = n; }
/* A byte of the newest piece of memory, counted from its end where `at` is negative: what a kernel that goes astray does.  Returns what was there. */
EXPORT int ap_fake_scribble(long at, int byte) {
    locked hold;
    if (memories.empty()) return -1;
    unsigned char *p = (unsigned char *)memories.back().p + (at < 0 ? (long)memories.back().n + at : at), was = *p;
    *p = (unsigned char)byte;
    return was;
}
EXPORT size_t ap_fake_live(void) { locked hold; return used; }
EXPORT long ap_fake_handles(void) { locked hold; return handles; }

extern const ap_device AP_FAKE_TABLE;
const ap_device AP_FAKE_TABLE = {
    "fake", fake_count, fake_select, fake_room, fake_get, fake_release, fake_fill, fake_upload, fake_fetch, fake_move, fake_launch, fake_stream_new, fake_stream_free,
    fake_wait, fake_done, fake_graph_new, fake_graph_set, fake_graph_run, fake_graph_free, fake_lost, fake_full, fake_error,
};
