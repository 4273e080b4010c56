/*
Several processes that train one model: by MPI, by NCCL, or by NCCL started by MPI. dev/tools.c
includes this file. Without MPI=1 or NCCL=1 in make there is one process, and nothing to do.
dev/COMMANDS.md says how to start several.

All processes have the same model. In a step each takes its share of the sequences, and then
reduce_gradients() adds up the gradients of all. Everything else follows from the step's number and
from that sum, so it is the same everywhere: noise, S, learning rate, clipping, update. Process 0
also prints and writes the files.

A process adds up its own batches first, in order. The order of the sum over processes is up to MPI
or NCCL: it depends on their number, not on chance.
*/
#pragma once
#if !MPI && !NCCL
static void processes_known(void) {}
static void processes_begin(void) {}
static void processes_end(void) {}
static void processes_check(Model *m, Data data, Data val_data, int step) {
    (void)m;
    (void)data;
    (void)val_data;
    (void)step;
}
static void any_process(int *yes, int n) {
    (void)yes;
    (void)n;
}
#else
#if MPI
#define OMPI_SKIP_MPICXX 1 // not the old C++ functions
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#if NCCL
#include <nccl.h>
#endif

// The first of these variables of the environment that is set, as a number; or `otherwise`.
static int from_environment(const char *const *names, int n, int otherwise) {
    for (int i = 0; i < n; i++)
        if (getenv(names[i])) return atoi(getenv(names[i]));
    return otherwise;
}

// By torchrun, Slurm, Open MPI, and others that start MPI's programs
static const char *const rank_names[] = {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK",
                                         "PMI_RANK"};
static const char *const ranks_names[] = {"WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE",
                                          "PMI_SIZE"};
static const char *const local_names[] = {"LOCAL_RANK", "SLURM_LOCALID",
                                          "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"};

static void set_rank(int number, int of) {
    rank = number;
    ranks = of;
    if (ranks > 1) snprintf(who, sizeof who, "loopmdm: rank %d", rank);
}

// Before the options are read: so that a wrong one is said once.
static void processes_known(void) {
    int of = from_environment(ranks_names, COUNT(ranks_names), 1);
    if (of > 1) set_rank(from_environment(rank_names, COUNT(rank_names), 0), of);
}

#if NCCL
// ---- NCCL: the sums on the GPUs ----

static ncclComm_t communicator;

static void nccl_check(ncclResult_t result, const char *what) {
    if (result != ncclSuccess)
        die(FAILED, "NCCL, %s: %s (NCCL_DEBUG=INFO says more)", what, ncclGetErrorString(result));
}

static void reduce_by_nccl(double *x, int n) {
    static double *on_gpu;
    static int room;
    if (n > room) {
        cudaFree(on_gpu);
        cuda_check(cudaMalloc((void **)&on_gpu, n * sizeof(double)), "memory for sums");
        room = n;
    }
    write_memory(on_gpu, x, n * sizeof(double));
    nccl_check(ncclAllReduce(on_gpu, on_gpu, n, ncclDouble, ncclSum, communicator, 0), "a sum");
    read_memory(x, on_gpu, n * sizeof(double));
}

static void reduce_floats(float *x, size_t n) { // x: in the model's memory
    nccl_check(ncclAllReduce(x, x, n, ncclFloat, ncclSum, communicator, 0), "the gradient's sum");
}

#if !MPI
// Without MPI the id comes to the others in a file beside --out. Its name is that of this start:
// the file of an earlier one must not be taken for it.
static void share_id(ncclUniqueId *id) {
    static const char *const starts[] = {"SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE",
                                         "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
                                         "MASTER_PORT"};
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s.nccl", opt_out);
    for (int i = 0; i < COUNT(starts); i++) {
        const char *value = getenv(starts[i]);
        if (value && length < PATH_MAX)
            length += snprintf(path + length, sizeof path - length, "-%s", value);
    }
    if (length >= PATH_MAX) die(USAGE, "--out: %s is too long", opt_out);
    if (rank == 0) {
        if (!opt_resume) make_folders(opt_out);
        nccl_check(ncclGetUniqueId(id), "an id");
        write_file(path, id, sizeof *id);
    }
    for (int tries = 0; rank > 0; tries++) { // write_file() renames: it is there and whole, or not
        FILE *file = fopen(path, "rb");
        size_t got = file ? fread(id, 1, sizeof *id, file) : 0;
        if (file) fclose(file);
        if (got == sizeof *id) break;
        if (tries == 600) die(FAILED, "rank 0 did not write %s: do all see --out?", path);
        usleep(100000);
    }
    nccl_check(ncclCommInitRank(&communicator, ranks, *id, rank), "the start");
    if (rank == 0) unlink(path); // all have read it
}
#endif

static void nccl_begin(void) {
    int devices, local = from_environment(local_names, COUNT(local_names), 0);
    cuda_check(cudaGetDeviceCount(&devices), "the GPUs");
    if (local >= devices)
        die(FAILED, "process %d of this machine has no GPU: it has %d", local, devices);
    cuda_check(cudaSetDevice(local), "the GPU");
    ncclUniqueId id;
#if MPI
    if (rank == 0) nccl_check(ncclGetUniqueId(&id), "an id");
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    nccl_check(ncclCommInitRank(&communicator, ranks, id, rank), "the start");
#else
    share_id(&id);
#endif
    reduce = reduce_by_nccl;
}

