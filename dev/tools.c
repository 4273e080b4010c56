/*
The whole program: `make` builds ./loopmdm from this file. It includes loopmdm.c, which has the
method, and calls it. What it adds:

  1. options            a table of all options of all commands, their help texts, their parser
  2. files              state.bin (to resume training), log.csv and other CSV files; a file that is
                        read is never overwritten
  3. text               tokens to text and back, templates with blanks, Sudoku boards
  4. adaptive loops     --adaptive, and the counting of what a forward costs
  5. train              with checkpoints, validation, --resume
  6. eval               tables of the NELBO, by noise level, by loop; puzzles and questions
  7. sample             prompts, templates, puzzles; --watch
  8. attention          how much masked positions look at masked ones
  9. tokenize, info, flops
  10. main

With -DBACKEND='"loopmdm.cu"' it is the same program for a GPU.
*/
#define TOOLS // loopmdm.c leaves out its own, smaller command line
#include "../loopmdm.c"
#include <ctype.h>
#include <glob.h>
#include <locale.h>
#include <signal.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#include <sys/file.h>
#include <sys/ioctl.h>
#include <time.h>
#include <wchar.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// =================================================================================================
// 1. Options

enum { TRAIN = 1, EVAL = 2, SAMPLE = 4, ATTENTION = 8, TOKENIZE = 16, INFO = 32, FLOPS = 64 };

static const struct { const char *name; int flag; const char *about; } commands[] = {
    {"train", TRAIN, "Trains a model on token shards.\n"
     "Writes model.bin, state.bin, tokenizer.bin and log.csv into --out."},
    {"eval", EVAL, "Estimates the NELBO of held-out tokens, in nats per token, for several numbers "
     "of loops.\nWith --sudoku it solves puzzles, with --exact-match it answers questions."},
    {"sample", SAMPLE, "Writes text: from nothing, from a beginning (--prompt), or into the blanks "
     "of a template (--fill).\nA model without a tokenizer reads and writes token ids."},
    {"attention", ATTENTION, "Measures how much attention masked positions pay to masked ones, by "
     "pass, head and noise level."},
    {"tokenize", TOKENIZE, "Encodes text: --text shows its tokens; --input and --output turn a "
     "file into a token shard.\nThe end-of-text token's own text, <|endoftext|>, separates "
     "stories."},
    {"info", INFO, "Prints the configuration, parameters and memory of a trained model or a "
     "preset."},
    {"flops", FLOPS, "Prints the exact floating point operations of the matrix products, per "
     "token, by number of loops."},
};

// Every option with its default. -1 and NULL: the preset's, or none.
static const char *opt_data, *opt_val_data, *opt_tokenizer, *opt_model, *opt_init, *opt_out;
static const char *opt_loop, *opt_loop_dist = "uniform", *opt_loops, *opt_adaptive;
static const char *opt_answers_after, *opt_by_t, *opt_by_loop, *opt_csv;
static const char *opt_prompt, *opt_fill, *opt_fill_file, *opt_puzzle, *opt_order = "confidence";
static const char *opt_text, *opt_input, *opt_output, *opt_precision;
static const char *opt_sample_steps = "32", *opt_eval_steps = "1,2,5,20";
static int opt_layers = -1, opt_heads = -1, opt_channels = -1, opt_seq_len = -1, opt_vocab = -1;
static int opt_max_loops = -1, opt_steps = -1, opt_batch = -1, opt_accum = -1, opt_warmup = -1;
static int opt_save_every = 500, opt_val_every = 500, opt_val_rows = 256, opt_rows = 1024;
static int opt_resume, opt_recompute, opt_fixed_rows, opt_sudoku, opt_exact_match, opt_watch;
static int opt_show_loops, opt_length = -1, opt_n = 1, opt_top_k, opt_block, opt_rows_of;
static int opt_eval_batch = 16, opt_buckets = 10, opt_threads, opt_noise_warmup;
static double opt_lr = -1, opt_ema = -1, opt_floor = 0.1, opt_weight_decay = 0.1, opt_clip = 1;
static double opt_temperature = 1, opt_eval_temperature, opt_top_p = 1, opt_threshold = 0.9;
static uint64_t opt_seed = 1;
static const char *products = "fp32"; // how matrices are multiplied, in words

#ifdef _OPENMP
#define THREADS_HELP "threads (default: one for each core)"
#else
#define THREADS_HELP "threads: 1, because this program was built without OpenMP"
#endif

#ifdef BACKEND
#define BUILT_FOR (BF16 ? "bf16" : "fp32")
#define PRECISION_HELP "fp32 or bf16, as this program was built"
#else
#define BUILT_FOR "fp32"
#define PRECISION_HELP "fp32, or bf16: less exact, faster on a CPU that has it (default fp32)"
#endif

enum Type { FLAG, TEXT, INTEGER, SEED, REAL };

static const struct {
    const char *name;
    int commands;     // that have this option
    enum Type type;
    void *value;
    double least;     // the smallest value that a number may have
    const char *argument, *help;
} options[] = {
    {"data", TRAIN | EVAL | ATTENTION, TEXT, &opt_data, 0, "FILES",
     "token shards: a file, or a quoted pattern such as 'train_*.bin'"},
    {"val-data", TRAIN, TEXT, &opt_val_data, 0, "FILES",
     "held-out token shards: their NELBO is printed and logged"},
    {"tokenizer", TRAIN | TOKENIZE | SAMPLE | EVAL | ATTENTION, TEXT, &opt_tokenizer, 0, "FILE",
     "tokenizer; training copies it into the model's folder, where other commands find it"},
    {"model", TRAIN, TEXT, &opt_model, 0, "PRESET",
     "d2, nano, d6 or d12: a model and a recipe, see info; other options change it (default nano)"},
    {"model", EVAL | SAMPLE | ATTENTION, TEXT, &opt_model, 0, "FOLDER",
     "what train wrote into --out"},
    {"model", INFO | FLOPS, TEXT, &opt_model, 0, "MODEL",
     "a trained model's folder, or a preset: d2, nano, d6, d12 (default nano)"},
    {"layers", TRAIN | INFO | FLOPS, INTEGER, &opt_layers, 1, "L", "layers"},
    {"heads", TRAIN | INFO | FLOPS, INTEGER, &opt_heads, 1, "NH", "attention heads"},
    {"channels", TRAIN | INFO | FLOPS, INTEGER, &opt_channels, 2, "C", "channels"},
    {"seq-len", TRAIN | INFO | FLOPS, INTEGER, &opt_seq_len, 1, "T", "positions in a sequence"},
    {"vocab", TRAIN, INTEGER, &opt_vocab, 1, "V", "tokens, if there is no --tokenizer"},
    {"vocab", INFO | FLOPS, INTEGER, &opt_vocab, 1, "V", "tokens, for a preset (default 4096)"},
    {"loop", TRAIN | INFO | FLOPS, TEXT, &opt_loop, 0, "A:B",
     "loop over layers A .. B-1; 0:0 for an ordinary MDM"},
    {"max-loops", TRAIN | INFO | FLOPS, INTEGER, &opt_max_loops, 1, "S",
     "loops in training: 1 to S"},
    {"init", TRAIN, TEXT, &opt_init, 0, "FOLDER",
     "begin with the parameters of another model of the same shape; its loop may differ"},
    {"loop-dist", TRAIN, TEXT, &opt_loop_dist, 0, "NAME",
     "how a step's loops are drawn: uniform, fixed (S), top (S/2 to S), flops (p ~ 1/FLOPs)"},
    {"fixed-rows", TRAIN, FLAG, &opt_fixed_rows, 0, "",
     "the data are sequences of T tokens, such as boards; without it sequences begin anywhere"},
    {"answers-after", TRAIN | EVAL | ATTENTION, TEXT, &opt_answers_after, 0, "TOKEN",
     "as --fixed-rows, and all up to this token is context: only the rest is masked and learned"},
    {"ema", TRAIN, REAL, &opt_ema, 0, "DECAY",
     "also keep an average of the parameters, which keeps DECAY, such as 0.999, of itself in each "
     "step; model.bin is then the average (--val-data still tries the last parameters); 0: none "
     "(default: the preset's)"},
    {"out", TRAIN, TEXT, &opt_out, 0, "FOLDER", "where the model goes"},
    {"resume", TRAIN, FLAG, &opt_resume, 0, "",
     "continue from the checkpoint in --out, exactly, with the same options"},
    {"steps", TRAIN, INTEGER, &opt_steps, 1, "N",
     "optimizer steps in all (default: the preset's)"},
    {"batch", TRAIN | INFO, INTEGER, &opt_batch, 1, "B",
     "sequences at a time (default: the preset's; info of a trained model: 16)"},
    {"batch", EVAL | ATTENTION, INTEGER, &opt_eval_batch, 1, "B", "sequences at a time"},
    {"accum", TRAIN, INTEGER, &opt_accum, 1, "N",
     "batches whose gradients are added up for one step (default: the preset's)"},
    {"recompute", TRAIN, FLAG, &opt_recompute, 0, "",
     "keep only each pass's input; the backward computes the rest again: less memory, slower"},
    {"lr", TRAIN, REAL, &opt_lr, 0, "RATE", "highest learning rate (default: the preset's)"},
    {"floor", TRAIN, REAL, &opt_floor, 0, "SHARE",
     "where the learning rate ends, as a share of the highest"},
    {"warmup", TRAIN, INTEGER, &opt_warmup, 0, "N",
     "steps over which the learning rate rises (default: the preset's, at most --steps / 4)"},
    {"noise-warmup", TRAIN, INTEGER, &opt_noise_warmup, 0, "N",
     "steps over which the share of tokens to predict that stay visible falls from half to none"},
    {"weight-decay", TRAIN, REAL, &opt_weight_decay, 0, "RATE",
     "AdamW's weight decay, on matrices only"},
    {"clip", TRAIN, REAL, &opt_clip, 1e-9, "NORM", "largest norm of the gradient"},
    {"save-every", TRAIN, INTEGER, &opt_save_every, 1, "N", "steps between checkpoints"},
    {"val-every", TRAIN, INTEGER, &opt_val_every, 1, "N", "steps between validations"},
    {"val-rows", TRAIN, INTEGER, &opt_val_rows, 1, "N", "sequences in a validation"},
    {"loops", TRAIN, TEXT, &opt_loops, 0, "S,S,..",
     "numbers of loops to validate with (default 1, 2, 4, .. and --max-loops)"},
    {"loops", EVAL, TEXT, &opt_loops, 0, "S,S,..",
     "numbers of loops, also more than in training (default 1, 2, 4, .. and as in training)"},
    {"loops", SAMPLE | ATTENTION, TEXT, &opt_loops, 0, "S",
     "loops, also more than in training (default: as many)"},
    {"adaptive", EVAL, TEXT, &opt_adaptive, 0, "TAU,..",
     "a sequence stops looping when a loop changes it by less than TAU"},
    {"adaptive", SAMPLE, TEXT, &opt_adaptive, 0, "TAU",
     "a text stops looping when a loop changes it by less than TAU"},
    {"max-loops", EVAL | SAMPLE, INTEGER, &opt_max_loops, 1, "S",
     "most loops with --adaptive (default: as many as in training)"},
    {"by-t", EVAL, TEXT, &opt_by_t, 0, "FILE",
     "also the loss by noise level, as a table and into this CSV file"},
    {"buckets", EVAL | ATTENTION, INTEGER, &opt_buckets, 1, "N",
     "into which noise levels are divided"},
    {"by-loop", EVAL, TEXT, &opt_by_loop, 0, "FILE",
     "also the norm of the state and its change in each loop (up to the last of --loops), as a "
     "table and into this CSV file"},
    {"sudoku", EVAL, FLAG, &opt_sudoku, 0, "",
     "--data are puzzles, each with its solution after it: the share solved, by --loops, --steps"},
    {"exact-match", EVAL, FLAG, &opt_exact_match, 0, "",
     "writes the answers and compares their last numbers with those of the data"},
    {"csv", ATTENTION, TEXT, &opt_csv, 0, "FILE", "all figures, also by head"},
    {"rows", EVAL | ATTENTION, INTEGER, &opt_rows, 1, "N",
     "sequences, spread over the data; beyond its end they begin again with other noise (puzzles, "
     "questions: the first N)"},
    {"prompt", SAMPLE, TEXT, &opt_prompt, 0, "TEXT", "how the text begins"},
    {"fill", SAMPLE, TEXT, &opt_fill, 0, "TEXT",
     "a template: ____ is a blank of one token, ________ of two, and so on"},
    {"fill-file", SAMPLE, TEXT, &opt_fill_file, 0, "FILE",
     "templates, one in a line; empty lines do not count"},
    {"puzzle", SAMPLE, TEXT, &opt_puzzle, 0, "BOARD", "a Sudoku, row by row, with . for blanks"},
    {"length", SAMPLE, INTEGER, &opt_length, 2, "T",
     "tokens in all, with the prompt and the end-of-text before it (default: the model's most)"},
    {"steps", EVAL, TEXT, &opt_eval_steps, 0, "N,..",
     "denoising steps, with --sudoku and --exact-match"},
    {"steps", SAMPLE, TEXT, &opt_sample_steps, 0, "N", "denoising steps"},
    {"order", EVAL | SAMPLE, TEXT, &opt_order, 0, "NAME",
     "which tokens are kept first: random, confidence, margin, entropy, threshold"},
    {"threshold", EVAL | SAMPLE, REAL, &opt_threshold, 0, "P",
     "with --order threshold: all tokens of higher probability are kept; it takes no --steps"},
    {"block", EVAL | SAMPLE, INTEGER, &opt_block, 1, "N",
     "fill in blocks of N positions, from left to right"},
    {"temperature", EVAL, REAL, &opt_eval_temperature, 0, "X",
     "0 always takes the likeliest token"},
    {"temperature", SAMPLE, REAL, &opt_temperature, 0, "X",
     "below 1 plays safe; 0 always takes the likeliest token"},
    {"top-k", EVAL | SAMPLE, INTEGER, &opt_top_k, 1, "K", "draw only from the K likeliest tokens"},
    {"top-p", EVAL | SAMPLE, REAL, &opt_top_p, 0, "P",
     "draw only from the likeliest tokens that together have probability P"},
    {"n", SAMPLE, INTEGER, &opt_n, 1, "N", "texts to write"},
    {"watch", SAMPLE, FLAG, &opt_watch, 0, "", "show the text while it is denoised"},
    {"show-loops", SAMPLE, FLAG, &opt_show_loops, 0, "",
     "with --watch: also show what all blanks would be after each loop"},
    {"text", TOKENIZE, TEXT, &opt_text, 0, "TEXT", "text to encode"},
    {"input", TOKENIZE, TEXT, &opt_input, 0, "FILE", "file to encode"},
    {"output", TOKENIZE, TEXT, &opt_output, 0, "FILE", "token shard to write"},
    {"rows-of", TOKENIZE, INTEGER, &opt_rows_of, 2, "T",
     "each story is a sequence of T tokens, filled up with end-of-text; longer ones are left out"},
    {"seed", TRAIN | EVAL | SAMPLE | ATTENTION, SEED, &opt_seed, 0, "N", "seed of all randomness"},
    {"precision", TRAIN | EVAL | SAMPLE, TEXT, &opt_precision, 0, "NAME",
     "of matrix products: " PRECISION_HELP},
    {"threads", TRAIN | EVAL | SAMPLE | ATTENTION, INTEGER, &opt_threads, 1, "N", THREADS_HELP},
};
enum { NUM_OPTIONS = COUNT(options), NUM_COMMANDS = COUNT(commands) };

