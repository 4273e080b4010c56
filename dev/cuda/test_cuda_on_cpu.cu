/*
Self-test of dev/cuda_on_cpu.h; test_cuda_on_cpu.sh builds it in several ways and runs it in each order. Without arguments it checks what
kernels compute and prints one line for each check; with a number it makes the mistake of that number, or does what
test_cuda_on_cpu.sh looks at (26, 27, 30).
*/
#include "dev/cuda_on_cpu.h"

static int failed;
static void check(bool ok, const char *what) {
    printf("%s %s\n", ok ? "ok" : "FAILED", what);
    failed += !ok;
}

static const unsigned FULL = 0xffffffff;
enum { N = 160, ROUNDS = 3 };

template <class T> struct Device { // memory, in which kernels and (by copies) the host read and write
    T *p;
    int n;
    Device(int n, const T *from = nullptr) : n(n) {
        cudaMalloc(&p, n * sizeof(T));
        if (from) cudaMemcpy(p, from, n * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Device() { cudaFree(p); }
    std::vector<T> read() {
        std::vector<T> x(n);
        cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
        return x;
    }
};

static uint32_t random_bits() {
    static uint64_t state = 1;
    state = state * 6364136223846793005 + 1442695040888963407;
    return state >> 32;
}
static float random_float() { return (int)(random_bits() >> 20) / 1024.0f - 2; } // multiples of 2^-10: products are exact in fp32
static uint16_t raw(float x) { return cuda_on_cpu::bits<uint16_t>(__float2bfloat16(x)); }

// ---------------------------------------------------------------------------------------------------------------------
// Barriers. Each round reverses the block: a barrier before the tile is read, and one after.

template <bool BEFORE, bool AFTER> __global__ void reverse(int *out) {
    __shared__ int tile[N];
    for (int r = 0; r < ROUNDS; r++) {
        tile[threadIdx.x] = 1000 * (1 + blockIdx.x) + 100 * r + threadIdx.x;
        if (BEFORE) __syncthreads();
        out[(blockIdx.x * ROUNDS + r) * N + threadIdx.x] = tile[N - 1 - threadIdx.x];
        if (AFTER) __syncthreads();
    }
}

template <bool BEFORE, bool AFTER> bool reverse_is_right() {
    const int blocks = 5;
    Device<int> out(blocks * ROUNDS * N);
    reverse<BEFORE, AFTER><<<blocks, N>>>(out.p);
    auto x = out.read();
    for (int i = 0; i < out.n; i++) if (x[i] != 1000 * (1 + i / N / ROUNDS) + 100 * (i / N % ROUNDS) + N - 1 - i % N) return false;
    return true;
}

__global__ void warp_reverse(int *out, bool sync) { // with dynamic shared memory and __syncwarp
    extern __shared__ __align__(16) int tile[];
    tile[threadIdx.x] = threadIdx.x;
    if (sync) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

__global__ void count_votes(int *out, int n) { // threads from n on have exited
    if ((int)threadIdx.x >= n) return;
    int a = __syncthreads_count(threadIdx.x % 3 == 0), b = __syncthreads_or(threadIdx.x == 77), c = __syncthreads_or(false);
    int d = __syncthreads_and(true), e = __syncthreads_and(threadIdx.x != 77);
    out[threadIdx.x] = a * 16 + b * 8 + c * 4 + d * 2 + e;
}

__global__ void poison(unsigned *out, int rounds) {
    extern __shared__ unsigned dynamic[];
    __shared__ unsigned fixed[32];
    __shared__ unsigned single;
    for (int i = 0; i < rounds; i++) out[blockIdx.x] &= dynamic[i] & fixed[i] & single;
    dynamic[0] = fixed[0] = single = 0; // the next block must not see this
}

__global__ void indices(int *out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    atomicAdd(&out[block * (blockDim.x * blockDim.y * blockDim.z) + thread], 1 + thread + 1000 * block);
}

static void barriers() {
    check(reverse_is_right<true, true>(), "two barriers: right");
    check(!reverse_is_right<false, true>(), "no barrier before the tile is read: wrong");
    check(!reverse_is_right<true, false>(), "no barrier after the tile is read: wrong");
    Device<int> out(200);
    bool right[2];
    for (int sync = 0; sync < 2; sync++) {
        warp_reverse<<<1, 64, 64 * sizeof(int)>>>(out.p, sync);
        auto x = out.read();
        right[sync] = true;
        for (int i = 0; i < 64; i++) right[sync] &= x[i] == (i ^ 31);
    }
    check(right[1] && !right[0], "__syncwarp: right with, wrong without");
    count_votes<<<1, 200>>>(out.p, 150);
    auto x = out.read();
    bool ok = x[150] == -1;
    for (int i = 0; i < 150; i++) ok &= x[i] == 50 * 16 + 8 + 2;
    check(ok, "__syncthreads_count, _or, _and, and threads that have exited");
    std::vector<unsigned> ones(50, ~0u);
    Device<unsigned> bits(50, ones.data());
    poison<<<50, 1, 128>>>(bits.p, 32);
    check(bits.read() == ones, "shared memory starts as 0xFF in every block");
    std::vector<int> zeros(24 * 30), expected;
    Device<int> seen(24 * 30, zeros.data());
    indices<<<dim3(2, 3, 4), dim3(5, 2, 3)>>>(seen.p);
    for (int i = 0; i < seen.n; i++) expected.push_back(1 + i % 30 + 1000 * (i / 30));
    check(seen.read() == expected, "indices in three dimensions, each once");
}

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles and votes, in a block whose last warp has 8 lanes

template <class T> __global__ void shuffles(T *out) {
    T x = (T)(threadIdx.x * 3 + 1), sum = x;
    int lane = threadIdx.x % 32, lanes = threadIdx.x < 32 ? 32 : 8;
    T *o = out + threadIdx.x * 8;
    o[0] = __shfl_sync(FULL, x, (lane + 3) % lanes);
    o[1] = __shfl_xor_sync(FULL, x, 5);
    o[2] = __shfl_up_sync(FULL, x, 2);
    o[3] = __shfl_down_sync(FULL, x, lanes == 32 ? 4 : 0);
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    o[4] = sum;
    o[5] = (T)__ballot_sync(FULL, lane % 3 == 0);
    o[6] = (T)(__any_sync(FULL, lane == 7) + 2 * __any_sync(FULL, false));
    o[7] = (T)(__all_sync(FULL, true) + 2 * __all_sync(FULL, lane != 7));
}

template <class T> bool shuffles_are_right() {
    Device<T> out(40 * 8);
    shuffles<T><<<1, 40>>>(out.p);
    auto x = out.read();
    bool ok = true;
    for (int i = 0; i < 40; i++) {
        int lane = i % 32, base = i - lane, lanes = i < 32 ? 32 : 8;
        auto of = [&](int l) { return (T)((base + l) * 3 + 1); };
        T sum = 0, *o = &x[i * 8];
        for (int l = 0; l < lanes; l++) sum += of(l);
        ok &= o[0] == of((lane + 3) % lanes) && o[1] == of(lane ^ 5) && o[2] == of(lane < 2 ? lane : lane - 2);
        ok &= o[3] == of(lanes == 8 || lane + 4 > 31 ? lane : lane + 4) && o[4] == sum && o[5] == (T)(lanes == 32 ? 0x49249249u : 0x49u);
        ok &= o[6] == 1 && o[7] == 1;
    }
    return ok;
}

__global__ void exits(unsigned *out) { // lanes leave one after the other
    for (unsigned i = 0; i <= threadIdx.x; i++) out[threadIdx.x] = __ballot_sync(FULL, threadIdx.x % 2 == 0);
    if (threadIdx.x == 31) out[31] = __shfl_sync(FULL, 0u, 30);
}

static void warps() {
    check(shuffles_are_right<int>() && shuffles_are_right<unsigned>() && shuffles_are_right<float>() && shuffles_are_right<double>()
          && shuffles_are_right<long long>() && shuffles_are_right<unsigned long long>(), "shuffles and votes, whole and partial warp");
    Device<unsigned> out(32);
    exits<<<1, 32>>>(out.p);
    auto x = out.read();
    bool ok = x[31] == ~0u; // what it reads from a lane that has exited
    for (int i = 0; i < 31; i++) ok &= x[i] == (0x55555555 & ~0u << i);
    check(ok, "collectives of the lanes that are left");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

static const int ROW = 24; // numbers in a row of a tile: 48 bytes, so that rows are 16-byte aligned but not contiguous

__global__ void matrices(const uint16_t *in, uint32_t *out) { // (32,ROW): lane i gives row i
    __shared__ __align__(16) uint16_t tile[32 * ROW];
    for (int i = threadIdx.x; i < 32 * ROW; i += 32) tile[i] = in[i];
    __syncwarp();
    ldmatrix_x4(out + threadIdx.x * 8, tile + threadIdx.x * ROW);
    ldmatrix_x4_trans(out + threadIdx.x * 8 + 4, tile + threadIdx.x * ROW + 8);
}

__global__ void mma(const float *a, const float *b, float *d16, float *d32) {
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float a32[8], b32[4], d[4], e[4];
    uint32_t a16[4], b16[2];
    for (int r = 0; r < 4; r++) {
        for (int i = 0; i < 2; i++) a32[2 * r + i] = a[(g + 8 * (r & 1)) * 16 + 2 * q + 8 * (r >> 1) + i];
        __nv_bfloat162 two = __floats2bfloat162_rn(a32[2 * r], a32[2 * r + 1]);
        memcpy(&a16[r], &two, 4);
    }
    for (int r = 0; r < 2; r++) {
        for (int i = 0; i < 2; i++) b32[2 * r + i] = b[(2 * q + 8 * r + i) * 8 + g];
        __nv_bfloat162 two = __floats2bfloat162_rn(b32[2 * r], b32[2 * r + 1]);
        memcpy(&b16[r], &two, 4);
    }
    for (int i = 0; i < 4; i++) d[i] = e[i] = i;
    mma_16x8x16(d, a16, b16);
    mma_16x8x16(e, a32, b32);
    for (int i = 0; i < 4; i++) d16[threadIdx.x * 4 + i] = d[i], d32[threadIdx.x * 4 + i] = e[i];
}

static void tensor_cores() {
    std::vector<uint16_t> tile(32 * ROW);
    for (auto &x : tile) x = random_bits();
    Device<uint16_t> in(tile.size(), tile.data());
    Device<uint32_t> out(32 * 8);
    matrices<<<1, 32>>>(in.p, out.p);
    auto r = out.read();
    bool ok = true;
    for (int lane = 0; lane < 32; lane++) {
        for (int j = 0; j < 4; j++) {
            const uint16_t *matrix = &tile[8 * j * ROW];
            int g = lane / 4, q = lane % 4;
            ok &= r[lane * 8 + j] == (matrix[g * ROW + 2 * q] | (uint32_t)matrix[g * ROW + 2 * q + 1] << 16);
            ok &= r[lane * 8 + 4 + j] == (matrix[2 * q * ROW + g + 8] | (uint32_t)matrix[(2 * q + 1) * ROW + g + 8] << 16);
        }
    }
    check(ok, "ldmatrix_x4, plain and transposed");

    std::vector<float> A(16 * 16), B(16 * 8);
    for (auto &x : A) x = random_float();
    for (auto &x : B) x = random_float();
    Device<float> a(A.size(), A.data()), b(B.size(), B.data()), d16(64 * 4), d32(64 * 4);
    mma<<<1, 64>>>(a.p, b.p, d16.p, d32.p);
    auto x = d16.read(), y = d32.read();
    double worst16 = 0, worst32 = 0;
    for (int t = 0; t < 64; t++) {
        for (int i = 0; i < 4; i++) {
            int row = t % 32 / 4 + 8 * (i / 2), column = 2 * (t % 4) + i % 2;
            double sum16 = i, sum32 = i;
            for (int k = 0; k < 16; k++) {
                sum32 += (double)A[row * 16 + k] * B[k * 8 + column];
                sum16 += (double)__bfloat162float(__float2bfloat16(A[row * 16 + k])) * __bfloat162float(__float2bfloat16(B[k * 8 + column]));
            }
            worst16 = fmax(worst16, fabs(x[t * 4 + i] - sum16));
            worst32 = fmax(worst32, fabs(y[t * 4 + i] - sum32));
        }
    }
    check(worst16 < 2e-5 && worst32 < 2e-5, "mma_16x8x16 of bf16 and of fp32");
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async: a pipeline of two stages

enum { NO_WAIT, WAIT_FOR_OLD, WAIT_FOR_ALL }; // at the end of the pipeline
template <int WAIT, bool BARRIER> __global__ void pipeline(const float *in, float *out, int steps, int bytes) {
    __shared__ __align__(16) float stage[2][64 * 4];
    auto load = [&](int i) {
        cp_async_16(&stage[i % 2][threadIdx.x * 4], bytes ? in + (i * 64 + threadIdx.x) * 4 : nullptr, bytes);
        cp_async_commit();
    };
    load(0);
    for (int i = 0; i < steps; i++) {
        if (i + 1 < steps) load(i + 1);
        if (WAIT == WAIT_FOR_ALL && i + 1 == steps) cp_async_wait<0>();
        else if (WAIT) cp_async_wait<1>();
        __syncthreads();
        for (int j = 0; j < 4; j++) out[(i * 64 + threadIdx.x) * 4 + j] = stage[i % 2][(63 - threadIdx.x) * 4 + j];
        if (BARRIER) __syncthreads();
    }
}

template <int WAIT, bool BARRIER> bool pipeline_is_right(int bytes) {
    const int steps = 5;
    std::vector<float> x(steps * 256);
    for (auto &f : x) f = random_float();
    Device<float> in(x.size(), x.data()), out(x.size());
    pipeline<WAIT, BARRIER><<<2, 64>>>(in.p, out.p, steps, bytes);
    auto y = out.read();
    for (int i = 0; i < steps * 256; i++) {
        int j = i % 4;
        if (y[i] != (4 * j < bytes ? x[i / 256 * 256 + (63 - i % 256 / 4) * 4 + j] : 0)) return false;
    }
    return true;
}

static void copies() {
    for (int bytes : {16, 8, 0}) check(pipeline_is_right<WAIT_FOR_ALL, true>(bytes), "cp_async_16, whole and with zeros");
    check(!pipeline_is_right<NO_WAIT, true>(16) && !pipeline_is_right<WAIT_FOR_OLD, true>(16), "cp_async_wait for none, for too few: wrong");
    check(!pipeline_is_right<WAIT_FOR_ALL, false>(16), "cp_async_16 into what others still read: wrong");
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers and atomics

static void numbers() {
    bool ok = true;
    for (uint32_t i = 0; i < 65536; i++) {
        __nv_bfloat16 b = cuda_on_cpu::bits<__nv_bfloat16>((uint16_t)i);
        float x = __bfloat162float(b), next = __bfloat162float(cuda_on_cpu::bits<__nv_bfloat16>((uint16_t)(i + 1)));
        if (x != x) {
            ok &= raw(x) == 0x7FFF;
            continue;
        }
        ok &= raw(x) == i;
        if (next != next || (i & 0x7fff) == 0x7f80) continue;
        uint32_t u = __float_as_uint(x); // between this bf16 and the next: below, at, and above the middle
        ok &= raw(__uint_as_float(u + 0x7fff)) == i && raw(__uint_as_float(u + 0x8001)) == i + 1 && raw(__uint_as_float(u + 0x8000)) == (i + 1) / 2 * 2;
    }
    check(ok, "bf16: every value, rounding to nearest even, NaN");
    check(__popc(0xF0F0) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32 && min(2, 3) == 2 && max(2.0f, NAN) == 2
          && min(NAN, 2.0f) == 2 && rsqrtf(4.0f) == 0.5f && __float_as_int(-0.0f) == INT32_MIN && __fmaf_rn(2, 3, 4) == 10, "functions of numbers");
}

__global__ void sums(int *i, unsigned *u, unsigned long long *l, float *f, double *d) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&i[0], 1), atomicAdd(u, 2), atomicAdd(l, 3ull << 32), atomicAdd(f, 0.5), atomicAdd(d, 0.25f);
    atomicMax(&i[1], n), atomicMin(&i[2], -n);
    if (atomicCAS(&i[3], 0, 1 + n) == 0) atomicExch(&i[4], 1 + n);
}

static void atomics() {
    int zeros[10] = {};
    Device<int> i(5, zeros);
    Device<unsigned> u(1, (unsigned *)zeros);
    Device<unsigned long long> l(1, (unsigned long long *)(void *)zeros);
    Device<float> f(1, (float *)(void *)zeros);
    Device<double> d(1, (double *)(void *)zeros);
    sums<<<400, 250>>>(i.p, u.p, l.p, f.p, d.p);
    auto x = i.read();
    check(x[0] == 100000 && x[1] == 99999 && x[2] == -99999 && x[3] && x[3] == x[4] && u.read()[0] == 200000 && l.read()[0] == 300000ull << 32
          && f.read()[0] == 50000 && d.read()[0] == 25000, "atomics across blocks");
}

// ---------------------------------------------------------------------------------------------------------------------
// Runtime

__global__ void touch(char *p) {
    extern __shared__ char shared[];
    if (p) p[0] = 1;
    else shared[0] = 1;
}

static cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
    Device<char> p(1);
    touch<<<grid, block, shared>>>(p.p);
    cudaError_t e = cudaPeekAtLastError();
    return (p.read()[0] == 1) == (e == cudaSuccess) && cudaGetLastError() == e && cudaGetLastError() == cudaSuccess ? e : (cudaError_t)-1;
}

static void runtime() {
    const cudaError_t config = cudaErrorInvalidConfiguration, value = cudaErrorInvalidValue;
    check(launch(1, 1024, 48 << 10) == cudaSuccess && launch(1, 1025, 0) == config && launch(1, dim3(32, 32, 2), 0) == config && launch(0, 1, 0) == config
          && launch(1, 0, 0) == config && launch(dim3(1, 65536), 1, 0) == config && launch(1, dim3(1, 1, 65), 0) == config, "sizes of launches");
    check(launch(1, 1, (48 << 10) + 1) == value && cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, (163 << 10) + 1) == value
          && cudaGetLastError() == value && cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10) == cudaSuccess
          && launch(1, 1, 100 << 10) == cudaSuccess && launch(1, 1, (100 << 10) + 1) == value, "dynamic shared memory beyond 48 KiB");
    touch<<<1, 1, 1>>>(NULL);
    size_t free0, free1, total;
    cudaMemGetInfo(&free0, &total);
    float *p = nullptr, *q = nullptr, *host = nullptr, filled[4] = {1, 2, 3, 4};
    bool ok = cudaMalloc(&p, 4000) == cudaSuccess && cudaMalloc(&q, 16) == cudaSuccess;
    cudaMemGetInfo(&free1, &total);
    ok &= free0 - free1 == 4016 && free0 == total && cudaMalloc(&host, total) == cudaErrorMemoryAllocation && cudaGetLastError() == cudaErrorMemoryAllocation;
    ok &= cudaMallocHost(&host, 16) == cudaSuccess;
    cudaMemcpyAsync(host, p, 16, cudaMemcpyDeviceToHost, 0);
    ok &= __float_as_uint(host[3]) == ~0u;
    cudaMemcpy(p + 996, filled, 16, cudaMemcpyHostToDevice);
    cudaMemcpy(q, p + 996, 16, cudaMemcpyDeviceToDevice);
    cudaMemsetAsync(q, 0, 4);
    cudaMemcpy(host, q, 16, cudaMemcpyDeviceToHost);
    ok &= host[0] == 0 && host[3] == 4 && cudaFree(p) == cudaSuccess && cudaFree(q) == cudaSuccess && cudaFree(nullptr) == cudaSuccess;
    cudaFreeHost(host);
    cudaMemGetInfo(&free1, &total);
    check(ok && free1 == total, "memory: amounts, copies, starts as 0xFF");
    cudaDeviceProp prop;
    cudaEvent_t a, b;
    float ms = -1;
    int count;
    ok = cudaGetDeviceCount(&count) == cudaSuccess && count == 1 && cudaSetDevice(0) == cudaSuccess && cudaSetDevice(1) == value;
    ok &= cudaGetLastError() == value && cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.major == 8 && prop.minor == 0;
    cudaEventCreate(&a), cudaEventCreate(&b), cudaEventRecord(a), cudaEventRecord(b), cudaEventSynchronize(b), cudaEventElapsedTime(&ms, a, b);
    cudaEventDestroy(a), cudaEventDestroy(b);
    check(ok && ms >= 0 && cudaDeviceSynchronize() == cudaSuccess, "device and events");
}

// ---------------------------------------------------------------------------------------------------------------------
// Mistakes

__global__ void mistake(float *p, int which, float *out) {
    extern __shared__ float dynamic[];
    __shared__ __align__(16) float tile[64];
    uint32_t r[4], s[2] = {};
    float d[4] = {};
    int t = threadIdx.x;
    dynamic[t] = tile[t] = t;
    if (which == 0) { if (t == 37) __syncwarp(); else __syncthreads(); }
    if (which == 1) { if (t == 37) __any_sync(FULL, 1); else __syncwarp(); }
    if (which == 2) {
        if (t < 32) __syncthreads();
        else __syncthreads();
    }
    if (which == 3) ldmatrix_x4(r, tile + 2);
    if (which == 4) cp_async_16(tile, (char *)p + 4, 16);
    if (which == 5 && t != 63) mma_16x8x16(d, r, s);
    if (which == 6) out[t] = __shfl_xor_sync(FULL, d[0], 1, 16);
    if (which == 7) { if (t < 16) __syncwarp(0xffff); }
    if (which == 7) __syncwarp(0xffff);
    if (which == 8) out[t] = p[t + 1];
    if (which == 9) out[t] = dynamic[t + 1];
    if (which == 10) out[t] = tile[t + 1];
    if (which == 11) for (int i = 0; i < 65; i++) cp_async_16(tile, p, 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// In which order do the threads of a block come by after each of three barriers? A line for each barrier and block.

__global__ void arrivals(int *out) { // (blocks, 3, 64)
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    for (int r = 0; r < 3; r++) {
        __syncthreads();
        out[(blockIdx.x * 3 + r) * 64 + atomicAdd(&count, 1) % 64] = threadIdx.x;
    }
}

static void print_arrivals() {
    Device<int> out(4 * 3 * 64);
    arrivals<<<4, 64>>>(out.p);
    auto x = out.read();
    for (int i = 0; i < out.n; i++) printf("%d%c", x[i], i % 64 < 63 ? ' ' : '\n');
}

int main(int argc, char **argv) {
    int which = argc > 1 ? atoi(argv[1]) : -1, count;
    if (which < 0) {
        barriers();
        warps();
        tensor_cores();
        copies();
        numbers();
        atomics();
        runtime();
        return failed != 0;
    }
    float host[64] = {}, *p = nullptr, *out = nullptr;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (!e) e = cudaMalloc(&p, sizeof host);
    if (!e) e = cudaMalloc(&out, sizeof host);
    if (which < 20) mistake<<<2, 64, sizeof host>>>(p, which, out);
    if (which == 20) mistake<<<1, 64, sizeof host>>>(p, which, host);
    if (which == 21) cudaMemcpy(host, host, 4, cudaMemcpyHostToDevice);
    if (which == 22) cudaMemcpy(p + 1, host, sizeof host, cudaMemcpyHostToDevice);
    if (which == 23) cudaMemcpy(p, out, 4, cudaMemcpyDeviceToHost);
    if (which == 24) cudaFree(p + 1);
    if (which == 25) p[3] = 1;
    if (which == 27) print_arrivals();
    if (which == 26) return !reverse_is_right<true, true>();
    if (!e) e = cudaGetLastError();
    puts(cudaGetErrorString(e));
    cudaFree(p);
    cudaFree(out);
}
