/*
A table of kernels and their times, printed when the program ends. For that, build loopmdm.cu with
-DPROFILE=1 (make build/loopmdm_cuda_profile): it then includes this file.

A kernel's time goes from the end of the kernel before it to its own end. So it includes copies
before it, and the time in which the GPU waited for the launch. CUDA_MODULE_LOADING=EAGER in the
environment loads all kernels beforehand: else their first launches do it.
*/
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct KernelTime { long launches; double ms, flops; };

static std::map<std::string, KernelTime> kernel_times;
static std::vector<std::pair<cudaEvent_t, KernelTime *>> timed_launches; // not yet added up
static cudaEvent_t last_event;

static void add_times() {
    for (auto &launch : timed_launches) {
        float ms;
        cuda_check(cudaEventSynchronize(launch.first), "profile");
        cuda_check(cudaEventElapsedTime(&ms, last_event, launch.first), "profile");
        cuda_check(cudaEventDestroy(last_event), "profile");
        last_event = launch.first;
        launch.second->launches++;
        launch.second->ms += ms;
    }
    timed_launches.clear();
}

static void print_times() {
    add_times();
    double sum = 0;
    std::vector<std::pair<std::string, KernelTime>> sorted(kernel_times.begin(),
                                                           kernel_times.end());
    auto slower = [](const auto &a, const auto &b) { return a.second.ms > b.second.ms; };
    std::sort(sorted.begin(), sorted.end(), slower);
    for (auto &k : sorted) sum += k.second.ms;
    printf("\n%-44s launches        ms   share  us each  TFLOP/s\n", "");
    for (auto &k : sorted) {
        KernelTime t = k.second;
        double each = t.ms / t.launches;
        printf("%-44s %8ld %9.2f %5.1f %% %8.1f", k.first.c_str(), t.launches, t.ms,
               100 * t.ms / sum, 1e3 * each);
        if (t.flops > 0) printf(" %8.1f", t.flops / t.ms * 1e-9);
        printf("\n");
    }
}

// Called after each launch; a matrix product (M,K)(K,N) also passes its shape.
static void launched(const char *what, int M = 0, int N = 0, int K = 0) {
    cuda_check(cudaGetLastError(), what);
    if (!last_event) {
        cuda_check(cudaEventCreate(&last_event), "profile");
        cuda_check(cudaEventRecord(last_event), "profile");
        atexit(print_times); // CUDA's own handler was registered earlier, so it runs later
    }
    // A product is known by the shape (OC,C) of its weight: the number of rows may change.
    bool weights = strstr(what, "weight"), inputs = strstr(what, "input");
    char name[80];
    if (M) snprintf(name, sizeof name, "%s (%d,%d)", what, weights ? M : inputs ? K : N,
                    weights || inputs ? N : K);
    else snprintf(name, sizeof name, "%s", what);
    KernelTime *time = &kernel_times[name];
    time->flops += 2.0 * M * N * K;
    cudaEvent_t event;
    cuda_check(cudaEventCreate(&event), "profile");
    cuda_check(cudaEventRecord(event), "profile");
    timed_launches.push_back({event, time});
    if (timed_launches.size() == 4096) add_times();
}
