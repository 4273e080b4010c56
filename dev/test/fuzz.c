/*
Fuzz test: gives the program damaged files and senseless options, and checks how it refuses them.

    fuzz N [SEED]               inputs 0 .. N-1, on all cores; 100,000 take some minutes
    fuzz --only NUMBER [SEED]   one of them again, with its command and what it says

Each input is a command line and the files that it reads. It depends only on SEED and its number. It
runs in a child process, which calls main() of dev/tools.c. Built with sanitizers, because a read
behind an array need not crash. What is checked:

  - no crash, no report of a sanitizer, no hang
  - a refused input gives exactly one line on standard error, "loopmdm: ...", and status 1 or 2
  - a file whose checksum, size or tokens are surely wrong is not accepted
  - no file is lost or changed, but those that the command is there to write; no .tmp file is left
  - of each kind of inputs some are refused and some accepted, or the test would reach nothing

At the end comes a line for each kind, then "N passed, N failed". Exit status 1 if one failed. The
files of a failed input are kept in build/fuzz_failed/NUMBER.
*/
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

// ---- what the program calls in the place of the C library ----

enum { MOST_MEMORY = 8 << 20, MOST_SECONDS = 60 };
static int until_failure; // allocation number until_failure fails, from 1; 0: none

// An accepted input is small, so one that needs much memory must find the program's own words.
static int no_memory(size_t bytes) {
    return bytes > MOST_MEMORY || (until_failure && !--until_failure);
}

static void *limited_malloc(size_t bytes) { return no_memory(bytes) ? NULL : malloc(bytes); }
static void *limited_realloc(void *old, size_t bytes) {
    return no_memory(bytes) ? NULL : realloc(old, bytes);
}
static void *limited_aligned_alloc(size_t alignment, size_t bytes) {
    return no_memory(bytes) ? NULL : aligned_alloc(alignment, bytes);
}

#define malloc limited_malloc
#define realloc limited_realloc
#define aligned_alloc limited_aligned_alloc
#define fsync(file) 0 // no power fails here
#define exit(status) leave(status)
#define main loopmdm_main
__attribute__((noreturn)) static void leave(int status);
#include "dev/tools.c"
#undef malloc
#undef realloc
#undef aligned_alloc
#undef exit
#undef main

// Without the sanitizers' work at the end of a process, which takes as long as the rest.
static void leave(int status) {
    fflush(NULL);
    _exit(status);
}

// Freed memory is used again at once: a child that touches less of it is made and ended sooner.
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "detect_leaks=0:exitcode=99:quarantine_size_mb=0:thread_local_quarantine_size_kb=0";
}

// ---- random numbers: input `number` always draws the same ----

static uint64_t seed = 1, number, draws;

static int below(int n) { return (int)(random_bits(seed, number, 0, draws++) % (uint64_t)n); }
static int chance(int percent) { return below(100) < percent; }
#define ONE_OF(array) ((array)[below(COUNT(array))])

static int edge(void) { // an integer that may be a limit of something
    static const int edges[] = {
        0, 1, -1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 64, 127, 128, 255, 256, 257, 1024, 1025, 65535,
        65536, 65537, 100000, INT_MAX, INT_MAX - 1, INT_MIN
    };
    int which = below(8);
    if (which == 0) return (int)random_bits(seed, number, 1, draws++);
    if (which == 1) return (int)(1u << below(32));
    return which < 5 ? below(9) : ONE_OF(edges);
}

// ---- files ----

enum { STATE, MODEL, LOG, TOKENS, DATA, ROWS, BOARDS, BYTES, STORY, BLANKS, OLD, NUM_FILES };
static const char *const names[NUM_FILES] = {
    "m/state.bin", "m/model.bin", "m/log.csv", "m/tokenizer.bin", "data.bin", "rows.bin",
    "boards.bin", "bytes.tok", "story.txt", "blanks.txt", "old.csv"
};
enum { ROOM = 1 << 17 }; // bytes for a file
typedef struct {
    unsigned char *bytes;
    size_t size;
    int absent, touched; // there is no such file; it is not as in good[]
} File;
static unsigned char good_bytes[NUM_FILES][ROOM], file_bytes[NUM_FILES][ROOM];
static File good[NUM_FILES]; // as the program takes them
static File file[NUM_FILES]; // those of this input

static void write_bytes(const char *path, const File *f) {
    if (f->absent) {
        unlink(path);
        return;
    }
    int to = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (to < 0 || write(to, f->bytes, f->size) != (ssize_t)f->size)
        die(FAILED, "cannot write %s: %s", path, strerror(errno));
    close(to);
}

static void read_bytes(const char *path, File *f) { // absent: there is no such file
    int from = open(path, O_RDONLY);
    ssize_t n = from < 0 ? 0 : read(from, f->bytes, ROOM);
    f->absent = from < 0;
    f->size = n < 0 ? 0 : (size_t)n;
    if (from >= 0) close(from);
}

static void append(File *f, const void *bytes, size_t n) {
    if (f->size + n > ROOM) return;
    memcpy(f->bytes + f->size, bytes, n);
    f->size += n;
}

