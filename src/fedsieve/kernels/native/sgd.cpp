// The step on the non-zeros, and the copies that the products read.
#include <cmath>

#include "vec.h"

void sgd(const Sgd& g, int thread, int threads) {
    Share part(g.count, thread, threads);
    for (int64_t i = part.begin; i < part.end; i++) {
        float w = g.w[i], d = g.grad[i];
        if (g.power != 1) d *= g.power * std::pow(std::fabs(w), g.power - 1);
        d += g.decay * w;
        if (g.velocity) d = g.velocity[i] = g.momentum * g.velocity[i] + d;
        w -= g.rate * d;
        g.w[i] = w;
        if (g.value) g.value[i] = g.power == 1 ? w : std::copysign(std::pow(std::fabs(w), g.power), w);
    }
}

void take(const Take& g, int thread, int threads) {
    Share part(g.count, thread, threads);
    for (int64_t i = part.begin; i < part.end; i++) g.value[i] = g.dense[g.index[i]];
}
