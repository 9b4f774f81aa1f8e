/* A disk that fails on purpose: preloaded into the processes of a job, it counts the calls that change the directory of checkpoints
 * and lets one of them fail in each checkpoint, another in each.
 *
 * FAILING_DISK is the directory, FAILING_LOG the file to which every call is written down: part, clock, number of the call among
 * those of its process and clock, name, and whether it was made to fail. From clock 10 on servers fail at even clocks, the launcher
 * at odd ones: at clock 14 + 2N the N-th call of each server, at clock 9 + 2N the N-th of the launcher. One of the servers makes the
 * directory, whichever comes first: that has the numbers -1 and 0.
 *
 * Invariant: a call that is made to fail does nothing but, if it is a write, half of what was asked for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Of this process: the newest clock that was seen, and its calls so far. */
static long newest = -1, calls = 0;

static int is_ours(const char *path) {
    const char *root = getenv("FAILING_DISK");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

/* Counts a call that changes something at `path`; 1 if it is to fail. */
static int fails(const char *name, const char *path) {
    if (!is_ours(path)) return 0;
    char thread[17] = {0};
    prctl(PR_GET_NAME, thread);
    int serves = strncmp(thread, "checkpoint-", 11) == 0;
    int launches = strcmp(thread, "checkpoints") == 0;
    if (!serves && !launches) return 0;
    pthread_mutex_lock(&lock);
    const char *clock = strstr(path, "/clock-");
    long of = clock ? strtol(clock + 7, NULL, 10) : newest;
    if (of > newest) newest = of, calls = 0;
    long number = serves && strcmp(name, "mkdir") == 0 ? -1 : serves && !clock ? 0 : ++calls, at = newest;
    pthread_mutex_unlock(&lock);
    int fail = at == (serves ? 14 : 9) + 2 * number;
    char line[256];
    int length = snprintf(line, sizeof line, "%s %ld %ld %s %s\n", serves ? "server" : "launcher", at, number,
                          name, fail ? "failed" : "done");
    int log = syscall(SYS_openat, AT_FDCWD, getenv("FAILING_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    syscall(SYS_write, log, line, length);
    syscall(SYS_close, log);
    if (fail) errno = number % 2 ? ENOSPC : EIO;
    return fail;
}

static const char *path_of(int fd, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, size - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if ((flags & O_CREAT) && fails("open", path)) return -1;
    return NEXT(open64)(path, flags, mode);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    char buffer[4096];
    if (fails("write", path_of(fd, buffer, sizeof buffer))) {
        int error = errno;
        NEXT(write)(fd, bytes, count / 2);
        errno = error;
        return -1;
    }
    return NEXT(write)(fd, bytes, count);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
    char buffer[4096];
    if (fails("write", path_of(fd, buffer, sizeof buffer))) {
        int error = errno;
        NEXT(pwrite64)(fd, bytes, count / 2, offset);
        errno = error;
        return -1;
    }
    return NEXT(pwrite64)(fd, bytes, count, offset);
}

int fsync(int fd) {
    char buffer[4096];
    return fails("fsync", path_of(fd, buffer, sizeof buffer)) ? -1 : NEXT(fsync)(fd);
}

int rename(const char *source, const char *target) { return fails("rename", source) ? -1 : NEXT(rename)(source, target); }

int linkat(int from, const char *source, int to, const char *target, int flags) {
    return fails("link", target) ? -1 : NEXT(linkat)(from, source, to, target, flags);
}

int link(const char *source, const char *target) { return fails("link", target) ? -1 : NEXT(link)(source, target); }

int mkdir(const char *path, mode_t mode) { return fails("mkdir", path) ? -1 : NEXT(mkdir)(path, mode); }

int unlink(const char *path) { return fails("unlink", path) ? -1 : NEXT(unlink)(path); }

int rmdir(const char *path) { return fails("rmdir", path) ? -1 : NEXT(rmdir)(path); }
