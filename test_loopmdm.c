/*
Checks loopmdm.c: against PyTorch's results in reference files, by properties that need none, and through the command line. Built with
-DTEST_CUDA='"loopmdm.cu"' it checks loopmdm.cu instead, on a GPU or, with the file prepared for it, on the CPU (dev/cuda_on_cpu.h).

    test_loopmdm PROGRAM FILE...     PROGRAM is the loopmdm to run, FILEs are reference files (dev/reference/README.md)
    test_loopmdm --digest            prints a checksum of training steps and samples, for comparing runs bit for bit
    test_loopmdm --layers            only the checks of single layers
    test_loopmdm --out-of-bounds     reads one row beyond an array, which AddressSanitizer must notice

Every check prints a line with its error and its tolerance; an exact check has tolerance 0. At the end: a table of the largest error
of each kind, and "N passed, N failed". Exit status 1 if any failed. See README, "How it is verified".
*/
#define main loopmdm_main
#ifdef TEST_CUDA
#include TEST_CUDA
#else
static unsigned long long gemm_flops; // of all matrix products so far
#define GEMM_CALLED(M, N, K) __atomic_fetch_add(&gemm_flops, 2ULL * (M) * (N) * (K), __ATOMIC_RELAXED)
#include "loopmdm.c"
typedef float floatX;
enum { BF16 = 0 };
static void to_device(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void to_host(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
#endif
#undef main
#include <float.h>
#include <sys/wait.h>

// What goes into matrix products has 24 significant bits in fp32, 8 in bf16, where rounding changes a number by 2^-8 at most, and by
// e = 2^-8/2.4 = 1.6e-3 in the root of the mean square. A branch of a pass has six roundings one after the other (LayerNorm, weights, qkv,
// rotary, probabilities, output; or LayerNorm, weights, GELU, weights): sqrt(6) e = 4e-3 of what it adds to the residual stream. Sums of
// independent errors keep that share; three times as much is allowed. The loss is a mean over 50 rows and more; with bell-shaped t one
// of them may outweigh the others, so that it is in effect a mean over 2 or 3, and four times as much is allowed. A gradient goes
// through forward and backward of up to P = 10 passes: sqrt(2 P) 4e-3, and twice as much is allowed.
#define TOLERANCE(fp32, bf16) (BF16 ? (bf16) : (fp32))
#define BF16_HIDDEN 1.2e-2
#define BF16_LOSS 2e-3
#define BF16_GRADIENT 3.6e-2

// A kernel on the emulation takes a hundred times as long, AddressSanitizer ten times: there what is random is repeated less often, and
// runs are shorter.
#if defined(TEST_CUDA) || defined(__SANITIZE_ADDRESS__)
#define SLOW 1
#define FEWER(n) ((n) / 10)
#else
#define SLOW 0
#define FEWER(n) (n)
#endif

static int passed, failed;
static struct { const char *kind; double error, tolerance; int count; } kinds[128];

// One check: error must not exceed tolerance (NaN fails). kind is its line in the final table.
static void check(const char *kind, double error, double tolerance, const char *format, ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    int ok = error <= tolerance, k = 0;
    printf("%s  %-34s %-44s error %.1e  tolerance %.0e\n", ok ? "ok  " : "FAIL", kind, what, error, tolerance);
    passed += ok, failed += !ok;
    while (kinds[k].kind && strcmp(kinds[k].kind, kind)) k++;
    if (k == 127) die(FAILED, "too many kinds of checks");
    if (!kinds[k].kind || !(error <= kinds[k].error)) kinds[k].error = error;
    kinds[k].kind = kind, kinds[k].tolerance = tolerance, kinds[k].count++;
}

static double worse(double a, double b) { return a >= b || isnan(a) ? a : b; } // the larger; NaN if one is, where fmax() would drop it

static double largest_difference(const float *a, const float *b, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) largest = worse(largest, fabs((double)a[i] - b[i]));
    return largest;
}

static double relative_norm(const float *a, const float *b, size_t n) { // |a - b| / |b|
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) difference += pow((double)a[i] - b[i], 2), norm += pow(b[i], 2);
    return sqrt(difference) / (sqrt(norm) + 1e-30);
}

static double count_different(const int *a, const int *b, size_t n) {
    size_t different = 0;
    for (size_t i = 0; i < n; i++) different += a[i] != b[i];
    return (double)different;
}

// ---------------------------------------------------------------------------------------------------------------------
// Against PyTorch

typedef struct { char name[33]; int type, dims, size[4]; const void *data; size_t count; } DumpTensor;
typedef struct { const unsigned char *file; size_t bytes; DumpTensor *tensors; int n; } Dump;

static Dump dump_open(const char *path) {
    Dump d;
    d.file = map_file(path, 20260527, "reference file", &d.bytes);
    d.n = ((const int *)d.file)[2];
    d.tensors = (DumpTensor *)allocate(d.n, sizeof *d.tensors, "the reference");
    size_t at = 1024;
    for (int i = 0; i < d.n; i++) {
        DumpTensor *t = &d.tensors[i];
        memcpy(t->name, d.file + at, 32), memcpy(&t->type, d.file + at + 32, 24); // type, number of dimensions, four sizes
        t->count = (size_t)t->size[0] * t->size[1] * t->size[2] * t->size[3];
        t->data = d.file + at + 56;
        at += 56 + t->count * (t->type == 3 ? 8 : 4);
    }
    if (at != d.bytes) die(FAILED, "%s is damaged", path);
    return d;
}

static const DumpTensor *find(const Dump *d, const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    for (int i = 0; i < d->n; i++)
        if (!strcmp(d->tensors[i].name, name)) return &d->tensors[i];
    return NULL;
}

static const float *floats(const Dump *d, const char *name, int S) {
    const DumpTensor *t = find(d, name, S);
    if (!t) die(FAILED, "the reference has no tensor %s", name);
    return (const float *)t->data;
}

static const int *ints(const Dump *d, const char *name) { return (const int *)floats(d, name, 0); }

static double number(const Dump *d, const char *name, const char *of, int i) { // element i of a tensor name/of of doubles, which need not be aligned
    const DumpTensor *t = find(d, *of ? "%s/%s" : "%s", name, of);
    double x;
    if (!t || t->type != 3) die(FAILED, "the reference has no tensor %s/%s of doubles", name, of);
    memcpy(&x, (const char *)t->data + i * sizeof x, sizeof x);
    return x;
}

static void write_shard(const char *path, const int *tokens, int n) {
    int header[HEADER_INTS] = {SHARD_MAGIC, 1, n};
    uint16_t *t = (uint16_t *)allocate(n, 2, "a shard");
    for (int i = 0; i < n; i++) t[i] = (uint16_t)tokens[i];
    const Part parts[] = {{header, sizeof header}, {t, 2 * (size_t)n}};
    write_file(path, parts, 2);
    free(t);
}

// The largest difference; in bf16, where a number's rounding is relative to its size, |a - b| / |b|.
static double state_error(const float *a, const float *b, size_t n) { return BF16 ? relative_norm(a, b, n) : largest_difference(a, b, n); }

static void read_logits(float *to, const Model *m, int rows) { // (rows,V)
    int V = m->config.vocab_size;
#ifdef TEST_CUDA
    for (int r = 0; r < rows; r++) to_host(to + (size_t)r * V, m->logits + (size_t)r * m->padded_logits, V * sizeof(float));
#else
    memcpy(to, m->logits, (size_t)rows * V * sizeof(float));
#endif
}

static void copy_parameters(Model *to, const Model *from) {
    float *params = (float *)allocate(from->params.total, sizeof(float), "parameters");
    tensors_read(params, &from->params);
    model_set_parameters(to, params);
    free(params);
}

static void clear_gradients(Model *m) {
    float *zeros = (float *)allocate(m->grads.total, sizeof(float), "zeros");
    tensors_write(&m->grads, zeros);
    free(zeros);
}

typedef struct { const int *want; size_t size; double different; } Trace; // (steps,B,T) tokens of the reference

static void compare_step(const int *x, int T, int step, void *data) {
    Trace *trace = (Trace *)data;
    (void)T;
    trace->different += count_different(x, trace->want + step * trace->size, trace->size);
}

