/*
LoopMDM on the CPU: the looped masked diffusion language model (arXiv 2605.26106) in one file of plain C.

A masked diffusion model learns to fill in text whose tokens were replaced by MASK, at every share of masks from
almost none to all. It then writes by filling in: from all MASK to no MASK, a few tokens at a time, in any order.
LoopMDM runs a few early-middle layers several times with the same weights: more depth, no more parameters.

    x (B,T) tokens, some of them MASK
      -> embed   h = wte[x] + wpe[position]
      -> head    layers 0 .. a-1       once
      -> loop    layers a .. b-1       S times, shared weights
      -> tail    layers b .. L-1       once
      -> final LayerNorm on the masked rows, logits = h wte^T

The file reads from top to bottom:

    1. configuration and parameters      6. data, tokenizer, checkpoints
    2. randomness and noise              7. training step and evaluation
    3. layers, forward and backward      8. sampler
    4. model                             9. command line
    5. optimizer

Build with make, or:  cc -O3 -march=native -ffp-contract=fast -fopenmp loopmdm.c -o loopmdm -lm
Without OpenMP it runs on one thread. Results do not depend on the number of threads, not even in the last bit:
work is divided so that every sum is taken in the same order whoever computes it.
*/
// loopmdm.cu is this program for a GPU. It takes sections 1 and 2 from here (with LOOPMDM_CU = 1), has its own 3 to 5, and takes the
// rest (with LOOPMDM_CU = 2). Functions marked HOST_DEVICE run on both sides there.
#if LOOPMDM_CU != 2
#ifndef HOST_DEVICE
#define HOST_DEVICE
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE  // mmap, glob, open_memstream, ioctl on Linux ...
#endif
#define _DARWIN_C_SOURCE // ... and on macOS
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "dev/data/unicode.h" // which code points are letters, numbers, spaces: GPT-2's pre-tokenization asks

#ifdef _OPENMP
#include <omp.h>
#define OMP(directive) _Pragma(#directive)
#define WORTH(operations) ((operations) > 20000) // threads take microseconds to wake up: is there enough to do?
#else
#define OMP(directive)
#endif

enum { FAILED = 1, USAGE = 2 }; // exit status

// One line that says what was wrong, with which file or option, and what to do; then the program ends.
__attribute__((format(printf, 2, 3), noreturn))
static void die(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("loopmdm: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(status);
}

static void *allocate(size_t count, size_t size, const char *what) { // zeroed
    void *p = calloc(count ? count : 1, size);
    if (!p) die(FAILED, "no memory for %s (%.0f MiB): choose a smaller model, --batch or --max-loops", what, (double)count * size / (1 << 20));
    return p;
}

static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// =====================================================================================================================
// 1. Configuration and parameters

// Letters used in shapes: B rows, T positions, C channels, NH heads of D = C/NH channels, L layers, V tokens,
// S loops, P passes, R masked rows of the (B*T, C) hidden state.
typedef struct {
    int max_seq_len;  // T at most
    int vocab_size;   // V real tokens; MASK has id V
    int padded_vocab; // Vp = V+1 rounded up to a multiple of 64: rows of wte
    int layers;       // L
    int heads;        // NH
    int channels;     // C
    int loop_start;   // a: the loop is layers a .. b-1; with a = b there is none
    int loop_end;     // b
    int max_loops;    // S_max in training; inference may use more
} Config;

static int padded(int vocab_size) { return (vocab_size < 65536 ? vocab_size + 64 : 64) / 64 * 64; }

// A pass is one application of a layer. Forward, backward, activations and FLOPs are all indexed by pass.
static int num_passes(Config c, int S) { return c.loop_start + S * (c.loop_end - c.loop_start) + c.layers - c.loop_end; }

// The layer whose weights pass p uses. This function is the whole difference between LoopMDM and an ordinary MDM.
static int layer_of_pass(Config c, int S, int p) {
    int a = c.loop_start, n = c.loop_end - c.loop_start;
    if (p < a) return p;                       // head
    if (p < a + S * n) return a + (p - a) % n; // loop
    return p - (S - 1) * n;                    // tail
}

typedef struct { double lr, beta1, beta2, eps, weight_decay, clip; } AdamW; // the optimizer's settings

// Why a configuration cannot be built, or NULL if it can.
static const char *config_error(Config c) {
    if (c.layers < 1 || c.layers > 1024) return "layers must be 1 to 1024";
    if (c.channels < 2 || c.channels > 65536) return "channels must be 2 to 65536";
    if (c.heads < 1 || c.channels % c.heads) return "heads must divide channels";
    if (c.channels / c.heads % 2) return "channels / heads must be even: rotary positions turn pairs of channels";
    if (c.max_seq_len < 1 || c.max_seq_len > 65536) return "the sequence length must be 1 to 65536";
    if (c.vocab_size < 1 || c.vocab_size > 65535) return "the vocabulary must have 1 to 65535 tokens";
    if (c.padded_vocab != padded(c.vocab_size)) return "the padded vocabulary must be a multiple of 64 with room for MASK";
    if (c.loop_start < 0 || c.loop_end < c.loop_start || c.loop_end > c.layers) return "the loop a:b needs 0 <= a <= b <= layers";
    if (c.max_loops < 1 || c.max_loops > 1024) return "max loops must be 1 to 1024";
    return NULL;
}

// Exact floating point operations (a multiply-add is two) in the matrix products for one token, as this program does
// them: per pass 24 C^2 in qkv, attproj, fc and fcproj and 4 T C in attention; 2 V C for a masked row in the LM head.
// Backward needs two products where forward needs one; attention five where forward has two, as it computes the
// scores again instead of storing them.
static double flops_per_token(Config c, int T, int S, double masked_share, int training) {
    double C = c.channels, V = c.vocab_size, P = num_passes(c, S);
    double forward = P * (24 * C * C + 4 * T * C) + masked_share * 2 * V * C;
    double backward = P * (48 * C * C + 10 * T * C) + masked_share * 4 * V * C;
    return training ? forward + backward : forward;
}

enum { WTE, WPE, LN1W, LN1B, QKVW, QKVB, ATTPROJW, ATTPROJB, LN2W, LN2B, FCW, FCB, FCPROJW, FCPROJB, LNFW, LNFB, NUM_TENSORS };

// Every parameter tensor is (copies, out, in), or (copies, out) with in = 0 for biases and LayerNorm.
typedef struct { const char *name; int copies, out, in; } Shape;

static void tensor_shapes(Config c, Shape s[NUM_TENSORS]) {
    int L = c.layers, C = c.channels;
    const Shape table[NUM_TENSORS] = {
        {"wte", 1, c.padded_vocab, C}, {"wpe", 1, c.max_seq_len, C},
        {"ln1w", L, C, 0},     {"ln1b", L, C, 0},     {"qkvw", L, 3 * C, C},     {"qkvb", L, 3 * C, 0},
        {"attprojw", L, C, C}, {"attprojb", L, C, 0}, {"ln2w", L, C, 0},         {"ln2b", L, C, 0},
        {"fcw", L, 4 * C, C},  {"fcb", L, 4 * C, 0},  {"fcprojw", L, C, 4 * C},  {"fcprojb", L, C, 0},
        {"lnfw", 1, C, 0},     {"lnfb", 1, C, 0},
    };
    memcpy(s, table, sizeof table);
}

// Parameters, their gradients and AdamW's two moments are four of these, each in one piece, so that the optimizer, checkpoints and
// clearing are one loop.
typedef struct {
    float *data;                 // (total), in the model's memory
    float *tensor[NUM_TENSORS];  // where each begins
    size_t size[NUM_TENSORS], per_layer[NUM_TENSORS], total;
} Tensors;

static void tensors_build(Tensors *t, Config c, float *data) { // data NULL: only the sizes
    Shape s[NUM_TENSORS];
    tensor_shapes(c, s);
    t->data = data;
    t->total = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        t->tensor[i] = data ? data + t->total : NULL;
        t->per_layer[i] = (size_t)s[i].out * (s[i].in ? s[i].in : 1);
        t->total += t->size[i] = s[i].copies * t->per_layer[i];
    }
}

static float *layer_tensor(const Tensors *t, int id, int layer) { return t->tensor[id] + layer * t->per_layer[id]; }

// =====================================================================================================================
// 2. Randomness and noise

// Random numbers are a hash of (seed, stream, step, index) and have no state. Every language, device and number of
// threads draws the same ones, and a resumed run needs to know only its step.
enum { STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK, STREAM_LOOPS, STREAM_UNMASK, STREAM_TOKEN };

HOST_DEVICE static inline uint64_t mix64(uint64_t x) { // the finalizer of SplitMix64 (Steele et al. 2014)
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

HOST_DEVICE static inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t step, uint64_t index) {
    return mix64(mix64(mix64(mix64(seed) + stream) + step) + index);
}

HOST_DEVICE static inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t step, uint64_t index) { // [0, 1)
    return (double)(random_bits(seed, stream, step, index) >> 11) * 0x1p-53;
}

// Matrices start with standard deviation 0.8/sqrt(C), wte with 0.02, the biases of q and k with 1, all else at zero (gains at
// one). Uniform rather than normal: that takes no transcendental function and so comes out the same everywhere.
// A masked model must first learn to look at its neighbours, and until then it knows no more than how frequent each token is.
// Rotary positions turn a bias of q and k into a preference for certain distances, so each head begins with its own; whether
// that gets it off this plateau sooner depends on the seed (dev/experiments). wpe starts at zero so as not to hide the words.
static void init_parameters(float *params, Config c, uint64_t seed) { // params (total)
    Shape s[NUM_TENSORS];
    Tensors t;
    tensor_shapes(c, s);
    tensors_build(&t, c, params);
    for (int i = 0; i < NUM_TENSORS; i++) {
        int is_gain = i == LN1W || i == LN2W || i == LNFW;
        double std = i == WTE ? 0.02 : i == WPE ? 0 : i == QKVB ? 1 : s[i].in ? 0.8 / sqrt(c.channels) : 0;
        for (size_t j = 0; j < t.size[i]; j++) {
            int unused = i == WTE && j >= (size_t)(c.vocab_size + 1) * c.channels; // padding rows
            int of_v = i == QKVB && j % (3 * c.channels) >= 2 * (size_t)c.channels;
            double u = random_uniform(seed, STREAM_INIT, i, j) - 0.5;
            t.tensor[i][j] = is_gain ? 1 : unused || of_v ? 0 : (float)(std * sqrt(12.0) * u);
        }
    }
}

// The noise level t in [eps, 1) of a row, one of a step's total_rows: stratified (Kingma et al. 2021), so that one step sees all
// noise levels evenly.
HOST_DEVICE static inline double noise_level(uint64_t seed, uint64_t step, int row, int total_rows) {
    const double eps = 1e-3;
    double strat = random_uniform(seed, STREAM_TIME, step, 0) + (double)row / total_rows;
    volatile double scaled = (1 - eps) * (strat - floor(strat)); // volatile: a fused multiply-add would round t differently
    return eps + scaled;
}

// Whether a token, number i of all rows of the step, becomes MASK: with probability t (the linear schedule alpha_t = 1-t).
HOST_DEVICE static inline int becomes_mask(uint64_t seed, uint64_t step, uint64_t i, double t) {
    return random_uniform(seed, STREAM_MASK, step, i) < t;
}

// The number of loops of a training step: S ~ p(S) on 1 .. S_max. One S for the whole step.
enum { LOOPS_UNIFORM, LOOPS_FIXED, LOOPS_FLOPS };

static int draw_loops(Config c, int dist, uint64_t seed, uint64_t step) {
    if (dist == LOOPS_FIXED) return c.max_loops;
    double total = 0, sum = 0, p[1024]; // config_error() limits S_max to 1024
    for (int S = 1; S <= c.max_loops; S++)
        total += p[S - 1] = dist == LOOPS_FLOPS ? 1 / flops_per_token(c, c.max_seq_len, S, 0.5, 1) : 1;
    double u = random_uniform(seed, STREAM_LOOPS, step, 0) * total;
    for (int S = 1; S < c.max_loops; S++)
        if (u < (sum += p[S - 1])) return S;
    return c.max_loops;
}

#endif
#ifndef LOOPMDM_CU
// =====================================================================================================================
// 3. Layers, each a forward/backward pair
//
// All tensors are row-major. A backward function gets the gradient of the layer's output and gives that of its input;
// gradients of parameters are added up (+=), because the loop uses the same weights in several passes.

// ---- the matrix product that everything goes through ----
//
// C (M,N) = A (M,K) B (K,N), with strides for both operands, so that no transposed copy is ever needed. It is the
// algorithm of GotoBLAS and BLIS: five loops around a microkernel, each keeping one piece in one cache.
//
//        N in steps of NC      a panel of B, packed: KC x NC, L3
//          K in steps of KC      all of A for these k, packed: M x KC
//            tiles MC x NT         a tile of C; MC x KC of A stay in L2; threads share the tiles
//              N in steps of NR      KC x NR of B stay in L1
//                M in steps of MR      the microkernel: MR x NR sums stay in registers
//                  K                     one column of A times one row of B
//
//                   NR                "Packed" means in the order in which the microkernel reads: MR values of A, then
//            B  k > |||||             the next MR; NR values of B, then the next NR. Rows past the end are zero.
//        A        +-------+
//       MR -----> | C tile|           GCC's vector extension compiles to AVX-512, AVX2, SSE or NEON alike.
//        ^ k      +-------+
#if defined(__AVX512F__)
enum { VECTOR = 16, MR = 12 }; // floats in a vector; rows of the microkernel: MR x 2 sums fill the registers
#elif defined(__AVX__)
enum { VECTOR = 8, MR = 6 };
#elif defined(__aarch64__)
enum { VECTOR = 4, MR = 12 };
#else
enum { VECTOR = 4, MR = 6 };
#endif
enum { NR = 2 * VECTOR, KC = 384, MC = 48, NT = 512, NC = 4096 };
typedef float vec __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float)), may_alias));

// Memory that each thread keeps for as long as it lives, by use: the packed operands, and attention's tiles.
enum { SCRATCH_A, SCRATCH_B, SCRATCH_ATTN, NUM_SCRATCH };

static float *scratch(int use, size_t count) {
    static __thread float *memory[NUM_SCRATCH];
    static __thread size_t capacity[NUM_SCRATCH];
    if (capacity[use] < count) {
        free(memory[use]);
        void *p;
        if (posix_memalign(&p, 64, count * sizeof(float))) die(FAILED, "no memory for a matrix product (%zu MiB)", count >> 18);
        memory[use] = (float *)p;
        capacity[use] = count;
    }
    return memory[use];
}

// src (n,k) with strides -> dst (k,width): n <= width values side by side, padded with zeros
static inline void gemm_pack(float *dst, const float *src, size_t stride_n, size_t stride_k, int n, int k, int width) {
    for (int p = 0; p < k; p++, dst += width, src += stride_k) {
        if (n < width)
            for (int i = 0; i < width; i++) dst[i] = i < n ? src[i * stride_n] : 0;
        else if (stride_n == 1)
            for (int i = 0; i < width; i++) dst[i] = src[i];
        else
            for (int i = 0; i < width; i++) dst[i] = src[i * stride_n];
    }
}

