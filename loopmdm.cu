/*
LoopMDM on the GPU: the program of loopmdm.c with kernels written by hand, no library but the CUDA runtime.

Read loopmdm.c first. This file takes sections 1 and 2 (configuration, randomness) and 6 to 9 (data, training, sampler, command line) from
there, and has its own 3 to 5: the same functions by the same names in the same order, so that the two can be read side by side. What the
CPU does in passes over memory is joined here: GELU and residual are epilogues of matrix products, cross entropy's two directions one kernel.

    3. layers: kernels, and the functions that launch them
    4. model: device memory, forward, backward
    5. optimizer

Two precisions, chosen when it is built. fp32 is for verification: every product in float. bf16 is for training: what goes into a matrix
product is bfloat16 and goes through tensor cores, sums are float; the residual stream, its gradient, the logits, the gradients of
parameters, and the parameters that AdamW changes stay float. Both run the same kernels, and differ in floatX, in how
a warp multiplies 16 x 8 x 16, and in how many tiles fit into shared memory.

No sum depends on which block came first: there are no atomics. The same seed gives the same bits on the same model of GPU. (How long sums
are split depends on its number of multiprocessors.)

Build with make loopmdm_cuda, or:  nvcc -O3 -std=c++17 -arch=native -DBF16=1 loopmdm.cu -o loopmdm_cuda
Without a GPU make loopmdm_cuda_on_cpu runs the same kernels on the CPU (dev/cuda_on_cpu.h).
*/
#ifdef __CUDACC__
#include <cuda_bf16.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "Ampere (sm_80) or newer is needed: build on the machine with the GPU, or name it: make loopmdm_cuda GPU=sm_90"
#endif
#else
#include "dev/cuda_on_cpu.h"
#endif
#define HOST_DEVICE __host__ __device__
#define LOOPMDM_CU 1
#include "loopmdm.c"

#ifndef BF16
#define BF16 0
#endif
#if BF16
typedef __nv_bfloat16 floatX; // what goes into matrix products
typedef uint32_t Pair;        // two of them side by side, as tensor cores take them
enum { WORDS = 1 };           // Pairs for two numbers
#else
typedef float floatX;
typedef float Pair;
enum { WORDS = 2 };
#endif

// =====================================================================================================================
// 3. Layers, each a forward/backward pair
//
// All tensors are row-major, in the GPU's memory. Where nothing else is said a function has the shapes of its namesake in loopmdm.c.

static void cuda_check(cudaError_t error, const char *what) {
    if (error == cudaErrorNoKernelImageForDevice) die(FAILED, "this program was built for another kind of GPU: remove build/loopmdm_cuda_*, and build it on this machine");
    if (error != cudaSuccess) die(FAILED, "%s: the GPU reports: %s", what, cudaGetErrorString(error));
}

// After every launch. What goes wrong in a kernel itself shows at a later copy; with CUDA_LAUNCH_BLOCKING=1 in the environment, here.
static void launched(const char *what) { cuda_check(cudaGetLastError(), what); }

static void to_device(void *device, const void *host, size_t bytes) { cuda_check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copying to the GPU"); }
static void to_host(void *host, const void *device, size_t bytes) { cuda_check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copying from the GPU"); }

static int blocks(size_t n, int each) { return (int)((n + each - 1) / each); }

enum { WARP = 32, THREADS = 256 };
#define ALL 0xffffffffu // lanes of a warp

// Two neighbours, the first at an even place. What load2 reads must not change while the kernel runs.
__device__ static inline float2 load2(const float *from) { return __ldg((const float2 *)from); }
__device__ static inline void store2(float *to, float x, float y) { *(float2 *)to = make_float2(x, y); }
#if BF16
__device__ static inline float2 load2(const floatX *from) {
    __nv_bfloat162 pair = __ldg((const __nv_bfloat162 *)from);
    return make_float2((float)pair.x, (float)pair.y);
}
__device__ static inline void store2(floatX *to, float x, float y) { *(__nv_bfloat162 *)to = __floats2bfloat162_rn(x, y); }
#endif

template <class T> __device__ static inline T warp_sum(T x) { // in all lanes
    for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}

// Sum, or maximum, over the block, in all threads, taken in the same order everywhere
template <class T> __device__ static inline T block_reduce(T x, int maximum) {
    __shared__ T part[WARP];
    for (int i = WARP / 2; i > 0; i /= 2) {
        T other = __shfl_xor_sync(ALL, x, i);
        x = maximum ? (other > x ? other : x) : x + other;
    }
    __syncthreads(); // part may still be in use by the call before
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    T all = part[0];
    for (int w = 1; w < (int)blockDim.x / WARP; w++) all = maximum ? (part[w] > all ? part[w] : all) : all + part[w];
    return all;
}

// out (n) += the sum of parts (splits, n), in order. A long sum is split over blocks, and put together by this.
__global__ void add_parts_kernel(float *out, const float *parts, size_t n, int splits) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = parts[i];
    for (int z = 1; z < splits; z++) sum += parts[z * n + i];
    out[i] += sum;
}

static void add_parts(float *out, const float *parts, size_t n, int splits) {
    add_parts_kernel<<<blocks(n, THREADS), THREADS>>>(out, parts, n, splits);
    launched("add_parts");
}

// ---- what tensor cores need: three PTX instructions, each behind one small function; dev/cuda_on_cpu.h has them in C ----
//
// A warp multiplies A (16,16) by B (16,8). With lane = 4g + q, its lanes hold pairs of neighbours, in registers:
//   a[0] A(g, 2q..2q+1)      a[1] A(g+8, 2q..)      a[2] A(g, 2q+8..)      a[3] A(g+8, 2q+8..)
//   b[0] B(2q..2q+1, g)      b[1] B(2q+8.., g)
//   d[0], d[1] D(g, 2q..2q+1)      d[2], d[3] D(g+8, 2q..)
// So two of D side by side have the layout of an A: what attention's softmax gives can go straight into the next product.
#if BF16 && defined(__CUDACC__)
__device__ static inline void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2]) { // d += A B, in bf16 with float sums
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 16 bytes from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and gets of each
// matrix 4 bytes of row l / 4; transposed: two bf16 of column l / 4.
__device__ static inline void ldmatrix_x4(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

#elif !BF16 && (defined(__CUDACC__) || defined(CUDA_ON_CPU_NO_MMA_FP32))
// The same product in fp32. No instruction does that, so lanes pass their numbers around.
__device__ static inline void mma_16x8x16(float d[4], const float a[8], const float b[4]) {
    int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int from = 0; from < 4; from++) // lane 4g + from has A(g,k) for these k, lane 4n + from B(k,n)
#pragma unroll
        for (int i = 0; i < 4; i++) {    // k = 2 from + i%2 + i/2*8
            float a0 = __shfl_sync(ALL, a[i / 2 * 4 + i % 2], 4 * g + from), a1 = __shfl_sync(ALL, a[i / 2 * 4 + 2 + i % 2], 4 * g + from);
            float b0 = __shfl_sync(ALL, b[i], 8 * q + from), b1 = __shfl_sync(ALL, b[i], 8 * q + 4 + from);
            d[0] = fmaf(a0, b0, d[0]), d[1] = fmaf(a0, b1, d[1]), d[2] = fmaf(a1, b0, d[2]), d[3] = fmaf(a1, b1, d[3]);
        }
}
#endif

#ifdef __CUDACC__
// Starts copying 16 bytes to shared memory, of which the first so many bytes are read and the others are zero.
__device__ static inline void cp_async_16(void *shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes) : "memory");
}

__device__ static inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); } // those since the last are one group

template <int N> __device__ static inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); } // all but the N newest groups
#endif

// A (16,16) from a tile in shared memory whose rows are ld apart: stored as it is, or TRANS as A^T.
template <bool TRANS> __device__ static inline void load_a(Pair a[4 * WORDS], const floatX *tile, int ld) {
    int lane = threadIdx.x % WARP;
#if BF16
    if (TRANS) ldmatrix_x4_trans(a, tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
    else ldmatrix_x4(a, tile + lane % 16 * ld + lane / 16 * 8);
#else
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) {
            int i = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8 + e;
            a[2 * r + e] = TRANS ? tile[k * ld + i] : tile[i * ld + k];
        }
#endif
}

// Two of B side by side, (16,8) each, from a tile stored as B^T, or TRANS as B
template <bool TRANS> __device__ static inline void load_b(Pair b[4 * WORDS], const floatX *tile, int ld) {
    int lane = threadIdx.x % WARP;
#if BF16
    if (TRANS) ldmatrix_x4_trans(b, tile + lane % 16 * ld + lane / 16 * 8);
    else ldmatrix_x4(b, tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
#else
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) {
            int n = lane / 4 + r / 2 * 8, k = lane % 4 * 2 + r % 2 * 8 + e;
            b[2 * r + e] = TRANS ? tile[k * ld + n] : tile[n * ld + k];
        }
#endif
}

// Two results (16,8) side by side become an A.
__device__ static inline void to_a(Pair a[4 * WORDS], const float left[4], const float right[4]) {
    for (int r = 0; r < 4; r++) {
        const float *from = (r < 2 ? left : right) + r % 2 * 2;
#if BF16
        __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
        memcpy(&a[r], &pair, sizeof pair);
#else
        a[2 * r] = from[0], a[2 * r + 1] = from[1];
#endif
    }
}

enum { PAD = 16 / sizeof(floatX) }; // columns added to tiles in shared memory, so that 8 rows of ldmatrix lie in different banks

