// Sums over the lanes of many vectors at once.
#pragma once
#include "vec.h"

// In groups of N lanes that stand for one sum: the lower (or higher) half of a's, and then that of b's.
template <int N, bool HIGH>
struct Half {
    static constexpr int at(int l) {
        const int half = N / 2, within = l % N, own = l - within + within % half + (HIGH ? half : 0);
        return within < half ? own : L + own;
    }
};

// The sum over the lanes of the vectors p[0] ... p[L - 1], as one vector: a tree of shuffles.
template <int N>
INLINE V sums(const V* p) {
    if constexpr (N == 1) {
        return p[0];
    } else {
        V half[N / 2];
        for (int i = 0; i < N / 2; i++) {
            V a = p[i], b = p[i + N / 2];
            half[i] = shuffled<Half<N, false>>(a, b) + shuffled<Half<N, true>>(a, b);
        }
        return sums<N / 2>(half);
    }
}

// Adds vectors' sums over their lanes to consecutive numbers, L at a time.
struct Sums {
    float* to;
    int n = 0;
    V p[L];
    explicit Sums(float* to) : to(to) {}
    INLINE void put(V x) {
        p[n++] = x;
        if (n < L) return;
        store(to, load(to) + sums<L>(p));
        to += L, n = 0;
    }
    INLINE void finish() {
        for (int j = n; j < L; j++) p[j] = zero();
        V s = sums<L>(p);
        for (int j = 0; j < n; j++) to[j] += s[j];
    }
};
