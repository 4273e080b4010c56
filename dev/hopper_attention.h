/*
Attention of loopmdm.cu on the instructions of Hopper. loopmdm.cu includes this file; warpgroups,
ring and barriers are those of dev/hopper.h.

A block has 128 positions of one head, 64 for each warpgroup, and goes over all positions, 64 at a
time. A tile is 64 positions of a head, and lies in shared memory as boxes of 64 columns. Scores
come from two tiles. Probabilities stay in registers for the next product. A box may reach into the
next head: no product takes those columns. The last tile may reach into the next sequence: p is made
zero there, or the rows are not stored.
*/
#pragma once

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

// d (64,D) += p (64,64) y (64,D); or d = p y with add 0. The caller commits.
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
    static constexpr int tile = (D + SLICE - 1) / SLICE * SLICE * SLICE; // whole boxes
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
    int group = warpgroup(), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int bh = blockIdx.x / blocks(T, ROWS), t0 = blockIdx.x % blocks(T, ROWS) * ROWS;
    int b = bh / NH, column = bh % NH * D, row = b * T;
    floatX *qt = ring + H::stages * 2 * H::tile;

    make_barriers(full, empty, NULL);

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

        online_softmax<D>(p, y, largest, sum, scale2, T - j0);
        multiply_probabilities<D>(y, p, vt, 1);
        wgmma_commit();
        wgmma_wait<0>(); // meanwhile other warpgroups have work for the tensor cores
        if (lane == 0) mbarrier_arrive(&empty[s]);
        keep(y);
    }

    int t_warp = t0 + warp * 16;
    floatX *to = out + ((size_t)row + t_warp) * C + column;
    lse += (size_t)bh * T + t_warp;
    store_softmax<D>(to, C, lse, y, largest, sum, scale2, T - t_warp, D);
}

// dk and dv of the block's keys from all queries; or, with OF_KEYS false, dq of the block's queries
// from all keys. x1, x2 are the block's own tiles, k and v or q and dout; y1, y2 are the other two.
// The block's own positions are the rows of p and dscores.
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
    __shared__ __align__(16) float queries[OF_KEYS ? H::stages : 1][2 * SLICE]; // lse, delta
    int group = warpgroup(), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int bh = blockIdx.x / blocks(T, ROWS), t0 = blockIdx.x % blocks(T, ROWS) * ROWS;
    int b = bh / NH, column = bh % NH * D, row = b * T;
    floatX *own_tiles = ring + H::stages * 2 * H::tile; // (groups, k and v or q and dout)
    lse_delta += (size_t)bh * blocks(T, SLICE) * SLICE * 2;

    make_barriers(full, empty, NULL);

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
            mbarrier_expect(&full[s], bytes + (OF_KEYS ? (int)sizeof queries[s] : 0));
            if (OF_KEYS) load_queries(ring + s * 2 * H::tile, t, &full[s]);
            else load_keys(ring + s * 2 * H::tile, t, &full[s]);
            if (OF_KEYS) bulk_load(queries[s], lse_delta + 2 * t, sizeof queries[s], &full[s]);
        }
        return;
    }

    more_registers<multiplies_with(1)>();
    const floatX *x1 = own_tiles + group * 2 * H::tile, *x2 = x1 + H::tile;
    int t_warp = t0 + warp * 16;
    float scale2 = scale * 1.44269504f;
    float dk_or_dq[D / 8][4], dv[OF_KEYS ? D / 8 : 1][4]; // the first product sets them
    float own[2][2]; // lse and delta of the warp's queries lane / 4 and lane / 4 + 8
    for (int half = 0; half < 2 && !OF_KEYS; half++) {
        int t = min(t_warp + lane / 4 + half * 8, T - 1); // lse_delta may end before the block
        load(own[half], lse_delta + 2 * t);
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

        if (!OF_KEYS && T - u0 < SLICE) mask_beyond(p, T - u0);
        float others[SLICE / 8][4]; // lse and delta of two queries for each j
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++) {
            if (OF_KEYS) load(others[j], queries[s] + 2 * (j * 8 + lane % 4 * 2));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float *query = OF_KEYS ? others[j] + e % 2 * 2 : own[e / 2];
                p[j][e] = exp_2(p[j][e] * scale2 - query[0]);
            }
        }
        // The exponentials should overlap with dp's product. The compiler moves them behind the
        // wait, unless a product that needs them begins before it: dv's. For dq there is none.
        if constexpr (OF_KEYS) {
            multiply_probabilities<D>(dv, p, y2, step > 0);
            wgmma_commit();
            wgmma_wait<1>();
        } else wgmma_wait<0>();
        keep(dscores);
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float *query = OF_KEYS ? others[j] + e % 2 * 2 : own[e / 2];
                dscores[j][e] = p[j][e] * (dscores[j][e] - query[1]);
            }
        multiply_probabilities<D>(dk_or_dq, dscores, y1, step > 0);
        wgmma_commit();
    }
    wgmma_wait<0>();
    keep(dk_or_dq);
    for (int d = 0; d < D / 2; d++) dk_or_dq[d / 4][d % 4] *= scale; // once, not each of dscores
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
    int grid = B * NH * blocks(T, ROWS);
    auto kv = attention_backward_hopper_kernel<D, true>;
    auto q = attention_backward_hopper_kernel<D, false>;
    float scale = 1 / sqrtf(D);
    allow_shared(kv, shared, "attention_backward_kv");
    allow_shared(q, shared, "attention_backward_q");
    kv<<<grid, HOPPER_THREADS, shared>>>(dqkv, map, dout_map, lse_delta, scale, T, C, NH);
    launched("attention_backward_kv");
    q<<<grid, HOPPER_THREADS, shared>>>(dqkv, map, dout_map, lse_delta, scale, T, C, NH);
    launched("attention_backward_q");
}
