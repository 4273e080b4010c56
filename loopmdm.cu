/*
LoopMDM on the GPU: the layers of loopmdm.c as hand-written CUDA kernels. They need no library
except the CUDA runtime.

Read loopmdm.c first. It includes this file in the place of its own sections 3 and 4:

    3. layers: kernels, and the functions that launch them
    4. memory, noise, a block forward and backward, head, loss, AdamW

The rest of the program is loopmdm.c: configuration, randomness, the loop over passes, training,
sampling, command line. Functions have nearly the same names and order in both files, so you can
read them side by side.

There are two precisions, and the build chooses one. fp32 is for verification: everything is float.
bf16 is for training: what goes into a matrix product is bfloat16 and goes through tensor cores.
Sums, the residual stream and its gradient, logits, parameters and their gradients stay float. The
kernels are the same. They differ in floatX, in how a warp multiplies, and in how many tiles fit
into shared memory. Built with GPU=sm_90a, which sets HOPPER, bf16 has other kernels for matrix
products and attention, for H100 and H200: dev/hopper*.h.

No sum depends on which block comes first: there are no atomics. The same seed gives the same bits
on the same model of GPU. (Long sums are split into parts. How many depends on its multiprocessors.)

make loopmdm_cuda builds it; the Makefile has nvcc's options. Without a GPU make loopmdm_cuda_on_cpu
runs the same kernels: dev/cuda_on_cpu/cuda_on_cpu.h is a small CUDA for the CPU.
*/
#ifndef BF16
#define BF16 0
#endif
#ifndef PROFILE
#define PROFILE 0
#endif

#ifdef __CUDACC__
#ifndef HOPPER
#define HOPPER 0
#endif
#include "dev/ptx.h"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "Ampere (sm_80) or newer is needed: build on the machine with the GPU, or name it: \
make loopmdm_cuda GPU=sm_80"
#endif
#else
#define HOPPER BF16 // the emulation has both kinds of kernels
#include "dev/cuda_on_cpu/cuda_on_cpu.h"
#endif

#if BF16
typedef __nv_bfloat16 floatX; // what goes into matrix products
typedef uint32_t Word;        // two of them side by side, as tensor cores take them
enum { WORDS = 1 };           // Words for two numbers
#else
typedef float floatX;
typedef float Word;
enum { WORDS = 2 };
#endif

// =================================================================================================
// 3. Layers, each a forward/backward pair
//
// All tensors are row-major, in the GPU's memory, and have the shapes that loopmdm.c gives them.
// The last line above a kernel gives its grid, in blocks, and its block, in threads. Divisions in
// it are rounded up.

static void cuda_check(cudaError_t error, const char *what) {
    if (error == cudaErrorNoKernelImageForDevice)
        die(FAILED, "this program was built for another kind of GPU: remove build/loopmdm_cuda_*, "
                    "and build it on this machine");
    if (error != cudaSuccess)
        die(FAILED, "%s: the GPU reports: %s (CUDA_LAUNCH_BLOCKING=1 shows which kernel it was)",
            what, cudaGetErrorString(error));
}

// Called after every launch; a matrix product also passes its shape. An error inside a kernel shows
// only later; with CUDA_LAUNCH_BLOCKING=1 in the environment it shows here.
#if PROFILE
#include "dev/profile.h" // it also takes the time
#else
static void launched(const char *what, int = 0, int = 0, int = 0) {
    cuda_check(cudaGetLastError(), what);
}
#endif

static void write_memory(void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
}

static void read_memory(void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copying from the GPU");
}

static void clear_memory(void *p, size_t bytes) {
    cuda_check(cudaMemset(p, 0, bytes), "clearing memory");
}

enum { WARP = 32, THREADS = 256 };
#define ALL 0xffffffffu // lanes of a warp

// n / each, rounded up: blocks(9, 4) is 3.
HOST_DEVICE static inline int blocks(size_t n, int each) { return (int)((n + each - 1) / each); }

static const cudaDeviceProp *this_gpu() {
    static cudaDeviceProp gpu;
    int device;
    if (gpu.major) return &gpu;
    cuda_check(cudaGetDevice(&device), "the GPU"); // of several processes each has its own
    cuda_check(cudaGetDeviceProperties(&gpu, device), "the GPU's properties");
    return &gpu;
}

// A block may use more than 48 KiB of shared memory only if the program asks for it.
template <class Kernel>
static void allow_shared(Kernel kernel, size_t bytes, const char *what) {
    auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cuda_check(cudaFuncSetAttribute(kernel, attribute, (int)bytes), what);
}

// This thread's number in the whole grid
__device__ static inline size_t thread_index() {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

// N neighbours, loaded or stored at once. The first is at a multiple of N.
template <class T, int N> struct alignas(N * sizeof(T)) Neighbours { T x[N]; };

template <class T, int N> __device__ static inline void load(float (&x)[N], const T *from) {
    Neighbours<T, N> all = *(const Neighbours<T, N> *)from;
    for (int e = 0; e < N; e++) x[e] = (float)all.x[e];
}

template <class T, int N> __device__ static inline void store(T *to, const float (&x)[N]) {
    Neighbours<T, N> all;
    for (int e = 0; e < N; e++) all.x[e] = (T)x[e];
    *(Neighbours<T, N> *)to = all;
}

// The sum over a warp, in all its lanes: each lane adds what the lane 16 away has, then 8, 4, 2, 1.
template <class T> __device__ static inline T warp_sum(T x) {
    for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}

enum Reduction { SUM, MAXIMUM };

template <class T> __device__ static inline T combine(T a, T b, Reduction how) {
    if (how == SUM) return a + b;
    return b > a ? b : a; // a stays if b is NaN
}

// The sum or the maximum over a block, in all its threads, always taken in the same order
template <class T> __device__ static inline T block_reduce(T x, Reduction how) {
    __shared__ T part[WARP];
    for (int i = WARP / 2; i > 0; i /= 2) x = combine(x, __shfl_xor_sync(ALL, x, i), how);

    __syncthreads(); // the call before may still use part
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads(); // part is complete

    T all = part[0]; // every thread combines the warps' results for itself
    for (int w = 1; w < (int)blockDim.x / WARP; w++) all = combine(all, part[w], how);
    return all;
}

// ---- tensor cores ----
//
// dev/ptx.h has the instructions, the CPU emulation the same functions in C++. A warp multiplies
// A (16,16) by B (16,8). Its lanes hold pairs of neighbours in registers. Lane 4g + q has
//   a[0] A(g, 2q..2q+1)      a[1] A(g+8, 2q..)      a[2] A(g, 2q+8..)      a[3] A(g+8, 2q+8..)
//   b[0] B(2q..2q+1, g)      b[1] B(2q+8.., g)
//   d[0], d[1] D(g, 2q..2q+1)      d[2], d[3] D(g+8, 2q..)
// So two D side by side are laid out like an A: the softmax of attention can go straight into the
// next product.
#if !BF16 && (defined(__CUDACC__) || defined(CUDA_ON_CPU_NO_MMA_FP32))
// The same product in fp32. There is no instruction for it, so lanes pass their numbers around.
__device__ static inline void mma_16x8x16(float d[4], const float a[8], const float b[4]) {
    int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int from = 0; from < 4; from++) // lane 4g + from has A(g,k), lane 4n + from has B(k,n)
#pragma unroll
        for (int i = 0; i < 4; i++) { // of these k: k = 2 from + i%2 + i/2*8
            float a0 = __shfl_sync(ALL, a[i / 2 * 4 + i % 2], 4 * g + from);     // A(g,k)
            float a1 = __shfl_sync(ALL, a[i / 2 * 4 + 2 + i % 2], 4 * g + from); // A(g+8,k)
            float b0 = __shfl_sync(ALL, b[i], 8 * q + from);                     // B(k,2q)
            float b1 = __shfl_sync(ALL, b[i], 8 * q + 4 + from);                 // B(k,2q+1)
            d[0] = fmaf(a0, b0, d[0]);
            d[1] = fmaf(a0, b1, d[1]);
            d[2] = fmaf(a1, b0, d[2]);
            d[3] = fmaf(a1, b1, d[3]);
        }
}
#endif

// A (16,16) from a tile in shared memory with rows ld apart. The tile holds A, or with TRANS A^T.
template <bool TRANS>
__device__ static inline void load_a(Word a[4 * WORDS], const floatX *tile, int ld) {
    int lane = threadIdx.x % WARP;
#if BF16
    // The lane gives the address of a row of one of four matrices (8,8), in the order of a[0..3].
    if (TRANS) ldmatrix_x4_trans(a, tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
    else ldmatrix_x4(a, tile + lane % 16 * ld + lane / 16 * 8);
#else
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) { // number e of a[r] is A(i,k)
            int i = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8 + e;
            a[2 * r + e] = TRANS ? tile[k * ld + i] : tile[i * ld + k];
        }
#endif
}

// Two B side by side, (16,8) each. The tile holds B^T, or with TRANS B.
template <bool TRANS>
__device__ static inline void load_b(Word b[4 * WORDS], const floatX *tile, int ld) {
    int lane = threadIdx.x % WARP;
#if BF16
    // Four matrices (8,8): b[0] and b[1] of the first B, then those of the second.
    if (TRANS) ldmatrix_x4_trans(b, tile + lane % 16 * ld + lane / 16 * 8);
    else ldmatrix_x4(b, tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
#else
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) { // number e of b[r] is B(k,n)
            int n = lane / 4 + r / 2 * 8, k = lane % 4 * 2 + r % 2 * 8 + e;
            b[2 * r + e] = TRANS ? tile[k * ld + n] : tile[n * ld + k];
        }
#endif
}

// Two results (16,8) side by side become an A.
__device__ static inline void to_a(Word a[4 * WORDS], const float left[4], const float right[4]) {
    for (int r = 0; r < 4; r++) {
        const float *from = (r < 2 ? left : right) + r % 2 * 2; // row g, or g + 8 if r is odd
#if BF16
        __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
        memcpy(&a[r], &pair, sizeof pair);
#else
        a[2 * r] = from[0];
        a[2 * r + 1] = from[1];
#endif
    }
}

// Tiles in shared memory have PAD more columns, so that the 8 rows of an ldmatrix lie in different
// banks.
enum { PAD = 16 / sizeof(floatX) };

// Starts to load a tile (ROWS,COLS) into shared memory, its rows COLS + PAD apart, from src, whose
// rows are ld apart. Only (rows,cols) of src exist; what lies beyond becomes zero. BLOCK, if given,
// is the number of threads: then a whole tile takes fewer instructions, but more registers.
template <int ROWS, int COLS, int BLOCK = 0> __device__ static inline
void load_tile(floatX *tile, const floatX *src, size_t ld, int rows, int cols) {
    enum { CHUNK = 16 / sizeof(floatX), PER_ROW = COLS / CHUNK }; // cp.async moves 16 bytes
    enum { AT_ONCE = BLOCK / PER_ROW };                           // rows that the block loads
    bool whole = rows >= ROWS && cols >= COLS && ((uintptr_t)src | ld * sizeof(floatX)) % 16 == 0;
    if (BLOCK && whole) {
        int i = threadIdx.x / PER_ROW, j = threadIdx.x % PER_ROW * CHUNK;
#pragma unroll
        for (int n = 0; n < ROWS; n += max(1, AT_ONCE))
            cp_async_16(tile + (n + i) * (COLS + PAD) + j, src + (n + i) * ld + j, 16);
        return;
    }
    for (int c = threadIdx.x; c < ROWS * PER_ROW; c += blockDim.x) {
        int i = c / PER_ROW, j = c % PER_ROW * CHUNK; // chunk c begins at (i,j)
        int n = i < rows ? min(cols - j, CHUNK) : 0;  // so many of its numbers exist
        floatX *to = tile + i * (COLS + PAD) + j;
        const floatX *from = src + i * ld + j;

        if (n <= 0) *(uint4 *)to = make_uint4(0, 0, 0, 0);
        else if ((uintptr_t)from % 16 == 0) cp_async_16(to, from, n * (int)sizeof(floatX));
        else // the address is not aligned for cp.async: one number after the other
            for (int e = 0; e < CHUNK; e++) to[e] = e < n ? from[e] : (floatX)0.0f;
    }
}

