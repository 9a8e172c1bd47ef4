// SWAT: the largest weights and activations, found anew as they change, and the dense weight gradient that they give.
//
// A threshold is found by counting: three passes over the bits of |x|, 11 and 10 and 10 of them, each pass a histogram
// of those that agree with what is known so far. Everything is counted before it is written, so that the lists do not
// depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

int fs_lanes(void) { return LANES; }

namespace {

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
uint32_t select_least(const Cut& c, int thread, int threads, Each&& each, int64_t* above, int64_t* ties) {
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
Passes passes(const Cut& c, bool exact, int thread, int threads, int64_t all, Each&& each, At&& at) {
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

// ---- weights

struct Taps {  // of a kernel: the parity of the input positions that a tap reaches, and where in the gradient
    std::vector<int> parity;
    std::vector<int64_t> down, right;
    Taps(int kernel, int stride, int padding) {
        auto part = [&](int tap, int& rest) {
            rest = ((tap - padding) % stride + stride) % stride;
            return (rest + padding - tap) / stride;
        };
        for (int i = 0; i < kernel; i++)
            for (int j = 0; j < kernel; j++) {
                int top, left;
                down.push_back(part(i, top));
                right.push_back(part(j, left));
                parity.push_back(top * stride + left);
            }
    }
};

struct Weights {
    const Top& t;
    const int64_t area, each, blocks, kinds;
    const Taps taps;
    explicit Weights(const Top& t)
        : t(t), area(int64_t(t.kernel) * t.kernel), each(t.in * area), blocks((t.out + LANES - 1) / LANES),
          kinds(int64_t(t.stride) * t.stride * t.in), taps(t.kernel, t.stride, t.padding) {}

    int32_t* tally(int64_t b) const { return t.tally + b * (LANES + kinds); }

    float at(int64_t i) const {  // in PyTorch's order
        int64_t o = i / each;
        return t.dense[(o / LANES * each + i % each) * LANES + o % LANES];
    }

    bool known(bool exact, int64_t b) const { return !exact && t.noted.marks && t.noted.count[b] >= 0; }

    // Calls f(entry of the row, marks of the lanes that pass, value of the next such lane) for a block.
    template <class F>
    INLINE void noted(int64_t b, F&& f) const {
        const uint32_t* marks = t.noted.marks + b * each;
        const float* value = t.noted.value + b * (t.noted.room + LANES);
        for (int64_t j = 0; j < each; j++)
            if (marks[j]) f(j, marks[j], [&](int) INLINE_LAMBDA { return *value++; });
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
                    if (magnitude(w[l]) == p.least && (b * LANES + l) * each + j > p.last) m &= ~(1u << l);
                });
            f(j, m, [&](int l) INLINE_LAMBDA { return w[l]; });
        }
    }

    template <class F>
    INLINE void passing(const Passes& p, bool exact, int64_t b, F&& f) const {
        known(exact, b) ? noted(b, f) : scan(b, p, f);
    }

