/*
Attention in four steps: qkv (B,T,3C) -> out (B,T,C), and for the last version its backward. Every
position sees every other: there is no causal mask.

    attention [VERSION]     checks all versions, or one, against loopmdm.c. On a GPU it measures
                            them too. README.md says how to build it

qkv and out are floatX, as in loopmdm.cu: bf16 when built with -DBF16=1, else float. Versions 1 to 3
compute in float. A head has size = C/NH channels. bh is a head of a sequence: b * NH + h.
*/
#include "dev/cuda/study.h"

// q of head bh at position t. k is C further on, v 2 C.
__device__ static inline const floatX *query_of(const floatX *qkv, int bh, int t, int T, int C,
                                                int NH) {
    return qkv + ((size_t)(bh / NH) * T + t) * 3 * C + bh % NH * (C / NH);
}
__device__ static inline floatX *out_of(floatX *out, int bh, int t, int T, int C, int NH) {
    return out + ((size_t)(bh / NH) * T + t) * C + bh % NH * (C / NH);
}

// -------------------------------------------------------------------------------------------------
// 1. Three kernels, with all scores in memory
//
// As the formula says: scores = q k^T / sqrt(size), a softmax of each row, out = probabilities v. A
// thread for each score, each row, each result.
// Limit: memory. Each of the T x T scores of a head is written, read three times and written twice
// in the softmax, and read again: 28 bytes for 4 size FLOPs, which is 256 with a size of 64. And it
// takes that memory: 0.8 GB for one layer of d12 with B = 16.

// Grid and block: a thread for each score.
__global__ void scores_kernel1(float *scores, const floatX *qkv, float scale, int B, int T, int C,
                               int NH) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)B * NH * T * T) return;
    int bh = (int)(n / T / T), t = (int)(n / T % T), j = (int)(n % T);
    const floatX *q = query_of(qkv, bh, t, T, C, NH), *k = query_of(qkv, bh, j, T, C, NH) + C;
    float sum = 0;
    for (int d = 0; d < C / NH; d++) sum += (float)q[d] * (float)k[d];
    scores[n] = scale * sum;
}

// Grid and block: a thread for each row of scores.
__global__ void softmax_kernel1(float *scores, int rows, int T) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float *p = scores + (size_t)row * T, largest = -INFINITY, sum = 0;
    for (int j = 0; j < T; j++) largest = fmaxf(largest, p[j]);
    for (int j = 0; j < T; j++) {
        p[j] = expf(p[j] - largest);
        sum += p[j];
    }
    for (int j = 0; j < T; j++) p[j] /= sum;
}

// Grid and block: a thread for each number of out.
__global__ void values_kernel1(floatX *out, const float *probs, const floatX *qkv, int B, int T,
                               int C, int NH) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)B * T * C) return;
    int size = C / NH, bh = (int)(n / T / size), t = (int)(n / size % T), d = (int)(n % size);
    const floatX *v = query_of(qkv, bh, 0, T, C, NH) + 2 * C + d;
    const float *p = probs + ((size_t)bh * T + t) * T;
    float sum = 0;
    for (int j = 0; j < T; j++) sum += p[j] * (float)v[(size_t)j * 3 * C];
    out_of(out, bh, t, T, C, NH)[d] = (floatX)sum;
}

static void attention1(floatX *out, float *scores, const floatX *qkv, int B, int T, int C, int NH) {
    int rows = B * NH * T, grid = blocks((size_t)rows * T, THREADS);
    scores_kernel1<<<grid, THREADS>>>(scores, qkv, 1 / sqrtf(C / NH), B, T, C, NH);
    launched("scores1");
    softmax_kernel1<<<blocks(rows, THREADS), THREADS>>>(scores, rows, T);
    launched("softmax1");
    grid = blocks((size_t)B * T * C, THREADS);
    values_kernel1<<<grid, THREADS>>>(out, scores, qkv, B, T, C, NH);
    launched("values1");
}

