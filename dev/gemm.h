/*
The matrix product and the exponential that loopmdm.c uses if it finds this file. They compute the
same as the plain versions in loopmdm.c, 10 to 50 times as fast.

    gemm(product, M, N, K, a, lda, b, ldb, c, ldc, bias, add)       c = or += a b + bias

The algorithm is that of GotoBLAS and BLIS: five loops around a microkernel. Each loop keeps one
piece of the operands in one cache.

    N in steps of NC
      K in steps of KC      a panel of B, packed: KC x NC, in L3; threads pack it together
        tiles MC x NT         of C: MC x KC of A stay in the L2 of the thread that takes the tile
          N in steps of NR      KC x NR of B, in L2 where L1 is too small
            M in steps of MR      the microkernel: MR x NR sums stay in registers
              K                     one column of A times one row of B

               NR               "Packed" means: in the order in which the microkernel reads. First
        B  k > |||||            MR values of A, then the next MR; first NR values of B, then the
    A        +-------+          next NR. Rows past the end are zero.
   MR -----> | C tile|
    ^ k      +-------+          GCC's vector extension becomes AVX-512, AVX2, SSE or NEON code.

loopmdm.c includes this file. It has die(), min_int(), OMP, WORTH and the names AB, ABT, ATB, ADD.
*/
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__)
enum { VECTOR = 16, MR = 12 }; // floats in a vector; MR x 2 vectors of sums fill the registers
#elif defined(__AVX__)
enum { VECTOR = 8, MR = 6 };
#elif defined(__aarch64__)
enum { VECTOR = 4, MR = 12 };
#else
enum { VECTOR = 4, MR = 6 };
#endif
enum { NR = 2 * VECTOR, KC = 512, MC = 48, NT = 512, NC = 4096 };
typedef float vec __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float)),
                                 may_alias));

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

// Packs src (n,k) with strides into panels (k,width): width values side by side, the last panel
// padded with zeros.
static inline void gemm_pack(float *dst, const float *src, size_t stride_n, size_t stride_k,
                             int n, int k, int width) {
    enum { LINE = 16, AHEAD = 8 };
    int whole = n / width * width;
    if (stride_n == 1) {
        // n is the dense dimension. No processor guesses these strides, so we prefetch.
        for (int p = 0; p < k; p++) {
            const float *row = src + p * stride_k;
            for (int j = 0; j < whole; j += LINE) __builtin_prefetch(row + AHEAD * stride_k + j);
            for (int j = 0; j < whole; j += width)
                memcpy(dst + (size_t)j * k + p * width, row + j, width * sizeof(float));
        }
    } else {
        // It reads a cache line along k, for each of the width rows.
        for (int j = 0; j < whole; j += width)
            for (int p0 = 0; p0 < k; p0 += LINE)
                for (int i = 0; i < width; i++) {
                    const float *row = src + (j + i) * stride_n;
                    float *panel = dst + (size_t)j * k + i;
                    int end = min_int(p0 + LINE, k);
                    for (int p = p0; p < end; p++) panel[p * width] = row[p * stride_k];
                }
    }
    if (whole == n) return;
    float *last = dst + (size_t)whole * k;
    memset(last, 0, (size_t)k * width * sizeof(float));
    for (int p = 0; p < k; p++)
        for (int i = whole; i < n; i++)
            last[p * width + i - whole] = src[i * stride_n + p * stride_k];
}

// sum (MR, vectors x VECTOR) = a (MR,k) b (k,NR). It uses one vector of the two where no more
// columns are wanted. This function and the next are always inlined: attention's sums are short,
// and calls would take a tenth of its time.
__attribute__((always_inline))
static inline void gemm_sums(vec sum[MR][2], int vectors, int k, const float *a, size_t a_row,
                             size_t a_col, const float *b) {
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int p = 0; p < k; p++, a += a_col, b += NR) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VECTOR);
        for (int i = 0; i < MR; i++) {
            sum[i][0] += a[i * a_row] * b0;
            if (vectors == 2) sum[i][1] += a[i * a_row] * b1;
        }
    }
}

// c (m,n) = or += a (MR,k) b (k,NR) + bias (n). b is packed; a[i*a_row + p*a_col] is packed or not.
// At the edges m < MR, n < NR.
__attribute__((always_inline))
static inline void gemm_micro(int k, const float *a, size_t a_row, size_t a_col, const float *b,
                              float *c, size_t ldc, int m, int n, const float *bias, int add) {
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1); // it comes during the sums
    vec sum[MR][2];
    if (n > VECTOR) gemm_sums(sum, 2, k, a, a_row, a_col, b);
    else gemm_sums(sum, 1, k, a, a_row, a_col, b);

    if (m == MR && n % VECTOR == 0) {
        // A whole tile. Without variable indices the sums never leave their registers.
        for (int v = 0; v < 2 && v * VECTOR < n; v++)
            for (int i = 0; i < MR; i++) {
                vec r = sum[i][v], *out = (vec *)(c + i * ldc + v * VECTOR);
                if (bias) r += *(const vec *)(bias + v * VECTOR);
                if (add) r += *out;
                *out = r;
            }
        return;
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float r = sum[i][j / VECTOR][j % VECTOR] + (bias ? bias[j] : 0);
            float *out = c + i * ldc + j;
            *out = add ? *out + r : r;
        }
}

