/* Preloaded into a run: counts its calls that change files below KILLS_ROOT, whichever library makes
 * them, and can end the process before one of them.
 *
 * KILLS_ROOT    a folder
 * KILLS_LOG     gets a line "NUMBER CALL PATH" for each call, before it is made
 * KILLS_COPIES  where KILLS_ROOT is copied to before each call, as NUMBER; what a kill would leave
 * KILLS_EVERY   only before each call of so many, if more than 1
 * KILLS_AT      the process ends by SIGKILL before the call of this number
 *
 * A write of more than one byte counts twice: before it, and when half of it is done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *root, *copies;
static long at, every = 1, number;
static int log_fd = -1;
static pid_t owner;

static void fail(const char *what) {
  dprintf(2, "kills.c: %s: %s\n", what, strerror(errno));
  _exit(99);
}

__attribute__((constructor)) static void begin(void) {
  root = getenv("KILLS_ROOT");
  copies = getenv("KILLS_COPIES");
  at = getenv("KILLS_AT") ? atol(getenv("KILLS_AT")) : 0;
  if (getenv("KILLS_EVERY")) every = atol(getenv("KILLS_EVERY"));
  if (!root || !getenv("KILLS_LOG")) fail("KILLS_ROOT and KILLS_LOG: expected paths");
  log_fd = syscall(SYS_openat, AT_FDCWD, getenv("KILLS_LOG"),
                   O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log_fd < 0) fail(getenv("KILLS_LOG"));
  owner = getpid();
  unsetenv("LD_PRELOAD"); /* whatever it starts is not the run */
}

/* The absolute path of what a call is about; "" where that is not known. */
static void locate(int folder, const char *path, char *out) {
  char link[64];
  ssize_t size = 0;
  out[0] = 0;
  if (path && path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  if (folder == AT_FDCWD) {
    if (!getcwd(out, PATH_MAX)) out[0] = 0;
    size = strlen(out);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    size = readlink(link, out, PATH_MAX - 1);
    if (size < 0) size = 0;
    out[size] = 0;
  }
  if (path && size) snprintf(out + size, PATH_MAX - size, "/%s", path);
}

static void copy(void) {
  char target[PATH_MAX], *argv[] = {"cp", "-a", (char *)root, target, NULL};
  char *quiet[] = {"PATH=/usr/bin:/bin", NULL};
  int status;
  pid_t child;
  snprintf(target, sizeof target, "%s/%ld", copies, number);
  if (posix_spawnp(&child, "cp", NULL, NULL, argv, quiet)) fail("cp");
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) fail("waitpid");
  if (status) fail(target);
}

/* Where below the root a call is about something, in `where`; NULL if it is not. */
static const char *below(int folder, const char *path, char *where) {
  int saved = errno;
  if (!root || getpid() != owner) return NULL;
  locate(folder, path, where);
  size_t size = strlen(root);
  errno = saved;
  if (strncmp(where, root, size) || (where[size] && where[size] != '/')) return NULL;
  return where + size;
}

/* Whether the call is about the root; if so, it is counted, and the mutex held until `after`. */
static int before(const char *call, int folder, const char *path) {
  char where[PATH_MAX];
  int saved = errno;
  const char *ours = below(folder, path, where);
  if (!ours) return 0;
  pthread_mutex_lock(&mutex);
  number++;
  dprintf(log_fd, "%ld %s %s\n", number, call, ours);
  if (copies && number % every == 0) copy();
  if (number == at) kill(owner, SIGKILL);
  errno = saved;
  return 1;
}

static void after(int counted) {
  if (counted) pthread_mutex_unlock(&mutex);
}

