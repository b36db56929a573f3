/*
** driver.c: a main for the targets where libFuzzer is not: reads a corpus, applies the target's mutator with a seeded generator, keeps what crashed.  It
** sees no coverage, so it only ever goes a few steps away from the corpus.  Arguments are libFuzzer's: -runs= -max_total_time= -seed= -max_len= and
** -artifact_prefix=; what is unknown is passed over; all others are files and folders.  Built by scripts/fuzz.py, with gcc.
*/
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "mutate.h"

typedef struct { uint8_t *p; size_t n; } drv_seed;
static drv_seed *drv_seeds;
static size_t drv_n, drv_cap;
static uint8_t *drv_now;                        /* what is being tried */
static size_t drv_now_n;
static const char *drv_prefix = "";
static mut_rng drv_rng = { 1 };

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void drv_keep(void) {
    char path[4096];
    if (!drv_now) return;
    snprintf(path, sizeof path, "%scrash-%08x", drv_prefix, mut_crc32(0, drv_now, drv_now_n));
    FILE *out = fopen(path, "wb");
    if (!out) return;
    fwrite(drv_now, 1, drv_now_n, out);
    fclose(out);
    fprintf(stderr, "the input is kept in %s\n", path);
}

static void drv_signal(int sig) {
    fprintf(stderr, sig == SIGALRM ? "time-out: an input took more than 5 s\n" : "the process was ended by signal %d\n", sig);
    drv_keep();
    _exit(77);
}

static void drv_read(const char *path) {
    struct stat st;
    if (stat(path, &st)) { fprintf(stderr, "cannot read %s\n", path); exit(2); }
    if (S_ISDIR(st.st_mode)) {
        DIR *d = opendir(path);
        for (struct dirent *e; d && (e = readdir(d)); ) {
            char inside[4096];
            if (e->d_name[0] == '.') continue;
            snprintf(inside, sizeof inside, "%s/%s", path, e->d_name);
            drv_read(inside);
        }
        if (d) closedir(d);
        return;
    }
    FILE *in = fopen(path, "rb");
    if (!in) { fprintf(stderr, "cannot read %s\n", path); exit(2); }
    if (drv_n == drv_cap) drv_seeds = realloc(drv_seeds, (drv_cap = drv_cap * 2 + 16) * sizeof *drv_seeds);
    drv_seed *s = &drv_seeds[drv_n++];
    s->p = malloc((size_t)st.st_size + 1);
    s->n = fread(s->p, 1, (size_t)st.st_size, in);
    fclose(in);
}

/* Bits, bytes, numbers, pieces: what libFuzzer does, roughly. */
size_t LLVMFuzzerMutate(uint8_t *p, size_t n, size_t room) {
    mut_rng *r = &drv_rng;
    size_t at = mut_below(r, n), many = 1 + mut_below(r, 8);
    uint64_t v = mut_number(r, n - at >= 8 ? mut_read(p + at, 8) : 0, n);
    int wide = 1 << mut_below(r, 4);
    switch (n ? mut_below(r, 5) : 3) {
    case 0: p[at] ^= (uint8_t)(1u << mut_below(r, 8)); return n;
    case 1: if (n - at >= (size_t)wide) memcpy(p + at, &v, (size_t)wide); return n;
    case 2: if (many > n - at) many = n - at; memmove(p + at, p + at + many, n - at - many); return n - many;
    case 3:
        if (many > room - n) many = room - n;
        memmove(p + at + many, p + at, n - at);
        for (size_t i = 0; i < many; i++) p[at + i] = (uint8_t)mut_next(r);
        return n + many;
    default: p[at] = (uint8_t)mut_next(r); return n;
    }
}

/* An exact copy each time, so that a read behind its end is seen. */
static void drv_try(const uint8_t *p, size_t n) {
    drv_now = malloc(n ? n : 1);
    drv_now_n = n;
    if (n) memcpy(drv_now, p, n);
    LLVMFuzzerTestOneInput(drv_now, n);
    free(drv_now);
    drv_now = NULL;
}

int main(int argc, char **argv) {
    long runs = -1, seconds = 0, room = 4096, done = 0;
    for (int i = 1; i < argc; i++) {
        if (sscanf(argv[i], "-runs=%ld", &runs) == 1 || sscanf(argv[i], "-max_total_time=%ld", &seconds) == 1 || sscanf(argv[i], "-max_len=%ld", &room) == 1) continue;
        if (sscanf(argv[i], "-seed=%lu", (unsigned long *)&drv_rng.s) == 1) continue;
        if (!strncmp(argv[i], "-artifact_prefix=", 17)) { drv_prefix = argv[i] + 17; continue; }
        if (argv[i][0] != '-') drv_read(argv[i]);
    }
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(drv_keep);
    signal(SIGABRT, drv_signal);
    signal(SIGALRM, drv_signal);
    for (size_t i = 0; i < drv_n; i++, done++) drv_try(drv_seeds[i].p, drv_seeds[i].n);
    if (!drv_n) { drv_seeds = calloc(1, sizeof *drv_seeds); drv_seeds->p = malloc(1); drv_n = 1; }
    uint8_t *p = malloc((size_t)room);
    for (time_t end = time(NULL) + seconds; runs < 0 ? time(NULL) < end : done < runs; done++) {
        const drv_seed *s = &drv_seeds[mut_below(&drv_rng, drv_n)];
        size_t n = s->n < (size_t)room ? s->n : (size_t)room;
        if (n) memcpy(p, s->p, n);
        for (size_t k = 1 + mut_below(&drv_rng, 4); k; k--) n = LLVMFuzzerCustomMutator(p, n, (size_t)room, (unsigned)mut_next(&drv_rng));
        if (!(done & 15)) alarm(5);
        drv_try(p, n);
    }
    free(p);
    printf("Done %ld runs in %ld second(s)\n", done, seconds);
    return 0;
}
