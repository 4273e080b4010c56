/*
The matrix product and attention of loopmdm.cu on the instructions of Hopper, compute capability 9.0
(H100, H200). loopmdm.cu includes this file.

Hopper's tensor cores reach their speed with wgmma only. It takes both tiles from shared memory,
transposed or not, and the threads need not wait for it. TMA brings the tiles, and is asked by one
thread. So a block has three warpgroups, of 4 warps each: two that multiply, each 64 x COLS of a
tile of 128 x COLS, and one that loads. They meet at mbarriers, two for each place of the ring:

    loads       waits for empty[s]; asks TMA for the next tiles, whose bytes count at full[s]
    multiply    wait for full[s]; begin its products; end those before, and arrive at their empty[s]

Step n uses place s = n % stages, in round n / stages. A round of the ring is a phase of its
barriers, so round r waits for parity r % 2 of full[s]. It waits for empty[s] of the round before,
with the other parity; in round 0 that has ended on a new barrier.

A block makes one tile of C after the other, and the next tile's numbers are loaded while one is
stored. COLS is 256, or 96 where that wastes less (C = 288). dev/ptx.h has the instructions.
*/
#pragma once

enum { GROUP = 4 * WARP, GROUPS = 2 };               // a warpgroup's threads; those that multiply
enum { HOPPER_THREADS = (GROUPS + 1) * GROUP };      // of a block
enum { SLICE = 64 };                                 // a box of TMA is so wide: 128 bytes
enum { ROWS = GROUPS * 64 };                         // of a tile of C; a wgmma has 64

// Registers of a thread, where so many blocks share the 65,536 of a multiprocessor
enum { LOADS_WITH = 32 };
HOST_DEVICE static constexpr int multiplies_with(int blocks) { return blocks == 1 ? 232 : 104; }

template <int COLS> struct Hopper {
    static constexpr int blocks = COLS > 128 ? 1 : 2;  // of a multiprocessor
    static constexpr int stages = COLS > 128 ? 4 : 3;  // of the ring
    static constexpr int b_size = (COLS + SLICE - 1) / SLICE * SLICE * SLICE; // numbers
    static constexpr int stage_size = ROWS * SLICE + b_size;
};

// What wgmma needs to know about a tile in shared memory: its address; the distance of its groups
// of 8 rows, 1024 bytes; for a transposed tile the distance of its groups of 64 columns; and in the
// highest bits that TMA has exchanged the chunks of its rows. All but these count in 16 bytes.
__device__ static inline uint64_t descriptor(const floatX *tile) {
    uint64_t groups = SLICE * SLICE * sizeof(floatX) / 16;
    return 1ull << 62 | 1024ull / 16 << 32 | groups << 16 | shared_address(tile) / 16;
}

// Tile n of C, and of the parts of K. The shorter side of C runs fastest: the blocks that run at
// the same time then share most of what they load.
struct Tile {
    int i0, j0, z;
    __device__ Tile(int n, int tall, int wide, int columns) {
        z = n / (tall * wide);
        n %= tall * wide;
        i0 = (tall > wide ? n / wide : n % tall) * ROWS;
        j0 = (tall > wide ? n % wide : n / tall) * columns;
    }
};

// From each of two results of mma a lane has two neighbours. Lanes 2n and 2n + 1 exchange: now the
// even one has four neighbours of the left result, the odd one of the right.
__device__ static inline void exchange(float x[4], const float left[2], const float right[2]) {
    bool odd = threadIdx.x % 2;
    for (int e = 0; e < 2; e++) {
        float other = __shfl_xor_sync(ALL, odd ? left[e] : right[e], 1);
        x[e] = odd ? other : left[e];
        x[e + 2] = odd ? right[e] : other;
    }
}

// By all threads: for each place of the ring a barrier that counts loads, and one that counts the
// warps that have multiplied. Attention has one more, for what is loaded once.
template <int N, int STAGES> __device__ static inline
void make_barriers(uint64_t (&full)[N], uint64_t (&empty)[STAGES]) {
    if (threadIdx.x == 0) {
        for (int s = 0; s < N; s++) mbarrier_init(&full[s], 1);
        for (int s = 0; s < STAGES; s++) mbarrier_init(&empty[s], GROUPS * GROUP / WARP);
        mbarrier_init_done();
    }
    __syncthreads(); // the barriers are there
}

