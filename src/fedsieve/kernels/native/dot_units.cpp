// The weights' gradient of a mask that groups of output channels share: sums of a few entries stay in registers while the
// positions pass, and each vector of the output's gradient serves them all.
#include <vector>

#include "sums.h"
#include "units.h"

namespace {

#if defined(__AVX512F__)
constexpr int ENTRIES = 3;  // at once
#else
constexpr int ENTRIES = 2;
#endif
constexpr int CHUNK = 64;  // positions of a group's gradient that stay in the first cache

// What is loaded once for several products, where the compiler would load it again for each.
INLINE V loaded(const void* p) {
    V x = load(p);
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
    return x;
}

// The sums over some positions for E entries and C rows, one entry after another.
template <int C, int E>
INLINE void dot_entries(const uint32_t* const (&x)[E], const uint32_t* y, int64_t channel, int64_t x_row, int64_t y_row,
                        int64_t step, int h0, int h1, int w0, int w1, Sums& total) {
    V acc[E][C] = {};
    for (int h = h0; h < h1; h++)
        for (int w = w0; w < w1; w++)
            for (int k = 0; k < G; k++) {
                V one[E];
                for (int e = 0; e < E; e++) one[e] = load(x[e] + h * x_row + w * step + k * L);
                for (int c = 0; c < C; c++) {
                    const V g = loaded(y + c * channel + h * y_row + w * WORDS + k * L);
                    for (int e = 0; e < E; e++) acc[e][c] += g * one[e];
                }
            }
    for (int e = 0; e < E; e++)
        for (int c = 0; c < C; c++) total.put(acc[e][c]);
}

template <int C>
void dot_rows(const Dot& d, const Share& groups) {
    static thread_local std::vector<float> memory;
    const Gather& g = d.of;
    const Steps in(g.in), out(g.out);
    const int64_t x_row = in.row * g.stride_in, step = int64_t(g.stride_in) * WORDS;
    const int area = g.kernel * g.kernel, high = std::max(1, CHUNK / g.width);
    const bool small = g.tap && g.width <= CHUNK / 4;  // a border that is worth leaving out
    for (int64_t i = groups.begin; i < groups.end; i++) {
        const Group group(g, i);
        rows_of<C>(group, [&](int u) {
            memory.assign(group.count * C + L, 0.0f);
            for (int64_t b = 0; b < g.in.blocks; b++)
                for (int top = 0; top < g.height; top += high) {
                    const int bottom = std::min(top + high, g.height);
                    const uint32_t* x = g.in.data + b * in.block;
                    const uint32_t* y = out.at(group.row + u, b);
                    Sums total(memory.data());
                    auto some = [&](int32_t j, int32_t last, int h0, int h1, int w0, int w1) INLINE_LAMBDA {
                        for (; j + ENTRIES <= last; j += ENTRIES) {
                            const uint32_t* from[ENTRIES];
                            for (int e = 0; e < ENTRIES; e++) from[e] = x + g.offset[j + e];
                            dot_entries<C, ENTRIES>(from, y, out.channel, x_row, out.row, step, h0, h1, w0, w1, total);
                        }
                        for (; j < last; j++)
                            dot_entries<C, 1>({x + g.offset[j]}, y, out.channel, x_row, out.row, step, h0, h1, w0, w1, total);
                    };
                    if (!small) {
                        some(group.first, group.last, top, bottom, 0, g.width);
                    } else {
                        for (int t = 0; t < area; t++) {
                            // positions whose input is inside: top <= h < bottom, 0 <= h stride + line < height
                            auto range = [&](int tap, int size, int begin, int end, int& first, int& last) {
                                for (first = begin; first < end && first * g.stride_in + tap < 0;) first++;
                                for (last = end; last > first && (last - 1) * g.stride_in + tap >= size;) last--;
                            };
                            int h0, h1, w0, w1;
                            range(t / g.kernel - g.padding, g.in.height, top, bottom, h0, h1);
                            range(t % g.kernel - g.padding, g.in.width, 0, g.width, w0, w1);
                            some(g.tap[i * area + t], g.tap[i * area + t + 1], h0, h1, w0, w1);
                        }
                    }
                    total.finish();
                }
            float* grad = d.grad + int64_t(g.unit) * group.first + u * group.count;
            for (int64_t j = 0; j < group.count; j++)
                for (int c = 0; c < C; c++) grad[c * group.count + j] = memory[j * C + c];
        });
    }
}

}  // namespace

void dot_units(const Dot& d, int thread, int threads) {
    const Share groups = by_work(d.of, thread, threads);
    sizes(d.of, [&](auto c) { dot_rows<decltype(c)::value>(d, groups); });
}
