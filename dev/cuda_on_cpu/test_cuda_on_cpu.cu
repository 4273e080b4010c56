/*
Test of dev/cuda_on_cpu/cuda_on_cpu.h. test_cuda_on_cpu.sh builds it in several ways and runs it in
each order. Without arguments it checks what kernels compute and prints a line for each check. With
a number it makes the mistake of that number, or does what test_cuda_on_cpu.sh looks at (26, 27, 30,
38).
*/
#include "dev/cuda_on_cpu/cuda_on_cpu.h"

static int failed;
static void check(bool ok, const char *what) {
    printf("%s %s\n", ok ? "ok" : "FAILED", what);
    failed += !ok;
}

static const unsigned FULL = 0xffffffff;
enum { N = 160, ROUNDS = 3 };

// Device memory. The host reads it by copies.
template <class T> struct Device {
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

// A multiple of 2^-10, so that products are exact in fp32
static float random_float() { return (int)(random_bits() >> 20) / 1024.0f - 2; }
static uint16_t raw(float x) { return cuda_on_cpu::bits<uint16_t>(__float2bfloat16(x)); }
static __nv_bfloat16 from_raw(uint16_t x) { return cuda_on_cpu::bits<__nv_bfloat16>(x); }

// -------------------------------------------------------------------------------------------------
// Barriers. Each round reverses the block: one barrier before the tile is read, and one after.

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
    for (int i = 0; i < out.n; i++) {
        int block = i / N / ROUNDS, round = i / N % ROUNDS;
        if (x[i] != 1000 * (1 + block) + 100 * round + N - 1 - i % N) return false;
    }
    return true;
}

__global__ void warp_reverse(int *out, bool sync) { // with dynamic shared memory and __syncwarp
    extern __shared__ __align__(16) int tile[];
    tile[threadIdx.x] = threadIdx.x;
    if (sync) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

__global__ void count_votes(int *out, int n) { // threads from n on have exited
    int t = threadIdx.x;
    if (t >= n) return;
    int a = __syncthreads_count(t % 3 == 0), b = __syncthreads_or(t == 77), c = __syncthreads_or(0);
    int d = __syncthreads_and(true), e = __syncthreads_and(t != 77);
    out[t] = a * 16 + b * 8 + c * 4 + d * 2 + e;
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
    int threads = blockDim.x * blockDim.y * blockDim.z;
    atomicAdd(&out[block * threads + thread], 1 + thread + 1000 * block);
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

// -------------------------------------------------------------------------------------------------
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
        auto of = [&](int other) { return (T)((base + other) * 3 + 1); };
        T sum = 0, *o = &x[i * 8];
        for (int other = 0; other < lanes; other++) sum += of(other);
        ok &= o[0] == of((lane + 3) % lanes);
        ok &= o[1] == of(lane ^ 5);
        ok &= o[2] == of(lane < 2 ? lane : lane - 2);
        ok &= o[3] == of(lanes == 8 || lane + 4 > 31 ? lane : lane + 4);
        ok &= o[4] == sum;
        ok &= o[5] == (T)(lanes == 32 ? 0x49249249u : 0x49u);
        ok &= o[6] == 1 && o[7] == 1;
    }
    return ok;
}

__global__ void exits(unsigned *out) { // lanes leave one after the other
    unsigned t = threadIdx.x;
    for (unsigned i = 0; i <= t; i++) out[t] = __ballot_sync(FULL, t % 2 == 0);
    if (t == 31) out[31] = __shfl_sync(FULL, 0u, 30);
}

static void warps() {
    bool ok = shuffles_are_right<int>() && shuffles_are_right<unsigned>();
    ok &= shuffles_are_right<float>() && shuffles_are_right<double>();
    ok &= shuffles_are_right<long long>() && shuffles_are_right<unsigned long long>();
    check(ok, "shuffles and votes, whole and partial warp");

    Device<unsigned> out(32);
    exits<<<1, 32>>>(out.p);
    auto x = out.read();
    ok = x[31] == ~0u; // what it reads from a lane that has exited
    for (int i = 0; i < 31; i++) ok &= x[i] == (0x55555555 & ~0u << i);
    check(ok, "collectives of the lanes that are left");
}

// -------------------------------------------------------------------------------------------------
// Tensor cores