// Grid: as many blocks as run at the same time. Block: HOPPER_THREADS. depth: a multiple of SLICE.
template <int COLS, bool TRANS_A, bool TRANS_B, class Epilogue>
__global__ void __launch_bounds__(HOPPER_THREADS, Hopper<COLS>::blocks)
matmul_hopper_kernel(Epilogue epilogue, const __grid_constant__ CUtensorMap a,
                     const __grid_constant__ CUtensorMap b, int M, int N, int K, int depth) {
    typedef Hopper<COLS> H;
    extern __shared__ __align__(1024) floatX ring[]; // (stages, A and B)
    __shared__ uint64_t full[H::stages];
    __shared__ uint64_t empty[H::stages];
    int group = threadIdx.x / GROUP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int tall = blocks(M, ROWS), wide = blocks(N, COLS), tiles = tall * wide * blocks(K, depth);
    int step = 0; // counts through all tiles of the block

    make_barriers(full, empty);

    if (group == GROUPS) {
        fewer_registers<LOADS_WITH>();
        if (threadIdx.x % GROUP) return;
        int bytes = ROWS * SLICE + (TRANS_B ? H::b_size : COLS * SLICE);
        for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
            Tile tile(n, tall, wide, COLS);
            int end = min(K, (tile.z + 1) * depth);
            for (int k = tile.z * depth; k < end; k += SLICE, step++) {
                int s = step % H::stages;
                floatX *at = ring + s * H::stage_size, *bt = at + ROWS * SLICE;
                mbarrier_wait(&empty[s], step / H::stages % 2 ^ 1);
                mbarrier_expect(&full[s], bytes * (int)sizeof(floatX));
                if (!TRANS_A) tma_load(at, &a, k, tile.i0, &full[s]);
                for (int i = 0; TRANS_A && i < ROWS; i += SLICE)
                    tma_load(at + i * SLICE, &a, tile.i0 + i, k, &full[s]);
                if (!TRANS_B) tma_load(bt, &b, k, tile.j0, &full[s]);
                for (int j = 0; TRANS_B && j < COLS; j += SLICE)
                    tma_load(bt + j * SLICE, &b, tile.j0 + j, k, &full[s]);
            }
        }
        return;
    }

    more_registers<multiplies_with(H::blocks)>();
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        Tile tile(n, tall, wide, COLS);
        int begin = tile.z * depth, end = min(K, begin + depth);
        float sum[COLS / 8][4]; // the first product sets it
#pragma unroll 1 // in copies of the loop the compiler would wait for each product
        for (int k0 = begin; k0 < end; k0 += SLICE, step++) {
            int s = step % H::stages;
            const floatX *at = ring + s * H::stage_size + group * 64 * SLICE;
            const floatX *bt = ring + s * H::stage_size + ROWS * SLICE;
            mbarrier_wait(&full[s], step / H::stages % 2);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < SLICE; k += 16) { // transposed tiles have 64 columns
                uint64_t a_at = descriptor(at + (TRANS_A ? k * 64 : k));
                uint64_t b_at = descriptor(bt + (TRANS_B ? k * 64 : k));
                wgmma<TRANS_A, TRANS_B>(sum, a_at, b_at, k0 + k > begin);
            }
            wgmma_commit();
            wgmma_wait<1>(); // the step before is done with its tiles
            if (k0 > begin && lane == 0) mbarrier_arrive(&empty[(step - 1) % H::stages]);
        }
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(&empty[(step - 1) % H::stages]);
        keep(sum);

#pragma unroll
        for (int j = 0; j < COLS / 8; j += 2)
#pragma unroll
            for (int half = 0; half < 2; half++) { // rows g and g + 8: see mma
                float x[4];
                exchange(x, &sum[j][2 * half], &sum[j + 1][2 * half]);
                int row = tile.i0 + warp * 16 + lane / 4 + half * 8;
                int column = tile.j0 + (j + lane % 2) * 8 + lane / 2 % 2 * 4;
                if (row < M && column < N) epilogue(tile.z * M + row, column, x);
            }
    }
}