static void check_reference(const char *path, const char *folder) {
    Dump d = dump_open(path);
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    const int *shape = ints(&d, "config"), *loops = ints(&d, "loops"), seed = *ints(&d, "seed");
    Config c = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8]};
    int B = find(&d, "x")->size[0], T = find(&d, "x")->size[1], V = c.vocab_size, C = c.channels, num_loops = (int)find(&d, "loops")->count;
    Shape shapes[NUM_TENSORS];
    tensor_shapes(c, shapes);
    Model m;
    model_build(&m, c);
    model_reserve(&m, B, c.max_seq_len, c.max_loops, 1, 0);
    float *params = (float *)allocate(m.params.total, sizeof(float), "parameters"), *at = params;
    init_parameters(params, c, seed);
    check("initial parameters, checksum", (int)crc32_update(0, params, m.params.total * sizeof(float)) != *ints(&d, "init_crc"), 0, "%s", name);
    for (int i = 0; i < NUM_TENSORS; at += m.params.size[i++]) {
        const DumpTensor *p = find(&d, "params/%s", shapes[i].name);
        if (!p || p->count != m.params.size[i]) die(FAILED, "%s: no tensor params/%s of %zu numbers", path, shapes[i].name, m.params.size[i]);
        memcpy(at, p->data, p->count * sizeof(float));
    }
    model_set_parameters(&m, params);

    // noise: t, masks and weights
    size_t BT = (size_t)B * T;
    int *x = (int *)allocate(BT, sizeof(int), "x");
    float *weights = (float *)allocate(BT, sizeof(float), "weights");
    int R = 0, *given = (int *)allocate(B, sizeof(int), "given");
    static const struct { const char *name, *targets, *x, *t, *weights; int time; } noises[] = {
        {"answers", "answers_targets", "answers_x", NULL, "answers_weights", TIME_UNIFORM}, {"bell", "targets", "bell_x", "bell_t", "bell_weights", TIME_BELL},
        {"uniform", "targets", "x", "t", "weights", TIME_UNIFORM}};
    for (int k = 0; k < 3; k++) {
        double worst = 0, density;
        Noise noise = {(uint64_t)seed, 0, 0, B, noises[k].time};
        Data answers = {NULL, 0, 0, T, k ? -1 : *ints(&d, "answers_sep")};
        for (int b = 0; b < B; b++) {
            if (noises[k].t) worst = worse(worst, fabs(noise_level(noise, b, &density) - number(&d, noises[k].t, "", b)));
            given[b] = data_given(&answers, ints(&d, noises[k].targets) + b * T, T);
        }
        if (k == 0) check("context, rows that differ", count_different(given, ints(&d, "answers_given"), B), 0, "%s", name);
        R = model_noise(&m, ints(&d, noises[k].targets), given, noise, B, T);
        to_host(x, m.x, BT * sizeof(int));
        to_host(weights, m.weights, BT * sizeof(float));
        if (noises[k].t) check("noise level t", worst, 0, "%s %s", name, noises[k].name);
        check("masks, tokens that differ", count_different(x, ints(&d, noises[k].x), BT), 0, "%s %s", name, noises[k].name);
        check("weights", largest_difference(weights, floats(&d, noises[k].weights, 0), BT), 0, "%s %s", name, noises[k].name);
    }

    // forward and backward at each S
    float *logits = (float *)allocate(BT * V, sizeof(float), "logits"), *state = (float *)allocate(BT * C, sizeof(float), "a state"), *grads = params;
    for (int s = 0; s < num_loops; s++) {
        int S = loops[s], n = c.loop_end - c.loop_start;
        double states_error = 0, hidden_error;
        model_forward(&m, S);
        for (int loop = 0; n && loop < S; loop++) {
            to_host(state, pass_input(&m, c.loop_start + (loop + 1) * n), BT * C * sizeof(float));
            states_error = worse(states_error, state_error(state, floats(&d, "states/%d", S) + loop * BT * C, BT * C));
        }
        to_host(state, pass_input(&m, num_passes(c, S)), BT * C * sizeof(float));
        hidden_error = state_error(state, floats(&d, "hidden/%d", S), BT * C);
        check(BF16 ? "hidden states, relative" : "hidden states, largest difference", worse(states_error, hidden_error), TOLERANCE(1e-4, BF16_HIDDEN), "%s S=%d", name, S);
        double loss = model_loss(&m, 1), want = floats(&d, "loss/%d", S)[0];
        check("loss, relative", fabs(loss - want) / want, TOLERANCE(1e-5, BF16_LOSS), "%s S=%d", name, S);
        tensors_read(grads, &m.grads);
        for (int r0 = 0; r0 < R; r0 += m.head_rows) {
            int rows = min_int(m.head_rows, R - r0);
            head_forward(&m, m.rows + r0, rows);
            read_logits(logits + (size_t)r0 * V, &m, rows);
        }
        check(BF16 ? "logits, relative" : "logits, largest difference", state_error(logits, floats(&d, "logits/%d", S), (size_t)R * V), TOLERANCE(1e-4, BF16_HIDDEN), "%s S=%d, %d masked rows", name, S, R);
        at = grads;
        for (int i = 0; i < NUM_TENSORS; at += m.grads.size[i++])
            check("gradients, relative to their norm", relative_norm(at, (const float *)find(&d, "grad%d/%s", S, shapes[i].name)->data, m.grads.size[i]),
                  TOLERANCE(1e-4, BF16_GRADIENT), "%s S=%d %s", name, S, shapes[i].name);
        clear_gradients(&m);
    }

    // NELBO of 10 rows for each S, and the samplers' traces
    char *shard = join_path(folder, "reference.bin");
    write_shard(shard, ints(&d, "tokens"), (int)find(&d, "tokens")->count);
    Data data = data_open(shard, V, c.max_seq_len);
    for (int s = 0; s < num_loops; s++) {
        double want = floats(&d, "nelbo", 0)[s];
        Loops l = {loops[s], 0, 0};
        check("NELBO, relative", fabs(evaluate(&m, &data, l, TIME_UNIFORM, 10, B, seed, NULL).nelbo - want) / want, TOLERANCE(1e-5, BF16_LOSS), "%s S=%d", name, loops[s]);
    }
    static const int scores[] = {SCORE_PROBABILITY, SCORE_PROBABILITY, SCORE_MARGIN, SCORE_ENTROPY, SCORE_PROBABILITY};
    int traces = 0;
    for (int k = 0; k < d.n && !BF16; k++) { // untrained, the likeliest tokens are too close together for bf16 to find the same
        const char *which = d.tensors[k].name + strlen("sample_options/");
        if (strncmp(d.tensors[k].name, "sample_options/", which - d.tensors[k].name)) continue;
        double v[9];
        for (int i = 0; i < 9; i++) v[i] = number(&d, "sample_options", which, i);
        SampleOptions o = {(int)v[0], (int)v[1], (int)v[6], v[5], v[7], {loops[num_loops - 1], 0, 0}, {v[2], (int)v[3], v[4], scores[(int)v[1]], (uint64_t)v[8]}};
        const DumpTensor *want = find(&d, "sample/%s", which);
        Trace compared = {(const int *)want->data, BT, 0};
        memcpy(x, ints(&d, "sample_given"), BT * sizeof(int));
        sample(&m, x, B, T, o, 0, NULL, compare_step, &compared);
        compared.different += count_different(x, compared.want + (want->size[0] - 1) * BT, BT);
        check("sampler's trace, tokens that differ", compared.different, 0, "%s %s", name, which);
        traces++;
    }
    check("samplers' traces, missing", !BF16 && traces < (V > 1000 ? 3 : 15), 0, "%s", name);

    // adaptive loops of the rows of x
    Model inference;
    model_build(&inference, c);
    model_reserve(&inference, B, T, 1, 0, 0);
    copy_parameters(&inference, &m);
    int *used = (int *)allocate(B, sizeof(int), "loops");
    static const char *const criteria[] = {"change", "second", "zero"};
    for (int k = 0; k < 3; k++) {
        Loops l = {(int)number(&d, "adaptive_options", criteria[k], 2), number(&d, "adaptive_options", criteria[k], 0), (int)number(&d, "adaptive_options", criteria[k], 1)};
        model_tokens(&inference, ints(&d, "x"), B, T);
        adaptive_forward(&inference, l, used);
        to_host(state, pass_input(&inference, num_passes(c, l.S)), BT * C * sizeof(float));
        if (!BF16 || k == 2) // bf16's own rounding is a change
            check("adaptive loops used, rows that differ", count_different(used, (const int *)find(&d, "adaptive_loops/%s", criteria[k])->data, B), 0, "%s %s", name, criteria[k]);
        if (!BF16 || k == 2)
            check("hidden states, adaptive, relative", relative_norm(state, (const float *)find(&d, "adaptive_hidden/%s", criteria[k])->data, BT * C),
                  TOLERANCE(1e-5, BF16_HIDDEN), "%s %s", name, criteria[k]);
    }
    model_free(&inference);

    // ten optimizer steps of two batches each, with S varying; then again with bell-shaped t, half the steps shorter, slower embeddings and an average
    for (int k = 0; k < 2; k++) {
        Model trained;
        AdamW o = {0, k ? 0.3 : 1, 0.9, 0.95, 1e-8, 0.1, 1, k ? 0.4 : 0};
        Recipe recipe = {LOOPS_UNIFORM, k ? TIME_BELL : TIME_UNIFORM, k ? 0.5 : 0, (uint64_t)seed, 2 * B, B};
        double loss_error = 0, norm_error = 0, drawn_error = 0;
        const float *loss = floats(&d, k ? "train2_loss" : "train_loss", 0), *norm = floats(&d, k ? "train2_norm" : "train_norm", 0);
        const int *drawn = ints(&d, k ? "train2_loops" : "train_loops");
        model_build(&trained, c);
        trained.keeps_ema = k;
        model_reserve(&trained, B, c.max_seq_len, c.max_loops, 1, 0);
        copy_parameters(&trained, &m);
        if (k) tensors_read(params, &m.params), tensors_write(&trained.ema, params);
        for (int step = 0; step < 10; step++) {
            Gradient g = train_gradient(&trained, &data, recipe, step);
            o.lr = learning_rate(1e-3, 0.1, 3, 10, step);
            model_update(&trained, o, g.norm, step + 1);
            loss_error = worse(loss_error, fabs(g.loss - loss[step]) / fmax(1, loss[step]));
            norm_error = worse(norm_error, fabs(g.norm / norm[step] - 1));
            drawn_error += g.S != drawn[step] || g.T != (k ? ints(&d, "train2_length")[step] : c.max_seq_len);
        }
        check("loops and lengths drawn, that differ", drawn_error, 0, "%s%s", name, k ? " bell, shorter" : "");
        check("losses of 10 AdamW steps, relative", loss_error, TOLERANCE(2e-5, (k ? 4 : 1) * BF16_LOSS), "%s%s", name, k ? " bell, shorter" : "");
        check("gradient norms of 10 steps, relative", norm_error, TOLERANCE(1e-4, BF16_GRADIENT), "%s%s", name, k ? " bell, shorter" : "");
        if (k) tensors_read(params, &trained.ema), check("average of parameters, relative", relative_norm(params, floats(&d, "train2_ema", 0), m.params.total), TOLERANCE(1e-4, 1e-2), "%s", name);
        model_free(&trained);
    }

    free(x), free(given), free(used), free(weights), free(logits), free(state), free(params), free(shard), free(d.tensors);
    munmap((void *)d.file, d.bytes);
    model_free(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Properties that need no reference

#ifndef TEST_CUDA
static void check_arithmetic(void) {
    double worst = 0;
    for (float x = -87; x < 87; x += 0.00137f) worst = worse(worst, fabs(exp_fast(x) / exp(x) - 1));
    check("exp_fast, relative", worst, 2.4e-7, "-87 .. 87"); // 2 units in the last place
    check("exp_fast of extremes", !(exp_fast(-1000) < 1e-37 && exp_fast(1000) > 6e37 && isnan(exp_fast(NAN)) && exp_fast(0) == 1), 0, "-1000, 0, 1000, NaN");

    // the matrix product at sizes around every tile, with every layout
    static const int sizes[] = {1, 2, MR, MR + 1, NR - 1, NR, NR + 1, MC, MC + 1, KC + 3, NT + 5};
    enum { N = sizeof sizes / sizeof *sizes };
    worst = 0;
    for (int i = 0; i < N * N * N; i++) {
        int M = sizes[i % N], n = sizes[i / N % N], K = sizes[i / N / N], layout = i % 8;
        float *a = (float *)allocate(M * K, 4, "a"), *b = (float *)allocate(K * n, 4, "b"), *c = (float *)allocate(M * (n + 3), 4, "c"), bias[NT + KC];
        for (int j = 0; j < M * K; j++) a[j] = (float)random_uniform(1, 0, i, j) - 0.5f;
        for (int j = 0; j < K * n; j++) b[j] = (float)random_uniform(2, 0, i, j) - 0.5f;
        for (int j = 0; j < n; j++) bias[j] = (float)j;
        for (int j = 0; j < M * (n + 3); j++) c[j] = 1;
        size_t ar = layout & 1 ? 1 : K, ac = layout & 1 ? M : 1, br = layout & 2 ? 1 : n, bc = layout & 2 ? K : 1;
        gemm(M, n, K, a, ar, ac, b, br, bc, c, n + 3, bias, layout >> 2);
        for (int r = 0; r < M; r += max_int(1, M / 7))
            for (int q = 0; q < n + 3; q++) {
                double sum = q < n ? bias[q] + (layout >> 2) : 1; // the three columns past the end stay as they were
                for (int k = 0; q < n && k < K; k++) sum += (double)a[r * ar + k * ac] * b[k * br + q * bc];
                worst = worse(worst, fabs(c[r * (n + 3) + q] - sum) / fmax(1, fabs(sum)));
            }
        free(a), free(b), free(c);
    }
    check("matrix product, relative", worst, 5e-6, "%d shapes, 8 layouts", N * N * N);
}
#endif

// ---- layers by themselves, against plain loops in double: sizes around every tile ----

static void *device_array(size_t bytes) {
#ifdef TEST_CUDA
    void *p;
    cuda_check(cudaMalloc(&p, bytes), "a test");
    return p;
#else
    return allocate(bytes, 1, "a test");
#endif
}

static void device_free(void *p) {
#ifdef TEST_CUDA
    cuda_check(cudaFree(p), "a test");
#else
    free(p);
#endif
}

// An array (n), where the model lives, of random numbers from -scale/2 to scale/2, as a layer takes them; values (n) get what they are.
static int arrays_made;
static float *random_floats(float *values, size_t n, float scale) {
    arrays_made++;
    for (size_t i = 0; i < n; i++) values[i] = scale * ((float)random_uniform(11, 0, arrays_made, i) - 0.5f);
    float *p = (float *)device_array(n * sizeof(float));
    to_device(p, values, n * sizeof(float));
    return p;
}

static floatX *random_x(float *values, size_t n, float scale) {
    floatX *host = (floatX *)allocate(n, sizeof(floatX), "a test"), *p = (floatX *)device_array(n * sizeof(floatX));
    arrays_made++;
    for (size_t i = 0; i < n; i++) {
        host[i] = (floatX)(scale * ((float)random_uniform(11, 0, arrays_made, i) - 0.5f));
        values[i] = (float)host[i];
    }
    to_device(p, host, n * sizeof(floatX));
    free(host);
    return p;
}

static void read_x(float *values, const floatX *p, size_t n) {
    floatX *host = (floatX *)allocate(n, sizeof(floatX), "a test");
    to_host(host, p, n * sizeof(floatX));
    for (size_t i = 0; i < n; i++) values[i] = (float)host[i];
    free(host);
}

#define ARRAY(n) ((float *)allocate(n, sizeof(float), "a test"))

static double matmul_error(float got, double want) { return fabs(got - want) / fmax(1, fabs(want)); }

static void check_matmul(int M, int C, int OC, double *forward, double *dinput, double *dweight_error) {
    float *inp = ARRAY(M * C), *weight = ARRAY(OC * C), *bias = ARRAY(OC), *dout = ARRAY(M * OC), *dweight = ARRAY(OC * C), *dbias = ARRAY(OC);
    float *out = ARRAY(M * OC), *dinp = ARRAY(M * C), *dw = ARRAY(OC * C), *db = ARRAY(OC);
    floatX *inp_ = random_x(inp, M * C, 1), *weight_ = random_x(weight, OC * C, 1), *dout_ = random_x(dout, M * OC, 1), *out_ = random_x(out, M * OC, 1), *dinp_ = random_x(dinp, M * C, 1);
    float *bias_ = random_floats(bias, OC, 1), *dweight_ = random_floats(dweight, OC * C, 1), *dbias_ = random_floats(dbias, OC, 1);
#ifdef TEST_CUDA
    size_t room = (size_t)2 * OC * C + 4 * OC;
    Parts parts = {(float *)device_array(room * sizeof(float)), room, 8};
    matmul_forward(Store<floatX>{out_, OC, bias_}, inp_, weight_, M, C, OC);
    matmul_backward(Store<floatX>{dinp_, C, NULL}, dweight_, dbias_, dout_, OC, inp_, weight_, M, C, OC, parts);
    device_free(parts.memory);
#else
    matmul_forward(out_, inp_, weight_, bias_, M, C, OC);
    matmul_backward(dinp_, dweight_, dbias_, dout_, inp_, weight_, M, C, OC);
#endif
    read_x(out, out_, M * OC), read_x(dinp, dinp_, M * C);
    to_host(dw, dweight_, OC * C * sizeof(float)), to_host(db, dbias_, OC * sizeof(float));
    int row = max_int(1, M / 9), column = max_int(1, OC / 9);
    for (int i = 0; i < M; i += i == M - 2 ? 1 : min_int(row, max_int(1, M - 2 - i))) { // some rows, and the last ones
        for (int j = 0; j < OC; j++) {
            double sum = bias[j];
            for (int k = 0; k < C; k++) sum += (double)inp[i * C + k] * weight[j * C + k];
            *forward = worse(*forward, matmul_error(out[i * OC + j], sum));
        }
        for (int j = 0; j < C; j++) {
            double sum = 0;
            for (int k = 0; k < OC; k++) sum += (double)dout[i * OC + k] * weight[k * C + j];
            *dinput = worse(*dinput, matmul_error(dinp[i * C + j], sum));
        }
    }
    for (int i = 0; i < OC; i += i == OC - 2 ? 1 : min_int(column, max_int(1, OC - 2 - i))) {
        double sum = dbias[i];
        for (int k = 0; k < M; k++) sum += dout[k * OC + i];
        *dweight_error = worse(*dweight_error, matmul_error(db[i], sum));
        for (int j = 0; j < C; j++) {
            sum = dweight[i * C + j];
            for (int k = 0; k < M; k++) sum += (double)dout[k * OC + i] * inp[k * C + j];
            *dweight_error = worse(*dweight_error, matmul_error(dw[i * C + j], sum));
        }
    }
    device_free(inp_), device_free(weight_), device_free(dout_), device_free(out_), device_free(dinp_), device_free(bias_), device_free(dweight_), device_free(dbias_);
    free(inp), free(weight), free(bias), free(dout), free(dweight), free(dbias), free(out), free(dinp), free(dw), free(db);
}

// q, k, v (T,D) of one head inside (B,T,3C) -> out and the gradients dq, dk, dv, all in double
static void check_attention(int B, int T, int NH, int D, double *forward, double *backward) {
    int C = NH * D;
    size_t n = (size_t)B * T * C;
    float *qkv = ARRAY(3 * n), *dout = ARRAY(n), *out = ARRAY(n), *dqkv = ARRAY(3 * n), *want = ARRAY(n), *dwant = ARRAY(3 * n);
    floatX *qkv_ = random_x(qkv, 3 * n, 4), *dout_ = random_x(dout, n, 1), *out_ = random_x(out, n, 1), *dqkv_ = random_x(dqkv, 3 * n, 1);
    float *lse_ = (float *)device_array((size_t)B * NH * T * sizeof(float));
#ifdef TEST_CUDA
    float *delta_ = (float *)device_array((size_t)B * NH * T * sizeof(float));
    attention_forward(out_, lse_, qkv_, B, T, C, NH);
    attention_backward(dqkv_, delta_, dout_, out_, qkv_, lse_, B, T, C, NH);
    device_free(delta_);
#else
    attention_forward(out_, lse_, qkv_, B, T, C, NH);
    attention_backward(dqkv_, dout_, qkv_, lse_, B, T, C, NH);
#endif
    read_x(out, out_, n), read_x(dqkv, dqkv_, 3 * n);
    double *p = (double *)allocate(T, sizeof(double), "a test"), *dp = (double *)allocate(T, sizeof(double), "a test"), *dkv = (double *)allocate(2 * (size_t)T * D, sizeof(double), "a test");
    for (int bh = 0; bh < B * NH; bh++) {
        const float *q = qkv + (size_t)(bh / NH) * T * 3 * C + bh % NH * D, *k = q + C, *v = k + C;
        size_t row = (size_t)(bh / NH) * T * C + bh % NH * D;
        memset(dkv, 0, 2 * (size_t)T * D * sizeof(double));
        for (int i = 0; i < T; i++) {
            double largest = -1e30, sum = 0, delta = 0;
            for (int j = 0; j < T; j++) {
                p[j] = dp[j] = 0;
                for (int d = 0; d < D; d++) p[j] += (double)q[i * 3 * C + d] * k[j * 3 * C + d] / sqrt(D), dp[j] += (double)dout[row + i * C + d] * v[j * 3 * C + d];
                largest = fmax(largest, p[j]);
            }
            for (int j = 0; j < T; j++) sum += p[j] = exp(p[j] - largest);
            for (int j = 0; j < T; j++) p[j] /= sum, delta += p[j] * dp[j];
            for (int d = 0; d < D; d++) {
                double y = 0, dq = 0;
                for (int j = 0; j < T; j++) {
                    double ds = p[j] * (dp[j] - delta) / sqrt(D);
                    y += p[j] * v[j * 3 * C + d];
                    dq += ds * k[j * 3 * C + d];
                    dkv[j * D + d] += ds * q[i * 3 * C + d];
                    dkv[(T + j) * D + d] += p[j] * dout[row + i * C + d];
                }
                want[row + i * C + d] = (float)y;
                dwant[3 * row - 2 * (bh % NH * D) + i * 3 * C + d] = (float)dq;
            }
        }
        for (int j = 0; j < T; j++)
            for (int d = 0; d < D; d++)
                for (int which = 0; which < 2; which++)
                    dwant[3 * row - 2 * (bh % NH * D) + j * 3 * C + (which + 1) * C + d] = (float)dkv[(which * T + j) * D + d];
    }
    *forward = worse(*forward, relative_norm(out, want, n));
    *backward = worse(*backward, relative_norm(dqkv, dwant, 3 * n));
    device_free(qkv_), device_free(dout_), device_free(out_), device_free(dqkv_), device_free(lse_);
    free(qkv), free(dout), free(out), free(dqkv), free(want), free(dwant), free(p), free(dp), free(dkv);
}

// The embedding's gradient where one token is at hundreds of positions, some twice in a stretch of 256 and some never again
static double check_encoder(int B, int T, int C, int V) {
    size_t n = (size_t)B * T * C;
    int *x = (int *)allocate((size_t)B * T, sizeof(int), "a test"), *x_ = (int *)device_array((size_t)B * T * sizeof(int));
    float *dout = ARRAY(n), *dwte = ARRAY((size_t)V * C), *dwpe = ARRAY((size_t)T * C), *got = ARRAY((size_t)V * C + (size_t)T * C);
    double *want = (double *)allocate((size_t)V * C + (size_t)T * C, sizeof(double), "a test"), worst = 0;
    for (int i = 0; i < B * T; i++) x[i] = random_uniform(12, 0, 0, i) < 0.5 ? V - 1 : (int)(random_bits(13, 0, 0, i) % V);
    to_device(x_, x, (size_t)B * T * sizeof(int));
    float *dout_ = random_floats(dout, n, 1), *dwte_ = random_floats(dwte, (size_t)V * C, 1), *dwpe_ = random_floats(dwpe, (size_t)T * C, 1);
    encoder_backward(dwte_, dwpe_, dout_, x_, B, T, C);
    to_host(got, dwte_, (size_t)V * C * sizeof(float)), to_host(got + (size_t)V * C, dwpe_, (size_t)T * C * sizeof(float));
    for (int i = 0; i < V * C; i++) want[i] = dwte[i];
    for (int i = 0; i < T * C; i++) want[V * C + i] = dwpe[i];
    for (int i = 0; i < B * T; i++)
        for (int c = 0; c < C; c++) want[x[i] * C + c] += dout[i * C + c], want[V * C + i % T * C + c] += dout[i * C + c];
    for (int i = 0; i < (V + T) * C; i++) worst = worse(worst, matmul_error(got[i], want[i]));
    device_free(x_), device_free(dout_), device_free(dwte_), device_free(dwpe_);
    free(x), free(dout), free(dwte), free(dwpe), free(got), free(want);
    return worst;
}

static void check_crossentropy(int R, int V, double *loss_error, double *gradient_error) {
    int ld = (V + 7) / 8 * 8, *targets = (int *)allocate(2 * R, sizeof(int), "a test"), *rows = (int *)allocate(R, sizeof(int), "a test");
    int *targets_ = (int *)device_array(2 * R * sizeof(int)), *rows_ = (int *)device_array(R * sizeof(int));
    float *logits = ARRAY((size_t)R * ld), *weights = ARRAY(2 * R), *losses = ARRAY(R), *got = ARRAY((size_t)R * ld), *want = ARRAY((size_t)R * ld);
#ifndef TEST_CUDA
    ld = V;
#endif
    float *logits_ = random_floats(logits, (size_t)R * ld, 20), *weights_ = random_floats(weights, 2 * R, 1), *losses_ = random_floats(losses, R, 1);
    for (int r = 0; r < R; r++) rows[r] = 2 * r + 1;
    for (int i = 0; i < 2 * R; i++) targets[i] = i == 1 ? V - 1 : (int)(random_bits(14, 0, 0, i) % V);
    to_device(targets_, targets, 2 * R * sizeof(int)), to_device(rows_, rows, R * sizeof(int));
#ifdef TEST_CUDA
    floatX *dlogits_ = BF16 ? random_x(got, (size_t)R * ld, 1) : (floatX *)logits_;
    crossentropy_forward_backward(losses_, dlogits_, logits_, weights_, targets_, rows_, R, V, ld);
    read_x(got, dlogits_, (size_t)R * ld);
#else
    crossentropy_forward(losses_, logits_, targets_, rows_, R, V);
    crossentropy_backward(logits_, weights_, targets_, rows_, R, V);
    to_host(got, logits_, (size_t)R * ld * sizeof(float));
#endif
    to_host(losses, losses_, R * sizeof(float));
    for (int r = 0; r < R; r++) {
        double sum = 0;
        for (int v = 0; v < V; v++) sum += exp((double)logits[r * ld + v]);
        for (int v = 0; v < V; v++) want[r * ld + v] = (float)((exp((double)logits[r * ld + v]) / sum - (v == targets[rows[r]])) * weights[rows[r]]);
        for (int v = V; v < ld; v++) got[r * ld + v] = 0; // padding
        *loss_error = worse(*loss_error, matmul_error(losses[r], log(sum) - logits[r * ld + targets[rows[r]]]));
    }
    *gradient_error = worse(*gradient_error, relative_norm(got, want, (size_t)R * ld));
#ifdef TEST_CUDA
    if (BF16) device_free(dlogits_);
#endif
    device_free(targets_), device_free(rows_), device_free(logits_), device_free(weights_), device_free(losses_);
    free(targets), free(rows), free(logits), free(weights), free(losses), free(got), free(want);
}

static void check_layers(void) {
    static const int rows[] = {1, 17, 128, 131, 700}, channels[] = {2, 6, 32, 130, 200}, outputs[] = {2, 64, 130, 264};
    double forward = 0, dinput = 0, dweight = 0;
    for (int i = 0; i < 100; i++) check_matmul(rows[i % 5], channels[i / 5 % 5], outputs[i / 25], &forward, &dinput, &dweight);
    // in bf16 results are rounded to 8 significant bits: by 2^-8 of their size at most
    check("matmul_forward", forward, TOLERANCE(5e-6, 1 / 255.), "100 shapes");
    check("matmul_backward, input", dinput, TOLERANCE(5e-6, 1 / 255.), "100 shapes");
    check("matmul_backward, weight and bias", dweight, TOLERANCE(1e-5, 1e-4), "100 shapes, sums of up to 700");
    static const int T[] = {1, 17, 64, 65, 130}, D[] = {2, 8, 20, 32, 48, 64, 66, 128};
    double backward = 0;
    forward = 0;
    for (int i = 0; i < 40; i++) check_attention(2, T[i % 5], 2, D[i / 5], &forward, &backward);
    // in bf16 out goes through two roundings (probabilities, results), the gradients through three (out and dscores as well), each of 2^-8
    // at most, which is half of that on average
    check("attention_forward, relative", forward, TOLERANCE(1e-6, 1 / 256.), "T = 1 .. 130, heads of 2 .. 128");
    check("attention_backward, relative", backward, TOLERANCE(3e-6, 1.5 / 256), "T = 1 .. 130, heads of 2 .. 128");
    check("encoder_backward", check_encoder(3, 210, 40, 50), 1e-5, "630 positions, half of them of one token");
    double loss_error = 0, gradient_error = 0;
    check_crossentropy(5, 1, &loss_error, &gradient_error);
    check_crossentropy(9, 703, &loss_error, &gradient_error);
    check_crossentropy(3, 20001, &loss_error, &gradient_error);
    check("crossentropy, loss", loss_error, 1e-6, "1, 703 and 20001 tokens");
    check("crossentropy, gradient, relative", gradient_error, TOLERANCE(2e-6, 1 / 256.), "1, 703 and 20001 tokens");
}

static Config small_config(int a, int b) {
    Config c = {24, 50, 64, 4, 2, 16, a, b, 4};
    return c;
}

static void build_small(Model *m, Config c, int B) { // parameters away from their start, so that every gradient is alive
    model_build(m, c);
    model_reserve(m, B, c.max_seq_len, c.max_loops, 1, 0);
    float *params = ARRAY(m->params.total);
    init_parameters(params, c, 3);
    for (size_t i = 0; i < m->params.total; i++) params[i] += 0.2f * (float)(random_uniform(4, 0, 0, i) - 0.5);
    model_set_parameters(m, params);
    free(params);
}

static void set_batch(Model *m, int step, int first, int B, int total) { // rows of a step of total
    int T = m->config.max_seq_len, *targets = (int *)allocate((size_t)B * T, sizeof(int), "targets");
    for (int i = 0; i < B * T; i++) targets[i] = (int)(random_bits(7, 0, step, first * T + i) % m->config.vocab_size);
    int given[8] = {0};
    Noise noise = {5, (uint64_t)step, first, total, TIME_UNIFORM};
    model_noise(m, targets, given, noise, B, T);
    free(targets);
}

static double forward_loss(Model *m, int S, int backward) {
    model_forward(m, S);
    return model_loss(m, backward);
}

static void check_model(void) {
    Config c = small_config(1, 3);
    Model m, other;
    Shape shapes[NUM_TENSORS];
    tensor_shapes(c, shapes);
    build_small(&m, c, 8);
    set_batch(&m, 0, 0, 8, 8);
    size_t total = m.params.total;
    float *params = ARRAY(total), *grads = ARRAY(total), *moved = ARRAY(total);

    // gradients against finite differences: the loss changes by |g|^2 h for a step of h along the gradient g of each tensor
    forward_loss(&m, 3, 1);
    double total_norm = gradient_norm(&m);
    tensors_read(params, &m.params), tensors_read(grads, &m.grads);
    for (size_t i = 0, begin = 0; i < NUM_TENSORS; begin += m.params.size[i++]) {
        double norm = 0, loss[2], h = TOLERANCE(5e-3, 5e-2);
        for (size_t j = begin; j < begin + m.params.size[i]; j++) norm += (double)grads[j] * grads[j];
        norm = sqrt(norm);
        for (int side = 0; side < 2; side++) {
            memcpy(moved, params, total * sizeof(float));
            for (size_t j = begin; j < begin + m.params.size[i]; j++) moved[j] += (float)((side ? -h : h) * grads[j] / norm);
            model_set_parameters(&m, moved);
            loss[side] = forward_loss(&m, 3, 0);
        }
        check("gradients against differences", fabs((loss[0] - loss[1]) / (2 * h) - norm) / fmax(norm, 0.01 * total_norm), TOLERANCE(1e-2, BF16_GRADIENT + 1e-2), "%s", shapes[i].name);
    }
    model_set_parameters(&m, params);

    // gradients with --recompute are the same numbers, and are added to what is there
    Model less;
    model_build(&less, c);
    model_reserve(&less, 8, 24, c.max_loops, 1, 1);
    copy_parameters(&less, &m);
    set_batch(&less, 0, 0, 8, 8);
    forward_loss(&less, 3, 1);
    tensors_read(moved, &less.grads);
    check("recomputed equals stored", largest_difference(moved, grads, total), 0, "gradients at S=3");
    check("recomputing takes less memory", !(less.bytes[ACTIVATIONS] < m.bytes[ACTIVATIONS]), 0, "activations");
    forward_loss(&less, 3, 1);
    tensors_read(moved, &less.grads);
    for (size_t i = 0; i < total; i++) grads[i] *= 2;
    check("gradients are added up, relative", relative_norm(moved, grads, total), 1e-6, "twice the same batch");
    model_free(&less);

    // the head in many small parts
    clear_gradients(&m);
    int head_rows = m.head_rows;
    double one_part = forward_loss(&m, 3, 0);
    m.head_rows = 7;
    check("the head in parts: loss, relative", fabs(forward_loss(&m, 3, 1) / one_part - 1), 1e-6, "7 rows at a time");
    m.head_rows = head_rows;
    float *parts = ARRAY(total);
    tensors_read(parts, &m.grads);
    for (size_t i = 0; i < total; i++) parts[i] *= 2;
    check("the head in parts: gradient, relative", relative_norm(parts, grads, total), TOLERANCE(1e-5, 1e-4), "7 rows at a time");
    free(parts);

    // the same memory for all passes gives the same forward as memory for each
    model_build(&other, c);
    model_reserve(&other, 8, 24, 1, 0, 0);
    copy_parameters(&other, &m);
    set_batch(&other, 0, 0, 8, 8);
    check("inference equals training", fabs(forward_loss(&m, 4, 0) - forward_loss(&other, 4, 0)), 0, "S=4");
    Model deep;
    model_build(&deep, c);
    model_reserve(&deep, 8, 24, 16, 1, 0);
    copy_parameters(&deep, &m);
    set_batch(&deep, 0, 0, 8, 8);
    check("inference equals training", fabs(forward_loss(&deep, 16, 0) - forward_loss(&other, 16, 0)), 0, "S=16, beyond S_max");
    model_free(&deep);

    // S = 1 is a plain transformer, and so is any S without a loop; with one, S matters
    other.config.loop_start = other.config.loop_end = 0;
    double plain = forward_loss(&other, 1, 0), looped[2];
    for (int S = 1; S < 3; S++) {
        looped[S - 1] = forward_loss(&m, S, 0);
        check("no loop: S does not matter", fabs(forward_loss(&other, S, 0) - plain), 0, "S=%d", S);
    }
    check("S=1 equals a plain MDM", fabs(looped[0] - plain), 0, "loss");
    check("S=2 differs from a plain MDM", fabs(looped[1] - plain) < 1e-4, 0, "loss");
    model_free(&other);

    // two batches whose gradients are added up are one batch of twice the rows: the same noise, the same gradient
    int x[8 * 24], half[4 * 24];
    double loss = 0, different = 0;
    clear_gradients(&m);
    double whole_loss = forward_loss(&m, 2, 1);
    tensors_read(grads, &m.grads);
    to_host(x, m.x, sizeof x);
    clear_gradients(&m);
    for (int first = 0; first < 8; first += 4) {
        set_batch(&m, 0, first, 4, 8);
        to_host(half, m.x, sizeof half);
        different += count_different(half, x + first * 24, 4 * 24);
        loss += forward_loss(&m, 2, 1);
    }
    tensors_read(moved, &m.grads);
    check("accumulation: masks that differ", different, 0, "2 x 4 rows and 8 rows");
    check("accumulation: loss, relative", fabs(loss / whole_loss - 1), 1e-6, "2 x 4 rows and 8 rows");
    check("accumulation: gradient, relative", relative_norm(moved, grads, total), TOLERANCE(1e-5, 1e-4), "2 x 4 rows and 8 rows");

    // noise: the share of masks follows t; t is stratified
    double masked = 0, expected = 0, spread = 0;
    for (int step = 0; step < 500; step++) {
        for (int b = 0; b < 8; b++) {
            Noise noise = {5, (uint64_t)step, 0, 8, TIME_UNIFORM};
            double density, t = noise_level(noise, b, &density);
            int bin = 0;
            for (int i = 0; i < 24; i++) masked += becomes_mask(5, step, b * 24 + i, t), expected += t;
            for (int other_b = 0; other_b < 8; other_b++) bin += noise_level(noise, other_b, &density) < t;
            spread = worse(spread, fabs(t - (bin + 0.5) / 8) - 0.5 / 8);
        }
    }
    check("share of masked tokens", fabs(masked / expected - 1), 0.01, "500 batches");
    check("t stays in its stratum", spread, 2e-3, "500 batches"); // eps = 1e-3 shifts the strata

    // draws of S
    double count[3][5] = {{0}};
    for (int step = 0; step < 20000; step++)
        for (int dist = 0; dist < 3; dist++) count[dist][draw_loops(c, dist, 9, step)] += 1 / 20000.0;
    double ratio = training_flops(c, 24, 4, 0.5, 0) / training_flops(c, 24, 1, 0.5, 0);
    check("p(S) uniform", fmax(fabs(count[0][1] - 0.25), fabs(count[0][4] - 0.25)), 0.015, "20000 steps");
    check("p(S) fixed", fabs(1 - count[1][4]), 1e-9, "20000 steps");
    check("p(S) flops: p(1)/p(4), relative", fabs(count[2][1] / count[2][4] / ratio - 1), 0.08, "20000 steps");

    // the schedule
    check("learning rate", fabs(learning_rate(1, 0.1, 10, 110, 4) - 0.5) + fabs(learning_rate(1, 0.1, 10, 110, 10) - 1) + fabs(learning_rate(1, 0.1, 10, 110, 60) - 0.55)
          + fabs(learning_rate(1, 0.1, 10, 110, 110) - 0.1), 1e-12, "warmup, top, middle, end");

    // only matrices decay, embeddings more slowly as they learn more slowly, and a step with no gradient moves nothing else
    AdamW o = {0.5, 0.2, 0.9, 0.95, 1e-8, 0.1, 1, 0};
    clear_gradients(&m); // the moments are zero since model_reserve()
    model_update(&m, o, 0, 1);
    tensors_read(moved, &m.params);
    double wrong = 0;
    for (size_t i = 0, begin = 0; i < NUM_TENSORS; begin += m.params.size[i++])
        for (size_t j = begin; j < begin + m.params.size[i]; j++) wrong = worse(wrong, fabs(moved[j] - params[j] * (i == WTE ? 0.99 : shapes[i].in ? 0.95 : 1)));
    check("weight decay", wrong, 1e-7, "matrices, and nothing else");
    free(params), free(grads), free(moved);
    model_free(&m);
}

static void check_threads(void) {
#ifdef __SSE__
    volatile float least = FLT_MIN;
    float sum = 0;
    OMP(omp parallel num_threads(2) reduction(+ : sum))
    sum += least / 2;
    check("subnormal numbers are zero", sum > 0, 0, "in each of 2 threads");
#endif
#ifdef _OPENMP
    Config c = {100, 300, 320, 3, 3, 60, 1, 2, 4};
    Model m[2];
    float *params[2];
    double loss[2], norm[2];
    for (int k = 0; k < 2; k++) {
        omp_set_num_threads(k ? 2 : 1);
        build_small(&m[k], c, 4);
        for (int step = 0; step < 3; step++) {
            set_batch(&m[k], step, 0, 4, 4);
            loss[k] = forward_loss(&m[k], 3, 1);
            norm[k] = gradient_norm(&m[k]);
            AdamW o = {1e-3, 1, 0.9, 0.95, 1e-8, 0.1, 1, 0};
            model_update(&m[k], o, norm[k], step + 1);
        }
        params[k] = ARRAY(m[k].params.total);
        tensors_read(params[k], &m[k].params);
    }
    check("one thread equals two", fabs(loss[0] - loss[1]) + fabs(norm[0] - norm[1]) + largest_difference(params[0], params[1], m[0].params.total), 0, "loss, norm, parameters after 3 steps");
    omp_set_num_threads(omp_get_num_procs());
    model_free(&m[0]), model_free(&m[1]);
    free(params[0]), free(params[1]);
#endif
}

// sample_forward() of logits (R,V), wherever it runs
static void sample_rows(int *token, double *score, const float *logits, const int *rows, int R, int V, Draw draw) {
    int *rows_ = (int *)device_array(R * sizeof(int)), *token_ = (int *)device_array(R * sizeof(int)), *ids_ = (int *)device_array(sizeof(int)), id = 0;
    float *logits_ = (float *)device_array((size_t)R * V * sizeof(float));
    double *score_ = (double *)device_array(R * sizeof(double));
    to_device(rows_, rows, R * sizeof(int)), to_device(logits_, logits, (size_t)R * V * sizeof(float)), to_device(ids_, &id, sizeof id);
#ifdef TEST_CUDA
    sample_forward(token_, score_, logits_, rows_, ids_, R, R, V, V, draw, 2);
#else
    sample_forward(token_, score_, logits_, rows_, ids_, R, R, V, draw, 2);
#endif
    to_host(token, token_, R * sizeof(int)), to_host(score, score_, R * sizeof(double));
    device_free(rows_), device_free(token_), device_free(logits_), device_free(score_), device_free(ids_);
}

// The tokens from which these options draw, with what probability: by sorting, where loopmdm.c looks for a threshold by bisection.
static void kept_probabilities(double *p, const float *logits, int V, Draw draw) {
    double total = 0, *all = (double *)allocate(V, sizeof(double), "probabilities");
    for (int v = 0; v < V; v++) p[v] = exp(logits[v] / draw.temperature);
    for (int pass = 0; pass < 3; pass++) {
        total = 0;
        for (int v = 0; v < V; v++) total += all[v] = p[v];
        for (int v = 0; v < V; v++) {
            double larger = 0; // of those that are larger: how many, then their probability
            for (int u = 0; u < V; u++)
                if (logits[u] > logits[v]) larger += pass == 0 ? 1 : all[u] / total;
            if (pass == 0 ? draw.top_k > 0 && larger >= draw.top_k : pass == 1 && draw.top_p < 1 && larger >= draw.top_p) p[v] = 0;
        }
    }
    for (int v = 0; v < V; v++) p[v] /= total;
    free(all);
}

static void check_sampler(void) {
    Config c = small_config(1, 3);
    Model m;
    model_build(&m, c);
    model_reserve(&m, 3, 24, 1, 0, 0);
    float *params = ARRAY(m.params.total);
    init_parameters(params, c, 3);
    model_set_parameters(&m, params);
    free(params);
    int given[3 * 24], x[3 * 24], alone[24];
    double changed = 0, masks = 0, batch = 0;
    for (int k = 0; k < FEWER(100); k++) {
        for (int i = 0; i < 3 * 24; i++) given[i] = random_uniform(k, 1, 0, i) < 0.7 ? c.vocab_size : (int)(random_bits(k, 2, 0, i) % 50);
        static const int scores[] = {SCORE_PROBABILITY, SCORE_PROBABILITY, SCORE_MARGIN, SCORE_ENTROPY, SCORE_PROBABILITY};
        int order = k % 5; // 24 positions are up to 5 blocks of 5
        SampleOptions o = {5 + k % 30, order, k % 7 == 3 ? 5 : 0, 0.05, order == ORDER_THRESHOLD || k % 2 ? 0 : 0.3, {1 + k % 6, k % 4 == 1 ? 0.2 : 0, k % 8 == 1}, {k % 3 * 0.5, k % 11 ? 0 : 4, k % 13 ? 1 : 0.7, scores[order], (uint64_t)k}};
        memcpy(x, given, sizeof x);
        sample(&m, x, 3, 24, o, 0, NULL, NULL, NULL);
        for (int i = 0; i < 3 * 24; i++) changed += given[i] != c.vocab_size && x[i] != given[i], masks += x[i] >= c.vocab_size;
        memcpy(alone, given + 24, sizeof alone);
        sample(&m, alone, 1, 24, o, 1, NULL, NULL, NULL);
        batch += count_different(alone, x + 24, 24);
    }
    check("given tokens that changed", changed, 0, "samples of 3 rows");
    check("masks left", masks, 0, "samples of 3 rows");
    check("alone or in a batch, that differ", batch, 0, "samples of 3 rows");
    model_free(&m);

    // Draws follow softmax(logits / temperature), cut by top-k and top-p: chi-square with n - 1 degrees of freedom for n tokens kept, whose
    // mean that is; it exceeds the limit with a probability of 0.001
    static const struct { int V; Draw draw; double limit; } draws[] = {
        {5, {1, 0, 1, SCORE_PROBABILITY, 1}, 18.5}, {5, {0.5, 0, 1, SCORE_MARGIN, 1}, 18.5}, {300, {1, 0, 1, SCORE_ENTROPY, 1}, 381}, {300, {1, 20, 1, SCORE_PROBABILITY, 1}, 43.8},
        {300, {0.7, 0, 0.6, SCORE_PROBABILITY, 1}, 200}, {300, {2, 40, 0.8, SCORE_ENTROPY, 1}, 73.4}};
    enum { DRAWS = FEWER(20000) };
    for (int k = 0; k < COUNT(draws); k++) {
        int V = draws[k].V, *rows = (int *)allocate(DRAWS, sizeof(int), "rows"), *token = (int *)allocate(DRAWS, sizeof(int), "tokens"), *count = (int *)allocate(V, sizeof(int), "counts");
        Draw draw = draws[k].draw;
        float *logits = ARRAY((size_t)DRAWS * V);
        double *score = (double *)allocate(DRAWS, sizeof(double), "scores"), *p = (double *)allocate(V, sizeof(double), "p"), sum = 0, chi = 0, worst = 0, entropy = 0, outside = 0;
        for (int r = 0; r < DRAWS; r++)
            for (int v = 0; v < V; v++) logits[(size_t)r * V + v] = 3 * (float)random_uniform(8, 0, 0, v);
        int best = 0, next = -1, kept = 0;
        for (int v = 1; v < V; v++) best = logits[v] > logits[best] ? v : best;
        for (int v = 0; v < V; v++) next = v != best && (next < 0 || logits[v] > logits[next]) ? v : next, sum += exp((double)logits[v]);
        for (int v = 0; v < V; v++) entropy -= exp((double)logits[v]) / sum * (logits[v] - log(sum));
        kept_probabilities(p, logits, V, draw);
        for (int r = 0; r < DRAWS; r++) rows[r] = r;
        sample_rows(token, score, logits, rows, DRAWS, V, draw);
        for (int r = 0; r < DRAWS; r++) {
            double likelihood = exp((double)logits[token[r]]) / sum, margin = (exp((double)logits[best]) - exp((double)logits[next])) / sum;
            count[token[r]]++;
            worst = worse(worst, fabs(score[r] - (draw.score == SCORE_PROBABILITY ? likelihood : draw.score == SCORE_MARGIN ? margin : -entropy)));
        }
        for (int v = 0; v < V; v++) {
            if (p[v] > 0) kept++, chi += pow(count[v] - DRAWS * p[v], 2) / (DRAWS * p[v]);
            else outside += count[v];
        }
        check(V == 5 ? "draws, chi-square of 5 tokens" : kept == V ? "draws, chi-square of 300 tokens" : "draws, chi-square of the tokens kept", chi, draws[k].limit, "temperature %g, top-k %d, top-p %g: %d tokens", draw.temperature, draw.top_k, draw.top_p, kept);
        check("draws outside top-k and top-p", outside, 0, "%d tokens", kept);
        check("score of a draw", worst, 1e-12, "%d tokens", V);
        draw.temperature = 0;
        sample_rows(token, score, logits, rows, 1, V, draw);
        check("temperature 0 takes the likeliest", token[0] != best, 0, "%d tokens", V);
        free(rows), free(token), free(count), free(logits), free(score), free(p);
    }
}

// A model so small that all that can happen can be enumerated: T = 3 positions of V = 3 tokens.
enum { TINY = 3, STATES = 64 }; // states: each position is a token or MASK (3), a digit of a number in base 4

static void tiny_model(Model *m) {
    Config c = {TINY, TINY, 64, 2, 2, 8, 0, 1, 3};
    model_build(m, c);
    model_reserve(m, STATES, TINY, 1, 0, 0);
    float *params = ARRAY(m->params.total);
    init_parameters(params, c, 21);
    for (size_t i = 0; i < m->params.total; i++) params[i] += (float)(1.5 * (random_uniform(21, 99, 0, i) - 0.5)); // far from uniform
    model_set_parameters(m, params);
    free(params);
}

static void tiny_tokens(int *x) { // all states (STATES,TINY)
    for (int s = 0; s < STATES; s++)
        for (int t = 0; t < TINY; t++) x[s * TINY + t] = s >> 2 * t & 3;
}

// Logits of every state and position (STATES,TINY,TINY), of positions that are MASK
static void tiny_logits(Model *m, float *logits, int S) {
    int x[STATES * TINY], rows[STATES * TINY];
    tiny_tokens(x);
    for (int i = 0; i < STATES * TINY; i++) rows[i] = i;
    model_tokens(m, x, STATES, TINY);
    model_forward(m, S);
    int *rows_ = (int *)device_array(sizeof rows);
    to_device(rows_, rows, sizeof rows);
    for (int r0 = 0; r0 < STATES * TINY; r0 += m->head_rows) {
        int n = min_int(m->head_rows, STATES * TINY - r0);
        head_forward(m, rows_ + r0, n);
        read_logits(logits + r0 * TINY, m, n);
    }
    device_free(rows_);
}

// The ancestral sampler against its exact distribution over all 27 texts, for temperatures, top-k, top-p and remasking: the probabilities of
// all states, step after step. Chi-square with 26 degrees of freedom or fewer.
static void check_posterior(void) {
    static const struct { int steps; double remask; Draw draw; } cases[] = {
        {1, 0, {1, 0, 1, SCORE_PROBABILITY, 1}}, {4, 0, {1, 0, 1, SCORE_PROBABILITY, 2}}, {4, 0, {0.6, 0, 1, SCORE_PROBABILITY, 3}}, {3, 0, {1.5, 2, 1, SCORE_PROBABILITY, 4}},
        {5, 0, {1, 0, 0.7, SCORE_PROBABILITY, 5}}, {6, 0.3, {1, 0, 1, SCORE_PROBABILITY, 6}}, {4, 1, {0.8, 2, 0.9, SCORE_PROBABILITY, 7}}};
    Model m;
    tiny_model(&m);
    float logits[STATES * TINY * TINY];
    tiny_logits(&m, logits, 2);
    enum { TEXTS = FEWER(FEWER(19200)) };
    int *x = (int *)allocate(TEXTS * TINY, sizeof(int), "texts");
    for (int k = 0; k < COUNT(cases); k++) {
        double p[STATES] = {0}, p_next[STATES], draw[STATES][TINY][TINY], chi = 0, count[STATES] = {0};
        for (int s = 0; s < STATES; s++)
            for (int t = 0; t < TINY; t++) kept_probabilities(draw[s][t], logits + (s * TINY + t) * TINY, TINY, cases[k].draw);
        p[STATES - 1] = 1;
        for (int j = 0; j < cases[k].steps; j++) {
            double N = cases[k].steps, sigma = j ? fmin(cases[k].remask, (N - j - 1) / j) : 0, reveal = (1 + sigma * j) / (N - j);
            memset(p_next, 0, sizeof p_next);
            for (int s = 0; s < STATES; s++)
                for (int to = 0; to < STATES && p[s] > 0; to++) {
                    double q = p[s];
                    for (int t = 0; t < TINY; t++) {
                        int a = s >> 2 * t & 3, b = to >> 2 * t & 3;
                        if (a == TINY) q *= b == TINY ? 1 - reveal : reveal * draw[s][t][b];
                        else q *= b == TINY ? sigma : a == b ? 1 - sigma : 0;
                    }
                    p_next[to] += q;
                }
            memcpy(p, p_next, sizeof p);
        }
        SampleOptions o = {cases[k].steps, ORDER_RANDOM, 0, 0, cases[k].remask, {2, 0, 0}, cases[k].draw};
        for (int first = 0; first < TEXTS; first += STATES) {
            for (int i = 0; i < STATES * TINY; i++) x[i] = TINY;
            sample(&m, x, STATES, TINY, o, first, NULL, NULL, NULL);
            for (int b = 0; b < STATES; b++) count[x[b * TINY] | x[b * TINY + 1] << 2 | x[b * TINY + 2] << 4]++;
        }
        for (int s = 0; s < STATES; s++) {
            if (p[s] > 1e-12) chi += pow(count[s] - TEXTS * p[s], 2) / (TEXTS * p[s]);
            else chi += count[s] > 0 ? INFINITY : 0;
        }
        check("texts of the ancestral sampler, chi-square", chi, 54.1, "%d steps, temperature %g, top-k %d, top-p %g, remask %g", cases[k].steps, cases[k].draw.temperature, cases[k].draw.top_k,
              cases[k].draw.top_p, cases[k].remask); // 0.001 for 26 degrees of freedom
    }
    free(x);

    // the NELBO of one text against the sum over all masks, integrated over t, for both ways of drawing t: within 4 standard errors
    int text[TINY] = {2, 0, 1};
    double exact = 0, by_count[TINY + 1] = {0}; // sums of cross entropies over the masks with that many masked
    for (int mask = 1; mask < 8; mask++) {
        int s = 0, n = 0;
        for (int t = 0; t < TINY; t++) s |= (mask >> t & 1 ? TINY : text[t]) << 2 * t, n += mask >> t & 1;
        for (int t = 0; t < TINY; t++) {
            const float *l = logits + (s * TINY + t) * TINY;
            if (mask >> t & 1) by_count[n] += log(exp((double)l[0]) + exp((double)l[1]) + exp((double)l[2])) - l[text[t]];
        }
    }
    for (int i = 0; i < 100000; i++) {
        double t = 1e-3 + (1 - 1e-3) * (i + 0.5) / 100000;
        for (int n = 1; n <= TINY; n++) exact += pow(t, n) * pow(1 - t, TINY - n) / t * by_count[n] / TINY / 100000;
    }
    uint16_t tokens[TINY] = {2, 0, 1};
    Shard shard = {tokens, TINY};
    Data data = {&shard, 1, TINY, 1, -1};
    int rows = FEWER(FEWER(38400));
    for (int time = 0; time < 2; time++) {
        Loops l = {2, 0, 0};
        Evaluation e = evaluate(&m, &data, l, time, rows, STATES, 3, NULL);
        check("NELBO against all masks, standard errors", fabs(e.nelbo - exact) / e.error, TOLERANCE(4, 8), "t %s: %.4f +- %.4f, exact %.4f", time ? "bell-shaped" : "uniform", e.nelbo, e.error, exact);
        check("NELBO's standard error, relative", e.error / exact, 0.025 * sqrt(38400.0 / rows), "t %s", time ? "bell-shaped" : "uniform");
    }
    model_free(&m);
}

// Adaptive loops: with tau = 0 as many as fixed, and rows that stop early do not change the others.
static void check_adaptive(void) {
    enum { B = 6, T = 24, S = 9 };
    Config c = small_config(1, 3);
    Model m;
    model_build(&m, c);
    model_reserve(&m, B, T, 1, 0, 0);
    float *params = ARRAY(m.params.total), *fixed = ARRAY(B * T * c.channels), *state = ARRAY(B * T * c.channels);
    init_parameters(params, c, 3);
    model_set_parameters(&m, params);
    int x[B * T], used[B], one[1], row = T * c.channels;
    for (int i = 0; i < B * T; i++) x[i] = random_uniform(5, 1, 0, i) < i / T / (B - 1.0) ? c.vocab_size : (int)(random_bits(5, 2, 0, i) % 50); // ever more masks
    Loops l = {S, 0, 0};
    model_tokens(&m, x, B, T);
    model_forward(&m, S);
    to_host(fixed, m.states, B * row * sizeof(float));
    adaptive_forward(&m, l, used);
    to_host(state, m.states, B * row * sizeof(float));
    check("tau = 0 equals fixed loops", largest_difference(state, fixed, B * row), 0, "%d loops", S);
    for (int second = 0; second < 2; second++) {
        double different = 0, tau = second ? 0.03 : 0.1;
        int fewest = S, most = 0;
        l.second = second;
        for (; fewest == most || fewest == S; tau *= 1.1) { // until rows differ
            if (tau > 10) break;
            l.tau = tau, fewest = S, most = 0;
            model_tokens(&m, x, B, T);
            adaptive_forward(&m, l, used);
            for (int b = 0; b < B; b++) fewest = min_int(fewest, used[b]), most = max_int(most, used[b]);
        }
        to_host(state, m.states, B * row * sizeof(float));
        for (int b = 0; b < B; b++) {
            model_tokens(&m, x + b * T, 1, T);
            adaptive_forward(&m, l, one);
            to_host(fixed, m.states, row * sizeof(float));
            different = worse(different, largest_difference(fixed, state + b * row, row) + abs(one[0] - used[b]));
            model_tokens(&m, x + b * T, 1, T); // and as many loops, but fixed: only the tail's passes have another number
            model_forward(&m, used[b]);
            to_host(fixed, m.states, row * sizeof(float));
            different = worse(different, largest_difference(fixed, state + b * row, row));
        }
        check("adaptive: rows alone, and fixed, differ", different, 0, "%s, %d to %d loops", second ? "second" : "change", fewest, most);
        check("adaptive: rows differ in loops", fewest == most, 0, "%s", second ? "second" : "change");
    }
    free(params), free(fixed), free(state);
    model_free(&m);
}

#ifndef TEST_CUDA
// The count of operations is that of the matrix products made, where T is a multiple of a vector: attention works on whole vectors of queries.
static void check_flops(void) {
    Config c = small_config(1, 3);
    int T = c.max_seq_len = 32;
    for (int recompute = 0; recompute < 2; recompute++) {
        Model m;
        model_build(&m, c);
        model_reserve(&m, 4, T, 5, 1, recompute);
        set_batch(&m, 0, 0, 4, 4);
        double before = (double)gemm_flops;
        model_forward(&m, 3);
        double forward = (double)gemm_flops - before, want = pass_flops(c, T, num_passes(c, 3)) * 4 * T;
        check("FLOPs of a forward, relative", fabs(forward / want - 1), 1e-12, "%.0f", want);
        before = (double)gemm_flops - forward;
        model_loss(&m, 1);
        want = training_flops(c, T, 3, m.R / (4.0 * T), recompute) * 4 * T;
        check("FLOPs of a training step, relative", fabs(((double)gemm_flops - before) / want - 1), 1e-12, "recompute %d: %.0f", recompute, want);
        model_free(&m);
    }
}
#endif

// A tokenizer of the 256 bytes, some merges in the order they were learned, and end-of-text.
static void write_tokenizer(const char *path, int version, int declared) {
    static const char *const merges[] = {" t", "he", " the", "in", "an", " a", "er", "aa", "aaa", "\n\n", "\xc3\xa9"};
    enum { MERGES = sizeof merges / sizeof *merges };
    uint32_t header[HEADER_INTS] = {TOKENIZER_MAGIC, (uint32_t)version, (uint32_t)declared, 256 + MERGES};
    unsigned char body[4096];
    size_t n = 0;
    for (int b = 0; b < 256; b++) body[n++] = 1, body[n++] = (unsigned char)b;
    for (int i = 0; i <= MERGES; i++) {
        const char *s = i < MERGES ? merges[i] : "<|endoftext|>";
        body[n++] = (unsigned char)strlen(s);
        memcpy(body + n, s, strlen(s)), n += strlen(s);
    }
    const Part parts[] = {{header, sizeof header}, {body, n}};
    write_file(path, parts, 2);
}
enum { TEST_VOCAB = 256 + 11 + 1 };

static double encodes_to(const Tokenizer *t, const char *text, const char *want) { // tokens separated by |
    int ids[256], n = (int)tokenizer_encode(t, ids, text, strlen(text), "test");
    char got[1024] = "";
    for (int i = 0; i < n; i++) snprintf(got + strlen(got), sizeof got - strlen(got), "%s%.*s", i ? "|" : "", t->length[ids[i]], (const char *)t->bytes[ids[i]]);
    if (strcmp(got, want)) printf("      '%s' was encoded as '%s', not '%s'\n", text, got, want);
    return strcmp(got, want) != 0;
}

static void check_tokenizer(const char *folder) {
    char *path = join_path(folder, "test.tok");
    write_tokenizer(path, 2, TEST_VOCAB);
    Tokenizer t = tokenizer_open(path);
    check("encoding", encodes_to(&t, "the theatre", "t|he| the|a|t|r|e"), 0, "lowest id first"); // "the" is no token, " the" is
    check("encoding", encodes_to(&t, "aaaaa in", "aa|aaa| |in"), 0, "left to right");
    check("encoding", encodes_to(&t, "it's  an\n\n\nox", "i|t|'|s| | |an|\n\n|\n|o|x"), 0, "pieces: contraction, spaces, lines");
    check("encoding", encodes_to(&t, "in<|endoftext|>an", "in|<|endoftext|>|an"), 0, "end of text");
    double wrong = 0;
    for (int k = 0; k < 300; k++) { // any bytes: random ones, and ones with many merges, letters and broken UTF-8
        unsigned char text[700];
        int n = k * 2 + 1, ids[701];
        for (int i = 0; i < n; i++) text[i] = (unsigned char)(k % 2 ? random_bits(1, 0, k, i) : (unsigned char)" athein\n\xc3\xa9\xe2\x80\x9d\xf0\x9f\x98\x80'"[random_bits(1, 0, k, i) % 18]);
        ids[0] = t.eot;
        char *back = decode(&t, ids, 1 + (int)tokenizer_encode(&t, ids + 1, (const char *)text, n, "test"));
        wrong += memcmp(back, text, n) || back[n];
        free(back);
    }
    check("decode(encode(x)) = x, that differ", wrong, 0, "300 strings of any bytes");
    size_t n = 1 << 20; // one piece of a million letters must not take forever
    char *long_text = (char *)allocate(n, 1, "a long text");
    int *ids = (int *)allocate(n, sizeof(int), "a long text");
    memset(long_text, 'a', n);
    check("a word of a million letters", fabs((double)tokenizer_encode(&t, ids, long_text, n, "test") - (n / 4 + n / 4)), 1, "tokens");
    int x[32];
    check("template: masks", encode_template(&t, x, 999, "a ____ in ________.") != 7 || x[1] != 999 || x[4] != 999 || x[5] != 999, 0, "one blank, two blanks");
    uint16_t row[6];
    tokenizer_encode(&t, x, "<|endoftext|>aaaaa<|endoftext|><|endoftext|><|endoftext|>", 57, "test");
    for (int i = 0; i < 6; i++) row[i] = (uint16_t)x[i];
    Shard shard = {row, 6};
    Data data = {&shard, 1, 6, 6, -1};
    check("tokens per byte", fabs(tokens_per_byte(&data, &t, 1, 6) - 6. / 7), 1e-12, "end-of-text that fills up a row is no byte");
    free(long_text), free(ids), free(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Through the command line

static const char *program;

// Runs the program with these arguments through the shell; returns its exit status (128 + signal if killed), what it wrote to standard
// error in err (size 1024) and, unless NULL, to standard output in out.
static int run(char *err, char *out, const char *folder, const char *format, ...) {
    char arguments[4096], command[9000];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    snprintf(command, sizeof command, "%s %s >%s/out 2>%s/err </dev/null", program, arguments, folder, folder);
    int status = system(command);
    const char *names[] = {"err", "out"};
    char *to[] = {err, out};
    for (int i = 0; i < 2; i++) {
        char *path = join_path(folder, names[i]);
        FILE *f = to[i] ? fopen(path, "rb") : NULL;
        if (f) to[i][fread(to[i], 1, 1023, f)] = 0, fclose(f);
        free(path);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// The program must end with this status and say, in one line, something that has this word in it.
static void expect_error(const char *folder, int want, const char *word, const char *format, ...) {
    char arguments[4096], err[1024] = "", *newline;
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    int status = run(err, NULL, folder, "%s", arguments);
    newline = strchr(err, '\n');
    int bad = status != want || strncmp(err, "loopmdm: ", 9) || !newline || newline[1] || !strstr(err, word);
    if (bad) printf("      status %d, not %d; wanted '%s' in one line, got: %s\n", status, want, word, err);
    check("one clear line and status", bad, 0, "%d: %s", want, word);
}

static double files_differ(const char *a, const char *b) {
    FILE *f = fopen(a, "rb"), *g = fopen(b, "rb");
    double different = !f || !g;
    for (int c = 0, d; !different && c != EOF;) c = getc(f), d = getc(g), different = c != d;
    if (f) fclose(f);
    if (g) fclose(g);
    return different;
}

static void edit_file(const char *from, const char *to, long at, int value, long keep) { // copies, changes a byte, cuts to keep bytes (-1: all)
    FILE *f = fopen(from, "rb"), *g = fopen(to, "wb");
    if (!f || !g) die(FAILED, "cannot copy %s to %s", from, to);
    long i = 0;
    for (int c; (c = getc(f)) != EOF && (keep < 0 || i < keep); i++) putc(i == at ? (value < 0 ? c ^ 1 : value) : c, g);
    fclose(f), fclose(g);
}

// Boards, prompts and answers, tables and templates, through the command line. A model that has learned one board, or one answer, by heart
// must get it right.
static void check_tasks(const char *d) {
    static const char tokenizer[] = "." "1234" "?" "#" " "; // ids 0 to 7, then end-of-text and the separator
    char err[1024], out[1024], path[1200], fixed[2400];
    unsigned char bytes[64];
    int n = 0, header[HEADER_INTS] = {TOKENIZER_MAGIC, 2, 10, 8};
    for (int i = 0; i < 8; i++) bytes[n++] = 1, bytes[n++] = (unsigned char)tokenizer[i];
    bytes[n++] = 13, memcpy(bytes + n, "<|endoftext|>", 13), n += 13;
    bytes[n++] = 7, memcpy(bytes + n, "<|sep|>", 7), n += 7;
    const Part parts[] = {{header, sizeof header}, {bytes, (size_t)n}};
    snprintf(path, sizeof path, "%s/board.tok", d);
    write_file(path, parts, 2);
    int board[48] = {0, 2, 3, 4, 0, 4, 1, 2, 2, 0, 4, 3, 4, 3, 2, 0, 1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1}; // a puzzle, its solution
    snprintf(path, sizeof path, "%s/board.bin", d);
    write_shard(path, board + 16, 16);
    snprintf(path, sizeof path, "%s/puzzle.bin", d);
    write_shard(path, board, 32);
    snprintf(fixed, sizeof fixed, "--tokenizer %s/board.tok --model d2 --layers 3 --loop 1:2 --batch 4 --warmup 2 --lr 1e-2 --steps 120", d);
    check("train on boards, exit status", run(err, out, d, "train %s --data %s/board.bin --fixed-rows --seq-len 16 --out %s/boards", fixed, d, d), 0, "120 steps");
    check("eval --sudoku, exit status", run(err, out, d, "eval --model %s/boards --data %s/puzzle.bin --sudoku --steps 1,3 --loops 2", d, d), 0, "");
    check("a board known by heart is solved", !strstr(out, "100.00 %"), 0, "4 x 4");
    check("sample --puzzle, exit status", run(err, out, d, "sample --model %s/boards --puzzle '.234 .412 2.43 432.' --temperature 0 --watch --show-loops", d), 0, "");
    check("a board is drawn", !strstr(out, "1 2 | 3 4\n3 4 | 1 2\n---------\n2 1 | 4 3\n4 3 | 2 1\n") || !strstr(out, "  0, loop  4 | 1234 3412 2143 4321\n"), 0, "as a grid, and in a line for each loop");
    check("a report of what it took", !strstr(err, "forwards") || !strstr(err, "GFLOP"), 0, "on the standard error");

    // question "2 2 ?" with the answer "# 4", and one for which it is wrong
    int row[32] = {8, 2, 7, 2, 5, 9, 6, 7, 4, 8, 8, 8, 8, 8, 8, 8};
    memcpy(row + 16, row, 16 * sizeof(int));
    row[16 + 8] = 3;
    snprintf(path, sizeof path, "%s/answer.bin", d);
    write_shard(path, row, 16);
    snprintf(path, sizeof path, "%s/answers.bin", d);
    write_shard(path, row, 32);
    check("train on answers, exit status", run(err, out, d, "train %s --data %s/answer.bin --answers-after '<|sep|>' --seq-len 16 --init %s/boards --out %s/answering", fixed, d, d, d), 0, "120 steps from --init");
    check("eval --exact-match, exit status", run(err, out, d, "eval --model %s/answering --data %s/answers.bin --answers-after '<|sep|>' --exact-match --steps 2 --loops 4", d, d), 0, "");
    check("an answer known by heart is right", !strstr(out, " 50.00 %"), 0, "one of two");
    row[16 + 8] = 8;
    snprintf(path, sizeof path, "%s/no_answer.bin", d);
    write_shard(path, row, 32);
    expect_error(d, 1, "row 1 has no number", "eval --model %s/answering --data %s/no_answer.bin --answers-after '<|sep|>' --exact-match", d, d);
    snprintf(path, sizeof path, "printf '2 2?<|sep|># 4<|endoftext|>\\n12341234123412341<|endoftext|>' >%s/rows.txt", d);
    check("tokenize --rows-of", system(path) || run(err, out, d, "tokenize --tokenizer %s/board.tok --input %s/rows.txt --output %s/rows.bin --rows-of 16", d, d, d), 0, "exit status");
    snprintf(path, sizeof path, "%s/rows.bin", d);
    Data rows = data_open(path, 10, 16);
    double different = rows.total != 16;
    for (int i = 0; i < 16 && rows.total >= 16; i++) different += rows.shards[0].tokens[i] != row[i];
    check("tokenize --rows-of, tokens that differ", different, 0, "one row; one is too long");

    // tables: attention's shares add up to 1; there is a line for each loop and noise level
    check("attention, exit status", run(err, out, d, "attention --model %s/whole --data %s/data.bin --rows 8 --buckets 4 --csv %s/attention.csv", d, d, d), 0, "");
    snprintf(path, sizeof path, "awk -F, 'NR > 1 {d = $8 + $9 - 1; if (d > 1e-5 || d < -1e-5 || $7 && !($10 > 0 && $10 <= 1)) bad = 1} END {exit bad || NR != 1 + 6 * 2 * 4}' %s/attention.csv", d);
    check("attention's shares add up to 1", system(path), 0, "6 passes, 2 heads, 4 noise levels");
    check("eval --by-t, exit status", run(err, out, d, "eval --model %s/whole --data %s/data.bin --rows 64 --loops 1,3 --buckets 5 --by-t %s/by_t.csv", d, d, d), 0, "");
    check("eval --by-loop, exit status", run(err, out, d, "eval --model %s/whole --data %s/data.bin --rows 8 --loops 7 --by-loop %s/by_loop.csv", d, d, d), 0, "");
    snprintf(path, sizeof path, "awk 'END {exit NR != 11}' %s/by_t.csv && awk -F, 'NR > 2 && !($2 > 0 && $3 > 0) {bad = 1} END {exit bad || NR != 9}' %s/by_loop.csv", d, d);
    check("tables by noise level and by loop", system(path), 0, "2 x 5 and 8 lines");
    check("eval --adaptive, exit status", run(err, out, d, "eval --model %s/whole --data %s/data.bin --rows 8 --adaptive 0,1000 --max-loops 3", d, d), 0, "");
    check("eval --adaptive", !strstr(out, "     0   3.00") || !strstr(out, "  1000   1.00"), 0, "tau = 0: 3 loops; 1000: one");
    snprintf(path, sizeof path, "printf 'the ____ an\\na ____ ____ in\\n' >%s/templates", d);
    check("sample --fill-file, exit status", system(path) || run(err, out, d, "sample --model %s/whole --fill-file %s/templates -n 2 --order margin --block 2 --remask 0.2 --top-k 5 --top-p 0.9 --adaptive 0.1", d, d), 0, "");
    check("sample --fill-file", strncmp(out, "the", 3) || !strstr(out, " an\n\nthe") || !strstr(err, "loops in each step"), 0, "two texts for each of two templates");

    expect_error(d, 2, "exclude", "sample --model %s/whole --prompt a --puzzle 1", d);
    expect_error(d, 2, "16", "sample --model %s/boards --puzzle 1.", d);
    expect_error(d, 2, "vocabulary", "sample --model %s/boards --puzzle 'x23434122143432.'", d);
    expect_error(d, 2, "no blank", "sample --model %s/boards --puzzle 1234341221434321", d);
    expect_error(d, 2, "one step at least", "sample --model %s/whole --steps 3 --block 2", d);
    expect_error(d, 2, "schedule", "sample --model %s/whole --order threshold --remask 0.1", d);
    expect_error(d, 2, "at most 1", "sample --model %s/whole --top-p 1.5", d);
    expect_error(d, 2, "--adaptive takes", "sample --model %s/whole --adaptive 0.1,0.2", d);
    expect_error(d, 2, "--adaptive takes", "eval --model %s/whole --data %s/data.bin --adaptive 0.1,x", d, d);
    expect_error(d, 2, "excludes --loops", "eval --model %s/whole --data %s/data.bin --adaptive 0.1 --loops 2", d, d);
    expect_error(d, 2, "no effect without --adaptive", "eval --model %s/whole --data %s/data.bin --max-loops 2", d, d);
    expect_error(d, 2, "no effect without --sudoku", "eval --model %s/whole --data %s/data.bin --order random", d, d);
    expect_error(d, 2, "no effect without --by-t", "eval --model %s/whole --data %s/data.bin --buckets 5", d, d);
    expect_error(d, 2, "no effect without --order threshold", "sample --model %s/whole --threshold 0.5", d);
    expect_error(d, 2, "--criterion", "eval --model %s/whole --data %s/data.bin --adaptive 0.1 --criterion third", d, d);
    expect_error(d, 2, "--time", "train --data %s/data.bin --vocab 300 --time noon --out %s/no", d, d);
    expect_error(d, 2, "below 1", "train --data %s/data.bin --vocab 300 --ema 1 --out %s/no", d, d);
    expect_error(d, 2, "--var-length", "train %s --data %s/board.bin --fixed-rows --seq-len 16 --var-length 0.1 --out %s/no", fixed, d, d);
    expect_error(d, 1, "are not rows of", "train %s --data %s/board.bin --fixed-rows --seq-len 15 --out %s/no", fixed, d, d);
    expect_error(d, 1, "row 0 has no", "train %s --data %s/board.bin --answers-after '<|sep|>' --seq-len 16 --out %s/no", fixed, d, d);
    expect_error(d, 2, "is no token", "train %s --data %s/answer.bin --answers-after 'so:' --seq-len 16 --out %s/no", fixed, d, d);
    expect_error(d, 2, "another shape", "train %s --data %s/board.bin --seq-len 15 --init %s/boards --out %s/no", fixed, d, d, d);
    expect_error(d, 1, "no puzzle", "eval --model %s/boards --data %s/answers.bin --sudoku", d, d);
    expect_error(d, 2, "--answers-after", "eval --model %s/boards --data %s/answers.bin --exact-match", d, d);
    expect_error(d, 1, "cannot write", "eval --model %s/whole --data %s/data.bin --rows 8 --by-t %s/nowhere/x.csv", d, d, d);
    expect_error(d, 1, "cannot write", "eval --model %s/whole --data %s/data.bin --by-loop %s/nowhere/x.csv", d, d, d);
    expect_error(d, 2, "would overwrite --model", "eval --model %s/whole --data %s/data.bin --rows 8 --by-loop %s/whole/model.bin", d, d, d);
    expect_error(d, 2, "would overwrite --data", "attention --model %s/whole --data %s/data.bin --rows 8 --csv %s/data.bin", d, d, d);
    expect_error(d, 2, "no effect without a schedule", "sample --model %s/whole --order threshold --steps 4", d);
    expect_error(d, 2, "no effect without --temperature", "sample --model %s/whole --temperature 0 --top-k 4", d);
    expect_error(d, 2, "no effect without --watch", "sample --model %s/whole --show-loops", d);
    expect_error(d, 1, "no story fits", "tokenize --tokenizer %s/board.tok --input %s/rows.txt --output %s/rows2.bin --rows-of 3", d, d, d);
    expect_error(d, 1, "cannot read", "sample --model %s/whole --fill-file %s/nothing", d, d);
}

static void check_command_line(const char *d) {
    char err[1024], out[1024], text[1200], base[1200], path[2][1200];
    int tokens[4000];
    for (int i = 0; i < 4000; i++) tokens[i] = i % 50 ? 97 + (int)(random_bits(1, 0, 0, i) % 20) : TEST_VOCAB - 1;
    snprintf(text, sizeof text, "%s/data.bin", d);
    write_shard(text, tokens, 4000);
    snprintf(text, sizeof text, "%s/data2.bin", d);
    write_shard(text, tokens, 1000);
    snprintf(text, sizeof text, "%s/test.tok", d);
    write_tokenizer(text, 2, TEST_VOCAB);
#define TRAIN_FLAGS "--tokenizer %s/test.tok --model d2 --layers 3 --loop 1:2 --batch 2 --warmup 2"
    snprintf(base, sizeof base, "--data '%s/data*.bin' " TRAIN_FLAGS, d, d);

    // an unbroken run; one killed after its checkpoint at step 20; one interrupted by Ctrl-C: all the same, bit for bit
    char long_run[1200];
    snprintf(long_run, sizeof long_run, "%s --steps 40 --save-every 20 --accum 2 --val-data %s/data2.bin --val-every 10 --val-rows 8 --ema 0.9 --time bell --var-length 0.3",
             SLOW ? "--channels 48 --seq-len 32 --batch 4" : "--channels 64 --seq-len 64 --batch 8", d);
    check("train, exit status", run(err, out, d, "train %s %s --out %s/whole", base, long_run, d), 0, "40 steps");
    for (int how = 0; how < 2; how++) {
        const char *name = how ? "interrupted" : "killed";
        pid_t child = fork();
        if (child == 0) {
            char command[8192];
            snprintf(command, sizeof command, "exec %s train %s %s --out %s/%s >/dev/null 2>&1", program, base, long_run, d, name);
            execl("/bin/sh", "sh", "-c", command, (char *)NULL);
            _exit(127);
        }
        snprintf(path[0], sizeof path[0], "%s/%s/%s", d, name, how ? "log.csv" : "model.bin");
        int status = 0, ended = 0;
        while (!ended && access(path[0], F_OK)) usleep(200), ended = waitpid(child, &status, WNOHANG) == child;
        kill(child, how ? SIGINT : SIGKILL);
        if (!ended) waitpid(child, &status, 0);
        snprintf(path[1], sizeof path[1], "%s/%s/model.bin", d, name);
        int step = peek_step(path[1], MODEL_MAGIC);
        check("stopped before its end", !(step >= 1 && step < 40), 0, "%s at step %d", name, step);
        if (!how) {
            char *copy = join_path(d, "step20.bin"), torn[1200];
            edit_file(path[1], copy, -1, 0, -1);
            free(copy);
            snprintf(torn, sizeof torn, "printf 1 >>%s/killed/log.csv", d);
            check("tear", system(torn), 0, "the log's last line");
        }
        if (how) check("Ctrl-C, exit status", !(WIFEXITED(status) && WEXITSTATUS(status) == 130), 0, "130");
        check("resume, exit status", run(err, out, d, "train %s %s --out %s/%s --resume", base, long_run, d, name), 0, "%s", name);
        static const char *const files[] = {"model.bin", "optimizer.bin", "ema.bin"};
        for (int k = 0; k < 3; k++) {
            snprintf(path[0], sizeof path[0], "%s/whole/%s", d, files[k]);
            snprintf(path[1], sizeof path[1], "%s/%s/%s", d, name, files[k]);
            check("resumed equals unbroken, bytes", files_differ(path[0], path[1]), 0, "%s: %s", name, files[k]);
        }
        char logs[2][1200];
        snprintf(logs[0], sizeof logs[0], "cut -d, -f1-6,8- %s/whole/log.csv >%s/log1; cut -d, -f1-6,8- %s/%s/log.csv | cmp -s - %s/log1", d, d, d, name, d);
        check("resumed equals unbroken, log.csv", system(logs[0]) != 0, 0, "%s: all but the speed", name);
    }

#if defined(__SSE__) && !defined(TEST_CUDA)
    // biases begin at zero; their first step, of half of --lr in a warmup of two, leaves them subnormal unless the program flushes such numbers. This
    // program, which flushes them too, can tell them by their bits alone
    check("train, exit status", run(err, out, d, "train %s --channels 64 --seq-len 64 --steps 1 --lr 2e-42 --out %s/still", base, d), 0, "--lr 2e-42");
    snprintf(path[0], sizeof path[0], "%s/still/model.bin", d);
    size_t size, subnormal = 0;
    const unsigned char *file = map_file(path[0], MODEL_MAGIC, "model", &size);
    for (size_t i = HEADER_INTS * sizeof(int); i < size; i += sizeof(float)) {
        uint32_t bits;
        memcpy(&bits, file + i, sizeof bits);
        subnormal += !(bits & 0x7f800000) && bits & 0x7fffff;
    }
    munmap((void *)file, size);
    check("subnormal numbers are zero", subnormal, 0, "parameters after a step of 1e-42");
#endif

    // a writer stopped after the first of its three renames
    snprintf(path[0], sizeof path[0], "cp -r %s/whole %s/between && cd %s/between && mv model.bin model.bin.tmp && mv ema.bin ema.bin.tmp && cp %s/step20.bin model.bin", d, d, d, d);
    check("copy", system(path[0]), 0, "a checkpoint");
    check("recovers an unfinished checkpoint", run(err, out, d, "train %s %s --out %s/between --resume", base, long_run, d), 0, "model of step 40 still in model.bin.tmp");
    snprintf(path[0], sizeof path[0], "%s/whole/model.bin", d);
    snprintf(path[1], sizeof path[1], "%s/between/model.bin", d);
    check("recovers an unfinished checkpoint", files_differ(path[0], path[1]), 0, "bytes of model.bin");

    // commands that must work
    check("eval, exit status", run(err, out, d, "eval --model %s/whole --data %s/data2.bin --rows 20 --loops 1,4,16", d, d), 0, "loops 16 beyond 4");
    check("sample, exit status", run(err, out, d, "sample --model %s/whole --prompt 'the a' --loops 16 --steps 5 -n 3 --seed 9", d), 0, "loops 16 beyond 4");
    check("sample begins with its prompt", strncmp(out, "the a", 5) != 0, 0, "the a");
    check("sample, exit status", run(err, out, d, "sample --model %s/whole --fill 'a ____ b' --watch --temperature 0 --order random", d), 0, "fill and watch");
    check("sample keeps its template", !strstr(out, "\na") || !strstr(out, " b\n"), 0, "a ____ b");
    for (size_t i = 0; i < NUM_COMMANDS; i++) check("--help, exit status", run(err, out, d, "%s --help", commands[i].name), 0, "%s", commands[i].name);
    check("info, flops, exit status", run(err, out, d, "info --model %s/whole", d) + run(err, out, d, "flops --model d12 --vocab 50257"), 0, "folder and preset");
    snprintf(path[0], sizeof path[0], "printf 'the cat<|endoftext|> an \\n\\n inn<|endoftext|>\\n' >%s/text", d);
    check("write", system(path[0]), 0, "a text");
    check("tokenize, exit status", run(err, out, d, "tokenize --tokenizer %s/test.tok --input %s/text --output %s/text.bin", d, d, d), 0, "two stories");
    static const int want[] = {267, 't', 257, ' ', 'c', 'a', 't', 267, 260, ' ', 265, ' ', 259, 'n'};
    snprintf(path[0], sizeof path[0], "%s/text.bin", d);
    Data shard = data_open(path[0], TEST_VOCAB, 4);
    double wrong = shard.total != 14;
    for (int i = 0; !wrong && i < 14; i++) wrong += shard.shards[0].tokens[i] != want[i];
    check("tokenize, tokens that differ", wrong, 0, "end-of-text first, space dropped");

    // usage
    expect_error(d, 2, "no command", "fly");
    expect_error(d, 2, "--wings", "train --wings 2");
    expect_error(d, 2, "whole number", "train --steps 1.5");
    expect_error(d, 2, "a number", "train --lr fast");
    expect_error(d, 2, "needs a value", "train --steps");
    expect_error(d, 2, "at least 1", "train --batch 0");
    expect_error(d, 2, "--data", "train");
    expect_error(d, 2, "--loops", "eval --model %s/whole --data %s/data.bin --loops 1,x", d, d);
    expect_error(d, 2, "--order", "sample --model %s/whole --order best", d);
    expect_error(d, 2, "exclude", "sample --model %s/whole --prompt a --fill b", d);
    expect_error(d, 2, "exclude", "sample --model %s/whole --fill 'a ____' --length 5", d);
    expect_error(d, 2, "is empty", "train %s --out ''", base);
    expect_error(d, 2, "at most 1024", "train %s --threads 100000 --out %s/no", base, d);
    expect_error(d, 2, "1 to 65535", "info --vocab 2147483647");
    expect_error(d, 2, "two layers", "train %s --loop 4294967297:2 --out %s/no", base, d);
    expect_error(d, 2, "too many rows", "train %s --val-data %s/data2.bin --val-rows 2147483647 --out %s/no", base, d, d);
    expect_error(d, 2, "beyond --steps", "train %s %s --out %s/whole --resume --steps 3", base, long_run, d);
    expect_error(d, 2, "would overwrite --input", "tokenize --tokenizer %s/test.tok --input %s/text --output %s/text", d, d, d);
    expect_error(d, 1, "device or pipe", "tokenize --tokenizer %s/test.tok --input %s/text --output /dev/null", d, d);
    snprintf(path[0], sizeof path[0], "mkfifo %s/pipe", d);
    check("make", system(path[0]), 0, "a pipe");
    expect_error(d, 1, "device or pipe", "eval --model %s/whole --data %s/pipe", d, d);
    expect_error(d, 2, "no blank", "sample --model %s/whole --fill 'no blanks here'", d);
    expect_error(d, 2, "at most", "sample --model %s/whole --length 65", d);
    expect_error(d, 2, "divide", "train %s --heads 5 --out %s/no", base, d);
    expect_error(d, 2, "even", "train %s --channels 6 --heads 2 --out %s/no", base, d);
    expect_error(d, 2, "a <= b", "train %s --loop 2:9 --out %s/no", base, d);
    expect_error(d, 2, "two layers", "train %s --loop 1-2 --out %s/no", base, d);
    expect_error(d, 2, "preset", "flops --model d7");
    expect_error(d, 2, "already there", "train %s %s --out %s/whole", base, long_run, d);
    expect_error(d, 2, "another shape", "train %s --out %s/whole --resume", base, d);
    expect_error(d, 2, "was begun with", "train %s %s --seed 5 --out %s/whole --resume", base, long_run, d);
    expect_error(d, 2, "was begun with --ema", "train %s %s --ema 0 --out %s/whole --resume", base, long_run, d);
    snprintf(path[0], sizeof path[0], "sed s/aaa/aab/ %s/test.tok >%s/other.tok", d, d);
    check("make", system(path[0]), 0, "another tokenizer of the same size");
    expect_error(d, 2, "which is there already: give that one", "train %s %s --tokenizer %s/other.tok --out %s/whole --resume", base, long_run, d, d);
    // a folder that has something already: shards to train on, a log with other columns, another tokenizer
    for (int i = 0; i < 2; i++) {
        snprintf(path[0], sizeof path[0], "mkdir %s/data%d; cp %s/data.bin %s/data%d/%s", d, i, d, d, i, i ? "optimizer.bin" : "ema.bin");
        check("make", system(path[0]), 0, "a folder with data");
        expect_error(d, 2, "would overwrite", "train %s --steps 1 --%s %s/data%d/%s --out %s/data%d", base, i ? "val-data" : "data", d, i, i ? "optimizer.bin" : "ema.bin", d, i);
    }
    expect_error(d, 2, "other columns", "train %s %s --loops 1 --out %s/whole --resume", base, long_run, d);
    snprintf(path[0], sizeof path[0], "mkdir %s/words; cp %s/other.tok %s/words/tokenizer.bin", d, d, d);
    check("make", system(path[0]), 0, "a folder with another tokenizer");
    expect_error(d, 2, "which is there already", "train %s --steps 1 --out %s/words", base, d);
    expect_error(d, 1, "--out: cannot open", "train %s --steps 1 --out %s/test.tok", base, d);
    expect_error(d, 1, "--out: cannot open", "train %s --steps 1 --out %s/nowhere/at/all --resume", base, d);
    expect_error(d, 2, "no effect without --val-data", "train %s --steps 1 --loops 1 --out %s/no", base, d);
    expect_error(d, 2, "would overwrite", "eval --model %s/whole --data %s/data2.bin --by-t %s/whole/log.csv", d, d, d);
    expect_error(d, 2, "ends a text", "eval --model %s/whole --data %s/data2.bin --answers-after '<|endoftext|>'", d, d);
    expect_error(d, 2, "no model takes more", "tokenize --tokenizer %s/test.tok --input %s/test.tok --output %s/no.bin --rows-of 65537", d, d, d);
    check_tasks(d);
    // templates and prompts
    expect_error(d, 1, "are possible", "sample --model %s/whole --fill '____ bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb bbbb'", d);
    expect_error(d, 1, "are possible", "sample --model %s/whole --prompt 'bbbb bbbb bbbb' --length 5", d);
    // files
    static const struct { const char *word, *name; long at; int value; long keep; } damages[] = {
        {"checksum", "model.bin", 2000, -1, -1}, {"checksum", "model.bin", 44, -1, -1}, {"is damaged", "model.bin", -1, 0, 5000},
        {"too short", "model.bin", -1, 0, 0},    {"not a model", "model.bin", 0, 7, -1}, {"version 9", "model.bin", 4, 9, -1},
        {"is damaged", "model.bin", 20, 0, -1},  {"heads", "model.bin", 24, 7, -1},
        {"checksum", "optimizer.bin", 3000, -1, -1}, {"is damaged", "optimizer.bin", -1, 0, 5000}, {"not a pair", "optimizer.bin", 44, 7, -1},
    };
    snprintf(path[0], sizeof path[0], "cp -r %s/whole %s/damaged", d, d);
    check("copy", system(path[0]), 0, "a checkpoint");
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        snprintf(path[0], sizeof path[0], "%s/whole/%s", d, damages[i].name);
        snprintf(path[1], sizeof path[1], "%s/damaged/%s", d, damages[i].name);
        edit_file(path[0], path[1], damages[i].at, damages[i].value, damages[i].keep);
        if (*damages[i].name == 'm') expect_error(d, 1, damages[i].word, "eval --model %s/damaged --data %s/data.bin", d, d);
        else expect_error(d, 1, i + 1 < sizeof damages / sizeof *damages ? damages[i].word : "checksum", "train %s %s --out %s/damaged --resume", base, long_run, d);
        edit_file(path[0], path[1], -1, 0, -1);
    }
    expect_error(d, 1, "No such file", "eval --model %s/nowhere --data %s/data.bin", d, d);
    expect_error(d, 1, "no file matches", "eval --model %s/whole --data %s/nothing.bin", d, d);
    expect_error(d, 1, "No such file", "train --data %s/data.bin --tokenizer %s/nothing.tok --out %s/no", d, d, d);
    expect_error(d, 1, "not a token shard", "eval --model %s/whole --data %s/test.tok", d, d);
    expect_error(d, 1, "is a folder", "eval --model %s/whole --data %s", d, d);
    snprintf(text, sizeof text, "%s/data.bin", d);
    static const struct { const char *word; long at; int value; long keep; } shards[] = {
        {"too short", -1, 0, 0}, {"its size", -1, 0, 4001}, {"version 2", 4, 2, -1}, {"outside the vocabulary", 1025, 200, -1}, {"its header", 11, 255, -1},
    };
    snprintf(path[0], sizeof path[0], "%s/bad.bin", d);
    for (size_t i = 0; i < sizeof shards / sizeof *shards; i++) {
        edit_file(text, path[0], shards[i].at, shards[i].value, shards[i].keep);
        expect_error(d, 1, shards[i].word, "eval --model %s/whole --data %s/bad.bin", d, d);
    }
    write_shard(path[0], tokens, 20);
    expect_error(d, 1, "too short", "eval --model %s/whole --data %s/bad.bin", d, d);
    snprintf(path[0], sizeof path[0], "%s/other.tok", d);
    write_tokenizer(path[0], 2, TEST_VOCAB + 1);
    expect_error(d, 1, "ends at token", "tokenize --tokenizer %s/other.tok --text a", d);
    write_tokenizer(path[0], 3, TEST_VOCAB);
    expect_error(d, 1, "version 3", "tokenize --tokenizer %s/other.tok --text a", d);
    write_tokenizer(path[0], 2, TEST_VOCAB - 1);
    expect_error(d, 1, "not in its vocabulary", "tokenize --tokenizer %s/other.tok --text a", d);
    char *short_tokenizer = join_path(d, "short.tok");
    uint32_t header[HEADER_INTS] = {TOKENIZER_MAGIC, 2, 3, 2};
    const Part parts[] = {{header, sizeof header}, {"\1a\1b\0", 5}};
    write_file(short_tokenizer, parts, 2);
    expect_error(d, 1, "do not belong together", "sample --model %s/whole --tokenizer %s", d, short_tokenizer);
    expect_error(d, 1, "no token for the byte", "tokenize --tokenizer %s --text abc", short_tokenizer);
    expect_error(d, 1, "outside the vocabulary", "train --data %s/data.bin --tokenizer %s --out %s/no", d, short_tokenizer, d);
    free(short_tokenizer);

    // no space: a limit on file size stands for a full disk. The checkpoint before it must stay as it was.
    check("train, exit status", run(err, out, d, "train %s --steps 3 --out %s/small", base, d), 0, "3 steps");
    snprintf(path[0], sizeof path[0], "cp %s/small/model.bin %s/small.bin && cp %s/small/optimizer.bin %s/small.opt", d, d, d, d);
    check("copy", system(path[0]), 0, "a checkpoint");
    const char *whole_program = program;
    char limited[2000];
    snprintf(limited, sizeof limited, "ulimit -f 60; %s", program);
    program = limited;
    expect_error(d, 1, "cannot write", "train %s --steps 6 --out %s/small --resume", base, d);
    program = whole_program;
    for (int k = 0; k < 2; k++) {
        snprintf(path[0], sizeof path[0], "%s/small/%s", d, k ? "optimizer.bin" : "model.bin");
        snprintf(path[1], sizeof path[1], "%s/small.%s", d, k ? "opt" : "bin");
        check("no space: the old checkpoint stays", files_differ(path[0], path[1]), 0, "%s", k ? "optimizer.bin" : "model.bin");
    }
    expect_error(d, 1, "cannot", "train %s --steps 3 --out /dev/null/run", base);

    // a loss that is not finite stops training and names the last good checkpoint
    expect_error(d, 1, "last good checkpoint is step 3", "train %s --steps 200 --lr 1e30 --clip 1e30 --warmup 0 --save-every 1 --out %s/small --resume", base, d);
    check("sample after that, exit status", run(err, out, d, "sample --model %s/small", d), 0, "the checkpoint still works");
}

// Shapes that reach every kernel's every barrier: heads of 20, 48, 64 and 128; rows that are no multiple of 16 bytes; several tiles each way.
static void print_digest(void) {
    static const Config configs[] = {
        {65, 300, 320, 2, 3, 60, 1, 2, 4}, {130, 703, 704, 1, 2, 96, 0, 1, 4}, {65, 300, 320, 1, 2, 128, 0, 1, 4}, {65, 300, 320, 1, 1, 128, 0, 1, 4},
    };
    uint32_t crc = 0;
    for (int k = 0; k < 4; k++) {
        Model m;
        int T = configs[k].max_seq_len, x[2 * 130];
        build_small(&m, configs[k], 2);
        set_batch(&m, 0, 0, 2, 2);
        double loss = forward_loss(&m, k ? 1 : 2, 1), norm = gradient_norm(&m);
        AdamW adamw = {1e-3, 1, 0.9, 0.95, 1e-8, 0.1, 1, 0};
        model_update(&m, adamw, norm, 1);
        crc = crc32_update(crc32_update(crc, &loss, sizeof loss), &norm, sizeof norm);
        float *params = ARRAY(m.params.total);
        tensors_read(params, &m.params);
        crc = crc32_update(crc, params, m.params.total * sizeof(float));
        for (int i = 0; i < 2 * T; i++) x[i] = configs[k].vocab_size;
        SampleOptions o = {2, k % 2, 0, 0, 0, {1, 0, 0}, {0.7, 20, 0.9, SCORE_PROBABILITY, 1}};
        sample(&m, x, 2, T, o, 0, NULL, NULL, NULL);
        crc = crc32_update(crc, x, 2 * T * sizeof(int));
        free(params);
        model_free(&m);
    }
    printf("digest %08x\n", crc);
}

static int report(void) { // the exit status
    printf("\n%-38s checks  largest error  tolerance\n", "");
    for (int k = 0; kinds[k].kind; k++)
        if (kinds[k].tolerance > 0 || kinds[k].error > 0) printf("%-38s %6d  %13.1e  %9.0e\n", kinds[k].kind, kinds[k].count, kinds[k].error, kinds[k].tolerance);
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

int main(int argc, char **argv) {
    char folder[] = "/tmp/test_loopmdm.XXXXXX", command[64];
    if (argc < 2) die(USAGE, "usage: test_loopmdm PROGRAM [REFERENCE FILE...], or test_loopmdm --digest, --layers or --out-of-bounds");
    program = argv[1];
    flush_subnormals();
    if (!strcmp(program, "--digest")) {
        print_digest();
        return 0;
    }
    if (!strcmp(program, "--out-of-bounds")) {
        float values[9 * 6];
        float *inp = random_floats(values, 8 * 6, 1), *weight = random_floats(values, 6, 1), *mean = random_floats(values, 9, 1), *rstd = random_floats(values, 9, 1);
        layernorm_forward(random_x(values, 9 * 6, 1), mean, rstd, inp, weight, weight, 9, 6); // inp has 8 rows
        return 0;
    }
    if (!strcmp(program, "--layers")) {
        check_layers();
        return report();
    }
    if (!mkdtemp(folder)) die(FAILED, "cannot make a folder in /tmp: %s", strerror(errno));
    for (int i = 2; i < argc; i++) check_reference(argv[i], folder);
#ifndef TEST_CUDA
    check_arithmetic();
#endif
    check_layers();
    check_model();
    check_threads();
    check_sampler();
    check_posterior();
    check_adaptive();
#ifndef TEST_CUDA
    check_flops();
#endif
    check_tokenizer(folder);
    check_command_line(folder);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command)) printf("could not remove %s\n", folder);
    return report();
}