// c (m,n) = or += a (MR,k) b (k,NR) + bias (n); b is packed, a[i*a_row + p*a_col] packed or not; at the edges m < MR, n < NR
static inline void gemm_micro(int k, const float *a, size_t a_row, size_t a_col, const float *b, float *c, size_t ldc, int m, int n,
                              const float *bias, int accumulate) {
    vec sum[MR][2];
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int p = 0; p < k; p++, a += a_col, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VECTOR);
        for (int i = 0; i < MR; i++) {
            sum[i][0] += a[i * a_row] * b0;
            sum[i][1] += a[i * a_row] * b1;
        }
    }
    for (int i = 0; i < m; i++) {
        for (int v = 0; v < 2; v++) {
            float *out = c + i * ldc + v * VECTOR;
            int width = n - v * VECTOR;
            if (width >= VECTOR) {
                vec r = sum[i][v];
                if (bias) r += *(const vec *)(bias + v * VECTOR);
                if (accumulate) r += *(vec *)out;
                *(vec *)out = r;
            } else {
                for (int j = 0; j < width; j++) {
                    float r = sum[i][v][j] + (bias ? bias[v * VECTOR + j] : 0);
                    out[j] = accumulate ? out[j] + r : r;
                }
            }
        }
    }
}

// c (M,N), rows ldc apart, = or += a b + bias; element (i,p) of a is a[i*a_row + p*a_col], likewise b; bias may be NULL
static void gemm(int M, int N, int K, const float *a, size_t a_row, size_t a_col, const float *b, size_t b_row, size_t b_col,
                 float *c, size_t ldc, const float *bias, int accumulate) {
    int a_panels = (M + MR - 1) / MR, tile = min_int(MC, (a_panels + 7) / 8 * MR); // at least 8 tiles to share, where there are rows
    int in_place = a_col == 1 && N <= 512 ? M / MR : 0; // panels of A read where they are: packing pays if many columns use them
    float *a_packed = scratch(SCRATCH_A, (size_t)a_panels * MR * min_int(K, KC));
    float *b_packed = scratch(SCRATCH_B, (size_t)(min_int(N, NC) + NR) * min_int(K, KC));
    OMP(omp parallel if (!omp_in_parallel() && WORTH((size_t)M * N * K / 16)))
    for (int n0 = 0; n0 < N; n0 += NC) {
        int n = min_int(NC, N - n0);
        for (int k0 = 0; k0 < K; k0 += KC) {
            int k = min_int(KC, K - k0), first = k0 == 0;
            OMP(omp for nowait)
            for (int i = in_place; i < a_panels; i++)
                gemm_pack(a_packed + (size_t)i * MR * k, a + i * MR * a_row + k0 * a_col, a_row, a_col, min_int(MR, M - i * MR), k, MR);
            OMP(omp for)
            for (int j = 0; j < n; j += NR)
                gemm_pack(b_packed + (size_t)j * k, b + k0 * b_row + (n0 + j) * b_col, b_col, b_row, min_int(NR, n - j), k, NR);
            OMP(omp for collapse(2) schedule(dynamic))
            for (int tile_i = 0; tile_i < M; tile_i += tile)
                for (int tile_j = 0; tile_j < n; tile_j += NT)
                    for (int j = tile_j; j < min_int(tile_j + NT, n); j += NR)
                        for (int i = tile_i; i < min_int(tile_i + tile, M); i += MR) {
                            int packed = i / MR >= in_place;
                            gemm_micro(k, packed ? a_packed + (size_t)i * k : a + i * a_row + k0, packed ? 1 : a_row, packed ? MR : 1,
                                       b_packed + (size_t)j * k, c + i * ldc + n0 + j, ldc, min_int(MR, M - i), min_int(NR, n - j),
                                       bias && first ? bias + n0 + j : NULL, accumulate || !first);
                        }
        }
    }
}

// ---- linear layer ----

// out (M,OC) = inp (M,C) weight^T + bias; weight (OC,C), bias (OC) or NULL
static void matmul_forward(float *out, const float *inp, const float *weight, const float *bias, int M, int C, int OC) {
    gemm(M, OC, C, inp, C, 1, weight, 1, C, out, OC, bias, 0);
}

// dinp (M,C) = dout (M,OC) weight;  dweight (OC,C) += dout^T inp;  dbias (OC) += column sums of dout
static void matmul_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, int M, int C, int OC) {
    gemm(M, C, OC, dout, OC, 1, weight, C, 1, dinp, C, NULL, 0);
    gemm(OC, C, M, dout, 1, OC, inp, C, 1, dweight, C, NULL, 1);
    if (!dbias) return;
    enum { COLUMNS = 32 };
    OMP(omp parallel for if (WORTH((size_t)M * OC)))
    for (int j0 = 0; j0 < OC; j0 += COLUMNS) { // threads own columns, so that each sum has one order
        int n = min_int(COLUMNS, OC - j0);
        float sum[COLUMNS] = {0};
        for (int i = 0; i < M; i++)
            for (int j = 0; j < n; j++) sum[j] += dout[(size_t)i * OC + j0 + j];
        for (int j = 0; j < n; j++) dbias[j0 + j] += sum[j];
    }
}

// ---- noise ----

// targets (B,T) -> x (B,T) with MASK (id V), weights (B,T): 1/(t total_rows T) where masked, else 0; for rows first_row .. first_row + B-1
// of a step of total_rows. The weights make sum(weights * cross entropy) the NELBO in nats per token of the whole step (MDLM, LLaDA).
static void noise_forward(int *x, float *weights, const int *targets, int V, uint64_t seed, uint64_t step, int first_row, int total_rows, int B, int T) {
    OMP(omp parallel for if (WORTH((size_t)B * T * 8)))
    for (int b = 0; b < B; b++) {
        double t = noise_level(seed, step, first_row + b, total_rows);
        for (int i = b * T; i < (b + 1) * T; i++) {
            int masked = becomes_mask(seed, step, (uint64_t)first_row * T + i, t);
            x[i] = masked ? V : targets[i];
            weights[i] = masked ? (float)(1 / (t * total_rows * T)) : 0;
        }
    }
}

// rows (R): the masked positions among weights (BT), ascending. Returns R.
static int masked_rows(int *rows, const float *weights, int BT) {
    int R = 0;
    for (int i = 0; i < BT; i++)
        if (weights[i] > 0) rows[R++] = i;
    return R;
}

// ---- embedding ----

// out (B,T,C) = wte[x] + wpe[position]; x (B,T), wte (Vp,C), wpe (max_seq_len,C)
static void encoder_forward(float *out, const int *x, const float *wte, const float *wpe, int B, int T, int C) {
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int i = 0; i < B * T; i++)
        for (int c = 0; c < C; c++) out[(size_t)i * C + c] = wte[(size_t)x[i] * C + c] + wpe[(size_t)(i % T) * C + c];
}

static void encoder_backward(float *dwte, float *dwpe, const float *dout, const int *x, int B, int T, int C) {
    enum { COLUMNS = 16 };
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int c0 = 0; c0 < C; c0 += COLUMNS) // many positions add to one row of wte: threads own columns
        for (int i = 0; i < B * T; i++)
            for (int c = c0; c < min_int(c0 + COLUMNS, C); c++) {
                dwte[(size_t)x[i] * C + c] += dout[(size_t)i * C + c];
                dwpe[(size_t)(i % T) * C + c] += dout[(size_t)i * C + c];
            }
}

// ---- layer normalization ----

// out (M,C) = (inp - mean) rstd weight + bias, for each row of inp (M,C); keeps mean (M) and rstd (M)
static void layernorm_forward(float *out, float *mean, float *rstd, const float *inp, const float *weight, const float *bias, int M, int C) {
    OMP(omp parallel for if (WORTH((size_t)M * C)))
    for (int i = 0; i < M; i++) {
        const float *x = inp + (size_t)i * C;
        float *y = out + (size_t)i * C, sum = 0, squares = 0;
        OMP(omp simd reduction(+ : sum))
        for (int c = 0; c < C; c++) sum += x[c];
        float m = sum / C;
        OMP(omp simd reduction(+ : squares))
        for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
        float s = 1 / sqrtf(squares / C + 1e-5f);
        for (int c = 0; c < C; c++) y[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[i] = m;
        rstd[i] = s;
    }
}

// dinp (M,C) += here, since the input is the residual stream, which also has a gradient of its own.
// With xhat = (inp - mean) rstd and g = dout weight:  dinp += rstd (g - mean(g) - xhat mean(g xhat))
static void layernorm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp, const float *weight,
                               const float *mean, const float *rstd, int M, int C) {
    OMP(omp parallel for if (WORTH((size_t)M * C)))
    for (int i = 0; i < M; i++) {
        const float *x = inp + (size_t)i * C, *dy = dout + (size_t)i * C;
        float *dx = dinp + (size_t)i * C, m = mean[i], s = rstd[i], g = 0, gx = 0;
        OMP(omp simd reduction(+ : g, gx))
        for (int c = 0; c < C; c++) {
            g += dy[c] * weight[c];
            gx += dy[c] * weight[c] * (x[c] - m) * s;
        }
        g /= C;
        gx /= C;
        for (int c = 0; c < C; c++) dx[c] += s * (dy[c] * weight[c] - g - (x[c] - m) * s * gx);
    }
    enum { COLUMNS = 32 };
    OMP(omp parallel for if (WORTH((size_t)M * C)))
    for (int c0 = 0; c0 < C; c0 += COLUMNS) {
        int n = min_int(COLUMNS, C - c0);
        float dw[COLUMNS] = {0}, db[COLUMNS] = {0};
        for (int i = 0; i < M; i++) {
            const float *x = inp + (size_t)i * C + c0, *dy = dout + (size_t)i * C + c0;
            float m = mean[i], s = rstd[i];
            for (int c = 0; c < n; c++) {
                dw[c] += dy[c] * (x[c] - m) * s;
                db[c] += dy[c];
            }
        }
        for (int c = 0; c < n; c++) {
            dweight[c0 + c] += dw[c];
            dbias[c0 + c] += db[c];
        }
    }
}

// ---- rotary positions (Su et al. 2021) ----

// In place on q and k of qkv (B,T,3C): channels (i, i + D/2) of each head turn by the angle t * 10000^(-2i/D), so that
// a query and a key see only their distance. cosine, sine (T,D/2). sign -1 turns back.
static void rope_rotate(float *qkv, const float *cosine, const float *sine, float sign, int B, int T, int C, int NH) {
    int D = C / NH, half = D / 2;
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int i = 0; i < B * T; i++) {
        const float *cs = cosine + (size_t)(i % T) * half, *sn = sine + (size_t)(i % T) * half;
        for (int h = 0; h < 2 * NH; h++) { // heads of q, then of k
            float *x = qkv + (size_t)i * 3 * C + h * D;
            for (int j = 0; j < half; j++) {
                float x0 = x[j], x1 = x[j + half], s = sign * sn[j];
                x[j] = x0 * cs[j] - x1 * s;
                x[j + half] = x1 * cs[j] + x0 * s;
            }
        }
    }
}

static void rope_forward(float *qkv, const float *cosine, const float *sine, int B, int T, int C, int NH) {
    rope_rotate(qkv, cosine, sine, 1, B, T, C, NH);
}

static void rope_backward(float *dqkv, const float *cosine, const float *sine, int B, int T, int C, int NH) {
    rope_rotate(dqkv, cosine, sine, -1, B, T, C, NH); // a rotation's gradient is the opposite rotation
}

// ---- attention ----

// e^x within 2 units in the last place, in arithmetic that compilers turn into vector instructions: with
// x = n ln2 + r, |r| <= ln2/2, it is 2^n times the Taylor series of e^r, whose remainder after r^7 is below 6e-9.
// Below -87 it stays at 1.6e-38, above 88 at 1.7e38; NaN stays NaN.
static inline float exp_fast(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    union { float f; uint32_t u; } n, power;
    n.f = x * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
    float whole = n.f - 12582912.0f;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f; // ln2 in two parts: the product with the first is exact
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)))))));
    power.u = (n.u << 23) + 0x3f800000u;
    return series * power.f;
}

// The largest of x (n), in 16 lanes that compilers turn into vectors.
static inline float largest_of(const float *x, int n) {
    float lane[16], largest = x[0];
    for (int l = 0; l < 16; l++) lane[l] = x[0];
    for (int j = 0; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) lane[l] = x[j + l] > lane[l] ? x[j + l] : lane[l];
    for (int l = 0; l < 16; l++) largest = lane[l] > largest ? lane[l] : largest;
    for (int j = n & ~15; j < n; j++) largest = x[j] > largest ? x[j] : largest;
    return largest;
}

enum { ATTN_TILE = 64 }; // queries at a time: the scores of a tile are (ATTN_TILE, T), and T x T is never stored

// Bidirectional: every position attends to every other. For each head, with scale = 1/sqrt(D):
//   scores = scale q k^T,  lse = log sum exp(scores),  out = exp(scores - lse) v
// qkv (B,T,3C) -> out (B,T,C), lse (B,NH,T), which backward needs to compute the probabilities again
static void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C, int NH) {
    int D = C / NH;
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t row = (size_t)(bh / NH) * T;
        int h = bh % NH;
        const float *q = qkv + row * 3 * C + h * D, *k = q + C, *v = k + C;
        float *probs = scratch(SCRATCH_ATTN, (size_t)2 * ATTN_TILE * T);
        for (int t0 = 0; t0 < T; t0 += ATTN_TILE) {
            int n = min_int(ATTN_TILE, T - t0);
            gemm(n, T, D, q + (size_t)t0 * 3 * C, 3 * C, 1, k, 1, 3 * C, probs, T, NULL, 0);
            for (int i = 0; i < n; i++) {
                float *p = probs + (size_t)i * T, largest = largest_of(p, T), sum = 0;
                OMP(omp simd reduction(+ : sum))
                for (int j = 0; j < T; j++) sum += p[j] = exp_fast(scale * (p[j] - largest));
                for (int j = 0; j < T; j++) p[j] /= sum;
                lse[(size_t)bh * T + t0 + i] = scale * largest + logf(sum);
            }
            gemm(n, D, T, probs, T, 1, v, 3 * C, 1, out + (row + t0) * C + h * D, C, NULL, 0);
        }
    }
}

// dout (B,T,C) -> dqkv (B,T,3C). With p the probabilities and dp = dout v^T:
//   dscores = scale p (dp - sum(p dp)),  dq = dscores k,  dk = dscores^T q,  dv = p^T dout
static void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse, int B, int T, int C, int NH) {
    int D = C / NH;
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t row = (size_t)(bh / NH) * T;
        int h = bh % NH;
        const float *q = qkv + row * 3 * C + h * D, *k = q + C, *v = k + C;
        float *dq = dqkv + row * 3 * C + h * D, *dk = dq + C, *dv = dk + C;
        float *probs = scratch(SCRATCH_ATTN, (size_t)2 * ATTN_TILE * T), *dscores = probs + (size_t)ATTN_TILE * T;
        for (int t0 = 0; t0 < T; t0 += ATTN_TILE) {
            int n = min_int(ATTN_TILE, T - t0);
            const float *dy = dout + (row + t0) * C + h * D, *qt = q + (size_t)t0 * 3 * C;
            gemm(n, T, D, qt, 3 * C, 1, k, 1, 3 * C, probs, T, NULL, 0);
            gemm(n, T, D, dy, C, 1, v, 1, 3 * C, dscores, T, NULL, 0);
            for (int i = 0; i < n; i++) {
                float *p = probs + (size_t)i * T, *d = dscores + (size_t)i * T, l = lse[(size_t)bh * T + t0 + i], sum = 0;
                OMP(omp simd reduction(+ : sum))
                for (int j = 0; j < T; j++) {
                    p[j] = exp_fast(scale * p[j] - l);
                    sum += p[j] * d[j];
                }
                for (int j = 0; j < T; j++) d[j] = scale * p[j] * (d[j] - sum);
            }
            gemm(n, D, T, dscores, T, 1, k, 3 * C, 1, dq + (size_t)t0 * 3 * C, 3 * C, NULL, 0);
            gemm(T, D, n, dscores, 1, T, qt, 3 * C, 1, dk, 3 * C, NULL, t0 > 0);
            gemm(T, D, n, probs, 1, T, dy, C, 1, dv, 3 * C, NULL, t0 > 0);
        }
    }
}