// How TMA finds boxes of (box_rows,64) in a matrix (rows,columns). What is outside becomes zero.
static CUtensorMap tensor_map(const floatX *matrix, int ld, int rows, int columns, int box_rows) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode; // the driver's function
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                    12000, cudaEnableDefault, &found),
                   "the driver's function for tensor maps");
        if (!encode) die(FAILED, "the GPU's driver has no tensor maps: install a newer one");
    }
    CUtensorMap map;
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows};
    cuuint64_t strides[] = {ld * sizeof(floatX)};
    cuuint32_t box[] = {SLICE, (cuuint32_t)box_rows}, steps[] = {1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)matrix, sizes, strides, box,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        die(FAILED, "the GPU's driver makes no tensor map of a matrix (%d,%d)", rows, columns);
    return map;
}

template <int COLS, bool TRANS_A, bool TRANS_B, class Epilogue>
static void multiply_hopper(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
                            int M, int N, int K, int depth) {
    typedef Hopper<COLS> H;
    CUtensorMap a_map = TRANS_A ? tensor_map(a, lda, K, M, SLICE) : tensor_map(a, lda, M, K, ROWS);
    CUtensorMap b_map = TRANS_B ? tensor_map(b, ldb, K, N, SLICE) : tensor_map(b, ldb, N, K, COLS);
    size_t shared = H::stages * H::stage_size * sizeof(floatX);
    int tiles = blocks(M, ROWS) * blocks(N, COLS) * blocks(K, depth);
    int grid = min(tiles, H::blocks * this_gpu()->multiProcessorCount);
    auto matmul = matmul_hopper_kernel<COLS, TRANS_A, TRANS_B, Epilogue>;
    allow_shared(matmul, shared, "matmul");
    matmul<<<grid, HOPPER_THREADS, shared>>>(epilogue, a_map, b_map, M, N, K, depth);
    launched(product_name(TRANS_A, TRANS_B), M, N, K);
}

// TMA wants rows that begin at multiples of 16 bytes, and epilogues get four neighbours.
static bool hopper_can(const floatX *a, int lda, const floatX *b, int ldb, int ld) {
    bool aligned = ((uintptr_t)a | (uintptr_t)b) % 16 == 0 && lda % 8 == 0 && ldb % 8 == 0;
    return this_gpu()->major == 9 && aligned && ld % 4 == 0;
}

// ---- attention: the functions of loopmdm.cu, on these instructions ----
//
// A block has 128 positions of one head, 64 for each warpgroup, and goes over all positions, 64 at
// a time. A tile is 64 positions of a head, and lies in shared memory as boxes of 64 columns.
// Scores come from two tiles. Probabilities stay in registers for the next product. A box may reach
// into the next head, whose columns no product takes, and the last tile into the next sequence.

// Where in a tile 16 channels begin, from d on
__device__ static inline const floatX *channels(const floatX *tile, int d) {
    return tile + d / SLICE * SLICE * SLICE + d % SLICE;
}

// d (64,64) = x (64,D) y (64,D)^T
template <int D> __device__ static inline
void multiply_tiles(float (&d)[SLICE / 8][4], const floatX *x, const floatX *y) {
#pragma unroll
    for (int k = 0; k < D; k += 16)
        wgmma<false, false>(d, descriptor(channels(x, k)), descriptor(channels(y, k)), k > 0);
    wgmma_commit();
}

// d (64,D) += p (64,64) y (64,D); or d = p y with add 0
template <int D> __device__ static inline
void multiply_probabilities(float (&d)[D / 8][4], const float (&p)[SLICE / 8][4], const floatX *y,
                            int add) {
    uint32_t a[SLICE / 16][4];
#pragma unroll
    for (int k = 0; k < SLICE / 16; k++) to_a(a[k], p[2 * k], p[2 * k + 1]);
    keep(a); // what was done to A and the sums must come before the fence
    keep(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SLICE / 16; k++)
        wgmma(d, a[k], descriptor(y + k * 16 * SLICE), add + k > 0);
}

template <int D> struct HopperAttention {
    static constexpr int tile = (D + SLICE - 1) / SLICE * SLICE * SLICE; // numbers
    static constexpr int stages = 4;                                     // of two tiles
    static constexpr int blocks = D <= 64 ? 2 : 1; // of a multiprocessor, in forward
};

