/*
** aprt.h: one APRT file, the values of one stage of one layer: "APRT", the layer, the number of values, the values (u32, u32, f32; little endian).  It holds
** neither a shape nor a stage: aprender/aprt.py knows those from the file's name.  Caller: py/aprt.c.
*/
#ifndef AP_APRT_H
#define AP_APRT_H
#include "../base/err.h"

#define AP_APRT_WHOLE UINT32_MAX    /* the layer of a stage of the whole model */
enum { AP_APRT_HEADER = 12 };

typedef struct {
    uint32_t layer;
    uint64_t n;                     /* values                                            */
    const float *v;                 /* inside memory, their bits as they are in the file */
    void *memory;                   /* the caller's to ap_free                           */
} ap_aprt;
int ap_aprt_read(ap_aprt *out, const char *path, ap_err *e);
int ap_aprt_parse(ap_aprt *out, const uint8_t *p, uint64_t n, ap_err *e);   /* p 4-byte aligned; memory is left alone */
#endif