// Starts loading a tile (ROWS,COLS) into shared memory, rows COLS + PAD apart, from src with rows ld apart, of which only
// (rows,cols) exist: the others become zero. cp.async moves 16 bytes; where these are not aligned, or cut, elements go one by one.
template <int ROWS, int COLS> __device__ static inline void load_tile(floatX *tile, const floatX *src, size_t ld, int rows, int cols) {
    enum { CHUNK = 16 / sizeof(floatX), PER_ROW = COLS / CHUNK };
    for (int c = threadIdx.x; c < ROWS * PER_ROW; c += blockDim.x) {
        int i = c / PER_ROW, j = c % PER_ROW * CHUNK, n = i < rows ? (cols - j < CHUNK ? cols - j : CHUNK) : 0;
        floatX *to = tile + i * (COLS + PAD) + j;
        const floatX *from = src + i * ld + j;
        if (n <= 0) *(uint4 *)to = make_uint4(0, 0, 0, 0);
        else if ((uintptr_t)from % 16 == 0) cp_async_16(to, from, n * (int)sizeof(floatX));
        else
            for (int e = 0; e < CHUNK; e++) to[e] = e < n ? from[e] : (floatX)0.0f;
    }
}

// ---- GELU, tanh form, for the epilogues below ----

__device__ static inline float gelu(float x) { return x / (1 + expf(-1.5957691216f * (x + 0.044715f * x * x * x))); } // 2 sqrt(2/pi)

__device__ static inline float gelu_gradient(float x) {
    float s = 1 / (1 + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
    return s + x * s * (1 - s) * 1.5957691216f * (1 + 3 * 0.044715f * x * x);
}

// ---- the matrix product that everything goes through ----
//
// C (M,N) = A (M,K) B (K,N). A block of 8 warps makes a tile of 128 x 128, a warp 64 x 32 of it, with all sums in registers. Tiles of A
// and B, 32 deep, come through shared memory; while one is multiplied, the next ones are on their way (STAGES in a ring).
//
//                       N                      A(i,k) is a[i*lda + k], or TRANS_A a[k*lda + i];
//               +---+---+---+---+              B(k,j) is b[j*ldb + k], or TRANS_B b[k*ldb + j].
//     A   K     | 0 | 1 | 2 | 3 |  64          Where k runs fastest tiles are as mma wants them; else ldmatrix transposes.
//    [][][] ->  +---+---+---+---+
//               | 4 | 5 | 6 | 7 |  64          What happens to a result is the epilogue's business: it gets C(i,j) and C(i,j+1), with j
//               +---+---+---+---+              even, and stores them with a bias, through GELU, on top of what is there ..
//                32  32  32  32
enum { TILE = 128, DEPTH = 32, STAGES = BF16 ? 3 : 2, TILE_SIZE = TILE * (DEPTH + PAD) }; // (DEPTH, TILE + PAD) is smaller

template <bool TRANS_A, bool TRANS_B, class Epilogue>
__global__ void __launch_bounds__(THREADS) matmul_kernel(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb, int M, int N, int K, int depth) {
    extern __shared__ __align__(16) floatX tiles[]; // (STAGES, A and B, TILE_SIZE)
    enum { LDA = (TRANS_A ? TILE : DEPTH) + PAD, LDB = (TRANS_B ? TILE : DEPTH) + PAD };
    int i0 = blockIdx.x * TILE, j0 = blockIdx.y * TILE, begin = blockIdx.z * depth, end = min(K, begin + depth); // this block's part of K
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, i_warp = warp / 4 * 64, j_warp = warp % 4 * 32;
    bool needed = i0 + i_warp < M && j0 + j_warp < N; // at the edges a warp may have nothing to do
    float sum[4][4][4] = {};

    auto load = [&](int step) {
        floatX *at = tiles + step % STAGES * 2 * TILE_SIZE, *bt = at + TILE_SIZE;
        int k0 = begin + step * DEPTH;
        if (k0 < end) {
            if (TRANS_A) load_tile<DEPTH, TILE>(at, a + (size_t)k0 * lda + i0, lda, end - k0, M - i0);
            else load_tile<TILE, DEPTH>(at, a + (size_t)i0 * lda + k0, lda, M - i0, end - k0);
            if (TRANS_B) load_tile<DEPTH, TILE>(bt, b + (size_t)k0 * ldb + j0, ldb, end - k0, N - j0);
            else load_tile<TILE, DEPTH>(bt, b + (size_t)j0 * ldb + k0, ldb, N - j0, end - k0);
        }
        cp_async_commit(); // an empty group counts too
    };

    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; begin + step * DEPTH < end; step++) {
        cp_async_wait<STAGES - 2>(); // this step's tiles are there ..
        __syncthreads();             // .. from all threads, and all are done with the step before, whose place the next load takes
        load(step + STAGES - 1);
        if (!needed) continue;
        const floatX *at = tiles + step % STAGES * 2 * TILE_SIZE, *bt = at + TILE_SIZE;
        for (int k = 0; k < DEPTH; k += 16) {
            Pair af[4 * WORDS], bf[2][4 * WORDS];
#pragma unroll
            for (int j = 0; j < 2; j++) load_b<TRANS_B>(bf[j], bt + (TRANS_B ? k * LDB + j_warp + j * 16 : (j_warp + j * 16) * LDB + k), LDB);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_a<TRANS_A>(af, at + (TRANS_A ? k * LDA + i_warp + i * 16 : (i_warp + i * 16) * LDA + k), LDA);
#pragma unroll
                for (int j = 0; j < 4; j++) mma_16x8x16(sum[i][j], af, bf[j / 2] + j % 2 * 2 * WORDS);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = i0 + i_warp + i * 16 + lane / 4 + half * 8, column = j0 + j_warp + j * 8 + lane % 4 * 2;
                if (row < M && column < N) epilogue(row, column, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
            }
}

// Epilogues. ld is the distance of rows, always even; where N is odd, one column beyond it is written.
template <class T> struct Store { // out = C + bias (N), or without
    T *out;
    int ld;
    const float *bias;
    __device__ void operator()(int i, int j, float x, float y) const {
        float2 b = bias ? load2(bias + j) : make_float2(0, 0);
        store2(out + (size_t)i * ld + j, x + b.x, y + b.y);
    }
};
struct StoreGelu { // inp = C + bias, kept for backward; out = gelu(inp)
    floatX *out, *inp;
    int ld;
    const float *bias;
    __device__ void operator()(int i, int j, float x, float y) const {
        float2 b = load2(bias + j);
        x += b.x, y += b.y;
        store2(inp + (size_t)i * ld + j, x, y);
        store2(out + (size_t)i * ld + j, gelu(x), gelu(y));
    }
};
struct StoreGeluBackward { // dinp = C gelu'(inp)
    floatX *dinp;
    const floatX *inp;
    int ld;
    __device__ void operator()(int i, int j, float x, float y) const {
        float2 u = load2(inp + (size_t)i * ld + j);
        store2(dinp + (size_t)i * ld + j, x * gelu_gradient(u.x), y * gelu_gradient(u.y));
    }
};
struct StoreResidual { // out = inp + C + bias
    float *out;
    const float *inp, *bias;
    int ld;
    __device__ void operator()(int i, int j, float x, float y) const {
        float2 u = load2(inp + (size_t)i * ld + j), b = load2(bias + j);
        store2(out + (size_t)i * ld + j, u.x + (x + b.x), u.y + (y + b.y));
    }
};
struct Accumulate { // out += C; or, where K is split over blockIdx.z, parts (z,M,N) = C
    float *out, *parts;
    size_t size;
    int ld;
    __device__ void operator()(int i, int j, float x, float y) const {
        size_t at = (size_t)i * ld + j;
        if (gridDim.z > 1) store2(parts + blockIdx.z * size + at, x, y);
        else store2(out + at, out[at] + x, out[at + 1] + y);
    }
};

template <bool TRANS_A, bool TRANS_B, class Epilogue>
static void matmul(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb, int M, int N, int K, int splits) {
    size_t shared = STAGES * 2 * TILE_SIZE * sizeof(floatX);
    auto matmul = matmul_kernel<TRANS_A, TRANS_B, Epilogue>;
    cuda_check(cudaFuncSetAttribute(matmul, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "matmul"); // more than 48 KiB must be asked for
    matmul<<<dim3(blocks(M, TILE), blocks(N, TILE), splits), THREADS, shared>>>(epilogue, a, lda, b, ldb, M, N, K, blocks(blocks(K, splits), DEPTH) * DEPTH);
    launched("matmul");
}

// ---- linear layer ----

typedef struct { float *memory; size_t size; int blocks; } Parts; // room for the parts of long sums; blocks that keep this GPU busy

// Into how many parts to split sums over K, where there are tiles of them, size in all: so that the GPU is full to the last round of
// blocks, each part 256 at least.
static int choose_splits(Parts parts, int tiles, int K, size_t size) {
    int most = (int)fmin(fmin(K / 256, parts.blocks), (double)(parts.size / size)), best = 1;
    double lowest = blocks(tiles, parts.blocks);
    for (int splits = 2; splits <= most; splits++) {
        double cost = blocks((size_t)tiles * splits, parts.blocks) / (double)splits; // rounds of blocks, each of 1/splits of the work
        if (cost < 0.95 * lowest) lowest = cost, best = splits; // adding up the parts takes time too
    }
    return best;
}

// out = epilogue(inp (M,C) weight^T), weight (OC,C)
template <class Epilogue> static void matmul_forward(Epilogue out, const floatX *inp, const floatX *weight, int M, int C, int OC) {
    matmul<false, false>(out, inp, C, weight, C, M, OC, C, 1);
}

// parts (gridDim.y, N) = column sums of inp (M,N), rows ld apart. Blocks of 32 columns and 8 rows at a time.
__global__ void column_sums_kernel(float *parts, const floatX *inp, int ld, int M, int N) {
    __shared__ float sums[THREADS];
    int column = blockIdx.x * WARP + threadIdx.x % WARP, each = (M + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(M, begin + each);
    float sum = 0;
    for (int i = begin + threadIdx.x / WARP; i < end && column < N; i += THREADS / WARP) sum += (float)inp[(size_t)i * ld + column];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= WARP || column >= N) return;
    for (int i = WARP; i < THREADS; i += WARP) sum += sums[i + threadIdx.x];
    parts[(size_t)blockIdx.y * N + column] = sum;
}

static int choose_column_splits(Parts parts, int M, int N) { // these blocks are small: four times as many at a time
    parts.blocks *= 4;
    return choose_splits(parts, blocks(N, WARP), M, N);
}

// dinp = epilogue(dout (M,OC) weight), rows of dout ldout apart;  dweight (OC,C) += dout^T inp;  dbias (OC) += column sums of dout, or NULL
template <class Epilogue>
static void matmul_backward(Epilogue dinp, float *dweight, float *dbias, const floatX *dout, int ldout, const floatX *inp, const floatX *weight, int M, int C, int OC, Parts parts) {
    matmul<false, true>(dinp, dout, ldout, weight, C, M, C, OC, 1);
    size_t size = (size_t)OC * C;
    int splits = choose_splits(parts, blocks(OC, TILE) * blocks(C, TILE), M, size);
    Accumulate accumulate = {dweight, parts.memory, size, C};
    matmul<true, true>(accumulate, dout, ldout, inp, C, OC, C, M, splits);
    if (splits > 1) add_parts(dweight, parts.memory, size, splits);
    if (!dbias) return;
    splits = choose_column_splits(parts, M, OC);
    column_sums_kernel<<<dim3(blocks(OC, WARP), splits), THREADS>>>(parts.memory, dout, ldout, M, OC);
    launched("column_sums");
    add_parts(dbias, parts.memory, OC, splits);
}

// ---- noise ----

__global__ void noise_kernel(int *x, float *weights, const int *targets, const int *given, int V, Noise n, int BT, int T) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, b = i / T;
    if (i >= BT) return;
    double density, t = noise_level(n, b, &density);
    int masked = i % T >= given[b] && becomes_mask(n.seed, n.step, (uint64_t)n.first_row * T + i, t);
    x[i] = masked ? V : targets[i];
    weights[i] = masked ? (float)(1 / (t * density * n.total_rows * (T - given[b]))) : 0;
}

static void noise_forward(int *x, float *weights, const int *targets, const int *given, int V, Noise n, int B, int T) {
    noise_kernel<<<blocks((size_t)B * T, THREADS), THREADS>>>(x, weights, targets, given, V, n, B * T, T);
    launched("noise");
}

// One block; each thread has a stretch of positions, counts its masked ones, learns how many are before them, and writes them there.
__global__ void masked_rows_kernel(int *rows, int *R, const float *weights, int BT) {
    __shared__ int counts[THREADS];
    int each = (BT + THREADS - 1) / THREADS, begin = threadIdx.x * each, end = min(BT, begin + each), count = 0, before = 0;
    for (int i = begin; i < end; i++) count += weights[i] > 0;
    counts[threadIdx.x] = count;
    __syncthreads();
    for (int t = 0; t < (int)threadIdx.x; t++) before += counts[t];
    if (threadIdx.x == THREADS - 1) *R = before + count;
    for (int i = begin; i < end; i++)
        if (weights[i] > 0) rows[before++] = i;
}

static int masked_rows(int *rows, int *R, const float *weights, int BT) { // R: a place on the GPU
    masked_rows_kernel<<<1, THREADS>>>(rows, R, weights, BT);
    launched("masked_rows");
    int count;
    to_host(&count, R, sizeof count);
    return count;
}

// ---- embedding ----

__global__ void encoder_forward_kernel(float *out, const int *x, const float *wte, const float *wpe, size_t n, int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = wte[(size_t)x[i / C] * C + i % C] + wpe[i / C % T * C + i % C];
}

static void encoder_forward(float *out, const int *x, const float *wte, const float *wpe, int B, int T, int C) {
    size_t n = (size_t)B * T * C;
    encoder_forward_kernel<<<blocks(n, THREADS), THREADS>>>(out, x, wte, wpe, n, T, C);
    launched("encoder_forward");
}

// Many positions add to one row of wte. A block is at each position, but only the first with its token stays: it looks for the others,
// 256 at a time, and adds them in order. MASK is about half of all positions, so the block that adds these up takes the longest.
__global__ void wte_backward_kernel(float *dwte, const float *dout, const int *x, int BT, int C) {
    __shared__ int found[THREADS];
    __shared__ int counts[THREADS / WARP];
    int i = blockIdx.x, token = x[i], thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    for (int j = thread; j - thread < i; j += THREADS)
        if (__syncthreads_or(j < i && x[j] == token)) return;
    for (int j = i + thread; j - thread < BT; j += THREADS) {
        int same = j < BT && x[j] == token, before = 0, n = 0;
        unsigned votes = __ballot_sync(ALL, same);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        for (int w = 0; w < THREADS / WARP; w++) before += w < warp ? counts[w] : 0, n += counts[w];
        if (same) found[before + __popc(votes & ((1u << lane) - 1))] = j;
        __syncthreads();
        for (int c = thread; n > 0 && c < C; c += THREADS) {
            float sum = dwte[(size_t)token * C + c];
            for (int k = 0; k < n; k++) sum += dout[(size_t)found[k] * C + c];
            dwte[(size_t)token * C + c] = sum;
        }
    }
}

__global__ void wpe_backward_kernel(float *dwpe, const float *dout, int B, size_t TC) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= TC) return;
    float sum = dwpe[i];
    for (int b = 0; b < B; b++) sum += dout[b * TC + i];
    dwpe[i] = sum;
}

