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
        return passes(c, ACTIVATIONS, c.exact, thread, threads, all, each, each, [&](int64_t i) { return at(i); });
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
