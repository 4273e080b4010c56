/*
Several processes that train one model: by MPI, by NCCL, or by NCCL started by MPI. dev/tools.c
includes this file. Without MPI=1 or NCCL=1 in make there is one process, and nothing to do.
dev/COMMANDS.md says how to start several.

All processes have the same model. In a step each takes its share of the sequences, and then
reduce_gradients() adds up the gradients of all. Everything else follows from the step's number and
from that sum, so it is the same everywhere: noise, S, learning rate, clipping, update. Process 0
also prints and writes the files.

A process adds up its own batches first, in order. The order of the sum over processes is up to MPI
or NCCL. With the same library, machines and number of processes it is the same each time.
*/
#pragma once
#if MPI
#define OMPI_SKIP_MPICXX 1 // not the old C++ functions
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#if NCCL
#include <nccl.h>
#endif

#if MPI || NCCL
// A launcher says by these variables which process this is, of how many, and which of its machine.
static const char *const launchers[][3] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK"}, // torchrun
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"}, // Open MPI
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"}, // MPICH and its relatives
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"}, // srun
};
static int local_rank;

static void set_rank(int number, int of) {
    if (number < 0 || number >= of)
        die(USAGE, "the environment says that this is process %d of %d", number, of);
    rank = number;
    ranks = of;
    strcpy(program_name, "loopmdm");
    if (of > 1) snprintf(program_name, sizeof program_name, "loopmdm: rank %d", rank);
}

// Before options are read: so that a wrong one is said once, by rank 0.
static void rank_from_environment(void) {
    for (int i = 0; i < COUNT(launchers); i++) {
        const char *number = getenv(launchers[i][0]), *of = getenv(launchers[i][1]);
        const char *local = getenv(launchers[i][2]);
        if (!number || !of) continue;
        set_rank(atoi(number), atoi(of));
        local_rank = local ? atoi(local) : 0;
        return;
    }
}
#endif

#if NCCL
// ---- NCCL: the sums on the GPUs ----

static ncclComm_t communicator;
#define STREAM cudaStreamPerThread // where the kernels of loopmdm.cu run

static void nccl_check(ncclResult_t result, const char *what) {
    if (result != ncclSuccess)
        die(FAILED, "NCCL, %s: %s (NCCL_DEBUG=INFO says more)", what, ncclGetErrorString(result));
}

static void reduce_numbers(double *x, int n) {
    static double *on_gpu;
    static int room;
    if (n > room) {
        cudaFree(on_gpu);
        cuda_check(cudaMalloc((void **)&on_gpu, n * sizeof(double)), "memory for sums");
        room = n;
    }
    write_memory(on_gpu, x, n * sizeof(double));
    nccl_check(ncclAllReduce(on_gpu, on_gpu, n, ncclDouble, ncclSum, communicator, STREAM),
               "summing");
    read_memory(x, on_gpu, n * sizeof(double));
}

static void reduce_floats(float *x, size_t n) { // x: in the model's memory
    nccl_check(ncclAllReduce(x, x, n, ncclFloat, ncclSum, communicator, STREAM),
               "summing gradients");
}

// NCCL's processes meet by an id that process 0 makes.
#if MPI
static void share_id(ncclUniqueId *id) {
    if (rank == 0) nccl_check(ncclGetUniqueId(id), "making an id");
    MPI_Bcast(id, sizeof *id, MPI_BYTE, 0, MPI_COMM_WORLD);
}
static void forget_id(void) {}

#else
static char id_path[PATH_MAX];
static int id_file;