static void encoder_backward(float *dwte, float *dwpe, const float *dout, const int *x, int B, int T, int C) {
    wte_backward_kernel<<<B * T, THREADS>>>(dwte, dout, x, B * T, C);
    launched("wte_backward");
    wpe_backward_kernel<<<blocks((size_t)T * C, THREADS), THREADS>>>(dwpe, dout, B, (size_t)T * C);
    launched("wpe_backward");
}

// ---- layer normalization: a warp for each row ----

__global__ void layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const float *inp, const float *weight, const float *bias, int M, int C) {
    int i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= M) return;
    const float *x = inp + (size_t)i * C;
    float sum = 0, squares = 0;
    for (int c = lane; c < C; c += WARP) sum += x[c];
    float m = warp_sum(sum) / C;
    for (int c = lane; c < C; c += WARP) squares += (x[c] - m) * (x[c] - m);
    float s = 1 / sqrtf(warp_sum(squares) / C + 1e-5f);
    for (int c = lane; c < C; c += WARP) out[(size_t)i * C + c] = (floatX)((x[c] - m) * s * weight[c] + bias[c]);
    if (lane == 0) mean[i] = m, rstd[i] = s;
}

static void layernorm_forward(floatX *out, float *mean, float *rstd, const float *inp, const float *weight, const float *bias, int M, int C) {
    layernorm_forward_kernel<<<blocks(M, THREADS / WARP), THREADS>>>(out, mean, rstd, inp, weight, bias, M, C);
    launched("layernorm_forward");
}

// dinp (M,C) +=, as in loopmdm.c, and dinpx (M,C) a copy of the sum for the next matrix product
__global__ void layernorm_backward_kernel(float *dinp, floatX *dinpx, const floatX *dout, const float *inp, const float *weight,
                                          const float *mean, const float *rstd, int M, int C) {
    int i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= M) return;
    size_t row = (size_t)i * C;
    float m = mean[i], s = rstd[i], g = 0, gx = 0;
    for (int c = lane; c < C; c += WARP) {
        float dy = (float)dout[row + c] * weight[c];
        g += dy;
        gx += dy * (inp[row + c] - m) * s;
    }
    g = warp_sum(g) / C;
    gx = warp_sum(gx) / C;
    for (int c = lane; c < C; c += WARP) {
        float dx = dinp[row + c] + s * ((float)dout[row + c] * weight[c] - g - (inp[row + c] - m) * s * gx);
        dinp[row + c] = dx;
        dinpx[row + c] = (floatX)dx;
    }
}

// parts (gridDim.y, C) of the gradient of weight, in the manner of column_sums_kernel
__global__ void layernorm_weight_kernel(float *parts, const floatX *dout, const float *inp, const float *mean, const float *rstd, int M, int C) {
    __shared__ float sums[THREADS];
    int c = blockIdx.x * WARP + threadIdx.x % WARP, each = (M + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each, end = min(M, begin + each);
    float sum = 0;
    for (int i = begin + threadIdx.x / WARP; i < end && c < C; i += THREADS / WARP)
        sum += (float)dout[(size_t)i * C + c] * (inp[(size_t)i * C + c] - mean[i]) * rstd[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= WARP || c >= C) return;
    for (int i = WARP; i < THREADS; i += WARP) sum += sums[i + threadIdx.x];
    parts[(size_t)blockIdx.y * C + c] = sum;
}

static void layernorm_backward(float *dinp, floatX *dinpx, float *dweight, float *dbias, const floatX *dout, const float *inp, const float *weight,
                               const float *mean, const float *rstd, int M, int C, Parts parts) {
    layernorm_backward_kernel<<<blocks(M, THREADS / WARP), THREADS>>>(dinp, dinpx, dout, inp, weight, mean, rstd, M, C);
    launched("layernorm_backward");
    int splits = choose_column_splits(parts, M, C);
    layernorm_weight_kernel<<<dim3(blocks(C, WARP), splits), THREADS>>>(parts.memory, dout, inp, mean, rstd, M, C);
    launched("layernorm_weight");
    add_parts(dweight, parts.memory, C, splits);
    column_sums_kernel<<<dim3(blocks(C, WARP), splits), THREADS>>>(parts.memory, dout, C, M, C);
    launched("column_sums");
    add_parts(dbias, parts.memory, C, splits);
}

// ---- rotary positions ----

__global__ void rope_kernel(floatX *qkv, const float *cosine, const float *sine, float sign, int BT, int T, int C, int NH) {
    int half = C / NH / 2, per_row = 2 * NH * half; // heads of q, then of k
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)BT * per_row) return;
    int i = (int)(n / per_row), h = (int)(n % per_row) / half, j = (int)(n % half), at = i % T * half + j;
    floatX *x = qkv + (size_t)i * 3 * C + h * 2 * half + j;
    float x0 = (float)x[0], x1 = (float)x[half], c = cosine[at], s = sign * sine[at];
    x[0] = (floatX)(x0 * c - x1 * s);
    x[half] = (floatX)(x1 * c + x0 * s);
}

