/*
loopmdm.c as WebAssembly, for the page in this folder. worker.js calls the functions that are
exported here; `make web` compiles them into loopmdm.wasm.

One thread, and one sequence x at a time: T tokens in the memory that web_tokens() names. A model is
a number, in the order in which web_open() got them. What is wrong ends the instance, after a line
on the standard error; then the page starts a new one.
*/
#define TOOLS // loopmdm.c leaves out its command line
#include "../../../loopmdm.c"
#include "../../tokenizer/tokenizer.h"
#include "../../tokenizer/text.h"

#define EXPORT(name) __attribute__((export_name(#name), used)) name
#define IMPORT(name) __attribute__((import_module("page"), import_name(#name)))

// What the page gets while a function here runs. All pointers are to T numbers.
//   step: x after a denoising step; of the positions that were blank before it, the likeliest token
//     and its probability, and of those that were filled in the probability of the token that was
//   loop: the likeliest token of each blank, and its probability, if the loop ended here
//   attention: what a query pays to each position, mean over the heads
IMPORT(step) void page_step(int step, const int *x, const int *guess, const float *probability);
IMPORT(loop) void page_loop(int loop, const int *guess, const float *probability);
IMPORT(attention) void page_attention(int pass, int layer, const float *weight);

// ---- files: loopmdm.c opens and maps them as on a disk, and checks them ----

typedef struct { char name[64]; void *data; size_t bytes; } File;
static File files[8];
static int num_files;

// Room for a file of that name, which the page fills in.
void *EXPORT(web_file)(const char *name, size_t bytes) {
    if (num_files == COUNT(files)) die(FAILED, "%s: no more files are possible", name);
    File *file = &files[num_files++];
    snprintf(file->name, sizeof file->name, "%s", name);
    file->data = allocate(bytes, 1, name);
    file->bytes = bytes;
    return file->data;
}

// These take the place of the C library's: a file's number is its descriptor.
int open(const char *path, int flags, ...) {
    (void)flags;
    for (int i = 0; i < num_files; i++)
        if (!strcmp(files[i].name, path)) return i;
    errno = ENOENT;
    return -1;
}

int fstat(int file, struct stat *info) {
    memset(info, 0, sizeof *info);
    info->st_mode = S_IFREG;
    info->st_size = (off_t)files[file].bytes;
    return 0;
}

void *mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
    (void)at, (void)bytes, (void)protection, (void)flags, (void)offset;
    return files[file].data;
}

int close(int file) {
    (void)file;
    return 0;
}

int madvise(void *at, size_t bytes, int advice) { // dev/gemm.h asks for large pages
    (void)at, (void)bytes, (void)advice;
    return 0;
}

// ---- models ----

static Model models[4];
static Tokenizer tokenizers[COUNT(models)];
static int num_models;
static int *x, *guess, *blank;      // (T): tokens, likeliest tokens, 1 for what is or was blank
static int *place;                  // (T): the positions of blanks
static float *probability, *weight; // (T)

// Opens FOLDER/model.bin and FOLDER/tokenizer.bin, which web_file() has got. Returns its number.
int EXPORT(web_open)(const char *folder) {
    if (num_models == COUNT(models)) die(FAILED, "%s: no more models are possible", folder);
    Model *m = &models[num_models];
    Tokenizer *t = &tokenizers[num_models];
    const int *file = model_open(m, folder);
    char *path = concat(folder, "/tokenizer.bin");
    *t = tokenizer_open(path);
    if (t->vocab_size != m->config.vocab_size) die(FAILED, "%s is of another model", path);
    free(path);
    model_reserve(m, 1, m->config.max_seq_len, 1, 0, 0);
    model_set_parameters(m, (const float *)(file + HEADER_INTS));
    return num_models++;
}

// What the page must know of a model: T, V (MASK's id), a and b of its loop, end-of-text's id.
const int *EXPORT(web_shape)(int model) {
    static int shape[5];
    Config c = models[model].config;
    const int values[] = {c.max_seq_len, c.vocab_size, c.loop_start, c.loop_end,
                          tokenizers[model].eot};
    memcpy(shape, values, sizeof shape);
    return shape;
}

// The bytes of a token. Sets *length.
const void *EXPORT(web_token)(int model, int id, int *length) {
    *length = tokenizers[model].length[id];
    return tokenizers[model].bytes[id];
}

// Room for the T tokens of x, which the page may set.
int *EXPORT(web_tokens)(int T) {
    static int room;
    if (T <= room) return x;
    free(x);
    room = T;
    x = (int *)allocate(6 * (size_t)T, sizeof(int), "the text");
    guess = x + T;
    blank = guess + T;
    place = blank + T;
    probability = (float *)(place + T);
    weight = probability + T;
    return x;
}

// A prompt, or a template with blanks (____), to x: an end-of-text, and the tokens of the text.
// Returns how many.
int EXPORT(web_encode)(int model, const char *text) {
    const Tokenizer *t = &tokenizers[model];
    web_tokens((int)strlen(text) + 1); // no text has more tokens than bytes
    x[0] = t->eot;
    return 1 + encode_template(t, x + 1, models[model].config.vocab_size, text);
}

// ---- the sampler ----

