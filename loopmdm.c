/*
LoopMDM on the CPU: the looped masked diffusion language model (arXiv 2605.26106) in one C file.

A masked diffusion model (MDM) learns to fill in tokens that were replaced by MASK, at every share
of masks from almost none to all. It writes by filling in: first all is MASK, then a few tokens at a
time become words, in any order. LoopMDM runs a few early-middle layers several times with the same
weights: a deeper model with the same parameters.

    x (B,T): B sequences of T tokens, some of them MASK
      -> embed   h = wte[x] + wpe[position], a learned vector for each token and each position
      -> head    layers 0 .. a-1       once (L layers like GPT-2's, also with rotary positions)
      -> loop    layers a .. b-1       S times, shared weights
      -> tail    layers b .. L-1       once
      -> final LayerNorm, logits = h wte^T (the same wte), at the masked positions only

One training step, train_gradient() and model_update():

    S = a random number of loops, 1 .. S_max: later any number of loops can be used
    for each sequence b:
        targets[b] = T tokens of the data
        t[b] = a noise level between 0 and 1; the model sees it only by the masks
        x[b] = targets[b], in which each token becomes MASK with probability t[b]
    h = forward(x, S)
    loss = sum over masked positions of cross_entropy(logits(h), targets) / t[b] / (B T)
           1/t: a sequence with few masks counts as much as one with many
    gradients = backward(loss), through all S loops; shared weights add up their gradients
    parameters = AdamW(parameters, gradients)

The sampler, sample():

    x = MASK everywhere, or a prompt or a template with blanks
    for step = 0 .. N-1:
        logits = forward(x, S) at the masked positions
        draw a token for each masked position, and score how sure the model is of it
        keep the best-scored tokens: a share (step+1)/N of the blanks is now filled in;
        the others stay MASK, and the next step draws them anew

Build with make: dev/ adds a fast matrix product, a tokenizer, threads, more commands and options.
Or build this file in an empty folder: cc -O3 loopmdm.c -lm. Results do not depend on the number of
threads, not even in the last bit.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // mmap, aligned_alloc and more, with any -std
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || __FINITE_MATH_ONLY__
#error "compile loopmdm without -Ofast and -ffast-math: they give wrong results and hide NaN"
#endif
#ifdef _OPENMP
#define OMP(directive) _Pragma(#directive) // the compiler expands WORTH in it
#define WORTH(operations) ((operations) > 20000) // enough work to wake up threads?
#else
#define OMP(directive)
#endif
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ // loopmdm.cu calls these functions on the GPU too
#else
#define HOST_DEVICE
#endif
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

enum { FAILED = 1, USAGE = 2 }; // exit status
static char program_name[32] = "loopmdm"; // begins an error's line
static int rank, ranks = 1; // this process, from 0, of those that train one model

// Prints one line that says what is wrong, with which file or option, and what to do. Exits.
__attribute__((format(printf, 2, 3), noreturn))
static void die(int status, const char *format, ...) {
    char line[4 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *(c += strcspn(c, "\n\r"));) *c = ' '; // a name may hold a line end
    fflush(stdout); // what was printed before comes first
    for (int i = 0; rank > 0 && i < 30; i++) usleep(100000); // if all fail alike, rank 0 ends all
    fprintf(stderr, "%s: %s\n", program_name, line);
    exit(status);
}

// Like calloc(), but exits if there is no memory. Large blocks use huge pages (fewer TLB misses).
static void *allocate(size_t count, size_t size, const char *what) {
    const size_t huge = 2 << 20; // 2 MiB
    size_t bytes = count > SIZE_MAX / 2 / size ? SIZE_MAX / 2 : count * size + 1; // never 0
    if (bytes >= huge) bytes = (bytes + huge - 1) / huge * huge;
    void *p = bytes < huge ? malloc(bytes) : aligned_alloc(huge, bytes);
    if (!p)
        die(FAILED, "no memory for %s (%.0f MiB): choose a smaller model, --batch or --max-loops",
            what, (double)count * size / (1 << 20));
#ifdef MADV_HUGEPAGE
    if (bytes >= huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

// =================================================================================================
// 1. Configuration and parameters
//
// Letters in shapes: B sequences, T positions, C channels, NH heads of D = C/NH channels, L layers,
// V tokens, S times through the loop, P passes, R predicted positions; t: noise level or position.

typedef struct {
    int max_seq_len;  // largest T
    int vocab_size;   // V tokens; MASK has id V
    int padded_vocab; // Vp, the rows of wte: V+1 rounded up to a multiple of 64 (fast kernels)
    int layers, heads, channels; // L, NH, C
    int loop_start, loop_end;    // a, b: the loop is layers a .. b-1; there is none if a = b
    int max_loops;               // S_max in training; inference may use more
} Config;

static int padded(int V) { return V < 65536 ? (V + 64) / 64 * 64 : 0; } // 100 -> 128, 64 -> 128

// A pass is one application of a layer. A forward of S loops has this many.
static int num_passes(Config c, int S) {
    return c.loop_start + S * (c.loop_end - c.loop_start) + c.layers - c.loop_end;
}

// The layer whose weights pass p uses: the whole difference between a looped and an ordinary model.
// With L = 4, a = 1, b = 3, S = 2 the passes use layers 0, 1, 2, 1, 2, 3.
static int layer_of_pass(Config c, int S, int p) {
    int a = c.loop_start, n = c.loop_end - c.loop_start;
    if (p < a) return p;                       // head: before the loop
    if (p < a + S * n) return a + (p - a) % n; // loop
    return p - (S - 1) * n;                    // tail: after it
}

// Why a configuration cannot be built, or NULL if it can.
static const char *config_error(Config c) {
    int T = c.max_seq_len, V = c.vocab_size, a = c.loop_start, b = c.loop_end;
    if (c.layers < 1 || c.layers > 1024) return "layers must be 1 to 1024";
    if (c.channels < 2 || c.channels > 65536) return "channels must be 2 to 65536";
    if (c.heads < 1 || c.channels % c.heads) return "heads must divide channels";
    if (c.channels / c.heads % 2)
        return "channels / heads must be even: rotary positions turn pairs of channels";
    if (T < 1 || T > 65536) return "the sequence length must be 1 to 65536";
    if (V < 1 || V > 65535) return "the vocabulary must have 1 to 65535 tokens";
    if (c.padded_vocab != padded(V))
        return "the padded vocabulary must be a multiple of 64 with room for MASK";
    if (a < 0 || b < a || b > c.layers) return "the loop a:b needs 0 <= a <= b <= layers";
    if (c.max_loops < 1 || c.max_loops > 1024) return "max loops must be 1 to 1024";
    return NULL;
}

// {T, V, Vp, L, NH, C, a, b, S_max} of that name; L = 0 if there is none. The paper's is d12.
static Config preset(const char *name, int V) {
    if (!strcmp(name, "d2")) return (Config){32, V, padded(V), 2, 2, 32, 1, 2, 4};
    if (!strcmp(name, "nano")) return (Config){128, V, padded(V), 6, 4, 128, 1, 3, 4};
    if (!strcmp(name, "d6")) return (Config){256, V, padded(V), 6, 6, 288, 1, 3, 4};
    if (!strcmp(name, "d12")) return (Config){1024, V, padded(V), 12, 12, 768, 1, 3, 12};
    return (Config){0, V, padded(V), 0, 0, 0, 0, 0, 0};
}

enum { // W: weight or gain, B: bias; ATTPROJ: after attention; FC, FCPROJ: MLP; LNF: the last LN
    WTE, WPE, LN1W, LN1B, QKVW, QKVB, ATTPROJW, ATTPROJB, LN2W, LN2B, FCW, FCB, FCPROJW, FCPROJB,
    LNFW, LNFB, NUM_TENSORS
};

// A parameter tensor is (copies, out, in), or (copies, out) with in = 0: biases and LayerNorm.
typedef struct { const char *name; int copies, out, in; } Shape;

static void tensor_shapes(Config c, Shape s[NUM_TENSORS]) {
    int L = c.layers, C = c.channels;
    const Shape table[NUM_TENSORS] = {
        {"wte", 1, c.padded_vocab, C}, {"wpe", 1, c.max_seq_len, C},
        {"ln1w", L, C, 0}, {"ln1b", L, C, 0}, {"qkvw", L, 3 * C, C}, {"qkvb", L, 3 * C, 0},
        {"attprojw", L, C, C}, {"attprojb", L, C, 0}, {"ln2w", L, C, 0}, {"ln2b", L, C, 0},
        {"fcw", L, 4 * C, C}, {"fcb", L, 4 * C, 0}, {"fcprojw", L, C, 4 * C}, {"fcprojb", L, C, 0},
        {"lnfw", 1, C, 0}, {"lnfb", 1, C, 0},
    };
    memcpy(s, table, sizeof table);
}

// All parameters in one piece of memory. Gradients, AdamW's two moments and the average (--ema) are
// such pieces too, so that the optimizer and checkpoints are simple loops.
typedef struct {
    float *data;                // (total)
    float *tensor[NUM_TENSORS]; // where each tensor begins
    size_t size[NUM_TENSORS], per_layer[NUM_TENSORS], total;
    int is_matrix[NUM_TENSORS];   // else it is a bias or belongs to LayerNorm
    int ends_branch[NUM_TENSORS]; // attproj, fcproj: what a layer adds to the residual stream
} Tensors;

static void tensors_build(Tensors *t, Config c, float *data) { // with data = NULL only the sizes
    Shape s[NUM_TENSORS];
    tensor_shapes(c, s);
    t->data = data;
    t->total = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        t->tensor[i] = data ? data + t->total : NULL;
        t->per_layer[i] = (size_t)s[i].out * max_int(1, s[i].in);
        t->size[i] = s[i].copies * t->per_layer[i];
        t->total += t->size[i];
        t->is_matrix[i] = s[i].in > 0;
        t->ends_branch[i] = strstr(s[i].name, "proj") != NULL;
    }
}

// w[i]: tensor i of this layer. Tensors outside the layers (wte, wpe, lnfw, lnfb) are whole.
static void layer_tensors(float *w[NUM_TENSORS], const Tensors *t, int layer) {
    for (int i = 0; i < NUM_TENSORS; i++)
        w[i] = t->tensor[i] + (i > WPE && i < LNFW ? layer : 0) * t->per_layer[i];
}

// A model's memory is four allocations. model_plan() (section 4) cuts ACTIVATIONS into pieces.
enum { PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, NUM_MEMORIES };
typedef struct { void *pointer; size_t bytes; } Piece; // the address of the pointer to set

// Places the pieces one after the other, sets their pointers and returns the bytes of all. With
// at = NULL the pointers become NULL: it only counts.
static size_t lay_out(const Piece *pieces, int n, char *at) {
    size_t sum = 0;
    for (int i = 0; i < n; i++) {
        char *piece = at ? at + sum : NULL;
        memcpy(pieces[i].pointer, &piece, sizeof piece); // the pointers have different types
        sum += (pieces[i].bytes + 255) / 256 * 256; // aligned for vectors and for GPUs
    }
    return sum;
}

// =================================================================================================
// 2. Randomness and noise
//
// A random number is a hash of (seed, stream, step, index); the stream says what it is for. There
// is no state: each language, device and number of threads draws the same numbers.

enum { STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK, STREAM_LOOPS, STREAM_UNMASK,
       STREAM_TOKEN };

// Mixes in one word after the other, by the finalizer of SplitMix64 (Steele et al. 2014).
HOST_DEVICE static inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t step,
                                               uint64_t index) {
    const uint64_t words[] = {seed, stream, step, index};
    uint64_t x = 0; // arithmetic is modulo 2^64
    for (int i = 0; i < 4; i++) {
        x += words[i] + 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        x ^= x >> 31;
    }
    return x;
}

HOST_DEVICE static inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t step,
                                                uint64_t index) {
    return (double)(random_bits(seed, stream, step, index) >> 11) * 0x1p-53; // in [0, 1)
}

// Fills params (total) with the values before training. Uniform numbers, unlike normal ones, need
// no transcendental function, so they are the same on every machine.
static void init_parameters(float *params, Config c, uint64_t seed) {
    Tensors t;
    tensors_build(&t, c, params);
    size_t C = c.channels;
    for (int i = 0; i < NUM_TENSORS; i++) {
        // attproj and fcproj start at zero: at first no layer changes the stream, however many.
        double std = t.is_matrix[i] && !t.ends_branch[i] ? 0.8 / sqrt(c.channels) : 0;
        if (i == WTE) std = 2 / sqrt(c.channels); // more would make the first logits too large
        if (i == WPE) std = 0; // learned positions start at zero: they must not hide the words
        // Rotary positions, see rope(): the biases' part of q k^T depends only on the distance, and
        // each head begins by preferring distances of its own, so it soon finds its neighbours.
        if (i == QKVB) std = 1;
        OMP(omp parallel for if (WORTH(t.size[i])))
        for (size_t j = 0; j < t.size[i]; j++) {
            double u = random_uniform(seed, STREAM_INIT, i, j) - 0.5; // its variance is 1/12
            int padding = i == WTE && j / C > (size_t)c.vocab_size; // rows after MASK's
            int of_v = i == QKVB && j % (3 * C) >= 2 * C;           // rope() does not turn v
            t.tensor[i][j] = padding || of_v ? 0 : (float)(std * sqrt(12.0) * u);
            if (i == LN1W || i == LN2W || i == LNFW) t.tensor[i][j] = 1; // gains
        }
    }
}

// What fixes the noise of sequences first, first + 1, ... of a step with `total` sequences. Some of
// the tokens to predict may stay visible: a share of them, see visible_share() in section 6.
typedef struct { uint64_t seed, step; int first, total; double visible; } Noise;

// The noise level t of sequence first + b: eps + (1 - eps) u, u in [0,1). The u of a step are
// spread evenly, so that the loss varies less (Kingma et al. 2021): of 4, one in each quarter.
HOST_DEVICE static inline double noise_level(Noise n, int b) {
    const double eps = 1e-3; // the loss divides by t
    double u = random_uniform(n.seed, STREAM_TIME, n.step, 0) + (double)(n.first + b) / n.total;
    volatile double scaled = (1 - eps) * (u - floor(u)); // volatile: a fused multiply-add would
    return eps + scaled;                                 // round differently
}

// S, the number of loops of a training step: 1 .. S_max, each with the same probability.
static int draw_loops(int max_loops, uint64_t seed, uint64_t step) {
    return 1 + (int)(random_uniform(seed, STREAM_LOOPS, step, 0) * max_loops);
}

// How the sampler draws a token from softmax(logits / temperature), and how it scores a position.
enum { SCORE_PROBABILITY, SCORE_MARGIN, SCORE_ENTROPY }; // p of token; 1st - 2nd p; -entropy
typedef struct {
    double temperature; // 0: always the likeliest token
    int top_k;          // only the k likeliest tokens, more if some are equal (0: all)
    double top_p;       // only the likeliest tokens that together have this probability (1: all)
    int score;          // SCORE_..., of softmax(logits) without temperature
    uint64_t seed;
} Draw;

// An integer that orders as floats do: -1 < 0 < 1. So keep_likeliest() can bisect logits.
HOST_DEVICE static inline uint32_t float_order(float x) {
    union { float f; uint32_t u; } bits;
    bits.f = x;
    return bits.u ^ (bits.u >> 31 ? 0xffffffffu : 0x80000000u); // if negative, it flips all bits
}

// The angles of rotary positions: cosine, sine (T,D/2) of t * 10000^(-2i/D).
static void rope_angles(float *cosine, float *sine, int T, int D) {
    for (int t = 0; t < T; t++)
        for (int i = 0; i < D / 2; i++) {
            double angle = t * pow(10000, -2.0 * i / D); // i = 0: t; the last i: about t / 10000
            cosine[t * (D / 2) + i] = (float)cos(angle);
            sine[t * (D / 2) + i] = (float)sin(angle);
        }
}

// What model_update() (section 5) tells adamw() about one tensor.
typedef struct { float scale, beta1, beta2, keep, step_size, correct, eps, ema; } AdamWStep;

#ifdef BACKEND
#include BACKEND // loopmdm.cu: sections 3 and 4 for a GPU
#else
// =================================================================================================
// 3. Layers, each a pair of forward and backward
//
// All tensors are row-major. A backward function takes the gradient of the layer's output and gives
// the gradient of its input. Gradients of parameters are added up (+=), because a loop uses the
// same weights in several passes.

enum { AB, ABT, ATB }; // c = a b, a b^T, a^T b
enum { SET, ADD };     // c =, c +=

// What a product c (M,N) does besides, while each piece of it is still in the cache: bias and
// residual are added, then finish() gets a piece of a row. What is NULL is left out. The rows of
// residual and other are as far apart as those of c.
typedef struct Epilogue {
    const float *bias;                            // (N)
    const float *residual;                        // (M,N) a residual connection
    void (*finish)(float *x, float *y, size_t n); // x: n numbers of a row of c
    float *other;                                 // (M,N) y: those at the same place here
    float *sums;                                  // (M) += the sums of a's columns; only with ATB
} Epilogue;
static const Epilogue NONE = {NULL, NULL, NULL, NULL, NULL};

#if __has_include("dev/gemm.h") && !defined(PLAIN_GEMM)
#include "dev/gemm.h" // exp_fast() and gemm(), 10 to 50 times as fast
#else
#define exp_fast expf

// c (M,N) = or += a b, a sum over K, then the epilogue. lda, ldb, ldc: the distance of two rows in
// memory, so that a matrix may be a part of a larger one.
static void gemm(int product, int M, int N, int K, const float *a, int lda, const float *b, int ldb,
                 float *c, int ldc, int add, Epilogue e) {
    OMP(omp parallel for if (WORTH((size_t)M * N * K)))
    for (int i = 0; i < M; i++) {
        size_t row = (size_t)i * ldc;
        for (int j = 0; j < N; j++) {
            float sum = e.bias ? e.bias[j] : 0;
            for (int k = 0; k < K; k++) {
                size_t at_a = product == ATB ? (size_t)k * lda + i : (size_t)i * lda + k;
                size_t at_b = product == ABT ? (size_t)j * ldb + k : (size_t)k * ldb + j;
                sum += a[at_a] * b[at_b];
            }
            c[row + j] = add == ADD ? c[row + j] + sum : sum;
            if (e.residual) c[row + j] += e.residual[row + j];
        }
        if (e.finish) e.finish(c + row, e.other + row, N);
        for (int k = 0; e.sums && k < K; k++) e.sums[i] += a[(size_t)k * lda + i];
    }
}
#endif

// A linear layer. out (M,OC) = inp (M,C) weight^T, then the epilogue; weight (OC,C).
static void matmul_forward(float *out, const float *inp, const float *weight, int M, int C, int OC,
                           Epilogue e) {
    gemm(ABT, M, OC, C, inp, C, weight, C, out, OC, SET, e);
}

// dinp = dout weight, then the epilogue;  dweight += dout^T inp;  dbias += sum of dout over rows.
static void matmul_backward(float *dinp, float *dweight, float *dbias, const float *dout,
                            const float *inp, const float *weight, int M, int C, int OC,
                            Epilogue e) {
    gemm(AB, M, C, OC, dout, OC, weight, C, dinp, C, SET, e);
    Epilogue also = {NULL, NULL, NULL, NULL, dbias};
    gemm(ATB, OC, C, M, dout, OC, inp, C, dweight, C, ADD, also);
}

// The embedding. out (B,T,C) = wte[x] + wpe[position]; x (B,T), wte (Vp,C), wpe (max_seq_len,C).
static void encoder_forward(float *out, const int *x, const float *wte, const float *wpe,
                            int B, int T, int C) {
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int i = 0; i < B * T; i++) {
        const float *token = wte + (size_t)x[i] * C, *position = wpe + (size_t)(i % T) * C;
        for (int c = 0; c < C; c++) out[(size_t)i * C + c] = token[c] + position[c];
    }
}

// dwte[x] += dout;  dwpe[position] += dout.
static void encoder_backward(float *dwte, float *dwpe, const float *dout, const int *x,
                             int B, int T, int C) {
    OMP(omp parallel if (WORTH((size_t)B * T * C)))
    for (int i = 0; i < B * T; i++) {
        float *token = dwte + (size_t)x[i] * C, *position = dwpe + (size_t)(i % T) * C;
        OMP(omp for simd schedule(static) nowait) // a thread owns columns: so each sum has one
        for (int c = 0; c < C; c++) {             // order, also that of a token in many positions
            token[c] += dout[(size_t)i * C + c];
            position[c] += dout[(size_t)i * C + c];
        }
    }
}

// Layer normalization. For each row of inp (M,C): out = (inp - mean) rstd weight + bias. It keeps
// mean (M) and rstd (M), which is 1 / standard deviation.
static void layernorm_forward(float *out, float *mean, float *rstd, const float *inp,
                              const float *weight, const float *bias, int M, int C) {
    OMP(omp parallel for if (WORTH((size_t)M * C)))
    for (int i = 0; i < M; i++) {
        const float *x = inp + (size_t)i * C;
        float *y = out + (size_t)i * C, sum = 0, squares = 0;
        OMP(omp simd reduction(+ : sum))
        for (int c = 0; c < C; c++) sum += x[c];
        float m = sum / C;
        OMP(omp simd reduction(+ : squares))
        for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
        float s = 1 / sqrtf(squares / C + 1e-5f); // 1e-5: a row may be constant

        for (int c = 0; c < C; c++) y[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[i] = m; // for the backward
        rstd[i] = s;
    }
}

// With elementwise products, xhat = (inp - mean) rstd, g = dout weight, and means over a row:
//   dinp += rstd (g - mean(g) - xhat mean(g xhat));  dweight += dout xhat;  dbias += dout
// The means: mean and rstd depend on inp. dinp is +=: it already holds the residual's gradient.
static void layernorm_backward(float *dinp, float *dweight, float *dbias, const float *dout,
                               const float *inp, const float *weight, const float *mean,
                               const float *rstd, int M, int C) {
    enum { ROWS = 64 };
    OMP(omp parallel if (WORTH((size_t)M * C)))
    for (int i0 = 0; i0 < M; i0 += ROWS) { // so few rows stay in the cache for the second loop
        int end = min_int(i0 + ROWS, M);
        OMP(omp for schedule(static) nowait)
        for (int i = i0; i < end; i++) {
            const float *x = inp + (size_t)i * C, *dy = dout + (size_t)i * C;
            float *dx = dinp + (size_t)i * C, m = mean[i], s = rstd[i], mean_g = 0, mean_gx = 0;
            OMP(omp simd reduction(+ : mean_g, mean_gx))
            for (int c = 0; c < C; c++) {
                mean_g += dy[c] * weight[c];
                mean_gx += dy[c] * weight[c] * (x[c] - m) * s;
            }
            mean_g /= C;
            mean_gx /= C; // of g xhat
            for (int c = 0; c < C; c++)
                dx[c] += s * (dy[c] * weight[c] - mean_g - (x[c] - m) * s * mean_gx);
        }

        for (int i = i0; i < end; i++) {
            const float *x = inp + (size_t)i * C, *dy = dout + (size_t)i * C;
            OMP(omp for simd schedule(static) nowait) // as in encoder_backward()
            for (int c = 0; c < C; c++) {
                dweight[c] += dy[c] * (x[c] - mean[i]) * rstd[i];
                dbias[c] += dy[c];
            }
        }
    }
}

// Rotary positions (Su et al. 2021) turn q and k of qkv (B,T,3C) in place: channels (i, i + D/2) of
// a head turn by an angle that grows with the position: in q k^T only the distance of both remains.
// sign = -1 turns back: the gradient of a rotation is the opposite rotation.
static void rope(float *qkv, const float *cosine, const float *sine, float sign,
                 int B, int T, int C, int NH) {
    int D = C / NH, half = D / 2;
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int i = 0; i < B * T; i++) {
        const float *cs = cosine + (size_t)(i % T) * half, *sn = sine + (size_t)(i % T) * half;
        for (int h = 0; h < 2 * NH; h++) { // the heads of q, then of k
            float *x = qkv + (size_t)i * 3 * C + h * D;
            for (int j = 0; j < half; j++) {
                float x0 = x[j], x1 = x[j + half];
                x[j] = x0 * cs[j] - x1 * (sign * sn[j]); // a rotation of the pair (x0, x1)
                x[j + half] = x1 * cs[j] + x0 * (sign * sn[j]);
            }
        }
    }
}

// x (n) -> exp(scale (x - largest)), in place; returns their sum, and the largest x. The softmax of
// scale x is then x / sum. Nothing overflows, because no exponent is above zero.
static inline float exp_and_sum(float *x, int n, float scale, float *largest) {
    float most = x[0], sum = 0; // sum is at least 1: the largest x gives e^0
    OMP(omp simd reduction(max : most))
    for (int j = 0; j < n; j++) most = x[j] > most ? x[j] : most;

    OMP(omp simd reduction(+ : sum))
    for (int j = 0; j < n; j++) {
        x[j] = exp_fast(scale * (x[j] - most));
        sum += x[j];
    }
    *largest = most;
    return sum;
}

enum { QUERIES = 256 }; // attention takes so many queries of a head at a time, to save memory

// Attention of each position to every position, before and after it. For each head:
//   scores = q k^T / sqrt(D),  lse = log sum exp(scores),  out = exp(scores - lse) v
// qkv (B,T,3C) -> out (B,T,C), lse (B,NH,T). From lse the backward computes the softmax again.
static void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C,
                              int NH) {
    int D = C / NH;
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t at = (size_t)(bh / NH) * T * 3 * C + bh % NH * D; // where this head's q begins
        const float *q = qkv + at, *k = q + C, *v = k + C;
        float *y = out + (size_t)(bh / NH) * T * C + bh % NH * D;
        float *probs = (float *)malloc(sizeof(float) * QUERIES * T);
        if (!probs) die(FAILED, "no memory for attention");
        for (int t0 = 0; t0 < T; t0 += QUERIES) {
            int n = min_int(QUERIES, T - t0);
            // Rows of q, k and v are 3C apart, because they are columns of qkv.
            gemm(ABT, n, T, D, q + (size_t)t0 * 3 * C, 3 * C, k, 3 * C, probs, T, SET, NONE);
            for (int i = 0; i < n; i++) {
                float *p = probs + (size_t)i * T, largest;
                float sum = exp_and_sum(p, T, scale, &largest), inverse = 1 / sum;
                for (int j = 0; j < T; j++) p[j] *= inverse;
                lse[(size_t)bh * T + t0 + i] = scale * largest + logf(sum);
            }
            gemm(AB, n, D, T, probs, T, v, 3 * C, y + (size_t)t0 * C, C, SET, NONE);
        }
        free(probs);
    }
}

// p = exp(scores - lse), dp = dout v^T, ds = p (dp - rowsum(p dp)) / sqrt(D), gradient of q k^T:
//   dq = ds k,  dk = ds^T q,  dv = p^T dout.   dout (B,T,C) -> dqkv (B,T,3C)
static void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse,
                               int B, int T, int C, int NH) {
    int D = C / NH;
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t at = (size_t)(bh / NH) * T * 3 * C + bh % NH * D;
        const float *k = qkv + at + C, *v = k + C;
        float *dk = dqkv + at + C, *dv = dk + C;
        float *probs = (float *)malloc(2 * sizeof(float) * QUERIES * T);
        if (!probs) die(FAILED, "no memory for attention");
        float *dscores = probs + (size_t)QUERIES * T;
        for (int t0 = 0; t0 < T; t0 += QUERIES) {
            int n = min_int(QUERIES, T - t0), add = t0 > 0 ? ADD : SET; // for dk and dv
            const float *q = qkv + at + (size_t)t0 * 3 * C;
            const float *dy = dout + ((size_t)(bh / NH) * T + t0) * C + bh % NH * D;
            float *dq = dqkv + at + (size_t)t0 * 3 * C;

            gemm(ABT, n, T, D, q, 3 * C, k, 3 * C, probs, T, SET, NONE);
            gemm(ABT, n, T, D, dy, C, v, 3 * C, dscores, T, SET, NONE); // holds dp for now
            for (int i = 0; i < n; i++) {
                float *p = probs + (size_t)i * T, *ds = dscores + (size_t)i * T;
                float log_sum = lse[(size_t)bh * T + t0 + i], sum = 0;
                OMP(omp simd reduction(+ : sum))
                for (int j = 0; j < T; j++) {
                    p[j] = exp_fast(scale * p[j] - log_sum); // the softmax, as in the forward
                    sum += p[j] * ds[j];
                }
                for (int j = 0; j < T; j++) ds[j] = scale * p[j] * (ds[j] - sum);
            }

            gemm(AB, n, D, T, dscores, T, k, 3 * C, dq, 3 * C, SET, NONE);
            gemm(ATB, T, D, n, dscores, T, q, 3 * C, dk, 3 * C, add, NONE);
            gemm(ATB, T, D, n, probs, T, dy, C, dv, 3 * C, add, NONE);
        }
        free(probs);
    }
}

// GELU in tanh form: y = 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
#define GELU_SCALE 1.5957691216f // 2 sqrt(2/pi)

static void gelu_forward(float *x, float *y, size_t n) {
    OMP(omp simd)
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] / (1 + exp_fast(-GELU_SCALE * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

// With s = sigmoid(2u):  dy becomes dx = dy (s + x s (1 - s) d(2u)/dx).  inp: the forward's x
static void gelu_backward(float *dy, float *inp, size_t n) {
    OMP(omp simd)
    for (size_t i = 0; i < n; i++) {
        float x = inp[i], s = 1 / (1 + exp_fast(-GELU_SCALE * (x + 0.044715f * x * x * x)));
        float slope = GELU_SCALE * (1 + 3 * 0.044715f * x * x); // d(2u)/dx
        dy[i] *= s + x * s * (1 - s) * slope;
    }
}

// Cross entropy at masked positions (R), for the loss sum(weights * losses). logits (R,V) become
// their gradient, in place: weight (p - 1) at the target, weight p elsewhere, with p = softmax.
static void crossentropy(float *losses, float *logits, const float *weights, const int *targets,
                         const int *positions, int R, int V) {
    OMP(omp parallel for if (WORTH((size_t)R * V)))
    for (int r = 0; r < R; r++) {
        // MASK (id V) has no column: the model never predicts it. targets and weights are (B,T).
        int target = targets[positions[r]];
        float *p = logits + (size_t)r * V, logit = p[target], weight = weights[positions[r]];
        float largest, sum = exp_and_sum(p, V, 1, &largest), p_target = p[target] / sum;
        losses[r] = largest - logit + logf(sum); // -log p_target
        for (int v = 0; v < V; v++) p[v] = p[v] / sum * weight;
        p[target] = (p_target - 1) * weight;
    }
}

// For top_k (by number) and top_p (by weight): keeps the fewest likeliest tokens that reach
// `enough`, with those equal to the last. Zeroes the other weights w (V); returns the sum of w.
static double keep_likeliest(double *w, const float *logits, int V, int by_weight, double enough) {
    // The threshold is the highest with enough tokens at or above it. Bisection finds its bits.
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        double sum = 0;
        for (int v = 0; v < V; v++)
            if (float_order(logits[v]) >= (threshold | bit)) sum += by_weight ? w[v] : 1;
        if (sum >= enough) threshold |= bit;
    }

    double total = 0;
    for (int v = 0; v < V; v++) {
        if (float_order(logits[v]) < threshold) w[v] = 0;
        total += w[v];
    }
    return total;
}

// Draws a token from logits (V) with the uniform random number u, and scores it; w (V) is a buffer.
// It inverts the cumulative distribution in double precision: Gumbel noise in float32, the usual
// trick, is too coarse and works like a lower temperature (Zheng et al. 2024).
static int sample_token(const float *logits, int V, Draw d, double u, double *score, double *w) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;

    // x: a logit minus the largest, so that exp(x) is at most 1. next: the second largest x.
    double sum = 0, sum_ex = 0, total = 0, next = -INFINITY;
    for (int v = 0; v < V; v++) {
        double x = (double)logits[v] - logits[best], e = exp(x);
        sum += e;
        sum_ex += e * x;
        if (v != best) next = fmax(next, x);
        w[v] = d.temperature == 1 ? e : exp(x / d.temperature); // unused if it is 0
        total += w[v];
    }

    int chosen = best;
    if (d.temperature > 0) {
        if (d.top_k > 0 && d.top_k < V) total = keep_likeliest(w, logits, V, 0, d.top_k);
        if (d.top_p < 1) total = keep_likeliest(w, logits, V, 1, d.top_p * total);
        double left = u * total; // the token at which the running sum of w passes this
        for (int v = 0; v < V && left >= 0; v++) {
            if (w[v] > 0) chosen = v;
            left -= w[v];
        }
    }

    if (d.score == SCORE_PROBABILITY) *score = exp((double)logits[chosen] - logits[best]) / sum;
    if (d.score == SCORE_MARGIN) *score = (1 - exp(next)) / sum; // the largest has 1 / sum
    if (d.score == SCORE_ENTROPY) *score = sum_ex / sum - log(sum); // since log p = x - log(sum)
    return chosen;
}

// =================================================================================================
// 4. What a GPU does in its own way: memory, noise, a block forward and backward, head, loss, AdamW

// The activations that a pass computes and its backward needs. atty: attention's output.
typedef struct {
    float *ln1, *ln1_mean, *ln1_rstd; // (B,T,C), (B,T), (B,T)
    float *qkv, *lse, *atty;          // (B,T,3C), (B,NH,T), (B,T,C)
    float *res2;                      // (B,T,C) the residual stream after attention
    float *ln2, *ln2_mean, *ln2_rstd; // (B,T,C), (B,T), (B,T)
    float *fch, *fch_gelu;            // (B,T,4C), (B,T,4C)
} Acts;

typedef struct {
    Config config;
    Tensors params, grads, moment1, moment2;
    Tensors ema;   // a running average of params, if keeps_ema is set before model_reserve()
    int keeps_ema, training, recompute, max_B, max_T; // (max_B,max_T): what fits into memory
    int head_rows; // masked positions that go through the LM head at a time
    void *memory[NUM_MEMORIES];
    size_t bytes[NUM_MEMORIES];

    float *states; // (P+1,B,T,C) h before each pass and after the last one; in inference (B,T,C)
    Acts *acts;    // (P) of each pass; in inference or with recompute only one, for all passes
    float *cosine, *sine; // (T,D/2), (T,D/2)
    float *head_inp, *lnf, *lnf_mean, *lnf_rstd, *logits; // head_rows rows of C, C, 1, 1, V
    float *losses;                     // (R) cross entropies of the masked positions
    float *dres, *dln, *datty, *dwide; // gradients (B,T,C), (B,T,C), (B,T,C), (B,T,4C)
    float *before, *settled; // (B,T,C) for dev/tools.c: the state a loop earlier; final states
    int *x, *targets, *masked; // (B,T) tokens, before the noise, (R) positions to predict
    float *weights;            // (B,T) how much each position counts in the loss
    double *sequence_loss;     // (B) each sequence's part of the last loss
    int B, T, S, R;            // of the last forward
} Model;

// Between the program and a model's memory, which in loopmdm.cu is the GPU's.
static void write_memory(void *to, const void *from, size_t n) { memcpy(to, from, n); }
static void read_memory(void *to, const void *from, size_t n) { memcpy(to, from, n); }

// Places the Acts of one pass for BT positions at a memory address. Returns their bytes.
static size_t place_acts(Acts *a, Config c, size_t BT, char *at) {
    size_t n = 4 * BT, C = c.channels; // n: bytes of a float for each position
    const Piece pieces[] = {
        {&a->ln1, n * C}, {&a->ln1_mean, n}, {&a->ln1_rstd, n}, {&a->qkv, n * 3 * C},
        {&a->lse, n * c.heads}, {&a->atty, n * C}, {&a->res2, n * C}, {&a->ln2, n * C},
        {&a->ln2_mean, n}, {&a->ln2_rstd, n}, {&a->fch, n * 4 * C}, {&a->fch_gelu, n * 4 * C},
    };
    return lay_out(pieces, COUNT(pieces), at);
}

// The residual stream (B,T,C) that pass p reads, and that pass p-1 wrote.
static float *pass_input(const Model *m, int p) {
    return m->states + (m->training ? p : 0) * (size_t)m->B * m->T * m->config.channels;
}

// Plans memory for up to (B,T) and S loops: sets m->bytes, and the pointers if the memory is there.
// Training keeps the Acts of each pass, or with recompute only each pass's input. Inference needs
// the Acts of one pass, so there S may be any number.
static void model_plan(Model *m, int B, int T, int S, int training, int recompute) {
    Config c = m->config;
    size_t C = c.channels, V = c.vocab_size, BT = (size_t)B * T, P = num_passes(c, S);
    size_t rows = max_int(512, (1 << 22) / c.vocab_size); // 4 million logits, or 512 rows
    if (rows > BT) rows = BT;

    m->training = training;
    m->recompute = recompute;
    m->max_B = B;
    m->max_T = T;
    m->head_rows = (int)rows;
    Acts unused; // place_acts() only counts here
    char *acts_memory;
    size_t num_acts = training && !recompute ? P : 1, acts_bytes = place_acts(&unused, c, BT, NULL);

    size_t half = 2 * T * C / c.heads, grad = training ? 4 * BT * C : 0, kept = 4 * BT * C - grad;
    const Piece pieces[] = {
        {&m->sequence_loss, 8 * (size_t)B}, {&m->x, 4 * BT}, {&m->targets, 4 * BT},
        {&m->masked, 4 * BT}, {&m->weights, 4 * BT}, {&m->losses, 4 * BT},
        {&m->states, 4 * BT * C * (training ? P + 1 : 1)}, {&m->acts, num_acts * sizeof(Acts)},
        {&acts_memory, num_acts * acts_bytes}, {&m->cosine, half}, {&m->sine, half},
        {&m->head_inp, 4 * rows * C}, {&m->lnf, 4 * rows * C}, {&m->lnf_mean, 4 * rows},
        {&m->lnf_rstd, 4 * rows}, {&m->logits, 4 * rows * V},
        {&m->dres, grad}, {&m->dln, grad}, {&m->datty, grad}, {&m->dwide, 4 * grad},
        {&m->before, kept}, {&m->settled, kept},
    };
    m->bytes[ACTIVATIONS] = lay_out(pieces, COUNT(pieces), (char *)m->memory[ACTIVATIONS]);
    for (size_t p = 0; acts_memory && p < num_acts; p++)
        place_acts(&m->acts[p], c, BT, acts_memory + p * acts_bytes);

    tensors_build(&m->params, c, (float *)m->memory[PARAMETERS]);
    size_t total = m->params.total;
    m->bytes[PARAMETERS] = 4 * total;
    m->bytes[GRADIENTS] = training ? 4 * total : 0;
    m->bytes[OPTIMIZER] = training ? 4 * total * (2 + m->keeps_ema) : 0;
    float *moments = (float *)m->memory[OPTIMIZER];
    if (!training || !moments) return;
    tensors_build(&m->grads, c, (float *)m->memory[GRADIENTS]);
    tensors_build(&m->moment1, c, moments);
    tensors_build(&m->moment2, c, moments + total);
    tensors_build(&m->ema, c, m->keeps_ema ? moments + 2 * total : NULL);
}

static void model_reserve(Model *m, int B, int T, int S, int training, int recompute) {
    model_plan(m, B, T, S, training, recompute);
    for (int i = 0; i < NUM_MEMORIES; i++) m->memory[i] = allocate(m->bytes[i], 1, "the model");
    model_plan(m, B, T, S, training, recompute); // now with pointers
    rope_angles(m->cosine, m->sine, T, m->config.channels / m->config.heads); // they never change
}

static void model_free(Model *m) {
    for (int i = 0; i < NUM_MEMORIES; i++) free(m->memory[i]);
    memset(m, 0, sizeof *m);
}

// Copies all parameters, `from` (total), in the order of tensor_shapes().
static void model_set_parameters(Model *m, const float *from) {
    write_memory(m->params.data, from, m->params.total * sizeof(float));
}

// Sets the next forward's tokens: targets (B,T) with noise; the first given[b] tokens of a sequence
// are context (a question, say), never predicted. Returns R, the number of positions to predict.
static int model_noise(Model *m, const int *targets, const int *given, Noise n, int B, int T) {
    m->B = B;
    m->T = T;
    m->R = 0;
    for (int b = 0; b < B; b++) {
        // If all are MASK, sum(weights * cross entropy) estimates the NELBO, in nats per token:
        // -log p of filling in token by token, mean over all orders. -log p(data) is at most that.
        double t = noise_level(n, b);
        float weight = (float)(1 / (t * n.total * (T - given[b]))); // context does not count
        for (int i = b * T; i < (b + 1) * T; i++) {
            double u = random_uniform(n.seed, STREAM_MASK, n.step, (uint64_t)n.first * T + i);
            int predicted = i - b * T >= given[b] && u < t; // and MASK, unless it stays visible
            m->targets[i] = targets[i];
            m->x[i] = predicted && u >= n.visible * t ? m->config.vocab_size : targets[i];
            m->weights[i] = predicted ? weight : 0;
            if (predicted) m->masked[m->R++] = i;
        }
    }
    return m->R;
}

// Pass p with the weights of this layer, from pass_input(p) to pass_input(p + 1). It is GPT-2's
// block, but with rotary positions and without the causal mask.
static void block_forward(Model *m, int p, int layer) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    float *w[NUM_TENSORS], *inp = pass_input(m, p), *out = pass_input(m, p + 1);
    layer_tensors(w, &m->params, layer);
    Acts a = m->acts[m->training && !m->recompute ? p : 0]; // 0: all passes share one

    // Attention mixes positions.
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, w[LN1W], w[LN1B], BT, C);
    Epilogue add_bias = {w[QKVB], NULL, NULL, NULL, NULL};
    matmul_forward(a.qkv, a.ln1, w[QKVW], BT, C, 3 * C, add_bias);
    rope(a.qkv, m->cosine, m->sine, 1, B, T, C, NH);
    attention_forward(a.atty, a.lse, a.qkv, B, T, C, NH);
    Epilogue add_inp = {w[ATTPROJB], inp, NULL, NULL, NULL};
    matmul_forward(a.res2, a.atty, w[ATTPROJW], BT, C, C, add_inp);

    // The MLP works on each position by itself.
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.res2, w[LN2W], w[LN2B], BT, C);
    Epilogue gelu = {w[FCB], NULL, gelu_forward, a.fch_gelu, NULL};
    Epilogue add_res2 = {w[FCPROJB], a.res2, NULL, NULL, NULL};
    matmul_forward(a.fch, a.ln2, w[FCW], BT, C, 4 * C, gelu);
    matmul_forward(out, a.fch_gelu, w[FCPROJW], BT, 4 * C, C, add_res2);
}

// Its mirror: m->dres is the gradient of pass_input(p + 1) and becomes that of pass_input(p). The
// residual connections hand it on as it is; each branch adds its part in layernorm_backward().
static void block_backward(Model *m, int p, int layer) {
    if (m->recompute) block_forward(m, p, layer); // the same numbers again
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    float *w[NUM_TENSORS], *dw[NUM_TENSORS];
    float *dres = m->dres, *dln = m->dln, *datty = m->datty, *dwide = m->dwide;
    layer_tensors(w, &m->params, layer);
    layer_tensors(dw, &m->grads, layer);
    Acts a = m->acts[m->training && !m->recompute ? p : 0];

    // The MLP, from its end to its beginning.
    matmul_backward(dwide, dw[FCPROJW], dw[FCPROJB], dres, a.fch_gelu, w[FCPROJW], BT, 4 * C, C,
                    (Epilogue){NULL, NULL, gelu_backward, a.fch, NULL});
    matmul_backward(dln, dw[FCW], dw[FCB], dwide, a.ln2, w[FCW], BT, C, 4 * C, NONE);
    layernorm_backward(dres, dw[LN2W], dw[LN2B], dln, a.res2, w[LN2W], a.ln2_mean, a.ln2_rstd,
                       BT, C);

    // Attention. Its dqkv takes the place of the MLP's gradient in dwide.
    matmul_backward(datty, dw[ATTPROJW], dw[ATTPROJB], dres, a.atty, w[ATTPROJW], BT, C, C, NONE);
    attention_backward(dwide, datty, a.qkv, a.lse, B, T, C, NH);
    rope(dwide, m->cosine, m->sine, -1, B, T, C, NH);
    matmul_backward(dln, dw[QKVW], dw[QKVB], dwide, a.ln1, w[QKVW], BT, C, 3 * C, NONE);
    layernorm_backward(dres, dw[LN1W], dw[LN1B], dln, pass_input(m, p), w[LN1W], a.ln1_mean,
                       a.ln1_rstd, BT, C);
}

// The LM head for R <= head_rows positions: m->logits (R,V) = LayerNorm(last state) wte^T.
static void head_forward(Model *m, const int *positions, int R) {
    int C = m->config.channels;
    float **w = m->params.tensor, *last = pass_input(m, num_passes(m->config, m->S)); // (B,T,C)
    for (int r = 0; r < R; r++)
        memcpy(m->head_inp + (size_t)r * C, last + (size_t)positions[r] * C, C * sizeof(float));
    layernorm_forward(m->lnf, m->lnf_mean, m->lnf_rstd, m->head_inp, w[LNFW], w[LNFB], R, C);
    matmul_forward(m->logits, m->lnf, w[WTE], R, C, m->config.vocab_size, NONE);
}

// From dlogits (R,V), in m->logits, to m->dres at these positions. m->datty serves as a buffer.
static void head_backward(Model *m, const int *positions, int R) {
    int C = m->config.channels, V = m->config.vocab_size;
    float **w = m->params.tensor, **dw = m->grads.tensor;
    matmul_backward(m->dln, dw[WTE], NULL, m->logits, m->lnf, w[WTE], R, C, V, NONE);
    memset(m->datty, 0, (size_t)R * C * sizeof(float));
    layernorm_backward(m->datty, dw[LNFW], dw[LNFB], m->dln, m->head_inp, w[LNFW], m->lnf_mean,
                       m->lnf_rstd, R, C);
    for (int r = 0; r < R; r++)
        memcpy(m->dres + (size_t)positions[r] * C, m->datty + (size_t)r * C, C * sizeof(float));
}

// The loss of the last forward: sum of weights * cross entropy over the masked positions. With
// `backward` it also leaves the gradient of the last state in m->dres.
static double model_loss(Model *m, int backward) {
    double loss = 0;
    int V = m->config.vocab_size;
    if (backward) memset(m->dres, 0, (size_t)m->B * m->T * m->config.channels * sizeof(float));
    for (int r0 = 0; r0 < m->R; r0 += m->head_rows) { // in parts: all logits never exist together
        int n = min_int(m->head_rows, m->R - r0), *positions = m->masked + r0;
        head_forward(m, positions, n);
        crossentropy(m->losses + r0, m->logits, m->weights, m->targets, positions, n, V);
        if (backward) head_backward(m, positions, n);
    }

    memset(m->sequence_loss, 0, m->B * sizeof(double));
    for (int r = 0; r < m->R; r++) // in double: the sum over a batch has many small terms
        m->sequence_loss[m->masked[r] / m->T] += (double)m->weights[m->masked[r]] * m->losses[r];
    for (int b = 0; b < m->B; b++) loss += m->sequence_loss[b];
    return loss;
}

// Draws a token for each of n positions of the last forward: token (n), score (n). ids[b] is the
// number of sequence b among all that are sampled, so that it draws the same in any batch.
static void model_sample(Model *m, int *token, double *score, const int *positions, int n,
                         const int *ids, Draw d, uint64_t step) {
    int T = m->T, V = m->config.vocab_size;
    m->R = n; // dev/tools.c counts operations by it
    for (int r0 = 0; r0 < n; r0 += m->head_rows) { // in parts, as in model_loss()
        int R = min_int(m->head_rows, n - r0);
        head_forward(m, positions + r0, R);
        OMP(omp parallel for if (WORTH((size_t)R * V)))
        for (int r = r0; r < r0 + R; r++) {
            uint64_t index = (uint64_t)ids[positions[r] / T] * T + positions[r] % T;
            double u = random_uniform(d.seed, STREAM_TOKEN, step, index);
            double *w = (double *)allocate(V, sizeof(double), "sampling");
            token[r] = sample_token(m->logits + (size_t)(r - r0) * V, V, d, u, &score[r], w);
            free(w);
        }
    }
}

// The norm of all gradients together.
static double gradient_norm(const Model *m) {
    double sum = 0;
    OMP(omp simd reduction(+ : sum))
    for (size_t i = 0; i < m->grads.total; i++) sum += pow(m->grads.data[i], 2);
    return sqrt(sum);
}

// One step of AdamW for one tensor; it clears the gradient. See model_update() below.
static void adamw(Model *m, int tensor, AdamWStep s) {
    size_t n = m->params.size[tensor];
    float *p = m->params.tensor[tensor], *grad = m->grads.tensor[tensor];
    float *m1 = m->moment1.tensor[tensor], *m2 = m->moment2.tensor[tensor];
    float *average = m->ema.tensor[tensor]; // NULL without --ema
    OMP(omp parallel for simd if (parallel : WORTH(n)))
    for (size_t i = 0; i < n; i++) {
        float g = s.scale * grad[i]; // clipped
        m1[i] = s.beta1 * m1[i] + (1 - s.beta1) * g;
        m2[i] = s.beta2 * m2[i] + (1 - s.beta2) * g * g;
        p[i] = s.keep * p[i] - s.step_size * m1[i] / (sqrtf(m2[i]) * s.correct + s.eps);
        if (average) average[i] = s.ema * average[i] + (1 - s.ema) * p[i];
        grad[i] = 0; // the next step adds to it
    }
}
#endif // BACKEND

// =================================================================================================
// 5. The model, the same on CPU and GPU

// A model without memory: only its sizes are known.
static void model_build(Model *m, Config c) {
    memset(m, 0, sizeof *m);
    m->config = c;
    tensors_build(&m->params, c, NULL);
}

// Sets the next forward's tokens, x (B,T).
static void model_tokens(Model *m, const int *x, int B, int T) {
    m->B = B;
    m->T = T;
    write_memory(m->x, x, (size_t)B * T * sizeof(int));
}

// A forward of m->x (B,T) with S loops. The result is pass_input(m, num_passes(m->config, S)).
static void model_forward(Model *m, int S) {
    float **w = m->params.tensor;
    m->S = S;
    encoder_forward(m->states, m->x, w[WTE], w[WPE], m->B, m->T, m->config.channels);
    for (int p = 0; p < num_passes(m->config, S); p++) {
        int layer = layer_of_pass(m->config, S, p); // a layer of the loop comes S times
        block_forward(m, p, layer);
    }
}

// From m->dres, the gradient of the last state, to the gradients of all parameters.
static void model_backward(Model *m) {
    for (int p = num_passes(m->config, m->S) - 1; p >= 0; p--) {
        int layer = layer_of_pass(m->config, m->S, p); // its gradient is added up S times
        block_backward(m, p, layer);
    }
    float **dw = m->grads.tensor;
    encoder_backward(dw[WTE], dw[WPE], m->dres, m->x, m->B, m->T, m->config.channels);
}

typedef struct { double lr, beta1, beta2, eps, weight_decay, clip, ema; } AdamW;

// Optimizer step number step (from 1): AdamW (Loshchilov and Hutter 2019) with the gradients in
// m->grads, whose norm is clipped. Only matrices decay: biases and gains are not what overfits.
static void model_update(Model *m, AdamW o, double norm, int step) {
    AdamWStep s = {(float)fmin(1, o.clip / (norm + 1e-6)), (float)o.beta1, (float)o.beta2, 0, 0, 0,
                   (float)o.eps, 0};

    // The moments start at zero, which makes them too small at first. 1 - beta^step corrects it.
    s.correct = (float)(1 / sqrt(1 - pow(o.beta2, step)));
    s.ema = (float)fmin(o.ema, (1.0 + step) / (10 + step)); // at first less, or its start stays
    for (int t = 0; t < NUM_TENSORS; t++) {
        // All L layers add to one stream. What adds to it learns L times slower, or it would jump.
        double lr = m->params.ends_branch[t] ? o.lr / m->config.layers : o.lr;
        s.step_size = (float)(lr / (1 - pow(o.beta1, step)));
        s.keep = (float)(1 - (m->params.is_matrix[t] ? lr * o.weight_decay : 0));
        adamw(m, t, s);
    }
}

// =================================================================================================
// 6. Training step and NELBO (negative evidence lower bound: see model_noise())

// A shard is a file of tokens. Sequences begin anywhere (stride 1), or at multiples of T (stride T)
// if each is complete in itself, such as a Sudoku; none goes on in the next shard.
typedef struct { const uint16_t *tokens; int64_t count; } Shard;
typedef struct {
    Shard *shards;
    int num_shards, stride;
    int separator; // the token that ends a sequence's context, which is never masked; -1: none
} Data;

// How many sequences of T tokens begin at multiples of stride: in one shard, then in all of d.
static int64_t shard_sequences(Shard s, int T, int stride) {
    return s.count < T ? 0 : (s.count - T) / stride + 1;
}

static int64_t data_sequences(const Data *d, int T, int stride) {
    int64_t n = 0;
    for (int i = 0; i < d->num_shards; i++) n += shard_sequences(d->shards[i], T, stride);
    return n;
}

// Copies sequence number `index` of those to tokens (T). Returns the length of its context, which
// ends with the first separator after position 0, or 0 if there is none.
static int data_sequence(const Data *d, int *tokens, int64_t index, int T, int stride) {
    const Shard *s = d->shards;
    for (; index >= shard_sequences(*s, T, stride); s++) index -= shard_sequences(*s, T, stride);
    for (int t = 0; t < T; t++) tokens[t] = s->tokens[index * stride + t];
    for (int t = 1; d->separator >= 0 && t < T; t++)
        if (tokens[t] == d->separator) return t + 1; // the separator itself is given too
    return 0;
}

// Of a step (from 0): linear warmup, then a cosine from lr down to floor * lr.
static double learning_rate(double lr, double floor, int warmup, int steps, int step) {
    if (step < warmup) return lr * (step + 1) / warmup;
    double done = fmin(1, (step - warmup) / fmax(1, steps - warmup)); // from 0 to 1
    return lr * (floor + (1 - floor) * 0.5 * (1 + cos(3.14159265358979323846 * done)));
}

// The share of predicted tokens that stay visible falls from a half to none over the first `warmup`
// steps. To predict what it sees keeps a model's vectors of words apart. Else words that stand in
// the same places become one vector before it learns to copy them (dev/experiments/README.md, 15).
static double visible_share(int warmup, int step) {
    return step < warmup ? 0.5 * (1 - (double)step / warmup) : 0;
}

typedef struct { uint64_t seed; int sequences, B; double visible; } Batches; // of a step
typedef struct { int masked; double loss, mean_t, norm; } Gradient; // of a step; norm: of m->grads

// For several processes (dev/processes.h): these add up what all have, and all get the sum.
static void (*reduce_gradients)(Model *m, Gradient *g), (*reduce)(double *x, int n);

// Adds the gradient of step number step (from 0) with S loops to m->grads, which are zero. The step
// takes random sequences of the data, each with its own noise, B at a time; B divides each share.
static Gradient train_gradient(Model *m, const Data *d, Batches r, int step, int S) {
    int T = m->config.max_seq_len, B = r.B;
    uint64_t available = (uint64_t)data_sequences(d, T, d->stride);
    int *targets = (int *)allocate((size_t)B * (T + 1), sizeof(int), "a batch");
    int *given = targets + (size_t)B * T;
    Gradient g = {0, 0, 0, 0};

    // A process takes its share of the sequences, B at a time. The noise of a sequence depends only
    // on its number in the step. So B and processes change only the rounding of sums.
    int share = r.sequences / ranks, end = (rank + 1) * share;
    for (int first = rank * share; first < end; first += B) {
        Noise noise = {r.seed, (uint64_t)step, first, r.sequences, r.visible};
        for (int b = 0; b < B; b++) {
            uint64_t index = random_bits(r.seed, STREAM_BATCH, step, first + b) % available;
            given[b] = data_sequence(d, targets + b * T, (int64_t)index, T, d->stride);
            g.mean_t += noise_level(noise, b) / r.sequences;
        }
        g.masked += model_noise(m, targets, given, noise, B, T);
        model_forward(m, S);
        g.loss += model_loss(m, 1);
        model_backward(m);
    }
    if (ranks > 1) reduce_gradients(m, &g);
    g.norm = gradient_norm(m);
    free(targets);
    return g;
}

// The loops of inference: S, or with tau > 0 (in dev/tools.c) fewer where they change little.
typedef struct { int S; double tau; } Loops;

static void fixed_loops(Model *m, Loops loops, int *used) { // used (B): each sequence's loops
    model_forward(m, loops.S);
    for (int b = 0; b < m->B; b++) used[b] = loops.S;
}

static void (*forward_loops)(Model *m, Loops loops, int *used) = fixed_loops; // may be replaced

// Evaluation sequence r of n, which are spread over the data; if it has fewer, they begin again.
static int evaluation_sequence(const Data *d, int *tokens, int r, int n, int T) {
    int64_t available = data_sequences(d, T, T), apart = available > n ? available / n : 1;
    return data_sequence(d, tokens, r * apart % available, T, T);
}

// Loads evaluation sequences first .. first+B-1 of n and masks them; returns their noise.
static Noise evaluation_batch(Model *m, const Data *d, int *targets, int *given, int first, int B,
                              int n, uint64_t seed) {
    int T = m->config.max_seq_len;
    Noise noise = {seed, 0, first, n, 0};
    for (int b = 0; b < B; b++)
        given[b] = evaluation_sequence(d, targets + (size_t)b * T, first + b, n, T);
    model_noise(m, targets, given, noise, B, T);
    return noise;
}

typedef struct { double nelbo, error; } Evaluation; // error: the NELBO's standard error

// The NELBO of n sequences, in nats per token; nelbo (n) is each sequence's. The masks depend only
// on seed and n, so each S and each model of the same T sees the same ones.
static Evaluation evaluate(Model *m, const Data *d, Loops loops, int n, int B, uint64_t seed,
                           double *nelbo) {
    int T = m->config.max_seq_len;
    int *targets = (int *)allocate((size_t)B * (T + 2), sizeof(int), "a batch");
    int *given = targets + (size_t)B * T, *used = given + B;
    Evaluation e = {0, 0};
    memset(nelbo, 0, n * sizeof(double)); // of other processes' sequences
    for (int first = rank * B; first < n; first += ranks * B) {
        int size = min_int(B, n - first);
        evaluation_batch(m, d, targets, given, first, size, n, seed);
        forward_loops(m, loops, used);
        model_loss(m, 0);
        for (int b = 0; b < size; b++)
            nelbo[first + b] = m->sequence_loss[b] * n; // the weights divide by n
    }
    if (ranks > 1) reduce(nelbo, n);

    for (int r = 0; r < n; r++) e.nelbo += nelbo[r] / n;
    for (int r = 0; r < n; r++) e.error += pow(nelbo[r] - e.nelbo, 2) / (n - 1); // NaN if n = 1
    e.error = sqrt(e.error / n); // an upper estimate, because the t are spread evenly
    free(targets);
    return e;
}

// =================================================================================================
// 7. Sampler
//
// Step j of N goes from noise level t = 1 - j/N to s = 1 - (j+1)/N. The order says which masked
// positions it fills in:
//   random: each with probability (t - s) / t = 1 / (N - j), for N = 4: 1/4, 1/3, 1/2, 1 (MDLM)
//   confidence, margin, entropy: all are predicted, and the best by score (see Draw) are kept, so
//     that a share (j+1)/N of the blanks is filled in (LLaDA; Kim et al. 2025; Dream)
//   threshold: all whose probability is above it, at least one, in as many steps as that takes

enum { ORDER_RANDOM, ORDER_CONFIDENCE, ORDER_MARGIN, ORDER_ENTROPY, ORDER_THRESHOLD };
typedef struct {
    int steps, order, block; // block: positions in a block, see find_turn(); 0: all
    double threshold;
    Loops loops;
    Draw draw; // its score must fit the order
} SampleOptions;

// The block that is filled in now: positions begin .. end-1; this is step `step` of its `steps`.
typedef struct { int begin, end, step, steps; } Turn;

// The K blocks with blanks come one after the other: the text grows from left to right. They share
// the N >= K steps evenly; if K = 2, N = 5, block 0 has steps 0 .. 1, block 1 steps 2 .. 4.
static Turn find_turn(const char *blank, int T, int block, int64_t step, int64_t N) {
    int64_t K = 0, first = 0, k = 0;
    for (int t = 0; t < T; t += block) K += memchr(blank + t, 1, min_int(block, T - t)) != NULL;
    for (int t = 0; t < T; t += block) {
        if (!memchr(blank + t, 1, min_int(block, T - t))) continue;
        int64_t end = ++k * N / K; // this block has steps first .. end-1
        if (step < end)
            return (Turn){t, min_int(T, t + block), (int)(step - first), (int)(end - first)};
        first = end;
    }
    return (Turn){0, 0, 0, 1};
}

// Fills in every MASK of x (B,T); other tokens never change. Sequence b is number first + b among
// all that are sampled. show, if not NULL, is called after a step.
static void sample(Model *m, int *x, int B, int T, SampleOptions o, int first,
                   void (*show)(const int *x, int T, int step, void *data), void *data) {
    int BT = B * T, mask = m->config.vocab_size, block = o.block ? o.block : T, left = 0;
    int threshold = o.order == ORDER_THRESHOLD, ranked = !threshold && o.order != ORDER_RANDOM;
    char *blank = (char *)allocate(BT, 1, "sampling"); // 1: MASK at the start; threshold: MASK now
    double *score = (double *)allocate(BT, sizeof(double), "sampling");
    int *active = (int *)allocate((size_t)B * (4 * T + 3), sizeof(int), "sampling");
    int *position = active + BT, *place = position + BT, *token = place + BT; // (R)
    int *ids = token + BT, *quota = ids + B, *used = quota + B; // (n)
    for (int i = 0; i < BT; i++) left += (blank[i] = x[i] == mask);

    for (int step = 0; threshold ? left > 0 : step < o.steps; step++) {
        // R candidates, number r at x[position[r]] and active[place[r]]; active: their n sequences.
        int R = 0, n = 0;
        for (int b = 0; b < B; b++) {
            int blanks = 0, filled = 0, R0 = R; // threshold: full blocks are gone: take the first
            int turn_step = threshold ? 0 : step, steps = threshold ? T : o.steps; // T: >= K
            Turn turn = find_turn(blank + b * T, T, block, turn_step, steps);
            double chance = o.order == ORDER_RANDOM ? 1.0 / (turn.steps - turn.step) : 1;
            for (int t = turn.begin; t < turn.end; t++) {
                int at = b * T + t;
                uint64_t index = (uint64_t)(first + b) * T + t;
                blanks += blank[at];
                filled += blank[at] && x[at] != mask;
                double u = random_uniform(o.draw.seed, STREAM_UNMASK, step, index); // below 1
                if (x[at] != mask || u >= chance) continue;
                position[R] = at;
                place[R++] = n * T + t;
            }

            // How many to keep: all, or as many as fill in the share (step+1)/steps of the blanks.
            quota[n] = R - R0;
            if (ranked) quota[n] = (int)((int64_t)blanks * (turn.step + 1) / turn.steps) - filled;
            if (quota[n] <= 0) R = R0;
            if (R == R0) continue;
            memcpy(active + n * T, x + b * T, T * sizeof(int));
            ids[n++] = first + b;
        }
        if (R == 0) continue;

        model_tokens(m, active, n, T);
        forward_loops(m, o.loops, used);
        model_sample(m, token, score, place, R, ids, o.draw, step);
        for (int i = 0, r0 = 0, r1 = 0; i < n; i++, r0 = r1) {
            // Of sequence i's candidates, r0 .. r1-1, those with the best scores are kept.
            int sure = 0;
            for (; r1 < R && place[r1] / T == i; r1++) sure += score[r1] > o.threshold;
            for (int k = threshold ? max_int(1, sure) : quota[i]; k > 0; k--, left--) {
                int best = -1;
                for (int r = r0; r < r1; r++) {
                    int open = x[position[r]] == mask; // not kept yet
                    if (open && (best < 0 || score[r] > score[best])) best = r;
                }
                if (best < 0 || !isfinite(score[best]))
                    die(FAILED, "--model: its probabilities are not finite: training went wrong");
                x[position[best]] = token[best];
                blank[position[best]] = !threshold; // threshold: full blocks get no turn
            }
        }
        if (show) show(x, T, step, data);
    }
    free(blank);
    free(score);
    free(active);
}

// =================================================================================================
// 8. Data and checkpoints
//
// A file starts with int32[256]: a magic number, a version, and more. A token shard (llm.c's): the
// number of tokens, then uint16 tokens. model.bin: configuration, step and checksum, then the
// parameters in the order of tensor_shapes().

enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, MODEL_MAGIC = 20260525 };
enum { AT_CONFIG = 2, AT_STEP = 11, AT_CRC = 12 }; // places in model.bin's header

// Maps a whole file. Exits unless it is a regular file with this magic and version (0: any).
static int *map_file(const char *path, int magic, int version, const char *kind, size_t *bytes) {
    struct stat info;
    int file = open(path, O_RDONLY | O_NONBLOCK); // if it is a pipe, it does not wait for a writer
    if (file < 0 || fstat(file, &info))
        die(FAILED, "cannot open %s %s: %s", kind, path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die(FAILED, "%s is a folder, device or pipe, not a %s", path, kind);
    *bytes = (size_t)info.st_size;
    if (*bytes < 4 * HEADER_INTS)
        die(FAILED, "%s is too short for a %s: empty or cut off", path, kind);

    // MAP_PRIVATE: what we write stays in this process.
    int *map = (int *)mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) die(FAILED, "cannot map %s: %s", path, strerror(errno));
    close(file);
    if (map[0] != magic)
        die(FAILED, "%s is not a %s: its first number is %d, not %d", path, kind, map[0], magic);
    if (version && map[1] != version)
        die(FAILED, "%s: version %d of a %s; known is %d", path, map[1], kind, version);
    return map;
}

// Opens n shards, for sequences of T tokens. It checks each token.
static Data data_open(const char *const *paths, int n, int vocab_size, int T) {
    Data d = {(Shard *)allocate(n, sizeof(Shard), "shards"), n, 1, -1};
    for (int i = 0; i < n; i++) {
        size_t bytes;
        const int *file = map_file(paths[i], SHARD_MAGIC, 1, "token shard", &bytes);
        Shard s = {(const uint16_t *)(file + HEADER_INTS), file[2]};
        bytes -= 4 * HEADER_INTS;
        if (s.count < 0 || bytes != 2 * (size_t)s.count)
            die(FAILED, "%s is damaged: its header says %lld tokens of 2 bytes; %zu bytes follow",
                paths[i], (long long)s.count, bytes);
        for (int64_t j = 0; j < s.count; j++) // a wrong tokenizer would give nonsense
            if (s.tokens[j] >= vocab_size)
                die(FAILED, "%s: token %lld is %d, outside the vocabulary of %d: was it made with "
                    "another tokenizer?", paths[i], (long long)j, s.tokens[j], vocab_size);
        d.shards[i] = s;
    }
    if (!data_sequences(&d, T, 1))
        die(FAILED, "%s%s: too short, no shard has %d tokens; use more text or a smaller --seq-len",
            paths[0], n > 1 ? " and the others" : "", T);
    return d;
}

static char *concat(const char *a, const char *b) { // the caller frees it
    char *s = (char *)allocate(strlen(a) + strlen(b) + 1, 1, "a name");
    return strcat(strcpy(s, a), b);
}

#if __has_include("dev/files.h")
#include "dev/files.h" // crc32() is faster; what was on the disk stays until the new file is whole
#else
// The checksum of zlib, which notices a damaged file. crc: that of what comes before, or 0.
static uint32_t crc32(uint32_t crc, const void *data, size_t n) {
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= ((const unsigned char *)data)[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

// Writes a header, with a checksum, and parts of n floats each, which are in the model's memory.
static void checkpoint_save(const char *path, const int *header, const float *const *parts,
                            int num_parts, size_t n) {
    size_t bytes = 4 * (HEADER_INTS + num_parts * n);
    int *data = (int *)allocate(bytes, 1, "a checkpoint");
    memcpy(data, header, 4 * HEADER_INTS);
    for (int i = 0; i < num_parts; i++) read_memory(data + HEADER_INTS + i * n, parts[i], 4 * n);
    data[AT_CRC] = (int)crc32(0, data, bytes); // taken while its own place is zero
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, bytes, file) != bytes || fclose(file))
        die(FAILED, "cannot write %s: %s", path, strerror(errno));
    free(data);
}
#endif

// Writes folder/model.bin: the parameters, or their average if there is one.
static void model_save(const Model *m, const char *folder, int step) {
    int header[HEADER_INTS] = {MODEL_MAGIC, 1};
    memcpy(header + AT_CONFIG, &m->config, sizeof m->config); // nine numbers
    header[AT_STEP] = step;
    const float *part = m->keeps_ema ? m->ema.data : m->params.data;
    char *path = concat(folder, "/model.bin");
    checkpoint_save(path, header, &part, 1, m->params.total);
    free(path);
}

static int checksum_fits(int *file, size_t bytes) { // of a mapped checkpoint
    uint32_t crc = (uint32_t)file[AT_CRC];
    file[AT_CRC] = 0; // as it was when the checksum was taken
    return crc32(0, file, bytes) == crc;
}

// Builds m, without memory, from a mapped file with all parameters `parts` times; checks the file.
static void checkpoint_check(Model *m, int *file, size_t bytes, int parts, const char *path) {
    Config c;
    memcpy(&c, file + AT_CONFIG, sizeof c);
    if (config_error(c)) die(FAILED, "%s is damaged: %s", path, config_error(c));
    model_build(m, c);
    if (bytes != 4 * (HEADER_INTS + parts * m->params.total))
        die(FAILED, "%s is damaged: its size is not that of its parameters", path);
    if (!checksum_fits(file, bytes)) die(FAILED, "%s is damaged: its checksum is wrong", path);
}

// Builds m from folder/model.bin. Returns the file; the parameters follow its header.
static const int *model_open(Model *m, const char *folder) {
    size_t bytes;
    char *path = concat(folder, "/model.bin");
    int *file = map_file(path, MODEL_MAGIC, 1, "model", &bytes);
    checkpoint_check(m, file, bytes, 1, path);
    free(path);
    return file;
}

#ifndef TOOLS
// =================================================================================================
// 9. Command line: the smallest that trains, evaluates and samples. dev/tools.c has the full one.

static int num_args;
static char **args; // those of main()

// The value after --name, or `otherwise` if the option is not there.
static const char *option(const char *name, const char *otherwise) {
    for (int i = 2; i + 1 < num_args; i += 2)
        if (!strcmp(args[i], name)) {
            args[i] = (char *)""; // what is left is unknown: see check_options()
            return args[i + 1];
        }
    if (!otherwise) die(USAGE, "%s needs %s", args[1], name);
    return otherwise;
}

static double number(const char *name, double otherwise, double least) {
    const char *text = option(name, "");
    char *end = (char *)text;
    double x = *text ? strtod(text, &end) : otherwise;
    if (*end || !(x >= least && x <= INT_MAX) || (least > 0 && x != floor(x))) // no default: 0
        die(USAGE, "%s is %g to 2^31%s, not '%s'", name, least, least > 0 ? ", whole" : "", text);
    return x;
}

static void check_options(void) {
    for (int i = 2; i < num_args; i += 2)
        if (*args[i] || i + 1 == num_args) die(USAGE, "%s does not know %s", args[1], args[i]);
}

static void train(void) {
    Config c = preset(option("--model", "nano"), (int)number("--vocab", 0, 1));
    if (!c.layers) die(USAGE, "--model takes d2, nano, d6 or d12");
    c.max_seq_len = (int)number("--seq-len", c.max_seq_len, 1); // else that of the preset
    if (config_error(c)) die(USAGE, "impossible model: %s", config_error(c));
    int steps = (int)number("--steps", 2000, 1), B = (int)number("--batch", 16, 1);
    double lr = number("--lr", 2e-3, 0), warmup = number("--warmup", 100, 0);
    double noise_warmup = number("--noise-warmup", 0, 0);
    const char *out = option("--out", NULL), *path = option("--data", NULL);
    Data data = data_open(&path, 1, c.vocab_size, c.max_seq_len);
    Batches batches = {(uint64_t)number("--seed", 1, 0), B, B, 0};
    check_options();

    Model m;
    model_build(&m, c);
    model_reserve(&m, B, c.max_seq_len, c.max_loops, 1, 0); // for training, without recompute
    init_parameters(m.params.data, c, batches.seed);
    if (mkdir(out, 0777)) die(FAILED, "--out: cannot make %s: %s", out, strerror(errno));
    for (int step = 0; step < steps; step++) {
        int S = draw_loops(c.max_loops, batches.seed, step);
        batches.visible = visible_share((int)noise_warmup, step);
        Gradient g = train_gradient(&m, &data, batches, step, S);
        AdamW o = {learning_rate(lr, 0.1, (int)warmup, steps, step), 0.9, 0.95, 1e-8, 0.1, 1, 0};
        model_update(&m, o, g.norm, step + 1);
        printf("step %d/%d | loss %.4f | loops %d\n", step + 1, steps, g.loss, S);
        if (!isfinite(g.norm)) die(FAILED, "the gradient is not finite: try a lower --lr");
    }
    model_save(&m, out, steps);
    model_free(&m);
}

// Opens the model in the folder --model for B sequences. Returns its number of loops, --loops.
static Loops open_model(Model *m, int B) {
    const int *file = model_open(m, option("--model", NULL));
    model_reserve(m, B, m->config.max_seq_len, 1, 0, 0);
    model_set_parameters(m, (const float *)(file + HEADER_INTS));
    return (Loops){(int)number("--loops", m->config.max_loops, 1), 0};
}

static void eval(void) {
    Model m;
    Loops loops = open_model(&m, 16);
    const char *path = option("--data", NULL);
    Data data = data_open(&path, 1, m.config.vocab_size, m.config.max_seq_len);
    int n = (int)number("--rows", 1024, 2);
    check_options();
    double *nelbo = (double *)allocate(n, sizeof(double), "the sequences");
    Evaluation e = evaluate(&m, &data, loops, n, 16, 1, nelbo);
    printf("NELBO with %d loops: %.4f +- %.4f nats per token\n", loops.S, e.nelbo, e.error);
}

// Writes one sequence from nothing, as token ids.
static void sample_ids(void) {
    Model m;
    Loops loops = open_model(&m, 1);
    int T = m.config.max_seq_len, *x = (int *)allocate(T, sizeof(int), "the sequence");
    Draw draw = {number("--temperature", 1, 0), 0, 1, SCORE_PROBABILITY, 1};
    draw.seed = (uint64_t)number("--seed", 1, 0);
    SampleOptions o = {(int)number("--steps", 32, 1), ORDER_CONFIDENCE, 0, 0, loops, draw};
    check_options();
    for (int t = 0; t < T; t++) x[t] = m.config.vocab_size; // MASK
    sample(&m, x, 1, T, o, 0, NULL, NULL);
    for (int t = 0; t < T; t++) printf("%d%c", x[t], t + 1 < T ? ' ' : '\n');
}

int main(int argc, char **argv) {
    num_args = argc;
    args = argv;
    const char *command = argc > 1 ? argv[1] : "";
    if (!strcmp(command, "train")) train();
    else if (!strcmp(command, "eval")) eval();
    else if (!strcmp(command, "sample")) sample_ids();
    else die(USAGE, "usage: loopmdm train | eval | sample --option value ...");
    if (fflush(stdout) || ferror(stdout)) die(FAILED, "cannot write to standard output");
}
#endif
