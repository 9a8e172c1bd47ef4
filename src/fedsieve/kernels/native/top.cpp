// SWAT's forward pass: a dense layer's largest weights as lists, found anew as the weights change.
//
// Everything is counted before it is written, so that the lists do not depend on the number of threads.
#include <cstdint>
#include <vector>

#include "cut.h"
#include "taps.h"
#include "vec.h"

namespace {

// The n-th bit of `bits`, where the n-th bit of `mask` that is set stands.
INLINE unsigned spread(unsigned bits, unsigned mask) {
#if defined(__BMI2__)
    return _pdep_u32(bits, mask);
#else
    unsigned m = 0;
    for (; mask; mask &= mask - 1, bits >>= 1)
        if (bits & 1) m |= mask & -mask;
    return m;
#endif
}

struct Weights {
    const Top& t;
    const int64_t area, each, blocks, kinds;
    const Taps taps;
    const uint32_t near;  // what weights were noted by: read before a new threshold is known
    explicit Weights(const Top& t)
        : t(t), area(int64_t(t.kernel) * t.kernel), each(t.in * area), blocks((t.out + LANES - 1) / LANES),
          kinds(int64_t(t.stride) * t.stride * t.in), taps(t.kernel, t.stride, t.padding),
          near(Near::least(t.cut.threshold[0], WEIGHTS)) {}

    int32_t* tally(int64_t b) const { return t.tally + b * (LANES + kinds); }

    float at(int64_t i) const {  // in PyTorch's order
        int64_t o = i / each;
        return t.dense[(o / LANES * each + i % each) * LANES + o % LANES];
    }

    // Whether all weights of a block that reach `least` are noted.
    bool known(uint32_t least, int64_t b) const {
        return t.noted.marks && t.noted.count[b] >= 0 && least >= near;
    }

    const float* noted_values(int64_t b) const { return t.noted.value + b * (t.noted.room + LANES); }

    // Calls f(entry of the row, marks of the lanes that pass, value of the next such lane) for a block.
    template <class F>
    INLINE void noted(int64_t b, const Passes& p, F&& f) const {
        const uint32_t* noted = t.noted.marks + b * each;
        const float* value = noted_values(b);
        for (int64_t j = 0; j < each; j++) {
            if (!noted[j]) continue;
            float passing[LANES + L];
            float* end = passing;
            unsigned m = 0;
            int first = 0, n = __builtin_popcount(noted[j]);
            for (; first < n; first += L) {
                const V x = load(value + first);
                const unsigned some = marks(reaches(x, p.least)) & (n - first >= L ? ALL_LANES : (1u << (n - first)) - 1);
                m |= some << first;
                end = packed(end, x, some);
            }
            value += n;
            if (!m) continue;
            m = spread(m, noted[j]);
            if (p.last != INT64_MAX) {
                const float* w = t.dense + (b * each + j) * LANES;
                end = passing;
                bits_of(m, [&](int l) {
                    if (later(p, w[l], b, l, j)) m &= ~(1u << l);
                    else *end++ = w[l];
                });
                if (!m) continue;
            }
            const float* next = passing;
            f(j, m, [&](int) INLINE_LAMBDA { return *next++; });
        }
    }

    bool later(const Passes& p, float w, int64_t b, int l, int64_t j) const {  // than the last that passes, of equals
        return magnitude(w) == p.least && (b * LANES + l) * each + j > p.last;
    }

    template <class F>
    INLINE void scan(int64_t b, const Passes& p, F&& f) const {
        const float* w = t.dense + b * each * LANES;
        for (int64_t j = 0; j < each; j++, w += LANES) {
            unsigned m = 0;
            for (int v = 0; v < B; v++) m |= marks(reaches(load(w + v * L), p.least)) << (v * L);
            if (!m) continue;
            if (p.last != INT64_MAX)
                bits_of(m, [&](int l) {
                    if (later(p, w[l], b, l, j)) m &= ~(1u << l);
                });
            f(j, m, [&](int l) INLINE_LAMBDA { return w[l]; });
        }
    }

    template <class F>
    INLINE void passing(const Passes& p, int64_t b, F&& f) const {
        known(p.least, b) ? noted(b, p, f) : scan(b, p, f);
    }