// After a denoising step. The step's state is still in the model, so the head can tell what it says
// of all blanks, also of those that had no turn.
static void show_step(const int *tokens, int T, int step, void *data) {
    Model *m = (Model *)data;
    int V = m->config.vocab_size, n = 0;
    for (int t = 0; t < T; t++) {
        guess[t] = V;
        if (blank[t]) place[n++] = t;
    }
    head_forward(m, place, n);
    for (int r = 0; r < n; r++) {
        int t = place[r], filled = tokens[t] != V;
        float *logits = m->logits + (size_t)r * V, largest;
        guess[t] = 0;
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[guess[t]]) guess[t] = v;
        float sum = exp_and_sum(logits, V, 1, &largest); // nobody needs the logits after this
        probability[t] = logits[filled ? tokens[t] : guess[t]] / sum;
        blank[t] = !filled;
    }
    page_step(step + 1, tokens, guess, probability);
}

// Fills in the blanks of x (T) with S loops in so many denoising steps, as `loopmdm sample` does.
// order: its place in random, confidence, margin, entropy. block: so many positions at a time, from
// left to right. The page gets each step.
void EXPORT(web_sample)(int model, int T, int S, int steps, int order, int block,
                        double temperature, double seed) {
    Model *m = &models[model];
    int score = SCORE_PROBABILITY;
    if (order == ORDER_MARGIN) score = SCORE_MARGIN;
    if (order == ORDER_ENTROPY) score = SCORE_ENTROPY;
    Draw draw = {temperature, 0, 1, score, (uint64_t)seed};
    SampleOptions o = {steps, order, block, 0, {S, 0}, draw};
    for (int t = 0; t < T; t++) {
        blank[t] = x[t] == m->config.vocab_size;
        probability[t] = 1;
    }
    sample(m, x, 1, T, o, 0, show_step, m);
}

// ---- what happens inside one forward ----

// The attention of position `query` in the pass that has just run, mean over the heads.
static void show_attention(const Model *m, int pass, int layer, int query) {
    int T = m->T, C = m->config.channels, NH = m->config.heads, D = C / NH;
    double *p = (double *)allocate(T, sizeof(double), "attention");
    memset(weight, 0, T * sizeof(float));
    for (int h = 0; h < NH; h++) {
        const float *q = m->acts[0].qkv + (size_t)query * 3 * C + h * D;
        double largest = -INFINITY, sum = 0;
        for (int t = 0; t < T; t++) {
            const float *k = m->acts[0].qkv + (size_t)t * 3 * C + C + h * D;
            p[t] = 0;
            for (int i = 0; i < D; i++) p[t] += (double)q[i] * k[i] / sqrt(D);
            largest = fmax(largest, p[t]);
        }
        for (int t = 0; t < T; t++) sum += p[t] = exp(p[t] - largest);
        for (int t = 0; t < T; t++) weight[t] += (float)(p[t] / sum / NH);
    }
    free(p);
    page_attention(pass, layer, weight);
}

// Layers begin .. end-1 of a forward. The first is pass number `pass`. query: -1 shows nothing.
static void run_layers(Model *m, int begin, int end, int pass, int query) {
    for (int layer = begin; layer < end; layer++, pass++) {
        block_forward(m, 0, layer);
        if (query >= 0) show_attention(m, pass, layer, query);
    }
}

// What the n blanks would become if the head saw the state as it is now.
static void show_guesses(Model *m, const int *places, int n, int loop) {
    int V = m->config.vocab_size, sequence = 0;
    int *token = (int *)allocate(m->T, sizeof(int), "the blanks");
    double *score = (double *)allocate(m->T, sizeof(double), "the blanks");
    Draw likeliest = {0, 0, 1, SCORE_PROBABILITY, 0};
    model_sample(m, token, score, places, n, &sequence, likeliest, 0);
    for (int t = 0; t < m->T; t++) guess[t] = V;
    for (int r = 0; r < n; r++) {
        guess[places[r]] = token[r];
        probability[places[r]] = (float)score[r];
    }
    free(token);
    free(score);
    page_loop(loop, guess, probability);
}

// One forward of x (T) with S loops. After each loop the page gets what the blanks would become.
// After each pass, if query is a position and not -1, it gets the query's attention.
void EXPORT(web_look)(int model, int T, int S, int query) {
    Model *m = &models[model];
    Config c = m->config;
    int a = c.loop_start, b = c.loop_end, n = 0, loops = a < b ? S : 1;
    size_t bytes = (size_t)T * c.channels * sizeof(float);
    for (int t = 0; t < T; t++)
        if (x[t] == c.vocab_size) place[n++] = t;

    model_tokens(m, x, 1, T);
    m->S = S;
    encoder_forward(m->states, m->x, m->params.tensor[WTE], m->params.tensor[WPE], 1, T,
                    c.channels);
    run_layers(m, 0, a, 0, query);
    for (int s = 1; s <= loops; s++) {
        run_layers(m, a, b, a + (s - 1) * (b - a), query);

        // The tail sees the state after each loop, but the next loop goes on from before the tail.
        memcpy(m->before, m->states, bytes);
        run_layers(m, b, c.layers, a + s * (b - a), s == loops ? query : -1);
        show_guesses(m, place, n, s);
        memcpy(m->states, m->before, bytes);
    }
}
