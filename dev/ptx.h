/*
PTX instructions for which CUDA C++ has no functions, each behind one small function. loopmdm.cu and
dev/hopper.h say how they work together. dev/cuda_on_cpu has the same functions in C, for the CPU.
Reference: NVIDIA, Parallel Thread Execution ISA.
*/
#pragma once
#include <cuda_bf16.h>
#if HOPPER
#include <cudaTypedefs.h>
#endif

#if BF16
// d += A B by a warp, (16,8) = (16,16) (16,8), in bf16 with float sums
__device__ static inline void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Where in shared memory, as PTX counts
__device__ static inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Four matrices of 8 rows of 16 bytes from shared memory. Lane n gives the address of row n % 8 of
// matrix n / 8. It gets 4 bytes of row n / 4 of each matrix; transposed: two bf16 of column n / 4.
__device__ static inline void ldmatrix_x4(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// Starts a copy of 16 bytes to shared memory. Only the first `bytes` are read; the others become
// zero.
__device__ static inline void cp_async_16(void *shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// The copies since the last call are one group.
__device__ static inline void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups except the N newest.
template <int N> __device__ static inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// 2^x, to 2 units in the last place; what is too small for a normal number is zero.
__device__ static inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if HOPPER
// ---- mbarriers: 8 bytes of shared memory that count arrivals of threads and of bytes ----
//
// A phase ends when `count` threads have arrived, and all bytes that they expect. Phases have
// parity 0, 1, 0, ...

__device__ static inline void mbarrier_init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes the new barriers visible to TMA. Other threads need a __syncthreads() after it.
__device__ static inline void mbarrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;"
                 ::: "memory");
}

__device__ static inline void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 :: "r"(shared_address(barrier)) : "memory");
}

// Arrives, and tells how many bytes TMA will bring in this phase.
__device__ static inline void mbarrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended. A new barrier acts as if one of parity 1 had.
__device__ static inline void mbarrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;\n"
                 "}" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- TMA, the tensor memory accelerator: one thread loads a whole box ----

// Starts to load the map's box that begins at this row and column. It becomes rows of 128 bytes in
// shared memory: chunk c of 16 bytes of row r lies at chunk c ^ (r % 8), so that neither rows nor
// columns meet in one bank. The bytes count at the barrier.
__device__ static inline void tma_load(void *shared, const CUtensorMap *map, int column, int row,
                                       uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)),
                    "r"(column), "r"(row) : "memory");
}

// Starts to load neighbouring bytes as they are. Both addresses and `bytes` are multiples of 16.
__device__ static inline void bulk_load(void *shared, const void *global, int bytes,
                                        uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes),
                    "r"(shared_address(barrier)) : "memory");
}

// Starts to bring neighbouring bytes into the L2 cache. Address and `bytes`: multiples of 16.
__device__ static inline void bulk_prefetch(const void *global, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(bytes));
}

// ---- wgmma: a warpgroup, 4 warps, multiplies tiles in shared memory, and need not wait ----

// All threads of a block begin with the same number of registers. From here on those of this
// warpgroup have N: they give up the rest, or wait until so many are free.
template <int N> __device__ static inline void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ static inline void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}

// Comes before products if other instructions have used their registers: the sums, or A.
__device__ static inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last call are one group.
__device__ static inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups except the N newest.
template <int N> __device__ static inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// wgmma returns before its sums are there, and the compiler does not know. It moves no use of the
// sums across this: neither from before a fence to after it, nor from after a wait to before it.
template <int N> __device__ static inline void keep(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) :: "memory");
}
template <int N> __device__ static inline void keep(uint32_t (&a)[N][4]) { // the same for A
#pragma unroll
    for (int j = 0; j < N; j++)
        asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]) :: "memory");
}

// The compiler computes nothing that depends on x before this.
__device__ static inline void not_before(int &x) { asm volatile("" : "+r"(x)); }

// d += A B or, with add 0, d = A B, with (64,N) = (64,16) (16,N). Warp w has rows 16w to 16w + 15,
// and d[j] is laid out like mma's d, for columns 8j to 8j + 7. Descriptors give tiles in shared
// memory. As in load_a and load_b they hold A and B^T, or with TRANS A^T and B (mn-major in PTX).
// Or A is in registers, laid out like mma's a, and the tile holds B.
// TO_n lists operands 0 to n - 1; SUMS_n(j) are the n floats from d[j] on.
#define TO_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define TO_24 TO_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define TO_32 TO_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define TO_48 TO_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define TO_64 TO_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TO_96 TO_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SUMS_8(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), \
    "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define SUMS_16(j) SUMS_8(j), SUMS_8(j + 2)
#define SUMS_24(j) SUMS_16(j), SUMS_8(j + 4)
#define SUMS_32(j) SUMS_16(j), SUMS_16(j + 4)
#define SUMS_48(j) SUMS_32(j), SUMS_16(j + 8)
#define SUMS_64(j) SUMS_32(j), SUMS_32(j + 8)
#define SUMS_96(j) SUMS_64(j), SUMS_32(j + 16)

// The last arguments are the numbers of the operands that follow the sums. "p, 1, 1": add if p, and
// negate neither A nor B. The last 1 of WGMMA_REGISTERS is TRANS_B.
#define WGMMA(N, SUMS, A, B, ADD, TRANS_A_, TRANS_B_) \
    template <bool TRANS_A, bool TRANS_B> __device__ static inline \
    void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " \
                     "{" TO_##SUMS "}, " A ", " B ", p, 1, 1, " TRANS_A_ ", " TRANS_B_ ";\n}" \
                     : SUMS_##SUMS(0) \
                     : "l"(a), "l"(b), "r"(add), "n"((int)TRANS_A), "n"((int)TRANS_B)); \
    }
WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36")
WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52")
WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100")

#define WGMMA_REGISTERS(N, SUMS, A, B, ADD) \
    __device__ static inline \
    void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " \
                     "{" TO_##SUMS "}, {" A "}, " B ", p, 1, 1, 1;\n}" \
                     : SUMS_##SUMS(0) \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)); \
    }
WGMMA_REGISTERS(32, 16, "%16,%17,%18,%19", "%20", "%21")
WGMMA_REGISTERS(48, 24, "%24,%25,%26,%27", "%28", "%29")
WGMMA_REGISTERS(64, 32, "%32,%33,%34,%35", "%36", "%37")
WGMMA_REGISTERS(96, 48, "%48,%49,%50,%51", "%52", "%53")
WGMMA_REGISTERS(128, 64, "%64,%65,%66,%67", "%68", "%69")
#endif
