/*
** json.h: a strict pull parser.  The caller asks for the next token and gets spans into the text; nothing recurses, nothing allocates but
** ap_json_text (which un-escapes a string into the caller's buffer).  Depth is at most 64, NaN and Infinity do not exist, integers are exact
** in int64/uint64 or are doubles.  Duplicate keys are the caller's to refuse, because only it keeps what it has seen.
*/
#ifndef AP_JSON_H
#define AP_JSON_H
#include "cursor.h"
#include "err.h"
typedef enum { AP_J_END, AP_J_OBJ, AP_J_OBJ_END, AP_J_ARR, AP_J_ARR_END, AP_J_KEY, AP_J_STR, AP_J_INT, AP_J_NUM, AP_J_TRUE, AP_J_FALSE, AP_J_NULL } ap_jkind;
enum { AP_JSON_DEPTH = 64 };
typedef struct {
    const char *p; uint64_t n, pos;
    int depth; uint8_t stack[AP_JSON_DEPTH];
    int state;
    ap_str span;            /* of the last token: a string's inside (still escaped), a number's digits */
    int negative;           /* of the last integer                                                     */
    uint64_t mag;           /* magnitude of the last integer                                           */
    double num;             /* value of the last integer or number                                     */
} ap_json;
void ap_json_init(ap_json *j, const char *p, uint64_t n);
int  ap_json_next(ap_json *j, ap_jkind *kind, ap_err *e);       /* trailing bytes other than white space are AP_JSON errors at AP_J_END */
int  ap_json_skip(ap_json *j, ap_err *e);                       /* skips the value that comes next                                      */
int  ap_json_text(const ap_json *j, ap_str span, char *out, uint64_t cap, uint64_t *len, ap_err *e); /* un-escapes span; surrogates paired, UTF-8 checked */
#endif
