// Sums of channels, each times a number for each place in a sequence: rotations of positions, scales, random depth.
#include "vec.h"

namespace {

template <class S>
void combined(const Combination& g, int thread, int threads) {
    constexpr int N = WORDS * S::parts, K = S::K;
    const Share own(g.out.channels, thread, threads);
    Steps in(g.in), out(g.out);
    for (int64_t c = own.begin; c < own.end; c++) {
        uint32_t* to = out.at(c, 0);
        int64_t place = 0;
        for (int64_t w = 0; w < g.out.width; w++) {
            V total[K] = {}, x[K];
            for (int64_t k = 0; k < g.terms; k++) {
                const int64_t at = k * g.out.channels + c;
                const float* factor = g.table + g.row[at] * g.stride + place;
                S::read(in.at(g.source[at], 0) + w * WORDS, x);
                for (int i = 0; i < K; i++) total[i] += x[i] * load(factor + i * L);
            }
            S::write(to + w * WORDS, total);
            place = (place + N) % g.length;
        }
    }
}

}  // namespace

void combination(const Combination& g, int thread, int threads) {
    g.in.packed ? combined<Bf16>(g, thread, threads) : combined<Fp32>(g, thread, threads);
}
