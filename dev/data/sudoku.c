/*
 * sudoku.c - writes Sudoku boards and puzzles as token shards, to train a masked diffusion model on.
 *
 * In text, a blanked-out word often has several right answers. A Sudoku puzzle has exactly one, and
 * a few rules decide it, so one can count how often a model is right; and since each digit found
 * helps to find the next, here is where looping over the same layers should pay.
 *
 *   cc -std=c11 -O2 -o sudoku sudoku.c
 *   ./sudoku --size 6 --count 100000 --seed 1 --output boards.bin --tokenizer sudoku.tok
 *   ./sudoku --size 6 --givens 12 --count 1000 --seed 2 --output puzzles.bin
 *
 * --help lists the options. A row is the size*size cells of a board, from left to right and top to
 * bottom: token 0 is a blank, ".", and tokens 1 .. size are the digits. (The last token of the
 * vocabulary, <|endoftext|>, is there because the tokenizer's format wants one; no row holds it.)
 * Without --givens the shard is one full board after another; with it, each puzzle's row is
 * followed by its solution's. The formats are in README.md beside this file.
 *
 * Row i depends only on the size, the seed, --givens and i: on every machine the same file, and a
 * larger --count only adds rows at the end. Boards and puzzles of one seed have nothing in common;
 * still, there are just 288 boards of size 4 and 28,200,960 of size 6, so many 4x4 and a few 6x6
 * boards of a test set are in a training set too, by chance. Of size 9 there are 6.7e21.
 *
 * Files are written as FILE.tmp and renamed when all are complete: FILE is never half written, and
 * what it held before is lost only to its successor. An error is one line on standard error; the
 * exit status is then 2 if the command line is wrong and 1 if something else is.
 */
#define _POSIX_C_SOURCE 200809L // fsync and fileno
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_SIZE = 9, MAX_CELLS = MAX_SIZE * MAX_SIZE };
enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328 };
enum { MAX_ATTEMPTS = 10000 }; // boards tried for one puzzle: enough for 4, 8 and 21 givens (by size)

// ------------------------------------------------------------------------------------------------
// Files

typedef struct { const char *path; char *temporary; FILE *file; } Output;

static Output shard, tokenizer; // path is NULL if the file was not asked for