// ---- GELU, tanh form: 0.5 x (1 + tanh u) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3) ----

#define GELU_SCALE 1.5957691216f // 2 sqrt(2/pi)

static void gelu_forward(float *out, const float *inp, size_t n) {
    OMP(omp parallel for simd if (parallel : WORTH(4 * n)))
    for (size_t i = 0; i < n; i++) {
        float x = inp[i];
        out[i] = x / (1 + exp_fast(-GELU_SCALE * (x + 0.044715f * x * x * x)));
    }
}

static void gelu_backward(float *dinp, const float *inp, const float *dout, size_t n) { // dinp may be dout
    OMP(omp parallel for simd if (parallel : WORTH(4 * n)))
    for (size_t i = 0; i < n; i++) {
        float x = inp[i], s = 1 / (1 + exp_fast(-GELU_SCALE * (x + 0.044715f * x * x * x)));
        dinp[i] = dout[i] * (s + x * s * (1 - s) * GELU_SCALE * (1 + 3 * 0.044715f * x * x));
    }
}

// ---- residual connection: its backward is that both inputs get the gradient of the sum ----

static void residual_forward(float *out, const float *a, const float *b, size_t n) {
    OMP(omp parallel for simd if (parallel : WORTH(n)))
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

// ---- masked rows: only they have a loss, so only they go through the LM head ----

// out (R,C) = inp (BT,C) at rows (R)
static void gather_forward(float *out, const float *inp, const int *rows, int R, int C) {
    OMP(omp parallel for if (WORTH((size_t)R * C)))
    for (int r = 0; r < R; r++) memcpy(out + (size_t)r * C, inp + (size_t)rows[r] * C, C * sizeof(float));
}

// dinp (BT,C) at rows (R) = dout (R,C)
static void gather_backward(float *dinp, const float *dout, const int *rows, int R, int C) {
    OMP(omp parallel for if (WORTH((size_t)R * C)))
    for (int r = 0; r < R; r++) memcpy(dinp + (size_t)rows[r] * C, dout + (size_t)r * C, C * sizeof(float));
}

// ---- softmax and cross entropy ----

// logits (R,V) -> probabilities (R,V) in their place; losses (R) = -log p[target]. targets (BT) are looked up at rows (R).
// MASK is no column: it is never a candidate.
static void crossentropy_forward(float *losses, float *logits, const int *targets, const int *rows, int R, int V) {
    OMP(omp parallel for if (WORTH((size_t)R * V)))
    for (int r = 0; r < R; r++) {
        float *p = logits + (size_t)r * V, largest = largest_of(p, V), sum = 0, target = p[targets[rows[r]]];
        OMP(omp simd reduction(+ : sum))
        for (int v = 0; v < V; v++) sum += p[v] = exp_fast(p[v] - largest);
        losses[r] = largest - target + logf(sum);
        for (int v = 0; v < V; v++) p[v] /= sum;
    }
}

// probabilities (R,V) -> dlogits (R,V) in their place, for the loss sum(weights * losses); weights (BT)
static void crossentropy_backward(float *probs, const float *weights, const int *targets, const int *rows, int R, int V) {
    OMP(omp parallel for if (WORTH((size_t)R * V)))
    for (int r = 0; r < R; r++) {
        float *d = probs + (size_t)r * V, weight = weights[rows[r]];
        d[targets[rows[r]]] -= 1;
        for (int v = 0; v < V; v++) d[v] *= weight;
    }
}

// ---- sampling ----

// One token from softmax(logits / temperature), logits (V), by a uniform u; temperature 0 takes the likeliest. Inverts the
// cumulative distribution in double: Gumbel noise in float32, the usual way, is known to lower the effective temperature of
// masked diffusion (Zheng et al. 2024). *confidence is the token's probability under softmax(logits).
static int sample_token(const float *logits, int V, double temperature, double u, double *confidence) {
    int best = 0, chosen;
    double sum = 0, total = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    for (int v = 0; v < V; v++) sum += exp((double)logits[v] - logits[best]);
    chosen = best;
    if (temperature > 0) {
        for (int v = 0; v < V; v++) total += exp(((double)logits[v] - logits[best]) / temperature);
        double left = u * total;
        for (chosen = 0; chosen < V - 1; chosen++)
            if ((left -= exp(((double)logits[chosen] - logits[best]) / temperature)) < 0) break;
    }
    *confidence = exp((double)logits[chosen] - logits[best]) / sum;
    return chosen;
}

// logits (R,V) -> token (R), confidence (R): see sample_token(). Position rows[r] draws its own random number, index first + rows[r].
static void sample_forward(int *token, double *confidence, const float *logits, const int *rows, int R, int V, double temperature,
                           uint64_t seed, uint64_t step, uint64_t first) {
    OMP(omp parallel for if (WORTH((size_t)R * V)))
    for (int r = 0; r < R; r++)
        token[r] = sample_token(logits + (size_t)r * V, V, temperature, random_uniform(seed, STREAM_TOKEN, step, first + rows[r]), &confidence[r]);
}

// =====================================================================================================================
// 4. Model

// What a pass computes, kept for its backward.
enum { LN1, LN1_MEAN, LN1_RSTD, QKV, LSE, ATTY, RES2, LN2, LN2_MEAN, LN2_RSTD, FCH, FCH_GELU, NUM_ACTS };
enum { PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, NUM_MEMORIES }; // a model's memory: one allocation each

typedef struct {
    Config config;
    Tensors params, grads, moment1, moment2; // the last three in training only
    int training, recompute, max_B, max_T, max_S; // what the activations have room for
    int head_rows;                           // rows that go through the LM head at a time
    void *memory[NUM_MEMORIES];
    size_t bytes[NUM_MEMORIES];
    float *states;                           // (passes + 1 in training, else 1; B,T,C): the residual stream before each pass, and after the last
    float *acts;                             // (passes in training, but 1 with recompute, else 1; NUM_ACTS tensors of sizes act_size)
    size_t act_size[NUM_ACTS], pass_size;
    float *proj;                             // (B,T,C): what a pass adds to the residual stream
    float *cosine, *sine;                    // (T,D/2)
    float *head_inp, *lnf, *lnf_mean, *lnf_rstd, *logits; // of head_rows rows: (,C), (,C), (), (), (,V)
    float *losses;                           // (R) cross entropies, in the order of rows
    float *dres, *dln, *datty, *dwide;       // gradients: (B,T,C) of the residual stream, (B,T,C), (B,T,C), (B,T,4C)
    int *x, *targets, *rows;                 // (B,T) tokens of the next forward; what they were before the noise; (R) positions of the masked ones
    float *weights;                          // (B,T) of the loss
    double *row_loss;                        // (B) each row's part of the last loss
    int B, T, S, R;                          // the last forward's shape, and its number of masked positions
} Model;

// The configuration alone: enough to know sizes.
static void model_build(Model *m, Config c) {
    memset(m, 0, sizeof *m);
    m->config = c;
    tensors_build(&m->params, c, NULL);
}

// Sizes of what one pass keeps for (B,T), in floats; returns their sum.
static size_t activation_sizes(Config c, int B, int T, size_t size[NUM_ACTS]) {
    size_t BT = (size_t)B * T, C = c.channels, sum = 0;
    const size_t table[NUM_ACTS] = {
        BT * C, BT, BT, BT * 3 * C, BT * c.heads, BT * C, BT * C, // LN1, LN1_MEAN, LN1_RSTD, QKV, LSE, ATTY, RES2
        BT * C, BT, BT, BT * 4 * C, BT * 4 * C,                   // LN2, LN2_MEAN, LN2_RSTD, FCH, FCH_GELU
    };
    memcpy(size, table, sizeof table);
    for (int i = 0; i < NUM_ACTS; i++) sum += size[i];
    return sum;
}

// Plans memory for up to (B,T) and S loops: sets m->bytes. In training each pass keeps its own activations, and there are gradients
// and moments; otherwise all passes share the memory of one, so that S is free. With recompute a pass keeps its input alone, and
// backward computes the rest again. With the memories there, also sets where everything is.
static void model_plan(Model *m, int B, int T, int S, int training, int recompute) {
    Config c = m->config;
    size_t C = c.channels, V = c.vocab_size, BT = (size_t)B * T, R = max_int(512, (1 << 22) / c.vocab_size), P = num_passes(c, S);
    if (R > BT) R = BT;
    m->training = training, m->recompute = recompute, m->max_B = B, m->max_T = T, m->max_S = S, m->head_rows = (int)R;
    m->pass_size = activation_sizes(c, B, T, m->act_size);
    size_t half = (size_t)T * (C / c.heads / 2), grad = training ? BT * C : 0;
    const struct { void *to; size_t bytes; } plan[] = {
        {&m->row_loss, B * sizeof(double)}, {&m->x, 4 * BT}, {&m->targets, 4 * BT}, {&m->rows, 4 * BT}, {&m->weights, 4 * BT},
        {&m->states, 4 * BT * C * (training ? P + 1 : 1)}, {&m->acts, 4 * m->pass_size * (training && !recompute ? P : 1)}, {&m->proj, 4 * BT * C},
        {&m->cosine, 4 * half}, {&m->sine, 4 * half}, {&m->head_inp, 4 * R * C}, {&m->lnf, 4 * R * C}, {&m->lnf_mean, 4 * R}, {&m->lnf_rstd, 4 * R},
        {&m->logits, 4 * R * V}, {&m->losses, 4 * BT}, {&m->dres, 4 * grad}, {&m->dln, 4 * grad}, {&m->datty, 4 * grad}, {&m->dwide, 16 * grad},
    };
    char *at = (char *)m->memory[ACTIVATIONS];
    m->bytes[ACTIVATIONS] = 0;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        if (at) memcpy(plan[i].to, &at, sizeof at), at += plan[i].bytes;
        m->bytes[ACTIVATIONS] += plan[i].bytes;
    }
    size_t total = m->params.total * sizeof(float);
    m->bytes[PARAMETERS] = total, m->bytes[GRADIENTS] = training ? total : 0, m->bytes[OPTIMIZER] = training ? 2 * total : 0;
    tensors_build(&m->params, c, (float *)m->memory[PARAMETERS]);
    tensors_build(&m->grads, c, (float *)m->memory[GRADIENTS]);
    tensors_build(&m->moment1, c, (float *)m->memory[OPTIMIZER]);
    tensors_build(&m->moment2, c, training && m->memory[OPTIMIZER] ? m->moment1.data + m->params.total : NULL);
}

static void model_reserve(Model *m, int B, int T, int S, int training, int recompute) {
    static const char *const what[NUM_MEMORIES] = {"the parameters", "the gradients", "the optimizer", "activations"};
    model_plan(m, B, T, S, training, recompute);
    for (int i = 0; i < NUM_MEMORIES; i++) m->memory[i] = allocate(m->bytes[i], 1, what[i]);
    model_plan(m, B, T, S, training, recompute);
    int D = m->config.channels / m->config.heads;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < D / 2; i++) {
            double angle = t * pow(10000, -2.0 * i / D);
            m->cosine[t * (D / 2) + i] = (float)cos(angle);
            m->sine[t * (D / 2) + i] = (float)sin(angle);
        }
}

static void model_free(Model *m) {
    for (int i = 0; i < NUM_MEMORIES; i++) free(m->memory[i]);
    memset(m, 0, sizeof *m);
}

// The rest of the program reads and writes tensors (total) through these, wherever a model's memory is.
static void tensors_read(float *to, const Tensors *from) { memcpy(to, from->data, from->total * sizeof(float)); }
static void tensors_write(Tensors *to, const float *from) { memcpy(to->data, from, to->total * sizeof(float)); }
static void model_set_parameters(Model *m, const float *from) { tensors_write(&m->params, from); }

// a: where pass p's activations are;  w: where its layer's tensors are
static void pass_acts(const Model *m, int p, float *a[NUM_ACTS]) {
    float *at = m->acts + (m->training && !m->recompute ? p : 0) * m->pass_size;
    for (int i = 0; i < NUM_ACTS; at += m->act_size[i++]) a[i] = at;
}

static void pass_tensors(const Model *m, const Tensors *t, int p, float *w[NUM_TENSORS]) {
    for (int i = 0; i < NUM_TENSORS; i++) w[i] = layer_tensor(t, i, i > WPE && i < LNFW ? layer_of_pass(m->config, m->S, p) : 0);
}

// The residual stream that pass p reads: the embedding, or what the pass before left.
static float *pass_input(const Model *m, int p) {
    return m->states + (m->training ? p : 0) * (size_t)m->B * m->T * m->config.channels;
}

// The next forward is of these tokens, x (B,T).
static void model_tokens(Model *m, const int *x, int B, int T) {
    if (B * T > m->max_B * m->max_T || T > m->max_T) die(FAILED, "%d rows of %d tokens are more than was reserved", B, T);
    m->B = B, m->T = T;
    memcpy(m->x, x, (size_t)B * T * sizeof(int));
}

// The next forward is of targets (B,T) with noise; see noise_forward(). Returns the number of masked tokens.
static int model_noise(Model *m, const int *targets, int B, int T, uint64_t seed, uint64_t step, int first_row, int total_rows) {
    model_tokens(m, targets, B, T);
    memcpy(m->targets, targets, (size_t)B * T * sizeof(int));
    noise_forward(m->x, m->weights, m->targets, m->config.vocab_size, seed, step, first_row, total_rows, B, T);
    return m->R = masked_rows(m->rows, m->weights, B * T);
}

// All of a pass that its backward needs
static void pass_forward(Model *m, int p) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    const float *inp = pass_input(m, p);
    float *a[NUM_ACTS], *w[NUM_TENSORS];
    pass_acts(m, p, a);
    pass_tensors(m, &m->params, p, w);
    layernorm_forward(a[LN1], a[LN1_MEAN], a[LN1_RSTD], inp, w[LN1W], w[LN1B], BT, C);
    matmul_forward(a[QKV], a[LN1], w[QKVW], w[QKVB], BT, C, 3 * C);
    rope_forward(a[QKV], m->cosine, m->sine, B, T, C, NH);
    attention_forward(a[ATTY], a[LSE], a[QKV], B, T, C, NH);
    matmul_forward(m->proj, a[ATTY], w[ATTPROJW], w[ATTPROJB], BT, C, C);
    residual_forward(a[RES2], inp, m->proj, (size_t)BT * C);
    layernorm_forward(a[LN2], a[LN2_MEAN], a[LN2_RSTD], a[RES2], w[LN2W], w[LN2B], BT, C);
    matmul_forward(a[FCH], a[LN2], w[FCW], w[FCB], BT, C, 4 * C);
    gelu_forward(a[FCH_GELU], a[FCH], (size_t)BT * 4 * C);
}

