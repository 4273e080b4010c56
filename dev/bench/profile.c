/*
Where the time of a training step goes on the CPU: milliseconds and floating point operations per
second of each kind of work.

    make build/profile && build/profile [PRESET [V [B [S [T]]]]] [bf16]
                          default: d6 4096 16 4, the preset's T, fp32

gcc's -finstrument-functions calls the two hooks below whenever a function of loopmdm.c begins or
ends. So it times the program itself, in its own order, with the caches as they are. Built as a
shared library, this file also gives bench.py what cannot be timed from outside: the machine's peak,
one matrix product, one forward.
*/
#define main loopmdm_main
#include "../tools.c"
#undef main

#define HOOK __attribute__((no_instrument_function))

// Matrix products come in the order of these kinds within a pass, backward in the opposite order.
enum {
    QKV_FORWARD, PROJ_FORWARD, FC_FORWARD, FCPROJ_FORWARD,
    QKV_BACKWARD, PROJ_BACKWARD, FC_BACKWARD, FCPROJ_BACKWARD,
    LOGITS_FORWARD, LOGITS_BACKWARD, ATTENTION_FORWARD, ATTENTION_BACKWARD,
    NORM, ROPE, SOFTMAX, UPDATE, BATCH, EMBED, STEP, NUM_KINDS
};
static const char *const kind_names[NUM_KINDS] = {
    "qkv", "attproj", "fc", "fcproj",
    "qkv, backward", "attproj, backward", "fc, backward", "fcproj, backward",
    "logits", "logits, backward", "attention", "attention, backward",
    "LayerNorm", "rotary positions", "cross entropy", "norm and AdamW", "batch and noise",
    "embedding", "step",
};
static double kind_seconds[NUM_KINDS], kind_flops[NUM_KINDS], began;
static int kind_calls[NUM_KINDS], matmuls, backward_matmuls, in_head, now = -1;
static void *timed; // the function that is being timed, as kind `now`

// Which kind of work a function is, or -1
HOOK static int kind_of(void *f) {
    if (f == (void *)matmul_forward)
        return in_head ? LOGITS_FORWARD : QKV_FORWARD + matmuls++ % 4;
    if (f == (void *)matmul_backward)
        return in_head ? LOGITS_BACKWARD : FCPROJ_BACKWARD - backward_matmuls++ % 4;
    if (f == (void *)attention_forward) return ATTENTION_FORWARD;
    if (f == (void *)attention_backward) return ATTENTION_BACKWARD;
    if (f == (void *)layernorm_forward || f == (void *)layernorm_backward) return NORM;
    if (f == (void *)rope) return ROPE;
    if (f == (void *)crossentropy) return SOFTMAX;
    if (f == (void *)gradient_norm || f == (void *)model_update) return UPDATE;
    if (f == (void *)data_sequence || f == (void *)model_noise) return BATCH;
    if (f == (void *)encoder_forward || f == (void *)encoder_backward) return EMBED;
    return -1;
}

HOOK static int is_head(void *f) { return f == (void *)head_forward || f == (void *)head_backward; }
HOOK static int is_first_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num() == 0;
#endif
    return 1;
}

HOOK void __cyg_profile_func_enter(void *f, void *caller) {
    (void)caller;
    if (timed || !is_first_thread()) return;
    if (is_head(f)) in_head = 1;
    now = kind_of(f);
    if (now < 0) return;
    timed = f;
    began = seconds();
}

HOOK void __cyg_profile_func_exit(void *f, void *caller) {
    (void)caller;
    if (!is_first_thread()) return;
    if (is_head(f)) in_head = 0;
    if (f != timed) return;
    kind_seconds[now] += seconds() - began;
    kind_calls[now]++;
    timed = NULL;
}

// -------------------------------------------------------------------------------------------------
// For bench.py

