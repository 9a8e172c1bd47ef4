// The largest numbers of many: a cut's threshold, and what passes it.
//
// A threshold is found by counting: three passes over the bits of |x|, 11 and 10 and 10 of them, each pass a histogram
// of those that agree with what is known so far.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int BUCKETS = 2048, COPIES = 4;
constexpr unsigned ALL_LANES = ~0u >> (32 - L);

INLINE U magnitude(V x) { return (U)x & 0x7fffffffu; }
INLINE uint32_t magnitude(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u & 0x7fffffffu;
}
INLINE float real(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
INLINE I reaches(V x, uint32_t least) { return (I)(magnitude(x) >= least); }

// What passes a cut: |x| above `least`, or equal to it and not later than `last` in PyTorch's order.
struct Passes {
    uint32_t least;
    int64_t last;
};

// The count-th largest |x|, at least the smallest number above 0; *above: how many are strictly larger, *ties: equal.
// each(f) calls f(vector, lanes that count) for the thread's share.
template <class Each>
static uint32_t select_least(const Cut& c, int thread, int threads, Each&& each, int64_t* above, int64_t* ties) {
    const int shifts[3] = {20, 10, 0}, sizes[3] = {2048, 1024, 1024};
    uint32_t known = 0;
    int64_t left = c.count;
    for (int p = 0; p < 3; p++) {
        uint32_t* own = c.work + int64_t(thread) * COPIES * BUCKETS;
        memset(own, 0, sizeof(uint32_t) * COPIES * BUCKETS);
        const int shift = shifts[p];
        const uint32_t size = sizes[p], high = p ? ~uint32_t(0) << shifts[p - 1] : 0;
        each([&](V x, unsigned lanes) INLINE_LAMBDA {
            U u = magnitude(x);
            unsigned m = lanes & marks((I)(u != 0u));
            if (p) m &= marks((I)((u & high) == known));
            for (; m; m &= m - 1) {
                int l = __builtin_ctz(m);
                own[(l % COPIES) * BUCKETS + (uint32_t(u[l]) >> shift & (size - 1))]++;
            }
        });
        barrier();
        int64_t sum = 0;
        int bucket = int(size) - 1;
        for (; bucket >= 0; bucket--) {
            int64_t here = 0;
            for (int i = 0; i < threads * COPIES; i++) here += c.work[int64_t(i) * BUCKETS + bucket];
            if (sum + here >= left || bucket == 0) {
                *ties = here;
                break;
            }
            sum += here;
        }
        left -= sum;
        known |= uint32_t(bucket) << shift;
        barrier();
    }
    *above = c.count - left;
    return std::max(known, uint32_t(1));
}

// Finds the cut's threshold, or takes up the last one. at(i) gives the i-th number in PyTorch's order, of `all`.
template <class Each, class At>
static Passes passes(const Cut& c, bool exact, int thread, int threads, int64_t all, Each&& each, At&& at) {
    if (!exact) return {std::max(magnitude(c.threshold[0]), uint32_t(1)), INT64_MAX};
    int64_t above = 0, ties = 0;
    Passes p{select_least(c, thread, threads, each, &above, &ties), INT64_MAX};
    if (above + ties > c.count) {
        int64_t more = c.count - above;
        for (p.last = 0; p.last < all; p.last++)
            if (magnitude(at(p.last)) == p.least && --more == 0) break;
    }
    if (thread == 0) c.threshold[0] = real(p.least);
    return p;
}

template <class F>
INLINE void bits_of(unsigned m, F&& f) {
    for (; m; m &= m - 1) f(__builtin_ctz(m));
}
