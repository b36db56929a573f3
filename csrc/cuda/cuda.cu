/*
** cuda.cu: the GPU as a backend: its memory, its cache, its launches and graphs.  The operations are in the files beside it.  Weights are uploaded once a model,
** still quantised, and shared by its runs; kept values lie in one arena on the device and come back in one copy.  Nothing waits for a kernel before that copy.
** Errors of kernels therefore surface late: a breadcrumb says at or before which step, and AP_MODE_CHECKED says exactly.
*/
#include "cuda.cuh"
#include <fenv.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { CUDA_GUARD = 256, CUDA_GUARD_BYTE = 0xA5, CUDA_ALIGN = 256, CUDA_POISON = 0xFF };    /* four bytes of CUDA_POISON are a NaN */

struct cuda_store {
    cuda_store *next;
    const ap_model *m;
    ap_weight *w;                                       /* as given: two runs with the same weights share */
    cuda_weight *at;
    int slots, refs;
    cuda_buffer bytes;
};

/* Of the process: a lost context stays lost for all, and an upload is for all runs of a model. */
static struct { pthread_mutex_t lock; cuda_store *stores; char lost[300]; } cuda_process = { PTHREAD_MUTEX_INITIALIZER, NULL, "" };

const char *cuda_stage_name(int stage) {
    static const char *const name[] = {
#define S(name, ...) #name,
#include "../plan/stages.def"
    };
    return stage >= 0 && stage < AP_S_N ? name[stage] : "the first step";
}

/* ---- errors ---- */

static double cuda_mb(size_t n) { return (double)n / 1e6; }

static int cuda_short(const ap_dev *d, size_t need, ap_err *e) {
    size_t free_bytes = 0, total = 0;
    (void)d->api->room(&free_bytes, &total);
    if (!need) return ap_fail(e, AP_DEVICE_MEMORY, "%s has no memory left (%zu of %zu bytes are free): give fewer tokens at once, or use cpu:", d->tier, free_bytes, total);
    return ap_fail(e, AP_DEVICE_MEMORY, "this needs %.1f MB (%zu bytes) on %s, where %.1f MB (%zu bytes) of %.1f MB are free: keep fewer stages, give fewer tokens at once, or use cpu:",
                   cuda_mb(need), need, d->tier, cuda_mb(free_bytes), free_bytes, cuda_mb(total));
}

static void cuda_where(const ap_dev *d, char *out, size_t n) {
    const char *how = d->o.mode == AP_MODE_CHECKED ? "in" : "at or before";
    if (d->stage < 0) snprintf(out, n, "before the first step");
    else if (d->layer < 0) snprintf(out, n, "%s %s", how, cuda_stage_name(d->stage));
    else snprintf(out, n, "%s %s of layer %d", how, cuda_stage_name(d->stage), d->layer);
}

int cuda_failed(ap_dev *d, int code, const char *what, ap_err *e) {
    char where[100], call[32];
    snprintf(call, sizeof call, "%.*s", (int)strcspn(what, "("), what);
    if (d->api->full(code)) return cuda_short(d, 0, e);
    cuda_where(d, where, sizeof where);
    e->stage = d->stage; e->layer = d->layer;
    if (!d->api->lost(code)) return ap_fail_at(e, AP_DEVICE, -1, call, "%s: %s, %s (%s)", d->tier, d->api->error(code), where, call);
    pthread_mutex_lock(&cuda_process.lock);
    if (!cuda_process.lost[0]) snprintf(cuda_process.lost, sizeof cuda_process.lost, "%.80s, %s", d->api->error(code), where);
    pthread_mutex_unlock(&cuda_process.lock);
    return ap_fail_at(e, AP_DEVICE, -1, call, "%s: %s, %s (%s); the device is lost to this process: end it and start anew", d->tier, d->api->error(code), where, call);
}

static int cuda_usable(ap_dev *d, ap_err *e) {
    if (!cuda_process.lost[0]) return AP_OK;
    return ap_fail_at(e, AP_DEVICE, -1, "context", "%s was lost to this process earlier (%s): end it and start anew", d->tier, cuda_process.lost);
}

/* ---- memory ---- */