// Multiply-adds per second on registers, times two, on all threads. No matrix product is faster.
double bench_peak(double duration) {
    enum { SUMS = 12, LOOPS = 20000 }; // as many independent sums as the microkernel has
    double total = 0;
    OMP(omp parallel reduction(+ : total))
    {
        vec sum[SUMS], x, y;
        for (int i = 0; i < SUMS; i++) sum[i] = (vec){0};
        for (int i = 0; i < VECTOR; i++) {
            x[i] = 0.5f + 0.01f * i;
            y[i] = 0.1f;
        }
        double start = seconds(), operations = 0, check = 0;
        while (seconds() - start < duration) {
            for (int k = 0; k < LOOPS; k++)
                for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * x + y;
            operations += 2.0 * LOOPS * SUMS * VECTOR;
        }
        double took = seconds() - start;
        for (int i = 0; i < SUMS; i++) check += sum[i][0]; // unused sums would be left out
        total += check > 0 ? operations / took : 0;
    }
    return total;
}

// One of the three products of a linear layer: kind 0 forward, 1 the gradient of the input, 2 that
// of the weight. inp (M,C), weight (OC,C), out (M,OC). Returns seconds.
double bench_matmul(int kind, float *out, float *inp, float *weight, int M, int C, int OC) {
    double start = seconds();
    if (kind == 0) gemm(ABT, M, OC, C, inp, C, weight, C, out, OC, SET, NONE);
    if (kind == 1) gemm(AB, M, C, OC, out, OC, weight, C, inp, C, SET, NONE);
    if (kind == 2) gemm(ATB, OC, C, M, out, OC, inp, C, weight, C, SET, NONE);
    return seconds() - start;
}

static Model bench_model;

// A new model with random tokens for one forward of (B,T)
void bench_open(int T, int V, int L, int NH, int C, int a, int b, int B) {
    Config c = {T, V, padded(V), L, NH, C, a, b, 1};
    Model *m = &bench_model;
    if (m->memory[PARAMETERS]) model_free(m);
    model_build(m, c);
    model_reserve(m, B, T, 1, 0, 0);
    init_parameters(m->params.data, c, 1);
    int *x = (int *)allocate((size_t)B * T, sizeof(int), "tokens");
    for (int i = 0; i < B * T; i++) {
        x[i] = (int)(random_bits(1, STREAM_BATCH, 0, i) % V);
        m->masked[i] = i;
    }
    model_tokens(m, x, B, T);
    free(x);
}

// Seconds of a forward with S loops and the head at all positions
double bench_forward(int S) {
    Model *m = &bench_model;
    int BT = m->B * m->T;
    double start = seconds();
    model_forward(m, S);
    for (int r = 0; r < BT; r += m->head_rows)
        head_forward(m, m->masked + r, min_int(m->head_rows, BT - r));
    return seconds() - start;
}

// Writes B sequences from nothing in so many steps of the confidence sampler, drawing from all
// tokens. Returns seconds.
double bench_sample(int S, int steps) {
    Model *m = &bench_model;
    int B = m->max_B, T = m->max_T, *x = (int *)allocate((size_t)B * T, sizeof(int), "tokens");
    for (int i = 0; i < B * T; i++) x[i] = m->config.vocab_size;
    Draw draw = {1, 0, 1, SCORE_PROBABILITY, 1};
    SampleOptions o = {steps, ORDER_CONFIDENCE, 0, 0, {S, 0}, draw};
    double start = seconds();
    sample(m, x, B, T, o, 0, NULL, NULL);
    double took = seconds() - start;
    free(x);
    return took;
}

// From now on products are in bfloat16, or in floats again.
void bench_precision(int bf16) {
    if (bf16) {
        gemm_use_bf16();
        return;
    }
    gemm_bf16 = 0;
    bf16_kernel = NULL;
}

void bench_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// -------------------------------------------------------------------------------------------------
// The profile

enum { STEPS = 5 };

// Of all the work in one step with R masked positions
HOOK static void count_flops(Config c, int B, int T, int S, double R) {
    double BT = (double)B * T, C = c.channels, P = num_passes(c, S);
    kind_flops[QKV_FORWARD] = 6 * BT * C * C * P;
    kind_flops[PROJ_FORWARD] = 2 * BT * C * C * P;
    kind_flops[FC_FORWARD] = kind_flops[FCPROJ_FORWARD] = 8 * BT * C * C * P;
    for (int k = 0; k < 4; k++) kind_flops[QKV_BACKWARD + k] = 2 * kind_flops[QKV_FORWARD + k];
    kind_flops[ATTENTION_FORWARD] = 4 * BT * T * C * P;
    kind_flops[ATTENTION_BACKWARD] = 10 * BT * T * C * P;
    kind_flops[LOGITS_FORWARD] = 2 * R * C * c.vocab_size;
    kind_flops[LOGITS_BACKWARD] = 4 * R * C * c.vocab_size;
    for (int k = 0; k < STEP; k++) kind_flops[STEP] += kind_flops[k];
}

