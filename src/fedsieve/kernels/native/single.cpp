// One sample alone: the lanes are neighbouring positions. A map is [channels][height * width] floats, features are one
// row of floats. A convolution is a gather once its input is unfolded.
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace {

void unfold_row(const Unfold& g, const float* from, int shift, float* to) {
    int begin = std::clamp((shift - 1) / g.stride + (shift > 0), 0, g.columns);  // the first column inside the map
    int end = std::clamp((g.width - 1 + shift + g.stride) / g.stride, begin, g.columns);
    if (!from) begin = end = g.columns;
    std::fill(to, to + begin, 0.0f);
    if (g.stride == 1 && begin < end) memcpy(to + begin, from + begin - shift, sizeof(float) * (end - begin));
    if (g.stride != 1)
        for (int w = begin; w < end; w++) to[w] = from[w * g.stride - shift];
    std::fill(to + end, to + g.columns, 0.0f);
}

}  // namespace

void unfold(const Unfold& g, int thread, int threads) {
    Share channels(g.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++) {
        float* to = g.out + c * g.out_channel;
        for (int j = 0; j < g.kernel; j++)
            for (int q = 0; q < std::min(g.stride, g.kernel); q++)
                for (int r = 0; r < g.rows; r++, to += g.columns) {
                    int y = r * g.stride + q - g.padding;
                    bool inside = y >= 0 && y < g.height;
                    unfold_row(g, inside ? g.in + c * g.in_channel + y * g.width : nullptr, g.padding - j, to);
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
