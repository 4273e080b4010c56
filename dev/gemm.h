/*
The matrix product and the exponential that loopmdm.c uses if it finds this file. In fp32 they
compute the same as the plain versions in loopmdm.c, 10 to 50 times as fast.

    gemm(product, M, N, K, a, lda, b, ldb, c, ldc, add, epilogue)       c = or += a b, and then

The algorithm is that of GotoBLAS and BLIS: five loops around a microkernel. Each loop keeps one
piece of the operands in one cache.

    N in steps of NC
      K in steps of KC      a panel of B, packed: KC x NC, in L3; threads pack it together
        tiles MC x NT         of C: MC x KC of A stay in the L2 of the thread that takes the tile
          N in steps of NR      KC x NR of B, in L1, or in L2 if L1 is too small
            M in steps of MR      the microkernel: MR x NR sums stay in registers
              K                     one column of A times one row of B

    K is cut into equal steps of at most KC. gemm_bf16.h has its own sizes and loops: there the last
    two loops over N and M change places, and if C is wide, each thread packs its own columns of B.

               NR               "Packed" means: in the order in which the microkernel reads. First
        B  k > |||||            MR values of A, then the next MR; first NR values of B, then the
    A        +-------+          next NR. Rows past the end are zero.
   MR -----> | C tile|
    ^ k      +-------+          GCC's vector extension becomes AVX-512, AVX2, SSE or NEON code.

loopmdm.c includes this file. It has die(), min_int(), max_int(), OMP, WORTH, Epilogue and
the names AB, ABT, ATB, ADD.
*/
#ifdef _OPENMP
#include <omp.h>
#endif

// INTERLEAVE(i): places in two vectors together, i of the first, i of the second, i + 1 of the
// first, ..: as many as a vector has. transpose() needs them.
#define PAIRS2(i) i, VECTOR + i, i + 1, VECTOR + i + 1
#define PAIRS4(i) PAIRS2(i), PAIRS2(i + 2)
#if defined(__AVX512F__)
enum { VECTOR = 16, MR = 14, MC = 56 }; // floats in a vector; MR x 2 sums fill the registers
#define INTERLEAVE(i) PAIRS4(i), PAIRS4(i + 4)
#elif defined(__AVX__)
enum { VECTOR = 8, MR = 6, MC = 48 };
#define INTERLEAVE(i) PAIRS4(i)
#elif defined(__aarch64__)
enum { VECTOR = 4, MR = 12, MC = 48 };
#define INTERLEAVE(i) PAIRS2(i)
#else
enum { VECTOR = 4, MR = 6, MC = 48 };
#define INTERLEAVE(i) PAIRS2(i)
#endif
enum { NR = 2 * VECTOR, KC = 512, NT = 512, NC = 4096 };
typedef float vec __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float)),
                                 may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(VECTOR * sizeof(int32_t))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

// e^x within 2 units in the last place, in arithmetic that compilers turn into vector instructions.
// Results stay between 1.6e-38 and 6.1e37. NaN stays NaN.
static inline float exp_fast(float x) {
    // With x = n ln2 + r and |r| <= ln2/2 it is 2^n e^r. The limit goes by the size of x: if gcc
    // gets a limit on each side, it computes both as cases of their own, in twice the time.
    float size = fabsf(x);
    x = copysignf(size > 87.0f ? 87.0f : size, x);

    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    union { float f; uint32_t u; } n, power;
    n.f = x * 1.44269504f + 12582912.0f;
    float whole = n.f - 12582912.0f;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f; // ln2 in two parts: more exact

    // The Taylor series; what follows r^7 is below 6e-9.
    float series = r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)));
    series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + series))));
    power.u = (n.u << 23) + 0x3f800000u; // 2^n: n becomes the exponent of a float
    return series * power.f;
}

// Memory that each thread keeps for packed operands: which = 0 for A, 1 for B.
static float *gemm_memory(int which, size_t count) {
    static __thread void *memory[2];
    static __thread size_t room[2];
    if (room[which] < count) {
        free(memory[which]);
        if (posix_memalign(&memory[which], 64, count * sizeof(float)))
            die(FAILED, "no memory for a thread's tiles (%zu MiB)", count >> 18);
        room[which] = count;
    }
    return (float *)memory[which];
}

