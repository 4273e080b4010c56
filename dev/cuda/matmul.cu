/*
The matrix product in six steps: out (M,OC) = inp (M,C) weight^T + bias, as a linear layer's
forward does it.

    matmul [VERSION]     checks all versions, or one, against loopmdm.c. On a GPU it measures them
                         too. README.md says how to build it

inp and weight are floatX, as in loopmdm.cu: bf16 when built with -DBF16=1, else float. Sums, bias
and out are float. Rows of out are ld apart.
*/
#include "dev/cuda/study.h"

// -------------------------------------------------------------------------------------------------
// 1. A thread for each result
//
// Simple, and right. But every FLOP costs a load: a thread reads 2 C numbers for its 2 C FLOPs. The
// 32 lanes of a warp have 32 neighbouring results of one row. Of inp they read one number together.
// Of weight they read 32 numbers from 32 different rows, each in its own line of memory.
// Limit: the lines that the L1 cache can deliver, 32 of them for 32 multiplications.

// Grid and block: one thread for each of the M * OC results, in order.
__global__ void matmul_kernel1(float *out, const floatX *inp, const floatX *weight,
                               const float *bias, int M, int C, int OC, int ld) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)M * OC) return;
    size_t i = n / OC, j = n % OC;
    float sum = bias[j];
    for (int k = 0; k < C; k++) sum += (float)inp[i * C + k] * (float)weight[j * C + k];
    out[i * ld + j] = sum;
}

static void matmul1(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    int grid = blocks((size_t)M * OC, THREADS);
    matmul_kernel1<<<grid, THREADS>>>(out, inp, weight, bias, M, C, OC, ld);
    launched("matmul1");
}

// -------------------------------------------------------------------------------------------------
// 2. Tiles in shared memory
//
// A block makes 32 x 32 results together. For 32 values of k at a time, its threads bring both
// tiles into shared memory. Each thread brings one number, and neighbours read neighbours. Then
// each number is used 32 times, so that global memory has 32 times less to do. The column added to
// a row (33 floats) puts what a warp reads of b, one column, into 32 different banks.
// Limit: shared memory. Each multiplication still needs two loads from there. An SM can load 32
// floats in a clock, so at most 16 multiply-adds: an eighth of what an H100's SM can do, a quarter
// of an A100's.

enum { SIDE = 32 };

// Grid: (rows / SIDE, columns / SIDE). Block: (SIDE, SIDE), a thread for each result.
__global__ void __launch_bounds__(SIDE * SIDE)
matmul_kernel2(float *out, const floatX *inp, const floatX *weight, const float *bias, int M, int C,
               int OC, int ld) {
    __shared__ float a[SIDE][SIDE + 1];
    __shared__ float b[SIDE][SIDE + 1];
    int x = threadIdx.x, y = threadIdx.y, i0 = blockIdx.x * SIDE, j0 = blockIdx.y * SIDE;
    float sum = 0;
    for (int k0 = 0; k0 < C; k0 += SIDE) {
        bool in_a = i0 + y < M && k0 + x < C, in_b = j0 + y < OC && k0 + x < C;
        a[y][x] = in_a ? (float)inp[(size_t)(i0 + y) * C + k0 + x] : 0;
        b[y][x] = in_b ? (float)weight[(size_t)(j0 + y) * C + k0 + x] : 0;
        __syncthreads(); // the tiles are complete
        for (int k = 0; k < SIDE; k++) sum += a[y][k] * b[x][k];
        __syncthreads(); // all are done with them
    }
    if (i0 + y < M && j0 + x < OC) out[(size_t)(i0 + y) * ld + j0 + x] = sum + bias[j0 + x];
}

static void matmul2(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    dim3 grid(blocks(M, SIDE), blocks(OC, SIDE)), block(SIDE, SIDE);
    matmul_kernel2<<<grid, block>>>(out, inp, weight, bias, M, C, OC, ld);
    launched("matmul2");
}

// -------------------------------------------------------------------------------------------------
// 3. Tiles in registers
//
// A thread makes 8 x 8 results. For each k it loads 8 + 8 numbers into registers and multiplies
// each with each: 64 multiply-adds for 16 loads, where version 2 has 2 loads for each. In shared
// memory k is a tile's row, so that 4 numbers come with one load. A block of 256 threads makes 128
// x 128 results, and global memory has 4 times less to do again.
// Limit: the multiply-adds of the SM's fp32 lanes, and the time in which a block waits for its next
// tiles, because none is on its way yet.

enum { BLOCK = 128, STEP = 16, EACH = 8 };

// A thread's e-th row or column: two groups of 4 neighbours. So the lanes of a warp read one
// contiguous stretch.
__device__ static inline int place_of(int thread, int e) {
    return e / 4 * (BLOCK / 2) + thread * 4 + e % 4;
}