// -------------------------------------------------------------------------------------------------
// 2. One kernel, a block for each query
//
// The T scores of a query fit into shared memory, so they never leave the SM, and a whole block
// shares the softmax. First each thread has a key, then a channel. There are more threads than
// channels, so several share the keys of a channel, and their sums are added up.
// Limit: every query reads all of k and v of its head, T times what there is. It comes from the
// caches, but 2 T size numbers for 4 T size FLOPs is 1 byte for a FLOP in bf16, 2 in fp32. And
// neighbouring lanes read different keys, each from its own line.

// Grid: (T, B * NH), a block for each query of each head. Block: THREADS threads.
__global__ void __launch_bounds__(THREADS)
attention_kernel2(floatX *out, const floatX *qkv, float scale, int T, int C, int NH) {
    extern __shared__ float scores[]; // (T)
    __shared__ float sums[THREADS];
    int size = C / NH, t = blockIdx.x, bh = blockIdx.y;
    int shares = THREADS / size, d = threadIdx.x % size, share = threadIdx.x / size;
    const floatX *q = query_of(qkv, bh, t, T, C, NH);
    const floatX *k = query_of(qkv, bh, 0, T, C, NH) + C, *v = k + C;
    float largest = -INFINITY, sum = 0, y = 0;
    for (int j = threadIdx.x; j < T; j += THREADS) {
        float s = 0;
        for (int i = 0; i < size; i++) s += (float)q[i] * (float)k[(size_t)j * 3 * C + i];
        scores[j] = s * scale;
        largest = fmaxf(largest, s * scale);
    }
    largest = block_reduce(largest, MAXIMUM);
    for (int j = threadIdx.x; j < T; j += THREADS) {
        scores[j] = expf(scores[j] - largest);
        sum += scores[j];
    }
    sum = block_reduce(sum, SUM); // its barriers make all of scores visible, too
    if (share < shares)
        for (int j = share; j < T; j += shares) y += scores[j] * (float)v[(size_t)j * 3 * C + d];
    sums[threadIdx.x] = y;
    __syncthreads(); // all shares are there
    if (share > 0) return;
    for (int s = 1; s < shares; s++) y += sums[s * size + d];
    out_of(out, bh, t, T, C, NH)[d] = (floatX)(y / sum);
}

static void attention2(floatX *out, float *, const floatX *qkv, int B, int T, int C, int NH) {
    size_t shared = T * sizeof(float);
    dim3 grid(T, B * NH);
    attention_kernel2<<<grid, THREADS, shared>>>(out, qkv, 1 / sqrtf(C / NH), T, C, NH);
    launched("attention2");
}

// -------------------------------------------------------------------------------------------------
// 3. Online softmax: a thread for each query, tiles of keys
//
// A block has 128 queries of a head. It brings 32 keys and values at a time into shared memory,
// where all its threads use them: 128 times less to read. Scores are never stored. A thread keeps
// the largest score so far, the sum of exp(score - largest) and the sum of exp(score - largest) v.
// When a tile brings a larger score, both sums are scaled down. All lanes read the same number of a
// tile at the same time, which shared memory gives them at once.
// Limit: fp32 multiply-adds, one number from shared memory for each (four come with one load). And
// q, scores and sums, 2 D + 32 numbers, take so many registers (247 with D = 64, on sm_80) that an
// SM has room for 8 warps of 64. These hide little of each other's waiting.

enum { QUERIES = 128, SOME_KEYS = 32 };

