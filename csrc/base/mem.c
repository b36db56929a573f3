/*
** mem.c: the heap's only door.  Each block carries its size in the 64 bytes before the address handed out, so that what is live can be counted
** without asking the C library.  Owns four counters (atomics, so any thread may allocate) and refuses a size that overflows.
*/
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "mem.h"
#include "num.h"

enum { MEM_ALIGN = 64 };                        /* a cache line, and the widest vector */
typedef struct { void *base; uint64_t size; } mem_head;
_Static_assert(sizeof(mem_head) <= MEM_ALIGN, "the header fits in front of an aligned block");

static _Atomic int64_t  mem_fuse = -1;          /* calls left until an injected failure; <= 0: never */
static _Atomic uint64_t mem_live, mem_most, mem_calls;

static mem_head *mem_head_of(void *p) { return (mem_head *)(void *)((char *)p - MEM_ALIGN); }

static int mem_injected(void) {
    atomic_fetch_add_explicit(&mem_calls, 1, memory_order_relaxed);
    if (atomic_load_explicit(&mem_fuse, memory_order_relaxed) <= 0) return 0;
    return atomic_fetch_sub_explicit(&mem_fuse, 1, memory_order_relaxed) == 1;
}

/* Weights and arenas: with 2 MiB pages the kernel faults 512 times less (a model is read three times as fast) and the kernels miss fewer
** translations.  Only advice, so its failure means nothing. */
static void mem_huge_pages(char *base, uint64_t total) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2u << 20;
    if (total < 4 * huge) return;
    uintptr_t from = ((uintptr_t)base + huge - 1) & ~(huge - 1), to = ((uintptr_t)base + (uintptr_t)total) & ~(huge - 1);
    madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)base, (void)total;
#endif
}

static void mem_count(uint64_t bytes) {
    uint64_t live = atomic_fetch_add_explicit(&mem_live, bytes, memory_order_relaxed) + bytes;
    uint64_t most = atomic_load_explicit(&mem_most, memory_order_relaxed);
    while (live > most && !atomic_compare_exchange_weak_explicit(&mem_most, &most, live, memory_order_relaxed, memory_order_relaxed)) {}
}

/* calloc and a hand-made alignment instead of aligned_alloc and memset: a large block comes zeroed from the kernel and its pages are not
** touched before somebody needs them. */
static void *mem_new(uint64_t count, uint64_t size) {
    uint64_t bytes, total;
    if (!ap_mul_ok(count, size, &bytes) || !ap_add_ok(bytes, 2 * MEM_ALIGN, &total) || total > PTRDIFF_MAX) return NULL;
    char *base = calloc(1, (size_t)total);
    if (!base) return NULL;
    mem_huge_pages(base, total);
    char *p = base + 2 * MEM_ALIGN - ((uintptr_t)base & (MEM_ALIGN - 1));      /* calloc aligns to 16: at least 64 bytes lie before p */
    *mem_head_of(p) = (mem_head){ base, bytes };
    mem_count(bytes);
    return p;
}

void *ap_alloc(uint64_t count, uint64_t size) { return mem_injected() ? NULL : mem_new(count, size); }

void *ap_grow(void *p, uint64_t old_count, uint64_t count, uint64_t size) {
    if (mem_injected()) return NULL;
    void *q = mem_new(count, size);
    if (!q) return NULL;
    if (p) memcpy(q, p, (size_t)((old_count < count ? old_count : count) * size));  /* both products were allocated once, so they fit */
    ap_free(p);
    return q;
}

void ap_free(void *p) {
    if (!p) return;
    mem_head h = *mem_head_of(p);
    atomic_fetch_sub_explicit(&mem_live, h.size, memory_order_relaxed);
    free(h.base);
}

void ap_mem_fail_at(int64_t nth) { atomic_store_explicit(&mem_fuse, nth, memory_order_relaxed); }
uint64_t ap_mem_live(void)  { return atomic_load_explicit(&mem_live, memory_order_relaxed); }
uint64_t ap_mem_peak(void)  { return atomic_exchange_explicit(&mem_most, ap_mem_live(), memory_order_relaxed); }
uint64_t ap_mem_calls(void) { return atomic_load_explicit(&mem_calls, memory_order_relaxed); }