// Prints one line "sudoku: ..." on standard error, removes what is unfinished, ends the program.
__attribute__((format(printf, 2, 3), noreturn))
static void die(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("sudoku: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    if (shard.file) remove(shard.temporary);
    if (tokenizer.file) remove(tokenizer.temporary);
    exit(status);
}

static char *join(const char *a, const char *b) { // the caller frees it
    char *s = malloc(strlen(a) + strlen(b) + 1);
    if (!s) die(1, "out of memory");
    return strcat(strcpy(s, a), b);
}

// Are these two names of one file, there or not? "a" and "./a" are: the same name in the same folder.
static int same_file(const char *a, const char *b) {
    char *parts[4] = {join(a, ""), join(a, ""), join(b, ""), join(b, "")}; // dirname writes into them
    struct stat x, y;
    int same = !strcmp(basename(parts[0]), basename(parts[2])) && !stat(dirname(parts[1]), &x) &&
               !stat(dirname(parts[3]), &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
    for (int i = 0; i < 4; i++) free(parts[i]);
    return same;
}

static void start(Output *out) {
    struct stat info;
    if (!stat(out->path, &info) && !S_ISREG(info.st_mode)) {
        die(1, "%s is a folder, device or pipe; choose another file", out->path);
    }
    out->file = fopen(out->temporary, "wb");
    if (!out->file) {
        die(1, "cannot create %s: %s; choose another file", out->temporary, strerror(errno));
    }
}

static void cannot_write(const Output *out) {
    die(1, "cannot write %s: %s; free some space or choose another file", out->path, strerror(errno));
}

// Makes sure that all is on the disk, as a full one may show only now.
static void finish(Output *out) {
    if (fflush(out->file) || fsync(fileno(out->file)) || fclose(out->file)) cannot_write(out);
}

static void commit(Output *out) { // the temporary file becomes the one that was asked for
    if (rename(out->temporary, out->path)) cannot_write(out);
    out->file = NULL;
    free(out->temporary);
}

// Little-endian, whatever the machine. A full disk shows here or in finish.
static void put(const Output *out, uint32_t value, int bytes) {
    for (; bytes > 0; bytes--, value >>= 8) {
        if (putc((int)(value & 255), out->file) == EOF) cannot_write(out);
    }
}

static void put_header(const Output *out, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t used[] = {a, b, c, d};
    for (int i = 0; i < HEADER_INTS; i++) put(out, i < 4 ? used[i] : 0, 4);
}

static void write_tokenizer(const Output *out, int size) {
    static const char eot[] = "<|endoftext|>";
    put_header(out, TOKENIZER_MAGIC, 2, (uint32_t)size + 2, (uint32_t)size + 1);
    for (int id = 0; id <= size; id++) { // a length, here always 1, and that many bytes
        put(out, 1, 1);
        put(out, id ? (uint32_t)('0' + id) : '.', 1);
    }
    put(out, sizeof eot - 1, 1);
    for (const char *p = eot; *p; p++) put(out, (uint32_t)*p, 1);
}

// ------------------------------------------------------------------------------------------------
// Random numbers: hashes of a key and a counter, as in stories.c

#define GOLDEN 0x9e3779b97f4a7c15u // 2^64 / golden ratio

typedef struct { uint64_t key, draws; } Random;

// The finalizer of splitmix64: any change of x changes about half of the bits.
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int draw(Random *r, int n) { // 0 .. n-1
    return (int)((mix(r->key + r->draws++ + GOLDEN) >> 32) * (uint64_t)n >> 32);
}

// ------------------------------------------------------------------------------------------------
// Boards. A digit d is the bit 1 << (d-1), and a set of digits one number: so the candidates for a
// cell are what three masks leave.

typedef uint16_t Mask;

typedef struct {
    Mask cell[MAX_CELLS];       // the digit of each cell, 0 in a blank
    Mask used[3][MAX_SIZE];     // the digits that stand in each row, column and box
    uint8_t blank[MAX_CELLS];   // the blanks, in any order
    int blanks;
} Board;

static int size, cells;
static uint8_t unit[3][MAX_CELLS];        // the row, column and box of each cell
static uint8_t set_size[1 << MAX_SIZE];   // how many digits are in a set

static void prepare(int board_size) {
    size = board_size, cells = size * size;
    int height = size == 9 ? 3 : 2, width = size / height; // of a box: 2x2, 2 rows x 3 columns, 3x3
    for (int c = 0; c < cells; c++) {
        int row = c / size, column = c % size;
        unit[0][c] = (uint8_t)row;
        unit[1][c] = (uint8_t)column;
        unit[2][c] = (uint8_t)(row / height * height + column / width); // a band has `height` boxes
    }
    for (int set = 1; set < 1 << MAX_SIZE; set++) set_size[set] = (uint8_t)(set_size[set >> 1] + (set & 1));
}

static Mask candidates(const Board *b, int c) {
    return (Mask)(((1 << size) - 1) & ~(b->used[0][unit[0][c]] | b->used[1][unit[1][c]] | b->used[2][unit[2][c]]));
}

// Puts a digit into an empty cell, or takes it out again. (The list of blanks is the caller's.)
static void flip(Board *b, int c, Mask digit) {
    b->cell[c] ^= digit;
    for (int k = 0; k < 3; k++) b->used[k][unit[k][c]] ^= digit;
}

// Fills the blanks by backtracking: 1, or 0 if they cannot be filled, and then they are blank again.
// The next cell is always one with the fewest candidates, where an error shows soonest. Digits are
// tried in ascending order, or, with r, in random order.
static int solve(Board *b, Random *r) {
    if (!b->blanks) return 1;
    int best = 0, fewest = MAX_SIZE + 1;
    for (int i = 0; i < b->blanks && fewest > 1; i++) {
        int n = set_size[candidates(b, b->blank[i])];
        if (n < fewest) best = i, fewest = n;
    }
    int last = --b->blanks;
    uint8_t c = b->blank[best];
    b->blank[best] = b->blank[last];
    b->blank[last] = c; // stays there, beyond the end, while the others are permuted
    for (Mask left = candidates(b, c); left;) {
        Mask from = left;
        if (r) for (int skip = draw(r, set_size[left]); skip > 0; skip--) from &= (Mask)(from - 1);
        Mask digit = (Mask)(from & -from);
        flip(b, c, digit);
        if (solve(b, r)) return 1;
        flip(b, c, digit);
        left ^= digit;
    }
    b->blanks++;
    return 0;
}

// A full board. Every one can come, but they are not exactly equally likely: a choice of digits that
// leaves few ways to go on is as likely as one that leaves many. Of 4x4 boards, the rarest comes
// 0.73 times as often as on average, the commonest 1.53 times.
static void random_board(Board *b, Random *r) {
    memset(b, 0, sizeof *b);
    for (b->blanks = 0; b->blanks < cells; b->blanks++) b->blank[b->blanks] = (uint8_t)b->blanks;
    solve(b, r);
}

// Empties cell c of a puzzle if it still has only one solution then. The solution is known, so the
// question is just whether there is one with another digit in c.
static int remove_cell(Board *b, int c) {
    Mask digit = b->cell[c];
    Board other = *b;
    flip(&other, c, digit);
    for (Mask left = candidates(&other, c) ^ digit; left; left &= (Mask)(left - 1)) {
        Mask wrong = (Mask)(left & -left);
        flip(&other, c, wrong);
        if (solve(&other, NULL)) return 0;
        flip(&other, c, wrong);
    }
    flip(b, c, digit);
    b->blank[b->blanks++] = (uint8_t)c;
    return 1;
}

// A puzzle with exactly one solution, and that. One pass in random order over the cells of a board is
// enough: a cell that is needed now is still needed when there are fewer others.
static void random_puzzle(Board *puzzle, Board *solution, int givens, Random *r) {
    for (int attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
        random_board(solution, r);
        *puzzle = *solution;
        uint8_t order[MAX_CELLS];
        int needed = 0;
        for (int i = 0; i < cells; i++) {
            int j = draw(r, i + 1);
            order[i] = order[j];
            order[j] = (uint8_t)i;
        }
        for (int i = 0; puzzle->blanks < cells - givens && needed <= givens; i++) {
            needed += !remove_cell(puzzle, order[i]);
        }
        if (puzzle->blanks == cells - givens) return;
    }
    die(1, "no puzzle with %d givens found in %d attempts: choose more givens", givens, MAX_ATTEMPTS);
}

static void write_row(const Output *out, const Board *b) {
    for (int c = 0; c < cells; c++) {
        int digit = 0;
        for (Mask bit = b->cell[c]; bit; bit >>= 1) digit++;
        put(out, (uint32_t)digit, 2);
    }
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: sudoku --size N [--output FILE] [--givens N] [--count N] [--seed N] [--tokenizer FILE]\n"
    "Writes random Sudoku boards, or puzzles with exactly one solution, as a token shard.\n"
    "  --size N          4, 6 or 9 digits; boxes of 2x2, 2x3 (2 rows, 3 columns) or 3x3\n"
    "  --output FILE     where to write the shard\n"
    "  --givens N        write puzzles with N cells given, each followed by its solution\n"
    "                    (default: only full boards)\n"
    "  --count N         how many boards or puzzles, at least 1 (default 1000)\n"
    "  --seed N          which ones, 0 to 2^64-1 (default 1)\n"
    "  --tokenizer FILE  where to write the tokenizer\n"
    "  --help            show this text\n";

// The value after the option argv[*i]; *i moves on to it.
static const char *next_value(char **argv, int *i) {
    if (!argv[*i + 1] || !*argv[*i + 1]) die(2, "%s needs a value; try --help", argv[*i]);
    return argv[++*i];
}

static uint64_t number(const char *name, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10); // takes " 7" and "-1" too: check for a digit
    if (!isdigit((unsigned char)*text) || *end || errno || n < min || n > max) {
        die(2, "%s needs a whole number from %" PRIu64 " to %" PRIu64 ", not '%s'", name, min, max, text);
    }
    return n;
}

int main(int argc, char **argv) {
    const char *size_text = NULL, *givens_text = NULL, *count_text = NULL, *seed_text = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            fputs(usage, stdout);
            if (fflush(stdout)) die(1, "cannot write standard output: %s", strerror(errno));
            return 0;
        }
        if (!strcmp(argv[i], "--size")) size_text = next_value(argv, &i);
        else if (!strcmp(argv[i], "--givens")) givens_text = next_value(argv, &i);
        else if (!strcmp(argv[i], "--count")) count_text = next_value(argv, &i);
        else if (!strcmp(argv[i], "--seed")) seed_text = next_value(argv, &i);
        else if (!strcmp(argv[i], "--output")) shard.path = next_value(argv, &i);
        else if (!strcmp(argv[i], "--tokenizer")) tokenizer.path = next_value(argv, &i);
        else die(2, "unknown option '%s'; try --help", argv[i]);
    }
    if (!size_text) die(2, "--size is missing; try --help");
    if (strcmp(size_text, "4") && strcmp(size_text, "6") && strcmp(size_text, "9")) {
        die(2, "--size needs 4, 6 or 9, not '%s'", size_text);
    }
    prepare(*size_text - '0');
    int givens = givens_text ? (int)number("--givens", givens_text, 1, (uint64_t)cells) : 0;
    int tokens_each = givens ? 2 * cells : cells; // the header of a shard has an int32 for all of them
    uint32_t count = count_text ? (uint32_t)number("--count", count_text, 1, (uint64_t)(INT32_MAX / tokens_each)) : 1000;
    uint64_t seed = seed_text ? number("--seed", seed_text, 0, UINT64_MAX) : 1;
    if (!shard.path && !tokenizer.path) die(2, "nothing to write: give --output or --tokenizer; try --help");
    if (!shard.path && (givens_text || count_text || seed_text)) {
        die(2, "%s needs --output", givens_text ? "--givens" : count_text ? "--count" : "--seed");
    }
    if (shard.path) shard.temporary = join(shard.path, ".tmp");
    if (tokenizer.path) tokenizer.temporary = join(tokenizer.path, ".tmp");
    if (shard.path && tokenizer.path &&
        (same_file(shard.path, tokenizer.path) || same_file(shard.temporary, tokenizer.path) ||
         same_file(shard.path, tokenizer.temporary))) {
        die(2, "--output and --tokenizer would overwrite each other; choose other names");
    }

#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a limit on file sizes is then an error like a full disk
#endif
    if (tokenizer.path) start(&tokenizer);
    if (shard.path) start(&shard);
    if (tokenizer.path) {
        write_tokenizer(&tokenizer, size);
        finish(&tokenizer);
    }
    if (shard.path) {
        put_header(&shard, SHARD_MAGIC, 1, count * (uint32_t)tokens_each, 0);
        uint64_t key = mix(mix(seed + GOLDEN) + (uint64_t)givens + GOLDEN);
        for (uint32_t i = 0; i < count; i++) {
            Random r = {mix(key + i + GOLDEN), 0};
            Board puzzle, board;
            if (givens) random_puzzle(&puzzle, &board, givens, &r);
            else random_board(&board, &r);
            if (givens) write_row(&shard, &puzzle);
            write_row(&shard, &board);
        }
        finish(&shard);
    }
    if (tokenizer.path) commit(&tokenizer);
    if (shard.path) commit(&shard);
    return 0;
}
