/*
** faults.cuh: faults that are no edits of plan data: they sit in kernels and in the graph.  Only the test libraries are compiled with it (AP_CUDA_FAULTS); in the
** one that is shipped every AP_FAULT is the constant 0.  APRENDER_CUDA_FAULT=NAME[@STAGE] switches one on, at one stage or wherever it can sit.
**
**   transposed   the GEMV of float32 weights reads them as [in, out]
**   race         threads read shared memory before the others have written it
**   stride       where the columns end inside a tile, its rows are taken to be as far apart as they are long
**   unrecorded   a kernel is left out of the graph
**   stale        a kernel of the graph keeps the arguments of the token before
*/
#ifndef AP_FAULTS_CUH
#define AP_FAULTS_CUH
#include <stdlib.h>
#include <string.h>

enum { FAULT_transposed = 1, FAULT_race = 2, FAULT_stride = 4, FAULT_unrecorded = 8, FAULT_stale = 16 };

static inline int fault_mask(const char *stage) {
    static const char *const name[] = { "transposed", "race", "stride", "unrecorded", "stale" };
    const char *said = getenv("APRENDER_CUDA_FAULT"), *at = said ? strchr(said, '@') : NULL;
    if (!said || (at && strcmp(at + 1, stage))) return 0;
    size_t n = at ? (size_t)(at - said) : strlen(said);
    for (int i = 0; i < 5; i++) if (strlen(name[i]) == n && !memcmp(name[i], said, n)) return 1 << i;
    return 0;
}

#define AP_FAULT_FIELD int fault;
#define AP_FAULT(args, name) ((args).fault & FAULT_##name)
#define AP_FAULT_SET(args, d, s) ((args).fault = fault_mask(cuda_stage_name((s)->stage)))
#define AP_FAULT_AT(d, name, stage) (fault_mask(cuda_stage_name(stage)) & FAULT_##name)
#endif
