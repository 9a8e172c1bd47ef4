// The entry point: a list of operations, run by one team of threads with a barrier after each.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <thread>
#include <vector>

#include "vec.h"

#ifndef FS_ISA
#define FS_ISA "unknown"
#endif

const char* fs_isa(void) { return FS_ISA; }

int fs_abi(void) { return 14; }

int fs_lanes(void) { return LANES; }

int64_t fs_size(int kind) {
#define FS_SIZE(kind, type, function) sizeof(type),
    static const int64_t sizes[KINDS] = {FS_OPERATIONS(FS_SIZE)};
#undef FS_SIZE
    return kind >= 0 && kind < KINDS ? sizes[kind] : 0;
}

namespace {

// A barrier whose threads look out for one another for some microseconds and then let others run. OpenMP's own puts
// threads to sleep sooner where PyTorch keeps several teams, and waking them can cost more than an operation.
struct Team {
    const int size;
    std::atomic<int> missing;
    std::atomic<unsigned> phase{0};
    std::vector<double> desk;
    explicit Team(int size) : size(size), missing(size), desk(size_t(size) * 4 * DESK) {}

    void wait() {
        const unsigned now = phase.load(std::memory_order_relaxed);
        if (missing.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            missing.store(size, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; phase.load(std::memory_order_acquire) == now; i++) {
            if (i > 4000) std::this_thread::yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

thread_local Team* own_team = nullptr;

}  // namespace

void barrier() {
    if (own_team) own_team->wait();
}

double* desk(int thread, bool odd) { return own_team->desk.data() + (2 * thread + odd) * 2 * DESK; }

static void one(const Op& op, int thread, int threads) {
    switch (op.kind) {
#define FS_CASE(kind, type, function) \
    case kind: return function(*(const type*)op.args, thread, threads);
        FS_OPERATIONS(FS_CASE)
#undef FS_CASE
    }
}

void fs_run(const Op* ops, int64_t count, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
        Team* team = nullptr;
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            team = new Team(omp_get_num_threads());
            own_team = team;
            for (int64_t i = 0; i < count; i++) {
                one(ops[i], omp_get_thread_num(), omp_get_num_threads());
                barrier();
            }
            own_team = nullptr;
        }
        delete team;
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < count; i++) one(ops[i], 0, 1);
}

void fs_each(const Op* const* ops, const int64_t* count, int64_t lists, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t p = 0; p < lists; p++)
        for (int64_t i = 0; i < count[p]; i++) one(ops[p][i], 0, 1);
}
