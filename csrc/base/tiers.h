/*
** tiers.h: which instruction sets this process may use.  The rows are tiers.def; every kernel that has more than one version is an array indexed
** by tier, and every version gives the same bits, so the choice is about speed only.
*/
#ifndef AP_TIERS_H
#define AP_TIERS_H
/* clang before 19 does not know the word; there is no CPU with AVX2 and without it. */
#if defined(__clang__) && __clang_major__ < 19
#define AP_CPU_F16C 1
#else
#define AP_CPU_F16C __builtin_cpu_supports("f16c")
#endif
typedef enum {
#define T(name, cond) AP_TIER_##name,
#include "tiers.def"
    AP_TIER_N
} ap_tier;
const char *ap_tier_name(int tier);
int ap_tier_available(int tier);
int ap_tier_best(void);
int ap_tier_find(const char *name);                              /* -1 when there is no such tier */
#define AP_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif
