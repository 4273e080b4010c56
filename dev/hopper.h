/*
The matrix product of loopmdm.cu on the instructions of Hopper, compute capability 9.0 (H100, H200).
loopmdm.cu includes this file. dev/ptx.h has the instructions: read its Hopper part first.

Hopper's tensor cores reach their speed with wgmma only. It takes both tiles from shared memory,
whether k runs fastest in them or not, and the threads need not wait for it. TMA brings the tiles,
and is asked by one thread. So a block has three warpgroups, of 4 warps each: two that multiply, and
one that loads. They meet at mbarriers, two for each place of a ring of tiles. In step n, at place
s = n % stages:

    loads       waits for empty[s]; asks TMA for the tiles of step n, whose bytes count at full[s]
    multiplies  waits for full[s]; starts step n; waits for the step before, of the same tile, and
                arrives at that step's empty

The ring is in round r = n / stages. A barrier is then in phase r, and a wait names a phase by its
parity. Round r may load when phase r - 1 of empty[s] has ended, which has the other parity. On a
new barrier that wait passes at once, as if a phase -1 had ended.

A block makes one tile of C, of 128 x COLS, after the other. Its two warpgroups that multiply take
turns: while one stores a tile, the other multiplies the next, so that tensor cores need not rest. A
turn begins when the other's last step has started: at my_turn, a barrier for each group. It may not
begin earlier. A wait for full[s] knows the parity of a round only, so all steps before must have
been loaded. COLS is 192, or 96 where 192 would compute far beyond the edge of C (N = 288).
*/
#pragma once

enum { GROUP = 4 * WARP, GROUPS = 2 };          // threads of a warpgroup; groups that multiply
enum { HOPPER_THREADS = (GROUPS + 1) * GROUP }; // of a block
enum { SLICE = 64 };    // columns of a box of TMA, 128 bytes as the swizzle wants; a step's depth
enum { ROWS = 2 * 64 }; // of a tile of C, and positions of a block of attention: SLICE a group
enum { READS = 4 };     // of an epilogue, on their way at a time; more take too many registers

// The warpgroup of this thread. All lanes take lane 0's: then the compiler knows that they have the
// same, and computes what depends on it once for a warp.
__device__ static inline int warpgroup() { return __shfl_sync(ALL, (int)threadIdx.x / GROUP, 0); }

// Registers of a thread. At the launch all have the same: 168, or 80 if two blocks share the 65,536
// of a multiprocessor. Then the group that loads gives up most of its own to those that multiply:
// 24 + 2 * 240 is 3 * 168, and 24 + 2 * 104 is at most 3 * 80.
enum { LOADS_WITH = 24 };
HOST_DEVICE static constexpr int multiplies_with(int blocks) { return blocks == 1 ? 240 : 104; }

template <int COLS> struct Hopper {
    static constexpr int stages = COLS > 96 ? 5 : 6; // of the ring: 200 or 192 KiB; 227 fit
    static constexpr int b_size = (COLS + SLICE - 1) / SLICE * SLICE * SLICE; // whole boxes
    static constexpr int stage_size = ROWS * SLICE + b_size;
};

// A tile for wgmma, in units of 16 bytes. Bits 0 to 13: its address. From bit 16: how far boxes of
// 64 columns are apart (used with TRANS). From bit 32: how far groups of 8 rows are apart, 1024
// bytes. Bit 62: TMA has exchanged the chunks of each row (the 128-byte swizzle). The exchange
// depends on the address alone: a tile begins at a multiple of 1024, but a descriptor may begin
// inside a row.
__device__ static inline uint64_t descriptor(const floatX *tile) {
    uint64_t box = SLICE * SLICE * sizeof(floatX) / 16;
    return 1ull << 62 | 1024ull / 16 << 32 | box << 16 | (shared_address(tile) & 0x3ffff) / 16;
}

// Tile n: it begins at C(i0,j0), and sums part z of K. The shorter side of C runs fastest: blocks
// that run at the same time then share most of what they load.
struct Tile {
    int i0, j0, z;
    __device__ Tile(int n, int tall, int wide, int columns) {
        z = n / (tall * wide);
        n %= tall * wide;
        i0 = (tall > wide ? n / wide : n % tall) * ROWS;
        j0 = (tall > wide ? n % wide : n / tall) * columns;
    }
};

// From each of two results of mma a lane has two neighbours. It gives one pair to lane ^ 1. Then an
// even lane has four neighbours of the left result, an odd one of the right: one store, not two.
__device__ static inline void exchange(float x[4], const float left[2], const float right[2]) {
    bool odd = threadIdx.x % 2;
    for (int e = 0; e < 2; e++) {
        float other = __shfl_xor_sync(ALL, odd ? left[e] : right[e], 1);
        x[e] = odd ? other : left[e];
        x[e + 2] = odd ? right[e] : other;
    }
}

