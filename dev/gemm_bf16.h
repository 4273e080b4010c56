/*
Matrix products in bfloat16 (--precision bf16). A bfloat16 is the upper half of a float: it has 8
significant bits. gemm.h rounds both operands while it packs them. The product of two bfloat16 is
exact in a float. Sums are floats, and all tensors in memory stay floats. gemm.h includes this file.

The instructions multiply pairs. A pair is two neighbours along K, in 32 bits. The product of the
pairs (a0,a1) and (b0,b1) is a0 b0 + a1 b1. A tile is 16 x 16 pairs, 1 KiB:

    a tile of A: 16 rows             a tile of B: 16 columns
    row 0   k=0,1  k=2,3  ..         k=0,1   column 0  column 1  ..
    row 1   k=0,1  k=2,3  ..         k=2,3   column 0  column 1  ..
    ..                               ..

In this file a panel is 16 rows of A, or 16 columns of B. Its tiles follow each other along K.

AVX512-BF16 multiplies one pair of A by 16 pairs of B: 256 instructions for two tiles. AMX has eight
registers for tiles, and one instruction multiplies two tiles. Both take subnormal numbers as zero,
as the program does. Without these instructions gemm.h's microkernel multiplies the rounded operands
as floats. Only the order of the sums differs, but it is no faster than fp32.
*/
#if defined(BF16_ON_CPU)
#include "test/bf16_on_cpu.h" // a test: the instructions as functions
#define TARGET(features)
#elif defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
// A function with TARGET may use these instructions, whatever -march says.
#define TARGET(features) __attribute__((target(features)))
#endif

typedef uint32_t pair; // the first value is in the lower half
enum { TILE = 16, PAIRS = TILE * TILE };
enum { DEPTH = 2 * TILE };  // values of a tile along K
enum { SQUARE = 2 * TILE }; // a kernel computes SQUARE x SQUARE of C

// c (32,32) = init + a b. a is two panels, one after the other, and so is b. A panel has so many
// tiles. Rows of init are init_row floats apart: with 0 all rows are the same (a bias).
typedef void Kernel(int tiles, const pair *a, const pair *b, const float *init, size_t init_row,
                    float *c, size_t ldc);
static Kernel *bf16_kernel; // NULL: floats, rounded if gemm_bf16
static int gemm_bf16;       // products are in bfloat16

#ifdef TARGET
// AVX512-BF16 (AMD since Zen 4, some Intel Xeons since 2020): one instruction adds 16 products of
// pairs to 16 sums.
TARGET("avx512f,avx512bf16")
static void bf16_avx512(int tiles, const pair *a, const pair *b, const float *init, size_t init_row,
                        float *c, size_t ldc) {
    enum { ROWS = 8 }; // 8 rows x 2 vectors: 16 of the 32 registers hold sums
    size_t panel = (size_t)tiles * PAIRS;
    for (int i0 = 0; i0 < SQUARE; i0 += ROWS) {
        const pair *rows = a + i0 / TILE * panel + i0 % TILE * TILE, *columns = b;
        __m512 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < 2; v++)
                sum[i][v] = _mm512_loadu_ps(init + (i0 + i) * init_row + v * TILE);

        for (int t = 0; t < tiles; t++, rows += PAIRS)
            for (int p = 0; p < TILE; p++, columns += TILE) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(columns);
                __m512bh right = (__m512bh)_mm512_loadu_si512(columns + panel);
                for (int i = 0; i < ROWS; i++) {
                    __m512bh x = (__m512bh)_mm512_set1_epi32((int)rows[i * TILE + p]);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
                }
            }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < 2; v++)
                _mm512_storeu_ps(c + (i0 + i) * ldc + v * TILE, sum[i][v]);
    }
}

// AMX (Intel Xeons since 2023). Of its eight registers four hold sums, two A, and two B.
TARGET("amx-tile,amx-bf16")
static void bf16_amx(int tiles, const pair *a, const pair *b, const float *init, size_t init_row,
                     float *c, size_t ldc) {
    static __thread int configured;
    if (!configured) { // once in a thread: eight tiles of 16 rows of 64 bytes
        struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape;
        memset(&shape, 0, sizeof shape);
        shape.palette = 1;
        for (int i = 0; i < 8; i++) {
            shape.bytes[i] = 4 * TILE; // of a row
            shape.rows[i] = TILE;
        }
        // GCC 12 thinks that the instruction reads eight bytes. Without this line it would drop
        // the stores into the others.
        __asm__ volatile("" : : "r"(&shape) : "memory");
        _tile_loadconfig(&shape);
        configured = 1;
    }

    // Distances of rows are in bytes. In GCC 11 these are macros without parentheses of their own.
    size_t panel = (size_t)tiles * PAIRS, init_bytes = init_row * 4, c_bytes = ldc * 4;
    const float *lower = init + TILE * init_row;
    _tile_loadd(0, init, init_bytes);
    _tile_loadd(1, (init + TILE), init_bytes);
    _tile_loadd(2, lower, init_bytes);
    _tile_loadd(3, (lower + TILE), init_bytes);
    for (int t = 0; t < tiles; t++, a += PAIRS, b += PAIRS) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, (a + panel), 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, (b + panel), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, (c + TILE), c_bytes);
    _tile_stored(2, (c + TILE * ldc), c_bytes);
    _tile_stored(3, (c + TILE * ldc + TILE), c_bytes);
}
#endif