// Starts to load 64 positions of the channels from this column on.
template <int D> __device__ static inline
void load_head(floatX *tile, const CUtensorMap *map, int column, int row, uint64_t *barrier) {
    for (int d = 0; d < D; d += SLICE)
        tma_load(tile + d * SLICE, map, column + d, row, barrier);
}

// Grid: B * NH * (T / ROWS). Block: HOPPER_THREADS.
template <int D>
__global__ void __launch_bounds__(HOPPER_THREADS, HopperAttention<D>::blocks)
attention_forward_hopper_kernel(floatX *out, float *lse, const __grid_constant__ CUtensorMap qkv,
                                float scale, int T, int C, int NH) {
    typedef HopperAttention<D> H;
    extern __shared__ __align__(1024) floatX ring[]; // (stages, k and v), then q of each group
    __shared__ uint64_t full[H::stages + 1]; // the last: the block's own tiles
    __shared__ uint64_t empty[H::stages];
    int group = threadIdx.x / GROUP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int bh = blockIdx.x / blocks(T, ROWS), t0 = blockIdx.x % blocks(T, ROWS) * ROWS;
    int b = bh / NH, column = bh % NH * D, row = b * T;
    floatX *qt = ring + H::stages * 2 * H::tile;

    make_barriers(full, empty);

    if (group == GROUPS) {
        fewer_registers<LOADS_WITH>();
        if (threadIdx.x % GROUP) return;
        const int bytes = 2 * H::tile * (int)sizeof(floatX);
        mbarrier_expect(&full[H::stages], bytes);
        for (int g = 0; g < GROUPS; g++)
            load_head<D>(qt + g * H::tile, &qkv, column, row + t0 + g * SLICE, &full[H::stages]);
        for (int j = 0, step = 0; j < T; j += SLICE, step++) {
            int s = step % H::stages;
            floatX *kt = ring + s * 2 * H::tile;
            mbarrier_wait(&empty[s], step / H::stages % 2 ^ 1);
            mbarrier_expect(&full[s], bytes);
            load_head<D>(kt, &qkv, C + column, row + j, &full[s]);
            load_head<D>(kt + H::tile, &qkv, 2 * C + column, row + j, &full[s]);
        }
        return;
    }

    more_registers<multiplies_with(H::blocks)>();
    float scale2 = scale * 1.44269504f; // log2(e)
    float y[D / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    mbarrier_wait(&full[H::stages], 0);
#pragma unroll 1
    for (int j0 = 0, step = 0; j0 < T; j0 += SLICE, step++) {
        int s = step % H::stages;
        const floatX *kt = ring + s * 2 * H::tile, *vt = kt + H::tile;
        float p[SLICE / 8][4]; // scores, then probabilities
        mbarrier_wait(&full[s], step / H::stages % 2);
        wgmma_fence();
        multiply_tiles<D>(p, qt + group * H::tile, kt);
        wgmma_wait<0>();
        keep(p);

        if (j0 + SLICE > T) { // what lies beyond the last key counts as zero
#pragma unroll
            for (int j = 0; j < SLICE / 2; j++)
                if (j0 + j / 4 * 8 + lane % 4 * 2 + j % 2 >= T) p[j / 4][j % 4] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) { // queries lane / 4, and that + 8
            float m = largest[half], total = 0;
#pragma unroll
            for (int j = 0; j < SLICE / 4; j++) m = fmaxf(m, p[j / 2][2 * half + j % 2]);
            m = fmaxf(m, __shfl_xor_sync(ALL, m, 1)); // four lanes share a query
            m = fmaxf(m, __shfl_xor_sync(ALL, m, 2));
            float shrink = exp_2((largest[half] - m) * scale2);
            largest[half] = m;
#pragma unroll
            for (int j = 0; j < SLICE / 4; j++) {
                float *x = &p[j / 2][2 * half + j % 2];
                *x = exp_2(*x * scale2 - m * scale2);
                total += *x;
            }
            sum[half] = sum[half] * shrink + total;
#pragma unroll
            for (int d = 0; d < D / 4; d++) y[d / 2][2 * half + d % 2] *= shrink;
        }
        multiply_probabilities<D>(y, p, vt, 1);
        wgmma_commit();
        wgmma_wait<0>(); // meanwhile other warpgroups have work for the tensor cores
        if (lane == 0) mbarrier_arrive(&empty[s]);
        keep(y);
    }

    int t_warp = t0 + warp * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int t = t_warp + lane / 4 + half * 8;
        float total = sum[half]; // of a quarter of the keys
        total += __shfl_xor_sync(ALL, total, 1);
        total += __shfl_xor_sync(ALL, total, 2);
        float l = largest[half] * scale2 + log2f(total);
        if (lane % 4 == 0 && t < T) lse[(size_t)bh * T + t] = l;
#pragma unroll
        for (int d = 0; d < D / 4; d++) y[d / 2][2 * half + d % 2] /= total;
    }
    store_rows<D>(out + ((size_t)row + t_warp) * C + column, C, y, T - t_warp, D);
}