static void append_token(File *f, const char *bytes, size_t n) {
    unsigned char length = (unsigned char)n;
    append(f, &length, 1);
    append(f, bytes, n);
}

// For a tokenizer of all bytes, or of those of plain text: then c has id c - 32.
enum { NEWLINE_ID = 95, EOT_ID = 96, BYTES_EOT_ID = 256, VOCABULARY = 96 + 15 };
static void make_tokenizer(File *f, int all_bytes) {
    static const char *const more[] = {
        "<|endoftext|>", "<|sep|>", " t", "he", " the", "in", "er", "12", "##", "####", " a", "__",
        "\xc3", "\xa9", "\xc3\xa9"
    }; // 15
    int header[HEADER_INTS] = {TOKENIZER_MAGIC, 2, 0, all_bytes ? BYTES_EOT_ID : EOT_ID};
    header[2] = (all_bytes ? 256 : 96) + COUNT(more);
    append(f, header, sizeof header);
    for (int i = 0; i < (all_bytes ? 256 : 96); i++) {
        char c = (char)(all_bytes ? i : i + 32);
        if (!all_bytes && i == NEWLINE_ID) c = '\n';
        append_token(f, &c, 1);
    }
    for (int i = 0; i < COUNT(more); i++) append_token(f, more[i], strlen(more[i]));
}

// A shard with this text (a character is a token, ~ is end-of-text) n times.
static void make_shard(File *f, const char *text, int n) {
    int length = (int)strlen(text), header[HEADER_INTS] = {SHARD_MAGIC, 1, n * length};
    append(f, header, sizeof header);
    for (int i = 0; i < n * length; i++) {
        int c = text[i % length];
        uint16_t id = (uint16_t)(c == '~' ? EOT_ID : c - 32);
        append(f, &id, sizeof id);
    }
}

// The file, to be damaged.
static File *use(int k) {
    file[k].touched = 1;
    return &file[k];
}

static char *args[64], args_room[1 << 17];
static int count_args, args_used, file_limit; // file_limit: most bytes of a file, or -1

static int has(const char *word) {
    for (int i = 0; i < count_args; i++)
        if (!strcmp(args[i], word)) return 1;
    return 0;
}

// ---- damage ----

static int must_refuse; // the file is surely damaged

// Without knowing what the file is.
static void spoil(File *f) {
    int size = max_int(1, (int)f->size), at = below(chance(40) ? min_int(size, 80) : size);
    int length = min_int(1 + below(16), size - at), how = below(6), *numbers = (int *)f->bytes;
    if (how == 0) f->size = at;
    else if (how == 1) memset(f->bytes + at, chance(50) ? 0xff : 0, length);
    else if (how == 2) numbers[below(16)] = edge();
    else if (how == 3) memmove(f->bytes + at, f->bytes + below(size - length + 1), length);
    for (int i = below(40); how == 4 && i > 0; i--) append(f, f->bytes + at, 1);
    for (int i = 1 + below(4); how == 5 && i > 0; i--) f->bytes[below(size)] ^= 1 << below(8);
    f->absent = chance(3);
}

// The checksum of a damaged checkpoint made right again, so that the damage gets past it.
static void seal(File *f) {
    int *header = (int *)f->bytes;
    header[AT_CRC] = 0;
    header[AT_CRC] = (int)crc32(0, f->bytes, f->size);
}

// Gives a checkpoint the size that its header asks for, if that is possible and small.
static void fit(File *f, int parts) {
    Config c;
    Model m;
    memcpy(&c, f->bytes + 4 * AT_CONFIG, sizeof c);
    if (config_error(c) || c.max_seq_len > 300) return;
    model_build(&m, c);
    if (m.params.total > 6000) return;
    size_t size = 4 * (HEADER_INTS + parts * m.params.total), floats = 4 * HEADER_INTS;
    for (size_t i = f->size; i < size; i++) f->bytes[i] = f->bytes[floats + i % 4096];
    f->size = size;
}

static void damage_checkpoint(int k) {
    static const float values[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e20f, 1e-42f, 0, 1};
    File *f = use(k);
    int *header = (int *)f->bytes, how = below(5), floats = (int)f->size / 4 - HEADER_INTS;
    int *V = header + AT_CONFIG + 1;
    if (how == 0) header[AT_CONFIG + below(9)] = edge();
    if (how == 0 && chance(70)) V[1] = padded(V[0]);
    if (how == 1) header[below(20)] = edge();
    if (how < 2 && chance(80)) fit(f, k == MODEL ? 1 : 3 + !!((State *)f->bytes)->has_average);
    if (how == 2) { // a run of parameters
        int at = below(floats), n = below(chance(20) ? floats - at : min_int(20, floats - at)) + 1;
        float value = ONE_OF(values);
        for (int i = at; i < at + n; i++) memcpy(header + HEADER_INTS + i, &value, sizeof value);
    }
    if (how > 2) spoil(f);
    if (f->size >= 4 * HEADER_INTS && chance(75)) {
        seal(f);
        return;
    }
    int same = f->size == good[k].size && !memcmp(f->bytes, good[k].bytes, f->size);
    must_refuse = !same && (k == STATE || !has("--resume")); // which only looks at model.bin's step
}