static void print_default(int i) {
    const void *value = options[i].value; // which still holds the default
    int integer = options[i].type == INTEGER ? *(const int *)value : 0;
    const char *text = options[i].type == TEXT ? *(const char *const *)value : NULL;
    if (integer > 0) printf(" (default %d)", integer); // 0 and -1 mean that there is none
    if (text) printf(" (default %s)", text);
    double real = options[i].type == REAL ? *(const double *)value : -1;
    if (real >= 0) printf(" (default %g)", real);
    if (options[i].type == SEED)
        printf(" (default %llu)", (unsigned long long)*(const uint64_t *)value);
}

static void print_help(int command) {
    printf("usage: loopmdm %s [options]\n%s\n\n", commands[command].name, commands[command].about);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        if (!(options[i].commands & commands[command].flag)) continue;
        int one_letter = !options[i].name[1]; // -n has one dash
        int width = 21 + one_letter - (int)strlen(options[i].name); // so that help texts align
        printf("  %s%s %-*s", one_letter ? "-" : "--", options[i].name, width, options[i].argument);
        printf("%s", options[i].help);
        print_default(i);
        printf("\n");
    }
}

static void processes_end(void); // dev/processes.h: leaves the other processes of a training

// Ends the program, after it has made sure that what it printed has arrived.
__attribute__((noreturn)) static void finish(void) {
    processes_end();
    if (fflush(stdout) || ferror(stdout))
        die(FAILED, "cannot write to standard output: %s", strerror(errno));
    exit(0);
}

// The option of a command that an argument such as --steps or --steps=5 names.
static int find_option(int command, const char *argument) {
    const char *name = argument + strspn(argument, "-"); // without dashes
    const char *equals = strchr(name, '=');
    size_t length = equals ? (size_t)(equals - name) : strlen(name);
    for (int i = 0; i < NUM_OPTIONS && *argument == '-'; i++) {
        const char *other = options[i].name;
        if (!(options[i].commands & commands[command].flag)) continue;
        if (strlen(other) == length && !memcmp(other, name, length)) return i;
    }
    die(USAGE, "%s has no option %s; see loopmdm %s --help", commands[command].name, argument,
        commands[command].name);
}

static void set_number(int i, const char *text) {
    const char *name = options[i].name;
    void *to = options[i].value;
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end || !isfinite(number))
        die(USAGE, "--%s takes a number, not '%s'", name, text);
    if (number < options[i].least)
        die(USAGE, "--%s must be at least %g, not %s", name, options[i].least, text);
    if (options[i].type == REAL) {
        *(double *)to = number;
        return;
    }

    // Not from the double, which cannot hold each whole number of 64 bits.
    errno = 0;
    unsigned long long integer = strtoull(text, &end, 10);
    unsigned long long most = options[i].type == SEED ? UINT64_MAX : INT_MAX;
    if (*end || errno || integer > most)
        die(USAGE, "--%s takes a whole number up to %llu, not '%s'", name, most, text);
    if (options[i].type == SEED) *(uint64_t *)to = integer;
    else *(int *)to = (int)integer;
}

static char was_given[NUM_OPTIONS]; // on the command line

static void parse_options(int command, int argc, char **argv) {
    for (int a = 2; a < argc; a++) {
        if (strcmp(argv[a], "--help") && strcmp(argv[a], "-h")) continue;
        print_help(command); // while the options still have their defaults
        finish();
    }
    for (int a = 2; a < argc; a++) {
        int i = find_option(command, argv[a]);
        const char *name = options[i].name, *equals = strchr(argv[a], '=');
        // Of two numbers the last counts. Two files or texts look as if both were meant.
        if (was_given[i] && options[i].type == TEXT)
            die(USAGE, "--%s is given twice: give it once%s", name,
                strcmp(options[i].argument, "FILES") ? "" : ", with one pattern for all files");
        was_given[i] = 1;
        if (options[i].type == FLAG) {
            if (equals) die(USAGE, "--%s takes no value", name);
            *(int *)options[i].value = 1;
            continue;
        }
        const char *value = equals ? equals + 1 : NULL;
        if (!equals && a + 1 < argc) value = argv[++a]; // --steps 5, not --steps=5
        if (!value) die(USAGE, "--%s needs a value: %s", name, options[i].help);
        if (options[i].type != TEXT) {
            set_number(i, value);
            continue;
        }
        if (!*value) die(USAGE, "--%s is empty: %s", name, options[i].help);
        *(const char **)options[i].value = value;
    }
    if (opt_threads > 1024) die(USAGE, "--threads is %d; at most 1024", opt_threads);
#ifdef _OPENMP
    if (opt_threads) omp_set_num_threads(opt_threads);
    int threads = omp_get_max_threads();
    if (threads < 1 || threads > 1024)
        die(USAGE, "OMP_NUM_THREADS gives %d threads: 1 to 1024 are possible", threads);
#else
    if (opt_threads > 1)
        die(USAGE, "--threads is %d, but this program was built without OpenMP: it has one thread",
            opt_threads);
#endif
}

// An option that has no effect without another one is a mistake. names: such options, with a blank
// before and after each.
static void only_with(const char *needed, int is_there, const char *names) {
    for (int i = 0; !is_there && i < NUM_OPTIONS; i++) {
        char name[32];
        snprintf(name, sizeof name, " %s ", options[i].name); // "loop" is no part of "loops"
        if (was_given[i] && strstr(names, name))
            die(USAGE, "--%s has no effect without %s", options[i].name, needed);
    }
}

// The place of value in names.
static int choose(const char *option, const char *value, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (!strcmp(value, names[i])) return i;
    die(USAGE, "--%s cannot be '%s'; see --help", option, value);
}

enum { MOST_LOOPS = 32 }; // most numbers in a list

// "1,2,8" -> list = {1, 2, 8}; returns how many.
static int parse_list(const char *option, const char *text, int *list, int most) {
    const char *all = text, *example = most > 1 ? "4 or 1,2,4" : "4";
    int n = 0;
    char *end;
    do {
        long x = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || x < 1 || x > 100000 || n == most)
            die(USAGE, "--%s takes at most %d number%s from 1 to 100000, such as %s, not '%s'",
                option, most, most > 1 ? "s" : "", example, all);
        list[n++] = (int)x;
        text = end + 1; // after the comma
    } while (*end);
    return n;
}

// "0.1,0.2" -> taus = {0.1, 0.2}; returns how many.
static int parse_taus(const char *text, double *taus, int most) {
    int n = 0;
    char *end;
    do {
        double tau = strtod(text, &end);
        if (end == text || (*end && *end != ',') || !(tau >= 0) || n == most) // !: also NaN
            die(USAGE, "--adaptive takes at most %d number%s, such as 0.1, not '%s'", most,
                most > 1 ? "s" : "", opt_adaptive);
        taus[n++] = tau;
        text = end + 1;
    } while (*end);
    return n;
}

// The numbers of loops to use: --loops, or 1, 2, 4, .. and S_max. Only S_max if most is 1.
static int loop_numbers(Config c, int *list, int most) {
    if (opt_loops) return parse_list("loops", opt_loops, list, most);
    int n = 0;
    for (int S = 1; most > 1 && S < c.max_loops; S *= 2) list[n++] = S;
    list[n++] = c.max_loops; // with max_loops = 6: 1, 2, 4, 6
    return n;
}

// What to use in inference: fixed numbers of loops, or --adaptive's taus; returns how many.
static int inference_loops(Config c, Loops *loops, int most) {
    int numbers[MOST_LOOPS] = {0}, S = opt_max_loops > 0 ? opt_max_loops : c.max_loops;
    double taus[MOST_LOOPS] = {0};

    // Either fixed numbers of loops, or at most S of them and one tau or several.
    only_with("--adaptive", opt_adaptive != NULL, " max-loops ");
    if (opt_adaptive && opt_loops)
        die(USAGE, "--adaptive excludes --loops; --max-loops sets the most");
    if (opt_adaptive && S > 100000) die(USAGE, "--max-loops %d are too many", S);

    int n = opt_adaptive ? parse_taus(opt_adaptive, taus, most) : loop_numbers(c, numbers, most);
    for (int i = 0; i < n; i++) {
        loops[i].S = opt_adaptive ? S : numbers[i];
        loops[i].tau = opt_adaptive ? taus[i] : 0;
    }
    return n;
}

// How to train the presets: nano for a quarter of an hour on two cores, d6 for a night.
static const struct {
    const char *preset;
    int batch, accum, steps, warmup;
    double lr, ema;
} recipes[] = {
    {"d2", 16, 1, 2000, 200, 4e-3, 0},
    {"nano", 8, 1, 4000, 300, 2e-3, 0},
    {"d6", 16, 1, 8000, 800, 1.4e-3, 0},
    {"d12", 8, 8, 1000000, 2500, 3e-4, 0.9999},
};

// Options of the recipe that were not given are the preset's.
static void recipe_from_preset(const char *name) {
    int i = 0;
    while (strcmp(recipes[i].preset, name)) i++;
    if (opt_batch < 0) opt_batch = recipes[i].batch;
    if (opt_accum < 0) opt_accum = recipes[i].accum;
    if (opt_steps < 0) opt_steps = recipes[i].steps;
    if (opt_warmup < 0) opt_warmup = min_int(recipes[i].warmup, opt_steps / 4); // a short training
    if (opt_lr < 0) opt_lr = recipes[i].lr;
    if (opt_ema < 0) opt_ema = recipes[i].ema;
}

static void print_recipe(void) {
    printf("recipe: --steps %d --batch %d --accum %d --lr %.12g --warmup %d --ema %.12g",
           opt_steps, opt_batch, opt_accum, opt_lr, opt_warmup, opt_ema);
    if (opt_noise_warmup) printf(" --noise-warmup %d", opt_noise_warmup);
    printf("\n");
}

// The model of the preset --model, and its recipe, with the options that change them.
static Config config_from_options(int vocab_size) {
    const char *name = opt_model ? opt_model : "nano";
    Config c = preset(name, vocab_size);
    int used = 0; // characters of --loop
    if (!c.layers) die(USAGE, "--model: there is no preset %s; they are d2, nano, d6, d12", name);
    recipe_from_preset(name);

    if (opt_seq_len > 0) c.max_seq_len = opt_seq_len; // -1: it was not given
    if (opt_layers > 0) c.layers = opt_layers;
    if (opt_heads > 0) c.heads = opt_heads;
    if (opt_channels > 0) c.channels = opt_channels;
    if (opt_max_loops > 0) c.max_loops = opt_max_loops;
    if (opt_loop) {
        // 9 digits at most: no number is too large for an int.
        int numbers = sscanf(opt_loop, "%9d:%9d%n", &c.loop_start, &c.loop_end, &used);
        if (numbers != 2 || opt_loop[used])
            die(USAGE, "--loop takes two layers such as 1:3, not '%s'", opt_loop);
    }
    if (c.loop_start == c.loop_end) c.max_loops = 1; // without a loop S changes nothing
    if (config_error(c)) die(USAGE, "impossible model: %s", config_error(c));
    return c;
}

// The looped layers, in words.
static const char *loop_of(Config c) {
    static char words[64];
    if (c.loop_start == c.loop_end) return "no loop";
    snprintf(words, sizeof words, "loop %d:%d up to %d times", c.loop_start, c.loop_end,
             c.max_loops);
    return words;
}

// How matrices are multiplied from now on, in words.
static const char *use_precision(void) {
    const char *name = opt_precision ? opt_precision : BUILT_FOR;
    int bf16 = !strcmp(name, "bf16");
    if (!bf16 && strcmp(name, "fp32")) die(USAGE, "--precision is fp32 or bf16, not %s", name);
#ifdef BACKEND
    if (strcmp(name, BUILT_FOR))
        die(USAGE, "--precision %s: this program was built for %s; make loopmdm_cuda PRECISION=%s "
            "builds the other", name, BUILT_FOR, name);
#elif defined(exp_fast)
    if (bf16) die(USAGE, "--precision bf16: this program was built without dev/gemm.h");
#else
    if (bf16) return gemm_use_bf16();
#endif
    return name;
}

// =================================================================================================
// 2. Files

// A number in a file's header, or -1 if there is no such file.
static int header_number(const char *path, int place) {
    int number = -1, file = open(path, O_RDONLY | O_NONBLOCK); // a pipe must not make it wait
    if (file < 0) return -1;
    if (pread(file, &number, sizeof number, place * sizeof number) != sizeof number) number = -1;
    close(file);
    return number;
}

// Refuses to overwrite an input file, also by path.tmp, which is written first.
static void keep_apart(const char *option, const char *path, const char *input_option,
                       const char *input) {
    struct stat a, b;
    char *temporary = concat(path, ".tmp");
    const char *names[] = {path, temporary};
    for (int i = 0; i < 2; i++) {
        if (stat(names[i], &a) || stat(input, &b)) continue; // one of them is not there
        // The same file may have several names, so names are not compared.
        if (a.st_dev == b.st_dev && a.st_ino == b.st_ino)
            die(USAGE, "%s %s would overwrite %s %s: choose another name", option, path,
                input_option, input);
    }
    free(temporary);
}

// The files of a name or a pattern such as train_*.bin. A file or folder that exists is meant by
// its name, even if it has [1] in it. Sets paths, which stay until the end of the program; returns
// how many.
static int find_files(const char *name, const char *const **paths) {
    const char *slash = strrchr(name, '/');
    size_t length = strlen(name), folder_length = slash ? slash + 1 - name : 0;
    char *folder = concat(name, ""), *pattern = (char *)allocate(1, 2 * length, "a name");
    folder[folder_length] = 0;
    size_t literal = 0; // so many of its first characters are no pattern
    if (!access(folder, F_OK)) literal = folder_length;
    if (!access(name, F_OK)) literal = length;

    char *to = pattern;
    for (const char *s = name; *s; *to++ = *s++)
        if (s < name + literal && strchr("*?[\\", *s)) *to++ = '\\';
    glob_t g;
    int found = !glob(pattern, 0, NULL, &g);
    free(folder);
    free(pattern);
    *paths = found ? (const char *const *)g.gl_pathv : NULL;
    return found ? (int)g.gl_pathc : 0;
}

static void keep_apart_from_data(const char *option, const char *path, const char *data_option,
                                 const char *pattern) {
    const char *const *inputs;
    int n = pattern ? find_files(pattern, &inputs) : 0; // no file matches: open_data() says so
    for (int i = 0; i < n; i++) keep_apart(option, path, data_option, inputs[i]);
}

static Data open_data(const char *pattern, int vocab_size, int T) {
    const char *const *paths;
    int n = find_files(pattern, &paths);
    if (!n) die(FAILED, "no data: no file matches %s", pattern);
    return data_open(paths, n, vocab_size, T);
}

static void write_file(const char *path, const void *data, size_t bytes) {
    FILE *file = file_begin(path);
    file_end(file, path, file && fwrite(data, 1, bytes, file) == bytes);
}

// ---- what training writes into --out ----

static const char *const model_files[] = {"/model.bin", "/state.bin", "/tokenizer.bin", "/log.csv"};