// m->x (B,T) -> the residual stream after the last pass (B,T,C), which is pass_input() of the pass after it
static void model_forward(Model *m, int S) {
    int C = m->config.channels, BT = m->B * m->T;
    if (m->training && S > m->max_S) die(FAILED, "a forward of %d loops is more than was reserved", S);
    m->S = S;
    encoder_forward(m->states, m->x, m->params.tensor[WTE], m->params.tensor[WPE], m->B, m->T, C);
    for (int p = 0; p < num_passes(m->config, S); p++) {
        float *a[NUM_ACTS], *w[NUM_TENSORS];
        pass_forward(m, p);
        pass_acts(m, p, a);
        pass_tensors(m, &m->params, p, w);
        matmul_forward(m->proj, a[FCH_GELU], w[FCPROJW], w[FCPROJB], BT, 4 * C, C);
        residual_forward(pass_input(m, p + 1), a[RES2], m->proj, (size_t)BT * C);
    }
}

// From m->dres, the gradient of what model_forward computed, to the gradients of all parameters.
static void model_backward(Model *m) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    for (int p = num_passes(m->config, m->S) - 1; p >= 0; p--) {
        float *a[NUM_ACTS], *w[NUM_TENSORS], *g[NUM_TENSORS];
        if (m->recompute) pass_forward(m, p);
        pass_acts(m, p, a);
        pass_tensors(m, &m->params, p, w);
        pass_tensors(m, &m->grads, p, g);
        // dres is the gradient of what the pass left, and thereby of RES2; each branch adds its own part
        matmul_backward(m->dwide, g[FCPROJW], g[FCPROJB], m->dres, a[FCH_GELU], w[FCPROJW], BT, 4 * C, C);
        gelu_backward(m->dwide, a[FCH], m->dwide, (size_t)BT * 4 * C);
        matmul_backward(m->dln, g[FCW], g[FCB], m->dwide, a[LN2], w[FCW], BT, C, 4 * C);
        layernorm_backward(m->dres, g[LN2W], g[LN2B], m->dln, a[RES2], w[LN2W], a[LN2_MEAN], a[LN2_RSTD], BT, C);
        matmul_backward(m->datty, g[ATTPROJW], g[ATTPROJB], m->dres, a[ATTY], w[ATTPROJW], BT, C, C);
        attention_backward(m->dwide, m->datty, a[QKV], a[LSE], B, T, C, NH);
        rope_backward(m->dwide, m->cosine, m->sine, B, T, C, NH);
        matmul_backward(m->dln, g[QKVW], g[QKVB], m->dwide, a[LN1], w[QKVW], BT, C, 3 * C);
        layernorm_backward(m->dres, g[LN1W], g[LN1B], m->dln, pass_input(m, p), w[LN1W], a[LN1_MEAN], a[LN1_RSTD], BT, C);
    }
    encoder_backward(m->grads.tensor[WTE], m->grads.tensor[WPE], m->dres, m->x, B, T, C);
}

// The LM head for R <= head_rows rows of the last forward's result: m->logits (R,V) = LayerNorm(rows) wte^T
static void head_forward(Model *m, const int *rows, int R) {
    int C = m->config.channels;
    float **w = m->params.tensor;
    gather_forward(m->head_inp, pass_input(m, num_passes(m->config, m->S)), rows, R, C);
    layernorm_forward(m->lnf, m->lnf_mean, m->lnf_rstd, m->head_inp, w[LNFW], w[LNFB], R, C);
    matmul_forward(m->logits, m->lnf, w[WTE], NULL, R, C, m->config.vocab_size);
}

// m->logits holds dlogits (R,V) -> m->dres at these rows; m->datty serves as a buffer
static void head_backward(Model *m, const int *rows, int R) {
    int C = m->config.channels;
    float **w = m->params.tensor, **g = m->grads.tensor;
    matmul_backward(m->dln, g[WTE], NULL, m->logits, m->lnf, w[WTE], R, C, m->config.vocab_size);
    memset(m->datty, 0, (size_t)R * C * sizeof(float));
    layernorm_backward(m->datty, g[LNFW], g[LNFB], m->dln, m->head_inp, w[LNFW], m->lnf_mean, m->lnf_rstd, R, C);
    gather_backward(m->dres, m->datty, rows, R, C);
}

// Loss of the last forward of tokens with noise: sum over masked positions of weight * cross entropy; in m->row_loss (B) each row's part.
// In training also backward, all the way: gradients are added to m->grads. The head goes in one sweep over a few rows at a time,
// so that the logits of all rows never exist together.
static double model_loss(Model *m, int backward) {
    int V = m->config.vocab_size;
    double loss = 0;
    if (backward) memset(m->dres, 0, (size_t)m->B * m->T * m->config.channels * sizeof(float));
    for (int r0 = 0; r0 < m->R; r0 += m->head_rows) {
        int n = min_int(m->head_rows, m->R - r0), *rows = m->rows + r0;
        head_forward(m, rows, n);
        crossentropy_forward(m->losses + r0, m->logits, m->targets, rows, n, V);
        if (!backward) continue;
        crossentropy_backward(m->logits, m->weights, m->targets, rows, n, V);
        head_backward(m, rows, n);
    }
    memset(m->row_loss, 0, m->B * sizeof(double));
    for (int r = 0; r < m->R; r++) m->row_loss[m->rows[r] / m->T] += (double)m->weights[m->rows[r]] * m->losses[r];
    for (int b = 0; b < m->B; b++) loss += m->row_loss[b];
    if (backward) model_backward(m);
    return loss;
}

// A token for each of rows (n) of the last forward: token (n), confidence (n); see sample_forward()
static void model_sample(Model *m, int *token, double *confidence, const int *rows, int n, double temperature, uint64_t seed, uint64_t step, uint64_t first) {
    for (int r0 = 0; r0 < n; r0 += m->head_rows) {
        int R = min_int(m->head_rows, n - r0);
        head_forward(m, rows + r0, R);
        sample_forward(token + r0, confidence + r0, m->logits, rows + r0, R, m->config.vocab_size, temperature, seed, step, first);
    }
}

// =====================================================================================================================
// 5. Optimizer: AdamW (Loshchilov and Hutter 2019) after clipping the gradients' global norm

// Square root of the sum of squares of all gradients. Blocks of fixed size, so that threads do not change the order.
static double gradient_norm(const Model *m) {
    const Tensors *grads = &m->grads;
    enum { BLOCK = 1 << 14 };
    double sum = 0;
    int blocks = (int)((grads->total + BLOCK - 1) / BLOCK);
    double *squares = (double *)allocate(blocks, sizeof(double), "the gradient norm");
    OMP(omp parallel for if (WORTH(grads->total)))
    for (int b = 0; b < blocks; b++) {
        size_t begin = (size_t)b * BLOCK, end = begin + BLOCK < grads->total ? begin + BLOCK : grads->total;
        double s = 0;
        OMP(omp simd reduction(+ : s))
        for (size_t i = begin; i < end; i++) s += (double)grads->data[i] * grads->data[i];
        squares[b] = s;
    }
    for (int b = 0; b < blocks; b++) sum += squares[b];
    free(squares);
    return sqrt(sum);
}

// Step number step (from 1) with the gradients in m->grads, whose norm is given; clears them. Weights decay towards zero
// apart from the gradient, and only matrices do: biases and LayerNorm's gains are not what overfits.
static void model_update(Model *m, AdamW o, double norm, int step) {
    Shape s[NUM_TENSORS];
    tensor_shapes(m->config, s);
    float scale = (float)fmin(1, o.clip / (norm + 1e-6)), b1 = (float)o.beta1, b2 = (float)o.beta2, eps = (float)o.eps;
    float step_size = (float)(o.lr / (1 - pow(o.beta1, step))), correct = (float)(1 / sqrt(1 - pow(o.beta2, step)));
    for (int t = 0; t < NUM_TENSORS; t++) {
        float keep = (float)(1 - (s[t].in ? o.lr * o.weight_decay : 0));
        float *p = m->params.tensor[t], *grad = m->grads.tensor[t], *m1 = m->moment1.tensor[t], *m2 = m->moment2.tensor[t];
        OMP(omp parallel for simd if (parallel : WORTH(m->params.size[t])))
        for (size_t i = 0; i < m->params.size[t]; i++) {
            float g = scale * grad[i];
            m1[i] = b1 * m1[i] + (1 - b1) * g;
            m2[i] = b2 * m2[i] + (1 - b2) * g * g;
            p[i] = keep * p[i] - step_size * m1[i] / (sqrtf(m2[i]) * correct + eps);
            grad[i] = 0;
        }
    }
}

#endif
#if LOOPMDM_CU != 1
// =====================================================================================================================
// 6. Data, tokenizer, checkpoints

// ---- token shards, llm.c's format: int32[256] header (magic, version, token count), then uint16 tokens ----

enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328, MODEL_MAGIC = 20260525, OPTIMIZER_MAGIC = 20260526 };

typedef struct { const uint16_t *tokens; int64_t count; } Shard;
typedef struct { Shard *shards; int num_shards; int64_t total; } Data;

// Maps a whole file into memory for reading; dies if it is missing, or shorter than a header with this magic number.
static const unsigned char *map_file(const char *path, uint32_t magic, const char *kind, size_t *size) {
    struct stat info;
    int file = open(path, O_RDONLY | O_NONBLOCK); // so as not to wait for somebody to write into a pipe
    if (file < 0 || fstat(file, &info)) die(FAILED, "cannot open %s %s: %s", kind, path, strerror(errno));
    *size = (size_t)info.st_size;
    if (!S_ISREG(info.st_mode)) die(FAILED, "%s is a %s, not a %s", path, S_ISDIR(info.st_mode) ? "folder" : "device or pipe", kind);
    if (*size < HEADER_INTS * 4) die(FAILED, "%s is too short for a %s: empty or cut off", path, kind);
    void *map = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) die(FAILED, "cannot map %s: %s", path, strerror(errno));
    close(file);
    if (*(const uint32_t *)map != magic) die(FAILED, "%s is not a %s: its first number is %u, not %u", path, kind, *(const uint32_t *)map, magic);
    return (const unsigned char *)map;
}

// How many rows of T tokens can begin somewhere (stride 1), or lie side by side (stride T); a row stays in one shard.
static int64_t shard_rows(Shard s, int T, int stride) { return s.count < T ? 0 : (s.count - T) / stride + 1; }

static int64_t data_rows(const Data *d, int T, int stride) {
    int64_t n = 0;
    for (int i = 0; i < d->num_shards; i++) n += shard_rows(d->shards[i], T, stride);
    return n;
}

// Row number index of those: tokens (T)
static void data_row(const Data *d, int *tokens, int64_t index, int T, int stride) {
    const Shard *s = d->shards;
    for (; index >= shard_rows(*s, T, stride); s++) index -= shard_rows(*s, T, stride);
    for (int t = 0; t < T; t++) tokens[t] = s->tokens[index * stride + t];
}

// Rows first_row .. first_row + B-1 of a training step: targets (B,T), each beginning anywhere
static void data_batch(const Data *d, int *targets, uint64_t seed, uint64_t step, int first_row, int B, int T) {
    uint64_t rows = (uint64_t)data_rows(d, T, 1);
    for (int b = 0; b < B; b++)
        data_row(d, targets + (size_t)b * T, (int64_t)(random_bits(seed, STREAM_BATCH, step, first_row + b) % rows), T, 1);
}

// All shards whose names match a pattern (or the one file it names), in alphabetical order, for rows of T tokens. Every
// token is checked to be in the vocabulary.
static Data data_open(const char *pattern, int vocab_size, int T) {
    glob_t g;
    if (glob(pattern, 0, NULL, &g)) die(FAILED, "no data: no file matches %s", pattern);
    Data d = {(Shard *)allocate(g.gl_pathc, sizeof(Shard), "shards"), (int)g.gl_pathc, 0};
    for (int i = 0; i < d.num_shards; i++) {
        size_t size;
        const char *path = g.gl_pathv[i];
        const unsigned char *file = map_file(path, SHARD_MAGIC, "token shard", &size);
        const int *header = (const int *)file;
        Shard s = {(const uint16_t *)(file + HEADER_INTS * 4), header[2]};
        if (header[1] != 1) die(FAILED, "%s is a token shard of version %d; this program reads version 1", path, header[1]);
        if (s.count < 1 || size != HEADER_INTS * 4 + (size_t)s.count * 2)
            die(FAILED, "%s is damaged: its header says %lld tokens, its size %lld", path, (long long)s.count,
                (long long)(size - HEADER_INTS * 4) / 2);
        for (int64_t j = 0; j < s.count; j++)
            if (s.tokens[j] >= vocab_size)
                die(FAILED, "%s: token %lld is %d, outside the vocabulary of %d: was it made with another tokenizer?", path,
                    (long long)j, s.tokens[j], vocab_size);
        d.shards[i] = s;
        d.total += s.count;
    }
    if (!data_rows(&d, T, 1)) die(FAILED, "%s is too short: no shard holds a row of %d tokens; give more text or a smaller --seq-len", pattern, T);
    globfree(&g);
    return d;
}

// ---- tokenizer: GPT-2's byte-level BPE, from llm.c's tokenizer.bin ----
//
// uint32[256] header (magic, version, vocabulary size, id of the end-of-text token), then for each token a byte with its length and
// its bytes. There is no merge table: ids are in the order in which merges were learned, so the pair to merge next is the one
// whose union is the token of lowest id.

typedef struct {
    const unsigned char *file;   // as it is on disk, mapped
    size_t file_size;
    int vocab_size, eot;
    const unsigned char **bytes; // (V) each token's bytes,
    int *length;                 // (V) and how many
    int *table, table_size;      // hash table from bytes to id, -1 where empty; a power of two
    int longest, byte_id[256];   // -1: this byte has no token
} Tokenizer;

static uint32_t hash_bytes(const unsigned char *s, int n) { // FNV-1a
    uint32_t h = 2166136261u;
    for (int i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    return h;
}

// The token with these bytes, or -1
static int tokenizer_find(const Tokenizer *t, const unsigned char *s, int n) {
    if (n > t->longest) return -1;
    for (uint32_t i = hash_bytes(s, n);; i++) {
        int id = t->table[i & (t->table_size - 1)];
        if (id < 0 || (t->length[id] == n && !memcmp(t->bytes[id], s, n))) return id;
    }
}

static Tokenizer tokenizer_open(const char *path) {
    size_t size, at = HEADER_INTS * 4;
    const unsigned char *file = map_file(path, TOKENIZER_MAGIC, "tokenizer", &size);
    const uint32_t *header = (const uint32_t *)file;
    Tokenizer t;
    memset(&t, 0, sizeof t);
    t.file = file, t.file_size = size;
    if (header[1] < 1 || header[1] > 2) die(FAILED, "%s is a tokenizer of version %u; this program reads 1 and 2", path, header[1]);
    if (header[2] < 1 || header[2] > 65535) die(FAILED, "%s is damaged: a vocabulary of %u tokens", path, header[2]);
    t.vocab_size = (int)header[2];
    t.eot = header[1] == 1 ? 50256 : (int)header[3]; // version 1 is always GPT-2's
    if (t.eot < 0 || t.eot >= t.vocab_size) die(FAILED, "%s is damaged: its end-of-text token %d is not in its vocabulary", path, t.eot);
    for (t.table_size = 4; t.table_size < 4 * t.vocab_size; t.table_size *= 2) {}
    t.bytes = (const unsigned char **)allocate(t.vocab_size, sizeof *t.bytes, "the tokenizer");
    t.length = (int *)allocate(t.vocab_size, sizeof *t.length, "the tokenizer");
    t.table = (int *)allocate(t.table_size, sizeof *t.table, "the tokenizer");
    for (int i = 0; i < t.table_size; i++) t.table[i] = -1;
    for (int id = 0; id < t.vocab_size; id++) {
        if (at >= size || at + 1 + file[at] > size) die(FAILED, "%s is damaged: it ends at token %d of %d", path, id, t.vocab_size);
        t.length[id] = file[at];
        t.bytes[id] = file + at + 1;
        at += 1 + file[at];
        t.longest = max_int(t.longest, t.length[id]);
        if (id == t.eot || tokenizer_find(&t, t.bytes[id], t.length[id]) >= 0) continue; // text never merges into end-of-text
        uint32_t i = hash_bytes(t.bytes[id], t.length[id]) & (t.table_size - 1);
        while (t.table[i] >= 0) i = (i + 1) & (t.table_size - 1);
        t.table[i] = id;
    }
    if (at != size) die(FAILED, "%s is damaged: %zu bytes follow its last token", path, size - at);
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        t.byte_id[b] = tokenizer_find(&t, &byte, 1);
    }
    return t;
}

