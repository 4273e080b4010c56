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

#ifdef __SSE__
#include <xmmintrin.h>
#endif
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

// Zeroed memory, to be given back by free(); if it is large, in large pages where the system has them: fewer addresses to translate
static void *allocate(size_t count, size_t size, const char *what) {
    const size_t page = 2 << 20;
    if (count > SIZE_MAX / 2 / size) die(FAILED, "no memory for %s", what);
    size_t bytes = count * size, whole = (bytes + page - 1) / page * page;
    void *p = bytes < page ? calloc(count ? count : 1, size) : aligned_alloc(page, whole);
    if (p && bytes >= page) {
#ifdef MADV_HUGEPAGE
        madvise(p, whole, MADV_HUGEPAGE);
#endif
        memset(p, 0, bytes);
    }
    if (!p) die(FAILED, "no memory for %s (%.0f MiB): choose a smaller model, --batch or --max-loops", what, (double)count * size / (1 << 20));
    return p;
}

// Saturated attention and GELU leave values near 1e-38. Products with them are subnormal numbers, with which x86 computes so slowly that a model
// that has learned too fast trained 18 times slower; as zeros they cost nothing, and no sum notices. Threads that start later inherit this.
static void flush_subnormals(void) {
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040); // as results and as operands
#endif
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

typedef struct { double lr, wte_lr, beta1, beta2, eps, weight_decay, clip, ema; } AdamW; // the optimizer's settings; wte_lr: the embeddings' rate, as a share of lr; ema: what the average keeps

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

// Exact floating point operations (a multiply-add is two) in the matrix products, as this program does them, but for what fills up vectors. A forward of P passes for
// one token: per pass 24 C^2 in qkv, attproj, fc and fcproj, and 4 T C in attention. The LM head for one masked token: 2 V C.
static double pass_flops(Config c, int T, double P) { return P * (24.0 * c.channels * c.channels + 4.0 * T * c.channels); }
static double head_flops(Config c) { return 2.0 * c.vocab_size * c.channels; }

// Forward and backward for one token. Backward needs two products where forward needs one; attention five where forward has two, as it
// computes the scores again instead of storing them. With recompute, backward repeats a pass's forward but for fcproj.
static double training_flops(Config c, int T, int S, double masked_share, int recompute) {
    double C = c.channels, P = num_passes(c, S);
    return pass_flops(c, T, P) + P * (48 * C * C + 10 * T * C) + masked_share * 3 * head_flops(c) + recompute * P * (16 * C * C + 4 * T * C);
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

// Parameters, their gradients, AdamW's two moments and, with --ema, the average are one of these each, in one piece, so that the optimizer,
// checkpoints and clearing are one loop.
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
enum { STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK, STREAM_LOOPS, STREAM_UNMASK, STREAM_TOKEN, STREAM_REMASK, STREAM_LENGTH };

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

// Matrices start with standard deviation 0.8/sqrt(C), wte with 2/sqrt(C), the biases of q and k with 1, all else at zero (gains at
// one). Uniform rather than normal: that takes no transcendental function and so comes out the same everywhere.
// A layer adds about 0.85 to each channel, and what a token is must be heard beside that. From GPT-2's 0.02 it is not: words that
// stand in the same places, such as names, become one vector before any head has learned to copy them (dev/experiments).
// A masked model must first learn to look at its neighbours, and until then it knows no more than how frequent each token is.
// Rotary positions turn a bias of q and k into a preference for certain distances, so each head begins with its own, and the
// loss falls sooner (dev/experiments). wpe starts at zero so as not to hide the words.
static void init_parameters(float *params, Config c, uint64_t seed) { // params (total)
    Shape s[NUM_TENSORS];
    Tensors t;
    tensor_shapes(c, s);
    tensors_build(&t, c, params);
    for (int i = 0; i < NUM_TENSORS; i++) {
        int is_gain = i == LN1W || i == LN2W || i == LNFW;
        double std = i == WTE ? 2 / sqrt(c.channels) : i == WPE ? 0 : i == QKVB ? 1 : s[i].in ? 0.8 / sqrt(c.channels) : 0;
        for (size_t j = 0; j < t.size[i]; j++) {
            int unused = i == WTE && j >= (size_t)(c.vocab_size + 1) * c.channels; // padding rows
            int of_v = i == QKVB && j % (3 * c.channels) >= 2 * (size_t)c.channels;
            double u = random_uniform(seed, STREAM_INIT, i, j) - 0.5;
            t.tensor[i][j] = is_gain ? 1 : unused || of_v ? 0 : (float)(std * sqrt(12.0) * u);
        }
    }
}

enum { TIME_UNIFORM, TIME_BELL };

// The noise of rows first_row, first_row + 1, .. of a step that has total_rows in all; time says how its levels are distributed.
typedef struct { uint64_t seed, step; int first_row, total_rows, time; } Noise;

// The noise level t = eps + (1 - eps) w of row b of those, and *density = F'(w), where F is the distribution function of w. Levels are
// stratified (Kingma et al. 2021): w = F^-1(frac(u0 + row/total_rows)), so that one step has every level in its proportion.
//   uniform: F(w) = w.
//   bell: F(w) = w/4 + 3/4 (3w^2 - 2w^3), a quarter uniform, the rest Beta(2,2): text teaches most at intermediate levels (arXiv 2605.13026).
//   Divided by the density, the loss still estimates the same NELBO; the uniform part keeps 1/density at 4 or below.
HOST_DEVICE static inline double noise_level(Noise n, int b, double *density) {
    const double eps = 1e-3;
    double strat = random_uniform(n.seed, STREAM_TIME, n.step, 0) + (double)(n.first_row + b) / n.total_rows, u = strat - floor(strat), w = u;
    volatile double part; // volatile: a fused multiply-add would round the sums below differently
    *density = 1;
    if (n.time == TIME_BELL) {
        double low = 0, high = 1;
        for (int i = 0; i < 53; i++) {
            double mid = (low + high) / 2;
            part = 0.75 * (mid * mid * (3 - 2 * mid));
            if (0.25 * mid + part <= u) low = mid;
            else high = mid;
        }
        w = low;
        part = 4.5 * (w * (1 - w));
        *density = 0.25 + part;
    }
    part = (1 - eps) * w;
    return eps + part;
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
        total += p[S - 1] = dist == LOOPS_FLOPS ? 1 / training_flops(c, c.max_seq_len, S, 0.5, 0) : 1;
    double u = random_uniform(seed, STREAM_LOOPS, step, 0) * total;
    for (int S = 1; S < c.max_loops; S++)
        if (u < (sum += p[S - 1])) return S;
    return c.max_loops;
}

// The length of a training step's rows: T, or for a small share of the steps any from 1 to T (LLaDA: 1 %), for a model that has seen rows
// of T alone takes the end of a shorter text for its middle.
static int draw_length(int T, double share, uint64_t seed, uint64_t step) {
    if (random_uniform(seed, STREAM_LENGTH, step, 0) >= share) return T;
    return 1 + (int)(random_bits(seed, STREAM_LENGTH, step, 1) % T);
}

// How the sampler (section 8; here because a GPU draws too) takes a token from softmax(logits / temperature), and the score by which it
// compares positions.
enum { SCORE_PROBABILITY, SCORE_MARGIN, SCORE_ENTROPY };

typedef struct {
    double temperature; // 0: always the likeliest
    int top_k;          // only from so many likeliest, more if equal (0: all)
    double top_p;       // only from the fewest likeliest that together have this probability (1: all)
    int score;          // PROBABILITY: that of the token drawn; MARGIN: the likeliest's less the next one's; ENTROPY: minus it. Of softmax(logits) as it is
    uint64_t seed;
} Draw;

// An integer that orders as floats do: to look for a threshold by bisection.
HOST_DEVICE static inline uint32_t float_order(float x) {
    union { float f; uint32_t u; } bits;
    bits.f = x;
    return bits.u ^ (bits.u >> 31 ? 0xffffffffu : 0x80000000u);
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
//        N in steps of NC
//          K in steps of KC      a panel of B, packed: KC x NC, in L3; threads pack it together, then share its tiles
//            tiles MC x NT         of C: MC x KC of A stay in the L2 of the thread that takes the tile
//              N in steps of NR      KC x NR of B, in L2 where L1 is too small: that costs less than adding to C more often
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
enum { NR = 2 * VECTOR, KC = 512, MC = 48, NT = 512, NC = 4096 };
typedef float vec __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float)), may_alias));

#ifndef GEMM_CALLED
#define GEMM_CALLED(M, N, K) // the test counts operations
#endif

// Memory that each thread keeps for as long as it lives, by use: the packed operands, attention's tiles, the weights of tokens.
enum { SCRATCH_A, SCRATCH_B, SCRATCH_ATTN, SCRATCH_SAMPLE, NUM_SCRATCH };

static float *scratch(int use, size_t count) {
    static __thread float *memory[NUM_SCRATCH];
    static __thread size_t capacity[NUM_SCRATCH];
    if (capacity[use] < count) {
        free(memory[use]);
        void *p;
        if (posix_memalign(&p, 64, count * sizeof(float))) die(FAILED, "no memory for a thread's tiles (%zu MiB)", count >> 18);
        memory[use] = (float *)p;
        capacity[use] = count;
    }
    return memory[use];
}

// src (n,k) with strides -> dst: panels (k,width) of width values side by side, the last padded with zeros. Memory is read a cache line
// at a time: across panels if n is the dense dimension, ahead of what is needed as no processor guesses such strides; else along k.
static inline void gemm_pack(float *dst, const float *src, size_t stride_n, size_t stride_k, int n, int k, int width) {
    enum { LINE = 16, AHEAD = 8 };
    int whole = n / width * width;
    if (stride_n == 1)
        for (int p = 0; p < k; p++) {
            for (int j = 0; j < whole; j += LINE) __builtin_prefetch(src + (p + AHEAD) * stride_k + j);
            for (int j = 0; j < whole; j += width) memcpy(dst + (size_t)j * k + p * width, src + p * stride_k + j, width * sizeof(float));
        }
    else
        for (int j = 0; j < whole; j += width)
            for (int p0 = 0; p0 < k; p0 += LINE)
                for (int i = 0; i < width; i++)
                    for (int p = p0; p < min_int(p0 + LINE, k); p++) dst[(size_t)j * k + p * width + i] = src[(j + i) * stride_n + p * stride_k];
    if (whole < n) {
        float *last = dst + (size_t)whole * k;
        memset(last, 0, (size_t)k * width * sizeof(float));
        for (int p = 0; p < k; p++)
            for (int i = whole; i < n; i++) last[p * width + i - whole] = src[i * stride_n + p * stride_k];
    }
}

// sum (MR, vectors x VECTOR) = a (MR,k) b (k,NR): one vector of the two where no more columns are wanted, as of heads of 16 channels with AVX-512.
// This and the next are always inlined: attention's sums are short, and calls would take a tenth of its time.
__attribute__((always_inline))
static inline void gemm_sums(vec sum[MR][2], int vectors, int k, const float *a, size_t a_row, size_t a_col, const float *b) {
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int p = 0; p < k; p++, a += a_col, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VECTOR);
        for (int i = 0; i < MR; i++) {
            sum[i][0] += a[i * a_row] * b0;
            if (vectors == 2) sum[i][1] += a[i * a_row] * b1;
        }
    }
}

// c (m,n) = or += a (MR,k) b (k,NR) + bias (n); b is packed, a[i*a_row + p*a_col] packed or not; at the edges m < MR, n < NR.
__attribute__((always_inline))
static inline void gemm_micro(int k, const float *a, size_t a_row, size_t a_col, const float *b, float *c, size_t ldc, int m, int n,
                              const float *bias, int accumulate) {
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1); // it comes while the sums are made
    vec sum[MR][2];
    if (n > VECTOR) gemm_sums(sum, 2, k, a, a_row, a_col, b);
    else gemm_sums(sum, 1, k, a, a_row, a_col, b);
    if (m == MR && n % VECTOR == 0) { // without variable indices the sums never leave their registers
        for (int v = 0; v < 2 && v * VECTOR < n; v++)
            for (int i = 0; i < MR; i++) {
                vec r = sum[i][v], *out = (vec *)(c + i * ldc + v * VECTOR);
                if (bias) r += *(const vec *)(bias + v * VECTOR);
                if (accumulate) r += *out;
                *out = r;
            }
        return;
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float r = sum[i][j / VECTOR][j % VECTOR] + (bias ? bias[j] : 0), *out = c + i * ldc + j;
            *out = accumulate ? *out + r : r;
        }
}

// c (M,N), rows ldc apart, = or += a b + bias, in one thread. Element (i,p) of a is a[i*a_row + p*a_col]; b is packed in panels (K,NR); bias may
// be NULL. With pack, M <= MC and a is packed first; otherwise its rows are read where they are, but for a last panel of less than MR.
static void gemm_tile(int M, int N, int K, const float *a, size_t a_row, size_t a_col, int pack, const float *b_packed, float *c, size_t ldc,
                      const float *bias, int accumulate) {
    GEMM_CALLED(M, N, K);
    int in_place = pack ? 0 : M / MR * MR;
    float *a_packed = scratch(SCRATCH_A, MC * KC);
    for (int k0 = 0; k0 < K; k0 += KC) {
        int k = min_int(KC, K - k0);
        gemm_pack(a_packed, a + in_place * a_row + k0 * a_col, a_row, a_col, M - in_place, k, MR);
        for (int j = 0; j < N; j += NR)
            for (int i = 0; i < M; i += MR) {
                int packed = i >= in_place;
                gemm_micro(k, packed ? a_packed + (size_t)(i - in_place) * k : a + i * a_row + k0 * a_col, packed ? 1 : a_row, packed ? (size_t)MR : a_col,
                           b_packed + (size_t)j * K + k0 * NR, c + i * ldc + j, ldc, min_int(MR, M - i), min_int(NR, N - j),
                           bias && k0 == 0 ? bias + j : NULL, accumulate || k0 > 0);
            }
    }
}