// state.bin is what training needs to go on: int32[256] header, then the parameters, both moments
// of AdamW and, with --ema, the average. The header begins with this; the rest of it is zero.
typedef struct {
    int magic, version;
    Config config;
    int step;          // steps done
    int crc;           // CRC-32 of the whole file with zero in this place
    int sequences;     // in a step
    uint64_t seed;
    double flops;      // of all steps so far
    int has_average, unused;
} State;
enum { STATE_MAGIC = 20260526, STATE_VERSION = 3 }; // 3: attproj and fcproj learn slower

static void state_save(const Model *m, const char *folder, const State *state) {
    const float *parts[] = {m->params.data, m->moment1.data, m->moment2.data, m->ema.data};
    int header[HEADER_INTS] = {0};
    memcpy(header, state, sizeof *state);
    char *path = concat(folder, "/state.bin");
    checkpoint_save(path, header, parts, 3 + state->has_average, m->params.total);
    free(path);
}

static const State *state_open(const char *path) {
    size_t bytes;
    Model m; // without memory: it knows the sizes
    int version = header_number(path, 1);
    if (header_number(path, 0) == STATE_MAGIC && version > 0 && version < STATE_VERSION)
        die(FAILED, "%s is of version %d, and training goes on from version %d only: begin again "
            "with --init %s and another --out, or use the program that wrote it", path, version,
            STATE_VERSION, opt_out);
    int *file = map_file(path, STATE_MAGIC, STATE_VERSION, "saved state of training", &bytes);
    const State *s = (const State *)file;
    checkpoint_check(&m, file, bytes, 3 + (s->has_average != 0), path);
    if (s->step < 0) die(FAILED, "%s is damaged: it is at step %d", path, s->step);
    return s;
}

// Gives m, which has memory, what the file of this header holds.
static void state_load(Model *m, const State *state) {
    size_t n = m->params.total;
    const float *floats = (const float *)state + HEADER_INTS;
    model_set_parameters(m, floats);
    write_memory(m->moment1.data, floats + n, 4 * n);
    write_memory(m->moment2.data, floats + 2 * n, 4 * n);
    if (m->keeps_ema) write_memory(m->ema.data, floats + 3 * n, 4 * n);
}

// Whether model.bin is whole and was saved at this step.
static int model_is_of(const char *path, int step) {
    size_t bytes;
    if (header_number(path, 0) != MODEL_MAGIC || header_number(path, AT_STEP) != step ||
        header_number(path, HEADER_INTS - 1) != 0) // -1: it is too short
        return 0;
    int *file = map_file(path, MODEL_MAGIC, 0, "model", &bytes);
    int whole = checksum_fits(file, bytes);
    munmap(file, bytes);
    return whole;
}

static void make_folders(const char *path) { // as mkdir -p
    char *p = concat(path, "/");
    for (char *s = p + 1; *s; s++) {
        if (*s != '/') continue;
        *s = 0; // of a/b/c/ make first a, then a/b, then a/b/c
        if (mkdir(p, 0777) && errno != EEXIST)
            die(FAILED, "cannot make the folder %s: %s", p, strerror(errno));
        *s = '/';
    }
    free(p);
}

// ---- CSV files: written when they are complete, so that an old one stays until then ----

typedef struct { const char *path; FILE *file; char *text; size_t bytes; } Csv;

// Csv must not move in memory between the two calls: the stream writes into it.
static void csv_open(Csv *csv, const char *path, const char *columns) {
    csv->path = path;
    csv->file = open_memstream(&csv->text, &csv->bytes);
    if (!csv->file) die(FAILED, "no memory for %s", path);
    fprintf(csv->file, "%s\n", columns);
}

static void csv_close(Csv *csv) {
    if (fclose(csv->file)) die(FAILED, "no memory for %s", csv->path);
    write_file(csv->path, csv->text, csv->bytes);
    free(csv->text);
}

// Called before anything is computed: can this file be written, and is it no input?
static void csv_check(const char *option, const char *path) {
    for (int i = 0; i < COUNT(model_files); i++) {
        char *input = concat(opt_model, model_files[i]);
        keep_apart(option, path, "--model's", input);
        free(input);
    }
    keep_apart_from_data(option, path, "--data", opt_data);
    if (opt_tokenizer) keep_apart(option, path, "--tokenizer", opt_tokenizer);

    // write_file() will write path.tmp first.
    check_regular(path);
    char *temporary = concat(path, ".tmp");
    FILE *file = fopen(temporary, "w");
    if (!file) die(FAILED, "cannot write %s: %s", path, strerror(errno));
    fclose(file);
    unlink(temporary);
    free(temporary);
}

// Opens log.csv to add lines. It keeps the steps of an old one up to this step: a resumed run
// repeats the others. The columns must be the same. What is no log of a training stays.
static FILE *log_open(const char *folder, int step, const int *val_loops, int num_val) {
    char *path = concat(folder, "/log.csv"), *kept = NULL, line[4096], first[1024] = "";
    size_t bytes;
    FILE *old = fopen(path, "r");
    if (!old && errno != ENOENT) die(FAILED, "cannot read %s: %s", path, strerror(errno));
    FILE *log = open_memstream(&kept, &bytes);
    fprintf(log, "step,loops,t,loss,lr,grad_norm,tokens_per_s,flops");
    for (int i = 0; i < num_val; i++) fprintf(log, ",val_nelbo_s%d", val_loops[i]);
    fprintf(log, "\n");
    fflush(log); // now the columns are in kept
    if (old && fgets(first, sizeof first, old) && strcmp(first, kept)) {
        if (step)
            die(USAGE, "--resume: %s has other columns: give --val-data and --loops as when it was "
                "begun", path);
        if (strncmp(first, kept, strlen("step,loops,t")))
            die(USAGE, "%s is there, and is no log of a training: choose another --out", path);
    }
    while (old && fgets(line, sizeof line, old)) {
        // A run that was killed may have left half a line.
        int whole = isdigit((unsigned char)line[0]) && strchr(line, '\n');
        if (whole && atoi(line) <= step) fputs(line, log);
    }
    if (old) fclose(old);
    fclose(log);
    write_file(path, kept, bytes);
    log = fopen(path, "a");
    if (!log) die(FAILED, "cannot write %s: %s", path, strerror(errno));
    free(path);
    free(kept);
    return log;
}

// =================================================================================================
// 3. Text

#include "tokenizer/tokenizer.h" // Tokenizer, tokenizer_open(), tokenizer_encode(), find_special()
#include "tokenizer/text.h"      // text, templates and boards to tokens and back

// The tokenizer of the model in --model: --tokenizer, or the one in its folder. Returns whether
// there is one.
static int find_tokenizer(Tokenizer *t, const Model *m) {
    char *path = opt_tokenizer ? concat(opt_tokenizer, "") : concat(opt_model, "/tokenizer.bin");
    // One that the user names must be there. A model that was trained with --vocab has none.
    int found = opt_tokenizer || !access(path, F_OK);
    if (found) *t = tokenizer_open(path);
    if (found && t->vocab_size != m->config.vocab_size)
        die(FAILED, "%s has %d tokens, the model in %s %d: they do not belong together", path,
            t->vocab_size, opt_model, m->config.vocab_size);
    free(path);
    return found;
}

// A whole file of size bytes, with a zero after it. The caller frees it.
static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    size_t room = 1 << 16, n = 1;
    char *text = (char *)malloc(room);
    if (!file) die(FAILED, "cannot read %s: %s", path, strerror(errno));
    for (*size = 0; text && n > 0; *size += n) {
        n = fread(text + *size, 1, room - *size - 1, file);
        if (*size + n + 1 < room) continue;
        room *= 2; // it is full
        text = (char *)realloc(text, room);
    }
    if (!text) die(FAILED, "no memory for %s", path);
    if (ferror(file)) die(FAILED, "cannot read %s: %s", path, strerror(errno));
    fclose(file);
    text[*size] = 0;
    return text;
}

// A text file as tinystories.py reads it: without a byte order mark, and each line ends with \n, if
// it was written on Windows too. The caller frees it.
static char *read_text(const char *path, size_t *size) {
    char *text = read_file(path, size);
    if (*size >= 2 && (!memcmp(text, "\xff\xfe", 2) || !memcmp(text, "\xfe\xff", 2)))
        die(FAILED, "%s is text in UTF-16: save it in UTF-8", path);
    size_t n = 0, i = *size >= 3 && !memcmp(text, "\xef\xbb\xbf", 3) ? 3 : 0;
    for (; i < *size; i++)
        if (text[i] != '\r') text[n++] = text[i];
        else if (text[i + 1] != '\n') text[n++] = '\n'; // after the last byte there is a zero
    text[n] = 0;
    *size = n;
    return text;
}

// ---- sequences that are things of their own: --fixed-rows, --answers-after, --sudoku ----

static int find_separator(const Tokenizer *t) { // --answers-after's token
    size_t length = strlen(opt_answers_after);
    if (!t) die(USAGE, "--answers-after needs --tokenizer, to find that token");
    int id = 0;
    for (; id < t->vocab_size; id++) {
        if ((size_t)t->length[id] != length) continue;
        if (!memcmp(t->bytes[id], opt_answers_after, length)) break;
    }
    if (id == t->vocab_size)
        die(USAGE, "--answers-after: '%s' is no token of the tokenizer", opt_answers_after);
    if (id == t->eot)
        die(USAGE, "--answers-after: '%s' ends a text, so no answer comes after it",
            opt_answers_after);
    return id;
}

static void fix_rows(Data *d, const char *pattern, const Tokenizer *t, int T) {
    if (!opt_answers_after && !opt_fixed_rows && !opt_sudoku) return;
    d->stride = T; // training sequences begin at multiples of T
    if (opt_answers_after) d->separator = find_separator(t);
    for (int i = 0; i < d->num_shards; i++)
        if (d->shards[i].count % T)
            die(FAILED, "%s: %lld tokens are not rows of %d, the model's --seq-len", pattern,
                (long long)d->shards[i].count, T);
    if (!opt_answers_after) return;

    // Each sequence must have a context and an answer.
    int *tokens = (int *)allocate(T, sizeof(int), "a sequence");
    for (int64_t r = 0; r < data_sequences(d, T, T); r++) {
        int given = data_sequence(d, tokens, r, T, T);
        if (given == 0 || given == T)
            die(FAILED, "%s: row %lld has %s --answers-after's token", pattern, (long long)r,
                given ? "nothing after" : "no");
    }
    free(tokens);
}

// =================================================================================================
// 4. FLOPs, adaptive loops

// Floating point operations of the matrix products, exact (a multiply-add counts as two).
// A forward of P passes, per token: 24 C^2 for the four linear layers, 4 T C for attention.
static double pass_flops(Config c, int T, double P) {
    return P * (24.0 * c.channels * c.channels + 4.0 * T * c.channels);
}

static double head_flops(Config c) { return 2.0 * c.vocab_size * c.channels; } // a masked position

// Forward and backward, per token. For a product of the forward, the backward of a linear layer
// takes two. Attention takes five for two, because it computes the scores again.
static double training_flops(Config c, int T, int S, double masked_share, int recompute) {
    double C = c.channels, P = num_passes(c, S);
    double forward = (1 + recompute) * pass_flops(c, T, P);
    return forward + P * (48 * C * C + 10 * T * C) + masked_share * 3 * head_flops(c);
}

#ifndef BACKEND
// These three are the CPU's. loopmdm.cu has its own.

static void copy_memory(void *to, const void *from, size_t n) { memcpy(to, from, n); }

static void read_activations(float *to, const float *from, size_t n) {
    memcpy(to, from, n * sizeof(float));
}

// How far the last loop moved each sequence: change (B), the mean over positions of
// |h - before| / |h|, where || is the norm over channels.
static void model_change(const Model *m, double *change) {
    int T = m->T, C = m->config.channels;
    OMP(omp parallel for if (WORTH((size_t)m->B * T * C)))
    for (int b = 0; b < m->B; b++) {
        change[b] = 0;
        for (int t = 0; t < T; t++) {
            const float *h = m->states + ((size_t)b * T + t) * C;
            const float *before = m->before + ((size_t)b * T + t) * C;
            double norm = 0, moved = 0;
            for (int c = 0; c < C; c++) {
                norm += (double)h[c] * h[c];
                moved += ((double)h[c] - before[c]) * ((double)h[c] - before[c]);
            }
            change[b] += sqrt(moved / norm) / T;
        }
    }
}
#endif

// The start of a forward of S loops whose passes are run one by one: tokens m->x -> the state.
static void embed(Model *m, int S) {
    float **w = m->params.tensor;
    m->S = S;
    encoder_forward(m->states, m->x, w[WTE], w[WPE], m->B, m->T, m->config.channels);
}

// Layers begin .. end-1 once, in inference, where all passes use the same memory.
static void run_layers(Model *m, int begin, int end) {
    for (int layer = begin; layer < end; layer++) block_forward(m, 0, layer);
}

// A forward of m->x (B,T) for inference, with S loops. With tau > 0 at most S: a sequence stops
// looping when a loop changes it by less than tau, and the others go on. used (B): loops of each.
static void adaptive_forward(Model *m, Loops loops, int *used) {
    Config c = m->config;
    if (loops.tau <= 0 || c.loop_start == c.loop_end) {
        fixed_loops(m, loops, used);
        return;
    }
    int B = m->B, n = B; // the first n sequences in memory still loop
    size_t size = (size_t)m->T * c.channels, bytes = size * sizeof(float); // of a state
    double *change = (double *)allocate(m->max_B, sizeof(double), "the sequences");
    int *which = (int *)allocate(m->max_B, sizeof(int), "the sequences"); // places in the batch
    for (int b = 0; b < B; b++) which[b] = b;

    embed(m, loops.S);
    run_layers(m, 0, c.loop_start);
    for (int s = 1; n > 0; s++) { // loop s
        copy_memory(m->before, m->states, n * bytes);
        m->B = n; // the layers take only these
        run_layers(m, c.loop_start, c.loop_end);
        model_change(m, change);
        for (int i = n - 1; i >= 0; i--) {
            if (!(change[i] < loops.tau) && s < loops.S) continue;

            // Sequence i has settled. The last one that still loops takes its place.
            copy_memory(m->settled + which[i] * size, m->states + i * size, bytes);
            used[which[i]] = s;
            n--;
            which[i] = which[n];
            if (i < n) copy_memory(m->states + i * size, m->states + n * size, bytes);
        }
    }

    // The tail takes all of them, in their first order.
    m->B = B;
    copy_memory(m->states, m->settled, B * bytes);
    run_layers(m, c.loop_end, c.layers);
    free(change);
    free(which);
}

// What sampling took. main() makes the sampler call counted_forward(), and each user of sample()
// gives it count_step().
typedef struct {
    int forwards;                         // of the model, each on all sequences with work to do
    double sequences, loops, flops;       // summed over forwards: sequences, and of each the loops
    double forward_loops;                 // of all sequences in the last forward
    double *step_sequences, *step_loops;  // by denoising step, or NULL
} Work;
static Work work;

static void counted_forward(Model *m, Loops loops, int *used) {
    adaptive_forward(m, loops, used);
    work.forwards++;
    work.sequences += m->B;
    work.forward_loops = 0;
    for (int b = 0; b < m->B; b++) {
        int passes = num_passes(m->config, used[b]);
        work.forward_loops += used[b];
        work.flops += m->T * pass_flops(m->config, m->T, passes);
    }
    work.loops += work.forward_loops;
}