enum { LETTER, NUMBER, SPACE, OTHER };

static int in_ranges(uint32_t c, const uint32_t (*range)[2], int n) {
    int low = 0;
    while (n > 0) { // binary search for the range that may hold c
        if (range[low + n / 2][1] < c) low += n / 2 + 1, n -= n / 2 + 1;
        else if (range[low + n / 2][0] > c) n /= 2;
        else return 1;
    }
    return 0;
}

// The class of the character at s (of n > 0 bytes) and its length; a byte that is no valid UTF-8 is a character of its own.
static int character_class(const unsigned char *s, int n, int *length) {
    uint32_t c = s[0];
    *length = 1;
    if (c >= 0x80) {
        int extra = c >= 0xf0 && c < 0xf5 ? 3 : c >= 0xe0 && c < 0xf0 ? 2 : c >= 0xc2 && c < 0xe0 ? 1 : 0;
        if (!extra || extra >= n) return OTHER;
        c &= 0x3f >> extra;
        for (int i = 1; i <= extra; i++) {
            if ((s[i] & 0xc0) != 0x80) return OTHER;
            c = c << 6 | (s[i] & 0x3f);
        }
        if ((extra == 2 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) || (extra == 3 && (c < 0x10000 || c > 0x10ffff))) return OTHER;
        *length = extra + 1;
    }
#define IN(ranges) in_ranges(c, ranges, (int)(sizeof(ranges) / sizeof(ranges[0])))
    return IN(unicode_letters) ? LETTER : IN(unicode_numbers) ? NUMBER : IN(unicode_spaces) ? SPACE : OTHER;
#undef IN
}

// Length in bytes of the first piece of text s, n > 0. No token reaches across pieces. GPT-2's pattern, first match wins:
//   's|'t|'re|'ve|'m|'ll|'d | ?letters | ?numbers | ?others | spaces before another space or the end | spaces
static int piece_length(const unsigned char *s, int n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        int k = (int)strlen(contractions[i]);
        if (k <= n && !memcmp(s, contractions[i], k)) return k;
    }
    int length, at = s[0] == ' ' && n > 1 ? 1 : 0, kind = character_class(s + at, n - at, &length);
    if (kind != SPACE) {
        while ((at += length) < n && character_class(s + at, n - at, &length) == kind) {}
        return at;
    }
    int last = 0;
    for (at = 0; at < n && character_class(s + at, n - at, &length) == SPACE; at += length) last = at;
    return at == n || last == 0 ? at : last; // the last space belongs to the word after it
}

// Encodes one piece s of n bytes by merging from single bytes upwards: ids (n at most) -> their count
static int encode_piece(const Tokenizer *t, int *ids, const unsigned char *s, int n, const char *source) {
    int *start = (int *)allocate(2 * (size_t)n + 2, sizeof(int), "encoding"), *pair = start + n + 1, count = n;
    for (int i = 0; i <= n; i++) start[i] = i;
    for (int i = 0; i < n; i++) {
        if (t->byte_id[s[i]] < 0) die(FAILED, "%s: the tokenizer has no token for the byte 0x%02x", source, s[i]);
        pair[i] = i + 1 < n ? tokenizer_find(t, s + i, 2) : -1; // the union of parts i and i+1
    }
    for (;;) {
        int lowest = INT_MAX, kept = 0;
        for (int i = 0; i < count; i++)
            if (pair[i] >= 0 && pair[i] < lowest) lowest = pair[i];
        if (lowest == INT_MAX) break;
        for (int i = 0; i < count; kept++) { // merge it everywhere, from left to right; -2: to be looked up again
            start[kept] = start[i];
            int merge = pair[i] == lowest;
            pair[kept] = merge ? -2 : pair[i];
            if (merge && kept) pair[kept - 1] = -2;
            i += merge ? 2 : 1;
        }
        start[kept] = n;
        count = kept;
        for (int i = 0; i < count; i++)
            if (pair[i] == -2) pair[i] = i + 1 < count ? tokenizer_find(t, s + start[i], start[i + 2] - start[i]) : -1;
    }
    for (int i = 0; i < count; i++) {
        int length = start[i + 1] - start[i];
        ids[i] = length == 1 ? t->byte_id[s[start[i]]] : tokenizer_find(t, s + start[i], length);
    }
    free(start);
    return count;
}

// Where the end-of-text token's own text next stands in s, from begin on; n if nowhere.
static size_t find_eot(const Tokenizer *t, const char *s, size_t begin, size_t n) {
    size_t length = t->length[t->eot];
    for (; length && begin + length <= n; begin++)
        if (s[begin] == (char)t->bytes[t->eot][0] && !memcmp(s + begin, t->bytes[t->eot], length)) return begin;
    return n;
}

// Text of n bytes (any bytes, less than 2 GiB) -> ids (n at most), and their count. The end-of-text token's own text stands for itself.
// source names the text in the error message about a byte without a token.
static size_t tokenizer_encode(const Tokenizer *t, int *ids, const char *text, size_t n, const char *source) {
    const unsigned char *s = (const unsigned char *)text;
    size_t count = 0;
    for (size_t begin = 0; begin < n;) {
        size_t end = find_eot(t, text, begin, n);
        while (begin < end) {
            int length = piece_length(s + begin, (int)(end - begin));
            count += encode_piece(t, ids + count, s + begin, length, source);
            begin += length;
        }
        if (end < n) ids[count++] = t->eot, begin += t->length[t->eot];
    }
    return count;
}

// ---- checkpoints ----
//
// model.bin: int32[256] header, then the parameters in the order of tensor_shapes(). optimizer.bin beside it: header, both
// moments. A CRC-32 of the whole file (taken with 0 in its place) tells a damaged one. Both are written to *.tmp, flushed to
// disk, and only then renamed: optimizer first. Whenever the program is stopped, the files are an old pair, a new pair, or a new
// optimizer.bin with its model still in model.bin.tmp, which checkpoint_recover() completes.

// Places in the headers: of both files, and of optimizer.bin (seed and FLOPs take two each).
enum { FILE_VERSION = 1, HEADER_STEP = 11, HEADER_CRC = 12, HEADER_ROWS = 2, HEADER_SEED = 4, HEADER_FLOPS = 6 };

typedef struct { // what resuming needs besides parameters and moments
    int step, rows;  // steps done; rows in a step
    uint64_t seed;
    double flops;    // spent so far
} Progress;

static uint32_t crc32_update(uint32_t crc, const void *data, size_t n) { // as in zlib; begin with 0
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            table[i] = c;
        }
    crc = ~crc;
    for (size_t i = 0; i < n; i++) crc = table[(crc ^ ((const unsigned char *)data)[i]) & 255] ^ (crc >> 8);
    return ~crc;
}

static char *concat(const char *a, const char *b) { // the caller frees it
    char *s = (char *)allocate(strlen(a) + strlen(b) + 1, 1, "a name");
    return strcat(strcpy(s, a), b);
}

static char *join_path(const char *folder, const char *name) {
    char *base = concat(folder, "/"), *path = concat(base, name);
    free(base);
    return path;
}

typedef struct { const void *data; size_t bytes; } Part;

typedef struct { const char *path; const Part *parts; int num_parts; } File;

// Writes a file to path.tmp, and sees that it is on the disk. Returns 0, or what went wrong as errno says it.
static int write_temporary(File f) {
    char *temporary = concat(f.path, ".tmp");
    FILE *file = fopen(temporary, "wb");
    int failed = !file;
    for (int i = 0; i < f.num_parts && !failed; i++) failed = fwrite(f.parts[i].data, 1, f.parts[i].bytes, file) != f.parts[i].bytes;
    failed = failed || fflush(file) || fsync(fileno(file));
    int error = failed ? errno : 0;
    if (file && fclose(file) && !failed) error = errno;
    free(temporary);
    return error;
}

static int commit_file(const char *path) { // path.tmp becomes path; returns 0 or errno
    char *temporary = concat(path, ".tmp");
    int error = rename(temporary, path) ? errno : 0;
    free(temporary);
    return error;
}

// Writes n files, which take the place of the old ones only when all are on the disk, one after the other. On an error the unfinished
// ones go.
static void write_files(const File *files, int n) {
    int error = 0, bad = 0;
    struct stat info;
    for (int i = 0; i < n; i++)
        if (!stat(files[i].path, &info) && !S_ISREG(info.st_mode)) die(FAILED, "cannot write %s: it is a folder, device or pipe", files[i].path);
    for (int i = 0; i < n && !error; i++) error = write_temporary(files[i]), bad = i;
    for (int i = 0; i < n && error; i++) {
        char *temporary = concat(files[i].path, ".tmp");
        unlink(temporary);
        free(temporary);
    }
    if (error) die(FAILED, "cannot write %s: %s; what was there before is unchanged", files[bad].path, strerror(error));
    for (int i = 0; i < n; i++)
        if ((error = commit_file(files[i].path))) die(FAILED, "cannot rename %s.tmp to %s: %s", files[i].path, files[i].path, strerror(error));
}

static void write_file(const char *path, const Part *parts, int n) {
    const File file = {path, parts, n};
    write_files(&file, 1);
}

// The header's CRC, of all parts; the header is the first.
static void seal_header(int *header, const Part *parts, int n) {
    uint32_t crc = 0;
    for (int i = 0; i < n; i++) crc = crc32_update(crc, parts[i].data, parts[i].bytes);
    header[HEADER_CRC] = (int)crc;
}

static void checkpoint_save(const Model *m, const char *folder, Progress p) {
    Config c = m->config;
    int model[HEADER_INTS] = {MODEL_MAGIC, FILE_VERSION, c.max_seq_len, c.vocab_size, c.padded_vocab, c.layers, c.heads, c.channels,
                              c.loop_start, c.loop_end, c.max_loops, p.step};
    int optimizer[HEADER_INTS] = {OPTIMIZER_MAGIC, FILE_VERSION};
    optimizer[HEADER_STEP] = p.step, optimizer[HEADER_ROWS] = p.rows;
    memcpy(optimizer + HEADER_SEED, &p.seed, sizeof p.seed);
    memcpy(optimizer + HEADER_FLOPS, &p.flops, sizeof p.flops);
    size_t n = m->params.total;
    float *copy = (float *)allocate(3 * n, sizeof(float), "a checkpoint");
    tensors_read(copy, &m->params), tensors_read(copy + n, &m->moment1), tensors_read(copy + 2 * n, &m->moment2);
    const Part model_parts[] = {{model, sizeof model}, {copy, n * sizeof(float)}};
    const Part optimizer_parts[] = {{optimizer, sizeof optimizer}, {copy + n, 2 * n * sizeof(float)}};
    char *model_path = join_path(folder, "model.bin"), *optimizer_path = join_path(folder, "optimizer.bin");
    seal_header(model, model_parts, 2);
    seal_header(optimizer, optimizer_parts, 2);
    const File files[] = {{optimizer_path, optimizer_parts, 2}, {model_path, model_parts, 2}};
    write_files(files, 2);
    free(model_path), free(optimizer_path), free(copy);
}

static Config header_config(const int *h) {
    Config c = {h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9], h[10]};
    return c;
}

// Reads a checkpoint file: the header, and count floats, which the caller frees; with count 0 the header alone.
static float *read_floats(const char *path, uint32_t magic, const char *kind, int *header, size_t count) {
    float *floats = NULL;
    size_t size;
    const unsigned char *file = map_file(path, magic, kind, &size);
    memcpy(header, file, HEADER_INTS * sizeof(int));
    if (header[1] != FILE_VERSION) die(FAILED, "%s is a %s of version %d; this program reads version %d", path, kind, header[1], FILE_VERSION);
    if (count) {
        size_t want = HEADER_INTS * sizeof(int) + count * sizeof(float);
        if (size != want) die(FAILED, "%s is damaged or belongs to another model: %zu bytes, not %zu", path, size, want);
        uint32_t crc = (uint32_t)header[HEADER_CRC];
        header[HEADER_CRC] = 0;
        uint32_t found = crc32_update(0, header, HEADER_INTS * sizeof(int));
        found = crc32_update(found, file + HEADER_INTS * sizeof(int), size - HEADER_INTS * sizeof(int));
        if (found != crc) die(FAILED, "%s is damaged: its checksum is %08x, not %08x", path, found, crc);
        floats = (float *)allocate(count, sizeof(float), path);
        memcpy(floats, file + HEADER_INTS * sizeof(int), count * sizeof(float));
    }
    munmap((void *)file, size);
    return floats;
}

// The step in a header, or -1 if there is no such file or it is something else.
static int peek_step(const char *path, int magic) {
    int header[HEADER_INTS], step = -1;
    FILE *file = fopen(path, "rb");
    if (file && fread(header, sizeof(int), HEADER_INTS, file) == HEADER_INTS && header[0] == magic) step = header[HEADER_STEP];
    if (file) fclose(file);
    return step;
}

// Completes a checkpoint whose writer was stopped between its two renames.
static void checkpoint_recover(const char *folder) {
    char *model = join_path(folder, "model.bin"), *unfinished = concat(model, ".tmp"), *optimizer = join_path(folder, "optimizer.bin");
    int step = peek_step(optimizer, OPTIMIZER_MAGIC);
    if (step >= 0 && peek_step(model, MODEL_MAGIC) != step && peek_step(unfinished, MODEL_MAGIC) == step) commit_file(model);
    free(model), free(unfinished), free(optimizer);
}

// Builds m, without memory, as folder/model.bin describes it; returns the step it was saved at.
static int checkpoint_build(Model *m, const char *folder) {
    int header[HEADER_INTS];
    char *path = join_path(folder, "model.bin");
    read_floats(path, MODEL_MAGIC, "model", header, 0);
    Config c = header_config(header);
    if (config_error(c)) die(FAILED, "%s is damaged: %s", path, config_error(c));
    if (header[HEADER_STEP] < 0) die(FAILED, "%s is damaged: it says step %d", path, header[HEADER_STEP]);
    model_build(m, c);
    struct stat info;
    if (stat(path, &info) || (size_t)info.st_size != sizeof header + m->params.total * sizeof(float)) die(FAILED, "%s is damaged: its size is not that of its parameters", path);
    free(path);
    return header[HEADER_STEP];
}

// Reads the parameters into a model that checkpoint_build() built and model_reserve() gave memory.
static void checkpoint_load(Model *m, const char *folder) {
    int header[HEADER_INTS];
    char *path = join_path(folder, "model.bin");
    float *params = read_floats(path, MODEL_MAGIC, "model", header, m->params.total);
    model_set_parameters(m, params);
    free(path), free(params);
}

