// SWAT's activations: the largest of a map, kept as lists for the weight gradient, or as a map with zeros elsewhere.
#include <cstdint>
#include <vector>

#include "cut.h"
#include "vec.h"

namespace {

struct Activations {
    const Map& m;
    const int samples;
    const Steps s;
    Activations(const Map& m, int samples) : m(m), samples(samples), s(m) {}

    unsigned valid(int b, int g) const {
        int n = samples - b * WORDS - g * L;
        return n >= L ? ALL_LANES : n > 0 ? (1u << n) - 1 : 0;
    }

    // Calls f(vector, lanes, row, column, first lane) for a block of a channel.
    template <class F>
    INLINE void part(int64_t c, int b, F&& f) const {
        for (int g = 0; g < G; g++) {
            unsigned lanes = valid(b, g);
            if (!lanes) continue;
            for (int h = 0; h < m.height; h++) {
                const uint32_t* p = s.at(c, b) + h * s.row + g * L;
                for (int w = 0; w < m.width; w++, p += WORDS) f(load(p), lanes, h, w, g * L);
            }
        }
    }

    // Calls f(vector, lanes) for channels.
    template <class F>
    INLINE void vectors(const Share& channels, F&& f) const {
        for (int64_t c = channels.begin; c < channels.end; c++)
            for (int b = 0; b < m.blocks; b++)
                part(c, b, [&](V x, unsigned lanes, int, int, int) INLINE_LAMBDA { f(x, lanes); });
    }

    float at(int64_t i) const {  // in PyTorch's order
        int64_t area = int64_t(m.height) * m.width, n = i / (area * m.channels), c = i / area % m.channels;
        const uint32_t* p = s.at(c, n / WORDS) + i % area / m.width * s.row + i % m.width * WORDS + n % WORDS;
        float x;
        memcpy(&x, p, 4);
        return x;
    }

    int64_t place(int64_t n, int64_t c, int h, int w) const {
        return ((n * m.channels + c) * m.height + h) * m.width + w;
    }

    // near(f) gives what may be near the last threshold.
    template <class N>
    Passes cut(const Cut& c, float part, int thread, int threads, N&& near) const {
        Share share(m.channels, thread, threads);
        auto each = [&](auto&& f) INLINE_LAMBDA { vectors(share, f); };
        int64_t all = int64_t(samples) * m.channels * m.height * m.width;
        return passes(c, part, c.exact, thread, threads, all, near, each, [&](int64_t i) { return at(i); });
    }

    // The lanes of a vector that pass.
    INLINE unsigned pass(const Passes& p, V x, unsigned lanes, int64_t c, int b, int h, int w, int first) const {
        unsigned k = lanes & marks(reaches(x, p.least));
        if (p.last != INT64_MAX)
            bits_of(k, [&](int l) {
                if (magnitude(x[l]) == p.least && place(b * WORDS + first + l, c, h, w) > p.last) k &= ~(1u << l);
            });
        return k;
    }
};

// A thread's numbers that nearly reach the last threshold, in the order of the lists, with where they go if they are kept.
struct Candidates {
    const Keep& k;
    const int kinds, lists;
    uint32_t low = 0;  // all that reach this are here; 0: nothing is
    std::vector<int64_t> start;  // of each of the thread's channels
    std::vector<float>& value;
    std::vector<int32_t>&position, &list;
    int64_t count = 0;

    explicit Candidates(const Keep& k)
        : k(k), kinds(k.stride * k.stride), lists(k.groups * kinds), value(memory<float>(0)), position(memory<int32_t>(0)),
          list(memory<int32_t>(1)) {}

    template <class T>
    static std::vector<T>& memory(int which) {
        static thread_local std::vector<T> own[2];
        return own[which];
    }

    // Where a sample's numbers go: its list, of the kind 0, and its first position.
    struct Lanes {
        int32_t list[WORDS], sample[WORDS];
        Lanes(const Candidates& o, int b) {
            for (int i = 0; i < WORDS; i++) {
                list[i] = (b * WORDS + i) / o.k.group * o.kinds;
                sample[i] = (b * WORDS + i) * o.k.plane * LANES;
            }
        }
    };
    int32_t here(int h, int w) const { return (h / k.stride * k.line + w / k.stride + k.corner) * LANES; }
    int32_t kind(int h, int w) const { return h % k.stride * k.stride + w % k.stride; }

    void find(const Activations& a, const Share& share) {
        const float last = k.cut.threshold[0];
        if (!(last > 0)) return;
        low = Near::least(last, k.cut.exact ? ACTIVATIONS : 1);
        for (int64_t c = share.begin; c < share.end; c++) {
            start.push_back(count);
            for (int b = 0; b < k.in.blocks; b++) {
                const Lanes lanes_of(*this, b);
                a.part(c, b, [&](V x, unsigned lanes, int h, int w, int first) INLINE_LAMBDA {
                    const unsigned m = lanes & marks(reaches(x, low));
                    if (!m) return;
                    if (size_t(count) + L > list.size()) {
                        const size_t n = 2 * list.size() + 64 * L;
                        value.resize(n), position.resize(n), list.resize(n);
                    }
                    const I at = from<I>(lanes_of.sample + first) + here(h, w);
                    const I to = from<I>(lanes_of.list + first) + kind(h, w);
                    packed((float*)&position[count], (V)at, m), packed((float*)&list[count], (V)to, m);
                    count = packed(&value[count], x, m) - value.data();
                });
            }
        }
        start.push_back(count);
    }