// tile (STEP, BLOCK) = src (BLOCK,C) transposed, from column k0 on. What is not there is zero.
__device__ static inline void load_transposed(float tile[STEP][BLOCK + 4], const floatX *src,
                                              int rows, int C, int k0) {
    for (int n = threadIdx.x; n < BLOCK * STEP; n += THREADS) {
        int i = n / STEP, k = n % STEP;
        tile[k][i] = i < rows && k0 + k < C ? (float)src[(size_t)i * C + k0 + k] : 0;
    }
}

// Grid: (rows / BLOCK, columns / BLOCK). Block: THREADS threads with EACH x EACH results each.
__global__ void __launch_bounds__(THREADS)
matmul_kernel3(float *out, const floatX *inp, const floatX *weight, const float *bias, int M, int C,
               int OC, int ld) {
    __shared__ __align__(16) float at[STEP][BLOCK + 4];
    __shared__ __align__(16) float bt[STEP][BLOCK + 4];
    int i0 = blockIdx.x * BLOCK, j0 = blockIdx.y * BLOCK;
    int y = threadIdx.x / 16, x = threadIdx.x % 16;
    float sum[EACH][EACH] = {};
    for (int k0 = 0; k0 < C; k0 += STEP) {
        load_transposed(at, inp + (size_t)i0 * C, M - i0, C, k0);
        load_transposed(bt, weight + (size_t)j0 * C, OC - j0, C, k0);
        __syncthreads(); // the tiles are complete
#pragma unroll
        for (int k = 0; k < STEP; k++) {
            float a[EACH], b[EACH];
#pragma unroll
            for (int e = 0; e < EACH; e += 4) {
                *(float4 *)(a + e) = *(const float4 *)&at[k][place_of(y, e)];
                *(float4 *)(b + e) = *(const float4 *)&bt[k][place_of(x, e)];
            }
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] += a[i] * b[j];
        }
        __syncthreads(); // all are done with them
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int row = i0 + place_of(y, i), column = j0 + place_of(x, j);
            if (row < M && column < OC) out[(size_t)row * ld + column] = sum[i][j] + bias[column];
        }
}

static void matmul3(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    dim3 grid(blocks(M, BLOCK), blocks(OC, BLOCK));
    matmul_kernel3<<<grid, THREADS>>>(out, inp, weight, bias, M, C, OC, ld);
    launched("matmul3");
}

// -------------------------------------------------------------------------------------------------
// 4. Tensor cores
//
// A warp multiplies 16 x 16 by 16 x 8 in one instruction, 2048 multiply-adds. A block is divided as
// in loopmdm.cu: 128 x 128 results, 8 warps, 64 x 32 for each. Fragments come straight from shared
// memory: each lane fetches its pairs of neighbours where they lie. (mma_16x8x16 in loopmdm.cu
// describes the layout.) PAD puts the 32 pairs of one load into 32 banks.
// Limit: waiting. A block loads its tiles, waits for all of them, multiplies, and only then asks
// for more. Tensor cores rest meanwhile. And instructions: 24 loads from shared memory, with their
// addresses, for 16 products.
// In fp32 the product is made of shuffles and is slow. What counts there is that it is right.

// The pair (row,column), (row,column+1) of a tile, as mma_16x8x16 wants it
__device__ static inline void load_pair(Word *to, const floatX *tile, int row, int column) {
    const Word *from = (const Word *)(tile + row * (DEPTH + PAD) + column);
    for (int w = 0; w < WORDS; w++) to[w] = from[w];
}

// Grid: (rows / TILE, columns / TILE). Block: THREADS threads.
__global__ void __launch_bounds__(THREADS)
matmul_kernel4(float *out, const floatX *inp, const floatX *weight, const float *bias, int M, int C,
               int OC, int ld) {
    __shared__ __align__(16) floatX at[TILE_SIZE];
    __shared__ __align__(16) floatX bt[TILE_SIZE];
    int i0 = blockIdx.x * TILE, j0 = blockIdx.y * TILE;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
    int i_warp = warp / 4 * 64, j_warp = warp % 4 * 32;
    float sum[4][4][4] = {};
    for (int k0 = 0; k0 < C; k0 += DEPTH) {
        load_tile<TILE, DEPTH>(at, inp + (size_t)i0 * C + k0, C, M - i0, C - k0);
        load_tile<TILE, DEPTH>(bt, weight + (size_t)j0 * C + k0, C, OC - j0, C - k0);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads(); // the tiles are complete
        for (int k = 0; k < DEPTH; k += 16) {
            int i_lane = i_warp + g, j_lane = j_warp + g, k_lane = k + 2 * q;
            Word a[4][4 * WORDS], b[4][2 * WORDS];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    int row = i_lane + i * 16 + r % 2 * 8, column = k_lane + r / 2 * 8;
                    load_pair(a[i] + r * WORDS, at, row, column);
                }
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    load_pair(b[j] + r * WORDS, bt, j_lane + j * 8, k_lane + r * 8);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_16x8x16(sum[i][j], a[i], b[j]);
        }
        __syncthreads(); // all are done with them
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = i0 + i_warp + i * 16 + g + e / 2 * 8;
                int column = j0 + j_warp + j * 8 + 2 * q + e % 2;
                float *to = out + (size_t)row * ld + column;
                if (row < M && column < OC) *to = sum[i][j][e] + bias[column];
            }
}