// ---- GELU, tanh form, for the epilogues below ----

#define GELU_SCALE 1.5957691216f // 2 sqrt(2/pi)

// 1 / (1 + exp(-x)); in bf16 by the hardware's approximations
__device__ static inline float sigmoid(float x) {
    return BF16 ? __fdividef(1, 1 + __expf(-x)) : 1 / (1 + expf(-x));
}

__device__ static inline float gelu(float x) {
    return x * sigmoid(GELU_SCALE * (x + 0.044715f * x * x * x));
}

__device__ static inline float gelu_gradient(float x) { // gelu(x) = x s
    float s = sigmoid(GELU_SCALE * (x + 0.044715f * x * x * x));
    return s + x * s * (1 - s) * GELU_SCALE * (1 + 3 * 0.044715f * x * x);
}

// ---- epilogues: what happens to C = A B, the result of a matrix product ----
//
// They get N neighbours, from C(i,j) on. ld, the distance of rows, is a multiple of N. Where the
// number of columns is not, they store up to N - 1 more. read() comes before: so a kernel can load
// for many of them before it stores any. It reads at source(), which dev/hopper.h prefetches (NULL:
// nothing but a bias).

template <class T> struct Store { // out = C + bias (columns), or without bias if it is NULL
    T *out;
    int ld;
    const float *bias;
    __device__ const T *source(int, int) const { return NULL; }
    template <int N> __device__ void read(float (&b)[N], int, int j) const {
        for (int e = 0; e < N; e++) b[e] = 0;
        if (bias) load(b, bias + j);
    }
    template <int N> __device__ void operator()(int i, int j, float (&x)[N], float (&b)[N]) const {
        for (int e = 0; e < N; e++) x[e] += b[e];
        store(out + (size_t)i * ld + j, x);
    }
};

struct StoreGelu { // inp = C + bias, kept for backward; out = gelu(inp)
    floatX *out, *inp;
    int ld;
    const float *bias;
    __device__ const floatX *source(int, int) const { return NULL; }
    template <int N> __device__ void read(float (&b)[N], int, int j) const { load(b, bias + j); }
    template <int N> __device__ void operator()(int i, int j, float (&x)[N], float (&b)[N]) const {
        Store<floatX>{inp, ld, bias}(i, j, x, b);
        for (int e = 0; e < N; e++) x[e] = gelu(x[e]);
        store(out + (size_t)i * ld + j, x);
    }
};

struct StoreGeluBackward { // dinp = C gelu'(inp)
    floatX *dinp;
    const floatX *inp;
    int ld;
    __device__ const floatX *source(int i, int j) const { return inp + (size_t)i * ld + j; }
    template <int N> __device__ void read(float (&u)[N], int i, int j) const {
        load(u, source(i, j));
    }
    template <int N> __device__ void operator()(int i, int j, float (&x)[N], float (&u)[N]) const {
        for (int e = 0; e < N; e++) x[e] *= gelu_gradient(u[e]);
        store(dinp + (size_t)i * ld + j, x);
    }
};

struct StoreResidual { // out = inp + C + bias, or without bias if it is NULL
    float *out;
    const float *inp, *bias;
    int ld;
    __device__ const float *source(int i, int j) const { return inp + (size_t)i * ld + j; }
    template <int N> __device__ void read(float (&u)[N], int i, int j) const {
        load(u, source(i, j));
    }
    template <int N> __device__ void operator()(int i, int j, float (&x)[N], float (&u)[N]) const {
        float b[N] = {};
        if (bias) load(b, bias + j); // not in read(): it would take registers
        for (int e = 0; e < N; e++) x[e] += b[e] + u[e];
        store(out + (size_t)i * ld + j, x);
    }
};

static StoreResidual add_to(float *out, int ld) { return {out, out, NULL, ld}; } // out += C

// ---- the matrix product that everything goes through ----
//
// C (M,N) = A (M,K) B (K,N). A block of 8 warps makes a tile of 128 x 128, each warp 64 x 32 of it,
// with all sums in registers. Tiles of A and B, 32 deep, come through shared memory. While one is
// multiplied, the next ones are on their way: there are STAGES of them in a ring.
//
//                       N
//               +---+---+---+---+         A(i,k) is a[i*lda + k], or with TRANS_A a[k*lda + i].
//     A   K     | 0 | 1 | 2 | 3 |  64     B(k,j) is b[j*ldb + k], or with TRANS_B b[k*ldb + j].
//    [][][] ->  +---+---+---+---+         With TRANS k runs slower, and ldmatrix transposes.
//               | 4 | 5 | 6 | 7 |  64
//               +---+---+---+---+         The epilogue gets C(i,j) and C(i,j+1), with j even, and
//                32  32  32  32           stores them: with a bias, through GELU, ...
enum { TILE = 128, DEPTH = 32, STAGES = BF16 ? 3 : 2, TILE_SIZE = TILE * (DEPTH + PAD) };

// The part of K that block z sums up begins at z * depth. The epilogue gets its rows at z * M + i.
// Grid: (M / TILE, N / TILE, parts of K). Block: THREADS.
template <bool TRANS_A, bool TRANS_B, class Epilogue>
__global__ void __launch_bounds__(THREADS)
matmul_kernel(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
              int M, int N, int K, int depth) {
    extern __shared__ __align__(16) floatX tiles[]; // (STAGES, A and B, TILE_SIZE)
    enum { LDA = (TRANS_A ? TILE : DEPTH) + PAD, LDB = (TRANS_B ? TILE : DEPTH) + PAD };
    int i0 = blockIdx.x * TILE, j0 = blockIdx.y * TILE;
    int begin = blockIdx.z * depth, end = min(K, begin + depth);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int i_warp = warp / 4 * 64, j_warp = warp % 4 * 32;
    bool needed = i0 + i_warp < M && j0 + j_warp < N; // at the edges a warp may have nothing to do
    float sum[4][4][4] = {}; // 4 x 4 results of mma, each (16,8), of which a lane has 4 numbers

    auto load = [&](int step) {
        floatX *at = tiles + step % STAGES * 2 * TILE_SIZE, *bt = at + TILE_SIZE;
        int k0 = begin + step * DEPTH, left = end - k0; // left: how deep the rest is
        if (k0 < end) {
            const floatX *a0 = a + (TRANS_A ? (size_t)k0 * lda + i0 : (size_t)i0 * lda + k0);
            const floatX *b0 = b + (TRANS_B ? (size_t)k0 * ldb + j0 : (size_t)j0 * ldb + k0);
            if (TRANS_A) load_tile<DEPTH, TILE, THREADS>(at, a0, lda, left, M - i0);
            else load_tile<TILE, DEPTH, THREADS>(at, a0, lda, M - i0, left);
            if (TRANS_B) load_tile<DEPTH, TILE, THREADS>(bt, b0, ldb, left, N - j0);
            else load_tile<TILE, DEPTH, THREADS>(bt, b0, ldb, N - j0, left);
        }
        cp_async_commit(); // an empty group counts too
    };

    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; begin + step * DEPTH < end; step++) {
        cp_async_wait<STAGES - 2>(); // what this thread has loaded of the step's tiles is there
        __syncthreads();             // now all of it; and all are done with the step before,
        load(step + STAGES - 1);     // whose place in the ring the next load takes
        if (!needed) continue;

        const floatX *at = tiles + step % STAGES * 2 * TILE_SIZE, *bt = at + TILE_SIZE;
        for (int k = 0; k < DEPTH; k += 16) {
            Word af[4 * WORDS], bf[2][4 * WORDS];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = j_warp + j * 16;
                load_b<TRANS_B>(bf[j], bt + (TRANS_B ? k * LDB + column : column * LDB + k), LDB);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) { // a part of A serves 4 products, a part of B too
                int row = i_warp + i * 16;
                load_a<TRANS_A>(af, at + (TRANS_A ? k * LDA + row : row * LDA + k), LDA);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mma_16x8x16(sum[i][j], af, bf[j / 2] + j % 2 * 2 * WORDS);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) { // rows g and g + 8: see mma
                int row = i0 + i_warp + i * 16 + lane / 4 + half * 8;
                int column = j0 + j_warp + j * 8 + lane % 4 * 2;
                float pair[2] = {sum[i][j][2 * half], sum[i][j][2 * half + 1]}, read[2];
                if (row >= M || column >= N) continue;
                epilogue.read(read, blockIdx.z * M + row, column);
                epilogue(blockIdx.z * M + row, column, pair, read);
            }
}

static const char *product_name(bool trans_a, bool trans_b) {
    return trans_a ? "matmul, weight's gradient" : trans_b ? "matmul, input's gradient" : "matmul";
}

// How wide a tile of C (M,N) is. Hopper's have 192 columns, or 96 where 192 would go far beyond the
// edge of C: tiles of 96 take 1.3 times as long for each column.
static int tile_columns(int N) {
    if (!HOPPER || this_gpu()->major != 9) return TILE;
    return 1.3 * blocks(N, 96) * 96 < blocks(N, 192) * 192 ? 96 : 192;
}

template <bool TRANS_A, bool TRANS_B, class Epilogue>
static void multiply_mma(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
                         int M, int N, int K, int depth) {
    size_t shared = STAGES * 2 * TILE_SIZE * sizeof(floatX);
    dim3 grid(blocks(M, TILE), blocks(N, TILE), blocks(K, depth));
    auto matmul = matmul_kernel<TRANS_A, TRANS_B, Epilogue>;
    allow_shared(matmul, shared, "matmul");
    matmul<<<grid, THREADS, shared>>>(epilogue, a, lda, b, ldb, M, N, K, depth);
    launched(product_name(TRANS_A, TRANS_B), M, N, K);
}

#if HOPPER
#include "dev/hopper.h" // the same on the instructions of H100 and H200
#endif

template <bool TRANS_A, bool TRANS_B, class Epilogue>
static void multiply(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
                     int M, int N, int K, int depth) {
    auto kernel = multiply_mma<TRANS_A, TRANS_B, Epilogue>;
#if HOPPER
    if (hopper_can(a, lda, b, ldb, epilogue.ld))
        kernel = tile_columns(N) == 96 ? multiply_hopper<96, TRANS_A, TRANS_B, Epilogue>
                                       : multiply_hopper<192, TRANS_A, TRANS_B, Epilogue>;
#endif
    kernel(epilogue, a, lda, b, ldb, M, N, K, depth);
}

// Room for the parts of long sums, and how many tiles keep this GPU busy
typedef struct { float *memory; size_t size; int blocks; } Parts;

// Into how many parts to split sums over K, for a result of this size in so many tiles: the last
// round of tiles should be full too, and no part shorter than 256. Example: 150 tiles on a GPU
// that makes 100 at a time take 2 rounds; split in 2 they take 3 rounds of half the length. To
// write a part and to add it up takes part_cost of a round of whole sums.
static int choose_splits(Parts parts, int tiles, int K, size_t size, double part_cost) {
    int most = (int)fmin(fmin(K / 256, parts.blocks), (double)(parts.size / size)), best = 1;
    if (most < 2) return 1;
    double lowest = blocks(tiles, parts.blocks); // the cost in rounds, if nothing is split
    for (int splits = 2; splits <= most; splits++) {
        double rounds = blocks((size_t)tiles * splits, parts.blocks) / (double)splits;
        double cost = rounds + splits * part_cost;
        if (cost < 0.95 * lowest) { // what gains little is not worth a launch
            lowest = cost;
            best = splits;
        }
    }
    return best;
}

// epilogue(i, j, the sum over z of parts (splits,M,ld)), always in the order of z
// Grid: M ld / THREADS. Block: THREADS, a thread for each number.
template <class Epilogue>
__global__ void sum_parts_kernel(Epilogue epilogue, const float *parts, int M, int N, int ld,
                                 int splits) {
    int n = M * ld, at = (int)thread_index(), i = at / ld, j = at % ld;
    if (at >= n || j >= N) return; // the last block may have more threads than there are numbers
    float sum[1] = {parts[at]}, read[1];
    for (int z = 1; z < splits; z++) sum[0] += parts[(size_t)z * n + at];
    epilogue.read(read, i, j);
    epilogue(i, j, sum, read);
}

