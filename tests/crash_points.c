/* Preloaded into a process (LD_PRELOAD), asks before every system call that changes the
 * directory CRASH_POINTS_UNDER: a line "CALL PATH" goes to the file descriptor CRASH_POINTS_ASK,
 * and the call is made when a byte has come back on CRASH_POINTS_GO. A write is asked about again
 * when half of it is done. Meanwhile no other such call is made, so the directory stands still. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_watched(const char *path) {
  const char *under = getenv("CRASH_POINTS_UNDER");
  size_t size = under ? strlen(under) : 0;
  return size && strncmp(path, under, size) == 0 && (path[size] == '/' || !path[size]);
}

static int path_of_file(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, PATH_MAX - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_watched(path);
}

static int path_of_name(int at, const char *name, char *path) {
  char folder[PATH_MAX];
  if (name[0] == '/') {
    snprintf(path, PATH_MAX, "%s", name);
  } else {
    if (at == AT_FDCWD) {
      if (!getcwd(folder, sizeof folder)) return 0;
    } else {
      path_of_file(at, folder);
    }
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", folder, name);
  }
  return is_watched(path);
}

static void ask(const char *call, const char *path) {
  char line[PATH_MAX + 64], answer;
  int size = snprintf(line, sizeof line, "%s %s\n", call, path);
  if (NEXT(write)(atoi(getenv("CRASH_POINTS_ASK")), line, size) != size ||
      read(atoi(getenv("CRASH_POINTS_GO")), &answer, 1) != 1)
    _exit(99); /* whoever is asked is gone */
}

/* Makes `call` after asking, with all others kept waiting. */
#define ASKED(watched, name, call)             \
  if (!(watched)) return call;                 \
  pthread_mutex_lock(&one_at_a_time);          \
  ask(name, path);                             \
  __typeof__(call) result = call;              \
  pthread_mutex_unlock(&one_at_a_time);        \
  return result;

/* The same for a write of `size` bytes, in halves: `first` writes size / 2, `rest` what is left
 * after `done` bytes. */
#define ASKED_TWICE(watched, name, whole, first, rest) \
  if (!(watched)) return whole;                        \
  pthread_mutex_lock(&one_at_a_time);                  \
  ask(name, path);                                     \
  ssize_t result;                                      \
  if (size < 2) {                                      \
    result = whole;                                    \
  } else {                                             \
    ssize_t done = result = first;                     \
    if (done == (ssize_t)(size / 2)) {                 \
      ask(name "/half", path);                         \
      ssize_t more = rest;                             \
      if (more > 0) result += more;                    \
    }                                                  \
  }                                                    \
  pthread_mutex_unlock(&one_at_a_time);                \
  return result;

ssize_t write(int fd, const void *data, size_t size) {
  char path[PATH_MAX];
  __typeof__(&write) real = NEXT(write);
  ASKED_TWICE(path_of_file(fd, path), "write", real(fd, data, size), real(fd, data, size / 2),
              real(fd, (const char *)data + done, size - done))
}

#define PWRITE(name)                                                                          \
  ssize_t name(int fd, const void *data, size_t size, off64_t at) {                           \
    char path[PATH_MAX];                                                                      \
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, #name);            \
    ASKED_TWICE(path_of_file(fd, path), "pwrite", real(fd, data, size, at),                   \
                real(fd, data, size / 2, at), real(fd, (const char *)data + done, size - done, \
                                                   at + done))                                \
  }
PWRITE(pwrite64)
#undef pwrite
PWRITE(pwrite)

static ssize_t write_parts(int fd, const struct iovec *parts, int count, const char *data,
                           size_t size) {
  char path[PATH_MAX];
  ASKED_TWICE(path_of_file(fd, path), "writev", NEXT(writev)(fd, parts, count),
              NEXT(write)(fd, data, size / 2), NEXT(write)(fd, data + done, size - done))
}

/* The array store's; in its middle are half of the bytes, wherever its parts end. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  char *data = malloc(size + 1), *end = data;
  for (int i = 0; i < count; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
  ssize_t result = write_parts(fd, parts, count, data, size);
  free(data);
  return result;
}

#define PWRITEV(name)                                                                   \
  ssize_t name(int fd, const struct iovec *parts, int count, off64_t at) {              \
    char path[PATH_MAX];                                                                \
    ssize_t (*real)(int, const struct iovec *, int, off64_t) = dlsym(RTLD_NEXT, #name); \
    ASKED(path_of_file(fd, path), "pwritev", real(fd, parts, count, at))                \
  }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define OF_FILE(name)                                       \
  int name(int fd) {                                        \
    char path[PATH_MAX];                                    \
    ASKED(path_of_file(fd, path), #name, NEXT(name)(fd))    \
  }
OF_FILE(fsync)
OF_FILE(fdatasync)

#define TRUNCATE(name)                                             \
  int name(int fd, off64_t size) {                                 \
    char path[PATH_MAX];                                           \
    int (*real)(int, off64_t) = dlsym(RTLD_NEXT, #name);           \
    ASKED(path_of_file(fd, path), "ftruncate", real(fd, size))     \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int rename(const char *old, const char *new) {
  char path[PATH_MAX];
  ASKED(path_of_name(AT_FDCWD, new, path), "rename", NEXT(rename)(old, new))
}

int renameat(int old_at, const char *old, int new_at, const char *new) {
  char path[PATH_MAX];
  ASKED(path_of_name(new_at, new, path), "rename", NEXT(renameat)(old_at, old, new_at, new))
}

int renameat2(int old_at, const char *old, int new_at, const char *new, unsigned int flags) {
  char path[PATH_MAX];
  ASKED(path_of_name(new_at, new, path), "rename",
        NEXT(renameat2)(old_at, old, new_at, new, flags))
}

int link(const char *old, const char *new) {
  char path[PATH_MAX];
  ASKED(path_of_name(AT_FDCWD, new, path), "link", NEXT(link)(old, new))
}

int unlink(const char *name) {
  char path[PATH_MAX];
  ASKED(path_of_name(AT_FDCWD, name, path), "unlink", NEXT(unlink)(name))
}

int unlinkat(int at, const char *name, int flags) {
  char path[PATH_MAX];
  ASKED(path_of_name(at, name, path), "unlink", NEXT(unlinkat)(at, name, flags))
}

int rmdir(const char *name) {
  char path[PATH_MAX];
  ASKED(path_of_name(AT_FDCWD, name, path), "rmdir", NEXT(rmdir)(name))
}