static void damage_shard(int k) {
    static const char likely[] = "0123456789=#.~ +-,";
    File *f = use(k);
    int *header = (int *)f->bytes, how = below(6), count = header[2], cut = below(count + 1);
    uint16_t *tokens = (uint16_t *)(header + HEADER_INTS);
    if (how == 0) header[2] = chance(50) ? edge() : count + below(3) - 1;
    if (how == 1) tokens[below(count)] = (uint16_t)edge();
    if (how == 2) { // fewer tokens, as the header says
        header[2] = k == DATA ? cut : cut / 16 * 16;
        f->size = 4 * HEADER_INTS + 2 * (size_t)header[2];
    }
    for (int i = 1 + below(5); how > 2 && i > 0; i--)
        tokens[below(count)] = (uint16_t)(likely[below(COUNT(likely) - 1)] - 32);
    if (how > 2 && chance(30)) spoil(f);

    if (k != DATA || f->absent) return; // some commands read only one of the others
    must_refuse = f->size != 4 * HEADER_INTS + 2 * (size_t)header[2];
    for (int i = 0; !must_refuse && i < header[2]; i++) must_refuse = tokens[i] >= VOCABULARY;
}

// Writes the tokens anew, some of them changed.
static void damage_tokenizer(int k) {
    File *f = use(k);
    const File *from = &good[k];
    int *header = (int *)f->bytes, change = below(8), percent = chance(20) ? 100 : 4, count = 0;
    char token[256] = "";
    size_t n = 0;
    f->size = 4 * HEADER_INTS;
    for (size_t at = f->size; at < from->size; at += 1 + from->bytes[at]) {
        int hit = chance(percent);
        if (hit && change == 6) continue; // left out
        if (!hit || change != 5) n = from->bytes[at]; // else it is the one before again
        if (!hit || change != 5) memcpy(token, from->bytes + at + 1, n);
        if (hit && change == 0) n = below(n + 1);
        if (hit && change == 1) n = (size_t)sprintf(token, "<|%d|>", count);
        if (hit && change == 2) n = 255;
        if (hit && change == 3) token[0] = (char)below(256);
        append_token(f, token, n);
        if (hit && change == 4) append_token(f, token, n);
        count += 1 + (hit && change == 4);
    }
    header[2] = chance(85) ? count : edge();
    if (chance(30)) header[3] = chance(50) ? below(count + 1) : edge();
    if (chance(20)) header[1] = edge();
    if (chance(25)) spoil(f);
}

// Text of up to n pieces, of which most are ordinary.
static void make_text(File *f, int n, int any_byte) {
    static const char *const plain[] = {
        "the", " ", " cat", "\n", "____", "___", " ________ ", "'s", "12", "#### 7", ", ", "=", "."
    };
    static const char *const strange[] = {
        "<|endoftext|>", "<|sep|>", "<|", "|>", "\r\n", "\xef\xbb\xbf", "\xff", "\xc3\xa9", "\xc3",
        "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf0\x9f\x98\x80", "\xe3\x80\x80", "\xc2\x85", "\t",
        "\x01", "\x7f", "\x1b[2J", "\n\n", "99999999999999999999", "-1", "_____"
    };
    static const int percents[] = {0, 5, 50};
    int percent = ONE_OF(percents);
    f->size = 0;
    for (int i = below(n + 1); i > 0; i--) {
        const char *piece = chance(percent) ? ONE_OF(strange) : ONE_OF(plain);
        int byte = below(256), times = chance(1) ? below(2000) : 1; // a long run now and then
        for (; times > 0; times--) append(f, piece, strlen(piece));
        if (any_byte && chance(percent) && chance(20)) append(f, &byte, 1);
    }
}

// ---- commands ----

#define SHAPE "--model d2 --layers 2 --heads 2 --channels 8 --seq-len 16 --loop 0:1 --max-loops 3"
#define RECIPE " --tokenizer m/tokenizer.bin --batch 2 --warmup 1 " SHAPE
#define RESUME "train --resume --data data.bin --out m --steps 3" RECIPE
#define EVAL_ROWS "eval --model m --data rows.bin --rows 4 --loops 2 "
static const char *const plain[NUM_COMMANDS] = { // in the order of commands[]
    "train --data data.bin --out out/run --steps 1" RECIPE,
    "eval --model m --data data.bin --rows 3 --batch 2", "sample --model m --steps 3",
    "attention --model m --data data.bin --rows 2 --batch 2",
    "tokenize --tokenizer m/tokenizer.bin --input story.txt --output out/o.bin", "info --model m",
    "flops --model m"
};