template <class Epilogue>
static void sum_parts(Epilogue epilogue, const float *parts, int M, int N, int ld, int splits) {
    int grid = blocks((size_t)M * ld, THREADS);
    sum_parts_kernel<Epilogue><<<grid, THREADS>>>(epilogue, parts, M, N, ld, splits);
    launched("sum_parts");
}

// epilogue(A B), with the sums over K in parts if that fills the GPU better
template <bool TRANS_A, bool TRANS_B, class Epilogue>
static void matmul(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
                   int M, int N, int K, Parts parts) {
    // Hopper's kernel makes one tile at a time on each multiprocessor, in half the time.
    if (HOPPER && this_gpu()->major == 9) parts.blocks /= 2;
    int ld = (N + 3) / 4 * 4, tiles = blocks(M, TILE) * blocks(N, tile_columns(N));
    // A number of a part takes 8 bytes of traffic. An A100 or H200 does 1600 operations meanwhile.
    double part_cost = 1600 / (2.0 * K) * tiles / parts.blocks;
    int splits = choose_splits(parts, tiles, K, (size_t)M * ld, part_cost);
    // Parts begin at multiples of 64, what Hopper loads at a time: it would run into the next part.
    int depth = blocks(blocks(K, splits), 64) * 64;
    if (depth >= K) {
        multiply<TRANS_A, TRANS_B>(epilogue, a, lda, b, ldb, M, N, K, depth);
        return;
    }
    Store<float> part = {parts.memory, ld, NULL};
    multiply<TRANS_A, TRANS_B>(part, a, lda, b, ldb, M, N, K, depth);
    sum_parts(epilogue, parts.memory, M, N, ld, blocks(K, depth));
}

// ---- linear layer ----

// out = epilogue(inp (M,C) weight^T), weight (OC,C)
template <class Epilogue> static void
matmul_forward(Epilogue out, const floatX *inp, const floatX *weight, int M, int C, int OC) {
    Parts none = {NULL, 0, 2}; // no memory: nothing is split. 2, as Hopper takes half of them
    matmul<false, false>(out, inp, C, weight, C, M, OC, C, none);
}

// Columns of inp (M,N), summed: row y of the result is the sum over part y of the rows, and goes to
// the epilogue. inp has rows ld apart.
// Grid: (N / (WARP * W), parts). Block: THREADS: a warp has a row at a time, a lane W neighbours.
template <int W, class T, class Epilogue>
__global__ void column_sums_kernel(Epilogue epilogue, const T *inp, int ld, int M, int N) {
    __shared__ float sums[THREADS / WARP][WARP * W];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int column = (blockIdx.x * WARP + lane) * W, each = blocks(M, gridDim.y); // rows of a part
    int begin = blockIdx.y * each, end = min(M, begin + each);
    float sum[W] = {};
    if (column >= N) end = begin;
#pragma unroll 8 // many loads at a time
    for (int i = begin + warp; i < end; i += THREADS / WARP) {
        float row[W];
        load(row, inp + (size_t)i * ld + column);
        for (int e = 0; e < W; e++) sum[e] += row[e];
    }
    for (int e = 0; e < W; e++) sums[warp][lane * W + e] = sum[e];
    __syncthreads();

    // The first warp adds up what the 8 warps have of each column.
    if (warp > 0 || column >= N) return;
    for (int w = 1; w < THREADS / WARP; w++)
        for (int e = 0; e < W; e++) sum[e] += sums[w][lane * W + e];
    float read[W];
    epilogue.read(read, blockIdx.y, column);
    epilogue(blockIdx.y, column, sum, read);
}

template <class T, class Epilogue>
static void column_sums(Epilogue epilogue, const T *inp, int ld, int M, int N, int splits) {
    bool four = (N | ld) % 4 == 0 && ((uintptr_t)inp | (uintptr_t)epilogue.out) % 16 == 0;
    auto kernel = four ? column_sums_kernel<4, T, Epilogue> : column_sums_kernel<1, T, Epilogue>;
    dim3 grid(blocks(N, four ? WARP * 4 : WARP), splits);
    kernel<<<grid, THREADS>>>(epilogue, inp, ld, M, N);
    launched("column_sums");
}

// out (N) += the column sums of inp (M,N)
template <class T>
static void add_column_sums(float *out, const T *inp, int ld, int M, int N, Parts parts) {
    parts.blocks *= 4; // these blocks are small: four times as many run at a time
    int splits = choose_splits(parts, blocks(N, WARP * 4), M, N, 0);
    Store<float> to_parts = {parts.memory, N, NULL};
    column_sums(to_parts, inp, ld, M, N, splits);
    column_sums(add_to(out, N), parts.memory, N, splits, N, 1);
}

// dinp = epilogue(dout weight),  dweight += dout^T inp,  dbias += column sums of dout
// dout (M,OC) has rows ldout apart; weight (OC,C); dbias (OC) may be NULL.
template <class Epilogue>
static void matmul_backward(Epilogue dinp, float *dweight, float *dbias, const floatX *dout,
                            int ldout, const floatX *inp, const floatX *weight,
                            int M, int C, int OC, Parts parts) {
    matmul<false, true>(dinp, dout, ldout, weight, C, M, C, OC, parts);
    StoreResidual to_dweight = add_to(dweight, C); // few tiles and long sums, over the M rows
    matmul<true, true>(to_dweight, dout, ldout, inp, C, OC, C, M, parts);
    if (dbias) add_column_sums(dbias, dout, ldout, M, OC, parts);
}

// ---- noise ----

// Grid: BT / THREADS. Block: THREADS, a thread for each position.
__global__ void noise_kernel(int *x, float *weights, const int *targets, const int *given, int V,
                             Noise noise, int BT, int T) {
    int i = (int)thread_index(), b = i / T;
    if (i >= BT) return;
    double t = noise_level(noise, b); // each thread computes its sequence's again
    double u = random_uniform(noise.seed, STREAM_MASK, noise.step, (uint64_t)noise.first * T + i);
    int predicted = i % T >= given[b] && u < t;
    x[i] = predicted && u >= noise.visible * t ? V : targets[i];
    weights[i] = predicted ? (float)(1 / (t * noise.total * (T - given[b]))) : 0;
}

static void noise_forward(int *x, float *weights, const int *targets, const int *given, int V,
                          Noise noise, int B, int T) {
    int BT = B * T;
    noise_kernel<<<blocks(BT, THREADS), THREADS>>>(x, weights, targets, given, V, noise, BT, T);
    launched("noise");
}

// positions (R): where weights (BT) are not zero, ascending. Each thread has a stretch of them: it
// counts its own, learns how many come before them, and writes them there.
// Grid: 1. Block: THREADS.
__global__ void masked_positions_kernel(int *positions, int *R, const float *weights, int BT) {
    __shared__ int counts[THREADS];
    int each = blocks(BT, THREADS); // positions of a stretch
    int begin = threadIdx.x * each, end = min(BT, begin + each), count = 0, before = 0;
    for (int i = begin; i < end; i++) count += weights[i] > 0;
    counts[threadIdx.x] = count;
    __syncthreads(); // all have counted

    for (int t = 0; t < (int)threadIdx.x; t++) before += counts[t];
    if (threadIdx.x == THREADS - 1) *R = before + count;
    for (int i = begin; i < end; i++)
        if (weights[i] > 0) positions[before++] = i;
}

// Returns R, which the kernel leaves at R on the GPU.
static int masked_positions(int *positions, int *R, const float *weights, int BT) {
    int count;
    masked_positions_kernel<<<1, THREADS>>>(positions, R, weights, BT);
    launched("masked_positions");
    read_memory(&count, R, sizeof count); // the host needs it for the grids of the head
    return count;
}

// ---- embedding ----

// Grid: n / THREADS. Block: THREADS, a thread for each of the n = BTC numbers of out.
__global__ void encoder_forward_kernel(float *out, const int *x, const float *wte, const float *wpe,
                                       size_t n, int T, int C) {
    size_t i = thread_index();
    if (i < n) out[i] = wte[(size_t)x[i / C] * C + i % C] + wpe[i / C % T * C + i % C];
}

static void encoder_forward(float *out, const int *x, const float *wte, const float *wpe,
                            int B, int T, int C) {
    size_t n = (size_t)B * T * C;
    encoder_forward_kernel<<<blocks(n, THREADS), THREADS>>>(out, x, wte, wpe, n, T, C);
    launched("encoder_forward");
}

// dwte[token] += dout at all positions of the token. Many positions add to one row of dwte, so the
// blocks of the token's first position do all of them, each for 64 channels. A block looks for the
// others, 256 positions at a time, and each of 4 groups of threads adds up a quarter of them.
// Grid: (BT, C / 64). Block: THREADS.
__global__ void wte_backward_kernel(float *dwte, const float *dout, const int *x, int BT, int C) {
    enum { CHANNELS = 64, TOGETHER = THREADS / CHANNELS };
    __shared__ int found[THREADS];
    __shared__ int counts[THREADS / WARP];
    __shared__ float sums[THREADS];
    int i = blockIdx.x, token = x[i];
    int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    int c = blockIdx.y * CHANNELS + thread % CHANNELS;
    float sum = 0;

    // A block whose token is at an earlier position has nothing to do.
    for (int j = thread; j - thread < i; j += THREADS)
        if (__syncthreads_or(j < i && x[j] == token)) return;

    for (int j = i + thread; j - thread < BT; j += THREADS) {
        // found (n): those of these 256 positions that have the token, in order. Each lane votes.
        int same = j < BT && x[j] == token, before = 0, n = 0;
        unsigned votes = __ballot_sync(ALL, same);
        if (lane == 0) counts[warp] = __popc(votes); // bits that are set
        __syncthreads();
        for (int w = 0; w < THREADS / WARP; w++) {
            before += w < warp ? counts[w] : 0;
            n += counts[w];
        }
        if (same) found[before + __popc(votes & ((1u << lane) - 1))] = j; // after lower lanes' ones
        __syncthreads();

        if (c >= C) n = 0;
#pragma unroll 8 // many loads at a time: there may be thousands of MASK
        for (int k = thread / CHANNELS; k < n; k += TOGETHER)
            sum += dout[(size_t)found[k] * C + c];
    }
    sums[thread] = sum;
    __syncthreads(); // all groups have their sums
    if (thread >= CHANNELS || c >= C) return;
    for (int group = 1; group < TOGETHER; group++) sum += sums[group * CHANNELS + thread];
    dwte[(size_t)token * C + c] += sum;
}

// dwpe += the sum of dout over sequences
// Grid: TC / THREADS. Block: THREADS, a thread for each number of dwpe.
__global__ void wpe_backward_kernel(float *dwpe, const float *dout, int B, size_t TC) {
    size_t i = thread_index();
    if (i >= TC) return;
    float sum = dwpe[i];
    for (int b = 0; b < B; b++) sum += dout[b * TC + i];
    dwpe[i] = sum;
}

static void encoder_backward(float *dwte, float *dwpe, const float *dout, const int *x,
                             int B, int T, int C) {
    size_t TC = (size_t)T * C;
    wte_backward_kernel<<<dim3(B * T, blocks(C, 64)), THREADS>>>(dwte, dout, x, B * T, C);
    launched("wte_backward");
    wpe_backward_kernel<<<blocks(TC, THREADS), THREADS>>>(dwpe, dout, B, TC);
    launched("wpe_backward");
}

// ---- layer normalization ----

// Grid: M / 8. Block: THREADS, a warp for each row, a lane for N neighbours at a time.
template <int N>
__global__ void layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const float *inp,
                                         const float *weight, const float *bias, int M, int C) {
    int i = (int)(thread_index() / WARP), lane = threadIdx.x % WARP;
    if (i >= M) return;
    const float *row = inp + (size_t)i * C;
    float sum = 0, squares = 0, x[N], w[N], b[N];
    for (int c = lane * N; c < C; c += WARP * N) {
        load(x, row + c);
        for (int e = 0; e < N; e++) sum += x[e];
    }
    float m = warp_sum(sum) / C;
    for (int c = lane * N; c < C; c += WARP * N) {
        load(x, row + c);
        for (int e = 0; e < N; e++) squares += (x[e] - m) * (x[e] - m);
    }
    float s = 1 / sqrtf(warp_sum(squares) / C + 1e-5f); // 1e-5: no division by zero

    for (int c = lane * N; c < C; c += WARP * N) {
        load(x, row + c);
        load(w, weight + c);
        load(b, bias + c);
        for (int e = 0; e < N; e++) x[e] = (x[e] - m) * s * w[e] + b[e];
        store(out + (size_t)i * C + c, x);
    }
    if (lane == 0) {
        mean[i] = m;
        rstd[i] = s;
    }
}

