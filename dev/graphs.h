/*
A pass through a layer as one launch. block_forward() has 8 kernels, block_backward() 26 to 34.

The kernels of a small model take the GPU less time than their launches take the CPU, so the GPU
would wait. Therefore its training records what a pass launches, as a CUDA graph, and from then on
starts all of it at once. A large model would gain nothing, and its graphs would take memory.

A graph has the arguments of its kernels in it. Here they depend on the pass, its layer, B and T,
and on nothing else, so each combination has a graph of its own. What runs for the first time is not
recorded: CUDA may load its kernels then, which a recording does not allow.

loopmdm.cu includes this file. CUDA cannot record the ordinary default stream, so the build needs
-default-stream=per-thread.
*/
#pragma once
#include <array>
#include <map>

#if defined(__CUDACC__) && !defined(CUDA_API_PER_THREAD_DEFAULT_STREAM)
#error "nvcc needs -default-stream=per-thread, which the Makefile gives"
#endif

struct Graph {
    bool has_run;
    cudaGraphExec_t exec; // NULL until it is recorded
};

struct Graphs {
    std::map<std::array<int, 5>, Graph> all; // by (direction, pass, layer, B, T)
    bool recording = false;

    ~Graphs() {
        for (auto &g : all)
            if (g.second.exec) cuda_check(cudaGraphExecDestroy(g.second.exec), "removing a graph");
    }
};

// For the training of a model whose forward pass through a layer has `flops`, without attention;
// NULL: nothing is recorded.
// 10 GFLOP take an H100 25 us at 400 TFLOP/s, and 8 launches take the CPU about 20. With
// CUDA_LAUNCH_BLOCKING=1 an error is to show at its own launch.
static Graphs *new_graphs(double flops) {
    return flops < 1e10 && !getenv("CUDA_LAUNCH_BLOCKING") ? new Graphs : NULL;
}

enum { FORWARD, BACKWARD };

// A function that launches kernels, and does nothing else, begins with
//     Recording pass(graphs, FORWARD, p, layer, B, T);
//     if (pass.replayed) return;
// To recompute, backward calls forward: it becomes a part of backward's graph.
struct Recording {
    Graphs *graphs;
    Graph *graph = NULL; // what is being recorded
    bool replayed = false;

    Recording(Graphs *graphs, int way, int p, int layer, int B, int T) : graphs(graphs) {
        if (!graphs || graphs->recording || PROFILE) return; // a profile has each kernel's time
        Graph *g = &graphs->all[{way, p, layer, B, T}];
        replayed = g->exec != NULL;
        if (replayed) {
            cuda_check(cudaGraphLaunch(g->exec, cudaStreamPerThread), "a pass");
            return;
        }
        if (!g->has_run) {
            g->has_run = true;
            return;
        }
        graph = g;
        graphs->recording = true;
        cuda_check(cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeThreadLocal),
                   "recording a pass");
    }

    ~Recording() { // the end of that function
        if (!graph) return;
        cudaGraph_t recorded;
        cuda_check(cudaStreamEndCapture(cudaStreamPerThread, &recorded), "recording a pass");
        cuda_check(cudaGraphInstantiateWithFlags(&graph->exec, recorded, 0), "recording a pass");
        cuda_check(cudaGraphDestroy(recorded), "recording a pass");
        graphs->recording = false;
        cuda_check(cudaGraphLaunch(graph->exec, cudaStreamPerThread), "a pass");
    }
};