// c (M,N), rows ldc apart, = or += a b + bias, in one thread; M <= MC. b is packed. With pack a is
// packed first. Otherwise it is read where it lies, except a last panel of fewer than MR rows.
static void gemm_tile(int M, int N, int K, const float *a, size_t a_row, size_t a_col, int pack,
                      const float *b_packed, float *c, size_t ldc, const float *bias, int add) {
    int in_place = pack ? 0 : M / MR * MR; // rows of a that are read where they lie
    float *a_packed = gemm_memory(0, MC * KC);
    gemm_pack(a_packed, a + in_place * a_row, a_row, a_col, M - in_place, K, MR);
    for (int j = 0; j < N; j += NR)
        for (int i = 0; i < M; i += MR) {
            int packed = i >= in_place;
            const float *rows = packed ? a_packed + (size_t)(i - in_place) * K : a + i * a_row;
            gemm_micro(K, rows, packed ? 1 : a_row, packed ? (size_t)MR : a_col,
                       b_packed + (size_t)j * K, c + i * ldc + j, ldc, min_int(MR, M - i),
                       min_int(NR, N - j), bias ? bias + j : NULL, add);
        }
}

// c = or += a b + bias in one thread. Element (i,p) of a is a[i*a_row + p*a_col], likewise b.
static void gemm_alone(int M, int N, int K, const float *a, size_t a_row, size_t a_col,
                       const float *b, size_t b_row, size_t b_col, float *c, size_t ldc,
                       const float *bias, int add) {
    int blocks = (K + KC - 1) / KC, kc = (K + blocks - 1) / blocks; // K in blocks of one size
    float *b_packed = gemm_memory(1, (size_t)(min_int(N, NC) + NR) * kc);
    for (int n0 = 0; n0 < N; n0 += NC)
        for (int k0 = 0; k0 < K; k0 += kc) {
            int n = min_int(NC, N - n0), k = min_int(kc, K - k0);
            const float *bias_n = bias && k0 == 0 ? bias + n0 : NULL;
            gemm_pack(b_packed, b + k0 * b_row + n0 * b_col, b_col, b_row, n, k, NR);
            for (int i = 0; i < M; i += MC)
                gemm_tile(min_int(MC, M - i), n, k, a + i * a_row + k0 * a_col, a_row, a_col,
                          a_col != 1, b_packed, c + i * ldc + n0, ldc, bias_n,
                          add == ADD || k0 > 0);
        }
}

#ifdef _OPENMP
// The same with all threads. They pack a panel of B together, then take tiles of C.
static void gemm_shared(int M, int N, int K, const float *a, size_t a_row, size_t a_col,
                        const float *b, size_t b_row, size_t b_col, float *c, size_t ldc,
                        const float *bias, int add) {
    int tile = min_int(MC, (M + 8 * MR - 1) / (8 * MR) * MR); // at least 8 tiles to share
    int blocks = (K + KC - 1) / KC, kc = (K + blocks - 1) / blocks;
    float *b_packed = gemm_memory(1, (size_t)(min_int(N, NC) + NR) * kc);
#pragma omp parallel
    for (int n0 = 0; n0 < N; n0 += NC)
        for (int k0 = 0; k0 < K; k0 += kc) {
            int n = min_int(NC, N - n0), k = min_int(kc, K - k0);
#pragma omp for
            for (int j = 0; j < n; j += 4 * NR)
                gemm_pack(b_packed + (size_t)j * k, b + k0 * b_row + (n0 + j) * b_col, b_col, b_row,
                          min_int(4 * NR, n - j), k, NR);
#pragma omp for collapse(2) schedule(dynamic)
            for (int i = 0; i < M; i += tile)
                for (int j = 0; j < n; j += NT)
                    gemm_tile(min_int(tile, M - i), min_int(NT, n - j), k,
                              a + i * a_row + k0 * a_col, a_row, a_col, a_col != 1,
                              b_packed + (size_t)j * k, c + i * ldc + n0 + j, ldc,
                              bias && k0 == 0 ? bias + n0 + j : NULL, add == ADD || k0 > 0);
        }
}
#endif

// See loopmdm.c. Attention calls it inside a parallel region: then one thread does all.
static void gemm(int product, int M, int N, int K, const float *a, int lda, const float *b, int ldb,
                 float *c, int ldc, const float *bias, int add) {
    size_t a_row = product == ATB ? 1 : lda, a_col = product == ATB ? lda : 1;
    size_t b_row = product == ABT ? 1 : ldb, b_col = product == ABT ? ldb : 1;
#ifdef _OPENMP
    if (omp_get_level() == 0 && WORTH((size_t)M * N * K / 16)) {
        gemm_shared(M, N, K, a, a_row, a_col, b, b_row, b_col, c, ldc, bias, add);
        return;
    }
#endif
    gemm_alone(M, N, K, a, a_row, a_col, b, b_row, b_col, c, ldc, bias, add);
}
