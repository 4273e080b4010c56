/*
The head in four steps: hidden states (R,C) of masked rows -> logits (R,V) -> losses (R) and the gradient of sum(weights * losses), dlogits (R,V).

    head [VERSION]     checks all versions, or one, against loopmdm.c; on a GPU it measures them too. How to build it: README.md

The product that makes the logits is that of loopmdm.cu, which matmul.cu is about; here it is what comes after. Hidden states, wte and dlogits
are floatX, as in loopmdm.cu: bf16 when built with -DBF16=1, else float. Logits are float; rows of logits and dlogits are ld apart.

With V = 50257 this is as much memory as anything in the program. Reading the logits once and writing dlogits once cannot be avoided
when the product is a kernel of its own; speeds are given for these bytes, so a version that goes over them more often shows less.
*/
#include "dev/cuda/study.h"

typedef struct { // where all is, on the GPU
    float *losses, *logits;
    floatX *dlogits;
    const float *weights;      // (BT), as targets: looked up at rows (R)
    const int *targets, *rows;
    int V, ld;
} Head;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Softmax, loss and gradient in three kernels
//
// Softmax in the place of the logits, a thread for a row; the loss, a thread for a row; the gradient, a thread for a number.
// Limit: memory, used badly. The softmax goes over a row three times and writes it twice, and its neighbouring lanes are in neighbouring rows, V numbers apart,
// so that each load of a warp touches 32 lines of memory. R threads in all do not fill a GPU. And where p underflows, the loss is infinite.

__global__ void softmax_kernel1(float *logits, int R, int V, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= R) return;
    float *p = logits + (size_t)r * ld, largest = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) largest = fmaxf(largest, p[v]);
    for (int v = 0; v < V; v++) sum += p[v] = expf(p[v] - largest);
    for (int v = 0; v < V; v++) p[v] /= sum;
}

__global__ void loss_kernel1(float *losses, const float *probs, const int *targets, const int *rows, int R, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r < R) losses[r] = -logf(probs[(size_t)r * ld + targets[rows[r]]]);
}

__global__ void gradient_kernel1(floatX *dlogits, const float *probs, const float *weights, const int *targets, const int *rows, int R, int V, int ld) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)R * V) return;
    int r = (int)(n / V), v = (int)(n % V);
    size_t at = (size_t)r * ld + v;
    dlogits[at] = (floatX)((probs[at] - (v == targets[rows[r]])) * weights[rows[r]]);
}

static void head1(Head h, int R) {
    softmax_kernel1<<<blocks(R, THREADS), THREADS>>>(h.logits, R, h.V, h.ld);
    launched("softmax1");
    loss_kernel1<<<blocks(R, THREADS), THREADS>>>(h.losses, h.logits, h.targets, h.rows, R, h.ld);
    launched("loss1");
    gradient_kernel1<<<blocks((size_t)R * h.V, THREADS), THREADS>>>(h.dlogits, h.logits, h.weights, h.targets, h.rows, R, h.V, h.ld);
    launched("gradient1");
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. One kernel, a thread for each row
//
// The largest logit and the sum stay in registers, probabilities are never stored: three sweeps, of which only the last writes. The loss
// is taken in the log domain, log sum exp - logit, and cannot underflow. Limit: as before, strided access by too few threads.

__global__ void head_kernel2(float *losses, floatX *dlogits, const float *logits, const float *weights, const int *targets, const int *rows, int R, int V, int ld) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= R) return;
    const float *l = logits + (size_t)r * ld;
    floatX *d = dlogits + (size_t)r * ld;
    int target = targets[rows[r]];
    float largest = -INFINITY, sum = 0, weight = weights[rows[r]];
    for (int v = 0; v < V; v++) largest = fmaxf(largest, l[v]);
    for (int v = 0; v < V; v++) sum += expf(l[v] - largest);
    losses[r] = largest - l[target] + logf(sum);
    for (int v = 0; v < V; v++) d[v] = (floatX)((expf(l[v] - largest) / sum - (v == target)) * weight);
}

