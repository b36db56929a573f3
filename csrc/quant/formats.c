/*
** formats.c: formats.def as an array, and the two ways to find a row of it.  It owns that constant array and refuses nothing: an unknown id is NULL and the
** container that met it says so.  The containers call it at open; everything above holds the pointer.
*/
#include <string.h>
#include "format.h"
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
#define F(name, gguf, st, block, bytes, decode) { #name, gguf, st, block, bytes, decode },
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
