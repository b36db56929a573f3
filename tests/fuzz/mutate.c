/* mutate.c: what the mutators share: numbers that break arithmetic, words that the product knows, an arena, CRC-32; and the smallest mutators. */
#include <stdio.h>
#include <string.h>
#include "mutate.h"

static uint8_t mut_arena[1 << 20];
static size_t mut_used;

void mut_begin(mut_rng *r, unsigned seed) { r->s = seed * 0x9E3779B97F4A7C15u + 1; mut_used = 0; }

uint64_t mut_next(mut_rng *r) {                 /* splitmix64 */
    uint64_t z = r->s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

size_t mut_below(mut_rng *r, size_t n) { return n ? (size_t)(mut_next(r) % n) : 0; }
int mut_chance(mut_rng *r, int percent) { return (int)mut_below(r, 100) < percent; }

/* Times a width it wraps to something small, or to what it was: widths of values, entries and blocks. */
static uint64_t mut_wrapping(mut_rng *r, uint64_t was) {
    static const uint16_t width[] = { 2, 4, 8, 2, 4, 8, 12, 14, 16, 18, 20, 25, 34, 64, 120, 128, 144, 210 };
    uint64_t w = width[mut_below(r, sizeof width / sizeof *width)];
    return UINT64_MAX / w + 1 + (mut_chance(r, 50) ? was : mut_below(r, 2));
}

uint64_t mut_number(mut_rng *r, uint64_t was, uint64_t left) {
    switch (mut_below(r, 12)) {
    case 0:  return 0;
    case 1:  return 1;
    case 2:  return was + 1;
    case 3:  return was - 1;
    case 4:  return was * 2;
    case 5:  return left;
    case 6:  return left + 1 - 2 * mut_below(r, 2);
    case 7:  return (uint64_t)1 << 31 << (mut_below(r, 3) * 16);              /* 2^31, 2^47, 2^63 */
    case 8:  return UINT64_MAX - mut_below(r, 33);
    case 9:  return mut_below(r, 300);
    case 10: return mut_wrapping(r, was);
    default: return ((uint64_t)1 << mut_below(r, 64)) + mut_below(r, 3) - 1;
    }
}

void mut_put(mut_out *o, const void *p, size_t n) {
    if (n > o->room - o->n) n = o->room - o->n;
    if (n) memcpy(o->p + o->n, p, n);
    o->n += n;
}

void mut_u64(mut_out *o, uint64_t v, int bytes) { mut_put(o, &v, (size_t)bytes); }

void mut_fill(mut_out *o, size_t n) {
    if (n > o->room - o->n) n = o->room - o->n;
    memset(o->p + o->n, 0, n);
    o->n += n;
}

uint8_t *mut_scratch(size_t n) {
    if (n > sizeof mut_arena - mut_used) return NULL;
    mut_used += n;
    return mut_arena + mut_used - n;
}

mut_span mut_keep(const void *p, size_t n) {
    uint8_t *q = mut_scratch(n);
    if (!q) return (mut_span){ (const uint8_t *)"", 0 };
    if (n) memcpy(q, p, n);
    return (mut_span){ q, n };
}

uint64_t mut_read(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    memcpy(&v, p, (size_t)bytes);
    return v;
}

uint32_t mut_crc32(uint32_t crc, const uint8_t *p, size_t n) {
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            table[i] = i;
            for (int k = 0; k < 8; k++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
        }
    crc = ~crc;
    for (size_t i = 0; i < n; i++) crc = crc >> 8 ^ table[(crc ^ p[i]) & 255];
    return ~crc;
}

/* --- words ----------------------------------------------------------------------------------------------------------------------------- */

/* The row files are the dictionary: a key that is added there is fuzzed from then on. */
static const char *const mut_words[] = {
#define P(field, kind, gguf, hf, apr, ...) gguf, hf, apr,
#define C(gguf, hf, apr, ...) gguf, hf, apr,
#define N(gguf, hf, apr) gguf, hf, apr,
#include "../../csrc/plan/hparams.def"
#define W(weight, group, gguf, hf, ...) gguf, hf,
#include "../../csrc/plan/weights.def"
#define A(name, hf_class, ...) #name, hf_class,
#include "../../csrc/plan/archs.def"
#define F(name, gguf, st, ...) st,
#include "../../csrc/quant/formats.def"
    "general.architecture", "general.alignment", "tokenizer.ggml.tokens", "__metadata__", "dtype", "shape", "data_offsets", "config.json", "silu", "default",
    "full_attention", "sliding_attention", "a", "weight_map", "split.no", "split.count", "split.tensors.count", "sharding", "shard_count", "shard_index", "pattern",
    ".", "..", "a/b", "a\\\\b", "F4", "F6_E2M3", "F8_E4M3FN", "rope_parameters", "rope_theta",
};

/* One of the spellings of a row; "%s" becomes an architecture, "%d" a layer, a trailing * some rest. */
mut_span mut_word(mut_rng *r) {
    static const char *const archs[] = { "llama", "qwen2", "qwen3", "gpt2" };
    char text[160];
    size_t at = 0;
    const char *w = mut_words[mut_below(r, sizeof mut_words / sizeof *mut_words)], *arch = archs[mut_below(r, 4)];
    for (const char *space; (space = strchr(w, ' ')) && mut_chance(r, 60); ) w = space + 1;
    for (; *w && *w != ' ' && at < 120; w++) {
        if (w[0] == '%' && w[1] == 's') { at += (size_t)sprintf(text + at, "%s", arch); w++; }
        else if (w[0] == '%' && w[1] == 'd') { at += (size_t)sprintf(text + at, "%d", (int)mut_below(r, 3)); w++; }
        else if (w[0] == '*' && (!w[1] || w[1] == ' ')) at += (size_t)sprintf(text + at, "x%d", (int)mut_below(r, 3));
        else text[at++] = *w;
    }
    return mut_keep(text, at);
}

mut_span mut_bend(mut_rng *r, mut_span s) {
    static const char *const bad[] = { "\xff", "\xc0\x80", "\xed\xa0\x80", "\xf5", "\xf4\x90\x80\x80", "\xe0\x80\x80", "\x1b[31m", "\n", "\x7f", "\xc2\x85", "\xe2\x80\xae", "\xc3", "../", "%s%n", "\xf0\x9f\x98\x80", "\xce\xb1", "\\u0061" };
    enum { LONG = 70 };
    uint8_t *q = mut_scratch(s.n + LONG);
    size_t cut = mut_below(r, s.n + 1), n = s.n;
    if (!q) return s;
    if (s.n) memcpy(q, s.p, s.n);
    switch (mut_below(r, 5)) {
    case 0:  n = cut; break;
    case 1:  if (n) q[cut % n] ^= (uint8_t)(1u << mut_below(r, 8)); break;
    case 2:  n = 0; break;
    case 3:  memset(q + n, 'x', LONG); n += 1 + mut_below(r, LONG); break;
    default: {
        const char *b = bad[mut_below(r, sizeof bad / sizeof *bad)];
        size_t m = strlen(b);
        if (mut_chance(r, 5)) { b = ""; m = 1; }                               /* a zero byte */
        memmove(q + cut + m, q + cut, n - cut);
        memcpy(q + cut, b, m);
        n += m;
    }
    }
    return (mut_span){ q, n };
}

/* --- the smallest formats -------------------------------------------------------------------------------------------------------------- */

/* APRT: magic, layer, count, floats.  Most outputs have the count that their size says. */
size_t mutate_aprt(uint8_t *p, size_t n, size_t room, unsigned seed) {
    mut_rng r;
    mut_begin(&r, seed);
    n = LLVMFuzzerMutate(p, n, room);
    if (n < 12 || mut_chance(&r, 15)) return n;
    uint64_t count = (n - 12) / 4;
    if (mut_chance(&r, 95)) memcpy(p, "APRT", 4);
    if (mut_chance(&r, 10)) count = mut_number(&r, count, count);
    else if (mut_chance(&r, 90)) n = 12 + 4 * (size_t)count;
    if (mut_chance(&r, 20)) memset(p + 4, 0xff, 4);
    memcpy(p + 8, &count, 4);
    return n;
}

size_t mutate_model(uint8_t *p, size_t n, size_t room, unsigned seed) {
    if (n >= 4 && !memcmp(p, "GGUF", 4)) return mutate_gguf(p, n, room, seed);
    if (n >= 3 && !memcmp(p, "APR", 3)) return mutate_apr(p, n, room, seed);
    if (n > 8 && p[8] == '{') return mutate_safetensors(p, n, room, seed);
    return LLVMFuzzerMutate(p, n, room);
}
