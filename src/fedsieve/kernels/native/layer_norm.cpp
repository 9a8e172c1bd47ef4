// LayerNorm and RMSNorm: lanes are tokens, so that each vector of them is normalised by itself, over the channels.
#include <algorithm>
#include <cmath>
#include <vector>

#include "sums.h"

namespace {

constexpr int WIDE = L / 4;  // columns of 16 words that are worked at once
constexpr int PARTS = 8;     // of the columns, each with sums of its own: the same for any number of threads

INLINE V invstd_of(V variance, float eps) {
    V y;
    for (int l = 0; l < L; l++) y[l] = 1 / std::sqrt(variance[l] + eps);
    return y;
}

template <class S, int N>
struct Columns {  // N columns of a map, from column w
    static constexpr int K = N * S::K;
    Steps steps;
    int64_t begin;
    Columns(const Map& m, int64_t w) : steps(m), begin(w * WORDS) {}
    INLINE uint32_t* at(int64_t c) const { return steps.at(c, 0) + begin; }
    INLINE void read(int64_t c, V* x) const {
        for (int i = 0; i < N; i++) S::read(at(c) + i * WORDS, x + i * S::K);
    }
    INLINE void fetch_next(int64_t c) const {  // of the columns behind these
        for (int i = N; i < 2 * N; i++) __builtin_prefetch(at(c) + i * WORDS, 0, 2);
    }
    INLINE void write(int64_t c, const V* x) const {
        for (int i = 0; i < N; i++) S::write(at(c) + i * WORDS, x + i * S::K);
    }
};

// Calls f(integral constant N, column) for N columns of a part at a time.
template <class F>
INLINE void each_column(const Map& m, int64_t part, F&& f) {
    const Share columns(m.width, int(part), PARTS);
    int64_t w = columns.begin;
    for (; w + WIDE <= columns.end; w += WIDE) f(std::integral_constant<int, WIDE>{}, w);
    for (; w < columns.end; w++) f(std::integral_constant<int, 1>{}, w);
}

template <class S, int N>
void normalise(const LayerNorm& n, int64_t w) {
    using Part = Columns<S, N>;
    constexpr int K = Part::K;
    const Part from(n.x, w), to(n.out, w);
    const int64_t channels = n.x.channels, lane = w * S::K * L;
    const V share = all(1.0f / float(channels));
    V mean[K], square[K], rest[K], x[K];
    for (int k = 0; k < K; k++) mean[k] = square[k] = rest[k] = zero();
    if (!n.rms) {
        for (int64_t c = 0; c < channels; c++) {
            from.read(c, x);
            for (int k = 0; k < K; k++) mean[k] += x[k];
        }
        for (int k = 0; k < K; k++) mean[k] *= share;
    }
    for (int64_t c = 0; c < channels; c++) {
        from.read(c, x), from.fetch_next(c);
        for (int k = 0; k < K; k++) {
            const V d = x[k] - mean[k];
            rest[k] += d, square[k] += d * d;
        }
    }
    V invstd[K];
    for (int k = 0; k < K; k++) {
        if (n.rms) rest[k] = zero();
        rest[k] *= share;
        mean[k] += rest[k];
        invstd[k] = invstd_of(square[k] * share - rest[k] * rest[k], n.eps);
        if (!n.rms) store(n.mean + lane + k * L, mean[k]);
        store(n.invstd + lane + k * L, invstd[k]);
    }
    for (int64_t c = 0; c < channels; c++) {
        const V gamma = all(n.gamma ? n.gamma[c] : 1), beta = all(n.beta ? n.beta[c] : 0);
        from.read(c, x), to.fetch_next(c);
        for (int k = 0; k < K; k++) x[k] = (x[k] - mean[k]) * invstd[k] * gamma + beta;
        to.write(c, x);
    }
}

// Of N columns; adds what its lanes add to the gradients of gamma and beta to sums[channels][2][L].
template <class S, int N>
void gradient(const LayerNormBackward& g, int64_t w, float* sums) {
    using Part = Columns<S, N>;
    constexpr int K = Part::K;
    const LayerNorm& n = g.of;
    const Part xs(n.x, w), grads(g.grad, w), to(g.grad_x, w);
    const int64_t channels = n.x.channels, lane = w * S::K * L;
    const V share = all(1.0f / float(channels));
    V mean[K], invstd[K], along[K], across[K], x[K], d[K];
    for (int k = 0; k < K; k++) {
        mean[k] = n.rms ? zero() : load(n.mean + lane + k * L);
        invstd[k] = load(n.invstd + lane + k * L);
        along[k] = across[k] = zero();
    }
    for (int64_t c = 0; c < channels; c++) {
        const V gamma = all(n.gamma ? n.gamma[c] : 1);
        V to_gamma = zero(), to_beta = zero();
        xs.read(c, x), grads.read(c, d), to.fetch_next(c);
        for (int k = 0; k < K; k++) {
            const V product = d[k] * ((x[k] - mean[k]) * invstd[k]);
            to_gamma += product, to_beta += d[k];
            across[k] += product * gamma, along[k] += d[k] * gamma;
        }
        float* to_sums = sums + 2 * c * L;
        store(to_sums, load(to_sums) + to_gamma);
        store(to_sums + L, load(to_sums + L) + to_beta);
    }
    for (int k = 0; k < K; k++) {
        along[k] = n.rms ? zero() : along[k] * share;
        across[k] *= share * invstd[k];
    }
    for (int64_t c = 0; c < channels; c++) {
        const V gamma = all(n.gamma ? n.gamma[c] : 1);
        xs.read(c, x), grads.read(c, d), xs.fetch_next(c), grads.fetch_next(c);
        for (int k = 0; k < K; k++) d[k] = (d[k] * gamma - along[k] - (x[k] - mean[k]) * across[k]) * invstd[k];
        to.write(c, d);
    }
}

template <class S>
void forward(const LayerNorm& n, int thread, int threads) {
    const Share parts(PARTS, thread, threads);
    for (int64_t part = parts.begin; part < parts.end; part++)
        each_column(n.x, part, [&](auto wide, int64_t w) { normalise<S, decltype(wide)::value>(n, w); });
}

// Memory of one thread's, for all of its team.
float* shared_memory(size_t count, int thread, int threads) {
    thread_local std::vector<float> own;
    float* p = nullptr;
    if (thread == 0) {
        if (own.size() < count) own.resize(count);
        p = own.data();
    }
    if (threads == 1) return p;
    if (thread == 0) memcpy(desk(0, false), &p, sizeof p);
    barrier();
    memcpy(&p, desk(0, false), sizeof p);
    return p;
}

template <class S>
void backward(const LayerNormBackward& g, int thread, int threads) {
    const int64_t channels = g.of.x.channels;
    const size_t numbers = size_t(2 * channels);
    float* of_parts = shared_memory(PARTS * numbers, thread, threads);
    thread_local std::vector<float> of_lanes;
    const Share parts(PARTS, thread, threads), mine(channels, thread, threads);
    for (int64_t part = parts.begin; part < parts.end; part++) {
        of_lanes.assign(numbers * L, 0.0f);
        each_column(g.grad, part, [&](auto wide, int64_t w) {
            gradient<S, decltype(wide)::value>(g, w, of_lanes.data());
        });
        float* to = of_parts + part * numbers;
        std::fill(to, to + numbers, 0.0f);
        Sums sums(to);
        for (size_t i = 0; i < numbers; i++) sums.put(load(&of_lanes[i * L]));
        sums.finish();
    }
    if (threads > 1) barrier();
    for (int64_t c = mine.begin; c < mine.end; c++) {
        float total[2] = {};
        for (int part = 0; part < PARTS; part++)
            for (int i = 0; i < 2; i++) total[i] += of_parts[part * numbers + 2 * c + i];
        if (g.grad_gamma) g.grad_gamma[c] = total[0];
        if (g.grad_beta) g.grad_beta[c] = total[1];
    }
}

}  // namespace

void layer_norm(const LayerNorm& n, int thread, int threads) {
    n.x.packed ? forward<Bf16>(n, thread, threads) : forward<Fp32>(n, thread, threads);
}

void layer_norm_backward(const LayerNormBackward& g, int thread, int threads) {
    g.of.x.packed ? backward<Bf16>(g, thread, threads) : backward<Fp32>(g, thread, threads);
}
