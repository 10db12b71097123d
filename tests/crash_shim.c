/* Makes a process fail or die at one of its own writes: preloaded by crash.py, armed by its child through ctypes.

   Only writes to regular files, syncs, renames, new files and removals count. What a mode does at the n-th of them:
     KILL    dies before it            TORN  dies in the middle of it, at a multiple of 512 bytes (a disk's sector)
     FAIL    returns -1 with `code` as errno, as do the `length - 1` after it
     POWER   dies, and of what was written and not yet synced, page by page, a random part had not reached the disk
   With CRASH_SYNC_NOTHING in the environment syncs do nothing: what a store must not survive, and the harness must notice.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <unistd.h>

enum { OFF, KILL, TORN, FAIL, POWER };
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int mode, code, length;
static long left;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* what pages held before they were written, since the last sync of their file */
typedef struct Undo { struct Undo *next; dev_t dev; ino_t ino; int fd; off_t at; ssize_t had; size_t n; char old[4096]; } Undo;
static Undo *undo;

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static int regular(int fd, struct stat *s) { return fstat(fd, s) == 0 && S_ISREG(s->st_mode); }

static void remember(int fd, off_t at, size_t n) {
    struct stat s;
    if (mode != POWER || !regular(fd, &s)) return;
    while (n) {
        Undo *u = malloc(sizeof *u);
        size_t piece = 4096 - at % 4096;
        u->n = piece < n ? piece : n;
        u->dev = s.st_dev; u->ino = s.st_ino; u->at = at;
        u->fd = fcntl(fd, F_DUPFD_CLOEXEC, 512);
        u->had = pread(u->fd, u->old, u->n, at); /* fails for a file opened for writing only: then it had nothing worth keeping */
        if (u->had < 0) u->had = 0;
        u->next = undo; undo = u;
        at += u->n; n -= u->n;
    }
}

static void synced(int fd) {
    struct stat s;
    if (mode != POWER || fstat(fd, &s)) return;
    for (Undo **p = &undo; *p;) {
        Undo *u = *p;
        if (u->dev == s.st_dev && u->ino == s.st_ino) { *p = u->next; close(u->fd); free(u); } else p = &u->next;
    }
}

static void cut_power(void) {
    /* newest first: once a page's write is kept, the ones before it reached the disk too */
    static struct { ino_t ino; off_t page; } kept[1 << 16];
    int n = 0, share = 1 + rand() % 9;
    for (Undo *u = undo; u; u = u->next) {
        int keep = rand() % 10 < share;
        for (int i = 0; i < n && !keep; i++) keep = kept[i].ino == u->ino && kept[i].page == u->at / 4096;
        if (keep) {
            if (n < 1 << 16) { kept[n].ino = u->ino; kept[n++].page = u->at / 4096; }
            continue;
        }
        memset(u->old + u->had, 0, u->n - u->had);
        REAL(pwrite)(u->fd, u->old, u->n, u->at);
    }
    die();
}

/* 1: the call fails; else how many bytes of `n` a torn write still writes, or -1: go on */
static long fault(size_t n) {
    long out = -1;
    pthread_mutex_lock(&lock);
    if (mode && --left < 0) {
        if (mode == KILL || (mode == TORN && n < 1024)) die();
        if (mode == POWER) cut_power();
        if (mode == TORN) out = 512 * (1 + rand() % (n / 512 - (n % 512 == 0)));
        if (mode == FAIL) {
            if (--length <= 0) mode = OFF;
            errno = code;
            out = 0;
        }
    }
    pthread_mutex_unlock(&lock);
    return out;
}

void crash_arm(int what, long after, int how_many, int error, unsigned seed) {
    srand(seed);
    left = after; length = how_many; code = error; mode = what;
}
/* whether the n-th was never reached */
int crash_disarm(void) { int was = mode; mode = OFF; return was != OFF; }

ssize_t write(int fd, const void *data, size_t n) {
    struct stat s;
    if (mode && regular(fd, &s)) {
        long f = fault(n);
        if (f == 0) return -1;
        if (f > 0) { REAL(write)(fd, data, f); die(); }
        off_t at = lseek(fd, 0, SEEK_CUR);
        if (at >= 0) remember(fd, at, n);
    }
    return REAL(write)(fd, data, n);
}

static ssize_t pwrite_at(int fd, const void *data, size_t n, off_t at) {
    if (mode) {
        long f = fault(n);
        if (f == 0) return -1;
        if (f > 0) { REAL(pwrite)(fd, data, f, at); die(); }
        remember(fd, at, n);
    }
    return REAL(pwrite)(fd, data, n, at);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite_at(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return pwrite_at(fd, data, n, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    /* LMDB writes runs of pages so: as single writes, each of which can fail */
    struct stat s;
    if (!mode || !regular(fd, &s)) return REAL(writev)(fd, parts, count);
    ssize_t done = 0;
    for (int i = 0; i < count; i++) {
        ssize_t n = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (n < 0) return done ? done : -1;
        done += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return done;
}

#define SYNC(name) int name(int fd) { \
    if (mode && fault(0) == 0) return -1; \
    if (getenv("CRASH_SYNC_NOTHING")) return 0; \
    int rc = REAL(name)(fd); if (!rc) synced(fd); return rc; }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) { return mode && fault(0) == 0 ? -1 : REAL(rename)(from, to); }
int unlink(const char *path) { return mode && fault(0) == 0 ? -1 : REAL(unlink)(path); }
int mkdir(const char *path, mode_t m) { return mode && fault(0) == 0 ? -1 : REAL(mkdir)(path, m); }
int ftruncate(int fd, off_t n) { return mode && fault(0) == 0 ? -1 : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off_t n) { return mode && fault(0) == 0 ? -1 : REAL(ftruncate)(fd, n); }

static int open_with(int (*real)(const char *, int, ...), const char *path, int flags, va_list rest) {
    mode_t m = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    if (mode && (flags & O_CREAT) && fault(0) == 0) return -1;
    return real(path, flags, m);
}
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int fd = open_with(REAL(name), path, flags, rest); va_end(rest); return fd; }
OPEN(open)
OPEN(open64)