static void matmul4(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    dim3 grid(blocks(M, TILE), blocks(OC, TILE));
    matmul_kernel4<<<grid, THREADS>>>(out, inp, weight, bias, M, C, OC, ld);
    launched("matmul4");
}

// -------------------------------------------------------------------------------------------------
// 5. The kernel of loopmdm.cu
//
// Two changes. Tiles lie in a ring: while one is multiplied, the next are on their way, and one
// barrier for a step is enough. ldmatrix fetches four 8 x 8 matrices at once: the same bytes with a
// quarter of the instructions, 6 loads for 16 products.
// Limit: on an H100 the bandwidth of shared memory, on an A100 that and the tensor cores alike.
// README.md counts it out.

static void matmul5(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    Store<float> store = {out, ld, bias};
    multiply_mma<false, false>(store, inp, C, weight, C, M, OC, C, C);
}

// -------------------------------------------------------------------------------------------------
// 6. The kernel of dev/hopper.h, for H100 and H200
//
// wgmma multiplies tiles where they lie in shared memory: no load into registers, and four warps
// share each tile of B. TMA brings the tiles without a thread's help. Two groups of warps take
// turns: one stores its tile while the other multiplies the next.
// Other GPUs run version 5 here, and so do shapes whose rows are no multiple of 16 bytes.

static void matmul6(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                    int C, int OC, int ld) {
    matmul_forward(Store<float>{out, ld, bias}, inp, weight, M, C, OC);
}

// -------------------------------------------------------------------------------------------------
// Checks and times

static const struct {
    const char *name;
    void (*run)(float *out, const floatX *inp, const floatX *weight, const float *bias, int M,
                int C, int OC, int ld);
} versions[] = {
    {"1 naive: a thread for each result", matmul1},
    {"2 tiles in shared memory", matmul2},
    {"3 8 x 8 results in a thread's registers", matmul3},
    {"4 tensor cores", matmul4},
    {"5 loopmdm.cu: ring of tiles, ldmatrix", matmul5},
    {"6 dev/hopper.h: wgmma, TMA", matmul6},
};

typedef struct { const char *name; int M, C, OC; } Case;

// The largest error of the last rows. Sets seconds too, if it is not NULL.
static double error_of(int version, Case c, int rows, double *seconds) {
    int ld = (c.OC + 3) / 4 * 4; // loopmdm.cu stores 2 or 4 neighbours, and reads bias like that
    Array<floatX> inp((size_t)c.M * c.C), weight((size_t)c.OC * c.C);
    Array<float> bias(ld), out((size_t)c.M * ld), right((size_t)rows * c.OC);
    inp.fill_random(1, 1);
    weight.fill_random(2, 1);
    bias.fill_random(3, 1);
    auto launch = [&] {
        versions[version - 1].run(out.gpu, inp.gpu, weight.gpu, bias.gpu, c.M, c.C, c.OC, ld);
    };
    launch();

    size_t first = c.M - rows;
    const float *last_inp = inp.host + first * c.C;
    cpu_matmul_forward(right.host, last_inp, weight.host, bias.host, rows, c.C, c.OC);
    const float *last_out = out.get(first * ld, (size_t)rows * ld);
    if (seconds) *seconds = best_seconds(launch);
    return largest_error(last_out, ld, right.host, rows, c.OC);
}

static void study(int version) {
    // One result; edges in all directions; an odd number of columns; rows that are no multiple of
    // 16 bytes; several steps of k
    static const Case small[] = {
        {"", 1, 2, 1},      {"", 5, 34, 67},    {"", 131, 70, 130},
        {"", 200, 131, 33}, {"", 96, 200, 129}, {"", 300, 136, 512}};
    static const Case large[] = {{"d6", 4096, 288, 1152}, {"d12", 16384, 768, 3072}};
    double error = 0, seconds[2];
    for (Case c : small) error = worse(error, error_of(version, c, c.M, NULL));
    for (int i = 0; ON_GPU && i < 2; i++)
        error = worse(error, error_of(version, large[i], 8, &seconds[i]));
    report(versions[version - 1].name, error, 3e-6); // sums are float everywhere, in another order
    for (int i = 0; ON_GPU && i < 2; i++)
        print_flops(large[i].name, 2.0 * large[i].M * large[i].C * large[i].OC, seconds[i]);
    printf("\n");
}

int main(int argc, char **argv) { return run_versions(argc, argv, COUNT(versions), study); }