// dst = src transposed, VECTOR x VECTOR values. Rows lie so many values apart.
static inline void transpose(float *dst, size_t dst_row, const float *src, size_t src_row) {
    vec a[VECTOR], b[VECTOR];
    for (int i = 0; i < VECTOR; i++) a[i] = *(const vec *)(src + i * src_row);

    // Interleaving the first half of all values with the second half moves the highest bit of each
    // value's number to its lowest. After log2(VECTOR) times, row and column have changed places.
    for (int bits = 1; bits < VECTOR; bits *= 2) {
        for (int i = 0; i < VECTOR / 2; i++) {
            b[2 * i] = SHUFFLE(a[i], a[i + VECTOR / 2], INTERLEAVE(0));
            b[2 * i + 1] = SHUFFLE(a[i], a[i + VECTOR / 2], INTERLEAVE(VECTOR / 2));
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < VECTOR; i++) *(vec *)(dst + i * dst_row) = a[i];
}

// Packs src (n,k) into panels (k,width): width values side by side, the last panel padded with
// zeros. One of the two strides is 1.
static inline void gemm_pack(float *dst, const float *src, size_t stride_n, size_t stride_k,
                             int n, int k, int width) {
    enum { ROWS = 8, AHEAD = 16 };
    int whole = n / width * width, done = 0; // done: of k, in whole panels
    if (stride_n == 1) {
        // n is the dense dimension. We take a few rows at a time: panels may lie a multiple of
        // 4 KiB apart, and then few lines of them fit into L1 together. No processor guesses these
        // strides, so we prefetch.
        for (int p0 = 0; p0 < k; p0 += ROWS)
            for (int j = 0; j < whole; j += width)
                for (int p = p0; p < min_int(p0 + ROWS, k); p++) {
                    const float *row = src + p * stride_k + j;
                    __builtin_prefetch(row + AHEAD * stride_k);
                    memcpy(dst + (size_t)j * k + p * width, row, width * sizeof(float));
                }
        done = k;
    } else if (width % VECTOR == 0) {
        for (int j = 0; j < whole; j += width)
            for (int p = 0; p + VECTOR <= k; p += VECTOR)
                for (int i = 0; i < width; i += VECTOR)
                    transpose(dst + (size_t)j * k + p * width + i, width,
                              src + (j + i) * stride_n + p, stride_n);
        done = k / VECTOR * VECTOR;
    }

    // What is left: the end of k, and the last panel.
    if (whole < n) memset(dst + (size_t)whole * k, 0, (size_t)k * width * sizeof(float));
    for (int j = 0; j < n; j += width) {
        int rows = min_int(width, n - j);
        for (int p = rows == width ? done : 0; p < k; p++)
            for (int i = 0; i < rows; i++)
                dst[(size_t)j * k + p * width + i] = src[(j + i) * stride_n + p * stride_k];
    }
}

// Keeps a vector in a register. Where registers are few, gcc would load b0 below from memory again
// for each of its MR products. That is up to a fifth slower: no core loads so fast.
#if defined(__x86_64__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#elif defined(__aarch64__)
#define IN_REGISTER(vector) __asm__("" : "+w"(vector))
#else
#define IN_REGISTER(vector)
#endif

// sum (MR, vectors x VECTOR) = a (MR,k) b (k,NR), with one or both vectors of b. This function and
// the next two are always inlined: attention's sums are short, and calls would take a tenth of its
// time.
__attribute__((always_inline))
static inline void gemm_sums(vec sum[MR][2], int vectors, int k, const float *a, size_t a_row,
                             size_t a_col, const float *b) {
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int p = 0; p < k; p++, a += a_col, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VECTOR);
        IN_REGISTER(b0);
        if (vectors == 2) IN_REGISTER(b1);
        for (int i = 0; i < MR; i++) {
            sum[i][0] += a[i * a_row] * b0;
            if (vectors == 2) sum[i][1] += a[i * a_row] * b1;
        }
    }
}

// c (MR, vectors x VECTOR) = or += a b + bias. Without variable indices sums stay in registers.
__attribute__((always_inline))
static inline void gemm_whole(int vectors, int k, const float *a, size_t a_row, size_t a_col,
                              const float *b, float *c, size_t ldc, const float *bias, int add) {
    vec sum[MR][2];
    gemm_sums(sum, vectors, k, a, a_row, a_col, b);
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < MR; i++) {
            vec r = sum[i][v], *out = (vec *)(c + i * ldc + v * VECTOR);
            if (bias) r += *(const vec *)(bias + v * VECTOR);
            if (add) r += *out;
            *out = r;
        }
}

