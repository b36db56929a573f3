/*
** model.h: a file bound to an architecture.  Binding is strict: every weight that a row demands is there with the right shape and a readable format, every
** tensor and every hyper-parameter of the file is used by a row, checked by a row, or refused by name.  Immutable afterwards and shared by threads; the file
** must outlive it.  No arithmetic here but sizes.
*/
#ifndef AP_MODEL_H
#define AP_MODEL_H
#include "tables.h"
#include "../file/file.h"

typedef struct {
    int layers, dim, ffn, heads, kv_heads, head, vocab, context;
    double eps, theta;
} ap_hparams;

/* A weight as an operation reads it: rows x cols values, row-major, `pairs` the head size whose rows the container interleaved (0: none). */
typedef struct {
    const uint8_t *data;
    const ap_format *fmt;
    int64_t rows, cols;
    int pairs;
    int tensor;                 /* index in the file, -1 for a value put in its place by a caller */
} ap_weight;

typedef struct ap_model {
    const ap_file *file;
    int arch;
    uint32_t flags, quirks;
    ap_hparams h;
    char source[16][96];        /* where each hyper-parameter came from, in the order of hparams.def */
    ap_weight *w;               /* slot = (layer + 1) * AP_W_N + row; fmt NULL where the row is off   */
} ap_model;

enum { AP_MAX_LAYERS = 4096, AP_MAX_HEADS = 65536, AP_MAX_VOCAB = 16 << 20, AP_MAX_WIDTH = 1 << 24 };

int  ap_model_bind(ap_model **out, const ap_file *file, ap_err *e);
void ap_model_free(ap_model *m);
static inline int ap_slot(int weight, int layer) { return (layer + 1) * AP_W_N + weight; }   /* layer -1: outside the layers */
static inline int ap_in_layer(int weight) { for (const char *s = ap_weights[weight].hf; *s; s++) if (*s == '%') return 1; return 0; }
/* A symbol or a product of symbols of stages.def and weights.def ("Qd", "T QKV"): sizes of all but the last into *rows, of the last into *cols. */
int  ap_shape(const ap_model *m, const char *shape, int T, int J, int64_t *rows, int64_t *cols);
/* Row n of the weight in Hugging Face lane order is this row of the file. */
AP_HD int64_t ap_paired_row(int64_t n, int pairs) {
    if (!pairs) return n;
    int64_t i = n % pairs, half = pairs / 2;
    return n - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}
static inline int64_t ap_weight_row_at(const ap_weight *w, int64_t n) { return ap_paired_row(n, w->pairs); }
#endif
