/*
Checks loopmdm.c: against PyTorch's results in reference files, by properties that need none, and through the command line.

    test_loopmdm PROGRAM FILE...     PROGRAM is the loopmdm to run, FILEs are reference files (dev/reference/README.md)

Every check prints a line with its error and its tolerance; an exact check has tolerance 0. At the end: a table of the largest error
of each kind, and "N passed, N failed". Exit status 1 if any failed. See README, "How it is verified".
*/
#define main loopmdm_main
#include "loopmdm.c"
#undef main
#include <sys/wait.h>

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

static double largest_difference(const float *a, const float *b, size_t n) { // NaN if there is one
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= largest)) largest = d;
    }
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

typedef struct { char name[32]; int type, dims, size[4]; const void *data; size_t count; } DumpTensor;
typedef struct { const unsigned char *file; size_t bytes; DumpTensor *tensors; int n; } Dump;

static Dump dump_open(const char *path) {
    Dump d;
    d.file = map_file(path, 20260527, "reference file", &d.bytes);
    d.n = ((const int *)d.file)[2];
    d.tensors = (DumpTensor *)allocate(d.n, sizeof *d.tensors, "the reference");
    size_t at = 1024;
    for (int i = 0; i < d.n; i++) {
        DumpTensor *t = &d.tensors[i];
        memcpy(t, d.file + at, 56); // name, type, number of dimensions, four sizes
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

static void write_shard(const char *path, const int *tokens, int n) {
    int header[HEADER_INTS] = {SHARD_MAGIC, 1, n};
    uint16_t *t = (uint16_t *)allocate(n, 2, "a shard");
    for (int i = 0; i < n; i++) t[i] = (uint16_t)tokens[i];
    const Part parts[] = {{header, sizeof header}, {t, 2 * (size_t)n}};
    write_file(path, parts, 2);
    free(t);
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
    const int *targets = ints(&d, "targets");
    Shape shapes[NUM_TENSORS];
    tensor_shapes(c, shapes);
    Model m;
    model_build(&m, c);
    model_reserve(&m, B, c.max_seq_len, c.max_loops, 1);
    init_parameters(&m.params, c, seed);
    check("initial parameters, checksum", (int)crc32_update(0, m.params.data, m.params.total * sizeof(float)) != *ints(&d, "init_crc"), 0, "%s", name);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const DumpTensor *p = find(&d, "params/%s", shapes[i].name);
        if (!p || p->count != m.params.size[i]) die(FAILED, "%s: no tensor params/%s of %zu numbers", path, shapes[i].name, m.params.size[i]);
        memcpy(m.params.tensor[i], p->data, p->count * sizeof(float));
    }

    // noise: t, masks and weights
    int *x = (int *)allocate((size_t)B * T, sizeof(int), "x");
    float *weights = (float *)allocate((size_t)B * T, sizeof(float), "weights");
    double *t = (double *)allocate(B, sizeof(double), "t"), worst = 0;
    add_noise(x, t, weights, targets, c, seed, 0, 0, B, B, T);
    for (int b = 0; b < B; b++) {
        double want; // the file does not align doubles
        memcpy(&want, (const char *)find(&d, "t")->data + b * sizeof want, sizeof want);
        worst = fmax(worst, fabs(t[b] - want));
    }
    check("noise level t", worst, 0, "%s", name);
    check("masks, tokens that differ", count_different(x, ints(&d, "x"), (size_t)B * T), 0, "%s", name);
    check("weights", largest_difference(weights, floats(&d, "weights", 0), (size_t)B * T), 0, "%s", name);

    // forward and backward at each S
    float *logits = (float *)allocate((size_t)B * T * V, sizeof(float), "logits");
    for (int s = 0; s < num_loops; s++) {
        int S = loops[s], n = c.loop_end - c.loop_start, R = 0;
        float *a[NUM_ACTS];
        model_forward(&m, x, B, T, S);
        worst = 0;
        for (int loop = 0; n && loop < S; loop++) {
            const float *state = floats(&d, "states/%d", S) + (size_t)loop * B * T * C;
            worst = fmax(worst, largest_difference(pass_input(&m, c.loop_start + (loop + 1) * n), state, (size_t)B * T * C));
        }
        pass_acts(&m, num_passes(c, S) - 1, a);
        check("hidden states, largest difference", fmax(worst, largest_difference(a[RES3], floats(&d, "hidden/%d", S), (size_t)B * T * C)), 1e-4, "%s S=%d", name, S);
        double loss = model_loss(&m, targets, weights, 1), want = floats(&d, "loss/%d", S)[0];
        check("loss, relative", fabs(loss - want) / want, 1e-5, "%s S=%d", name, S);
        for (int i = 0; i < B * T; i++) R += weights[i] > 0;
        for (int r0 = 0; r0 < R; r0 += m.head_rows) {
            int rows = min_int(m.head_rows, R - r0);
            head_forward(&m, m.rows + r0, rows);
            memcpy(logits + (size_t)r0 * V, m.logits, (size_t)rows * V * sizeof(float));
        }
        check("logits, largest difference", largest_difference(logits, floats(&d, "logits/%d", S), (size_t)R * V), 1e-4, "%s S=%d, %d masked rows", name, S, R);
        for (int i = 0; i < NUM_TENSORS; i++)
            check("gradients, relative to their norm", relative_norm(m.grads.tensor[i], (const float *)find(&d, "grad%d/%s", S, shapes[i].name)->data, m.grads.size[i]), 1e-4,
                  "%s S=%d %s", name, S, shapes[i].name);
        memset(m.grads.data, 0, m.grads.total * sizeof(float));
    }

    // NELBO of 10 rows for each S, and the samplers' traces
    char *shard = join_path(folder, "reference.bin");
    write_shard(shard, ints(&d, "tokens"), (int)find(&d, "tokens")->count);
    Data data = data_open(shard, V, c.max_seq_len);
    for (int s = 0; s < num_loops; s++) {
        double error, want = floats(&d, "nelbo", 0)[s];
        check("NELBO, relative", fabs(evaluate(&m, &data, loops[s], 10, B, seed, &error) - want) / want, 1e-5, "%s S=%d", name, loops[s]);
    }
    static const struct { const char *name; int order; double temperature; } samplers[] = {{"random", ORDER_RANDOM, 1}, {"confidence", ORDER_CONFIDENCE, 0.7}, {"greedy", ORDER_CONFIDENCE, 0}};
    for (int k = 0; k < 3; k++) {
        char trace[32];
        snprintf(trace, sizeof trace, "sample_%s", samplers[k].name);
        SampleOptions o = {5, loops[num_loops - 1], samplers[k].order, samplers[k].temperature, (uint64_t)seed};
        Trace compared = {ints(&d, trace), (size_t)B * T, 0};
        memcpy(x, ints(&d, "sample_given"), (size_t)B * T * sizeof(int));
        sample(&m, x, B, T, o, 0, compare_step, &compared);
        compared.different += count_different(x, compared.want + 4 * compared.size, compared.size);
        check("sampler's trace, tokens that differ", compared.different, 0, "%s %s", name, samplers[k].name);
    }

    // ten optimizer steps of two batches each, with S varying
    AdamW o = {0, 0.9, 0.95, 1e-8, 0.1, 1};
    Batch batch = batch_build(B, c.max_seq_len);
    double loss_error = 0, norm_error = 0, loops_error = 0;
    for (int step = 0; step < 10; step++) {
        Gradient g = train_gradient(&m, &data, batch, LOOPS_UNIFORM, seed, step, 2 * B, B);
        o.lr = learning_rate(1e-3, 0.1, 3, 10, step);
        model_update(&m, o, g.norm, step + 1);
        loss_error = fmax(loss_error, fabs(g.loss - floats(&d, "train_loss", 0)[step]));
        norm_error = fmax(norm_error, fabs(g.norm / floats(&d, "train_norm", 0)[step] - 1));
        loops_error += g.S != ints(&d, "train_loops")[step];
    }
    check("loops drawn, that differ", loops_error, 0, "%s", name);
    check("losses of 10 AdamW steps", loss_error, 1e-4, "%s", name);
    check("gradient norms of 10 steps, relative", norm_error, 1e-4, "%s", name);

    batch_free(batch), free(x), free(weights), free(t), free(logits), free(shard), free(d.tensors);
    munmap((void *)d.file, d.bytes);
    model_free(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Properties that need no reference

static void check_arithmetic(void) {
    double worst = 0;
    for (float x = -87; x < 88; x += 0.00137f) worst = fmax(worst, fabs(exp_fast(x) / exp(x) - 1));
    check("exp_fast, relative", worst, 2.4e-7, "-87 .. 88"); // 2 units in the last place
    check("exp_fast of extremes", !(exp_fast(-1000) < 1e-37 && exp_fast(1000) > 1e38 && isnan(exp_fast(NAN)) && exp_fast(0) == 1), 0, "-1000, 0, 1000, NaN");

    // the matrix product at sizes around every tile, with every layout
    static const int sizes[] = {1, 2, MR, MR + 1, NR - 1, NR, NR + 1, MC, MC + 1, KC + 3, NT + 5};
    enum { N = sizeof sizes / sizeof *sizes };
    worst = 0;
    for (int i = 0; i < N * N * N; i++) {
        int M = sizes[i % N], n = sizes[i / N % N], K = sizes[i / N / N], layout = i % 8;
        float *a = (float *)allocate(M * K, 4, "a"), *b = (float *)allocate(K * n, 4, "b"), *c = (float *)allocate(M * (n + 3), 4, "c"), bias[NT + 5];
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
                worst = fmax(worst, fabs(c[r * (n + 3) + q] - sum) / fmax(1, fabs(sum)));
            }
        free(a), free(b), free(c);
    }
    check("matrix product, relative", worst, 5e-6, "%d shapes, 8 layouts", N * N * N);
}

static Config small_config(int a, int b) {
    Config c = {24, 50, 64, 4, 2, 16, a, b, 4};
    return c;
}

static void build_small(Model *m, Config c, int B) { // parameters away from their start, so that every gradient is alive
    model_build(m, c);
    init_parameters(&m->params, c, 3);
    for (size_t i = 0; i < m->params.total; i++) m->params.data[i] += 0.2f * (float)(random_uniform(4, 0, 0, i) - 0.5);
    model_reserve(m, B, c.max_seq_len, c.max_loops, 1);
}

typedef struct { int x[8 * 24], targets[8 * 24]; float weights[8 * 24]; double t[8]; } SmallBatch;

static void make_batch(SmallBatch *b, Config c, int step, int first, int B, int total) {
    for (int i = 0; i < B * 24; i++) b->targets[i] = (int)(random_bits(7, 0, step, first * 24 + i) % c.vocab_size);
    add_noise(b->x, b->t, b->weights, b->targets, c, 5, step, first, B, total, 24);
}

static void check_model(void) {
    Config c = small_config(1, 3);
    SmallBatch batch;
    Model m, other;
    Shape shapes[NUM_TENSORS];
    tensor_shapes(c, shapes);
    build_small(&m, c, 8);
    make_batch(&batch, c, 0, 0, 8, 8);

    // gradients against finite differences: the loss changes by |g|^2 h for a step of h along the gradient g of each tensor
    model_forward(&m, batch.x, 8, 24, 3);
    model_loss(&m, batch.targets, batch.weights, 1);
    double total_norm = gradient_norm(&m.grads);
    for (int i = 0; i < NUM_TENSORS; i++) {
        float *p = m.params.tensor[i], *g = m.grads.tensor[i], *kept = (float *)allocate(m.params.size[i], 4, "a copy");
        double norm = 0, loss[2];
        for (size_t j = 0; j < m.params.size[i]; j++) kept[j] = p[j], norm += (double)g[j] * g[j];
        norm = sqrt(norm);
        double h = 5e-3;
        for (int side = 0; side < 2; side++) {
            for (size_t j = 0; j < m.params.size[i]; j++) p[j] = kept[j] + (float)((side ? -h : h) * g[j] / norm);
            model_forward(&m, batch.x, 8, 24, 3);
            loss[side] = model_loss(&m, batch.targets, batch.weights, 0);
        }
        memcpy(p, kept, m.params.size[i] * sizeof(float));
        check("gradients against differences", fabs((loss[0] - loss[1]) / (2 * h) - norm) / fmax(norm, 0.01 * total_norm), 1e-2, "%s", shapes[i].name);
        free(kept);
    }

    // the same memory for all passes gives the same forward as memory for each
    model_build(&other, c);
    memcpy(other.params.data, m.params.data, m.params.total * sizeof(float));
    model_reserve(&other, 8, 24, 1, 0);
    model_forward(&m, batch.x, 8, 24, 4);
    model_forward(&other, batch.x, 8, 24, 4);
    double difference = model_loss(&m, batch.targets, batch.weights, 0) - model_loss(&other, batch.targets, batch.weights, 0);
    check("inference equals training", fabs(difference), 0, "S=4");
    Model deep;
    model_build(&deep, c);
    memcpy(deep.params.data, m.params.data, m.params.total * sizeof(float));
    model_reserve(&deep, 8, 24, 16, 1);
    model_forward(&deep, batch.x, 8, 24, 16);
    model_forward(&other, batch.x, 8, 24, 16);
    difference = model_loss(&deep, batch.targets, batch.weights, 0) - model_loss(&other, batch.targets, batch.weights, 0);
    check("inference equals training", fabs(difference), 0, "S=16, beyond S_max");
    model_free(&deep);

    // S = 1 is a plain transformer, and so is any S without a loop; with one, S matters
    other.config.loop_start = other.config.loop_end = 0;
    double plain, looped[2];
    model_forward(&other, batch.x, 8, 24, 1);
    plain = model_loss(&other, batch.targets, batch.weights, 0);
    for (int S = 1; S < 3; S++) {
        model_forward(&m, batch.x, 8, 24, S);
        looped[S - 1] = model_loss(&m, batch.targets, batch.weights, 0);
        model_forward(&other, batch.x, 8, 24, S);
        check("no loop: S does not matter", fabs(model_loss(&other, batch.targets, batch.weights, 0) - plain), 0, "S=%d", S);
    }
    check("S=1 equals a plain MDM", fabs(looped[0] - plain), 0, "loss");
    check("S=2 differs from a plain MDM", fabs(looped[1] - plain) < 1e-4, 0, "loss");
    model_free(&other);

    // two batches whose gradients are added up are one batch of twice the rows: the same noise, the same gradient
    float *whole = (float *)allocate(m.grads.total, 4, "gradients");
    SmallBatch half;
    double loss = 0;
    memset(m.grads.data, 0, m.grads.total * sizeof(float));
    model_forward(&m, batch.x, 8, 24, 2);
    double whole_loss = model_loss(&m, batch.targets, batch.weights, 1), different = 0;
    memcpy(whole, m.grads.data, m.grads.total * sizeof(float));
    memset(m.grads.data, 0, m.grads.total * sizeof(float));
    for (int first = 0; first < 8; first += 4) {
        make_batch(&half, c, 0, first, 4, 8);
        different += count_different(half.x, batch.x + first * 24, 4 * 24);
        model_forward(&m, half.x, 4, 24, 2);
        loss += model_loss(&m, half.targets, half.weights, 1);
    }
    check("accumulation: masks that differ", different, 0, "2 x 4 rows and 8 rows");
    check("accumulation: loss, relative", fabs(loss / whole_loss - 1), 1e-6, "2 x 4 rows and 8 rows");
    check("accumulation: gradient, relative", relative_norm(m.grads.data, whole, m.grads.total), 1e-5, "2 x 4 rows and 8 rows");
    free(whole);

    // noise: the share of masks follows t; t is stratified
    double masked = 0, expected = 0, spread = 0;
    for (int step = 0; step < 500; step++) {
        make_batch(&half, c, step, 0, 8, 8);
        for (int i = 0; i < 8 * 24; i++) masked += half.x[i] == c.vocab_size, expected += half.t[i / 24];
        for (int b = 0; b < 8; b++) {
            int bin = 0;
            for (int other_b = 0; other_b < 8; other_b++) bin += half.t[other_b] < half.t[b];
            spread = fmax(spread, fabs(half.t[b] - (bin + 0.5) / 8) - 0.5 / 8);
        }
    }
    check("share of masked tokens", fabs(masked / expected - 1), 0.01, "500 batches");
    check("t stays in its stratum", spread, 2e-3, "500 batches"); // eps = 1e-3 shifts the strata

    // draws of S
    double count[3][5] = {{0}};
    for (int step = 0; step < 20000; step++)
        for (int dist = 0; dist < 3; dist++) count[dist][draw_loops(c, dist, 9, step)] += 1 / 20000.0;
    double ratio = flops_per_token(c, 24, 4, 0.5, 1) / flops_per_token(c, 24, 1, 0.5, 1);
    check("p(S) uniform", fmax(fabs(count[0][1] - 0.25), fabs(count[0][4] - 0.25)), 0.015, "20000 steps");
    check("p(S) fixed", fabs(1 - count[1][4]), 1e-9, "20000 steps");
    check("p(S) flops: p(1)/p(4), relative", fabs(count[2][1] / count[2][4] / ratio - 1), 0.08, "20000 steps");

    // the schedule
    check("learning rate", fabs(learning_rate(1, 0.1, 10, 110, 4) - 0.5) + fabs(learning_rate(1, 0.1, 10, 110, 10) - 1) + fabs(learning_rate(1, 0.1, 10, 110, 60) - 0.55)
          + fabs(learning_rate(1, 0.1, 10, 110, 110) - 0.1), 1e-12, "warmup, top, middle, end");

    // only matrices decay, and a step with no gradient moves nothing else
    AdamW o = {0.5, 0.9, 0.95, 1e-8, 0.1, 1};
    memset(m.grads.data, 0, m.grads.total * sizeof(float));
    float before = m.params.tensor[FCW][5], bias = m.params.tensor[FCB][5], gain = m.params.tensor[LN1W][5];
    memset(m.moment1.data, 0, m.moment1.total * sizeof(float));
    model_update(&m, o, 0, 1);
    check("weight decay", fabsf(m.params.tensor[FCW][5] - before * 0.95f) + fabsf(m.params.tensor[FCB][5] - bias) + fabsf(m.params.tensor[LN1W][5] - gain), 1e-7, "matrix, bias, gain");
    model_free(&m);
}

static void check_threads(void) {
#ifdef _OPENMP
    Config c = {100, 300, 320, 3, 3, 60, 1, 2, 4};
    Model m[2];
    int n = 4 * 100, *targets = (int *)allocate(n, sizeof(int), "targets"), *x = (int *)allocate(n, sizeof(int), "x");
    float *weights = (float *)allocate(n, sizeof(float), "weights");
    double t[4], loss[2], norm[2];
    for (int i = 0; i < n; i++) targets[i] = (int)(random_bits(1, 0, 0, i) % 300);
    for (int k = 0; k < 2; k++) {
        omp_set_num_threads(k ? 2 : 1);
        build_small(&m[k], c, 4);
        for (int step = 0; step < 3; step++) {
            add_noise(x, t, weights, targets, c, 5, step, 0, 4, 4, 100);
            model_forward(&m[k], x, 4, 100, 3);
            loss[k] = model_loss(&m[k], targets, weights, 1);
            norm[k] = gradient_norm(&m[k].grads);
            AdamW o = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1};
            model_update(&m[k], o, norm[k], step + 1);
        }
    }
    check("one thread equals two", fabs(loss[0] - loss[1]) + fabs(norm[0] - norm[1]) + largest_difference(m[0].params.data, m[1].params.data, m[0].params.total), 0, "loss, norm, parameters after 3 steps");
    omp_set_num_threads(omp_get_num_procs());
    model_free(&m[0]), model_free(&m[1]);
    free(targets), free(x), free(weights);
#endif
}

static void check_sampler(void) {
    Config c = small_config(1, 3);
    Model m;
    model_build(&m, c);
    init_parameters(&m.params, c, 3);
    model_reserve(&m, 3, 24, 1, 0);
    int given[3 * 24], x[3 * 24], alone[24];
    double changed = 0, masks = 0, batch = 0;
    for (int k = 0; k < 40; k++) {
        for (int i = 0; i < 3 * 24; i++) given[i] = random_uniform(k, 1, 0, i) < 0.7 ? c.vocab_size : (int)(random_bits(k, 2, 0, i) % 50);
        SampleOptions o = {1 + k % 30, 1 + k % 6, k % 2, k % 3 * 0.5, (uint64_t)k};
        memcpy(x, given, sizeof x);
        sample(&m, x, 3, 24, o, 0, NULL, NULL);
        for (int i = 0; i < 3 * 24; i++) changed += given[i] != c.vocab_size && x[i] != given[i], masks += x[i] >= c.vocab_size;
        memcpy(alone, given + 24, sizeof alone);
        sample(&m, alone, 1, 24, o, 1, NULL, NULL);
        batch += count_different(alone, x + 24, 24);
    }
    check("given tokens that changed", changed, 0, "40 samples of 3 rows");
    check("masks left", masks, 0, "40 samples of 3 rows");
    check("alone or in a batch, that differ", batch, 0, "40 samples of 3 rows");
    model_free(&m);

    // 100,000 draws follow softmax(logits / temperature): chi-square with 4 degrees of freedom; 18.5 has probability 0.001
    const float logits[5] = {0, 1, -1, 2, 0.5f};
    for (int k = 0; k < 2; k++) {
        double temperature = k ? 0.5 : 1, p[5], total = 0, chi = 0, confidence;
        int count[5] = {0};
        for (int v = 0; v < 5; v++) total += p[v] = exp(logits[v] / temperature);
        for (int i = 0; i < 100000; i++) count[sample_token(logits, 5, temperature, random_uniform(1, 2, k, i), &confidence)]++;
        for (int v = 0; v < 5; v++) chi += pow(count[v] - 1e5 * p[v] / total, 2) / (1e5 * p[v] / total);
        check("draws, chi-square", chi, 18.5, "temperature %g", temperature);
    }
    double confidence, total = 1 + exp(1) + exp(-1) + exp(2) + exp(0.5);
    int token = sample_token(logits, 5, 0, 0.99, &confidence);
    check("temperature 0 takes the likeliest", (token != 3) + fabs(confidence - exp(2) / total), 1e-12, "token, confidence");
}

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
    const char *long_run = "--channels 64 --seq-len 64 --batch 8 --steps 40 --save-every 20 --accum 2 --val-every 10 --val-rows 8";
    check("train, exit status", run(err, out, d, "train %s --val-data %s/data2.bin %s --out %s/whole", base, d, long_run, d), 0, "40 steps");
    for (int how = 0; how < 2; how++) {
        const char *name = how ? "interrupted" : "killed";
        pid_t child = fork();
        if (child == 0) {
            char command[8192];
            snprintf(command, sizeof command, "exec %s train %s --val-data %s/data2.bin %s --out %s/%s >/dev/null 2>&1", program, base, d, long_run, d, name);
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
        check("resume, exit status", run(err, out, d, "train %s --val-data %s/data2.bin %s --out %s/%s --resume", base, d, long_run, d, name), 0, "%s", name);
        for (int k = 0; k < 2; k++) {
            snprintf(path[0], sizeof path[0], "%s/whole/%s", d, k ? "optimizer.bin" : "model.bin");
            snprintf(path[1], sizeof path[1], "%s/%s/%s", d, name, k ? "optimizer.bin" : "model.bin");
            check("resumed equals unbroken, bytes", files_differ(path[0], path[1]), 0, "%s: %s", name, k ? "optimizer.bin" : "model.bin");
        }
        char logs[2][1200];
        snprintf(logs[0], sizeof logs[0], "cut -d, -f1-6,8- %s/whole/log.csv >%s/log1; cut -d, -f1-6,8- %s/%s/log.csv | cmp -s - %s/log1", d, d, d, name, d);
        check("resumed equals unbroken, log.csv", system(logs[0]) != 0, 0, "%s: all but the speed", name);
    }

    // a writer stopped between its two renames
    snprintf(path[0], sizeof path[0], "cp -r %s/whole %s/between && mv %s/between/model.bin %s/between/model.bin.tmp && cp %s/step20.bin %s/between/model.bin", d, d, d, d, d, d);
    check("copy", system(path[0]), 0, "a checkpoint");
    check("recovers an unfinished checkpoint", run(err, out, d, "train %s --val-data %s/data2.bin %s --out %s/between --resume", base, d, long_run, d), 0, "model of step 40 still in model.bin.tmp");
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
    expect_error(d, 2, "too many rows", "train %s --val-rows 2147483647 --out %s/no", base, d);
    expect_error(d, 2, "beyond --steps", "train %s %s --out %s/whole --resume --steps 3", base, long_run, d);
    expect_error(d, 2, "is --input", "tokenize --tokenizer %s/test.tok --input %s/text --output %s/text", d, d, d);
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

int main(int argc, char **argv) {
    char folder[] = "/tmp/test_loopmdm.XXXXXX", command[64];
    if (argc < 2) die(USAGE, "usage: test_loopmdm PROGRAM [REFERENCE FILE...]");
    program = argv[1];
    if (!mkdtemp(folder)) die(FAILED, "cannot make a folder in /tmp: %s", strerror(errno));
    for (int i = 2; i < argc; i++) check_reference(argv[i], folder);
    check_arithmetic();
    check_model();
    check_threads();
    check_sampler();
    check_tokenizer(folder);
    check_command_line(folder);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command)) printf("could not remove %s\n", folder);
    printf("\n%-38s checks  largest error  tolerance\n", "");
    for (int k = 0; kinds[k].kind; k++)
        if (kinds[k].tolerance > 0 || kinds[k].error > 0) printf("%-38s %6d  %13.1e  %9.0e\n", kinds[k].kind, kinds[k].count, kinds[k].error, kinds[k].tolerance);
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
