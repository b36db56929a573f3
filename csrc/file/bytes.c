/*
** bytes.c: the only place that opens a file.  Regular files only, never blocking, mapped only where asked for; each read is followed by a look whether the file is still what
** it was.  It refuses symbolic links where the name came out of a file, except those that the cache of the Hugging Face hub is made of.
*/
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "../base/map.h"
#include "../base/mem.h"
#include "../base/num.h"
#include "bytes.h"

struct ap_source { char *path; int fd; struct stat st; pthread_mutex_t lock; ap_map *map; };

int ap_no_memory(uint64_t bytes, ap_err *e) { return ap_fail(e, AP_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes); }

/* %m is errno in words; unlike strerror it needs no shared buffer. */
static int bytes_io(const char *doing, const char *path, ap_err *e) {
    char shown[132];
    int sys = errno;
    ap_show(shown, path, strlen(path));
    errno = sys;
    e->sys = sys;
    return ap_fail(e, AP_IO, "cannot %s '%s': %m", doing, shown);
}

/* The first n bytes of folder, a slash if it lacks one, and a name: the caller's to free, NULL without memory. */
char *ap_path_join(const char *folder, size_t n, const char *name) {
    size_t m = strlen(name), slash = n && folder[n - 1] != '/';
    char *path = ap_alloc(n + slash + m + 1, 1);
    if (!path) return NULL;
    memcpy(path, folder, n);
    if (slash) path[n] = '/';
    memcpy(path + n + slash, name, m);
    return path;
}

int ap_is_folder(const char *path) {
    struct stat st;
    return !stat(path, &st) && S_ISDIR(st.st_mode);
}

/* --- opening --------------------------------------------------------------------------------------------------------------------------- */

/* O_NONBLOCK so that a FIFO opens at once and can be refused; it means nothing for regular files. */
static int bytes_open(const char *path, int more) {
    int fd;
    do fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | more); while (fd < 0 && errno == EINTR);
    return fd;
}

static int bytes_look(ap_source *s, ap_err *e) {
    char shown[132];
    if (fstat(s->fd, &s->st)) return bytes_io("look at", s->path, e);
    if (S_ISREG(s->st.st_mode)) return AP_OK;
    return ap_fail(e, AP_NOT_REGULAR, "'%s' is not a regular file", ap_show(shown, s->path, strlen(s->path)));
}

/* Takes the descriptor over, whatever happens. */
static int bytes_adopt(ap_source **out, const char *path, int fd, ap_err *e) {
    ap_source *s = ap_alloc(1, sizeof *s);
    if (!s) { close(fd); return ap_no_memory(sizeof *s, e); }
    s->fd = fd;
    pthread_mutex_init(&s->lock, NULL);
    s->path = ap_path_join("", 0, path);
    int rc = s->path ? bytes_look(s, e) : ap_no_memory(strlen(path), e);
    if (rc) ap_source_close(s);
    else *out = s;
    return rc;
}

int ap_source_open(ap_source **out, const char *path, ap_err *e) {
    int fd = bytes_open(path, 0);
    return fd < 0 ? bytes_io("open", path, e) : bytes_adopt(out, path, fd, e);
}

/* The cache of the Hugging Face hub keeps each file as ../../blobs/<hash>: the one symbolic link that is followed, and only to a plain name there. */
static int bytes_hub_blob(const char *link) {
    static const char blobs[] = "../../blobs/";
    const char *name = link + sizeof blobs - 1;
    return !strncmp(link, blobs, sizeof blobs - 1) && *name && !strchr(name, '/') && name[0] != '.';
}

int ap_source_open_link(ap_source **out, const char *path, ap_err *e) {
    char link[512], shown[132];
    int fd = bytes_open(path, O_NOFOLLOW);
    if (fd >= 0) return bytes_adopt(out, path, fd, e);
    int sys = errno;
    ap_show(shown, path, strlen(path));
    errno = sys;
    if (sys == ENOENT) return ap_fail_at(e, AP_MISSING, -1, shown, "the file '%s' of this model is missing", shown);
    if (sys != ELOOP) return bytes_io("open", path, e);
    ssize_t n = readlink(path, link, sizeof link - 1);
    link[n < 0 ? 0 : n] = 0;
    if (!bytes_hub_blob(link)) return ap_fail_at(e, AP_PATH, -1, shown, "'%s' is a symbolic link, which is not followed: it may lead out of the folder", shown);
    const char *slash = strrchr(path, '/');
    char *blob = ap_path_join(path, slash ? (size_t)(slash - path) + 1 : 0, link);
    if (!blob) return ap_no_memory(sizeof link, e);
    fd = bytes_open(blob, O_NOFOLLOW);
    int rc = fd < 0 ? bytes_io("open", blob, e) : bytes_adopt(out, path, fd, e);
    ap_free(blob);
    return rc;
}

