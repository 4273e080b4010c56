/*
CUDA on the CPU: g++ or clang++ compiles a CUDA file and runs its kernels, to test them where there
is no GPU. README.md beside this file shows how to use it for your own kernels.

    #ifdef __CUDACC__
    #include <cuda_bf16.h> // and the functions of section 4, if the file uses them, with asm
    #else
    #include "dev/cuda_on_cpu/cuda_on_cpu.h"
    #endif

Launches and shared arrays are not C++. The rules for sed in launches.sed turn them into calls.
Lines stay lines, and #line keeps their numbers:

    (echo '#line 1 "file.cu"'; sed -E -f dev/cuda_on_cpu/launches.sed file.cu) >file.cpp
    g++ -std=c++17 -O2 -fopenmp -I. file.cpp -o file
    (with -g -fsanitize=address,undefined it finds wrong indices)

The threads of a block are fibers of one OS thread. Blocks run in parallel with OpenMP. Each thread
runs until it must wait: at a warp collective for its warp, at a barrier for its block. So threads
are as far apart as the barriers allow, and a missing barrier gives a wrong result in one of the
orders below every time, not in one run of a thousand. Environment variables choose:

    CUDA_ON_CPU_ORDER=ascending | descending | random
                              which thread, warp and block goes first. random: another order
                              after each barrier
    CUDA_ON_CPU_SEED=N        another random order. It does not depend on the number of cores
    CUDA_ON_CPU_SKIP=FILE:LINE  the barriers and waits in that line do nothing: do the tests
                              notice? Without FILE: it, in any file
    CUDA_ON_CPU_LIST=FILE     appends file, line and kernel of each barrier and wait that ran, to
                              try SKIP on: __syncthreads, cp_async_wait, mbarrier_wait, wgmma_wait
    CUDA_ON_CPU_PROTECT=1     the program crashes where host code touches device memory
    CUDA_ON_CPU_MEMORY=BYTES, CUDA_ON_CPU_CAPABILITY=70, CUDA_ON_CPU_DEVICES=0 (no GPU) or -1 (old
                              driver): what do the program's error messages say?

It is stricter than a GPU. Device and shared memory hold 0xFF bytes (NaN) until the program writes
them. The targets of cp_async_16, tma_load and bulk_load do so from the call to the wait, and the
sums of wgmma too. What they read they read as late as a GPU may. One line with kernel, block,
thread and line ends the program when
  - lanes of a warp wait for different things,
  - threads of a block wait at different __syncthreads,
  - an address of ldmatrix, cp_async_16, tma_load, bulk_load or bulk_prefetch is not aligned (for
    float4: -fsanitize=undefined),
  - all wait at mbarriers and nothing is on its way to them, or a block ends before what is on its
    way has arrived,
  - the arguments of a launch or a copy are not device memory,
  - a graph records a kernel that has not run before: a GPU may have to load it then.

Limits:
  - A warp collective is for all lanes that have not exited, with width 32. Masks for a part of a
    warp do not work. Two calls of the same collective in different branches meet.
  - Arithmetic on __nv_bfloat16 is float. A GPU rounds each result.
  - Static shared memory does not count for the limit of a block.
  - A thread must not spin until another thread writes.
  - There are no clusters. wgmma_fence, mbarrier_init_done and the number of registers have no
    effect: a missing one does not show.
  - Pointers inside structures are not checked. Host code may use a variable with __device__ or
    __constant__ by its name, and a kernel may write one with __constant__: only nvcc warns.
  - Launches and copies are done when they return. A missing cudaDeviceSynchronize, or a missing
    wait for another stream, does not show.
  - Graphs record launches only, but those of all streams.
  - The template arguments of a kernel are written out, without < or > in them. A launch stands in
    one line up to its (. For one in a macro, errors name the kernel as the macro does.
  - A shared array is declared by itself in a line. Others work too, but start as zeros, and
    AddressSanitizer does not see them.
  - The local variables of a thread fit in 64 KiB.
  - There is no __half, no __managed__, and of CUDA's libraries and calls only what stands here.
*/
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// Fibers switch with a few lines of assembly on x86-64 and AArch64, with ucontext.h on others.
// -DCUDA_ON_CPU_UCONTEXT=1 takes ucontext.h everywhere.
#if !defined(CUDA_ON_CPU_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CUDA_ON_CPU_UCONTEXT 1
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1 // GCC's name for it
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
enum { CUDA_ON_CPU_ASAN = 1, CUDA_ON_CPU_STACK = 256 << 10 };
#else
#define __asan_poison_memory_region(address, bytes)
#define __asan_unpoison_memory_region(address, bytes)
#define __sanitizer_start_switch_fiber(mine, stack, bytes)
#define __sanitizer_finish_switch_fiber(mine, stack, bytes)
// Not a power of two: with one, the tops of all stacks would compete for the same cache lines.
enum { CUDA_ON_CPU_ASAN = 0, CUDA_ON_CPU_STACK = (64 << 10) + 320 };
#endif

namespace cuda_on_cpu {
namespace cuda {} // CUDA's own names. They see all of cuda_on_cpu; programs see only them
}
using namespace cuda_on_cpu::cuda;

// =================================================================================================
// 1. The language: keywords, types, functions of numbers

#define __global__
#define __device__
#define __constant__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// For declarations that launches.sed does not change. A block runs on one OS thread.
#define __shared__ static thread_local

// Macros, because C libraries use some of these names.
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __fdividef(x, y) ((x) / (y))
#define __fmaf_rn(x, y, z) fmaf(x, y, z)

