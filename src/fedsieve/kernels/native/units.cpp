// The products of a mask that groups of `unit` output channels share: a vector that is loaded serves all of them.
//
// gather (forward) has sums of the group's channels in registers while the entries pass; scatter (the input's gradient)
// has the output's gradient there, and adds to the input's in memory, so that no transposed lists are needed. Entries are
// sorted by tap, so that what lies outside the map is left out.
#include <memory>
#include <vector>

#include "units.h"

namespace {

// A line of N output positions, from (h, w) on, and which taps of the kernel see lines [from, to) of the input there.
template <int N>
struct Place {
    const Gather& g;
    int y, x;
    int64_t from, to;
    Place(const Gather& g, int h, int w, int64_t from, int64_t to)
        : g(g), y(h * g.stride_in - g.padding), x(w * g.stride_in - g.padding), from(from), to(to) {}
    bool inside() const {
        return y >= from && y + g.kernel <= to && x >= 0 && x + (N - 1) * g.stride_in + g.kernel <= g.in.width;
    }
    bool within(int column) const { return column >= 0 && column < g.in.width; }
    // Calls f(first column, end, first entry, end), the columns as constants, for the taps of a group: the entries of its
    // t-th begin at first[t] and end at last[t].
    template <class F>
    INLINE void each(const int32_t* first, const int32_t* last, F&& f) const {
        for (int i = 0; i < g.kernel; i++) {
            if (y + i < from || y + i >= to) continue;
            for (int j = 0; j < g.kernel; j++) {
                const int32_t t = i * g.kernel + j, begin = first[t], end = last[t];
                if (begin == end) continue;
                const bool left = within(x + j), right = within(x + j + (N - 1) * g.stride_in);
                if (left && right) f(Number<0>{}, Number<N>{}, begin, end);
                else if (N == 2 && left) f(Number<0>{}, Number<1>{}, begin, end);
                else if (N == 2 && right) f(Number<N - 1>{}, Number<N>{}, begin, end);
            }
        }
    }
};

// Calls f(Number<N>, column) for places that cover a line.
template <class F>
INLINE void along(int width, F&& f) {
    int w = 0;
    for (; w + POSITIONS <= width; w += POSITIONS) f(Number<POSITIONS>{}, w);
    for (; w < width; w++) f(Number<1>{}, w);
}

// y[c] at N positions += the values of C rows times x.
template <int C, int N>
INLINE void gather_place(const Gather& g, const Place<N>& place, bool whole, int64_t index, const Group& group, int u,
                         const uint32_t* in, int64_t step, V (&acc)[C][N][G]) {
    const float* value = group.value + u * group.count;
    auto some = [&](auto b0, auto b1, int32_t first, int32_t last) INLINE_LAMBDA {
        for (int32_t i = first; i < last; i++) {
            const uint32_t* p = in + g.offset[i];
            const float* w = value + (i - group.first);
            V x[N][G];
            for (int b = decltype(b0)::value; b < decltype(b1)::value; b++) Fp32::read(p + b * step, x[b]);
            for (int c = 0; c < C; c++) {
                const V each = all(w[c * group.count]);
                for (int b = decltype(b0)::value; b < decltype(b1)::value; b++)
                    for (int k = 0; k < G; k++) acc[c][b][k] += each * x[b][k];
            }
        }
    };
    if (whole) some(Number<0>{}, Number<N>{}, group.first, group.last);
    else place.each(g.tap + index * g.kernel * g.kernel, g.tap + index * g.kernel * g.kernel + 1, some);
}

// Asks for what the next line of output positions looks at and this one does not: far apart, these would all be misses.
template <int N, int WRITE>
INLINE void fetch(const Place<N>& place, const Steps& in, int64_t b, const Share& channels) {
    const int stride = place.g.stride_in, y = place.y + place.g.kernel;
    if (y + stride > place.g.in.height) return;
    for (int64_t c = channels.begin; c < channels.end; c++)
        for (int r = 0; r < stride; r++)
            for (int p = 0; p < N * stride; p++)
                __builtin_prefetch(in.at(c, b) + (y + r) * in.row + (place.x + place.g.kernel - 1 + p) * WORDS, WRITE, 2);
}

// Asks for C rows of the output at the next N positions.
template <int C, int N, int WRITE>
INLINE void fetch(const Steps& out, int64_t row, int64_t b, int h, int w) {
    for (int c = 0; c < C; c++)
        for (int p = 0; p < N; p++) __builtin_prefetch(out.at(row + c, b) + h * out.row + (w + N + p) * WORDS, WRITE);
}

template <int C>
void gather_rows(const Gather& g, const Share& lines, const Share& groups) {
    const Steps in(g.in), out(g.out), add(g.add ? *g.add : g.out);
    const int64_t step = int64_t(g.stride_in) * WORDS;
    for (int64_t b = 0; b < g.in.blocks; b++)
        for (int h = 0; h < g.height; h++) {
            if (int64_t line = b * g.height + h; line < lines.begin || line >= lines.end) continue;
            const uint32_t* from = g.in.data + b * in.block + h * in.row * g.stride_in;
            along(g.width, [&](auto n, int w) INLINE_LAMBDA {
                constexpr int N = decltype(n)::value;
                const Place<N> place(g, h, w, 0, g.in.height);
                const bool whole = !g.tap || place.inside();
                for (int64_t i = groups.begin; i < groups.end; i++) {
                    const Group group(g, i);
                    fetch<N, 0>(place, in, b, Share(g.in.channels, int(i - groups.begin), int(groups.end - groups.begin)));
                    rows_of<C>(group, [&](int u) INLINE_LAMBDA {
                        fetch<C, N, 1>(out, group.row + u, b, h, w);
                        V acc[C][N][G];
                        for (int c = 0; c < C; c++)
                            for (int p = 0; p < N; p++)
                                for (int k = 0; k < G; k++) acc[c][p][k] = all(g.bias ? g.bias[group.row + u + c] : 0.0f);
                        gather_place<C, N>(g, place, whole, i, group, u, from + w * step, step, acc);
                        for (int c = 0; c < C; c++)
                            for (int p = 0; p < N; p++) {
                                const int64_t at = h * out.row + (w + p) * WORDS;
                                V* y = acc[c][p];
                                if (g.add) {
                                    V more[G];
                                    Fp32::read(add.at(group.row + u + c, b) + h * add.row + (w + p) * WORDS, more);
                                    for (int k = 0; k < G; k++) y[k] += more[k];
                                }
                                for (int k = 0; k < G && g.relu; k++) y[k] = rectified(y[k], g.relu);
                                Fp32::write(out.at(group.row + u + c, b) + at, y);
                            }
                    });
                }
            });
        }
}

// Which entries of each group and tap are of the input channels [begin, end): [groups * area] beginnings and ends.
struct Channels {
    std::vector<int32_t> first, last;
    Channels(const Gather& g, int64_t begin, int64_t end) {
        const int64_t line = Steps(g.in).row, channel = Steps(g.in).channel;
        const int64_t n = groups_of(g) * g.kernel * g.kernel;
        first.resize(n), last.resize(n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t t = i % (g.kernel * g.kernel), border = g.in.halo - g.padding;
            const int64_t shift = (border + t / g.kernel) * line + (border + t % g.kernel) * WORDS;
            auto at = [&](int64_t c) {
                const int32_t *from = g.offset + g.tap[i], *to = g.offset + g.tap[i + 1];
                return int32_t(std::lower_bound(from, to, c * channel + shift) - g.offset);
            };
            first[i] = at(begin), last[i] = at(end);
        }
    }
};

// x at N positions += the values of C rows times y there.
template <int C, int N, class B0, class B1>
INLINE void scatter_entries(const Gather& g, const Group& group, int u, uint32_t* in, int64_t step,
                            const V (&y)[C][N][G], B0, B1, int32_t first, int32_t last) {
    const float* value = group.value + u * group.count;
    for (int32_t i = first; i < last; i++) {
        uint32_t* p = in + g.offset[i];
        const float* w = value + (i - group.first);
        V x[N][G];
        for (int b = B0::value; b < B1::value; b++) Fp32::read(p + b * step, x[b]);
        for (int c = 0; c < C; c++) {
            const V each = all(w[c * group.count]);
            for (int b = B0::value; b < B1::value; b++)
                for (int k = 0; k < G; k++) x[b][k] += each * y[c][b][k];
        }
        for (int b = B0::value; b < B1::value; b++) Fp32::write(p + b * step, x[b]);
    }
}

template <int C>
void scatter_rows(const Gather& g, const Home& home, const Channels* own, bool clear) {
    const Share& lines = home.lines;
    const Steps in(g.in), out(g.out);
    const int64_t step = int64_t(g.stride_in) * WORDS, groups = groups_of(g);
    const int area = g.kernel * g.kernel;
    for (int64_t b = 0; b < g.in.blocks; b++) {
        const int64_t from = std::max<int64_t>(lines.begin - b * g.in.height, 0);
        const int64_t to = std::min<int64_t>(lines.end - b * g.in.height, g.in.height);
        int64_t cleared = from;  // lines are set to zero shortly before something is added to them
        auto clear_to = [&](int64_t end) {
            for (; clear && cleared < std::min(end, to); cleared++)
                for (int64_t c = home.channels.begin; c < home.channels.end; c++)
                    memset(in.at(c, b) + cleared * in.row, 0, sizeof(uint32_t) * g.in.width * WORDS);
        };
        for (int h = 0; h < g.height && from < to; h++) {
            clear_to(h * g.stride_in - g.padding + g.kernel);
            uint32_t* x = g.in.data + b * in.block + h * in.row * g.stride_in;
            along(g.width, [&](auto n, int w) INLINE_LAMBDA {
                constexpr int N = decltype(n)::value;
                const Place<N> place(g, h, w, from, to);
                if (place.y + g.kernel <= from || place.y >= to) return;
                const bool whole = !own && place.inside();
                for (int64_t i = 0; i < groups; i++) {
                    const Group group(g, i);
                    fetch<N, 1>(place, in, b, Share(g.in.channels, int(i), int(groups)));
                    rows_of<C>(group, [&](int u) INLINE_LAMBDA {
                        fetch<C, N, 0>(out, group.row + u, b, h, w);
                        V y[C][N][G];
                        for (int c = 0; c < C; c++)
                            for (int p = 0; p < N; p++)
                                Fp32::read(out.at(group.row + u + c, b) + h * out.row + (w + p) * WORDS, y[c][p]);
                        auto some = [&](auto b0, auto b1, int32_t first, int32_t last) INLINE_LAMBDA {
                            scatter_entries<C, N>(g, group, u, x + w * step, step, y, b0, b1, first, last);
                        };
                        const int32_t* tap = g.tap + i * area;
                        if (whole) some(Number<0>{}, Number<N>{}, group.first, group.last);
                        else if (own) place.each(&own->first[i * area], &own->last[i * area], some);
                        else place.each(tap, tap + 1, some);
                    });
                }
            });
        }
        clear_to(to);
    }
}

}  // namespace

void gather_units(const Gather& g, int thread, int threads) {
    const Home home(g.out, thread, threads);
    const Share all(groups_of(g), 0, 1), groups = home.by_line ? all : by_work(g, thread, threads);
    sizes(g, [&](auto c) { gather_rows<decltype(c)::value>(g, home.lines, groups); });
    const int64_t end = std::min<int64_t>(groups.end * g.unit, g.rows);
    for (int64_t r = groups.begin * g.unit; r < end && g.out.halo; r++) zero_halo(g.out, r, home.lines);
}

void scatter(const Scatter& s, int thread, int threads) {
    const Gather& g = s.of;
    const Home home(g.in, thread, threads);
    for (int64_t c = home.channels.begin; c < home.channels.end && !s.accumulate; c++) zero_halo(g.in, c, home.lines);
    bool clear = !s.accumulate;
    std::unique_ptr<Channels> own;
    if (!home.by_line && threads > 1) own.reset(new Channels(g, home.channels.begin, home.channels.end));
    sizes(g, [&](auto c) {
        scatter_rows<decltype(c)::value>(g, home, own.get(), clear);
        clear = false;
    });
}
