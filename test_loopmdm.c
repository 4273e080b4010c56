/*
Checks loopmdm.c and dev/tools.c: against PyTorch's results in reference files, by properties that
need none, and through the command line. Built with -DBACKEND='"loopmdm.cu"' it checks loopmdm.cu
in the place of the CPU's layers, on a GPU or on the emulation (dev/cuda_on_cpu).

    test_loopmdm PROGRAM FILE...   PROGRAM is the loopmdm to run; FILE: see dev/reference/README.md
    test_loopmdm --digest          prints checksums of training steps and samples, so that two runs
                                   can be compared bit for bit
    test_loopmdm --layers          only the checks of single layers
    test_loopmdm --out-of-bounds   reads one row beyond an array: AddressSanitizer must notice it

Each check prints a line with its error and its tolerance. An exact check has tolerance 0. At the
end come a table with the largest error of each kind, and "N passed, N failed". The exit status is 1
if any check failed. dev/TESTS.md says what is checked and why.
*/
#ifndef BACKEND
// With these macros each call gemm(AB, ...) becomes counted_gemm(AB, ...), which counts operations.
// The definition of gemm(), which begins with gemm(int product, stays as it is.
#define gemm(product, ...) GEMM_##product, __VA_ARGS__)
#define GEMM_AB counted_gemm(AB
#define GEMM_ABT counted_gemm(ABT
#define GEMM_ATB counted_gemm(ATB
#define GEMM_int gemm(int
typedef struct Epilogue Epilogue; // loopmdm.c defines it
static void counted_gemm(int product, int M, int N, int K, const float *a, int lda, const float *b,
                         int ldb, float *c, int ldc, int add, Epilogue e);
#endif
#define main loopmdm_main
#include "dev/tools.c"
#undef main
#include <float.h>
#include <sys/wait.h>

#ifndef BACKEND
#undef gemm
typedef float floatX; // in loopmdm.cu: what goes into matrix products, float or bfloat16
#ifndef BF16 // with -DBF16=1 each product rounds its operands, as --precision bf16
#define BF16 0
#endif
static unsigned long long gemm_flops; // of all matrix products so far

static void counted_gemm(int product, int M, int N, int K, const float *a, int lda, const float *b,
                         int ldb, float *c, int ldc, int add, Epilogue e) {
    __atomic_fetch_add(&gemm_flops, 2ULL * M * N * K, __ATOMIC_RELAXED);
    gemm(product, M, N, K, a, lda, b, ldb, c, ldc, add, e);
}
#endif

// What goes into a matrix product has 24 significant bits in fp32 and 8 in bf16. There rounding
// changes a number by 2^-8 at most, and by e = 2^-8/2.4 = 1.6e-3 in the root of the mean square.
// These are the tolerances of bf16:
//   A branch of a pass has six roundings, one after the other: LayerNorm, weights, qkv, rotary
//   positions, probabilities, output; or LayerNorm, weights, GELU, weights. Together they are
//   sqrt(6) e = 4e-3 of what the branch adds to the residual stream. Sums of independent errors
//   keep that share. Three times as much is allowed.
//   The loss is a mean over 50 masked positions and more: the errors of most cancel.
//   A gradient goes through forward and backward of up to P = 10 passes: sqrt(2 P) 4e-3. Twice as
//   much is allowed.
#define BF16_HIDDEN 1.2e-2
#define BF16_LOSS 2e-3
#define BF16_GRADIENT 3.6e-2
#define TOLERANCE(fp32, bf16) (BF16 ? (bf16) : (fp32))

// A kernel takes a hundred times as long on the emulation; AddressSanitizer and the plain matrix
// product take ten times as long. There random things are repeated less often, and runs are
// shorter.
#if defined(BACKEND) || defined(__SANITIZE_ADDRESS__) || defined(PLAIN_GEMM)
#define SLOW 1
#else
#define SLOW 0
#endif
#define IF_SLOW(fewer, otherwise) (SLOW ? (fewer) : (otherwise))

static int passed, failed;
static struct { const char *kind; double error, tolerance; int count; } kinds[256];

// One check: the error is from 0 to the tolerance (NaN fails). kind is its line in the table at
// the end.
__attribute__((format(printf, 4, 5)))
static void check(const char *kind, double error, double tolerance, const char *format, ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    int ok = error >= 0 && error <= tolerance, k = 0;
    printf("%s  %-34s %-44s error %.1e  tolerance %.0e\n", ok ? "ok  " : "FAIL", kind, what, error,
           tolerance);
    passed += ok;
    failed += !ok;

    // The table has one line for each kind: it keeps the largest error, or NaN.
    while (kinds[k].kind && strcmp(kinds[k].kind, kind)) k++;
    if (k == COUNT(kinds) - 1) die(FAILED, "too many kinds of checks");
    if (!kinds[k].kind || !(error <= kinds[k].error)) kinds[k].error = error;
    kinds[k].kind = kind;
    kinds[k].tolerance = tolerance;
    kinds[k].count++;
}

// The larger of two errors; NaN if one of them is NaN. fmax() would drop it.
static double worse(double a, double b) { return a >= b || isnan(a) ? a : b; }

static double largest_difference(const float *a, const float *b, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) largest = worse(largest, fabs((double)a[i] - b[i]));
    return largest;
}

static double relative_norm(const float *a, const float *b, size_t n) { // |a - b| / |b|
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += pow((double)a[i] - b[i], 2);
        norm += pow(b[i], 2);
    }
    return sqrt(difference) / (sqrt(norm) + 1e-30);
}

static double count_different(const int *a, const int *b, size_t n) {
    size_t different = 0;
    for (size_t i = 0; i < n; i++) different += a[i] != b[i];
    return (double)different;
}

// ---- memory for tests, which is given back all at once ----

static struct { void *p; int of_model; } kept[4096];
static int num_kept;

static void *keep(void *p, int of_model) {
    if (num_kept == COUNT(kept)) die(FAILED, "the test keeps too many arrays");
    kept[num_kept].p = p;
    kept[num_kept++].of_model = of_model;
    return p;
}

static void *host_array(size_t n, size_t size) { return keep(allocate(n, size, "a test"), 0); }
#define FLOATS(n) ((float *)host_array(n, sizeof(float)))
#define DOUBLES(n) ((double *)host_array(n, sizeof(double)))
#define INTS(n) ((int *)host_array(n, sizeof(int)))

// Memory where the model's memory is: in loopmdm.cu on the GPU.
static void *model_array(size_t bytes) {
    void *p;
#ifdef BACKEND
    cuda_check(cudaMalloc(&p, bytes), "a test");
#else
    p = allocate(bytes, 1, "a test");
#endif
    return keep(p, 1);
}

static void release(int from) { // gives back what was made since num_kept was from
    while (num_kept > from) {
        num_kept--;
#ifdef BACKEND
        if (kept[num_kept].of_model) {
            cuda_check(cudaFree(kept[num_kept].p), "a test");
            continue;
        }
#endif
        free(kept[num_kept].p);
    }
}

static int *to_model(const int *values, size_t n) { // a copy (n) in the model's memory
    int *p = (int *)model_array(n * sizeof(int));
    write_memory(p, values, n * sizeof(int));
    return p;
}

// ---- models for tests ----

// The logits (R,V) of the last head_forward().
static void read_logits(float *to, const Model *m, int R) {
    int V = m->config.vocab_size, distance = V; // of two rows of logits
#ifdef BACKEND
    distance = m->padded_logits; // rows begin at multiples of 16 bytes
#endif
    for (int r = 0; r < R; r++)
        read_memory(to + (size_t)r * V, m->logits + (size_t)r * distance, V * sizeof(float));
}

static void read_tensors(float *to, const Tensors *from) { // all of them (total)
    read_memory(to, from->data, from->total * sizeof(float));
}

static void write_tensors(Tensors *to, const float *from) {
    write_memory(to->data, from, to->total * sizeof(float));
}

static void copy_parameters(Model *to, const Model *from) {
    int mark = num_kept;
    float *params = FLOATS(from->params.total);
    read_tensors(params, &from->params);
    model_set_parameters(to, params);
    release(mark);
}

static void clear_gradients(Model *m) {
    int mark = num_kept;
    write_tensors(&m->grads, FLOATS(m->grads.total)); // zeros
    release(mark);
}

static Config small_config(int a, int b) {
    Config c = {24, 50, 64, 4, 2, 16, a, b, 4};
    return c;
}

// Parameters away from their start, so that no gradient is trivial. Branches add as much as in a
// trained model.
static void moved_parameters(float *params, Config c, uint64_t seed, double distance) {
    Tensors t;
    init_parameters(params, c, seed); // biases and branches are zero, gains are one
    tensors_build(&t, c, params);
    for (int i = 0; i < NUM_TENSORS; i++) {
        int branch = t.is_matrix[i] && t.ends_branch[i];
        double width = branch ? fmax(distance, 3 / sqrt(c.channels)) : distance;
        for (size_t j = 0; j < t.size[i]; j++)
            t.tensor[i][j] += (float)(width * (random_uniform(seed, 99, i, j) - 0.5));
    }
}

static void build_moved(Model *m, Config c, int B, int max_loops, int training, int recompute) {
    int mark = num_kept;
    model_build(m, c);
    model_reserve(m, B, c.max_seq_len, max_loops, training, recompute);
    float *params = FLOATS(m->params.total);
    moved_parameters(params, c, 7, 0.2);
    model_set_parameters(m, params);
    release(mark);
}

static void build_small(Model *m, Config c, int B, int max_loops, int recompute) {
    build_moved(m, c, B, max_loops, 1, recompute);
}

static void build_inference(Model *m, Config c, int B) { build_moved(m, c, B, 1, 0, 0); }

// Sets the next forward's tokens: sequences first .. first+B-1 of a step that has total.
static void set_batch(Model *m, int step, int first, int B, int total) {
    int T = m->config.max_seq_len, mark = num_kept, *targets = INTS(B * T);
    for (int i = 0; i < B * T; i++)
        targets[i] = (int)(random_bits(7, 0, step, first * T + i) % m->config.vocab_size);
    Noise noise = {5, (uint64_t)step, first, total, 0};
    model_noise(m, targets, INTS(B), noise, B, T); // zeros: no sequence has a context
    release(mark);
}

static double forward_loss(Model *m, int S, int backward) {
    model_forward(m, S);
    double loss = model_loss(m, backward);
    if (backward) model_backward(m);
    return loss;
}

// Writes tokens as a shard.
static void write_shard(const char *path, const int *tokens, int n) {
    int mark = num_kept;
    size_t bytes = 4 * HEADER_INTS + 2 * (size_t)n;
    int *file = (int *)host_array(bytes, 1);
    file[0] = SHARD_MAGIC;
    file[1] = 1;
    file[2] = n;
    uint16_t *to = (uint16_t *)(file + HEADER_INTS);
    for (int i = 0; i < n; i++) to[i] = (uint16_t)tokens[i];
    write_file(path, file, bytes);
    release(mark);
}

// =================================================================================================
// Against PyTorch

typedef struct {
    char name[33];
    int type, dims, size[4]; // type: 1 int32, 2 float32, 3 float64
    const void *data;
    size_t count;
} DumpTensor;

typedef struct {
    const char *path, *name; // name: without its folder
    const unsigned char *file;
    size_t bytes;
    DumpTensor *tensors;
    int n;
} Dump;

static Dump dump_open(const char *path) {
    Dump d;
    d.path = path;
    d.name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    d.file = (const unsigned char *)map_file(path, 20260527, 1, "reference file", &d.bytes);
    d.n = ((const int *)d.file)[2];
    d.tensors = (DumpTensor *)host_array(d.n, sizeof *d.tensors);
    size_t at = 1024; // the header
    for (int i = 0; i < d.n; i++) {
        DumpTensor *t = &d.tensors[i];
        memcpy(t->name, d.file + at, 32);
        memcpy(&t->type, d.file + at + 32, 24); // type, number of dimensions, four sizes
        t->count = (size_t)t->size[0] * t->size[1] * t->size[2] * t->size[3];
        t->data = d.file + at + 56;
        at += 56 + t->count * (t->type == 3 ? 8 : 4);
    }
    if (at != d.bytes) die(FAILED, "%s is damaged", path);
    return d;
}

// The tensor of that name and type. It must have count elements, or any number if count is 0.
__attribute__((format(printf, 4, 5)))
static const DumpTensor *find(const Dump *d, int type, size_t count, const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    for (int i = 0; i < d->n; i++) {
        const DumpTensor *t = &d->tensors[i];
        if (!strcmp(t->name, name) && t->type == type && (!count || t->count == count)) return t;
    }
    die(FAILED, "%s: no tensor %s of type %d with %zu elements", d->path, name, type, count);
}
#define DUMP_INTS(d, ...) ((const int *)find(d, 1, __VA_ARGS__)->data)
#define DUMP_FLOATS(d, ...) ((const float *)find(d, 2, __VA_ARGS__)->data)

static double dump_double(const DumpTensor *t, int i) { // element i; they need not be aligned
    double x;
    memcpy(&x, (const char *)t->data + i * sizeof x, sizeof x);
    return x;
}

// The largest difference. In bf16, where rounding is relative to a number's size: |a - b| / |b|.
static double state_error(const float *a, const float *b, size_t n) {
    return BF16 ? relative_norm(a, b, n) : largest_difference(a, b, n);
}

// What the checks of one reference file share.
typedef struct {
    Dump dump;
    Config config;
    Shape shapes[NUM_TENSORS];
    Model model; // with the parameters of the file
    Data data;   // its corpus
    int B, T, seed;
    int num_loops, loops[8];
} Reference;

static void reference_parameters(Reference *r) {
    const Dump *d = &r->dump;
    Model *m = &r->model;
    float *params = FLOATS(m->params.total);

    // The checksum stands for all of the initial parameters.
    init_parameters(params, r->config, r->seed);
    int crc = (int)crc32(0, params, m->params.total * sizeof(float));
    check("initial parameters, checksum", crc != *DUMP_INTS(d, 1, "init_crc"), 0, "%s", d->name);

    // The other checks begin with other parameters, at which no gradient is trivial.
    float *at = params;
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t n = m->params.size[i];
        memcpy(at, DUMP_FLOATS(d, n, "params/%s", r->shapes[i].name), n * sizeof(float));
        at += n;
    }
    model_set_parameters(m, params);
}

// Noise of the sequences in the tensor NAMEtargets: masks and weights. The model has it afterwards.
static void reference_noise(Reference *r, const char *prefix, const int *given) {
    const Dump *d = &r->dump;
    const char *kind = *prefix ? "answers" : "uniform";
    size_t BT = (size_t)r->B * r->T;
    int *x = INTS(BT);
    float *weights = FLOATS(BT);
    Noise noise = {(uint64_t)r->seed, 0, 0, r->B, 0};
    const int *targets = DUMP_INTS(d, BT, "%stargets", prefix);
    model_noise(&r->model, targets, given, noise, r->B, r->T);
    read_memory(x, r->model.x, BT * sizeof(int));
    read_memory(weights, r->model.weights, BT * sizeof(float));
    check("masks, tokens that differ", count_different(x, DUMP_INTS(d, BT, "%sx", prefix), BT), 0,
          "%s %s", d->name, kind);
    check("weights", largest_difference(weights, DUMP_FLOATS(d, BT, "%sweights", prefix), BT), 0,
          "%s %s", d->name, kind);
}

// How many tokens of a sequence are context, and which numbers come of it.
static void reference_answers(Reference *r) {
    const Dump *d = &r->dump;
    int BT = r->B * r->T, *given = INTS(r->B), *tokens = INTS(BT);
    const int *targets = DUMP_INTS(d, BT, "answers_targets");
    uint16_t *as_shard = (uint16_t *)host_array(BT, sizeof(uint16_t));
    for (int i = 0; i < BT; i++) as_shard[i] = (uint16_t)targets[i]; // sequence after sequence
    Shard shard = {as_shard, BT};
    Data data = {&shard, 1, r->T, *DUMP_INTS(d, 1, "answers_sep")};
    for (int b = 0; b < r->B; b++)
        given[b] = data_sequence(&data, tokens + b * r->T, b, r->T, r->T);
    check("context, sequences that differ",
          count_different(given, DUMP_INTS(d, r->B, "answers_given"), r->B)
              + count_different(tokens, targets, BT), 0, "%s", d->name);
    reference_noise(r, "answers_", given);
}

// The levels, and the noise of the batch that all further checks use.
static void reference_levels(Reference *r) {
    const DumpTensor *levels = find(&r->dump, 3, r->B, "t");
    Noise noise = {(uint64_t)r->seed, 0, 0, r->B, 0};
    double worst = 0;
    for (int b = 0; b < r->B; b++)
        worst = worse(worst, fabs(noise_level(noise, b) - dump_double(levels, b)));
    check("noise level t", worst, 0, "%s", r->dump.name);
    reference_noise(r, "", INTS(r->B));
}

// Forward and backward with S loops: the state after each loop and the last pass, logits, loss and
// the gradient of each tensor.
static void reference_passes(Reference *r, int S) {
    const Dump *d = &r->dump;
    Model *m = &r->model;
    Config c = r->config;
    int n = c.loop_end - c.loop_start, V = c.vocab_size, R = m->R;
    size_t BTC = (size_t)r->B * r->T * c.channels;
    float *state = FLOATS(BTC), *logits = FLOATS((size_t)R * V), *grads = FLOATS(m->params.total);

    // In training each pass has a state of its own, so they are all there after the forward.
    model_forward(m, S);
    read_memory(state, pass_input(m, num_passes(c, S)), BTC * sizeof(float));
    double error = state_error(state, DUMP_FLOATS(d, BTC, "hidden/%d", S), BTC);
    for (int loop = 0; n && loop < S; loop++) {
        const float *want = DUMP_FLOATS(d, S * BTC, "states/%d", S) + loop * BTC;
        read_memory(state, pass_input(m, c.loop_start + (loop + 1) * n), BTC * sizeof(float));
        error = worse(error, state_error(state, want, BTC));
    }
    check(BF16 ? "hidden states, relative" : "hidden states, largest difference", error,
          TOLERANCE(1e-4, BF16_HIDDEN), "%s S=%d", d->name, S);

    double loss = model_loss(m, 1), want = *DUMP_FLOATS(d, 1, "loss/%d", S);
    check("loss, relative", fabs(loss - want) / want, TOLERANCE(1e-5, BF16_LOSS), "%s S=%d",
          d->name, S);
    model_backward(m);
    read_tensors(grads, &m->grads);
    clear_gradients(m); // the next S starts from zero

    // The head once more, because the backward has overwritten its logits.
    for (int r0 = 0; r0 < R; r0 += m->head_rows) {
        int positions = min_int(m->head_rows, R - r0);
        head_forward(m, m->masked + r0, positions);
        read_logits(logits + (size_t)r0 * V, m, positions);
    }
    size_t RV = (size_t)R * V;
    check(BF16 ? "logits, relative" : "logits, largest difference",
          state_error(logits, DUMP_FLOATS(d, RV, "logits/%d", S), RV), TOLERANCE(1e-4, BF16_HIDDEN),
          "%s S=%d, %d masked positions", d->name, S, R);

    const float *at = grads;
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t size = m->grads.size[i];
        const char *name = r->shapes[i].name;
        check("gradients, relative to their norm",
              relative_norm(at, DUMP_FLOATS(d, size, "grad%d/%s", S, name), size),
              TOLERANCE(1e-4, BF16_GRADIENT), "%s S=%d %s", d->name, S, name);
        at += size;
    }
}

