/*
** map.h: a file mapped for reading, such that a page that is gone (the file was cut, the disk fails) reads as zeros and is remembered, instead of ending the
** process.  Whoever computes with a map asks afterwards whether it was whole.  Called by file/bytes.c for models that are opened with mmap.
*/
#ifndef AP_MAP_H
#define AP_MAP_H
#include <stdint.h>
#include "err.h"
enum { AP_MAPS = 4160 };                        /* at once in a process: more than the shards of a model */
typedef struct ap_map ap_map;
int  ap_map_open(ap_map **out, int fd, uint64_t n, ap_err *e);           /* AP_LIMIT when there are too many, AP_IO */
const uint8_t *ap_map_bytes(const ap_map *m);
int  ap_map_lost(const ap_map *m);                                       /* a page was wanted that is not there any more */
void ap_map_close(ap_map *m);
#endif