    void count(const Passes& p, bool exact, int64_t b) const {
        int32_t* n = tally(b);
        memset(n, 0, sizeof(int32_t) * (LANES + kinds));
        passing(p, exact, b, [&](int64_t j, unsigned m, auto&&) INLINE_LAMBDA {
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

    void fill(const Passes& p, bool exact, int64_t b) const {
        int32_t* n = tally(b);
        std::vector<int32_t> place(area);
        std::vector<int64_t> back(area);
        for (int64_t i = 0; i < area; i++) {
            place[i] = int32_t((t.shift + i / t.kernel) * t.line + (t.shift + i % t.kernel) * WORDS);
            back[i] = (t.back_halo + taps.down[i]) * t.back_line + (t.back_halo + taps.right[i]) * WORDS;
        }
        passing(p, exact, b, [&](int64_t j, unsigned m, auto&& value) INLINE_LAMBDA {
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
    auto at = [&](int64_t i) { return w.at(i); };
    for (bool exact = t.cut.exact;; exact = true) {
        Passes p = passes(t.cut, exact, thread, threads, t.out * w.each, each, at);
        for (int64_t b = blocks.begin; b < blocks.end; b++) w.count(p, exact, b);
        barrier();
        int64_t total = w.total();
        barrier();
        if (total > t.capacity && !exact) continue;
        if (thread == 0) {
            w.begin();
            *t.cut.found = total;
        }
        barrier();
        for (int64_t b = blocks.begin; b < blocks.end; b++) w.fill(p, exact, b);
        return;
    }
}

// ---- activations

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

    Passes cut(const Cut& c, int thread, int threads) const {
        Share share(m.channels, thread, threads);
        auto each = [&](auto&& f) INLINE_LAMBDA {
            for (int64_t k = share.begin; k < share.end; k++)
                for (int b = 0; b < m.blocks; b++)
                    part(k, b, [&](V x, unsigned lanes, int, int, int) INLINE_LAMBDA { f(x, lanes); });
        };
        int64_t all = int64_t(samples) * m.channels * m.height * m.width;
        return passes(c, c.exact, thread, threads, all, each, [&](int64_t i) { return at(i); });
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

}  // namespace

void keep(const Keep& k, int thread, int threads) {
    Activations a(k.in, k.samples);
    Passes p = a.cut(k.cut, thread, threads);
    Share share(k.in.channels, thread, threads);
    const int kinds = k.stride * k.stride, lists = k.groups * kinds;
    std::vector<int32_t> lane(kinds * WORDS), next(lists);
    for (int64_t c = share.begin; c < share.end; c++) {
        int32_t* n = k.start + 1 + c * lists;
        memset(n, 0, sizeof(int32_t) * lists);
        for (int b = 0; b < k.in.blocks; b++) {
            std::fill(lane.begin(), lane.end(), 0);
            a.part(c, b, [&](V x, unsigned lanes, int h, int w, int first) INLINE_LAMBDA {
                int32_t* own = &lane[(h % k.stride * k.stride + w % k.stride) * WORDS + first];
                I count, passed;
                memcpy(&count, own, sizeof count);
                if (p.last == INT64_MAX && lanes == ALL_LANES) {
                    passed = reaches(x, p.least);
                } else {
                    unsigned m = a.pass(p, x, lanes, c, b, h, w, first);
                    for (int l = 0; l < L; l++) passed[l] = -int(m >> l & 1);
                }
                count -= passed;
                memcpy(own, &count, sizeof count);
            });
            for (int i = 0; i < WORDS && b * WORDS + i < k.samples; i++)
                for (int kind = 0; kind < kinds; kind++)
                    n[(b * WORDS + i) / k.group * kinds + kind] += lane[kind * WORDS + i];
        }
    }
    barrier();
    if (thread == 0) {
        k.start[0] = 0;
        for (int64_t i = 0, all = int64_t(k.in.channels) * lists; i < all; i++) k.start[i + 1] += k.start[i];
        *k.cut.found = k.start[int64_t(k.in.channels) * lists];
    }
    barrier();
    for (int64_t c = share.begin; c < share.end; c++) {
        memcpy(next.data(), k.start + c * lists, sizeof(int32_t) * lists);
        for (int b = 0; b < k.in.blocks; b++) {
            int32_t list[WORDS], sample[WORDS];
            for (int i = 0; i < WORDS; i++) {
                list[i] = (b * WORDS + i) / k.group * kinds;
                sample[i] = (b * WORDS + i) * k.plane * LANES;
            }
            a.part(c, b, [&](V x, unsigned lanes, int h, int w, int first) INLINE_LAMBDA {
                unsigned m = a.pass(p, x, lanes, c, b, h, w, first);
                if (!m) return;
                const int32_t here = (h / k.stride * k.line + w / k.stride + k.corner) * LANES;
                int32_t* cursor = next.data() + h % k.stride * k.stride + w % k.stride;
                float value[L];
                memcpy(value, &x, sizeof value);
                bits_of(m, [&](int l) INLINE_LAMBDA {
                    int32_t at = cursor[list[first + l]]++;
                    k.position[at] = sample[first + l] + here;
                    k.value[at] = value[l];
                });
            });
        }
    }
}

void prune(const Prune& k, int thread, int threads) {
    Activations a(k.in, k.samples);
    Passes p = a.cut(k.cut, thread, threads);
    Share share(k.in.channels, thread, threads);
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

// ---- the gradient of dense weights

namespace {

// acc[t] += value * gradient at the entry's position, moved by shift[t]: for the taps that one parity reaches.
template <int T>
INLINE void products(const int32_t* position, const float* value, int64_t n, const float* gradient,
                     const int64_t* shift, V (*acc)[B]) {
    V sum[T][B];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < B; v++) sum[t][v] = acc[t][v];
    for (int64_t i = 0; i < n; i++) {
        const float* g = gradient + position[i];
        V a = all(value[i]);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < B; v++) sum[t][v] += a * load(g + shift[t] + v * L);
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < B; v++) acc[t][v] = sum[t][v];
}

void dispatch(int taps, const int32_t* position, const float* value, int64_t n, const float* gradient,
              const int64_t* shift, V (*acc)[B]) {
    switch (taps) {
        case 1: return products<1>(position, value, n, gradient, shift, acc);
        case 2: return products<2>(position, value, n, gradient, shift, acc);
        case 3: return products<3>(position, value, n, gradient, shift, acc);
        case 4: return products<4>(position, value, n, gradient, shift, acc);
        case 5: return products<5>(position, value, n, gradient, shift, acc);
        case 6: return products<6>(position, value, n, gradient, shift, acc);
        case 7: return products<7>(position, value, n, gradient, shift, acc);
        case 8: return products<8>(position, value, n, gradient, shift, acc);
        case 9: return products<9>(position, value, n, gradient, shift, acc);
    }
}

// Notes which weights of a block reach the threshold, as they are written in order: see Noted.
struct Noting {
    const Noted& to;
    const int64_t each;
    const uint32_t least;
    uint32_t* mark = nullptr;
    float *value = nullptr, *begin = nullptr;
    bool fits = false;
    explicit Noting(const Noted& to, int64_t each)
        : to(to), each(each), least(to.marks ? std::max(magnitude(to.threshold[0]), uint32_t(1)) : 0) {}

    void start(int64_t block) {
        if (!to.marks) return;
        mark = to.marks + block * each;
        value = begin = to.value + block * (to.room + LANES);
        fits = true;
    }

    // Before `rows` entries of all lanes are written.
    void expect(int64_t rows) {
        fits = fits && value - begin + rows * LANES <= to.room;
    }

    INLINE void note(V x, int v) {
        if (!fits) return;
        const unsigned m = marks(reaches(x, least));
        *mark = v == 0 ? m : *mark | m << (v * L);
        value = packed(value, x, m);
        mark += v == B - 1;
    }

    void end(int64_t block) {
        if (to.marks) to.count[block] = fits ? int32_t(value - begin) : -1;
    }
};

// A square of L samples (rows) by L channels (columns), turned round.
INLINE void turn(const uint32_t* from, int64_t channel, int channels, float* to, int64_t sample, int samples) {
    alignas(64) float x[L][L];
    for (int c = 0; c < L; c++)
        if (c < channels) memcpy(x[c], from + c * channel, 4 * L); else memset(x[c], 0, 4 * L);
    for (int n = 0; n < samples; n++) {
        V row;
        for (int c = 0; c < L; c++) row[c] = x[c][n];
        store(to + n * sample, row);
    }
}

void transposed(const Wide& g, int thread, int threads) {
    Steps s(g.grad);
    const int64_t line = g.grad.width + 2 * g.halo, plane = line * (g.grad.height + 2 * g.halo);
    const int64_t blocks = (g.grad.channels + LANES - 1) / LANES, samples = g.from->samples;
    Share share(blocks * g.grad.blocks, thread, threads);
    for (int64_t u = share.begin; u < share.end; u++) {
        const int64_t o = u / g.grad.blocks, b = u % g.grad.blocks;
        const int here = int(std::min<int64_t>(WORDS, samples - b * WORDS));
        if (here <= 0) continue;
        float* to = g.blocks + (o * samples + b * WORDS) * plane * LANES;
        if (g.halo) memset(to, 0, sizeof(float) * here * plane * LANES);
        for (int h = 0; h < g.grad.height; h++)
            for (int w = 0; w < g.grad.width; w++)
                for (int v = 0; v < B; v++) {
                    const int first = int(o) * LANES + v * L, n = std::min(L, g.grad.channels - first);
                    float* q = to + ((h + g.halo) * line + w + g.halo) * LANES + v * L;
                    for (int l = 0; l < here; l += L)
                        turn(s.at(first, b) + h * s.row + w * WORDS + l, s.channel, n, q + l * plane * LANES,
                             plane * LANES, std::min(L, here - l));
                }
    }
}

void multiplied(const Wide& g, int thread, int threads) {
    const Keep& k = *g.from;
    const int64_t area = int64_t(g.kernel) * g.kernel, each = k.in.channels * area;
    const int64_t blocks = (g.grad.channels + LANES - 1) / LANES, kinds = int64_t(k.stride) * k.stride;
    const Taps taps(g.kernel, k.stride, g.padding);
    std::vector<std::vector<int>> own(kinds);
    std::vector<int64_t> shift(area);
    for (int t = 0; t < area; t++) {
        own[taps.parity[t]].push_back(t);
        shift[t] = (taps.down[t] * k.line + taps.right[t]) * LANES;
    }
    float* sums = g.sums + thread * each * LANES;
    Share share(blocks, thread, threads);
    const V rate = all(g.rate), momentum = all(g.momentum), decay = all(g.decay);
    Noting noting(g.noted, each);
    for (int64_t o = share.begin; o < share.end; o++) {
        noting.start(o);
        const float* gradient = g.blocks + o * k.samples * k.plane * LANES;
        for (int group = 0; group < k.groups; group++)
            for (int64_t c = 0; c < k.in.channels; c++)
                for (int64_t kind = 0; kind < kinds; kind++) {
                    const int32_t* list = k.start + (c * k.groups + group) * kinds + kind;
                    for (size_t first = 0; first < own[kind].size(); first += 9) {
                        const int n = int(std::min<size_t>(9, own[kind].size() - first));
                        const int* tap = own[kind].data() + first;
                        V acc[9][B];
                        int64_t moved[9];
                        for (int t = 0; t < n; t++) {
                            moved[t] = shift[tap[t]];
                            for (int v = 0; v < B; v++)
                                acc[t][v] = group ? load(sums + (c * area + tap[t]) * LANES + v * L) : zero();
                        }
                        dispatch(n, k.position + list[0], k.value + list[0], list[1] - list[0], gradient, moved, acc);
                        noting.expect(n);
                        for (int t = 0; t < n; t++)
                            for (int v = 0; v < B; v++) {
                                const int64_t at = (c * area + tap[t]) * LANES + v * L, i = o * each * LANES + at;
                                V d = acc[t][v];
                                if (group + 1 < k.groups) {
                                    store(sums + at, d);
                                } else if (g.grad_out) {
                                    store(g.grad_out + i, d);
                                } else {
                                    V w = load(g.dense + i);
                                    d += decay * w;
                                    if (g.velocity) {
                                        d += momentum * load(g.velocity + i);
                                        store(g.velocity + i, d);
                                    }
                                    w -= rate * d;
                                    store(g.dense + i, w);
                                    noting.note(w, v);
                                }
                            }
                    }
                }
        noting.end(o);
    }
}

}  // namespace

void wide(const Wide& g, int thread, int threads) {
    g.phase ? multiplied(g, thread, threads) : transposed(g, thread, threads);
}