static void reference_nelbo(Reference *r) {
    double nelbo[10];
    for (int i = 0; i < r->num_loops; i++) {
        double want = DUMP_FLOATS(&r->dump, r->num_loops, "nelbo")[i];
        Loops loops = {r->loops[i], 0};
        Evaluation e = evaluate(&r->model, &r->data, loops, 10, r->B, r->seed, nelbo);
        check("NELBO, relative", fabs(e.nelbo - want) / want, TOLERANCE(1e-5, BF16_LOSS), "%s S=%d",
              r->dump.name, loops.S);
    }
}

typedef struct { const int *want; size_t size; int steps; double different; } Trace;

static void compare_step(const int *x, int T, int step, void *data) { // sample() calls it
    Trace *trace = (Trace *)data;
    (void)T;
    if (step >= trace->steps) trace->different++;
    else trace->different += count_different(x, trace->want + step * trace->size, trace->size);
}

// The sampler for a position's score, by order.
static const int scores[] = {SCORE_PROBABILITY, SCORE_PROBABILITY, SCORE_MARGIN, SCORE_ENTROPY,
                             SCORE_PROBABILITY};

// The tokens after each step of each sampler.
static void reference_samplers(Reference *r) {
    const Dump *d = &r->dump;
    size_t BT = (size_t)r->B * r->T;
    int traces = 0, *x = INTS(BT), prefix = (int)strlen("sample_options/");
    Loops loops = {r->loops[r->num_loops - 1], 0};
    for (int k = 0; k < d->n; k++) {
        const DumpTensor *t = &d->tensors[k];
        if (strncmp(t->name, "sample_options/", prefix)) continue;
        if (t->count != 8) die(FAILED, "%s: %s has not 8 numbers", d->path, t->name);
        double v[8];
        for (int i = 0; i < 8; i++) v[i] = dump_double(t, i);
        int order = (int)v[1];
        Draw draw = {v[2], (int)v[3], v[4], scores[order], (uint64_t)v[7]};
        SampleOptions o = {(int)v[0], order, (int)v[6], v[5], loops, draw};
        const DumpTensor *want = find(d, 1, 0, "sample/%s", t->name + prefix);
        Trace trace = {(const int *)want->data, BT, want->size[0], 0};

        // compare_step() sees the tokens after each step. The last ones must be the result.
        memcpy(x, DUMP_INTS(d, BT, "sample_given"), BT * sizeof(int));
        sample(&r->model, x, r->B, r->T, o, 0, compare_step, &trace);
        trace.different += count_different(x, trace.want + (trace.steps - 1) * BT, BT);
        check("sampler's trace, tokens that differ", trace.different, 0, "%s %s", d->name,
              t->name + prefix);
        traces++;
    }

    // Files with many tokens have fewer: PyTorch would take minutes to write more.
    check("samplers' traces, missing", traces < (r->config.vocab_size > 1000 ? 3 : 12), 0, "%s",
          d->name);
}

// Adaptive loops of the sequences of x: how many each uses, and the states.
static void reference_adaptive(Reference *r) {
    const Dump *d = &r->dump;
    Model m;
    model_build(&m, r->config);
    model_reserve(&m, r->B, r->T, 1, 0, 0);
    copy_parameters(&m, &r->model);
    size_t BT = (size_t)r->B * r->T, BTC = BT * r->config.channels;
    float *state = FLOATS(BTC);
    int *used = INTS(r->B);
    static const char *const names[] = {"change", "zero"};
    for (int k = BF16; k < 2; k++) { // in bf16 rounding is a change too: there only tau = 0
        const DumpTensor *options = find(d, 3, 2, "adaptive_options/%s", names[k]);
        Loops loops = {(int)dump_double(options, 1), dump_double(options, 0)};
        model_tokens(&m, DUMP_INTS(d, BT, "x"), r->B, r->T);
        adaptive_forward(&m, loops, used);
        read_memory(state, m.states, BTC * sizeof(float));
        const int *want = DUMP_INTS(d, r->B, "adaptive_loops/%s", names[k]);
        check("adaptive loops used, that differ", count_different(used, want, r->B), 0, "%s %s",
              d->name, names[k]);
        check("hidden states, adaptive, relative",
              relative_norm(state, DUMP_FLOATS(d, BTC, "adaptive_hidden/%s", names[k]), BTC),
              TOLERANCE(1e-5, BF16_HIDDEN), "%s %s", d->name, names[k]);
    }
    model_free(&m);
}

// Ten optimizer steps of two batches each, with S varying; fewer without an average if that is
// slow, because the steps are the same.
static void reference_training(Reference *r, int average) {
    const Dump *d = &r->dump;
    int steps = IF_SLOW(average ? 10 : 3, 10);
    const char *prefix = average ? "train2" : "train", *what = average ? " with an average" : "";
    const float *loss = DUMP_FLOATS(d, 10, "%s_loss", prefix);
    const float *norm = DUMP_FLOATS(d, 10, "%s_norm", prefix);
    const int *drawn = DUMP_INTS(d, 10, "%s_loops", prefix);
    AdamW o = {0, 0.9, 0.95, 1e-8, 0.1, 1, average ? 0.4 : 0};
    Batches batches = {(uint64_t)r->seed, 2 * r->B, r->B, 0};
    double loss_error = 0, norm_error = 0, drawn_error = 0;

    // A model of its own, because the steps change the parameters
    Model m;
    model_build(&m, r->config);
    m.keeps_ema = average;
    model_reserve(&m, r->B, r->config.max_seq_len, r->config.max_loops, 1, 0);
    copy_parameters(&m, &r->model);
    size_t total = m.params.total;
    float *params = FLOATS(total);
    read_tensors(params, &m.params);
    if (average) write_tensors(&m.ema, params); // the average begins as the parameters

    for (int step = 0; step < steps; step++) {
        int S = draw_loops(r->config.max_loops, batches.seed, step);
        Gradient g = train_gradient(&m, &r->data, batches, step, S);
        o.lr = learning_rate(1e-3, 0.1, 3, 10, step);
        model_update(&m, o, g.norm, step + 1);
        loss_error = worse(loss_error, fabs(g.loss - loss[step]) / fmax(1, loss[step]));
        norm_error = worse(norm_error, fabs(g.norm / norm[step] - 1));
        drawn_error += S != drawn[step];
    }

    check("loops drawn, that differ", drawn_error, 0, "%s%s", d->name, what);
    check("losses of AdamW steps, relative", loss_error, TOLERANCE(2e-5, BF16_LOSS),
          "%s, %d steps%s", d->name, steps, what);
    check("gradient norms of steps, relative", norm_error, TOLERANCE(1e-4, BF16_GRADIENT),
          "%s, %d steps%s", d->name, steps, what);
    if (average) {
        read_tensors(params, &m.ema);
        check("average of parameters, relative",
              relative_norm(params, DUMP_FLOATS(d, total, "train2_ema"), total),
              TOLERANCE(1e-4, 1e-2), "%s", d->name);
    }

    // If all stay visible, the model sees no MASK, and predicts as many tokens.
    int masked = train_gradient(&m, &r->data, batches, 0, 1).masked;
    batches.visible = 1;
    masked -= train_gradient(&m, &r->data, batches, 0, 1).masked;
    int *x = INTS(m.B * m.T), seen = 0;
    read_memory(x, m.x, (size_t)m.B * m.T * sizeof(int));
    for (int i = 0; i < m.B * m.T; i++) seen += x[i] == m.config.vocab_size;
    check("masks, if all stay visible", seen + abs(masked), 0, "%s%s", d->name, what);
    model_free(&m);
}

static void check_reference(const char *path, const char *folder) {
    int mark = num_kept;
    Reference r;
    r.dump = dump_open(path);
    const Dump *d = &r.dump;
    memcpy(&r.config, DUMP_INTS(d, 9, "config"), sizeof r.config);
    tensor_shapes(r.config, r.shapes);
    r.seed = *DUMP_INTS(d, 1, "seed");
    r.B = find(d, 1, 0, "x")->size[0];
    r.T = find(d, 1, 0, "x")->size[1];
    r.num_loops = (int)find(d, 1, 0, "loops")->count;
    memcpy(r.loops, DUMP_INTS(d, r.num_loops, "loops"), r.num_loops * sizeof(int));

    // Its corpus becomes a file, because open_data() reads files.
    char *shard = concat(folder, "/reference.bin");
    write_shard(shard, DUMP_INTS(d, 0, "tokens"), (int)find(d, 1, 0, "tokens")->count);
    r.data = open_data(shard, r.config.vocab_size, r.config.max_seq_len);
    free(shard);
    model_build(&r.model, r.config);
    model_reserve(&r.model, r.B, r.config.max_seq_len, r.config.max_loops, 1, 0);

    reference_parameters(&r);
    reference_answers(&r);
    reference_levels(&r);
    for (int i = 0; i < r.num_loops; i++) reference_passes(&r, r.loops[i]);
    reference_nelbo(&r);

    // Untrained, the likeliest tokens are too close together for bf16 to find the same ones.
    if (!BF16) reference_samplers(&r);
    reference_adaptive(&r);
    reference_training(&r, 0);
    reference_training(&r, 1);
    model_free(&r.model);
    munmap((void *)d->file, d->bytes);
    release(mark);
}

// =================================================================================================
// Layers by themselves, against plain loops in double, at sizes around every tile

#ifdef BACKEND
#define operand(x) ((floatX)(x))
#else
// What a product makes of a number: it keeps it, or it takes the nearest bfloat16, whose lower 16
// bits are zero; of two equally near ones the even one.
static floatX operand(float x) {
    if (!BF16) return x;
    union { float f; uint32_t u; } bits = {x}, above;
    uint32_t rest = bits.u & 0xffff;
    bits.u -= rest;
    above.u = bits.u + 0x10000;
    return rest > 0x8000 || (rest == 0x8000 && bits.u >> 16 & 1) ? above.f : bits.f;
}
#endif

// An array (n) of a layer: values on the host, and the same in the model's memory. The second kind
// holds floatX, which matrix products take.
typedef struct { float *values, *there; size_t n; } Floats;
typedef struct { float *values; floatX *there; size_t n; } Numbers;

// Random numbers from -scale/2 to scale/2. No two arrays get the same.
static int arrays_made;

static Floats random_floats(size_t n, float scale) {
    Floats a = {FLOATS(n), (float *)model_array(n * sizeof(float)), n};
    arrays_made++;
    for (size_t i = 0; i < n; i++)
        a.values[i] = scale * ((float)random_uniform(11, 0, arrays_made, i) - 0.5f);
    write_memory(a.there, a.values, n * sizeof(float));
    return a;
}

static Numbers random_numbers(size_t n, float scale) {
    Numbers a = {FLOATS(n), (floatX *)model_array(n * sizeof(floatX)), n};
    floatX *host = (floatX *)host_array(n, sizeof(floatX));
    arrays_made++;
    for (size_t i = 0; i < n; i++) {
        host[i] = operand(scale * ((float)random_uniform(11, 0, arrays_made, i) - 0.5f));
        a.values[i] = (float)host[i]; // after rounding
    }
    write_memory(a.there, host, n * sizeof(floatX));
    return a;
}

// What the arrays hold now, after a layer has written into them.
static const float *floats_now(Floats a) {
    float *values = FLOATS(a.n);
    read_memory(values, a.there, a.n * sizeof(float));
    return values;
}

static const float *numbers_now(Numbers a) {
    float *values = FLOATS(a.n);
    floatX *host = (floatX *)host_array(a.n, sizeof(floatX));
    read_memory(host, a.there, a.n * sizeof(floatX));
    for (size_t i = 0; i < a.n; i++) values[i] = (float)host[i];
    return values;
}

// Of one number: relative if it is large.
static double number_error(float got, double want) {
    return fabs(got - want) / fmax(1, fabs(want));
}

#ifndef BACKEND
static void check_exp(void) {
#ifndef exp_fast // with -DPLAIN_GEMM it is expf
    double error = 0;
    for (float x = -87; x < 87; x += 0.00137f) error = worse(error, fabs(exp_fast(x) / exp(x) - 1));
    check("exp_fast, relative", error, 2.4e-7, "-87 .. 87"); // 2 units in the last place
    int right = exp_fast(-1000) < 1e-37 && exp_fast(1000) > 6e37 && exp_fast(0) == 1;
    check("exp_fast of extremes", !(right && isnan(exp_fast(NAN))), 0, "-1000, 0, 1000, NaN");
#endif
}

