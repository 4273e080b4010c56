/*
 * sudoku.c - writes Sudoku boards and puzzles as token shards, the training data for a masked
 * diffusion model.
 *
 * In text, a masked word often has several right answers. A Sudoku puzzle has exactly one, and a
 * few rules decide it, so one can count how often a model is right. Each digit that is found helps
 * to find the next one, so looping over the same layers should pay here.
 *
 *   cc -std=c11 -O2 -o sudoku sudoku.c
 *   ./sudoku --size 6 --count 100000 --seed 1 --output boards.bin --tokenizer sudoku.tok
 *   ./sudoku --size 6 --givens 12 --count 1000 --seed 2 --output puzzles.bin
 *   ./sudoku --size 9 --from hard.csv --output hard.bin
 *
 * --help lists the options. A sequence of the shard is the size*size cells of a board, from left to
 * right and top to bottom: token 0 is a blank, ".", and tokens 1 .. size are the digits. (The last
 * token, <|endoftext|>, exists because the format of the tokenizer needs one; no sequence uses it.)
 * Without --givens the shard holds one full board after the other. With --givens each puzzle is
 * followed by its solution. --from takes puzzles from a text file: a line is a puzzle, with . or 0
 * for a blank, a comma, and its solution; the first line may name the columns. README.md in this
 * folder describes the formats.
 *
 * Sequence i depends only on the size, the seed, --givens and i. Every machine writes the same
 * file, and a larger --count only adds sequences at the end. The boards and the puzzles of one seed
 * are drawn independently. But there are only 288 boards of size 4 and 28,200,960 of size 6, so
 * many 4x4 boards and a few 6x6 boards of a test set are in a training set too. Of size 9 there are
 * 6.7e21.
 */
#define PROGRAM "sudoku"
#define OUTPUT "file"
#include "generator.h" // errors, command line, files, random numbers
#include <libgen.h>

enum { MAX_SIZE = 9, MAX_CELLS = MAX_SIZE * MAX_SIZE };
enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328 };

// Boards that the program tries for one puzzle. This is enough for 4, 8 and 21 givens (by size).
enum { MAX_ATTEMPTS = 10000 };

// ------------------------------------------------------------------------------------------------
// Files

static Output shard, tokenizer; // path is NULL if the user did not ask for the file