// Numbers in a row of a tile: 48 bytes, so that rows are 16-byte aligned but not contiguous
static const int ROW = 24;

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
        int row = g + 8 * (r & 1), column = 2 * q + 8 * (r >> 1);
        for (int i = 0; i < 2; i++) a32[2 * r + i] = a[row * 16 + column + i];
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
    for (int i = 0; i < 4; i++) {
        d16[threadIdx.x * 4 + i] = d[i];
        d32[threadIdx.x * 4 + i] = e[i];
    }
}

static void load_matrix() {
    std::vector<uint16_t> tile(32 * ROW);
    for (auto &x : tile) x = random_bits();
    Device<uint16_t> in(tile.size(), tile.data());
    Device<uint32_t> out(32 * 8);
    matrices<<<1, 32>>>(in.p, out.p);
    auto r = out.read();
    bool ok = true;
    auto two = [](uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; };
    for (int lane = 0; lane < 32; lane++) {
        for (int j = 0; j < 4; j++) {
            const uint16_t *m = &tile[8 * j * ROW];
            int g = lane / 4, q = lane % 4;
            ok &= r[lane * 8 + j] == two(m[g * ROW + 2 * q], m[g * ROW + 2 * q + 1]);
            // transposed, and 8 columns further on
            ok &= r[lane * 8 + 4 + j] == two(m[2 * q * ROW + g + 8], m[(2 * q + 1) * ROW + g + 8]);
        }
    }
    check(ok, "ldmatrix_x4, plain and transposed");
}

static void tensor_cores() {
    std::vector<float> A(16 * 16), B(16 * 8);
    for (auto &x : A) x = random_float();
    for (auto &x : B) x = random_float();
    Device<float> a(A.size(), A.data()), b(B.size(), B.data()), d16(64 * 4), d32(64 * 4);
    mma<<<1, 64>>>(a.p, b.p, d16.p, d32.p);
    auto x = d16.read(), y = d32.read();
    auto rounded = [](float v) { return (double)__bfloat162float(__float2bfloat16(v)); };
    double worst16 = 0, worst32 = 0;
    for (int t = 0; t < 64; t++) {
        for (int i = 0; i < 4; i++) {
            int row = t % 32 / 4 + 8 * (i / 2), column = 2 * (t % 4) + i % 2;
            double sum16 = i, sum32 = i; // the kernel starts its sums at i
            for (int k = 0; k < 16; k++) {
                sum32 += (double)A[row * 16 + k] * B[k * 8 + column];
                sum16 += rounded(A[row * 16 + k]) * rounded(B[k * 8 + column]);
            }
            worst16 = fmax(worst16, fabs(x[t * 4 + i] - sum16));
            worst32 = fmax(worst32, fabs(y[t * 4 + i] - sum32));
        }
    }
    check(worst16 < 2e-5 && worst32 < 2e-5, "mma_16x8x16 of bf16 and of fp32");
}

// -------------------------------------------------------------------------------------------------
// cp.async: a pipeline of two stages

enum { NO_WAIT, WAIT_FOR_OLD, WAIT_FOR_ALL }; // at the end of the pipeline
template <int WAIT, bool BARRIER>
__global__ void pipeline(const float *in, float *out, int steps, int bytes) {
    __shared__ __align__(16) float stage[2][64 * 4];
    int t = threadIdx.x;
    auto load = [&](int i) {
        cp_async_16(&stage[i % 2][t * 4], bytes ? in + (i * 64 + t) * 4 : nullptr, bytes);
        cp_async_commit();
    };
    load(0);
    for (int i = 0; i < steps; i++) {
        if (i + 1 < steps) load(i + 1);
        if (WAIT == WAIT_FOR_ALL && i + 1 == steps) {
            cp_async_wait<0>();
        } else if (WAIT) {
            cp_async_wait<1>();
        }
        __syncthreads();
        for (int j = 0; j < 4; j++) out[(i * 64 + t) * 4 + j] = stage[i % 2][(63 - t) * 4 + j];
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
        int step = i / 256, thread = i % 256 / 4, j = i % 4;
        float right = 4 * j < bytes ? x[step * 256 + (63 - thread) * 4 + j] : 0;
        if (y[i] != right) return false;
    }
    return true;
}

static void copies() {
    for (int bytes : {16, 8, 0})
        check(pipeline_is_right<WAIT_FOR_ALL, true>(bytes), "cp_async_16, whole and with zeros");
    bool right = pipeline_is_right<NO_WAIT, true>(16) || pipeline_is_right<WAIT_FOR_OLD, true>(16);
    check(!right, "cp_async_wait for none, for too few: wrong");
    right = pipeline_is_right<WAIT_FOR_ALL, false>(16);
    check(!right, "cp_async_16 into what others still read: wrong");
}