static void add_y(float *x, float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

// One product of random matrices, whose rows lie `apart` farther apart than needed. There a and b
// hold NaN, which must not get into the result, and c holds 7, which must stay.
static double gemm_error(int product, int M, int N, int K, int apart, int with_bias, int add,
                         int finished) {
    int mark = num_kept, a_rows = product == ATB ? K : M, a_columns = product == ATB ? M : K;
    int b_rows = product == ABT ? N : K, b_columns = product == ABT ? K : N;
    int lda = a_columns + apart, ldb = b_columns + apart, ldc = N + apart;
    float *a = FLOATS(a_rows * lda), *b = FLOATS(b_rows * ldb), *c = FLOATS(M * ldc);
    float *bias = FLOATS(N), *other = FLOATS(M * ldc), *sums = FLOATS(M);
    uint64_t seed = random_bits(M, N, K, 0);
    for (int i = 0; i < a_rows * lda; i++)
        a[i] = i % lda < a_columns ? (float)random_uniform(seed, 1, 0, i) - 0.5f : NAN;
    for (int i = 0; i < b_rows * ldb; i++)
        b[i] = i % ldb < b_columns ? (float)random_uniform(seed, 2, 0, i) - 0.5f : NAN;
    for (int i = 0; i < M * ldc; i++) c[i] = i % ldc < N ? 1 : 7; // SET must forget the 1
    for (int j = 0; j < N; j++) bias[j] = (float)j;
    for (int i = 0; i < M * ldc; i++) other[i] = i % ldc < N ? (float)(i % 8) : NAN;
    for (int i = 0; i < M; i++) sums[i] = 1; // stays in the sum
    Epilogue e = {with_bias ? bias : NULL, NULL, NULL, NULL, product == ATB ? sums : NULL};
    if (finished) { // twice: as residual, and at the end
        e.residual = e.other = other;
        e.finish = add_y;
    }
    gemm(product, M, N, K, a, lda, b, ldb, c, ldc, add, e);

    double error = 0;
    for (int i = 0; i < M; i++)
        for (int j = N; j < ldc; j++) error += c[i * ldc + j] != 7;
    // Of a large product some rows, and the last one
    int step = max_int(1, M / 5);
    for (int i = 0; i < M; i = i < M - 1 ? min_int(i + step, M - 1) : M)
        for (int j = 0; j < N; j++) {
            double sum = (with_bias ? j : 0) + (add == ADD ? 1 : 0);
            sum += finished ? 2 * ((i * ldc + j) % 8) : 0;
            for (int k = 0; k < K; k++) {
                float x = product == ATB ? a[k * lda + i] : a[i * lda + k];
                float y = product == ABT ? b[j * ldb + k] : b[k * ldb + j];
                sum += (double)operand(x) * operand(y);
            }
            error = worse(error, number_error(c[i * ldc + j], sum));
        }
    for (int i = 0; i < M && e.sums; i++) { // bit for bit: they have one order
        float sum = 1;
        for (int k = 0; k < K; k++) sum += a[k * lda + i];
        error += sums[i] != sum;
    }
    release(mark);
    return error;
}

// With instructions that are functions, under AddressSanitizer, all shapes would take minutes.
#if defined(BF16_ON_CPU) && defined(__SANITIZE_ADDRESS__)
enum { FEWER_SHAPES = 17 };
#else
enum { FEWER_SHAPES = 1 };
#endif

static void check_gemm(const char *kernel) {
#ifdef exp_fast // -DPLAIN_GEMM: there are no tiles
    static const int sizes[] = {1, 2, 5, 16, 33, 130};
#else
    // The edges of the microkernel, of a tile and of a step along K
    int sizes[] = {1, 2, MR, MR + 1, NR - 1, NR, NR + 1, MC, MC + 1, KC + 3, NT + 5};
    int bf16_sizes[] = {1, 2, TILE, TILE + 1, SQUARE - 1, SQUARE, SQUARE + 1, 3 * SQUARE,
                        3 * SQUARE + 1, BF16_KC + 3, BF16_MC + 5};
    if (bf16_kernel) memcpy(sizes, bf16_sizes, sizeof sizes);
#endif
    enum { N = COUNT(sizes) };
    static const char *const names[] = {"a b", "a b^T", "a^T b"};
    double error[3] = {0};
    int made[3] = {0};
    for (int i = 0; i < N * N * N; i += FEWER_SHAPES) { // a shape, with the next of 48 kinds
        int product = i % 3, with_bias = i / 3 % 2, add = i / 6 % 2 ? ADD : SET, apart = i / 12 % 2;
        int M = sizes[i % N], n = sizes[i / N % N], K = sizes[i / N / N], finished = i / 24 % 2;
        double e = gemm_error(product, M, n, K, 3 * apart, with_bias, add, finished);
        error[product] = worse(error[product], e);
        made[product]++;
    }
    for (int product = 0; product < 3; product++)
        check("matrix product, relative", error[product], 5e-6, "%s, %s, %d shapes", kernel,
              names[product], made[product]);
#ifndef exp_fast
    // More columns than the panel of b holds
    int columns = bf16_kernel ? BF16_PANEL / DEPTH + 9 : NC + 9;
    check("matrix product, relative", gemm_error(ABT, 3, columns, 5, 3, 1, ADD, 1), 5e-6,
          "%s, a b^T, %d columns", kernel, columns);

    // Several panels that threads share
    columns = bf16_kernel ? BF16_PANEL / BF16_KC + 9 : NC + 9;
    int rows = FEWER_SHAPES > 1 ? 40 : columns + 5;
    double e = gemm_error(AB, rows, columns, bf16_kernel ? BF16_KC : 20, 0, 0, ADD, 1);
    e = worse(e, gemm_error(ATB, rows, columns, bf16_kernel ? BF16_KC : 20, 3, 1, SET, 1));
    check("matrix product, relative", e, 5e-6, "%s, %d rows, %d columns", kernel, rows, columns);
#endif
}

// With each kernel that can be run here
static void check_kernels(void) {
#if !BF16 || defined(exp_fast)
    check_gemm("fp32");
#else
    Kernel *usual = bf16_kernel;
    bf16_kernel = NULL;
    check_gemm("bf16 as floats");
#ifdef TARGET
#ifndef BF16_ON_CPU
    if (__builtin_cpu_supports("avx512bf16"))
#endif
    {
        bf16_kernel = bf16_avx512;
        check_gemm("AVX512-BF16");
    }
    if (usual == bf16_amx) {
        bf16_kernel = bf16_amx;
        check_gemm("AMX");
    }
#endif
    bf16_kernel = usual;
#endif
}

static void check_rounding(void) {
#ifndef exp_fast
    static const uint32_t cases[][2] = { // a float's bits, and the bfloat16's
        {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}, {0xbf80ffff, 0xbf81},
        {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80}, {0xff800000, 0xff80}, {0x7fffffff, 0x7fff},
        {0x7f800001, 0x7fc0}, {0x80000000, 0x8000}};
    int wrong = 0;
    for (int i = 0; i < (int)COUNT(cases); i++) {
        union { uint32_t u; float f; } x = {cases[i][0]};
        wrong += to_bf16(x.f) != cases[i][1];
    }
    check("rounding to bfloat16", wrong, 0, "ties, infinity, NaN, zero");
#endif
}
#endif

// ---- linear layer ----

typedef struct { double forward, dinp, dweight; } MatmulErrors;

static void matmul_errors(int M, int C, int OC, MatmulErrors *e) {
    int mark = num_kept;
    Numbers inp = random_numbers(M * C, 1), weight = random_numbers(OC * C, 1);
    Numbers dout = random_numbers(M * OC, 1);
    Numbers out = random_numbers(M * OC, 1), dinp = random_numbers(M * C, 1);
    Floats bias = random_floats(OC, 1), dweight = random_floats(OC * C, 1);
    Floats dbias = random_floats(OC, 1);
#ifdef BACKEND
    // Room for the parts of long sums, as on a GPU that runs 8 blocks at a time
    size_t room = (size_t)2 * OC * C + 4 * OC;
    Parts parts = {(float *)model_array(room * sizeof(float)), room, 8};
    Store<floatX> to_out = {out.there, OC, bias.there}, to_dinp = {dinp.there, C, NULL};
    matmul_forward(to_out, inp.there, weight.there, M, C, OC);
    matmul_backward(to_dinp, dweight.there, dbias.there, dout.there, OC, inp.there, weight.there, M,
                    C, OC, parts);
#else
    Epilogue add_bias = {bias.there, NULL, NULL, NULL, NULL};
    matmul_forward(out.there, inp.there, weight.there, M, C, OC, add_bias);
    matmul_backward(dinp.there, dweight.there, dbias.there, dout.there, inp.there, weight.there, M,
                    C, OC, NONE);
#endif
    const float *got = numbers_now(out), *got_dinp = numbers_now(dinp);
    const float *got_dweight = floats_now(dweight), *got_dbias = floats_now(dbias);
    const float *x = inp.values, *w = weight.values, *dy = dout.values;

    // Against sums in double, for some rows and the last two
    int step = max_int(1, M / 9);
    for (int i = 0; i < M; i += i < M - 2 ? min_int(step, M - 2 - i) : 1) {
        for (int j = 0; j < OC; j++) {
            double sum = bias.values[j];
            for (int k = 0; k < C; k++) sum += (double)x[i * C + k] * w[j * C + k];
            e->forward = worse(e->forward, number_error(got[i * OC + j], sum));
        }
        for (int j = 0; j < C; j++) {
            double sum = 0;
            for (int k = 0; k < OC; k++) sum += (double)dy[i * OC + k] * w[k * C + j];
            e->dinp = worse(e->dinp, number_error(got_dinp[i * C + j], sum));
        }
    }

    // The gradients of weight and bias are added to what was there.
    step = max_int(1, OC / 9);
    for (int i = 0; i < OC; i += i < OC - 2 ? min_int(step, OC - 2 - i) : 1) {
        double sum = dbias.values[i];
        for (int k = 0; k < M; k++) sum += dy[k * OC + i];
        e->dweight = worse(e->dweight, number_error(got_dbias[i], sum));
        for (int j = 0; j < C; j++) {
            sum = dweight.values[i * C + j];
            for (int k = 0; k < M; k++) sum += (double)dy[k * OC + i] * x[k * C + j];
            e->dweight = worse(e->dweight, number_error(got_dweight[i * C + j], sum));
        }
    }
    release(mark);
}

// ---- attention ----

// One head in double: q, k, v and their gradients have rows 3C apart, y and dy rows C apart.
static void attention_in_double(float *y, float *dq, const float *q, const float *dy, int T, int C,
                                int D) {
    int mark = num_kept;
    const float *k = q + C, *v = k + C;
    double *p = DOUBLES(T), *dp = DOUBLES(T), *dk = DOUBLES(T * D), *dv = DOUBLES(T * D);
    for (int i = 0; i < T; i++) { // the query
        double largest = -1e30, sum = 0, delta = 0;

        // p: scores, then their softmax. dp = dout v^T
        for (int j = 0; j < T; j++) {
            p[j] = 0;
            dp[j] = 0;
            for (int d = 0; d < D; d++) {
                p[j] += (double)q[i * 3 * C + d] * k[j * 3 * C + d] / sqrt(D);
                dp[j] += (double)dy[i * C + d] * v[j * 3 * C + d];
            }
            largest = fmax(largest, p[j]);
        }
        for (int j = 0; j < T; j++) {
            p[j] = exp(p[j] - largest);
            sum += p[j];
        }
        for (int j = 0; j < T; j++) {
            p[j] /= sum;
            delta += p[j] * dp[j];
        }

        // out = p v;  dscores = p (dp - delta);  dq, dk and dv follow from them
        for (int d = 0; d < D; d++) {
            double out = 0, dquery = 0;
            for (int j = 0; j < T; j++) {
                double dscore = p[j] * (dp[j] - delta) / sqrt(D);
                out += p[j] * v[j * 3 * C + d];
                dquery += dscore * k[j * 3 * C + d];
                dk[j * D + d] += dscore * q[i * 3 * C + d];
                dv[j * D + d] += p[j] * dy[i * C + d];
            }
            y[i * C + d] = (float)out;
            dq[i * 3 * C + d] = (float)dquery;
        }
    }
    for (int j = 0; j < T; j++)
        for (int d = 0; d < D; d++) {
            dq[j * 3 * C + C + d] = (float)dk[j * D + d];
            dq[j * 3 * C + 2 * C + d] = (float)dv[j * D + d];
        }
    release(mark);
}

static void attention_errors(int B, int T, int NH, int D, double *forward, double *backward) {
    int mark = num_kept, C = NH * D;
    size_t n = (size_t)B * T * C;
    Numbers qkv = random_numbers(3 * n, 4), dout = random_numbers(n, 1);
    Numbers out = random_numbers(n, 1), dqkv = random_numbers(3 * n, 1);
    float *lse = (float *)model_array((size_t)B * NH * T * sizeof(float));
    float *want = FLOATS(n), *dwant = FLOATS(3 * n);
    attention_forward(out.there, lse, qkv.there, B, T, C, NH);
#ifdef BACKEND // the softmax's sum(p dp) has a buffer of its own
    size_t padded = (size_t)B * NH * blocks(T, ATTN_ROWS) * ATTN_ROWS * 2;
    float *lse_delta = (float *)model_array(padded * sizeof(float));
    attention_backward(dqkv.there, lse_delta, dout.there, out.there, qkv.there, lse, B, T, C, NH);
#else
    attention_backward(dqkv.there, dout.there, qkv.there, lse, B, T, C, NH);
#endif
    for (int bh = 0; bh < B * NH; bh++) {
        size_t head = bh % NH * D, at = (size_t)(bh / NH) * T * C + head;
        size_t at_q = (size_t)(bh / NH) * T * 3 * C + head;
        attention_in_double(want + at, dwant + at_q, qkv.values + at_q, dout.values + at, T, C, D);
    }
    *forward = worse(*forward, relative_norm(numbers_now(out), want, n));
    *backward = worse(*backward, relative_norm(numbers_now(dqkv), dwant, 3 * n));
    release(mark);
}

// ---- embedding ----

// The gradient where one token stands at hundreds of positions, some tokens stand twice in a
// stretch of 256 positions, and some never.
static double encoder_error(int B, int T, int C, int V) {
    int mark = num_kept, *x = INTS(B * T);
    size_t n = (size_t)B * T * C;
    for (int i = 0; i < B * T; i++) {
        int often = random_uniform(12, 0, 0, i) < 0.5;
        x[i] = often ? V - 1 : (int)(random_bits(13, 0, 0, i) % V);
    }
    Floats dout = random_floats(n, 1), dwte = random_floats((size_t)V * C, 1);
    Floats dwpe = random_floats((size_t)T * C, 1);
    encoder_backward(dwte.there, dwpe.there, dout.there, to_model(x, B * T), B, T, C);

    // The layer adds to what is there.
    double *want = DOUBLES(V * C), *want_wpe = DOUBLES(T * C), error = 0;
    for (int i = 0; i < V * C; i++) want[i] = dwte.values[i];
    for (int i = 0; i < T * C; i++) want_wpe[i] = dwpe.values[i];
    for (int i = 0; i < B * T; i++)
        for (int c = 0; c < C; c++) {
            want[x[i] * C + c] += dout.values[i * C + c];
            want_wpe[i % T * C + c] += dout.values[i * C + c];
        }
    const float *got = floats_now(dwte), *got_wpe = floats_now(dwpe);
    for (int i = 0; i < V * C; i++) error = worse(error, number_error(got[i], want[i]));
    for (int i = 0; i < T * C; i++) error = worse(error, number_error(got_wpe[i], want_wpe[i]));
    release(mark);
    return error;
}

// ---- cross entropy ----

static void crossentropy_errors(int R, int V, double *loss_error, double *gradient_error) {
    int mark = num_kept, distance = V, *positions = INTS(R), *targets = INTS(2 * R);
#ifdef BACKEND
    distance = (V + 7) / 8 * 8; // of the rows of logits
#endif
    size_t n = (size_t)R * distance;
    float *want = FLOATS(n), *got = FLOATS(n);
    for (int r = 0; r < R; r++) positions[r] = 2 * r + 1; // each second position is masked
    for (int i = 0; i < 2 * R; i++)
        targets[i] = i == 1 ? V - 1 : (int)(random_bits(14, 0, 0, i) % V);
    Floats logits = random_floats(n, 20), weights = random_floats(2 * R, 1);
    Floats losses = random_floats(R, 1);
    int *targets_there = to_model(targets, 2 * R), *positions_there = to_model(positions, R);
#ifdef BACKEND
    Numbers dlogits = random_numbers(n, 1);
    if (!BF16) dlogits.there = (floatX *)logits.there; // in fp32 they take the place of the logits
    crossentropy(losses.there, dlogits.there, logits.there, weights.there, targets_there,
                 positions_there, R, V, distance);
    memcpy(got, numbers_now(dlogits), n * sizeof(float));
#else
    crossentropy(losses.there, logits.there, weights.there, targets_there, positions_there, R, V);
    memcpy(got, floats_now(logits), n * sizeof(float));
#endif

    // loss = -log softmax(logits)[target];  dlogits = weight (p - 1 at the target)
    const float *got_losses = floats_now(losses);
    for (int r = 0; r < R; r++) {
        const float *x = logits.values + (size_t)r * distance;
        int target = targets[positions[r]];
        double sum = 0, weight = weights.values[positions[r]];
        for (int v = 0; v < V; v++) sum += exp((double)x[v]);
        for (int v = 0; v < V; v++) {
            double p = exp((double)x[v]) / sum;
            want[r * distance + v] = (float)((p - (v == target)) * weight);
        }
        for (int v = V; v < distance; v++) got[r * distance + v] = 0; // padding may be anything
        double loss = log(sum) - x[target];
        *loss_error = worse(*loss_error, number_error(got_losses[r], loss));
    }
    *gradient_error = worse(*gradient_error, relative_norm(got, want, n));
    release(mark);
}

static void check_products(void) {
    static const int rows[] = {1, 17, 128, 131, 700}, channels[] = {2, 6, 32, 130, 200};
    static const int outputs[] = {2, 64, 130, 264};
    MatmulErrors e = {0, 0, 0};
    for (int i = 0; i < 100; i++) // each combination
        matmul_errors(rows[i % 5], channels[i / 5 % 5], outputs[i / 25], &e);
#ifdef BACKEND // on Hopper a third turn in each block, and sums longer than its ring
    if (this_gpu()->major == 9) {
        int many = 5 * 64 * this_gpu()->multiProcessorCount; // 384 columns are 2 tiles of 128 rows
        matmul_errors(many + 20, 328, 384, &e);
        matmul_errors(72, 384, many, &e);
    }
#endif
    // In bf16 results are rounded to 8 significant bits: by 2^-8 of their size at most.
    check("matmul_forward", e.forward, TOLERANCE(5e-6, 1 / 255.), "100 shapes");
    check("matmul_backward, input", e.dinp, TOLERANCE(5e-6, 1 / 255.), "100 shapes");
    check("matmul_backward, weight and bias", e.dweight, TOLERANCE(1e-5, 1e-4),
          "100 shapes, sums of up to 700");
}

static void check_attention(void) {
    static const int T[] = {1, 17, 64, 65, 130}, D[] = {2, 8, 20, 32, 48, 64, 66, 96, 128};
    double forward = 0, backward = 0;
    for (int i = 0; i < 45; i++) attention_errors(2, T[i % 5], 2, D[i / 5], &forward, &backward);
#ifdef BACKEND // on Hopper more positions than its ring holds
    if (this_gpu()->major == 9) attention_errors(1, 330, 2, 64, &forward, &backward);
#endif
    // In bf16 the output goes through two roundings: probabilities, results. The gradients go
    // through three: the output and dscores too. Each is 2^-8 at most, half of that on average.
    check("attention_forward, relative", forward, TOLERANCE(1e-6, 1 / 256.),
          "T = 1 .. 130, heads of 2 .. 128");
    check("attention_backward, relative", backward, TOLERANCE(3e-6, 1.5 / 256),
          "T = 1 .. 130, heads of 2 .. 128");
}

static void check_layers(void) {
#ifndef BACKEND
    check_exp();
    check_rounding();
    check_kernels();
#endif
    check_products();
    check_attention();
    check("encoder_backward", encoder_error(3, 210, 140, 50), 1e-5,
          "630 positions, half of them of one token");

    double loss = 0, gradient = 0;
    crossentropy_errors(5, 1, &loss, &gradient);
    crossentropy_errors(9, 703, &loss, &gradient);
    crossentropy_errors(3, 20001, &loss, &gradient);
    check("crossentropy, loss", loss, 1e-6, "1, 703 and 20001 tokens");
    check("crossentropy, gradient, relative", gradient, TOLERANCE(2e-6, 1 / 256.),
          "1, 703 and 20001 tokens");
#ifndef BACKEND // more queries than attention takes at a time
    double forward = 0, backward = 0;
    attention_errors(1, 2 * QUERIES + 44, 2, 48, &forward, &backward);
    check("attention_forward, relative", forward, TOLERANCE(1e-6, 1 / 256.), "556 positions");
    check("attention_backward, relative", backward, TOLERANCE(3e-6, 1.5 / 256), "556 positions");
#endif
}

// =================================================================================================
// Properties of a model that need no reference

// Gradients against finite differences: the loss changes by 2 h |g| from one side of the parameters
// to the other, h away along the gradient g of a tensor.
static void check_differences(void) {
    int mark = num_kept;
    Config c = small_config(1, 3);
    Model m;
    Shape shapes[NUM_TENSORS];
    tensor_shapes(c, shapes);
    build_small(&m, c, 8, c.max_loops, 0);
    set_batch(&m, 0, 0, 8, 8);
    size_t total = m.params.total, begin = 0;
    float *params = FLOATS(total), *grads = FLOATS(total), *moved = FLOATS(total);
    forward_loss(&m, 3, 1);
    double total_norm = gradient_norm(&m), h = TOLERANCE(5e-3, 1e-1);
    read_tensors(params, &m.params);
    read_tensors(grads, &m.grads);
    for (int i = 0; i < NUM_TENSORS; i++) { // elements begin .. end-1 of all parameters
        size_t end = begin + m.params.size[i];
        double norm = 0, loss[2];
        for (size_t j = begin; j < end; j++) norm += (double)grads[j] * grads[j];
        norm = sqrt(norm);

        // The loss on both sides. Only this tensor moves.
        for (int side = 0; side < 2; side++) {
            double distance = side ? h : -h;
            memcpy(moved, params, total * sizeof(float));
            for (size_t j = begin; j < end; j++) moved[j] += (float)(distance * grads[j] / norm);
            model_set_parameters(&m, moved);
            loss[side] = forward_loss(&m, 3, 0);
        }

        // A tensor whose gradient is small beside the others is compared with all of them.
        double error = fabs((loss[1] - loss[0]) / (2 * h) - norm) / fmax(norm, 0.01 * total_norm);
        check("gradients against differences", error, TOLERANCE(1e-2, BF16_GRADIENT + 1e-2), "%s",
              shapes[i].name);
        begin = end;
    }
    model_free(&m);
    release(mark);
}

// Gradients that come in other ways are the same: recomputed, twice, with the head in parts, and of
// two halves of a batch.
static void check_gradients(void) {
    int mark = num_kept, x[8 * 24], half[4 * 24];
    Config c = small_config(1, 3);
    Model m, less;
    build_small(&m, c, 8, c.max_loops, 0);
    build_small(&less, c, 8, c.max_loops, 1);
    size_t total = m.params.total;
    float *once = FLOATS(total), *twice = FLOATS(total), *other = FLOATS(total);
    set_batch(&m, 0, 0, 8, 8);
    set_batch(&less, 0, 0, 8, 8);
    double loss = forward_loss(&m, 3, 1);
    read_tensors(once, &m.grads);
    for (size_t i = 0; i < total; i++) twice[i] = 2 * once[i];

    // --recompute: the same numbers. A second backward adds to what is there.
    forward_loss(&less, 3, 1);
    read_tensors(other, &less.grads);
    check("recomputed equals stored", largest_difference(other, once, total), 0,
          "gradients at S=3");
    check("recomputing takes less memory", less.bytes[ACTIVATIONS] >= m.bytes[ACTIVATIONS], 0,
          "activations");
    forward_loss(&less, 3, 1);
    read_tensors(other, &less.grads);
    check("gradients are added up, relative", relative_norm(other, twice, total), 1e-6,
          "twice the same batch");
    model_free(&less);

    // The head takes 7 masked positions at a time; the last part has fewer.
    clear_gradients(&m);
    int head_rows = m.head_rows;
    m.head_rows = 7;
    check("the head in parts: loss, relative", fabs(forward_loss(&m, 3, 1) / loss - 1), 1e-6,
          "7 positions at a time");
    m.head_rows = head_rows;
    read_tensors(other, &m.grads);
    check("the head in parts: gradient, relative", relative_norm(other, once, total),
          TOLERANCE(1e-5, 1e-4), "7 positions at a time");

    // Two batches of 4 sequences: the same noise, and a gradient that is the sum of theirs
    double sum = 0, different = 0;
    clear_gradients(&m);
    read_memory(x, m.x, sizeof x);
    for (int first = 0; first < 8; first += 4) {
        set_batch(&m, 0, first, 4, 8);
        read_memory(half, m.x, sizeof half);
        different += count_different(half, x + first * 24, 4 * 24);
        sum += forward_loss(&m, 3, 1);
    }
    read_tensors(other, &m.grads);
    check("accumulation: masks that differ", different, 0, "2 x 4 sequences and 8");
    check("accumulation: loss, relative", fabs(sum / loss - 1), 1e-6, "2 x 4 sequences and 8");
    check("accumulation: gradient, relative", relative_norm(other, once, total),
          TOLERANCE(1e-5, 1e-4), "2 x 4 sequences and 8");
    model_free(&m);
    release(mark);
}

// The same step again and again, with others in between, gives the same gradients: loopmdm.cu
// records a pass when it runs for the second time, and from then on replays it.
static void check_repeated(int channels, int heads, int recompute) {
    int mark = num_kept;
    Config c = small_config(1, 3);
    Model m;
    c.channels = channels;
    c.heads = heads;
    build_small(&m, c, 8, c.max_loops, recompute);
    float *once = FLOATS(m.params.total), *again = FLOATS(m.params.total);
    for (int run = 1; run <= 4; run++) {
        set_batch(&m, 0, 0, 8, 8);
        clear_gradients(&m);
        forward_loss(&m, 3, 1);
        read_tensors(run == 1 ? once : again, &m.grads);
        if (run > 1)
            check("the same step again", largest_difference(again, once, m.params.total), 0,
                  "run %d, heads of %d, recompute %d", run, channels / heads, recompute);
        set_batch(&m, 1, 0, 4, 8);
        forward_loss(&m, run, 1);
    }
    model_free(&m);
    release(mark);
}

// One memory for all passes gives what a memory for each gives. One loop is an ordinary model.
static void check_loops(void) {
    Config c = small_config(1, 3);
    Model m, inference;
    build_small(&m, c, 2, 16, 0);
    model_build(&inference, c);
    model_reserve(&inference, 2, 24, 1, 0, 0);
    copy_parameters(&inference, &m);
    set_batch(&m, 0, 0, 2, 2);
    set_batch(&inference, 0, 0, 2, 2);
    double looped[17];
    for (int S = 1; S <= 16; S++)
        if (S <= 4 || S == 16) looped[S] = forward_loss(&m, S, 0);

    // In inference all passes use the same memory.
    for (int S = 4; S <= 16; S += 12)
        check("inference equals training", fabs(looped[S] - forward_loss(&inference, S, 0)), 0,
              "S=%d%s", S, S > c.max_loops ? ", beyond S_max" : "");

    // The same parameters without a loop: an ordinary MDM.
    inference.config.loop_start = 0;
    inference.config.loop_end = 0;
    double plain = forward_loss(&inference, 1, 0);
    check("no loop: S does not matter", fabs(forward_loss(&inference, 2, 0) - plain), 0, "S=2");
    check("S=1 equals a plain MDM", fabs(looped[1] - plain), 0, "loss");
    check("S=2 differs from a plain MDM", fabs(looped[2] - plain) < 1e-4, 0, "loss");
    model_free(&inference);
    model_free(&m);
}

// The share of tokens to predict follows t. The share of them that stay visible is as asked. Each t
// stays in its stratum: of 8, one lies in each eighth.
static void check_noise(void) {
    enum { B = 8, T = 24 };
    Model m;
    model_build(&m, small_config(1, 1));
    model_reserve(&m, B, T, 1, 1, 0);
    int targets[B * T] = {0}, given[B] = {0}, x[B * T];
    float weights[B * T];
    double shares[] = {0, 0.5, 1};
    for (int k = 0; k < COUNT(shares); k++) {
        double predicted = 0, visible = 0, expected = 0, outside = 0, wrong = 0;
        for (int step = 0; step < 500; step++) {
            Noise noise = {5, (uint64_t)step, 0, B, shares[k]};
            int R = model_noise(&m, targets, given, noise, B, T);
            read_memory(x, m.x, sizeof x);
            read_memory(weights, m.weights, sizeof weights);
            for (int i = 0; i < B * T; i++) {
                predicted += weights[i] > 0;
                visible += weights[i] > 0 && x[i] == 0;
                wrong += x[i] != 0 && !(weights[i] > 0);
                R -= weights[i] > 0;
            }
            wrong += abs(R);
            for (int b = 0; b < B; b++) {
                double t = noise_level(noise, b);
                int below = 0; // how many levels of this step are lower: the number of its stratum
                for (int other = 0; other < B; other++) below += noise_level(noise, other) < t;
                expected += T * t;
                outside = worse(outside, fabs(t - (below + 0.5) / B) - 0.5 / B);
            }
        }
        check("share of tokens to predict", fabs(predicted / expected - 1), 0.01, "500 batches");
        check("share that stays visible", fabs(visible / predicted - shares[k]),
              0.01 * (shares[k] == 0.5), "500 batches, %g", shares[k]);
        check("masks without a weight", wrong, 0, "500 batches, %g", shares[k]);
        check("t stays in its stratum", outside, 2e-3, "500 batches"); // eps = 1e-3 shifts strata
    }
    model_free(&m);
    double error = fabs(visible_share(0, 0)) + fabs(visible_share(10, 0) - 0.5);
    error += fabs(visible_share(10, 5) - 0.25) + fabs(visible_share(10, 10));
    check("visible share", error, 1e-12, "without a warmup; first step, middle, end");
}

static void check_draws_of_loops(void) {
    Config c = small_config(1, 3);
    double share[4][5] = {{0}};
    for (int step = 0; step < 20000; step++)
        for (int dist = 0; dist < 4; dist++)
            share[dist][loops_of_step(c, dist, step)] += 1 / 20000.0;
    // p(S) ~ 1 / FLOPs(S), so that p(1) / p(4) = FLOPs(4) / FLOPs(1)
    double flops = training_flops(c, 24, 4, 0.5, 0) / training_flops(c, 24, 1, 0.5, 0);
    const double *uniform = share[LOOPS_UNIFORM], *by_flops = share[LOOPS_FLOPS];
    const double *top = share[LOOPS_TOP];
    check("p(S) uniform", fmax(fabs(uniform[1] - 0.25), fabs(uniform[4] - 0.25)), 0.015,
          "20000 steps");
    check("p(S) fixed", fabs(1 - share[LOOPS_FIXED][4]), 1e-9, "20000 steps");
    check("p(S) top: only 2, 3 and 4", fabs(1 - top[2] - top[3] - top[4]), 1e-9, "20000 steps");
    check("p(S) top", fmax(fabs(top[2] - 1 / 3.0), fabs(top[4] - 1 / 3.0)), 0.015, "20000 steps");
    check("p(S) flops: p(1)/p(4), relative", fabs(by_flops[1] / by_flops[4] / flops - 1), 0.08,
          "20000 steps");
    int fewest = 7;
    c.max_loops = 7;
    for (int step = 0; step < 1000; step++)
        fewest = min_int(fewest, loops_of_step(c, LOOPS_TOP, step));
    check("p(S) top: from 4 up if S_max is 7", abs(fewest - 4), 0, "1000 steps");
}

// The schedule, and what a step does with no gradient: only matrices move, because they decay.
static void check_optimizer(void) {
    static const struct { int step; double rate; } points[] = {
        {4, 0.5}, {10, 1}, {60, 0.55}, {110, 0.1},
    };
    int mark = num_kept;
    double error = 0;
    for (int i = 0; i < 4; i++)
        error += fabs(learning_rate(1, 0.1, 10, 110, points[i].step) - points[i].rate);
    check("learning rate", error, 1e-12, "warmup, top, middle, end");

    // lr 0.5 and weight decay 0.1 take 0.05 of a matrix. What learns slower also decays slower.
    Config c = small_config(1, 3);
    Shape shapes[NUM_TENSORS];
    Model m;
    tensor_shapes(c, shapes);
    build_small(&m, c, 1, 1, 0);
    float *before = FLOATS(m.params.total), *after = FLOATS(m.params.total), *at = after;
    read_tensors(before, &m.params);
    AdamW o = {0.5, 0.9, 0.95, 1e-8, 0.1, 1, 0};
    model_update(&m, o, 0, 1);
    read_tensors(after, &m.params);
    error = 0;
    for (int i = 0; i < NUM_TENSORS; i++)
        for (size_t j = 0; j < m.params.size[i]; j++, at++) {
            double decay = m.params.ends_branch[i] ? 0.05 / c.layers : 0.05;
            double want = before[at - after] * (shapes[i].in ? 1 - decay : 1);
            error = worse(error, fabs(*at - want));
        }
    check("weight decay", error, 1e-7, "matrices, and nothing else");
    model_free(&m);
    release(mark);
}

// The average keeps a share of itself: (1 + step) / (10 + step) at first, then --ema. With a rate
// of zero the parameters stay, so only the average moves.
static void check_average(void) {
    int mark = num_kept;
    Config c = small_config(1, 3);
    Model m;
    model_build(&m, c);
    m.keeps_ema = 1;
    model_reserve(&m, 1, c.max_seq_len, 1, 1, 0);
    size_t n = m.params.total;
    float *params = FLOATS(n), *average = FLOATS(n);
    init_parameters(params, c, 3);
    for (size_t i = 0; i < n; i++) average[i] = 1;
    model_set_parameters(&m, params);
    write_tensors(&m.ema, average);
    AdamW o = {0, 0.9, 0.95, 1e-8, 0.1, 1, 0.7};
    double keeps = 1, error = 0;
    for (int step = 1; step <= 30; step += 29) { // (1 + 30) / (10 + 30) is more than 0.7
        model_update(&m, o, 0, step);
        read_tensors(average, &m.ema);
        keeps *= step == 1 ? 2 / 11. : 0.7; // of the 1 that it began with
        for (size_t i = 0; i < n; i++)
            error = worse(error, fabs(average[i] - (keeps + (1 - keeps) * params[i])));
    }
    check("average of parameters, what it keeps", error, 1e-6, "steps 1 and 30");
    model_free(&m);
    release(mark);
}

static void check_threads(void) {
#ifdef __SSE__
    // volatile: the compiler must not do it
    volatile float least = FLT_MIN;
    float sum = 0;
    OMP(omp parallel num_threads(2) reduction(+ : sum))
    sum += least / 2;
    check("subnormal numbers are zero", sum > 0, 0, "in each of 2 threads");
#endif
#ifdef _OPENMP
    // Large enough that every layer is worth two threads: B T C is above 20000 on the CPU.
    Config large = {100, 300, 320, 3, 3, 60, 1, 2, 4}, small = {40, 100, 128, 3, 2, 36, 1, 2, 4};
    Config c = IF_SLOW(small, large);
    int mark = num_kept, threads = omp_get_max_threads();
    double loss[2], norm[2];
    float *params[2];
    for (int k = 0; k < 2; k++) { // with one thread, then with two
        Model m;
        omp_set_num_threads(1 + k);
        build_small(&m, c, 4, c.max_loops, 0);
        for (int step = 0; step < 2; step++) {
            AdamW o = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 0};
            set_batch(&m, step, 0, 4, 4);
            loss[k] = forward_loss(&m, 3, 1);
            norm[k] = gradient_norm(&m);
            model_update(&m, o, norm[k], step + 1);
        }
        params[k] = FLOATS(m.params.total);
        read_tensors(params[k], &m.params);
        double moved = largest_difference(params[0], params[k], m.params.total);
        if (k == 1)
            check("one thread equals two",
                  fabs(loss[0] - loss[1]) + fabs(norm[0] - norm[1]) + moved, 0,
                  "loss, norm, parameters after 2 steps");
        model_free(&m);
    }
    omp_set_num_threads(threads); // as it was: more would slow down the other checks
    release(mark);
#endif
}