// Returns 1 if a and b are two names of one file, whether it exists or not. "a" and "./a" are: the
// same name in the same folder.
static int same_file(const char *a, const char *b) {
    // dirname() and basename() change their argument, so each gets its own copy.
    char *copies[4] = {join(a, ""), join(a, ""), join(b, ""), join(b, "")};
    struct stat x, y;
    int same = !strcmp(basename(copies[0]), basename(copies[2])) && !stat(dirname(copies[1]), &x) &&
               !stat(dirname(copies[3]), &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
    for (int i = 0; i < 4; i++) free(copies[i]);
    return same;
}

// Writes the lowest bytes of value, little-endian on every machine.
static void put(const Output *out, uint32_t value, int bytes) {
    for (; bytes > 0; bytes--) {
        if (putc((int)(value & 255), out->file) == EOF) cannot_write(out);
        value >>= 8;
    }
}

static void put_header(const Output *out, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t used[] = {a, b, c, d};
    for (int i = 0; i < HEADER_INTS; i++) put(out, i < 4 ? used[i] : 0, 4);
}

static void write_tokenizer(const Output *out, int size) {
    static const char eot[] = "<|endoftext|>";
    // version 2, the size of the vocabulary, the id of end-of-text
    put_header(out, TOKENIZER_MAGIC, 2, (uint32_t)size + 2, (uint32_t)size + 1);

    // Each token is its length and its bytes.
    for (int id = 0; id <= size; id++) {
        put(out, 1, 1);
        put(out, id ? (uint32_t)('0' + id) : '.', 1);
    }
    put(out, sizeof eot - 1, 1);
    for (const char *p = eot; *p; p++) put(out, (uint32_t)*p, 1);
}

// ------------------------------------------------------------------------------------------------
// Boards. A set of digits is one number: digit d is the bit 1 << (d-1). So three masks give the
// candidates for a cell.

typedef uint16_t Mask;

typedef struct {
    Mask cell[MAX_CELLS];       // the digit of each cell, 0 if the cell is blank
    Mask used[3][MAX_SIZE];     // the digits in each row, column and box
    uint8_t blank[MAX_CELLS];   // the blank cells, in any order
    int blanks;
} Board;

static int size, cells;
static uint8_t unit[3][MAX_CELLS];        // the row, column and box of each cell
static uint8_t set_size[1 << MAX_SIZE];   // number of digits in a set

// Fills the tables above for boards of this size.
static void prepare(int board_size) {
    size = board_size;
    cells = size * size;
    int height = size == 9 ? 3 : 2; // boxes: 2x2, 2 rows x 3 columns, 3x3
    int width = size / height;

    for (int c = 0; c < cells; c++) {
        int row = c / size;
        int column = c % size;
        unit[0][c] = (uint8_t)row;
        unit[1][c] = (uint8_t)column;
        // size / width boxes stand side by side, and size / width is `height`.
        unit[2][c] = (uint8_t)(row / height * height + column / width);
    }

    // A set has the digits of set >> 1, which is counted already, and maybe the lowest one.
    for (int set = 1; set < 1 << MAX_SIZE; set++) {
        set_size[set] = (uint8_t)(set_size[set >> 1] + (set & 1));
    }
}

// Returns the digits that are neither in the row, nor in the column, nor in the box of cell c.
static Mask candidates(const Board *b, int c) {
    int used = b->used[0][unit[0][c]] | b->used[1][unit[1][c]] | b->used[2][unit[2][c]];
    return (Mask)(((1 << size) - 1) & ~used);
}

// Puts a digit into an empty cell, or removes it again. The caller keeps the list of blanks.
static void flip(Board *b, int c, Mask digit) {
    b->cell[c] ^= digit;
    for (int k = 0; k < 3; k++) b->used[k][unit[k][c]] ^= digit;
}

// Returns the index in b->blank of a cell with the fewest candidates. There an error shows soonest.
static int most_constrained(const Board *b) {
    int best = 0;
    int fewest = MAX_SIZE + 1;

    // One candidate is as good as none: both cost no guess.
    for (int i = 0; i < b->blanks && fewest > 1; i++) {
        int n = set_size[candidates(b, b->blank[i])];
        if (n < fewest) {
            best = i;
            fewest = n;
        }
    }
    return best;
}

// Fills the blanks by backtracking. Returns 1, or 0 if there is no solution; then the blanks are
// blank again. It tries the digits in ascending order or, with r, in random order.
static int solve(Board *b, Random *r) {
    if (!b->blanks) return 1;

    // Move the cell to the end of the list and shorten the list by one. Deeper calls permute only
    // what is before it, so b->blanks++ below brings it back.
    int i = most_constrained(b);
    int last = --b->blanks;
    uint8_t c = b->blank[i];
    b->blank[i] = b->blank[last];
    b->blank[last] = c;

    for (Mask left = candidates(b, c); left;) {
        // The digit to try: the lowest bit of `from`, after the removal of some low bits.
        Mask from = left;
        int skip = r ? random_below(r, set_size[left]) : 0;
        for (; skip > 0; skip--) from &= (Mask)(from - 1);
        Mask digit = (Mask)(from & -from);

        flip(b, c, digit);
        if (solve(b, r)) return 1;
        flip(b, c, digit);
        left ^= digit;
    }
    b->blanks++; // no digit fits: the cell is blank again
    return 0;
}

// Makes a full board. Every board can come, but not with exactly the same probability: a digit that
// leaves few solutions is as likely as one that leaves many. Of the 4x4 boards, the rarest comes
// 0.73 times and the most frequent 1.53 times as often as the mean.
static void random_board(Board *b, Random *r) {
    memset(b, 0, sizeof *b);

    // An empty board, of which each cell is blank. Then any solution is a full board.
    for (int c = 0; c < cells; c++) b->blank[c] = (uint8_t)c;
    b->blanks = cells;
    solve(b, r);
}

// Makes cell c blank if the puzzle still has only one solution then, and returns whether it did.
// The known solution is one, so the question is only: is there one with another digit in c?
static int remove_cell(Board *b, int c) {
    Mask digit = b->cell[c];
    Board other = *b;
    flip(&other, c, digit); // empty

    // Take the lowest digit of `left` in turn, until none is left.
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

// Makes a puzzle with exactly one solution, and the solution. It visits the cells of a board once,
// in random order: a cell that is needed now is still needed when fewer other cells are given.
static void random_puzzle(Board *puzzle, Board *solution, int givens, Random *r) {
    for (int attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
        random_board(solution, r);
        *puzzle = *solution;

        uint8_t order[MAX_CELLS]; // a random permutation of the cells
        for (int i = 0; i < cells; i++) {
            int j = random_below(r, i + 1);
            order[i] = order[j];
            order[j] = (uint8_t)i;
        }
        // If more cells are needed than are to be given, this board makes no such puzzle.
        int needed = 0;
        for (int i = 0; puzzle->blanks < cells - givens && needed <= givens; i++) {
            needed += !remove_cell(puzzle, order[i]);
        }
        if (puzzle->blanks == cells - givens) return;
    }
    die(1, "no puzzle with %d givens found in %d attempts: choose more givens",
        givens, MAX_ATTEMPTS);
}

// Writes the cells of a board as tokens of two bytes: 0 for a blank, else the digit.
static void write_board(const Output *out, const Board *b) {
    for (int c = 0; c < cells; c++) {
        int digit = 0; // the number of the bit, from 1: mask 0b100 is digit 3
        for (Mask bit = b->cell[c]; bit; bit >>= 1) digit++;
        put(out, (uint32_t)digit, 2);
    }
}

static void write_shard(const Output *out, uint32_t count, uint64_t seed, int givens) {
    int tokens_each = givens ? 2 * cells : cells;
    put_header(out, SHARD_MAGIC, 1, count * (uint32_t)tokens_each, 0);

    // --givens is a part of the key, so a puzzle is not the board with the same index.
    uint64_t key = hash(hash(0, seed), (uint64_t)givens);

    for (uint32_t i = 0; i < count; i++) {
        Random r = {hash(key, i), 0};
        Board puzzle, board;
        if (givens) {
            random_puzzle(&puzzle, &board, givens, &r);
            write_board(out, &puzzle);
        } else {
            random_board(&board, &r);
        }
        write_board(out, &board);
    }
}

// Reads the cells of a board from text. Returns where it ends, or NULL if it is no board.
static const char *read_board(Board *b, const char *text) {
    memset(b, 0, sizeof *b);
    for (int c = 0; c < cells; c++, text++) {
        int digit = *text == '.' ? 0 : *text - '0';
        if (digit < 0 || digit > size) return NULL;
        Mask bit = (Mask)(digit ? 1 << (digit - 1) : 0);
        if (bit & ~candidates(b, c)) return NULL; // twice in a row, column or box
        flip(b, c, bit);
        b->blanks += !digit;
    }
    return text;
}

// Writes the first `most` puzzles of a file, with their solutions.
static void write_puzzles_of(const Output *out, FILE *file, const char *path, uint32_t most) {
    put_header(out, SHARD_MAGIC, 1, 0, 0); // the number of tokens comes at the end
    char *line = NULL;
    size_t room = 0;
    uint32_t count = 0;
    for (int number = 1; count < most && getline(&line, &room, file) > 0; number++) {
        line[strcspn(line, "\r\n")] = 0;
        if (!*line || (number == 1 && isalpha((unsigned char)*line))) continue; // names of columns
        Board puzzle, solution;
        const char *end = read_board(&puzzle, line);
        end = end && *end == ',' ? read_board(&solution, end + 1) : NULL;
        int right = end && (!*end || *end == ',') && !solution.blanks;
        for (int c = 0; right && c < cells; c++) {
            right = !puzzle.cell[c] || puzzle.cell[c] == solution.cell[c];
        }
        if (!right) {
            die(1, "%s, line %d: not a puzzle, a comma and its solution, of %d cells each", path,
                number, cells);
        }
        write_board(out, &puzzle);
        write_board(out, &solution);
        count++;
    }
    if (count < most && !feof(file)) die(1, "cannot read %s: %s", path, strerror(errno));
    if (!count) die(1, "%s has no puzzle", path);
    free(line);
    if (fseek(out->file, 0, SEEK_SET)) cannot_write(out);
    put_header(out, SHARD_MAGIC, 1, count * 2 * (uint32_t)cells, 0);
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: sudoku --size N [--output FILE] [--givens N | --from FILE] [--count N] [--seed N] "
    "[--tokenizer FILE]\n"
    "Writes random Sudoku boards, or puzzles with exactly one solution, as a token shard.\n"
    "  --size N          4, 6 or 9 digits; boxes of 2x2, 2x3 (2 rows, 3 columns) or 3x3\n"
    "  --output FILE     where to write the shard\n"
    "  --givens N        write puzzles with N given cells, each followed by its solution\n"
    "                    (default: only full boards)\n"
    "  --from FILE       write puzzles of a text file: a puzzle, a comma and its solution a line\n"
    "  --count N         how many boards or puzzles, at least 1 (default 1000; of --from: all)\n"
    "  --seed N          which ones, 0 to 2^64-1 (default 1)\n"
    "  --tokenizer FILE  where to write the tokenizer\n"
    "  --help            show this text\n";

// The values of the options as the user wrote them; NULL: not given.
static const char *size_text, *givens_text, *count_text, *seed_text, *from;

static void parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            if (fflush(stdout)) die(1, "cannot write standard output: %s", strerror(errno));
            exit(0);
        }
        if (!strcmp(name, "--size")) size_text = next_value(argv, &i);
        else if (!strcmp(name, "--givens")) givens_text = next_value(argv, &i);
        else if (!strcmp(name, "--count")) count_text = next_value(argv, &i);
        else if (!strcmp(name, "--seed")) seed_text = next_value(argv, &i);
        else if (!strcmp(name, "--from")) from = next_value(argv, &i);
        else if (!strcmp(name, "--output")) output_to(&shard, next_value(argv, &i));
        else if (!strcmp(name, "--tokenizer")) output_to(&tokenizer, next_value(argv, &i));
        else die(2, "unknown option '%s'; try --help", name);
    }
}