// Reads the moments as well, of the same step.
static Progress checkpoint_resume(Model *m, const char *folder, int step) {
    Progress p;
    int header[HEADER_INTS];
    char *path = join_path(folder, "optimizer.bin");
    float *moments = read_floats(path, OPTIMIZER_MAGIC, "optimizer state", header, 2 * m->params.total);
    checkpoint_load(m, folder);
    tensors_write(&m->moment1, moments), tensors_write(&m->moment2, moments + m->params.total);
    p.step = header[HEADER_STEP], p.rows = header[HEADER_ROWS];
    memcpy(&p.seed, header + HEADER_SEED, sizeof p.seed);
    memcpy(&p.flops, header + HEADER_FLOPS, sizeof p.flops);
    if (p.step != step) die(FAILED, "%s is of step %d, the model beside it of step %d: they are not a pair", path, p.step, step);
    free(path), free(moments);
    return p;
}

// =====================================================================================================================
// 7. Training step and evaluation

// Linear warmup, then a cosine from lr towards floor * lr, which it would reach at step number steps. step counts from 0.
static double learning_rate(double lr, double floor, int warmup, int steps, int step) {
    if (step < warmup) return lr * (step + 1) / warmup;
    double done = (double)(step - warmup) / max_int(1, steps - warmup);
    return lr * (floor + (1 - floor) * 0.5 * (1 + cos(3.14159265358979323846 * (done > 1 ? 1 : done))));
}

typedef struct { int S, masked; double loss, mean_t, norm; } Gradient; // masked: tokens, of all rows

// The gradient of step number step (from 0), in m->grads: one S for the step; rows of data, B at a time, with their noise.
static Gradient train_gradient(Model *m, const Data *d, int loop_dist, uint64_t seed, int step, int rows, int B) {
    int T = m->config.max_seq_len, *targets = (int *)allocate((size_t)B * T, sizeof(int), "a batch");
    Gradient g = {draw_loops(m->config, loop_dist, seed, step), 0, 0, 0, 0};
    for (int first = 0; first < rows; first += B) {
        data_batch(d, targets, seed, step, first, B, T);
        g.masked += model_noise(m, targets, B, T, seed, step, first, rows);
        model_forward(m, g.S);
        g.loss += model_loss(m, 1);
    }
    for (int row = 0; row < rows; row++) g.mean_t += noise_level(seed, step, row, rows) / rows;
    g.norm = gradient_norm(m);
    free(targets);
    return g;
}

// NELBO in nats per token of rows spread over the data, each with a t of its own; *error is its standard error
// (an upper estimate, as the t are stratified). Depends on the seed alone: every S, and every model of the same T, sees the same masks.
static double evaluate(Model *m, const Data *d, int S, int rows, int B, uint64_t seed, double *error) {
    int T = m->config.max_seq_len, *targets = (int *)allocate((size_t)B * T, sizeof(int), "a batch");
    int64_t available = data_rows(d, T, T), stride = available > rows ? available / rows : 1;
    double *nelbo = (double *)allocate(rows, sizeof(double), "the rows"), mean = 0, variance = 0;
    for (int first = 0; first < rows; first += B) {
        int n = min_int(B, rows - first);
        for (int i = 0; i < n; i++) data_row(d, targets + (size_t)i * T, (first + i) * stride % available, T, T);
        model_noise(m, targets, n, T, seed, 0, first, rows);
        model_forward(m, S);
        model_loss(m, 0);
        for (int i = 0; i < n; i++) nelbo[first + i] = m->row_loss[i] * rows;
    }
    for (int r = 0; r < rows; r++) mean += nelbo[r] / rows;
    for (int r = 0; r < rows; r++) variance += (nelbo[r] - mean) * (nelbo[r] - mean) / max_int(1, rows - 1);
    *error = sqrt(variance / rows);
    free(targets), free(nelbo);
    return mean;
}

// =====================================================================================================================
// 8. Sampler

enum { ORDER_RANDOM, ORDER_CONFIDENCE };

typedef struct {
    int steps, loops, order;
    double temperature;
    uint64_t seed;
} SampleOptions;

// Fills in every MASK of x (B,T), in steps; other tokens never change. Row b draws the random numbers of row first_row + b, so
// that a text does not depend on the others in its batch. show, if not NULL, is called after every step with work to do.
//
// random: the exact reverse process (MDLM's ancestral sampler). From noise level t = 1 - step/steps to s = t - 1/steps, a
//   token is revealed with probability (t - s) / t = 1 / (steps - step).
// confidence: LLaDA's low-confidence remasking. All masked tokens are predicted, and the most confident are kept, an equal
//   share in every step.
static void sample(Model *m, int *x, int B, int T, SampleOptions o, int first_row,
                   void (*show)(const int *x, int T, int step, void *), void *show_data) {
    int BT = B * T, mask = m->config.vocab_size;
    int *candidates = (int *)allocate(BT, sizeof(int), "sampling"), *token = (int *)allocate(BT, sizeof(int), "sampling");
    int *blanks = (int *)allocate(B, sizeof(int), "sampling"), *quota = (int *)allocate(B, sizeof(int), "sampling");
    double *confidence = (double *)allocate(BT, sizeof(double), "sampling");
    for (int i = 0; i < BT; i++) blanks[i / T] += x[i] == mask;
    for (int step = 0; step < o.steps; step++) {
        int n = 0;
        for (int b = 0; b < B; b++) quota[b] = (int)((int64_t)blanks[b] * (step + 1) / o.steps - (int64_t)blanks[b] * step / o.steps);
        for (int i = 0; i < BT; i++) {
            double u = random_uniform(o.seed, STREAM_UNMASK, step, (uint64_t)first_row * T + i);
            if (x[i] == mask && (o.order == ORDER_CONFIDENCE ? quota[i / T] > 0 : u < 1.0 / (o.steps - step))) candidates[n++] = i;
        }
        if (n == 0) continue; // nothing would change: no forward
        model_tokens(m, x, B, T);
        model_forward(m, o.loops);
        model_sample(m, token, confidence, candidates, n, o.temperature, o.seed, step, (uint64_t)first_row * T);
        for (int r = 0; r < n; r++)
            if (!isfinite(confidence[r])) die(FAILED, "--model: its probabilities are not finite: its training went wrong");
        if (o.order == ORDER_RANDOM)
            for (int r = 0; r < n; r++) x[candidates[r]] = token[r];
        else
            for (int begin = 0, end = 0; begin < n; begin = end) { // the candidates of one row
                int b = candidates[begin] / T;
                while (end < n && candidates[end] / T == b) end++;
                for (; quota[b] > 0; quota[b]--) {
                    int best = -1;
                    for (int r = begin; r < end; r++)
                        if (x[candidates[r]] == mask && (best < 0 || confidence[r] > confidence[best])) best = r;
                    x[candidates[best]] = token[best];
                }
            }
        if (show) show(x, T, step, show_data);
    }
    free(candidates), free(token), free(blanks), free(quota), free(confidence);
}

// =====================================================================================================================
// 9. Command line

enum { TRAIN = 1, EVAL = 2, SAMPLE = 4, TOKENIZE = 8, INFO = 16, FLOPS = 32 };

static const struct { const char *name; int flag; const char *about; } commands[] = {
    {"train", TRAIN, "Trains a model on token shards; writes model.bin, optimizer.bin, tokenizer.bin and log.csv into --out."},
    {"eval", EVAL, "Estimates the NELBO of held-out tokens, in nats per token, for several numbers of loops."},
    {"sample", SAMPLE, "Writes text: from nothing, from a beginning (--prompt), or into the blanks of a template (--fill)."},
    {"tokenize", TOKENIZE, "Encodes text: --text shows its tokens; --input and --output turn a file into a token shard,\n"
                           "stories separated by the end-of-text token's own text, <|endoftext|>."},
    {"info", INFO, "Prints the configuration, parameters and memory of a trained model or a preset."},
    {"flops", FLOPS, "Prints the exact floating point operations of the matrix products, per token, by number of loops."},
};

// The paper's model is d12; the others are for one's own machine.
static const struct { const char *name; int T, L, NH, C, a, b, S; } presets[] = {
    {"d2", 32, 2, 2, 32, 1, 2, 4}, {"nano", 128, 6, 4, 128, 1, 3, 8}, {"d6", 256, 6, 6, 288, 1, 3, 8}, {"d12", 1024, 12, 12, 768, 1, 3, 8},
};

// Every option of every command, with its default. -1 or NULL: taken from the preset, or none.
static const char *opt_data, *opt_val_data, *opt_tokenizer, *opt_model, *opt_loop, *opt_out, *opt_loops;
static const char *opt_prompt, *opt_fill, *opt_text, *opt_input, *opt_output, *opt_loop_dist = "uniform", *opt_order = "confidence";
static int opt_layers = -1, opt_heads = -1, opt_channels = -1, opt_seq_len = -1, opt_vocab = -1, opt_max_loops = -1;
static int opt_steps = 2000, opt_batch = 16, opt_accum = 1, opt_warmup = 100, opt_save_every = 500, opt_val_every = 500, opt_val_rows = 256;
static int opt_resume, opt_recompute, opt_rows = 1024, opt_length = -1, opt_sample_steps = 32, opt_n = 1, opt_watch, opt_threads;
static double opt_lr = 2e-3, opt_floor = 0.1, opt_weight_decay = 0.1, opt_clip = 1, opt_temperature = 1;
static uint64_t opt_seed = 1;

static const struct { const char *name; int commands; char type; void *value; double least; const char *argument, *help; } options[] = {
    {"data", TRAIN | EVAL, 's', &opt_data, 0, "FILES", "token shards: a file, or a quoted pattern such as 'train_*.bin'"},
    {"val-data", TRAIN, 's', &opt_val_data, 0, "FILES", "held-out token shards: their NELBO is printed and logged"},
    {"tokenizer", TRAIN | TOKENIZE | SAMPLE, 's', &opt_tokenizer, 0, "FILE", "tokenizer; after training it is found in the model's folder"},
    {"model", TRAIN, 's', &opt_model, 0, "PRESET", "d2, nano, d6 or d12; the next options change it (default nano)"},
    {"model", EVAL | SAMPLE, 's', &opt_model, 0, "FOLDER", "what train wrote into --out"},
    {"model", INFO | FLOPS, 's', &opt_model, 0, "MODEL", "a trained model's folder, or a preset: d2, nano, d6, d12 (default nano)"},
    {"layers", TRAIN | INFO | FLOPS, 'i', &opt_layers, 1, "L", "layers"},
    {"heads", TRAIN | INFO | FLOPS, 'i', &opt_heads, 1, "NH", "attention heads"},
    {"channels", TRAIN | INFO | FLOPS, 'i', &opt_channels, 2, "C", "channels"},
    {"seq-len", TRAIN | INFO | FLOPS, 'i', &opt_seq_len, 1, "T", "positions in a row"},
    {"vocab", TRAIN | INFO | FLOPS, 'i', &opt_vocab, 1, "V", "tokens, where there is no --tokenizer"},
    {"loop", TRAIN | INFO | FLOPS, 's', &opt_loop, 0, "A:B", "loop over layers A .. B-1; 0:0 for an ordinary MDM"},
    {"max-loops", TRAIN | INFO | FLOPS, 'i', &opt_max_loops, 1, "S", "loops in training: 1 to S"},
    {"loop-dist", TRAIN, 's', &opt_loop_dist, 0, "NAME", "how a step's loops are drawn: uniform, fixed (always S), flops (p ~ 1/FLOPs)"},
    {"out", TRAIN, 's', &opt_out, 0, "FOLDER", "where the model goes"},
    {"resume", TRAIN, 'b', &opt_resume, 0, "", "continue from the checkpoint in --out, exactly, with the same options"},
    {"steps", TRAIN, 'i', &opt_steps, 1, "N", "optimizer steps in all"},
    {"batch", TRAIN | EVAL | INFO, 'i', &opt_batch, 1, "B", "rows at a time"},
    {"accum", TRAIN, 'i', &opt_accum, 1, "N", "batches whose gradients are added up for one step"},
    {"recompute", TRAIN, 'b', &opt_recompute, 0, "", "keep only each pass's input for backward and compute the rest again: less memory, more time"},
    {"lr", TRAIN, 'f', &opt_lr, 0, "RATE", "highest learning rate"},
    {"floor", TRAIN, 'f', &opt_floor, 0, "SHARE", "where the learning rate ends, as a share of the highest"},
    {"warmup", TRAIN, 'i', &opt_warmup, 0, "N", "steps over which the learning rate rises"},
    {"weight-decay", TRAIN, 'f', &opt_weight_decay, 0, "RATE", "AdamW's weight decay, on matrices only"},
    {"clip", TRAIN, 'f', &opt_clip, 1e-9, "NORM", "largest norm of the gradient"},
    {"save-every", TRAIN, 'i', &opt_save_every, 1, "N", "steps between checkpoints"},
    {"val-every", TRAIN, 'i', &opt_val_every, 1, "N", "steps between validations"},
    {"val-rows", TRAIN, 'i', &opt_val_rows, 1, "N", "rows in a validation"},
    {"loops", TRAIN, 's', &opt_loops, 0, "S,S,..", "numbers of loops to validate with (default 1, 2, 4, .. and --max-loops)"},
    {"loops", EVAL, 's', &opt_loops, 0, "S,S,..", "numbers of loops, also beyond --max-loops (default 1, 2, 4, .. and that)"},
    {"loops", SAMPLE, 's', &opt_loops, 0, "S", "loops, also beyond --max-loops (default --max-loops)"},
    {"rows", EVAL, 'i', &opt_rows, 1, "N", "rows, spread over the data; beyond its end they begin again with other noise"},
    {"prompt", SAMPLE, 's', &opt_prompt, 0, "TEXT", "how the text begins"},
    {"fill", SAMPLE, 's', &opt_fill, 0, "TEXT", "a template: ____ is a blank of one token, ________ of two, and so on"},
    {"length", SAMPLE, 'i', &opt_length, 2, "T", "tokens to write (default: all that the model takes)"},
    {"steps", SAMPLE, 'i', &opt_sample_steps, 1, "N", "denoising steps"},
    {"order", SAMPLE, 's', &opt_order, 0, "NAME", "which tokens are kept first: confidence, random"},
    {"temperature", SAMPLE, 'f', &opt_temperature, 0, "X", "below 1 plays safe; 0 always takes the likeliest token"},
    {"n", SAMPLE, 'i', &opt_n, 1, "N", "texts to write"},
    {"watch", SAMPLE, 'b', &opt_watch, 0, "", "show the text while it is denoised"},
    {"text", TOKENIZE, 's', &opt_text, 0, "TEXT", "text to encode"},
    {"input", TOKENIZE, 's', &opt_input, 0, "FILE", "file to encode"},
    {"output", TOKENIZE, 's', &opt_output, 0, "FILE", "token shard to write"},
    {"seed", TRAIN | EVAL | SAMPLE, 'u', &opt_seed, 0, "N", "seed of all randomness"},
    {"threads", TRAIN | EVAL | SAMPLE, 'i', &opt_threads, 1, "N", "threads (default: one for each core)"},
};
#define COUNT(array) (int)(sizeof(array) / sizeof(array)[0])
enum { NUM_OPTIONS = COUNT(options), NUM_COMMANDS = COUNT(commands), NUM_PRESETS = COUNT(presets) };

