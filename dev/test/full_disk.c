// A disk that becomes full, for full_disk.sh: a library that LD_PRELOAD puts under a program. It
// replaces fopen(), fsync(), rename() and so on. The streams keep glibc's buffers; only what they
// write comes here. Standard output is not one of them.
//     cc -shared -fPIC dev/test/full_disk.c -o full_disk.so
//     LD_PRELOAD=./full_disk.so FULL_DISK_COUNT=FILE [FULL_DISK_AT=N [FULL_DISK_ONCE=1]] PROGRAM...
// Operation N and all after it fail, or only this one; without N none does. FILE gets the number of
// operations that were tried.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { FILE *stream; int file, dirty; } Output; // dirty: written since the last fsync()
enum { MOST = 8 };
static Output outputs[MOST]; // open ones have a stream

// Counts an operation. Returns whether it must fail.
static int fails(void) {
    static int operations, count = -1;
    const char *at = getenv("FULL_DISK_AT"), *once = getenv("FULL_DISK_ONCE");
    char text[16];
    // Each time: how the program will end is not known.
    if (count < 0) count = open(getenv("FULL_DISK_COUNT"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    int length = snprintf(text, sizeof text, "%d\n", ++operations);
    if (pwrite(count, text, length, 0) != length) abort();

    int n = at ? atoi(at) : 0;
    int full = n && (operations == n || (operations > n && !once));
    if (full) errno = ENOSPC;
    return full;
}

static Output *find_output(FILE *stream) { // NULL: a free one
    for (int i = 0; i < MOST; i++)
        if (outputs[i].stream == stream) return &outputs[i];
    return NULL;
}

// A full disk takes a part of what is written to it: half of it, or one byte, which can be a digit
// of a number that has more.
static ssize_t write_output(void *cookie, const char *data, size_t bytes) {
    Output *o = cookie;
    int full = fails();
    size_t part = getenv("FULL_DISK_ONCE") ? 1 : bytes / 2;
    ssize_t written = write(o->file, data, full ? part : bytes);
    o->dirty = 1;
    if (full) errno = ENOSPC;
    return written < 0 ? 0 : written; // 0 is an error too
}

// It writes nothing, so a full disk does not hinder it.
static int seek_output(void *cookie, off64_t *offset, int from) {
    Output *o = cookie;
    *offset = lseek(o->file, *offset, from);
    return *offset < 0 ? -1 : 0;
}

// Over a network close() may be the first to say that there was no room, unless fsync() was before.
static int close_output(void *cookie) {
    Output *o = cookie;
    int full = o->dirty && fails();
    close(o->file);
    o->stream = NULL;
    if (full) errno = ENOSPC;
    return full ? EOF : 0;
}

// ---- what the program calls. Here these functions are called by other names ----

FILE *fopen(const char *path, const char *mode) {
    if (*mode == 'r') return fopen64(path, mode);
    int flags = O_WRONLY | O_CREAT | (*mode == 'a' ? O_APPEND : O_TRUNC);
    Output *o = find_output(NULL);
    if (!o) abort();
    if (fails() || (o->file = open(path, flags, 0666)) < 0) return NULL;
    o->dirty = 0;
    cookie_io_functions_t functions = {NULL, write_output, seek_output, close_output};
    return o->stream = fopencookie(o, mode, functions);
}

int fileno(FILE *stream) {
    const Output *o = find_output(stream);
    return o ? o->file : fileno_unlocked(stream);
}

int fsync(int file) { // waits for no disk: nobody pulls the plug
    if (fails()) return -1;
    for (int i = 0; i < MOST; i++)
        if (outputs[i].file == file) outputs[i].dirty = 0;
    return 0;
}

int rename(const char *from, const char *to) {
    return fails() ? -1 : renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int mkdir(const char *path, mode_t mode) { // a folder that is there needs no room
    return access(path, F_OK) && fails() ? -1 : mkdirat(AT_FDCWD, path, mode);
}