// c (m,n) = or += a (MR,k) b (k,NR) + bias (n). b is packed; a[i*a_row + p*a_col] is packed or not.
// At the edges m < MR, n < NR.
__attribute__((always_inline))
static inline void gemm_micro(int k, const float *a, size_t a_row, size_t a_col, const float *b,
                              float *c, size_t ldc, int m, int n, const float *bias, int add) {
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1); // it comes during the sums
    if (m == MR && n == NR) {
        gemm_whole(2, k, a, a_row, a_col, b, c, ldc, bias, add);
        return;
    }
    if (m == MR && n == VECTOR) {
        gemm_whole(1, k, a, a_row, a_col, b, c, ldc, bias, add);
        return;
    }
    vec sum[MR][2];
    gemm_sums(sum, 2, k, a, a_row, a_col, b);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float r = sum[i][j / VECTOR][j % VECTOR] + (bias ? bias[j] : 0);
            float *out = c + i * ldc + j;
            *out = add ? *out + r : r;
        }
}

// c (M,N) = or += a b, and then the epilogue. Element (i,p) of a is a[i*a_row + p*a_col], likewise
// b; rows of c are ldc apart.
typedef struct {
    int M, N, K;
    const float *a, *b;
    size_t a_row, a_col, b_row, b_col, ldc;
    float *c;
    int add;
    Epilogue e;
} Product;

typedef struct { int n0, n, k0, k; } Panel; // of B: columns n0 .. n0+n, rows k0 .. k0+k

// Finishes rows i0 .. i0+m, and columns j0 .. j0+n of the panel's, if this was the last step of K.
static void gemm_finish_tile(const Product *g, Panel p, int i0, int m, int j0, int n) {
    enum { LINE = 16 }; // floats of a cache line
    const float *read = g->e.residual ? g->e.residual : g->e.other;
    if (!read || p.k0 + p.k < g->K) return;
    for (int i = i0; i < i0 + m; i++) {
        size_t at = i * g->ldc + p.n0 + j0;
        float *c = g->c + at;
        for (int j = 0; j < n; j += LINE) __builtin_prefetch(read + at + g->ldc + j); // next row
        for (int j = 0; g->e.residual && j < n; j++) c[j] += g->e.residual[at + j];
        if (g->e.finish) g->e.finish(c, g->e.other + at, n);
    }
}

// With ATB, where a is (K,M): adds its columns i0 .. i0+m, rows k0 .. k0+k, to the epilogue's sums.
// Each sum has one order: that of the rows.
static void gemm_add_sums(const Product *g, int i0, int m, int k0, int k) {
    float *sums = g->e.sums + i0;
    for (int p = k0; p < k0 + k; p++) {
        const float *row = g->a + p * g->a_col + i0;
        OMP(omp simd)
        for (int i = 0; i < m; i++) sums[i] += row[i];
    }
}

#include "gemm_bf16.h" // bf16_product(), for processors with instructions for bfloat16

// Packs n rows of A or columns of B, of k values each.
static void gemm_pack_operand(float *dst, const float *src, size_t stride_n, size_t stride_k, int n,
                              int k, int width) {
    gemm_pack(dst, src, stride_n, stride_k, n, k, width);
    if (gemm_bf16) bf16_round(dst, (size_t)(n + width - 1) / width * width * k);
}

// Packs columns j .. j+n of a panel.
static void gemm_pack_b(const Product *g, Panel p, int j, int n, float *b_packed) {
    const float *b = g->b + p.k0 * g->b_row + (p.n0 + j) * g->b_col;
    gemm_pack_operand(b_packed + (size_t)j * p.k, b, g->b_col, g->b_row, n, p.k, NR);
}

