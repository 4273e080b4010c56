/*
The head in four steps: hidden states (R,C) at masked positions -> logits (R,V) -> losses (R) and
the gradient of sum(weights * losses), dlogits (R,V).

    head [VERSION]     checks all versions, or one, against loopmdm.c. On a GPU it measures them
                       too. README.md says how to build it

The product that makes the logits is that of loopmdm.cu; matmul.cu is about it. Here we look at what
comes after. Hidden states, wte and dlogits are floatX, as in loopmdm.cu: bf16 when built with
-DBF16=1, else float. Logits are float. Rows of logits and dlogits are ld apart.

With V = 50257 this is as much memory as anything in the program. When the product is its own
kernel, logits must be read once and dlogits written once. Speeds are given for these bytes, so a
version that goes over them more often shows less.
*/
#include "dev/cuda/study.h"

typedef struct { // where all is, on the GPU
    float *losses, *logits;
    floatX *dlogits;
    const float *weights;            // (BT), like targets: looked up at the positions (R)
    const int *targets, *positions;
    int V, ld;
} Head;

// -------------------------------------------------------------------------------------------------
// 1. Softmax, loss and gradient in three kernels
//
// The softmax in the place of the logits, a thread for a row; the loss, a thread for a row; the
// gradient, a thread for a number.
// Limit: memory, used badly. The softmax goes over a row three times and writes it twice. Its
// neighbouring lanes are in neighbouring rows, V numbers apart, so that each load of a warp touches
// 32 lines of memory. R threads do not fill a GPU. And where p underflows, the loss is infinite.

// Grid and block: a thread for each row.
__global__ void softmax_kernel1(float *logits, int R, int V, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= R) return;
    float *p = logits + (size_t)r * ld, largest = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) largest = fmaxf(largest, p[v]);
    for (int v = 0; v < V; v++) {
        p[v] = expf(p[v] - largest);
        sum += p[v];
    }
    for (int v = 0; v < V; v++) p[v] /= sum;
}

// Grid and block: a thread for each row.
__global__ void loss_kernel1(float *losses, const float *probs, const int *targets,
                             const int *positions, int R, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r < R) losses[r] = -logf(probs[(size_t)r * ld + targets[positions[r]]]);
}

// Grid and block: a thread for each number.
__global__ void gradient_kernel1(floatX *dlogits, const float *probs, const float *weights,
                                 const int *targets, const int *positions, int R, int V, int ld) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)R * V) return;
    int r = (int)(n / V), v = (int)(n % V), position = positions[r];
    size_t at = (size_t)r * ld + v;
    dlogits[at] = (floatX)((probs[at] - (v == targets[position])) * weights[position]);
}

static void head1(Head h, int R) {
    int rows = blocks(R, THREADS), numbers = blocks((size_t)R * h.V, THREADS);
    softmax_kernel1<<<rows, THREADS>>>(h.logits, R, h.V, h.ld);
    launched("softmax1");
    loss_kernel1<<<rows, THREADS>>>(h.losses, h.logits, h.targets, h.positions, R, h.ld);
    launched("loss1");
    gradient_kernel1<<<numbers, THREADS>>>(h.dlogits, h.logits, h.weights, h.targets, h.positions,
                                           R, h.V, h.ld);
    launched("gradient1");
}

// -------------------------------------------------------------------------------------------------
// 2. One kernel, a thread for each row
//
// The largest logit and the sum stay in registers. Probabilities are never stored: three sweeps, of
// which only the last writes. The loss is log sum exp - logit, which cannot underflow.
// Limit: as before, strided access by too few threads.

// Grid and block: a thread for each row.
__global__ void head_kernel2(float *losses, floatX *dlogits, const float *logits,
                             const float *weights, const int *targets, const int *positions, int R,
                             int V, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= R) return;
    const float *z = logits + (size_t)r * ld;
    floatX *d = dlogits + (size_t)r * ld;
    int target = targets[positions[r]];
    float largest = -INFINITY, sum = 0, weight = weights[positions[r]];
    for (int v = 0; v < V; v++) largest = fmaxf(largest, z[v]);
    for (int v = 0; v < V; v++) sum += expf(z[v] - largest);
    losses[r] = largest - z[target] + logf(sum);
    for (int v = 0; v < V; v++)
        d[v] = (floatX)((expf(z[v] - largest) / sum - (v == target)) * weight);
}

static void head2(Head h, int R) {
    head_kernel2<<<blocks(R, THREADS), THREADS>>>(h.losses, h.dlogits, h.logits, h.weights,
                                                  h.targets, h.positions, R, h.V, h.ld);
    launched("head2");
}

// -------------------------------------------------------------------------------------------------
// 3. A block for each row, two sweeps before the gradient
//
// Neighbouring lanes read neighbouring logits, a line of memory for each load of a warp, and there
// are 256 R threads. The block puts largest and sum together.
// Limit: memory again, now at full width. But logits are read three times. A row of 50257 is 0.2
// MB. With 8 blocks on each of a hundred SMs neither L1 nor L2 still has it when it is read again.

// Grid: R blocks, one for each row. Block: THREADS threads.
__global__ void __launch_bounds__(THREADS)
head_kernel3(float *losses, floatX *dlogits, const float *logits, const float *weights,
             const int *targets, const int *positions, int V, int ld) {
    const float *z = logits + (size_t)blockIdx.x * ld;
    floatX *d = dlogits + (size_t)blockIdx.x * ld;
    int position = positions[blockIdx.x], target = targets[position];
    float largest = -INFINITY, sum = 0, weight = weights[position];
    for (int v = threadIdx.x; v < V; v += THREADS) largest = fmaxf(largest, z[v]);
    largest = block_reduce(largest, MAXIMUM);
    for (int v = threadIdx.x; v < V; v += THREADS) sum += expf(z[v] - largest);
    sum = block_reduce(sum, SUM);
    if (threadIdx.x == 0) losses[blockIdx.x] = largest - z[target] + logf(sum);
    for (int v = threadIdx.x; v < V; v += THREADS)
        d[v] = (floatX)((expf(z[v] - largest) / sum - (v == target)) * weight);
}