// What reads the damaged file, by the kind of input: m model.bin, s state.bin, d data.bin, r rows,
// t tokenizer, b bytes.tok, n no memory or disk.
static const struct { const char *kinds, *command; } uses[] = {
    {"mdtn", "eval --model m --data data.bin --rows 2 --loops 1,3"},
    {"mn", "eval --model m --data data.bin --rows 3 --loops 2 --by-t out/a.csv --buckets 3"},
    {"m", "eval --model m --data data.bin --rows 2 --loops 2 --by-loop out/a.csv"},
    {"mn", "eval --model m --data data.bin --rows 3 --adaptive 0.2,0.01 --max-loops 3 --batch 2"},
    {"mn", "attention --model m --data data.bin --rows 2 --loops 2 --csv old.csv"},
    {"m", "sample --model m --steps 2 --loops 2 --watch --show-loops --order margin"},
    {"m", "sample --model m --order threshold --adaptive 0.1 --max-loops 3 -n 2 --block 3"},
    {"mn", "sample --model m --steps 2"}, {"mn", "info --model m"}, {"mn", "flops --model m"},
    {"mn", "train --data data.bin --init m --out out/run --steps 1" RECIPE},
    {"msssstnnn", RESUME}, {"sn", RESUME " --ema 0.9"},
    {"n", RESUME " --val-data data.bin --val-rows 2 --val-every 1 --save-every 1"},
    {"d", "eval --model m --rows 4 --loops 2 --data [dr]*.bin"},
    {"d", "attention --model m --rows 2 --loops 2 --data d*.bin"},
    {"dn", "train --data data.bin --out out/run --steps 1 --val-data data.bin --val-rows 2" RECIPE},
    {"d", "train --data *.bin --out out/run --steps 1 --fixed-rows" RECIPE},
    {"rrtn", EVAL_ROWS "--exact-match --answers-after = --steps 1,3"},
    {"r", EVAL_ROWS "--answers-after ="}, {"t", EVAL_ROWS},
    {"rtn", EVAL_ROWS "--sudoku --data boards.bin --steps 4"},
    {"r", EVAL_ROWS "--sudoku --data *s.bin"},
    {"r", "attention --model m --data rows.bin --rows 3 --loops 2 --answers-after ="},
    {"r", "train --data rows.bin --out out/run --steps 1 --answers-after =" RECIPE},
    {"r", "train --data boards.bin --out out/run --steps 1 --fixed-rows" RECIPE},
    {"b", "tokenize --tokenizer bytes.tok --input story.txt --output out/o.bin"},
    {"tt", "tokenize --tokenizer m/tokenizer.bin --text the_cat's<|sep|>12_==._<|"},
    {"t", "tokenize --tokenizer m/tokenizer.bin --input story.txt --output out/o.bin --rows-of 40"},
    {"n", "tokenize --tokenizer m/tokenizer.bin --input story.txt --output old.csv"},
    {"tn", "sample --model m --steps 4 --fill the____12____"},
    {"tn", "sample --model m --steps 9 --puzzle 12..34......21.. --watch"},
};

// One more argument. Its zero bytes end it, as they would for a shell.
static void add(const char *text, size_t n) {
    char *to = args_room + args_used;
    if (count_args + 1 == COUNT(args) || args_used + n + 1 > sizeof args_room) return;
    memcpy(to, text, n);
    to[n] = 0;
    args[count_args++] = to;
    args[count_args] = NULL;
    args_used += (int)n + 1;
}

static void add_words(const char *words) {
    for (size_t n; *words; words += n + strspn(words + n, " ")) {
        n = strcspn(words, " ");
        add(words, n);
    }
}

static void add_string(const char *text) { add(text, strlen(text)); }
static void add_file(const File *f) { add((const char *)f->bytes, f->size); }

static void new_command(void) {
    count_args = args_used = 0;
    add_string("loopmdm");
}

static void add_use(char kind) {
    int i = 0;
    do i = below(COUNT(uses));
    while (!strchr(uses[i].kinds, kind));
    add_words(uses[i].command);
}

// ---- kinds of inputs ----

static void damaged_model(void) { damage_checkpoint(MODEL); }

static void damaged_state(void) {
    damage_checkpoint(STATE);
    if (chance(20)) spoil(use(LOG));
    if (chance(10)) use(MODEL)->absent = 1;
}

static void damaged_shard(void) { damage_shard(DATA); }

static void damaged_rows(void) {
    static const char *const separators[] = {"+", " the", "<|sep|>", "<|endoftext|>", "zz", "~"};
    damage_shard(chance(50) ? ROWS : BOARDS);
    if (chance(90)) return;
    add_words("--answers-after");
    add_string(ONE_OF(separators));
}

static void damaged_tokenizer(void) {
    damage_tokenizer(TOKENS);
    int V = ((int *)file[TOKENS].bytes)[2], reads_model = has("eval") || has("sample");
    must_refuse = reads_model && V != VOCABULARY && !file[TOKENS].absent;
}

static void damaged_bytes(void) { // a tokenizer of all bytes
    damage_tokenizer(BYTES);
    make_text(use(STORY), 30, 1);
}

