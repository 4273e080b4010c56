/*
Where the time of a training step goes: time, and floating point operations per second, of each kind of work, on the CPU.

    make build/profile && build/profile [PRESET [V [B [S [T]]]]]        default: d6 4096 16 4 and the preset's T

gcc's -finstrument-functions calls the two hooks below whenever a function of loopmdm.c begins or ends, so that what is timed is the program
itself, in its own order, with the caches as they are. Built as a shared library this file also gives bench.py what cannot be timed from
outside: the machine's peak, one matrix product, one forward.
*/
#define main loopmdm_main
#include "../../loopmdm.c"
#undef main

#define HOOK __attribute__((no_instrument_function))
enum { NORM, QKV_FORWARD, PROJ_FORWARD, FC_FORWARD, FCPROJ_FORWARD, QKV_BACKWARD, PROJ_BACKWARD, FC_BACKWARD, FCPROJ_BACKWARD, ATTENTION_FORWARD, ATTENTION_BACKWARD, ROPE, GELU, RESIDUAL,
       LOGITS_FORWARD, LOGITS_BACKWARD, SOFTMAX, UPDATE, BATCH, EMBED, STEP, NUM_KINDS };
static const char *const kind_names[] = {"LayerNorm", "qkv", "attproj", "fc", "fcproj", "qkv, backward", "attproj, backward", "fc, backward", "fcproj, backward", "attention",
                                         "attention, backward", "rotary positions", "GELU", "residual", "logits", "logits, backward", "cross entropy", "norm and AdamW", "batch and noise", "embedding", "step"};
static double kind_seconds[NUM_KINDS], began;
static int kind_calls[NUM_KINDS], matmuls, backward_matmuls, in_head, now = -1;
static void *timed; // the function that is being timed, as kind now

// Which kind of work a function is, or -1. Matrix products are told apart by their order within a pass.
HOOK static int kind_of(void *f) {
    if (f == (void *)layernorm_forward || f == (void *)layernorm_backward) return NORM;
    if (f == (void *)matmul_forward) return in_head ? LOGITS_FORWARD : QKV_FORWARD + matmuls++ % 4;
    if (f == (void *)matmul_backward) return in_head ? LOGITS_BACKWARD : FCPROJ_BACKWARD - backward_matmuls++ % 4;
    if (f == (void *)attention_forward) return ATTENTION_FORWARD;
    if (f == (void *)attention_backward) return ATTENTION_BACKWARD;
    if (f == (void *)rope_forward || f == (void *)rope_backward) return ROPE;
    if (f == (void *)gelu_forward || f == (void *)gelu_backward) return GELU;
    if (f == (void *)residual_forward) return RESIDUAL;
    if (f == (void *)crossentropy_forward || f == (void *)crossentropy_backward) return SOFTMAX;
    if (f == (void *)gradient_norm || f == (void *)model_update) return UPDATE;
    if (f == (void *)data_batch || f == (void *)model_noise) return BATCH;
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
    if ((now = kind_of(f)) >= 0) timed = f, began = seconds();
}

HOOK void __cyg_profile_func_exit(void *f, void *caller) {
    (void)caller;
    if (!is_first_thread()) return;
    if (is_head(f)) in_head = 0;
    if (f == timed) kind_seconds[now] += seconds() - began, kind_calls[now]++, timed = NULL;
}

// Multiply-adds per second on registers alone, times two, on all threads: what no matrix product can exceed.
double bench_peak(double duration) {
    enum { SUMS = 12, LOOPS = 20000 }; // as many independent sums as the microkernel has
    double total = 0;
    OMP(omp parallel reduction(+ : total))
    {
        vec sum[SUMS], x, y;
        for (int i = 0; i < SUMS; i++) sum[i] = (vec){0};
        for (int l = 0; l < VECTOR; l++) x[l] = 0.5f + 0.01f * l, y[l] = 0.1f;
        double start = seconds(), operations = 0, check = 0;
        while (seconds() - start < duration) {
            for (int k = 0; k < LOOPS; k++)
                for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * x + y;
            operations += 2.0 * LOOPS * SUMS * VECTOR;
        }
        double took = seconds() - start;
        for (int i = 0; i < SUMS; i++) check += sum[i][0]; // used, or compilers leave the sums out
        total += check > 0 ? operations / took : 0;
    }
    return total;
}

// One of the three products of a linear layer, kind 0 forward, 1 gradient of the input, 2 of the weight, with what lies at inp (M,C), weight (OC,C),
// out (M,OC). Returns seconds.
double bench_matmul(int kind, float *out, float *inp, float *weight, int M, int C, int OC) {
    double start = seconds();
    if (kind == 0) gemm(M, OC, C, inp, C, 1, weight, 1, C, out, OC, NULL, 0);
    if (kind == 1) gemm(M, C, OC, out, OC, 1, weight, C, 1, inp, C, NULL, 0);
    if (kind == 2) gemm(OC, C, M, out, 1, OC, inp, C, 1, weight, C, NULL, 0);
    return seconds() - start;
}

static Model bench_model;

// A new model with random tokens for one forward of (B,T); bench_forward() returns the seconds of a forward of S loops and the head on all rows.
void bench_open(int T, int V, int L, int NH, int C, int a, int b, int B) {
    Config c = {T, V, padded(V), L, NH, C, a, b, 1};
    if (bench_model.memory[PARAMETERS]) model_free(&bench_model);
    model_build(&bench_model, c);
    model_reserve(&bench_model, B, T, 1, 0, 0);
    init_parameters(bench_model.params.data, c, 1);
    int *x = (int *)allocate((size_t)B * T, sizeof(int), "tokens");
    for (int i = 0; i < B * T; i++) x[i] = (int)(random_bits(1, STREAM_BATCH, 0, i) % V), bench_model.rows[i] = i;
    model_tokens(&bench_model, x, B, T);
    free(x);
}

