/*
** plugin.h: opens the library of a device that is not linked in.  py/run.c calls it when such a device is asked for; there is no other device to fall back to.
*/
#ifndef AP_RUN_PLUGIN_H
#define AP_RUN_PLUGIN_H
#include "../cuda/plugin.h"

/* The CUDA library: APRENDER_CUDA_LIBRARY, or libaprender_cuda.so beside the extension.  AP_DEVICE when it is not there, cannot be loaded, or was built from other
** tables; path, if not NULL, is where it was looked for. */
int ap_cuda_open(const ap_plugin **out, char path[4096], ap_err *e);
#endif
