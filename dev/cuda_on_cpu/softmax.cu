/*
Softmax of each row of a matrix, one block per row: an example of a kernel that is written and
tested without a GPU and then runs on one. README.md beside this file says more.

On a GPU, from the root of the repository:

    nvcc -O3 -std=c++17 -I. dev/cuda_on_cpu/softmax.cu -o softmax && ./softmax

On the CPU:

    (echo '#line 1 "softmax.cu"'
     sed -E -f dev/cuda_on_cpu/launches.sed dev/cuda_on_cpu/softmax.cu) >softmax.cpp
    g++ -std=c++17 -O2 -fopenmp -I. softmax.cpp -o softmax && ./softmax
*/
#ifndef __CUDACC__
#include "dev/cuda_on_cpu/cuda_on_cpu.h"
#endif
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static void check(cudaError_t e, int line) {
    if (!e) return;
    printf("line %d: %s\n", line, cudaGetErrorString(e));
    exit(1);
}
#define CHECK(call) check(call, __LINE__)

enum { THREADS = 256, WARPS = THREADS / 32 };

struct Max {
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    __device__ static float of(float a, float b) { return a + b; }
};

// All threads of the block call this, and all get the result.
template <class Op> __device__ float reduce(float x, float *of_warp) {
    for (int d = 16; d > 0; d /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffff, x, d));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads(); // all warps have written
    x = of_warp[0];
    for (int w = 1; w < WARPS; w++) x = Op::of(x, of_warp[w]);
    __syncthreads(); // all warps have read: the next call may write
    return x;
}

// Grid: any number of blocks; they share the rows. Block: THREADS threads.
template <class T> __global__ void softmax(T *out, const T *in, int R, int C) { // (R,C)
    __shared__ float of_warp[WARPS];
    for (int row = blockIdx.x; row < R; row += gridDim.x) {
        const T *x = in + (size_t)row * C;
        T *y = out + (size_t)row * C;
        float largest = -INFINITY, sum = 0;
        for (int i = threadIdx.x; i < C; i += THREADS) largest = fmaxf(largest, x[i]);
        largest = reduce<Max>(largest, of_warp);
        for (int i = threadIdx.x; i < C; i += THREADS) sum += expf(x[i] - largest);
        sum = reduce<Sum>(sum, of_warp);
        for (int i = threadIdx.x; i < C; i += THREADS) y[i] = expf(x[i] - largest) / sum;
    }
}

// The largest relative error of y = softmax(x), (C). NaN counts as infinity.
static double row_error(const float *y, const float *x, int C) {
    double largest = -INFINITY, sum = 0, worst = 0;
    for (int i = 0; i < C; i++) largest = fmax(largest, x[i]);
    for (int i = 0; i < C; i++) sum += exp(x[i] - largest);
    for (int i = 0; i < C; i++) {
        double p = exp(x[i] - largest) / sum, error = fabs(y[i] - p) / p;
        worst = isnan(error) ? INFINITY : fmax(worst, error);
    }
    return worst;
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
#ifdef __CUDACC__
    const int R = 8192, C = 16411, blocks = 8 * device.multiProcessorCount;
#else
    const int R = 100, C = 1001, blocks = 8;
#endif
    size_t bytes = (size_t)R * C * sizeof(float);
    float *x = (float *)malloc(bytes), *y = (float *)malloc(bytes), *in, *out;
    for (size_t i = 0; i < (size_t)R * C; i++) x[i] = (float)((i * 2654435761u >> 7) % 10007) / 500;
    CHECK(cudaMalloc(&in, bytes));
    CHECK(cudaMalloc(&out, bytes));
    CHECK(cudaMemcpy(in, x, bytes, cudaMemcpyHostToDevice));

    cudaEvent_t begin, end;
    float ms;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 2; i++) { // the first launch warms up
        CHECK(cudaEventRecord(begin));
        softmax<float><<<blocks, THREADS>>>(out, in, R, C);
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(end));
    }
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    CHECK(cudaMemcpy(y, out, bytes, cudaMemcpyDeviceToHost));

    double worst = 0;
    for (int row = 0; row < R; row += 1 + R / 100) {
        size_t at = (size_t)row * C;
        worst = fmax(worst, row_error(y + at, x + at, C));
    }
    bool ok = worst < 1e-5;
    printf("%s: softmax (%d,%d), largest relative error %.1e, %.3g GB/s: %s\n", device.name, R, C,
           worst, 2e-6 * bytes / ms, ok ? "ok" : "WRONG");
    CHECK(cudaFree(in));
    CHECK(cudaFree(out));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    free(x);
    free(y);
    return !ok;
}