// D: size rounded up. Grid: (T / QUERIES, B * NH). Block: QUERIES threads, one for each query.
template <int D> __global__ void __launch_bounds__(QUERIES)
attention_kernel3(floatX *out, const floatX *qkv, float scale, int T, int C, int NH) {
    __shared__ __align__(16) float kt[SOME_KEYS][D];
    __shared__ __align__(16) float vt[SOME_KEYS][D];
    int size = C / NH, t = blockIdx.x * QUERIES + threadIdx.x, bh = blockIdx.y;
    const floatX *q = query_of(qkv, bh, t, T, C, NH);
    const floatX *k = query_of(qkv, bh, 0, T, C, NH) + C, *v = k + C;
    float own[D], acc[D] = {}, largest = -INFINITY, sum = 0;
#pragma unroll
    for (int d = 0; d < D; d++) own[d] = t < T && d < size ? (float)q[d] * scale : 0;
    for (int j0 = 0; j0 < T; j0 += SOME_KEYS) {
        int keys = min(SOME_KEYS, T - j0);
        __syncthreads(); // all are done with the keys before
        for (int n = threadIdx.x; n < SOME_KEYS * D; n += QUERIES) {
            int j = n / D, d = n % D;
            bool there = j < keys && d < size;
            kt[j][d] = there ? (float)k[(size_t)(j0 + j) * 3 * C + d] : 0;
            vt[j][d] = there ? (float)v[(size_t)(j0 + j) * 3 * C + d] : 0;
        }
        __syncthreads(); // the tiles are complete
        float p[SOME_KEYS], m = largest;
#pragma unroll
        for (int j = 0; j < SOME_KEYS; j++) {
            float s = 0;
#pragma unroll
            for (int d = 0; d < D; d++) s += own[d] * kt[j][d];
            p[j] = j < keys ? s : -INFINITY;
            m = fmaxf(m, p[j]);
        }
        float shrink = expf(largest - m);
        largest = m;
        sum *= shrink;
#pragma unroll
        for (int d = 0; d < D; d++) acc[d] *= shrink;
#pragma unroll
        for (int j = 0; j < SOME_KEYS; j++) {
            float e = expf(p[j] - m);
            sum += e;
#pragma unroll
            for (int d = 0; d < D; d++) acc[d] += e * vt[j][d];
        }
    }
    if (t >= T) return;
#pragma unroll
    for (int d = 0; d < D; d++)
        if (d < size) out_of(out, bh, t, T, C, NH)[d] = (floatX)(acc[d] / sum);
}

static void attention3(floatX *out, float *, const floatX *qkv, int B, int T, int C, int NH) {
    dim3 grid(blocks(T, QUERIES), B * NH);
    float scale = 1 / sqrtf(C / NH);
    if (C / NH <= 48) {
        attention_kernel3<48><<<grid, QUERIES>>>(out, qkv, scale, T, C, NH);
    } else {
        attention_kernel3<64><<<grid, QUERIES>>>(out, qkv, scale, T, C, NH);
    }
    launched("attention3");
}

// -------------------------------------------------------------------------------------------------
// 4. The kernels of loopmdm.cu
//
// The same online softmax, but both products go through tensor cores, and 64 queries belong to 4
// warps. A lane has parts of two queries. So scores, softmax and sums fit into registers, and
// probabilities become the next product's operand where they are. Keys are on their way while
// values are multiplied, and the other way round. Backward computes the scores again, which costs
// FLOPs but no memory.
// Limit: README.md counts it out.

static void attention4(floatX *out, float *lse, const floatX *qkv, int B, int T, int C, int NH) {
    attention_forward(out, lse, qkv, B, T, C, NH);
}

// -------------------------------------------------------------------------------------------------
// Checks and times

static const struct {
    const char *name;
    void (*run)(floatX *out, float *buffer, const floatX *qkv, int B, int T, int C, int NH);
} versions[] = {
    {"1 naive: all scores in memory", attention1},
    {"2 a block for each query", attention2},
    {"3 online softmax, a thread for each query", attention3},
    {"4 loopmdm.cu: online softmax on tensor cores", attention4},
};
enum { VERSIONS = COUNT(versions) };

typedef struct { const char *name; int B, T, C, NH; } Case;

// One query and key; sizes that are rounded up, of which 10 is no multiple of 16 bytes; several
// tiles of queries and keys, the last not full
static const Case small[] = {
    {"", 1, 1, 4, 2}, {"", 2, 37, 30, 3}, {"", 1, 130, 96, 2}, {"", 2, 70, 128, 2}};
static const Case large[] = {{"d6", 16, 256, 288, 6}, {"d12", 16, 1024, 768, 12}};