static int cuda_buffer_new(ap_dev *d, cuda_buffer *b, size_t n, const char *what, ap_err *e) {
    void *base = NULL;
    int code = d->api->get(&base, n + 2 * CUDA_GUARD);
    if (code && d->api->full(code)) return cuda_short(d, n + 2 * CUDA_GUARD, e);
    if (code) return cuda_failed(d, code, "get", e);
    b->base = (char *)base; b->p = (float *)(void *)(b->base + CUDA_GUARD); b->n = n; b->what = what;
    CUDA_TRY(d, fill(b->base, CUDA_GUARD_BYTE, CUDA_GUARD, d->stream), e);
    CUDA_TRY(d, fill(b->base + CUDA_GUARD + n, CUDA_GUARD_BYTE, CUDA_GUARD, d->stream), e);
    return AP_OK;
}

static void cuda_buffer_free(ap_dev *d, cuda_buffer *b) {
    if (b->base) (void)d->api->release(b->base);
    memset(b, 0, sizeof *b);
}

/* A kernel that wrote beside a buffer is found here. */
static int cuda_guard(ap_dev *d, const cuda_buffer *b, ap_err *e) {
    unsigned char seen[2][CUDA_GUARD];
    char where[100];
    if (!b->base) return AP_OK;
    CUDA_TRY(d, fetch(seen[0], b->base, CUDA_GUARD, d->stream), e);
    CUDA_TRY(d, fetch(seen[1], b->base + CUDA_GUARD + b->n, CUDA_GUARD, d->stream), e);
    CUDA_TRY(d, wait(d->stream), e);
    cuda_where(d, where, sizeof where);
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < CUDA_GUARD; i++)
            if (seen[side][i] != CUDA_GUARD_BYTE)
                return ap_fail_at(e, AP_DEVICE, -1, b->what, "%s: a kernel wrote %s the buffer of %s, %s", d->tier, side ? "behind" : "before", b->what, where);
    return AP_OK;
}

/* ---- weights ---- */

static int cuda_format(const ap_format *f) {
    static const char *const name[] = {
#define F(name, ...) #name,
#include "../quant/formats.def"
    };
    for (int i = 0; i < AP_F_N; i++) if (!strcmp(name[i], f->name)) return i;
    return -1;
}

/* Norm weights and biases are few, and decoded on the way; matrices stay as they are. */
static int cuda_is_vector(int slot) {
    static const int form[] = {
#define W(name, group, gguf, hf, shape, kind, ...) AP_FORM_##kind,
#include "../plan/weights.def"
    };
    return form[slot % AP_W_N] != AP_FORM_MATRIX;
}

/* Bytes of a weight on the device; that the file has those of a matrix was checked when it was opened. */
static size_t cuda_weight_bytes(const ap_weight *w, int slot) {
    if (cuda_is_vector(slot)) return (size_t)w->cols * sizeof(float);
    uint64_t values = (uint64_t)w->rows * (uint64_t)w->cols, block = (uint64_t)w->fmt->block;
    if (w->fmt->packing == AP_PACK_ROWS) return (size_t)((uint64_t)w->rows * ap_format_row_bytes(w->fmt, w->cols));
    return (size_t)((values + block - 1) / block * (uint64_t)w->fmt->bytes + (w->fmt->packing == AP_PACK_WHOLE ? sizeof(float) : 0));
}

static size_t cuda_aligned(size_t n) { return (n + CUDA_ALIGN - 1) & ~(size_t)(CUDA_ALIGN - 1); }

/* A weight that stands in another's place (a tied head) is uploaded once: both lie outside the layers. */
static int cuda_twin(const ap_weight *w, int i) {
    for (int j = 0; j < i && i < AP_W_N; j++) if (w[j].fmt && w[j].data == w[i].data && w[j].fmt == w[i].fmt) return j;
    return -1;
}

static void cuda_store_free(ap_dev *d, cuda_store *s) {
    if (!s) return;
    cuda_buffer_free(d, &s->bytes);
    ap_free(s->w); ap_free(s->at); ap_free(s);
}

static int cuda_upload_weight(ap_dev *d, void *to, const ap_weight *w, int slot, ap_err *e) {
    size_t n = cuda_weight_bytes(w, slot);
    float *values = cuda_is_vector(slot) ? (float *)ap_alloc((uint64_t)w->cols, sizeof *values) : NULL;
    if (cuda_is_vector(slot) && !values) return ap_fail(e, AP_MEMORY, "no memory for a vector of %lld values", (long long)w->cols);
    if (values) w->fmt->decode(w->data, values, (size_t)w->cols);       /* of formats without blocks only: plan/model.c */
    int code = d->api->upload(to, values ? (const void *)values : w->data, n, d->stream);
    ap_free(values);
    return code ? cuda_failed(d, code, "upload", e) : AP_OK;
}

