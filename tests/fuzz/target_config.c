/*
** target_config.c: the bytes are the config.json beside one fixed safetensors file, that of a llama with one layer.  What binds is run.
** It owns the fixed file: the names and sizes below, all weights 0.
*/
#include <stdio.h>
#include <string.h>
#include "mutate.h"
#include "use.h"

enum { DIM = 4, FFN = 6, HEADS = 2, KV_HEADS = 1, HEAD = 2, VOCAB = 5, ROOM = 8192 };

static size_t config_model(uint8_t *out) {
    static const struct { const char *name; int rows, cols; } t[] = {
        { "model.embed_tokens.weight", VOCAB, DIM }, { "model.layers.0.input_layernorm.weight", 0, DIM }, { "model.layers.0.self_attn.q_proj.weight", HEADS * HEAD, DIM },
        { "model.layers.0.self_attn.k_proj.weight", KV_HEADS * HEAD, DIM }, { "model.layers.0.self_attn.v_proj.weight", KV_HEADS * HEAD, DIM },
        { "model.layers.0.self_attn.o_proj.weight", DIM, HEADS * HEAD }, { "model.layers.0.post_attention_layernorm.weight", 0, DIM },
        { "model.layers.0.mlp.gate_proj.weight", FFN, DIM }, { "model.layers.0.mlp.up_proj.weight", FFN, DIM }, { "model.layers.0.mlp.down_proj.weight", DIM, FFN },
        { "model.norm.weight", 0, DIM },
    };
    char *text = (char *)out + 8;
    size_t n = 0, at = 0;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        size_t size = (size_t)(t[i].rows ? t[i].rows : 1) * (size_t)t[i].cols * 4;
        n += (size_t)sprintf(text + n, "%c\"%s\":{\"dtype\":\"F32\",\"shape\":[", i ? ',' : '{', t[i].name);
        if (t[i].rows) n += (size_t)sprintf(text + n, "%d,", t[i].rows);
        n += (size_t)sprintf(text + n, "%d],\"data_offsets\":[%zu,%zu]}", t[i].cols, at, at + size);
        at += size;
    }
    text[n++] = '}';
    uint64_t length = n;
    memcpy(out, &length, sizeof length);
    memset(text + n, 0, at);
    return 8 + n + at;
}

static int config_use(const check_input *in, ap_err *e) {
    ap_file *f;
    AP_TRY(check_open(&f, in, e));
    int rc = check_file(f, e);
    if (!rc) rc = use_file(f, e);
    ap_file_close(f);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    static uint8_t model[ROOM];
    static size_t model_n;
    if (!model_n) model_n = config_model(model);
    check_action(config_use, &(check_input){ .p = model, .n = model_n, .kind = check_container("safetensors"), .config = (const char *)(p ? p : model), .config_n = n });
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t room, unsigned seed) { return mutate_json(p, n, room, seed); }
