/*
 * generator.h - what stories.c, arithmetic.c and sudoku.c share: errors, the command line, output
 * files and random numbers.
 *
 * Include this file first: it sets _POSIX_C_SOURCE, which the system's headers read. It includes
 * the standard headers itself. Define two macros before it:
 *
 *   PROGRAM   the name of the program; each error message begins with it
 *   OUTPUT    the option that names the output file, for error messages, for example "--output"
 *
 * No function returns an error. If something is wrong, the program prints one line to standard
 * error and exits: with status 2 if the command line is wrong, else with status 1.
 */
#define _POSIX_C_SOURCE 200809L // declares fsync and fileno
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

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0])) // number of elements

// An output file, FILE. The program writes FILE.tmp and renames it at the end, so FILE is always
// complete. Call output_to, start, then write to `file`, then finish and commit.
typedef struct Output {
    const char *path;        // FILE; NULL without output_to, then start() uses standard output
    char *temporary;         // FILE.tmp; set by output_to, freed by commit
    FILE *file;              // open from start to finish
    struct Output *previous; // the file that was started before this one
} Output;

static Output *last_started;

// Prints one line to standard error, removes the incomplete files and exits.
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

// Returns the value of the option argv[*i], which is the next argument, and moves *i to it.
static const char *next_value(char **argv, int *i) {
    if (!argv[*i + 1] || !*argv[*i + 1]) die(2, "%s needs a value; try --help", argv[*i]);
    return argv[++*i];
}

// Reads `text`, the value of the option `name`: a decimal number from min to max.
static uint64_t whole_number(const char *name, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);

    // strtoull() accepts " 7" and "-1" too, so check that the first character is a digit.
    if (!isdigit((unsigned char)*text) || *end || errno || n < min || n > max) {
        die(2, "%s needs a whole number from %" PRIu64 " to %" PRIu64 ", not '%s'",
            name, min, max, text);
    }
    return n;
}

// ------------------------------------------------------------------------------------------------
// Files

// Returns the two strings as one. The caller frees it.
static char *join(const char *a, const char *b) {
    char *s = malloc(strlen(a) + strlen(b) + 1);
    if (!s) die(1, "out of memory");
    return strcat(strcpy(s, a), b);
}

// Sets the name of the output file. It opens nothing, because the rest of the command line may
// still be wrong.
static void output_to(Output *out, const char *path) {
    free(out->temporary); // an option can come twice: the last one counts
    out->path = path;
    out->temporary = join(path, ".tmp");
}

// Opens FILE.tmp, or uses standard output if there is no FILE.
static void start(Output *out) {
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file that is too large is then an error, like a full disk
#endif
    out->file = stdout;
    if (!out->path) return;

    // rename() would replace a device or a pipe by a file.
    struct stat info;
    if (!lstat(out->path, &info) && !S_ISREG(info.st_mode)) {
        die(1, "%s is a folder, device, pipe or link; choose another " OUTPUT, out->path);
    }
    unlink(out->temporary); // from a program that was killed; a link would lead elsewhere
    out->file = fopen(out->temporary, "wbx");
    if (!out->file) {
        die(1, "cannot create %s: %s; choose another " OUTPUT, out->temporary, strerror(errno));
    }
    out->previous = last_started;
    last_started = out;
}

// Reports a failed write. Call it directly after the failed call, because errno holds the reason.
static void cannot_write(const Output *out) {
    die(1, "cannot write %s: %s; free some space or choose another " OUTPUT,
        out->path ? out->path : "standard output", strerror(errno));
}

// Makes sure that everything is on the disk. A full disk may show only here.
static void finish(Output *out) {
    if (ferror(out->file) || fflush(out->file)) cannot_write(out);
    if (out->path && (fsync(fileno(out->file)) || fclose(out->file))) cannot_write(out);
}

// Renames FILE.tmp to FILE. A program with several files finishes all of them before it commits
// the first.
static void commit(Output *out) {
    if (out->path && rename(out->temporary, out->path)) cannot_write(out);
    free(out->temporary);
    out->temporary = NULL;
}

// ------------------------------------------------------------------------------------------------
// Random numbers. A number is a hash of a key and of how many numbers were drawn with this key
// before. Each story, problem or board has its own key, made from the seed and its index. So story
// 7 is the same whether 10 or 10,000 stories are written.

typedef struct { uint64_t key, draws; } Random;

// The mixing steps of splitmix64: a change of one bit of the input changes about half of the bits
// of the output. To hash several numbers, pass the result on: hash(hash(0, a), b).
static uint64_t hash(uint64_t key, uint64_t n) {
    // 2^64 / golden ratio. Without it the hash of 0 would be 0.
    uint64_t x = key + n + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Returns a number from 0 to n-1. Each has the same probability, up to an error of n / 2^32.
static int random_below(Random *r, int n) {
    uint64_t bits = hash(r->key, r->draws) >> 32;
    r->draws++;
    return (int)(bits * (uint64_t)n >> 32); // bits / 2^32 is from 0 to below 1
}