// After a denoising step of the model (data).
static void count_step(const int *x, int T, int step, void *data) {
    const Model *m = (const Model *)data;
    (void)x;
    (void)T;
    work.flops += m->R * head_flops(m->config); // R masked positions were predicted
    if (!work.step_loops) return;
    work.step_sequences[step] += m->B;
    work.step_loops[step] += work.forward_loops;
}

// =================================================================================================
// 5. train

typedef struct {
    Model model;
    Tokenizer tokenizer; // with --tokenizer
    Data data, val_data;
    Batches batches;
    int loop_dist;
    int val_loops[MOST_LOOPS], num_val;
    double *nelbo;       // of each sequence in a validation
    State state;         // after the last step
    Gradient gradient;   // of the last step, and its number of loops and learning rate
    int S;
    double lr;
    int begin, saved;    // the step at which it began; the last good checkpoint's, or -1
    int model_is_older;  // than state.bin: a program was ended between writing the two
    FILE *log;
    double began;        // when it began, plus the time of validations and checkpoints
    double tokens;       // since then
    double loss_sum;     // since the last line that was printed
    int loss_count;
} Training;

#include "processes.h"

static volatile sig_atomic_t interrupted; // the signal's number

// A second Ctrl-C ends the program at once. But a terminal that is closed may send SIGHUP twice.
static void on_interrupt(int number) {
    interrupted = number;
    signal(number, number == SIGHUP ? SIG_IGN : SIG_DFL);
}

static void catch_interrupts(void) {
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    signal(SIGUSR1, on_interrupt); // mpirun passes it on and lets the processes save
    if (signal(SIGHUP, on_interrupt) == SIG_IGN) signal(SIGHUP, SIG_IGN); // by nohup
    signal(SIGPIPE, SIG_IGN); // to write to a pipe that is closed is then an error
}

// --loop-dist: a step has S = 1 .. S_max loops, each as often; S_max loops; S_max/2 .. S_max, each
// as often; or 1 .. S_max with p(S) ~ 1/FLOPs(S).
enum { LOOPS_UNIFORM, LOOPS_FIXED, LOOPS_TOP, LOOPS_FLOPS };

static int loops_of_step(Config c, int dist, int step) {
    if (dist == LOOPS_FIXED) return c.max_loops;
    int below = dist == LOOPS_TOP ? (c.max_loops - 1) / 2 : 0; // so many of 1, 2, .. are left out
    if (dist != LOOPS_FLOPS) return below + draw_loops(c.max_loops - below, opt_seed, step);

    // Of u, uniform in [0, total), each S gets a piece as long as 1/FLOPs(S).
    double total = 0, sum = 0;
    for (int S = 1; S <= c.max_loops; S++)
        total += 1 / training_flops(c, c.max_seq_len, S, 0.5, 0);
    double u = random_uniform(opt_seed, STREAM_LOOPS, step, 0) * total;
    for (int S = 1; S < c.max_loops; S++) {
        sum += 1 / training_flops(c, c.max_seq_len, S, 0.5, 0);
        if (u < sum) return S;
    }
    return c.max_loops;
}

static void check_train_options(void) {
    if (!opt_data || !opt_out) die(USAGE, "train needs --data and --out; see loopmdm train --help");
    if (!opt_tokenizer && opt_vocab < 0)
        die(USAGE, "train needs --tokenizer, or --vocab for the number of tokens");
    if (opt_floor > 1) die(USAGE, "--floor is a share of --lr: at most 1, not %g", opt_floor);
    if (opt_ema >= 1)
        die(USAGE, "--ema is what the average keeps in a step: below 1, not %g", opt_ema);
    only_with("--val-data", opt_val_data != NULL, " loops val-rows val-every ");
    if (opt_init && opt_resume)
        die(USAGE, "--init excludes --resume, which has its parameters from --out");
}

// Opens tokenizer and data, and builds the model without memory.
static void train_open(Training *t) {
    static const char *const dists[] = {"uniform", "fixed", "top", "flops"};
    const Tokenizer *tokenizer = opt_tokenizer ? &t->tokenizer : NULL;
    if (tokenizer) {
        t->tokenizer = tokenizer_open(opt_tokenizer);
        if (opt_vocab >= 0 && opt_vocab != tokenizer->vocab_size)
            die(USAGE, "--vocab is %d, but %s has %d tokens", opt_vocab, opt_tokenizer,
                tokenizer->vocab_size);
    }

    // The model, without memory, and what a step takes.
    Config c = config_from_options(tokenizer ? tokenizer->vocab_size : opt_vocab);
    int T = c.max_seq_len;
    if (fmax((double)opt_batch * opt_accum * ranks, opt_val_rows) * T > INT_MAX / 4)
        die(USAGE, "--batch, --accum or --val-rows: too many rows of %d tokens", T);
    const Batches batches = {opt_seed, opt_batch * opt_accum * ranks, opt_batch, 0};
    const State start = {
        STATE_MAGIC, STATE_VERSION, c, 0, 0, batches.sequences, opt_seed, 0, opt_ema > 0, 0
    };
    t->loop_dist = choose("loop-dist", opt_loop_dist, dists, COUNT(dists));
    t->batches = batches;
    t->state = start;
    t->nelbo = (double *)allocate(max_int(opt_batch, opt_val_rows), sizeof(double), "validation");
    model_build(&t->model, c);
    t->model.keeps_ema = start.has_average;

    // The data.
    t->data = open_data(opt_data, c.vocab_size, T);
    fix_rows(&t->data, opt_data, tokenizer, T);
    if (!opt_val_data) return;
    t->val_data = open_data(opt_val_data, c.vocab_size, T);
    fix_rows(&t->val_data, opt_val_data, tokenizer, T);
    t->num_val = loop_numbers(c, t->val_loops, MOST_LOOPS);
    for (int i = 0; i < t->num_val; i++)
        if (t->val_loops[i] > c.max_loops)
            die(USAGE, "--loops: training has memory for %d loops; use eval for more", c.max_loops);
}

// --out belongs to this training until the end of the program.
static void lock_folder(void) {
    if (!opt_resume) make_folders(opt_out);
    int lock = open(opt_out, O_RDONLY | O_DIRECTORY);
    int failed = lock < 0 || flock(lock, LOCK_EX | LOCK_NB); // it does not wait for the lock
    if (failed && lock >= 0 && errno == EWOULDBLOCK)
        die(FAILED, "--out: another training is writing into %s", opt_out);
    if (failed) die(FAILED, "--out: cannot open %s: %s", opt_out, strerror(errno));
}

// Exits if --out holds what must stay.
static void check_folder(void) {
    for (int i = 0; i < COUNT(model_files); i++) {
        char *path = concat(opt_out, model_files[i]);
        int is_model = i < 2; // model.bin, state.bin
        keep_apart_from_data("--out", path, "--data", opt_data);
        keep_apart_from_data("--out", path, "--val-data", opt_val_data);
        if (!opt_resume && is_model && !access(path, F_OK))
            die(USAGE, "%s is already there: continue it with --resume, or choose another --out",
                path);
        check_regular(path);
        free(path);
    }
}

// The tokenizer goes with the model. Another one must not be there.
static void copy_tokenizer(const Tokenizer *t, int now) {
    char *copy = concat(opt_out, "/tokenizer.bin");
    if (now) write_file(copy, t->file, t->file_size);
    else if (!access(copy, F_OK)) {
        Tokenizer old = tokenizer_open(copy);
        if (old.file_size != t->file_size || memcmp(old.file, t->file, t->file_size))
            die(USAGE, "--tokenizer %s is not %s, which is there already: give that one, or choose "
                "another --out", opt_tokenizer, copy);
    }
    free(copy);
}

// A new model: --init's parameters, or random ones.
static void train_new(Model *m) {
    Config c = m->config;
    size_t n = m->params.total;
    float *params = (float *)allocate(n, sizeof(float), "the parameters");
    if (opt_init) {
        Model other;
        const int *file = model_open(&other, opt_init);
        other.config.loop_start = c.loop_start; // the loop may differ
        other.config.loop_end = c.loop_end;
        other.config.max_loops = c.max_loops;
        if (memcmp(&other.config, &c, sizeof c))
            die(USAGE, "--init: the model in %s has another shape (loopmdm info --model %s)",
                opt_init, opt_init);
        memcpy(params, file + HEADER_INTS, n * sizeof(float));
    } else {
        init_parameters(params, c, opt_seed);
    }
    model_reserve(m, opt_batch, c.max_seq_len, c.max_loops, 1, opt_recompute);
    model_set_parameters(m, params);
    if (m->keeps_ema) write_memory(m->ema.data, params, n * sizeof(float));
    free(params);
}

// Goes on where state.bin is.
static void train_resume(Model *m, State *state) {
    Config c = m->config;
    char *path = concat(opt_out, "/state.bin");
    const State *saved = state_open(path);

    // The same options, or the run would not be the same as one without a break.
    if (memcmp(&saved->config, &c, sizeof c))
        die(USAGE, "--resume: %s has another shape (loopmdm info --model %s); give the options it "
            "was begun with", path, opt_out);
    if (saved->has_average != state->has_average)
        die(USAGE, "--resume: this run was begun %s --ema",
            saved->has_average ? "with" : "without");
    if (saved->seed != state->seed || saved->sequences != state->sequences)
        die(USAGE, "--resume: this run was begun with --seed %llu and --batch times --accum%s = %d",
            (unsigned long long)saved->seed, ranks > 1 ? " times processes" : "",
            saved->sequences);
    if (saved->step > opt_steps)
        die(USAGE, "--resume: %s is at step %d already, beyond --steps %d", path, saved->step,
            opt_steps);

    model_reserve(m, opt_batch, c.max_seq_len, c.max_loops, 1, opt_recompute);
    state_load(m, saved);
    *state = *saved;
    free(path);
}

static void print_memory(const Model *m) {
    const double MiB = 1 << 20;
    printf("memory: %.1f MiB parameters, %.1f MiB gradients, %.1f MiB optimizer state, "
           "%.1f MiB activations\n", m->bytes[PARAMETERS] / MiB, m->bytes[GRADIENTS] / MiB,
           m->bytes[OPTIMIZER] / MiB, m->bytes[ACTIVATIONS] / MiB);
}

// The loss is not finite: says where, and what is left.
static void stop_training(const Training *t, int step, double loss, double norm) {
    char checkpoint[64] = "there is no checkpoint yet";
    if (t->saved < 0 && opt_resume)
        die(FAILED, "step %d: the %s not finite from the start: the model in %s went wrong before "
            "it was saved; begin anew", step, isfinite(loss) ? "gradient is" : "loss is", opt_out);
    if (t->saved >= 0)
        snprintf(checkpoint, sizeof checkpoint, "the last good checkpoint is step %d", t->saved);
    die(FAILED, "step %d: the loss is %g, the gradient's norm %g; %s in %s. Try a lower --lr", step,
        loss, norm, checkpoint, opt_out);
}

// Exits if the model's loss is not finite: such a model is never saved.
static void check_loss(Training *t) {
    Loops loops = {t->model.config.max_loops, 0};
    Evaluation e = evaluate(&t->model, &t->data, loops, opt_batch, opt_batch, opt_seed, t->nelbo);
    if (!isfinite(e.nelbo)) stop_training(t, t->state.step, e.nelbo, t->gradient.norm);
}

static void print_training(const Training *t) {
    Config c = t->model.config;
    int64_t tokens = 0, unused = 0; // in shards that are too short for a sequence
    for (int i = 0; i < t->data.num_shards; i++) {
        int64_t n = t->data.shards[i].count;
        if (n < c.max_seq_len) unused += n;
        else tokens += n;
    }
    printf("%zu parameters, %d layers, %s, %lld training tokens", t->model.params.total, c.layers,
           loop_of(c), (long long)tokens);
    if (unused) printf("; %lld more are in shards that are too short", (long long)unused);
    printf("\n");
    print_recipe();
    if (ranks > 1)
        printf("%d processes; each takes %d sequences of a step\n", ranks,
               t->batches.sequences / ranks);
    printf("matrix products: %s\n", products);
    print_memory(&t->model);
}

// All processes look at --out, but only process 0 writes.
static void train_begin(Training *t) {
    if (rank == 0) lock_folder();
    check_folder();
    if (opt_tokenizer) copy_tokenizer(&t->tokenizer, 0);
    if (opt_resume) train_resume(&t->model, &t->state);
    else train_new(&t->model);
    t->saved = -1;
    t->begin = t->state.step;

    char *path = concat(opt_out, "/model.bin");
    t->model_is_older = opt_resume && !model_is_of(path, t->begin);
    processes_check(t);
    any_process(&t->model_is_older, 1);
    if (t->model_is_older) check_loss(t);
    free(path);
    if (rank > 0) t->log = fopen("/dev/null", "w");
    else t->log = log_open(opt_out, t->begin, t->val_loops, t->num_val);
    if (opt_tokenizer && rank == 0) copy_tokenizer(&t->tokenizer, 1);
    print_training(t);
}

static void print_step(Training *t, double now) {
    int step = t->state.step;
    double took = now - t->began;
    int left = (int)(took / (step - t->begin) * (opt_steps - step)); // seconds
    double loss = t->loss_sum / t->loss_count; // a mean: 1/t makes the loss of one step noisy
    printf("step %d/%d | loss %.4f | loops %d | norm %.2f | lr %.2e | %.0f tokens/s | "
           "%d:%02d left\n", step, opt_steps, loss, t->S, t->gradient.norm, t->lr,
           t->tokens / took, left / 60, left % 60);
    t->loss_sum = 0;
    t->loss_count = 0;
}

// Prints the NELBO of --val-data for each number of loops, and adds it to the log's line.
static void validate(Training *t) {
    printf("validation NELBO, nats per token:");
    for (int i = 0; i < t->num_val; i++) {
        Loops loops = {t->val_loops[i], 0};
        Evaluation e = evaluate(&t->model, &t->val_data, loops, opt_val_rows, opt_batch, opt_seed,
                                t->nelbo);
        printf("  S=%d %.4f", loops.S, e.nelbo);
        fprintf(t->log, ",%.6f", e.nelbo);
    }
    printf("\n");
}

static void save_checkpoint(Training *t) {
    int step = t->state.step;
    check_loss(t);
    must_agree_on_parameters(&t->model);
    // state.bin first: --resume can write model.bin from it
    if (rank == 0) state_save(&t->model, opt_out, &t->state);
    if (rank == 0) model_save(&t->model, opt_out, step);
    wait_for_all(); // where one process has ended, the launcher may end the others
    t->saved = step;
}

// What --resume began with has proved to be good.
static void state_is_good(Training *t) {
    if (t->model_is_older && rank == 0) model_save(&t->model, opt_out, t->begin);
    t->saved = t->begin;
}

static void train_step(Training *t) {
    Model *m = &t->model;
    State *s = &t->state;
    int T = m->config.max_seq_len;
    double tokens = (double)s->sequences * T;
    t->S = loops_of_step(m->config, t->loop_dist, s->step);
    t->lr = learning_rate(opt_lr, opt_floor, opt_warmup, opt_steps, s->step);
    t->batches.visible = visible_share(opt_noise_warmup, s->step);

    Gradient g = train_gradient(m, &t->data, t->batches, s->step, t->S);
    if (!isfinite(g.loss) || !isfinite(g.norm)) stop_training(t, s->step + 1, g.loss, g.norm);
    if (opt_resume && s->step == t->begin) state_is_good(t);
    s->step++;
    AdamW adamw = {t->lr, 0.9, 0.95, 1e-8, opt_weight_decay, opt_clip, opt_ema};
    model_update(m, adamw, g.norm, s->step);
    s->flops += training_flops(m->config, T, t->S, g.masked / tokens, opt_recompute) * tokens;

    t->gradient = g;
    t->tokens += tokens;
    t->loss_sum += g.loss;
    t->loss_count++;
}

