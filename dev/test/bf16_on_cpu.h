// The instructions of AMX and AVX512-BF16 that dev/gemm_bf16.h uses, as functions: so any computer
// can check its kernels. gemm_bf16.h includes this with -DBF16_ON_CPU. Sums have another order than
// in the processor, so the last bits differ.

static float bf16_value(uint32_t half) {
    union { uint32_t u; float f; } bits = {half << 16};
    return bits.f;
}

static float add_product_of_pairs(float sum, uint32_t x, uint32_t y) {
    sum += bf16_value(x & 0xffff) * bf16_value(y & 0xffff);
    return sum + bf16_value(x >> 16) * bf16_value(y >> 16);
}

// ---- AMX: eight tiles of 16 rows of 64 bytes ----

static __thread uint32_t amx_tiles[8][16][16];
static __thread int amx_configured;

static void _tile_loadconfig(const void *shape) {
    const uint8_t *bytes = (const uint8_t *)shape;
    amx_configured = bytes[0] == 1;
    for (int i = 0; i < 8; i++)
        if (bytes[16 + 2 * i] != 64 || bytes[48 + i] != 16) amx_configured = 0;
}
static void _tile_loadd(int tile, const void *from, size_t stride) {
    if (!amx_configured) __builtin_trap();
    for (int i = 0; i < 16; i++) memcpy(amx_tiles[tile][i], (const char *)from + i * stride, 64);
}
static void _tile_zero(int tile) {
    if (!amx_configured) __builtin_trap();
    memset(amx_tiles[tile], 0, sizeof amx_tiles[tile]);
}
static void _tile_stored(int tile, void *to, size_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, amx_tiles[tile][i], 64);
}
static void _tile_dpbf16ps(int c, int a, int b) {
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < 16; p++)
            for (int j = 0; j < 16; j++) {
                float sum;
                memcpy(&sum, &amx_tiles[c][i][j], 4);
                sum = add_product_of_pairs(sum, amx_tiles[a][i][p], amx_tiles[b][p][j]);
                memcpy(&amx_tiles[c][i][j], &sum, 4);
            }
}

// ---- AVX512-BF16: vectors of 64 bytes ----

static uint32_t to_bf16(float x);

typedef float __m512 __attribute__((vector_size(64)));
typedef uint32_t __m512i __attribute__((vector_size(64)));
typedef __m512i __m512bh;

// Macros: how such vectors go into functions depends on the compiler's options.
#define VECTOR_FROM(type, from) ({ type x_; memcpy(&x_, from, 64); x_; })
#define _mm512_loadu_ps(from) VECTOR_FROM(__m512, from)
#define _mm512_loadu_si512(from) VECTOR_FROM(__m512i, from)
#define _mm512_storeu_ps(to, x) memcpy(to, &(x), 64)
#define _mm512_set1_epi32(x) ((__m512i){0} + (uint32_t)(x))
#define _mm512_dpbf16_ps(sum, x, y) ({ \
    __m512 s_ = sum; \
    for (int i_ = 0; i_ < 16; i_++) s_[i_] = add_product_of_pairs(s_[i_], (x)[i_], (y)[i_]); \
    s_; })

// What packing uses: floats that a mask leaves out are not read.
typedef uint16_t halves __attribute__((vector_size(64)));
#define _mm512_storeu_si512(to, x) memcpy(to, &(x), 64)
#define _mm512_maskz_loadu_ps(mask, from) ({ \
    __m512 x_ = {0}; \
    for (int i_ = 0; i_ < 16; i_++) \
        if ((uint16_t)(mask) >> i_ & 1) x_[i_] = (from)[i_]; \
    x_; })
#define _mm512_cvtne2ps_pbh(high, low) ({ \
    halves h_ = {0}; \
    for (int i_ = 0; i_ < 16; i_++) { \
        h_[i_] = (uint16_t)to_bf16((low)[i_]); \
        h_[16 + i_] = (uint16_t)to_bf16((high)[i_]); \
    } \
    (__m512i)h_; })
#define _mm512_permutexvar_epi16(places, x) ({ \
    halves from_ = (halves)(x), at_ = (halves)(places), to_ = {0}; \
    for (int i_ = 0; i_ < 32; i_++) to_[i_] = from_[at_[i_]]; \
    (__m512i)to_; })
