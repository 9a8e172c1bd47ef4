// The largest numbers of many: a cut's threshold, and what passes it.
//
// A threshold is found by counting: three passes over the bits of |x|, 11 and 10 and 10 of them, each pass a histogram
// of those that agree with what is known so far. From step to step a threshold moves little. So what is near the last one
// is set aside first, and what is above that is only counted; where the new threshold is not near, all are looked at.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"

constexpr int BUCKETS = 2048, COPIES = 4;
// What part of the last threshold is near it, and its inverse: of weights, which change little; of activations.
constexpr float WEIGHTS = 0.97f, ACTIVATIONS = 0.85f;
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

// What is near the last threshold: a thread's share of it.
struct Near {
    const uint32_t low, high;
    std::vector<float>& x;  // followed by room for a vector
    int64_t count = 0, above = 0;

    Near(float threshold, float part)
        : low(least(threshold, part)), high(magnitude(threshold / part)), x(memory()) {}

    static uint32_t least(float threshold, float part) { return std::max(magnitude(threshold * part), uint32_t(1)); }

    static std::vector<float>& memory() {
        static thread_local std::vector<float> own;
        return own;
    }

    INLINE void put(V value, unsigned lanes) {
        const U u = magnitude(value);
        const unsigned reach = lanes & marks((I)(u >= low));
        if (!reach) return;
        const unsigned beyond = reach & marks((I)(u >= high));
        above += __builtin_popcount(beyond);
        if (size_t(count) + L > x.size()) x.resize(2 * x.size() + 16 * L);
        count = packed(x.data() + count, value, reach & ~beyond) - x.data();
    }

    template <class F>
    INLINE void each(F&& f) const {
        for (int64_t i = 0; i < count; i += L) f(load(&x[i]), count - i >= L ? ALL_LANES : (1u << (count - i)) - 1);
    }

    // Of all threads: whether the wanted-th largest is among these; it is then the *left-th.
    bool hold(const Cut& c, int64_t wanted, int thread, int threads, int64_t* left) const {
        int64_t all = 0, larger = 0, own[2] = {count, above};
        memcpy(c.work + int64_t(thread) * COPIES * BUCKETS, own, sizeof own);
        barrier();
        for (int t = 0; t < threads; t++) {
            memcpy(own, c.work + int64_t(t) * COPIES * BUCKETS, sizeof own);
            all += own[0], larger += own[1];
        }
        barrier();
        *left = wanted - larger;
        return *left > 0 && *left <= all;
    }
};

// The left-th largest |x|, at least the smallest number above 0; *above: how many are strictly larger, *ties: equal.
// each(f) calls f(vector, lanes that count) for the thread's share.
template <class Each>
static uint32_t select_least(const Cut& c, int64_t left, int thread, int threads, Each&& each, int64_t* above,
                             int64_t* ties) {
    const int shifts[3] = {20, 10, 0}, sizes[3] = {2048, 1024, 1024};
    const int64_t wanted = left;
    uint32_t known = 0;
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
    *above = wanted - left;
    return std::max(known, uint32_t(1));
}

// Finds the cut's threshold, or takes up the last one. at(i) gives the i-th number in PyTorch's order, of `all`. every(f)
// calls f for all vectors of the thread's share; each(f) may leave out what is below that `part` of the last threshold.
template <class Each, class Every, class At>
static Passes passes(const Cut& c, float part, bool exact, int thread, int threads, int64_t all, Each&& each,
                     Every&& every, At&& at) {
    if (!exact) return {std::max(magnitude(c.threshold[0]), uint32_t(1)), INT64_MAX};
    int64_t above = 0, ties = 0, wanted = c.count;
    Passes p{0, INT64_MAX};
    Near near(c.threshold[0], part);
    if (c.threshold[0] > 0) each([&](V x, unsigned lanes) INLINE_LAMBDA { near.put(x, lanes); });
    if (near.hold(c, c.count, thread, threads, &wanted)) {
        p.least = select_least(c, wanted, thread, threads, [&](auto&& f) INLINE_LAMBDA { near.each(f); }, &above, &ties);
    } else {
        wanted = c.count;
        p.least = select_least(c, wanted, thread, threads, every, &above, &ties);
    }
    if (above + ties > wanted) {
        int64_t more = wanted - above;
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
