// The step of Adam on the non-zeros, and what becomes of gradients before any step.
#include <algorithm>
#include <cmath>

#include "stream.h"
#include "vec.h"

namespace {

INLINE V root(V x) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x);
#elif defined(__AVX2__)
    return (V)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (V)_mm_sqrt_ps((__m128)x);
#else
    V y = zero();
    for (int l = 0; l < L; l++) y[l] = std::sqrt(x[l]);
    return y;
#endif
}

// Each sum has one product alone: it is rounded the same wherever a number stands.
INLINE void step(const Adam& g, V& w, V& mean, V& square, V d) {
    d += g.decay * w;
    mean += g.fresh_mean * (d - mean);
    square += g.fresh_square * (d * d - square);
    w = g.keep * w - g.rate * mean / (g.root * root(square) + g.eps);
}

// Of up to L numbers.
void few(const Adam& g, int64_t i, int64_t n) {
    V w = zero(), mean = zero(), square = zero(), d = zero();
    for (int64_t l = 0; l < n; l++) {
        w[l] = g.w[i + l], mean[l] = g.mean[i + l], square[l] = g.square[i + l], d[l] = g.grad[i + l];
        if (g.power != 1 && !g.chained) d[l] *= g.power * std::pow(std::fabs(w[l]), g.power - 1);
    }
    step(g, w, mean, square, d);
    for (int64_t l = 0; l < n; l++) {
        g.w[i + l] = w[l], g.mean[i + l] = mean[l], g.square[i + l] = square[l];
        if (g.value) g.value[i + l] = g.power == 1 ? w[l] : std::copysign(std::pow(std::fabs(w[l]), g.power), w[l]);
    }
}

constexpr int64_t PART = 4096;

double squares(const float* x, int64_t n) {
    double sum[16] = {}, all = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) sum[l] += double(x[i + l]) * x[i + l];
    for (; i < n; i++) all += double(x[i]) * x[i];
    for (double one : sum) all += one;
    return all;
}

}  // namespace

void adam(const Adam& g, int thread, int threads) {
    Share part(g.count, thread, threads);
    int64_t i = part.begin;
    if (g.power != 1 || g.value) {
        for (; i < part.end; i += L) few(g, i, std::min<int64_t>(L, part.end - i));
        return;
    }
    const int64_t off = int64_t(uintptr_t(g.w + i) % sizeof(V) / sizeof(float));
    const int64_t first = off ? std::min<int64_t>(L - off, part.end - i) : 0;
    if (first) few(g, i, first);
    for (i += first; i + L <= part.end; i += L) {
        V w = load(g.w + i), mean = load(g.mean + i), square = load(g.square + i);
        step(g, w, mean, square, load(g.grad + i));
        store(g.mean + i, mean);
        store(g.square + i, square);
        stream(g.w + i, w);
    }
    if (i < part.end) few(g, i, part.end - i);
    streamed();
}

void adjust(const Adjust& g, int thread, int threads) {
    Share parts((g.count + PART - 1) / PART, thread, threads);
    for (int64_t p = parts.begin; p < parts.end; p++) {
        const int64_t begin = p * PART, end = std::min(g.count, begin + PART);
        if (g.power != 1)
            for (int64_t i = begin; i < end; i++) g.grad[i] *= g.power * std::pow(std::fabs(g.w[i]), g.power - 1);
        if (g.start)
            for (int64_t i = begin; i < end; i++) g.grad[i] += g.mu * (g.w[i] - g.start[i]);
        if (g.shift)
            for (int64_t i = begin; i < end; i++) g.grad[i] += g.shift[i];
        if (g.sums) g.sums[p] = squares(g.grad + begin, end - begin);
    }
}

void clip(const Clip& g, int thread, int threads) {
    double sum = 0;
    for (int64_t p = 0; p < g.parts; p++) sum += g.sums[p];
    const double by = g.most / (std::sqrt(sum) + 1e-6);
    if (by >= 1) return;
    Share part(g.count, thread, threads);
    for (int64_t i = part.begin; i < part.end; i++) g.grad[i] *= float(by);
}