// What pass_flops() and its like say is what the matrix products do, exactly, for any T.
static void check_flops(void) {
#ifndef BACKEND
    static const int lengths[] = {1, 37, 70}; // one query, part of a tile, more than one
    for (int i = 0; i < 6; i++) {
        Config c = small_config(1, 3);
        Model m;
        int T = c.max_seq_len = lengths[i / 2], B = 4, S = 3, recompute = i % 2;
        build_small(&m, c, B, S, recompute);
        set_batch(&m, 0, 0, B, B);
        double tokens = B * T, want = tokens * pass_flops(c, T, num_passes(c, S));

        // The forward has no head: that belongs to the loss.
        unsigned long long before = gemm_flops;
        model_forward(&m, S);
        check("FLOPs of a forward", fabs((double)(gemm_flops - before) - want), 0, "T=%d: %.0f", T,
              want);

        // Per masked position the head takes one product forward and two backward.
        model_loss(&m, 1);
        model_backward(&m);
        want = tokens * training_flops(c, T, S, 0, recompute) + m.R * 3 * head_flops(c);
        check("FLOPs of a training step", fabs((double)(gemm_flops - before) - want), 0,
              "T=%d, recompute %d: %.0f", T, recompute, want);

        // training_flops() takes the share of masked positions, which rounding makes inexact.
        double share = tokens * training_flops(c, T, S, m.R / tokens, recompute);
        check("FLOPs with a share of masked positions", fabs(share / want - 1), 1e-12, "T=%d", T);
        model_free(&m);
    }
#endif
}

// =================================================================================================
// Sampler

// Draws from logits (R,V), wherever the model lives. Position r is number r of sequence 0.
static void draw_tokens(int *token, double *score, const float *logits, int R, int V, Draw draw) {
    const uint64_t step = 2;
#ifdef BACKEND
    // One sequence that is number 0 of all
    int mark = num_kept, id = 0, *positions = INTS(R);
    for (int r = 0; r < R; r++) positions[r] = r;
    int *token_there = (int *)model_array(R * sizeof(int));
    double *score_there = (double *)model_array(R * sizeof(double));
    float *logits_there = (float *)model_array((size_t)R * V * sizeof(float));
    write_memory(logits_there, logits, (size_t)R * V * sizeof(float));
    sample_forward(token_there, score_there, logits_there, to_model(positions, R), to_model(&id, 1),
                   R, R, V, V, draw, step);
    read_memory(token, token_there, R * sizeof(int));
    read_memory(score, score_there, R * sizeof(double));
    release(mark);
#else
    double *w = (double *)allocate(V, sizeof(double), "a test");
    for (int r = 0; r < R; r++) {
        double u = random_uniform(draw.seed, STREAM_TOKEN, step, r);
        token[r] = sample_token(logits + (size_t)r * V, V, draw, u, &score[r], w);
    }
    free(w);
#endif
}

// p (V): with what probability these options draw each token. It counts for each token how many are
// likelier, while the sampler looks for a threshold by bisection.
static void kept_probabilities(double *p, const float *logits, int V, Draw draw) {
    double total = 0, *all = (double *)allocate(V, sizeof(double), "a test");
    for (int v = 0; v < V; v++) p[v] = exp(logits[v] / draw.temperature);
    for (int pass = 0; pass < 3; pass++) { // top-k, top-p, and only the sum
        total = 0;
        for (int v = 0; v < V; v++) {
            all[v] = p[v];
            total += p[v];
        }
        for (int v = 0; v < V; v++) {
            double number = 0, probability = 0; // of the likelier ones
            for (int u = 0; u < V; u++)
                if (logits[u] > logits[v]) {
                    number++;
                    probability += all[u] / total;
                }
            if (pass == 0 && draw.top_k > 0 && number >= draw.top_k) p[v] = 0;
            if (pass == 1 && draw.top_p < 1 && probability >= draw.top_p) p[v] = 0;
        }
    }
    for (int v = 0; v < V; v++) p[v] /= total;
    free(all);
}

// Draws follow softmax(logits / temperature), cut by top-k and top-p, and have the right scores.
static void check_draws(int V, Draw draw, int draws, double limit) {
    int mark = num_kept, *token = INTS(draws), kept_tokens = 0;
    int best = 0, next = -1; // the likeliest token and the next one
    float *logits = FLOATS((size_t)draws * V);
    double *score = DOUBLES(draws), *p = DOUBLES(V), *count = DOUBLES(V);
    double sum = 0, entropy = 0, chi = 0, outside = 0, error = 0;

    // All draws are from the same logits.
    for (size_t i = 0; i < (size_t)draws * V; i++)
        logits[i] = 3 * (float)random_uniform(8, 0, 0, i % V);
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    for (int v = 0; v < V; v++) {
        if (v != best && (next < 0 || logits[v] > logits[next])) next = v;
        sum += exp((double)logits[v]);
    }
    for (int v = 0; v < V; v++) entropy -= exp((double)logits[v]) / sum * (logits[v] - log(sum));
    kept_probabilities(p, logits, V, draw);

    draw_tokens(token, score, logits, draws, V, draw);
    for (int r = 0; r < draws; r++) {
        double want = -entropy, likeliest = exp((double)logits[best]);
        if (draw.score == SCORE_PROBABILITY) want = exp((double)logits[token[r]]) / sum;
        if (draw.score == SCORE_MARGIN) want = (likeliest - exp((double)logits[next])) / sum;
        error = worse(error, fabs(score[r] - want));
        count[token[r]]++;
    }
    for (int v = 0; v < V; v++) {
        kept_tokens += p[v] > 0;
        if (p[v] > 0) chi += pow(count[v] - draws * p[v], 2) / (draws * p[v]);
        else outside += count[v];
    }

    const char *kind = "draws, chi-square of the tokens kept";
    if (kept_tokens == V) kind = V == 5 ? "draws, chi-square of 5 tokens"
                                        : "draws, chi-square of 300 tokens";
    check(kind, chi, limit, "temperature %g, top-k %d, top-p %g: %d tokens", draw.temperature,
          draw.top_k, draw.top_p, kept_tokens);
    check("draws outside top-k and top-p", outside, 0, "%d tokens", kept_tokens);
    check("score of a draw", error, 1e-12, "%d tokens", V);

    draw.temperature = 0;
    draw_tokens(token, score, logits, 1, V, draw);
    check("temperature 0 takes the likeliest", token[0] != best, 0, "%d tokens", V);
    release(mark);
}