// For each place of the ring: full waits for the thread that loads (and its bytes), empty for the
// warps that use its tiles. Attention has one more full, for what is loaded once. In a matrix
// product one group of warps uses a place, and each group has a barrier in my_turn; attention has
// none. All threads call it.
template <int N, int STAGES> __device__ static inline
void make_barriers(uint64_t (&full)[N], uint64_t (&empty)[STAGES], uint64_t *my_turn) {
    int warps = GROUP / WARP;
    if (threadIdx.x == 0) {
        for (int s = 0; s < N; s++) mbarrier_init(&full[s], 1);
        for (int s = 0; s < STAGES; s++) mbarrier_init(&empty[s], my_turn ? warps : GROUPS * warps);
        for (int g = 0; my_turn && g < GROUPS; g++) mbarrier_init(&my_turn[g], warps);
        mbarrier_init_done();
    }
    __syncthreads(); // the barriers are there
}

// Grid: as many blocks as run at the same time. Block: HOPPER_THREADS. depth: a multiple of SLICE.
template <int COLS, bool TRANS_A, bool TRANS_B, class Epilogue>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
matmul_hopper_kernel(Epilogue epilogue, const __grid_constant__ CUtensorMap a,
                     const __grid_constant__ CUtensorMap b, int M, int N, int K, int depth) {
    typedef Hopper<COLS> H;
    extern __shared__ __align__(1024) floatX ring[]; // (stages, A and B)
    __shared__ uint64_t full[H::stages];
    __shared__ uint64_t empty[H::stages];
    __shared__ uint64_t my_turn[GROUPS];
    int group = warpgroup(), warp = threadIdx.x % GROUP / WARP, lane = threadIdx.x % WARP;
    int tall = blocks(M, ROWS), wide = blocks(N, COLS), tiles = tall * wide * blocks(K, depth);
    int step = 0, turn = 0; // count through all tiles of the block; turn: through tiles

    make_barriers(full, empty, my_turn);

    if (group == GROUPS) {
        fewer_registers<LOADS_WITH>();
        if (threadIdx.x % GROUP) return; // one thread is enough
        // With TRANS_B the boxes are whole: 96 columns need two of 64.
        int bytes = (ROWS * SLICE + (TRANS_B ? H::b_size : COLS * SLICE)) * (int)sizeof(floatX);
        for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
            Tile tile(n, tall, wide, COLS);
            int end = min(K, (tile.z + 1) * depth);
            for (int k = tile.z * depth; k < end; k += SLICE, step++) {
                int s = step % H::stages;
                floatX *at = ring + s * H::stage_size, *bt = at + ROWS * SLICE;
                mbarrier_wait(&empty[s], step / H::stages % 2 ^ 1);
                mbarrier_expect(&full[s], bytes);
                if (!TRANS_A) tma_load(at, &a, k, tile.i0, &full[s]); // else in boxes (64,64)
                for (int i = 0; TRANS_A && i < ROWS; i += SLICE)
                    tma_load(at + i * SLICE, &a, tile.i0 + i, k, &full[s]);
                if (!TRANS_B) tma_load(bt, &b, k, tile.j0, &full[s]);
                for (int j = 0; TRANS_B && j < COLS; j += SLICE)
                    tma_load(bt + j * SLICE, &b, tile.j0 + j, k, &full[s]);
            }
        }
        return;
    }

    more_registers<multiplies_with(1)>();
    for (int n = blockIdx.x; n < tiles; n += gridDim.x, turn++) {
        Tile tile(n, tall, wide, COLS);
        int begin = tile.z * depth, end = min(K, begin + depth);
        if (turn % GROUPS != group) {
            step += blocks(end - begin, SLICE);
            continue;
        }
        // What the epilogue will read comes into L2 meanwhile. Each thread asks for a row.
        static_assert((int)GROUP == (int)ROWS, "");
        int i = tile.i0 + threadIdx.x % GROUP, width = min(COLS, N - tile.j0);
        auto source = epilogue.source(tile.z * M + i, tile.j0);
        if (source && i < M) bulk_prefetch(source, width * (int)sizeof *source / 16 * 16);

        float sum[ROWS / 64][COLS / 8][4]; // the first product sets it
        // This turn begins when the turn before it has started its last step. Group 0's first one
        // has none before it.
        mbarrier_wait(&my_turn[group], turn / GROUPS % 2 ^ (group == 0));
#pragma unroll 1 // unrolled, the compiler would wait for each product
        for (int k0 = begin; k0 < end; k0 += SLICE, step++) {
            int s = step % H::stages;
            const floatX *at = ring + s * H::stage_size, *bt = at + ROWS * SLICE;
            mbarrier_wait(&full[s], step / H::stages % 2);
            wgmma_fence();
            uint64_t a_at = descriptor(at), b_at = descriptor(bt); // in 16 bytes: 8 numbers
#pragma unroll
            for (int k = 0; k < SLICE; k += 16) // k columns further, with TRANS k rows of 64
#pragma unroll
                for (int i = 0; i < ROWS / 64; i++)
                    wgmma<TRANS_A, TRANS_B>(sum[i],
                                            a_at + (i * 64 * SLICE + (TRANS_A ? k * 64 : k)) / 8,
                                            b_at + (TRANS_B ? k * 64 : k) / 8, k0 + k > begin);
            wgmma_commit();
            wgmma_wait<1>(); // the step before is done with its tiles
            if (k0 > begin && lane == 0) mbarrier_arrive(&empty[(step - 1) % H::stages]);
        }
        if (lane == 0) mbarrier_arrive(&my_turn[group ^ 1]); // all of this tile's steps have begun
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(&empty[(step - 1) % H::stages]);
        for (int i = 0; i < ROWS / 64; i++) keep(sum[i]);

        // A lane stores 4 neighbours at a time, in PLACES places. The first COLS / 8 are in the
        // upper 64 rows. Of these places 2p and 2p + 1 come from pair p of results side by side:
        // row g, and row g + 8 (see mma).
        enum { PLACES = ROWS / 64 * COLS / 8 };
        auto row = [&](int n) {
            return tile.i0 + n / (COLS / 8) * 64 + warp * 16 + lane / 4 + n % 2 * 8;
        };
        auto column = [&](int n) {
            return tile.j0 + (n % (COLS / 8) / 2 * 2 + lane % 2) * 8 + lane / 2 % 2 * 4;
        };
#pragma unroll
        for (int first = 0; first < PLACES; first += READS) {
            float read[READS][4], x[4];
            not_before(lane); // else it computes all addresses first, and has no registers left
#pragma unroll
            for (int n = first; n < first + READS; n++)
                if (row(n) < M && column(n) < N)
                    epilogue.read(read[n - first], tile.z * M + row(n), column(n));
#pragma unroll
            for (int n = first; n < first + READS; n++) {
                float (*at)[4] = &sum[n / (COLS / 8)][n % (COLS / 8) / 2 * 2];
                exchange(x, &at[0][n % 2 * 2], &at[1][n % 2 * 2]);
                if (row(n) < M && column(n) < N)
                    epilogue(tile.z * M + row(n), column(n), x, read[n - first]);
            }
        }
    }
}

