/*
** fast.c: the formats that models are made of, decoded once more with the instructions of a CPU tier.  Each version makes the same products and differences
** with the same roundings as the plain reference, so the bits are the same (no fused multiply-add), and every pair is held together by a test.  It owns a
** table and refuses nothing: what has no version here is decoded by the reference.  The matmuls call it.
*/
#include "../base/tiers.h"
#include "apr_q4.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "plain.h"
#include "q4_0.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"

#if defined(__x86_64__)
#include <immintrin.h>

AP_TARGET_AVX2 static inline float fast_half(const uint8_t *p) { return _cvtsh_ss(ap_le16(p)); }
AP_TARGET_AVX2 static inline __m128i fast_16(const void *p) { return _mm_loadu_si128(p); }

/* dst[0..15] = scale * q, q 16 signed bytes. */
AP_TARGET_AVX2 static inline void fast_scale16(float *dst, __m128i q, __m256 scale) {
    _mm256_storeu_ps(dst, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))));
    _mm256_storeu_ps(dst + 8, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)))));
}

/* dst[0..15] = scale * q - min. */
AP_TARGET_AVX2 static inline void fast_line16(float *dst, __m128i q, __m256 scale, __m256 min) {
    __m256 lo = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
    __m256 hi = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8))));
    _mm256_storeu_ps(dst, _mm256_sub_ps(lo, min));
    _mm256_storeu_ps(dst + 8, _mm256_sub_ps(hi, min));
}

AP_TARGET_AVX2 static inline __m128i fast_low(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(15)); }
AP_TARGET_AVX2 static inline __m128i fast_high(__m128i bytes) { return fast_low(_mm_srli_epi16(bytes, 4)); }

AP_TARGET_AVX2 static void fast_f16_avx2(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (; n >= 8; n -= 8, p += 16, dst += 8) _mm256_storeu_ps(dst, _mm256_cvtph_ps(fast_16(p)));
    ap_f16_decode(p, dst, n);
}

AP_TARGET_AVX2 static void fast_bf16_avx2(const void *src, float *dst, size_t n) {
    const uint8_t *p = src;
    for (; n >= 8; n -= 8, p += 16, dst += 8)
        _mm256_storeu_ps(dst, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(fast_16(p)), 16)));
    ap_bf16_decode(p, dst, n);
}

AP_TARGET_AVX2 static void fast_q8_0_avx2(const void *src, float *dst, size_t n) {
    const ap_q8_0 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        __m256 d = _mm256_set1_ps(fast_half(b->d));
        fast_scale16(dst, fast_16(b->q), d);
        fast_scale16(dst + 16, fast_16(b->q + 16), d);
    }
}

AP_TARGET_AVX2 static void fast_q4_0_avx2(const void *src, float *dst, size_t n) {
    const ap_q4_0 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        __m256 d = _mm256_set1_ps(fast_half(b->d));
        __m128i q = fast_16(b->q), eight = _mm_set1_epi8(8);
        fast_scale16(dst, _mm_sub_epi8(fast_low(q), eight), d);
        fast_scale16(dst + 16, _mm_sub_epi8(fast_high(q), eight), d);
    }
}

AP_TARGET_AVX2 static void fast_apr_q4_avx2(const void *src, float *dst, size_t n) {
    const ap_apr_q4 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        int exponent = b->d[1] >> 2 & 31;
        __m256 d = _mm256_set1_ps(exponent && exponent != 31 ? fast_half(b->d) : 0.0f);
        __m128i q = fast_16(b->q), eight = _mm_set1_epi8(8), low = _mm_sub_epi8(fast_low(q), eight), high = _mm_sub_epi8(fast_high(q), eight);
        fast_scale16(dst, _mm_unpacklo_epi8(low, high), d);                     /* neighbours share a byte */
        fast_scale16(dst + 16, _mm_unpackhi_epi8(low, high), d);
    }
}