static int cuda_store_upload(ap_dev *d, cuda_store *s, ap_err *e) {
    size_t need = 0, at = 0, free_bytes, total;
    for (int i = 0; i < s->slots; i++) if (s->w[i].fmt && cuda_twin(s->w, i) < 0) need += cuda_aligned(cuda_weight_bytes(&s->w[i], i));
    CUDA_TRY(d, room(&free_bytes, &total), e);
    if (need > free_bytes) return cuda_short(d, need, e);
    AP_TRY(cuda_buffer_new(d, &s->bytes, need, "weights", e));
    for (int i = 0; i < s->slots; i++) {
        const ap_weight *w = &s->w[i];
        if (!w->fmt) continue;
        int twin = cuda_twin(s->w, i), format = cuda_format(w->fmt);
        if (format < 0) return ap_fail_at(e, AP_DEVICE, -1, w->fmt->name, "the CUDA library does not know the number format %s", w->fmt->name);
        uint8_t *to = (uint8_t *)s->bytes.p + at;
        s->at[i] = { twin < 0 ? to : s->at[twin].data, w->cols, w->rows, w->pairs, format };
        if (twin >= 0) continue;
        AP_TRY(cuda_upload_weight(d, to, w, i, e));
        at += cuda_aligned(cuda_weight_bytes(w, i));
    }
    CUDA_TRY(d, wait(d->stream), e);
    return AP_OK;
}

static int cuda_store_get(ap_dev *d, const ap_weight *w, ap_err *e) {
    int slots = (d->m->h.layers + 1) * AP_W_N, rc = AP_OK;
    size_t size = (size_t)slots * sizeof *w;
    pthread_mutex_lock(&cuda_process.lock);
    for (cuda_store *s = cuda_process.stores; s && !d->store; s = s->next)
        if (s->m == d->m && s->slots == slots && !memcmp(s->w, w, size)) { s->refs++; d->store = s; }
    pthread_mutex_unlock(&cuda_process.lock);
    if (d->store) return AP_OK;
    cuda_store *s = (cuda_store *)ap_alloc(1, sizeof *s);
    if (s) { s->m = d->m; s->slots = slots; s->refs = 1; s->w = (ap_weight *)ap_alloc((uint64_t)slots, sizeof *w); s->at = (cuda_weight *)ap_alloc((uint64_t)slots, sizeof *s->at); }
    if (!s || !s->w || !s->at) rc = ap_fail(e, AP_MEMORY, "no memory for a list of %d weights", slots);
    else { memcpy(s->w, w, size); rc = cuda_store_upload(d, s, e); }
    if (rc) { cuda_store_free(d, s); return rc; }
    pthread_mutex_lock(&cuda_process.lock);
    s->next = cuda_process.stores; cuda_process.stores = s;
    pthread_mutex_unlock(&cuda_process.lock);
    d->store = s;
    return AP_OK;
}

static void cuda_store_put(ap_dev *d) {
    cuda_store *s = d->store;
    if (!s) return;
    pthread_mutex_lock(&cuda_process.lock);
    int last = --s->refs == 0;
    for (cuda_store **at = &cuda_process.stores; last && *at; at = &(*at)->next) if (*at == s) { *at = s->next; break; }
    pthread_mutex_unlock(&cuda_process.lock);
    if (last) cuda_store_free(d, s);
}

cuda_weight cuda_weight_of(const ap_dev *d, int slot) { return d->store->at[slot]; }
const float *cuda_vector(const ap_dev *d, int slot) { return slot < 0 ? NULL : (const float *)(const void *)d->store->at[slot].data; }

/* ---- life ---- */

static void cuda_close(ap_dev *d) {
    if (!d) return;
    (void)d->api->select(0, NULL);
    if (d->stream) (void)d->api->wait(d->stream);
    if (d->graph) (void)d->api->graph_free(d->graph);
    cuda_buffer_free(d, &d->keep); cuda_buffer_free(d, &d->scratch); cuda_buffer_free(d, &d->tokens);
    cuda_buffer_free(d, &d->cache[0]); cuda_buffer_free(d, &d->cache[1]);
    cuda_store_put(d);
    if (d->stream) (void)d->api->stream_free(d->stream);
    ap_free(d->node); ap_free(d->drawn); ap_free(d);
}