// In a file in --out, with the launch in its name if the launcher has one. Process 0 holds a lock
// on it: if there is none, the file was left by a process that is dead.
static void share_id(ncclUniqueId *id) {
    static const char *const launch[] = {"SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE",
                                         "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
                                         "MASTER_PORT"};
    int length = snprintf(id_path, sizeof id_path, "%s/nccl_id", opt_out);
    for (int i = 0; i < COUNT(launch); i++) {
        const char *value = getenv(launch[i]);
        if (value && length < PATH_MAX)
            length += snprintf(id_path + length, sizeof id_path - length, "-%s", value);
    }
    if (length >= PATH_MAX) die(USAGE, "--out: %s is too long", opt_out);
    if (rank == 0) {
        if (!opt_resume) make_folders(opt_out);
        nccl_check(ncclGetUniqueId(id), "making an id");
        char *temporary = concat(id_path, ".tmp"); // renamed, the file is locked and whole
        id_file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (id_file < 0 || flock(id_file, LOCK_EX | LOCK_NB) ||
            write(id_file, id, sizeof *id) != sizeof *id || fsync(id_file) ||
            rename(temporary, id_path))
            die(FAILED, "--out: cannot write %s: %s", temporary, strerror(errno));
        free(temporary);
        return;
    }

    for (int tries = 0; tries < 600; tries++) {
        int file = open(id_path, O_RDONLY);
        int is_new = file >= 0 && flock(file, LOCK_SH | LOCK_NB);
        if (is_new && read(file, id, sizeof *id) == sizeof *id) return;
        if (file >= 0) close(file);
        usleep(100000);
    }
    die(FAILED, "rank 0 did not write %s within a minute: do all see the folder?", id_path);
}

static void forget_id(void) {
    if (rank > 0) return;
    unlink(id_path);
    close(id_file);
}
#endif

static void join(void) {
    int devices;
    cuda_check(cudaGetDeviceCount(&devices), "the GPUs");
    int device = devices == 1 ? 0 : local_rank; // a launcher may show each process only its own
    if (device < 0 || device >= devices)
        die(FAILED, "process %d (from 0) of this machine finds %d GPUs: start one process a GPU",
            local_rank, devices);
    cuda_check(cudaSetDevice(device), "the GPU");
    ncclUniqueId id;
    share_id(&id);
    nccl_check(ncclCommInitRank(&communicator, ranks, id, rank), "meeting the other processes");
    forget_id(); // all have it
}

#elif MPI
// ---- MPI: the sums on the CPUs ----