static void layernorm_forward(floatX *out, float *mean, float *rstd, const float *inp,
                              const float *weight, const float *bias, int M, int C) {
    auto kernel = C % 4 == 0 ? layernorm_forward_kernel<4> : layernorm_forward_kernel<1>;
    kernel<<<blocks(M, THREADS / WARP), THREADS>>>(out, mean, rstd, inp, weight, bias, M, C);
    launched("layernorm_forward");
}

// With xhat = (inp - mean) rstd and g = dout weight:
//   dinp += rstd (g - mean(g) - xhat mean(g xhat)),  dweight += sum(dout xhat),  dbias += sum(dout)
// dinpx (M,C) is a copy of the sum for the next matrix product. Each block has a part of the rows,
// and leaves its part of dweight and dbias in parts (blocks,2,C). It takes 8 rows at a time: first
// each warp sums one up, then each thread has columns of all. N neighbours are loaded at a time.
// Grid: any. Block: THREADS. Shared memory: (2,C) floats.
template <int N>
__global__ void layernorm_backward_kernel(float *__restrict__ dinp, floatX *__restrict__ dinpx,
                                          float *parts, const floatX *__restrict__ dout,
                                          const float *__restrict__ inp, const float *weight,
                                          const float *mean, const float *rstd, int M, int C) {
    extern __shared__ __align__(16) float sums[];
    __shared__ __align__(16) float of_row[THREADS / WARP][4]; // mean, rstd, mean(g), mean(g xhat)
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, each = blocks(M, gridDim.x);
    int begin = blockIdx.x * each, end = min(M, begin + each);
    float dy[N], x[N], w[N], dx[N];
    for (int c = threadIdx.x; c < 2 * C; c += THREADS) sums[c] = 0;

    for (int i0 = begin; i0 < end; i0 += THREADS / WARP) {
        int i = i0 + warp;
        if (i < end) {
            float m = mean[i], s = rstd[i], g = 0, gx = 0;
            for (int c = lane * N; c < C; c += WARP * N) {
                load(dy, dout + (size_t)i * C + c);
                load(x, inp + (size_t)i * C + c);
                load(w, weight + c);
                for (int e = 0; e < N; e++) {
                    g += dy[e] * w[e];
                    gx += dy[e] * w[e] * (x[e] - m) * s;
                }
            }
            float four[4] = {m, s, warp_sum(g) / C, warp_sum(gx) / C};
            if (lane == 0) store(of_row[warp], four);
        }
        __syncthreads(); // all rows are summed up

        int rows = min(THREADS / WARP, end - i0);
        for (int c = threadIdx.x * N; c < C; c += THREADS * N) { // the same thread each time
            float dw[N] = {}, db[N] = {};
            load(w, weight + c);
#pragma unroll 4
            for (int r = 0; r < rows; r++) {
                const float *row = of_row[r];
                size_t at = (size_t)(i0 + r) * C + c;
                load(dy, dout + at);
                load(x, inp + at);
                load(dx, dinp + at);
                for (int e = 0; e < N; e++) {
                    float xhat = (x[e] - row[0]) * row[1];
                    dx[e] += row[1] * (dy[e] * w[e] - row[2] - xhat * row[3]);
                    dw[e] += dy[e] * xhat;
                    db[e] += dy[e];
                }
                store(dinp + at, dx);
                store(dinpx + at, dx);
            }
            for (int e = 0; e < N; e++) {
                sums[c + e] += dw[e];
                sums[C + c + e] += db[e];
            }
        }
        __syncthreads(); // all are done with these rows
    }
    for (int c = threadIdx.x; c < 2 * C; c += THREADS)
        parts[(size_t)blockIdx.x * 2 * C + c] = sums[c];
}

static void layernorm_backward(float *dinp, floatX *dinpx, float *dweight, float *dbias,
                               const floatX *dout, const float *inp, const float *weight,
                               const float *mean, const float *rstd, int M, int C, Parts parts) {
    int most = (int)min((size_t)2 * parts.blocks, parts.size / (2 * C));
    int grid = min(most, blocks(M, THREADS / WARP));
    size_t shared = 2 * C * sizeof(float);
    auto kernel = C % 4 == 0 ? layernorm_backward_kernel<4> : layernorm_backward_kernel<1>;
    allow_shared(kernel, shared, "layernorm_backward");
    kernel<<<grid, THREADS, shared>>>(dinp, dinpx, parts.memory, dout, inp, weight, mean, rstd,
                                      M, C);
    launched("layernorm_backward");
    column_sums(add_to(dweight, C), parts.memory, 2 * C, grid, C, 1);
    column_sums(add_to(dbias, C), parts.memory + C, 2 * C, grid, C, 1);
}

// ---- rotary positions ----

// Turns q and k in place by sign times the angle of the position.
// Grid: BTC / N / THREADS. Block: THREADS, a thread for N neighbouring pairs of channels.
template <int N>
__global__ void rope_kernel(floatX *qkv, const float *cosine, const float *sine, float sign,
                            int BT, int T, int C, int NH) {
    unsigned n = (unsigned)thread_index(), per_row = C / N, i = n / per_row; // i: position
    if (i >= (unsigned)BT) return;
    unsigned half = C / NH / 2, pair = n % per_row * N, h = pair / half, j = pair % half;
    floatX *x = qkv + (size_t)i * 3 * C + h * 2 * half + j; // h counts the heads of q, then of k
    float x0[N], x1[N], c[N], s[N], y0[N], y1[N];
    load(x0, x);
    load(x1, x + half);
    load(c, cosine + i % T * half + j);
    load(s, sine + i % T * half + j);
    for (int e = 0; e < N; e++) {
        y0[e] = x0[e] * c[e] - x1[e] * sign * s[e];
        y1[e] = x1[e] * c[e] + x0[e] * sign * s[e];
    }
    store(x, y0);
    store(x + half, y1);
}

static void rope(floatX *qkv, const float *cosine, const float *sine, float sign,
                 int B, int T, int C, int NH) {
    int n = C / NH / 2 % 4 == 0 ? 4 : 1; // C = NH * D/2 pairs of q, and as many of k: C pairs
    auto kernel = n == 4 ? rope_kernel<4> : rope_kernel<1>;
    kernel<<<blocks((size_t)B * T * C / n, THREADS), THREADS>>>(qkv, cosine, sine, sign, B * T, T,
                                                                C, NH);
    launched("rope");
}

// ---- attention, in the manner of FlashAttention (Dao 2023): no T x T matrix in memory ----
//
// Forward: a block of 4 warps has 64 queries of one head, a warp 16 of them. It goes over all keys,
// 64 at a time. Scores, probabilities and the output stay in registers. The softmax is online: when
// a larger score comes, what was summed so far is scaled down.
//
// D is the size of a head, C/NH, rounded up to 32, 48, 64, 96 or 128; the added columns are zero.
// Scores are in units of log 2, because exp2 is what the hardware has:
//   score = q k^T scale2  with scale2 = log2(e)/sqrt(C/NH),   lse = log2 sum exp2(score)
enum { ATTN_ROWS = 64, ATTN_THREADS = 128, KEYS = 64 };

// In bf16 the hardware's approximation is exact enough.
__device__ static inline float exp_2(float x) { return BF16 ? exp2_approx(x) : exp2f(x); }

// sum (16,N) += a (16,D) b^T with b (N,D). Both are tiles in shared memory.
template <int D, int N> __device__ static inline
void multiply_rows(float sum[N / 8][4], const floatX *a, const floatX *b) {
    enum { LD = D + PAD };
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        Word af[4 * WORDS], bf[4 * WORDS]; // one of A, and two of B side by side
        load_a<false>(af, a + d, LD);
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            load_b<false>(bf, b + j * 16 * LD + d, LD);
            mma_16x8x16(sum[2 * j], af, bf);
            mma_16x8x16(sum[2 * j + 1], af, bf + 2 * WORDS);
        }
    }
}

// sum (16,D) += p (16,N) b with b (N,D). p is in registers, b a tile in shared memory.
template <int D, int N> __device__ static inline
void multiply_probabilities(float sum[D / 8][4], const float p[N / 8][4], const floatX *b) {
    enum { LD = D + PAD };
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
        Word af[4 * WORDS], bf[4 * WORDS];
        to_a(af, p[2 * j], p[2 * j + 1]); // columns 16j .. 16j+15 of p
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            load_b<true>(bf, b + j * 16 * LD + d * 16, LD);
            mma_16x8x16(sum[2 * d], af, bf);
            mma_16x8x16(sum[2 * d + 1], af, bf + 2 * WORDS);
        }
    }
}

// Stores a warp's result (16,D) in a matrix with rows ld apart, where it has such rows and columns.
template <int D> __device__ static inline
void store_rows(floatX *to, size_t ld, const float result[D / 8][4], int rows, int columns) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = lane / 4 + half * 8, column = d * 8 + lane % 4 * 2;
            float pair[2] = {result[d][2 * half], result[d][2 * half + 1]};
            if (row < rows && column < columns) store(to + row * ld + column, pair);
        }
}

// Sets scores p (16,8N) to -infinity in the columns from `begin` on.
template <int N> __device__ static inline void mask_beyond(float (&p)[N][4], int begin) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (j * 8 + (int)threadIdx.x % 4 * 2 + e % 2 >= begin) p[j][e] = -INFINITY;
}

// One step of the online softmax, for a warp's 16 queries and the first `keys` of KEYS keys. p are
// scores without scale2, and become probabilities. y, the output so far, and sum are scaled down if
// a larger score comes. Of queries lane / 4 and lane / 4 + 8: largest; sum, over the lane's keys.
template <int D> __device__ static inline
void online_softmax(float (&p)[KEYS / 8][4], float y[D / 8][4], float largest[2], float sum[2],
                    float scale2, int keys) {
    if (keys < KEYS) mask_beyond(p, keys);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = largest[half], s = 0;
#pragma unroll
        for (int j = 0; j < KEYS / 4; j++) // the lane's scores of one query
            m = fmaxf(m, p[j / 2][2 * half + j % 2]);
        m = fmaxf(m, __shfl_xor_sync(ALL, m, 1)); // four lanes share a query
        m = fmaxf(m, __shfl_xor_sync(ALL, m, 2));

        float shrink = exp_2((largest[half] - m) * scale2); // 1 if no larger score has come
        largest[half] = m;
#pragma unroll
        for (int j = 0; j < KEYS / 4; j++) {
            float *x = &p[j / 2][2 * half + j % 2];
            *x = exp_2(*x * scale2 - m * scale2);
            s += *x;
        }
        sum[half] = sum[half] * shrink + s;
#pragma unroll
        for (int d = 0; d < D / 4; d++) y[d / 2][2 * half + d % 2] *= shrink;
    }
}

// Its end, for the first `rows` of the 16 queries: divides y by the sum, and stores y and lse.
template <int D> __device__ static inline
void store_softmax(floatX *out, size_t ld, float *lse, float y[D / 8][4], const float largest[2],
                   const float sum[2], float scale2, int rows, int columns) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + half * 8;
        float s = sum[half];
        s += __shfl_xor_sync(ALL, s, 1);
        s += __shfl_xor_sync(ALL, s, 2);
        if (lane % 4 == 0 && row < rows) lse[row] = largest[half] * scale2 + log2f(s);
#pragma unroll
        for (int d = 0; d < D / 4; d++) y[d / 2][2 * half + d % 2] *= 1 / s;
    }
    store_rows<D>(out, ld, y, rows, columns);
}

