/*
** mutate.h: structure-aware mutators.  Each takes a file apart by a tolerant walker of its own (no line of the product's parsers), changes one to three
** things, and writes it together again, so that the lengths, counts and checksums that nobody wanted to change are right.  What cannot be taken apart, and
** a tenth of everything else, goes to LLVMFuzzerMutate.  A mutator is a function of its input and its seed.  Callers: the targets.
*/
#ifndef MUTATE_H
#define MUTATE_H
#include <stddef.h>
#include <stdint.h>

size_t LLVMFuzzerMutate(uint8_t *p, size_t n, size_t room);                       /* libFuzzer's, or driver.c's */
size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed);
int    LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);

size_t mutate_gguf(uint8_t *p, size_t n, size_t room, unsigned seed);
size_t mutate_apr(uint8_t *p, size_t n, size_t room, unsigned seed);
size_t mutate_aprt(uint8_t *p, size_t n, size_t room, unsigned seed);
size_t mutate_json(uint8_t *p, size_t n, size_t room, unsigned seed);
size_t mutate_safetensors(uint8_t *p, size_t n, size_t room, unsigned seed);
size_t mutate_model(uint8_t *p, size_t n, size_t room, unsigned seed);            /* by what it begins with */

/* --- shared by the mutators ------------------------------------------------------------------------------------------------------------ */

enum { MUT_ROOM = 1 << 18 };                                                      /* larger inputs are left to LLVMFuzzerMutate */
typedef struct { uint64_t s; } mut_rng;
typedef struct { const uint8_t *p; size_t n; } mut_span;
typedef struct { uint8_t *p; size_t n, room; } mut_out;                           /* what does not fit is dropped                     */

uint64_t mut_next(mut_rng *r);
size_t   mut_below(mut_rng *r, size_t n);                                         /* 0 when n is 0                                    */
int      mut_chance(mut_rng *r, int percent);
uint64_t mut_number(mut_rng *r, uint64_t was, uint64_t left);                     /* 0, 1, 2^k +- 1, was +- 1, left +- 1, ...          */
void     mut_put(mut_out *o, const void *p, size_t n);
void     mut_u64(mut_out *o, uint64_t v, int bytes);                              /* little-endian                                    */
void     mut_fill(mut_out *o, size_t n);                                          /* zeros                                            */
mut_span mut_keep(const void *p, size_t n);                                       /* a copy that lives until the next mutation        */
mut_span mut_word(mut_rng *r);                                                    /* a key, name or value that the product knows      */
mut_span mut_bend(mut_rng *r, mut_span s);                                        /* a string with something wrong in it              */
uint8_t *mut_scratch(size_t n);                                                   /* NULL when the arena is full                      */
void     mut_begin(mut_rng *r, unsigned seed);                                    /* empties the arena                                */
uint64_t mut_read(const uint8_t *p, int bytes);
uint32_t mut_crc32(uint32_t crc, const uint8_t *p, size_t n);                     /* IEEE; start with 0                               */
size_t   mut_json_text(mut_rng *r, const uint8_t *p, size_t n, uint8_t *out, size_t room);   /* one edit; returns the new length   */
#endif