static void head3(Head h, int R) {
    head_kernel3<<<R, THREADS>>>(h.losses, h.dlogits, h.logits, h.weights, h.targets, h.positions,
                                 h.V, h.ld);
    launched("head3");
}

// -------------------------------------------------------------------------------------------------
// 4. The kernel of loopmdm.cu
//
// The softmax is taken online, so that one sweep gives largest and sum: logits are read twice, not
// three times. And the head works on so many rows at a time that their logits fit into a buffer of
// 2^27 numbers, not R V. That costs no time, and the memory does not grow with R.
// Limit: memory, and the two sweeps.

static void head4(Head h, int R) {
    crossentropy(h.losses, h.dlogits, h.logits, h.weights, h.targets, h.positions, R, h.V, h.ld);
}

// -------------------------------------------------------------------------------------------------
// Checks and times

static const struct {
    const char *name;
    void (*run)(Head h, int R); // logits of R rows are there
} versions[] = {
    {"1 naive: softmax, loss and gradient in three kernels", head1},
    {"2 one kernel, a thread for each row", head2},
    {"3 a block for each row", head3},
    {"4 loopmdm.cu: online softmax, rows in chunks", head4},
};
enum { VERSIONS = COUNT(versions) };

typedef struct { const char *name; int R, C, V, chunk; } Case; // chunk: rows at a time in version 4

// The largest error of the last rows' losses and gradients. Sets the seconds of all, and of all
// without the product, if seconds is not NULL.
static double error_of(int version, Case c, int checked, double *seconds, double *rest) {
    int ld = blocks(c.V, 8) * 8, BT = 2 * c.R + 1;
    int chunk = version == VERSIONS ? min_int(c.chunk, c.R) : c.R;
    Array<floatX> hidden((size_t)c.R * c.C), wte((size_t)c.V * c.C), dlogits((size_t)c.R * ld);
    Array<float> losses(c.R), logits((size_t)chunk * ld), weights(BT);
    Array<float> right((size_t)checked * c.V), right_losses(checked);
    Array<int, int> targets(BT), positions(c.R);
    hidden.fill_random(1, 1);
    wte.fill_random(2, 8 / sqrtf(c.C));
    weights.fill([](size_t i) { return 1 + i % 5; });
    targets.fill([=](size_t i) { return (i * 31 + c.V - 1) % c.V; });
    positions.fill([](size_t i) { return 2 * i + 1; }); // every second position is masked

    auto each_chunk = [&](bool product) {
        for (int r0 = 0; r0 < c.R; r0 += chunk) {
            int R = min_int(chunk, c.R - r0);
            Store<float> store = {logits.gpu, ld, NULL};
            if (product) matmul_forward(store, hidden.gpu + (size_t)r0 * c.C, wte.gpu, R, c.C, c.V);
            Head h = {losses.gpu + r0, logits.gpu, dlogits.gpu + (size_t)r0 * ld, weights.gpu,
                      targets.gpu, positions.gpu + r0, c.V, ld};
            versions[version - 1].run(h, R);
        }
    };
    each_chunk(true);

    int first = c.R - checked;
    const float *last_hidden = hidden.host + (size_t)first * c.C;
    cpu_matmul_forward(right.host, last_hidden, wte.host, NULL, checked, c.C, c.V);
    cpu_crossentropy(right_losses.host, right.host, weights.host, targets.host,
                     positions.host + first, checked, c.V);
    const float *last_losses = losses.get(first, checked);
    const float *last_dlogits = dlogits.get((size_t)first * ld, (size_t)checked * ld);
    double error = worse(largest_error(last_losses, 1, right_losses.host, checked, 1),
                         largest_error(last_dlogits, ld, right.host, checked, c.V));
    if (seconds) {
        *seconds = best_seconds([&] { each_chunk(true); });
        *rest = best_seconds([&] { each_chunk(false); });
    }
    return error;
}

static void study(int version) {
    // One row; a vocabulary smaller than a warp, odd, larger than a block; chunks of which the last
    // is not full
    static const Case small[] = {
        {"", 1, 8, 2, 1}, {"", 7, 34, 31, 3}, {"", 130, 16, 67, 128}, {"", 5, 24, 1001, 2}};
    // Half of B*T masked; chunks of 2^27 / V rows, in tiles
    static const Case large[] = {{"d6", 2048, 288, 4096, 16384}, {"d12", 8192, 768, 50257, 2560}};
    double error = 0, seconds[2], rest[2];
    for (Case c : small) error = worse(error, error_of(version, c, c.R, NULL, NULL));
    for (int i = 0; ON_GPU && i < 2; i++)
        error = worse(error, error_of(version, large[i], 8, &seconds[i], &rest[i]));
    report(versions[version - 1].name, error, BF16 ? 4e-3 : 5e-6); // in bf16: half a unit of 8 bits
    for (int i = 0; ON_GPU && i < 2; i++) {
        double numbers = (double)large[i].R * large[i].V;
        printf("   %s all %8.3f ms,", large[i].name, 1e3 * seconds[i]);
        print_bytes("without the product", numbers * (sizeof(float) + sizeof(floatX)), rest[i]);
    }
    printf("\n");
}

int main(int argc, char **argv) { return run_versions(argc, argv, VERSIONS, study); }