    void count(const Passes& p, int64_t b) const {
        int32_t* n = tally(b);
        memset(n, 0, sizeof(int32_t) * (LANES + kinds));
        passing(p, b, [&](int64_t j, unsigned m, auto&&) INLINE_LAMBDA {
            n[LANES + taps.parity[j % area] * t.in + j / area] += __builtin_popcount(m);
            add_marks(n, m);
        });
    }

    int64_t total() const {
        int64_t n = 0;
        for (int64_t b = 0; b < blocks; b++)
            for (int l = 0; l < LANES; l++) n += tally(b)[l];
        return n;
    }

    void begin() const {  // counts become places
        int32_t n = 0;
        for (int64_t r = 0; r < t.out; r++) {
            int32_t& own = tally(r / LANES)[r % LANES];
            t.row[r] = n, n += own, own = t.row[r];
        }
        t.row[t.out] = n;
        if (!t.back_row) return;
        n = 0;
        for (int64_t k = 0; k < kinds; k++) {
            t.back_row[k] = n;
            for (int64_t b = 0; b < blocks; b++) {
                int32_t& own = tally(b)[LANES + k];
                int32_t here = own;
                own = n, n += here;
            }
        }
        t.back_row[kinds] = n;
    }

    void fill(const Passes& p, int64_t b) const {
        int32_t* n = tally(b);
        std::vector<int32_t> place(area);
        std::vector<int64_t> back(area);
        for (int64_t i = 0; i < area; i++) {
            place[i] = int32_t((t.shift + i / t.kernel) * t.line + (t.shift + i % t.kernel) * WORDS);
            back[i] = (t.back_halo + taps.down[i]) * t.back_line + (t.back_halo + taps.right[i]) * WORDS;
        }
        passing(p, b, [&](int64_t j, unsigned m, auto&& value) INLINE_LAMBDA {
            const int64_t tap = j % area, c = j / area;
            const int32_t here = int32_t(c * t.channel) + place[tap];
            int32_t& behind = n[LANES + taps.parity[tap] * t.in + c];
            bits_of(m, [&](int l) INLINE_LAMBDA {
                const int32_t at = n[l]++;
                const float w = value(l);
                t.offset[at] = here, t.value[at] = w;
                if (t.back_row) {
                    t.back_offset[behind] = int32_t((b * LANES + l) * t.back_channel + back[tap]);
                    t.back_value[behind++] = w;
                }
            });
        });
    }
};

}  // namespace

void top(const Top& t, int thread, int threads) {
    Weights w(t);
    Share blocks(w.blocks, thread, threads);
    auto each = [&](auto&& f) INLINE_LAMBDA {
        const float* x = t.dense + blocks.begin * w.each * LANES;
        const float* end = t.dense + blocks.end * w.each * LANES;
        for (; x < end; x += L) f(load(x), ALL_LANES);
    };
    auto near = [&](auto&& f) INLINE_LAMBDA {  // from the weights that are noted, where all are that can matter
        for (int64_t b = blocks.begin; b < blocks.end; b++) {
            const bool known = w.known(w.near, b);
            const float* x = known ? w.noted_values(b) : t.dense + b * w.each * LANES;
            const int64_t n = known ? t.noted.count[b] : w.each * LANES;
            for (int64_t i = 0; i < n; i += L) f(load(x + i), n - i >= L ? ALL_LANES : (1u << (n - i)) - 1);
        }
    };
    auto at = [&](int64_t i) { return w.at(i); };
    for (bool exact = t.cut.exact;; exact = true) {
        Passes p = passes(t.cut, WEIGHTS, exact, thread, threads, t.out * w.each, near, each, at);
        for (int64_t b = blocks.begin; b < blocks.end; b++) w.count(p, b);
        barrier();
        int64_t total = w.total();
        barrier();
        if (total > t.capacity && !exact) continue;
        if (thread == 0) {
            w.begin();
            *t.cut.found = total;
        }
        barrier();
        for (int64_t b = blocks.begin; b < blocks.end; b++) w.fill(p, b);
        return;
    }
}