// From now on products are in bfloat16. Returns what multiplies them.
__attribute__((unused)) // in loopmdm.c by itself
static const char *gemm_use_bf16(void) {
    gemm_bf16 = 1;
#if defined(TARGET) && !defined(BF16_ON_CPU)
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 }; // bits of edx
    // A process may use tiles only after it has asked Linux. Linux refuses if it or a hypervisor
    // does not support them.
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    if (edx & AMX_BF16 && edx & AMX_TILE &&
        !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) {
        bf16_kernel = bf16_amx;
        return "bf16, by AMX";
    }
    if (__builtin_cpu_supports("avx512bf16")) {
        bf16_kernel = bf16_avx512;
        return "bf16, by AVX512-BF16";
    }
#endif
    return "bf16, as rounded floats: no instruction for it is known here, and fp32 is faster";
}

// The nearest bfloat16, in the lower 16 bits; of two equally near ones the even one. 0x7fff carries
// into the upper half if the lower half is above the middle. In the middle it does so only with the
// 1 that an odd upper half adds. NaN stays NaN.
static inline pair to_bf16(float x) {
    union { float f; uint32_t u; } bits = {x};
    uint32_t rounded = bits.u + 0x7fff + (bits.u >> 16 & 1);
    return (x == x ? rounded : bits.u | 0x400000) >> 16;
}

// Rounds n floats to bfloat16, to be multiplied as floats.
static void bf16_round(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        union { uint32_t u; float f; } bits = {to_bf16(x[i]) << 16};
        x[i] = bits.f;
    }
}

// A tile at the edge, filled with zeros: n rows or columns, k values of each.
static void bf16_pack_edge(pair *dst, const float *src, size_t stride_n, size_t stride_k, int n,
                           int k, int is_a) {
    memset(dst, 0, PAIRS * sizeof(pair));
    for (int i = 0; i < min_int(n, TILE); i++)
        for (int p = 0; p < min_int(k, DEPTH); p++) {
            pair value = to_bf16(src[i * stride_n + p * stride_k]);
            dst[is_a ? i * TILE + p / 2 : p / 2 * TILE + i] |= value << p % 2 * 16;
        }
}

// Rounds src (n,k) with strides and packs it into panels. Their number is even, because a kernel
// takes two at a time. n runs along rows of A or columns of B.
static void bf16_pack(pair *dst, const float *src, size_t stride_n, size_t stride_k, int n, int k,
                      int is_a) {
    int panels = (n + SQUARE - 1) / SQUARE * 2;
    for (int i0 = 0; i0 < panels * TILE; i0 += TILE)
        for (int k0 = 0; k0 < k; k0 += DEPTH, dst += PAIRS) {
            const float *from = src + i0 * stride_n + k0 * stride_k;
            if (i0 + TILE > n || k0 + DEPTH > k) {
                bf16_pack_edge(dst, from, stride_n, stride_k, n - i0, k - k0, is_a);
                continue;
            }

            // We read along cache lines. If the tile has the other order, we transpose it after.
            int along_k = stride_k == 1;
            pair turned[PAIRS], *out = along_k == is_a ? dst : turned;
            if (along_k)
                for (int i = 0; i < TILE; i++, from += stride_n)
                    for (int p = 0; p < TILE; p++)
                        out[i * TILE + p] = to_bf16(from[2 * p]) | to_bf16(from[2 * p + 1]) << 16;
            else
                for (int p = 0; p < TILE; p++, from += 2 * stride_k)
                    for (int i = 0; i < TILE; i++)
                        out[p * TILE + i] = to_bf16(from[i]) | to_bf16(from[stride_k + i]) << 16;
            if (out == turned)
                for (int i = 0; i < TILE; i += VECTOR)
                    for (int p = 0; p < TILE; p += VECTOR)
                        transpose((float *)(dst + i * TILE + p), TILE,
                                  (float *)(turned + p * TILE + i), TILE);
        }
}

// c (M,N) = or += a b + bias, of packed operands with so many tiles along K.
static void bf16_tile(int M, int N, int tiles, const pair *a, const pair *b, float *c, size_t ldc,
                      const float *bias, int add) {
    static const float zeros[SQUARE] = {0};
    size_t panel = (size_t)tiles * PAIRS;
    for (int i = 0; i < M; i += SQUARE) // two panels of A stay in L1
        for (int j = 0; j < N; j += SQUARE) {
            const pair *rows = a + i / TILE * panel, *columns = b + j / TILE * panel;
            float *out = c + i * ldc + j;
            int m = min_int(SQUARE, M - i), n = min_int(SQUARE, N - j);
            if (m == SQUARE && n == SQUARE && !(bias && add)) {
                const float *init = add ? out : bias ? bias + j : zeros;
                bf16_kernel(tiles, rows, columns, init, add ? ldc : 0, out, ldc);
                continue;
            }

            // At an edge the kernel works on a copy. Here too the sum begins with what is in c, so
            // that a row's result does not depend on how many rows there are.
            float square[SQUARE * SQUARE] = {0};
            for (int y = 0; y < m; y++)
                for (int x = 0; x < n; x++)
                    square[y * SQUARE + x] =
                        (add ? out[y * ldc + x] : 0) + (bias ? bias[j + x] : 0);
            bf16_kernel(tiles, rows, columns, square, SQUARE, square, SQUARE);
            for (int y = 0; y < m; y++)
                memcpy(out + y * ldc, square + y * SQUARE, n * sizeof(float));
        }
}