static void strange_text(void) {
    static const char *const outputs[] = {"out/o.bin", "out/o.bin", "old.csv", "story.txt"};
    File *f = use(STORY);
    add_words("tokenize --tokenizer");
    add_words(chance(70) ? "bytes.tok" : "m/tokenizer.bin");
    make_text(f, chance(20) ? 300 : 20, 1);
    if (chance(30)) {
        add_words("--text");
        add_file(f);
        return;
    }
    if (chance(10)) spoil(f);
    add_words("--input story.txt --output");
    add_words(ONE_OF(outputs));
    if (chance(30)) add_words(chance(80) ? "--rows-of 24" : "--rows-of 2");
}

static void strange_template(void) {
    static const char *const more[] = {
        "--order random", "--order entropy", "--order threshold --threshold 0.5", "--block 3",
        "--top-k 2", "--top-p 0.5", "--temperature 0", "-n 2", "--watch", "--length 9", "--loops 3"
    };
    static const char *const option[] = {"--fill", "--prompt", "--puzzle"};
    File *f = use(BLANKS);
    if (chance(15)) use(TOKENS)->absent = 1; // then the model takes ids
    make_text(f, 6, chance(50));
    add_words(plain[2]);
    if (chance(40)) {
        add_words("--fill-file blanks.txt");
        if (chance(10)) spoil(f);
    } else {
        add_words(ONE_OF(option));
        add_file(f);
    }
    for (int i = below(3); i > 0; i--) add_words(ONE_OF(more));
}

static void strange_board(void) {
    static const char cells[] = "..001234 \nx\xff~";
    static const char *const more[] = {
        "--steps 2", "--block 4", "--block 1", "--watch", "--watch --show-loops", "-n 2",
        "--tokenizer bytes.tok", "--length 16", "--fill ____", "--order threshold"
    };
    static const char *const sizes[] = {
        "................", "12..34......21..", "1234341221434321", ".........",
        "12..\n34..\n....\n..1."
    };
    File *f = use(BLANKS);
    const char *board = ONE_OF(sizes);
    f->size = 0;
    append(f, board, strlen(board));
    for (int i = below(4); i > 0; i--)
        f->bytes[below((int)f->size)] = (unsigned char)cells[below(COUNT(cells) - 1)];
    if (chance(10)) append(f, "1", 1);
    add_words("sample --model m --steps 16 --puzzle");
    add_file(f);
    for (int i = below(3); i > 0; i--) add_words(ONE_OF(more));
    if (chance(5)) use(TOKENS)->absent = 1;
}

// A number for an option, as text, or what is none.
static void write_number(char *to, size_t room, int command, const char *name) {
    static const char *const texts[] = {
        "0", "1", "-1", "2", "3", "4", "5", "8", "16", "17", "65535", "65536", "2147483647",
        "2147483648", "-2147483648", "4294967297", "9223372036854775807", "9223372036854775808",
        "-9223372036854775809", "1e400", "1e-400", "-0", "0.5", "1.5", "0.999", "1e3", "1e-9",
        "1e30", "nan", "-nan", "inf", "-inf", "0x10", "+3", " 3", "3 ", "007", "1,2", "3x", "x",
        "--steps", "\xff", "%s%n", "1\n2", "1e", ".", "-", "9999999999999999999999"
    };
    const char *text = texts[below(chance(40) ? 6 : COUNT(texts))];

    // These would be accepted, and take long.
    int slow = strstr(" layers channels vocab max-loops batch accum val-rows rows steps loops n ",
                      name) != NULL && command != INFO && command != FLOPS;
    double value = strtod(text, NULL);
    int unlimited = !strcmp(name, "n") || !strcmp(name, "steps");
    if (slow && value > 4 && (value < INT_MAX || unlimited)) text = "2";
    snprintf(to, room, "%s", text);
}

// What an option of text may have: names of files that suit it or do not, lists, anything.
static void add_value(int command, const char *name) {
    static const char *const values[][9] = {
        {"data", "data.bin", "[dr]*.bin", "*.bin", "nowhere", "m", "d*[", "/dev/null"},
        {"val-data", "data.bin", "rows.bin", "*", "nowhere", "m"},
        {"tokenizer", "m/tokenizer.bin", "bytes.tok", "story.txt", "nowhere", "m"},
        {"model", "m", "d2", "nano", "out", "nowhere", "./m/", "m/model.bin"},
        {"init", "m", "out", "nowhere", "/dev/null"},
        {"out", "out/run", "m", "data.bin", "m/model.bin/run", "out"},
        {"input", "story.txt", "nowhere", "m", "/dev/null"},
        {"output", "out/o.bin", "old.csv", "story.txt", "m", "nowhere/o", "/dev/null"},
        {"csv", "out/a.csv", "old.csv", "m/model.bin", "m/state.bin", "data.bin", "m"},
        {"by-t", "out/a.csv", "old.csv", "m/model.bin", "m/log.csv", "m/tokenizer.bin", "out"},
        {"by-loop", "out/a.csv", "old.csv", "m/state.bin", "data.bin", "nowhere/a", "/dev/full"},
        {"fill-file", "blanks.txt", "story.txt", "nowhere", "m", "data.bin"},
        {"fill", "____", "the ____ cat ________", "_", "the", "_________________________________"},
        {"prompt", "the", " ", "1 2 3", "<|endoftext|>", "____", "\x01\n"},
        {"puzzle", "................", "12..34......21..", "....", "1", "x"},
        {"text", "the cat", "<|endoftext|>", "\xff\xfe", " ", "\r\n"},
        {"order", "random", "confidence", "margin", "entropy", "threshold", "x", "random "},
        {"loop-dist", "uniform", "fixed", "top", "flops", "x"},
        {"answers-after", "=", "<|endoftext|>", "x", "\xff", " the"},
        {"loop", "0:0", "0:1", "1:2", "0:2", "2:1", "-1:1", "1", "0:99999999999"}
    };
    char text[256] = "";
    for (int i = 0; i < COUNT(values); i++) {
        int n = 1;
        while (n < 9 && values[i][n]) n++;
        if (strcmp(values[i][0], name)) continue;
        add_string(values[i][1 + below(n - 1)]);
        return;
    }

    // A list, of which the program takes 32 numbers at most.
    int n = chance(3) ? 33 : 1 + below(3);
    write_number(text, 64, command, name);
    for (int i = 1, at; i < n && chance(90); i++) {
        at = (int)strlen(text);
        text[at++] = chance(95) ? ',' : ':';
        write_number(text + at, 40, command, name);
        if (at > 200) break;
    }
    add_string(text);
}

