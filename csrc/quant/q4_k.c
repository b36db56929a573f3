/*
** q4_k.c: the reference decode and the encoder of q4_k.h.  The decode is rounded where ggml rounds: d * sc and dmin * m are exact (11 and 6 bits), then their products and the
** difference each round once; no fused multiply-add may replace them.  Owns nothing; the whole-tensor readers and writers
** and the tests call it.
*/
#include <float.h>
#include <math.h>
#include <string.h>
#include "q4_k.h"

void ap_q4_k_decode(const void *src, float *dst, size_t n) {
    const ap_q4_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = ap_f16_to_f32(ap_le16(b->d)), dmin = ap_f16_to_f32(ap_le16(b->dmin));
        for (int g = 0; g < 8; g++) {
            float scale = d * (float)ap_q4_k_scale(b->s, g), min = dmin * (float)ap_q4_k_min(b->s, g);
            for (int i = g * 32; i < g * 32 + 32; i++) dst[i] = scale * (float)ap_q4_k_q(b, i) - min;
        }
    }
}

/* ---- encode: least squares, unweighted ----
** A group's real scale and minimum first: the values are laid on 0 .. 15 by a few stretches of their range, and each time the line through the quants is
** fitted.  Then the two halves of the block, and each group's integers next to its real ones by the error that the decoder will see. */

typedef struct { float scale, min; } q4_k_line;

/* The nearest quant of a position on the scale 0 .. 15. */
static int q4_k_near(float v) { return (int)((v < 0 ? 0 : v > 15 ? 15 : v) + 0.5f); }

static q4_k_line q4_k_fit(const float x[32]) {
    float lo = 0, hi = x[0];
    double sx = 0, sxx = 0, least = DBL_MAX;
    for (int i = 0; i < 32; i++) { lo = fminf(lo, x[i]); hi = fmaxf(hi, x[i]); sx += x[i]; sxx += (double)x[i] * x[i]; }
    q4_k_line best = { 0, -lo };                            /* all values alike and none above zero: the minimum says it all */
    for (int k = 0; k < 15 && hi > lo; k++) {
        float top = 15 + (float)(k % 2 ? -(k + 1) / 2 : k / 2) * 0.25f, stretch = top / (hi - lo);     /* the plain stretch first, then ever further from it */
        if (isinf(stretch)) break;                          /* values far below the least half */
        int sq = 0, sqq = 0;
        double sxq = 0;
        for (int i = 0; i < 32; i++) {
            int q = q4_k_near((x[i] - lo) * stretch);
            sq += q; sqq += q * q; sxq += (double)x[i] * q;
        }
        int det = 32 * sqq - sq * sq;
        if (!det && !sqq) continue;
        double scale = det ? (32 * sxq - sx * sq) / det : 0, min = (scale * sq - sx) / 32;
        if (!det || min < 0) { min = 0; scale = sxq / sqq; }
        double error = sxx + scale * (scale * sqq - 2 * sxq) + min * (2 * sx - 2 * scale * sq + 32 * min);
        if (scale >= 0 && error < least - 1e-9 * sxx) { least = error; best = (q4_k_line){ (float)scale, (float)min }; }
    }
    return best;
}

/* A half that 63 times over reaches `most`; the least half, a subnormal, rather than none at all, and the greatest rather than infinity. */
static float q4_k_half(float most, uint8_t out[2]) {
    uint16_t h = ap_f32_to_f16(fminf(most / 63, 65504));
    if (!h && most > 0x1p-25f) h = 1;
    ap_put_le16(out, h);
    return ap_f16_to_f32(h);
}

static int q4_k_six_bits(float v, float d) {
    float q = d ? v / d + 0.5f : 0;
    return q > 63 ? 63 : (int)q;
}

static float q4_k_error(const float x[32], float scale, float min) {
    float inverse = scale ? 1 / scale : 0, error = 0;
    for (int i = 0; i < 32; i++) {
        float off = x[i] - (scale * (float)q4_k_near((x[i] + min) * inverse) - min);
        error += off * off;
    }
    return error;
}

/* The integers of a group: those nearest to its line, or their neighbours where these fit better. */
static void q4_k_integers(const float x[32], q4_k_line line, float d, float dmin, int *scale, int *min) {
    int s = q4_k_six_bits(line.scale, d), m = q4_k_six_bits(line.min, dmin);
    float least = q4_k_error(x, d * (float)s, dmin * (float)m);
    *scale = s; *min = m;
    for (int a = s ? s - 1 : 0; a <= s + 1 && a < 64; a++)
        for (int b = m ? m - 1 : 0; b <= m + 1 && b < 64; b++) {
            float error = a == s && b == m ? least : q4_k_error(x, d * (float)a, dmin * (float)b);
            if (error < least) { least = error; *scale = a; *min = b; }
        }
}

/* The inverse of ap_q4_k_scale and ap_q4_k_min. */
static void q4_k_pack(uint8_t s[12], const int scale[8], const int min[8]) {
    for (int g = 0; g < 4; g++) {
        s[g] = (uint8_t)(scale[g] | scale[g + 4] >> 4 << 6);
        s[g + 4] = (uint8_t)(min[g] | min[g + 4] >> 4 << 6);
        s[g + 8] = (uint8_t)((scale[g + 4] & 15) | (min[g + 4] & 15) << 4);
    }
}

static void q4_k_encode_block(const float x[256], ap_q4_k *b) {
    q4_k_line line[8];
    int scale[8], min[8];
    float most_scale = 0, most_min = 0;
    for (int g = 0; g < 8; g++) {
        line[g] = q4_k_fit(x + g * 32);
        most_scale = fmaxf(most_scale, line[g].scale);
        most_min = fmaxf(most_min, line[g].min);
    }
    float d = q4_k_half(most_scale, b->d), dmin = q4_k_half(most_min, b->dmin);
    memset(b->q, 0, sizeof b->q);
    for (int g = 0; g < 8; g++) {
        q4_k_integers(x + g * 32, line[g], d, dmin, &scale[g], &min[g]);
        float s = d * (float)scale[g], m = dmin * (float)min[g], inverse = s ? 1 / s : 0;
        for (int i = g * 32; i < g * 32 + 32; i++) b->q[(i >> 6) * 32 + (i & 31)] |= (uint8_t)(q4_k_near((x[i] + m) * inverse) << (i >> 5 & 1) * 4);
    }
    q4_k_pack(b->s, scale, min);
}

void ap_q4_k_encode(const float *src, void *dst, size_t n) {
    ap_q4_k *b = dst;
    for (; n >= 256; n -= 256, src += 256, b++) q4_k_encode_block(src, b);
}
