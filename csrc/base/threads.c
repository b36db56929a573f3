/*
** threads.c: one pool per process, started when it is first needed.  It owns its threads, the job they work on and nothing of the caller's.  A job is
** open while indices are left; a worker that wakes too late finds it closed and sleeps on, so nobody waits for the scheduler.  Operations call it;
** it cannot fail: with no threads to be had the caller does all the work, and the bits are the same.
*/
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#include "threads.h"

static struct {
    pthread_mutex_t turn;                       /* held by the one caller whose job runs        */
    pthread_mutex_t lock;                       /* guards all that follows                      */
    pthread_cond_t wake, idle;
    pthread_t id[AP_MAX_THREADS];
    int live;                                   /* threads there are: id[1..live-1] and the caller */
    int stopping;
    unsigned long job;                          /* number of the current job                    */
    int open, inside;                           /* may be joined; workers now inside it         */
    int threads, joined, n;                     /* how many may join, how many have (the caller counts) */
    ap_task task;
    void *ctx;
    atomic_int next;                            /* first index nobody has taken                 */
} pool = { .turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .idle = PTHREAD_COND_INITIALIZER, .live = 1 };

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static _Thread_local int pool_within;           /* this thread is running a task: a nested job runs inline */

int ap_cores(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (!sched_getaffinity(0, sizeof set, &set)) {
        int n = CPU_COUNT(&set);
        if (n > 0) return n < AP_MAX_THREADS ? n : AP_MAX_THREADS;
    }
    long n = sysconf(_SC_NPROCESSORS_ONLN);     /* more CPUs than a cpu_set_t holds */
    return n < 1 ? 1 : n < AP_MAX_THREADS ? (int)n : AP_MAX_THREADS;
}

/* A thread inherits the floating-point mode of the one that made it, and that one may have been poisoned by a library built with -ffast-math. */
static void pool_plain_floats(void) {
#if defined(__x86_64__)
    _mm_setcsr(0x1F80);                         /* round to nearest, all exceptions masked, no flush-to-zero, no denormals-are-zero */
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(0ul));
#endif
}

static void pool_work(int worker) {
    int was = pool_within;
    pool_within = 1;
    for (int i; (i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.n; ) pool.task(pool.ctx, i, worker);
    pool_within = was;
}

/* Whoever wakes first joins first and is worker 1, so exactly as many are woken as a job wants, however many there are. */
static void *pool_main(void *arg) {
    unsigned long seen = 0;
    pool_plain_floats();
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.stopping && !(pool.open && pool.job != seen && pool.joined < pool.threads)) pthread_cond_wait(&pool.wake, &pool.lock);
        if (pool.stopping) break;
        int me = pool.joined++;
        seen = pool.job;
        pool.inside++;
        pthread_mutex_unlock(&pool.lock);
        pool_work(me);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.inside) pthread_cond_signal(&pool.idle);
    }
    pthread_mutex_unlock(&pool.lock);
    return arg;
}

/* A child of fork has the memory of the pool and none of its threads: begin anew.  A job that was running belonged to a thread that is gone. */
static void pool_after_fork(void) {
    pthread_mutex_init(&pool.turn, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.idle, NULL);
    pool.live = 1;
    pool.open = pool.inside = 0;
}

static void pool_stop(void) {
    pthread_mutex_lock(&pool.lock);
    int live = pool.live;
    pool.stopping = 1;                          /* for good: later jobs run inline */
    pool.live = 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int k = 1; k < live; k++) pthread_join(pool.id[k], NULL);
}

static void pool_setup(void) {
    pthread_atfork(NULL, NULL, pool_after_fork);
    atexit(pool_stop);
}

/* Signals belong to the program's own threads (Ctrl-C must reach Python's main thread), so workers are born with all of them blocked. */
static void pool_start(int threads) {           /* lock held */
    sigset_t all, old;
    if (pool.stopping || pool.live >= threads) return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.live < threads && !pthread_create(&pool.id[pool.live], NULL, pool_main, NULL)) pool.live++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void ap_pool_run(int threads, int n, ap_task task, void *ctx) {
    if (threads > AP_MAX_THREADS) threads = AP_MAX_THREADS;
    if (threads > n) threads = n;
    if (threads <= 1 || pool_within) {
        for (int i = 0; i < n; i++) task(ctx, i, 0);
        return;
    }
    pthread_once(&pool_once, pool_setup);
    pthread_mutex_lock(&pool.turn);
    pthread_mutex_lock(&pool.lock);
    pool_start(threads);
    pool.task = task; pool.ctx = ctx; pool.n = n; pool.threads = threads;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    pool.job++;
    pool.joined = pool.open = 1;
    for (int k = 1; k < threads; k++) pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    pool_work(0);

    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    while (pool.inside) pthread_cond_wait(&pool.idle, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.turn);
}