// The same in all threads, for b with strides: element (p,j) is b[p*b_row + j*b_col]. a is packed unless its rows are dense: then that costs more
// than it gains.
static void gemm(int M, int N, int K, const float *a, size_t a_row, size_t a_col, const float *b, size_t b_row, size_t b_col,
                 float *c, size_t ldc, const float *bias, int accumulate) {
    int tile = min_int(MC, (M + 8 * MR - 1) / (8 * MR) * MR); // at least 8 tiles to share, where there are rows
    int blocks = (K + KC - 1) / KC, kc = (K + blocks - 1) / blocks; // blocks of K that are as long as each other
    float *b_packed = scratch(SCRATCH_B, (size_t)(min_int(N, NC) + NR) * kc);
    OMP(omp parallel if (!omp_in_parallel() && WORTH((size_t)M * N * K / 16)))
    for (int n0 = 0; n0 < N; n0 += NC) {
        int n = min_int(NC, N - n0);
        for (int k0 = 0; k0 < K; k0 += kc) {
            int k = min_int(kc, K - k0);
            OMP(omp for)
            for (int j = 0; j < n; j += 4 * NR)
                gemm_pack(b_packed + (size_t)j * k, b + k0 * b_row + (n0 + j) * b_col, b_col, b_row, min_int(4 * NR, n - j), k, NR);
            OMP(omp for collapse(2) schedule(dynamic))
            for (int i = 0; i < M; i += tile)
                for (int j = 0; j < n; j += NT)
                    gemm_tile(min_int(tile, M - i), min_int(NT, n - j), k, a + i * a_row + k0 * a_col, a_row, a_col, a_col != 1,
                              b_packed + (size_t)j * k, c + i * ldc + n0 + j, ldc, bias && k0 == 0 ? bias + n0 + j : NULL, accumulate || k0 > 0);
        }
    }
}

// floats of b (K,N) packed
static size_t gemm_packed_size(int K, int N) { return (size_t)(N + NR - 1) / NR * NR * K; }

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
    enum { COLUMNS = 128 };
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

// targets (B,T) -> x (B,T) with MASK (id V), weights (B,T) for B rows of a step. The first given (B) tokens of a row are context and never
// masked. weights: 1/(t density total_rows (T - given)) where masked, else 0: they make sum(weights * cross entropy) the NELBO of the whole
// step, in nats per token that is not given (MDLM, LLaDA).
static void noise_forward(int *x, float *weights, const int *targets, const int *given, int V, Noise n, int B, int T) {
    OMP(omp parallel for if (WORTH((size_t)B * T * 8)))
    for (int b = 0; b < B; b++) {
        double density, t = noise_level(n, b, &density);
        float weight = (float)(1 / (t * density * n.total_rows * (T - given[b])));
        for (int i = b * T; i < (b + 1) * T; i++) {
            int masked = i - b * T >= given[b] && becomes_mask(n.seed, n.step, (uint64_t)n.first_row * T + i, t);
            x[i] = masked ? V : targets[i];
            weights[i] = masked ? weight : 0;
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
// Below -87 it stays at 1.6e-38, above 87 at 6.1e37; NaN stays NaN. (The limit goes by the size of x because gcc, given a limit
// on each side, computes both constants' results as cases of their own, in twice the time.)
static inline float exp_fast(float x) {
    float size = fabsf(x);
    x = copysignf(size > 87.0f ? 87.0f : size, x);
    union { float f; uint32_t u; } n, power;
    n.f = x * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
    float whole = n.f - 12582912.0f;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f; // ln2 in two parts: the product with the first is exact
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)))))));
    power.u = (n.u << 23) + 0x3f800000u;
    return series * power.f;
}

enum { ATTN_TILE = 8 * MR }; // queries at a time, a multiple of VECTOR: a tile's scores are (T, ATTN_TILE), and T x T is never stored

// Bidirectional: every position attends to every other. For each head, with scale = 1/sqrt(D):
//   scores = scale q k^T,  lse = log sum exp(scores),  out = exp(scores - lse) v
// qkv (B,T,3C) -> out (B,T,C), lse (B,NH,T), which backward needs to compute the probabilities again.
// Scores are stored transposed, (keys, queries): a vector holds one key's scores for VECTOR queries, so that the softmax, which goes over keys,
// never works across a vector. Columns past the last query score zero; what becomes of them is not used.
static void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C, int NH) {
    int D = C / NH;
    size_t whole = gemm_packed_size(T, D), tile = gemm_packed_size(D, ATTN_TILE);
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t row = (size_t)(bh / NH) * T;
        int h = bh % NH;
        const float *q = qkv + row * 3 * C + h * D, *k = q + C, *v = k + C;
        float *v_packed = scratch(SCRATCH_ATTN, whole + tile + (size_t)ATTN_TILE * T), *qt_packed = v_packed + whole, *probs = qt_packed + tile;
        gemm_pack(v_packed, v, 1, 3 * C, D, T, NR);
        for (int t0 = 0; t0 < T; t0 += ATTN_TILE) {
            int n = min_int(ATTN_TILE, T - t0), N = (n + VECTOR - 1) / VECTOR * VECTOR; // queries; columns
            float *y = out + (row + t0) * C + h * D;
            gemm_pack(qt_packed, q + (size_t)t0 * 3 * C, 3 * C, 1, n, D, NR);
            gemm_tile(T, N, D, k, 3 * C, 1, 0, qt_packed, probs, N, NULL, 0);
            float sums[ATTN_TILE];
            for (int i = 0; i < N; i += VECTOR) {
                float *p = probs + i, largest[VECTOR], sum[VECTOR] = {0};
                memcpy(largest, p, sizeof largest);
                for (int j = 1; j < T; j++) {
                    OMP(omp simd)
                    for (int l = 0; l < VECTOR; l++) largest[l] = p[j * N + l] > largest[l] ? p[j * N + l] : largest[l];
                }
                for (int j = 0; j < T; j++) {
                    OMP(omp simd)
                    for (int l = 0; l < VECTOR; l++) sum[l] += p[j * N + l] = exp_fast(scale * (p[j * N + l] - largest[l]));
                }
                for (int l = 0; l < min_int(VECTOR, n - i); l++) {
                    lse[(size_t)bh * T + t0 + i + l] = scale * largest[l] + logf(sum[l]);
                    sums[i + l] = sum[l];
                }
            }
            gemm_tile(n, D, T, probs, 1, N, 0, v_packed, y, C, NULL, 0);
            for (int i = 0; i < n; i++)
                for (int d = 0; d < D; d++) y[(size_t)i * C + d] /= sums[i];
        }
    }
}