/* A second look in the middle of a call that holds the mutex. */
static void between(const char *call, int fd) {
  pthread_mutex_unlock(&mutex);
  before(call, fd, NULL);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define CALL1(name, type, first, folder, path)    \
  int name(type first) {                          \
    REAL(name);                                   \
    int counted = before(#name, folder, path);    \
    int result = real(first);                     \
    after(counted);                               \
    return result;                                \
  }

CALL1(unlink, const char *, path, AT_FDCWD, path)
CALL1(remove, const char *, path, AT_FDCWD, path)
CALL1(rmdir, const char *, path, AT_FDCWD, path)
CALL1(fsync, int, fd, fd, NULL)
CALL1(fdatasync, int, fd, fd, NULL)

#define CALL(name, arguments, given, folder, path) \
  int name arguments {                             \
    REAL(name);                                    \
    int counted = before(#name, folder, path);     \
    int result = real given;                       \
    after(counted);                                \
    return result;                                 \
  }

CALL(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
CALL(mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), fd, path)
CALL(unlinkat, (int fd, const char *path, int flags), (fd, path, flags), fd, path)
CALL(rename, (const char *old, const char *new), (old, new), AT_FDCWD, new)
CALL(renameat, (int f, const char *old, int t, const char *new), (f, old, t, new), t, new)
CALL(renameat2, (int f, const char *old, int t, const char *new, unsigned g), (f, old, t, new, g),
     t, new)
CALL(link, (const char *old, const char *new), (old, new), AT_FDCWD, new)
CALL(linkat, (int f, const char *old, int t, const char *new, int g), (f, old, t, new, g), t, new)
CALL(symlink, (const char *old, const char *new), (old, new), AT_FDCWD, new)
CALL(symlinkat, (const char *old, int t, const char *new), (old, t, new), t, new)
CALL(truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path)
CALL(truncate64, (const char *path, off64_t size), (path, size), AT_FDCWD, path)
CALL(ftruncate, (int fd, off_t size), (fd, size), fd, NULL)
CALL(ftruncate64, (int fd, off64_t size), (fd, size), fd, NULL)
CALL(posix_fallocate, (int fd, off_t start, off_t size), (fd, start, size), fd, NULL)
CALL(posix_fallocate64, (int fd, off64_t start, off64_t size), (fd, start, size), fd, NULL)
CALL(fallocate, (int fd, int mode, off_t start, off_t size), (fd, mode, start, size), fd, NULL)
CALL(fallocate64, (int fd, int mode, off64_t start, off64_t size), (fd, mode, start, size), fd,
     NULL)

/* Opening counts where it may change something. */
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

#define MODE                                                    \
  mode_t mode = 0;                                              \
  if (flags & (O_CREAT | __O_TMPFILE)) {                        \
    va_list rest;                                               \
    va_start(rest, flags);                                      \
    mode = va_arg(rest, mode_t);                                \
    va_end(rest);                                               \
  }

#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    REAL(name);                                                                 \
    MODE                                                                        \
    int counted = CHANGES(flags) ? before(#name, AT_FDCWD, path) : 0;           \
    int result = real(path, flags, mode);                                       \
    after(counted);                                                             \
    return result;                                                              \
  }

#define OPENAT(name)                                                            \
  int name(int fd, const char *path, int flags, ...) {                          \
    REAL(name);                                                                 \
    MODE                                                                        \
    int counted = CHANGES(flags) ? before(#name, fd, path) : 0;                 \
    int result = real(fd, path, flags, mode);                                   \
    after(counted);                                                             \
    return result;                                                              \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CALL(creat, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
CALL(creat64, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)

#define FOPEN(name)                                                             \
  FILE *name(const char *path, const char *mode) {                              \
    REAL(name);                                                                 \
    int counted = strpbrk(mode, "wa+") ? before(#name, AT_FDCWD, path) : 0;     \
    FILE *result = real(path, mode);                                            \
    after(counted);                                                             \
    return result;                                                              \
  }

FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  int counted = before("write", fd, NULL);
  ssize_t half = 0;
  if (counted && size > 1 && (half = real(fd, data, size / 2)) > 0) {
    between("half-write", fd);
    data = (const char *)data + half;
    size -= half;
  }
  ssize_t result = half < 0 ? half : real(fd, data, size);
  after(counted);
  return result < 0 ? result : result + half;
}

/* As one write: the pieces are small. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  size_t size = 0, end = 0;
  char where[PATH_MAX];
  if (!below(fd, NULL, where)) return real(fd, parts, count);
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  char *all = malloc(size + 1);
  if (!all) fail("malloc");
  for (int i = 0; i < count; end += parts[i++].iov_len)
    memcpy(all + end, parts[i].iov_base, parts[i].iov_len);
  ssize_t result = write(fd, all, size);
  free(all);
  return result;
}

#define PWRITE(name, offset_type)                                               \
  ssize_t name(int fd, const void *data, size_t size, offset_type offset) {     \
    REAL(name);                                                                 \
    int counted = before(#name, fd, NULL);                                      \
    ssize_t half = 0;                                                           \
    if (counted && size > 1 && (half = real(fd, data, size / 2, offset)) > 0) { \
      between("half-" #name, fd);                                               \
      data = (const char *)data + half;                                         \
      size -= half;                                                             \
      offset += half;                                                           \
    }                                                                           \
    ssize_t result = half < 0 ? half : real(fd, data, size, offset);            \
    after(counted);                                                             \
    return result < 0 ? result : result + half;                                 \
  }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define LONG_CALL(name, arguments, given, fd)     \
  ssize_t name arguments {                        \
    REAL(name);                                   \
    int counted = before(#name, fd, NULL);        \
    ssize_t result = real given;                  \
    after(counted);                               \
    return result;                                \
  }

ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
LONG_CALL(pwritev, (int fd, const struct iovec *parts, int count, off_t offset),
          (fd, parts, count, offset), fd)
LONG_CALL(pwritev64, (int fd, const struct iovec *parts, int count, off64_t offset),
          (fd, parts, count, offset), fd)
LONG_CALL(sendfile, (int fd, int from, off_t *offset, size_t size), (fd, from, offset, size), fd)
LONG_CALL(sendfile64, (int fd, int from, off64_t *offset, size_t size), (fd, from, offset, size),
          fd)
LONG_CALL(copy_file_range,
          (int from, off64_t *start, int fd, off64_t *offset, size_t size, unsigned flags),
          (from, start, fd, offset, size, flags), fd)