static int cuda_begin(ap_dev *d, const ap_weight *w, ap_err *e) {
    ap_properties p;
    AP_TRY(cuda_usable(d, e));
    int n = 0, code = d->api->count(&n);
    if (code || n < 1) return ap_fail_at(e, AP_DEVICE, -1, "cuda", "cuda: there is no device to use: %s; use cpu:", code ? d->api->error(code) : "the driver lists none");
    CUDA_TRY(d, select(0, &p), e);
    snprintf(d->tier, sizeof d->tier, "%s sm_%d%d", p.name, p.major, p.minor);
    CUDA_TRY(d, stream_new(&d->stream), e);
    return cuda_store_get(d, w, e);
}

static int cuda_open(ap_dev **out, const ap_model *m, const ap_weight *w, const ap_backend_options *o, ap_err *e) {
    ap_dev *d = (ap_dev *)ap_alloc(1, sizeof *d);
    if (!d) return ap_fail(e, AP_MEMORY, "no memory for the CUDA backend");
    d->m = m; d->o = *o; d->api = &cuda_device; d->stage = d->layer = -1;
    snprintf(d->tier, sizeof d->tier, "cuda");
    int rc = cuda_begin(d, w, e);
    if (rc) cuda_close(d);
    else *out = d;
    return rc;
}

/* ---- a request: places, values put in, values fetched ---- */

static size_t cuda_kd(const ap_dev *d) { return (size_t)d->m->h.kv_heads * (size_t)d->m->h.head; }
static size_t cuda_cache_bytes(const ap_dev *d, int capacity) { return (size_t)d->m->h.layers * (size_t)capacity * cuda_kd(d) * sizeof(float); }

static int cuda_grow_cache(ap_dev *d, int capacity, ap_err *e) {
    cuda_buffer grown[2] = {};
    size_t row = cuda_kd(d) * sizeof(float), was = (size_t)d->capacity * row, now = (size_t)capacity * row;
    int rc = AP_OK;
    for (int c = 0; c < 2 && !rc; c++) rc = cuda_buffer_new(d, &grown[c], cuda_cache_bytes(d, capacity), c ? "cached values" : "cached keys", e);
    for (int c = 0; c < 2 && !rc && was; c++)
        for (int layer = 0; layer < d->m->h.layers && !rc; layer++) {
            int code = d->api->move((char *)grown[c].p + (size_t)layer * now, (char *)d->cache[c].p + (size_t)layer * was, was, d->stream);
            if (code) rc = cuda_failed(d, code, "move", e);
        }
    int code = rc ? 0 : d->api->wait(d->stream);
    if (code) rc = cuda_failed(d, code, "wait", e);
    for (int c = 0; c < 2; c++) {                       /* both or neither: the two share one capacity */
        cuda_buffer_free(d, rc ? &grown[c] : &d->cache[c]);
        if (!rc) d->cache[c] = grown[c];
    }
    if (!rc) d->capacity = capacity;
    return rc;
}

float *cuda_cache(const ap_dev *d, const ap_step *s) {
    static const int wire[] = {
#define S(name, span, op, out, ...) AP_WIRE_##out,
#include "../plan/stages.def"
    };
    return d->cache[wire[s->stage] == AP_WIRE_VCACHE].p + (size_t)s->layer * (size_t)d->capacity * cuda_kd(d);
}

/* Everything that the request will need is counted before the first byte is asked for. */
static int cuda_make_room(ap_dev *d, const ap_plan *p, ap_err *e) {
    int capacity = d->capacity ? d->capacity : 64;
    while (capacity < p->pos + p->T) capacity *= 2;
    const struct { cuda_buffer *b; size_t n; const char *what; } want[] = {
        { &d->keep, p->keep_n * sizeof(float), "kept values" }, { &d->scratch, p->scratch_n * sizeof(float), "working values" }, { &d->tokens, (size_t)p->T * sizeof(int32_t), "tokens" },
    };
    size_t need = capacity > d->capacity ? 2 * (cuda_cache_bytes(d, capacity) + 2 * CUDA_GUARD) : 0, back = 0, free_bytes, total;
    for (const auto &w : want) if (w.n > w.b->n) { need += w.n + 2 * CUDA_GUARD; back += w.b->n; }
    if (!need) return AP_OK;
    CUDA_TRY(d, room(&free_bytes, &total), e);
    if (need > free_bytes + back) return cuda_short(d, need, e);
    for (const auto &w : want)
        if (w.n > w.b->n) cuda_buffer_free(d, w.b);
    if (capacity > d->capacity) AP_TRY(cuda_grow_cache(d, capacity, e));
    for (const auto &w : want) if (w.n > w.b->n) AP_TRY(cuda_buffer_new(d, w.b, w.n, w.what, e));
    return AP_OK;
}