namespace cuda_on_cpu {
template <class To, class From> To bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Blocks run on several OS threads, so *p = f(*p) must be atomic. Returns the old value.
template <class T, class F> T atomically(T *p, F f) {
    T old, value;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do {
        value = f(old);
    } while (!__atomic_compare_exchange(p, &old, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// A parameter of this type takes what converts to T. The other parameters determine T.
template <class T> using Given = std::enable_if_t<true, T>;
} // namespace cuda_on_cpu

namespace cuda_on_cpu::cuda {
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// As on a GPU, three numbers are aligned like one, and no vector to more than 16 bytes.
#define VECTORS(T, name) \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(signed char, char) VECTORS(unsigned char, uchar)
VECTORS(short, short) VECTORS(unsigned short, ushort)
VECTORS(int, int) VECTORS(unsigned, uint)
VECTORS(long long, longlong) VECTORS(unsigned long long, ulonglong)
VECTORS(float, float) VECTORS(double, double)
#undef VECTORS

inline dim3 gridDim, blockDim;
inline thread_local uint3 blockIdx, threadIdx;
inline constexpr int warpSize = 32;

inline unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits<float>(x); }
inline int __float_as_int(float x) { return bits<int>(x); }
inline float __int_as_float(int x) { return bits<float>(x); }

struct __nv_bfloat16 {
    uint16_t raw;
    __nv_bfloat16() = default;

    // To nearest, ties to even. A carry out of the fraction increases the exponent.
    __nv_bfloat16(float x) {
        unsigned u = __float_as_uint(x);
        raw = (uint16_t)(x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return __uint_as_float((unsigned)raw << 16); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }

// The other number if one is NaN, as fminf and fmaxf do
#define MIN_MAX(T) \
    inline T min(T a, T b) { return b < a || a != a ? b : a; } \
    inline T max(T a, T b) { return a < b || a != a ? b : a; }
MIN_MAX(int)
MIN_MAX(long)
MIN_MAX(long long)
MIN_MAX(unsigned)
MIN_MAX(unsigned long)
MIN_MAX(unsigned long long)
MIN_MAX(float)
MIN_MAX(double)
#undef MIN_MAX

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, Given<T> x) { *p = x; }

#define ATOMIC(name, value) \
    template <class T> T name(T *p, Given<T> x) { \
        return atomically(p, [=](T old) { return value; }); \
    }
ATOMIC(atomicAdd, old + x) ATOMIC(atomicSub, old - x)
ATOMIC(atomicMax, max(old, x)) ATOMIC(atomicMin, min(old, x))
ATOMIC(atomicAnd, old & x) ATOMIC(atomicOr, old | x) ATOMIC(atomicXor, old ^ x)
ATOMIC(atomicInc, old < x ? old + 1 : 0)
ATOMIC(atomicDec, old && old <= x ? old - 1 : x)
#undef ATOMIC
template <class T> T atomicExch(T *p, Given<T> x) {
    return atomically(p, [=](T) { return x; });
}
template <class T> T atomicCAS(T *p, Given<T> is, Given<T> x) {
    return atomically(p, [=](T old) { return old == is ? x : old; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
} // namespace cuda_on_cpu::cuda

namespace cuda_on_cpu {

// =================================================================================================
// 2. Settings, errors, fibers

void print_place(int line);

// Prints one line and ends the program. It calls no destructors, because other OS threads still
// run. Only the first thread that fails prints. line 0: not in a kernel.
__attribute__((format(printf, 2, 3), noreturn)) inline void die(int line, const char *format, ...) {
    static std::mutex first;
    first.lock();
    fflush(stdout);
    fputs("cuda_on_cpu: ", stderr);
    if (line) print_place(line);

    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    _exit(1);
}

inline long number(const char *name, long otherwise) {
    char *text = getenv(name), *end;
    if (!text) return otherwise;
    long value = strtol(text, &end, 10);
    if (end == text || *end) die(0, "%s=%s: a whole number is needed", name, text);
    return value;
}

inline const struct Settings {
    std::string order = getenv("CUDA_ON_CPU_ORDER") ? getenv("CUDA_ON_CPU_ORDER") : "ascending";
    bool random = order == "random", descending = order == "descending";
    uint64_t seed = number("CUDA_ON_CPU_SEED", 0);
    std::string skip = getenv("CUDA_ON_CPU_SKIP") ? getenv("CUDA_ON_CPU_SKIP") : "";
    const char *list = getenv("CUDA_ON_CPU_LIST");
    bool protect = number("CUDA_ON_CPU_PROTECT", 0);
    size_t memory = number("CUDA_ON_CPU_MEMORY", 8L << 30);
    int capability = number("CUDA_ON_CPU_CAPABILITY", 80);
    int devices = number("CUDA_ON_CPU_DEVICES", 1);

    Settings() {
        if (!random && !descending && order != "ascending")
            die(0, "CUDA_ON_CPU_ORDER=%s: choose ascending, descending or random", order.c_str());
    }
} settings;

// Zeros. The system gives real memory only to pages that the program touches.
inline void *map(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die(0, "no memory: mmap of %zu bytes failed", bytes);
    return p;
}

// A fiber has its own stack. A switch to another fiber pushes the registers that a function must
// preserve, exchanges the stack pointers, and pops. To the caller it is an ordinary function call,
// which returns when another fiber switches back.
#ifdef CUDA_ON_CPU_UCONTEXT
typedef ucontext_t Context;
inline void exchange(Context *from, Context *to) { swapcontext(from, to); }
inline void prepare(Context *c, void *stack, size_t size, void (*entry)()) {
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = size;
    makecontext(c, entry, 0);
}
#else
typedef void **Context; // the top of the stack of a fiber that waits
void exchange(Context *from, const Context *to) asm("cuda_on_cpu_exchange");
// FRAME: words that a switch leaves on the stack. RETURN: which of them is the return address
#ifdef __x86_64__
enum { FRAME = 8, RETURN = 6 };
asm(".text\n .p2align 4\n cuda_on_cpu_exchange:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
#else
enum { FRAME = 20, RETURN = 11 };
#define ALL_TWENTY(op) \
    #op " x19, x20, [sp]\n" #op " x21, x22, [sp, #16]\n" #op " x23, x24, [sp, #32]\n" \
    #op " x25, x26, [sp, #48]\n" #op " x27, x28, [sp, #64]\n" #op " x29, x30, [sp, #80]\n" \
    #op " d8, d9, [sp, #96]\n" #op " d10, d11, [sp, #112]\n" #op " d12, d13, [sp, #128]\n" \
    #op " d14, d15, [sp, #144]\n"
asm(".text\n .p2align 4\n cuda_on_cpu_exchange:\n"
    "sub sp, sp, #160\n" ALL_TWENTY(stp) "mov x2, sp\n str x2, [x0]\n"
    "ldr x2, [x1]\n mov sp, x2\n" ALL_TWENTY(ldp) "add sp, sp, #160\n ret\n");
#undef ALL_TWENTY
#endif
// A new fiber looks as if it had switched away at the start of entry.
inline void prepare(Context *c, void *stack, size_t size, void (*entry)()) {
    *c = (Context)((char *)stack + size) - FRAME;
    (*c)[RETURN] = (void *)entry;
}
#endif

struct Fiber {
    Context context;
    const void *stack; // this and the next two: for AddressSanitizer
    size_t size;
    void *fake_stack;
};

// =================================================================================================
// 3. The threads of a block, barriers, warp collectives

enum { WARP = 32, MAX_WARPS = 32, MAX_THREADS = 1024, MAX_COPIES = 64 };
// Of wgmma: a lane's floats, products and results on their way
enum { MAX_SUMS = 128, MAX_PRODUCTS = 64, MAX_RESULTS = 8 };

struct Thread {
    Fiber *fiber; // NULL until the thread starts
    uint3 index;
    unsigned copies_begun, copies_done, groups; // of cp_async_16
};

// What an mbarrier holds. Its phase ends when neither threads nor bytes are missing.
struct Mbarrier {
    uint32_t phase : 1, threads : 15, missing : 16;
    int32_t missing_bytes;
};

// A result of wgmma while products for it are on their way: where the lanes have it, and what it
// really is, since the lanes' copies are spoilt
struct Result {
    float *at[WARP];
    int products;
    float sums[WARP][MAX_SUMS];
};

// A product on its way. A is in the lanes' registers, or has a descriptor as B has.
struct Product {
    int result, columns;
    uint64_t a, b;
    uint32_t registers[WARP][4];
    bool in_registers, trans_a, trans_b, add;
    unsigned group;
};

// A round of a warp: each lane in turn runs until it waits or exits. After that all lanes that wait
// must wait for the same thing.
struct Warp {
    Thread *threads;
    int lanes, turn;
    uint8_t order[WARP];
    uint32_t live;          // lanes that have not exited
    const char *what;       // what the lanes wait for that had their turn, and in which line
    int line;
    bool block;             // they wait for a barrier of the block
    const uint64_t *mbarrier; // or until the phase of this parity of an mbarrier has ended
    int parity;
    void (*action)(Warp &); // what happens when all lanes have arrived
    void *arguments[WARP][3]; // and what each lane gave it
    uint32_t took_part;     // lanes at the last collective
    uint32_t votes, ballot; // votes for the next collective, votes of the last one
    uint64_t slots[2][WARP]; // for shuffles: lanes may write for the next one while others still
    uint64_t *next_slots;    // read those of the last one
    Product products[MAX_PRODUCTS]; // of wgmma, in order
    Result results[MAX_RESULTS];
    unsigned num_products, groups;
};

struct Copy {
    void *shared;
    const void *global;
    int bytes;
    unsigned group;
};

namespace cuda {
struct CUtensorMap { // of a matrix of bf16
    const char *data;
    int64_t rows, columns, ld; // ld in bytes
    int box_rows;              // of boxes (box_rows,64)
};
} // namespace cuda

// What TMA has been asked for: a box, or if bytes is not 0 so many of them from the map's data on
struct Load {
    char *to;
    CUtensorMap map;
    int column, row, bytes;
    uint64_t *mbarrier;
    int line; // of the request
};
inline thread_local std::vector<Load> loads; // of the block that runs
void finish_load(size_t which);

// What an OS thread needs to run blocks
struct Core {
    Fiber host, fibers[MAX_THREADS];
    Fiber *spare[MAX_THREADS]; // fibers without a thread to run
    Fiber *from, *fiber;       // the last one that ran, and the one that runs
    int num_fibers, num_spare;
    Thread threads[MAX_THREADS], *thread;
    Warp warps[MAX_WARPS], *warp;
    uint8_t ready[MAX_WARPS]; // the warps that do not wait for the block's barrier
    int num_warps, num_ready, chosen;
    uint8_t parked[MAX_WARPS]; // the warps that wait at an mbarrier
    int num_parked;
    const char *barrier; // the barrier that threads wait at, its line, the first thread that came
    int line, first;
    int votes, count; // of __syncthreads_count and the like: so far, and at the last barrier
    uint64_t random, blocks_begun;
    void *shared;
    Copy copies[MAX_THREADS][MAX_COPIES];
    alignas(16) char stacks[MAX_THREADS][CUDA_ON_CPU_STACK];
};
inline thread_local Core *core;

// The kernel that runs
inline struct Running {
    const char *name;
    void (*call)(void *closure); // runs one thread
    void *closure;
    size_t shared;
} running;

inline int thread_number() { return core->thread - core->threads; }
inline int lane() { return thread_number() % WARP; }

inline void print_place(int line) {
    fprintf(stderr, "kernel %s, block (%u,%u,%u), thread %d (lane %d of warp %d), line %d: ",
            running.name, blockIdx.x, blockIdx.y, blockIdx.z, thread_number(), lane(),
            thread_number() / WARP, line);
}

inline unsigned random_below(unsigned n, uint64_t *state) { // splitmix64
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return (z >> 33) % n;
}

// order = 0, 1, .. n-1 in the order that the settings ask for
template <class T> void permute(T *order, unsigned n, uint64_t *random) {
    for (unsigned i = 0; i < n; i++) order[i] = settings.descending ? n - 1 - i : i;
    if (!settings.random) return;
    for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[random_below(i, random)]);
}

inline void begin_round(Warp &w) {
    w.turn = -1;
    w.what = nullptr;
    w.block = false;
    w.mbarrier = nullptr;
    if (settings.random) permute(w.order, w.lanes, &core->random);
}

inline void end_collective(Warp &w) {
    w.took_part = w.live;
    w.ballot = w.votes;
    w.votes = 0;
    w.next_slots = w.slots[w.next_slots == w.slots[0]];
    if (!w.action) return;
    if (w.live != ~0u) die(w.line, "%s needs all 32 lanes of the warp", w.what);
    w.action(w);
}

// The barriers and waits that ran, for CUDA_ON_CPU_LIST. The destructor writes them at the end.
inline struct List {
    std::mutex mutex;
    std::set<std::string> lines; // FILE:LINE kernel
    std::atomic<bool> skipped{false};

    ~List() {
        if (!settings.skip.empty() && !skipped)
            fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_SKIP=%s: no barrier or wait in that line was "
                            "reached\n", settings.skip.c_str());
        if (!settings.list) return;
        FILE *f = fopen(settings.list, "a");
        if (!f) {
            fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_LIST: cannot write %s\n", settings.list);
            return;
        }
        for (auto &line : lines) fprintf(f, "%s\n", line.c_str());
        fclose(f);
    }
} list;

inline bool skips(const char *file, int line) {
    if (settings.skip.empty() && !settings.list) return false;
    std::string number = std::to_string(line), place = file + (":" + number);
    if (settings.list) {
        std::lock_guard<std::mutex> lock(list.mutex);
        list.lines.insert(place + " " + running.name);
    }
    bool skip = settings.skip == number || settings.skip == place;
    if (skip) list.skipped = true;
    return skip;
}

// All threads that have not exited wait at the barrier, or for the block to begin. Makes their
// warps ready. Returns whether there are any.
inline bool end_barrier() {
    core->barrier = nullptr;
    core->count = core->votes;
    core->votes = 0;

    uint8_t order[MAX_WARPS];
    permute(order, core->num_warps, &core->random);
    for (int i = 0; i < core->num_warps; i++) {
        if (!core->warps[order[i]].live) continue;
        begin_round(core->warps[order[i]]);
        core->ready[core->num_ready++] = order[i];
    }
    return core->num_ready > 0;
}

inline void choose_warp() {
    core->chosen = settings.random ? random_below(core->num_ready, &core->random) : 0;
    core->warp = &core->warps[core->ready[core->chosen]];
}

inline bool phase_ended(const Warp &w) {
    return (int)((const Mbarrier *)w.mbarrier)->phase != w.parity;
}

// Warps whose phase of an mbarrier has ended become ready. If no warp is ready, what TMA was asked
// for arrives until one is: as late as a GPU may do it. In random order some of it comes earlier.
inline void unpark() {
    bool load = settings.random && !loads.empty() && !random_below(4, &core->random);
    for (;; load = true) {
        if (load && loads.empty())
            die(core->warps[core->parked[0]].line,
                "a deadlock: all wait, and nothing is on its way to this mbarrier");
        size_t last = loads.size() - 1;
        if (load) finish_load(settings.random ? random_below(last + 1, &core->random)
                                              : settings.descending ? last : 0);
        for (int i = core->num_parked - 1; i >= 0; i--) {
            if (!phase_ended(core->warps[core->parked[i]])) continue;
            core->ready[core->num_ready++] = core->parked[i];
            core->num_parked--;
            memmove(core->parked + i, core->parked + i + 1, core->num_parked - i);
        }
        if (core->num_ready || !core->num_parked) return;
    }
}

// The thread to run next, or NULL at the end of the block. A warp goes on from collective to
// collective until all its lanes wait at a barrier or have exited. Then another warp has its turn.
// In random order another warp may come at any collective.
inline Thread *next_thread() {
    for (;;) {
        Warp &w = *core->warp;
        while (++w.turn < w.lanes)
            if (w.live >> w.order[w.turn] & 1) return &w.threads[w.order[w.turn]];

        if (w.live && !w.block && (!w.mbarrier || phase_ended(w))) {
            end_collective(w);
            begin_round(w);
            if (!settings.random) continue;
        } else {
            // The warp is done up to the barrier: take it out of the list.
            uint8_t *place = core->ready + core->chosen;
            core->num_ready--;
            memmove(place, place + 1, core->num_ready - core->chosen);
            if (w.live && w.mbarrier) core->parked[core->num_parked++] = &w - core->warps;
        }
        unpark();
        if (!core->num_ready && !end_barrier()) return nullptr;
        choose_warp();
    }
}

inline void switch_fiber(Fiber *to) {
    Fiber *from = core->from = core->fiber;
    core->fiber = to;
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->size);
    exchange(&from->context, &to->context);
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

void run_threads();

// Runs the next thread. Returns when it is the caller's turn again, and never for a thread that has
// exited.
inline void run_next() {
    Thread *t = next_thread();
    if (!t) return switch_fiber(&core->host);
    core->thread = t;
    threadIdx = t->index;

    if (!t->fiber && !core->num_spare) { // a new fiber
        char *stack = core->stacks[core->num_fibers];
        Fiber *f = &core->fibers[core->num_fibers++];
        core->spare[core->num_spare++] = f;
        f->stack = stack;
        f->size = CUDA_ON_CPU_STACK;
        prepare(&f->context, stack, CUDA_ON_CPU_STACK, run_threads);
    }
    if (!t->fiber) t->fiber = core->spare[--core->num_spare];
    if (t->fiber != core->fiber) switch_fiber(t->fiber);
}

// What a fiber does: runs a thread to its end, then becomes spare. A thread that starts takes the
// fiber that became spare last, which is this one. So threads that never wait need no switch.
inline void run_threads() {
    // This tells AddressSanitizer where the host's stack is.
    __sanitizer_finish_switch_fiber(nullptr, &core->from->stack, &core->from->size);
    for (;;) {
        running.call(running.closure);
        core->warp->live &= ~(1u << lane());
        core->spare[core->num_spare++] = core->fiber;
        run_next();
    }
}

// The calling thread waits until all threads of the warp (or the block) have come here. Meanwhile
// the others run.
inline void wait(const char *what, int line, bool block, void (*action)(Warp &)) {
    Warp &w = *core->warp;
    if (!w.what) {
        w.what = what;
        w.line = line;
        w.block = block;
        w.action = action;
    } else if (w.what != what && strcmp(w.what, what)) {
        die(line, "waits at %s while other lanes of its warp wait at %s in line %d", what, w.what,
            w.line);
    }
    run_next();
}

inline void collective(const char *what, unsigned mask, int line,
                       void (*action)(Warp &) = nullptr) {
    wait(what, line, false, action);
    if (core->warp->took_part & ~mask)
        die(line, "%s with mask %08x leaves out lanes that have not exited: not supported", what,
            mask);
}

inline unsigned vote(const char *what, unsigned mask, bool yes, int line) {
    core->warp->votes |= (unsigned)yes << lane();
    collective(what, mask, line);
    return core->warp->ballot;
}

template <class T>
T shuffle(const char *what, unsigned mask, T x, int source, int width, int line) {
    static_assert(std::is_arithmetic<T>::value, "shuffles are for numbers");
    if (width != WARP) die(line, "%s with width %d: only 32 is supported", what, width);
    Warp &w = *core->warp;
    uint64_t *slots = w.next_slots;
    memcpy(&slots[lane()], &x, sizeof x);
    collective(what, mask, line);

    if (source < 0 || source >= WARP) return x;
    if (!(w.took_part >> source & 1)) slots[source] = ~0ull; // a lane that has exited: undefined
    memcpy(&x, &slots[source], sizeof x);
    return x;
}

// Returns how many threads said yes.
inline int barrier(const char *what, bool yes, int line, const char *file) {
    if (skips(file, line)) return yes;
    if (!core->barrier) {
        core->barrier = what;
        core->line = line;
        core->first = thread_number();
    } else if (core->line != line) {
        die(line, "waits at %s while thread %d waits at %s in line %d", what, core->first,
            core->barrier, core->line);
    }
    core->votes += yes;
    wait(what, line, true, nullptr);
    return core->count;
}

inline void *dynamic_shared() { return core->shared; }

// Each declaration has its own lambda as Declaration, so its own function and its own array in each
// OS thread. A new block finds 0xFF bytes.
template <class T, class Declaration> T &static_shared(Declaration) {
    static thread_local void *array = malloc(sizeof(T));
    static thread_local uint64_t block;
    if (block != core->blocks_begun) memset(array, 0xFF, sizeof(T));
    block = core->blocks_begun;
    return *(T *)array;
}

inline void run_block(uint64_t block) {
    blockIdx.x = block % gridDim.x;
    blockIdx.y = block / gridDim.x % gridDim.y;
    blockIdx.z = block / gridDim.x / gridDim.y;
    int threads = blockDim.x * blockDim.y * blockDim.z;
    core->blocks_begun++;
    core->random = (settings.seed << 40) + block;
    for (int i = 0; i < threads; i++) core->threads[i] = {nullptr, core->threads[i].index, 0, 0, 0};

    core->num_warps = (threads + WARP - 1) / WARP;
    for (int i = 0; i < core->num_warps; i++) {
        Warp &w = core->warps[i];
        w.threads = core->threads + i * WARP;
        w.lanes = min(threads - i * WARP, (int)WARP);
        w.live = ~0u >> (WARP - w.lanes);
        w.votes = 0;
        w.next_slots = w.slots[0];
        w.num_products = w.groups = 0;
        for (Result &r : w.results) r.products = 0;
        permute(w.order, w.lanes, &core->random);
    }
    memset(core->shared, 0xFF, running.shared);
    end_barrier();
    choose_warp();
    core->fiber = &core->host;
    run_next(); // returns at the end of the block

    if (!loads.empty()) die(0, "kernel %s: a block ended before its tma_load", running.name);
    for (int i = 0; i < core->num_warps; i++)
        if (core->warps[i].num_products)
            die(0, "kernel %s: a warp ended before its wgmma", running.name);
}

inline void run_grid() {
    std::vector<uint64_t> order((uint64_t)gridDim.x * gridDim.y * gridDim.z);
    uint64_t random = settings.seed;
    permute(order.data(), order.size(), &random);
#ifdef _OPENMP
#pragma omp parallel if (order.size() > 1)
#endif
    {
        if (!core) core = (Core *)map(sizeof(Core));
        for (unsigned i = 0; i < blockDim.x * blockDim.y * blockDim.z; i++) {
            unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y;
            core->threads[i].index = {x, y, i / blockDim.x / blockDim.y};
        }
        // Exactly this size, for AddressSanitizer; and aligned, for TMA
        if (posix_memalign(&core->shared, 1024, running.shared)) die(0, "no shared memory");
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (uint64_t i = 0; i < order.size(); i++) run_block(order[i]);
        free(core->shared);
    }
}

namespace cuda {
// As a default argument, __builtin_LINE() is the line of the call.
#define LINE int line = __builtin_LINE()
#define PLACE LINE, const char *file = __builtin_FILE()
inline void __syncthreads(PLACE) { barrier("__syncthreads", false, line, file); }
inline int __syncthreads_count(int p, PLACE) {
    return barrier("__syncthreads_count", p, line, file);
}
inline int __syncthreads_or(int p, PLACE) {
    return barrier("__syncthreads_or", p, line, file) > 0;
}
inline int __syncthreads_and(int p, PLACE) {
    if (skips(file, line)) return p != 0;
    return barrier("__syncthreads_and", !p, line, file) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, LINE) { collective("__syncwarp", mask, line); }
inline unsigned __ballot_sync(unsigned mask, int p, LINE) {
    return vote("__ballot_sync", mask, p, line);
}
inline int __any_sync(unsigned mask, int p, LINE) { return vote("__any_sync", mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, LINE) {
    return vote("__all_sync", mask, !p, line) == 0;
}
template <class T> T __shfl_sync(unsigned mask, T x, int source, int width = 32, LINE) {
    return shuffle("__shfl_sync", mask, x, source & 31, width, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, LINE) {
    return shuffle("__shfl_xor_sync", mask, x, lane() ^ bits, width, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, LINE) {
    return shuffle("__shfl_up_sync", mask, x, lane() - (int)delta, width, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, LINE) {
    return shuffle("__shfl_down_sync", mask, x, lane() + (int)delta, width, line);
}
} // namespace cuda

// =================================================================================================
// 4. PTX instructions for which CUDA C++ has no functions. For the GPU, a program writes these
//    functions itself, with asm

inline void with(void *x, const void *y, const void *z, const char *what, int line,
                 void (*action)(Warp &)) {
    void **arguments = core->warp->arguments[lane()];
    arguments[0] = x;
    arguments[1] = (void *)y;
    arguments[2] = (void *)z;
    collective(what, ~0u, line, action);
}

inline void must_be_aligned(const char *what, const void *p, int line) {
    if ((uintptr_t)p % 16) die(line, "%s: %p is not a multiple of 16", what, p);
}

// The fragments of mma.m16n8k16 in lane 4g + q:
//   pair a[r] is row g + 8 (r % 2), columns 2q + 8 (r / 2) and the next, of A (16,16)
//   pair b[r] is rows 2q + 8r and the next, column g, of B (16,8)
//   d[2r], d[2r + 1] is row g + 8r, columns 2q and 2q + 1, of D (16,8): see lane_result()
inline float2 pair(const uint32_t *f, int r) {
    return {__uint_as_float(f[r] << 16), __uint_as_float(f[r] & 0xFFFF0000)};
}
inline float2 pair(const float *f, int r) { return {f[2 * r], f[2 * r + 1]}; }
inline void put(float *to, float2 x) {
    to[0] = x.x;
    to[1] = x.y;
}

inline float lane_result(const float d[16][8], int lane, int r) {
    return d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

// d (16,8) = A (16,16) B (16,8); rows of B are ld apart. Four rows at a time: their sums do not
// wait for each other. No sanitizer looks at it: its arrays are the emulation's own.
__attribute__((no_sanitize("address", "undefined")))
inline void product(float d[16][8], const float a[16][16], const float *b, int ld) {
#ifdef __AVX__
    typedef float Floats __attribute__((vector_size(32), may_alias));
#else
    typedef float Floats __attribute__((vector_size(16), may_alias));
#endif
    for (int i = 0; i < 16; i += 4) {
        for (size_t j = 0; j < 8; j += sizeof(Floats) / sizeof(float)) {
            Floats sum[4] = {};
            for (int k = 0; k < 16; k++) {
                Floats row = *(const Floats *)(b + k * ld + j);
                for (int r = 0; r < 4; r++) sum[r] += a[i + r][k] * row;
            }
            for (int r = 0; r < 4; r++) *(Floats *)&d[i + r][j] = sum[r];
        }
    }
}

template <class T> void multiply(Warp &w) { // D += A B
    alignas(32) float a[16][16];
    alignas(32) float b[16][8];
    alignas(32) float d[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        int g = lane / 4, q = lane % 4;
        const T *from_a = (const T *)w.arguments[lane][1];
        const T *from_b = (const T *)w.arguments[lane][2];
        for (int r = 0; r < 4; r++) put(&a[g + 8 * (r % 2)][2 * q + 8 * (r / 2)], pair(from_a, r));
        for (int r = 0; r < 2; r++) {
            float2 rows = pair(from_b, r);
            b[2 * q + 8 * r][g] = rows.x;
            b[2 * q + 8 * r + 1][g] = rows.y;
        }
    }
    product(d, a, b[0], 8);
    for (int lane = 0; lane < WARP; lane++) {
        float *to = (float *)w.arguments[lane][0];
        for (int r = 0; r < 4; r++) to[r] += lane_result(d, lane, r);
    }
}

// Lane i has given the address of row i % 8 of matrix i / 8. It receives two of the 8 x 8 numbers
// of 16 bits of each matrix.
template <bool TRANS> void load_matrices(Warp &w) {
    for (int lane = 0; lane < WARP; lane++) {
        int g = lane / 4, q = lane % 4;
        uint16_t *to = (uint16_t *)w.arguments[lane][0];
        for (int j = 0; j < 4; j++) {
            auto row = [&](int i) { return (const uint16_t *)w.arguments[8 * j + i][1]; };
            to[2 * j] = TRANS ? row(2 * q)[g] : row(g)[2 * q];
            to[2 * j + 1] = TRANS ? row(2 * q + 1)[g] : row(g)[2 * q + 1];
        }
    }
}

namespace cuda {
inline void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2], LINE) { // d += a b
    with(d, a, b, "mma_16x8x16 (bf16)", line, multiply<uint32_t>);
}
#ifndef CUDA_ON_CPU_NO_MMA_FP32
// The same in fp32, with a[2r] and a[2r + 1] in the place of pair a[r]. A GPU has no such
// instruction; there it is made of shuffles.
inline void mma_16x8x16(float d[4], const float a[8], const float b[4], LINE) {
    with(d, a, b, "mma_16x8x16 (fp32)", line, multiply<float>);
}
#endif
inline float exp2_approx(float x) { return exp2f(x); }
inline void ldmatrix_x4(uint32_t r[4], const void *row, LINE) {
    must_be_aligned("ldmatrix_x4", row, line);
    with(r, row, nullptr, "ldmatrix_x4", line, load_matrices<false>);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void *row, LINE) {
    must_be_aligned("ldmatrix_x4_trans", row, line);
    with(r, row, nullptr, "ldmatrix_x4_trans", line, load_matrices<true>);
}

// Copies `bytes` from global to shared memory, and zeros up to 16. The GPU does it some time before
// the wait. This does it at the wait, so that a missing wait shows. It spoils the target at once,
// so that it shows if a thread has yet to read what was there.
inline void cp_async_16(void *shared, const void *global, int bytes, LINE) {
    Thread &t = *core->thread;
    must_be_aligned("cp_async_16 to shared memory", shared, line);
    must_be_aligned("cp_async_16 from global memory", global, line);
    if (bytes < 0 || bytes > 16) die(line, "cp_async_16 of %d bytes", bytes);
    if (t.copies_begun - t.copies_done == MAX_COPIES)
        die(line, "more than %d cp_async_16 without a wait", MAX_COPIES);
    memset(shared, 0xFF, 16);
    Copy &c = core->copies[thread_number()][t.copies_begun++ % MAX_COPIES];
    c = {shared, global, bytes, t.groups};
}
inline void cp_async_commit() { core->thread->groups++; }
template <int N> void cp_async_wait(PLACE) { // until all groups except the N newest are done
    Thread &t = *core->thread;
    if (skips(file, line)) return;
    for (; t.copies_done < t.copies_begun; t.copies_done++) {
        Copy &c = core->copies[thread_number()][t.copies_done % MAX_COPIES];
        if (c.group + N >= t.groups) break;
        if (c.bytes) memcpy(c.shared, c.global, c.bytes);
        memset((char *)c.shared + c.bytes, 0, 16 - c.bytes);
    }
}
} // namespace cuda

// ---- Hopper (compute capability 9.0): mbarriers, TMA, wgmma ----

inline void end_phase_if_complete(Mbarrier *m) {
    if (m->missing || m->missing_bytes) return;
    m->phase ^= 1;
    m->missing = m->threads;
}

// Where TMA and wgmma find byte n of shared memory, counted from its begin: the chunks of 16 bytes
// of a row of 128 are exchanged, in another way in each of 8 rows.
inline char *exchanged(uint32_t n) { return (char *)core->shared + (n ^ (n >> 7 & 7) << 4); }

inline void finish_load(size_t which) {
    Load l = loads[which];
    loads.erase(loads.begin() + which);
    uint32_t to = l.to - (char *)core->shared;
    memcpy(l.to, l.map.data, l.bytes);
    for (int i = 0; i < l.map.box_rows; i++)
        for (int j = 0; j < 64; j++) { // zero where the matrix has nothing
            int64_t row = l.row + i, column = l.column + j;
            uint16_t x = 0;
            if (row >= 0 && row < l.map.rows && column >= 0 && column < l.map.columns)
                memcpy(&x, l.map.data + row * l.map.ld + 2 * column, sizeof x);
            memcpy(exchanged(to + i * 128 + j * 2), &x, sizeof x);
        }
    Mbarrier *m = (Mbarrier *)l.mbarrier;
    m->missing_bytes -= l.map.box_rows * 128 + l.bytes;
    if (m->missing_bytes < 0) die(l.line, "more bytes arrive at an mbarrier than it expects");
    end_phase_if_complete(m);
}

// Element (i,k) of an A (64,16), or (k,i) of a B, in the tile of this descriptor
inline float element(uint64_t descriptor, bool trans, int i, int k) {
    uint32_t begin = (descriptor & 0x3FFF) * 16;
    uint32_t columns = (descriptor >> 16 & 0x3FFF) * 16, rows = (descriptor >> 32 & 0x3FFF) * 16;
    uint32_t row = trans ? k : i, column = trans ? i % 64 : k;
    if (trans) begin += i / 64 * columns;
    __nv_bfloat16 x;
    memcpy(&x, exchanged(begin + row / 8 * rows + row % 8 * 128 + column * 2), sizeof x);
    return x;
}

// Lane 4g + q of warp w has the sums of rows 16w + g and that + 8, of columns 8j + 2q and the next.
inline void finish_product(Warp &w, const Product &p) {
    alignas(32) static thread_local float a[16][16], b[16][2 * MAX_SUMS];
    alignas(32) float d[16][8];
    Result &result = w.results[p.result];
    int first_row = (&w - core->warps) % 4 * 16;
    for (int lane = 0; lane < WARP && p.in_registers; lane++)
        for (int r = 0; r < 4; r++) {
            int row = lane / 4 + 8 * (r % 2), column = lane % 4 * 2 + 8 * (r / 2);
            put(&a[row][column], pair(p.registers[lane], r));
        }
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 16 && !p.in_registers; i++)
            a[i][k] = element(p.a, p.trans_a, first_row + i, k);
        for (int j = 0; j < p.columns; j++) b[k][j] = element(p.b, p.trans_b, j, k);
    }
    for (int j = 0; j < p.columns; j += 8) {
        product(d, a, &b[0][j], 2 * MAX_SUMS);
        for (int lane = 0; lane < WARP; lane++)
            for (int r = 0; r < 4; r++) {
                float *sum = &result.sums[lane][j / 2 + r];
                *sum = lane_result(d, lane, r) + (p.add ? *sum : 0);
            }
    }
    if (--result.products) return;
    for (int lane = 0; lane < WARP; lane++) // the program may see it
        memcpy(result.at[lane], result.sums[lane], p.columns / 2 * sizeof(float));
}

// The result of this product. When it is the first for this result, the result's numbers are kept
// here, and spoilt where the program has them.
inline int result_of(Warp &w, int columns) {
    int unused = -1;
    for (int i = 0; i < MAX_RESULTS; i++) {
        if (w.results[i].products && w.results[i].at[0] == w.arguments[0][0]) return i;
        if (!w.results[i].products) unused = i;
    }
    if (unused < 0) die(w.line, "more than %d results of wgmma on their way", MAX_RESULTS);
    size_t bytes = columns / 2 * sizeof(float);
    for (int lane = 0; lane < WARP; lane++) {
        float *at = w.results[unused].at[lane] = (float *)w.arguments[lane][0];
        memcpy(w.results[unused].sums[lane], at, bytes);
        memset(at, 0xFF, bytes);
    }
    return unused;
}

template <int COLUMNS, bool IN_REGISTERS, bool TRANS_A, bool TRANS_B, bool ADD>
void begin_product(Warp &w) {
    if (w.num_products == MAX_PRODUCTS)
        die(w.line, "more than %d wgmma without a wait", MAX_PRODUCTS);
    Product &p = w.products[w.num_products++];
    void **first = w.arguments[0];
    p = {result_of(w, COLUMNS), COLUMNS, (uint64_t)first[1], (uint64_t)first[2], {},
         IN_REGISTERS, TRANS_A, TRANS_B, ADD, w.groups};
    w.results[p.result].products++;
    for (int lane = 0; lane < WARP; lane++) {
        void **mine = w.arguments[lane];
        if (IN_REGISTERS) memcpy(p.registers[lane], mine[1], sizeof p.registers[lane]);
        if (mine[2] != first[2] || (!IN_REGISTERS && mine[1] != first[1]))
            die(w.line, "wgmma: lanes have different descriptors");
    }
}

// Does what must be done when all groups except the `newest` must be.
inline void finish_products(Warp &w, unsigned newest) {
    unsigned done = 0;
    while (done < w.num_products && w.products[done].group + newest < w.groups)
        finish_product(w, w.products[done++]);
    w.num_products -= done;
    memmove(w.products, w.products + done, w.num_products * sizeof(Product));
}

namespace cuda {
inline uint32_t shared_address(const void *p) {
    return (const char *)p - (const char *)core->shared;
}

inline void mbarrier_init(uint64_t *barrier, int count) {
    *(Mbarrier *)barrier = {0, (uint32_t)count, (uint32_t)count, 0};
}
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(uint64_t *barrier, LINE) {
    Mbarrier *m = (Mbarrier *)barrier;
    if (!m->missing) die(line, "more threads arrive at an mbarrier than it expects");
    m->missing--;
    end_phase_if_complete(m);
}
inline void mbarrier_expect(uint64_t *barrier, int bytes, LINE) {
    ((Mbarrier *)barrier)->missing_bytes += bytes;
    mbarrier_arrive(barrier, line);
}
inline void mbarrier_wait(uint64_t *barrier, int parity, PLACE) {
    if (skips(file, line)) return;
    Warp &w = *core->warp;
    if (w.what && w.mbarrier && (w.mbarrier != barrier || w.parity != parity))
        die(line, "lanes of a warp wait for different mbarriers or phases");
    w.mbarrier = barrier;
    w.parity = parity;
    wait("mbarrier_wait", line, false, nullptr);
}

// Spoils the target at once: nobody may still read what was there.
inline void tma_load(void *to, const CUtensorMap *map, int column, int row, uint64_t *barrier,
                     LINE) {
    if (shared_address(to) % 1024) die(line, "tma_load: the target is no multiple of 1024");
    memset(to, 0xFF, map->box_rows * 128);
    loads.push_back({(char *)to, *map, column, row, 0, barrier, line});
}
inline void bulk_load(void *to, const void *from, int bytes, uint64_t *barrier, LINE) {
    if ((shared_address(to) | (uintptr_t)from | bytes) % 16)
        die(line, "bulk_load: an address, or the number of bytes, is no multiple of 16");
    memset(to, 0xFF, bytes);
    loads.push_back({(char *)to, {(const char *)from, 0, 0, 0, 0}, 0, 0, bytes, barrier, line});
}

inline void bulk_prefetch(const void *from, int bytes, LINE) {
    if (((uintptr_t)from | bytes) % 16)
        die(line, "bulk_prefetch: the address, or the number of bytes, is no multiple of 16");
    for (int i = 0; i < bytes; i++) (void)((const volatile char *)from)[i]; // may it be read?
}

template <int N> void more_registers() {}
template <int N> void fewer_registers() {}
template <class T, int N> void keep(T (&)[N][4]) {}
inline void not_before(int &) {}
inline void wgmma_fence() {}
inline void wgmma_commit(LINE) {
    with(nullptr, nullptr, nullptr, "wgmma_commit", line, [](Warp &w) { w.groups++; });
}
template <int N> void wgmma_wait(PLACE) { // until all groups except the N newest are done
    if (skips(file, line)) return;
    auto finish = [](Warp &w) { finish_products(w, N); };
    with(nullptr, nullptr, nullptr, "wgmma_wait", line, finish);
}
template <bool TRANS_A, bool TRANS_B, int N>
void wgmma(float (&d)[N][4], uint64_t a, uint64_t b, int add, LINE) {
    with(d, (void *)a, (void *)b, "wgmma", line,
         add ? begin_product<8 * N, false, TRANS_A, TRANS_B, true>
             : begin_product<8 * N, false, TRANS_A, TRANS_B, false>);
}
template <int N> void wgmma(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, int add, LINE) {
    with(d, a, (void *)b, "wgmma", line,
         add ? begin_product<8 * N, true, false, true, true>
             : begin_product<8 * N, true, false, true, false>);
}
} // namespace cuda
#undef PLACE
#undef LINE

// =================================================================================================
// 5. Runtime: memory, device, events, launches

enum { SHARED_DEFAULT = 48 << 10 }; // dynamic shared memory that a block may have without asking

namespace cuda {
static int shared_max() { // bytes of it that a block may have at most
    int c = settings.capability;
    if (c == 80 || c == 87) return 163 << 10;
    if (c < 90 || c >= 120) return 99 << 10;
    return 227 << 10;
}

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209, cudaErrorIllegalState = 401,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum { cudaMemAttachGlobal = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st {} *cudaStream_t;
#define cudaStreamPerThread ((cudaStream_t)2)
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed
};
typedef std::vector<std::function<void()>> CUgraph_st; // recorded launches
typedef CUgraph_st *cudaGraph_t, *cudaGraphExec_t;
typedef double *cudaEvent_t; // seconds
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int maxThreadsPerBlock, warpSize, major, minor, multiProcessorCount;
};
} // namespace cuda

// Device memory. The host may touch what is managed. CUDA_ON_CPU_PROTECT closes only what came from
// cudaMalloc: a variable shares its page with others.
struct Allocation {
    size_t bytes;
    enum { MALLOC, MANAGED, VARIABLE } kind;
};
inline std::map<char *, Allocation> allocations;
inline size_t allocated;
inline std::map<const void *, size_t> shared_limits; // of the kernels that asked
inline std::set<const void *> loaded;                // kernels that have run
inline cudaGraph_t recording;                        // a graph that is being recorded, or NULL
inline cudaError_t last_error;

inline cudaError_t result(cudaError_t e) {
    if (e) last_error = e;
    return e;
}
inline cudaError_t check_device() {
    if (settings.devices < 0) return result(cudaErrorInsufficientDriver);
    return result(settings.devices == 0 ? cudaErrorNoDevice : cudaSuccess);
}
inline cudaError_t check_idle() { // for what must not happen while a graph is recorded
    if (check_device()) return last_error;
    return result(recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

// The allocation in which all `bytes` from p on lie, or NULL. With bytes = 0 p may be its end.
inline Allocation *on_device(const void *p, size_t bytes) {
    auto after = allocations.upper_bound((char *)p);
    if (after == allocations.begin()) return nullptr;
    size_t offset = (char *)p - (--after)->first, size = after->second.bytes;
    return offset <= size && bytes <= size - offset ? &after->second : nullptr;
}

inline void must_be_on(bool device, const char *what, const char *side, const void *p,
                       size_t bytes) {
    if (!bytes) return;
    const Allocation *a = on_device(p, device ? bytes : 1);
    if (device ? !a : a && a->kind != Allocation::MANAGED)
        die(0, "%s%s: %p and the %zu bytes from there are %s", what, side, p, bytes,
            device ? "not (all) device memory" : "device memory, not the host's");
}

// For CUDA_ON_CPU_PROTECT: opens device memory to the program, or closes it.
inline void open_or_close(const std::pair<char *const, Allocation> &a, bool open) {
    if (!settings.protect || a.second.kind != Allocation::MALLOC) return;
    size_t bytes = a.second.bytes;
    if (!CUDA_ON_CPU_ASAN) mprotect(a.first, bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    if (open) {
        __asan_unpoison_memory_region(a.first, bytes);
    } else {
        __asan_poison_memory_region(a.first, bytes);
    }
}
struct Open { // all device memory is open while this exists
    Open() { for (auto &a : allocations) open_or_close(a, true); }
    ~Open() { for (auto &a : allocations) open_or_close(a, false); }
};

// launches.sed makes of kernel<<<grid, block>>>(arguments):
// Launch("kernel", grid, block).of(kernel)(arguments)
struct Launch {
    const char *name;
    dim3 grid, block;
    size_t shared;
    Launch(const char *name, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr)
        : name(name), grid(grid), block(block), shared(shared) {}

    static bool sizes_within(dim3 d, unsigned x, unsigned y, unsigned z) { // and none is 0
        return d.x - 1 < x && d.y - 1 < y && d.z - 1 < z;
    }

    cudaError_t check(const void *kernel) {
        if (check_device()) return last_error;
        if (settings.capability < 80) return cudaErrorNoKernelImageForDevice;
        if (!sizes_within(grid, 0x7FFFFFFF, 65535, 65535) || !sizes_within(block, 1024, 1024, 64) ||
            block.x * block.y * block.z > MAX_THREADS)
            return cudaErrorInvalidConfiguration;
        size_t asked = shared_limits.count(kernel) ? shared_limits[kernel] : 0;
        return shared > max(asked, (size_t)SHARED_DEFAULT) ? cudaErrorInvalidValue : cudaSuccess;
    }

    template <class T> void check_argument([[maybe_unused]] int i, [[maybe_unused]] T argument) {
        if constexpr (std::is_pointer<T>::value) {
            const void *p = (const void *)argument;
            if (p && !on_device(p, 0))
                die(0, "kernel %s: argument %d, %p, is not device memory", name, i, p);
        }
    }

    template <class... T> void run(void (*kernel)(T...), T... arguments) {
        [[maybe_unused]] int i = 0;
        (check_argument(++i, arguments), ...);
        auto thread = [&] { kernel(arguments...); }; // by value: each thread has its own
        auto call = [](void *closure) { (*(decltype(thread) *)closure)(); };
        running = {name, call, &thread, shared};
        gridDim = grid;
        blockDim = block;
        Open device;
        run_grid();
    }

    template <class... T> auto of(void (*kernel)(T...)) {
        return [this, kernel](T... arguments) {
            if (result(check((const void *)kernel))) return;
            bool first = loaded.insert((const void *)kernel).second;
            if (!recording) return run(kernel, arguments...);
            if (first) die(0, "kernel %s: its first launch is recorded, not run", name);
            recording->push_back([launch = *this, kernel, arguments...]() mutable {
                launch.run(kernel, arguments...);
            });
        };
    }
};

inline cudaError_t copy(const char *what, void *to, const void *from, size_t bytes,
                        cudaMemcpyKind kind) {
    if (check_idle()) return last_error;
    bool any = kind == cudaMemcpyDefault, within = kind == cudaMemcpyDeviceToDevice;
    bool to_device = within || kind == cudaMemcpyHostToDevice || (any && on_device(to, 1));
    bool from_device = within || kind == cudaMemcpyDeviceToHost || (any && on_device(from, 1));
    must_be_on(to_device, what, " to", to, bytes);
    must_be_on(from_device, what, " from", from, bytes);
    Open device;
    if (bytes) memmove(to, from, bytes);
    return cudaSuccess;
}

// Makes a variable with __device__ or __constant__ device memory while this exists. Only then: to
// host code its name is not an address in device memory.
struct Symbol {
    char *p;
    bool is_new;
    template <class T> Symbol(T &x) : p((char *)&x) {
        is_new = allocations.insert({p, {sizeof x, Allocation::VARIABLE}}).second;
    }
    ~Symbol() { if (is_new) allocations.erase(p); }
};

namespace cuda {
template <class T> cudaError_t cudaMalloc(T **p, size_t bytes) {
    *p = nullptr;
    if (check_idle()) return last_error;
    if (bytes > settings.memory - allocated) return result(cudaErrorMemoryAllocation);
    if (!bytes) return cudaSuccess;

    // mprotect needs whole pages, AddressSanitizer exactly `bytes`.
    size_t page = sysconf(_SC_PAGESIZE), rest = bytes % page;
    size_t padded = rest && !CUDA_ON_CPU_ASAN ? bytes + page - rest : bytes;
    void *memory;
    if (posix_memalign(&memory, page, padded)) return result(cudaErrorMemoryAllocation);

    *p = (T *)memset(memory, 0xFF, bytes);
    auto a = allocations.insert({(char *)memory, {bytes, Allocation::MALLOC}}).first;
    open_or_close(*a, false);
    allocated += bytes;
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMallocManaged(T **p, size_t bytes, unsigned = cudaMemAttachGlobal) {
    if (!bytes) return result(cudaErrorInvalidValue);
    if (cudaMalloc(p, bytes)) return last_error;
    auto a = allocations.find((char *)*p);
    open_or_close(*a, true);
    a->second.kind = Allocation::MANAGED;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    if (check_idle()) return last_error;
    auto a = allocations.find((char *)p);
    if (a == allocations.end() || a->second.kind == Allocation::VARIABLE)
        die(0, "cudaFree: %p did not come from cudaMalloc, or was freed before", p);
    allocated -= a->second.bytes;
    open_or_close(*a, true);
    free(p);
    allocations.erase(a);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return copy("cudaMemcpy", to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    if (check_idle()) return last_error;
    must_be_on(true, "cudaMemset", "", p, bytes);
    Open device;
    if (bytes) memset(p, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t = nullptr) {
    return cudaMemset(p, value, bytes);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
    Symbol s(symbol);
    return copy("cudaMemcpyToSymbol", s.p + offset, from, bytes, kind);
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void *to, const T &symbol, size_t bytes, size_t offset = 0,
                                 cudaMemcpyKind kind = cudaMemcpyDeviceToHost) {
    Symbol s(symbol);
    return copy("cudaMemcpyFromSymbol", to, s.p + offset, bytes, kind);
}
template <class T> cudaError_t cudaGetSymbolAddress(void **p, T &symbol) {
    *p = (void *)&symbol;
    allocations.insert({(char *)*p, {sizeof symbol, Allocation::VARIABLE}});
    return check_device();
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes) {
    *p = (T *)malloc(bytes);
    return result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = settings.memory;
    *free = *total - allocated;
    return check_device();
}

inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = max(settings.devices, 0);
    return check_device();
}
inline cudaError_t cudaSetDevice(int i) {
    if (check_device()) return last_error;
    return result(i < 0 || i >= settings.devices ? cudaErrorInvalidValue : cudaSuccess);
}
inline cudaError_t cudaGetDevice(int *i) {
    *i = 0;
    return check_device();
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int i) {
    *p = {"CPU emulation", settings.memory, SHARED_DEFAULT, (size_t)shared_max(), MAX_THREADS, WARP,
          settings.capability / 10, settings.capability % 10, 8};
    return cudaSetDevice(i);
}
inline cudaError_t cudaDeviceSynchronize() { return check_idle(); }
template <class... T>
cudaError_t cudaFuncSetAttribute(void (*kernel)(T...), cudaFuncAttribute, int bytes) {
    if (check_device()) return last_error;
    if (bytes < 0 || bytes > shared_max()) return result(cudaErrorInvalidValue);
    shared_limits[(const void *)kernel] = bytes;
    return cudaSuccess;
}

// The driver's function for tensor maps: matrices of bf16 with boxes 64 wide, as TMA loads here
typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum {
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9, CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_128B = 3, CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0
};
inline CUresult cuTensorMapEncodeTiled(CUtensorMap *map, int type, int rank, void *data,
                                       const cuuint64_t *sizes, const cuuint64_t *strides,
                                       const cuuint32_t *box, const cuuint32_t *steps,
                                       int interleave, int swizzle, int, int) {
    bool known = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 && !interleave &&
                 swizzle == CU_TENSOR_MAP_SWIZZLE_128B && steps[0] == 1 && steps[1] == 1;
    if (!known || (uintptr_t)data % 16 || strides[0] % 16 || box[0] != 64 || box[1] > 256)
        return CUDA_ERROR_INVALID_VALUE;
    *map = {(const char *)data, (int64_t)sizes[1], (int64_t)sizes[0], (int64_t)strides[0],
            (int)box[1]};
    return CUDA_SUCCESS;
}
typedef decltype(&cuTensorMapEncodeTiled) PFN_cuTensorMapEncodeTiled_v12000;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                                    int, cudaDriverEntryPointQueryResult *found) {
    if (strcmp(name, "cuTensorMapEncodeTiled")) return result(cudaErrorInvalidValue);
    *function = (void *)cuTensorMapEncodeTiled;
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorIllegalState:
        return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    }
    return "unrecognized error code";
}

inline cudaError_t cudaStreamCreate(cudaStream_t *s) {
    *s = new CUstream_st();
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return check_idle(); }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (check_idle()) return last_error;
    if (!s) return result(cudaErrorStreamCaptureUnsupported); // not of the default stream
    recording = new CUgraph_st;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = std::exchange(recording, nullptr);
    return result(*graph ? cudaSuccess : cudaErrorIllegalState);
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                                 unsigned long long) {
    *exec = new CUgraph_st(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    if (check_idle()) return last_error;
    for (auto &launch : *exec) launch();
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return cudaGraphDestroy(exec); }
inline cudaError_t cudaEventCreate(cudaEvent_t *e) {
    *e = new double();
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    *e = t.tv_sec + 1e-9 * t.tv_nsec;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = 1e3 * (*end - *begin);
    return cudaSuccess;
}
} // namespace cuda
} // namespace cuda_on_cpu
