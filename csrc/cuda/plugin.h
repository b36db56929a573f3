/*
** plugin.h: how libaprender_cuda.so and the extension meet.  The library is opened at run time, sees no symbol of the extension and exports one: ap_backend_cuda,
** an ap_plugin.  Everything else goes through structs, so both sides must agree on every row file and every struct: `version` is a hash of these, computed by each
** from its own copy of the headers.  run/plugin.c opens; cuda.cu fills.
*/
#ifndef AP_PLUGIN_H
#define AP_PLUGIN_H
#include "../plan/backend.h"

typedef struct {
    uint64_t version;                                           /* ap_plugin_version() where it was built; stays the first field */
    const ap_backend *backend;
    int (*devices)(char *names, size_t n, int *count, ap_err *e);  /* what is there, a line each; AP_DEVICE with the driver's reason when none is */
    const char *built;                                          /* compiler and architectures, in words */
} ap_plugin;
#define AP_PLUGIN_SYMBOL "ap_backend_cuda"

/* FNV-1a over the rows as they are spelled, then over the sizes and the places of the last fields. */
static inline uint64_t ap_plugin_text(uint64_t h, const char *s) { for (; *s; s++) h = (h ^ (uint8_t)*s) * 1099511628211u; return h * 31; }
static inline uint64_t ap_plugin_number(uint64_t h, uint64_t v) { for (int i = 0; i < 8; i++, v >>= 8) h = (h ^ (v & 255)) * 1099511628211u; return h; }
static inline uint64_t ap_plugin_version(void) {
    uint64_t h = 14695981039346656037u;
#define O(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../plan/ops.def"
#define S(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../plan/stages.def"
#define W(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../plan/weights.def"
#define G(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../plan/flags.def"
#define M(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../plan/params.def"
#define F(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../quant/formats.def"
#define X(...) h = ap_plugin_text(h, #__VA_ARGS__);
#include "../base/errors.def"
    const uint64_t sizes[] = {
        sizeof(ap_plugin), sizeof(ap_backend), sizeof(ap_backend_options), sizeof(ap_plan), sizeof(ap_step), sizeof(ap_part), sizeof(ap_model), sizeof(ap_hparams),
        sizeof(ap_weight), sizeof(ap_format), sizeof(ap_err), offsetof(ap_step, at), offsetof(ap_step, b), offsetof(ap_model, w), offsetof(ap_err, msg),
        offsetof(ap_backend, path), offsetof(ap_weight, tensor), offsetof(ap_hparams, theta), AP_MAX_PARTS, AP_PACK_WHOLE, AP_MODE_N,
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) h = ap_plugin_number(h, sizes[i]);
    return h;
}
#endif
