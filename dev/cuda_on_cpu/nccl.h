/*
The functions of NCCL that dev/processes.h calls, for processes on one computer whose "GPUs" are
emulated by cuda_on_cpu.h. They meet in a file that all map. Its name is the id.

Reference: NVIDIA, NCCL API. Sums are taken in the order of the ranks.
*/
#pragma once
#include <atomic>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum ncclResult_t { ncclSuccess, ncclSystemError };
enum ncclDataType_t { ncclFloat, ncclDouble };
enum ncclRedOp_t { ncclSum };
struct ncclUniqueId { char internal[128]; };

struct ncclComm {
    enum { MOST = 8, PIECE = 1 << 16 }; // processes; bytes of each that are summed at a time
    struct Meeting {
        std::atomic<int> arrived, round;
        alignas(16) char piece[MOST][PIECE];
    } *meeting;
    int rank, ranks;

    void wait_for_all() {
        int round = meeting->round;
        if (++meeting->arrived < ranks) {
            while (meeting->round == round) usleep(10);
            return;
        }
        meeting->arrived = 0; // the last one lets all go on
        meeting->round = round + 1;
    }

    template <class T> void sum(T *x, size_t n) {
        const size_t most = PIECE / sizeof(T);
        for (size_t i = 0; i < n; i += most) {
            size_t size = n - i < most ? n - i : most;
            memcpy(meeting->piece[rank], x + i, size * sizeof(T));
            wait_for_all();
            for (size_t j = 0; j < size; j++) {
                x[i + j] = 0;
                for (int r = 0; r < ranks; r++) x[i + j] += ((T *)meeting->piece[r])[j];
            }
            wait_for_all(); // nobody changes a piece that others still read
        }
    }
};
typedef ncclComm *ncclComm_t;

inline const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : "the file where processes meet";
}

inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    strcpy(id->internal, "/tmp/nccl_on_cpu_XXXXXX");
    int file = mkstemp(id->internal);
    if (file < 0 || ftruncate(file, sizeof(ncclComm::Meeting))) return ncclSystemError;
    return close(file) ? ncclSystemError : ncclSuccess;
}

inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    int file = open(id.internal, O_RDWR);
    if (file < 0 || ranks > ncclComm::MOST) return ncclSystemError;
    size_t size = sizeof(ncclComm::Meeting);
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return ncclSystemError;
    close(file);
    *comm = new ncclComm{(ncclComm::Meeting *)map, rank, ranks};
    (*comm)->wait_for_all();
    if (rank == 0) unlink(id.internal);
    return ncclSuccess;
}

inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type,
                                  ncclRedOp_t, ncclComm_t comm, cudaStream_t) {
    if (from != to) return ncclSystemError; // dev/processes.h sums in place
    if (type == ncclFloat) comm->sum((float *)to, n);
    else comm->sum((double *)to, n);
    return ncclSuccess;
}

inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    delete comm;
    return ncclSuccess;
}