// -------------------------------------------------------------------------------------------------
// Numbers and atomics

static void numbers() {
    bool ok = true;
    for (uint32_t i = 0; i < 65536; i++) {
        float x = __bfloat162float(from_raw(i)), next = __bfloat162float(from_raw(i + 1));
        if (x != x) {
            ok &= raw(x) == 0x7FFF;
            continue;
        }
        ok &= raw(x) == i;
        if (next != next || (i & 0x7fff) == 0x7f80) continue;
        // Between this bf16 and the next: below, above and at the middle
        uint32_t u = __float_as_uint(x);
        ok &= raw(__uint_as_float(u + 0x7fff)) == i;
        ok &= raw(__uint_as_float(u + 0x8001)) == i + 1;
        ok &= raw(__uint_as_float(u + 0x8000)) == (i + 1) / 2 * 2;
    }
    check(ok, "bf16: every value, rounding to nearest even, NaN");

    ok = __popc(0xF0F0) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32;
    ok &= min(2, 3) == 2 && max(2.0f, NAN) == 2 && min(NAN, 2.0f) == 2;
    ok &= rsqrtf(4.0f) == 0.5f && __float_as_int(-0.0f) == INT32_MIN && __fmaf_rn(2, 3, 4) == 10;
    ok &= __powf(3, 2) == 9 && __sinf(0) == 0 && __cosf(0) == 1;
    float x = 3;
    __stcs(&x, 2 * __ldcs(&x));
    check(ok && x == 6, "functions of numbers");
}

static void vectors() {
    auto is = [](size_t size, size_t align, size_t right_size, size_t right_align) {
        return size == right_size && align == right_align;
    };
#define IS(T, size, align) is(sizeof(T), alignof(T), size, align)
    bool ok = IS(char2, 2, 2) && IS(uchar3, 3, 1) && IS(uchar4, 4, 4);
    ok &= IS(short2, 4, 4) && IS(ushort3, 6, 2) && IS(short4, 8, 8);
    ok &= IS(int2, 8, 8) && IS(int3, 12, 4) && IS(uint3, 12, 4) && IS(uint4, 16, 16);
    ok &= IS(float2, 8, 8) && IS(float3, 12, 4) && IS(float4, 16, 16);
    ok &= IS(double2, 16, 16) && IS(double3, 24, 8) && IS(double4, 32, 16);
    ok &= IS(longlong2, 16, 16) && IS(ulonglong3, 24, 8) && IS(ulonglong4, 32, 16);
#undef IS
    float3 f = make_float3(1, 2, 3);
    uchar4 u = make_uchar4(1, 2, 3, 255);
    ok &= f.x == 1 && f.y == 2 && f.z == 3 && u.x == 1 && u.w == 255 && make_char2(1, -1).y == -1;
    check(ok && make_int3(1, 2, 3).z == 3 && make_double2(1, 2).y == 2, "vectors");
}

__global__ void sums(int *i, unsigned *u, unsigned long long *ull, float *f, double *d) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&i[0], 1);
    atomicAdd(u, 2);
    atomicAdd(ull, 3ull << 32);
    atomicAdd(f, 0.5);
    atomicAdd(d, 0.25f);
    atomicMax(&i[1], n);
    atomicMin(&i[2], -n);
    if (atomicCAS(&i[3], 0, 1 + n) == 0) atomicExch(&i[4], 1 + n);
}

__global__ void more_atomics(unsigned *u) {
    int t = threadIdx.x;
    atomicSub(&u[0], 3);
    atomicAnd(&u[1], ~(1u << t % 16));
    atomicOr(&u[2], 1u << t % 16);
    atomicXor(&u[3], 1u << t % 16);
    atomicInc(&u[4], 9);
    atomicDec(&u[5], 9);
    atomicDec(&u[6], 500);
}

static void atomics() {
    int zeros[10] = {};
    Device<int> i(5, zeros);
    Device<unsigned> u(1, (unsigned *)zeros);
    Device<unsigned long long> ull(1, (unsigned long long *)(void *)zeros);
    Device<float> f(1, (float *)(void *)zeros);
    Device<double> d(1, (double *)(void *)zeros);
    sums<<<400, 250>>>(i.p, u.p, ull.p, f.p, d.p);
    auto x = i.read();
    bool ok = x[0] == 100000 && x[1] == 99999 && x[2] == -99999 && x[3] && x[3] == x[4];
    ok &= u.read()[0] == 200000 && ull.read()[0] == 300000ull << 32;
    ok &= f.read()[0] == 50000 && d.read()[0] == 25000;
    check(ok, "atomics across blocks");

    unsigned start[7] = {1000, 0xFFFFFFFF, 0x10000, 0xF0F0F, 0, 0, 1000};
    Device<unsigned> m(7, start);
    more_atomics<<<3, 16>>>(m.p); // 48 threads. 0 to 9 have a period of 10
    check(m.read() == std::vector<unsigned>{856, 0xFFFF0000, 0x1FFFF, 0xFF0F0, 8, 2, 453},
          "atomicSub, And, Or, Xor, Inc, Dec");
}