static void strange_options(void) {
    int command = below(NUM_COMMANDS), flag = commands[command].flag;
    if (flag == TRAIN && chance(30)) add_words(RESUME);
    else if (chance(98)) add_words(plain[command]);
    for (int k = 1 + below(3); k > 0; k--) {
        int i = below(NUM_OPTIONS);
        while (!(options[i].commands & flag) && chance(97)) i = (i + 1) % NUM_OPTIONS;
        char name[64];
        snprintf(name, sizeof name, "%s%s", options[i].name[1] ? "--" : "-", options[i].name);
        if (chance(2)) name[below((int)strlen(name))] = (char)(33 + below(90));
        add_string(name);
        char number[64];
        write_number(number, sizeof number, flag, options[i].name);
        if (k == 1 && chance(3)) break; // the last one has no value
        if (options[i].type == TEXT) add_value(flag, options[i].name);
        else if (options[i].type != FLAG || chance(3)) add_string(number);
    }
    if (chance(2)) add("", 0);
}

static void no_room(void) { // for memory, or on the disk
    if (chance(60)) until_failure = 1 + below(chance(70) ? 30 : 200);
    else file_limit = below(chance(50) ? 3000 : 40000);
}

// letter: the command is one of uses[], and make() may add to it; 0: make() gives it.
static const struct { const char *name; char letter; void (*make)(void); } kinds[] = {
    {"model.bin", 'm', damaged_model}, {"state.bin", 's', damaged_state},
    {"token shard", 'd', damaged_shard}, {"rows of a shard", 'r', damaged_rows},
    {"tokenizer.bin", 't', damaged_tokenizer}, {"tokenizer of bytes", 'b', damaged_bytes},
    {"text", 0, strange_text}, {"template", 0, strange_template}, {"board", 0, strange_board},
    {"options", 0, strange_options}, {"no memory or disk", 'n', no_room},
};
enum { NUM_KINDS = COUNT(kinds) };

// ---- running an input ----

static char home[1024];      // where build/ is
static char said[1 << 16];   // on standard error
static size_t said_bytes;
static char problem[256];    // what is wrong, or empty
static int said_pipe[2], null_file;

// Runs the command of args in a child, with the files; returns how it ended.
static int run(void) {
    int status = 0;
    for (int k = 0; k < NUM_FILES; k++)
        if (file[k].touched) write_bytes(names[k], &file[k]);
    fflush(stdout); // what is in its buffer would be the child's too
    pid_t child = fork();
    if (child < 0) die(FAILED, "cannot fork: %s", strerror(errno));
    if (child == 0) {
        struct rlimit limit = {(rlim_t)file_limit, (rlim_t)file_limit};
        if (file_limit >= 0) setrlimit(RLIMIT_FSIZE, &limit);
        alarm(MOST_SECONDS);
        dup2(null_file, 1);
        dup2(said_pipe[1], 2);
        leave(loopmdm_main(count_args, args));
    }
    waitpid(child, &status, 0);
    until_failure = 0;

    ssize_t n = read(said_pipe[0], said, sizeof said - 1); // it does not wait
    said_bytes = n > 0 ? (size_t)n : 0;
    said[said_bytes] = 0;
    return status;
}

// Whether the command may have given file k these bytes.
static int may_change(int k, File *disk, int refused) {
    if (k == OLD || !has("--resume")) return k == OLD && !refused;
    if (k > MODEL) return k == LOG || file[k].absent; // a log grows before a training fails

    // A training that fails later leaves whole checkpoints, and never an older state. Before that,
    // what a damaged state holds must not get into model.bin.
    if (k == MODEL && refused && file[STATE].touched && !strstr(said, "last good checkpoint"))
        return 0;
    const int *before = (const int *)file[k].bytes;
    int *after = (int *)disk->bytes, crc = after[AT_CRC];
    seal(disk);
    if (k == STATE && refused && after[AT_STEP] <= before[AT_STEP]) return 0;
    return disk->size > 4 * HEADER_INTS && after[AT_CRC] == crc;
}

