/*
** file.h: a container's bytes become an index of tensors and metadata, and nothing more: no model, no architecture, no meaning.  Every range is checked
** at open; after that a tensor is a pointer, a format and dimensions, whatever the container.  Callers: plan/model.c binds it, py/file.c shows it.
** The bytes are read with pread into memory that we own (a file that shrinks later cannot kill the process).
*/
#ifndef AP_FILE_H
#define AP_FILE_H
#include "../base/cursor.h"
#include "../base/err.h"
#include "../quant/format.h"

enum { AP_MAX_DIMS = 32 };       /* of safetensors, as NumPy 1 had it; the other containers have fewer */
typedef struct {
    ap_str name;
    const ap_format *fmt;
    int nd;
    int part;                       /* 0: this file; i: its shard i - 1     */
    int64_t *dim;                   /* outermost first, whatever the file says: a weight is [out, in] */
    const uint8_t *data; uint8_t *own;      /* NULL while the bytes are on disk: ap_file_data brings them */
    uint64_t bytes;
    uint64_t offset;                /* of data in the file, or in the shard */
} ap_tensor;

typedef enum { AP_V_INT, AP_V_UINT, AP_V_FLOAT, AP_V_BOOL, AP_V_STR, AP_V_ARR, AP_V_NULL, AP_V_JSON } ap_vkind;
typedef struct {
    ap_str key;                     /* GGUF: the key.  safetensors: key of config.json; nested objects are flattened with dots: rope_parameters.rope_theta */
    ap_vkind kind, elem;            /* elem: kind of an array's elements                                                   */
    uint32_t raw_type;              /* GGUF value type (arrays: of the element); 0 for JSON                                */
    union { int64_t i; uint64_t u; double f; int b; } v;
    ap_str s;                       /* AP_V_STR: text.  AP_V_ARR: the raw elements (GGUF encoding).  AP_V_JSON: JSON text of an array, not parsed */
    uint64_t n;                     /* elements of an array                                                                */
} ap_kv;

typedef struct ap_file ap_file;
enum { AP_NOTES = 8, AP_NOTE = 200 };
typedef struct { const char *name; int (*sniff)(const uint8_t *p, uint64_t n); int (*parse)(ap_file *f, ap_err *e); int (*verify)(const ap_file *f, int *checked, ap_err *e); } ap_container;
struct ap_file {
    const ap_container *kind;
    char *path;                     /* as opened: the .gguf file, the .safetensors file; for a folder, its model.safetensors */
    const uint8_t *p; uint64_t have, n;         /* the first `have` of the file's n bytes: all of a small file, of a large one those that describe it */
    struct ap_source *src;          /* where the others are; NULL when all are here */
    ap_file **shard; int nshard;    /* the other files of a model in several, opened and owned; this one is the first, or their index */
    int is_shard;                   /* opened as one of them   */
    int mapped;                     /* tensors are not read but mapped: for models larger than memory */
    char *config; uint64_t config_n;/* config.json beside a safetensors file; NULL for other containers */
    char *text; uint64_t text_n;    /* un-escaped names of a JSON header */
    char *kv_text;                  /* un-escaped keys and values of JSON metadata */
    char note[AP_NOTES][AP_NOTE]; int nnotes;   /* what is odd about the file and no error, in words */
    ap_tensor *t; int nt;           /* in file order           */
    int64_t *dims; uint64_t ndims;  /* what t[].dim point into: those of the first tensor, of the second ... */
    ap_kv *kv; int nkv;
    int *by_name;                   /* tensor indices sorted by name: ap_file_tensor is a binary search */
    uint32_t version, alignment;
};
int  ap_file_open(ap_file **out, const char *path, int mapped, ap_err *e);            /* sniffs; a folder means its model.safetensors + config.json */
int  ap_file_same(const ap_file *f, ap_err *e);                           /* of a mapped file, after computing with it: AP_CHANGED if its bytes were not what they had been */
int  ap_file_open_bytes(ap_file **out, const uint8_t *p, uint64_t n, const ap_container *kind, const char *config, uint64_t config_n, ap_err *e); /* for tests and fuzzers; copies; kind NULL: sniff */
void ap_file_close(ap_file *f);
const ap_tensor *ap_file_tensor(const ap_file *f, ap_str name);           /* NULL when absent */
int  ap_file_data(const ap_file *f, const ap_tensor *t, const uint8_t **data, ap_err *e);   /* the bytes of one of f's tensors, read if need be; f keeps them */
const ap_kv *ap_file_kv(const ap_file *f, const char *key);               /* NULL when absent */
int  ap_file_verify(const ap_file *f, int *checked, ap_err *e);           /* reads all bytes against the checksum that the container has; *checked 0: it has none */
extern const ap_container ap_containers[];
extern const int ap_containers_n;