#else
// ---- MPI: the sums on the CPUs ----

static void reduce_by_mpi(double *x, int n) {
    MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

// In pieces of 1 MiB, which stay in the caches: d12's 474 MiB at once took three times as long.
static void reduce_floats(float *x, size_t n) { // x: in the model's memory
    enum { PIECE = 1 << 18 };
#ifdef BACKEND
    static float copy[PIECE];
#endif
    for (size_t i = 0; i < n; i += PIECE) {
        int size = (int)(n - i < PIECE ? n - i : PIECE);
#ifdef BACKEND
        read_memory(copy, x + i, size * sizeof(float));
        MPI_Allreduce(MPI_IN_PLACE, copy, size, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        write_memory(x + i, copy, size * sizeof(float));
#else
        MPI_Allreduce(MPI_IN_PLACE, x + i, size, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
#endif
    }
}
#endif

// ---- the same for both ----

static double summing; // seconds: the sums themselves, and waiting for slower processes
static int num_sums;

static void sum_over_processes(Model *m, Gradient *g) {
    double began = seconds();
    double numbers[] = {(double)g->masked, g->loss, g->mean_t};
    reduce(numbers, COUNT(numbers));
    g->masked = (int)numbers[0];
    g->loss = numbers[1];
    g->mean_t = numbers[2];
    reduce_floats(m->grads.data, m->grads.total);
    summing += seconds() - began;
    num_sums++;
}

static void processes_end(void) {
    if (num_sums)
        printf("sums over processes: %.2f ms a step, with waiting\n", 1e3 * summing / num_sums);
#if NCCL
    if (communicator) ncclCommDestroy(communicator);
#endif
#if MPI
    int begun;
    MPI_Initialized(&begun);
    if (begun) MPI_Finalize();
#endif
}

#if MPI
// After die(): the others would wait for this process for ever.
static void end_all(void) {
    int ended;
    MPI_Finalized(&ended);
    if (!ended) MPI_Abort(MPI_COMM_WORLD, FAILED);
}
#endif

// Joins the others. From here on `rank` and `ranks` are right, and only process 0 prints.
static void processes_begin(void) {
#if MPI
    int provided, number, of;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &number);
    MPI_Comm_size(MPI_COMM_WORLD, &of);
    set_rank(number, of);
    atexit(end_all);
#endif
    if (ranks == 1) return;
#if NCCL
    nccl_begin();
#else
    reduce = reduce_by_mpi;
#endif
    reduce_gradients = sum_over_processes;
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) die(FAILED, "cannot open /dev/null");
}

// Ends all if a process has another number than process 0.
static void must_agree(double mine, const char *what) {
    double *all = (double *)allocate(ranks, sizeof(double), "the processes");
    all[rank] = mine;
    reduce(all, ranks);
    for (int r = 1; r < ranks; r++)
        if (all[r] != all[0]) die(USAGE, "rank %d has %s than rank 0", r, what);
    free(all);
}

// Sets those of yes (n, at most 4) that are set in any process.
static void any_process(int *yes, int n) {
    if (ranks == 1) return;
    double sums[4];
    for (int i = 0; i < n; i++) sums[i] = yes[i] != 0;
    reduce(sums, n);
    for (int i = 0; i < n; i++) yes[i] = sums[i] > 0;
}

static uint32_t crc32_of_data(Data d) {
    uint32_t crc = 0;
    for (int i = 0; i < d.num_shards; i++)
        crc = crc32(crc, d.shards[i].tokens, (size_t)d.shards[i].count * sizeof(uint16_t));
    return crc;
}

// Options that say what is computed. A file's name may differ, but not what is in it.
static uint32_t crc32_of_options(void) {
    uint32_t crc = crc32(0, products, strlen(products));
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const void *value = options[i].value;
        size_t size = sizeof(int);
        int is_text = options[i].type == TEXT;
        int is_file = is_text && strstr("FILES FOLDER", options[i].argument);
        if (!(options[i].commands & TRAIN) || is_file || value == &opt_threads) continue;
        if (options[i].type == REAL) size = sizeof(double);
        if (options[i].type == SEED) size = sizeof(uint64_t);
        if (is_text) value = *(const char *const *)value;
        if (is_text) size = value ? strlen((const char *)value) : 0;
        crc = crc32(crc, value, size);
    }
    return crc;
}

// What a step adds up fits together only if all began with the same.
static void processes_check(Model *m, Data data, Data val_data, int step) {
    if (ranks == 1) return;
    uint32_t crc = 0;
    const size_t piece = 1 << 20;
    float *copy = (float *)allocate(piece, sizeof(float), "the parameters");
    for (size_t i = 0; i < m->params.total; i += piece) {
        size_t size = m->params.total - i < piece ? m->params.total - i : piece;
        read_memory(copy, m->params.data + i, size * sizeof(float));
        crc = crc32(crc, copy, size * sizeof(float));
    }
    free(copy);
    must_agree(crc32_of_options(), "other options, or another --precision,");
    must_agree(crc32_of_data(data), "other text in --data");
    must_agree(crc32_of_data(val_data), "other text in --val-data");
    must_agree(step, "a checkpoint of another step in --out");
    must_agree(crc, "other parameters");
}
#endif