// -------------------------------------------------------------------------------------------------
// Variables with __constant__ and __device__

__constant__ float table[64];
__constant__ int rows;
static __device__ int counter = 5;
__device__ float3 place;

__global__ void use_variables() {
    if ((int)threadIdx.x < rows) atomicAdd(&counter, (int)table[threadIdx.x]);
    if (threadIdx.x == 0) place = make_float3(table[1], table[2], rows);
}
__global__ void use_address(int *p) { *p += 1; }

static void variables() {
    float values[64], back[2];
    float3 at;
    int count, n = 60, zero = 0, *p, *q;
    for (int i = 0; i < 64; i++) values[i] = 2 * i;
    bool ok = cudaMemcpyToSymbol(table, values, sizeof values) == cudaSuccess;
    ok &= cudaMemcpyToSymbol(rows, &n, sizeof n) == cudaSuccess;
    cudaMemcpyToSymbol(table, values + 10, 8, 4); // table[1] is 20, table[2] is 22
    use_variables<<<1, 64>>>();
    ok &= cudaMemcpyFromSymbol(&count, counter, sizeof count) == cudaSuccess;
    ok &= count == 5 + 60 * 59 + 20 + 22 - 2 - 4;
    cudaMemcpyFromSymbol(&at, place, sizeof at);
    cudaMemcpyFromSymbol(back, table, 8, 62 * sizeof(float));
    ok &= at.x == 20 && at.y == 22 && at.z == 60 && back[0] == 124 && back[1] == 126;
    check(ok, "__constant__ and __device__ variables");

    ok = cudaGetSymbolAddress((void **)&p, counter) == cudaSuccess;
    use_address<<<1, 1>>>(p);
    cudaMemcpy(&n, p, sizeof n, cudaMemcpyDeviceToHost);
    ok &= n == count + 1;
    cudaMemcpy(p, &zero, sizeof zero, cudaMemcpyHostToDevice);
    cudaMalloc(&q, sizeof n);
    cudaMemcpyFromSymbol(q, counter, sizeof n, 0, cudaMemcpyDeviceToDevice);
    use_address<<<1, 1>>>(q);
    cudaMemcpyToSymbol(counter, q, sizeof n, 0, cudaMemcpyDeviceToDevice);
    use_address<<<1, 1>>>(p);
    cudaMemcpyFromSymbol(&n, counter, sizeof n, 0, cudaMemcpyDefault);
    cudaFree(q);
    check(ok && n == 2, "addresses of variables");
}

// -------------------------------------------------------------------------------------------------
// Hopper: out (64,96) = A (64,64) B (64,96), twice, through TMA, an mbarrier and wgmma

enum { DEEP = 64, WIDE = 96, BOX = DEEP * 64 }; // a transposed B is two boxes 64 wide

// The tiles as wgmma takes them: rows of 128 bytes, groups of 8 rows, boxes one after the other
static uint64_t tile_descriptor(const __nv_bfloat16 *tile) {
    return 1ull << 62 | 64ull << 32 | (uint64_t)(BOX * 2 / 16) << 16 | shared_address(tile) / 16;
}

