// The entry point: a list of operations, run by one team of threads with a barrier after each.
#ifdef _OPENMP
#include <omp.h>
#endif
#include "vec.h"

#ifndef FS_ISA
#define FS_ISA "unknown"
#endif

const char* fs_isa(void) { return FS_ISA; }

int fs_abi(void) { return 2; }

int64_t fs_size(int kind) {
    static const int64_t sizes[KINDS] = {sizeof(Gather), sizeof(Dot), sizeof(Norm), sizeof(NormBackward),
                                         sizeof(Pool), sizeof(Copy), sizeof(Pack), sizeof(Loss),
                                         sizeof(Sgd), sizeof(Top), sizeof(Keep), sizeof(Prune),
                                         sizeof(Wide), sizeof(Take), sizeof(Convolution), sizeof(Window),
                                         sizeof(Linear)};
    return kind >= 0 && kind < KINDS ? sizes[kind] : 0;
}

static void one(const Op& op, int thread, int threads) {
    switch (op.kind) {
        case GATHER: return gather(*(const Gather*)op.args, thread, threads);
        case DOT: return dot(*(const Dot*)op.args, thread, threads);
        case NORM: return norm(*(const Norm*)op.args, thread, threads);
        case NORM_BACKWARD: return norm_backward(*(const NormBackward*)op.args, thread, threads);
        case POOL: return pool(*(const Pool*)op.args, thread, threads);
        case COPY: return copy(*(const Copy*)op.args, thread, threads);
        case PACK: return pack(*(const Pack*)op.args, thread, threads);
        case LOSS: return loss(*(const Loss*)op.args, thread, threads);
        case SGD: return sgd(*(const Sgd*)op.args, thread, threads);
        case TOP: return top(*(const Top*)op.args, thread, threads);
        case KEEP: return keep(*(const Keep*)op.args, thread, threads);
        case PRUNE: return prune(*(const Prune*)op.args, thread, threads);
        case WIDE: return wide(*(const Wide*)op.args, thread, threads);
        case TAKE: return take(*(const Take*)op.args, thread, threads);
        case CONVOLUTION: return convolution(*(const Convolution*)op.args, thread, threads);
        case WINDOW: return window(*(const Window*)op.args, thread, threads);
        case LINEAR: return linear(*(const Linear*)op.args, thread, threads);
    }
}

void fs_run(const Op* ops, int64_t count, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        for (int64_t i = 0; i < count; i++) {
            one(ops[i], omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
        }
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