// What is printed, logged and saved after a step that took some seconds.
static void report_step(Training *t, double took) {
    double now = seconds(), tokens = (double)t->state.sequences * t->model.config.max_seq_len;
    int step = t->state.step, last = step == opt_steps;
    int validates = t->num_val && (step % opt_val_every == 0 || last); // Ctrl-C waits for it
    int every = min_int(200, max_int(1, opt_steps / 20)); // steps between printed lines
    fprintf(t->log, "%d,%d,%.6f,%.9g,%.9g,%.9g,%.0f,%.9g", step, t->S, t->gradient.mean_t,
            t->gradient.loss, t->lr, t->gradient.norm, tokens / took, t->state.flops);

    if (validates || last || step == t->begin + 1 || step % every == 0) print_step(t, now);
    if (validates) validate(t);
    else for (int i = 0; i < t->num_val; i++) fputc(',', t->log); // empty columns
    fputc('\n', t->log);
    if (fflush(t->log)) die(FAILED, "cannot write log.csv in %s: %s", opt_out, strerror(errno));

    // What is learned is saved, even if nobody reads the output any more.
    int asked[] = {interrupted, fflush(stdout) || ferror(stdout)};
    any_process(asked, 2); // all processes save and stop at the same step
    int stop = asked[0], lost = asked[1];
    if (step % opt_save_every == 0 || last || stop || lost) save_checkpoint(t);
    t->began += seconds() - now;  // neither validating nor saving counts in tokens/s
    if (lost && ranks == 1) stop = interrupted; // a closed terminal's signal may come late
    if (lost && !stop && !last)
        die(FAILED, "standard output is closed or full; the checkpoint of step %d is in %s, "
            "--resume continues", step, opt_out);
    if (stop && !last) {
        printf("stopped after step %d; the checkpoint is in %s, --resume continues\n", step,
               opt_out);
        processes_end();
        exit(128 + (interrupted ? interrupted : SIGTERM)); // 130 after Ctrl-C, as shells have it
    }
}

static void train(void) {
    Training t;
    memset(&t, 0, sizeof t);
    check_train_options();
    processes_begin();
    train_open(&t);
    train_begin(&t);
    catch_interrupts();
    t.began = seconds();
    while (t.state.step < opt_steps) {
        double step_began = seconds();
        train_step(&t);
        report_step(&t, seconds() - step_began);
    }
    if (t.begin == opt_steps) state_is_good(&t); // there was no step to prove more
    if (fclose(t.log)) die(FAILED, "cannot write log.csv in %s: %s", opt_out, strerror(errno));
    free(t.nelbo);
    model_free(&t.model);
    printf("step %d of %d is done; the model is in %s\n", t.state.step, opt_steps, opt_out);
}

// =================================================================================================
// 6. eval

// A model from a file of model_open(), with memory for B sequences.
static void load_model(Model *m, const int *file, int B) {
    model_reserve(m, B, m->config.max_seq_len, 1, 0, 0);
    model_set_parameters(m, (const float *)(file + HEADER_INTS));
}

static SampleOptions sample_options(Loops loops, int steps, double temperature) {
    static const char *const orders[] = {"random", "confidence", "margin", "entropy", "threshold"};
    int order = choose("order", opt_order, orders, COUNT(orders)), score = SCORE_PROBABILITY;
    if (order == ORDER_MARGIN) score = SCORE_MARGIN;
    if (order == ORDER_ENTROPY) score = SCORE_ENTROPY;
    if (opt_top_p > 1 || opt_threshold > 1)
        die(USAGE, "--top-p and --threshold are probabilities: at most 1");
    only_with("--order threshold", order == ORDER_THRESHOLD, " threshold ");
    only_with("an order that has a schedule; threshold has none", order != ORDER_THRESHOLD,
              " steps ");
    only_with("--temperature above 0", temperature > 0, " top-k top-p ");

    Draw draw = {temperature, opt_top_k, opt_top_p, score, opt_seed};
    SampleOptions o = {steps, order, opt_block, opt_threshold, loops, draw};
    return o;
}

// How many blocks of x (T) have a MASK: each needs a step of its own.
static int blocks_to_fill(const int *x, int T, int mask) {
    int n = 0, last = -1, size = opt_block ? opt_block : T;
    for (int t = 0; t < T; t++) {
        if (x[t] != mask || t / size == last) continue; // t / size: the block
        last = t / size;
        n++;
    }
    return n;
}

static void check_steps(int steps, int blocks) {
    if (steps < blocks)
        die(USAGE, "--steps is %d, and %d blocks are to be filled in: give each one step at least",
            steps, blocks);
}

// Of eval and attention: --rows of T tokens, and --buckets.
static void check_rows(int T) {
    if ((double)opt_rows * T > INT_MAX / 4) die(USAGE, "--rows %d are too many", opt_rows);
    if (opt_buckets > 1000) die(USAGE, "--buckets is %d; at most 1000", opt_buckets);
}

static int bucket_of(double t) { return min_int(opt_buckets - 1, (int)(t * opt_buckets)); }

// The tokens in a byte of text, over the n sequences that evaluate() takes. End-of-text counts as
// one byte, which a file needs between texts; those that fill up a sequence after it are no text.
static double tokens_per_byte(const Data *d, const Tokenizer *t, int n, int T) {
    int *tokens = (int *)allocate(T, sizeof(int), "a sequence");
    double count = 0, bytes = 0;
    for (int r = 0; r < n; r++)
        for (int i = evaluation_sequence(d, tokens, r, n, T); i < T; i++) {
            count++;
            if (tokens[i] != t->eot) bytes += t->length[tokens[i]];
            else if (i == 0 || tokens[i - 1] != t->eot) bytes++;
        }
    free(tokens);
    return count / bytes;
}

// How many tokens of a sequence can be masked: the mean over the n sequences that evaluate() takes.
static double maskable_tokens(const Data *d, int n, int T) {
    int *tokens = (int *)allocate(T, sizeof(int), "a sequence");
    double sum = 0;
    for (int r = 0; r < n; r++) sum += T - evaluation_sequence(d, tokens, r, n, T);
    free(tokens);
    return sum / n;
}

// Prints the NELBO for each of n numbers of loops (or taus).
static void eval_nelbo(Model *m, int step, const Data *d, const Tokenizer *t, const Loops *loops,
                       int n) {
    Config c = m->config;
    int T = c.max_seq_len;
    double bits = t ? tokens_per_byte(d, t, opt_rows, T) / log(2) : 0; // 1 nat/token in bits/byte
    double head = 0.5 * maskable_tokens(d, opt_rows, T) * head_flops(c); // it sees half of them
    double *nelbo = (double *)allocate(opt_rows, sizeof(double), "the sequences");
    printf("%s, step %d: NELBO of %d row%s of %d tokens\n\n", opt_model, step, opt_rows,
           opt_rows > 1 ? "s" : "", T);
    printf("%sloops  passes  NELBO, nats/token  perplexity at most%s  GFLOP/row  tokens/s\n",
           opt_adaptive ? "   tau  " : "", bits > 0 ? "  bits/byte" : "");
    for (int i = 0; i < n; i++) {
        double began = seconds();
        memset(&work, 0, sizeof work);
        Evaluation e = evaluate(m, d, loops[i], opt_rows, m->max_B, opt_seed, nelbo);
        double mean_loops = work.loops / work.sequences; // with --adaptive sequences differ
        double passes = num_passes(c, 0) + mean_loops * (c.loop_end - c.loop_start);
        double gflop = (T * pass_flops(c, T, passes) + head) * 1e-9;
        double speed = (double)opt_rows * T / (seconds() - began);

        if (!isfinite(e.nelbo))
            die(FAILED, "--model: the loss of %s is %g at %d loops: its training went wrong",
                opt_model, e.nelbo, loops[i].S);
        if (opt_adaptive) printf("%6g  %5.2f  %6.2f", loops[i].tau, mean_loops, passes);
        else printf("%5d  %6.0f", loops[i].S, passes);
        printf("    %.4f +- ", e.nelbo);
        if (opt_rows > 1) printf("%.4f", e.error);
        else printf("%6s", "?"); // one number has no spread
        printf("  %18.2f", exp(e.nelbo));
        if (bits > 0) printf("  %9.3f", e.nelbo * bits);
        printf("  %9.4f  %8.0f\n", gflop, speed);
        fflush(stdout);
    }
    free(nelbo);
}

// ---- --by-t: cross entropy of masked tokens by noise level, whose mean over t is the NELBO ----

// masked (buckets): the masked positions of the sequences that evaluate() takes.
static void count_masked(const Data *d, int T, double *masked) {
    int *tokens = (int *)allocate(T, sizeof(int), "a sequence");
    Noise noise = {opt_seed, 0, 0, opt_rows, 0}; // that of evaluation_batch()
    for (int r = 0; r < opt_rows; r++) {
        double t = noise_level(noise, r);
        int i = evaluation_sequence(d, tokens, r, opt_rows, T);
        for (; i < T; i++) {
            double u = random_uniform(noise.seed, STREAM_MASK, noise.step, (uint64_t)r * T + i);
            masked[bucket_of(t)] += u < t;
        }
    }
    free(tokens);
}

// sums (buckets): the cross entropies of these positions, for one Loops.
static void sum_by_t(Model *m, const Data *d, Loops loops, double *sums) {
    int T = m->config.max_seq_len, *tokens = (int *)allocate(T, sizeof(int), "a sequence");
    double *nelbo = (double *)allocate(opt_rows, sizeof(double), "the sequences");
    Noise noise = {opt_seed, 0, 0, opt_rows, 0};
    evaluate(m, d, loops, opt_rows, m->max_B, opt_seed, nelbo);
    for (int r = 0; r < opt_rows; r++) {
        double t = noise_level(noise, r);
        int given = evaluation_sequence(d, tokens, r, opt_rows, T);
        sums[bucket_of(t)] += nelbo[r] * t * (T - given); // without the weight 1 / (t (T - given))
    }
    free(tokens);
    free(nelbo);
}

static void eval_by_t(Model *m, const Data *d, const Loops *loops, int n) {
    int K = opt_buckets;
    double *masked = (double *)allocate((size_t)(n + 1) * K, sizeof(double), "the table");
    double *sums = masked + K;
    count_masked(d, m->config.max_seq_len, masked);
    for (int i = 0; i < n; i++) sum_by_t(m, d, loops[i], sums + i * K);

    // A row of the table for each bucket of t, a column for each number of loops.
    Csv csv;
    csv_open(&csv, opt_by_t, "loops,t_low,t_high,masked_tokens,nats_per_masked_token");
    printf("\nnats per masked token\n        t");
    for (int i = 0; i < n; i++) printf("  %5s%-3d", "S=", loops[i].S);
    printf("\n");
    for (int k = 0; k < K; k++) {
        double low = k / (double)K, high = (k + 1) / (double)K;
        printf("%4.2f-%4.2f", low, high);
        for (int i = 0; i < n; i++) {
            double count = masked[k], loss = sums[i * K + k] / count;
            if (!count) { // no sequence has this noise level
                printf("         -");
                continue;
            }
            printf("  %8.4f", loss);
            fprintf(csv.file, "%d,%g,%g,%.0f,%.6f\n", loops[i].S, low, high, count, loss);
        }
        printf("\n");
    }
    csv_close(&csv);
    printf("written to %s\n", opt_by_t);
    free(masked);
}

// ---- --by-loop: what does a loop do to the state? It has no normalization of its own ----

enum { LOOP_NORM, LOOP_CHANGE, LOOP_SECOND, LOOP_COSINE, LOOP_MOVED, NUM_BY_LOOP };

// Adds to sum (NUM_BY_LOOP), for each state h0 (n) of C channels: its norm; relative to it, the
// first and second difference; the cosine between the last step and the one before, if the state
// moved in both, and how many did. h1 and h2 are the states one and two loops before.
static void add_differences(double *sum, const float *h0, const float *h1, const float *h2,
                            size_t n, int C) {
    for (size_t at = 0; at < n * C; at += C) {
        double norm = 0, first = 0, second = 0, earlier = 0, product = 0;
        for (size_t i = at; i < at + C; i++) {
            double x = h0[i], step = x - h1[i], step_before = (double)h1[i] - h2[i];
            norm += x * x;
            first += step * step;
            second += (step - step_before) * (step - step_before);
            earlier += step_before * step_before;
            product += step * step_before;
        }
        sum[LOOP_NORM] += sqrt(norm);
        if (norm > 0) {
            sum[LOOP_CHANGE] += sqrt(first / norm);
            sum[LOOP_SECOND] += sqrt(second / norm);
        }
        if (first > 0 && earlier > 0) {
            sum[LOOP_COSINE] += product / sqrt(first * earlier);
            sum[LOOP_MOVED]++;
        }
    }
}

// sums (S+1, NUM_BY_LOOP): of the state before the loop and after each of S loops.
static void sum_by_loop(Model *m, const Data *d, int S, double *sums) {
    Config c = m->config;
    int T = c.max_seq_len, C = c.channels, B = m->max_B;
    int *targets = (int *)allocate((size_t)B * (T + 1), sizeof(int), "a batch");
    int *given = targets + (size_t)B * T;
    size_t size = (size_t)B * T * C;
    float *states = (float *)allocate(3 * size, sizeof(float), "the states");
    for (int first = 0; first < opt_rows; first += B) {
        int n = min_int(B, opt_rows - first);
        evaluation_batch(m, d, targets, given, first, n, opt_rows, opt_seed);
        embed(m, S); // a forward as in adaptive_forward(), up to the last loop
        run_layers(m, 0, c.loop_start);
        for (int s = 0; s <= S; s++) {
            // The states of the last three loops take turns in memory.
            float *h0 = states + s % 3 * size, *h1 = states + (s + 2) % 3 * size;
            float *h2 = states + (s + 1) % 3 * size;
            if (s > 0) run_layers(m, c.loop_start, c.loop_end);
            read_memory(h0, m->states, (size_t)n * T * C * sizeof(float));
            add_differences(sums + NUM_BY_LOOP * s, h0, h1, h2, (size_t)n * T, C);
        }
    }
    free(targets);
    free(states);
}

static void eval_by_loop(Model *m, const Data *d, int S) {
    double *sums = (double *)allocate(NUM_BY_LOOP * (size_t)(S + 1), sizeof(double), "the table");
    double positions = (double)opt_rows * m->config.max_seq_len;
    sum_by_loop(m, d, S, sums);
    Csv csv;
    csv_open(&csv, opt_by_loop, "loop,norm,change,second_difference,cosine");
    printf("\nafter loop      norm    change  second difference  cosine of steps\n");
    for (int s = 0; s <= S; s++) {
        double mean[NUM_BY_LOOP], moved = sums[NUM_BY_LOOP * s + LOOP_MOVED];
        for (int i = 0; i < NUM_BY_LOOP; i++) mean[i] = sums[NUM_BY_LOOP * s + i] / positions;
        double cosine = sums[NUM_BY_LOOP * s + LOOP_COSINE] / moved;

        // A change needs one loop; a second difference and the cosine of two steps need two.
        printf("%10d  %8.3f", s, mean[LOOP_NORM]);
        if (s > 0) printf("  %8.4f", mean[LOOP_CHANGE]);
        if (s > 1) printf("  %17.4f", mean[LOOP_SECOND]);
        if (s > 1 && moved > 0) printf("  %15.4f", cosine);
        printf("\n");
        fprintf(csv.file, "%d,%.6f,", s, mean[LOOP_NORM]);
        if (s > 0) fprintf(csv.file, "%.6f", mean[LOOP_CHANGE]);
        fprintf(csv.file, ",");
        if (s > 1) fprintf(csv.file, "%.6f", mean[LOOP_SECOND]);
        fprintf(csv.file, ",");
        if (s > 1 && moved > 0) fprintf(csv.file, "%.6f", cosine);
        fprintf(csv.file, "\n");
    }
    csv_close(&csv);
    printf("written to %s\n", opt_by_loop);
    free(sums);
}

