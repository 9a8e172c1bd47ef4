// The step on the non-zeros, and the copies that the products read.
#include <cmath>

#include "stream.h"
#include "vec.h"

namespace {

struct Step {
    float rate, momentum, decay;
    bool nesterov;
    template <class T>  // a number, or a vector of them
    INLINE void operator()(T& w, T& velocity, T d, bool moving) const {
        d += decay * w;
        if (moving) {
            velocity = momentum * velocity + d;
            d = nesterov ? d + momentum * velocity : velocity;
        }
        w -= rate * d;
    }
};

// Weights are written past the caches: all threads have just read them, and to take lines back from another core's cache
// can cost more than the way to memory.
void plain(const Sgd& g, int64_t i, int64_t end) {
    const Step step{g.rate, g.momentum, g.decay, g.nesterov != 0};
    auto one = [&](int64_t i) { step(g.w[i], g.velocity ? g.velocity[i] : g.w[i], g.grad[i], g.velocity != nullptr); };
    for (; i < end && uintptr_t(g.w + i) % sizeof(V); i++) one(i);
    for (; i + L <= end; i += L) {
        V w = load(g.w + i), velocity = g.velocity ? load(g.velocity + i) : zero();
        step(w, velocity, load(g.grad + i), g.velocity != nullptr);
        if (g.velocity) store(g.velocity + i, velocity);
        stream(g.w + i, w);
    }
    for (; i < end; i++) one(i);
    streamed();
}

}  // namespace

void sgd(const Sgd& g, int thread, int threads) {
    Share part(g.count, thread, threads);
    if (g.power == 1 && !g.value) return plain(g, part.begin, part.end);
    const Step step{g.rate, g.momentum, g.decay, g.nesterov != 0};
    for (int64_t i = part.begin; i < part.end; i++) {
        float w = g.w[i], d = g.grad[i], none = 0;
        if (g.power != 1 && !g.chained) d *= g.power * std::pow(std::fabs(w), g.power - 1);
        step(w, g.velocity ? g.velocity[i] : none, d, g.velocity != nullptr);
        g.w[i] = w;
        if (g.value) g.value[i] = g.power == 1 ? w : std::copysign(std::pow(std::fabs(w), g.power), w);
    }
}

void take(const Take& g, int thread, int threads) {
    Share part(g.count, thread, threads);
    for (int64_t i = part.begin; i < part.end; i++) g.value[i] = g.dense[g.index[i]];
}