static void print_help(int command) {
    printf("usage: loopmdm %s [options]\n%s\n\n", commands[command].name, commands[command].about);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        if (!(options[i].commands & commands[command].flag)) continue;
        int one_letter = !options[i].name[1];
        printf("  %s%s %-*s%s", one_letter ? "-" : "--", options[i].name, 21 - (int)strlen(options[i].name) + one_letter, options[i].argument, options[i].help);
        if (options[i].type == 'i' && *(int *)options[i].value > 0) printf(" (default %d)", *(int *)options[i].value);
        if (options[i].type == 'f') printf(" (default %g)", *(double *)options[i].value);
        if (options[i].type == 'u') printf(" (default %llu)", (unsigned long long)*(uint64_t *)options[i].value);
        if (options[i].type == 's' && *(const char **)options[i].value) printf(" (default %s)", *(const char **)options[i].value);
        printf("\n");
    }
}

__attribute__((noreturn)) static void finish(void) { // what was printed must have arrived
    if (fflush(stdout) || ferror(stdout)) die(FAILED, "cannot write to standard output: %s", strerror(errno));
    exit(0);
}

static void parse_options(int command, int argc, char **argv) {
    for (int a = 2; a < argc; a++) {
        if (!strcmp(argv[a], "--help") || !strcmp(argv[a], "-h")) {
            print_help(command);
            finish();
        }
        const char *name = argv[a] + strspn(argv[a], "-"), *equals = strchr(name, '=');
        size_t length = equals ? (size_t)(equals - name) : strlen(name);
        int i = argv[a][0] == '-' ? 0 : NUM_OPTIONS;
        for (; i < NUM_OPTIONS; i++)
            if ((options[i].commands & commands[command].flag) && strlen(options[i].name) == length && !memcmp(options[i].name, name, length)) break;
        if (i == NUM_OPTIONS) die(USAGE, "%s has no option %s; see loopmdm %s --help", commands[command].name, argv[a], commands[command].name);
        void *to = options[i].value;
        if (options[i].type == 'b') {
            if (equals) die(USAGE, "--%s takes no value", options[i].name);
            *(int *)to = 1;
            continue;
        }
        const char *value = equals ? equals + 1 : a + 1 < argc ? argv[++a] : NULL;
        if (!value) die(USAGE, "--%s needs a value: %s", options[i].name, options[i].help);
        char *end;
        errno = 0;
        if (options[i].type == 's') {
            if (!*value) die(USAGE, "--%s is empty: %s", options[i].name, options[i].help);
            *(const char **)to = value;
            continue;
        }
        double number = strtod(value, &end);
        if (end == value || *end || !isfinite(number)) die(USAGE, "--%s takes a number, not '%s'", options[i].name, value);
        if (number < options[i].least) die(USAGE, "--%s must be at least %g, not %s", options[i].name, options[i].least, value);
        if (options[i].type == 'f') *(double *)to = number;
        else {
            long long integer = strtoll(value, &end, 10);
            if (*end || errno || (options[i].type == 'i' && integer > INT_MAX))
                die(USAGE, "--%s takes a whole number, not '%s'", options[i].name, value);
            if (options[i].type == 'i') *(int *)to = (int)integer;
            else *(uint64_t *)to = (uint64_t)integer;
        }
    }
    if (opt_threads > 1024) die(USAGE, "--threads is %d; at most 1024", opt_threads);
#ifdef _OPENMP
    if (opt_threads) omp_set_num_threads(opt_threads);
#endif
}

static int choose(const char *option, const char *value, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (!strcmp(value, names[i])) return i;
    die(USAGE, "--%s cannot be '%s'; see --help", option, value);
}

enum { MOST_LOOPS = 32 }; // in a list

// "1,2,8" -> {1, 2, 8}; returns how many
static int parse_loops(const char *text, int *loops, int most) {
    int n = 0;
    char *end;
    do {
        long S = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || S < 1 || S > 100000 || n == most)
            die(USAGE, "--loops takes numbers from 1, such as 4 or 1,2,4, not '%s'", opt_loops);
        loops[n++] = (int)S;
        text = end + 1;
    } while (*end);
    return n;
}

static int find_preset(const char *name) { // -1: there is none
    for (int i = 0; i < NUM_PRESETS; i++)
        if (!strcmp(name, presets[i].name)) return i;
    return -1;
}

static Config config_from_options(int vocab_size) {
    int i = find_preset(opt_model ? opt_model : "nano"), used = 0;
    if (i < 0) die(USAGE, "--model: there is no preset %s; they are d2, nano, d6, d12", opt_model);
    Config c = {presets[i].T, vocab_size, padded(vocab_size), presets[i].L, presets[i].NH, presets[i].C, presets[i].a, presets[i].b, presets[i].S};
    if (opt_seq_len > 0) c.max_seq_len = opt_seq_len;
    if (opt_layers > 0) c.layers = opt_layers;
    if (opt_heads > 0) c.heads = opt_heads;
    if (opt_channels > 0) c.channels = opt_channels;
    if (opt_max_loops > 0) c.max_loops = opt_max_loops;
    if (opt_loop && (sscanf(opt_loop, "%9d:%9d%n", &c.loop_start, &c.loop_end, &used) != 2 || opt_loop[used]))
        die(USAGE, "--loop takes two layers such as 1:3, not '%s'", opt_loop);
    if (config_error(c)) die(USAGE, "impossible model: %s", config_error(c));
    return c;
}

// The tokenizer of a trained model: --tokenizer, or the one in its folder.
static Tokenizer model_tokenizer(const Model *m, const char *folder) {
    char *path = join_path(folder, "tokenizer.bin");
    Tokenizer t = tokenizer_open(opt_tokenizer ? opt_tokenizer : path);
    if (t.vocab_size != m->config.vocab_size)
        die(FAILED, "%s has %d tokens, the model in %s %d: they do not belong together", opt_tokenizer ? opt_tokenizer : path, t.vocab_size,
            folder, m->config.vocab_size);
    free(path);
    return t;
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    interrupted = 1;
    signal(number, SIG_DFL); // a second Ctrl-C ends the program at once
}

static void make_folders(const char *path) { // as mkdir -p
    char *p = join_path(path, "");
    for (char *s = p + 1; *s; s++)
        if (*s == '/') {
            *s = 0;
            if (mkdir(p, 0777) && errno != EEXIST) die(FAILED, "cannot make the folder %s: %s", p, strerror(errno));
            *s = '/';
        }
    free(p);
}

// Opens log.csv for appending, with the lines of earlier steps that a resumed run does not repeat.
static FILE *open_log(const char *folder, int step, const int *val_loops, int num_val) {
    char *path = join_path(folder, "log.csv"), *kept = NULL, line[4096];
    size_t bytes;
    FILE *old = step ? fopen(path, "r") : NULL, *log = open_memstream(&kept, &bytes);
    fprintf(log, "step,loops,t,loss,lr,grad_norm,tokens_per_s,flops");
    for (int i = 0; i < num_val; i++) fprintf(log, ",val_nelbo_s%d", val_loops[i]);
    fprintf(log, "\n");
    while (old && fgets(line, sizeof line, old))
        if (isdigit((unsigned char)line[0]) && strchr(line, '\n') && atoi(line) <= step) fputs(line, log);
    if (old) fclose(old);
    fclose(log);
    Part part = {kept, bytes};
    write_file(path, &part, 1);
    if (!(log = fopen(path, "a"))) die(FAILED, "cannot write %s: %s", path, strerror(errno));
    free(path), free(kept);
    return log;
}

// The numbers of loops to evaluate with: --loops, or 1, 2, 4, .. and S_max.
static int evaluation_loops(Config c, int *loops, int most) {
    int n = 0;
    if (opt_loops) return parse_loops(opt_loops, loops, most);
    for (int S = 1; n == 0 || loops[n - 1] < c.max_loops; S *= 2) loops[n++] = min_int(S, c.max_loops);
    return n;
}

// The model that training begins with, new or from --out, with its Progress; and --out itself.
static Progress train_begin(Model *m, Config c, const Tokenizer *tokenizer) {
    Progress p = {0, opt_batch * opt_accum, opt_seed, 0};
    char *saved = join_path(opt_out, "model.bin"), *copy = join_path(opt_out, "tokenizer.bin");
    make_folders(opt_out);
    int lock = open(opt_out, O_RDONLY); // until the end
    if (lock < 0 || (flock(lock, LOCK_EX | LOCK_NB) && errno != EWOULDBLOCK)) die(FAILED, "--out: cannot open %s: %s", opt_out, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB)) die(FAILED, "--out: another training is writing into %s", opt_out);
    if (!opt_resume) {
        if (!access(saved, F_OK)) die(USAGE, "%s is already there: continue it with --resume, or choose another --out", saved);
        model_build(m, c);
        model_reserve(m, opt_batch, c.max_seq_len, c.max_loops, 1, opt_recompute);
        float *params = (float *)allocate(m->params.total, sizeof(float), "the parameters");
        init_parameters(params, c, opt_seed);
        model_set_parameters(m, params);
        free(params);
    } else {
        checkpoint_recover(opt_out);
        int step = checkpoint_build(m, opt_out);
        if (memcmp(&m->config, &c, sizeof c))
            die(USAGE, "--resume: %s has another shape (loopmdm info --model %s); give the options it was begun with", saved, opt_out);
        model_reserve(m, opt_batch, c.max_seq_len, c.max_loops, 1, opt_recompute);
        p = checkpoint_resume(m, opt_out, step);
        if (p.seed != opt_seed || p.rows != opt_batch * opt_accum)
            die(USAGE, "--resume: this run was begun with --seed %llu and --batch times --accum = %d", (unsigned long long)p.seed, p.rows);
    }
    if (p.step > opt_steps) die(USAGE, "--resume: %s is at step %d already, beyond --steps %d", saved, p.step, opt_steps);
    if (opt_tokenizer) {
        Part part = {tokenizer->file, tokenizer->file_size};
        write_file(copy, &part, 1);
    }
    free(saved), free(copy);
    return p;
}

// The loss is not finite: says where, and what is left. saved is the step of the last checkpoint, or -1.
static void stop_training(int step, double loss, double norm, int saved) {
    char checkpoint[64] = "there is no checkpoint yet";
    if (saved < 0 && opt_resume) die(FAILED, "step %d: the loss is %g from the start: the model in %s went wrong before it was saved; begin anew", step, loss, opt_out);
    if (saved >= 0) snprintf(checkpoint, sizeof checkpoint, "the last good checkpoint is step %d", saved);
    die(FAILED, "step %d: the loss is %g, the gradient's norm %g; %s in %s. Try a lower --lr", step, loss, norm, checkpoint, opt_out);
}

static void print_memory(const Model *m) {
    const double MiB = 1 << 20;
    printf("memory: %.1f MiB parameters, %.1f MiB gradients, %.1f MiB optimizer state, %.1f MiB activations\n", m->bytes[PARAMETERS] / MiB,
           m->bytes[GRADIENTS] / MiB, m->bytes[OPTIMIZER] / MiB, m->bytes[ACTIVATIONS] / MiB);
}

static void train(void) {
    static const char *const dists[] = {"uniform", "fixed", "flops"};
    int dist = choose("loop-dist", opt_loop_dist, dists, 3), val_loops[MOST_LOOPS], num_val = 0;
    if (!opt_data || !opt_out) die(USAGE, "train needs --data and --out; see loopmdm train --help");
    if (!opt_tokenizer && opt_vocab < 0) die(USAGE, "train needs --tokenizer, or --vocab for the number of tokens");
    if (opt_floor > 1) die(USAGE, "--floor is a share of --lr: at most 1, not %g", opt_floor);
    Tokenizer tokenizer;
    if (opt_tokenizer) {
        tokenizer = tokenizer_open(opt_tokenizer);
        if (opt_vocab >= 0 && opt_vocab != tokenizer.vocab_size)
            die(USAGE, "--vocab is %d, but %s has %d tokens", opt_vocab, opt_tokenizer, tokenizer.vocab_size);
    }
    Config c = config_from_options(opt_tokenizer ? tokenizer.vocab_size : opt_vocab);
    if (fmax((double)opt_batch * opt_accum, opt_val_rows) * c.max_seq_len > INT_MAX / 4)
        die(USAGE, "--batch, --accum or --val-rows: too many rows of %d tokens", c.max_seq_len);
    int rows = opt_batch * opt_accum, T = c.max_seq_len;
    Data data = data_open(opt_data, c.vocab_size, T), val;
    if (opt_val_data) {
        val = data_open(opt_val_data, c.vocab_size, T);
        num_val = evaluation_loops(c, val_loops, MOST_LOOPS);
        for (int i = 0; i < num_val; i++)
            if (val_loops[i] > c.max_loops) die(USAGE, "--loops: training has memory for %d loops; use eval for more", c.max_loops);
    }
    Model m;
    Progress p = train_begin(&m, c, &tokenizer);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    FILE *log = open_log(opt_out, p.step, val_loops, num_val);
    printf("%zu parameters, %d layers, loop %d:%d up to %d times, %lld training tokens\n", m.params.total, c.layers, c.loop_start, c.loop_end,
           c.max_loops, (long long)data.total);
    print_memory(&m);

    double began = seconds(), shown = began, loss_sum = 0;
    int begin = p.step, saved = -1, loss_count = 0;
    while (p.step < opt_steps) {
        double step_began = seconds();
        Gradient g = train_gradient(&m, &data, dist, opt_seed, p.step, rows, opt_batch);
        if (!isfinite(g.loss) || !isfinite(g.norm)) stop_training(p.step + 1, g.loss, g.norm, saved);
        AdamW adamw = {learning_rate(opt_lr, opt_floor, opt_warmup, opt_steps, p.step), 0.9, 0.95, 1e-8, opt_weight_decay, opt_clip};
        if (p.step == begin && opt_resume) saved = begin; // it has proved to be good
        model_update(&m, adamw, g.norm, ++p.step);
        p.flops += flops_per_token(c, T, g.S, g.masked / ((double)rows * T), 1) * rows * T;
        loss_sum += g.loss;
        loss_count++;

        double now = seconds(), per_step = (now - began) / (p.step - begin);
        int last = p.step == opt_steps, stop = interrupted, validates = num_val && !stop && (p.step % opt_val_every == 0 || last);
        fprintf(log, "%d,%d,%.6f,%.9g,%.9g,%.9g,%.0f,%.9g", p.step, g.S, g.mean_t, g.loss, adamw.lr, g.norm, rows * T / (now - step_began), p.flops);
        if (validates || last || p.step == begin + 1 || now - shown > 5) { // the mean loss since the line before: 1/t makes single losses noisy
            int left = (int)(per_step * (opt_steps - p.step));
            printf("step %d/%d | loss %.4f | loops %d | norm %.2f | lr %.2e | %.0f tokens/s | %d:%02d left\n", p.step, opt_steps,
                   loss_sum / loss_count, g.S, g.norm, adamw.lr, rows * T / per_step, left / 60, left % 60);
            shown = now;
            loss_sum = loss_count = 0;
        }
        if (validates) printf("validation NELBO, nats per token:");
        for (int i = 0; i < num_val; i++) {
            fputc(',', log);
            if (!validates) continue;
            double error, nelbo = evaluate(&m, &val, val_loops[i], opt_val_rows, opt_batch, opt_seed, &error);
            printf("  S=%d %.4f%s", val_loops[i], nelbo, i + 1 == num_val ? "\n" : "");
            fprintf(log, "%.6f", nelbo);
        }
        fputc('\n', log);
        if (fflush(stdout) || fflush(log)) die(FAILED, "cannot write log.csv in %s, or standard output: %s", opt_out, strerror(errno));
        if (p.step % opt_save_every == 0 || last || stop) { // a model is saved only if it still gives a finite loss
            double error, now_loss = evaluate(&m, &data, c.max_loops, opt_batch, opt_batch, opt_seed, &error);
            if (!isfinite(now_loss)) stop_training(p.step, now_loss, g.norm, saved);
            checkpoint_save(&m, opt_out, p);
            saved = p.step;
        }
        began += seconds() - now; // neither validating nor saving counts in tokens/s
        if (stop && !last) {
            printf("stopped after step %d; the checkpoint is in %s, --resume continues\n", p.step, opt_out);
            exit(130);
        }
    }
    fclose(log), model_free(&m);
    printf("step %d of %d is done; the model is in %s\n", p.step, opt_steps, opt_out);
}