/* 16 where bit i of the 16 bits h is set. */
AP_TARGET_AVX2 static inline __m128i fast_fifth(const uint8_t *h) {
    __m128i bit = _mm_set1_epi64x((long long)0x8040201008040201u), byte = _mm_set_epi64x(0x0101010101010101, 0);
    __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(ap_le16(h)), byte);
    return _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit), _mm_set1_epi8(16));
}

AP_TARGET_AVX2 static void fast_q5_0_avx2(const void *src, float *dst, size_t n) {
    const ap_q5_0 *b = src;
    for (; n >= 32; n -= 32, dst += 32, b++) {
        __m256 d = _mm256_set1_ps(fast_half(b->d));
        __m128i q = fast_16(b->q), sixteen = _mm_set1_epi8(16);
        fast_scale16(dst, _mm_sub_epi8(_mm_or_si128(fast_low(q), fast_fifth(b->h)), sixteen), d);
        fast_scale16(dst + 16, _mm_sub_epi8(_mm_or_si128(fast_high(q), fast_fifth(b->h + 2)), sixteen), d);
    }
}

AP_TARGET_AVX2 static inline __m128i fast_levels(void) {
    int8_t level[16];
    for (int q = 0; q < 16; q++) level[q] = (int8_t)ap_iq4_level(q);
    return fast_16(level);
}

AP_TARGET_AVX2 static void fast_iq4_nl_avx2(const void *src, float *dst, size_t n) {
    const ap_iq4_nl *b = src;
    __m128i level = fast_levels();
    for (; n >= 32; n -= 32, dst += 32, b++) {
        __m256 d = _mm256_set1_ps(fast_half(b->d));
        __m128i q = fast_16(b->q);
        fast_scale16(dst, _mm_shuffle_epi8(level, fast_low(q)), d);
        fast_scale16(dst + 16, _mm_shuffle_epi8(level, fast_high(q)), d);
    }
}

AP_TARGET_AVX2 static void fast_iq4_xs_avx2(const void *src, float *dst, size_t n) {
    const ap_iq4_xs *b = src;
    __m128i level = fast_levels();
    for (; n >= 256; n -= 256, b++) {
        float d = fast_half(b->d);
        for (int g = 0; g < 8; g++, dst += 32) {
            __m256 scale = _mm256_set1_ps(d * (float)ap_iq4_xs_scale(b, g));
            __m128i q = fast_16(b->q + g * 16);
            fast_scale16(dst, _mm_shuffle_epi8(level, fast_low(q)), scale);
            fast_scale16(dst + 16, _mm_shuffle_epi8(level, fast_high(q)), scale);
        }
    }
}

AP_TARGET_AVX2 static void fast_q4_k_avx2(const void *src, float *dst, size_t n) {
    const ap_q4_k *b = src;
    for (; n >= 256; n -= 256, b++) {
        float d = fast_half(b->d), dmin = fast_half(b->dmin);
        for (int g = 0; g < 8; g += 2, dst += 64) {                             /* two groups share 32 bytes */
            __m128i first = fast_16(b->q + g * 16), second = fast_16(b->q + g * 16 + 16);
            __m256 scale = _mm256_set1_ps(d * (float)ap_q4_k_scale(b->s, g)), min = _mm256_set1_ps(dmin * (float)ap_q4_k_min(b->s, g));
            fast_line16(dst, fast_low(first), scale, min);
            fast_line16(dst + 16, fast_low(second), scale, min);
            scale = _mm256_set1_ps(d * (float)ap_q4_k_scale(b->s, g + 1));
            min = _mm256_set1_ps(dmin * (float)ap_q4_k_min(b->s, g + 1));
            fast_line16(dst + 32, fast_high(first), scale, min);
            fast_line16(dst + 48, fast_high(second), scale, min);
        }
    }
}

/* Bit g of 16 bytes as the fifth bit of 16 numbers. */
AP_TARGET_AVX2 static inline __m128i fast_bit(__m128i bytes, int g) {
    return _mm_slli_epi16(_mm_and_si128(_mm_srl_epi16(bytes, _mm_cvtsi32_si128(g)), _mm_set1_epi8(1)), 4);
}