static void check_all_draws(void) {
    // The sum has n - 1 degrees of freedom for n tokens that are kept, and that is its mean. It
    // exceeds the limit with a probability of 0.001.
    static const struct { int V; Draw draw; double limit; } cases[] = {
        {5, {1, 0, 1, SCORE_PROBABILITY, 1}, 18.5},
        {5, {0.5, 0, 1, SCORE_MARGIN, 1}, 18.5},
        {300, {1, 0, 1, SCORE_ENTROPY, 1}, 381},
        {300, {1, 20, 1, SCORE_PROBABILITY, 1}, 43.8},
        {300, {0.7, 0, 0.6, SCORE_PROBABILITY, 1}, 200},
        {300, {2, 40, 0.8, SCORE_ENTROPY, 1}, 73.4},
    };
    for (int k = 0; k < COUNT(cases); k++) {
        int draws = IF_SLOW(1000, cases[k].V == 5 ? 20000 : 10000);
        check_draws(cases[k].V, cases[k].draw, draws, cases[k].limit);
    }
}

// Tokens that are given never change, no MASK is left, and a text does not depend on its batch.
static void check_sampler(void) {
    enum { B = 3, T = 24 };
    Config c = small_config(1, 3);
    Model m;
    build_inference(&m, c, B);
    int given[B * T], x[B * T], single[T];
    double changed = 0, masks = 0, batch = 0;
    for (int k = 0; k < IF_SLOW(5, 100); k++) {
        for (int i = 0; i < B * T; i++) {
            int blank = random_uniform(k, 1, 0, i) < 0.7;
            given[i] = blank ? c.vocab_size : (int)(random_bits(k, 2, 0, i) % c.vocab_size);
        }
        // Every order with many combinations of the rest. 24 positions are up to 5 blocks of 5.
        int order = k % 5, steps = IF_SLOW(5 + k % 3, 5 + k % 30);
        Loops loops = {1 + k % 6, k % 4 == 1 ? 0.2 : 0};
        Draw draw = {k % 3 * 0.5, k % 11 ? 0 : 4, k % 13 ? 1 : 0.7, scores[order], (uint64_t)k};
        SampleOptions o = {steps, order, k % 7 == 3 ? 5 : 0, 0.05, loops, draw};
        memcpy(x, given, sizeof x);
        sample(&m, x, B, T, o, 0, NULL, NULL);
        for (int i = 0; i < B * T; i++) {
            changed += given[i] != c.vocab_size && x[i] != given[i];
            masks += x[i] >= c.vocab_size;
        }

        // Sequence 1 without the others: first = 1 gives it the same random numbers.
        memcpy(single, given + T, sizeof single);
        sample(&m, single, 1, T, o, 1, NULL, NULL);
        batch += count_different(single, x + T, T);
    }
    check("given tokens that changed", changed, 0, "samples of 3 sequences");
    check("masks left", masks, 0, "samples of 3 sequences");
    check("single or in a batch, that differ", batch, 0, "samples of 3 sequences");
    model_free(&m);
}

// A model so small that all that can happen can be listed: T = 3 positions of V = 3 tokens. A state
// says what each position holds, a token or MASK (3): the digits of a number in base 4.
enum { TINY = 3, STATES = 64 };

static int digit(int state, int t) { return state >> 2 * t & 3; }

static void tiny_model(Model *m) {
    int mark = num_kept;
    Config c = {TINY, TINY, 64, 2, 2, 8, 0, 1, 3};
    model_build(m, c);
    model_reserve(m, STATES, TINY, 1, 0, 0);
    float *params = FLOATS(m->params.total);
    moved_parameters(params, c, 21, 1.5); // far from uniform
    model_set_parameters(m, params);
    release(mark);
}

// Logits of each state and position: (STATES,TINY,TINY).
static void tiny_logits(Model *m, float *logits, int S) {
    enum { N = STATES * TINY };
    int mark = num_kept, x[N], positions[N];
    for (int i = 0; i < N; i++) {
        x[i] = digit(i / TINY, i % TINY);
        positions[i] = i;
    }
    // A batch of all states; head_rows positions at a time
    int *positions_there = to_model(positions, N);
    model_tokens(m, x, STATES, TINY);
    model_forward(m, S);
    for (int r0 = 0; r0 < N; r0 += m->head_rows) {
        int R = min_int(m->head_rows, N - r0);
        head_forward(m, positions_there + r0, R);
        read_logits(logits + r0 * TINY, m, R);
    }
    release(mark);
}

// p (STATES): the exact probability of each state after all steps of the order random. A step fills
// in each MASK with probability 1 / (steps that are left).
static void exact_states(double *p, const float *logits, int steps, Draw draw) {
    double next[STATES], drawn[STATES][TINY][TINY];
    for (int s = 0; s < STATES; s++)
        for (int t = 0; t < TINY; t++)
            kept_probabilities(drawn[s][t], logits + (s * TINY + t) * TINY, TINY, draw);
    memset(p, 0, STATES * sizeof(double));
    p[STATES - 1] = 1; // all is MASK
    for (int step = 0; step < steps; step++) {
        double fill = 1.0 / (steps - step);
        memset(next, 0, sizeof next);
        for (int from = 0; from < STATES; from++)
            for (int to = 0; to < STATES && p[from] > 0; to++) {
                double q = p[from]; // times the probability of this change at each position
                for (int t = 0; t < TINY; t++) {
                    int a = digit(from, t), b = digit(to, t);
                    if (a == TINY) q *= b == TINY ? 1 - fill : fill * drawn[from][t][b];
                    else q *= a == b;
                }
                next[to] += q;
            }
        memcpy(p, next, sizeof next);
    }
}

// The order random against its exact distribution over all 27 texts.
static void check_ancestral(Model *m, const float *logits) {
    static const struct { int steps; Draw draw; } cases[] = {
        {4, {1, 0, 1, SCORE_PROBABILITY, 2}},   {3, {1.5, 2, 1, SCORE_PROBABILITY, 4}},
        {1, {1, 0, 1, SCORE_PROBABILITY, 1}},   {4, {0.6, 0, 1, SCORE_PROBABILITY, 3}},
        {5, {1, 0, 0.7, SCORE_PROBABILITY, 5}},
    };
    enum { TEXTS = IF_SLOW(192, 19200) };
    int x[STATES * TINY];
    for (int k = 0; k < IF_SLOW(2, COUNT(cases)); k++) {
        Draw draw = cases[k].draw;
        double p[STATES], count[STATES] = {0}, chi = 0;
        exact_states(p, logits, cases[k].steps, draw);

        // first: each batch has other random numbers
        SampleOptions o = {cases[k].steps, ORDER_RANDOM, 0, 0, {2, 0}, draw};
        for (int first = 0; first < TEXTS; first += STATES) {
            for (int i = 0; i < STATES * TINY; i++) x[i] = TINY;
            sample(m, x, STATES, TINY, o, first, NULL, NULL);
            for (int b = 0; b < STATES; b++)
                count[x[b * TINY] | x[b * TINY + 1] << 2 | x[b * TINY + 2] << 4]++;
        }
        for (int s = 0; s < STATES; s++) {
            double expected = (double)TEXTS * p[s];
            if (p[s] > 1e-12) chi += pow(count[s] - expected, 2) / expected;
            else if (count[s] > 0) chi = INFINITY; // a text that cannot be
        }
        // 26 degrees of freedom or fewer: it exceeds 54.1 with a probability of 0.001.
        check("texts of the order random, chi-square", chi, 54.1,
              "%d steps, temperature %g, top-k %d, top-p %g", cases[k].steps, draw.temperature,
              draw.top_k, draw.top_p);
    }
}

// The NELBO of one text against the sum over all masks, integrated over t.
static void check_exact_nelbo(Model *m, const float *logits) {
    const int text[TINY] = {2, 0, 1};
    double exact = 0, by_count[TINY + 1] = {0}; // sums of cross entropies, by the number of masks
    for (int mask = 1; mask < 1 << TINY; mask++) {
        int state = 0, n = 0;
        for (int t = 0; t < TINY; t++) {
            int masked = mask >> t & 1;
            state |= (masked ? TINY : text[t]) << 2 * t;
            n += masked;
        }
        for (int t = 0; t < TINY; t++) {
            const float *x = logits + (state * TINY + t) * TINY;
            double sum = exp((double)x[0]) + exp((double)x[1]) + exp((double)x[2]);
            if (mask >> t & 1) by_count[n] += log(sum) - x[text[t]];
        }
    }

    // The integral over t of the expected loss: n of 3 positions are masked with this probability.
    enum { INTERVALS = 100000 };
    for (int i = 0; i < INTERVALS; i++) {
        double t = 1e-3 + (1 - 1e-3) * (i + 0.5) / INTERVALS;
        for (int n = 1; n <= TINY; n++)
            exact += pow(t, n) * pow(1 - t, TINY - n) / t * by_count[n] / TINY / INTERVALS;
    }

    // The data are this one text, which evaluate() repeats with other noise.
    const uint16_t tokens[TINY] = {2, 0, 1};
    Shard shard = {tokens, TINY};
    Data data = {&shard, 1, 1, -1};
    Loops loops = {2, 0};
    enum { N = IF_SLOW(384, 38400) };
    int mark = num_kept;
    Evaluation e = evaluate(m, &data, loops, N, STATES, 3, DOUBLES(N));
    check("NELBO against all masks, standard errors", fabs(e.nelbo - exact) / e.error,
          TOLERANCE(4, 8), "%.4f +- %.4f, exact %.4f", e.nelbo, e.error, exact);
    check("NELBO's standard error, relative", e.error / exact, 0.025 * sqrt(38400.0 / N),
          "%d masks", N);
    release(mark);
}

static void check_tiny(void) {
    Model m;
    float logits[STATES * TINY * TINY];
    tiny_model(&m);
    tiny_logits(&m, logits, 2);
    check_ancestral(&m, logits);
    check_exact_nelbo(&m, logits);
    model_free(&m);
}

// Adaptive loops. With tau = 0 all loops are made. A sequence that stops early changes no other: it
// has the state that it has in a batch of its own, and with as many loops that are fixed.
static void check_adaptive(void) {
    enum { B = 6, T = 24, S = 9 };
    static const double taus[] = {0.22, 0.455}; // here sequences differ
    int mark = num_kept, x[B * T], used[B], one[1];
    Config c = small_config(1, 3);
    Model m;
    build_inference(&m, c, B);
    size_t n = T * c.channels;
    float *fixed = FLOATS(B * n), *state = FLOATS(B * n);
    for (int i = 0; i < B * T; i++) { // the first sequence has no MASK, the last one has only MASK
        int blank = random_uniform(5, 1, 0, i) < i / T / (B - 1.0);
        x[i] = blank ? c.vocab_size : (int)(random_bits(5, 2, 0, i) % c.vocab_size);
    }
    Loops loops = {S, 0};
    model_tokens(&m, x, B, T);
    model_forward(&m, S);
    read_memory(fixed, m.states, B * n * sizeof(float));
    adaptive_forward(&m, loops, used);
    read_memory(state, m.states, B * n * sizeof(float));
    check("tau = 0 equals fixed loops", largest_difference(state, fixed, B * n), 0, "%d loops", S);

    for (int k = 0; k < IF_SLOW(1, 2); k++) {
        double different = 0;
        int fewest = S, most = 0;
        loops.tau = taus[k];
        model_tokens(&m, x, B, T);
        adaptive_forward(&m, loops, used);
        read_memory(state, m.states, B * n * sizeof(float));
        for (int b = 0; b < B; b++) {
            fewest = min_int(fewest, used[b]);
            most = max_int(most, used[b]);

            // In a batch of its own
            model_tokens(&m, x + b * T, 1, T);
            adaptive_forward(&m, loops, one);
            read_memory(fixed, m.states, n * sizeof(float));
            different = worse(different, largest_difference(fixed, state + b * n, n));
            different += abs(one[0] - used[b]);

            // With as many loops that are fixed
            model_tokens(&m, x + b * T, 1, T);
            model_forward(&m, used[b]);
            read_memory(fixed, m.states, n * sizeof(float));
            different = worse(different, largest_difference(fixed, state + b * n, n));
        }
        check("adaptive: batch, single, fixed differ", different, 0, "%d to %d loops", fewest,
              most);
        check("adaptive: sequences differ in loops", fewest == most, 0, "tau = %g", loops.tau);
    }
    release(mark);
    model_free(&m);
}

// =================================================================================================
// Tokenizer

enum { TEST_VOCAB = 256 + 11 + 1 };

// A tokenizer of the 256 bytes, some merges in the order in which they were learned, and
// end-of-text. declared: how many tokens its header says.
static void write_tokenizer(const char *path, int version, int declared) {
    static const char *const merges[] = {" t", "he", " the", "in", "an", " a", "er", "aa", "aaa",
                                         "\n\n", "\xc3\xa9", "<|endoftext|>"};
    int file[2048] = {TOKENIZER_MAGIC, version, declared, TEST_VOCAB - 1};
    unsigned char *begin = (unsigned char *)file, *to = begin + 4 * HEADER_INTS;

    // Each token is a byte with its length, then its bytes.
    for (int b = 0; b < 256; b++) {
        *to++ = 1;
        *to++ = (unsigned char)b;
    }
    for (int i = 0; i < COUNT(merges); i++) {
        size_t n = strlen(merges[i]);
        *to++ = (unsigned char)n;
        memcpy(to, merges[i], n);
        to += n;
    }
    write_file(path, file, to - begin);
}

// Whether text is encoded as these tokens, which have | between them: 0 if it is.
static double encodes_to(const Tokenizer *t, const char *text, const char *want) {
    int ids[256], n = (int)tokenizer_encode(t, ids, text, strlen(text), "test");
    char got[1024] = ""; // the tokens with | between them
    for (int i = 0; i < n; i++) {
        size_t at = strlen(got);
        snprintf(got + at, sizeof got - at, "%s%.*s", i ? "|" : "", t->length[ids[i]],
                 (const char *)t->bytes[ids[i]]);
    }
    if (!strcmp(got, want)) return 0;
    printf("      '%s' was encoded as '%s', not '%s'\n", text, got, want);
    return 1;
}

static void check_tokenizer(void) {
    int mark = num_kept;
    write_tokenizer("test.tok", 2, TEST_VOCAB);
    Tokenizer t = tokenizer_open("test.tok");
    // " the" is a token, "the" is not
    check("encoding", encodes_to(&t, "the theatre", "t|he| the|a|t|r|e"), 0, "lowest id first");
    check("encoding", encodes_to(&t, "aaaaa in", "aa|aaa| |in"), 0, "left to right");
    check("encoding", encodes_to(&t, "it's  an\n\n\nox", "i|t|'|s| | |an|\n\n|\n|o|x"), 0,
          "pieces: contraction, spaces, lines");
    check("encoding", encodes_to(&t, "in<|endoftext|>an", "in|<|endoftext|>|an"), 0, "end of text");

    // Any bytes: random ones, and ones with many merges, letters and broken UTF-8
    static const char common[] = " athein\n\xc3\xa9\xe2\x80\x9d\xf0\x9f\x98\x80'";
    double wrong = 0;
    for (int k = 0; k < 300; k++) {
        unsigned char text[600];
        int n = 2 * k + 1, ids[601];
        for (int i = 0; i < n; i++) {
            uint64_t random = random_bits(1, 0, k, i);
            text[i] = (unsigned char)(k % 2 ? random : (uint64_t)common[random % 18]);
        }
        ids[0] = t.eot; // decode() drops it
        n = 1 + (int)tokenizer_encode(&t, ids + 1, (const char *)text, n, "test");
        size_t bytes;
        char *back = decode(&t, ids, n, n, &bytes);
        wrong += bytes != 2 * (size_t)k + 1 || memcmp(back, text, bytes);
        free(back);
    }
    check("decode(encode(x)) = x, that differ", wrong, 0, "300 strings of any bytes");

    size_t n = 1 << 20; // one piece of a million letters must not take forever
    char *letters = (char *)host_array(n, 1);
    memset(letters, 'a', n);
    double tokens = (double)tokenizer_encode(&t, INTS(n), letters, n, "test");
    check("a word of a million letters", fabs(tokens - n / 2.0), 1, "tokens");

    // "a", a blank, " ", "in", two blanks, ".": the space before a blank belongs to it
    int x[32], masks = 0;
    int count = encode_template(&t, x, 999, "a ____ in ________.");
    for (int i = 0; i < count; i++) masks += x[i] == 999;
    check("template: masks", count != 7 || masks != 3 || x[1] != 999 || x[4] != 999 || x[5] != 999,
          0, "one blank, two blanks");
    release(mark);
}

// The numbers that answers end with.
static void check_last_number(void) {
    static const struct { const char *text; double number; } cases[] = {
        {"7, then -1,000.5.", -1000.5}, {"2e3", 3},  {"0x10", 10}, {"about .5", 0.5}, {"- 5", 5},
        {"3-4", -4}, {"1.2.3", 3}, {"x-.25!", -0.25}, {"5.", 5}, {"12,345 is it", 12345},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", cases[i].text);
        check("last number", fabs(last_number(text) - cases[i].number), 0, "%s", cases[i].text);
    }
    char none[] = "none";
    check("last number", !isnan(last_number(none)), 0, "none");
}

// Two states of two channels with known steps: (3,0) then (0,4), and (1,0) then (2,0).
static void check_by_loop(void) {
    static const float h0[] = {3, 4, 3, 0}, h1[] = {3, 0, 1, 0}, h2[] = {0, 0, 0, 0};
    static const double want[] = {5 + 3, 4 / 5. + 2 / 3., 5 / 5. + 1 / 3., 0 + 1, 2};
    double sum[NUM_BY_LOOP] = {0}, error = 0;
    add_differences(sum, h0, h1, h2, 2, 2);
    for (int i = 0; i < NUM_BY_LOOP; i++) error = worse(error, fabs(sum[i] - want[i]));
    check("norm, change, second difference, cosine", error, 1e-12, "two states");

    memset(sum, 0, sizeof sum);
    add_differences(sum, h0, h0, h2, 1, 2);
    check("a state that stands still has no cosine", sum[LOOP_MOVED] + fabs(sum[LOOP_COSINE]), 0,
          "not NaN");
    memset(sum, 0, sizeof sum);
    add_differences(sum, h2, h0, h2, 1, 2);
    check("a state of norm 0 has no relative change", fabs(sum[LOOP_CHANGE]), 0, "not NaN");
}

// End-of-text that fills up a sequence is no byte of its text.
static void check_tokens_per_byte(void) {
    static const char text[] = "<|endoftext|>aaaaa<|endoftext|><|endoftext|><|endoftext|>";
    Tokenizer t = tokenizer_open("test.tok");
    int ids[6];
    uint16_t tokens[6];
    tokenizer_encode(&t, ids, text, strlen(text), "test");
    for (int i = 0; i < 6; i++) tokens[i] = (uint16_t)ids[i];
    Shard shard = {tokens, 6};
    Data data = {&shard, 1, 6, -1};
    // 6 tokens: end-of-text (1 byte), aa, aaa (5 bytes), end-of-text (1 byte), two that fill up
    check("tokens per byte", fabs(tokens_per_byte(&data, &t, 1, 6) - 6. / 7), 1e-12,
          "end-of-text that fills up");
}

// =================================================================================================
// Through the command line. The test's folder is the working folder here.

static char program[PATH_MAX]; // the loopmdm to run
static char out[16384], err[4096]; // what the last run wrote