// Grid: B * NH * (T / ATTN_ROWS), a block for 64 queries of a head. Block: ATTN_THREADS.
template <int D> __global__ void __launch_bounds__(ATTN_THREADS)
attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, float scale,
                         int T, int C, int NH) {
    enum { LD = D + PAD };
    extern __shared__ __align__(16) floatX tiles[];
    floatX *qt = tiles, *kt = qt + ATTN_ROWS * LD, *vt = kt + KEYS * LD; // tiles of q, k, v
    int bh = blockIdx.x / blocks(T, ATTN_ROWS), b = bh / NH, h = bh % NH, size = C / NH;
    int warp = threadIdx.x / WARP;
    int t0 = blockIdx.x % blocks(T, ATTN_ROWS) * ATTN_ROWS, t_warp = t0 + warp * 16;
    const floatX *q = qkv + (size_t)b * T * 3 * C + h * size, *k = q + C, *v = k + C;
    float scale2 = scale * 1.44269504f; // log2(e)
    float y[D / 8][4] = {}; // the warp's (16,D) of out, not yet divided by the sum
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    load_tile<ATTN_ROWS, D>(qt, q + (size_t)t0 * 3 * C, 3 * C, T - t0, size);
    load_tile<KEYS, D>(kt, k, 3 * C, T, size);
    cp_async_commit();
    load_tile<KEYS, D>(vt, v, 3 * C, T, size);
    cp_async_commit();
    for (int j0 = 0; j0 < T; j0 += KEYS) {
        float p[KEYS / 8][4] = {}; // (16,KEYS): scores, then probabilities
        int next = j0 + KEYS;
        cp_async_wait<1>(); // the keys are there, the values may be on their way
        __syncthreads();
        multiply_rows<D, KEYS>(p, qt + warp * 16 * LD, kt);

        __syncthreads(); // all are done with these keys: the next may come during the softmax
        if (next < T) load_tile<KEYS, D>(kt, k + (size_t)next * 3 * C, 3 * C, T - next, size);
        cp_async_commit();
        online_softmax<D>(p, y, largest, sum, scale2, T - j0);

        cp_async_wait<1>(); // the values are there, the next keys may be on their way
        __syncthreads();
        multiply_probabilities<D, KEYS>(y, p, vt);

        __syncthreads(); // all are done with these values
        if (next < T) load_tile<KEYS, D>(vt, v + (size_t)next * 3 * C, 3 * C, T - next, size);
        cp_async_commit();
    }

    floatX *to = out + ((size_t)b * T + t_warp) * C + h * size;
    lse += (size_t)bh * T + t_warp;
    store_softmax<D>(to, C, lse, y, largest, sum, scale2, T - t_warp, size);
}

// Backward: with p = exp2(score - lse), dp = dout v^T and delta = sum(p dp) over a query's keys,
//   dscores = p (dp - delta) / sqrt(C/NH),   dv = p^T dout,   dk = dscores^T q,   dq = dscores k
// Two launches do this, and both compute the scores again. Every sum then has one owner, without
// atomics: a block of the first owns keys and goes over all queries, a block of the second owns
// queries and goes over all keys.

// lse_delta (B,NH,tiles * ATTN_ROWS,2) = lse and delta of each query. delta is the sum of dout out
// over the head's channels, because dp_j = dout v_j and out = sum(p_j v_j). Queries beyond the last
// get an infinite lse, which makes their p zero.
// Grid: B * NH * tiles * ATTN_ROWS / 32. Block: THREADS, 8 lanes for each query. A lane has N
// neighbouring channels at a time.
template <int N>
__global__ void attention_delta_kernel(float *lse_delta, const float *lse, const floatX *dout,
                                       const floatX *out, int T, int C, int NH) {
    int padded_T = blocks(T, ATTN_ROWS) * ATTN_ROWS, size = C / NH;
    int n = (int)(thread_index() / 8), lane = threadIdx.x % 8;
    int bh = n / padded_T, t = n % padded_T; // the number of queries has no remainder
    size_t at = ((size_t)(bh / NH) * T + t) * C + bh % NH * size;
    float both[2] = {t < T ? lse[(size_t)bh * T + t] : INFINITY, 0};
    for (int d = lane * N; d < size && t < T; d += 8 * N) {
        float dy[N], y[N];
        load(dy, dout + at + d);
        load(y, out + at + d);
        for (int e = 0; e < N; e++) both[1] += dy[e] * y[e];
    }
    for (int i = 4; i > 0; i /= 2) both[1] += __shfl_xor_sync(ALL, both[1], i);
    if (lane == 0) store(lse_delta + 2 * (size_t)n, both);
}

// How many of the others, queries or keys, to load at a time. Heads of 128 in fp32 then take all of
// the 99 KiB that the smallest GPUs (8.6, 8.9, 12.0) give a block.
HOST_DEVICE static constexpr int others_at_a_time(int D, bool of_keys) {
    if (D > 64) return 16;
    if (of_keys) return BF16 || D < 64 ? 64 : 32;
    return D <= 32 ? 64 : 32;
}

// p (16,N) += a1 b1^T and q (16,N) += a2 b2^T, by turns: a tensor core then waits less for a sum.
template <int D, int N> __device__ static inline
void multiply_rows(float p[N / 8][4], const floatX *a1, const floatX *b1,
                   float q[N / 8][4], const floatX *a2, const floatX *b2) {
    enum { LD = D + PAD };
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        Word af1[4 * WORDS], af2[4 * WORDS], bf[4 * WORDS];
        load_a<false>(af1, a1 + d, LD);
        load_a<false>(af2, a2 + d, LD);
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            load_b<false>(bf, b1 + j * 16 * LD + d, LD);
            mma_16x8x16(p[2 * j], af1, bf);
            mma_16x8x16(p[2 * j + 1], af1, bf + 2 * WORDS);
            load_b<false>(bf, b2 + j * 16 * LD + d, LD);
            mma_16x8x16(q[2 * j], af2, bf);
            mma_16x8x16(q[2 * j + 1], af2, bf + 2 * WORDS);
        }
    }
}

// dk and dv of the block's keys from all queries; or, with OF_KEYS false, dq of the block's queries
// from all keys. x1, x2 are tiles of the block's own, k and v or q and dout; y1, y2 of the others,
// q and dout or k and v. The block's own positions are the rows of p and dscores.
// Grid: B * NH * (T / ATTN_ROWS), a block for 64 positions of a head. Block: ATTN_THREADS.
template <int D, bool OF_KEYS> __global__ void __launch_bounds__(ATTN_THREADS)
attention_backward_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv,
                          const float *lse_delta, float scale, int T, int C, int NH) {
    enum { LD = D + PAD, N = others_at_a_time(D, OF_KEYS) };
    extern __shared__ __align__(16) floatX tiles[];
    floatX *x1 = tiles, *x2 = x1 + ATTN_ROWS * LD;
    floatX *ring = x2 + ATTN_ROWS * LD; // two places, each for N positions of y1 and y2
    int bh = blockIdx.x / blocks(T, ATTN_ROWS), b = bh / NH, h = bh % NH, size = C / NH;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int t0 = blockIdx.x % blocks(T, ATTN_ROWS) * ATTN_ROWS, t_warp = t0 + warp * 16;
    const floatX *q = qkv + (size_t)b * T * 3 * C + h * size, *k = q + C, *v = k + C;
    const floatX *dy = dout + (size_t)b * T * C + h * size;
    int ldx = OF_KEYS ? 3 * C : C, ldy = OF_KEYS ? C : 3 * C; // of x2 and y2
    float scale2 = scale * 1.44269504f, dk_or_dq[D / 8][4] = {}, dv[OF_KEYS ? D / 8 : 1][4] = {};
    float own[2][2]; // lse and delta of the warp's queries lane / 4 and lane / 4 + 8; not OF_KEYS
    lse_delta += (size_t)bh * blocks(T, ATTN_ROWS) * ATTN_ROWS * 2;
    for (int half = 0; half < 2; half++)
        load(own[half], lse_delta + (t_warp + lane / 4 + half * 8) * 2);

    auto load_next = [&](int u) { // positions u .. u+N-1 of y1 and y2
        floatX *to = ring + u / N % 2 * 2 * N * LD;
        if (u < T) {
            const floatX *y1 = OF_KEYS ? q : k, *y2 = OF_KEYS ? dy : v;
            load_tile<N, D>(to, y1 + (size_t)u * 3 * C, 3 * C, T - u, size);
            load_tile<N, D>(to + N * LD, y2 + (size_t)u * ldy, ldy, T - u, size);
        }
        cp_async_commit(); // an empty group counts too
    };
    load_tile<ATTN_ROWS, D>(x1, (OF_KEYS ? k : q) + (size_t)t0 * 3 * C, 3 * C, T - t0, size);
    load_tile<ATTN_ROWS, D>(x2, (OF_KEYS ? v : dy) + (size_t)t0 * ldx, ldx, T - t0, size);
    load_next(0);
    for (int u0 = 0; u0 < T; u0 += N) {
        const floatX *y1 = ring + u0 / N % 2 * 2 * N * LD, *y2 = y1 + N * LD;
        load_next(u0 + N);
        cp_async_wait<1>(); // these positions are there, the next may be on their way
        __syncthreads();

        float p[N / 8][4] = {}, dscores[N / 8][4] = {}; // first scores and dp
        multiply_rows<D, N>(p, x1 + warp * 16 * LD, y1, dscores, x2 + warp * 16 * LD, y2);
        if (!OF_KEYS && T - u0 < N) mask_beyond(p, T - u0);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            float others[4]; // lse and delta of two queries
            if (OF_KEYS) load(others, lse_delta + 2 * (u0 + j * 8 + lane % 4 * 2));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float *query = OF_KEYS ? others + e % 2 * 2 : own[e / 2];
                p[j][e] = exp_2(p[j][e] * scale2 - query[0]);
                dscores[j][e] = scale * p[j][e] * (dscores[j][e] - query[1]);
            }
        }
        multiply_probabilities<D, N>(dk_or_dq, dscores, y1);
        if constexpr (OF_KEYS) multiply_probabilities<D, N>(dv, p, y2);

        __syncthreads(); // all are done with these positions: others may take their place
    }
    floatX *to = dqkv + ((size_t)b * T + t_warp) * 3 * C + h * size;
    store_rows<D>(to + (OF_KEYS ? C : 0), 3 * C, dk_or_dq, T - t_warp, size);
    if constexpr (OF_KEYS) store_rows<D>(to + 2 * C, 3 * C, dv, T - t_warp, size);
}

#if HOPPER
#include "dev/hopper_attention.h" // these kernels on the instructions of H100 and H200
#endif

template <int D> static void
attention_forward_of(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
#if HOPPER
    if (this_gpu()->major == 9 && C / NH == D)
        return attention_forward_hopper<D>(out, lse, qkv, B, T, C, NH);
#endif
    int grid = B * NH * blocks(T, ATTN_ROWS);
    size_t shared = (ATTN_ROWS + 2 * KEYS) * (D + PAD) * sizeof(floatX);
    auto attention = attention_forward_kernel<D>;
    allow_shared(attention, shared, "attention_forward");
    attention<<<grid, ATTN_THREADS, shared>>>(out, lse, qkv, 1 / sqrtf(C / NH), T, C, NH);
    launched("attention_forward");
}

// out (B,T,C), lse (B,NH,T) in units of log 2
static void
attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
    int D = C / NH;
    if (D <= 32) attention_forward_of<32>(out, lse, qkv, B, T, C, NH);
    else if (D <= 48) attention_forward_of<48>(out, lse, qkv, B, T, C, NH);
    else if (D <= 64) attention_forward_of<64>(out, lse, qkv, B, T, C, NH);
    else if (D <= 96) attention_forward_of<96>(out, lse, qkv, B, T, C, NH);
    else attention_forward_of<128>(out, lse, qkv, B, T, C, NH);
}

