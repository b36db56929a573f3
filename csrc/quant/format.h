/*
** format.h: what the bits of a stored number mean.  One row of formats.def per format; one file per family with the struct of a block, its size
** asserted, and `decode`, the plain reference: n values (a multiple of the block) to float32, exact where float32 can hold them.  `encode`, where there is
** one, writes n values (likewise; a WHOLE tensor at once) with the least error that a short search finds; none of them may exceed `limit`.
** No file names, no models, no threads here.  Files and models hold `const ap_format *`.
*/
#ifndef AP_FORMAT_H
#define AP_FORMAT_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "../base/hd.h"
typedef enum { AP_PACK_ROWS, AP_PACK_FLAT, AP_PACK_WHOLE } ap_packing;      /* how a tensor's blocks lie: see formats.def */
enum { AP_FORMAT_BLOCK_MAX = 256 };
typedef void (*ap_decode)(const void *src, float *dst, size_t n);
typedef struct {
    const char *name;           /* "Q4_K": as the gguf package spells it            */
    int gguf;                   /* ggml type id, -1 when GGUF has none              */
    const char *safetensors;    /* dtype string, "" when safetensors has none       */
    int apr;                    /* APR's dtype byte, -1 when APR has none            */
    int block, bytes;           /* values and bytes per block                       */
    ap_packing packing;
    ap_decode decode;           /* NULL: can be listed, cannot be read              */
    void (*encode)(const float *src, void *dst, size_t n);      /* NULL: cannot be written */
    float limit;                /* the greatest magnitude that encode takes; infinite: any value, NaN too */
} ap_format;
typedef enum {
#define F(name, gguf, st, apr, block, bytes, packing, decode, encode, limit) AP_F_##name,
#include "formats.def"
    AP_F_N
} ap_format_id;
extern const ap_format ap_formats[AP_F_N];
const ap_format *ap_format_by_gguf(uint32_t id);                /* NULL when unknown */
const ap_format *ap_format_by_safetensors(const char *p, size_t n);
const ap_format *ap_format_by_apr(uint8_t id);
/* Row `row` of a tensor whose rows have `cols` values, whatever the packing; a last block that is not full is read as far as the row goes. */
void ap_format_row(const ap_format *f, const uint8_t *tensor, int64_t cols, int64_t row, float *out);
/* The same bits by the fastest decoder that a tier (base/tiers.h) has for the format: the reference where it has none of its own. */
void ap_format_row_fast(const ap_format *f, int tier, const uint8_t *tensor, int64_t cols, int64_t row, float *out);
ap_decode ap_format_decoder(const ap_format *f, int tier);
/* Encodes n values, the last block filled up with zeros. */
void ap_format_encode(const ap_format *f, const float *src, int64_t n, uint8_t *dst);
/* Bytes of a tensor of rows x cols values, last blocks filled up; 0 when the size overflows. */
int ap_format_bytes(const ap_format *f, int64_t rows, int64_t cols, uint64_t *bytes);
const ap_format *ap_format_by_name(const char *name);
/* Bytes of one row of `cols` values where rows begin blocks (ROWS). */
static inline uint64_t ap_format_row_bytes(const ap_format *f, int64_t cols) { return (uint64_t)((cols + f->block - 1) / f->block) * (uint64_t)f->bytes; }
/* Half formats, also used by the KV cache later: round to nearest even, NaN kept quiet. */
uint16_t ap_f32_to_f16(float x);
uint16_t ap_f32_to_bf16(float x);

/* A block's struct is bytes only, so a block may stand at any address, and its integers are unpacked by inline functions that both compilers share. */
#ifdef __cplusplus
#define AP_ASSERT(cond, text) static_assert(cond, text)
#else
#define AP_ASSERT(cond, text) _Static_assert(cond, text)
#endif
AP_HD uint16_t ap_le16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
AP_HD uint32_t ap_le32(const uint8_t *p) { return ap_le16(p) | (uint32_t)ap_le16(p + 2) << 16; }
AP_HD float ap_float_of(uint32_t bits) { float f; memcpy(&f, &bits, sizeof f); return f; }
/* binary16 is 1 sign, 5 exponent (bias 15), 10 mantissa bits; binary32 is 1, 8 (bias 127), 23: the mantissa moves up by 13, the exponent grows by 112. */
AP_HD float ap_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    if (exponent == 31) return ap_float_of(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x00400000u : 0));        /* Inf; NaN, made quiet as F16C does */
    if (exponent) return ap_float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * (1.0f / 16777216);                           /* subnormal: mantissa * 2^-24 is exact and normal in float32 */
    return sign ? -tiny : tiny;
}
AP_HD float ap_bf16_to_f32(uint16_t h) { return ap_float_of((uint32_t)h << 16); }
AP_HD void ap_put_le16(uint8_t *p, uint16_t h) { p[0] = (uint8_t)h; p[1] = (uint8_t)(h >> 8); }
#endif