// A tile of c, in one thread: rows i0 .. i0+m, the panel's columns j0 .. j0+n. m <= MC. In
// fp32, rows of A whose values lie side by side along K are read where they lie; a last group of
// fewer than MR rows is packed. In all other cases A is packed first.
static void gemm_tile(const Product *g, Panel p, int i0, int m, int j0, int n,
                      const float *b_packed) {
    const float *a = g->a + i0 * g->a_row + p.k0 * g->a_col;
    const float *bias = g->e.bias && p.k0 == 0 ? g->e.bias + p.n0 + j0 : NULL;
    float *c = g->c + i0 * g->ldc + p.n0 + j0, *a_packed = gemm_memory(0, MC * KC);
    int add = g->add == ADD || p.k0 > 0;
    int in_place = !gemm_bf16 && g->a_col == 1 ? m / MR * MR : 0; // rows that are not packed
    if (g->e.sums && p.n0 + j0 == 0) gemm_add_sums(g, i0, m, p.k0, p.k);
    b_packed += (size_t)j0 * p.k;
    gemm_pack_operand(a_packed, a + in_place * g->a_row, g->a_row, g->a_col, m - in_place, p.k, MR);
    for (int j = 0; j < n; j += NR)
        for (int i = 0; i < m; i += MR) {
            int packed = i >= in_place;
            const float *rows = packed ? a_packed + (i - in_place) * (size_t)p.k : a + i * g->a_row;
            gemm_micro(p.k, rows, packed ? 1 : g->a_row, packed ? (size_t)MR : g->a_col,
                       b_packed + j * (size_t)p.k, c + i * g->ldc + j, g->ldc, min_int(MR, m - i),
                       min_int(NR, n - j), bias ? bias + j : NULL, add);
        }
    gemm_finish_tile(g, p, i0, m, j0, n);
}

// All blocks in one thread.
static void gemm_alone(const Product *g, int kc, float *b_packed) {
    for (int n0 = 0; n0 < g->N; n0 += NC)
        for (int k0 = 0; k0 < g->K; k0 += kc) {
            Panel p = {n0, min_int(NC, g->N - n0), k0, min_int(kc, g->K - k0)};
            gemm_pack_b(g, p, 0, p.n, b_packed);
            for (int i = 0; i < g->M; i += MC)
                gemm_tile(g, p, i, min_int(MC, g->M - i), 0, p.n, b_packed);
        }
}

#ifdef _OPENMP
// The same with all threads. They pack a panel of B together, then take tiles of C.
static void gemm_shared(const Product *g, int kc, float *b_packed) {
    int shares = 4 * omp_get_max_threads(), columns = 4 * NR; // some cores may be slower
    int rows = min_int(MC, (g->M + shares * MR - 1) / (shares * MR) * MR);
#pragma omp parallel
    for (int n0 = 0; n0 < g->N; n0 += NC)
        for (int k0 = 0; k0 < g->K; k0 += kc) {
            Panel p = {n0, min_int(NC, g->N - n0), k0, min_int(kc, g->K - k0)};
#pragma omp for
            for (int j = 0; j < p.n; j += columns)
                gemm_pack_b(g, p, j, min_int(columns, p.n - j), b_packed);
#pragma omp for collapse(2) schedule(dynamic)
            for (int i = 0; i < g->M; i += rows)
                for (int j = 0; j < p.n; j += NT)
                    gemm_tile(g, p, i, min_int(rows, g->M - i), j, min_int(NT, p.n - j),
                              b_packed);
        }
}
#endif

// See loopmdm.c. Attention calls it inside a parallel region: then one thread does all.
static void gemm(int product, int M, int N, int K, const float *a, int lda, const float *b, int ldb,
                 float *c, int ldc, int add, Epilogue e) {
    size_t a_row = product == ATB ? 1 : lda, a_col = product == ATB ? lda : 1;
    size_t b_row = product == ABT ? 1 : ldb, b_col = product == ABT ? ldb : 1;
    Product g = {M, N, K, a, b, a_row, a_col, b_row, b_col, (size_t)ldc, c, add, e};
#ifdef _OPENMP
    int shared = omp_get_level() == 0 && WORTH((size_t)M * N * K / 16);
#else
    int shared = 0;
    (void)shared; // unused if there is no bf16 either
#endif
#ifdef TARGET
    if (bf16_kernel) {
        bf16_product(&g, shared);
        return;
    }
#endif
    int steps = (K + KC - 1) / KC, kc = (K + steps - 1) / steps; // K in steps of one size
    float *b_packed = gemm_memory(1, (size_t)(min_int(N, NC) + NR) * kc);
#ifdef _OPENMP
    if (shared) {
        gemm_shared(&g, kc, b_packed);
        return;
    }
#endif
    gemm_alone(&g, kc, b_packed);
}