    template <class T>
    static INLINE T from(const int32_t* p) { T x; memcpy(&x, p, sizeof x); return x; }

    template <class F>
    INLINE void each(F&& f) const {
        for (int64_t i = 0; i < count; i += L) f(load(&value[i]), count - i >= L ? ALL_LANES : (1u << (count - i)) - 1);
    }

    // Calls f(list, position, value) for those of the thread's i-th channel that reach `least`.
    template <class F>
    INLINE void passing(uint32_t least, int64_t i, F&& f) const {
        for (int64_t j = start[i]; j < start[i + 1]; j++)
            if (magnitude(value[j]) >= least) f(list[j], position[j], value[j]);
    }
};

// Calls f(list, position, value) for what passes, of a channel: the i-th of the thread's.
template <class F>
INLINE void passing(const Activations& a, const Candidates& near, const Passes& p, int64_t c, int64_t i, F&& f) {
    if (near.low && p.least >= near.low && p.last == INT64_MAX) return near.passing(p.least, i, f);
    for (int b = 0; b < near.k.in.blocks; b++) {
        const Candidates::Lanes of(near, b);
        a.part(c, b, [&](V x, unsigned lanes, int h, int w, int first) INLINE_LAMBDA {
            bits_of(a.pass(p, x, lanes, c, b, h, w, first), [&](int l) INLINE_LAMBDA {
                f(of.list[first + l] + near.kind(h, w), of.sample[first + l] + near.here(h, w), x[l]);
            });
        });
    }
}

}  // namespace

void keep(const Keep& k, int thread, int threads) {
    Activations a(k.in, k.samples);
    Share share(k.in.channels, thread, threads);
    Candidates near(k);
    near.find(a, share);
    const Passes p = a.cut(k.cut, ACTIVATIONS, thread, threads, [&](auto&& f) INLINE_LAMBDA { near.each(f); });
    const int lists = near.lists;
    for (int64_t c = share.begin; c < share.end; c++) {
        int32_t* n = k.start + 1 + c * lists;
        memset(n, 0, sizeof(int32_t) * lists);
        passing(a, near, p, c, c - share.begin, [&](int32_t list, int32_t, float) INLINE_LAMBDA { n[list]++; });
    }
    barrier();
    if (thread == 0) {
        k.start[0] = 0;
        for (int64_t i = 0, all = int64_t(k.in.channels) * lists; i < all; i++) k.start[i + 1] += k.start[i];
        *k.cut.found = k.start[int64_t(k.in.channels) * lists];
    }
    barrier();
    std::vector<int32_t> next(lists);
    for (int64_t c = share.begin; c < share.end; c++) {
        memcpy(next.data(), k.start + c * lists, sizeof(int32_t) * lists);
        passing(a, near, p, c, c - share.begin, [&](int32_t list, int32_t position, float value) INLINE_LAMBDA {
            const int32_t at = next[list]++;
            k.position[at] = position, k.value[at] = value;
        });
    }
}

void prune(const Prune& k, int thread, int threads) {
    Activations a(k.in, k.samples);
    Share share(k.in.channels, thread, threads);
    Passes p = a.cut(k.cut, ACTIVATIONS, thread, threads, [&](auto&& f) INLINE_LAMBDA { a.vectors(share, f); });
    Steps to(k.out);
    int64_t found = 0;
    if (thread == 0) *k.cut.found = 0;
    barrier();
    for (int64_t c = share.begin; c < share.end; c++) {
        for (int b = 0; b < k.in.blocks; b++)
            a.part(c, b, [&](V x, unsigned lanes, int h, int w, int first) INLINE_LAMBDA {
                unsigned m = a.pass(p, x, lanes, c, b, h, w, first);
                found += __builtin_popcount(m);
                V kept = select(reaches(x, p.least), x, zero());
                if (m != marks(reaches(x, p.least)))
                    for (int l = 0; l < L; l++) kept[l] = m >> l & 1 ? x[l] : 0.0f;
                store(to.at(c, b) + h * to.row + w * WORDS + first, kept);
            });
        for (int b = 0; b < k.in.blocks; b++)
            for (int g = 0; g < G; g++)
                if (!a.valid(b, g))
                    for (int h = 0; h < k.in.height; h++)
                        for (int w = 0; w < k.in.width; w++)
                            store(to.at(c, b) + h * to.row + w * WORDS + g * L, zero());
        zero_halo(k.out, c);
    }
    __atomic_fetch_add(k.cut.found, found, __ATOMIC_RELAXED);
}