template <bool TRANS_A, bool TRANS_B>
__global__ void hopper(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                       float *out) {
    extern __shared__ __align__(1024) __nv_bfloat16 tiles[];
    __shared__ uint64_t full;
    __nv_bfloat16 *at = tiles, *bt = tiles + BOX;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    float d[WIDE / 8][4];
    if (threadIdx.x == 0) {
        mbarrier_init(&full, 1);
        mbarrier_init_done();
        mbarrier_expect(&full, (BOX + (TRANS_B ? 2 * BOX : DEEP * WIDE)) * 2);
        tma_load(at, &a, 0, 0, &full);
        tma_load(bt, &b, 0, 0, &full);
        if (TRANS_B) tma_load(bt + BOX, &b, 64, 0, &full);
    }
    __syncthreads();
    mbarrier_wait(&full, 0);
    for (int round = 0; round < 2; round++) { // the second adds the same again
        wgmma_fence();
        for (int k = 0; k < DEEP; k += 16) {
            uint64_t a_at = tile_descriptor(at + (TRANS_A ? k * 64 : k));
            uint64_t b_at = tile_descriptor(bt + (TRANS_B ? k * 64 : k));
            wgmma<TRANS_A, TRANS_B>(d, a_at, b_at, round + k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    keep(d);
    for (int j = 0; j < WIDE / 8; j++)
        for (int e = 0; e < 4; e++)
            out[(warp * 16 + g + e / 2 * 8) * WIDE + j * 8 + 2 * q + e % 2] = d[j][e];
}

static CUtensorMap map_of(const __nv_bfloat16 *p, int rows, int columns, int box_rows) {
    PFN_cuTensorMapEncodeTiled_v12000 encode;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                     cudaEnableDefault, &found);
    CUtensorMap map;
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[] = {columns * 2ull};
    cuuint32_t box[] = {64, (cuuint32_t)box_rows}, steps[] = {1, 1};
    CUresult e = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, sizes, strides, box,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e != CUDA_SUCCESS) map.data = nullptr;
    return map;
}

template <bool TRANS_A, bool TRANS_B> bool hopper_is_right() {
    const size_t shared = 3 * BOX * sizeof(__nv_bfloat16);
    const int a_rows = TRANS_A ? DEEP : 60; // 60: TMA makes zeros of the rows that do not exist
    std::vector<__nv_bfloat16> A(a_rows * 64), B(DEEP * WIDE);
    for (auto &x : A) x = random_float();
    for (auto &x : B) x = random_float();
    Device<__nv_bfloat16> a(A.size(), A.data()), b(B.size(), B.data());
    Device<float> out(64 * WIDE);
    CUtensorMap a_map = map_of(a.p, a_rows, 64, 64);
    CUtensorMap b_map = TRANS_B ? map_of(b.p, DEEP, WIDE, 64) : map_of(b.p, WIDE, DEEP, WIDE);
    cudaFuncSetAttribute(hopper<TRANS_A, TRANS_B>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         shared);
    hopper<TRANS_A, TRANS_B><<<1, 128, shared>>>(a_map, b_map, out.p);
    auto got = out.read();
    double worst = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < WIDE; j++) {
            double sum = 0;
            for (int k = 0; k < DEEP && (TRANS_A || i < a_rows); k++) {
                double x = (float)A[TRANS_A ? k * 64 + i : i * DEEP + k];
                sum += 2 * x * (float)B[TRANS_B ? k * WIDE + j : j * DEEP + k];
            }
            worst = fmax(worst, fabs(got[i * WIDE + j] - sum));
            if (got[i * WIDE + j] != got[i * WIDE + j]) worst = INFINITY;
        }
    return worst < 1e-3;
}

static void hoppers() {
    check(hopper_is_right<false, false>(), "TMA, mbarrier and wgmma");
    check(hopper_is_right<true, false>(), "the same, with A transposed");
    check(hopper_is_right<false, true>(), "the same, with B transposed");
    check(hopper_is_right<true, true>(), "the same, with both transposed");
    Device<__nv_bfloat16> p(64 * 65);
    check(!map_of(p.p + 1, 64, 64, 64).data && !map_of(p.p, 64, 65, 64).data,
          "tensor maps of addresses or rows that are no multiple of 16 bytes are refused");
}

// -------------------------------------------------------------------------------------------------
// Runtime

__global__ void touch(char *p) {
    extern __shared__ char shared[];
    if (p) {
        p[0] = 1;
    } else {
        shared[0] = 1;
    }
}

// The error of a launch. -1 if it ran in spite of an error, or did not run, or the error stays.
static int launch(dim3 grid, dim3 block, size_t shared) {
    Device<char> p(1);
    touch<<<grid, block, shared>>>(p.p);
    cudaError_t e = cudaPeekAtLastError();
    bool ran = p.read()[0] == 1;
    bool clears = cudaGetLastError() == e && cudaGetLastError() == cudaSuccess;
    return ran == (e == cudaSuccess) && clears ? e : -1;
}