static void rope_rotate(floatX *qkv, const float *cosine, const float *sine, float sign, int B, int T, int C, int NH) {
    rope_kernel<<<blocks((size_t)B * T * C, THREADS), THREADS>>>(qkv, cosine, sine, sign, B * T, T, C, NH);
    launched("rope");
}

static void rope_forward(floatX *qkv, const float *cosine, const float *sine, int B, int T, int C, int NH) {
    rope_rotate(qkv, cosine, sine, 1, B, T, C, NH);
}

static void rope_backward(floatX *dqkv, const float *cosine, const float *sine, int B, int T, int C, int NH) {
    rope_rotate(dqkv, cosine, sine, -1, B, T, C, NH);
}

// ---- attention, in the manner of FlashAttention (Dao 2023): no T x T in memory ----
//
// A block of 4 warps has 64 rows (queries) of one head, a warp 16 of them, and goes over all keys, 64 at a time. Scores, probabilities
// and the output stay in registers. The softmax is taken online: when a larger score comes, what was summed is scaled down.
// D is the head's size, C/NH, rounded up; the columns added are zero. Scores are in units of log 2, since exp2 is what the hardware has:
// score = q k^T scale2 with scale2 = log2(e)/sqrt(C/NH), lse = log2 sum exp2(score).
enum { ATTN_ROWS = 64, ATTN_THREADS = 128 };
HOST_DEVICE static inline int attention_tiles(int T) { return (T + ATTN_ROWS - 1) / ATTN_ROWS; } // of each head: blocks in a grid

template <int D>
__global__ void __launch_bounds__(ATTN_THREADS) attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, float scale, int T, int C, int NH) {
    enum { LD = D + PAD, KEYS = 64 };
    extern __shared__ __align__(16) floatX tiles[];
    floatX *qt = tiles, *kt = qt + ATTN_ROWS * LD, *vt = kt + KEYS * LD;
    int size = C / NH, bh = blockIdx.x / attention_tiles(T), b = bh / NH, h = bh % NH, t0 = blockIdx.x % attention_tiles(T) * ATTN_ROWS;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const floatX *q = qkv + (size_t)b * T * 3 * C + h * size, *k = q + C, *v = k + C;
    float scale2 = scale * 1.44269504f, sum[2] = {0, 0}, largest[2] = {-INFINITY, -INFINITY}, acc[D / 8][4] = {}; // of rows lane / 4, and that + 8

    load_tile<ATTN_ROWS, D>(qt, q + (size_t)t0 * 3 * C, 3 * C, T - t0, size);
    load_tile<KEYS, D>(kt, k, 3 * C, T, size);
    cp_async_commit();
    load_tile<KEYS, D>(vt, v, 3 * C, T, size);
    cp_async_commit();
    for (int j0 = 0; j0 < T; j0 += KEYS) {
        float p[KEYS / 8][4] = {};
        cp_async_wait<1>(); // the keys are there, the values may be on their way
        __syncthreads();
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            Pair af[4 * WORDS], bf[4 * WORDS];
            load_a<false>(af, qt + warp * 16 * LD + d, LD);
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                load_b<false>(bf, kt + j * 16 * LD + d, LD);
                mma_16x8x16(p[2 * j], af, bf);
                mma_16x8x16(p[2 * j + 1], af, bf + 2 * WORDS);
            }
        }
        __syncthreads(); // all are done with these keys: the next may come while the softmax is taken
        if (j0 + KEYS < T) load_tile<KEYS, D>(kt, k + (size_t)(j0 + KEYS) * 3 * C, 3 * C, T - j0 - KEYS, size);
        cp_async_commit();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = largest[half], s = 0;
#pragma unroll
            for (int j = 0; j < KEYS / 4; j++) {
                float *x = &p[j / 2][2 * half + j % 2];
                *x = j0 + j / 2 * 8 + lane % 4 * 2 + j % 2 < T ? *x * scale2 : -INFINITY;
                m = fmaxf(m, *x);
            }
            m = fmaxf(m, __shfl_xor_sync(ALL, m, 1)); // four lanes share a row
            m = fmaxf(m, __shfl_xor_sync(ALL, m, 2));
            float shrink = exp2f(largest[half] - m);
            largest[half] = m;
#pragma unroll
            for (int j = 0; j < KEYS / 4; j++) {
                float *x = &p[j / 2][2 * half + j % 2];
                s += *x = exp2f(*x - m);
            }
            sum[half] = sum[half] * shrink + s;
#pragma unroll
            for (int d = 0; d < D / 4; d++) acc[d / 2][2 * half + d % 2] *= shrink;
        }
        cp_async_wait<1>(); // the values are there, the next keys may be on their way
        __syncthreads();
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            Pair af[4 * WORDS], bf[4 * WORDS];
            to_a(af, p[2 * j], p[2 * j + 1]);
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                load_b<true>(bf, vt + j * 16 * LD + d * 16, LD);
                mma_16x8x16(acc[2 * d], af, bf);
                mma_16x8x16(acc[2 * d + 1], af, bf + 2 * WORDS);
            }
        }
        __syncthreads(); // all are done with these values
        if (j0 + KEYS < T) load_tile<KEYS, D>(vt, v + (size_t)(j0 + KEYS) * 3 * C, 3 * C, T - j0 - KEYS, size);
        cp_async_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int t = t0 + warp * 16 + lane / 4 + half * 8;
        float s = sum[half];
        s += __shfl_xor_sync(ALL, s, 1);
        s += __shfl_xor_sync(ALL, s, 2);
        if (t >= T) continue;
        if (lane % 4 == 0) lse[(size_t)bh * T + t] = largest[half] + log2f(s);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            int column = d * 8 + lane % 4 * 2;
            if (column < size) store2(out + ((size_t)b * T + t) * C + h * size + column, acc[d][2 * half] / s, acc[d][2 * half + 1] / s);
        }
    }
}

// delta (B,NH,T) = sum of dout out over a head's channels: what sum(p dp) over keys comes to, as dp_j = dout v_j and out = sum(p_j v_j).
// A warp for each.
__global__ void attention_delta_kernel(float *delta, const floatX *dout, const floatX *out, int B, int T, int C, int NH) {
    int n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, size = C / NH;
    if (n >= B * NH * T) return;
    size_t at = ((size_t)(n / (NH * T)) * T + n % T) * C + n / T % NH * size;
    float sum = 0;
    for (int d = lane; d < size; d += WARP) sum += (float)dout[at + d] * (float)out[at + d];
    sum = warp_sum(sum);
    if (lane == 0) delta[n] = sum;
}

// Rows of the other side at a time. Heads of 128 in fp32 then take all of the 99 KiB that the smallest GPUs (8.6, 8.9, 12.0) give a block.
HOST_DEVICE static constexpr int attention_others(int D, bool of_keys) { return D > 64 ? 16 : D <= 32 || (of_keys && (BF16 || D < 64)) ? 64 : 32; }