// dk and dv of the block's keys from all queries; or, with OF_KEYS false, dq of the block's queries
// from all keys. The block's own positions are the rows of p and dscores.
// Grid: B * NH * (T / ROWS). Block: HOPPER_THREADS.
template <int D, bool OF_KEYS>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
attention_backward_hopper_kernel(floatX *dqkv, const __grid_constant__ CUtensorMap qkv,
                                 const __grid_constant__ CUtensorMap dout, const float *lse_delta,
                                 float scale, int T, int C, int NH) {
    typedef HopperAttention<D> H;
    extern __shared__ __align__(1024) floatX ring[]; // (stages, two tiles), then each group's own
    __shared__ uint64_t full[H::stages + 1]; // the last: the block's own tiles
    __shared__ uint64_t empty[H::stages];
    int group = threadIdx.x / GROUP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int bh = blockIdx.x / blocks(T, ROWS), t0 = blockIdx.x % blocks(T, ROWS) * ROWS;
    int b = bh / NH, column = bh % NH * D, row = b * T;
    floatX *own_tiles = ring + H::stages * 2 * H::tile; // (groups, k and v or q and dout)

    make_barriers(full, empty);

    if (group == GROUPS) {
        fewer_registers<LOADS_WITH>();
        if (threadIdx.x % GROUP) return;
        const int bytes = 2 * H::tile * (int)sizeof(floatX);
        auto load_keys = [&](floatX *to, int t, uint64_t *barrier) { // k and v
            load_head<D>(to, &qkv, C + column, row + t, barrier);
            load_head<D>(to + H::tile, &qkv, 2 * C + column, row + t, barrier);
        };
        auto load_queries = [&](floatX *to, int t, uint64_t *barrier) { // q and dout
            load_head<D>(to, &qkv, column, row + t, barrier);
            load_head<D>(to + H::tile, &dout, column, row + t, barrier);
        };
        mbarrier_expect(&full[H::stages], GROUPS * bytes);
        for (int g = 0; g < GROUPS; g++) {
            floatX *to = own_tiles + g * 2 * H::tile;
            if (OF_KEYS) load_keys(to, t0 + g * SLICE, &full[H::stages]);
            else load_queries(to, t0 + g * SLICE, &full[H::stages]);
        }
        for (int t = 0, step = 0; t < T; t += SLICE, step++) {
            int s = step % H::stages;
            mbarrier_wait(&empty[s], step / H::stages % 2 ^ 1);
            mbarrier_expect(&full[s], bytes);
            if (OF_KEYS) load_queries(ring + s * 2 * H::tile, t, &full[s]);
            else load_keys(ring + s * 2 * H::tile, t, &full[s]);
        }
        return;
    }

    more_registers<multiplies_with(1)>();
    const floatX *x1 = own_tiles + group * 2 * H::tile, *x2 = x1 + H::tile;
    int t_warp = t0 + warp * 16;
    float scale2 = scale * 1.44269504f;
    float dk_or_dq[D / 8][4], dv[OF_KEYS ? D / 8 : 4][4]; // the first product sets them
    float rows[2][2]; // lse and delta of the block's queries lane / 4, and that + 8
    lse_delta += (size_t)bh * blocks(T, SLICE) * SLICE * 2;
    for (int half = 0; half < 2 && !OF_KEYS; half++) {
        int t = min(t_warp + lane / 4 + half * 8, T - 1); // what is beyond T is not stored
        load(rows[half], lse_delta + 2 * t);
    }
    mbarrier_wait(&full[H::stages], 0);
#pragma unroll 1
    for (int u0 = 0, step = 0; u0 < T; u0 += SLICE, step++) {
        int s = step % H::stages;
        const floatX *y1 = ring + s * 2 * H::tile, *y2 = y1 + H::tile;
        float p[SLICE / 8][4], dscores[SLICE / 8][4]; // first scores and dp
        mbarrier_wait(&full[s], step / H::stages % 2);
        wgmma_fence();
        multiply_tiles<D>(p, x1, y1);
        multiply_tiles<D>(dscores, x2, y2);
        wgmma_wait<1>(); // p is there, and the step before is done with its tiles
        if (step > 0 && lane == 0) mbarrier_arrive(&empty[(step - 1) % H::stages]);
        keep(p);

        // lse and delta of the queries: of the lane's two rows, or of two columns for each j
        float query[SLICE / 8][4];
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++) {
            if (OF_KEYS) load(query[j], lse_delta + 2 * (u0 + j * 8 + lane % 4 * 2));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float *of = OF_KEYS ? query[j] + e % 2 * 2 : rows[e / 2];
                bool there = OF_KEYS || u0 + j * 8 + lane % 4 * 2 + e % 2 < T;
                p[j][e] = there ? exp_2(p[j][e] * scale2 - of[0]) : 0;
            }
        }
        wgmma_wait<0>();
        keep(dscores);
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float *of = OF_KEYS ? query[j] + e % 2 * 2 : rows[e / 2];
                dscores[j][e] = p[j][e] * (dscores[j][e] - of[1]);
            }
        if constexpr (OF_KEYS) multiply_probabilities<D>(dv, p, y2, step);
        multiply_probabilities<D>(dk_or_dq, dscores, y1, step);
        wgmma_commit();
    }
    wgmma_wait<0>();
    keep(dk_or_dq);
    for (int d = 0; d < D / 2; d++) dk_or_dq[d / 4][d % 4] *= scale;
    floatX *to = dqkv + ((size_t)row + t_warp) * 3 * C + column;
    store_rows<D>(to + (OF_KEYS ? C : 0), 3 * C, dk_or_dq, T - t_warp, D);
    if constexpr (OF_KEYS) {
        keep(dv);
        store_rows<D>(to + 2 * C, 3 * C, dv, T - t_warp, D);
    }
}