// dout (B,T,C) -> dqkv (B,T,3C). With p the probabilities and dp = dout v^T:
//   dscores = scale p (dp - sum(p dp)),  dq = dscores k,  dk = dscores^T q,  dv = p^T dout
static void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse, int B, int T, int C, int NH) {
    int D = C / NH;
    size_t whole = gemm_packed_size(T, D), tile = gemm_packed_size(ATTN_TILE, D), tile_t = gemm_packed_size(D, ATTN_TILE);
    float scale = 1 / sqrtf(D);
    OMP(omp parallel for schedule(dynamic) if (WORTH((size_t)B * T * T * C)))
    for (int bh = 0; bh < B * NH; bh++) {
        size_t row = (size_t)(bh / NH) * T;
        int h = bh % NH;
        const float *q = qkv + row * 3 * C + h * D, *k = q + C, *v = k + C;
        float *dq = dqkv + row * 3 * C + h * D, *dk = dq + C, *dv = dk + C;
        float *k_packed = scratch(SCRATCH_ATTN, whole + 2 * tile + 2 * tile_t + (size_t)2 * ATTN_TILE * T), *qt_packed = k_packed + whole, *dyt_packed = qt_packed + tile_t;
        float *q_packed = dyt_packed + tile_t, *dy_packed = q_packed + tile; // a tile's q^T and dout^T, (D,n), for the scores; q and dout, (n,D), for dk and dv
        float *probs = dy_packed + tile, *dscores = probs + (size_t)ATTN_TILE * T; // transposed as in forward
        gemm_pack(k_packed, k, 1, 3 * C, D, T, NR);
        for (int t0 = 0; t0 < T; t0 += ATTN_TILE) {
            int n = min_int(ATTN_TILE, T - t0), N = (n + VECTOR - 1) / VECTOR * VECTOR;
            const float *dy = dout + (row + t0) * C + h * D, *qs = q + (size_t)t0 * 3 * C;
            gemm_pack(qt_packed, qs, 3 * C, 1, n, D, NR);
            gemm_pack(dyt_packed, dy, C, 1, n, D, NR);
            gemm_tile(T, N, D, k, 3 * C, 1, 0, qt_packed, probs, N, NULL, 0);
            gemm_tile(T, N, D, v, 3 * C, 1, 0, dyt_packed, dscores, N, NULL, 0);
            for (int i = 0; i < N; i += VECTOR) {
                float *p = probs + i, *d = dscores + i, log_sum[VECTOR] = {0}, sum[VECTOR] = {0};
                memcpy(log_sum, lse + (size_t)bh * T + t0 + i, min_int(VECTOR, n - i) * sizeof(float));
                for (int j = 0; j < T; j++) {
                    OMP(omp simd)
                    for (int l = 0; l < VECTOR; l++) {
                        p[j * N + l] = exp_fast(scale * p[j * N + l] - log_sum[l]);
                        sum[l] += p[j * N + l] * d[j * N + l];
                    }
                }
                for (int j = 0; j < T; j++) {
                    OMP(omp simd)
                    for (int l = 0; l < VECTOR; l++) d[j * N + l] = scale * p[j * N + l] * (d[j * N + l] - sum[l]);
                }
            }
            gemm_tile(n, D, T, dscores, 1, N, 0, k_packed, dq + (size_t)t0 * 3 * C, 3 * C, NULL, 0);
            gemm_pack(q_packed, qs, 1, 3 * C, D, n, NR);
            gemm_pack(dy_packed, dy, 1, C, D, n, NR);
            gemm_tile(T, D, n, dscores, N, 1, 0, q_packed, dk, 3 * C, NULL, t0 > 0);
            gemm_tile(T, D, n, probs, N, 1, 0, dy_packed, dv, 3 * C, NULL, t0 > 0);
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

// The largest of x (n), in 16 lanes that compilers turn into vectors.
static inline float largest_of(const float *x, int n) {
    float lane[16], largest = x[0];
    for (int l = 0; l < 16; l++) lane[l] = x[0];
    for (int j = 0; j + 16 <= n; j += 16) {
        OMP(omp simd)
        for (int l = 0; l < 16; l++) lane[l] = x[j + l] > lane[l] ? x[j + l] : lane[l];
    }
    for (int l = 0; l < 16; l++) largest = lane[l] > largest ? lane[l] : largest;
    for (int j = n & ~15; j < n; j++) largest = x[j] > largest ? x[j] : largest;
    return largest;
}

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

// For top-k and top-p without sorting, and the same on a GPU: the largest threshold such that the weights w (V; NULL: 1 each) of all v
// with float_order(logits[v]) >= threshold still add up to least. Found bit by bit.
static uint32_t threshold_of(const float *logits, const double *w, int V, double least) {
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        double sum = 0;
        for (int v = 0; v < V; v++) sum += float_order(logits[v]) < (threshold | bit) ? 0 : w ? w[v] : 1;
        if (sum >= least) threshold |= bit;
    }
    return threshold;
}

// One token from logits (V) by a uniform u, and its score; w (V) is a buffer. Inverts the cumulative distribution in double: Gumbel noise
// in float32, the usual way, is known to lower the effective temperature of masked diffusion (Zheng et al. 2024).
static int sample_token(const float *logits, int V, Draw d, double u, double *score, double *w) {
    int best = 0, chosen, next = -1;
    double sum = 0, total = 0, entropy = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    for (int v = 0; v < V; v++) {
        double e = w[v] = exp((double)logits[v] - logits[best]);
        sum += e;
        entropy -= e * ((double)logits[v] - logits[best]);
        if (v != best && (next < 0 || logits[v] > logits[next])) next = v;
    }
    chosen = best;
    if (d.temperature > 0) {
        uint32_t least = d.top_k > 0 && d.top_k < V ? threshold_of(logits, NULL, V, d.top_k) : 0;
        for (int v = 0; v < V; v++) {
            if (d.temperature != 1) w[v] = exp(((double)logits[v] - logits[best]) / d.temperature);
            total += w[v] = float_order(logits[v]) >= least ? w[v] : 0;
        }
        if (d.top_p < 1) {
            least = threshold_of(logits, w, V, d.top_p * total);
            total = 0;
            for (int v = 0; v < V; v++) total += w[v] = float_order(logits[v]) >= least ? w[v] : 0;
        }
        double left = u * total;
        for (int v = 0; v < V && left >= 0; v++)
            if (w[v] > 0) chosen = v, left -= w[v];
    }
    if (d.score == SCORE_PROBABILITY) *score = exp((double)logits[chosen] - logits[best]) / sum;
    if (d.score == SCORE_MARGIN) *score = (1 - (next < 0 ? 0 : exp((double)logits[next] - logits[best]))) / sum;
    if (d.score == SCORE_ENTROPY) *score = -(log(sum) + entropy / sum);
    return chosen;
}

// logits (R,V) -> token (R), score (R): see sample_token(). rows (R) are positions of (B,T); row b of these is row ids[b] of all that are
// sampled, and each position of those draws its own random number.
static void sample_forward(int *token, double *score, const float *logits, const int *rows, const int *ids, int R, int T, int V, Draw d, uint64_t step) {
    OMP(omp parallel for if (WORTH((size_t)R * V)))
    for (int r = 0; r < R; r++) {
        double u = random_uniform(d.seed, STREAM_TOKEN, step, (uint64_t)ids[rows[r] / T] * T + rows[r] % T);
        token[r] = sample_token(logits + (size_t)r * V, V, d, u, &score[r], (double *)scratch(SCRATCH_SAMPLE, 2 * (size_t)V));
    }
}

// ---- adaptive loops ----

// How far a loop moved the residual stream h (B,T,C) from what it was before: change (B) is |h - before| / |h|, a norm over channels,
// averaged over a row's positions. With before2, the state another loop earlier, the second difference: |h - 2 before + before2| / |h|.
static void state_change(double *change, const float *h, const float *before, const float *before2, int B, int T, int C) {
    OMP(omp parallel for if (WORTH((size_t)B * T * C)))
    for (int b = 0; b < B; b++) {
        double mean = 0;
        for (size_t at = (size_t)b * T * C, end = at + (size_t)T * C; at < end; at += C) {
            double norm = 0, moved = 0;
            for (int c = 0; c < C; c++) {
                double d = before2 ? (double)h[at + c] - 2.0 * before[at + c] + before2[at + c] : (double)h[at + c] - before[at + c];
                norm += (double)h[at + c] * h[at + c];
                moved += d * d;
            }
            mean += sqrt(moved / norm) / T;
        }
        change[b] = mean;
    }
}

static void copy_floats(float *to, const float *from, size_t n) { memcpy(to, from, n * sizeof(float)); } // from a model's memory to itself

// =====================================================================================================================
// 4. Model

// What a pass computes, kept for its backward.
enum { LN1, LN1_MEAN, LN1_RSTD, QKV, LSE, ATTY, RES2, LN2, LN2_MEAN, LN2_RSTD, FCH, FCH_GELU, NUM_ACTS };
enum { PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, NUM_MEMORIES }; // a model's memory: one allocation each

typedef struct {
    Config config;
    Tensors params, grads, moment1, moment2; // the last three in training only
    Tensors ema;                             // a running average of the parameters
    int keeps_ema;                           // to be set before memory is reserved
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
    float *before, *before2, *settled;       // inference: (B,T,C) the state a loop earlier, two earlier, and of rows that have stopped
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
    size_t half = (size_t)T * (C / c.heads / 2), grad = training ? BT * C : 0, kept = training ? 0 : BT * C;
    const struct { void *to; size_t bytes; } plan[] = {
        {&m->row_loss, B * sizeof(double)}, {&m->x, 4 * BT}, {&m->targets, 4 * BT}, {&m->rows, 4 * BT}, {&m->weights, 4 * BT},
        {&m->states, 4 * BT * C * (training ? P + 1 : 1)}, {&m->acts, 4 * m->pass_size * (training && !recompute ? P : 1)}, {&m->proj, 4 * BT * C},
        {&m->cosine, 4 * half}, {&m->sine, 4 * half}, {&m->head_inp, 4 * R * C}, {&m->lnf, 4 * R * C}, {&m->lnf_mean, 4 * R}, {&m->lnf_rstd, 4 * R},
        {&m->logits, 4 * R * V}, {&m->losses, 4 * BT}, {&m->dres, 4 * grad}, {&m->dln, 4 * grad}, {&m->datty, 4 * grad}, {&m->dwide, 16 * grad},
        {&m->before, 4 * kept}, {&m->before2, 4 * kept}, {&m->settled, 4 * kept},
    };
    char *at = (char *)m->memory[ACTIVATIONS];
    m->bytes[ACTIVATIONS] = 0;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        if (at) memcpy(plan[i].to, &at, sizeof at), at += plan[i].bytes;
        m->bytes[ACTIVATIONS] += plan[i].bytes;
    }
    size_t total = m->params.total * sizeof(float);
    m->bytes[PARAMETERS] = total, m->bytes[GRADIENTS] = training ? total : 0, m->bytes[OPTIMIZER] = training ? (2 + m->keeps_ema) * total : 0;
    tensors_build(&m->params, c, (float *)m->memory[PARAMETERS]);
    tensors_build(&m->grads, c, (float *)m->memory[GRADIENTS]);
    tensors_build(&m->moment1, c, (float *)m->memory[OPTIMIZER]);
    tensors_build(&m->moment2, c, training && m->memory[OPTIMIZER] ? m->moment1.data + m->params.total : NULL);
    tensors_build(&m->ema, c, training && m->keeps_ema && m->memory[OPTIMIZER] ? m->moment2.data + m->params.total : NULL);
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
static void read_memory(float *to, const float *from, size_t n) { memcpy(to, from, n * sizeof(float)); }
static void tensors_read(float *to, const Tensors *from) { read_memory(to, from->data, from->total); }
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
    if (B > m->max_B || T > m->max_T) die(FAILED, "%d rows of %d tokens are more than was reserved", B, T);
    m->B = B, m->T = T;
    memcpy(m->x, x, (size_t)B * T * sizeof(int));
}

// The next forward is of targets (B,T) with noise; see noise_forward(). Returns the number of masked tokens.
static int model_noise(Model *m, const int *targets, const int *given, Noise n, int B, int T) {
    model_tokens(m, targets, B, T);
    memcpy(m->targets, targets, (size_t)B * T * sizeof(int));
    noise_forward(m->x, m->weights, m->targets, given, m->config.vocab_size, n, B, T);
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

// Begins a forward of S loops: m->x (B,T) -> the embedding (B,T,C), pass_input() of pass 0.
static void model_embed(Model *m, int S) {
    if (m->training && S > m->max_S) die(FAILED, "a forward of %d loops is more than was reserved", S);
    m->S = S;
    encoder_forward(m->states, m->x, m->params.tensor[WTE], m->params.tensor[WPE], m->B, m->T, m->config.channels);
}

// Goes on with passes begin .. end-1: their result (B,T,C) is pass_input() of pass end.
static void model_passes(Model *m, int begin, int end) {
    int C = m->config.channels, BT = m->B * m->T;
    for (int p = begin; p < end; p++) {
        float *a[NUM_ACTS], *w[NUM_TENSORS];
        pass_forward(m, p);
        pass_acts(m, p, a);
        pass_tensors(m, &m->params, p, w);
        matmul_forward(m->proj, a[FCH_GELU], w[FCPROJW], w[FCPROJB], BT, 4 * C, C);
        residual_forward(pass_input(m, p + 1), a[RES2], m->proj, (size_t)BT * C);
    }
}

static void model_forward(Model *m, int S) {
    model_embed(m, S);
    model_passes(m, 0, num_passes(m->config, S));
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

// How far the last loop moved each row: change (B), see state_change(). m->before holds the state (B,T,C) before that loop; for the second
// difference, m->before2 the one before the loop before it.
static void model_change(const Model *m, double *change, int second) {
    state_change(change, m->states, m->before, second ? m->before2 : NULL, m->B, m->T, m->config.channels);
}

// What the last pass, p, attended with: qkv (B,T,3C), after rotary positions, and lse (B,NH,T)
static void model_attention(const Model *m, int p, float *qkv, float *lse) {
    float *a[NUM_ACTS];
    pass_acts(m, p, a);
    read_memory(qkv, a[QKV], (size_t)3 * m->B * m->T * m->config.channels);
    read_memory(lse, a[LSE], (size_t)m->B * m->T * m->config.heads);
}

// A token for each of rows (n) of the last forward: token (n), score (n); see sample_forward()
static void model_sample(Model *m, int *token, double *score, const int *rows, int n, const int *ids, Draw d, uint64_t step) {
    for (int r0 = 0; r0 < n; r0 += m->head_rows) {
        int R = min_int(m->head_rows, n - r0);
        head_forward(m, rows + r0, R);
        sample_forward(token + r0, score + r0, m->logits, rows + r0, ids, R, m->T, m->config.vocab_size, d, step);
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
// apart from the gradient, and only matrices do: biases and LayerNorm's gains are not what overfits. Embeddings may learn more
// slowly than the rest. A step of Adam is as long for a rare word as for others, and its gradient is mostly noise; words that stand in
// the same places, such as names, lose what tells them apart before the layers have learned to carry it from one place to another.
static void model_update(Model *m, AdamW o, double norm, int step) {
    Shape s[NUM_TENSORS];
    tensor_shapes(m->config, s);
    float scale = (float)fmin(1, o.clip / (norm + 1e-6)), b1 = (float)o.beta1, b2 = (float)o.beta2, eps = (float)o.eps;
    float ema = (float)fmin(o.ema, (1.0 + step) / (10 + step)); // the first averages keep less, or the random start would stay in them for long
    float correct = (float)(1 / sqrt(1 - pow(o.beta2, step)));
    for (int t = 0; t < NUM_TENSORS; t++) {
        double lr = o.lr * (t == WTE ? o.wte_lr : 1);
        float keep = (float)(1 - (s[t].in ? lr * o.weight_decay : 0)), step_size = (float)(lr / (1 - pow(o.beta1, step)));
        float *p = m->params.tensor[t], *grad = m->grads.tensor[t], *m1 = m->moment1.tensor[t], *m2 = m->moment2.tensor[t];
        OMP(omp parallel for simd if (parallel : WORTH(m->params.size[t])))
        for (size_t i = 0; i < m->params.size[t]; i++) {
            float g = scale * grad[i];
            m1[i] = b1 * m1[i] + (1 - b1) * g;
            m2[i] = b2 * m2[i] + (1 - b2) * g * g;
            p[i] = keep * p[i] - step_size * m1[i] / (sqrtf(m2[i]) * correct + eps);
            grad[i] = 0;
        }
        if (!m->keeps_ema) continue;
        float *average = m->ema.tensor[t];
        OMP(omp parallel for simd if (parallel : WORTH(m->params.size[t])))
        for (size_t i = 0; i < m->params.size[t]; i++) average[i] = ema * average[i] + (1 - ema) * p[i];
    }
}

#endif
#if LOOPMDM_CU != 1
// =====================================================================================================================
// 6. Data, tokenizer, checkpoints

// ---- token shards, llm.c's format: int32[256] header (magic, version, token count), then uint16 tokens ----

enum { HEADER_INTS = 256, SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328, MODEL_MAGIC = 20260525, OPTIMIZER_MAGIC = 20260526 };

typedef struct { const uint16_t *tokens; int64_t count; } Shard;
typedef struct {
    Shard *shards;
    int num_shards;
    int64_t total;
    int stride;    // training rows begin at its multiples: 1, anywhere; or T, where each row is a thing of its own, such as a board
    int separator; // the token that ends a row's context, -1 for none
} Data;

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

// The first T tokens of row number index of those of T_data tokens: tokens (T)
static void data_row(const Data *d, int *tokens, int64_t index, int T, int T_data, int stride) {
    const Shard *s = d->shards;
    for (; index >= shard_rows(*s, T_data, stride); s++) index -= shard_rows(*s, T_data, stride);
    for (int t = 0; t < T; t++) tokens[t] = s->tokens[index * stride + t];
}

// How many tokens at the beginning of a row (T) are context, which is never masked: up to the first separator after the row's first
// token. 0 where there is no separator.
static int data_given(const Data *d, const int *tokens, int T) {
    for (int t = 1; d->separator >= 0 && t < T; t++)
        if (tokens[t] == d->separator) return t + 1;
    return 0;
}

// Rows first_row .. first_row + B-1 of a training step: targets (B,T), given (B). The rows are the beginnings of rows of T_data tokens.
static void data_batch(const Data *d, int *targets, int *given, uint64_t seed, uint64_t step, int first_row, int B, int T, int T_data) {
    uint64_t rows = (uint64_t)data_rows(d, T_data, d->stride);
    for (int b = 0; b < B; b++) {
        int64_t index = (int64_t)(random_bits(seed, STREAM_BATCH, step, first_row + b) % rows);
        data_row(d, targets + b * T, index, T, T_data, d->stride);
        given[b] = data_given(d, targets + b * T, T);
    }
}

// Makes a shard's rows of T tokens things of their own, of which what comes after the separator (-1: none) is to be learned.
static void data_fix_rows(Data *d, const char *pattern, int T, int separator) {
    int *row = (int *)allocate(T, sizeof(int), "a row");
    d->stride = T, d->separator = separator;
    for (int i = 0; i < d->num_shards; i++)
        if (d->shards[i].count % T) die(FAILED, "%s: %lld tokens are not rows of %d, the model's --seq-len", pattern, (long long)d->shards[i].count, T);
    for (int64_t r = 0; separator >= 0 && r < data_rows(d, T, T); r++) {
        data_row(d, row, r, T, T, T);
        int given = data_given(d, row, T);
        if (given == 0 || given == T) die(FAILED, "%s: row %lld has %s --answers-after's token", pattern, (long long)r, given ? "nothing after" : "no");
    }
    free(row);
}

// All shards whose names match a pattern (or the one file it names), in alphabetical order, for rows of T tokens. Every
// token is checked to be in the vocabulary.
static Data data_open(const char *pattern, int vocab_size, int T) {
    glob_t g;
    if (glob(pattern, 0, NULL, &g)) die(FAILED, "no data: no file matches %s", pattern);
    Data d = {(Shard *)allocate(g.gl_pathc, sizeof(Shard), "shards"), (int)g.gl_pathc, 0, 1, -1};
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

// ---- tokenizer: GPT-2's byte-level BPE. Any text can be encoded, and decoded again ----

#include "dev/data/tokenizer.h" // Tokenizer, tokenizer_open(), tokenizer_encode(), find_special()

// ---- checkpoints ----
//
// model.bin: int32[256] header, then the parameters in the order of tensor_shapes(). ema.bin, if there is one: their average, likewise.
// optimizer.bin: header, both moments. A CRC-32 of the whole file (taken with 0 in its place) tells a damaged one. All are written to
// *.tmp, flushed to disk, and only then renamed, optimizer first and model last. Whenever the program is stopped, the files are the old
// ones, the new ones, or some new ones with the rest, model.bin among them, still in *.tmp, which checkpoint_recover() completes.

// Places in the headers: of all files, and of optimizer.bin (seed and FLOPs take two each).
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

// What is written must not be what is read, and neither must path.tmp, which is written first.
static void keep_apart(const char *option, const char *path, const char *other_option, const char *other) {
    struct stat a, b;
    char *temporary = concat(path, ".tmp");
    const char *names[] = {path, temporary};
    for (int i = 0; i < 2; i++)
        if (!stat(names[i], &a) && !stat(other, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
            die(USAGE, "%s %s would overwrite %s %s: choose another name", option, path, other_option, other);
    free(temporary);
}

// Nor one of the shards that are read.
static void keep_apart_from_data(const char *option, const char *path, const char *data_option, const char *pattern) {
    glob_t g;
    if (!pattern || glob(pattern, 0, NULL, &g)) return;
    for (size_t i = 0; i < g.gl_pathc; i++) keep_apart(option, path, data_option, g.gl_pathv[i]);
    globfree(&g);
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
    float *copy = (float *)allocate((3 + m->keeps_ema) * n, sizeof(float), "a checkpoint");
    tensors_read(copy, &m->params), tensors_read(copy + n, &m->moment1), tensors_read(copy + 2 * n, &m->moment2);
    if (m->keeps_ema) tensors_read(copy + 3 * n, &m->ema);
    int ema[HEADER_INTS];
    memcpy(ema, model, sizeof ema);
    const Part model_parts[] = {{model, sizeof model}, {copy, n * sizeof(float)}};
    const Part optimizer_parts[] = {{optimizer, sizeof optimizer}, {copy + n, 2 * n * sizeof(float)}}, ema_parts[] = {{ema, sizeof ema}, {copy + 3 * n, n * sizeof(float)}};
    char *model_path = join_path(folder, "model.bin"), *optimizer_path = join_path(folder, "optimizer.bin"), *ema_path = join_path(folder, "ema.bin");
    seal_header(model, model_parts, 2);
    if (m->keeps_ema) seal_header(ema, ema_parts, 2);
    seal_header(optimizer, optimizer_parts, 2);
    const File files[] = {{optimizer_path, optimizer_parts, 2}, {m->keeps_ema ? ema_path : model_path, m->keeps_ema ? ema_parts : model_parts, 2}, {model_path, model_parts, 2}};
    write_files(files, 2 + m->keeps_ema);
    free(model_path), free(optimizer_path), free(ema_path), free(copy);
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

// Completes a checkpoint whose writer was stopped between its renames: model.bin, the last, is still in *.tmp.
static void checkpoint_recover(const char *folder) {
    char *model = join_path(folder, "model.bin"), *unfinished = concat(model, ".tmp"), *optimizer = join_path(folder, "optimizer.bin");
    char *ema = join_path(folder, "ema.bin"), *unfinished_ema = concat(ema, ".tmp");
    int step = peek_step(optimizer, OPTIMIZER_MAGIC);
    if (step >= 0 && peek_step(model, MODEL_MAGIC) != step && peek_step(unfinished, MODEL_MAGIC) == step) {
        if (peek_step(unfinished_ema, MODEL_MAGIC) == step) commit_file(ema);
        commit_file(model);
    }
    free(model), free(unfinished), free(optimizer), free(ema), free(unfinished_ema);
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

// The parameters in a folder, (total), for a model that checkpoint_build() built: the averaged ones if there are any and averaged is not 0.
static float *checkpoint_parameters(const Model *m, const char *folder, int averaged) {
    int header[HEADER_INTS], ema_header[HEADER_INTS];
    char *path = join_path(folder, "model.bin"), *ema_path = join_path(folder, "ema.bin");
    float *params = read_floats(path, MODEL_MAGIC, "model", header, m->params.total); // also with an average: a damaged file is to be noticed
    if (averaged && !access(ema_path, F_OK)) {
        free(params);
        params = read_floats(ema_path, MODEL_MAGIC, "model", ema_header, m->params.total);
        if (ema_header[HEADER_STEP] != header[HEADER_STEP])
            die(FAILED, "%s is of step %d, the model beside it of step %d: they do not belong together; train --resume may complete them", ema_path, ema_header[HEADER_STEP], header[HEADER_STEP]);
    }
    free(path), free(ema_path);
    return params;
}

// Reads them into a model that model_reserve() gave memory.
static void checkpoint_load(Model *m, const char *folder, int averaged) {
    float *params = checkpoint_parameters(m, folder, averaged);
    model_set_parameters(m, params);
    free(params);
}

// Reads the moments as well, of the same step, and the average.
static Progress checkpoint_resume(Model *m, const char *folder, int step) {
    Progress p;
    int header[HEADER_INTS];
    char *path = join_path(folder, "optimizer.bin");
    float *moments = read_floats(path, OPTIMIZER_MAGIC, "saved optimizer state", header, 2 * m->params.total);
    checkpoint_load(m, folder, 0);
    tensors_write(&m->moment1, moments), tensors_write(&m->moment2, moments + m->params.total);
    if (m->keeps_ema) {
        float *ema = checkpoint_parameters(m, folder, 1);
        tensors_write(&m->ema, ema);
        free(ema);
    }
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

typedef struct { int loop_dist, time; double var_length; uint64_t seed; int rows, B; } Recipe; // of a step; rows in all, B at a time
typedef struct { int S, T, masked; double loss, mean_t, norm; } Gradient;                      // masked: tokens, of all rows

// The gradient of step number step (from 0), in m->grads: one S and one length T for the step; rows of data, B at a time, with their noise.
static Gradient train_gradient(Model *m, const Data *d, Recipe o, int step) {
    int T_data = m->config.max_seq_len, T = draw_length(T_data, o.var_length, o.seed, step);
    int *targets = (int *)allocate((size_t)o.B * T, sizeof(int), "a batch"), *given = (int *)allocate(o.B, sizeof(int), "a batch");
    Gradient g = {draw_loops(m->config, o.loop_dist, o.seed, step), T, 0, 0, 0, 0};
    for (int first = 0; first < o.rows; first += o.B) {
        Noise noise = {o.seed, (uint64_t)step, first, o.rows, o.time};
        double density;
        data_batch(d, targets, given, o.seed, step, first, o.B, T, T_data);
        g.masked += model_noise(m, targets, given, noise, o.B, T);
        model_forward(m, g.S);
        g.loss += model_loss(m, 1);
        for (int b = 0; b < o.B; b++) g.mean_t += noise_level(noise, b, &density) / o.rows;
    }
    g.norm = gradient_norm(m);
    free(targets), free(given);
    return g;
}

// ---- adaptive loops ----
//
// Later loops change less. With tau > 0 a row stops looping when the last loop changed its state by less than tau (see state_change()), and
// the others go on without it. Two measures of change: the first difference (LoopMDM), or the second, which must be below tau in two loops
// running (Pappone et al. 2025).
typedef struct { int S; double tau; int second; } Loops; // S loops, at most if tau > 0

// A forward of m->x (B,T); used (B): the loops of each row. tau > 0 in inference only: training keeps no states to compare.
static void adaptive_forward(Model *m, Loops l, int *used) {
    Config c = m->config;
    int B = m->B, n = B, a = c.loop_start, width = c.loop_end - a;
    for (int b = 0; b < B; b++) used[b] = l.S;
    if (l.tau <= 0 || width == 0) {
        model_forward(m, l.S);
        return;
    }
    size_t row = (size_t)m->T * c.channels;
    int *row_of = (int *)allocate(B, sizeof(int), "the rows"); // rows that go on are the first n, in any order; row_of says which they are
    double *change = (double *)allocate(2 * (size_t)B, sizeof(double), "the rows"), *last = change + B;
    for (int b = 0; b < B; b++) row_of[b] = b, last[b] = INFINITY;
    model_embed(m, l.S);
    model_passes(m, 0, a);
    for (int s = 1; n > 0; s++) {
        float *h = m->states, *swap = m->before2; // two loops ago: needed in this loop alone, hence not moved with its row below
        m->before2 = m->before, m->before = swap;
        copy_floats(m->before, h, n * row);
        m->B = n;
        model_passes(m, a + (s - 1) * width, a + s * width);
        for (int i = 0; i < n; i++) change[i] = INFINITY;
        if (!l.second || s > 1) model_change(m, change, l.second);
        for (int i = n - 1; i >= 0; i--) {
            int small = change[i] < l.tau && (!l.second || last[i] < l.tau);
            last[i] = change[i];
            if (!small && s < l.S) continue;
            used[row_of[i]] = s;
            copy_floats(m->settled + row_of[i] * row, h + i * row, row);
            if (i == --n) continue;
            copy_floats(h + i * row, h + n * row, row); // the last takes its place
            copy_floats(m->before + i * row, m->before + n * row, row);
            row_of[i] = row_of[n], last[i] = last[n];
        }
    }
    m->B = B;
    copy_floats(m->states, m->settled, B * row);
    model_passes(m, a + l.S * width, num_passes(c, l.S));
    free(row_of), free(change);
}

typedef struct { double nelbo, error, loops; } Evaluation; // nats per token, its standard error, mean loops

// Row number r of rows spread over the data, for evaluation: tokens (T); returns how many of them are given. Beyond the end they begin again.
static int evaluation_row(const Data *d, int *tokens, int r, int rows, int T) {
    int64_t available = data_rows(d, T, T), stride = available > rows ? available / rows : 1;
    data_row(d, tokens, r * stride % available, T, T, T);
    return data_given(d, tokens, T);
}

// The next forward is of n of those, from number first on, with noise; targets (n,T), given (n)
static Noise evaluation_batch(Model *m, const Data *d, int *targets, int *given, int first, int n, int rows, int time, uint64_t seed) {
    int T = m->config.max_seq_len;
    Noise noise = {seed, 0, first, rows, time};
    for (int i = 0; i < n; i++) given[i] = evaluation_row(d, targets + (size_t)i * T, first + i, rows, T);
    model_noise(m, targets, given, noise, n, T);
    return noise;
}

// NELBO of rows spread over the data, each with a t of its own; the standard error is an upper estimate, as the t are stratified. The masks
// depend on seed, time and rows alone: every S, and every model of the same T, sees the same. row_nelbo (rows) gets each row's, if not NULL.
static Evaluation evaluate(Model *m, const Data *d, Loops l, int time, int rows, int B, uint64_t seed, double *row_nelbo) {
    int T = m->config.max_seq_len, *targets = (int *)allocate((size_t)B * T, sizeof(int), "a batch"), *given = (int *)allocate(2 * (size_t)B, sizeof(int), "a batch"), *used = given + B;
    double *nelbo = row_nelbo ? row_nelbo : (double *)allocate(rows, sizeof(double), "the rows"), variance = 0;
    Evaluation e = {0, 0, 0};
    for (int first = 0; first < rows; first += B) {
        int n = min_int(B, rows - first);
        evaluation_batch(m, d, targets, given, first, n, rows, time, seed);
        adaptive_forward(m, l, used);
        model_loss(m, 0);
        for (int i = 0; i < n; i++) nelbo[first + i] = m->row_loss[i] * rows, e.loops += used[i] / (double)rows;
    }
    for (int r = 0; r < rows; r++) e.nelbo += nelbo[r] / rows;
    for (int r = 0; r < rows; r++) variance += (nelbo[r] - e.nelbo) * (nelbo[r] - e.nelbo) / max_int(1, rows - 1);
    e.error = sqrt(variance / rows);
    free(targets), free(given);
    if (!row_nelbo) free(nelbo);
    return e;
}

// =====================================================================================================================
// 8. Sampler

// Step j of N (with blocks: of the block's turn) goes from noise level t = 1 - j/N to s = 1 - (j+1)/N. Which MASKs are filled in:
//   random: the exact reverse process (MDLM's ancestral sampler): each is revealed with probability (t - s) / t = 1 / (N - j).
//   confidence, margin, entropy: all are predicted, and those with the best score (see Draw) are kept, until a share (j+1)/N of the
//     blanks is filled in (LLaDA's low-confidence remasking; Kim et al. 2025; Dream).
//   threshold: all whose probability is above it, one at least; as many steps as that takes, without N.
// remask (ReMDM, Wang et al. 2025): what was filled in is masked again with probability sigma = min(remask, (1 - alpha_s) / alpha_t) with
// alpha_t = 1 - t = j/N, and more is revealed for it, with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) = (1 + sigma j) / (N - j):
// mistakes can be taken back.
enum { ORDER_RANDOM, ORDER_CONFIDENCE, ORDER_MARGIN, ORDER_ENTROPY, ORDER_THRESHOLD };

typedef struct {
    int steps, order, block; // block: positions in one, 0 for the whole row
    double threshold, remask;
    Loops loops;
    Draw draw;
} SampleOptions;

typedef struct {
    int forwards;                     // of the model, on all rows with work to do
    double rows, loops, flops;        // summed over these: rows, their loops, and the exact floating point operations
    double *step_rows, *step_loops;   // (steps, or T if more) rows and their loops in each step; may be NULL
} SampleReport;

// The part of a row that the sampler works on in one step: positions begin .. end-1 (none if they are equal), whose turn takes steps, of
// which this is number step.
typedef struct { int begin, end, step, steps; } Work;

// How many blocks of x (T) have a MASK: each needs a step of its own.
static int blocks_to_fill(const int *x, int T, int mask, int block) {
    int n = 0, size = block ? block : T, last = -1;
    for (int t = 0; t < T; t++)
        if (x[t] == mask && t / size != last) last = t / size, n++;
    return n;
}

// The blocks of a row that have blanks take turns from left to right, and share all steps evenly: of K blocks and N steps, block k has
// floor(k N / K) .. floor((k+1) N / K) - 1; K <= N. blank (T): which positions were MASK at the start.
static Work scheduled_work(const char *blank, int T, SampleOptions o, int step) {
    Work w = {0, 0, 0, 0};
    int size = o.block ? o.block : T, K = 0;
    for (int begin = 0; begin < T; begin += size) K += memchr(blank + begin, 1, min_int(size, T - begin)) != NULL;
    int64_t N = o.steps, k = ((step + 1) * (int64_t)K - 1) / N, before = 0; // k: whose turn it is
    for (int begin = 0; begin < T; begin += size)
        if (memchr(blank + begin, 1, min_int(size, T - begin)) && before++ == k) {
            w.begin = begin, w.end = min_int(T, begin + size);
            w.step = (int)(step - k * N / K), w.steps = (int)((k + 1) * N / K - k * N / K);
        }
    return w;
}

// With ORDER_THRESHOLD a block's turn lasts until no MASK is left in it.
static Work unscheduled_work(const int *x, int T, int mask, SampleOptions o) {
    Work w = {0, 0, 0, 0};
    int size = o.block ? o.block : T, t = 0;
    while (t < T && x[t] != mask) t++;
    if (t < T) w.begin = t / size * size, w.end = min_int(T, w.begin + size);
    return w;
}

// The arrays of sample(). R candidates: the masked positions that are predicted in a step. Only rows that have any go through the model.
typedef struct {
    char *blank, *again;              // (B,T) was MASK at the start; is masked again in this step
    int *active, *ids, *used, *quota; // (rows,T) tokens of the rows with candidates; (rows) which they are, their loops, how many to keep
    int *position, *row, *token;      // (R) where in x, where in active; the prediction,
    double *score;                    // (R) and how good it is
} SampleState;

// Adds one row x (T) to the *rows that go through the model, and its candidates to the *R that there are, if it has any to fill in.
// offset: where the row begins among all; id: its number in the random numbers.
static void row_candidates(SampleState s, int *R, int *rows, const int *x, int offset, int id, int T, int mask, SampleOptions o, int step) {
    const char *blank = s.blank + offset;
    Work w = o.order == ORDER_THRESHOLD ? unscheduled_work(x, T, mask, o) : scheduled_work(blank, T, o, step);
    int blanks = 0, masked = 0, remasked = 0, n = *R;
    double j = w.step, N = w.steps, sigma = j > 0 ? fmin(o.remask, (N - j - 1) / j) : 0;
    for (int t = w.begin; t < w.end; t++) {
        uint64_t index = (uint64_t)id * T + t;
        int revealed = o.order != ORDER_RANDOM || random_uniform(o.draw.seed, STREAM_UNMASK, step, index) < (1 + sigma * j) / (N - j);
        blanks += blank[t], masked += x[t] == mask;
        if (x[t] == mask && revealed) s.position[n] = offset + t, s.row[n++] = *rows * T + t;
        if (blank[t] && x[t] != mask && random_uniform(o.draw.seed, STREAM_REMASK, step, index) < sigma) remasked += s.again[offset + t] = 1;
    }
    int quota = n - *R; // random, threshold: all candidates. Else: what is to be filled in after this step, less what stays filled in
    if (o.order != ORDER_RANDOM && o.order != ORDER_THRESHOLD)
        quota = min_int(masked, (int)((int64_t)blanks * (w.step + 1) / max_int(1, w.steps)) - (blanks - masked - remasked));
    if (quota <= 0) return;
    memcpy(s.active + *rows * T, x, T * sizeof(int));
    s.ids[*rows] = id, s.quota[*rows] = quota;
    *R = n, *rows += 1;
}

// Of the candidates begin .. end-1 of a row, those with the best scores go into x (B,T): quota of them, or all above the threshold and
// one at least.
static void keep_best(int *x, SampleState s, int begin, int end, int quota, int mask, SampleOptions o) {
    if (o.order == ORDER_THRESHOLD) {
        quota = 0;
        for (int r = begin; r < end; r++) quota += s.score[r] > o.threshold;
        quota = max_int(1, quota);
    }
    for (; quota > 0; quota--) {
        int best = -1;
        for (int r = begin; r < end; r++)
            if (x[s.position[r]] == mask && (best < 0 || s.score[r] > s.score[best])) best = r;
        x[s.position[best]] = s.token[best];
    }
}

// Fills in every MASK of x (B,T); other tokens never change. Row b draws the random numbers of row first_row + b, so that a text does not
// depend on the others in its batch; rows with nothing to do in a step are left out of its forward, and without rows there is none.
// show, if not NULL, is called after every step with work to do.
static void sample(Model *m, int *x, int B, int T, SampleOptions o, int first_row, SampleReport *report,
                   void (*show)(const int *x, int T, int step, void *), void *show_data) {
    int BT = B * T, mask = m->config.vocab_size, n_masks = 0;
    char *flags = (char *)allocate(2 * (size_t)BT, 1, "sampling");
    int *ints = (int *)allocate(4 * (size_t)BT + 3 * (size_t)B, sizeof(int), "sampling");
    double *score = (double *)allocate(BT, sizeof(double), "sampling");
    SampleState s;
    s.blank = flags, s.again = flags + BT, s.score = score;
    s.active = ints, s.position = s.active + BT, s.row = s.position + BT, s.token = s.row + BT;
    s.ids = s.token + BT, s.used = s.ids + B, s.quota = s.used + B;
    for (int i = 0; i < BT; i++) n_masks += s.blank[i] = x[i] == mask;
    for (int step = 0; o.order == ORDER_THRESHOLD ? n_masks > 0 : step < o.steps; step++) {
        int R = 0, rows = 0, changed = 0;
        memset(s.again, 0, BT);
        for (int b = 0; b < B; b++) row_candidates(s, &R, &rows, x + b * T, b * T, first_row + b, T, mask, o, step);
        if (R) {
            model_tokens(m, s.active, rows, T);
            adaptive_forward(m, o.loops, s.used);
            model_sample(m, s.token, s.score, s.row, R, s.ids, o.draw, step);
        }
        for (int r = 0; r < R; r++)
            if (!isfinite(s.score[r])) die(FAILED, "--model: its probabilities are not finite: its training went wrong");
        for (int begin = 0, end = 0, row = 0; row < rows; row++, begin = end) {
            while (end < R && s.row[end] / T == row) end++;
            keep_best(x, s, begin, end, s.quota[row], mask, o);
        }
        for (int i = n_masks = 0; i < BT; i++) {
            if (s.again[i]) x[i] = mask, changed = 1;
            n_masks += x[i] == mask;
        }
        if (report && R) {
            report->forwards++, report->rows += rows, report->flops += R * head_flops(m->config);
            for (int r = 0; r < rows; r++) {
                report->loops += s.used[r], report->flops += T * pass_flops(m->config, T, num_passes(m->config, s.used[r]));
                if (report->step_rows) report->step_rows[step]++, report->step_loops[step] += s.used[r];
            }
        }
        if (show && (R || changed)) show(x, T, step, show_data);
    }
    free(flags), free(ints), free(score);
}

// =====================================================================================================================
// 9. Command line

enum { TRAIN = 1, EVAL = 2, SAMPLE = 4, ATTENTION = 8, TOKENIZE = 16, INFO = 32, FLOPS = 64 };

static const struct { const char *name; int flag; const char *about; } commands[] = {
    {"train", TRAIN, "Trains a model on token shards.\nWrites model.bin, optimizer.bin, tokenizer.bin, log.csv and, with --ema, ema.bin into --out."},
    {"eval", EVAL, "Estimates the NELBO of held-out tokens, in nats per token, for several numbers of loops.\n"
                   "With --sudoku it solves puzzles, with --exact-match it answers questions."},
    {"sample", SAMPLE, "Writes text: from nothing, from a beginning (--prompt), or into the blanks of a template (--fill)."},
    {"attention", ATTENTION, "Measures how much attention masked positions pay to masked ones, by pass, head and noise level."},
    {"tokenize", TOKENIZE, "Encodes text: --text shows its tokens; --input and --output turn a file into a token shard.\n"
                           "Stories are separated by the end-of-text token's own text, <|endoftext|>."},
    {"info", INFO, "Prints the configuration, parameters and memory of a trained model or a preset."},
    {"flops", FLOPS, "Prints the exact floating point operations of the matrix products, per token, by number of loops."},
};

// The paper's model is d12; the others are for one's own machine, where training is short and pays for few loops only (dev/experiments, 3).
static const struct { const char *name; int T, L, NH, C, a, b, S; } presets[] = {
    {"d2", 32, 2, 2, 32, 1, 2, 4}, {"nano", 128, 6, 4, 128, 1, 3, 4}, {"d6", 256, 6, 6, 288, 1, 3, 4}, {"d12", 1024, 12, 12, 768, 1, 3, 8},
};

// Every option of every command, with its default. -1 or NULL: taken from the preset, or none.
static const char *opt_data, *opt_val_data, *opt_tokenizer, *opt_model, *opt_loop, *opt_out, *opt_loops;
static const char *opt_prompt, *opt_fill, *opt_fill_file, *opt_puzzle, *opt_text, *opt_input, *opt_output, *opt_loop_dist = "uniform", *opt_time = "uniform";
static const char *opt_order = "confidence", *opt_criterion = "change", *opt_adaptive, *opt_init, *opt_answers_after, *opt_by_t, *opt_by_loop, *opt_csv, *opt_sample_steps = "32", *opt_eval_steps = "1,2,5,20";
static int opt_layers = -1, opt_heads = -1, opt_channels = -1, opt_seq_len = -1, opt_vocab = -1, opt_max_loops = -1;
static int opt_steps = 2000, opt_batch = 16, opt_accum = 1, opt_warmup = 100, opt_save_every = 500, opt_val_every = 500, opt_val_rows = 256;
static int opt_resume, opt_recompute, opt_rows = 1024, opt_length = -1, opt_n = 1, opt_watch, opt_show_loops, opt_threads;
static int opt_fixed_rows, opt_raw, opt_sudoku, opt_exact_match, opt_top_k, opt_block, opt_rows_of, opt_buckets = 10;
static double opt_lr = 2e-3, opt_wte_lr = 1, opt_floor = 0.1, opt_weight_decay = 0.1, opt_clip = 1, opt_temperature = 1, opt_top_p = 1, opt_threshold = 0.9, opt_remask, opt_ema, opt_var_length, opt_eval_temperature;
static uint64_t opt_seed = 1;

static const struct { const char *name; int commands; char type; void *value; double least; const char *argument, *help; } options[] = {
    {"data", TRAIN | EVAL | ATTENTION, 's', &opt_data, 0, "FILES", "token shards: a file, or a quoted pattern such as 'train_*.bin'"},
    {"val-data", TRAIN, 's', &opt_val_data, 0, "FILES", "held-out token shards: their NELBO is printed and logged"},
    {"tokenizer", TRAIN | TOKENIZE | SAMPLE | EVAL | ATTENTION, 's', &opt_tokenizer, 0, "FILE", "tokenizer; after training it is found in the model's folder"},
    {"model", TRAIN, 's', &opt_model, 0, "PRESET", "d2, nano, d6 or d12; the next options change it (default nano)"},
    {"model", EVAL | SAMPLE | ATTENTION, 's', &opt_model, 0, "FOLDER", "what train wrote into --out"},
    {"model", INFO | FLOPS, 's', &opt_model, 0, "MODEL", "a trained model's folder, or a preset: d2, nano, d6, d12 (default nano)"},
    {"layers", TRAIN | INFO | FLOPS, 'i', &opt_layers, 1, "L", "layers"},
    {"heads", TRAIN | INFO | FLOPS, 'i', &opt_heads, 1, "NH", "attention heads"},
    {"channels", TRAIN | INFO | FLOPS, 'i', &opt_channels, 2, "C", "channels"},
    {"seq-len", TRAIN | INFO | FLOPS, 'i', &opt_seq_len, 1, "T", "positions in a row"},
    {"vocab", TRAIN, 'i', &opt_vocab, 1, "V", "tokens, where there is no --tokenizer"},
    {"vocab", INFO | FLOPS, 'i', &opt_vocab, 1, "V", "tokens, for a preset (default 4096)"},
    {"loop", TRAIN | INFO | FLOPS, 's', &opt_loop, 0, "A:B", "loop over layers A .. B-1; 0:0 for an ordinary MDM"},
    {"max-loops", TRAIN | INFO | FLOPS, 'i', &opt_max_loops, 1, "S", "loops in training: 1 to S"},
    {"init", TRAIN, 's', &opt_init, 0, "FOLDER", "begin with the parameters (averaged, if there is an ema.bin) of another model of the same shape; its loop may differ"},
    {"loop-dist", TRAIN, 's', &opt_loop_dist, 0, "NAME", "how a step's loops are drawn: uniform, fixed (always S), flops (p ~ 1/FLOPs)"},
    {"time", TRAIN | EVAL, 's', &opt_time, 0, "NAME", "how noise levels are drawn: uniform, bell (intermediate ones more often, weighted for it)"},
    {"var-length", TRAIN, 'f', &opt_var_length, 0, "SHARE", "of steps whose rows are cut to a length from 1 to T"},
    {"fixed-rows", TRAIN, 'b', &opt_fixed_rows, 0, "", "the data are rows of T tokens, such as boards; without it rows begin anywhere"},
    {"answers-after", TRAIN | EVAL | ATTENTION, 's', &opt_answers_after, 0, "TOKEN", "fixed rows in which all up to this token is context; only the rest is masked and learned"},
    {"ema", TRAIN, 'f', &opt_ema, 0, "DECAY", "also keep an average of the parameters, such as 0.999, which eval, sample and attention then use (--val-data is tried on the last ones)"},
    {"out", TRAIN, 's', &opt_out, 0, "FOLDER", "where the model goes"},
    {"resume", TRAIN, 'b', &opt_resume, 0, "", "continue from the checkpoint in --out, exactly, with the same options"},
    {"steps", TRAIN, 'i', &opt_steps, 1, "N", "optimizer steps in all"},
    {"raw", EVAL | SAMPLE | ATTENTION, 'b', &opt_raw, 0, "", "the last parameters, where training also kept an average (--ema)"},
    {"batch", TRAIN | EVAL | INFO | ATTENTION, 'i', &opt_batch, 1, "B", "rows at a time"},
    {"accum", TRAIN, 'i', &opt_accum, 1, "N", "batches whose gradients are added up for one step"},
    {"recompute", TRAIN, 'b', &opt_recompute, 0, "", "keep only each pass's input for backward and compute the rest again: less memory, more time"},
    {"lr", TRAIN, 'f', &opt_lr, 0, "RATE", "highest learning rate"},
    {"wte-lr", TRAIN, 'f', &opt_wte_lr, 0, "SHARE", "learning rate of the embeddings, as a share of the others'"},
    {"floor", TRAIN, 'f', &opt_floor, 0, "SHARE", "where the learning rate ends, as a share of the highest"},
    {"warmup", TRAIN, 'i', &opt_warmup, 0, "N", "steps over which the learning rate rises"},
    {"weight-decay", TRAIN, 'f', &opt_weight_decay, 0, "RATE", "AdamW's weight decay, on matrices only"},
    {"clip", TRAIN, 'f', &opt_clip, 1e-9, "NORM", "largest norm of the gradient"},
    {"save-every", TRAIN, 'i', &opt_save_every, 1, "N", "steps between checkpoints"},
    {"val-every", TRAIN, 'i', &opt_val_every, 1, "N", "steps between validations"},
    {"val-rows", TRAIN, 'i', &opt_val_rows, 1, "N", "rows in a validation"},
    {"loops", TRAIN, 's', &opt_loops, 0, "S,S,..", "numbers of loops to validate with (default 1, 2, 4, .. and --max-loops)"},
    {"loops", EVAL, 's', &opt_loops, 0, "S,S,..", "numbers of loops, also beyond --max-loops (default 1, 2, 4, .. and that)"},
    {"loops", SAMPLE | ATTENTION, 's', &opt_loops, 0, "S", "loops, also beyond those of training (default: as many as those)"},
    {"adaptive", EVAL, 's', &opt_adaptive, 0, "TAU,..", "rows stop looping when a loop changes them by less than TAU"},
    {"adaptive", SAMPLE, 's', &opt_adaptive, 0, "TAU", "a text stops looping when a loop changes it by less than TAU"},
    {"max-loops", EVAL | SAMPLE, 'i', &opt_max_loops, 1, "S", "most loops with --adaptive (default: as many as in training)"},
    {"criterion", EVAL | SAMPLE, 's', &opt_criterion, 0, "NAME", "what --adaptive compares with TAU: change, or second (the second difference, twice)"},
    {"by-t", EVAL, 's', &opt_by_t, 0, "FILE", "also the loss by noise level, as a table and into this CSV file"},
    {"buckets", EVAL | ATTENTION, 'i', &opt_buckets, 1, "N", "into which noise levels are divided"},
    {"by-loop", EVAL, 's', &opt_by_loop, 0, "FILE", "also the norm of the state and its change in each loop (up to the last of --loops), as a table and into this CSV file"},
    {"sudoku", EVAL, 'b', &opt_sudoku, 0, "", "--data are puzzles, each with its solution after it: prints the share solved, by --loops and --steps"},
    {"exact-match", EVAL, 'b', &opt_exact_match, 0, "", "writes the answers and compares their last numbers with those of the data"},
    {"csv", ATTENTION, 's', &opt_csv, 0, "FILE", "all figures, also by head"},
    {"rows", EVAL | ATTENTION, 'i', &opt_rows, 1, "N", "rows, spread over the data; beyond its end they begin again with other noise (puzzles, questions: the first N)"},
    {"prompt", SAMPLE, 's', &opt_prompt, 0, "TEXT", "how the text begins"},
    {"fill", SAMPLE, 's', &opt_fill, 0, "TEXT", "a template: ____ is a blank of one token, ________ of two, and so on"},
    {"fill-file", SAMPLE, 's', &opt_fill_file, 0, "FILE", "templates, one in a line"},
    {"puzzle", SAMPLE, 's', &opt_puzzle, 0, "BOARD", "a Sudoku, row by row, with . for blanks"},
    {"length", SAMPLE, 'i', &opt_length, 2, "T", "tokens in all, with the prompt and the end-of-text before it (default: all that the model takes)"},
    {"steps", EVAL, 's', &opt_eval_steps, 0, "N,..", "denoising steps, with --sudoku and --exact-match"},
    {"steps", SAMPLE, 's', &opt_sample_steps, 0, "N", "denoising steps"},
    {"order", EVAL | SAMPLE, 's', &opt_order, 0, "NAME", "which tokens are kept first: random, confidence, margin, entropy, threshold"},
    {"threshold", EVAL | SAMPLE, 'f', &opt_threshold, 0, "P", "with --order threshold: all tokens of a higher probability are kept, in as many steps as needed"},
    {"block", EVAL | SAMPLE, 'i', &opt_block, 1, "N", "fill in blocks of N positions, from left to right"},
    {"remask", EVAL | SAMPLE, 'f', &opt_remask, 0, "P", "mask what was filled in again with this probability in each step (ReMDM)"},
    {"temperature", EVAL, 'f', &opt_eval_temperature, 0, "X", "0 always takes the likeliest token"},
    {"temperature", SAMPLE, 'f', &opt_temperature, 0, "X", "below 1 plays safe; 0 always takes the likeliest token"},
    {"top-k", EVAL | SAMPLE, 'i', &opt_top_k, 1, "K", "draw from the K likeliest tokens only"},
    {"top-p", EVAL | SAMPLE, 'f', &opt_top_p, 0, "P", "draw from the likeliest tokens that together have probability P"},
    {"n", SAMPLE, 'i', &opt_n, 1, "N", "texts to write"},
    {"watch", SAMPLE, 'b', &opt_watch, 0, "", "show the text while it is denoised"},
    {"show-loops", SAMPLE, 'b', &opt_show_loops, 0, "", "with --watch: also show what all blanks would be after each loop"},
    {"text", TOKENIZE, 's', &opt_text, 0, "TEXT", "text to encode"},
    {"input", TOKENIZE, 's', &opt_input, 0, "FILE", "file to encode"},
    {"output", TOKENIZE, 's', &opt_output, 0, "FILE", "token shard to write"},
    {"rows-of", TOKENIZE, 'i', &opt_rows_of, 2, "T", "each story becomes a row of T tokens, filled up with end-of-text; longer ones are left out"},
    {"seed", TRAIN | EVAL | SAMPLE | ATTENTION, 'u', &opt_seed, 0, "N", "seed of all randomness"},
    {"threads", TRAIN | EVAL | SAMPLE | ATTENTION, 'i', &opt_threads, 1, "N", "threads (default: one for each core)"},
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

static char was_given[NUM_OPTIONS]; // on the command line

// An option that has no effect without another is a mistake. names: such options, with a blank before and after each.
static void only_with(const char *needed, int is_there, const char *names) {
    for (int i = 0; !is_there && i < NUM_OPTIONS; i++) {
        char name[32];
        snprintf(name, sizeof name, " %s ", options[i].name);
        if (was_given[i] && strstr(names, name)) die(USAGE, "--%s has no effect without %s", options[i].name, needed);
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
        was_given[i] = 1;
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
static int parse_list(const char *option, const char *text, int *list, int most) {
    const char *all = text;
    int n = 0;
    char *end;
    do {
        long S = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || S < 1 || S > 100000 || n == most)
            die(USAGE, "--%s takes at most %d number%s from 1 to 100000, such as %s, not '%s'", option, most, most > 1 ? "s" : "", most > 1 ? "4 or 1,2,4" : "4", all);
        list[n++] = (int)S;
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

static int choose_time(void) {
    static const char *const times[] = {"uniform", "bell"};
    return choose("time", opt_time, times, 2);
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

// Opens log.csv for appending, with the lines of earlier steps that a resumed run does not repeat. Its columns must be the same.
static FILE *open_log(const char *folder, int step, const int *val_loops, int num_val) {
    char *path = join_path(folder, "log.csv"), *kept = NULL, line[4096], first[1024] = "";
    size_t bytes;
    FILE *old = step ? fopen(path, "r") : NULL, *log = open_memstream(&kept, &bytes);
    fprintf(log, "step,loops,t,loss,lr,grad_norm,tokens_per_s,flops");
    for (int i = 0; i < num_val; i++) fprintf(log, ",val_nelbo_s%d", val_loops[i]);
    fprintf(log, "\n");
    fflush(log);
    if (old && fgets(first, sizeof first, old) && strcmp(first, kept)) die(USAGE, "--resume: %s has other columns: give --val-data and --loops as when it was begun", path);
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
    if (opt_loops) return parse_list("loops", opt_loops, loops, most);
    for (int S = 1; n == 0 || loops[n - 1] < c.max_loops; S *= 2) loops[n++] = min_int(S, c.max_loops);
    return n;
}

// What follows the separator alone is learned (--answers-after), or rows are things of their own (--fixed-rows).
static void fix_rows(Data *d, const char *pattern, const Tokenizer *t, int T) {
    int separator = -1;
    if (opt_answers_after) {
        size_t length = strlen(opt_answers_after);
        if (!t) die(USAGE, "--answers-after needs --tokenizer, to find that token");
        for (int i = 0; i < t->vocab_size; i++)
            if (separator < 0 && (size_t)t->length[i] == length && !memcmp(t->bytes[i], opt_answers_after, length)) separator = i;
        if (separator < 0) die(USAGE, "--answers-after: '%s' is no token of the tokenizer", opt_answers_after);
        if (separator == t->eot) die(USAGE, "--answers-after: '%s' ends a text, so no answer comes after it", opt_answers_after);
    }
    if (opt_answers_after || opt_fixed_rows || opt_sudoku) data_fix_rows(d, pattern, T, separator);
}

// What a new model m begins with, (total): the parameters of --init (their average, if it has one), or random ones
static float *initial_parameters(const Model *m) {
    Config c = m->config;
    Model other;
    if (opt_init) {
        checkpoint_build(&other, opt_init);
        Config o = other.config;
        if (o.max_seq_len != c.max_seq_len || o.vocab_size != c.vocab_size || o.layers != c.layers || o.heads != c.heads || o.channels != c.channels)
            die(USAGE, "--init: the model in %s has another shape (loopmdm info --model %s)", opt_init, opt_init);
        return checkpoint_parameters(&other, opt_init, 1);
    }
    float *params = (float *)allocate(m->params.total, sizeof(float), "the parameters");
    init_parameters(params, c, opt_seed);
    return params;
}

static const char *const model_files[] = {"model.bin", "ema.bin", "optimizer.bin", "tokenizer.bin", "log.csv"}; // what training writes into --out
enum { NUM_MODEL_FILES = COUNT(model_files) };

// The model that training begins with, new or from --out, with its Progress; and --out itself.
static Progress train_begin(Model *m, Config c, const Tokenizer *tokenizer) {
    Progress p = {0, opt_batch * opt_accum, opt_seed, 0};
    char *saved = join_path(opt_out, "model.bin"), *copy = join_path(opt_out, "tokenizer.bin"), *ema = join_path(opt_out, "ema.bin");
    if (!opt_resume) make_folders(opt_out);
    int lock = open(opt_out, O_RDONLY | O_DIRECTORY); // until the end
    if (lock < 0 || (flock(lock, LOCK_EX | LOCK_NB) && errno != EWOULDBLOCK)) die(FAILED, "--out: cannot open %s: %s", opt_out, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB)) die(FAILED, "--out: another training is writing into %s", opt_out);
    if (!opt_resume && !access(saved, F_OK)) die(USAGE, "%s is already there: continue it with --resume, or choose another --out", saved);
    for (int i = 0; i < NUM_MODEL_FILES; i++) {
        char *path = join_path(opt_out, model_files[i]);
        keep_apart_from_data("--out", path, "--data", opt_data);
        keep_apart_from_data("--out", path, "--val-data", opt_val_data);
        free(path);
    }
    if (opt_tokenizer && !access(copy, F_OK)) {
        size_t size;
        const unsigned char *old = map_file(copy, TOKENIZER_MAGIC, "tokenizer", &size);
        if (size != tokenizer->file_size || memcmp(old, tokenizer->file, size))
            die(USAGE, "--tokenizer %s is not %s, which is there already: give that one, or choose another --out", opt_tokenizer, copy);
    }
    if (!opt_resume) {
        model_build(m, c);
        m->keeps_ema = opt_ema > 0;
        float *params = initial_parameters(m);
        model_reserve(m, opt_batch, c.max_seq_len, c.max_loops, 1, opt_recompute);
        model_set_parameters(m, params);
        if (unlink(ema) && errno != ENOENT) die(FAILED, "cannot remove %s, of an earlier model: %s", ema, strerror(errno));
        if (m->keeps_ema) tensors_write(&m->ema, params);
        free(params);
    } else {
        checkpoint_recover(opt_out);
        int step = checkpoint_build(m, opt_out);
        if (memcmp(&m->config, &c, sizeof c))
            die(USAGE, "--resume: %s has another shape (loopmdm info --model %s); give the options it was begun with", saved, opt_out);
        if ((access(ema, F_OK) == 0) != (opt_ema > 0)) die(USAGE, "--resume: %s", opt_ema > 0 ? "this run was begun without --ema, or its ema.bin is lost" : "this run was begun with --ema");
        m->keeps_ema = opt_ema > 0;
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
    free(saved), free(copy), free(ema);
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
    Recipe recipe = {choose("loop-dist", opt_loop_dist, dists, 3), choose_time(), opt_var_length, opt_seed, opt_batch * opt_accum, opt_batch};
    int val_loops[MOST_LOOPS], num_val = 0;
    if (!opt_data || !opt_out) die(USAGE, "train needs --data and --out; see loopmdm train --help");
    if (!opt_tokenizer && opt_vocab < 0) die(USAGE, "train needs --tokenizer, or --vocab for the number of tokens");
    if (opt_floor > 1) die(USAGE, "--floor is a share of --lr: at most 1, not %g", opt_floor);
    if (opt_ema >= 1) die(USAGE, "--ema is what the average keeps in a step: below 1, not %g", opt_ema);
    if (opt_var_length > 1) die(USAGE, "--var-length is a share: at most 1, not %g", opt_var_length);
    if (opt_var_length > 0 && (opt_fixed_rows || opt_answers_after)) die(USAGE, "--var-length would cut the rows of --fixed-rows and --answers-after");
    only_with("--val-data", opt_val_data != NULL, " loops val-rows val-every ");
    if (opt_init && opt_resume) die(USAGE, "--init excludes --resume, which has its parameters from --out");
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
    fix_rows(&data, opt_data, opt_tokenizer ? &tokenizer : NULL, T);
    if (opt_val_data) {
        val = data_open(opt_val_data, c.vocab_size, T);
        fix_rows(&val, opt_val_data, opt_tokenizer ? &tokenizer : NULL, T);
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

    double began = seconds(), shown = began, loss_sum = 0, tokens = 0;
    int begin = p.step, saved = -1, loss_count = 0;
    while (p.step < opt_steps) {
        double step_began = seconds();
        Gradient g = train_gradient(&m, &data, recipe, p.step);
        if (!isfinite(g.loss) || !isfinite(g.norm)) stop_training(p.step + 1, g.loss, g.norm, saved);
        AdamW adamw = {learning_rate(opt_lr, opt_floor, opt_warmup, opt_steps, p.step), opt_wte_lr, 0.9, 0.95, 1e-8, opt_weight_decay, opt_clip, opt_ema};
        if (p.step == begin && opt_resume) saved = begin; // it has proved to be good
        model_update(&m, adamw, g.norm, ++p.step);
        p.flops += training_flops(c, g.T, g.S, g.masked / ((double)rows * g.T), opt_recompute) * rows * g.T;
        loss_sum += g.loss, tokens += (double)rows * g.T;
        loss_count++;

        double now = seconds(), per_step = (now - began) / (p.step - begin);
        int last = p.step == opt_steps, stop = interrupted, validates = num_val && !stop && (p.step % opt_val_every == 0 || last);
        fprintf(log, "%d,%d,%.6f,%.9g,%.9g,%.9g,%.0f,%.9g", p.step, g.S, g.mean_t, g.loss, adamw.lr, g.norm, rows * g.T / (now - step_began), p.flops);
        if (validates || last || p.step == begin + 1 || now - shown > 5) { // the mean loss since the line before: 1/t makes single losses noisy
            int left = (int)(per_step * (opt_steps - p.step));
            printf("step %d/%d | loss %.4f | loops %d | norm %.2f | lr %.2e | %.0f tokens/s | %d:%02d left\n", p.step, opt_steps,
                   loss_sum / loss_count, g.S, g.norm, adamw.lr, tokens / (now - began), left / 60, left % 60);
            shown = now;
            loss_sum = loss_count = 0;
        }
        if (validates) printf("validation NELBO, nats per token:");
        for (int i = 0; i < num_val; i++) {
            fputc(',', log);
            if (!validates) continue;
            Loops loops = {val_loops[i], 0, 0};
            double nelbo = evaluate(&m, &val, loops, TIME_UNIFORM, opt_val_rows, opt_batch, opt_seed, NULL).nelbo;
            printf("  S=%d %.4f%s", val_loops[i], nelbo, i + 1 == num_val ? "\n" : "");
            fprintf(log, "%.6f", nelbo);
        }
        fputc('\n', log);
        if (fflush(stdout) || fflush(log)) die(FAILED, "cannot write log.csv in %s, or standard output: %s", opt_out, strerror(errno));
        if (p.step % opt_save_every == 0 || last || stop) { // a model is saved only if it still gives a finite loss
            Loops loops = {c.max_loops, 0, 0};
            double now_loss = evaluate(&m, &data, loops, TIME_UNIFORM, opt_batch, opt_batch, opt_seed, NULL).nelbo;
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

// --adaptive's taus, and in l the most loops, the first tau and the criterion; returns how many. Without it none: l is of fixed loops.
static int parse_taus(double *taus, int most, int max_loops, Loops *l) {
    static const char *const criteria[] = {"change", "second"};
    int n = 0;
    char *end;
    l->S = max_loops, l->tau = 0, l->second = choose("criterion", opt_criterion, criteria, 2);
    only_with("--adaptive", opt_adaptive != NULL, " max-loops criterion ");
    if (!opt_adaptive) return 0;
    if (opt_loops) die(USAGE, "--adaptive excludes --loops; --max-loops sets the most");
    if (opt_max_loops > 0) l->S = opt_max_loops;
    if (l->S > 100000) die(USAGE, "--max-loops %d are too many", l->S);
    const char *text = opt_adaptive;
    do {
        double tau = strtod(text, &end);
        if (end == text || (*end && *end != ',') || !(tau >= 0) || n == most) die(USAGE, "--adaptive takes at most %d number%s, such as 0.1, not '%s'", most, most > 1 ? "s" : "", opt_adaptive);
        taus[n++] = tau;
        text = end + 1;
    } while (*end);
    l->tau = taus[0];
    return n;
}

static SampleOptions sample_options(Loops loops, int steps, double temperature) {
    static const char *const orders[] = {"random", "confidence", "margin", "entropy", "threshold"};
    int order = choose("order", opt_order, orders, 5), score = order == ORDER_MARGIN ? SCORE_MARGIN : order == ORDER_ENTROPY ? SCORE_ENTROPY : SCORE_PROBABILITY;
    if (opt_remask > 1 || opt_top_p > 1 || opt_threshold > 1) die(USAGE, "--remask, --top-p and --threshold are probabilities: at most 1");
    only_with("--order threshold", order == ORDER_THRESHOLD, " threshold ");
    only_with("a schedule of steps, which --order threshold has not", order != ORDER_THRESHOLD, " steps remask ");
    only_with("--temperature above 0", temperature > 0, " top-k top-p ");
    SampleOptions o = {steps, order, opt_block, opt_threshold, opt_remask, loops, {temperature, opt_top_k, opt_top_p, score, opt_seed}};
    return o;
}

static void check_steps(int steps, int blocks) {
    if (steps < blocks) die(USAGE, "--steps is %d, and %d blocks are to be filled in: give each one step at least", steps, blocks);
}

#include "dev/analysis.h" // eval's tables by noise level and by loop, Sudoku and exact match; the command attention

static void eval(void) {
    Model m;
    Loops l;
    double taus[MOST_LOOPS];
    if (!opt_model || !opt_data) die(USAGE, "eval needs --model and --data; see loopmdm eval --help");
    int step = checkpoint_build(&m, opt_model), loops[MOST_LOOPS], n = evaluation_loops(m.config, loops, MOST_LOOPS), T = m.config.max_seq_len, time = choose_time();
    int num_taus = parse_taus(taus, MOST_LOOPS, m.config.max_loops, &l), B = min_int(opt_batch, opt_rows);
    Tokenizer t;
    int has_tokenizer = find_tokenizer(&t, &m, opt_model);
    Data data = data_open(opt_data, m.config.vocab_size, T);
    fix_rows(&data, opt_data, has_tokenizer ? &t : NULL, T);
    check_rows(T);
    if (opt_adaptive && (opt_by_t || opt_by_loop)) die(USAGE, "--by-t and --by-loop are for fixed numbers of loops: they exclude --adaptive");
    only_with("--sudoku or --exact-match", opt_sudoku || opt_exact_match, " steps order threshold block remask temperature top-k top-p ");
    only_with("a NELBO, which --sudoku and --exact-match do not estimate", !opt_sudoku && !opt_exact_match, " time ");
    only_with("--by-t", opt_by_t != NULL, " buckets ");
    sample_options(l, 1, opt_eval_temperature); // dies if they make no sense
    if (opt_sudoku + opt_exact_match + (opt_by_t != NULL) + (opt_by_loop != NULL) > 1) die(USAGE, "--sudoku, --exact-match, --by-t and --by-loop exclude each other");
    if (opt_by_t) csv_check("--by-t", opt_by_t);
    if (opt_by_loop) csv_check("--by-loop", opt_by_loop);
    model_reserve(&m, B, T, 1, 0, 0);
    checkpoint_load(&m, opt_model, !opt_raw);
    if (opt_sudoku || opt_exact_match) {
        if (!has_tokenizer) die(FAILED, "%s has no tokenizer.bin; name one with --tokenizer", opt_model);
        if (opt_exact_match && !opt_answers_after) die(USAGE, "--exact-match needs --answers-after");
        eval_solutions(&m, step, &data, &t, l, loops, n, taus, num_taus, B);
        return;
    }
    double nats_to_bits = has_tokenizer ? tokens_per_byte(&data, &t, opt_rows, T) / log(2) : 0;
    printf("%s, step %d: NELBO of %d rows of %d tokens\n\n", opt_model, step, opt_rows, T);
    printf("%sloops  passes  NELBO, nats/token  perplexity at most%s  GFLOP/row  tokens/s\n", opt_adaptive ? "   tau  " : "", nats_to_bits > 0 ? "  bits/byte" : "");
    for (int i = 0; i < (opt_adaptive ? num_taus : n); i++) {
        if (opt_adaptive) l.tau = taus[i];
        else l.S = loops[i];
        double began = seconds();
        Evaluation e = evaluate(&m, &data, l, time, opt_rows, B, opt_seed, NULL);
        double passes = num_passes(m.config, 0) + e.loops * (m.config.loop_end - m.config.loop_start);
        if (!isfinite(e.nelbo)) die(FAILED, "--model: the loss of %s is %g at %d loops: its training went wrong", opt_model, e.nelbo, l.S);
        if (opt_adaptive) printf("%6g  %5.2f  %6.2f", l.tau, e.loops, passes);
        else printf("%5d  %6.0f", l.S, passes);
        printf("    %.4f +- %.4f  %18.2f", e.nelbo, e.error, exp(e.nelbo));
        if (nats_to_bits > 0) printf("  %9.3f", e.nelbo * nats_to_bits);
        printf("  %9.3f  %8.0f\n", (pass_flops(m.config, T, passes) + 0.5 * head_flops(m.config)) * T * 1e-9, (double)opt_rows * T / (seconds() - began));
        fflush(stdout);
    }
    if (opt_by_t) eval_by_t(&m, &data, loops, n, time, B);
    if (opt_by_loop) eval_by_loop(&m, &data, loops[n - 1], time, B);
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

#include "dev/watch.h" // sample --watch and --show-loops: draws the text or board while it is denoised

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

// What the sampler begins with: text as a prompt, a template or a board, to tokens x (most); returns T.
static int encode_start(const Model *m, const Tokenizer *t, int *x, int most, const char *option, const char *text) {
    int mask = m->config.vocab_size, given = 0, T, blanks = 0;
    if (opt_puzzle) {
        if ((T = encode_board(t, x, most, mask, text)) != most) die(USAGE, "--puzzle has %d cells; the model takes %d", T, most);
    } else { // every text begins after an end-of-text
        int *room = (int *)allocate(strlen(text) + 1, sizeof(int), "the text");
        given = 1 + (opt_fill || opt_fill_file ? encode_template(t, room, mask, text) : (int)tokenizer_encode(t, room, text, strlen(text), option));
        T = opt_fill || opt_fill_file ? given : opt_length < 0 ? most : opt_length;
        if (given > T || T > most) die(FAILED, "%s has %d tokens with the end-of-text before it; %d are possible", option, given, min_int(T, most));
        x[0] = t->eot;
        memcpy(x + 1, room, (given - 1) * sizeof(int));
        for (int i = given; i < T; i++) x[i] = mask;
        free(room);
    }
    for (int i = 0; i < T; i++) blanks += x[i] == mask;
    if (most == 1 && !opt_puzzle) die(USAGE, "--model has room for one token, the end-of-text: there is nothing to write");
    if (!blanks && !opt_prompt) die(USAGE, "%s has no blank: write %s where a token is to be filled in", option, opt_puzzle ? "." : "____");
    return T;
}

static char *read_text(const char *path) { // a whole file, with a zero after it; the caller frees it
    FILE *file = fopen(path, "rb");
    size_t size = 0, room = 1 << 16;
    char *text = (char *)allocate(room, 1, path);
    if (!file) die(FAILED, "cannot read %s: %s", path, strerror(errno));
    for (size_t n; (n = fread(text + size, 1, room - size - 1, file)) > 0; size += n)
        if (size + n + 1 == room && !(text = (char *)realloc(text, room *= 2))) die(FAILED, "no memory for %s", path);
    if (ferror(file)) die(FAILED, "cannot read %s: %s", path, strerror(errno));
    fclose(file);
    if (memchr(text, 0, size)) die(FAILED, "%s holds a zero byte, so it is no text: write one template in a line", path);
    text[size] = 0;
    return text;
}

static void sample_command(void) {
    Model m;
    Loops l;
    double tau;
    int steps;
    if (!opt_model) die(USAGE, "sample needs --model; see loopmdm sample --help");
    if (!!opt_prompt + !!opt_fill + !!opt_fill_file + !!opt_puzzle > 1) die(USAGE, "--prompt, --fill, --fill-file and --puzzle exclude each other");
    only_with("--watch", opt_watch, " show-loops ");
    if (opt_length >= 0 && (opt_fill || opt_fill_file || opt_puzzle)) die(USAGE, "--length excludes --fill, --fill-file and --puzzle, which have a length of their own");
    checkpoint_build(&m, opt_model);
    Tokenizer t = model_tokenizer(&m, opt_model);
    int most = m.config.max_seq_len, num_texts = 1;
    parse_taus(&tau, 1, m.config.max_loops, &l);
    if (opt_loops) parse_list("loops", opt_loops, &l.S, 1);
    parse_list("steps", opt_sample_steps, &steps, 1);
    SampleOptions o = sample_options(l, steps, opt_temperature);
    if (opt_length > most) die(USAGE, "--length is %d; the model takes at most %d tokens", opt_length, most);
    const char *option = opt_fill ? "--fill" : opt_fill_file ? "--fill-file" : opt_puzzle ? "--puzzle" : "--prompt";
    char *templates = opt_fill_file ? read_text(opt_fill_file) : NULL;
    const char *text = opt_fill ? opt_fill : opt_puzzle ? opt_puzzle : opt_prompt ? opt_prompt : "";
    for (char *s = templates; s && *s; s++)
        if (*s == '\n') *s = 0, num_texts += s[1] != 0;
    if (templates) text = templates;

    int B = opt_watch ? 1 : min_int(opt_n, 16), *start = (int *)allocate(most, sizeof(int), "the text"), *x = (int *)allocate((size_t)B * most, sizeof(int), "the texts");
    int slots = max_int(steps, most), printed = 0;
    int64_t blanks = 0;
    SampleReport report = {0, 0, 0, 0, (double *)allocate(2 * (size_t)slots, sizeof(double), "the report"), NULL};
    report.step_loops = report.step_rows + slots;
    for (int number = 0, at = 0; number < num_texts; number++, at += (int)strlen(text + at) + 1) { // errors come before any text
        char where[64];
        snprintf(where, sizeof where, "--fill-file, template %d", number + 1);
        int T = encode_start(&m, &t, start, most, templates ? where : option, text + at), blocks = blocks_to_fill(start, T, m.config.vocab_size, opt_block);
        if (o.order != ORDER_THRESHOLD) check_steps(steps, blocks);
    }
    model_reserve(&m, B, most, 1, 0, 0);
    checkpoint_load(&m, opt_model, !opt_raw);
    double began = seconds();
    for (int number = 0; number < num_texts; number++, text += strlen(text) + 1) {
        o.draw.seed = opt_seed + (uint64_t)number; // row numbers begin again: other random numbers
        int T = encode_start(&m, &t, start, most, option, text), side = opt_puzzle ? (int)lrint(sqrt(T)) : 0;
        if (side * side != T && side) die(USAGE, "--puzzle: %d cells are no square", T);
        for (int first = 0, n; first < opt_n; first += n) { // += B could pass INT_MAX
            n = min_int(B, opt_n - first);
            Watch w = {&t, &m, 0, side, opt_show_loops ? l.S : 0};
            for (int b = 0; b < n; b++) memcpy(x + b * T, start, T * sizeof(int));
            for (int i = 0; i < n * T; i++) blanks += x[i] == m.config.vocab_size;
            if (opt_show_loops) draw_each_loop(&w, x, T, 0);
            sample(&m, x, n, T, o, first, &report, opt_watch ? watch : NULL, &w);
            for (int b = 0; b < n; b++) {
                char *result = side ? board_text(&t, x + b * T, side, 1) : decode(&t, x + b * T, T);
                if (w.lines) printf("\033[%dA\r\033[J", w.lines), w.lines = 0;
                printf("%s%s\n", printed++ ? "\n" : "", result);
                free(result);
            }
            fflush(stdout);
        }
    }
    double took = seconds() - began;
    if (opt_adaptive) fprintf(stderr, "loops in each step:");
    for (int i = 0; i < slots; i++)
        if (opt_adaptive && report.step_rows[i]) fprintf(stderr, " %.1f", report.step_loops[i] / report.step_rows[i]);
    if (opt_adaptive) fprintf(stderr, "\n");
    fprintf(stderr, "%lld tokens in %d forwards, %.2f loops on average, %.3f GFLOP, %.0f tokens/s\n", (long long)blanks, report.forwards, report.loops / fmax(1, report.rows),
            report.flops * 1e-9, blanks / took);
    free(start), free(x), free(templates), free(report.step_rows);
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
    only_with("--input", opt_input != NULL, " rows-of ");
    if (opt_rows_of > 65536) die(USAGE, "--rows-of is %d; no model takes more than 65536 tokens", opt_rows_of);
    if (!opt_text == !opt_input || !opt_input != !opt_output) die(USAGE, "tokenize takes either --text, or --input and --output");
    Tokenizer t = tokenizer_open(opt_tokenizer);
    if (opt_text) {
        int *ids = (int *)allocate(strlen(opt_text), sizeof(int), "tokens"), n = (int)tokenizer_encode(&t, ids, opt_text, strlen(opt_text), "--text");
        for (int i = 0; i < n; i++) print_token(&t, ids[i]);
        printf("%d tokens\n", n);
        free(ids);
        return;
    }
    struct stat info;
    if (stat(opt_input, &info)) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    if (!S_ISREG(info.st_mode)) die(FAILED, "cannot read %s: it is a folder, device or pipe", opt_input);
    keep_apart("--output", opt_output, "--input", opt_input);
    keep_apart("--output", opt_output, "--tokenizer", opt_tokenizer);
    FILE *in = fopen(opt_input, "rb");
    if (!in) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    if (info.st_size == 0 || info.st_size >= INT_MAX)
        die(FAILED, "%s has %lld bytes: from 1 byte to 2 GiB are possible", opt_input, (long long)info.st_size);
    size_t size = (size_t)info.st_size, count = 0, room = 2 * size;
    char *text = (char *)allocate(size, 1, "the text");
    int *ids = (int *)allocate(size, sizeof(int), "tokens");
    uint16_t *tokens = (uint16_t *)allocate(room, sizeof *tokens, "tokens");
    if (fread(text, 1, size, in) != size) die(FAILED, "cannot read %s: %s", opt_input, strerror(errno));
    fclose(in);
    int stories = 0, too_long = 0;
    for (size_t begin = 0, end; begin < size; begin = end + t.length[t.eot]) { // as llm.c: an end-of-text before each story, no space around it
        int special = -1;
        for (end = begin; end < size; end += t.length[special]) // other special texts are a part of the story
            if ((end = find_special(&t, text, end, size, &special)) == size || special == t.eot) break;
        size_t from = begin, to = end;
        while (from < to && isspace((unsigned char)text[from])) from++;
        while (to > from && isspace((unsigned char)text[to - 1])) to--;
        if (from == to) continue;
        size_t n = tokenizer_encode(&t, ids, text + from, to - from, opt_input);
        if (opt_rows_of && n + 1 > (size_t)opt_rows_of) {
            too_long++;
            continue;
        }
        for (; opt_rows_of && count + opt_rows_of > room; room *= 2)
            if (!(tokens = (uint16_t *)realloc(tokens, 2 * room * sizeof *tokens))) die(FAILED, "no memory for the rows of %s", opt_input);
        tokens[count++] = (uint16_t)t.eot;
        for (size_t i = 0; i < n; i++) tokens[count++] = (uint16_t)ids[i];
        while (opt_rows_of && count % opt_rows_of) tokens[count++] = (uint16_t)t.eot;
        stories++;
    }
    if (!count) die(FAILED, too_long ? "%s: no story fits into --rows-of" : "%s has no text", opt_input);
    if (count > INT_MAX) die(FAILED, "%s: the rows have %zu tokens; a shard holds 2^31 - 1 at most", opt_input, count);
    int header[HEADER_INTS] = {SHARD_MAGIC, 1, (int)count};
    const Part parts[] = {{header, sizeof header}, {tokens, count * sizeof *tokens}};
    write_file(opt_output, parts, 2);
    if (opt_rows_of) printf("%s: %d rows of %d tokens; %d stories are longer and were left out\n", opt_output, stories, opt_rows_of, too_long);
    else printf("%s: %d stories, %zu tokens, %.2f bytes per token\n", opt_output, stories, count, (double)size / count);
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
    int T = c.max_seq_len;
    printf("MFLOP per token at T = %d, V = %d (a multiply-add is two); the LM head on masked tokens only\n", T, c.vocab_size);
    printf("a pass forward: %.3f, of which attention %.3f; backward: %.3f. The head of a masked token: %.3f, backward %.3f\n\n",
           pass_flops(c, T, 1) * 1e-6, 4e-6 * T * c.channels, (training_flops(c, T, 1, 0, 0) / num_passes(c, 1) - pass_flops(c, T, 1)) * 1e-6,
           head_flops(c) * 1e-6, 2e-6 * head_flops(c));
    printf("loops  passes  forward, all masked  training, half masked  with --recompute  relative to S=1\n");
    for (int S = 1; S <= c.max_loops; S++) {
        double step = training_flops(c, T, S, 0.5, 0);
        printf("%5d  %6d  %19.3f  %21.3f  %16.3f  %15.2f\n", S, num_passes(c, S), (pass_flops(c, T, num_passes(c, S)) + head_flops(c)) * 1e-6, step * 1e-6,
               training_flops(c, T, S, 0.5, 1) * 1e-6, step / training_flops(c, T, 1, 0.5, 0));
    }
}

int main(int argc, char **argv) {
    static void (*const run[])(void) = {train, eval, sample_command, attention, tokenize, info, flops};
    flush_subnormals();
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