static int cuda_arena(ap_dev *d, const ap_plan *p, const int32_t *tokens, float *keep, ap_err *e) {
    (void)keep;
    AP_TRY(cuda_usable(d, e));
    CUDA_TRY(d, select(0, NULL), e);
    CUDA_TRY(d, wait(d->stream), e);                    /* of a request that failed, kernels may still run */
    d->stage = d->layer = -1;
    d->nnodes = d->launched = d->graphed = 0;
    d->drawing = d->o.mode == AP_MODE_AUTO && p->T == 1;
    AP_TRY(cuda_make_room(d, p, e));
    d->keep_n = p->keep_n * sizeof(float);
    if (d->keep_n) CUDA_TRY(d, fill(d->keep.p, CUDA_POISON, d->keep_n, d->stream), e);      /* what no kernel writes must not look like a value */
    CUDA_TRY(d, upload(d->tokens.p, tokens, (size_t)p->T * sizeof *tokens, d->stream), e);
    return AP_OK;
}

/* Kernels that were collected are run one by one after all: between them comes something that no graph has. */
static int cuda_undraw(ap_dev *d, ap_err *e) {
    int n = d->drawing ? d->nnodes : 0;
    d->drawing = 0; d->nnodes = 0;
    for (int i = 0; i < n; i++) { CUDA_TRY(d, launch(&d->node[i], d->stream), e); d->launched++; }
    return AP_OK;
}

static int cuda_put(ap_dev *d, const ap_plan *p, int step, const float *host, ap_err *e) {
    const ap_step *s = &p->s[step];
    size_t bytes = (size_t)s->rows * (size_t)s->cols * sizeof(float);
    AP_TRY(cuda_undraw(d, e));
    d->stage = s->stage; d->layer = s->layer;
    if (s->op == AP_OP_CACHE) CUDA_TRY(d, upload(cuda_cache(d, s), host, bytes, d->stream), e);
    if (s->op != AP_OP_CACHE || s->kept) CUDA_TRY(d, upload(cuda_place(d, s), host, bytes, d->stream), e);
    return AP_OK;
}

static int64_t cuda_now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

static int cuda_asked_to_stop(ap_dev *d) {
    if (!d->o.poll || cuda_now() - d->polled < 20000000) return 0;      /* signals are looked at every 20 ms */
    d->polled = cuda_now();
    return d->o.poll(d->o.poll_ctx);
}

/* Waits for the stream.  A kernel cannot be called back: if a signal asks to stop, the answer is known at once and given when the device is idle. */
static int cuda_await(ap_dev *d, ap_err *e) {
    int64_t since = cuda_now();
    const struct timespec nap = { 0, 50000 };
    for (int idle = 0, stop = 0;;) {
        CUDA_TRY(d, done(d->stream, &idle), e);
        if (idle && stop) return ap_fail(e, AP_INTERRUPTED, "interrupted");
        if (idle) break;
        if (cuda_now() - since > 2000000) nanosleep(&nap, NULL);        /* short waits spin: a decoded token takes less */
        stop = stop || cuda_asked_to_stop(d);
    }
    CUDA_TRY(d, wait(d->stream), e);
    return AP_OK;
}

/* ---- launches and graphs ---- */

static int cuda_collect(ap_dev *d, const ap_launch *k, ap_err *e) {
    if (d->nnodes == d->room) {
        int room = d->room ? 2 * d->room : 256;
        void *grown = ap_grow(d->node, (uint64_t)d->room, (uint64_t)room, sizeof *d->node);
        if (!grown) return ap_fail(e, AP_MEMORY, "no memory for a graph of %d kernels", room);
        d->node = (ap_launch *)grown; d->room = room;
    }
    d->node[d->nnodes++] = *k;
    return AP_OK;
}

static int cuda_check(ap_dev *d, ap_err *e) {
    const cuda_buffer *all[] = { &d->store->bytes, &d->keep, &d->scratch, &d->tokens, &d->cache[0], &d->cache[1] };
    CUDA_TRY(d, wait(d->stream), e);
    for (const cuda_buffer *b : all) AP_TRY(cuda_guard(d, b, e));
    return AP_OK;
}