// Scores are computed again, from both sides, so that every sum has one owner and no atomics are needed:
//   OF_KEYS   a block has 64 keys and goes over all queries:  dv += p^T dout,  dk += dscores^T q
//   otherwise a block has 64 queries and goes over all keys:  dq += dscores k
// "Own" are the block's rows, "other" those it goes over; the scores of (own, other) are own1 other1^T, and dp is own2 other2^T,
// where 1 and 2 are q and dout, or k and v.
template <int D, bool OF_KEYS>
__global__ void __launch_bounds__(ATTN_THREADS) attention_backward_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const float *delta,
                                                                          float scale, int T, int C, int NH) {
    enum { LD = D + PAD, OTHERS = attention_others(D, OF_KEYS) };
    extern __shared__ __align__(16) floatX tiles[];
    floatX *own1 = tiles, *own2 = own1 + ATTN_ROWS * LD, *others = own2 + ATTN_ROWS * LD; // others: two places, each for both tiles
    int size = C / NH, bh = blockIdx.x / attention_tiles(T), b = bh / NH, h = bh % NH, t0 = blockIdx.x % attention_tiles(T) * ATTN_ROWS;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const floatX *q = qkv + (size_t)b * T * 3 * C + h * size, *k = q + C, *v = k + C, *dy = dout + (size_t)b * T * C + h * size;
    float scale2 = scale * 1.44269504f, dk_or_dq[D / 8][4] = {}, dv[OF_KEYS ? D / 8 : 1][4] = {};
    lse += (size_t)bh * T, delta += (size_t)bh * T;

    load_tile<ATTN_ROWS, D>(own1, (OF_KEYS ? k : q) + (size_t)t0 * 3 * C, 3 * C, T - t0, size);
    if (OF_KEYS) load_tile<ATTN_ROWS, D>(own2, v + (size_t)t0 * 3 * C, 3 * C, T - t0, size);
    else load_tile<ATTN_ROWS, D>(own2, dy + (size_t)t0 * C, C, T - t0, size);
    auto load = [&](int j0) {
        floatX *other1 = others + j0 / OTHERS % 2 * 2 * OTHERS * LD, *other2 = other1 + OTHERS * LD;
        if (j0 < T) {
            load_tile<OTHERS, D>(other1, (OF_KEYS ? q : k) + (size_t)j0 * 3 * C, 3 * C, T - j0, size);
            if (OF_KEYS) load_tile<OTHERS, D>(other2, dy + (size_t)j0 * C, C, T - j0, size);
            else load_tile<OTHERS, D>(other2, v + (size_t)j0 * 3 * C, 3 * C, T - j0, size);
        }
        cp_async_commit();
    };
    load(0);
    for (int j0 = 0; j0 < T; j0 += OTHERS) {
        const floatX *other1 = others + j0 / OTHERS % 2 * 2 * OTHERS * LD, *other2 = other1 + OTHERS * LD;
        load(j0 + OTHERS);
        cp_async_wait<1>(); // these rows are there, the next may be on their way
        __syncthreads();
        float p[OTHERS / 8][4] = {}, dscores[OTHERS / 8][4] = {}; // dscores is dp first
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            Pair a1[4 * WORDS], a2[4 * WORDS], bf[4 * WORDS];
            load_a<false>(a1, own1 + warp * 16 * LD + d, LD);
            load_a<false>(a2, own2 + warp * 16 * LD + d, LD);
#pragma unroll
            for (int j = 0; j < OTHERS / 16; j++) {
                load_b<false>(bf, other1 + j * 16 * LD + d, LD);
                mma_16x8x16(p[2 * j], a1, bf);
                mma_16x8x16(p[2 * j + 1], a1, bf + 2 * WORDS);
                load_b<false>(bf, other2 + j * 16 * LD + d, LD);
                mma_16x8x16(dscores[2 * j], a2, bf);
                mma_16x8x16(dscores[2 * j + 1], a2, bf + 2 * WORDS);
            }
        }
#pragma unroll
        for (int j = 0; j < OTHERS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int own = t0 + warp * 16 + lane / 4 + e / 2 * 8, other = j0 + j * 8 + lane % 4 * 2 + e % 2, query = OF_KEYS ? other : own;
                bool there = own < T && other < T;
                p[j][e] = there ? exp2f(p[j][e] * scale2 - lse[query]) : 0;
                dscores[j][e] = there ? scale * p[j][e] * (dscores[j][e] - delta[query]) : 0;
            }
#pragma unroll
        for (int j = 0; j < OTHERS / 16; j++) {
            Pair pf[4 * WORDS], df[4 * WORDS], bf[4 * WORDS];
            if (OF_KEYS) to_a(pf, p[2 * j], p[2 * j + 1]);
            to_a(df, dscores[2 * j], dscores[2 * j + 1]);
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                load_b<true>(bf, other1 + j * 16 * LD + d * 16, LD);
                mma_16x8x16(dk_or_dq[2 * d], df, bf);
                mma_16x8x16(dk_or_dq[2 * d + 1], df, bf + 2 * WORDS);
                if (!OF_KEYS) continue;
                load_b<true>(bf, other2 + j * 16 * LD + d * 16, LD);
                mma_16x8x16(dv[2 * d], pf, bf);
                mma_16x8x16(dv[2 * d + 1], pf, bf + 2 * WORDS);
            }
        }
        __syncthreads(); // all are done with these rows, whose place the load after the next takes
    }
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = t0 + warp * 16 + lane / 4 + half * 8, column = d * 8 + lane % 4 * 2;
            if (t >= T || column >= size) continue;
            floatX *to = dqkv + ((size_t)b * T + t) * 3 * C + h * size + column;
            store2(to + (OF_KEYS ? C : 0), dk_or_dq[d][2 * half], dk_or_dq[d][2 * half + 1]);
            if (OF_KEYS) store2(to + 2 * C, dv[d][2 * half], dv[d][2 * half + 1]);
        }
}

template <int D> static void attention_forward_of(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
    size_t shared = 3 * ATTN_ROWS * (D + PAD) * sizeof(floatX);
    auto attention = attention_forward_kernel<D>;
    cuda_check(cudaFuncSetAttribute(attention, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "attention_forward");
    attention<<<B * NH * attention_tiles(T), ATTN_THREADS, shared>>>(out, lse, qkv, 1 / sqrtf(C / NH), T, C, NH);
    launched("attention_forward");
}

template <int D, bool OF_KEYS>
static void attention_backward_of(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const float *delta, int B, int T, int C, int NH) {
    size_t shared = (2 * ATTN_ROWS + 4 * attention_others(D, OF_KEYS)) * (D + PAD) * sizeof(floatX);
    auto attention = attention_backward_kernel<D, OF_KEYS>;
    cuda_check(cudaFuncSetAttribute(attention, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "attention_backward");
    attention<<<B * NH * attention_tiles(T), ATTN_THREADS, shared>>>(dqkv, dout, qkv, lse, delta, 1 / sqrtf(C / NH), T, C, NH);
    launched("attention_backward");
}

static void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
    int D = C / NH;
    if (D <= 32) attention_forward_of<32>(out, lse, qkv, B, T, C, NH);
    else if (D <= 48) attention_forward_of<48>(out, lse, qkv, B, T, C, NH);
    else if (D <= 64) attention_forward_of<64>(out, lse, qkv, B, T, C, NH);
    else attention_forward_of<128>(out, lse, qkv, B, T, C, NH);
}

template <int D> static void attention_backward_both(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const float *delta, int B, int T, int C, int NH) {
    attention_backward_of<D, true>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
    attention_backward_of<D, false>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
}

// out (B,T,C) is what forward gave; delta (B,NH,T) a buffer
static void attention_backward(floatX *dqkv, float *delta, const floatX *dout, const floatX *out, const floatX *qkv, const float *lse, int B, int T, int C, int NH) {
    int D = C / NH;
    attention_delta_kernel<<<blocks((size_t)B * NH * T, THREADS / WARP), THREADS>>>(delta, dout, out, B, T, C, NH);
    launched("attention_delta");
    if (D <= 32) attention_backward_both<32>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
    else if (D <= 48) attention_backward_both<48>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
    else if (D <= 64) attention_backward_both<64>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
    else attention_backward_both<128>(dqkv, dout, qkv, lse, delta, B, T, C, NH);
}

// ---- masked rows ----

__global__ void gather_forward_kernel(float *out, const float *inp, const int *rows, int R, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)R * C) out[i] = inp[(size_t)rows[i / C] * C + i % C];
}

static void gather_forward(float *out, const float *inp, const int *rows, int R, int C) {
    gather_forward_kernel<<<blocks((size_t)R * C, THREADS), THREADS>>>(out, inp, rows, R, C);
    launched("gather_forward");
}

__global__ void gather_backward_kernel(float *dinp, floatX *dinpx, const float *dout, const int *rows, int R, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)R * C) return;
    size_t to = (size_t)rows[i / C] * C + i % C;
    dinp[to] = dout[i];
    dinpx[to] = (floatX)dout[i];
}

static void gather_backward(float *dinp, floatX *dinpx, const float *dout, const int *rows, int R, int C) { // dinpx: a copy for matrix products
    gather_backward_kernel<<<blocks((size_t)R * C, THREADS), THREADS>>>(dinp, dinpx, dout, rows, R, C);
    launched("gather_backward");
}

// ---- softmax and cross entropy: a block for each row, loss and gradient in one kernel ----

// logits (R,V), rows ld apart -> losses (R) = -log p[target], and unless NULL dlogits (R,V), rows ld apart, of sum(weights * losses).
// dlogits may be logits. targets and weights (BT) are looked up at rows (R).
__global__ void crossentropy_kernel(float *losses, floatX *dlogits, const float *logits, const float *weights, const int *targets, const int *rows, int V, int ld) {
    const float *l = logits + (size_t)blockIdx.x * ld;
    float largest = -INFINITY, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) { // online, as in attention: one sweep for both
        float x = l[v], m = fmaxf(largest, x);
        sum = sum * expf(largest - m) + expf(x - m);
        largest = m;
    }
    float m = block_reduce(largest, 1);
    sum = block_reduce(sum * expf(largest - m), 0);
    int target = targets[rows[blockIdx.x]];
    if (threadIdx.x == 0) losses[blockIdx.x] = m - l[target] + logf(sum);
    if (!dlogits) return;
    __syncthreads(); // dlogits may be logits: the target's has been read
    float weight = weights[rows[blockIdx.x]], scale = weight / sum;
    floatX *d = dlogits + (size_t)blockIdx.x * ld;
    for (int v = threadIdx.x; v < V; v += blockDim.x) d[v] = (floatX)(expf(l[v] - m) * scale - (v == target ? weight : 0));
}

static void crossentropy_forward_backward(float *losses, floatX *dlogits, const float *logits, const float *weights, const int *targets, const int *rows, int R, int V, int ld) {
    int threads = V > 16384 ? 1024 : THREADS; // fewer rows at a time where they are long: the second sweep may find more of them in the L2 cache
    crossentropy_kernel<<<R, threads>>>(losses, dlogits, logits, weights, targets, rows, V, ld);
    launched("crossentropy");
}

// row_loss (B): the sum of weights * losses over each row's masked positions, which lie together in rows (R). A warp for each row.
__global__ void row_loss_kernel(double *row_loss, const float *losses, const float *weights, const int *rows, int R, int T) {
    int b = blockIdx.x, at[2] = {0, 0};
    for (int side = 0; side < 2; side++) // the first position not before row b, and row b + 1
        for (int n = R; n > 0;) {
            int half = n / 2, less = rows[at[side] + half] / T < b + side;
            at[side] += less ? half + 1 : 0;
            n = less ? n - half - 1 : half;
        }
    double sum = 0;
    for (int r = at[0] + threadIdx.x; r < at[1]; r += WARP) sum += (double)weights[rows[r]] * losses[r];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) row_loss[b] = sum;
}

// ---- sampling: a block for each row ----

// As in loopmdm.c, for the threads of a block, which have a stretch of the logits each. What counts is exp((l - largest) / temperature),
// or with temperature 0 one, of logits not below least.
__device__ static uint32_t threshold_of(const float *l, int begin, int end, double largest, double temperature, uint32_t least, double enough) {
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        double sum = 0;
        for (int v = begin; v < end; v++)
            if (float_order(l[v]) >= max(threshold | bit, least)) sum += temperature > 0 ? exp((l[v] - largest) / temperature) : 1;
        if (block_reduce(sum, 0) >= enough) threshold |= bit;
    }
    return max(threshold, least);
}

