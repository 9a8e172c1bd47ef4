// SWAT's backward pass: the gradient of all weights from the activations kept, and the step along it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cut.h"
#include "taps.h"
#include "vec.h"

namespace {

// acc[t] += value * gradient at the entry's position, moved by shift[t]: for the taps that one parity reaches.
template <int T>
INLINE void products(const int32_t* position, const float* value, int64_t n, const float* gradient,
                     const int64_t* shift, V (*acc)[B]) {
    V sum[T][B];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < B; v++) sum[t][v] = acc[t][v];
    for (int64_t i = 0; i < n; i++) {
        const float* g = gradient + position[i];
        V a = all(value[i]);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < B; v++) sum[t][v] += a * load(g + shift[t] + v * L);
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < B; v++) acc[t][v] = sum[t][v];
}

void dispatch(int taps, const int32_t* position, const float* value, int64_t n, const float* gradient,
              const int64_t* shift, V (*acc)[B]) {
    switch (taps) {
        case 1: return products<1>(position, value, n, gradient, shift, acc);
        case 2: return products<2>(position, value, n, gradient, shift, acc);
        case 3: return products<3>(position, value, n, gradient, shift, acc);
        case 4: return products<4>(position, value, n, gradient, shift, acc);
        case 5: return products<5>(position, value, n, gradient, shift, acc);
        case 6: return products<6>(position, value, n, gradient, shift, acc);
        case 7: return products<7>(position, value, n, gradient, shift, acc);
        case 8: return products<8>(position, value, n, gradient, shift, acc);
        case 9: return products<9>(position, value, n, gradient, shift, acc);
    }
}

// Notes which weights of a block nearly reach the threshold, as they are written in order: see Noted.
struct Noting {
    const Noted& to;
    const int64_t each;
    const uint32_t least;
    uint32_t* mark = nullptr;
    float *value = nullptr, *begin = nullptr;
    bool fits = false;
    explicit Noting(const Noted& to, int64_t each)
        : to(to), each(each), least(to.marks ? Near::least(to.threshold[0], WEIGHTS) : 0) {}

    void start(int64_t block) {
        if (!to.marks) return;
        mark = to.marks + block * each;
        value = begin = to.value + block * (to.room + LANES);
        fits = true;
    }

    // Before `rows` entries of all lanes are written.
    void expect(int64_t rows) {
        fits = fits && value - begin + rows * LANES <= to.room;
    }

    INLINE void note(V x, int v) {
        if (!fits) return;
        const unsigned m = marks(reaches(x, least));
        *mark = v == 0 ? m : *mark | m << (v * L);
        value = packed(value, x, m);
        mark += v == B - 1;
    }

    void end(int64_t block) {
        if (to.marks) to.count[block] = fits ? int32_t(value - begin) : -1;
    }
};

// A square of L samples (rows) by L channels (columns), turned round.
INLINE void turn(const uint32_t* from, int64_t channel, int channels, float* to, int64_t sample, int samples) {
    alignas(64) float x[L][L];
    for (int c = 0; c < L; c++)
        if (c < channels) memcpy(x[c], from + c * channel, 4 * L); else memset(x[c], 0, 4 * L);
    for (int n = 0; n < samples; n++) {
        V row;
        for (int c = 0; c < L; c++) row[c] = x[c][n];
        store(to + n * sample, row);
    }
}

void transposed(const Wide& g, int thread, int threads) {
    Steps s(g.grad);
    const int64_t line = g.grad.width + 2 * g.halo, plane = line * (g.grad.height + 2 * g.halo);
    const int64_t blocks = (g.grad.channels + LANES - 1) / LANES, samples = g.from->samples;
    Share share(blocks * g.grad.blocks, thread, threads);
    for (int64_t u = share.begin; u < share.end; u++) {
        const int64_t o = u / g.grad.blocks, b = u % g.grad.blocks;
        const int here = int(std::min<int64_t>(WORDS, samples - b * WORDS));
        if (here <= 0) continue;
        float* to = g.blocks + (o * samples + b * WORDS) * plane * LANES;
        if (g.halo) memset(to, 0, sizeof(float) * here * plane * LANES);
        for (int h = 0; h < g.grad.height; h++)
            for (int w = 0; w < g.grad.width; w++)
                for (int v = 0; v < B; v++) {
                    const int first = int(o) * LANES + v * L, n = std::min(L, g.grad.channels - first);
                    float* q = to + ((h + g.halo) * line + w + g.halo) * LANES + v * L;
                    for (int l = 0; l < here; l += L)
                        turn(s.at(first, b) + h * s.row + w * WORDS + l, s.channel, n, q + l * plane * LANES,
                             plane * LANES, std::min(L, here - l));
                }
    }
}

void multiplied(const Wide& g, int thread, int threads) {
    const Keep& k = *g.from;
    const int64_t area = int64_t(g.kernel) * g.kernel, each = k.in.channels * area;
    const int64_t blocks = (g.grad.channels + LANES - 1) / LANES, kinds = int64_t(k.stride) * k.stride;
    const Taps taps(g.kernel, k.stride, g.padding);
    std::vector<std::vector<int>> own(kinds);
    std::vector<int64_t> shift(area);
    for (int t = 0; t < area; t++) {
        own[taps.parity[t]].push_back(t);
        shift[t] = (taps.down[t] * k.line + taps.right[t]) * LANES;
    }
    float* sums = g.sums + thread * each * LANES;
    Share share(blocks, thread, threads);
    const V rate = all(g.rate), momentum = all(g.momentum), decay = all(g.decay);
    Noting noting(g.noted, each);
    for (int64_t o = share.begin; o < share.end; o++) {
        noting.start(o);
        const float* gradient = g.blocks + o * k.samples * k.plane * LANES;
        for (int group = 0; group < k.groups; group++)
            for (int64_t c = 0; c < k.in.channels; c++)
                for (int64_t kind = 0; kind < kinds; kind++) {
                    const int32_t* list = k.start + (c * k.groups + group) * kinds + kind;
                    for (size_t first = 0; first < own[kind].size(); first += 9) {
                        const int n = int(std::min<size_t>(9, own[kind].size() - first));
                        const int* tap = own[kind].data() + first;
                        V acc[9][B];
                        int64_t moved[9];
                        for (int t = 0; t < n; t++) {
                            moved[t] = shift[tap[t]];
                            for (int v = 0; v < B; v++)
                                acc[t][v] = group ? load(sums + (c * area + tap[t]) * LANES + v * L) : zero();
                        }
                        dispatch(n, k.position + list[0], k.value + list[0], list[1] - list[0], gradient, moved, acc);
                        noting.expect(n);
                        for (int t = 0; t < n; t++)
                            for (int v = 0; v < B; v++) {
                                const int64_t at = (c * area + tap[t]) * LANES + v * L, i = o * each * LANES + at;
                                V d = acc[t][v];
                                if (group + 1 < k.groups) {
                                    store(sums + at, d);
                                } else if (g.grad_out) {
                                    store(g.grad_out + i, d);
                                } else {
                                    V w = load(g.dense + i);
                                    d += decay * w;
                                    if (g.velocity) {
                                        d += momentum * load(g.velocity + i);
                                        store(g.velocity + i, d);
                                    }
                                    w -= rate * d;
                                    store(g.dense + i, w);
                                    noting.note(w, v);
                                }
                            }
                    }
                }
        noting.end(o);
    }
}

}  // namespace

void wide(const Wide& g, int thread, int threads) {
    g.phase ? multiplied(g, thread, threads) : transposed(g, thread, threads);
}