int cuda_submit(ap_dev *d, const ap_launch *k, ap_err *e) {
    if (!d->drawing && cuda_asked_to_stop(d)) return ap_fail(e, AP_INTERRUPTED, "interrupted");
    if (d->drawing && AP_FAULT_AT(d, unrecorded, k->stage)) return AP_OK;
    d->stage = k->stage; d->layer = k->layer;
    if (d->drawing) return cuda_collect(d, k, e);
    CUDA_TRY(d, launch(k, d->stream), e);
    d->launched++;
    return d->o.mode == AP_MODE_CHECKED ? cuda_check(d, e) : AP_OK;
}

/* The collected kernels become a graph; the last one serves again if it has the same kernels, with the arguments that changed. */
static int cuda_draw(ap_dev *d, ap_err *e) {
    int same = d->graph && d->ndrawn == d->nnodes;
    for (int i = 0; same && i < d->nnodes; i++) same = d->node[i].entry == d->drawn[i].entry && d->node[i].shared == d->drawn[i].shared;
    for (int i = 0; same && i < d->nnodes; i++) {
        if (!memcmp(&d->node[i], &d->drawn[i], sizeof d->node[i])) continue;
        if (AP_FAULT_AT(d, stale, d->node[i].stage)) continue;
        CUDA_TRY(d, graph_set(d->graph, i, &d->node[i]), e);
    }
    if (!same) {
        if (d->graph) CUDA_TRY(d, graph_free(d->graph), e);
        d->graph = NULL;
        CUDA_TRY(d, graph_new(&d->graph, d->node, d->nnodes), e);
    }
    ap_launch *was = d->drawn;                          /* what was collected is what the graph is made of now; the other list is filled next */
    int room = d->drawn_room;
    d->drawn = d->node; d->ndrawn = d->nnodes; d->drawn_room = d->room;
    d->node = was; d->room = room; d->nnodes = 0;
    CUDA_TRY(d, graph_run(d->graph, d->stream), e);
    d->graphed = d->ndrawn;
    return AP_OK;
}

static int cuda_fetch(ap_dev *d, const ap_plan *p, float *keep, ap_err *e) {
    (void)p;
    if (d->drawing && d->nnodes) AP_TRY(cuda_draw(d, e));
    if (d->keep_n) CUDA_TRY(d, fetch(keep, d->keep.p, d->keep_n, d->stream), e);
    return cuda_await(d, e);
}

static const char *cuda_tier(const ap_dev *d) { return d->tier; }
static const char *cuda_path(const ap_dev *d) {
    char *text = ((ap_dev *)d)->path;                   /* d is the caller's and not const: only its type is */
    if (d->graphed) snprintf(text, sizeof d->path, "a graph of %d kernels", d->graphed);
    else snprintf(text, sizeof d->path, "%d kernels, one by one", d->launched);
    return text;
}

static const ap_backend cuda_backend = {
    "cuda", cuda_open, cuda_arena, cuda_put,
    {
#define O(name, text) cuda_##name,
#include "../plan/ops.def"
    },
    cuda_fetch, cuda_close, cuda_tier, cuda_path,
};

static int cuda_devices(char *names, size_t n, int *count, ap_err *e) {
    int code = cuda_device.count(count);
    if (n) names[0] = 0;
    if (code) return ap_fail_at(e, AP_DEVICE, -1, "cuda", "%s", cuda_device.error(code));
    for (int i = 0; i < *count; i++) {
        ap_properties p;
        code = cuda_device.select(i, &p);
        if (code) return ap_fail_at(e, AP_DEVICE, -1, "cuda", "device %d: %s", i, cuda_device.error(code));
        size_t used = strlen(names);
        snprintf(names + used, n - used, "%s%s, sm_%d%d, %d multiprocessors, %.0f GB", used ? "\n" : "", p.name, p.major, p.minor, p.processors, (double)p.memory / 1e9);
    }
    return *count ? cuda_device.select(0, NULL) : AP_OK;
}

#ifndef AP_BUILT
#define AP_BUILT "unknown compiler"
#endif
extern "C" __attribute__((visibility("default"))) const ap_plugin ap_backend_cuda;
extern "C" const ap_plugin ap_backend_cuda = { ap_plugin_version(), &cuda_backend, cuda_devices, AP_BUILT };