static void launches() {
    const int config = cudaErrorInvalidConfiguration, value = cudaErrorInvalidValue;
    bool ok = launch(1, 1024, 48 << 10) == cudaSuccess;
    ok &= launch(1, 1025, 0) == config && launch(1, dim3(32, 32, 2), 0) == config;
    ok &= launch(0, 1, 0) == config && launch(1, 0, 0) == config;
    ok &= launch(dim3(1, 65536), 1, 0) == config && launch(1, dim3(1, 1, 65), 0) == config;
    check(ok, "sizes of launches");

    auto ask = [](int bytes) {
        return cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    ok = launch(1, 1, (48 << 10) + 1) == value && ask((163 << 10) + 1) == value;
    ok &= cudaGetLastError() == value && ask(100 << 10) == cudaSuccess;
    ok &= launch(1, 1, 100 << 10) == cudaSuccess && launch(1, 1, (100 << 10) + 1) == value;
    check(ok, "dynamic shared memory beyond 48 KiB");
    touch<<<1, 1, 1>>>(NULL);
}

// Everything that a launch may look like
namespace named {
__device__ int blocks, threads;
__global__ void count() {
    atomicAdd(&threads, 1);
    if (threadIdx.x == 0) atomicAdd(&blocks, 1);
}
template <int A, int B> __global__ void set(int *p) { *p = A + B; }
} // namespace named
__global__ void triple(int *p) { *p *= 3; }

static void syntax() {
    Device<int> x(1);
    cudaStream_t stream;
    int n = 64, blocks, threads;
    cudaStreamCreate(&stream);
    named::count<<<1, n>>>();
    named::count<<<dim3(2, 3), n >> 1, n > 9 ? 8 : 0, stream>>>(); named::count<<<n>>5, 1>>> ();
    if (x.n < 2) named::set<4, 3><<<1, 1>>>(x.p); else triple<<<1, 1>>>(x.p);
    triple<<<1, 1>>>(x.p); triple<<<x.n > 1 ? 2 : 1, x.n, 0, stream>>>(
        x.p);
    bool ok = cudaStreamSynchronize(stream) == cudaSuccess;
    ok &= cudaStreamDestroy(stream) == cudaSuccess;
    cudaMemcpyFromSymbol(&blocks, named::blocks, sizeof blocks);
    cudaMemcpyFromSymbol(&threads, named::threads, sizeof threads);
    ok &= blocks == 1 + 6 + 2 && threads == 64 + 6 * 32 + 2;
    check(ok && x.read()[0] == 7 * 9, "launches: two in a line, without arguments, streams");
}

__global__ void add_one(float *p) { p[threadIdx.x]++; }

// Of a vector of arguments each recording keeps a copy.
__global__ void add(int *p, int4 x) { *p += x.x + x.w; }

static void graphs() {
    int n = 5, *p;
    Device<int> x(1, &n);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    add<<<1, 1>>>(x.p, make_int4(0, 0, 0, 0));
    triple<<<1, 1, 0, stream>>>(x.p);

    bool ok = cudaStreamEndCapture(stream, &graph) == cudaErrorIllegalState;
    ok &= cudaStreamBeginCapture(0, cudaStreamCaptureModeThreadLocal) && !cudaStreamBeginCapture(
        cudaStreamPerThread, cudaStreamCaptureModeThreadLocal);
    cudaGetLastError();
    n = 2;
    add<<<1, 1>>>(x.p, make_int4(n, 0, 0, 1));
    triple<<<1, 1>>>(x.p);
    n = 100;
    const cudaError_t no = cudaErrorStreamCaptureUnsupported;
    ok &= cudaMemcpy(&n, x.p, sizeof n, cudaMemcpyDeviceToHost) == no && cudaMalloc(&p, 4) == no;
    ok &= cudaMemset(x.p, 0, sizeof n) == no && cudaFree(x.p) == no;
    ok &= cudaDeviceSynchronize() == no && cudaStreamSynchronize(stream) == no;
    ok &= cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == no;
    cudaGetLastError();
    ok &= !cudaStreamEndCapture(cudaStreamPerThread, &graph) && x.read()[0] == 15;
    ok &= !cudaGraphInstantiateWithFlags(&exec, graph, 0) && !cudaGraphDestroy(graph);
    check(ok, "a graph records launches, and runs none; no copy, no memory, no wait");

    ok = !cudaGraphLaunch(exec, cudaStreamPerThread) && x.read()[0] == (15 + 3) * 3;
    ok &= !cudaGraphLaunch(exec, stream) && x.read()[0] == (54 + 3) * 3;
    check(ok && !cudaGraphExecDestroy(exec), "a graph runs its launches each time, in order");
    cudaStreamDestroy(stream);
}

static void managed() { // with CUDA_ON_CPU_PROTECT too
    const size_t bytes = 64 * sizeof(float);
    float *m, *p, *none = nullptr, host[64], back[64];
    bool ok = cudaMallocManaged(&m, bytes) == cudaSuccess && __float_as_uint(m[63]) == ~0u;
    ok &= cudaMallocManaged(&none, 0) == cudaErrorInvalidValue;
    ok &= cudaMallocManaged(&none, 1ull << 60) == cudaErrorMemoryAllocation && !none;
    ok &= cudaGetLastError() == cudaErrorMemoryAllocation;
    cudaMalloc(&p, bytes);
    for (int i = 0; i < 64; i++) m[i] = i;
    add_one<<<1, 64>>>(m);
    ok &= m[0] == 1 && m[63] == 64;

    // It is device memory and host memory.
    cudaMemcpy(p, m, bytes, cudaMemcpyHostToDevice);
    add_one<<<1, 64>>>(p);
    cudaMemcpy(m, p, bytes, cudaMemcpyDeviceToHost);
    cudaMemset(m + 32, 0, 32 * sizeof(float));
    cudaMemcpy(p, m, bytes, cudaMemcpyDeviceToDevice);
    cudaMemcpy(host, p, bytes, cudaMemcpyDeviceToHost);
    ok &= host[0] == 2 && host[31] == 33 && host[32] == 0 && host[63] == 0;
    check(ok, "managed memory");

    host[63] = 9;
    ok = cudaMemcpy(p, host, bytes, cudaMemcpyDefault) == cudaSuccess;
    cudaMemcpy(m, p, bytes, cudaMemcpyDefault);
    m[62] = 8;
    cudaMemcpy(p, m, bytes, cudaMemcpyDefault);
    cudaMemcpy(back, p, bytes, cudaMemcpyDefault);
    cudaMemcpy(host, back, bytes, cudaMemcpyDefault);
    ok &= host[0] == 2 && host[62] == 8 && host[63] == 9;
    check(ok && !cudaFree(m) && !cudaFree(p), "cudaMemcpyDefault");
}

static void memory() {
    size_t free0, free1, total;
    cudaMemGetInfo(&free0, &total);
    float *p = nullptr, *q = nullptr, *host = nullptr, filled[4] = {1, 2, 3, 4};
    bool ok = cudaMalloc(&p, 4000) == cudaSuccess && cudaMalloc(&q, 16) == cudaSuccess;
    cudaMemGetInfo(&free1, &total);
    ok &= free0 - free1 == 4016 && free0 == total;
    ok &= cudaMalloc(&host, total) == cudaErrorMemoryAllocation;
    ok &= cudaGetLastError() == cudaErrorMemoryAllocation;

    ok &= cudaMallocHost(&host, 16) == cudaSuccess;
    cudaMemcpyAsync(host, p, 16, cudaMemcpyDeviceToHost, 0);
    ok &= __float_as_uint(host[3]) == ~0u;
    cudaMemcpy(p + 996, filled, 16, cudaMemcpyHostToDevice);
    cudaMemcpy(q, p + 996, 16, cudaMemcpyDeviceToDevice);
    cudaMemsetAsync(q, 0, 4);
    cudaMemcpy(host, q, 16, cudaMemcpyDeviceToHost);
    ok &= host[0] == 0 && host[3] == 4;
    ok &= cudaFree(p) == cudaSuccess && cudaFree(q) == cudaSuccess && cudaFree(NULL) == cudaSuccess;
    cudaFreeHost(host);
    cudaMemGetInfo(&free1, &total);
    check(ok && free1 == total, "memory: amounts, copies, starts as 0xFF");
}

static void device() {
    cudaDeviceProp prop;
    cudaEvent_t a, b;
    float ms = -1;
    int count, current = -1;
    bool ok = cudaGetDeviceCount(&count) == cudaSuccess && count == 1;
    ok &= cudaGetDevice(&current) == cudaSuccess && current == 0;
    ok &= cudaSetDevice(0) == cudaSuccess && cudaSetDevice(1) == cudaErrorInvalidValue;
    ok &= cudaGetLastError() == cudaErrorInvalidValue;
    ok &= cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.major == 8 && prop.minor == 0;
    ok &= prop.sharedMemPerBlock == 48 << 10 && prop.sharedMemPerBlockOptin == 163 << 10;
    ok &= prop.maxThreadsPerBlock == 1024 && prop.warpSize == 32 && prop.multiProcessorCount == 8;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    cudaEventRecord(a);
    cudaEventRecord(b);
    cudaEventSynchronize(b);
    cudaEventElapsedTime(&ms, a, b);
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    check(ok && ms >= 0 && cudaDeviceSynchronize() == cudaSuccess, "device and events");
}

// -------------------------------------------------------------------------------------------------
// Mistakes. test_cuda_on_cpu.sh looks for these lines.

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
        else __syncthreads(); // 2
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

    __shared__ uint64_t barrier;
    float sums[12][4];
    CUtensorMap map = {(char *)p, 1, 64, 128, 1};
    if (which < 12) return;
    if (t == 0) mbarrier_init(&barrier, 1);
    if (which == 12) mbarrier_wait(&barrier, t % 2);
    if (which == 13) mbarrier_wait(&barrier, 0);
    if (which == 14 && t == 0) tma_load(dynamic + 4, &map, 0, 0, &barrier);
    if (which == 15 && t == 0) tma_load(dynamic, &map, 0, 0, &barrier);
    if (which == 39 && t == 0) tma_load(dynamic, &map, 0, 0, &barrier);
    if (which == 39) mbarrier_wait(&barrier, 0);
    if (which == 42 && t == 0) bulk_load(dynamic, p + 1, 16, &barrier);
    if (which == 43 && t == 0) bulk_prefetch(p + 1, 16);
    if (which == 16 && t == 0) { mbarrier_expect(&barrier, 16); mbarrier_arrive(&barrier); }
    if (which == 17) wgmma<false, false>(sums, t, 0, 0);
    if (which == 18) wgmma<false, false>(sums, 0, 0, 0);
    float more[9][12][4];
    if (which == 40) for (int i = 0; i < 65; i++) wgmma<false, false>(sums, 0, 0, 0);
    if (which == 41) for (int i = 0; i < 9; i++) wgmma<false, false>(more[i], 0, 0, 0);
}