template <int D> static void
attention_backward_of(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse_delta,
                      int B, int T, int C, int NH) {
#if HOPPER
    if constexpr (D <= 96) // the sums of larger heads take too many registers
        if (this_gpu()->major == 9 && C / NH == D)
            return attention_backward_hopper<D>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
#endif
    int grid = B * NH * blocks(T, ATTN_ROWS);
    float scale = 1 / sqrtf(C / NH);
    size_t row = (D + PAD) * sizeof(floatX);
    size_t kv_shared = (2 * ATTN_ROWS + 4 * others_at_a_time(D, true)) * row;
    size_t q_shared = (2 * ATTN_ROWS + 4 * others_at_a_time(D, false)) * row;
    auto kv = attention_backward_kernel<D, true>;
    auto q = attention_backward_kernel<D, false>;
    allow_shared(kv, kv_shared, "attention_backward_kv");
    allow_shared(q, q_shared, "attention_backward_q");
    kv<<<grid, ATTN_THREADS, kv_shared>>>(dqkv, dout, qkv, lse_delta, scale, T, C, NH);
    launched("attention_backward_kv");
    q<<<grid, ATTN_THREADS, q_shared>>>(dqkv, dout, qkv, lse_delta, scale, T, C, NH);
    launched("attention_backward_q");
}

// out (B,T,C) is what forward gave; lse_delta is a buffer, see attention_delta_kernel.
static void attention_backward(floatX *dqkv, float *lse_delta, const floatX *dout,
                               const floatX *out, const floatX *qkv, const float *lse,
                               int B, int T, int C, int NH) {
    int D = C / NH, grid = B * NH * blocks(T, ATTN_ROWS) * ATTN_ROWS / (THREADS / 8);
    auto delta = D % 4 == 0 ? attention_delta_kernel<4> : attention_delta_kernel<1>;
    delta<<<grid, THREADS>>>(lse_delta, lse, dout, out, T, C, NH);
    launched("attention_delta");
    if (D <= 32) attention_backward_of<32>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
    else if (D <= 48) attention_backward_of<48>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
    else if (D <= 64) attention_backward_of<64>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
    else if (D <= 96) attention_backward_of<96>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
    else attention_backward_of<128>(dqkv, dout, qkv, lse_delta, B, T, C, NH);
}

// ---- masked positions ----

// out (R,C) = inp (BT,C) at positions (R)
// Grid: RC / THREADS. Block: THREADS, a thread for each number of out.
__global__ void gather_forward_kernel(float *out, const float *inp, const int *positions,
                                      int R, int C) {
    size_t i = thread_index();
    if (i < (size_t)R * C) out[i] = inp[(size_t)positions[i / C] * C + i % C];
}

static void gather_forward(float *out, const float *inp, const int *positions, int R, int C) {
    gather_forward_kernel<<<blocks((size_t)R * C, THREADS), THREADS>>>(out, inp, positions, R, C);
    launched("gather_forward");
}

// dinp (BT,C) at positions (R) = dout (R,C); dinpx (BT,C) is a copy for matrix products.
// Grid: RC / THREADS. Block: THREADS, a thread for each number of dout.
__global__ void gather_backward_kernel(float *dinp, floatX *dinpx, const float *dout,
                                       const int *positions, int R, int C) {
    size_t i = thread_index();
    if (i >= (size_t)R * C) return;
    size_t to = (size_t)positions[i / C] * C + i % C;
    dinp[to] = dout[i];
    dinpx[to] = (floatX)dout[i];
}

static void gather_backward(float *dinp, floatX *dinpx, const float *dout, const int *positions,
                            int R, int C) {
    int n = blocks((size_t)R * C, THREADS);
    gather_backward_kernel<<<n, THREADS>>>(dinp, dinpx, dout, positions, R, C);
    launched("gather_backward");
}

// ---- softmax and cross entropy ----

// losses (R) = -log p[target], and dlogits (R,V) = weight (p - 1 at the target), for the loss
// sum(weights * losses). Rows of logits and dlogits are ld apart, a multiple of 4, and the numbers
// after the V of a row may change; dlogits may be logits, or NULL.
// targets and weights (BT) are looked up at positions (R).
// Grid: R, a block for each row of logits. Block: THREADS, or 1024 for long rows.
__global__ void crossentropy_kernel(float *losses, floatX *dlogits, const float *logits,
                                    const float *weights, const int *targets, const int *positions,
                                    int V, int ld) {
    const float *x = logits + (size_t)blockIdx.x * ld;
    float largest = -INFINITY, sum = 0;
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) { // online, as in attention
        float y[4], m = largest;
        load(y, x + v);
        for (int e = 0; e < 4; e++) {
            if (v + e >= V) y[e] = -INFINITY;
            m = fmaxf(m, y[e]);
        }
        sum *= expf(largest - m);
        for (int e = 0; e < 4; e++) sum += expf(y[e] - m);
        largest = m;
    }
    float m = block_reduce(largest, MAXIMUM);         // of the whole row
    sum = block_reduce(sum * expf(largest - m), SUM); // each thread's is scaled down to m
    int target = targets[positions[blockIdx.x]];
    if (threadIdx.x == 0) losses[blockIdx.x] = m - x[target] + logf(sum);
    if (!dlogits) return;

    __syncthreads(); // dlogits may be logits: thread 0 has read the target's
    float weight = weights[positions[blockIdx.x]], scale = weight / sum;
    floatX *d = dlogits + (size_t)blockIdx.x * ld;
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) {
        float y[4];
        load(y, x + v);
        for (int e = 0; e < 4; e++)
            y[e] = expf(y[e] - m) * scale - (v + e == target ? weight : 0);
        store(d + v, y);
    }
}

static void crossentropy(float *losses, floatX *dlogits, const float *logits, const float *weights,
                         const int *targets, const int *positions, int R, int V, int ld) {
    // Large blocks for long rows: with fewer rows at a time, the second sweep finds more in L2.
    int threads = V > 16384 ? 1024 : THREADS;
    crossentropy_kernel<<<R, threads>>>(losses, dlogits, logits, weights, targets, positions,
                                        V, ld);
    launched("crossentropy");
}

// The first of positions (R), which ascend, that is not before sequence b; R if all are.
__device__ static int first_of_sequence(const int *positions, int R, int T, int b) {
    int low = 0, high = R; // it is one of low .. high
    while (low < high) {
        int middle = (low + high) / 2;
        if (positions[middle] / T < b) low = middle + 1;
        else high = middle;
    }
    return low;
}

// sequence_loss (B) = the sum of weights * losses over each sequence's masked positions
// Grid: B. Block: WARP.
__global__ void sequence_loss_kernel(double *sequence_loss, const float *losses,
                                     const float *weights, const int *positions, int R, int T) {
    int b = blockIdx.x, end = first_of_sequence(positions, R, T, b + 1);
    double sum = 0;
    for (int r = first_of_sequence(positions, R, T, b) + threadIdx.x; r < end; r += WARP)
        sum += (double)weights[positions[r]] * losses[r];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) sequence_loss[b] = sum;
}

// ---- sampling ----

// What a stretch of logits weighs: each exp((x - largest) / temperature), or 1 with temperature 0.
// Those below least weigh nothing.
__device__ static double stretch_weight(const float *logits, int begin, int end, double largest,
                                        double temperature, uint32_t least) {
    double sum = 0;
    for (int v = begin; v < end; v++)
        if (float_order(logits[v]) >= least)
            sum += temperature > 0 ? exp((logits[v] - largest) / temperature) : 1;
    return sum;
}

// As in loopmdm.c, by all threads of a block: the largest threshold, not below `least`, such that
// what is not below it weighs `enough`. It is found bit by bit.
__device__ static uint32_t threshold_of(const float *logits, int begin, int end, double largest,
                                        double temperature, uint32_t least, double enough) {
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        uint32_t tried = max(threshold | bit, least); // with this bit, is there still enough?
        double sum = stretch_weight(logits, begin, end, largest, temperature, tried);
        if (block_reduce(sum, SUM) >= enough) threshold |= bit;
    }
    return max(threshold, least);
}

// As sample_token() in loopmdm.c. Each thread has a stretch of the vocabulary. The thread whose
// stretch holds the draw looks for it there.
// Grid: R, a block for each row of logits. Block: THREADS.
__global__ void sample_kernel(int *token, double *score, const float *logits, const int *positions,
                              const int *ids, int T, int V, int ld, Draw d, uint64_t step) {
    __shared__ double sums[THREADS];
    __shared__ int owner;
    __shared__ int chosen;
    const float *x = logits + (size_t)blockIdx.x * ld;
    int each = blocks(V, THREADS); // tokens of a stretch
    int begin = min(V, (int)threadIdx.x * each), end = min(V, begin + each), best = begin;
    for (int v = begin + 1; v < end; v++)
        if (x[v] > x[best]) best = v;
    float largest = block_reduce(begin < end ? x[best] : -INFINITY, MAXIMUM);

    // The likeliest token is the lowest one if several are equal. next is the next one's logit.
    int mine = begin < end && x[best] == largest;
    int likeliest = -block_reduce(mine ? -best : 1 - V, MAXIMUM);
    float next = -INFINITY;
    double sum = 0, entropy = 0;
    for (int v = begin; v < end; v++) {
        double e = exp((double)x[v] - largest);
        sum += e;
        entropy -= e * ((double)x[v] - largest);
        if (v != likeliest && x[v] > next) next = x[v];
    }
    sum = block_reduce(sum, SUM);
    entropy = block_reduce(entropy, SUM);
    next = block_reduce(next, MAXIMUM);

    // Only logits not below least are drawn from. weight is what this thread's stretch has of them.
    uint32_t least = 0;
    double weight = 0;
    if (d.temperature > 0) {
        int top = d.top_k > 0 && d.top_k < V;
        if (top) least = threshold_of(x, begin, end, largest, 0, 0, d.top_k);
        weight = stretch_weight(x, begin, end, largest, d.temperature, least);
        if (d.top_p < 1) {
            double enough = d.top_p * block_reduce(weight, SUM);
            least = threshold_of(x, begin, end, largest, d.temperature, least, enough);
            weight = stretch_weight(x, begin, end, largest, d.temperature, least);
        }
    }
    sums[threadIdx.x] = weight;
    __syncthreads();

    if (threadIdx.x == 0) { // whose stretch holds the draw?
        double total = 0;
        for (int t = 0; t < THREADS; t++) total += sums[t];
        int position = positions[blockIdx.x], t = 0, last = THREADS - 1;
        uint64_t index = (uint64_t)ids[position / T] * T + position % T;
        double left = random_uniform(d.seed, STREAM_TOKEN, step, index) * total;
        while (last > 0 && sums[last] == 0) last--; // the last thread that has anything to draw
        while (t < last && left >= sums[t]) left -= sums[t++];
        owner = t;
        sums[t] = left; // how far into that stretch the draw is
        chosen = likeliest;
    }
    __syncthreads();

    if (d.temperature > 0 && (int)threadIdx.x == owner) {
        double left = sums[owner];
        for (int v = begin; v < end && left >= 0; v++)
            if (float_order(x[v]) >= least) {
                double w = exp((x[v] - (double)largest) / d.temperature);
                if (w > 0) chosen = v;
                left -= w;
            }
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        double *to = &score[blockIdx.x];
        token[blockIdx.x] = chosen;
        if (d.score == SCORE_PROBABILITY) *to = exp((double)x[chosen] - largest) / sum;
        if (d.score == SCORE_MARGIN) *to = (1 - exp((double)next - largest)) / sum;
        if (d.score == SCORE_ENTROPY) *to = -(log(sum) + entropy / sum);
    }
}

static void sample_forward(int *token, double *score, const float *logits, const int *positions,
                           const int *ids, int R, int T, int V, int ld, Draw d, uint64_t step) {
    sample_kernel<<<R, THREADS>>>(token, score, logits, positions, ids, T, V, ld, d, step);
    launched("sample");
}

// =================================================================================================
// 4. Memory, noise, a block forward and backward, head, loss, AdamW

#include "dev/graphs.h" // in the training of a small model the kernels of a pass are one launch

enum { SQUARES = 1 << 14 }; // how many numbers' squares a block of gradient_norm() adds up