// ---- --sudoku and --exact-match: puzzles solved, questions answered ----

// The last number in s: of "7, then -1,000.5." it is -1000.5. NaN if there is none. Changes s.
static double last_number(char *s) {
    static const char digits[] = "0123456789";
    double number = NAN;
    char *begin = s, *to = s, *end;
    for (char *from = s; *from; from++) // 1,234 is one number
        if (*from != ',') *to++ = *from;
    *to = 0;
    for (end = s; *(s += strcspn(s, digits)); s = end) {
        // The point of .5 belongs to the number. The second point of 1.5.5 does not.
        int follows = !isnan(number) && s - 1 == end; // the number before
        int point = s > begin && s[-1] == '.' && !follows;
        char *from = s - point;
        from -= from > begin && from[-1] == '-';
        end = s + strspn(s, digits);
        if (*end == '.' && !point) end += 1 + strspn(end + 1, digits);
        char after = *end;
        *end = 0; // strtod() would take 2e3 and 0x10 for one number
        number = strtod(from, NULL);
        *end = after;
    }
    return number;
}

// The number that an answer ends with: the last one after its last ####, or else its last one, as
// in GSM8K. NaN if it has none.
static double final_number(const Tokenizer *t, const int *tokens, int T) {
    size_t bytes;
    char *text = text_of(t, tokens, T, 0, &bytes), *s = text, *mark;
    while ((mark = strstr(s, "####"))) s = mark + 4; // after the last one
    double number = last_number(s);
    free(text);
    return number;
}

typedef struct {
    int n, T, blocks;    // n sequences; the most blocks that one of them has to fill in
    int *start, *wanted; // (n,T) with MASK where the solution or answer goes; with it
    int *given;          // (n) where the answer begins, 0 for a puzzle
} Tasks;

// Sequence r becomes a puzzle: in the data its solution follows it.
static void read_puzzle(Tasks *tasks, int r, const Data *d, const Tokenizer *t, int mask) {
    int T = tasks->T, *x = tasks->start + (size_t)r * T, *solution = tasks->wanted + (size_t)r * T;
    int blanks = 0, differs = 0;
    data_sequence(d, x, 2 * (int64_t)r, T, T);
    data_sequence(d, solution, 2 * (int64_t)r + 1, T, T);
    for (int i = 0; i < T; i++) {
        int blank = x[i] == t->byte_id[(int)'.']; // the data have the token . where a cell is empty
        blanks += blank;
        differs += !blank && x[i] != solution[i];
        if (blank) x[i] = mask;
    }
    if (differs || !blanks)
        die(FAILED, "%s: row %d is no puzzle with its solution after it", opt_data, 2 * r);
}

// Sequence r becomes a question: its answer is masked.
static void read_question(Tasks *tasks, int r, const Data *d, const Tokenizer *t, int mask) {
    int T = tasks->T, *x = tasks->start + (size_t)r * T, *answer = tasks->wanted + (size_t)r * T;
    int given = data_sequence(d, answer, r, T, T);
    for (int i = 0; i < T; i++) x[i] = i < given ? answer[i] : mask;
    if (isnan(final_number(t, answer + given, T - given)))
        die(FAILED, "%s: the answer in row %d has no number, which --exact-match compares",
            opt_data, r);
    tasks->given[r] = given;
}

static Tasks read_tasks(const Model *m, const Data *d, const Tokenizer *t) {
    int T = m->config.max_seq_len, mask = m->config.vocab_size;
    int64_t available = data_sequences(d, T, T) / (opt_sudoku ? 2 : 1);
    Tasks tasks = {available < opt_rows ? (int)available : opt_rows, T, 0, NULL, NULL, NULL};
    if (!tasks.n) die(FAILED, "%s has no puzzle with its solution after it", opt_data);
    size_t size = (size_t)tasks.n * T;
    tasks.start = (int *)allocate(2 * size + tasks.n, sizeof(int), "the sequences");
    tasks.wanted = tasks.start + size;
    tasks.given = tasks.wanted + size;
    for (int r = 0; r < tasks.n; r++) {
        if (opt_sudoku) read_puzzle(&tasks, r, d, t, mask);
        else read_question(&tasks, r, d, t, mask);
        int blocks = blocks_to_fill(tasks.start + (size_t)r * T, T, mask);
        tasks.blocks = max_int(tasks.blocks, blocks);
    }
    return tasks;
}

// Whether x (T) solves task r.
static int is_right(Tasks tasks, int r, const int *x, const Tokenizer *t) {
    int T = tasks.T, given = tasks.given[r];
    const int *wanted = tasks.wanted + (size_t)r * T;
    if (opt_sudoku) return !memcmp(x, wanted, T * sizeof(int));
    return final_number(t, x + given, T - given) == final_number(t, wanted + given, T - given);
}

// Samples the solutions of all tasks; returns how many are right.
static int solve(Model *m, Tasks tasks, const Tokenizer *t, SampleOptions o) {
    int T = tasks.T, right = 0;
    int *x = (int *)allocate((size_t)m->max_B * T, sizeof(int), "a batch");
    memset(&work, 0, sizeof work);
    for (int first = 0; first < tasks.n; first += m->max_B) {
        int n = min_int(m->max_B, tasks.n - first);
        memcpy(x, tasks.start + (size_t)first * T, (size_t)n * T * sizeof(int));
        sample(m, x, n, T, o, first, count_step, m);
        for (int b = 0; b < n; b++) right += is_right(tasks, first + b, x + b * T, t);
    }
    free(x);
    return right;
}

// Prints the share that is right for each number of loops (or tau) and of denoising steps.
static void eval_solutions(Model *m, int step, const Data *d, const Tokenizer *t,
                           const Loops *loops, int num_loops) {
    if (!t) die(FAILED, "%s has no tokenizer.bin; name one with --tokenizer", opt_model);
    if (opt_exact_match && !opt_answers_after) die(USAGE, "--exact-match needs --answers-after");

    Tasks tasks = read_tasks(m, d, t);
    int steps[MOST_LOOPS], num_steps = parse_list("steps", opt_eval_steps, steps, MOST_LOOPS);
    if (sample_options(loops[0], 1, opt_eval_temperature).order == ORDER_THRESHOLD) {
        num_steps = 1; // as many as it takes
        steps[0] = 0;
    } else {
        for (int k = 0; k < num_steps; k++) check_steps(steps[k], tasks.blocks);
    }

    printf("%s, step %d: %d %s, order %s\n\n", opt_model, step, tasks.n,
           opt_sudoku ? "boards" : "questions", opt_order);
    printf("%s  loops  steps  forwards      right  GFLOP/row\n", opt_adaptive ? "   tau" : "");
    for (int i = 0; i < num_loops; i++)
        for (int k = 0; k < num_steps; k++) {
            SampleOptions o = sample_options(loops[i], steps[k], opt_eval_temperature);
            double right = 100.0 * solve(m, tasks, t, o) / tasks.n;
            double mean_loops = work.loops / fmax(1, work.sequences);
            if (opt_adaptive) printf("%6g  %5.2f", loops[i].tau, mean_loops);
            else printf("%7.0f", mean_loops);
            printf("  %5d  %8.1f  %7.2f %%  %9.4f\n", steps[k], work.sequences / tasks.n, right,
                   work.flops * 1e-9 / tasks.n);
            fflush(stdout);
        }
    free(tasks.start);
}

static void check_eval_options(void) {
    int tasks = opt_sudoku || opt_exact_match;
    int kinds = opt_sudoku + opt_exact_match + (opt_by_t != NULL) + (opt_by_loop != NULL);
    if (opt_adaptive && (opt_by_t || opt_by_loop))
        die(USAGE, "--by-t and --by-loop are for fixed numbers of loops: they exclude --adaptive");
    only_with("--sudoku or --exact-match", tasks,
              " steps order threshold block temperature top-k top-p ");
    only_with("--by-t", opt_by_t != NULL, " buckets ");
    Loops any = {1, 0};
    sample_options(any, 1, opt_eval_temperature); // exits if they make no sense
    if (kinds > 1)
        die(USAGE, "--sudoku, --exact-match, --by-t and --by-loop exclude each other");
    if (opt_by_t) csv_check("--by-t", opt_by_t);
    if (opt_by_loop) csv_check("--by-loop", opt_by_loop);
}

static void eval(void) {
    Model m;
    Tokenizer tokenizer;
    Loops loops[MOST_LOOPS];
    if (!opt_model || !opt_data)
        die(USAGE, "eval needs --model and --data; see loopmdm eval --help");

    // All that may be wrong is checked before the model gets memory and computes.
    const int *file = model_open(&m, opt_model);
    int T = m.config.max_seq_len, step = file[AT_STEP];
    int n = inference_loops(m.config, loops, MOST_LOOPS);
    const Tokenizer *t = find_tokenizer(&tokenizer, &m) ? &tokenizer : NULL;
    Data data = open_data(opt_data, m.config.vocab_size, T);
    fix_rows(&data, opt_data, t, T);
    check_rows(T);
    check_eval_options();
    if (opt_by_loop && m.config.loop_start == m.config.loop_end)
        die(USAGE, "--by-loop: this model has no loop");

    load_model(&m, file, min_int(opt_eval_batch, opt_rows));
    if (opt_sudoku || opt_exact_match) eval_solutions(&m, step, &data, t, loops, n);
    else eval_nelbo(&m, step, &data, t, loops, n);
    if (opt_by_t) eval_by_t(&m, &data, loops, n);
    if (opt_by_loop) eval_by_loop(&m, &data, loops[n - 1].S);
    model_free(&m);
}

// =================================================================================================
// 7. sample

// ---- --watch and --show-loops: the text or board while it is denoised ----

typedef struct {
    Model *model;
    const Tokenizer *tokenizer;
    int side;       // of a board, or 0
    int shown;      // tokens that are shown even if one of them is an end-of-text
    int show_loops; // S with --show-loops, or 0
    int lines;      // drawn so far on a terminal, to be drawn over
} Watch;

static char *text_or_board(const Watch *w, const int *x, int T, int grid, size_t *bytes) {
    if (w->side) return board_text(w->tokenizer, x, w->side, grid, bytes);
    return decode(w->tokenizer, x, T, w->shown, bytes);
}

// One line, which begins with label: for a file or pipe.
static void draw_line(char *text, const char *label) {
    for (char *s = text; *s; s++)
        if (*s == '\n') *s = ' ';
    printf("%s |%s%s\n", label, *text == ' ' ? "" : " ", text);
}

// The character at s: its bytes, and the columns that it takes on a terminal, or takes at most if
// terminals disagree. -1: a control character or no valid UTF-8, which must not be drawn.
static int character_columns(const char *s, int *bytes) {
    wchar_t c;
    *bytes = mbtowc(&c, s, MB_CUR_MAX);
    if (*bytes < 1) {
        *bytes = 1;
        return -1;
    }
    if (c < 32 || (c >= 127 && c < 160) || c == 0x2028 || c == 0x2029) return -1;
    if (c == 0xfe0f) return 1; // makes the sign before it an emoji, often a column wider
    int columns = wcwidth(c);
    return columns < 0 ? 2 : columns; // newer than this table
}

// Draws a line of s within `width` columns: up to a line end, or to a space before width. Returns
// how many bytes it took from s.
static int draw_wrapped(const char *s, int width) {
    int end = 0, space = 0, bytes, columns = 0;
    for (; s[end] && s[end] != '\n'; end += bytes) {
        columns += abs(character_columns(s + end, &bytes)); // one sign for what must not be drawn
        if (columns > width && end > 0) break; // one character at least
        if (s[end] == ' ') space = end;
    }
    if (s[end] && s[end] != '\n' && s[end] != ' ' && space) end = space;

    printf("\033[?7l"); // the terminal must not wrap it again, where it thinks of other columns
    for (int i = 0; i < end; i += bytes) {
        if (character_columns(s + i, &bytes) < 0) putchar(s[i] == '\t' ? ' ' : '?');
        else printf("%.*s", bytes, s + i);
    }
    printf("\033[?7h\n");
    return end + (s[end] == '\n' || s[end] == ' '); // a space at a line end is not drawn
}

// Over the last drawing on a terminal, wrapped at its width.
static void draw_in_place(Watch *w, const char *s, const char *label) {
    struct winsize size;
    int known = !ioctl(1, TIOCGWINSZ, &size) && size.ws_col > 0 && size.ws_row > 0;
    int width = known ? size.ws_col : 80, height = max_int(1, (known ? size.ws_row : 24) - 1);
    if (w->lines) printf("\033[%dA", w->lines); // back up,
    printf("\r\033[J");                        // and clear what is below
    w->lines = 0;
    if (w->show_loops) {
        draw_wrapped(label, INT_MAX);
        w->lines = 1;
    }
    for (; *s && w->lines < height; w->lines++) // what does not fit on the screen is left out
        s += draw_wrapped(s, width);
    fflush(stdout);
    struct timespec pause = {0, (w->show_loops ? 2 : 1) * 60000000L}; // long enough to be seen
    nanosleep(&pause, NULL);
}

static void draw(Watch *w, const int *x, int T, const char *label) {
    const char *name = getenv("TERM");
    int terminal = isatty(1) && name && strcmp(name, "dumb"); // a dumb one cannot go back
    size_t bytes;
    char *text = text_or_board(w, x, T, terminal, &bytes);
    for (size_t i = 0; i < bytes; i++)
        if (!text[i]) text[i] = '?'; // from here on it is a string
    if (terminal) draw_in_place(w, text, label);
    else draw_line(text, label);
    free(text);
}

// For S = 1, 2, ..: what x (T) would be if all blanks were filled in after S loops.
static void draw_each_loop(Watch *w, const int *x, int T, int step) {
    Model *m = w->model;
    int mask = m->config.vocab_size, n = 0, id = 0;
    int *blanks = (int *)allocate(3 * (size_t)T, sizeof(int), "the blanks");
    int *token = blanks + T, *filled = token + T;
    double *score = (double *)allocate(T, sizeof(double), "the blanks");
    Draw greedy = {0, 0, 1, SCORE_PROBABILITY, 0}; // the likeliest tokens
    for (int t = 0; t < T; t++)
        if (x[t] == mask) blanks[n++] = t;
    for (int S = 1; n && S <= w->show_loops; S++) {
        char label[48];
        snprintf(label, sizeof label, "%3d, loop %2d", step, S);
        model_tokens(m, x, 1, T);
        model_forward(m, S); // the tail and the head take the state as it is after loop S
        model_sample(m, token, score, blanks, n, &id, greedy, 0);
        memcpy(filled, x, T * sizeof(int));
        for (int r = 0; r < n; r++) filled[blanks[r]] = token[r];
        draw(w, filled, T, label);
    }
    free(blanks);
    free(score);
}

