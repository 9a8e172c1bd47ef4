// One sample alone: the lanes are neighbouring positions. A map is [channels][height * width] floats, features are one
// row of floats. A convolution is a gather once its input is unfolded.
//
// Each thread unfolds for itself: a cache line that one core writes and others read costs more than to compute it.
#include <algorithm>
#include <cmath>
#include <memory>

#include "vec.h"

namespace {

INLINE V masked(V x, const int32_t* mask) { return (V)(bits(x) & bits(load(mask))); }

template <int STEP>
INLINE V every(const float* p) {
    if constexpr (STEP == 1) {
        return load(p);
    } else {
        I even;
        for (int l = 0; l < L; l++) even[l] = 2 * l;
        return __builtin_shuffle(load(p), load(p + L), even);
    }
}

// One column and parity of a channel. What a row's last vector writes beyond it, the next row overwrites.
template <int STEP>
INLINE void unfold_rows(const Unfold& g, const float* in, int parity, int column, int first, int last,
                        const int32_t* mask, float* to) {
    for (int r = first; r < last; r++) {
        const int y = r * STEP + parity - g.padding;
        const float* from = in + int64_t(y) * g.width + column - g.padding;
        for (int w = 0, i = r * g.columns; w < g.columns; w += L, i += L)
            store(to + i, y < 0 || y >= g.height ? zero() : masked(every<STEP>(from + w * STEP), mask + i));
    }
}

// What the output positions begin ... end need of a map.
void unfold(const Unfold& g, int64_t begin, int64_t end, float* to) {
    const int parities = std::min(g.stride, g.kernel), plane = g.rows * g.columns;
    end += (g.kernel - 1) / g.stride * g.columns;
    const bool flat = g.stride == 1 && g.columns == g.width;
    const int first = begin / g.columns, last = std::min<int64_t>(g.rows, (end + g.columns - 1) / g.columns);
    for (int c = 0; c < g.channels; c++) {
        const float* in = g.in + c * g.in_channel;
        for (int j = 0; j < g.kernel; j++)
            for (int q = 0; q < parities; q++) {
                float* x = to + c * g.out_channel + (j * parities + q) * plane;
                const int32_t* mask = g.mask + (j * parities + q) * plane;
                const float* from = in - g.padding * (g.width + 1) + j;
                if (flat)
                    for (int64_t i = begin; i < std::min<int64_t>(end, plane); i += L)
                        store(x + i, masked(load(from + i), mask + i));
                else if (g.stride == 1)
                    unfold_rows<1>(g, in, q, j, first, last, mask, x);
                else
                    unfold_rows<2>(g, in, q, j, first, last, mask, x);
            }
    }
}

struct Scratch {  // a thread's own memory
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
    float* get(int64_t wanted) {
        if (wanted > size) memory.reset(new float[size = wanted]);
        return memory.get();
    }
};

}  // namespace

void convolution(const Convolution& f, int thread, int threads) {
    static thread_local Scratch scratch;
    Gather g = f.of;
    Map add;
    const bool by_position = g.width >= 4 * threads;
    Share mine(g.width, by_position ? thread : 0, by_position ? threads : 1);
    if (f.in.mask) {
        const int64_t size = f.in.channels * f.in.out_channel;
        float* x = scratch.get(size + 2 * WORDS);
        x += -(uintptr_t(x) / sizeof(float)) % WORDS;
        unfold(f.in, mine.begin * WORDS, mine.end * WORDS, x);
        g.in.data = (uint32_t*)x;
    }
    if (!by_position) return gather(g, thread, threads);
    g.width = mine.end - mine.begin;
    g.in.data += mine.begin * WORDS;
    g.out.data += mine.begin * WORDS;
    if (g.add) {
        add = *g.add;
        add.data += mine.begin * WORDS;
        g.add = &add;
    }
    gather(g, 0, 1);
}

void window(const Window& g, int thread, int threads) {
    Share channels(g.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++)
        for (int h = 0; h < g.out_height; h++) {
            float* to = g.out + c * g.out_channel + int64_t(h) * g.out_width;
            const int top = h * g.stride - g.padding, first = std::max(top, 0);
            const int last = std::min(top + g.kernel, g.height);
            std::fill(to, to + g.out_width, g.average ? 0.0f : -INFINITY);
            for (int y = first; y < last; y++) {
                const float* from = g.in + c * g.in_channel + int64_t(y) * g.width;
                for (int w = 0; w < g.out_width; w++) {
                    const int left = w * g.stride - g.padding, end = std::min(left + g.kernel, g.width);
                    for (int x = std::max(left, 0); x < end; x++) {
                        if (g.average) to[w] += from[x];
                        else if (!(from[x] <= to[w])) to[w] = from[x];
                    }
                }
            }
            for (int w = 0; g.average && w < g.out_width; w++) {
                const int left = w * g.stride - g.padding;
                const int inside = (last - first) * (std::min(left + g.kernel, g.width) - std::max(left, 0));
                to[w] /= float(g.average == 1 ? g.kernel * g.kernel : inside);
            }
        }
}

void linear(const Linear& g, int thread, int threads) {
    Share mine(g.rows, thread, threads);
    for (int64_t r = mine.begin; r < mine.end; r++) {
        constexpr int CHAINS = 8;  // additions that need not wait for each other
        float s[CHAINS] = {};
        int64_t i = g.row[r], end = g.row[r + 1];
        for (; i + CHAINS <= end; i += CHAINS)
            for (int k = 0; k < CHAINS; k++) s[k] += g.value[i + k] * g.x[g.index[i + k]];
        for (; i < end; i++) s[0] += g.value[i] * g.x[g.index[i]];
        float y = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
        y += (g.bias ? g.bias[r] : 0) + (g.add ? g.add[r] : 0);
        g.y[r] = g.relu && y <= 0 ? 0 : y;
    }
}