double bench_forward(int S) {
    Model *m = &bench_model;
    double start = seconds();
    model_forward(m, S);
    for (int r = 0; r < m->B * m->T; r += m->head_rows) head_forward(m, m->rows + r, min_int(m->head_rows, m->B * m->T - r));
    return seconds() - start;
}

// Writes B rows from nothing in so many steps of the confidence sampler, drawing from all tokens; returns seconds.
double bench_sample(int S, int steps) {
    Model *m = &bench_model;
    int B = m->max_B, T = m->max_T, *x = (int *)allocate((size_t)B * T, sizeof(int), "tokens");
    for (int i = 0; i < B * T; i++) x[i] = m->config.vocab_size;
    SampleOptions o = {steps, ORDER_CONFIDENCE, 0, 0, 0, {S, 0, 0}, {1, 0, 1, SCORE_PROBABILITY, 1}};
    double start = seconds();
    sample(m, x, B, T, o, 0, NULL, NULL, NULL);
    double took = seconds() - start;
    free(x);
    return took;
}

void bench_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

HOOK int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "d6";
    int V = argc > 2 ? atoi(argv[2]) : 4096, B = argc > 3 ? atoi(argv[3]) : 16, S = argc > 4 ? atoi(argv[4]) : 4, i = find_preset(name), steps = 5;
    if (i < 0 || V < 1 || B < 1 || S < 1) die(USAGE, "profile takes a preset (d2, nano, d6, d12), V, B, S and T");
    int T = argc > 5 ? atoi(argv[5]) : presets[i].T;
    Config c = {T, V, padded(V), presets[i].L, presets[i].NH, presets[i].C, presets[i].a, presets[i].b, S};
    if (config_error(c)) die(USAGE, "impossible model: %s", config_error(c));
    Model m;
    model_build(&m, c);
    model_reserve(&m, B, T, S, 1, 0);
    float *params = (float *)allocate(m.params.total, sizeof(float), "the parameters");
    init_parameters(params, c, 1);
    model_set_parameters(&m, params);
    uint16_t *tokens = (uint16_t *)allocate(1 << 20, sizeof *tokens, "tokens");
    for (int k = 0; k < 1 << 20; k++) tokens[k] = (uint16_t)(random_bits(1, STREAM_BATCH, 1, k) % V);
    Shard shard = {tokens, 1 << 20};
    Data data = {&shard, 1, 1 << 20, 1, -1};
    Recipe recipe = {LOOPS_FIXED, TIME_UNIFORM, 0, 1, B, B};
    AdamW adamw = {1e-3, 1, 0.9, 0.95, 1e-8, 0.1, 1, 0};
    double step_seconds = 0, best = 1e9, masked = 0, peak = bench_peak(0.3);
    for (int step = 0; step <= steps; step++) { // the first touches the memory and does not count
        if (step == 1) memset(kind_seconds, 0, sizeof kind_seconds), memset(kind_calls, 0, sizeof kind_calls);
        double start = seconds();
        Gradient g = train_gradient(&m, &data, recipe, step);
        model_update(&m, adamw, g.norm, step + 1);
        if (!step) continue;
        double took = seconds() - start;
        step_seconds += took, masked += g.masked;
        if (took < best) best = took;
    }
    double BT = (double)B * T, C = c.channels, P = num_passes(c, S), R = masked / steps, sum = 0;
    double flops[NUM_KINDS] = {0};
    flops[QKV_FORWARD] = 6 * BT * C * C * P, flops[PROJ_FORWARD] = 2 * BT * C * C * P, flops[FC_FORWARD] = flops[FCPROJ_FORWARD] = 8 * BT * C * C * P;
    for (int k = 0; k < 4; k++) flops[QKV_BACKWARD + k] = 2 * flops[QKV_FORWARD + k];
    flops[ATTENTION_FORWARD] = 4 * BT * T * C * P, flops[ATTENTION_BACKWARD] = 10 * BT * T * C * P;
    flops[LOGITS_FORWARD] = 2 * R * C * V, flops[LOGITS_BACKWARD] = 4 * R * C * V;
    printf("%s, V=%d, T=%d, B=%d, S=%d: a training step takes %.1f ms (best of %d; below means); peak %.0f GFLOP/s\n\n", name, V, T, B, S, best * 1e3, steps, peak * 1e-9);
    printf("                      calls      ms   share   GFLOP/s  of peak\n");
    double all = 0;
    for (int k = 0; k < STEP; k++) sum += kind_seconds[k], all += flops[k];
    kind_seconds[STEP] = step_seconds, kind_calls[STEP] = steps, flops[STEP] = all;
    for (int k = 0; k <= STEP; k++) {
        if (k == STEP) printf("%-20s         %7.1f  %5.1f %%\n", "all else", (step_seconds - sum) / steps * 1e3, 100 * (1 - sum / step_seconds));
        printf("%-20s  %5d  %7.1f  %5.1f %%", kind_names[k], kind_calls[k] / steps, kind_seconds[k] / steps * 1e3, 100 * kind_seconds[k] / step_seconds);
        if (flops[k] > 0) printf("  %7.1f  %5.1f %%", flops[k] * steps / kind_seconds[k] * 1e-9, 100 * flops[k] * steps / kind_seconds[k] / peak);
        printf("\n");
    }
    return 0;
}