void ap_source_close(ap_source *s) {
    if (!s) return;
    close(s->fd);
    ap_map_close(s->map);
    pthread_mutex_destroy(&s->lock);
    ap_free(s->path);
    ap_free(s);
}

/* What is read once for all is read under the lock of its source. */
void ap_source_lock(ap_source *s) { pthread_mutex_lock(&s->lock); }
void ap_source_unlock(ap_source *s) { pthread_mutex_unlock(&s->lock); }

/* --- reading --------------------------------------------------------------------------------------------------------------------------- */

uint64_t ap_source_size(const ap_source *s) { return (uint64_t)s->st.st_size; }

static int bytes_same(const struct stat *a, const struct stat *b) {
    return a->st_size == b->st_size && a->st_ino == b->st_ino && a->st_dev == b->st_dev
        && a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static int bytes_fill(const ap_source *s, uint64_t at, uint8_t *p, uint64_t n, ap_err *e) {
    enum { PIECE = 1 << 30 };                   /* Linux reads at most 0x7ffff000 bytes in one call */
    for (uint64_t got = 0; got < n; ) {
        ssize_t k = pread(s->fd, p + got, (size_t)(n - got < PIECE ? n - got : PIECE), (off_t)(at + got));
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) return bytes_io("read", s->path, e);
        if (k == 0)
            return ap_fail_at(e, AP_CHANGED, (int64_t)(at + got), NULL, "the file shrank from %llu to %llu bytes while it was read", (unsigned long long)ap_source_size(s), (unsigned long long)(at + got));
        got += (uint64_t)k;
    }
    return AP_OK;
}

int ap_source_map(ap_source *s, ap_err *e) { return ap_map_open(&s->map, s->fd, ap_source_size(s), e); }
const uint8_t *ap_source_mapped(const ap_source *s) { return s->map ? ap_map_bytes(s->map) : NULL; }

int ap_source_read(const ap_source *s, uint64_t at, void *p, uint64_t n, ap_err *e) {
    AP_TRY(bytes_fill(s, at, p, n, e));
    return ap_source_same(s, e);
}

int ap_source_same(const ap_source *s, ap_err *e) {
    struct stat now;
    char shown[132];
    if (s->map && ap_map_lost(s->map)) return ap_fail(e, AP_CHANGED, "'%s' shrank or could not be read while it was mapped", ap_show(shown, s->path, strlen(s->path)));
    if (fstat(s->fd, &now)) return bytes_io("look at", s->path, e);
    if (bytes_same(&s->st, &now)) return AP_OK;
    return ap_fail(e, AP_CHANGED, "'%s' was written to since it was opened", ap_show(shown, s->path, strlen(s->path)));
}

static int bytes_whole(const ap_source *s, uint64_t limit, uint8_t **p, uint64_t *n, ap_err *e) {
    char shown[132];
    uint64_t size = ap_source_size(s), room;
    if (size > limit)
        return ap_fail(e, AP_LIMIT, "'%s' has %llu bytes, at most %llu are read", ap_show(shown, s->path, strlen(s->path)), (unsigned long long)size, (unsigned long long)limit);
    uint8_t *all = ap_add_ok(size, 1, &room) ? ap_alloc(room, 1) : NULL;
    if (!all) return ap_no_memory(size, e);
    int rc = ap_source_read(s, 0, all, size, e);
    if (rc) { ap_free(all); return rc; }
    *p = all;
    *n = size;
    return AP_OK;
}

int ap_read_whole(const char *path, uint64_t limit, uint8_t **p, uint64_t *n, ap_err *e) {
    ap_source *s = NULL;
    AP_TRY(ap_source_open(&s, path, e));
    int rc = bytes_whole(s, limit, p, n, e);
    ap_source_close(s);
    return rc;
}
