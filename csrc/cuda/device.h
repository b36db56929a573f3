/*
** device.h: the table of functions between the backend and a device.  device_cuda.cu fills it from the CUDA runtime; fake.cpp fills it with a device made of host
** memory that runs the same kernels, counts, poisons, and fails where a test tells it to.  Every function returns 0 or an error code of its device, whose words
** are `error`.  Nothing above this table calls CUDA.
*/
#ifndef AP_DEVICE_H
#define AP_DEVICE_H
#include <stddef.h>
#include <stdint.h>

static constexpr int AP_ARGS_MAX = 256, AP_THREADS = 256;           /* bytes of a kernel's one argument; threads of every block */

/* One kernel to run: blocks of AP_THREADS threads, `shared` bytes of shared memory each, and its argument by value. */
typedef struct {
    const void *entry;
    unsigned gx, gy;
    unsigned shared;
    int meets;                                          /* threads of a block wait for each other: barriers, shuffles */
    int stage, layer;                                   /* whose kernel it is */
    size_t bytes;
    alignas(16) unsigned char args[AP_ARGS_MAX];
} ap_launch;

typedef struct { char name[128]; int major, minor, processors; size_t memory; } ap_properties;

typedef struct {
    const char *name;
    int (*count)(int *n);
    int (*select)(int device, ap_properties *p);        /* for the calling thread, before anything else                     */
    int (*room)(size_t *free_bytes, size_t *total);
    int (*get)(void **p, size_t n);
    int (*release)(void *p);
    int (*fill)(void *p, int byte, size_t n, void *stream);
    int (*upload)(void *p, const void *host, size_t n, void *stream);       /* host may be changed after the return          */
    int (*fetch)(void *host, const void *p, size_t n, void *stream);        /* host holds it after the next wait             */
    int (*move)(void *to, const void *from, size_t n, void *stream);
    int (*launch)(const ap_launch *k, void *stream);
    int (*stream_new)(void **stream);
    int (*stream_free)(void *stream);
    int (*wait)(void *stream);                          /* errors of kernels that ran since then surface here at the latest */
    int (*done)(void *stream, int *yes);                /* the same without waiting                                          */
    int (*graph_new)(void **graph, const ap_launch *k, int n);              /* one after the other                           */
    int (*graph_set)(void *graph, int i, const ap_launch *k);               /* same entry, other argument                    */
    int (*graph_run)(void *graph, void *stream);
    int (*graph_free)(void *graph);
    int (*lost)(int code);                              /* whether after this code the process can use the device no more   */
    int (*full)(int code);                              /* whether it means too little memory                                */
    const char *(*error)(int code);
} ap_device;

extern const ap_device cuda_device;                     /* device_cuda.cu's, or fake.cpp's */
#endif
