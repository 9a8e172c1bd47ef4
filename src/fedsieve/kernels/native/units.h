// Groups of rows that share their entries, and how many of their channels are taken at once.
#pragma once
#include <algorithm>

#include "vec.h"

#if defined(__AVX512F__)
constexpr int CHANNELS = 8, POSITIONS = 2;  // in registers at once
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int CHANNELS = 4, POSITIONS = 1;
#else
constexpr int CHANNELS = 2, POSITIONS = 1;
#endif

template <int N> struct Number { static constexpr int value = N; };

// Rows that share their entries, `count` in each.
struct Group {
    int32_t first, last;  // entry
    int64_t count, row;   // its first row
    const float* value;
    int rows;
    Group(const Gather& g, int64_t i)
        : first(g.row[i]), last(g.row[i + 1]), count(last - first), row(i * g.unit),
          value(g.value + int64_t(g.unit) * first), rows(int(std::min<int64_t>(g.unit, g.rows - row))) {}
};

inline int64_t groups_of(const Gather& g) { return (g.rows + g.unit - 1) / g.unit; }

// Calls f(Number<C>) for C = CHANNELS and its halves, as far as some group has rows that are taken C at once.
template <int C = CHANNELS, class F>
INLINE void sizes(const Gather& g, F&& f) {
    const int rest = g.rows % g.unit;
    if (C == CHANNELS ? std::min(g.unit, g.rows) >= C : (g.unit | rest) & C) f(Number<C>{});
    if constexpr (C > 1) sizes<C / 2>(g, f);
}

// Calls f(first) for the rows of a group that are taken C at once.
template <int C, class F>
INLINE void rows_of(const Group& group, F&& f) {
    if constexpr (C == CHANNELS) {
        for (int u = 0; u + C <= group.rows; u += C) f(u);
    } else if (group.rows & C) {
        f(group.rows & ~(2 * C - 1));
    }
}

// The groups whose entries are a thread's share.
inline Share by_work(const Gather& g, int thread, int threads) {
    const int64_t n = groups_of(g), all = g.row[n] + n;
    auto cut = [&](int t) {
        int64_t i = 0;
        while (i < n && (g.row[i] + i) * int64_t(threads) < all * t) i++;
        return i;
    };
    Share s(0, 0, 1);
    s.begin = thread ? cut(thread) : 0, s.end = thread + 1 == threads ? n : cut(thread + 1);
    return s;
}
