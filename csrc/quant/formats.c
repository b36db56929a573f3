/*
** formats.c: formats.def as an array, the ways to find a row of it, and the one way to read a row of a tensor.  It owns that constant array and refuses
** nothing: an unknown id is NULL and the container that met it says so.  The containers call it at open; everything above holds the pointer.
*/
#include <string.h>
#include "format.h"
#include "apr_q4.h"
#include "apr_q8.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "mxfp4.h"
#include "plain.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_1.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"
#include "q8_1.h"
#include "q8_k.h"

const ap_format ap_formats[AP_F_N] = {
#define F(name, gguf, st, apr, block, bytes, packing, decode, encode) { #name, gguf, st, apr, block, bytes, AP_PACK_##packing, decode, encode },
#include "formats.def"
};

const ap_format *ap_format_by_gguf(uint32_t id) {
    for (int i = 0; i < AP_F_N; i++)
        if (ap_formats[i].gguf >= 0 && (uint32_t)ap_formats[i].gguf == id) return &ap_formats[i];
    return NULL;
}

const ap_format *ap_format_by_safetensors(const char *p, size_t n) {
    for (int i = 0; n && i < AP_F_N; i++)
        if (strlen(ap_formats[i].safetensors) == n && !memcmp(ap_formats[i].safetensors, p, n)) return &ap_formats[i];
    return NULL;
}

const ap_format *ap_format_by_apr(uint8_t id) {
    if (id == 8 || id == 9) id = (uint8_t)(id + 120);           /* how early writers spelled 128 and 129 */
    for (int i = 0; i < AP_F_N; i++)
        if (ap_formats[i].apr == id) return &ap_formats[i];
    return NULL;
}

/* n values from value `first` of a run of blocks on; only a block that is not wanted whole goes through a buffer. */
static void format_span(const ap_format *f, const uint8_t *blocks, int64_t first, float *out, int64_t n) {
    float whole[AP_FORMAT_BLOCK_MAX];
    const uint8_t *p = blocks + (uint64_t)(first / f->block) * (uint64_t)f->bytes;
    for (int64_t skip = first % f->block; n > 0; skip = 0, p += f->bytes) {
        int64_t take = n < f->block - skip ? n : f->block - skip;
        if (!skip && n >= f->block) {
            take = n - n % f->block;
            f->decode(p, out, (size_t)take);
            p += (uint64_t)(take / f->block - 1) * (uint64_t)f->bytes;
        } else {
            f->decode(p, whole, (size_t)f->block);
            memcpy(out, whole + skip, (size_t)take * sizeof *out);
        }
        out += take;
        n -= take;
    }
}

void ap_format_row(const ap_format *f, const uint8_t *tensor, int64_t cols, int64_t row, float *out) {
    switch (f->packing) {
    case AP_PACK_ROWS:  format_span(f, tensor + (uint64_t)row * ap_format_row_bytes(f, cols), 0, out, cols); return;
    case AP_PACK_FLAT:  format_span(f, tensor, row * cols, out, cols); return;
    case AP_PACK_WHOLE: ap_apr_q8_values(tensor, row * cols, out, (size_t)cols); return;
    }
}