AP_TARGET_AVX2 static void fast_q5_k_avx2(const void *src, float *dst, size_t n) {
    const ap_q5_k *b = src;
    for (; n >= 256; n -= 256, b++) {
        float d = fast_half(b->d), dmin = fast_half(b->dmin);
        __m128i tops[2] = { fast_16(b->h), fast_16(b->h + 16) };
        for (int g = 0; g < 8; g++, dst += 32) {
            __m256 scale = _mm256_set1_ps(d * (float)ap_q4_k_scale(b->s, g)), min = _mm256_set1_ps(dmin * (float)ap_q4_k_min(b->s, g));
            for (int i = 0; i < 2; i++) {
                __m128i q = fast_16(b->q + (g >> 1) * 32 + i * 16);
                fast_line16(dst + i * 16, _mm_or_si128(g & 1 ? fast_high(q) : fast_low(q), fast_bit(tops[i], g)), scale, min);
            }
        }
    }
}

/* 16 six-bit numbers less 32: nibbles, and the two bits of `tops` from bit `shift` on. */
AP_TARGET_AVX2 static inline __m128i fast_q6(__m128i nibbles, __m128i tops, int shift) {
    __m128i top = _mm_and_si128(_mm_srl_epi16(tops, _mm_cvtsi32_si128(shift)), _mm_set1_epi8(3));
    return _mm_sub_epi8(_mm_or_si128(nibbles, _mm_slli_epi16(top, 4)), _mm_set1_epi8(32));
}

AP_TARGET_AVX2 static void fast_q6_k_avx2(const void *src, float *dst, size_t n) {
    const ap_q6_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d = fast_half(b->d);
        for (int part = 0; part < 4; part++) {                                  /* half 0 or 1, first or last 16 values of every 32 */
            int at = (part >> 1) * 64 + (part & 1) * 16;
            const int8_t *s = b->s + (part >> 1) * 8 + (part & 1);
            float *out = dst + (part >> 1) * 128 + (part & 1) * 16;
            __m128i a = fast_16(b->l + at), c = fast_16(b->l + at + 32), tops = fast_16(b->h + at / 64 * 32 + (part & 1) * 16);
            fast_scale16(out, fast_q6(fast_low(a), tops, 0), _mm256_set1_ps(d * (float)s[0]));
            fast_scale16(out + 32, fast_q6(fast_low(c), tops, 2), _mm256_set1_ps(d * (float)s[2]));
            fast_scale16(out + 64, fast_q6(fast_high(a), tops, 4), _mm256_set1_ps(d * (float)s[4]));
            fast_scale16(out + 96, fast_q6(fast_high(c), tops, 6), _mm256_set1_ps(d * (float)s[6]));
        }
    }
}
#endif

static const ap_decode fast_decode[AP_TIER_N][AP_F_N] = {
#if defined(__x86_64__)
    [AP_TIER_avx2] = {
        [AP_F_F16] = fast_f16_avx2, [AP_F_BF16] = fast_bf16_avx2, [AP_F_Q8_0] = fast_q8_0_avx2, [AP_F_Q4_0] = fast_q4_0_avx2,
        [AP_F_Q5_0] = fast_q5_0_avx2, [AP_F_Q4_K] = fast_q4_k_avx2, [AP_F_Q5_K] = fast_q5_k_avx2, [AP_F_Q6_K] = fast_q6_k_avx2,
        [AP_F_IQ4_NL] = fast_iq4_nl_avx2, [AP_F_IQ4_XS] = fast_iq4_xs_avx2, [AP_F_APR_Q4] = fast_apr_q4_avx2,
    },
#endif
};

ap_decode ap_format_decoder(const ap_format *f, int tier) {
    for (; tier >= 0; tier--) if (fast_decode[tier][f - ap_formats]) return fast_decode[tier][f - ap_formats];
    return f->decode;
}
