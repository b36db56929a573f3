/*
** formats.c: formats.def as an array, the ways to find a row of it, and the one way to read a row of a tensor.  It owns that constant array and refuses
** nothing: an unknown id is NULL and the container that met it says so.  The containers call it at open; everything above holds the pointer.
*/
#include <math.h>
#include <string.h>
#include "../base/num.h"
#include "format.h"
#include "apr_q4.h"
#include "apr_q8.h"
#include "f8.h"
#include "iq1_m.h"
#include "iq1_s.h"
#include "iq2_s.h"
#include "iq2_xs.h"
#include "iq2_xxs.h"
#include "iq3_s.h"
#include "iq3_xxs.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "mxfp4.h"
#include "nvfp4.h"
#include "plain.h"
#include "q1_0.h"
#include "q2_0.h"
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
#include "tq1_0.h"
#include "tq2_0.h"

const ap_format ap_formats[AP_F_N] = {
#define F(name, gguf, st, apr, block, bytes, packing, decode, encode, limit) { #name, gguf, st, apr, block, bytes, AP_PACK_##packing, decode, encode, limit },
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

const ap_format *ap_format_by_name(const char *name) {
    for (int i = 0; i < AP_F_N; i++)
        if (!strcmp(ap_formats[i].name, name)) return &ap_formats[i];
    return NULL;
}

int ap_format_bytes(const ap_format *f, int64_t rows, int64_t cols, uint64_t *bytes) {
    uint64_t r = (uint64_t)rows, c = (uint64_t)cols, n, block = (uint64_t)f->block;
    if (f->packing != AP_PACK_ROWS) { if (!ap_mul_ok(r, c, &c)) return 0; r = 1; }          /* one long row */
    if (!ap_add_ok(c, block - 1, &n) || !ap_mul_ok(n / block, (uint64_t)f->bytes, &n) || !ap_mul_ok(n, r, bytes)) return 0;
    return f->packing != AP_PACK_WHOLE || ap_add_ok(*bytes, AP_APR_Q8_SCALE, bytes);
}

/* n values from value `first` of a run of blocks on; only a block that is not wanted whole goes through a buffer. */
static void format_span(const ap_format *f, ap_decode decode, const uint8_t *blocks, int64_t first, float *out, int64_t n) {
    float whole[AP_FORMAT_BLOCK_MAX];
    const uint8_t *p = blocks + (uint64_t)(first / f->block) * (uint64_t)f->bytes;
    for (int64_t skip = first % f->block; n > 0; skip = 0, p += f->bytes) {
        int64_t take = n < f->block - skip ? n : f->block - skip;
        if (!skip && n >= f->block) {
            take = n - n % f->block;
            decode(p, out, (size_t)take);
            p += (uint64_t)(take / f->block - 1) * (uint64_t)f->bytes;
        } else {
            decode(p, whole, (size_t)f->block);
            memcpy(out, whole + skip, (size_t)take * sizeof *out);
        }
        out += take;
        n -= take;
    }
}

static void format_row(const ap_format *f, ap_decode decode, const uint8_t *tensor, int64_t cols, int64_t row, float *out) {
    switch (f->packing) {
    case AP_PACK_ROWS:  format_span(f, decode, tensor + (uint64_t)row * ap_format_row_bytes(f, cols), 0, out, cols); return;
    case AP_PACK_FLAT:  format_span(f, decode, tensor, row * cols, out, cols); return;
    case AP_PACK_WHOLE: ap_apr_q8_values(tensor, row * cols, out, (size_t)cols); return;
    }
}

void ap_format_row(const ap_format *f, const uint8_t *tensor, int64_t cols, int64_t row, float *out) { format_row(f, f->decode, tensor, cols, row, out); }

void ap_format_row_fast(const ap_format *f, int tier, const uint8_t *tensor, int64_t cols, int64_t row, float *out) {
    format_row(f, ap_format_decoder(f, tier), tensor, cols, row, out);
}

void ap_format_encode(const ap_format *f, const float *src, int64_t n, uint8_t *dst) {
    float last[AP_FORMAT_BLOCK_MAX] = { 0 };
    int64_t rest = n % f->block, whole = n - rest;
    f->encode(src, dst, (size_t)whole);
    if (!rest) return;
    memcpy(last, src + whole, (size_t)rest * sizeof *last);
    f->encode(last, dst + (uint64_t)(whole / f->block) * (uint64_t)f->bytes, (size_t)f->block);
}
