/*
Matrix products in bfloat16 (--precision bf16). A bfloat16 is the upper half of a float: it has 8
significant bits. Both operands are rounded while they are packed. The product of two bfloat16 is
exact in a float. Sums are floats, and all tensors in memory stay floats. gemm.h includes this file.

The instructions multiply pairs. A pair is two neighbours along K, in 32 bits. The product of the
pairs (a0,a1) and (b0,b1) is a0 b0 + a1 b1. A tile is 16 x 16 pairs, 1 KiB:

    a tile of A: 16 rows             a tile of B: 16 columns
    row 0   k=0,1  k=2,3  ..         k=0,1   column 0  column 1  ..
    row 1   k=0,1  k=2,3  ..         k=2,3   column 0  column 1  ..
    ..                               ..

A strip is 16 rows of A, or 16 columns of B: its tiles follow each other along K. A kernel
multiplies two strips of A by two of B (by one at the right edge): 32 x 32 of C.

AVX512-BF16 multiplies one pair of A by 16 pairs of B: 256 instructions for two tiles. AMX has eight
registers for tiles, and one instruction multiplies two tiles. Both take subnormal numbers as zero,
as the program does. Without these instructions gemm.h's microkernel multiplies the rounded operands
as floats. Only the order of the sums differs, but it is no faster than fp32.

AMX is so fast that memory sets the pace. So a thread packs A itself, and B too if C is wide: then
they are in its own cache. Packing reads along cache lines.
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

// At a time a thread takes at most so many values along K, rows of A, and values of a panel of B,
// which is all of B that is packed: 1.5 MiB. A processor with AMX has 2 MiB of L2.
enum { BF16_KC = 768, BF16_MC = 256, BF16_PANEL = 3 << 18 };

// c (32,32) = init + a b. a is two strips, one after the other. b is two strips, or one: then c has
// 16 columns. tiles: the length of a strip. init NULL: zero. Rows of init are init_row floats
// apart; with 0 each row begins with the same values (a bias).
typedef void Kernel(int tiles, int strips, const pair *a, const pair *b, const float *init,
                    size_t init_row, float *c, size_t ldc);
static Kernel *bf16_kernel; // NULL: floats, rounded if gemm_bf16
static int gemm_bf16;       // products are in bfloat16

#ifdef TARGET
// AVX512-BF16 (AMD since Zen 4): one instruction adds 16 products of pairs to 16 sums. Intel has it
// too, but there two fp32 instructions are faster than one of these. `strips` is a constant where
// this is inlined, so all sums stay in registers.
TARGET("avx512f,avx512bf16") __attribute__((always_inline))
static inline void bf16_avx512_strips(int tiles, int strips, const pair *a, const pair *b,
                                      const float *init, size_t init_row, float *c, size_t ldc) {
    enum { ROWS = 8 }; // 8 rows x 2 vectors: 16 of the 32 registers hold sums
    static const float zeros[SQUARE] = {0};
    size_t strip = (size_t)tiles * PAIRS;
    if (!init) init = zeros; // and init_row is 0
    for (int i0 = 0; i0 < SQUARE; i0 += ROWS) {
        const pair *rows = a + i0 / TILE * strip + i0 % TILE * TILE, *columns = b;
        __m512 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < strips; v++)
                sum[i][v] = _mm512_loadu_ps(init + (i0 + i) * init_row + v * TILE);

        for (int t = 0; t < tiles; t++, rows += PAIRS)
            for (int p = 0; p < TILE; p++, columns += TILE) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(columns), right = left;
                if (strips == 2) right = (__m512bh)_mm512_loadu_si512(columns + strip);
                for (int i = 0; i < ROWS; i++) {
                    __m512bh x = (__m512bh)_mm512_set1_epi32((int)rows[i * TILE + p]);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
                    if (strips == 2) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
                }
            }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < strips; v++)
                _mm512_storeu_ps(c + (i0 + i) * ldc + v * TILE, sum[i][v]);
    }
}

TARGET("avx512f,avx512bf16")
static void bf16_avx512(int tiles, int strips, const pair *a, const pair *b, const float *init,
                        size_t init_row, float *c, size_t ldc) {
    if (strips == 2) bf16_avx512_strips(tiles, 2, a, b, init, init_row, c, ldc);
    else bf16_avx512_strips(tiles, 1, a, b, init, init_row, c, ldc);
}

// Gives this thread eight tiles of 16 rows of 64 bytes. Any other library in the process may take
// them away, so it comes before each part of a product.
TARGET("amx-tile")
static void amx_configure(void) {
    struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 4 * TILE; // of a row
        shape.rows[i] = TILE;
    }
    // GCC 12 thinks that the instruction reads eight bytes. Without this line it would drop the
    // stores into the others.
    __asm__ volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
}

// AMX (Intel Xeons since 2023). Of its eight registers four hold sums, two A, and two B.
TARGET("amx-tile,amx-bf16")
static void bf16_amx(int tiles, int strips, const pair *a, const pair *b, const float *init,
                     size_t init_row, float *c, size_t ldc) {
    // Distances of rows are in bytes. In GCC 11 these are macros without parentheses of their own.
    size_t strip = (size_t)tiles * PAIRS, init_bytes = init_row * 4, c_bytes = ldc * 4;
    for (int i = 0; i < SQUARE; i++) { // c comes into the cache during the products
        __builtin_prefetch(c + i * ldc, 1);
        __builtin_prefetch(c + i * ldc + TILE, 1);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (init) {
        const float *lower = init + TILE * init_row;
        _tile_loadd(0, init, init_bytes);
        _tile_loadd(2, lower, init_bytes);
        if (strips == 2) {
            _tile_loadd(1, (init + TILE), init_bytes);
            _tile_loadd(3, (lower + TILE), init_bytes);
        }
    }
    for (int t = 0; t < tiles; t++, a += PAIRS, b += PAIRS) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, (a + strip), 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (strips == 1) continue;
        _tile_loadd(7, (b + strip), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(2, (c + TILE * ldc), c_bytes);
    if (strips == 1) return;
    _tile_stored(1, (c + TILE), c_bytes);
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
    int packs = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
    if (packs && edx & AMX_BF16 && edx & AMX_TILE &&
        !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) {
        bf16_kernel = bf16_amx;
        return "bf16, by AMX";
    }
    if (packs && __builtin_cpu_is("amd")) {
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

#ifdef TARGET
// Rounds n <= TILE rows of A, or columns of B, of k <= DEPTH values to a tile. The rest is zero. If
// cache lines lie along K, two neighbours are a pair. Else a pair has one value from each of two
// lines. `turned`: rows and columns must still change places.
TARGET("avx512f,avx512bw,avx512bf16") __attribute__((always_inline))
static inline void bf16_pack_tile(pair *dst, const float *src, size_t n_apart, size_t k_apart,
                                  int n, int k, int along_k, int is_a) {
    static const uint16_t zip[2 * TILE] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                           21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    pair turned[PAIRS], *out = along_k == is_a ? dst : turned;
    __m512i zipped = _mm512_loadu_si512(zip);
    for (int i = 0; i < TILE; i++) {
        // The two vectors that become row i of the tile, and how many of their floats there are
        const float *first = src + i * (along_k ? n_apart : 2 * k_apart);
        const float *second = first + (along_k ? (size_t)TILE : k_apart);
        int n1 = along_k ? (i < n) * min_int(k, TILE) : (2 * i < k) * n;
        int n2 = along_k ? (i < n) * max_int(0, k - TILE) : (2 * i + 1 < k) * n;
        __m512 x1 = _mm512_maskz_loadu_ps((1u << n1) - 1, first);
        __m512 x2 = _mm512_maskz_loadu_ps((1u << n2) - 1, second);
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(x2, x1); // all of x1, then all of x2
        if (!along_k) rounded = _mm512_permutexvar_epi16(zipped, rounded);
        _mm512_storeu_si512(out + i * TILE, rounded);
    }
    if (out == dst) return;
    for (int i = 0; i < TILE; i += VECTOR)
        for (int p = 0; p < TILE; p += VECTOR)
            transpose((float *)(dst + i * TILE + p), TILE, (float *)(turned + p * TILE + i), TILE);
}

// One operand of a product: n rows of A, or columns of B. One of the two distances is 1.
typedef struct { const float *x; size_t n_apart, k_apart; int is_a; } Operand;

// Packs values k0 .. k0+k of rows, or columns, n0 .. n0+n into strips; of A into an even number.
TARGET("avx512f,avx512bw,avx512bf16")
static void bf16_pack(pair *dst, Operand o, int n0, int n, int k0, int k) {
    int strips = (n + TILE - 1) / TILE, tiles = (k + DEPTH - 1) / DEPTH, along_k = o.k_apart == 1;
    if (o.is_a) strips = (strips + 1) / 2 * 2;
    for (int t = 0; t < strips * tiles; t++) { // in the order in which they lie in memory
        int i = along_k ? t / tiles : t % strips, p = along_k ? t % tiles : t / strips;
        int left_n = max_int(0, n - i * TILE), left_k = k - p * DEPTH;
        pair *to = dst + ((size_t)i * tiles + p) * PAIRS;
        const float *from = o.x + (n0 + i * TILE) * o.n_apart + (k0 + p * DEPTH) * o.k_apart;

        // Whole tiles go by constants: the compiler drops what it knows.
        if (left_n < TILE || left_k < DEPTH)
            bf16_pack_tile(to, from, o.n_apart, o.k_apart, min_int(TILE, left_n),
                           min_int(DEPTH, left_k), along_k, o.is_a);
        else if (along_k && o.is_a) bf16_pack_tile(to, from, o.n_apart, 1, TILE, DEPTH, 1, 1);
        else if (along_k) bf16_pack_tile(to, from, o.n_apart, 1, TILE, DEPTH, 1, 0);
        else if (o.is_a) bf16_pack_tile(to, from, 1, o.k_apart, TILE, DEPTH, 0, 1);
        else bf16_pack_tile(to, from, 1, o.k_apart, TILE, DEPTH, 0, 0);
    }
}

// c (m,n) = or += a b + bias, of m, n <= SQUARE
static void bf16_square(int m, int n, int tiles, const pair *a, const pair *b, float *c, size_t ldc,
                        const float *bias, int add) {
    int strips = (n + TILE - 1) / TILE;
    if (m == SQUARE && n % TILE == 0 && !(bias && add)) {
        bf16_kernel(tiles, strips, a, b, add ? c : bias, add ? ldc : 0, c, ldc);
        return;
    }

    // At an edge the kernel works on a copy. Here too the sum begins with what is in c, so that a
    // row's result does not depend on how many rows there are.
    float square[SQUARE * SQUARE] = {0};
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            square[i * SQUARE + j] = (add ? c[i * ldc + j] : 0) + (bias ? bias[j] : 0);
    bf16_kernel(tiles, strips, a, b, square, SQUARE, square, SQUARE);
    for (int i = 0; i < m; i++) memcpy(c + i * ldc, square + i * SQUARE, n * sizeof(float));
}

// Rows i0 .. i0+m of c, in the columns of the panel p of B, in one thread. m <= BF16_MC.
static void bf16_rows(const Product *g, Panel p, int i0, int m, const pair *b_packed) {
    Operand a = {g->a, g->a_row, g->a_col, 1};
    int tiles = (p.k + DEPTH - 1) / DEPTH, add = g->add == ADD || p.k0 > 0;
    size_t strip = (size_t)tiles * PAIRS;
    const float *bias = g->e.bias && p.k0 == 0 ? g->e.bias + p.n0 : NULL;
    float *c = g->c + i0 * g->ldc + p.n0;
    pair *a_packed = (pair *)gemm_memory(0, BF16_MC * BF16_KC / 2);
    if (g->e.sums && p.n0 == 0) gemm_add_sums(g, i0, m, p.k0, p.k);
    bf16_pack(a_packed, a, i0, m, p.k0, p.k);
    if (bf16_kernel == bf16_amx) amx_configure();
    for (int i = 0; i < m; i += SQUARE) // two strips of A come again and again, if possible from L1
        for (int j = 0; j < p.n; j += SQUARE)
            bf16_square(min_int(SQUARE, m - i), min_int(SQUARE, p.n - j), tiles,
                        a_packed + i / TILE * strip, b_packed + j / TILE * strip,
                        c + i * g->ldc + j, g->ldc, bias ? bias + j : NULL, add);
    gemm_finish_tile(g, p, i0, m, 0, p.n);
}

// Columns n0 .. n0+n of c, in one thread
static void bf16_columns(const Product *g, int n0, int n, int kc) {
    Operand b = {g->b, g->b_col, g->b_row, 0};
    pair *packed = (pair *)gemm_memory(1, (size_t)(n + SQUARE) * kc / 2);
    for (int k0 = 0; k0 < g->K; k0 += kc) {
        Panel p = {n0, n, k0, min_int(kc, g->K - k0)};
        bf16_pack(packed, b, n0, n, k0, p.k);
        for (int i = 0; i < g->M; i += BF16_MC)
            bf16_rows(g, p, i, min_int(BF16_MC, g->M - i), packed);
    }
}

// n in so many equal parts: the size of one, rounded up to a multiple
static int size_of_part(int n, int parts, int multiple) {
    return ((n + parts - 1) / parts + multiple - 1) / multiple * multiple;
}

#ifdef _OPENMP
// With all threads. They pack a panel of B together, then each takes rows.
static void bf16_shared(const Product *g, int nc, int kc) {
    enum { COLUMNS = 4 * SQUARE };
    Operand b = {g->b, g->b_col, g->b_row, 0};
    pair *packed = (pair *)gemm_memory(1, (size_t)(nc + SQUARE) * kc / 2);

    // If a_row is 1, neighbouring rows share cache lines: a part has as many as fit. Else there are
    // four parts a thread and more, because some cores may be slower.
    int threads = omp_get_max_threads(), most = threads * BF16_MC;
    int rows = min_int(2 * SQUARE, size_of_part(g->M, 4 * threads, SQUARE));
    if (g->a_row == 1) rows = size_of_part(g->M, (g->M + most - 1) / most * threads, SQUARE);
#pragma omp parallel
    for (int n0 = 0; n0 < g->N; n0 += nc)
        for (int k0 = 0; k0 < g->K; k0 += kc) {
            Panel p = {n0, min_int(nc, g->N - n0), k0, min_int(kc, g->K - k0)};
            size_t strip = (size_t)((p.k + DEPTH - 1) / DEPTH) * PAIRS;
#pragma omp for schedule(dynamic)
            for (int j = 0; j < p.n; j += COLUMNS)
                bf16_pack(packed + j / TILE * strip, b, n0 + j, min_int(COLUMNS, p.n - j), k0, p.k);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < g->M; i += rows)
                bf16_rows(g, p, i, min_int(rows, g->M - i), packed);
        }
}
#endif

// The product, in one thread or shared by all.
static void bf16_product(const Product *g, int shared) {
    int kc = size_of_part(g->K, (g->K + BF16_KC - 1) / BF16_KC, DEPTH);
    int most = BF16_PANEL / kc / SQUARE * SQUARE;
    int nc = size_of_part(g->N, (g->N + most - 1) / most, SQUARE);
#ifdef _OPENMP
    int threads = omp_get_max_threads();
    if (shared && g->N / threads < g->M) {
        bf16_shared(g, nc, kc);
        return;
    }
    if (shared) { // c is wide: each thread takes columns, and packs A, which is small, by itself
        most *= threads;
        nc = size_of_part(g->N, (g->N + most - 1) / most * threads, SQUARE);
#pragma omp parallel for schedule(dynamic)
        for (int n0 = 0; n0 < g->N; n0 += nc) bf16_columns(g, n0, min_int(nc, g->N - n0), kc);
        return;
    }
#else
    (void)shared;
#endif
    for (int n0 = 0; n0 < g->N; n0 += nc) bf16_columns(g, n0, min_int(nc, g->N - n0), kc);
}
#endif