typedef struct {                            // what a pass computes, kept for its backward
    floatX *ln1, *qkv, *atty;               // (B,T,C), (B,T,3C), (B,T,C)
    floatX *ln2, *fch, *fch_gelu;           // (B,T,C), (B,T,4C), (B,T,4C)
    float *ln1_mean, *ln1_rstd, *lse;       // (B,T), (B,T), (B,NH,T) in units of log 2
    float *res2, *ln2_mean, *ln2_rstd;      // (B,T,C), (B,T), (B,T)
} Acts;

typedef struct { // as in loopmdm.c; only acts, sequence_loss and graphs are on the host
    Config config;
    Tensors params, grads, moment1, moment2, ema;
    floatX *paramsx;                        // (total) in bf16 a copy of params for matrix products
    int keeps_ema, training, recompute, max_B, max_T;
    int head_rows, padded_logits;           // padded_logits: how far the rows of logits are apart
    void *memory[NUM_MEMORIES];
    size_t bytes[NUM_MEMORIES];

    float *states;                          // (P+1,B,T,C), in inference (B,T,C)
    Acts *acts;                             // (P) or (1), what they point to is on the GPU
    float *cosine, *sine;                   // (T,D/2)
    float *before, *settled;                // inference: (B,T,C)

    float *head_inp, *lnf_mean, *lnf_rstd;  // (head_rows,C), (head_rows), (head_rows)
    floatX *lnf;                            // (head_rows,C)
    float *logits;                          // (head_rows,padded_logits)
    floatX *dlogits;                        // the same; in fp32 they take the place of the logits
    float *losses;                          // (R)

    float *dres, *dhead;                    // (B,T,C), (head_rows,C) of head_inp
    float *lse_delta;                       // see attention_delta_kernel
    floatX *dresx, *dln, *datty;            // (B,T,C): a copy of dres, and two buffers
    floatX *dwide;                          // (B,T,4C) of fch, then (B,T,3C) of qkv
    Parts parts;

    int *x, *targets, *given;               // (B,T), (B,T), (B) how many tokens are context
    float *weights;                         // (B,T)
    int *masked, *count;                    // (R) the masked positions, (1) R
    int *ids, *token;                       // (B) sequence numbers, (head_rows) sampled tokens
    double *score, *change;                 // (head_rows), (B)
    double *sequence_loss_gpu, *sequence_loss; // (B), and a copy on the host
    Graphs *graphs;                         // in training: recorded passes
    int B, T, S, R;
} Model;

static size_t place_acts(Acts *a, Config c, size_t BT, char *at) {
    size_t BTC = BT * c.channels, X = sizeof(floatX), F = sizeof(float);
    const Piece pieces[] = {
        {&a->ln1, BTC * X}, {&a->ln1_mean, BT * F}, {&a->ln1_rstd, BT * F},
        {&a->qkv, 3 * BTC * X}, {&a->lse, BT * c.heads * F}, {&a->atty, BTC * X},
        {&a->res2, BTC * F}, {&a->ln2, BTC * X}, {&a->ln2_mean, BT * F}, {&a->ln2_rstd, BT * F},
        {&a->fch, 4 * BTC * X}, {&a->fch_gelu, 4 * BTC * X},
    };
    return lay_out(pieces, COUNT(pieces), at);
}

static float *pass_input(const Model *m, int p) {
    return m->states + (m->training ? p : 0) * (size_t)m->B * m->T * m->config.channels;
}

static void model_plan(Model *m, int B, int T, int S, int training, int recompute) {
    Config c = m->config;
    size_t C = c.channels, V = c.vocab_size, BT = (size_t)B * T, P = num_passes(c, S);
    size_t X = sizeof(floatX), F = sizeof(float), I = sizeof(int), doubles = sizeof(double);
    size_t n = m->params.total, R = max_int(512, (1 << 27) / c.vocab_size / TILE * TILE);
    if (R > BT) R = BT; // 2^27 logits are 512 MiB: a product large enough to fill a GPU

    m->training = training;
    m->recompute = recompute;
    m->max_B = B;
    m->max_T = T;
    m->head_rows = (int)R;
    m->padded_logits = (int)((V + 7) / 8 * 8); // rows begin at a multiple of 16 bytes
    m->parts.size = 0;
    size_t tile = TILE * (HOPPER ? 192 : TILE); // the largest, see tile_columns()
    if (training) // two tiles for each block (none in info), a bias's sums, gradient_norm()'s room
        m->parts.size = 2 * m->parts.blocks * tile + 4 * C + 2 * blocks(n, SQUARES);
    Acts unused; // place_acts() only counts here
    char *acts_memory;
    size_t num_acts = training && !recompute ? P : 1, acts_bytes = place_acts(&unused, c, BT, NULL);

    size_t angles = (size_t)T * (C / c.heads / 2), logits = R * m->padded_logits;
    size_t grad = training ? BT * C : 0, kept = training ? 0 : BT * C; // numbers
    size_t padded_T = (size_t)blocks(T, ATTN_ROWS) * ATTN_ROWS;
    const Piece pieces[] = {
        {&m->sequence_loss_gpu, B * doubles}, {&m->x, BT * I}, {&m->targets, BT * I},
        {&m->masked, BT * I}, {&m->count, I}, {&m->weights, BT * F}, {&m->token, R * I},
        {&m->score, R * doubles}, {&m->change, B * doubles}, {&m->given, B * I}, {&m->ids, B * I},
        {&m->states, BT * C * F * (training ? P + 1 : 1)},
        {&acts_memory, num_acts * acts_bytes}, {&m->cosine, angles * F}, {&m->sine, angles * F},
        {&m->head_inp, R * C * F}, {&m->lnf, R * C * X}, {&m->lnf_mean, R * F},
        {&m->lnf_rstd, R * F}, {&m->logits, logits * F},
        {&m->dlogits, BF16 && training ? logits * X : 0}, {&m->losses, BT * F},
        {&m->dres, grad * F}, {&m->dhead, training ? R * C * F : 0},
        {&m->lse_delta, training ? 2 * B * c.heads * padded_T * F : 0}, {&m->dresx, grad * X},
        {&m->dln, grad * X}, {&m->datty, grad * X}, {&m->dwide, 4 * grad * X},
        {&m->before, kept * F}, {&m->settled, kept * F}, {&m->parts.memory, m->parts.size * F},
    };
    m->bytes[ACTIVATIONS] = lay_out(pieces, COUNT(pieces), (char *)m->memory[ACTIVATIONS]);
    for (size_t p = 0; acts_memory && p < num_acts; p++)
        place_acts(&m->acts[p], c, BT, acts_memory + p * acts_bytes);

    // In bf16 the copy of the parameters follows them, and its tensors are aligned like theirs.
    size_t copy_at = (n + 63) / 64 * 64;
    float *moments = (float *)m->memory[OPTIMIZER];
    m->bytes[PARAMETERS] = BF16 ? copy_at * F + n * X : n * F;
    m->bytes[GRADIENTS] = training ? n * F : 0;
    m->bytes[OPTIMIZER] = training ? n * F * (2 + m->keeps_ema) : 0;
    tensors_build(&m->params, c, (float *)m->memory[PARAMETERS]);
    tensors_build(&m->grads, c, (float *)m->memory[GRADIENTS]);
    tensors_build(&m->moment1, c, moments);
    tensors_build(&m->moment2, c, moments ? moments + n : NULL);
    tensors_build(&m->ema, c, moments && m->keeps_ema ? moments + 2 * n : NULL);
    if (!m->params.data) return;
    m->paramsx = (floatX *)(BF16 ? m->params.data + copy_at : m->params.data);
    if (!BF16) m->dlogits = (floatX *)m->logits; // cross entropy may overwrite them
}

static size_t total_bytes(const Model *m) {
    size_t sum = 0;
    for (int i = 0; i < NUM_MEMORIES; i++) sum += m->bytes[i];
    return sum;
}

// Ends the program and says what would fit.
static void
no_memory(Model *m, int B, int T, int S, int training, int recompute, size_t available) {
    const double MiB = 1 << 20;
    double wanted = total_bytes(m) / MiB;
    int fits = 0, passes = num_passes(m->config, S);
    for (int step = 1 << 20; step > 0; step /= 2) { // bit by bit: the largest B that fits
        if (fits + step >= B) continue;
        model_plan(m, fits + step, T, S, training, recompute);
        if (total_bytes(m) <= available) fits += step;
    }
    char advice[64] = "choose a smaller model";
    const char *option = training ? "" : ", or -n in sample";
    if (fits) snprintf(advice, sizeof advice, "%d fit (--batch%s)", fits, option);
    die(FAILED, "%s %d sequences takes %.1f MiB, and the GPU has %.1f MiB free: %s%s",
        training ? "training with" : "a forward of", B, wanted, available / MiB, advice,
        training && !recompute && passes > 1 ? "; --recompute takes less" : "");
}

static void model_reserve(Model *m, int B, int T, int S, int training, int recompute) {
    int devices = 0, D = m->config.channels / m->config.heads;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        die(FAILED, "no GPU: %s; use loopmdm, which runs on the CPU",
            error == cudaSuccess ? "none was found" : cudaGetErrorString(error));
    const cudaDeviceProp *gpu = this_gpu();
    if (gpu->major < 8)
        die(FAILED, "the GPU, %s, has compute capability %d.%d, below 8.0: use loopmdm",
            gpu->name, gpu->major, gpu->minor);
    if (D > 128) die(FAILED, "heads of %d channels; on the GPU 128 at most: more --heads", D);

    m->parts.blocks = 2 * gpu->multiProcessorCount; // 2 fit on each of an A100 or H100
    model_plan(m, B, T, S, training, recompute);
    size_t available, all, MiB = 1 << 20;
    cuda_check(cudaMemGetInfo(&available, &all), "the GPU's memory");

    // Some stays free: for rounding, graphs, and kernels, which are loaded when first called.
    available -= available / 64 < 64 * MiB ? available / 64 : 64 * MiB;
    if (total_bytes(m) > available) no_memory(m, B, T, S, training, recompute, available);

    for (int i = 0; i < NUM_MEMORIES; i++) {
        if (m->bytes[i] == 0) continue;
        if (cudaMalloc(&m->memory[i], m->bytes[i]) != cudaSuccess)
            die(FAILED, "the GPU has %zu MiB free, but none of %zu in one piece: "
                        "choose a smaller --batch", available / MiB, m->bytes[i] / MiB);
        clear_memory(m->memory[i], m->bytes[i]);
    }
    m->acts = (Acts *)allocate(num_passes(m->config, S), sizeof(Acts), "the model");
    m->sequence_loss = (double *)allocate(B, sizeof(double), "the losses");
    m->graphs = training ? new_graphs(pow(m->config.channels, 2) * 24 * B * T) : NULL;
    model_plan(m, B, T, S, training, recompute); // now with pointers

    size_t n = (size_t)T * (D / 2);
    float *cosine = (float *)allocate(2 * n, sizeof(float), "rotary positions"), *sine = cosine + n;
    rope_angles(cosine, sine, T, D);
    write_memory(m->cosine, cosine, n * sizeof(float));
    write_memory(m->sine, sine, n * sizeof(float));
    free(cosine);
}

static void model_free(Model *m) {
    for (int i = 0; i < NUM_MEMORIES; i++) cuda_check(cudaFree(m->memory[i]), "freeing memory");
    free(m->acts);
    free(m->sequence_loss);
    delete m->graphs;
    memset(m, 0, sizeof *m);
}

// Grid: n / THREADS. Block: THREADS, a thread for each number.
__global__ void round_kernel(floatX *out, const float *inp, size_t n) {
    size_t i = thread_index();
    if (i < n) out[i] = (floatX)inp[i];
}

static void model_set_parameters(Model *m, const float *from) {
    size_t n = m->params.total;
    write_memory(m->params.data, from, n * sizeof(float));
    if (!BF16) return; // matrix products take the parameters themselves
    round_kernel<<<blocks(n, THREADS), THREADS>>>(m->paramsx, m->params.data, n);
    launched("round");
}

static int model_noise(Model *m, const int *targets, const int *given, Noise noise, int B, int T) {
    m->B = B;
    m->T = T;
    write_memory(m->targets, targets, (size_t)B * T * sizeof(int));
    write_memory(m->given, given, B * sizeof(int));
    noise_forward(m->x, m->weights, m->targets, m->given, m->config.vocab_size, noise, B, T);
    m->R = masked_positions(m->masked, m->count, m->weights, B * T);
    return m->R;
}

