/*
** tiers.c: expands tiers.def.  Owns nothing: the CPU is asked each time, which is a load and a test.  Whoever holds an array of kernels indexed by tier
** calls it; which tier to use when the user names one is decided above.
*/
#include <string.h>
#include "tiers.h"

const char *ap_tier_name(int tier) {
    static const char *const name[AP_TIER_N] = {
#define T(name, cond) #name,
#include "tiers.def"
    };
    return tier >= 0 && tier < AP_TIER_N ? name[tier] : "?";
}

int ap_tier_available(int tier) {
    switch (tier) {
#define T(name, cond) case AP_TIER_##name: return (cond) ? 1 : 0;
#include "tiers.def"
    default: return 0;
    }
}

int ap_tier_best(void) {
    int best = 0;
    for (int t = 0; t < AP_TIER_N; t++) if (ap_tier_available(t)) best = t;
    return best;
}

int ap_tier_find(const char *name) {
    for (int t = 0; t < AP_TIER_N; t++) if (!strcmp(ap_tier_name(t), name)) return t;
    return -1;
}
