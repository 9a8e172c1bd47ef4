// One sample alone: the lanes are neighbouring positions. A map is [channels][height * width] floats, features are one
// row of floats. A convolution is a gather once its input is unfolded.
//
// Each thread unfolds for itself: a cache line that one core writes and others read costs more than to compute it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "vec.h"

namespace {

INLINE V masked(V x, const int32_t* mask) { return (V)(bits(x) & bits(load(mask))); }

struct Even {
    static constexpr int at(int l) { return 2 * l; }
};

template <int STEP>
INLINE V every(const float* p) {
    if constexpr (STEP == 1) {
        return load(p);
    } else {
        return shuffled<Even>(load(p), load(p + L));
    }
}

// One column and line of the kernel. What a row's last vector writes beyond it, the next row overwrites.
template <int STEP>
INLINE void unfold_rows(const Unfold& g, const float* in, int line, int column, int first, int last,
                        const int32_t* mask, float* to) {
    for (int r = first; r < last; r++) {
        const int y = r * STEP + line - g.padding;
        const float* from = in + int64_t(y) * g.width + column - g.padding;
        for (int w = 0, i = r * g.columns; w < g.columns; w += L, i += L)
            store(to + i, y < 0 || y >= g.height ? zero() : masked(every<STEP>(from + w * STEP), mask + i));
    }
}

// What the output positions begin ... end need of a map.
void unfold(const Unfold& g, int64_t begin, int64_t end, float* to) {
    const int plane = g.rows * g.columns;
    if (g.lines < g.kernel) end += (g.kernel - 1) / g.stride * g.columns;
    end = std::min<int64_t>(end, plane);
    const bool flat = g.stride == 1 && g.columns == g.width;
    const int first = begin / g.columns, last = (end + g.columns - 1) / g.columns;
    for (int c = 0; c < g.channels; c++) {
        const float* in = g.in + c * g.in_channel;
        for (int j = 0; j < g.kernel; j++)
            for (int q = 0; q < g.lines; q++) {
                float* x = to + c * g.out_channel + (j * g.lines + q) * plane;
                const int32_t* mask = g.mask + (j * g.lines + q) * plane;
                const float* from = in + (q - g.padding) * g.width + j - g.padding;
                if (flat)
                    for (int64_t i = begin; i < end; i += L)
                        store(x + i, masked(load(from + i), mask + i));
                else if (g.stride == 1)
                    unfold_rows<1>(g, in, q, j, first, last, mask, x);
                else
                    unfold_rows<2>(g, in, q, j, first, last, mask, x);
            }
    }
}

struct Scratch {  // a thread's own memory, in whole cache lines
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
    float* get(int64_t wanted) {
        if (wanted > size) memory.reset(new float[(size = wanted) + WORDS]);
        float* p = memory.get();
        return p + -(uintptr_t(p) / sizeof(float)) % WORDS;
    }
};

// One row of a pool, tap by tap: the columns are the lanes. STEP 0: any stride.
template <int STEP, bool AVERAGE>
void window_row(const Window& g, const float* in, int h, float* __restrict to) {
    const int stride = STEP ? STEP : g.stride, top = h * stride - g.padding;
    const int first = std::max(top, 0), last = std::min(top + g.kernel, g.height);
    for (int y = first; y < last; y++)
        for (int j = -g.padding; j < g.kernel - g.padding; j++) {
            const float* __restrict from = in + int64_t(y) * g.width;
            const int begin = j < 0 ? (stride - 1 - j) / stride : 0;
            const int end = std::min(g.out_width, (g.width - 1 - j + stride) / stride);
            for (int w = begin; w < end; w++) {
                const float x = from[w * stride + j];
                to[w] = AVERAGE ? to[w] + x : x > to[w] || x != x ? x : to[w];
            }
        }
    for (int w = 0; AVERAGE && w < g.out_width; w++) {
        const int left = w * stride - g.padding;
        const int inside = (last - first) * (std::min(left + g.kernel, g.width) - std::max(left, 0));
        to[w] /= float(g.average == 1 ? g.kernel * g.kernel : inside);
    }
}

template <size_t... K>
INLINE V pick(const float* x, const int32_t* index, std::index_sequence<K...>) {
    return V{x[index[K]]...};
}

INLINE float total(V x) {
    float s[L];
    store(s, x);
    for (int n = L / 2; n; n /= 2)
        for (int k = 0; k < n; k++) s[k] += s[k + n];
    return s[0];
}

}  // namespace

void convolution(const Convolution& f, int thread, int threads) {
    static thread_local Scratch scratch;
    constexpr int UNIT = 4, PART = 64;  // vectors: sums do not depend on where units are cut; a part stays in the cache
    const int width = f.of.width;
    const bool by_position = width >= UNIT * threads;
    Share units((width + UNIT - 1) / UNIT, by_position ? thread : 0, by_position ? threads : 1);
    const int64_t last = std::min<int64_t>(width, units.end * UNIT);
    for (int64_t begin = units.begin * UNIT; begin < last; begin += PART) {
        Gather g = f.of;
        g.width = std::min<int64_t>(PART, last - begin);
        const int64_t first = begin * WORDS;
        if (f.in.mask) {
            float* x = scratch.get(f.in.channels * f.in.out_channel);
            const int64_t base = first / f.in.columns * f.in.columns / WORDS * WORDS;  // of this part, the same memory
            unfold(f.in, first, first + g.width * WORDS, x - base);
            g.in.data = (uint32_t*)(x - base);
        }
        Map add = g.add ? *g.add : Map{};
        for (Map* m : {&g.in, &g.out, &add}) m->data += first;
        if (g.add) g.add = &add;
        gather(g, by_position ? 0 : thread, by_position ? 1 : threads);
    }
}

void window(const Window& g, int thread, int threads) {
    Share channels(g.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++) {
        const float* in = g.in + c * g.in_channel;
        float* to = g.out + c * g.out_channel;
        for (int h = 0; h < g.out_height; h++, to += g.out_width) {
            std::fill_n(to, g.out_width, g.average ? 0.0f : -INFINITY);
            if (g.average)
                g.stride == 1 ? window_row<1, true>(g, in, h, to) : window_row<0, true>(g, in, h, to);
            else if (g.stride == 1)
                window_row<1, false>(g, in, h, to);
            else
                g.stride == 2 ? window_row<2, false>(g, in, h, to) : window_row<0, false>(g, in, h, to);
        }
    }
}

void linear(const Linear& g, int thread, int threads) {
    Share rows(g.rows, thread, threads);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        V acc = zero();
        int32_t i = g.row[r], end = g.row[r + 1];
        for (; i + L <= end; i += L) acc += load(g.value + i) * pick(g.x, g.index + i, std::make_index_sequence<L>());
        float y = (g.bias ? g.bias[r] : 0) + (g.add ? g.add[r] : 0) + total(acc);
        for (; i < end; i++) y += g.value[i] * g.x[g.index[i]];
        g.y[r] = g.relu && y <= 0 ? 0 : g.relu == 2 && y > 6 ? 6 : y;
    }
}