// Of forward: two products, each B NH (T,size) (size,T)
static double flops_of(Case c) { return 4.0 * c.B * c.T * c.T * c.C; }

// The largest error of out in the last sequence of the batch. Sets seconds too, if it is not NULL.
static double forward_error(int version, Case c, double *seconds) {
    size_t TC = (size_t)c.T * c.C, last = (c.B - 1) * TC;
    size_t scores = (size_t)c.B * c.NH * c.T * (version == 1 ? c.T : 1);
    Array<floatX> qkv(3 * c.B * TC), out(c.B * TC);
    Array<float> right(TC), lse((size_t)c.NH * c.T), buffer(scores);
    qkv.fill_random(1, 2);
    auto launch = [&] {
        versions[version - 1].run(out.gpu, buffer.gpu, qkv.gpu, c.B, c.T, c.C, c.NH);
    };
    launch();
    cpu_attention_forward(right.host, lse.host, qkv.host + 3 * last, 1, c.T, c.C, c.NH);
    double error = largest_error(out.get(last, TC), c.C, right.host, c.T, c.C);
    if (seconds) *seconds = best_seconds(launch);
    return error;
}

// The same for dqkv, after a forward
static double backward_error(Case c, double *seconds) {
    size_t TC = (size_t)c.T * c.C, last = (c.B - 1) * TC, rows = (size_t)c.B * c.NH * c.T;
    Array<floatX> qkv(3 * c.B * TC), out(c.B * TC), dout(c.B * TC), dqkv(3 * c.B * TC);
    Array<float> right(3 * TC), right_out(TC), right_lse((size_t)c.NH * c.T);
    Array<float> lse(rows), lse_delta(2 * rows + 2 * ATTN_ROWS * c.B * c.NH);
    qkv.fill_random(1, 2);
    dout.fill_random(2, 1);
    attention_forward(out.gpu, lse.gpu, qkv.gpu, c.B, c.T, c.C, c.NH);
    auto launch = [&] {
        attention_backward(dqkv.gpu, lse_delta.gpu, dout.gpu, out.gpu, qkv.gpu, lse.gpu, c.B, c.T,
                           c.C, c.NH);
    };
    launch();
    const float *last_qkv = qkv.host + 3 * last;
    cpu_attention_forward(right_out.host, right_lse.host, last_qkv, 1, c.T, c.C, c.NH);
    cpu_attention_backward(right.host, dout.host + last, last_qkv, right_lse.host, 1, c.T, c.C,
                           c.NH);
    double error = largest_error(dqkv.get(3 * last, 3 * TC), 3 * c.C, right.host, c.T, 3 * c.C);
    if (seconds) *seconds = best_seconds(launch);
    return error;
}

// products: how many the result needs, of which forward_error() has two
template <class F>
static void study_one(const char *name, double tolerance, double products, F error_of) {
    double error = 0, seconds[2];
    for (Case c : small) error = worse(error, error_of(c, (double *)NULL));
    for (int i = 0; ON_GPU && i < 2; i++) error = worse(error, error_of(large[i], &seconds[i]));
    report(name, error, tolerance);
    for (int i = 0; ON_GPU && i < 2; i++)
        print_flops(large[i].name, products / 2 * flops_of(large[i]), seconds[i]);
    printf("\n");
}

// Tolerances: in float, sums in another order. In bf16 the result is rounded to 8 bits, an error of
// 2^-8 at most. In version 4 probabilities and gradients of scores go through tensor cores and are
// rounded too.
static void study(int version) {
    auto forward = [=](Case c, double *seconds) { return forward_error(version, c, seconds); };
    study_one(versions[version - 1].name, BF16 ? 8e-3 : 5e-6, 2, forward);
    if (version < VERSIONS) return;
    // The result needs 5 products; the kernels make 7.
    study_one("4 loopmdm.cu, backward", BF16 ? 2e-2 : 5e-6, 5, backward_error);
}

int main(int argc, char **argv) { return run_versions(argc, argv, VERSIONS, study); }