// As sample_token() in loopmdm.c. A thread has a stretch of the vocabulary; the thread whose stretch holds the draw looks for it there.
__global__ void sample_kernel(int *token, double *score, const float *logits, const int *rows, const int *ids, int T, int V, int ld, Draw d, uint64_t step) {
    __shared__ double sums[THREADS];
    __shared__ int owner;
    __shared__ int chosen;
    const float *l = logits + (size_t)blockIdx.x * ld;
    int each = (V + THREADS - 1) / THREADS, begin = min(V, (int)threadIdx.x * each), end = min(V, begin + each), best = begin, row = rows[blockIdx.x];
    for (int v = begin + 1; v < end; v++)
        if (l[v] > l[best]) best = v;
    float largest = block_reduce(begin < end ? l[best] : -INFINITY, 1), next = -INFINITY;
    int likeliest = -block_reduce(begin < end && l[best] == largest ? -best : 1 - V, 1); // the lowest, if several are equal
    double sum = 0, entropy = 0, tempered = 0;
    for (int v = begin; v < end; v++) {
        double e = exp((double)l[v] - largest);
        sum += e;
        entropy -= e * ((double)l[v] - largest);
        if (v != likeliest && l[v] > next) next = l[v];
    }
    sum = block_reduce(sum, 0);
    entropy = block_reduce(entropy, 0);
    next = block_reduce(next, 1);
    uint32_t least = d.temperature > 0 && d.top_k > 0 && d.top_k < V ? threshold_of(l, begin, end, largest, 0, 0, d.top_k) : 0;
    for (int pass = 0; pass < 2 && d.temperature > 0; pass++) { // the second time with top_p
        tempered = 0;
        for (int v = begin; v < end; v++)
            if (float_order(l[v]) >= least) tempered += exp((l[v] - (double)largest) / d.temperature);
        if (pass || d.top_p >= 1) break;
        least = threshold_of(l, begin, end, largest, d.temperature, least, d.top_p * block_reduce(tempered, 0));
    }
    sums[threadIdx.x] = tempered;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (int t = 0; t < THREADS; t++) total += sums[t];
        double left = random_uniform(d.seed, STREAM_TOKEN, step, (uint64_t)ids[row / T] * T + row % T) * total;
        int t = 0, last = THREADS - 1; // the last thread that has anything to draw
        while (last > 0 && sums[last] == 0) last--;
        while (t < last && left >= sums[t]) left -= sums[t++];
        owner = t, sums[t] = left, chosen = likeliest;
    }
    __syncthreads();
    if (d.temperature > 0 && (int)threadIdx.x == owner) {
        double left = sums[owner];
        for (int v = begin; v < end && left >= 0; v++)
            if (float_order(l[v]) >= least) chosen = v, left -= exp((l[v] - (double)largest) / d.temperature);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        token[blockIdx.x] = chosen;
        score[blockIdx.x] = d.score == SCORE_PROBABILITY ? exp((double)l[chosen] - largest) / sum
                          : d.score == SCORE_MARGIN ? (1 - exp((double)next - largest)) / sum : -(log(sum) + entropy / sum);
    }
}

static void sample_forward(int *token, double *score, const float *logits, const int *rows, const int *ids, int R, int T, int V, int ld, Draw d, uint64_t step) {
    sample_kernel<<<R, THREADS>>>(token, score, logits, rows, ids, T, V, ld, d, step);
    launched("sample");
}

// ---- adaptive loops: a block for each row, a warp for a position ----

__global__ void state_change_kernel(double *change, const float *h, const float *before, const float *before2, int T, int C) {
    int lane = threadIdx.x % WARP;
    double sum = 0;
    for (int t = threadIdx.x / WARP; t < T; t += blockDim.x / WARP) {
        size_t at = ((size_t)blockIdx.x * T + t) * C;
        double norm = 0, moved = 0;
        for (int c = lane; c < C; c += WARP) {
            double d = before2 ? (double)h[at + c] - 2.0 * before[at + c] + before2[at + c] : (double)h[at + c] - before[at + c];
            norm += (double)h[at + c] * h[at + c];
            moved += d * d;
        }
        sum += sqrt(warp_sum(moved) / warp_sum(norm)) / T;
    }
    sum = block_reduce(lane ? 0 : sum, 0);
    if (threadIdx.x == 0) change[blockIdx.x] = sum;
}

static void copy_floats(float *to, const float *from, size_t n) { cuda_check(cudaMemcpy(to, from, n * sizeof(float), cudaMemcpyDeviceToDevice), "copying"); }

// =====================================================================================================================
// 4. Model

enum { PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, NUM_MEMORIES }; // a model's memory: one allocation each

enum { SQUARES = 1 << 14 }; // numbers whose squares a block of gradient_norm() adds up

typedef struct { // what a pass computes, kept for its backward
    floatX *ln1, *qkv, *atty, *ln2, *fch, *fch_gelu;                       // (B,T,C), (B,T,3C), (B,T,C), (B,T,C), (B,T,4C), (B,T,4C)
    float *ln1_mean, *ln1_rstd, *lse, *res2, *ln2_mean, *ln2_rstd;         // (B,T), (B,T), (B,NH,T) in log 2, (B,T,C), (B,T), (B,T)
} Acts;

typedef struct { // as in loopmdm.c, on the GPU but for row_loss
    Config config;
    Tensors params, grads, moment1, moment2, ema;
    floatX *paramsx;                         // (total) what matrix products take: in bf16 a copy of params, else params
    int keeps_ema, training, recompute, max_B, max_T, max_S;
    int head_rows, padded_logits;            // padded_logits: the distance of rows of logits, V rounded up
    void *memory[NUM_MEMORIES];
    size_t bytes[NUM_MEMORIES];
    float *states;                           // (passes + 1 in training, else 1; B,T,C)
    char *acts;                              // (passes in training, but 1 with recompute, else 1) Acts, pass_bytes each
    size_t pass_bytes;
    float *cosine, *sine;                    // (T,D/2)
    float *head_inp, *lnf_mean, *lnf_rstd, *logits; // (head_rows,C), (head_rows), (head_rows), (head_rows,padded_logits)
    floatX *lnf, *dlogits;                   // (head_rows,C), (head_rows,padded_logits); in fp32 dlogits take the place of logits
    float *losses, *dres, *dhead, *delta;    // (R), (B,T,C), (head_rows,C) of head_inp, (B,NH,T)
    floatX *dresx, *dln, *datty, *dwide;     // (B,T,C) a copy of dres, (B,T,C), (B,T,C), (B,T,4C) of fch, then (B,T,3C) of qkv
    float *before, *before2, *settled;
    int *x, *targets, *rows, *count, *token; // count (1): of masked rows;  token (head_rows): sampled
    int *given, *ids;                        // (B) tokens of a row that are context; the rows' numbers among all that are sampled
    float *weights;
    double *row_loss_gpu, *row_loss, *score, *change; // change (B)
    Parts parts;
    int B, T, S, R;
} Model;

static void model_build(Model *m, Config c) {
    memset(m, 0, sizeof *m);
    m->config = c;
    tensors_build(&m->params, c, NULL);
}

typedef struct { void *to; size_t bytes; } Place;

// Lays out pieces one after the other from at, 256 bytes aligned, and sets the pointers to them; returns the bytes. at NULL: only counts.
static size_t place(const Place *plan, size_t n, char *at) {
    size_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        char *piece = at ? at + sum : NULL;
        memcpy(plan[i].to, &piece, sizeof piece);
        sum += (plan[i].bytes + 255) / 256 * 256;
    }
    return sum;
}

static size_t place_acts(Acts *a, Config c, int B, int T, char *at) { // one pass's for (B,T)
    size_t BT = (size_t)B * T, BTC = BT * c.channels, X = sizeof(floatX);
    const Place plan[] = {
        {&a->ln1, BTC * X}, {&a->ln1_mean, BT * 4}, {&a->ln1_rstd, BT * 4}, {&a->qkv, 3 * BTC * X}, {&a->lse, BT * c.heads * 4}, {&a->atty, BTC * X},
        {&a->res2, BTC * 4}, {&a->ln2, BTC * X}, {&a->ln2_mean, BT * 4}, {&a->ln2_rstd, BT * 4}, {&a->fch, 4 * BTC * X}, {&a->fch_gelu, 4 * BTC * X},
    };
    return place(plan, sizeof plan / sizeof *plan, at);
}