/* For the containers' parsers only. */
int   ap_file_tensor_bytes(ap_tensor *t, int64_t at, ap_err *e);          /* bytes from dim and fmt; AP_SHAPE, AP_BLOCK          */
int   ap_file_packed_bytes(ap_tensor *t, int64_t at, ap_err *e);          /* the same where blocks need not end with rows: AP_SHAPE  */
int   ap_file_name_ok(ap_str s, uint64_t max, const char *what, int64_t at, ap_err *e);   /* 1..max bytes, UTF-8, no controls   */
int   ap_file_beside(const ap_file *f, const char *name, char **p, uint64_t *n, ap_err *e);  /* the file of that name in f's folder; *p stays NULL when there is none */
int   ap_file_plain_name(ap_str s, int64_t at, ap_err *e);                /* the name of a file and nothing else: AP_PATH */
int   ap_file_open_shard(ap_file *f, ap_str name, ap_err *e);             /* opens the file of that name in f's folder, and never another, as a shard of f */
int   ap_file_adopt(ap_file *f, ap_err *e);                               /* the shards' tensors become f's; index */
int   ap_file_pairs(ap_file *f, const char *what, const char *p, uint64_t n, int last_wins, ap_err *e);    /* a JSON object as kv; once a file */
void  ap_file_note(ap_file *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int   ap_file_peek(const ap_file *f, uint64_t at, void *p, uint64_t n, ap_err *e);            /* bytes inside the file, wherever they are */
int   ap_file_zeros(const ap_file *f, uint64_t from, uint64_t to, uint64_t *odd, ap_err *e);  /* *odd: the first byte of from..to that is not zero, or to */
int   ap_file_reserve(ap_file *f, uint64_t tensors, uint64_t dims, ap_err *e);    /* memory for that many in all                  */
void  ap_file_keep(ap_file *f, const ap_tensor *t);                       /* t, whose dim lies in the caller's memory, is the next one     */
int   ap_file_index(ap_file *f, ap_err *e);                               /* fills by_name; refuses a name or key given twice    */
int   ap_file_twice(const void *rows, int n, size_t stride, int *order);  /* sorts rows that begin with an ap_str into order; the place in it of the second of two equal ones, or 0 */
void *ap_file_room(void *rows, int n, uint64_t *cap, uint64_t size);      /* room for row n, doubling; NULL: no memory, rows stay */

/* Limits: each is refused with AP_LIMIT.  The fuzzers build with small ones, so that they meet them. */
#ifndef AP_SMALL_LIMITS
#define AP_FILE_WHOLE      (8u << 20)           /* a file up to this size is read at once */
#define AP_LIMIT_TENSORS   1000000u
#define AP_LIMIT_KV        1000000u
#define AP_LIMIT_METADATA  (1u << 30)
#define AP_LIMIT_STRING    (64u << 20)
#define AP_LIMIT_HEADER    100000000u
#define AP_LIMIT_SHARDS    4096
#else
#define AP_FILE_WHOLE      256u
#define AP_LIMIT_TENSORS   80u
#define AP_LIMIT_KV        80u
#define AP_LIMIT_METADATA  5000u
#define AP_LIMIT_STRING    1000u
#define AP_LIMIT_HEADER    4500u
#define AP_LIMIT_SHARDS    2
#endif
#endif