static void head2(Head h, int R) {
    head_kernel2<<<blocks(R, THREADS), THREADS>>>(h.losses, h.dlogits, h.logits, h.weights, h.targets, h.rows, R, h.V, h.ld);
    launched("head2");
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. A block for each row, two sweeps before the gradient
//
// Neighbouring lanes read neighbouring logits, a line of memory for each load of a warp, and there are 256 R threads. Largest and sum are put
// together over the block. Limit: memory again, now at full width; but logits are read three times. A row of 50257 is 0.2 MB, and with 8 blocks
// on each of a hundred SMs neither L1 nor L2 still has it when it is read again.

__global__ void __launch_bounds__(THREADS) head_kernel3(float *losses, floatX *dlogits, const float *logits, const float *weights, const int *targets, const int *rows, int V, int ld) {
    const float *l = logits + (size_t)blockIdx.x * ld;
    floatX *d = dlogits + (size_t)blockIdx.x * ld;
    int target = targets[rows[blockIdx.x]];
    float largest = -INFINITY, sum = 0, weight = weights[rows[blockIdx.x]];
    for (int v = threadIdx.x; v < V; v += THREADS) largest = fmaxf(largest, l[v]);
    largest = block_reduce(largest, 1);
    for (int v = threadIdx.x; v < V; v += THREADS) sum += expf(l[v] - largest);
    sum = block_reduce(sum, 0);
    if (threadIdx.x == 0) losses[blockIdx.x] = largest - l[target] + logf(sum);
    for (int v = threadIdx.x; v < V; v += THREADS) d[v] = (floatX)((expf(l[v] - largest) / sum - (v == target)) * weight);
}

static void head3(Head h, int R) {
    head_kernel3<<<R, THREADS>>>(h.losses, h.dlogits, h.logits, h.weights, h.targets, h.rows, h.V, h.ld);
    launched("head3");
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The kernel of loopmdm.cu
//
// The softmax is taken online, so that one sweep gives largest and sum: logits are read twice, not three times. And the head works on so many
// rows at a time that their logits fit into a buffer of 2^27 numbers, not R V: that costs no time, and the memory does not grow with R.
// Limit: memory, and the two sweeps.

static void head4(Head h, int R) {
    crossentropy_forward_backward(h.losses, h.dlogits, h.logits, h.weights, h.targets, h.rows, R, h.V, h.ld);
}

// ---------------------------------------------------------------------------------------------------------------------
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
enum { VERSIONS = sizeof versions / sizeof *versions };

typedef struct { const char *name; int R, C, V, chunk; } Case; // chunk: so many rows at a time, in version 4

// The largest error of the last rows' losses and gradients; seconds of all, and without the product, unless NULL
static double error_of(int version, Case c, int checked, double *seconds, double *rest) {
    int ld = blocks(c.V, 8) * 8, chunk = version == VERSIONS ? min_int(c.chunk, c.R) : c.R, BT = 2 * c.R + 1;
    Array<floatX> hidden((size_t)c.R * c.C), wte((size_t)c.V * c.C), dlogits((size_t)c.R * ld);
    Array<float> losses(c.R), logits((size_t)chunk * ld), weights(BT), right((size_t)checked * c.V), right_losses(checked);
    Array<int, int> targets(BT), rows(c.R);
    hidden.fill_random(1, 1), wte.fill_random(2, 8 / sqrtf(c.C));
    weights.fill([](size_t i) { return 1 + i % 5; });
    targets.fill([=](size_t i) { return (i * 31 + c.V - 1) % c.V; });
    rows.fill([](size_t i) { return 2 * i + 1; }); // every second position is masked

    auto each_chunk = [&](bool product) {
        for (int r0 = 0; r0 < c.R; r0 += chunk) {
            int R = min_int(chunk, c.R - r0);
            if (product) matmul_forward(Store<float>{logits.gpu, ld, NULL}, hidden.gpu + (size_t)r0 * c.C, wte.gpu, R, c.C, c.V);
            versions[version - 1].run({losses.gpu + r0, logits.gpu, dlogits.gpu + (size_t)r0 * ld, weights.gpu, targets.gpu, rows.gpu + r0, c.V, ld}, R);
        }
    };
    each_chunk(true);
    int first = c.R - checked;
    cpu_matmul_forward(right.host, hidden.host + (size_t)first * c.C, wte.host, NULL, checked, c.C, c.V);
    cpu_crossentropy(right_losses.host, right.host, weights.host, targets.host, rows.host + first, checked, c.V);
    double error = worse(largest_error(losses.get(first, checked), 1, right_losses.host, checked, 1),
                         largest_error(dlogits.get((size_t)first * ld, (size_t)checked * ld), ld, right.host, checked, c.V));
    if (seconds) *seconds = best_seconds([&] { each_chunk(true); }), *rest = best_seconds([&] { each_chunk(false); });
    return error;
}

static void study(int version) {
    // One row; a vocabulary smaller than a warp, odd, larger than a block; chunks of which the last is not full
    static const Case small[] = {{"", 1, 8, 2, 1}, {"", 7, 34, 31, 3}, {"", 130, 16, 67, 128}, {"", 5, 24, 1001, 2}};
    static const Case large[] = {{"d6", 2048, 288, 4096, 16384}, {"d12", 8192, 768, 50257, 2560}}; // half of B*T; 2^27 / V in tiles
    double error = 0, seconds[2], rest[2];
    for (Case c : small) error = worse(error, error_of(version, c, c.R, NULL, NULL));
    if (ON_GPU)
        for (int i = 0; i < 2; i++) error = worse(error, error_of(version, large[i], 8, &seconds[i], &rest[i]));
    report(versions[version - 1].name, error, BF16 ? 4e-3 : 5e-6); // in bf16: half a unit of 8 bits
    if (ON_GPU)
        for (int i = 0; i < 2; i++) {
            printf("   %s all %8.3f ms,", large[i].name, 1e3 * seconds[i]);
            print_bytes("without the product", (double)large[i].R * large[i].V * (sizeof(float) + sizeof(floatX)), rest[i]);
        }
    printf("\n");
}

int main(int argc, char **argv) { return run_versions(argc, argv, VERSIONS, study); }