// -------------------------------------------------------------------------------------------------
// In which order do the threads of a block come by after each of three barriers? A line for each
// barrier and block.

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

static void check_all() {
    barriers();
    warps();
    load_matrix();
    tensor_cores();
    copies();
    numbers();
    vectors();
    atomics();
    variables();
    hoppers();
    launches();
    syntax();
    graphs();
    managed();
    memory();
    device();
}

int main(int argc, char **argv) {
    int which = argc > 1 ? atoi(argv[1]) : -1, count;
    if (which < 0) {
        check_all();
        return failed != 0;
    }

    float host[64] = {}, *p = nullptr, *out = nullptr;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (!e) e = cudaMalloc(&p, sizeof host);
    if (!e) e = cudaMalloc(&out, sizeof host);
    if (which < 20 || (which > 38 && which < 44)) mistake<<<2, 64, sizeof host>>>(p, which, out);
    if (which == 20) mistake<<<1, 64, sizeof host>>>(p, which, host);
    if (which == 21) cudaMemcpy(host, host, 4, cudaMemcpyHostToDevice);
    if (which == 22) cudaMemcpy(p + 1, host, sizeof host, cudaMemcpyHostToDevice);
    if (which == 23) cudaMemcpy(p, out, 4, cudaMemcpyDeviceToHost);
    if (which == 24) cudaFree(p + 1);
    if (which == 25) p[3] = 1;
    if (which == 26) return !reverse_is_right<true, true>();
    if (which == 27) print_arrivals();
    if (which == 31) cudaMemcpyToSymbol(table, host, sizeof host, 4);
    if (which == 32) cudaMemcpyFromSymbol(host, rows, 8);
    if (which == 33) cudaMemcpyToSymbol(rows, host, 4, 0, cudaMemcpyDeviceToHost);
    if (which == 34 && !cudaMemcpyToSymbol(table, host, 4)) add_one<<<1, 1>>>(table);
    if (which == 35 && !cudaGetSymbolAddress((void **)&p, table)) cudaFree(p);
    if (which == 36) cudaMemcpy(p + 1, host, sizeof host, cudaMemcpyDefault);
    if (which == 37) cudaMemcpy(host, p + 1, sizeof host, cudaMemcpyDefault);
    if (which == 38) {
        cudaGetLastError();
        e = cudaMemcpyToSymbol(table, host, 4);
    }
    if (which == 44) cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeThreadLocal);
    if (which == 44) add_one<<<1, 1>>>(p);
    if (!e) e = cudaGetLastError();
    puts(cudaGetErrorString(e));
    cudaFree(p);
    cudaFree(out);
}
