/*
** plugin.c: finds, loads and checks the CUDA library.  A library stays loaded for the life of the process: its device does too.
*/
#include "plugin.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void plugin_path(char path[4096]) {
    const char *said = getenv("APRENDER_CUDA_LIBRARY");
    Dl_info here;
    path[0] = 0;
    if (said && *said) { snprintf(path, 4096, "%s", said); return; }
    if (!dladdr((const void *)(uintptr_t)ap_cuda_open, &here) || !here.dli_fname) return;
    const char *slash = strrchr(here.dli_fname, '/');
    snprintf(path, 4096, "%.*slibaprender_cuda.so", slash ? (int)(slash + 1 - here.dli_fname) : 0, here.dli_fname);
}

int ap_cuda_open(const ap_plugin **out, char place[4096], ap_err *e) {
    char own[4096], shown[132], *path = place ? place : own;
    plugin_path(path);
    ap_show(shown, path, strlen(path));
    if (access(path, R_OK))
        return ap_fail_at(e, AP_DEVICE, -1, "cuda", "cuda: aprender was built without it: there is no %s; build it with `make cuda` where nvcc is, or use cpu:", shown);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return ap_fail_at(e, AP_DEVICE, -1, "cuda", "cuda: the library cannot be loaded: %.300s", dlerror());
    const ap_plugin *plugin = dlsym(library, AP_PLUGIN_SYMBOL);
    if (!plugin) return ap_fail_at(e, AP_DEVICE, -1, "cuda", "cuda: %s is no CUDA library of aprender: it has no %s", shown, AP_PLUGIN_SYMBOL);
    if (plugin->version != ap_plugin_version())
        return ap_fail_at(e, AP_DEVICE, -1, "cuda", "cuda: %s was built from other tables (%016llx, this extension has %016llx): build both again with `make build cuda`", shown,
                          (unsigned long long)plugin->version, (unsigned long long)ap_plugin_version());
    *out = plugin;
    return AP_OK;
}