// How TMA finds boxes of (box_rows,64) in a matrix (rows,columns). What is outside becomes zero.
static CUtensorMap tensor_map(const floatX *matrix, int ld, int rows, int columns, int box_rows) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
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
        die(FAILED, "the GPU's driver makes no tensor map of a matrix (%d,%d): build without "
            "GPU=sm_90a", rows, columns);
    return map;
}

template <int COLS, bool TRANS_A, bool TRANS_B, class Epilogue>
static void multiply_hopper(Epilogue epilogue, const floatX *a, int lda, const floatX *b, int ldb,
                            int M, int N, int K, int depth) {
    CUtensorMap a_map = TRANS_A ? tensor_map(a, lda, K, M, SLICE) : tensor_map(a, lda, M, K, ROWS);
    CUtensorMap b_map = TRANS_B ? tensor_map(b, ldb, K, N, SLICE) : tensor_map(b, ldb, N, K, COLS);
    size_t shared = Hopper<COLS>::stages * Hopper<COLS>::stage_size * sizeof(floatX);
    int tiles = blocks(M, ROWS) * blocks(N, COLS) * blocks(K, depth);
    int grid = min(tiles, this_gpu()->multiProcessorCount);
    auto matmul = matmul_hopper_kernel<COLS, TRANS_A, TRANS_B, Epilogue>;
    allow_shared(matmul, shared, "matmul");
    matmul<<<grid, HOPPER_THREADS, shared>>>(epilogue, a_map, b_map, M, N, K, depth);
    launched(product_name(TRANS_A, TRANS_B), M, N, K);
}

// TMA wants rows that begin at multiples of 16 bytes, in bf16 8 numbers. So does bulk_prefetch().
static bool hopper_can(const floatX *a, int lda, const floatX *b, int ldb, int ldc) {
    bool aligned = ((uintptr_t)a | (uintptr_t)b) % 16 == 0 && lda % 8 == 0 && ldb % 8 == 0;
    return this_gpu()->major == 9 && aligned && ldc % 8 == 0;
}
