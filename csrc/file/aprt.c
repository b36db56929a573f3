/*
** aprt.c: reads an APRT file.  The size of the file must be what its header says, to the byte: a short one was cut, a longer one holds something that nobody
** declared.  No count is believed before it is held against the bytes that are there.  No value is touched: a NaN keeps its payload.  py/aprt.c calls it.
*/
#include <string.h>
#include "../base/cursor.h"
#include "../base/mem.h"
#include "../base/num.h"
#include "aprt.h"
#include "bytes.h"
#include "file.h"

/* Would the count fit if its bytes were turned round?  Then a big-endian machine wrote the file. */
static const char *aprt_hint(uint32_t count, uint64_t left) {
    uint64_t turned = __builtin_bswap32(count);
    return turned != count && turned * sizeof(float) == left ? " (with its bytes swapped the count fits: a big-endian writer?)" : "";
}

int ap_aprt_parse(ap_aprt *out, const uint8_t *p, uint64_t n, ap_err *e) {
    ap_cur c = { p, n, 0, n };
    const uint8_t *magic;
    uint32_t layer, count;
    uint64_t want;
    char shown[132];
    if (n < AP_APRT_HEADER) return ap_fail_at(e, AP_TRUNCATED, (int64_t)n, NULL, "%llu bytes, an APRT header has %d", (unsigned long long)n, AP_APRT_HEADER);
    if (!ap_take(&c, 4, &magic) || memcmp(magic, "APRT", 4))
        return ap_fail_at(e, AP_BAD_MAGIC, 0, NULL, "the file begins with '%s', not with 'APRT'", ap_show(shown, (const char *)p, 4));
    if (!ap_u32(&c, &layer) || !ap_u32(&c, &count) || !ap_mul_ok(count, sizeof(float), &want))
        return ap_fail_at(e, AP_TRUNCATED, (int64_t)c.pos, NULL, "the header ends early");
    uint64_t left = ap_left(&c);
    if (left < want)
        return ap_fail_at(e, AP_TRUNCATED, 8, "count", "the header says %u values, which is %llu bytes; %llu follow it%s", count,
                          (unsigned long long)want, (unsigned long long)left, aprt_hint(count, left));
    if (left > want)
        return ap_fail_at(e, AP_GAP, AP_APRT_HEADER + (int64_t)want, "count", "the header says %u values, which is %llu bytes; %llu follow it: %llu too many%s", count,
                          (unsigned long long)want, (unsigned long long)left, (unsigned long long)(left - want), aprt_hint(count, left));
    out->layer = layer;
    out->n = count;
    out->v = (const float *)(const void *)(p + AP_APRT_HEADER);
    return AP_OK;
}

int ap_aprt_read(ap_aprt *out, const char *path, ap_err *e) {
    uint8_t *p = NULL;
    uint64_t n = 0;
    AP_TRY(ap_read_whole(path, AP_APRT_HEADER + (uint64_t)UINT32_MAX * sizeof(float), &p, &n, e));
    int rc = ap_aprt_parse(out, p, n, e);
    if (rc) ap_free(p);
    else out->memory = p;
    return rc;
}