static void check_files(int refused) {
    static unsigned char bytes[ROOM];
    File disk = {bytes, 0, 0, 0};
    for (int k = 0; k < NUM_FILES; k++) {
        char temporary[64];
        const File *f = &file[k];
        snprintf(temporary, sizeof temporary, "%s.tmp", names[k]);
        if (!unlink(temporary)) snprintf(problem, sizeof problem, "%s is left", temporary);
        read_bytes(names[k], &disk);
        if (disk.absent && f->absent) continue;
        if (disk.absent == f->absent && disk.size == f->size && !memcmp(bytes, f->bytes, f->size))
            continue;
        file[k].touched = 1;
        if (disk.absent || !may_change(k, &disk, refused))
            snprintf(problem, sizeof problem, "%s is %s", names[k],
                     disk.absent ? "lost" : "changed");
    }
    if (!rmdir("out") || errno == ENOENT) {
        mkdir("out", 0777);
        return;
    }

    // What a command may leave there.
    static const char *const outputs[] = {
        "out/a.csv", "out/o.bin", "out/run/model.bin", "out/run/state.bin", "out/run/log.csv",
        "out/run/tokenizer.bin", "out/model.bin", "out/state.bin", "out/log.csv",
        "out/tokenizer.bin"
    };
    for (int i = 0; i < COUNT(outputs); i++) unlink(outputs[i]);
    rmdir("out/run");
    if (rmdir("out")) {
        snprintf(problem, sizeof problem, "another file is left in out");
        if (system("rm -rf out")) die(FAILED, "cannot clear the folder out");
    }
    mkdir("out", 0777);
}

// What is wrong with how the child ended goes into problem. Returns whether it refused the input.
static int check_end(int status) {
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    int one_line = strchr(said, '\n') == said + said_bytes - 1 && !strncmp(said, "loopmdm: ", 9);
    const char *wrong = NULL;
    if (code < 0) wrong = WTERMSIG(status) == SIGALRM ? "it hangs" : "it crashes";
    else if (code > USAGE) wrong = "its exit status is not 0, 1 or 2";
    else if (code && !one_line) wrong = "it does not say exactly one line, loopmdm: ...";
    else if (!code && must_refuse) wrong = "it accepts a damaged file";
    else if (!code && has("sample") && !strstr(said, " tokens/s\n")) wrong = "it does not report";
    if (wrong) snprintf(problem, sizeof problem, "%s", wrong);
    return code != 0;
}

// ---- failures, counts ----

typedef struct { int refused, accepted, failed; } Counts;

static void print_input(void) {
    printf("      loopmdm");
    for (int i = 1; i < count_args; i++) {
        printf(" $'"); // as bash reads it
        for (const unsigned char *s = (const unsigned char *)args[i]; *s; s++) {
            if (*s < 32 || *s > 126 || *s == '\'' || *s == '\\') printf("\\x%02x", *s);
            else putchar(*s);
        }
        printf("'");
    }
    printf("\n      it says: %s\n", said);
}

static void print_failure(int kind) {
    char folder[1100], path[1200];
    unsigned long long n = number;
    printf("FAIL  input %llu, %s: %s\n", n, kinds[kind].name, problem);
    print_input();
    printf("      files: build/fuzz_failed/%llu   again: build/fuzz --only %llu %llu\n", n, n,
           (unsigned long long)seed);
    snprintf(folder, sizeof folder, "%s/build/fuzz_failed/%llu/", home, n);
    snprintf(path, sizeof path, "%sm", folder);
    make_folders(path);
    for (int k = 0; k < NUM_FILES; k++) {
        snprintf(path, sizeof path, "%s%s", folder, names[k]);
        write_bytes(path, &file[k]);
    }
}

static void restore_files(void) {
    for (int k = 0; k < NUM_FILES; k++) {
        if (!file[k].touched) continue;
        memcpy(file[k].bytes, good[k].bytes, good[k].size);
        file[k].size = good[k].size;
        file[k].absent = file[k].touched = 0;
        write_bytes(names[k], &file[k]);
    }
}