__attribute__((format(printf, 1, 2)))
static int shell(const char *format, ...) { // 0 if the commands succeed
    char commands_text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(commands_text, sizeof commands_text, format, args);
    va_end(args);
    return system(commands_text) != 0;
}

static void read_output(const char *path, char *text, size_t size) {
    FILE *file = fopen(path, "rb");
    size_t n = file ? fread(text, 1, size - 1, file) : 0;
    text[n] = 0;
    if (file) fclose(file);
}

// Runs the program with these arguments, which the shell splits. Returns its exit status, or
// 128 + signal. before: shell commands that prepare it, such as limits.
static int run_after(const char *before, const char *arguments) {
    char command[PATH_MAX + 4096];
    snprintf(command, sizeof command, "%s exec '%s' %s >out 2>err </dev/null", before, program,
             arguments);
    int status = system(command);

    // What it wrote, for the checks that follow
    read_output("out", out, sizeof out);
    read_output("err", err, sizeof err);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int run(const char *arguments) { return run_after("", arguments); }

// One run that must succeed. kind: the command; detail: what is special about it.
static void succeed(const char *kind, const char *detail, const char *arguments) {
    int status = run(arguments);
    check(kind, status, 0, "%s", detail);
    if (status) printf("      %s\n      %s", arguments, err);
}

// The program must end with this status and one line that has these words in it.
static void fail_after(const char *before, int status, const char *words, const char *arguments) {
    int got = run_after(before, arguments);
    const char *newline = strchr(err, '\n');
    int one_line = newline && !newline[1] && !strncmp(err, "loopmdm: ", 9);
    int right = got == status && one_line && strstr(err, words);
    check("one clear line and status", !right, 0, "%d: %s", status, words);
    if (!right) printf("      %s\n      status %d, wanted %d; %s", arguments, got, status, err);
}

static void fail(int status, const char *words, const char *arguments) {
    fail_after("", status, words, arguments);
}

typedef struct { int status; const char *words, *arguments; } Failure;

static void fail_all(const Failure *failures, int n) {
    for (int i = 0; i < n; i++) fail(failures[i].status, failures[i].words, failures[i].arguments);
}

static double files_differ(const char *a, const char *b) {
    FILE *f = fopen(a, "rb"), *g = fopen(b, "rb");
    double different = !f || !g;
    for (int c = 0; !different && c != EOF;) { // both must end at the same place
        c = getc(f);
        different = c != getc(g);
    }
    if (f) fclose(f);
    if (g) fclose(g);
    return different;
}

// Copies a file with one byte changed: at `at` to value, or one bit of it if value is -1. Keeps the
// first `keep` bytes, or all if that is -1.
static void edit_file(const char *from, const char *to, long at, int value, long keep_bytes) {
    size_t size;
    char *text = read_file(from, &size);
    if (keep_bytes >= 0) size = keep_bytes;
    if (at >= 0) text[at] = (char)(value < 0 ? text[at] ^ 1 : value);
    FILE *file = fopen(to, "wb");
    if (!file || fwrite(text, 1, size, file) != size || fclose(file))
        die(FAILED, "cannot copy %s to %s", from, to);
    free(text);
}

#define BASE_WITH(tokenizer) "--data 'data*.bin' --tokenizer " tokenizer " --model d2 " \
    "--layers 3 --loop 1:2 --batch 2 --warmup 2 "
#define BASE BASE_WITH("test.tok")
#define WHOLE "--model whole --data data.bin "
#if SLOW
#define SIZE "--channels 32 --seq-len 16 --batch 2 "
#define STEPS "--steps 24 --save-every 6 --val-every 12 "
#else
#define SIZE "--channels 64 --seq-len 32 --batch 4 "
#define STEPS "--steps 40 --save-every 10 --val-every 10 "
#endif
#define LONG_WITH(tokenizer) BASE_WITH(tokenizer) SIZE STEPS "--accum 2 --seed 7 " \
    "--val-data data2.bin --val-rows 8 "
#define LONG LONG_WITH("test.tok")
enum { LONG_STEPS = IF_SLOW(24, 40), LONG_SEQUENCES = IF_SLOW(4, 8) }; // of a step

static void make_files(void) {
    int tokens[4000];
    for (int i = 0; i < 4000; i++) // letters; every 50th is an end-of-text
        tokens[i] = i % 50 ? 97 + (int)(random_bits(1, 0, 0, i) % 20) : TEST_VOCAB - 1;
    write_shard("data.bin", tokens, 4000);
    write_shard("data2.bin", tokens, 1000);
    write_shard("short.bin", tokens, 10);
    write_shard("empty.bin", tokens, 0);
    check("make", shell("mkfifo pipe && sed s/aaa/aab/ test.tok >other.tok && mkdir words && "
                        "cp other.tok words/tokenizer.bin"), 0,
          "a pipe, another tokenizer of the same size, a folder that has it");
}

// ---- training that is stopped, and goes on ----

// Begins a training in the folder `name`. Stops it by this signal when a file there has more than
// so many bytes. Returns its status as waitpid() gives it.
static int stop_once(const char *name, const char *file, long bytes, const char *options,
                     int number) {
    char command[PATH_MAX + 4096], path[256];
    int status = 0;
    struct stat info;
    snprintf(command, sizeof command, "exec '%s' train %s --out %s >/dev/null 2>&1", program,
             options, name);
    snprintf(path, sizeof path, "%s/%s", name, file);
    pid_t child = fork();
    if (child == 0) { // exec in the command: the signal reaches the program, not a shell
        signal(SIGHUP, SIG_DFL); // nohup may have set it to be ignored
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    while (stat(path, &info) || info.st_size <= bytes) {
        usleep(200);
        if (waitpid(child, &status, WNOHANG) == child) return status;
    }
    kill(child, number);
    if (number == SIGHUP) kill(child, number); // a terminal that is closed may send two
    waitpid(child, &status, 0);
    return status;
}

// The same, and checks that it was stopped. On a busy machine it may come to its end before we
// look: then it begins again.
static void stop_run(const char *name, const char *file, long bytes, const char *options,
                     int number) {
    char path[256];
    int status, step, tries = 0;
    snprintf(path, sizeof path, "%s/state.bin", name);
    do {
        shell("rm -rf %s", name);
        status = stop_once(name, file, bytes, options, number);
        step = header_number(path, AT_STEP);
    } while (step >= LONG_STEPS && ++tries < 10);
    check("stopped before its end", step < 1 || step >= LONG_STEPS, 0, "%s at step %d", name, step);
    if (number != SIGKILL)
        check("a signal that saves, exit status",
              !WIFEXITED(status) || WEXITSTATUS(status) != 128 + number, 0, "%d", 128 + number);
}

// Everything except the speed is the same in both logs.
static double logs_differ(const char *a, const char *b) {
    return shell("cut -d, -f1-6,8- %s/log.csv >log1; cut -d, -f1-6,8- %s/log.csv | cmp -s - log1",
                 a, b);
}

// An unbroken run equals one that was stopped and resumed, bit for bit.
static void check_resume(const char *whole, const char *name, const char *options, int number) {
    char arguments[2048], path[2][256];
    snprintf(arguments, sizeof arguments, "train %s --out %s", options, whole);
    succeed("train, exit status", "an unbroken run", arguments);
    check("copy", shell("cp out %s.out", whole), 0, "what it printed");
    // SIGKILL leaves what is there: the first checkpoint, or only its state.bin. Others save one.
    // The header of log.csv has less than 100 bytes; then comes a line for each step.
    if (number == SIGKILL) stop_run(name, "state.bin", 0, options, number);
    else stop_run(name, "log.csv", 100, options, number);
    // A line of a step after the checkpoint, and a part of a line
    check("write", shell("printf '39,1,0.5,2,0.1,1,100,1e9,,,\\n1' >>%s/log.csv", name), 0,
          "lines at the end of the log");

    snprintf(arguments, sizeof arguments, "train %s --out %s --resume", options, name);
    succeed("resume, exit status", name, arguments);
    static const char *const files[] = {"model.bin", "state.bin", "tokenizer.bin"};
    for (int k = 0; k < COUNT(files); k++) {
        snprintf(path[0], sizeof path[0], "%s/%s", whole, files[k]);
        snprintf(path[1], sizeof path[1], "%s/%s", name, files[k]);
        check("resumed equals unbroken, bytes", files_differ(path[0], path[1]), 0, "%s: %s", name,
              files[k]);
    }
    check("resumed equals unbroken, log.csv", logs_differ(whole, name), 0,
          "%s: all except the speed", name);
}

// The numbers in a log.csv: step, loops, t, loss, lr, grad_norm, tokens_per_s, flops. Returns the
// last step.
typedef struct { double v[8]; } LogLine;

static int read_log(const char *path, LogLine *lines, int most) {
    size_t size;
    char *text = read_file(path, &size), *line = strchr(text, '\n');
    int n = 0;
    for (; line && line[1] && n < most; line = strchr(line + 1, '\n')) {
        char *at = line + 1;
        for (int i = 0; i < 8; i++) {
            lines[n].v[i] = strtod(at, &at);
            at++;
        }
        n++;
    }
    free(text);
    return n;
}

// The lines that training prints: after step 1 and then 20 times. The loss is the mean since the
// line before, so that nothing depends on the speed.
static void check_printed(void) {
    LogLine log[64];
    int n = read_log("whole/log.csv", log, 64), lines = 0, from = 0, every = LONG_STEPS / 20;
    size_t size;
    char *text = read_file("whole.out", &size);
    double error = 0, wrong = n != LONG_STEPS;
    for (char *line = strstr(text, "step 1/"); line; line = strstr(line + 1, "\nstep ")) {
        int step, steps, loops;
        double loss, norm, lr, sum = 0;
        line += *line == '\n';
        if (sscanf(line, "step %d/%d | loss %lf | loops %d | norm %lf | lr %lf |", &step, &steps,
                   &loss, &loops, &norm, &lr) != 6) break;
        if (step < 1 || step > n) break;

        // The numbers of this step, and the mean loss of steps from+1 .. step
        int want = every == 1 ? lines + 1 : max_int(1, lines * every);
        wrong += step != want || steps != LONG_STEPS || loops != log[step - 1].v[1];
        for (int i = from; i < step; i++) sum += log[i].v[3];
        error = worse(error, fabs(loss - sum / (step - from)));
        error = worse(error, fabs(norm - log[step - 1].v[5]) / 100); // printed with two digits
        error = worse(error, fabs(lr / log[step - 1].v[4] - 1) / 100);
        from = step;
        lines++;
    }
    free(text);

    wrong += from != LONG_STEPS; // the last step has a line
    check("printed lines, wrong steps or loops", wrong, 0, "%d lines", lines);
    check("printed loss against log.csv", error, 6e-5, "mean since the line before");

    // Two runs, which do not have the same speed
    check("printed lines do not depend on the speed",
          shell("for run in whole plain; do sed -n 's/ | [0-9]* tokens.*//; /^step .*loss/p' "
                "$run.out >$run.lines; done; cmp -s whole.lines plain.lines"), 0,
          "with and without --ema");
}

// state.bin as its format says (dev/tools.c): places in its header, and its parts.
enum {
    STATE_STEP = 11, STATE_CRC = 12, STATE_SEQUENCES = 13, STATE_SEED = 14, STATE_FLOPS = 16,
    STATE_AVERAGE = 18
};
enum { STATE_PARAMETERS, STATE_MOMENT1, STATE_MOMENT2, STATE_EMA };

typedef struct { const int *header; const float *part[4]; Config config; size_t total; } StateFile;

static StateFile read_state(const char *path) {
    StateFile s;
    size_t bytes;
    Model m;
    int *file = map_file(path, STATE_MAGIC, STATE_VERSION, "state", &bytes);
    memcpy(&s.config, file + 2, sizeof s.config);
    model_build(&m, s.config);
    s.header = file;
    s.total = m.params.total;
    for (int i = 0; i < 4; i++) s.part[i] = (const float *)(file + HEADER_INTS) + i * s.total;

    // The sizes are those of the configuration. The checksum is taken with zero in its place.
    int parts = 3 + file[STATE_AVERAGE];
    check("state.bin's size", bytes != 4 * (HEADER_INTS + parts * s.total), 0, "%s", path);
    uint32_t crc = (uint32_t)file[STATE_CRC];
    file[STATE_CRC] = 0;
    check("state.bin's checksum", crc32(0, file, bytes) != crc, 0, "%s", path);
    return s;
}

static int floats_differ(const float *a, const float *b, size_t n) { // in any bit
    return memcmp(a, b, n * sizeof(float)) != 0;
}

// What state.bin holds, and model.bin: with --ema the average, otherwise the parameters.
static void check_state(void) {
    LogLine log[64];
    Model saved, saved_plain;
    StateFile s = read_state("whole/state.bin"), plain = read_state("plain/state.bin");
    const float *model = (const float *)(model_open(&saved, "whole") + HEADER_INTS);
    const float *model_plain = (const float *)(model_open(&saved_plain, "plain") + HEADER_INTS);
    int lines = read_log("whole/log.csv", log, 64);
    uint64_t seed;
    double flops;
    memcpy(&seed, s.header + STATE_SEED, sizeof seed);
    memcpy(&flops, s.header + STATE_FLOPS, sizeof flops);
    check("state.bin's step, sequences, seed", s.header[STATE_STEP] != LONG_STEPS || seed != 7 ||
          s.header[STATE_SEQUENCES] != LONG_SEQUENCES, 0, "%d, %d, 7", LONG_STEPS, LONG_SEQUENCES);
    check("state.bin's FLOPs, relative", fabs(flops / log[lines - 1].v[7] - 1), 1e-8,
          "as in log.csv");
    check("state.bin's configuration", memcmp(&s.config, &saved.config, sizeof s.config) != 0, 0,
          "as in model.bin");
    check("state.bin says whether it has an average",
          s.header[STATE_AVERAGE] != 1 || plain.header[STATE_AVERAGE] != 0, 0,
          "with and without --ema");

    // model.bin is what one samples from.
    check("model.bin is the average", floats_differ(model, s.part[STATE_EMA], s.total), 0,
          "with --ema");
    check("the average is not the parameters",
          relative_norm(model, s.part[STATE_PARAMETERS], s.total) < 1e-4, 0, "with --ema");
    check("model.bin is the parameters",
          floats_differ(model_plain, plain.part[STATE_PARAMETERS], s.total), 0, "without --ema");
    check("an average changes no training",
          floats_differ(s.part[0], plain.part[0], 3 * s.total), 0, "parameters and moments");
}

// The average begins as the parameters: after step 1 it is 2/11 of those before the step and 9/11
// of those after it.
static void check_first_average(void) {
    int mark = num_kept;
    succeed("train, exit status", "1 step with --ema",
            "train " BASE "--steps 1 --ema 0.5 --seed 3 --out first");
    StateFile s = read_state("first/state.bin");
    float *before = FLOATS(s.total), *want = FLOATS(s.total);
    init_parameters(before, s.config, 3);
    for (size_t i = 0; i < s.total; i++)
        want[i] = (2 * before[i] + 9 * s.part[STATE_PARAMETERS][i]) / 11;
    check("average after one step", largest_difference(s.part[STATE_EMA], want, s.total), 1e-6,
          "2/11 of the start");
    release(mark);
}

// Stopped between the two files of a checkpoint: model.bin is older, or missing.
static void check_between(void) {
    // Only its step is read: that it is another one is enough.
    check("copy", shell("cp -r whole between"), 0, "a checkpoint");
    edit_file("whole/model.bin", "between/model.bin", 4 * STATE_STEP, LONG_STEPS - 1, -1);
    succeed("resume, exit status", "model.bin is older than state.bin",
            "train " LONG "--ema 0.9 --out between --resume");
    check("model.bin follows state.bin", files_differ("whole/model.bin", "between/model.bin"), 0,
          "it was older");

    check("make", shell("rm between/model.bin"), 0, "no model.bin");
    succeed("resume, exit status", "model.bin is missing",
            "train " LONG "--ema 0.9 --out between --resume");
    check("model.bin follows state.bin", files_differ("whole/model.bin", "between/model.bin"), 0,
          "it was missing");
    check("state.bin stays", files_differ("whole/state.bin", "between/state.bin"), 0,
          "there was nothing to do");
}

// Nobody reads what it prints: it saves what it has learned.
static void check_lost_output(void) {
    static const char words[] = "output is closed or full; the checkpoint of step 1 is in piped";
    char command[PATH_MAX + 4096];
    snprintf(command, sizeof command, "mkfifo lost; : <lost & exec 3>lost; wait; " // no reader
             "exec '%s' train " LONG "--out piped 2>err >&3", program);
    shell("%s", command);
    read_output("err", err, sizeof err);
    check("the output is closed", !strstr(err, words), 0, "%s", words);
    check("the output is closed", header_number("piped/state.bin", AT_STEP) != 1, 0, "saved");
}

static void check_training(void) {
    check_resume("whole", "killed", LONG "--ema 0.9", SIGKILL);
    check_resume("plain", "interrupted", LONG, SIGINT);
    check_resume("plain2", "closed", LONG, SIGHUP);
    check_lost_output();
    check_printed();
    check_state();
    check_first_average();
    check_between();
}

// ---- commands that must work ----

static void check_commands(void) {
    succeed("eval, exit status", "loops 16 beyond 4",
            "eval --model whole --data data2.bin --rows 20 --loops 1,4,16");
    succeed("sample, exit status", "loops 16 beyond 4",
            "sample --model whole --prompt 'the a' --loops 16 --steps 5 -n 3 --seed 9");
    check("sample begins with its prompt", strncmp(out, "the a", 5) != 0, 0, "the a");
    succeed("sample, exit status", "fill and watch",
            "sample --model whole --fill 'a ____ b' --watch --temperature 0 --order random");
    check("sample keeps its template", !strstr(out, "\na") || !strstr(out, " b\n"), 0, "a ____ b");

    // Commands that only print
    for (int i = 0; i < NUM_COMMANDS; i++) {
        char arguments[64];
        snprintf(arguments, sizeof arguments, "%s --help", commands[i].name);
        succeed("--help, exit status", commands[i].name, arguments);
    }
    succeed("--help, exit status", "after other options", "train --steps 7 --help");
    check("--help shows the defaults", !strstr(out, "validations (default 500)"), 0, "--val-every");
    succeed("info, exit status", "a folder", "info --model whole");
    succeed("flops, exit status", "a preset", "flops --model d12 --vocab 50257");

    // Tables: attention's shares add up to 1; there is a line for each loop and noise level.
    succeed("attention, exit status", "",
            "attention --model whole --data data.bin --rows 8 --buckets 4 --csv attention.csv");
    check("attention's shares add up to 1",
          shell("awk -F, 'NR > 1 {d = $8 + $9 - 1; if (d > 1e-5 || d < -1e-5) bad = 1; "
                "if ($7 && !($10 > 0 && $10 <= 1)) bad = 1} END {exit bad || NR != 1 + 6 * 2 * 4}' "
                "attention.csv"), 0, "6 passes, 2 heads, 4 noise levels");
    succeed("eval --by-t, exit status", "", "eval --model whole --data data.bin --rows 64 "
            "--loops 1,3 --buckets 5 --by-t by_t.csv");
    succeed("eval --by-loop, exit status", "",
            "eval --model whole --data data.bin --rows 8 --loops 7 --by-loop by_loop.csv");
    check("tables by noise level and by loop",
          shell("awk 'END {exit NR != 11}' by_t.csv && awk -F, 'NR > 2 && !($2 > 0 && $3 > 0) "
                "|| NF != 5 {bad = 1} END {exit bad || NR != 9}' by_loop.csv"), 0,
          "2 x 5 and 8 lines");
    succeed("eval --adaptive, exit status", "",
            "eval --model whole --data data.bin --rows 8 --adaptive 0,1000 --max-loops 3");
    check("eval --adaptive", !strstr(out, "     0   3.00") || !strstr(out, "  1000   1.00"), 0,
          "tau = 0: 3 loops; 1000: one");

    // Two templates; the texts of each stand one after the other.
    check("write", shell("printf 'the ____ an\\na ____ ____ in\\n' >templates"), 0,
          "two templates");
    succeed("sample --fill-file, exit status", "",
            "sample --model whole --fill-file templates -n 2 --order margin --block 2 --top-k 5 "
            "--top-p 0.9 --adaptive 0.1");
    int right = !strncmp(out, "the", 3) && strstr(out, " an\n\nthe");
    check("sample --fill-file", !right || !strstr(err, "loops in each step"), 0,
          "two texts for each of two templates");
    check("copy", shell("cp out texts && printf '\\357\\273\\277the ____ an\\r\\n \\r\\n\\r\\n"
                        "a ____ ____ in\\r\\n\\n' >templates"), 0,
          "from Windows, with empty lines");
    succeed("sample --fill-file, exit status", "from Windows",
            "sample --model whole --fill-file templates -n 2 --order margin --block 2 --top-k 5 "
            "--top-p 0.9 --adaptive 0.1");
    check("sample --fill-file", files_differ("out", "texts"), 0, "from Windows: the same texts");
    succeed("eval, exit status", "one row", "eval " WHOLE "--rows 1 --loops 1");
    check("one row has no standard error", !strstr(out, " +-      ? "), 0, "?");
}

// A name that exists is that file, though it could be a pattern that other files match.
static void check_names(void) {
    check("make", shell("mkdir 'v[1]' v1 && cp data2.bin 'v[1]/a.bin' && cp data.bin v1/a.bin"), 0,
          "folders with [1]");
    check("make", shell("mkdir 'my rows [v1]' && cp data2.bin 'my rows [v1]/x.bin' && "
                        "cp data2.bin 'rows[1].bin' && cp data.bin rows1.bin && "
                        "cp short.bin 'my rows [v1]/y.bin'"), 0, "names with [1]");
    succeed("train, exit status", "a file named as a pattern",
            "train --data 'rows[1].bin' --vocab 268 --model d2 --batch 2 --steps 1 --out named");
    check("a file named as a pattern", !strstr(out, " 1000 training tokens\n"), 0, "rows[1].bin");
    succeed("eval, exit status", "a folder named as a pattern",
            "eval --model named --data 'my rows [v1]/x.bin' --rows 4 --loops 1");
    succeed("train, exit status", "a pattern", "train --data 'my rows ?v1?/?.bin' --vocab 268 "
            "--model d2 --batch 2 --steps 1 --out named2");
    check("a pattern", !strstr(out, " 1000 training tokens; 10 more are in shards that are too "
          "short\n"), 0, "two files, one of them shorter than a sequence");
    succeed("train, exit status", "a pattern in a folder named as one",
            "train --data 'v[1]/?.bin' --vocab 268 --model d2 --batch 2 --steps 1 --out named3");
    check("a folder named as a pattern", !strstr(out, " 1000 training tokens\n"), 0, "v[1]");
    check("copy", shell("cp data.bin 'my rows [v1]/log.csv'"), 0, "data named as the log");
    fail(2, "would overwrite",
         "train --data 'my rows [v1]/log.csv' --vocab 268 --out 'my rows [v1]'");
}

static void check_tokenize(void) {
    static const int want[] = {267, 't', 257, ' ', 'c', 'a', 't',
                               267, 260, ' ', 265, ' ', 259, 'n'};
    check("write", shell("printf 'the cat<|endoftext|> an \\n\\n inn<|endoftext|>\\n' >text"), 0,
          "a text");
    succeed("tokenize, exit status", "two stories",
            "tokenize --tokenizer test.tok --input text --output text.bin");

    // Each story has an end-of-text before it and no space around it.
    Data data = open_data("text.bin", TEST_VOCAB, 4);
    Shard shard = data.shards[0];
    double wrong = shard.count != COUNT(want);
    for (int i = 0; !wrong && i < COUNT(want); i++) wrong += shard.tokens[i] != want[i];
    check("tokenize, tokens that differ", wrong, 0, "end-of-text first, space dropped");

    // The same text as Windows writes it
    check("write", shell("printf '\\357\\273\\277the cat<|endoftext|> an \\r\\n\\r\\n "
                         "inn<|endoftext|>\\r\\n' >windows"), 0, "a byte order mark, \\r\\n");
    succeed("tokenize, exit status", "a text from Windows",
            "tokenize --tokenizer test.tok --input windows --output windows.bin");
    check("tokenize", files_differ("text.bin", "windows.bin"), 0, "a text from Windows");
}

// A model without a tokenizer reads and writes token ids.
static void check_ids(void) {
    succeed("train, exit status", "--vocab and no tokenizer",
            "train --data data.bin --vocab 268 --model d2 --steps 2 --batch 2 --out ids");
    check("no tokenizer in its folder", !access("ids/tokenizer.bin", F_OK), 0, "--vocab");
    succeed("eval, exit status", "--vocab and no tokenizer",
            "eval --model ids --data data.bin --rows 4 --loops 1");
    succeed("sample, exit status", "ids as a prompt",
            "sample --model ids --prompt '97 266' --length 8 --steps 3");

    // The prompt, then what the model wrote: 8 numbers below V
    int ids = 0, wrong = strncmp(out, "97 266 ", 7) != 0;
    for (char *at = out, *end;; at = end) {
        long id = strtol(at, &end, 10);
        if (end == at) break;
        wrong += id < 0 || id >= TEST_VOCAB;
        ids++;
    }
    check("sample prints ids", wrong || ids != 8 || strchr(out, '\n')[1], 0, "8 in a line");

    // Two texts of "5 _ 7 _ _": 5 numbers each
    succeed("sample, exit status", "ids in a template",
            "sample --model ids --fill '5 ____ 7 ________' --steps 3 -n 2");
    int a, b, c, d, e, f, g, h, i, j;
    int numbers = sscanf(out, "%d %d %d %d %d %d %d %d %d %d", &a, &b, &c, &d, &e, &f, &g, &h, &i,
                         &j);
    check("sample keeps its template", numbers != 10 || a != 5 || c != 7 || f != 5 || h != 7, 0,
          "ids with three blanks, twice");
    static const Failure failures[] = {
        {2, "takes ids from 0 to 267, not 'a", "sample --model ids --prompt 'a 5'"},
        {2, "takes ids from 0 to 267, not '268'", "sample --model ids --prompt '5 268'"},
        {2, "takes ids from 0 to 267", "sample --model ids --fill 'x ____'"},
        {1, "has no tokenizer.bin", "sample --model ids --puzzle 1.34"},
        {2, "needs --tokenizer", "eval --model ids --data data.bin --answers-after '<|sep|>'"},
    };
    fail_all(failures, COUNT(failures));
}

// ---- boards, prompts and answers ----

#define TASK "--tokenizer board.tok --model d2 --layers 3 --loop 1:2 --max-loops 2 " \
    "--seq-len 16 --batch 4 --warmup 5 --lr 1e-2 --steps 50 "
#define ANSWERS "--answers-after '<|sep|>' "

// Tokens 0 to 7 are the characters of ".1234?# ", then come end-of-text and a separator.
static void write_task_files(void) {
    static const char *const tokens[] = {".", "1", "2", "3", "4", "?", "#", " ", "<|endoftext|>",
                                         "<|sep|>"};
    int file[512] = {TOKENIZER_MAGIC, 2, COUNT(tokens), 8};
    unsigned char *begin = (unsigned char *)file, *to = begin + 4 * HEADER_INTS;
    for (int i = 0; i < COUNT(tokens); i++) {
        size_t n = strlen(tokens[i]);
        *to++ = (unsigned char)n;
        memcpy(to, tokens[i], n);
        to += n;
    }
    write_file("board.tok", file, to - begin);

    static const int puzzle[32] = {0, 2, 3, 4, 0, 4, 1, 2, 2, 0, 4, 3, 4, 3, 2, 0,  // and solution
                                   1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1};
    write_shard("board.bin", puzzle + 16, 16);
    write_shard("puzzle.bin", puzzle, 32);

    // The question "2 2?" with the answer "# 4", then with another answer, then with none
    int row[32] = {8, 2, 7, 2, 5, 9, 6, 7, 4, 8, 8, 8, 8, 8, 8, 8};
    memcpy(row + 16, row, 16 * sizeof(int));
    write_shard("answer.bin", row, 16);
    row[16 + 8] = 3;
    write_shard("answers.bin", row, 32);
    row[16 + 8] = 8;
    write_shard("no_answer.bin", row, 32);
}

// A model that has learned "1 2", end-of-text, "3 4" by heart. Given text and templates are printed
// whole; what the model writes by itself ends at an end-of-text.
static void check_end_of_text(void) {
    static const int row[16] = {8, 1, 2, 8, 3, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8};
    static const struct { const char *words, *arguments; } cases[] = {
        {"12<|endoftext|>34\n", "--fill '12____34'"},
        {"12<|endoftext|>3<|endoftext|>4\n", "--fill '12____3<|endoftext|>4'"},
        {"  1 | 12<|endoftext|>34\n12<|endoftext|>34\n", "--fill '12____34' --watch --steps 1"},
        {"12<|endoftext|>34\n", "--prompt '12<|endoftext|>' --steps 15"},
        {"12<|endoftext|>34\n", "--prompt '12<|endoftext|>3' --steps 15"},
        {"12<|endoftext|>3<|endoftext|>\n", "--prompt '12<|endoftext|>3<|endoftext|>' --length 6"},
        {"12\n", "--prompt '1' --steps 15"},
    };
    write_shard("two.bin", row, 16);
    succeed("train, exit status", "on one row",
            "train " TASK "--data two.bin --fixed-rows --steps 150 --out two");
    for (int i = 0; i < COUNT(cases); i++) {
        char arguments[256];
        snprintf(arguments, sizeof arguments, "sample --model two --temperature 0 %s",
                 cases[i].arguments);
        succeed("sample, exit status", cases[i].arguments, arguments);
        check("end-of-text", strcmp(out, cases[i].words) != 0, 0, "%s", cases[i].arguments);
    }
}

// The FLOPs of a row of T=64 of which 7 tokens can be masked, on average half of them.
static void check_flops_of_answers(void) {
    enum { V = 4096, T = 64 };
    int file[4 * V] = {TOKENIZER_MAGIC, 2, V, V - 1}, row[T] = {0};
    unsigned char *begin = (unsigned char *)file, *to = begin + 4 * HEADER_INTS;
    for (int i = 0; i < V; i++) { // "0000" to "4095"
        char text[16];
        snprintf(text, sizeof text, "%04d", i);
        *to++ = 4;
        memcpy(to, text, 4);
        to += 4;
    }
    write_file("large.tok", file, to - begin);
    row[T - 8] = 77;
    write_shard("large.bin", row, T);
    succeed("train, exit status", "V = 4096", "train --tokenizer large.tok --data large.bin "
            "--answers-after 0077 --model d2 --channels 64 --seq-len 64 --batch 1 --steps 1 "
            "--out large");
    succeed("eval, exit status", "V = 4096",
            "eval --model large --data large.bin --answers-after 0077 --loops 1 --rows 4");
    // 2 passes of 64 (24 C C + 4 T C), and 7/2 times the head's 2 V C: 14.68e6 + 1.84e6
    check("FLOPs of a row", !strstr(out, "   0.0165  "), 0, "the head sees half of 7 tokens");
}

// A model that has learned one board, or one answer, by heart must get it right.
static void check_tasks(void) {
    write_task_files();
    succeed("train, exit status", "on boards",
            "train " TASK "--data board.bin --fixed-rows --out boards");
    succeed("eval --sudoku, exit status", "",
            "eval --model boards --data puzzle.bin --sudoku --steps 1,3 --loops 2");
    check("a board known by heart is solved", !strstr(out, "100.00 %"), 0, "4 x 4");
    succeed("sample --puzzle, exit status", "",
            "sample --model boards --puzzle '.234 .412 2.43 432.' --temperature 0 --watch "
            "--show-loops");
    static const char grid[] = "1 2 | 3 4\n3 4 | 1 2\n---------\n2 1 | 4 3\n4 3 | 2 1\n";
    check("a board is drawn", !strstr(out, grid) ||
          !strstr(out, "  0, loop  2 | 1234 3412 2143 4321\n"), 0,
          "as a grid, and in a line for each loop");
    check("a report of what it took", !strstr(err, "forwards") || !strstr(err, "GFLOP"), 0,
          "on the standard error");

    // It goes on from the boards. The second of two questions wants another answer.
    succeed("train, exit status", "on answers, from --init",
            "train " TASK "--data answer.bin " ANSWERS "--init boards --steps 40 --out answering");
    succeed("eval --exact-match, exit status", "", "eval --model answering --data answers.bin "
            ANSWERS "--exact-match --steps 2 --loops 4");
    check("an answer known by heart is right", !strstr(out, " 50.00 %"), 0, "one of two");

    // A story that becomes the sequence in answer.bin, and one of 17 tokens
    check("write", shell("printf '2 2?<|sep|># 4<|endoftext|>\\n12341234123412341<|endoftext|>' "
                         ">rows.txt"), 0, "two texts");
    succeed("tokenize, exit status", "--rows-of 16", "tokenize --tokenizer board.tok "
            "--input rows.txt --output rows.bin --rows-of 16");
    check("tokenize --rows-of", files_differ("rows.bin", "answer.bin"), 0,
          "one sequence; one is too long");

    static const Failure failures[] = {
        {1, "row 1 has no number",
         "eval --model answering --data no_answer.bin " ANSWERS "--exact-match"},
        {2, "exclude", "sample --model whole --prompt a --puzzle 1"},
        {2, "16", "sample --model boards --puzzle 1."},
        {2, "vocabulary", "sample --model boards --puzzle 'x23434122143432.'"},
        {2, "no blank", "sample --model boards --puzzle 1234341221434321"},
        {2, "row 2, column 1 and row 2, column 4 hold",
         "sample --model boards --puzzle '1... 4..4 .... ....'"},
        {2, "row 1, column 2 and row 4, column 2 hold",
         "sample --model boards --puzzle '1234 .... .... .2..'"},
        {2, "row 3, column 3 and row 4, column 4 hold",
         "sample --model boards --puzzle '1... .... ..4. ...4'"},
        {1, "are not rows of",
         "train " TASK "--data board.bin --fixed-rows --seq-len 15 --out no"},
        {1, "row 0 has no", "train " TASK "--data board.bin " ANSWERS "--out no"},
        {2, "is no token", "train " TASK "--data answer.bin --answers-after 'so:' --out no"},
        {2, "another shape", "train " TASK "--data board.bin --seq-len 15 --init boards --out no"},
        {1, "no puzzle", "eval --model boards --data answers.bin --sudoku"},
        {2, "--answers-after", "eval --model boards --data answers.bin --exact-match"},
        {1, "no story fits", "tokenize --tokenizer board.tok --input rows.txt --output rows2.bin "
         "--rows-of 3"},
    };
    fail_all(failures, COUNT(failures));
}

// ---- wrong options ----

static void check_usage(void) {
    static const Failure failures[] = {
        {2, "no command", "fly"},
        {2, "--wings", "train --wings 2"},
        {2, "whole number", "train --steps 1.5"},
        {2, "a number", "train --lr fast"},
        {2, "needs a value", "train --steps"},
        {2, "at least 1", "train --batch 0"},
        {2, "--data", "train"},
        {2, "is empty", "train " BASE "--out ''"},
        {2, "a number, not '1 2 '", "eval --rows '1\n2\r'"},
        {2, "--data is given twice: give it once, with one pattern for all files",
         "train " BASE "--data data2.bin --out no"},
        {2, "--prompt is given twice: give it once\n", "sample --prompt a --prompt=b"},
        {2, "at most 1024", "train " BASE "--threads 100000 --out no"},
        {2, "1 to 65535", "info --vocab 2147483647"},
        {2, "two layers", "train --data data.bin --vocab 300 --loop 4294967297:2 --out no"},
        {2, "two layers", "train --data data.bin --vocab 300 --loop 1-2 --out no"},
        {2, "a <= b", "train --data data.bin --vocab 300 --loop 2:9 --out no"},
        {2, "divide", "train " BASE "--heads 5 --out no"},
        {2, "even", "train " BASE "--channels 6 --heads 2 --out no"},
        {2, "preset", "flops --model d7"},
        {2, "no effect without a preset", "flops --model whole --max-loops 8"},
        {2, "up to 2147483647", "train --steps 2147483648"},
        {2, "up to 18446744073709551615", "train --seed 18446744073709551616"},
        {2, "too many rows",
         "train " BASE "--val-data data2.bin --val-rows 2147483647 --out no"},
        {2, "no effect without --val-data", "train " BASE "--steps 1 --loops 1 --out no"},
        {2, "below 1", "train --data data.bin --vocab 300 --ema 1 --out no"},
        {2, "at most 1", "train --data data.bin --vocab 300 --floor 2 --out no"},
        {2, "--precision is", "train --data data.bin --vocab 300 --precision fp16 --out no"},
        {2, "--loop-dist", "train --data data.bin --vocab 300 --loop-dist bell --out no"},
        {2, "no option --time", "train --data data.bin --vocab 300 --time bell --out no"},
        {2, "--vocab is 300", "train " BASE "--vocab 300 --out no"},
        {2, "--init excludes --resume", "train " BASE "--init whole --resume --out no"},
        {2, "use eval for more", "train " BASE "--val-data data2.bin --loops 5 --out no"},

        {2, "--loops", "eval " WHOLE "--loops 1,x"},
        {2, "--adaptive takes", "eval " WHOLE "--adaptive 0.1,x"},
        {2, "excludes --loops", "eval " WHOLE "--adaptive 0.1 --loops 2"},
        {2, "no effect without --adaptive", "eval " WHOLE "--max-loops 2"},
        {2, "no effect without --sudoku", "eval " WHOLE "--order random"},
        {2, "no effect without --by-t", "eval " WHOLE "--buckets 5"},
        {2, "ends a text", "eval " WHOLE "--answers-after '<|endoftext|>'"},

        {2, "--order", "sample --model whole --order best"},
        {2, "exclude", "sample --model whole --prompt a --fill b"},
        {2, "exclude", "sample --model whole --fill 'a ____' --length 5"},
        {2, "no blank", "sample --model whole --fill 'no blanks here'"},
        {2, "at most", "sample --model whole --length 65"},
        {2, "one step at least", "sample --model whole --steps 3 --block 2"},
        {2, "at most 1", "sample --model whole --top-p 1.5"},
        {2, "--adaptive takes", "sample --model whole --adaptive 0.1,0.2"},
        {2, "no effect without --order threshold", "sample --model whole --threshold 0.5"},
        {2, "--steps has no effect without", "sample --model whole --order threshold --steps 4"},
        {2, "no effect without --temperature", "sample --model whole --temperature 0 --top-k 4"},
        {2, "no effect without --watch", "sample --model whole --show-loops"},
        {1, "are possible", "sample --model whole --fill '____ bbbb bbbb bbbb bbbb bbbb bbbb bbbb "
         "bbbb bbbb bbbb bbbb bbbb bbbb bbbb'"},
        {1, "are possible", "sample --model whole --prompt 'bbbb bbbb bbbb' --length 5"},
        {2, "no model takes more", "tokenize --tokenizer test.tok --input test.tok --output no.bin "
         "--rows-of 65537"},
    };
    fail_all(failures, COUNT(failures));
#ifndef _OPENMP
    fail(2, "--threads is 2, but this program was built without OpenMP",
         "eval " WHOLE "--threads 2");
#endif
}

// ---- files that are not there, or must not be written ----

static void check_files(void) {
    check("write", shell("printf '\\n \\r\\n\\t\\n' >no_templates && ln -s nothing link.csv && "
                         "printf '\\377\\376a\\0' >utf16"), 0, "empty lines, a link, UTF-16");
    // Data that is named as what training writes, or as its temporary names
    check("make", shell("for i in 0 1 2 3; do mkdir data_$i; done; cp data.bin data_0/log.csv; "
                        "cp data.bin data_1/state.bin.tmp; cp data.bin data_2/state.bin; "
                        "echo notes >data_3/log.csv"), 0, "folders with data, one with notes");
    static const Failure failures[] = {
        {2, "would overwrite", "train --data data_0/log.csv --vocab 300 --out data_0"},
        {2, "would overwrite",
         "train --data data.bin --val-data data_1/state.bin.tmp --vocab 300 --out data_1"},
        {2, "would overwrite", "train --data data_2/state.bin --vocab 300 --out data_2"},
        {2, "is no log of a training", "train " BASE "--steps 1 --out data_3"},
        {2, "already there", "train " LONG "--ema 0.9 --out whole"},
        {2, "beyond --steps", "train " LONG "--ema 0.9 --out whole --resume --steps 3"},
        {2, "another shape", "train " BASE "--out whole --resume"},
        {2, "was begun with --seed", "train " LONG "--ema 0.9 --seed 5 --out whole --resume"},
        {2, "was begun with --seed", "train " LONG "--ema 0.9 --accum 3 --out whole --resume"},
        {2, "was begun with --ema", "train " LONG "--out whole --resume"},
        {2, "was begun without --ema", "train " LONG "--ema 0.9 --out plain --resume"},
        {2, "other columns", "train " LONG "--ema 0.9 --loops 1 --out whole --resume"},
        {2, "which is there already: give that one",
         "train " LONG_WITH("other.tok") "--ema 0.9 --out whole --resume"},
        {2, "which is there already", "train " BASE "--steps 1 --out words"},
        {1, "--out: cannot open", "train " BASE "--steps 1 --out test.tok"},
        {1, "--out: cannot open", "train " BASE "--steps 1 --out nowhere/at/all --resume"},
        {1, "cannot", "train " BASE "--steps 3 --out /dev/null/run"},
        {1, "cannot open saved state", "train " BASE_WITH("other.tok") "--out words --resume"},

        {2, "would overwrite --input",
         "tokenize --tokenizer test.tok --input text --output text"},
        {2, "would overwrite --model", "eval " WHOLE "--rows 8 --by-loop whole/model.bin"},
        {2, "would overwrite --model", "eval " WHOLE "--rows 8 --by-t whole/state.bin"},
        {2, "would overwrite --model", "eval " WHOLE "--by-t whole/log.csv"},
        {2, "would overwrite --data", "attention " WHOLE "--rows 8 --csv data.bin"},
        {1, "or link", "tokenize --tokenizer test.tok --input text --output /dev/null"},
        {1, "or link", "eval " WHOLE "--by-t link.csv"},
        {1, "UTF-16", "tokenize --tokenizer test.tok --input utf16 --output utf16.bin"},
        {1, "device or pipe", "eval --model whole --data pipe"},
        {1, "cannot write", "eval " WHOLE "--rows 8 --by-t nowhere/x.csv"},
        {1, "cannot write", "eval " WHOLE "--rows 8 --by-loop nowhere/x.csv"},

        {1, "No such file", "eval --model nowhere --data data.bin"},
        {1, "No such file", "train --data data.bin --tokenizer nothing.tok --out no"},
        {1, "no file matches", "eval --model whole --data nothing.bin"},
        {1, "not a token shard", "eval --model whole --data test.tok"},
        {1, "is a folder", "eval --model whole --data ."},
        {1, "cannot read", "sample --model whole --fill-file nothing"},
        {1, "too short", "eval --model whole --data short.bin"},
        {1, "no shard has 32 tokens", "train --data empty.bin --vocab 9 --model d2 --out no"},
        {1, "has no template", "sample --model whole --fill-file no_templates"},
    };
    fail_all(failures, COUNT(failures));
}

// ---- damaged files ----

// One byte of a file is another, or only its first bytes are there. at -1: no byte is changed;
// value -1: one bit of it is; keep -1: all bytes are there.
typedef struct { const char *words; long at; int value; long keep; } Damage;

static void check_damages(const char *file, const char *damaged, const Damage *damages, int n,
                          const char *arguments) {
    for (int i = 0; i < n; i++) {
        edit_file(file, damaged, damages[i].at, damages[i].value, damages[i].keep);
        fail(1, damages[i].words, arguments);
    }
}

static void check_damaged(void) {
    static const Damage model[] = {
        {"checksum", 2000, -1, -1},          {"checksum", 44, -1, -1},
        {"is damaged: its size", -1, 0, 5000}, {"too short", -1, 0, 0},
        {"not a model", 0, 7, -1},           {"version 9", 4, 9, -1},
        {"layers must be", 20, 0, -1},       {"heads", 24, 7, -1},
    };
    static const Damage state[] = {
        {"checksum", 3000, -1, -1},          {"checksum", 4 * STATE_STEP, -1, -1},
        {"checksum", 4 * STATE_SEED, -1, -1},   {"checksum", 4 * STATE_FLOPS, -1, -1},
        {"is damaged: its size", -1, 0, 5000}, {"too short", -1, 0, 0},
        {"not a saved state", 0, 7, -1},     {"version 2", 4, 2, -1},
        {"layers must be", 20, 0, -1},       {"heads", 24, 7, -1},
        {"is damaged: its size", 4 * STATE_AVERAGE, -1, -1},
    };
    static const Damage shard[] = {
        {"too short", -1, 0, 0},  {"version 2", 4, 2, -1},
        {"its header says 4000 tokens of 2 bytes; 2977 bytes follow", -1, 0, 4001},
        {"its header", 11, 255, -1}, {"outside the vocabulary", 1025, 200, -1},
    };

    // The other file of the checkpoint stays whole.
    check("copy", shell("cp -r whole damaged"), 0, "a checkpoint");
    check_damages("whole/model.bin", "damaged/model.bin", model, COUNT(model),
                  "eval --model damaged --data data.bin");
    check_damages("whole/state.bin", "damaged/state.bin", state, COUNT(state),
                  "train " LONG "--ema 0.9 --out damaged --resume");
    check_damages("data.bin", "bad.bin", shard, COUNT(shard), "eval --model whole --data bad.bin");

    // Tokenizers that end too early, of an unknown version, and without room for end-of-text
    write_tokenizer("other.tok", 2, TEST_VOCAB + 1);
    fail(1, "ends at token", "tokenize --tokenizer other.tok --text a");
    write_tokenizer("other.tok", 3, TEST_VOCAB);
    fail(1, "version 3", "tokenize --tokenizer other.tok --text a");
    write_tokenizer("other.tok", 2, TEST_VOCAB - 1);
    fail(1, "not in its vocabulary", "tokenize --tokenizer other.tok --text a");
    int two_letters[HEADER_INTS + 2] = {TOKENIZER_MAGIC, 2, 3, 2}; // "a", "b", and an empty token
    memcpy(two_letters + HEADER_INTS, "\1a\1b\0", 5);
    write_file("short.tok", two_letters, 4 * HEADER_INTS + 5);
    fail(1, "do not belong together", "sample --model whole --tokenizer short.tok");
    fail(1, "no token for the byte", "tokenize --tokenizer short.tok --text abc");
    fail(1, "outside the vocabulary", "train --data data.bin --tokenizer short.tok --out no");
}

// ---- a checkpoint that cannot be written, and one that must not be ----

static void check_no_space(void) {
    succeed("train, exit status", "3 steps", "train " BASE "--steps 3 --ema 0.5 --out small");
    check("copy", shell("cp -r small small3"), 0, "a checkpoint");

    // A limit on the size of files stands for a full disk. The checkpoint before stays as it was.
    fail_after("ulimit -f 60;", 1, "state.bin: File too large",
               "train " BASE "--steps 6 --ema 0.5 --out small --resume");
    check("no space: the old checkpoint stays", files_differ("small/state.bin", "small3/state.bin"),
          0, "state.bin");
    check("no space: the old checkpoint stays", files_differ("small/model.bin", "small3/model.bin"),
          0, "model.bin");

    // Now only model.bin cannot be written: there is a folder of its temporary name.
    check("make", shell("mkdir small/model.bin.tmp"), 0, "a folder in the way");
    fail(1, "model.bin: Is a directory",
         "train " BASE "--steps 6 --ema 0.5 --out small --resume");
    check("no space: the old checkpoint stays", files_differ("small/model.bin", "small3/model.bin"),
          0, "model.bin, while state.bin is new");

    // --resume begins at step 6. It has nothing to do except to write model.bin.
    check("make", shell("rmdir small/model.bin.tmp"), 0, "it is gone");
    succeed("resume, exit status", "step 6, model.bin of step 3",
            "train " BASE "--steps 6 --ema 0.5 --out small --resume");
    Model saved;
    StateFile s = read_state("small/state.bin");
    const int *model = model_open(&saved, "small");
    check("model.bin follows state.bin", model[AT_STEP] != 6 || s.header[STATE_STEP] != 6 ||
          floats_differ((const float *)(model + HEADER_INTS), s.part[STATE_EMA], s.total), 0,
          "step 6 in both");

    // A state that went wrong, with a right checksum, must not take the place of a good model.bin.
    size_t size;
    char *state = read_file("small/state.bin", &size);
    int *header = (int *)state;
    header[STATE_STEP] = 5;
    header[HEADER_INTS] = 0x7fc00000; // NaN
    header[STATE_CRC] = 0;
    header[STATE_CRC] = (int)crc32(0, state, size);
    check("copy", shell("cp -r small wrong"), 0, "a checkpoint");
    write_file("wrong/state.bin", state, size);
    fail(1, "the loss is not finite from the start",
         "train " BASE "--steps 6 --ema 0.5 --out wrong --resume");
    check("a wrong state.bin: model.bin and the log stay",
          files_differ("wrong/model.bin", "small/model.bin") +
          files_differ("wrong/log.csv", "small/log.csv"), 0, "NaN");
    header[STATE_STEP] = -5;
    header[STATE_CRC] = 0;
    header[STATE_CRC] = (int)crc32(0, state, size);
    write_file("wrong/state.bin", state, size);
    fail(1, "it is at step -5", "train " BASE "--steps 6 --ema 0.5 --out wrong --resume");
    free(state);

    // A loss that is not finite stops training and names the last good checkpoint.
    fail(1, "last good checkpoint is step 6", "train " BASE "--steps 200 --ema 0.5 --lr 1e30 "
         "--clip 1e30 --warmup 0 --save-every 1 --out small --resume");
    succeed("sample, exit status", "the checkpoint still works", "sample --model small");
}

// Biases begin at zero. Their first step, of half of --lr in a warmup of two, leaves them subnormal
// unless the program flushes such numbers. This test flushes them too, so it looks at their bits.
static void check_subnormal(void) {
#if defined(__SSE__) && !defined(BACKEND)
    succeed("train, exit status", "--lr 2e-42",
            "train " BASE SIZE "--steps 1 --lr 2e-42 --out still");
    Model m;
    const int *file = model_open(&m, "still");
    size_t subnormal = 0;
    for (size_t i = 0; i < m.params.total; i++) {
        int bits = file[HEADER_INTS + i];
        subnormal += !(bits & 0x7f800000) && bits & 0x7fffff;
    }
    check("subnormal numbers are zero", (double)subnormal, 0, "parameters after a step of 1e-42");
#endif
}

static void check_command_line(void) {
    make_files();
    check_training();
    check_subnormal();
    check_commands();
    check_names();
    check_tokenize();
    check_ids();
    check_tasks();
    check_end_of_text();
    check_flops_of_answers();
    check_usage();
    check_files();
    check_no_space();
    check_damaged(); // last: it changes other.tok
}

// =================================================================================================

static void print_checksum(const char *what, int k, const void *data, size_t bytes) {
    printf("digest %d %s %08x\n", k, what, crc32(0, data, bytes));
    fflush(stdout); // who compares two of them can stop at the first line that differs
}

// Shapes that reach every barrier of every kernel: heads of 20, 48, 64 and 128 channels, rows that
// are no multiple of 16 bytes, several tiles each way.
static void print_digest(void) {
    static const Config configs[] = {
        {65, 300, 320, 2, 3, 60, 1, 2, 4},   {65, 300, 320, 1, 2, 128, 0, 1, 4},
        {65, 300, 320, 1, 1, 128, 0, 1, 4},  {130, 703, 704, 1, 2, 96, 0, 1, 4},
    };
    for (int k = 0; k < COUNT(configs); k++) {
        Model m;
        int T = configs[k].max_seq_len, x[2 * 130];
        double loss[2]; // and the norm of the gradients

        // Forward and backward, a step of the optimizer, two denoising steps
        build_small(&m, configs[k], 2, configs[k].max_loops, 0);
        set_batch(&m, 0, 0, 2, 2);
        loss[0] = forward_loss(&m, k ? 1 : 2, 1);
        loss[1] = gradient_norm(&m);
        print_checksum("loss", k, loss, sizeof loss);
        AdamW adamw = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 0};
        model_update(&m, adamw, loss[1], 1);
        float *params = FLOATS(m.params.total);
        read_tensors(params, &m.params);
        print_checksum("parameters", k, params, m.params.total * sizeof(float));
        for (int i = 0; i < 2 * T; i++) x[i] = configs[k].vocab_size;
        Draw draw = {0.7, 20, 0.9, SCORE_PROBABILITY, 1};
        SampleOptions o = {2, k % 2 ? ORDER_CONFIDENCE : ORDER_RANDOM, 0, 0, {1, 0}, draw};
        sample(&m, x, 2, T, o, 0, NULL, NULL);
        print_checksum("samples", k, x, 2 * T * sizeof(int));
        model_free(&m);
    }
}

// Layer normalization of 9 rows, of which the input has 8.
static void read_out_of_bounds(void) {
    Floats inp = random_floats(8 * 6, 1), weight = random_floats(6, 1);
    Floats mean = random_floats(9, 1), rstd = random_floats(9, 1);
    layernorm_forward(random_numbers(9 * 6, 1).there, mean.there, rstd.there, inp.there,
                      weight.there, weight.there, 9, 6);
}

// Prints the table and the counts; returns the exit status.
static int report(void) {
    printf("\n%-38s checks  largest error  tolerance\n", "");
    for (int k = 0; kinds[k].kind; k++)
        if (kinds[k].tolerance > 0 || kinds[k].error > 0)
            printf("%-38s %6d  %13.1e  %9.0e\n", kinds[k].kind, kinds[k].count, kinds[k].error,
                   kinds[k].tolerance);
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

static void remove_folder(const char *folder) {
    if (chdir("/") || shell("rm -rf %s", folder)) printf("could not remove %s\n", folder);
}

static void check_all(int argc, char **argv) {
    char folder[] = "/tmp/test_loopmdm.XXXXXX";
    int only_layers = !strcmp(argv[1], "--layers");
    if (!only_layers && !realpath(argv[1], program))
        die(FAILED, "cannot find the program %s: %s", argv[1], strerror(errno));
    if (!mkdtemp(folder)) die(FAILED, "cannot make a folder in /tmp: %s", strerror(errno));
    // Single things first: if they are wrong, the rest is too.
    for (int i = 2; i < argc; i++) check_reference(argv[i], folder);
    check_layers();
    if (only_layers) {
        remove_folder(folder);
        return;
    }
    check_differences();
    check_gradients();
    check_repeated(16, 2, 0);
    check_repeated(16, 2, 1);
    check_repeated(64, 1, 0); // heads for which Hopper has kernels of its own
    check_loops();
    check_noise();
    check_draws_of_loops();
    check_optimizer();
    check_average();
    check_threads();
    check_flops();
    check_all_draws();
    check_sampler();
    check_tiny();
    check_adaptive();

    // From here on in a folder that holds only what the checks make
    if (chdir(folder)) die(FAILED, "cannot go to %s: %s", folder, strerror(errno));
    check_tokenizer();
    check_tokens_per_byte();
    check_by_loop();
    check_last_number();
    // The emulation is slow, and the command line the same in both precisions.
    if (!(SLOW && BF16)) check_command_line();
    remove_folder(folder);
}

int main(int argc, char **argv) {
    if (argc < 2)
        die(USAGE, "usage: test_loopmdm PROGRAM [REFERENCE FILE...], or in the place of PROGRAM "
            "--layers, --products, --attention, --digest or --out-of-bounds");
    flush_subnormals();
    forward_loops = adaptive_forward;
#if !defined(BACKEND) && BF16
    printf("bf16: %s\n", gemm_use_bf16());
#endif
#ifdef BF16_ON_CPU
    bf16_kernel = bf16_amx;
#endif
    if (!strcmp(argv[1], "--digest")) {
        print_digest();
        return 0;
    }
    if (!strcmp(argv[1], "--out-of-bounds")) {
        read_out_of_bounds();
        return 0;
    }
    if (!strcmp(argv[1], "--products")) check_products();
    else if (!strcmp(argv[1], "--attention")) check_attention();
    else check_all(argc, argv);
    return report();
}
