/*
** threads.h: a small pool of pthreads.  ap_pool_run calls task(ctx, i, worker) for i in [0, n), from at most `threads` threads, the caller among
** them, and returns when all are done.  Tasks split rows of an output and never a reduction, so results do not depend on the thread count.
** The pool is safe after fork (a child starts its own) and is stopped at exit.  Two callers at once are serialised.
*/
#ifndef AP_THREADS_H
#define AP_THREADS_H
typedef void (*ap_task)(void *ctx, int i, int worker);          /* worker is in [0, threads): index for per-thread scratch */
enum { AP_MAX_THREADS = 256 };
int  ap_cores(void);                                            /* CPUs this process may run on */
void ap_pool_run(int threads, int n, ap_task task, void *ctx);
#endif
