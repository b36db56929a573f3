/* q8_k.c: the reference decode of q8_k.h: one rounding per value, that of d * q.  Owns nothing; the whole-tensor readers and the tests call it. */
#include "plain.h"
#include "q8_k.h"

void ap_q8_k_decode(const void *src, float *dst, size_t n) {
    const ap_q8_k *b = src;
    for (; n >= 256; n -= 256, dst += 256, b++) {
        float d;
        ap_f32_decode(b->d, &d, 1);
        for (int i = 0; i < 256; i++) dst[i] = d * (float)b->q[i];
    }
}