// After each denoising step.
static void sample_step(const int *x, int T, int step, void *data) {
    Watch *w = (Watch *)data;
    count_step(x, T, step, w->model);
    if (!opt_watch) return;
    char label[48];
    snprintf(label, sizeof label, w->show_loops ? "%3d         " : "%3d", step + 1);
    draw(w, x, T, label);
    if (w->show_loops) draw_each_loop(w, x, T, step + 1);
}

// ---- what the sampler begins with ----

// Text to tokens x, after an end-of-text, with which each text begins; returns T. Without a
// tokenizer (NULL) there is none.
static int encode_start_text(const Model *m, const Tokenizer *t, int *x, const char *option,
                             const char *text) {
    int mask = m->config.vocab_size, most = m->config.max_seq_len, fill = opt_fill || opt_fill_file;
    // No text has more tokens than bytes. Two more: end-of-text, and a byte for an empty text.
    int *room = (int *)allocate(strlen(text) + 2, sizeof(int), "the text"), given = 0;
    if (t) room[given++] = t->eot;
    if (fill) given += encode_template(t, room + given, mask, text);
    else given += encode_text(t, room + given, mask, text, strlen(text), option);

    int T = opt_length < 0 ? most : opt_length;
    if (fill) T = given; // a template has a length of its own
    if (given > T || T > most)
        die(FAILED, "%s has %d tokens%s; %d are possible", option, given,
            t ? " with the end-of-text before it" : "", min_int(T, most));
    for (int i = 0; i < T; i++) x[i] = i < given ? room[i] : mask;
    free(room);
    return T;
}

// Exits if a digit of the board x (side*side) stands twice in a row, column or box.
static void check_board(const int *x, int side, int mask) {
    int high = (int)sqrt(side), wide = side / high; // a box, if boxes fill the board
    for (int i = 0; i < side * side; i++)
        for (int j = i + 1; j < side * side; j++) {
            if (x[i] == mask || x[i] != x[j]) continue;
            int row = i / side, column = i % side, row2 = j / side, column2 = j % side;
            int boxes = row / high == row2 / high && column / wide == column2 / wide;
            if (row == row2 || column == column2 || (boxes && high * wide == side))
                die(USAGE, "--puzzle has no solution: row %d, column %d and row %d, column %d hold "
                    "the same digit", row + 1, column + 1, row2 + 1, column2 + 1);
        }
}

static int encode_puzzle(const Model *m, const Tokenizer *t, int *x, const char *text) {
    int most = m->config.max_seq_len;
    if (!t) die(FAILED, "%s has no tokenizer.bin; name one with --tokenizer", opt_model);
    int T = encode_board(t, x, most, m->config.vocab_size, text), side = (int)lrint(sqrt(T));
    if (T != most) die(USAGE, "--puzzle has %d cells; the model takes %d", T, most);
    if (side * side != T) die(USAGE, "--puzzle: %d cells are no square", T);
    check_board(x, side, m->config.vocab_size);
    return T;
}

// A prompt, template or board to tokens x (max_seq_len); returns T.
static int encode_start(const Model *m, const Tokenizer *t, int *x, const char *option,
                        const char *text) {
    int blanks = 0;
    int T = opt_puzzle ? encode_puzzle(m, t, x, text) : encode_start_text(m, t, x, option, text);
    if (t && m->config.max_seq_len == 1 && !opt_puzzle)
        die(USAGE, "--model has room for one token, the end-of-text: there is nothing to write");
    for (int i = 0; i < T; i++) blanks += x[i] == m->config.vocab_size;
    if (!blanks && !opt_prompt)
        die(USAGE, "%s has no blank: write %s where a token is to be filled in", option,
            opt_puzzle ? "." : "____");
    return T;
}

// n beginnings x (n, max_seq_len); each has T (n) tokens, of which some are MASK.
typedef struct { int n, *T, *x; } Starts;

// Reads --fill-file. Sets lines to those of its lines that hold more than space; returns how many.
static int read_templates(const char ***lines) {
    size_t size;
    int n = 0;
    char *file = read_text(opt_fill_file, &size);
    if (strlen(file) < size)
        die(FAILED, "%s holds a zero byte, so it is no text: write one template in a line",
            opt_fill_file);
    *lines = (const char **)allocate(size, sizeof(char *), "the templates");
    for (char *line = strtok(file, "\n"); line; line = strtok(NULL, "\n"))
        if (line[strspn(line, " \t")]) (*lines)[n++] = line;
    if (!n) die(FAILED, "%s has no template: write one in a line", opt_fill_file);
    return n;
}

static Starts read_starts(const Model *m, const Tokenizer *t, SampleOptions o) {
    int most = m->config.max_seq_len;
    const char *option = "--prompt", *text = opt_prompt ? opt_prompt : "", **texts = &text;
    char where[64];
    Starts s = {1, NULL, NULL};
    if (opt_fill) {
        option = "--fill";
        text = opt_fill;
    }
    if (opt_puzzle) {
        option = "--puzzle";
        text = opt_puzzle;
    }
    if (opt_fill_file) {
        option = where;
        s.n = read_templates(&texts);
    }

    // All are encoded before the first text is written: errors come first.
    s.T = (int *)allocate((size_t)s.n * (most + 1), sizeof(int), "the beginnings");
    s.x = s.T + s.n;
    for (int i = 0; i < s.n; i++) {
        int *x = s.x + (size_t)i * most;
        snprintf(where, sizeof where, "--fill-file, template %d", i + 1);
        s.T[i] = encode_start(m, t, x, option, texts[i]);
        int blocks = blocks_to_fill(x, s.T[i], m->config.vocab_size);
        if (o.order != ORDER_THRESHOLD) check_steps(o.steps, blocks);
    }
    return s;
}

// ---- the command ----

static int printed; // texts

// Writes opt_n texts that begin with start (T).
static void write_texts(Watch *w, SampleOptions o, const int *start, int T) {
    Model *m = w->model;
    int n = 0, *x = (int *)allocate((size_t)m->max_B * T, sizeof(int), "the texts");
    for (int first = 0; first < opt_n; first += n) {
        n = min_int(m->max_B, opt_n - first);
        for (int b = 0; b < n; b++) memcpy(x + b * T, start, T * sizeof(int)); // copies of start
        if (w->show_loops) draw_each_loop(w, x, T, 0);
        sample(m, x, n, T, o, first, sample_step, w);

        for (int b = 0; b < n; b++) {
            size_t bytes;
            char *text = text_or_board(w, x + b * T, T, 1, &bytes);
            if (w->lines) printf("\033[%dA\r\033[J", w->lines); // over the drawing
            w->lines = 0;
            if (printed++) putchar('\n');
            fwrite(text, 1, bytes, stdout);
            putchar('\n');
            free(text);
        }
        fflush(stdout);
    }
    free(x);
}

// What it took, on the standard error.
static void report_work(int slots, double blanks, double took) {
    if (opt_adaptive) {
        fprintf(stderr, "loops in each step:");
        for (int i = 0; i < slots; i++)
            if (work.step_sequences[i])
                fprintf(stderr, " %.1f", work.step_loops[i] / work.step_sequences[i]);
        fprintf(stderr, "\n");
    }
    fprintf(stderr, "%.0f tokens in %d forwards, %.2f loops on average, %.3f GFLOP, "
            "%.0f tokens/s\n", blanks, work.forwards, work.loops / fmax(1, work.sequences),
            work.flops * 1e-9, blanks / took);
}

static void check_sample_options(void) {
    int starts = !!opt_prompt + !!opt_fill + !!opt_fill_file + !!opt_puzzle;
    if (!opt_model) die(USAGE, "sample needs --model; see loopmdm sample --help");
    if (starts > 1)
        die(USAGE, "--prompt, --fill, --fill-file and --puzzle exclude each other");
    only_with("--watch", opt_watch, " show-loops ");
    if (opt_length >= 0 && (opt_fill || opt_fill_file || opt_puzzle))
        die(USAGE, "--length excludes --fill, --fill-file and --puzzle, which have a length of "
            "their own");
}

static void sample_command(void) {
    Model m;
    Tokenizer tokenizer;
    Loops loops;
    int steps = 0;
    check_sample_options();

    // All that may be wrong is checked before the first text is written.
    const int *file = model_open(&m, opt_model);
    const Tokenizer *t = find_tokenizer(&tokenizer, &m) ? &tokenizer : NULL;
    int most = m.config.max_seq_len;
    inference_loops(m.config, &loops, 1);
    parse_list("steps", opt_sample_steps, &steps, 1);
    SampleOptions o = sample_options(loops, steps, opt_temperature);
    if (opt_length > most)
        die(USAGE, "--length is %d; the model takes at most %d tokens", opt_length, most);
    Starts starts = read_starts(&m, t, o);
    // wcwidth() needs a locale with UTF-8; names differ.
    if (opt_watch && !setlocale(LC_CTYPE, "C.UTF-8") && !setlocale(LC_CTYPE, "UTF-8"))
        setlocale(LC_CTYPE, "");
    load_model(&m, file, opt_watch ? 1 : min_int(opt_n, 16)); // one text is watched at a time

    int slots = max_int(steps, most); // steps; --order threshold takes at most one for each token
    work.step_sequences = (double *)allocate(2 * (size_t)slots, sizeof(double), "the report");
    work.step_loops = work.step_sequences + slots;
    double blanks = 0, began = seconds();
    for (int i = 0; i < starts.n; i++) {
        int T = starts.T[i], *x = starts.x + (size_t)i * most;
        int side = opt_puzzle ? (int)lrint(sqrt(T)) : 0, shown = T; // of a template all is shown,
        if (!opt_fill && !opt_fill_file)                            // else all that is given
            while (shown > 0 && x[shown - 1] == m.config.vocab_size) shown--;
        Watch w = {&m, t, side, shown, opt_show_loops ? loops.S : 0, 0};
        for (int k = 0; k < T; k++) blanks += x[k] == m.config.vocab_size ? opt_n : 0;
        o.draw.seed = opt_seed + (uint64_t)i; // other random numbers for each template
        write_texts(&w, o, x, T);
    }
    report_work(slots, blanks, seconds() - began);
    free(work.step_sequences);
    free(starts.T);
    model_free(&m);
}

// =================================================================================================
// 8. attention: where do masked positions look?

// Of the queries at masked positions, the attention that they pay to masked keys and to the others,
// and what masked keys would get if attention were uniform. Sums over queries.
typedef struct { double queries, to_masked, to_unmasked, uniform; } Attention;

static void attention_add(Attention *sum, Attention a) {
    sum->queries += a.queries;
    sum->to_masked += a.to_masked;
    sum->to_unmasked += a.to_unmasked;
    sum->uniform += a.uniform;
}

// One head of one sequence x (T). q and k are vectors (D) at the first position; those of the next
// one stand `stride` floats later.
static Attention attention_of_head(const float *q, const float *k, int stride, int D,
                                   const int *x, int T, int mask) {
    Attention sum = {0, 0, 0, 0};
    double *score = (double *)allocate(T, sizeof(double), "attention"), masked = 0;
    for (int j = 0; j < T; j++) masked += x[j] == mask;
    for (int i = 0; i < T; i++) {
        if (x[i] != mask) continue;

        // The scores of query i. Minus their largest none is too large for exp().
        double largest = -INFINITY;
        for (int j = 0; j < T; j++) {
            double dot = 0;
            for (int e = 0; e < D; e++)
                dot += (double)q[(size_t)i * stride + e] * k[(size_t)j * stride + e];
            score[j] = dot / sqrt(D);
            largest = fmax(largest, score[j]);
        }

        double all[2] = {0, 0}; // exp of the scores: of the other keys, of masked keys
        for (int j = 0; j < T; j++) all[x[j] == mask] += exp(score[j] - largest);
        sum.queries++;
        sum.to_masked += all[1] / (all[0] + all[1]);
        sum.to_unmasked += all[0] / (all[0] + all[1]);
        sum.uniform += masked / T;
    }
    free(score);
    return sum;
}

// The last pass, of sequences x (B,T) with their noise: adds to table (NH, buckets).
static void attention_of_pass(const Model *m, const int *x, Noise noise, float *qkv,
                              Attention *heads, Attention *table) {
    int n = m->B, T = m->T, C = m->config.channels, NH = m->config.heads;
    // All passes of inference use the same memory: this is the last one's q, k and v.
    read_activations(qkv, m->acts[0].qkv, (size_t)3 * n * T * C);
    OMP(omp parallel for)
    for (int bh = 0; bh < n * NH; bh++) {
        const float *q = qkv + (size_t)(bh / NH) * T * 3 * C + bh % NH * (C / NH); // k: at q + C
        heads[bh] = attention_of_head(q, q + C, 3 * C, C / NH, x + bh / NH * T, T,
                                      m->config.vocab_size);
    }

    // Added up by one thread, so that the order of the sums is always the same.
    for (int bh = 0; bh < n * NH; bh++) {
        if (!isfinite(heads[bh].to_masked + heads[bh].to_unmasked))
            die(FAILED, "--model: the attention of %s is not finite: its training went wrong",
                opt_model);
        int bucket = bucket_of(noise_level(noise, bh / NH));
        attention_add(table + bh % NH * opt_buckets + bucket, heads[bh]);
    }
}

// table (P, NH, buckets): over all sequences.
static void measure_attention(Model *m, const Data *d, int S, Attention *table) {
    Config c = m->config;
    int T = c.max_seq_len, B = m->max_B, NH = c.heads;
    int *targets = (int *)allocate((size_t)B * (2 * T + 1), sizeof(int), "a batch");
    int *x = targets + (size_t)B * T, *given = x + (size_t)B * T;
    float *qkv = (float *)allocate((size_t)3 * B * T * c.channels, sizeof(float), "attention");
    Attention *heads = (Attention *)allocate((size_t)B * NH, sizeof(Attention), "the table");
    for (int first = 0; first < opt_rows; first += B) {
        int n = min_int(B, opt_rows - first);
        Noise noise = evaluation_batch(m, d, targets, given, first, n, opt_rows, opt_seed);
        read_memory(x, m->x, (size_t)n * T * sizeof(int)); // with MASK
        embed(m, S);
        for (int p = 0; p < num_passes(c, S); p++) {
            block_forward(m, p, layer_of_pass(c, S, p));
            attention_of_pass(m, x, noise, qkv, heads, table + (size_t)p * NH * opt_buckets);
        }
    }
    free(targets);
    free(qkv);
    free(heads);
}

// The loop that pass p belongs to, from 1; 0 if it is in the head or the tail.
static int loop_of_pass(Config c, int S, int p) {
    int width = c.loop_end - c.loop_start, end = c.loop_start + S * width;
    return p >= c.loop_start && p < end ? (p - c.loop_start) / width + 1 : 0;
}