// Means of STEPS steps, which took so many seconds together
HOOK static void print_table(double all, double peak) {
    double rest = all;
    for (int k = 0; k < STEP; k++) rest -= kind_seconds[k];
    kind_seconds[STEP] = all;
    kind_calls[STEP] = STEPS;
    printf("                      calls      ms   share   GFLOP/s  of peak\n");
    for (int k = 0; k <= STEP; k++) {
        double share = 100 * kind_seconds[k] / all;
        double speed = kind_flops[k] * STEPS / kind_seconds[k];
        if (k == STEP)
            printf("%-20s         %7.1f  %5.1f %%\n", "all else", rest / STEPS * 1e3,
                   100 * rest / all);
        printf("%-20s  %5d  %7.1f  %5.1f %%", kind_names[k], kind_calls[k] / STEPS,
               kind_seconds[k] / STEPS * 1e3, share);
        if (kind_flops[k] > 0) printf("  %7.1f  %5.1f %%", speed * 1e-9, 100 * speed / peak);
        printf("\n");
    }
}

HOOK int main(int argc, char **argv) {
    const char *products = "fp32";
    if (argc > 1 && !strcmp(argv[argc - 1], "bf16")) {
        products = gemm_use_bf16();
        argc--;
    }
    const char *name = argc > 1 ? argv[1] : "d6";
    int V = argc > 2 ? atoi(argv[2]) : 4096, B = argc > 3 ? atoi(argv[3]) : 16;
    int S = argc > 4 ? atoi(argv[4]) : 4;
    Config c = preset(name, V);
    if (!c.layers || V < 1 || B < 1 || S < 1)
        die(USAGE, "profile takes a preset (d2, nano, d6, d12), V, B, S and T");
    if (argc > 5) c.max_seq_len = atoi(argv[5]);
    c.max_loops = S;
    if (config_error(c)) die(USAGE, "impossible model: %s", config_error(c));
    int T = c.max_seq_len;

    Model m;
    model_build(&m, c);
    model_reserve(&m, B, T, S, 1, 0);
    float *params = (float *)allocate(m.params.total, sizeof(float), "the parameters");
    init_parameters(params, c, 1);
    model_set_parameters(&m, params);
    uint16_t *tokens = (uint16_t *)allocate(1 << 20, sizeof *tokens, "tokens");
    Shard shard = {tokens, 1 << 20};
    Data data = {&shard, 1, 1, -1};
    for (int k = 0; k < shard.count; k++)
        tokens[k] = (uint16_t)(random_bits(1, STREAM_BATCH, 1, k) % V);
    Batches batches = {1, B, B, 0};
    AdamW adamw = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 0};

    double all = 0, best = 1e9, masked = 0, peak = bench_peak(0.3);
    for (int step = 0; step <= STEPS; step++) {
        double start = seconds();
        Gradient g = train_gradient(&m, &data, batches, step, S);
        model_update(&m, adamw, g.norm, step + 1);
        double took = seconds() - start;
        if (step == 0) { // the first step touches the memory and does not count
            memset(kind_seconds, 0, sizeof kind_seconds);
            memset(kind_calls, 0, sizeof kind_calls);
            continue;
        }
        all += took;
        masked += g.masked;
        best = fmin(best, took);
    }
    printf("%s, V=%d, T=%d, B=%d, S=%d: a training step takes %.1f ms (best of %d; below means)\n"
           "products in %s; fp32 peak %.0f GFLOP/s\n\n", name, V, T, B, S, best * 1e3, STEPS,
           products, peak * 1e-9);
    count_flops(c, B, T, S, masked / STEPS);
    print_table(all, peak);
    return 0;
}