// Exits if there is nothing to write, an option has no effect, or the two output files would
// overwrite each other. A file that has the name of the other one's FILE.tmp counts too.
static void check_files(void) {
    if (!shard.path && !tokenizer.path) {
        die(2, "nothing to write: give --output or --tokenizer; try --help");
    }
    if (!shard.path && givens_text) die(2, "--givens needs --output");
    if (!shard.path && count_text) die(2, "--count needs --output");
    if (!shard.path && seed_text) die(2, "--seed needs --output");
    if (!shard.path && from) die(2, "--from needs --output");
    if (from && (givens_text || seed_text)) die(2, "--from excludes --givens and --seed");
    const Output *outputs[] = {&shard, &tokenizer};
    for (int i = 0; from && i < COUNT(outputs); i++) {
        const Output *out = outputs[i];
        if (out->path && (same_file(from, out->path) || same_file(from, out->temporary))) {
            die(2, "%s would overwrite --from; choose another name", out->path);
        }
    }
    if (shard.path && tokenizer.path &&
        (same_file(shard.path, tokenizer.path) || same_file(shard.temporary, tokenizer.path) ||
         same_file(shard.path, tokenizer.temporary))) {
        die(2, "--output and --tokenizer would overwrite each other; choose other names");
    }
}

int main(int argc, char **argv) {
    parse(argc, argv);
    if (!size_text) die(2, "--size is missing; try --help");
    if (strcmp(size_text, "4") && strcmp(size_text, "6") && strcmp(size_text, "9")) {
        die(2, "--size needs 4, 6 or 9, not '%s'", size_text);
    }
    prepare(*size_text - '0');

    int givens = 0; // 0: full boards
    uint32_t count = 1000;
    uint64_t seed = 1;
    if (givens_text) givens = (int)whole_number("--givens", givens_text, 1, (uint64_t)cells);
    // The header of a shard counts the tokens in an int32.
    uint64_t most = (uint64_t)(INT32_MAX / (givens || from ? 2 * cells : cells));
    if (from) count = (uint32_t)most;
    if (count_text) {
        count = (uint32_t)whole_number("--count", count_text, 1, most);
    }
    if (seed_text) seed = whole_number("--seed", seed_text, 0, UINT64_MAX);
    check_files();

    FILE *puzzles = NULL;
    if (from && !(puzzles = fopen(from, "r"))) {
        die(1, "cannot open %s: %s; choose another --from", from, strerror(errno));
    }

    // Finish both files before the first gets its name: they belong together.
    if (tokenizer.path) start(&tokenizer);
    if (shard.path) start(&shard);
    if (tokenizer.path) {
        write_tokenizer(&tokenizer, size);
        finish(&tokenizer);
    }
    if (shard.path) {
        if (from) write_puzzles_of(&shard, puzzles, from, count);
        else write_shard(&shard, count, seed, givens);
        finish(&shard);
    }
    if (puzzles) fclose(puzzles);
    if (tokenizer.path) commit(&tokenizer);
    if (shard.path) commit(&shard);
    return 0;
}
