/*
 * generator.h - what stories.c, arithmetic.c and sudoku.c, which write data from a seed, have in
 * common: errors, command line, files and random numbers. The standard headers come along.
 *
 * Each of them includes this file before any other header, as it says which functions the others
 * are to declare, and before that defines
 *
 *   PROGRAM   its name, with which its error messages begin
 *   OUTPUT    what they say to choose another of when a file cannot be written, as "--output"
 *
 * No function here returns an error: one line on standard error says what is wrong, and the
 * program ends, with status 2 if the command line is wrong and 1 if something else is.
 */
#define _POSIX_C_SOURCE 200809L // fsync and fileno
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0])) // how many elements it has

// A file to write, FILE. It is written as FILE.tmp and renamed when complete, so FILE is never half
// written. The order of calls is output_to, start, whatever writes to `file`, finish, commit.
typedef struct Output {
    const char *path;        // FILE, or NULL without output_to: start then takes standard output
    char *temporary;         // FILE.tmp, from output_to to commit
    FILE *file;              // open from start to finish
    struct Output *previous; // the file started before this one
} Output;

static Output *last_started;

// Prints one line on standard error, removes the files that are not complete, and ends the program.
__attribute__((format(printf, 2, 3), noreturn))
static void die(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs(PROGRAM ": ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    for (Output *out = last_started; out; out = out->previous) {
        if (out->temporary) remove(out->temporary);
    }
    exit(status);
}

// ------------------------------------------------------------------------------------------------
// The command line

// The value after the option argv[*i]; *i moves on to it.
static const char *next_value(char **argv, int *i) {
    if (!argv[*i + 1] || !*argv[*i + 1]) die(2, "%s needs a value; try --help", argv[*i]);
    return argv[++*i];
}

// The value `text` of the option `name`, which must be decimal and from min to max.
static uint64_t whole_number(const char *name, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10); // takes " 7" and "-1" too: check for a digit
    if (!isdigit((unsigned char)*text) || *end || errno || n < min || n > max) {
        die(2, "%s needs a whole number from %" PRIu64 " to %" PRIu64 ", not '%s'", name, min, max, text);
    }
    return n;
}

// ------------------------------------------------------------------------------------------------
// Files

// The two strings as one; the caller frees it.
static char *join(const char *a, const char *b) {
    char *s = malloc(strlen(a) + strlen(b) + 1);
    if (!s) die(1, "out of memory");
    return strcat(strcpy(s, a), b);
}

// Says that `path` is FILE. Nothing is opened yet, as the rest of the command line may be wrong.
static void output_to(Output *out, const char *path) {
    free(out->temporary); // an option may be given twice: the last one counts
    out->path = path;
    out->temporary = join(path, ".tmp");
}

// Opens FILE.tmp, or takes standard output.
static void start(Output *out) {
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a limit on file sizes is then an error like a full disk
#endif
    out->file = stdout;
    if (!out->path) return;
    struct stat info;
    if (!stat(out->path, &info) && !S_ISREG(info.st_mode)) die(1, "%s is a folder, device or pipe; choose another " OUTPUT, out->path);
    out->file = fopen(out->temporary, "wb");
    if (!out->file) die(1, "cannot create %s: %s; choose another " OUTPUT, out->temporary, strerror(errno));
    out->previous = last_started;
    last_started = out;
}

// To be called at once after what failed: errno says why.
static void cannot_write(const Output *out) {
    die(1, "cannot write %s: %s; free some space or choose another " OUTPUT, out->path ? out->path : "standard output", strerror(errno));
}

// Makes sure that all is on the disk, as a full one may show only now.
static void finish(Output *out) {
    if (ferror(out->file) || fflush(out->file)) cannot_write(out);
    if (out->path && (fsync(fileno(out->file)) || fclose(out->file))) cannot_write(out);
}

// FILE.tmp becomes FILE. If there are several files, finish all before the first is committed.
static void commit(Output *out) {
    if (out->path && rename(out->temporary, out->path)) cannot_write(out);
    free(out->temporary);
    out->temporary = NULL;
}

// ------------------------------------------------------------------------------------------------
// Random numbers. Each is a hash of a key and of how many were drawn before it. Each story, problem
// or board has a key of its own, a hash of the seed and its number; there is no generator whose state
// passes from one to the next. So none of them depends on how many are written.

typedef struct { uint64_t key, draws; } Random;

// splitmix64's finalizer, in which any change of x changes about half of the bits; 2^64 / golden ratio
// is added as its hash of 0 is 0. Several numbers are hashed one after the other: hash(hash(0, a), b).
static uint64_t hash(uint64_t key, uint64_t n) {
    uint64_t x = key + n + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// From 0 to n-1, each as likely to within n / 2^32.
static int random_below(Random *r, int n) {
    return (int)((hash(r->key, r->draws++) >> 32) * (uint64_t)n >> 32);
}
