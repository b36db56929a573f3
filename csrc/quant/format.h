/*
** format.h: what the bits of a stored number mean.  One row of formats.def per format; one file per family with the struct of a block, its size
** asserted, and `decode`, the plain reference: n values (a multiple of the block) to float32, exact where float32 can hold them.
** No file names, no models, no threads here.  Files and models hold `const ap_format *`.
*/
#ifndef AP_FORMAT_H
#define AP_FORMAT_H
#include <stddef.h>
#include <stdint.h>
typedef struct {
    const char *name;           /* "Q4_K": as the gguf package spells it            */
    int gguf;                   /* ggml type id, -1 when GGUF has none              */
    const char *safetensors;    /* dtype string, "" when safetensors has none       */
    int block, bytes;           /* values and bytes per block                       */
    void (*decode)(const void *src, float *dst, size_t n);      /* NULL: can be listed, cannot be read */
} ap_format;
typedef enum {
#define F(name, gguf, st, block, bytes, decode) AP_F_##name,
#include "formats.def"
    AP_F_N
} ap_format_id;
extern const ap_format ap_formats[AP_F_N];
const ap_format *ap_format_by_gguf(uint32_t id);                /* NULL when unknown */
const ap_format *ap_format_by_safetensors(const char *p, size_t n);
/* Half formats, also used by the KV cache later: round to nearest even, NaN kept quiet. */
float ap_f16_to_f32(uint16_t h);
float ap_bf16_to_f32(uint16_t h);

/* A block's struct is bytes only, so a block may stand at any address, and its integers are unpacked by inline functions that both compilers share. */
#ifdef __cplusplus
#define AP_ASSERT(cond, text) static_assert(cond, text)
#else
#define AP_ASSERT(cond, text) _Static_assert(cond, text)
#endif
#ifdef __CUDACC__
#define AP_HD static __host__ __device__ inline
#else
#define AP_HD static inline
#endif
AP_HD uint16_t ap_le16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
#endif