static void model_plan(Model *m, int B, int T, int S, int training, int recompute) {
    Config c = m->config;
    size_t C = c.channels, V = c.vocab_size, BT = (size_t)B * T, R = max_int(512, (1 << 27) / c.vocab_size / TILE * TILE), P = num_passes(c, S), X = sizeof(floatX);
    if (R > BT) R = BT; // 2^27 logits are 512 MiB: a product large enough to fill a GPU
    Acts unused;
    m->training = training, m->recompute = recompute, m->max_B = B, m->max_T = T, m->max_S = S, m->head_rows = (int)R;
    m->padded_logits = (int)((V + 7) / 8 * 8); // rows begin at a multiple of 16 bytes
    m->pass_bytes = place_acts(&unused, c, B, T, NULL);
    m->parts.size = training ? (size_t)2 * m->parts.blocks * TILE * TILE + 4 * C + 2 * blocks(m->params.total, SQUARES) : 0; // the last for gradient_norm()
    size_t half = (size_t)T * (C / c.heads / 2), logits = R * m->padded_logits, grad = training ? BT * C : 0, kept = training ? 0 : BT * C;
    const Place plan[] = {
        {&m->row_loss_gpu, B * sizeof(double)}, {&m->x, BT * 4}, {&m->targets, BT * 4}, {&m->rows, BT * 4}, {&m->count, 4}, {&m->weights, BT * 4},
        {&m->token, R * 4}, {&m->score, R * sizeof(double)}, {&m->change, B * sizeof(double)}, {&m->given, B * sizeof(int)}, {&m->ids, B * sizeof(int)}, {&m->states, BT * C * 4 * (training ? P + 1 : 1)},
        {&m->acts, m->pass_bytes * (training && !recompute ? P : 1)}, {&m->cosine, half * 4}, {&m->sine, half * 4},
        {&m->head_inp, R * C * 4}, {&m->lnf, R * C * X}, {&m->lnf_mean, R * 4}, {&m->lnf_rstd, R * 4}, {&m->logits, logits * 4},
        {&m->dlogits, BF16 && training ? logits * X : 0}, {&m->losses, BT * 4}, {&m->dres, grad * 4}, {&m->dhead, training ? R * C * 4 : 0},
        {&m->delta, training ? BT * c.heads * 4 : 0}, {&m->dresx, grad * X}, {&m->dln, grad * X}, {&m->datty, grad * X}, {&m->dwide, 4 * grad * X},
        {&m->before, kept * 4}, {&m->before2, kept * 4}, {&m->settled, kept * 4}, {&m->parts.memory, m->parts.size * 4},
    };
    m->bytes[ACTIVATIONS] = place(plan, sizeof plan / sizeof *plan, (char *)m->memory[ACTIVATIONS]);
    size_t n = m->params.total, after = (n + 63) / 64 * 64; // the copy's tensors are aligned as the parameters are
    m->bytes[PARAMETERS] = BF16 ? after * 4 + n * X : n * 4;
    m->bytes[GRADIENTS] = training ? n * 4 : 0, m->bytes[OPTIMIZER] = training ? n * 4 * (2 + m->keeps_ema) : 0;
    tensors_build(&m->params, c, (float *)m->memory[PARAMETERS]);
    tensors_build(&m->grads, c, (float *)m->memory[GRADIENTS]);
    tensors_build(&m->moment1, c, (float *)m->memory[OPTIMIZER]);
    tensors_build(&m->moment2, c, m->memory[OPTIMIZER] ? m->moment1.data + n : NULL);
    tensors_build(&m->ema, c, m->keeps_ema && m->memory[OPTIMIZER] ? m->moment2.data + n : NULL);
    if (!m->params.data) return;
    m->paramsx = (floatX *)(BF16 ? m->params.data + after : m->params.data);
    if (!BF16) m->dlogits = (floatX *)m->logits;
}

static size_t total_bytes(const Model *m) { return m->bytes[PARAMETERS] + m->bytes[GRADIENTS] + m->bytes[OPTIMIZER] + m->bytes[ACTIVATIONS]; }

static void no_memory(Model *m, int B, int T, int S, int training, int recompute, size_t available) { // says what would fit
    const double MiB = 1 << 20;
    double wanted = total_bytes(m) / MiB;
    int fits = 0, passes = num_passes(m->config, S);
    for (int step = 1 << 20; step > 0; step /= 2) { // by bisection
        if (fits + step >= B) continue;
        model_plan(m, fits + step, T, S, training, recompute);
        if (total_bytes(m) <= available) fits += step;
    }
    char advice[64] = "choose a smaller model";
    if (fits) snprintf(advice, sizeof advice, "%d fit (--batch%s)", fits, training ? "" : ", or -n in sample");
    die(FAILED, "%s %d rows takes %.1f MiB, and the GPU has %.1f MiB free: %s%s", training ? "training with" : "a forward of", B, wanted, available / MiB,
        advice, training && !recompute && passes > 1 ? "; --recompute takes less" : "");
}

static void model_reserve(Model *m, int B, int T, int S, int training, int recompute) {
    int devices = 0;
    cudaDeviceProp gpu;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        die(FAILED, "no GPU: %s; use loopmdm, which runs on the CPU", error == cudaSuccess ? "none was found" : cudaGetErrorString(error));
    cuda_check(cudaGetDeviceProperties(&gpu, 0), "the GPU's properties");
    if (gpu.major < 8) die(FAILED, "the GPU, %s, has compute capability %d.%d; 8.0 (Ampere) is needed", gpu.name, gpu.major, gpu.minor);
    if (m->config.channels / m->config.heads > 128) die(FAILED, "heads of %d channels: on the GPU they have 128 at most", m->config.channels / m->config.heads);
    m->parts.blocks = 2 * gpu.multiProcessorCount; // 2 fit on each (dev/cuda/README.md)
    model_plan(m, B, T, S, training, recompute);
    size_t available, all;
    cuda_check(cudaMemGetInfo(&available, &all), "the GPU's memory");
    available -= available / 64 < 64 << 20 ? available / 64 : 64 << 20; // for rounding, and for kernels that are loaded when they are first called
    if (total_bytes(m) > available) no_memory(m, B, T, S, training, recompute, available);
    for (int i = 0; i < NUM_MEMORIES; i++) {
        if (m->bytes[i] == 0) continue;
        if (cudaMalloc(&m->memory[i], m->bytes[i]) != cudaSuccess)
            die(FAILED, "the GPU has %zu MiB free, but none of %zu in one piece: choose a smaller --batch", available >> 20, m->bytes[i] >> 20);
        cuda_check(cudaMemset(m->memory[i], 0, m->bytes[i]), "clearing memory");
    }
    model_plan(m, B, T, S, training, recompute);
    m->row_loss = (double *)allocate(B, sizeof(double), "the losses");
    int half = m->config.channels / m->config.heads / 2;
    float *angles = (float *)allocate((size_t)2 * T * half, sizeof(float), "rotary positions"), *cosine = angles, *sine = angles + (size_t)T * half;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < half; i++) {
            double angle = t * pow(10000, -1.0 * i / half);
            cosine[t * half + i] = (float)cos(angle);
            sine[t * half + i] = (float)sin(angle);
        }
    to_device(m->cosine, cosine, (size_t)T * half * sizeof(float));
    to_device(m->sine, sine, (size_t)T * half * sizeof(float));
    free(angles);
}

static void model_free(Model *m) {
    for (int i = 0; i < NUM_MEMORIES; i++) cuda_check(cudaFree(m->memory[i]), "freeing memory");
    free(m->row_loss);
    memset(m, 0, sizeof *m);
}

static void read_memory(float *to, const float *from, size_t n) { to_host(to, from, n * sizeof(float)); }
static void tensors_read(float *to, const Tensors *from) { read_memory(to, from->data, from->total); }
static void tensors_write(Tensors *to, const float *from) { to_device(to->data, from, to->total * sizeof(float)); }

__global__ void round_kernel(floatX *out, const float *inp, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (floatX)inp[i];
}

static void model_set_parameters(Model *m, const float *from) {
    tensors_write(&m->params, from);
    if (!BF16) return;
    round_kernel<<<blocks(m->params.total, THREADS), THREADS>>>(m->paramsx, m->params.data, m->params.total);
    launched("round");
}

static Acts pass_acts(const Model *m, int p) {
    Acts a;
    place_acts(&a, m->config, m->B, m->T, m->acts + (m->training && !m->recompute ? p : 0) * m->pass_bytes);
    return a;
}

static void pass_tensors(const Model *m, const Tensors *t, int p, float *w[NUM_TENSORS]) {
    for (int i = 0; i < NUM_TENSORS; i++) w[i] = layer_tensor(t, i, i > WPE && i < LNFW ? layer_of_pass(m->config, m->S, p) : 0);
}

static const floatX *matrix(const Model *m, const float *w) { return m->paramsx + (w - m->params.data); } // w as matrix products take it

static float *pass_input(const Model *m, int p) {
    return m->states + (m->training ? p : 0) * (size_t)m->B * m->T * m->config.channels;
}

static void model_tokens(Model *m, const int *x, int B, int T) {
    if (B > m->max_B || T > m->max_T) die(FAILED, "%d rows of %d tokens are more than was reserved", B, T);
    m->B = B, m->T = T;
    to_device(m->x, x, (size_t)B * T * sizeof(int));
}

static int model_noise(Model *m, const int *targets, const int *given, Noise n, int B, int T) {
    model_tokens(m, targets, B, T);
    to_device(m->targets, targets, (size_t)B * T * sizeof(int));
    to_device(m->given, given, B * sizeof(int));
    noise_forward(m->x, m->weights, m->targets, m->given, m->config.vocab_size, n, B, T);
    return m->R = masked_rows(m->rows, m->count, m->weights, B * T);
}

static void pass_forward(Model *m, int p) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    const float *inp = pass_input(m, p);
    Acts a = pass_acts(m, p);
    float *w[NUM_TENSORS];
    pass_tensors(m, &m->params, p, w);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, w[LN1W], w[LN1B], BT, C);
    matmul_forward(Store<floatX>{a.qkv, 3 * C, w[QKVB]}, a.ln1, matrix(m, w[QKVW]), BT, C, 3 * C);
    rope_forward(a.qkv, m->cosine, m->sine, B, T, C, NH);
    attention_forward(a.atty, a.lse, a.qkv, B, T, C, NH);
    matmul_forward(StoreResidual{a.res2, inp, w[ATTPROJB], C}, a.atty, matrix(m, w[ATTPROJW]), BT, C, C);
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.res2, w[LN2W], w[LN2B], BT, C);
    matmul_forward(StoreGelu{a.fch_gelu, a.fch, 4 * C, w[FCB]}, a.ln2, matrix(m, w[FCW]), BT, C, 4 * C);
}

static void model_embed(Model *m, int S) {
    if (m->training && S > m->max_S) die(FAILED, "a forward of %d loops is more than was reserved", S);
    m->S = S;
    encoder_forward(m->states, m->x, m->params.tensor[WTE], m->params.tensor[WPE], m->B, m->T, m->config.channels);
}