// The files as the program takes them, in a folder for this worker.
static void make_good_files(void) {
    static const char log[] = "step,loops,t,loss,lr,grad_norm,tokens_per_s,flops\n"
                              "1,1,0.5,5,0.002,1,1000,1e6\n2,3,0.5,5,0.001,1,1000,3e6\n";
    for (int k = 0; k < NUM_FILES; k++) {
        good[k].bytes = good_bytes[k];
        file[k].bytes = file_bytes[k];
    }
    mkdir("m", 0777);
    mkdir("out", 0777);
    make_tokenizer(&good[TOKENS], 0);
    make_tokenizer(&good[BYTES], 1);
    make_shard(&good[DATA], "~the cat sat on 12 of 34~", 12);
    make_shard(&good[ROWS], "~1+2=#### 3~~~~~~12+3= 15~~~~~~~", 4);
    make_shard(&good[BOARDS], "12..34......21..1234341243212143", 4);
    append(&good[STORY], "the cat<|endoftext|>12 the", 26);
    append(&good[BLANKS], "the ____\n____12\n", 16);
    append(&good[OLD], "old\n", 4);
    for (int k = TOKENS; k < NUM_FILES; k++) write_bytes(names[k], &good[k]);

    // The program itself makes the checkpoint.
    new_command();
    add_words("train --data data.bin --out m --steps 2" RECIPE);
    file_limit = -1;
    if (run()) die(FAILED, "cannot train the model: %s", said);
    for (int k = 0; k < LOG; k++) read_bytes(names[k], &good[k]);
    append(&good[LOG], log, sizeof log - 1); // the real one has the speed of this machine
    for (int k = 0; k < NUM_FILES; k++) file[k].touched = 1;
    restore_files();
}

static void one_input(Counts *counts) {
    int kind = (int)(random_bits(seed, number, 2, 0) % NUM_KINDS);
    draws = 0;
    must_refuse = 0;
    new_command();
    file_limit = -1;
    *problem = 0;
    if (kinds[kind].letter) add_use(kinds[kind].letter);
    kinds[kind].make();
    int refused = check_end(run());
    check_files(refused);
    counts[kind].refused += refused;
    counts[kind].accepted += !refused;
    if (*problem && counts[kind].failed++ < 5) print_failure(kind);
    restore_files();
}

// Inputs first, first + step, .. below end, in a folder of its own.
static void work_on(uint64_t first, uint64_t end, int step, Counts *counts) {
    const char *disk = access("/dev/shm", W_OK) ? "build" : "/dev/shm"; // which is in memory
    char folder[64];
    snprintf(folder, sizeof folder, "%s/loopmdm_fuzz_XXXXXX", disk);
    if (!mkdtemp(folder) || chdir(folder)) die(FAILED, "cannot make a folder in %s", disk);
    null_file = open("/dev/null", O_RDWR);
    if (pipe(said_pipe) || fcntl(said_pipe[0], F_SETFL, O_NONBLOCK))
        die(FAILED, "cannot make a pipe: %s", strerror(errno));
    make_good_files();
    for (number = first; number < end; number += step) one_input(counts);
    if (end == first + 1 && !*problem) print_input();

    // If the program had left other files there, the folders would stay.
    for (int k = 0; k < NUM_FILES; k++) unlink(names[k]);
    if (rmdir("m") || rmdir("out") || chdir(home) || rmdir(folder))
        die(FAILED, "files are left in %s", folder);
}

int main(int argc, char **argv) {
    int only = argc > 2 && !strcmp(argv[1], "--only"), passed = 0, failed = 0;
    uint64_t n = argc > 1 + only ? strtoull(argv[1 + only], NULL, 10) : 0;
    if (argc < 2 + only || argc > 3 + only)
        die(USAGE, "usage: fuzz N [SEED], or fuzz --only NUMBER [SEED]");
    if (argc == 3 + only) seed = strtoull(argv[2 + only], NULL, 10);
    if (!getcwd(home, sizeof home)) die(FAILED, "cannot find this folder");

    // The workers count in memory that is shared.
    int workers = only ? 1 : max_int(1, (int)sysconf(_SC_NPROCESSORS_ONLN));
    size_t bytes = NUM_KINDS * sizeof(Counts);
    Counts *counts = (Counts *)mmap(NULL, workers * bytes, PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counts == MAP_FAILED) die(FAILED, "no memory for the counts");
    double began = seconds();
    for (int w = 0; w < workers; w++) {
        if (fork()) continue;
        work_on(only ? n : (uint64_t)w, only ? n + 1 : n, workers, counts + w * NUM_KINDS);
        leave(0);
    }
    for (int w = 0, status; w < workers; w++)
        if (wait(&status) < 0 || status) failed++;
    if (failed) printf("FAIL  %d workers did not come to their end\n", failed);
    for (int k = 0; only && k < NUM_KINDS; k++) failed += counts[k].failed;
    if (only) return failed != 0;

    printf("\n%-24s %10s %10s %10s\n", "inputs", "refused", "accepted", "failed");
    for (int k = 0; k < NUM_KINDS; k++) {
        Counts sum = {0, 0, 0};
        for (int w = 0; w < workers; w++) {
            sum.refused += counts[w * NUM_KINDS + k].refused;
            sum.accepted += counts[w * NUM_KINDS + k].accepted;
            sum.failed += counts[w * NUM_KINDS + k].failed;
        }
        int ok = sum.refused && sum.accepted && !sum.failed;
        printf("%s  %-18s %10d %10d %10d\n", ok ? "ok  " : "FAIL", kinds[k].name, sum.refused,
               sum.accepted, sum.failed);
        passed += ok;
        failed += !ok;
    }
    printf("%.0f seconds, %.0f inputs in a second\n", seconds() - began, n / (seconds() - began));
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