static void reduce_numbers(double *x, int n) {
    MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

// In pieces of 1 MiB, which stay in the caches
static void reduce_floats(float *x, size_t n) { // x: in the model's memory
    enum { PIECE = 1 << 18 };
#ifdef BACKEND
    static float copy[PIECE];
#endif
    for (size_t i = 0; i < n; i += PIECE) {
        int size = (int)fmin(PIECE, (double)(n - i));
#ifdef BACKEND
        read_memory(copy, x + i, size * sizeof(float));
        MPI_Allreduce(MPI_IN_PLACE, copy, size, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        write_memory(x + i, copy, size * sizeof(float));
#else
        MPI_Allreduce(MPI_IN_PLACE, x + i, size, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
#endif
    }
}

static void join(void) {}
#endif

// ---- the beginning and the end ----

#if MPI || NCCL
static double summing; // seconds: the sums themselves, and waiting for slower processes
static int num_sums;

static void wait_for_gpu(void) {
#ifdef BACKEND
    cuda_check(cudaDeviceSynchronize(), "a training step");
#endif
}

static void sum_over_processes(Model *m, Gradient *g) {
    wait_for_gpu(); // its work is no part of the sums' time
    double began = seconds();
    double numbers[] = {(double)g->masked, g->loss, g->mean_t};
    reduce(numbers, COUNT(numbers));
    g->masked = (int)numbers[0];
    g->loss = numbers[1];
    g->mean_t = numbers[2];
    reduce_floats(m->grads.data, m->grads.total);
    wait_for_gpu();
    summing += seconds() - began;
    num_sums++;
}

#if MPI
// After die(): the others would wait for this process for ever.
static void end_all(int status, void *unused) {
    int ended;
    (void)unused;
    MPI_Finalized(&ended);
    if (!ended) MPI_Abort(MPI_COMM_WORLD, status);
}
#ifndef __GLIBC__ // which alone has on_exit()
static void end_all_failed(void) { end_all(FAILED, NULL); }
#define on_exit(function, unused) atexit(end_all_failed)
#endif
#endif

// Joins the others. From here on `rank` and `ranks` are right, and only process 0 prints.
static void processes_begin(void) {
#if MPI
    int number, of;
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &number);
    MPI_Comm_size(MPI_COMM_WORLD, &of);
    if (ranks > 1 && of == 1)
        die(USAGE, "the launcher starts %d processes, but MPI does not know them: is its mpirun of "
            "the MPI that this program was built with?", ranks);
    set_rank(number, of);
    on_exit(end_all, NULL);
#endif
    if (ranks == 1) return;
    if (rank == 0) printf("waiting for %d processes\n", ranks);
    fflush(stdout);
    join();
    reduce = reduce_numbers;
    reduce_gradients = sum_over_processes;
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) die(FAILED, "cannot open /dev/null");
}

// All leave together. Not called after die().
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

#else
static void rank_from_environment(void) {}
static void processes_begin(void) {}
static void processes_end(void) {}
#endif

// ---- that all do the same ----

// Sets those of yes (n, at most 4) that are set in any process.
static void any_process(int *yes, int n) {
    if (ranks == 1) return;
    double sums[4];
    for (int i = 0; i < n; i++) sums[i] = yes[i] != 0;
    reduce(sums, n);
    for (int i = 0; i < n; i++) yes[i] = sums[i] > 0;
}

static void wait_for_all(void) {
    int yes = 0;
    any_process(&yes, 1);
}

// Ends all if a process has another number than process 0.
static void must_agree(double mine, const char *what) {
    double *all = (double *)allocate(ranks, sizeof(double), "the processes");
    all[rank] = mine;
    reduce(all, ranks);
    for (int r = 1; r < ranks; r++)
        if (all[r] != all[0]) die(USAGE, "rank %d differs from rank 0 in its %s", r, what);
    free(all);
}

static void must_agree_on_text(Data d, const char *what) {
    uint32_t crc = 0;
    for (int i = 0; i < d.num_shards; i++)
        crc = crc32(crc, d.shards[i].tokens, (size_t)d.shards[i].count * sizeof(uint16_t));
    must_agree(crc, what);
    must_agree(d.separator, "--answers-after");
}

// Each option of train, except threads, and files: there what is in them counts, not their names.
static void must_agree_on_options(void) {
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const void *value = options[i].value;
        const char *argument = options[i].argument;
        int is_file = !strcmp(argument, "FILE") || !strcmp(argument, "FILES") ||
            !strcmp(argument, "FOLDER");
        if (!(options[i].commands & TRAIN) || is_file || value == &opt_threads) continue;
        size_t size = sizeof(int);
        if (options[i].type == REAL) size = sizeof(double);
        if (options[i].type == SEED) size = sizeof(uint64_t);
        if (options[i].type == TEXT) {
            value = *(const char *const *)value;
            size = value ? strlen((const char *)value) : 0;
        }
        char name[32];
        snprintf(name, sizeof name, "--%s", options[i].name);
        must_agree(crc32(0, value, size), name);
    }
}

static void must_agree_on_parameters(const Model *m) {
    if (ranks == 1) return;
    const Tensors *params = &m->params;
    const size_t piece = 1 << 20;
    float *copy = (float *)allocate(piece, sizeof(float), "the parameters");
    uint32_t crc = 0;
    for (size_t i = 0; i < params->total; i += piece) {
        size_t size = params->total - i < piece ? params->total - i : piece;
        read_memory(copy, params->data + i, size * sizeof(float));
        crc = crc32(crc, copy, size * sizeof(float));
    }
    free(copy);
    must_agree(crc, "parameters: are the machines of different kinds?");
}

// A sum of gradients is right only if all have the same options, text and parameters.
static void processes_check(const Training *t) {
    if (ranks == 1) return;
    must_agree_on_options();
    must_agree(crc32(0, products, strlen(products)), "--precision, or kind of CPU");
    must_agree_on_text(t->data, "text in --data");
    must_agree_on_text(t->val_data, "text in --val-data");
    must_agree(crc32(0, t->tokenizer.file, t->tokenizer.file_size), "--tokenizer");
    must_agree(t->begin, "step of the checkpoint in --out");
    must_agree_on_parameters(&t->model);
}
