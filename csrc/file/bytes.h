/*
** bytes.h: a regular file, opened, whose bytes are fetched with pread into memory that we own, or, if asked for, mapped: a file that shrinks or is written to
** is an error of ours and never a signal.  file.c opens models and what stands beside them here; it knows nothing of what the bytes mean.
*/
#ifndef AP_BYTES_H
#define AP_BYTES_H
#include <stdint.h>
#include "../base/err.h"

typedef struct ap_source ap_source;
int  ap_source_open(ap_source **out, const char *path, ap_err *e);       /* AP_NOT_REGULAR, AP_IO */
int  ap_source_open_link(ap_source **out, const char *path, ap_err *e);  /* the same, but a symbolic link leads nowhere except into a hub's cache: AP_PATH, AP_MISSING */
int  ap_source_map(ap_source *s, ap_err *e);                             /* from now on ap_source_mapped gives all its bytes */
const uint8_t *ap_source_mapped(const ap_source *s);                     /* NULL: it is not mapped */
int  ap_source_same(const ap_source *s, ap_err *e);                      /* AP_CHANGED if the file is not what it was, or a page of the map was gone */
uint64_t ap_source_size(const ap_source *s);
int  ap_source_read(const ap_source *s, uint64_t at, void *p, uint64_t n, ap_err *e);   /* AP_CHANGED if the file is not what it was when it was opened */
void ap_source_lock(ap_source *s);
void ap_source_unlock(ap_source *s);
void ap_source_close(ap_source *s);
int  ap_read_whole(const char *path, uint64_t limit, uint8_t **p, uint64_t *n, ap_err *e);   /* with a zero byte after it; the caller's to ap_free; AP_LIMIT */
int  ap_is_folder(const char *path);
char *ap_path_join(const char *folder, size_t n, const char *name);      /* the first n bytes of folder, a slash if it lacks one, name; NULL: no memory */
int  ap_no_memory(uint64_t bytes, ap_err *e);
#endif