// A parameter tensor as matrix products take it
static const floatX *matrix(const Model *m, const float *w) {
    return m->paramsx + (w - m->params.data);
}

static void block_forward(Model *m, int p, int layer) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    Recording pass(m->graphs, FORWARD, p, layer, B, T);
    if (pass.replayed) return;
    const float *inp = pass_input(m, p);
    float *w[NUM_TENSORS];
    layer_tensors(w, &m->params, layer);
    Acts a = m->acts[m->training && !m->recompute ? p : 0]; // 0: all passes share one

    // res2 = inp + attproj(attention(rope(qkv(ln1(inp))))). Biases are added by the epilogues.
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, w[LN1W], w[LN1B], BT, C);
    Store<floatX> qkv = {a.qkv, 3 * C, w[QKVB]};
    matmul_forward(qkv, a.ln1, matrix(m, w[QKVW]), BT, C, 3 * C);
    rope(a.qkv, m->cosine, m->sine, 1, B, T, C, NH);
    attention_forward(a.atty, a.lse, a.qkv, B, T, C, NH);
    StoreResidual res2 = {a.res2, inp, w[ATTPROJB], C};
    matmul_forward(res2, a.atty, matrix(m, w[ATTPROJW]), BT, C, C);

    // out = res2 + fcproj(gelu(fc(ln2(res2))))
    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.res2, w[LN2W], w[LN2B], BT, C);
    StoreGelu fch = {a.fch_gelu, a.fch, 4 * C, w[FCB]};
    matmul_forward(fch, a.ln2, matrix(m, w[FCW]), BT, C, 4 * C);
    StoreResidual out = {pass_input(m, p + 1), a.res2, w[FCPROJB], C};
    matmul_forward(out, a.fch_gelu, matrix(m, w[FCPROJW]), BT, 4 * C, C);
}

// m->dres is first the gradient of out, and so of res2; each branch adds its part, from the end on.
static void block_backward(Model *m, int p, int layer) {
    int B = m->B, T = m->T, C = m->config.channels, NH = m->config.heads, BT = B * T;
    Recording pass(m->graphs, BACKWARD, p, layer, B, T);
    if (pass.replayed) return;
    if (m->recompute) block_forward(m, p, layer); // the same numbers again
    float *w[NUM_TENSORS], *dw[NUM_TENSORS];
    layer_tensors(w, &m->params, layer);
    layer_tensors(dw, &m->grads, layer);
    Acts a = m->acts[m->training && !m->recompute ? p : 0];

    // out = res2 + fcproj(gelu(fc(ln2(res2)))). dresx is dres, as matrix products take it.
    StoreGeluBackward dfch = {m->dwide, a.fch, 4 * C};
    matmul_backward(dfch, dw[FCPROJW], dw[FCPROJB], m->dresx, C, a.fch_gelu, matrix(m, w[FCPROJW]),
                    BT, 4 * C, C, m->parts);
    Store<floatX> dln = {m->dln, C, NULL};
    matmul_backward(dln, dw[FCW], dw[FCB], m->dwide, 4 * C, a.ln2, matrix(m, w[FCW]),
                    BT, C, 4 * C, m->parts);
    layernorm_backward(m->dres, m->dresx, dw[LN2W], dw[LN2B], m->dln, a.res2, w[LN2W],
                       a.ln2_mean, a.ln2_rstd, BT, C, m->parts);

    // res2 = inp + attproj(attention(rope(qkv(ln1(inp))))). dwide now has dqkv.
    Store<floatX> datty = {m->datty, C, NULL};
    matmul_backward(datty, dw[ATTPROJW], dw[ATTPROJB], m->dresx, C, a.atty, matrix(m, w[ATTPROJW]),
                    BT, C, C, m->parts);
    attention_backward(m->dwide, m->lse_delta, m->datty, a.atty, a.qkv, a.lse, B, T, C, NH);
    rope(m->dwide, m->cosine, m->sine, -1, B, T, C, NH);
    matmul_backward(dln, dw[QKVW], dw[QKVB], m->dwide, 3 * C, a.ln1, matrix(m, w[QKVW]),
                    BT, C, 3 * C, m->parts);
    layernorm_backward(m->dres, m->dresx, dw[LN1W], dw[LN1B], m->dln, pass_input(m, p), w[LN1W],
                       a.ln1_mean, a.ln1_rstd, BT, C, m->parts);
}

static void head_forward(Model *m, const int *positions, int R) {
    int C = m->config.channels;
    float **w = m->params.tensor;
    gather_forward(m->head_inp, pass_input(m, num_passes(m->config, m->S)), positions, R, C);
    layernorm_forward(m->lnf, m->lnf_mean, m->lnf_rstd, m->head_inp, w[LNFW], w[LNFB], R, C);
    Store<float> logits = {m->logits, m->padded_logits, NULL}; // float, not floatX
    matmul_forward(logits, m->lnf, matrix(m, w[WTE]), R, C, m->config.vocab_size);
}

// From m->dlogits to m->dres at these positions
static void head_backward(Model *m, const int *positions, int R) {
    int C = m->config.channels;
    float **w = m->params.tensor, **dw = m->grads.tensor;
    Store<floatX> dln = {m->dln, C, NULL};
    matmul_backward(dln, dw[WTE], NULL, m->dlogits, m->padded_logits, m->lnf, matrix(m, w[WTE]),
                    R, C, m->config.vocab_size, m->parts);
    clear_memory(m->dhead, (size_t)R * C * sizeof(float)); // nothing else adds to this gradient
    layernorm_backward(m->dhead, m->datty, dw[LNFW], dw[LNFB], m->dln, m->head_inp, w[LNFW],
                       m->lnf_mean, m->lnf_rstd, R, C, m->parts); // m->datty is a buffer here
    gather_backward(m->dres, m->dresx, m->dhead, positions, R, C);
}

static double model_loss(Model *m, int backward) {
    size_t BTC = (size_t)m->B * m->T * m->config.channels;
    double loss = 0;
    if (backward) {
        clear_memory(m->dres, BTC * sizeof(float));
        clear_memory(m->dresx, BTC * sizeof(floatX));
    }
    for (int r0 = 0; r0 < m->R; r0 += m->head_rows) { // in parts, as in loopmdm.c
        int n = min_int(m->head_rows, m->R - r0), *positions = m->masked + r0;
        head_forward(m, positions, n);
        crossentropy(m->losses + r0, backward ? m->dlogits : NULL, m->logits, m->weights,
                     m->targets, positions, n, m->config.vocab_size, m->padded_logits);
        if (backward) head_backward(m, positions, n);
    }
    sequence_loss_kernel<<<m->B, WARP>>>(m->sequence_loss_gpu, m->losses, m->weights,
                                         m->masked, m->R, m->T);
    launched("sequence_loss");
    read_memory(m->sequence_loss, m->sequence_loss_gpu, m->B * sizeof(double)); // waits for the GPU
    for (int b = 0; b < m->B; b++) loss += m->sequence_loss[b];
    return loss;
}

static void model_sample(Model *m, int *token, double *score, const int *positions, int n,
                         const int *ids, Draw d, uint64_t step) {
    m->R = n; // dev/tools.c counts operations by it
    write_memory(m->masked, positions, n * sizeof(int));
    write_memory(m->ids, ids, m->B * sizeof(int));
    for (int r0 = 0; r0 < n; r0 += m->head_rows) {
        int R = min_int(m->head_rows, n - r0); // in parts, as in model_loss()
        head_forward(m, m->masked + r0, R);
        sample_forward(m->token, m->score, m->logits, m->masked + r0, m->ids, R, m->T,
                       m->config.vocab_size, m->padded_logits, d, step);
        read_memory(token + r0, m->token, R * sizeof(int));
        read_memory(score + r0, m->score, R * sizeof(double));
    }
}

// ---- the optimizer's arithmetic ----

// squares (blocks): the sums of squares of inp (n) over stretches of SQUARES numbers
// Grid: n / SQUARES. Block: THREADS.
__global__ void squares_kernel(double *squares, const float *inp, size_t n) {
    size_t begin = (size_t)blockIdx.x * SQUARES, end = begin + SQUARES < n ? begin + SQUARES : n;
    double sum = 0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += (double)inp[i] * inp[i];
    sum = block_reduce(sum, SUM);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

static double gradient_norm(const Model *m) {
    int n = blocks(m->grads.total, SQUARES);
    double sum = 0, *squares_gpu = (double *)m->parts.memory; // backward is done with it
    double *squares = (double *)allocate(n, sizeof(double), "the gradient norm");
    squares_kernel<<<n, THREADS>>>(squares_gpu, m->grads.data, m->grads.total);
    launched("squares");
    read_memory(squares, squares_gpu, n * sizeof(double));
    for (int b = 0; b < n; b++) sum += squares[b]; // on the host, in order
    free(squares);
    return sqrt(sum);
}

// px is the copy for matrix products; average is NULL without --ema.
// Grid: n / THREADS. Block: THREADS, a thread for each parameter.
__global__ void adamw_kernel(float *p, floatX *px, float *grad, float *m1, float *m2,
                             float *average, size_t n, AdamWStep s) {
    size_t i = thread_index();
    if (i >= n) return;
    float g = s.scale * grad[i]; // clipped
    m1[i] = s.beta1 * m1[i] + (1 - s.beta1) * g;
    m2[i] = s.beta2 * m2[i] + (1 - s.beta2) * g * g;
    p[i] = s.keep * p[i] - s.step_size * m1[i] / (sqrtf(m2[i]) * s.correct + s.eps);
    grad[i] = 0; // the next step adds to it
    if (average) average[i] = s.ema * average[i] + (1 - s.ema) * p[i];
    if (BF16) px[i] = (floatX)p[i];
}

static void adamw(Model *m, int t, AdamWStep s) {
    size_t n = m->params.size[t];
    float *p = m->params.tensor[t], *grad = m->grads.tensor[t], *average = m->ema.tensor[t];
    float *m1 = m->moment1.tensor[t], *m2 = m->moment2.tensor[t];
    floatX *px = m->paramsx + (p - m->params.data);
    adamw_kernel<<<blocks(n, THREADS), THREADS>>>(p, px, grad, m1, m2, average, n, s);
    launched("adamw");
}

// ---- for dev/tools.c: adaptive loops, and what a pass computes ----

[[maybe_unused]] static void copy_memory(void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice), "copying");
}

// Activations as float, on the host
[[maybe_unused]] static void read_activations(float *to, const floatX *from, size_t n) {
    floatX *copy = (floatX *)allocate(n, sizeof(floatX), "activations");
    read_memory(copy, from, n * sizeof(floatX));
    for (size_t i = 0; i < n; i++) to[i] = (float)copy[i];
    free(copy);
}

// change (B) = |h - before| / |h|, a norm over channels, averaged over a sequence's positions
// Grid: B. Block: THREADS, a warp for one position after the other.
__global__ void state_change_kernel(double *change, const float *h, const float *before,
                                    int T, int C) {
    int lane = threadIdx.x % WARP;
    double sum = 0;
    for (int t = threadIdx.x / WARP; t < T; t += blockDim.x / WARP) {
        size_t at = ((size_t)blockIdx.x * T + t) * C;
        double norm = 0, moved = 0; // |h|^2 and |h - before|^2 at this position
        for (int c = lane; c < C; c += WARP) {
            double d = (double)h[at + c] - before[at + c];
            norm += (double)h[at + c] * h[at + c];
            moved += d * d;
        }
        sum += sqrt(warp_sum(moved) / warp_sum(norm)) / T;
    }
    sum = block_reduce(lane ? 0 : sum, SUM); // all lanes of a warp have the same sum: count one
    if (threadIdx.x == 0) change[blockIdx.x] = sum;
}

[[maybe_unused]] static void model_change(const Model *m, double *change) {
    int T = m->T, C = m->config.channels;
    state_change_kernel<<<m->B, THREADS>>>(m->change, m->states, m->before, T, C);
    launched("state_change");
    read_memory(change, m->change, m->B * sizeof(double));
}
