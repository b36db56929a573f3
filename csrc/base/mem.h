/*
** mem.h: the only door to the heap.  ap_alloc gives 64-byte aligned zeroed memory or NULL, counts what is live, and can be told to fail
** its Nth call, so that every out-of-memory path can be walked by a test.  Sizes are count x size, checked.
*/
#ifndef AP_MEM_H
#define AP_MEM_H
#include <stddef.h>
#include <stdint.h>
void *ap_alloc(uint64_t count, uint64_t size);                  /* NULL on overflow, exhaustion or an injected failure       */
void *ap_grow(void *p, uint64_t old_count, uint64_t count, uint64_t size); /* like realloc; p stays valid when NULL comes back; new part zeroed */
void  ap_free(void *p);
void  ap_mem_fail_at(int64_t nth);                              /* the nth ap_alloc/ap_grow from now returns NULL; -1: never */
uint64_t ap_mem_live(void);                                     /* bytes now held                                            */
uint64_t ap_mem_peak(void);                                     /* most bytes held at once since the last call of this       */
uint64_t ap_mem_calls(void);                                    /* allocations so far                                        */
#endif