static void write_attention_csv(Config c, int S, const Attention *table) {
    Csv csv;
    int NH = c.heads, K = opt_buckets;
    csv_open(&csv, opt_csv,
             "pass,layer,loop,head,t_low,t_high,queries,to_masked,to_unmasked,uniform");
    for (int p = 0; p < num_passes(c, S); p++)
        for (int k = 0; k < K; k++)
            for (int h = 0; h < NH; h++) {
                Attention a = table[((size_t)p * NH + h) * K + k];
                if (!a.queries) continue; // no sequence has this noise level
                fprintf(csv.file, "%d,%d,%d,%d,%g,%g,%.0f,%.6f,%.6f,%.6f\n", p,
                        layer_of_pass(c, S, p), loop_of_pass(c, S, p), h, k / (double)K,
                        (k + 1) / (double)K, a.queries, a.to_masked / a.queries,
                        a.to_unmasked / a.queries, a.uniform / a.queries);
            }
    csv_close(&csv);
}

// The means over heads of one pass, table (NH, buckets): of to_masked, or of uniform.
static void print_attention(const Attention *table, int NH, int uniform) {
    for (int k = 0; k < opt_buckets; k++) {
        Attention sum = {0, 0, 0, 0};
        for (int h = 0; h < NH; h++) attention_add(&sum, table[h * opt_buckets + k]);
        double share = (uniform ? sum.uniform : sum.to_masked) / sum.queries;
        if (sum.queries > 0) printf("  %9.3f", share);
        else printf("          -");
    }
}

static void attention(void) {
    Model m;
    Tokenizer tokenizer;
    int S;
    if (!opt_model || !opt_data)
        die(USAGE, "attention needs --model and --data; see loopmdm attention --help");
    const int *file = model_open(&m, opt_model);
    Config c = m.config;
    loop_numbers(c, &S, 1);
    int T = c.max_seq_len, NH = c.heads, P = num_passes(c, S);
    Data d = open_data(opt_data, c.vocab_size, T);
    fix_rows(&d, opt_data, find_tokenizer(&tokenizer, &m) ? &tokenizer : NULL, T);
    check_rows(T);
    if (opt_csv) csv_check("--csv", opt_csv);
    load_model(&m, file, min_int(opt_eval_batch, opt_rows));

    size_t size = (size_t)NH * opt_buckets; // of a pass
    Attention *table = (Attention *)allocate(P * size, sizeof(Attention), "the table");
    measure_attention(&m, &d, S, table);

    printf("%s, step %d: share of attention that masked positions pay to masked ones, "
           "mean of %d heads, by noise level t\n\n", opt_model, file[AT_STEP], NH);
    printf("pass  layer  loop");
    for (int k = 0; k < opt_buckets; k++)
        printf("  %4.2f-%4.2f", k / (double)opt_buckets, (k + 1) / (double)opt_buckets);
    for (int p = 0; p < P; p++) {
        int loop = loop_of_pass(c, S, p);
        printf("\n%4d  %5d  ", p, layer_of_pass(c, S, p));
        if (loop) printf("%4d", loop);
        else printf("   -");
        print_attention(table + p * size, NH, 0);
    }
    printf("\nuniform          ");
    print_attention(table, NH, 1);
    printf("\n");
    if (opt_csv) write_attention_csv(c, S, table);
    free(table);
    model_free(&m);
}

// =================================================================================================
// 9. tokenize, info, flops

static void print_token(const Tokenizer *t, int id) { // bytes that cannot be printed as \xNN
    printf("%6d  '", id);
    for (int i = 0, length; i < t->length[id]; i += length) {
        const unsigned char *s = t->bytes[id] + i;
        character_class(s, t->length[id] - i, &length);
        // Control characters, and bytes that are no valid UTF-8.
        if (*s < 32 || *s == 127 || (*s >= 128 && length == 1)) printf("\\x%02x", *s);
        else printf("%.*s", length, (const char *)s);
    }
    printf("'\n");
}

static void print_tokens(const Tokenizer *t, const char *text) {
    int *ids = (int *)allocate(strlen(text), sizeof(int), "tokens");
    int n = (int)tokenizer_encode(t, ids, text, strlen(text), "--text");
    for (int i = 0; i < n; i++) print_token(t, ids[i]);
    printf("%d tokens\n", n);
    free(ids);
}

// A token shard that grows. The file begins with its header.
typedef struct { int *file; uint16_t *tokens; size_t count, room; } Output;

static void add_token(Output *out, int id) {
    if (out->count == out->room) {
        out->room = 2 * out->room + 65536;
        out->file = (int *)realloc(out->file, 4 * HEADER_INTS + 2 * out->room);
        if (!out->file) die(FAILED, "no memory for the rows of %s", opt_input);
        out->tokens = (uint16_t *)(out->file + HEADER_INTS);
    }
    out->tokens[out->count++] = (uint16_t)id;
}

static void write_shard_file(Output *out) {
    if (out->count > INT_MAX)
        die(FAILED, "%s: the rows have %zu tokens; a shard holds 2^31 - 1 at most", opt_input,
            out->count);
    memset(out->file, 0, 4 * HEADER_INTS);
    out->file[0] = SHARD_MAGIC;
    out->file[1] = 1;
    out->file[2] = (int)out->count;
    write_file(opt_output, out->file, 4 * HEADER_INTS + 2 * out->count);
}

// Before --input is read: can it be, and --output written?
static void check_input(void) {
    struct stat info;
    if (stat(opt_input, &info)) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    if (!S_ISREG(info.st_mode))
        die(FAILED, "cannot read %s: it is a folder, device or pipe", opt_input);
    keep_apart("--output", opt_output, "--input", opt_input);
    keep_apart("--output", opt_output, "--tokenizer", opt_tokenizer);
    check_regular(opt_output);
    if (info.st_size == 0 || info.st_size >= INT_MAX)
        die(FAILED, "%s has %lld bytes: from 1 byte to 2 GiB are possible", opt_input,
            (long long)info.st_size);
}

// Where the story that begins at begin ends: at an end-of-text, or the end. Other special tokens
// are a part of it.
static size_t end_of_story(const Tokenizer *t, const char *text, size_t begin, size_t size) {
    int id = -1;
    size_t end = find_special(t, text, begin, size, &id);
    while (end < size && id != t->eot)
        end = find_special(t, text, end + t->length[id], size, &id);
    return end;
}

// --input to --output. As in llm.c each story has an end-of-text before it, and no space around it.
static void tokenize_file(const Tokenizer *t) {
    size_t size, end;
    check_input();
    char *text = read_text(opt_input, &size);
    int *ids = (int *)allocate(size, sizeof(int), "tokens"), stories = 0, too_long = 0;
    Output out = {NULL, NULL, 0, 0};
    for (size_t begin = 0; begin < size; begin = end + t->length[t->eot]) {
        end = end_of_story(t, text, begin, size);
        size_t from = begin, to = end;
        while (from < to && isspace((unsigned char)text[from])) from++;
        while (to > from && isspace((unsigned char)text[to - 1])) to--;
        if (from == to) continue; // only space

        size_t n = tokenizer_encode(t, ids, text + from, to - from, opt_input);
        if (opt_rows_of && n + 1 > (size_t)opt_rows_of) {
            too_long++;
            continue;
        }

        add_token(&out, t->eot);
        for (size_t i = 0; i < n; i++) add_token(&out, ids[i]);
        while (opt_rows_of && out.count % opt_rows_of) add_token(&out, t->eot);
        stories++;
    }

    if (!out.count && too_long) die(FAILED, "%s: no story fits into --rows-of", opt_input);
    if (!out.count) die(FAILED, "%s has no text", opt_input);
    write_shard_file(&out);
    if (opt_rows_of)
        printf("%s: %d rows of %d tokens; %d stories are longer and were left out\n", opt_output,
               stories, opt_rows_of, too_long);
    else
        printf("%s: %d stories, %zu tokens, %.2f bytes per token\n", opt_output, stories,
               out.count, (double)size / out.count);
    free(text);
    free(ids);
    free(out.file);
}

static void tokenize(void) {
    if (!opt_tokenizer) die(USAGE, "tokenize needs --tokenizer; see loopmdm tokenize --help");
    only_with("--input", opt_input != NULL, " rows-of ");
    if (opt_rows_of > 65536)
        die(USAGE, "--rows-of is %d; no model takes more than 65536 tokens", opt_rows_of);
    if (!opt_text == !opt_input || !opt_input != !opt_output)
        die(USAGE, "tokenize takes either --text, or --input and --output");
    Tokenizer t = tokenizer_open(opt_tokenizer);
    if (opt_text) print_tokens(&t, opt_text);
    else tokenize_file(&t);
}

// info and flops take a trained model or a preset. Returns the model's step, or -1 for a preset.
static int model_or_preset(Model *m) {
    if (opt_model && !preset(opt_model, 1).layers) {
        if (access(opt_model, F_OK))
            die(USAGE, "--model: %s is neither a folder nor a preset; these are d2, nano, d6, d12",
                opt_model);
        only_with("a preset as --model", 0, " vocab layers heads channels seq-len loop max-loops ");
        return model_open(m, opt_model)[AT_STEP];
    }
    model_build(m, config_from_options(opt_vocab < 0 ? 4096 : opt_vocab));
    m->keeps_ema = opt_ema > 0;
    return -1;
}

static void info(void) {
    Model m;
    int step = model_or_preset(&m);
    Config c = m.config;
    Shape s[NUM_TENSORS];
    tensor_shapes(c, s);
    printf("%s: %d layers, %d channels, %d heads, %d positions, %d tokens, %s\n",
           opt_model ? opt_model : "nano", c.layers, c.channels, c.heads, c.max_seq_len,
           c.vocab_size, loop_of(c));
    if (step >= 0) printf("trained for %d steps\n", step);
    else print_recipe();
    printf("\ntensor     shape                 parameters\n");
    for (int i = 0; i < NUM_TENSORS; i++) {
        char shape[64];
        const char *format = s[i].in ? "%d x (%d,%d)" : "%d x (%d)";
        snprintf(shape, sizeof shape, format, s[i].copies, s[i].out, s[i].in);
        printf("%-10s %-20s %11zu\n", s[i].name, shape, m.params.size[i]);
    }
    printf("%-31s %11zu\n\n", "total", m.params.total);
    for (int recompute = 0; recompute < 2; recompute++) {
        // It has no memory, so this only sets m.bytes.
        int B = opt_batch > 0 ? opt_batch : 16; // -1: a trained model, without a recipe
        model_plan(&m, B, c.max_seq_len, c.max_loops, 1, recompute);
        printf("training with --batch %d%s; ", B, recompute ? " --recompute" : "");
        print_memory(&m);
    }
}

static void flops(void) {
    Model m;
    model_or_preset(&m);
    Config c = m.config;
    int T = c.max_seq_len;
    double forward = pass_flops(c, T, 1), one_loop = training_flops(c, T, 1, 0.5, 0); // half masked
    double backward = training_flops(c, T, 1, 0, 0) / num_passes(c, 1) - forward;
    printf("MFLOP per token at T = %d, V = %d (a multiply-add is two); the LM head on masked "
           "tokens only\n", T, c.vocab_size);
    printf("a pass forward: %.3f, of which attention %.3f; backward: %.3f. The head of a masked "
           "token: %.3f, backward %.3f\n\n", forward * 1e-6, 4e-6 * T * c.channels,
           backward * 1e-6, head_flops(c) * 1e-6, 2e-6 * head_flops(c));
    printf("loops  passes  forward, all masked  training, half masked  with --recompute  "
           "relative to S=1\n");
    for (int S = 1; S <= c.max_loops; S++) {
        int P = num_passes(c, S);
        double step = training_flops(c, T, S, 0.5, 0), more = training_flops(c, T, S, 0.5, 1);
        printf("%5d  %6d  %19.3f  %21.3f  %16.3f  %15.2f\n", S, P,
               (pass_flops(c, T, P) + head_flops(c)) * 1e-6, step * 1e-6, more * 1e-6,
               step / one_loop);
    }
}

// =================================================================================================
// 10. main

// Saturated attention and GELU leave values near 1e-38. Their products are subnormal numbers, which
// x86 computes with so slowly that training took 18 times as long. As zeros they cost nothing.
static void flush_subnormals(void) {
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040); // as results and as operands; new threads inherit this
#endif
}

// A standard stream may be closed. A file that is opened later must not take its place.
static void hold_standard_streams(void) {
    int file;
    do file = open("/dev/null", O_RDONLY); // so that to write is an error
    while (file >= 0 && file < 3);
    close(file);
}

// Says in one line why the program cannot go on.
static void on_fault(int number) {
    const char *text = "loopmdm: this CPU lacks an instruction that the program was built to use: "
        "run make on this machine, or make ARCH= for any CPU\n";
    if (number == SIGBUS)
        text = "loopmdm: a file cannot be read any more: it became shorter, or its disk failed\n";
    ssize_t written = write(2, text, strlen(text)); // printf must not be used here
    (void)written;
    _exit(FAILED);
}

// Two things cost nearly all speed beside other programs: a waiting thread of GCC's OpenMP spins
// for milliseconds before it sleeps, and Linux moves two threads to one core. OpenMP reads its
// settings before main(), so the program sets them and begins anew.
static void share_cores(char **argv) {
#if defined(_OPENMP) && defined(__linux__)
    struct stat a, b;
    const char *name = (const char *)getauxval(AT_EXECFN), *self = "/proc/self/exe";
    int waits = !getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY"); // else the user has chosen
    int binds = !getenv("OMP_PROC_BIND") && !getenv("OMP_PLACES") && !getenv("GOMP_CPU_AFFINITY");

    // Fewer threads than cores must not all be on the first cores, where other programs' are too,
    // or other processes of this one.
    if (omp_get_max_threads() != omp_get_num_procs() || ranks > 1) binds = 0;
    if (!waits && !binds) return;

    // Under valgrind, for example, self is another program.
    if (!name || stat(name, &a) || stat(self, &b)) return;
    if (a.st_dev != b.st_dev || a.st_ino != b.st_ino) return;
    if (waits && setenv("GOMP_SPINCOUNT", "3000", 1)) return;
    if (binds && setenv("OMP_PROC_BIND", "true", 1)) return; // a thread stays on its core
    execv(name, argv); // if that fails, it goes on as it is
#else
    (void)argv;
#endif
}

static void print_commands(FILE *to) {
    fprintf(to, "usage: loopmdm COMMAND [options]; loopmdm COMMAND --help lists them\n\n");
    for (int i = 0; i < NUM_COMMANDS; i++) {
        const char *about = commands[i].about;
        fprintf(to, "  %-9s %.*s\n", commands[i].name, (int)strcspn(about, "\n"), about);
    }
}

int main(int argc, char **argv) {
    static void (*const run[])(void) = {
        train, eval, sample_command, attention, tokenize, info, flops
    };
    signal(SIGILL, on_fault);
    signal(SIGBUS, on_fault);
    flush_subnormals();
    signal(SIGXFSZ, SIG_IGN); // a limit on file sizes is then an error, as a full disk is
    hold_standard_streams();
    forward_loops = counted_forward; // loopmdm.c's evaluate() and sample() call this one
    for (int i = 0; argc > 1 && i < NUM_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name)) continue;
        if (commands[i].flag == TRAIN) rank_from_environment();
        parse_options(i, argc, argv);
        if (commands[i].flag & (TRAIN | EVAL | SAMPLE | ATTENTION)) share_cores(argv);
        products = use_precision();
        if (opt_precision && commands[i].flag != TRAIN)
            fprintf(stderr, "matrix products: %s\n", products);
        run[i]();
        finish();
    }
    int help = argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"));
    if (argc > 1 && !help) die(USAGE, "there is no command %s; see loopmdm --help", argv[1]);
    print_commands(help ? stdout : stderr);
    if (help) finish();
    return USAGE;
}
