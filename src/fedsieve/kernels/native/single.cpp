// One sample alone: the lanes are neighbouring positions. A map is [channels][height * width] floats, features are one
// row of floats. A convolution is a gather once its input is unfolded.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "vec.h"

namespace {

struct Columns {  // of an unfolded row: those that lie inside the map
    int begin, end;
    Columns(const Unfold& g, int shift) {
        begin = std::clamp((shift - 1) / g.stride + (shift > 0), 0, g.columns);
        end = std::clamp((g.width - 1 + shift + g.stride) / g.stride, begin, g.columns);
    }
};

// Rows of the map's own width: one copy, and then the borders.
void shift_plane(const Unfold& g, const float* in, int shift, float* to) {
    Columns inside(g, shift);
    const int count = g.height;
    float* first = std::fill_n(to, g.padding * g.columns, 0.0f);
    memcpy(first + inside.begin, in + inside.begin - shift, sizeof(float) * (count * g.columns - std::abs(shift)));
    for (int r = 0; r < count; r++) {
        for (int w = 0; w < inside.begin; w++) first[r * g.columns + w] = 0;
        for (int w = inside.end; w < g.columns; w++) first[r * g.columns + w] = 0;
    }
    std::fill(first + count * g.columns, to + g.rows * g.columns, 0.0f);
}

// Every other number of `from`: whole vectors while `last` allows, and their rest lands on what is written later.
INLINE void halve(const float* from, const float* last, float* to, int count) {
    I even;
    for (int l = 0; l < L; l++) even[l] = 2 * l;
    int w = 0;
    for (; w < count && from + 2 * (w + L) <= last; w += L)
        store(to + w, __builtin_shuffle(load(from + 2 * w), load(from + 2 * w + L), even));
    for (; w < count; w++) to[w] = from[2 * w];
}

void pick_rows(const Unfold& g, const float* in, int parity, int shift, float* to) {
    Columns inside(g, shift);
    for (int r = 0; r < g.rows; r++, to += g.columns) {
        const int y = r * g.stride + parity - g.padding, count = inside.end - inside.begin;
        const bool empty = y < 0 || y >= g.height;
        std::fill_n(to, empty ? g.columns : inside.begin, 0.0f);
        if (empty) continue;
        const float* from = in + y * g.width + inside.begin * g.stride - shift;
        if (g.stride == 1)
            memcpy(to + inside.begin, from, sizeof(float) * count);
        else
            halve(from, in + g.height * g.width, to + inside.begin, count);
        std::fill(to + inside.end, to + g.columns, 0.0f);
    }
}

}  // namespace

void unfold(const Unfold& g, int thread, int threads) {
    Share channels(g.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++) {
        const float* in = g.in + c * g.in_channel;
        float* to = g.out + c * g.out_channel;
        for (int j = 0; j < g.kernel; j++)
            for (int q = 0; q < std::min(g.stride, g.kernel); q++, to += g.rows * g.columns) {
                const int shift = g.padding - j;
                if (g.stride == 1 && g.columns == g.width && std::abs(shift) < g.width)
                    shift_plane(g, in, shift, to);
                else
                    pick_rows(g, in, q, shift, to);
            }
    }
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
