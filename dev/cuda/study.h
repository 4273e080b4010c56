/*
What the kernel studies share: loopmdm.cu itself, whose kernels are the last version of each; the
CPU's functions (cpu.c), which say what is right; arrays that exist on both sides; checks and times.
README.md says how to build a study and what the numbers mean. BACKEND is loopmdm.cu, or without
nvcc what launches.sed makes of it.
*/
#define main loopmdm_main
#include "../tools.c"
#undef main

// cpu.c: the functions of loopmdm.c by their names there
extern "C" {
void cpu_matmul_forward(float *out, const float *inp, const float *weight, const float *bias, int M,
                        int C, int OC);
void cpu_attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C, int NH);
void cpu_attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse,
                            int B, int T, int C, int NH);
void cpu_crossentropy(float *losses, float *logits, const float *weights, const int *targets,
                      const int *positions, int R, int V);
}

// n numbers, on the GPU as T, here as the float or int they are exactly.
template <class T, class Host = float> struct Array {
    size_t n;
    Host *host;
    T *gpu;

    explicit Array(size_t n) : n(n), host((Host *)allocate(n, sizeof(Host), "a study")) {
        cuda_check(cudaMalloc(&gpu, n * sizeof(T)), "memory for a study");
    }
    ~Array() {
        free(host);
        cudaFree(gpu);
    }
    Array(const Array &) = delete;

    template <class F> void fill(F value) { // value(i) on both sides
        T *rounded = (T *)allocate(n, sizeof(T), "a study");
        for (size_t i = 0; i < n; i++) {
            rounded[i] = (T)value(i);
            host[i] = (Host)rounded[i];
        }
        write_memory(gpu, rounded, n * sizeof(T));
        free(rounded);
    }
    void fill_random(uint64_t stream, float scale) { // between -scale and scale
        fill([=](size_t i) { return scale * (float)(2 * random_uniform(1, stream, 0, i) - 1); });
    }

    // Copies count numbers from the GPU. Returns where the first of them is on the host.
    const Host *get(size_t from, size_t count) {
        T *copy = (T *)allocate(count, sizeof(T), "a study");
        read_memory(copy, gpu + from, count * sizeof(T));
        for (size_t i = 0; i < count; i++) host[from + i] = (Host)copy[i];
        free(copy);
        return host + from;
    }
};

// The larger of two errors. NaN is the worst.
static double worse(double a, double b) { return a >= b || isnan(a) ? a : b; }

// The largest difference of (rows,columns), divided by the largest number that is right. NaN if
// there is one, or if nothing was checked. Rows of `is` are ld apart.
static double largest_error(const float *is, int ld, const float *right, int rows, int columns) {
    double error = 0, largest = 0;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            double r = right[(size_t)i * columns + j];
            error = worse(error, fabs(is[(size_t)i * ld + j] - r));
            largest = fmax(largest, fabs(r));
        }
    return error / largest;
}

static int passed, failed;
static void report(const char *what, double error, double tolerance) {
    int ok = error <= tolerance;
    printf("%s  %-52s error %.1e  tolerance %.0e", ok ? "ok  " : "FAIL", what, error, tolerance);
    passed += ok;
    failed += !ok;
}

// ---- on a GPU: seconds, and what the card can do ----

#ifdef __CUDACC__
enum { ON_GPU = 1 };

template <class F> static double best_seconds(F launch) { // of 5, after one to warm up
    cudaEvent_t begin, end;
    float best = INFINITY, ms;
    cuda_check(cudaEventCreate(&begin), "timing");
    cuda_check(cudaEventCreate(&end), "timing");
    for (int i = 0; i < 6; i++) {
        cuda_check(cudaEventRecord(begin), "timing");
        launch();
        cuda_check(cudaEventRecord(end), "timing");
        cuda_check(cudaEventSynchronize(end), "timing");
        cuda_check(cudaEventElapsedTime(&ms, begin, end), "timing");
        if (i > 0 && ms < best) best = ms;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return best / 1e3;
}

static inline double attribute(cudaDeviceAttr which) {
    int value;
    cuda_check(cudaDeviceGetAttribute(&value, which, 0), "the GPU's properties");
    return value;
}

// FLOP/s: what an SM does in a clock, times SMs and the highest clock. In bf16 tensor cores count,
// with float sums.
static inline double peak_flops() {
    int major = (int)attribute(cudaDevAttrComputeCapabilityMajor);
    int capability = 10 * major + (int)attribute(cudaDevAttrComputeCapabilityMinor);
    double tensor = 512, scalar = capability == 80 ? 128 : 256; // FLOP of an SM in a clock
    if (capability == 80) tensor = 2048;
    if (capability == 90) tensor = 4096;
    if (major == 10) tensor = 8192;
    double clock = attribute(cudaDevAttrClockRate) * 1e3;
    return (BF16 ? tensor : scalar) * attribute(cudaDevAttrMultiProcessorCount) * clock;
}

static inline double peak_bytes() { // of memory, per second: two transfers in a clock
    double clock = attribute(cudaDevAttrMemoryClockRate) * 1e3;
    return 2 * clock * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
}
#else
enum { ON_GPU = 0 };
template <class F> static double best_seconds(F) { return NAN; }
static inline double peak_flops() { return NAN; }
static inline double peak_bytes() { return NAN; }
#endif

static inline void print_flops(const char *shape, double flops, double s) {
    double share = 100 * flops / s / peak_flops();
    printf("   %s %8.3f ms %6.1f TFLOP/s %3.0f %%", shape, 1e3 * s, flops / s / 1e12, share);
}

static inline void print_bytes(const char *shape, double bytes, double s) {
    double share = 100 * bytes / s / peak_bytes();
    printf("   %s %8.3f ms %6.0f GB/s %3.0f %%", shape, 1e3 * s, bytes / s / 1e9, share);
}

// main of every study: runs the version in the argument, or all.
static int run_versions(int argc, char **argv, int versions, void (*study)(int version)) {
    int one = argc == 2 && strlen(argv[1]) == 1 ? atoi(argv[1]) : 0;
    if (argc > 2 || (argc == 2 && (one < 1 || one > versions)))
        die(USAGE, "give no argument, or a version from 1 to %d", versions);
    for (int v = 1; v <= versions; v++)
        if (one == 0 || v == one) study(v);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || fflush(stdout) || ferror(stdout);
}