template <int D> static void
attention_forward_hopper(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
    typedef HopperAttention<D> H;
    CUtensorMap map = tensor_map(qkv, 3 * C, B * T, 3 * C, SLICE);
    size_t shared = (2 * H::stages + GROUPS) * H::tile * sizeof(floatX);
    int grid = B * NH * blocks(T, ROWS);
    auto attention = attention_forward_hopper_kernel<D>;
    allow_shared(attention, shared, "attention_forward");
    attention<<<grid, HOPPER_THREADS, shared>>>(out, lse, map, 1 / sqrtf(D), T, C, NH);
    launched("attention_forward");
}

template <int D> static void
attention_backward_hopper(floatX *dqkv, const floatX *dout, const floatX *qkv,
                          const float *lse_delta, int B, int T, int C, int NH) {
    typedef HopperAttention<D> H;
    CUtensorMap map = tensor_map(qkv, 3 * C, B * T, 3 * C, SLICE);
    CUtensorMap dout_map = tensor_map(dout, C, B * T, C, SLICE);
    size_t shared = 2 * (H::stages + GROUPS) * H::tile * sizeof(floatX);
    int grid = B * NH * blocks(T, ROWS), threads = HOPPER_THREADS;
    auto kv = attention_backward_hopper_kernel<D, true>;
    auto q = attention_backward_hopper_kernel<D, false>;
    float scale = 1 / sqrtf(D);
    allow_shared(kv, shared, "attention_backward_kv");
    allow_shared(q, shared, "attention_backward_q");
    kv<<<grid, threads, shared>>>(dqkv, map, dout_map, lse_delta, scale, T, C, NH);
    launched("attention_backward_kv");
    q<<<grid, threads, shared>>>(dqkv, map, dout_map, lse_delta, scale, T, C, NH);
    launched("attention_backward_q");
}