static void model_passes(Model *m, int begin, int end) {
    int C = m->config.channels, BT = m->B * m->T;
    for (int p = begin; p < end; p++) {
        float *w[NUM_TENSORS];
        pass_forward(m, p);
        Acts a = pass_acts(m, p);
        pass_tensors(m, &m->params, p, w);
        matmul_forward(StoreResidual{pass_input(m, p + 1), a.res2, w[FCPROJB], C}, a.fch_gelu, matrix(m, w[FCPROJW]), BT, 4 * C, C);
    }
}

static void model_forward(Model *m, int S) {
    model_embed(m, S);
    model_passes(m, 0, num_passes(m->config, S));
}

static void model_backward(Model *m) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    for (int p = num_passes(m->config, m->S) - 1; p >= 0; p--) {
        float *w[NUM_TENSORS], *g[NUM_TENSORS];
        if (m->recompute) pass_forward(m, p);
        Acts a = pass_acts(m, p);
        pass_tensors(m, &m->params, p, w);
        pass_tensors(m, &m->grads, p, g);
        matmul_backward(StoreGeluBackward{m->dwide, a.fch, 4 * C}, g[FCPROJW], g[FCPROJB], m->dresx, C, a.fch_gelu, matrix(m, w[FCPROJW]), BT, 4 * C, C, m->parts);
        matmul_backward(Store<floatX>{m->dln, C, NULL}, g[FCW], g[FCB], m->dwide, 4 * C, a.ln2, matrix(m, w[FCW]), BT, C, 4 * C, m->parts);
        layernorm_backward(m->dres, m->dresx, g[LN2W], g[LN2B], m->dln, a.res2, w[LN2W], a.ln2_mean, a.ln2_rstd, BT, C, m->parts);
        matmul_backward(Store<floatX>{m->datty, C, NULL}, g[ATTPROJW], g[ATTPROJB], m->dresx, C, a.atty, matrix(m, w[ATTPROJW]), BT, C, C, m->parts);
        attention_backward(m->dwide, m->delta, m->datty, a.atty, a.qkv, a.lse, B, T, C, NH);
        rope_backward(m->dwide, m->cosine, m->sine, B, T, C, NH);
        matmul_backward(Store<floatX>{m->dln, C, NULL}, g[QKVW], g[QKVB], m->dwide, 3 * C, a.ln1, matrix(m, w[QKVW]), BT, C, 3 * C, m->parts);
        layernorm_backward(m->dres, m->dresx, g[LN1W], g[LN1B], m->dln, pass_input(m, p), w[LN1W], a.ln1_mean, a.ln1_rstd, BT, C, m->parts);
    }
    encoder_backward(m->grads.tensor[WTE], m->grads.tensor[WPE], m->dres, m->x, B, T, C);
}

static void head_forward(Model *m, const int *rows, int R) { // m->logits (R,V), rows padded_logits apart
    int C = m->config.channels;
    float **w = m->params.tensor;
    gather_forward(m->head_inp, pass_input(m, num_passes(m->config, m->S)), rows, R, C);
    layernorm_forward(m->lnf, m->lnf_mean, m->lnf_rstd, m->head_inp, w[LNFW], w[LNFB], R, C);
    matmul_forward(Store<float>{m->logits, m->padded_logits, NULL}, m->lnf, matrix(m, w[WTE]), R, C, m->config.vocab_size);
}

static void head_backward(Model *m, const int *rows, int R) { // from m->dlogits
    int C = m->config.channels;
    float **w = m->params.tensor, **g = m->grads.tensor;
    matmul_backward(Store<floatX>{m->dln, C, NULL}, g[WTE], NULL, m->dlogits, m->padded_logits, m->lnf, matrix(m, w[WTE]), R, C, m->config.vocab_size, m->parts);
    cuda_check(cudaMemset(m->dhead, 0, (size_t)R * C * sizeof(float)), "clearing memory");
    layernorm_backward(m->dhead, m->datty, g[LNFW], g[LNFB], m->dln, m->head_inp, w[LNFW], m->lnf_mean, m->lnf_rstd, R, C, m->parts);
    gather_backward(m->dres, m->dresx, m->dhead, rows, R, C);
}

static double model_loss(Model *m, int backward) {
    int V = m->config.vocab_size;
    size_t BTC = (size_t)m->B * m->T * m->config.channels;
    double loss = 0;
    if (backward) {
        cuda_check(cudaMemset(m->dres, 0, BTC * sizeof(float)), "clearing memory");
        cuda_check(cudaMemset(m->dresx, 0, BTC * sizeof(floatX)), "clearing memory");
    }
    for (int r0 = 0; r0 < m->R; r0 += m->head_rows) {
        int n = min_int(m->head_rows, m->R - r0), *rows = m->rows + r0;
        head_forward(m, rows, n);
        crossentropy_forward_backward(m->losses + r0, backward ? m->dlogits : NULL, m->logits, m->weights, m->targets, rows, n, V, m->padded_logits);
        if (backward) head_backward(m, rows, n);
    }
    row_loss_kernel<<<m->B, WARP>>>(m->row_loss_gpu, m->losses, m->weights, m->rows, m->R, m->T);
    launched("row_loss");
    if (backward) model_backward(m);
    to_host(m->row_loss, m->row_loss_gpu, m->B * sizeof(double)); // waits for all of the above
    for (int b = 0; b < m->B; b++) loss += m->row_loss[b];
    return loss;
}

static void model_change(const Model *m, double *change, int second) {
    state_change_kernel<<<m->B, THREADS>>>(m->change, m->states, m->before, second ? m->before2 : NULL, m->T, m->config.channels);
    launched("state_change");
    to_host(change, m->change, m->B * sizeof(double));
}

static void model_attention(const Model *m, int p, float *qkv, float *lse) {
    Acts a = pass_acts(m, p);
    size_t n = (size_t)3 * m->B * m->T * m->config.channels, rows = (size_t)m->B * m->config.heads * m->T;
    floatX *copy = (floatX *)allocate(n, sizeof(floatX), "attention");
    to_host(copy, a.qkv, n * sizeof(floatX));
    for (size_t i = 0; i < n; i++) qkv[i] = (float)copy[i];
    to_host(lse, a.lse, rows * sizeof(float));
    for (size_t i = 0; i < rows; i++) lse[i] *= 0.69314718f; // from log 2
    free(copy);
}

static void model_sample(Model *m, int *token, double *score, const int *rows, int n, const int *ids, Draw d, uint64_t step) {
    to_device(m->rows, rows, n * sizeof(int));
    to_device(m->ids, ids, m->B * sizeof(int));
    for (int r0 = 0; r0 < n; r0 += m->head_rows) {
        int R = min_int(m->head_rows, n - r0);
        head_forward(m, m->rows + r0, R);
        sample_forward(m->token, m->score, m->logits, m->rows + r0, m->ids, R, m->T, m->config.vocab_size, m->padded_logits, d, step);
        to_host(token + r0, m->token, R * sizeof(int));
        to_host(score + r0, m->score, R * sizeof(double));
    }
}

// =====================================================================================================================
// 5. Optimizer

// squares (blocks): the sums of squares of inp (n) over stretches of SQUARES numbers
__global__ void squares_kernel(double *squares, const float *inp, size_t n) {
    size_t begin = (size_t)blockIdx.x * SQUARES, end = begin + SQUARES < n ? begin + SQUARES : n;
    double sum = 0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += (double)inp[i] * inp[i];
    sum = block_reduce(sum, 0);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

static double gradient_norm(const Model *m) {
    int n = blocks(m->grads.total, SQUARES);
    double sum = 0, *squares = (double *)allocate(n, sizeof(double), "the gradient norm"), *squares_gpu = (double *)m->parts.memory;
    squares_kernel<<<n, THREADS>>>(squares_gpu, m->grads.data, m->grads.total);
    launched("squares");
    to_host(squares, squares_gpu, n * sizeof(double));
    for (int b = 0; b < n; b++) sum += squares[b];
    free(squares);
    return sqrt(sum);
}

__global__ void adamw_kernel(float *p, floatX *px, float *grad, float *m1, float *m2, float *average, size_t n, float scale, float b1, float b2, float keep,
                             float step_size, float correct, float eps, float ema) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = scale * grad[i];
    m1[i] = b1 * m1[i] + (1 - b1) * g;
    m2[i] = b2 * m2[i] + (1 - b2) * g * g;
    p[i] = keep * p[i] - step_size * m1[i] / (sqrtf(m2[i]) * correct + eps);
    grad[i] = 0;
    if (average) average[i] = ema * average[i] + (1 - ema) * p[i];
    if (BF16) px[i] = (floatX)p[i];
}

static void model_update(Model *m, AdamW o, double norm, int step) {
    Shape s[NUM_TENSORS];
    tensor_shapes(m->config, s);
    float scale = (float)fmin(1, o.clip / (norm + 1e-6)), correct = (float)(1 / sqrt(1 - pow(o.beta2, step))), ema = (float)fmin(o.ema, (1.0 + step) / (10 + step));
    for (int t = 0; t < NUM_TENSORS; t++) {
        double lr = o.lr * (t == WTE ? o.wte_lr : 1);
        float keep = (float)(1 - (s[t].in ? lr * o.weight_decay : 0)), step_size = (float)(lr / (1 - pow(o.beta1, step)));
        size_t n = m->params.size[t], at = m->params.tensor[t] - m->params.data;
        adamw_kernel<<<blocks(n, THREADS), THREADS>>>(m->params.tensor[t], m->paramsx + at, m->grads.tensor[t], m->moment1.tensor[t], m->moment2.tensor[t], m->ema.tensor[t], n,
                                                      scale, (float)o.beta1, (float)o.beta2, keep, step_size, correct, (float)o.eps, ema);
        launched("adamw");
    }
}

// =====================================================================================================================
// 6 to 9: data, tokenizer, checkpoints; training step and evaluation; sampler; command line

#undef LOOPMDM_CU
#define LOOPMDM_CU 2
#include "loopmdm.c"