static void eval(void) {
    Model m;
    if (!opt_model || !opt_data) die(USAGE, "eval needs --model and --data; see loopmdm eval --help");
    int step = checkpoint_build(&m, opt_model), loops[MOST_LOOPS], n = evaluation_loops(m.config, loops, MOST_LOOPS), T = m.config.max_seq_len;
    Data data = data_open(opt_data, m.config.vocab_size, T);
    if ((double)opt_rows * T > INT_MAX / 4) die(USAGE, "--rows %d are too many", opt_rows);
    model_reserve(&m, min_int(opt_batch, opt_rows), T, 1, 0, 0);
    checkpoint_load(&m, opt_model);
    printf("%s, step %d: NELBO of %d rows of %d tokens\n\n", opt_model, step, opt_rows, T);
    printf("loops  passes  NELBO, nats/token  perplexity at most  GFLOP/row  tokens/s\n");
    for (int i = 0; i < n; i++) {
        double began = seconds(), error, nelbo = evaluate(&m, &data, loops[i], opt_rows, min_int(opt_batch, opt_rows), opt_seed, &error);
        if (!isfinite(nelbo)) die(FAILED, "--model: the loss of %s is %g at %d loops: its training went wrong", opt_model, nelbo, loops[i]);
        printf("%5d  %6d    %.4f +- %.4f  %18.2f  %9.3f  %8.0f\n", loops[i], num_passes(m.config, loops[i]), nelbo, error, exp(nelbo),
               flops_per_token(m.config, T, loops[i], 0.5, 0) * T * 1e-9, (double)opt_rows * T / (seconds() - began));
        fflush(stdout);
    }
    model_free(&m);
}

// The text of tokens (T), from the one after an initial end-of-text to the next; MASK is shown as blanks. Caller frees.
static char *decode(const Tokenizer *t, const int *tokens, int T) {
    char *text = (char *)allocate((size_t)T * (max_int(t->longest, 4) + 1) + 1, 1, "text");
    int n = 0;
    for (int i = tokens[0] == t->eot; i < T && tokens[i] != t->eot; i++) {
        int mask = tokens[i] >= t->vocab_size;
        memcpy(text + n, mask ? " __" : (const char *)t->bytes[tokens[i]], mask ? 3 : t->length[tokens[i]]);
        n += mask ? 3 : t->length[tokens[i]];
    }
    return text;
}

typedef struct { const Tokenizer *tokenizer; int lines; } Watch; // lines drawn so far, to be drawn over

// Draws the text in place on a terminal, wrapped at its width; elsewhere as one line for each step.
static void watch(const int *x, int T, int step, void *data) {
    Watch *w = (Watch *)data;
    char *text = decode(w->tokenizer, x, T), *s = text;
    if (!isatty(1)) {
        for (; *s; s++) *s = *s == '\n' ? ' ' : *s;
        printf("%3d |%s%s\n", step + 1, *text == ' ' ? "" : " ", text);
        free(text);
        return;
    }
    struct winsize size;
    int known = !ioctl(1, TIOCGWINSZ, &size) && size.ws_col > 8 && size.ws_row > 2;
    int width = known ? size.ws_col - 1 : 79, height = known ? size.ws_row - 1 : 23;
    if (w->lines) printf("\033[%dA", w->lines); // back up over the last drawing,
    printf("\r\033[J");                        // and clear it
    for (w->lines = 0; *s && w->lines < height; w->lines++) {
        int n = (int)strcspn(s, "\n"), columns = 0, cut = 0, space = 0;
        for (; cut < n && columns < width; cut++) { // continuation bytes of UTF-8 take no column
            columns += (s[cut + 1] & 0xc0) != 0x80;
            if (s[cut] == ' ') space = cut;
        }
        if (cut < n && space) cut = space;
        printf("%.*s\n", cut, s);
        s += cut + (s[cut] == '\n' || s[cut] == ' ');
    }
    fflush(stdout);
    free(text);
    struct timespec pause = {0, 60000000}; // long enough to be seen
    nanosleep(&pause, NULL);
}

// A template to tokens: each run of three or more underscores is a blank of one token for every four begun, together with
// the space before it, which belongs to the token.
static int encode_template(const Tokenizer *t, int *x, int mask, const char *s) {
    int n = 0;
    while (*s) {
        const char *blank = strstr(s, "___"), *end = blank ? blank : s + strlen(s);
        int run = (int)strspn(end, "_");
        n += (int)tokenizer_encode(t, x + n, s, end - s - (run && end > s && end[-1] == ' '), "--fill");
        for (int i = 0; i < run; i += 4) x[n++] = mask;
        s = end + run;
    }
    return n;
}

static void sample_command(void) {
    static const char *const orders[] = {"random", "confidence"};
    Model m;
    int order = choose("order", opt_order, orders, 2), loops;
    if (!opt_model) die(USAGE, "sample needs --model; see loopmdm sample --help");
    if (opt_fill && (opt_prompt || opt_length >= 0)) die(USAGE, "--fill excludes --prompt and --length");
    checkpoint_build(&m, opt_model);
    Tokenizer t = model_tokenizer(&m, opt_model);
    int mask = m.config.vocab_size, most = m.config.max_seq_len, T = opt_length < 0 ? most : opt_length;
    if (opt_loops) parse_loops(opt_loops, &loops, 1);
    else loops = m.config.max_loops;
    if (T > most) die(USAGE, "--length is %d; the model takes at most %d tokens", T, most);
    const char *text = opt_fill ? opt_fill : opt_prompt ? opt_prompt : "";
    int *start = (int *)allocate(strlen(text) + most + 1, sizeof(int), "the text"), given = 1; // every text begins after an end-of-text
    start[0] = t.eot;
    given += opt_fill ? encode_template(&t, start + 1, mask, text) : (int)tokenizer_encode(&t, start + 1, text, strlen(text), "--prompt");
    if (given > T)
        die(FAILED, "%s has %d tokens with the end-of-text before it; %d are possible", opt_fill ? "--fill" : "--prompt", given, T);
    if (opt_fill) {
        int blanks = 0;
        for (int i = 0; i < given; i++) blanks += start[i] == mask;
        if (!blanks) die(USAGE, "--fill has no blank: write ____ where a token is to be filled in");
        T = given;
    }
    for (int i = given; i < T; i++) start[i] = mask;
    int B = opt_watch ? 1 : min_int(opt_n, 16), *x = (int *)allocate((size_t)B * T, sizeof(int), "the texts");
    SampleOptions o = {opt_sample_steps, loops, order, opt_temperature, opt_seed};
    model_reserve(&m, B, T, 1, 0, 0);
    checkpoint_load(&m, opt_model);
    for (int first = 0; first < opt_n; first += B) {
        int n = min_int(B, opt_n - first);
        Watch w = {&t, 0};
        for (int b = 0; b < n; b++) memcpy(x + b * T, start, T * sizeof(int));
        sample(&m, x, n, T, o, first, opt_watch ? watch : NULL, &w);
        for (int b = 0; b < n; b++) {
            char *result = decode(&t, x + b * T, T);
            if (w.lines) printf("\033[%dA\r\033[J", w.lines);
            printf("%s\n%s", result, first + b + 1 < opt_n ? "\n" : "");
            free(result);
        }
        fflush(stdout);
    }
    free(start), free(x);
    model_free(&m);
}

static void print_token(const Tokenizer *t, int id) { // what is no printable character as \xNN
    printf("%6d  '", id);
    for (int i = 0, length; i < t->length[id]; i += length) {
        const unsigned char *s = t->bytes[id] + i;
        character_class(s, t->length[id] - i, &length);
        if (*s < 32 || *s == 127 || (*s >= 128 && length == 1)) printf("\\x%02x", *s);
        else printf("%.*s", length, (const char *)s);
    }
    printf("'\n");
}

static void tokenize(void) {
    if (!opt_tokenizer) die(USAGE, "tokenize needs --tokenizer; see loopmdm tokenize --help");
    if (!opt_text == !opt_input || !opt_input != !opt_output) die(USAGE, "tokenize takes either --text, or --input and --output");
    Tokenizer t = tokenizer_open(opt_tokenizer);
    if (opt_text) {
        int *ids = (int *)allocate(strlen(opt_text), sizeof(int), "tokens"), n = (int)tokenizer_encode(&t, ids, opt_text, strlen(opt_text), "--text");
        for (int i = 0; i < n; i++) print_token(&t, ids[i]);
        printf("%d tokens\n", n);
        free(ids);
        return;
    }
    struct stat info, other;
    if (stat(opt_input, &info)) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    if (!S_ISREG(info.st_mode)) die(FAILED, "cannot read %s: it is a folder, device or pipe", opt_input);
    if (!stat(opt_output, &other) && other.st_dev == info.st_dev && other.st_ino == info.st_ino) die(USAGE, "--output is --input: %s", opt_input);
    if (!strcmp(opt_output, opt_tokenizer)) die(USAGE, "--output is --tokenizer: %s", opt_output);
    FILE *in = fopen(opt_input, "rb");
    if (!in) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    if (info.st_size == 0 || info.st_size >= INT_MAX)
        die(FAILED, "%s has %lld bytes: from 1 byte to 2 GiB are possible", opt_input, (long long)info.st_size);
    size_t size = (size_t)info.st_size, count = 0;
    char *text = (char *)allocate(size, 1, "the text");
    int *ids = (int *)allocate(size, sizeof(int), "tokens");
    uint16_t *tokens = (uint16_t *)allocate(2 * size, sizeof *tokens, "tokens");
    if (fread(text, 1, size, in) != size) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    fclose(in);
    int stories = 0;
    for (size_t begin = 0, end; begin < size; begin = end + t.length[t.eot]) { // as llm.c: an end-of-text before each story, no space around it
        end = find_eot(&t, text, begin, size);
        size_t from = begin, to = end;
        while (from < to && isspace((unsigned char)text[from])) from++;
        while (to > from && isspace((unsigned char)text[to - 1])) to--;
        if (from == to) continue;
        size_t n = tokenizer_encode(&t, ids, text + from, to - from, opt_input);
        tokens[count++] = (uint16_t)t.eot;
        for (size_t i = 0; i < n; i++) tokens[count++] = (uint16_t)ids[i];
        stories++;
    }
    if (!count) die(FAILED, "%s has no text", opt_input);
    int header[HEADER_INTS] = {SHARD_MAGIC, 1, (int)count};
    const Part parts[] = {{header, sizeof header}, {tokens, count * sizeof *tokens}};
    write_file(opt_output, parts, 2);
    printf("%s: %d stories, %zu tokens, %.2f bytes per token\n", opt_output, stories, count, (double)size / count);
    free(text), free(ids), free(tokens);
}

// info and flops take a trained model or a preset; returns the step, or -1 for a preset
static int model_or_preset(Model *m) {
    if (opt_model && find_preset(opt_model) < 0) {
        if (access(opt_model, F_OK)) die(USAGE, "--model: %s is neither a folder nor a preset; these are d2, nano, d6, d12", opt_model);
        return checkpoint_build(m, opt_model);
    }
    model_build(m, config_from_options(opt_vocab < 0 ? 4096 : opt_vocab));
    return -1;
}

static void info(void) {
    Model m;
    int step = model_or_preset(&m);
    Config c = m.config;
    Shape s[NUM_TENSORS];
    tensor_shapes(c, s);
    printf("%s: %d layers, %d channels, %d heads, %d positions, %d tokens, loop %d:%d up to %d times\n", opt_model ? opt_model : "nano",
           c.layers, c.channels, c.heads, c.max_seq_len, c.vocab_size, c.loop_start, c.loop_end, c.max_loops);
    if (step >= 0) printf("trained for %d steps\n", step);
    printf("\ntensor     shape                 parameters\n");
    for (int i = 0; i < NUM_TENSORS; i++) {
        char shape[64];
        snprintf(shape, sizeof shape, s[i].in ? "%d x (%d,%d)" : "%d x (%d)", s[i].copies, s[i].out, s[i].in);
        printf("%-10s %-20s %11zu\n", s[i].name, shape, m.params.size[i]);
    }
    printf("%-31s %11zu\n\n", "total", m.params.total);
    for (int recompute = 0; recompute < 2; recompute++) {
        model_plan(&m, opt_batch, c.max_seq_len, c.max_loops, 1, recompute);
        printf("training with --batch %d%s; ", opt_batch, recompute ? " --recompute" : "");
        print_memory(&m);
    }
}

static void flops(void) {
    Model m;
    model_or_preset(&m);
    Config c = m.config;
    printf("MFLOP per token at T = %d, V = %d (a multiply-add is two); the LM head on masked tokens only\n\n", c.max_seq_len, c.vocab_size);
    printf("loops  passes   layers  attention     head  sampling, all masked  training, half masked  relative to S=1\n");
    for (int S = 1; S <= c.max_loops; S++) {
        double attention = 4.0 * num_passes(c, S) * c.max_seq_len * c.channels, all = flops_per_token(c, c.max_seq_len, S, 0, 0);
        printf("%5d  %6d  %7.3f  %9.3f  %7.3f  %20.3f  %21.3f  %15.2f\n", S, num_passes(c, S), (all - attention) * 1e-6, attention * 1e-6,
               2e-6 * c.vocab_size * c.channels,
               flops_per_token(c, c.max_seq_len, S, 1, 0) * 1e-6, flops_per_token(c, c.max_seq_len, S, 0.5, 1) * 1e-6,
               flops_per_token(c, c.max_seq_len, S, 0.5, 1) / flops_per_token(c, c.max_seq_len, 1, 0.5, 1));
    }
}

int main(int argc, char **argv) {
    static void (*const run[])(void) = {train, eval, sample_command, tokenize, info, flops};
    signal(SIGXFSZ, SIG_IGN); // a limit on file sizes is then an error like a full disk
    int file; // if a standard stream is closed, no file opened later must take its place
    while ((file = open("/dev/null", O_RDWR)) >= 0 && file < 3) {}
    close(file);
    for (int i = 0; argc > 1 && i < NUM_COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) {
            parse_options(i, argc, argv);
            run[i]();
            finish();
        }
    int help = argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"));
    FILE *to = help ? stdout : stderr;
    if (argc > 1 && !help) die(USAGE, "there is no command %s; see loopmdm --help", argv[1]);
    fprintf(to, "usage: loopmdm COMMAND [options]; loopmdm COMMAND --help lists them\n\n");
    for (int i = 0; i < NUM_COMMANDS; i++) fprintf(to, "  %-9s %.*s\n", commands[i].name, (int)strcspn(commands[i].about, "\n"), commands[i].about);
    if (help) finish();
    return USAGE;
}
#endif
