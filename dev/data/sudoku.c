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
#define PROGRAM "sudoku"
#define OUTPUT "file"
#include "generator.h" // errors, command line, files, random numbers
#include <libgen.h>

enum { MAX_SIZE = 9, MAX_CELLS = MAX_SIZE * MAX_SIZE };
enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328 };
enum { MAX_ATTEMPTS = 10000 }; // boards tried for one puzzle: enough for 4, 8 and 21 givens (by size)

// ------------------------------------------------------------------------------------------------
// Files

static Output shard, tokenizer; // path is NULL if the file was not asked for

// Are these two names of one file, there or not? "a" and "./a" are: the same name in the same folder.
static int same_file(const char *a, const char *b) {
    char *parts[4] = {join(a, ""), join(a, ""), join(b, ""), join(b, "")}; // dirname writes into them
    struct stat x, y;
    int same = !strcmp(basename(parts[0]), basename(parts[2])) && !stat(dirname(parts[1]), &x) &&
               !stat(dirname(parts[3]), &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
    for (int i = 0; i < 4; i++) free(parts[i]);
    return same;
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
        if (r) for (int skip = random_below(r, set_size[left]); skip > 0; skip--) from &= (Mask)(from - 1);
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
            int j = random_below(r, i + 1);
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
        else if (!strcmp(argv[i], "--output")) output_to(&shard, next_value(argv, &i));
        else if (!strcmp(argv[i], "--tokenizer")) output_to(&tokenizer, next_value(argv, &i));
        else die(2, "unknown option '%s'; try --help", argv[i]);
    }
    if (!size_text) die(2, "--size is missing; try --help");
    if (strcmp(size_text, "4") && strcmp(size_text, "6") && strcmp(size_text, "9")) {
        die(2, "--size needs 4, 6 or 9, not '%s'", size_text);
    }
    prepare(*size_text - '0');
    int givens = givens_text ? (int)whole_number("--givens", givens_text, 1, (uint64_t)cells) : 0;
    int tokens_each = givens ? 2 * cells : cells; // the header of a shard has an int32 for all of them
    uint32_t count = count_text ? (uint32_t)whole_number("--count", count_text, 1, (uint64_t)(INT32_MAX / tokens_each)) : 1000;
    uint64_t seed = seed_text ? whole_number("--seed", seed_text, 0, UINT64_MAX) : 1;
    if (!shard.path && !tokenizer.path) die(2, "nothing to write: give --output or --tokenizer; try --help");
    if (!shard.path && (givens_text || count_text || seed_text)) {
        die(2, "%s needs --output", givens_text ? "--givens" : count_text ? "--count" : "--seed");
    }
    if (shard.path && tokenizer.path &&
        (same_file(shard.path, tokenizer.path) || same_file(shard.temporary, tokenizer.path) ||
         same_file(shard.path, tokenizer.temporary))) {
        die(2, "--output and --tokenizer would overwrite each other; choose other names");
    }

    if (tokenizer.path) start(&tokenizer);
    if (shard.path) start(&shard);
    if (tokenizer.path) {
        write_tokenizer(&tokenizer, size);
        finish(&tokenizer);
    }
    if (shard.path) {
        put_header(&shard, SHARD_MAGIC, 1, count * (uint32_t)tokens_each, 0);
        uint64_t key = hash(hash(0, seed), (uint64_t)givens);
        for (uint32_t i = 0; i < count; i++) {
            Random r = {hash(key, i), 0};
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
