/* q6_k.c: the reference decode and the encoder of q6_k.h.  The decode is rounded where ggml rounds: d * sc is exact (11 and 7 bits), its product with q rounds once.
** Owns nothing; the whole-tensor readers and writers and the tests call it. */
#include <math.h>
#include <string.h>
#include "q6_k.h"

void ap_q6_k_decode(const void *src, float *dst, size_t n) {
    const ap_q6_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d));
        for (int g = 0; g < 16; g++) {
            float scale = d * (float)b->s[g];
            for (int i = g * 16; i < g * 16 + 16; i++) dst[i] = scale * (float)ap_q6_k_q(b, i);
        }
    }
}

/* ---- encode: least squares, unweighted ----
** A group's real scale first: the values are laid on -32 .. 31 by a few stretches, and each time the scale through the quants is fitted.  Then the half of
** the block, and each group's integer next to its real one by the error that the decoder will see. */

static int q6_k_near(float v) {
    float up = (v < -32 ? -32 : v > 31 ? 31 : v) + 32.5f;   /* positive, so that truncation rounds down */
    return (int)up - 32;
}

static float q6_k_fit(const float x[16]) {
    float peak = 0, scale = 0;                              /* peak: with its sign; it is laid on -32 first, where there is most room */
    double most = 0;
    for (int i = 0; i < 16; i++) if (fabsf(x[i]) > fabsf(peak)) peak = x[i];
    for (int k = 0; k < 24 && peak; k++) {
        float top = k < 15 ? -32 - (float)(k % 2 ? -(k + 1) / 2 : k / 2) * 0.125f : 30 + (float)(k - 15) * 0.25f, stretch = top / peak;
        int sqq = 0;
        double sxq = 0;
        if (isinf(stretch)) break;                          /* values far below the least half */
        for (int i = 0; i < 16; i++) {
            int q = q6_k_near(x[i] * stretch);
            sqq += q * q; sxq += (double)x[i] * q;
        }
        double fits = sqq ? sxq * sxq / sqq : 0;            /* the squared error is that of zeros less this */
        if (fits > most * (1 + 1e-9)) { most = fits; scale = (float)(sxq / sqq); }
    }
    return scale;
}

static float q6_k_error(const float x[16], float scale) {
    float inverse = scale ? 1 / scale : 0, error = 0;
    for (int i = 0; i < 16; i++) {
        float off = x[i] - scale * (float)q6_k_near(x[i] * inverse);
        error += off * off;
    }
    return error;
}

/* The integer of a group: the nearest to its real scale, or a neighbour that fits better; what it leaves is added to `error`. */
static int q6_k_integer(const float x[16], float scale, float d, float *error) {
    float near = d ? roundf(scale / d) : 0;
    int s = (int)(near < -128 ? -128 : near > 127 ? 127 : near), best = s;
    float least = q6_k_error(x, d * (float)s);
    for (int a = s > -128 ? s - 1 : s; a <= s + 1 && a < 128; a++) {
        float other = a == s ? least : q6_k_error(x, d * (float)a);
        if (other < least) { least = other; best = a; }
    }
    *error += least;
    return best;
}

/* A half under which `scale` becomes the integer `top`: the least half, a subnormal, rather than none at all, and the greatest rather than infinity. */
static uint16_t q6_k_half(float scale, int top) {
    uint16_t h = ap_f32_to_f16(fminf(fmaxf(scale / (float)top, -65504), 65504));
    return !(h & 0x7FFF) && fabsf(scale) > 0x1p-25f ? h | 1 : h;
}

/* The half and the integers of the groups.  The greatest scale becomes one of -128 .. -125: which, is a choice between roundings of the half. */
static void q6_k_scales(const float x[256], ap_q6_k *b) {
    float scale[16], peak = 0, least = INFINITY;
    for (int g = 0; g < 16; g++) {
        scale[g] = q6_k_fit(x + g * 16);
        if (fabsf(scale[g]) > fabsf(peak)) peak = scale[g];
    }
    for (int top = -128; top <= -125; top++) {
        uint16_t h = q6_k_half(peak, top);
        float error = 0;
        int8_t s[16];
        for (int g = 0; g < 16; g++) s[g] = (int8_t)q6_k_integer(x + g * 16, scale[g], ap_f16_to_f32(h), &error);
        if (!(error < least)) continue;
        least = error;
        ap_put_le16(b->d, h);
        memcpy(b->s, s, sizeof b->s);
    }
}

static void q6_k_encode_block(const float x[256], ap_q6_k *b) {
    q6_k_scales(x, b);
    memset(b->l, 0, sizeof b->l);
    memset(b->h, 0, sizeof b->h);
    float d = ap_f16_to_f32(ap_le16(b->d));
    for (int i = 0; i < 256; i++) {
        float s = d * (float)b->s[i >> 4], inverse = s ? 1 / s : 0;
        int q = q6_k_near(x[i] * inverse) + 32, half = i >> 7;
        b->l[half * 64 + (i & 63)] |= (uint8_t)((q & 15) << (i >> 6 & 1) * 4);
        b->h[half * 32 + (i & 31)] |= (uint8_t)(q >> 4 << (i >> 5 & 3) * 2);
    }
}

void ap_q6_k_encode(const float *src, void *dst, size_t n) {
    ap_q6_k *b = dst;
    for (; n >= 256; n -= 256, src += 256, b++) q6_k_encode_block(src, b);
}
