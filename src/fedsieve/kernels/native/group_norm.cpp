// GroupNorm: statistics of each sample, which are lane by lane; sums over a group's channels and lines in parts that are
// joined in one order, so that they are the same for any number of threads.
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace {

// How the lines of a map are summed: in the parts of its Home, cut where a block ends. The piece of part p in block b is
// piece p + b (some of these are none).
struct Pieces {
    int64_t height, all;
    int parts, count;
    Pieces(const Map& m, const Home& home)
        : height(m.height), all(int64_t(m.blocks) * m.height), parts(home.parts), count(parts + m.blocks - 1) {}
    Share lines(int64_t part, int64_t block) const {
        Share s(all, int(part), parts);
        s.begin = std::max(s.begin, block * height), s.end = std::min(s.end, (block + 1) * height);
        return s;
    }
    // Calls f(piece, block, lines) for what the lines [begin, end) hold.
    template <class F>
    INLINE void each(const Share& of, F&& f) const {
        for (int64_t b = of.begin / height; b * height < of.end; b++)
            for (int64_t p = 0; p < parts; p++) {
                const Share s = lines(p, b);
                if (s.begin < s.end && s.begin >= of.begin && s.end <= of.end) f(p + b, b, s);
            }
    }
};

// Where sums are kept: two vectors of lanes for each piece and group, and two numbers for each piece and channel.
template <class S>
struct Sums {
    static constexpr int lanes = S::K * L;
    const Norm& n;
    const Pieces& pieces;
    float* of(int64_t piece, int64_t group) const { return n.sums + (piece * n.groups + group) * 2 * lanes; }
    float* channel(int64_t piece, int64_t c) const {
        return n.sums + int64_t(pieces.count) * n.groups * 2 * lanes + (piece * n.y.channels + c) * 2;
    }
    // The sums of a block's pieces.
    INLINE void joined(int64_t b, int64_t group, V* total) const {
        for (int k = 0; k < 2 * S::K; k++) total[k] = zero();
        for (int64_t p = 0; p < pieces.parts; p++)
            if (const Share s = pieces.lines(p, b); s.begin < s.end)
                for (int k = 0; k < 2 * S::K; k++) total[k] += load(of(p + b, group) + k * L);
    }
};

// A thread's share: groups, or lines of all of them; few(group, end) sums, then last(group, end) applies: few groups at a
// time, so that what is read twice is still in the cache.
template <class Few, class Last>
INLINE void by_groups(const Norm& n, const Home& home, int thread, int threads, Few&& few, Last&& last) {
    constexpr int64_t CACHE = 192 * 1024;
    const Share groups(n.groups, home.by_line ? 0 : thread, home.by_line ? 1 : threads);
    const int64_t lines = home.lines.end - home.lines.begin;
    const int64_t bytes = lines * n.y.width * WORDS * int64_t(sizeof(uint32_t)) * n.y.channels / n.groups;
    const int64_t step = home.by_line && threads > 1 ? std::max<int64_t>(1, CACHE / bytes) : 1;
    for (int64_t g = groups.begin; g < groups.end; g += step) {
        const int64_t end = std::min(g + step, groups.end);
        few(g, end);
        if (home.by_line && threads > 1) barrier();
        last(g, end);
    }
}

template <class S>
INLINE void read_stats(const Norm& n, int64_t b, int64_t group, V* mean, V* inv) {
    const int64_t at = (b * n.groups + group) * S::K * L;
    for (int k = 0; k < S::K; k++) mean[k] = load(n.mean + at + k * L), inv[k] = load(n.invstd + at + k * L);
}

// Of a group in a block, from its sums around `shift`.
template <class S>
INLINE void stats_of(const Norm& n, const V* total, const V* shift, V* mean, V* inv) {
    const double count = double(n.y.channels / n.groups) * n.y.height * n.y.width;
    for (int k = 0; k < S::K; k++)
        for (int l = 0; l < L; l++) {
            const double d = total[k][l] / count, var = std::max(total[S::K + k][l] / count - d * d, 0.0);
            mean[k][l] = float(shift[k][l] + d), inv[k][l] = float(1 / std::sqrt(var + n.eps));
        }
}

template <class S>
INLINE void affine(const Norm& n, int64_t c, const V* mean, const V* inv, V* scale, V* shift) {
    const V gamma = all(n.gamma ? n.gamma[c] : 1), beta = all(n.beta ? n.beta[c] : 0);
    for (int k = 0; k < S::K; k++) scale[k] = gamma * inv[k], shift[k] = beta - scale[k] * mean[k];
}

template <class S>
void forward(const Norm& n, int thread, int threads) {
    const Home home(n.y, thread, threads);
    const Pieces pieces(n.y, home);
    const Sums<S> sums{n, pieces};
    const int64_t each = n.y.channels / n.groups;
    Steps from(n.y), to(n.out), add(n.add ? *n.add : n.y);
    auto start = [&](int64_t b, int64_t group, V* s) INLINE_LAMBDA { S::read(from.at(group * each, b), s); };
    auto few = [&](int64_t first, int64_t end) INLINE_LAMBDA {
        if (n.training == 2) return;
        for (int64_t g = first; g < end; g++)
            pieces.each(home.lines, [&](int64_t piece, int64_t b, const Share& lines) INLINE_LAMBDA {
                V s[S::K], total[2 * S::K] = {};
                start(b, g, s);
                for (int64_t c = g * each; c < (g + 1) * each; c++) {
                    V own[2 * S::K] = {};
                    each_line(n.y, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
                        V t[2 * S::K] = {};
                        const uint32_t* p = from.at(c, b) + h * from.row;
                        for (int w = 0; w < n.y.width; w++, p += WORDS) {
                            V x[S::K];
                            S::read(p, x);
                            for (int k = 0; k < S::K; k++) {
                                const V d = x[k] - s[k];
                                t[k] += d, t[S::K + k] += d * d;
                            }
                        }
                        for (int k = 0; k < 2 * S::K; k++) own[k] += t[k];
                    });
                    for (int k = 0; k < 2 * S::K; k++) total[k] += own[k];
                }
                for (int k = 0; k < 2 * S::K; k++) store(sums.of(piece, g) + k * L, total[k]);
            });
    };
    auto last = [&](int64_t first, int64_t end) INLINE_LAMBDA {
        for (int64_t g = first; g < end; g++) {
            int64_t known = -1;
            V mean[S::K], inv[S::K];
            pieces.each(home.lines, [&](int64_t, int64_t b, const Share& lines) INLINE_LAMBDA {
                if (n.training == 2) {
                    read_stats<S>(n, b, g, mean, inv);
                } else if (b != known) {
                    V total[2 * S::K], s[S::K];
                    sums.joined(b, g, total);
                    start(b, g, s);
                    stats_of<S>(n, total, s, mean, inv);
                }
                if (lines.begin == b * n.y.height && n.training != 2) {  // one thread has it
                    const int64_t at = (b * n.groups + g) * S::K * L;
                    for (int k = 0; k < S::K; k++) store(n.mean + at + k * L, mean[k]), store(n.invstd + at + k * L, inv[k]);
                }
                known = b;
                for (int64_t c = g * each; c < (g + 1) * each; c++) {
                    V scale[S::K], shift[S::K];
                    affine<S>(n, c, mean, inv, scale, shift);
                    each_line(n.y, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
                        const uint32_t* p = from.at(c, b) + h * from.row;
                        const uint32_t* r = add.at(c, b) + h * add.row;
                        uint32_t* q = to.at(c, b) + h * to.row;
                        for (int w = 0; w < n.y.width; w++, p += WORDS, q += WORDS, r += WORDS) {
                            V x[S::K], more[S::K];
                            S::read(p, x);
                            for (int k = 0; k < S::K; k++) x[k] = x[k] * scale[k] + shift[k];
                            if (n.add) {
                                S::read(r, more);
                                for (int k = 0; k < S::K; k++) x[k] += more[k];
                            }
                            if (n.relu)
                                for (int k = 0; k < S::K; k++) x[k] = rectified(x[k], n.relu);
                            S::write(q, x);
                        }
                    });
                    zero_halo(n.out, c, lines);
                }
            });
        }
    };
    by_groups(n, home, thread, threads, few, last);
}

template <class S>
void backward(const NormBackward& g, int thread, int threads) {
    const Norm& n = g.of;
    const Home home(n.y, thread, threads);
    const Pieces pieces(n.y, home);
    const Sums<S> sums{n, pieces};
    const int64_t each = n.y.channels / n.groups;
    const bool keep = n.add && g.grad.data != g.grad_y.data;
    Steps ys(n.y), outs(n.out), grads(g.grad), to(g.grad_y);
    // Calls f(gradient, number) for every position of a line: the gradient is that of the sum, behind its ReLU.
    auto positions = [&](int64_t c, int64_t b, int64_t h, const V* scale, const V* shift, auto&& f) INLINE_LAMBDA {
        uint32_t* d = grads.at(c, b) + h * grads.row;
        const uint32_t *p = ys.at(c, b) + h * ys.row, *o = outs.at(c, b) + h * outs.row;
        for (int w = 0; w < n.y.width; w++, d += WORDS, p += WORDS, o += WORDS) {
            V dp[S::K], y[S::K], out[S::K] = {};
            S::read(d, dp);
            S::read(p, y);
            if (n.relu) {
                if (n.add) S::read(o, out);
                for (int k = 0; k < S::K; k++) {
                    const V z = n.add ? out[k] : y[k] * scale[k] + shift[k];
                    dp[k] = select(is_flat(z, n.relu), zero(), dp[k]);
                }
            }
            f(dp, y, d, w);
        }
    };
    auto few = [&](int64_t first, int64_t end) INLINE_LAMBDA {
        for (int64_t gr = first; gr < end; gr++)
            pieces.each(home.lines, [&](int64_t piece, int64_t b, const Share& lines) INLINE_LAMBDA {
                V mean[S::K], inv[S::K], total[2 * S::K] = {};
                read_stats<S>(n, b, gr, mean, inv);
                for (int64_t c = gr * each; c < (gr + 1) * each; c++) {
                    V scale[S::K], shift[S::K], own[2 * S::K] = {};
                    affine<S>(n, c, mean, inv, scale, shift);
                    each_line(n.y, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
                        V t[2 * S::K] = {};
                        positions(c, b, h, scale, shift, [&](const V* dp, const V* y, uint32_t*, int) INLINE_LAMBDA {
                            for (int k = 0; k < S::K; k++) t[k] += dp[k], t[S::K + k] += dp[k] * (y[k] - mean[k]);
                        });
                        for (int k = 0; k < 2 * S::K; k++) own[k] += t[k];
                    });
                    const V gamma = all(n.gamma ? n.gamma[c] : 1);
                    V whole[2] = {zero(), zero()};
                    for (int k = 0; k < S::K; k++) {
                        total[k] += gamma * own[k], total[S::K + k] += gamma * own[S::K + k];
                        whole[0] += own[k], whole[1] += own[S::K + k] * inv[k];
                    }
                    for (int i = 0; i < 2; i++) sums.channel(piece, c)[i] = in_pairs(whole[i]);
                }
                for (int k = 0; k < 2 * S::K; k++) store(sums.of(piece, gr) + k * L, total[k]);
            });
    };
    auto last = [&](int64_t first, int64_t end) INLINE_LAMBDA {
        const V count = all(float(double(each) * n.y.height * n.y.width));
        for (int64_t gr = first; gr < end; gr++) {
            if (!home.by_line || thread == 0)
                for (int64_t c = gr * each; c < (gr + 1) * each; c++) {
                    double whole[2] = {0, 0};
                    pieces.each(Share(pieces.all, 0, 1), [&](int64_t piece, int64_t, const Share&) {
                        for (int i = 0; i < 2; i++) whole[i] += sums.channel(piece, c)[i];
                    });
                    if (g.grad_beta) g.grad_beta[c] = float(whole[0]);
                    if (g.grad_gamma) g.grad_gamma[c] = float(whole[1]);
                }
            pieces.each(home.lines, [&](int64_t, int64_t b, const Share& lines) INLINE_LAMBDA {
                V mean[S::K], inv[S::K], total[2 * S::K], offset[S::K], slope[S::K];
                read_stats<S>(n, b, gr, mean, inv);
                sums.joined(b, gr, total);
                for (int k = 0; k < S::K; k++) {
                    offset[k] = inv[k] * total[k] / count;
                    slope[k] = inv[k] * inv[k] * inv[k] * total[S::K + k] / count;
                }
                for (int64_t c = gr * each; c < (gr + 1) * each; c++) {
                    V scale[S::K], shift[S::K];
                    affine<S>(n, c, mean, inv, scale, shift);
                    each_line(n.y, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
                        uint32_t* q = to.at(c, b) + h * to.row;
                        positions(c, b, h, scale, shift, [&](const V* dp, const V* y, uint32_t* d, int w) INLINE_LAMBDA {
                            V dy[S::K];
                            for (int k = 0; k < S::K; k++)
                                dy[k] = scale[k] * dp[k] - offset[k] - (y[k] - mean[k]) * slope[k];
                            if (keep) S::write(d, dp);
                            S::write(q + w * WORDS, dy);
                        });
                    });
                    zero_halo(g.grad_y, c, lines);
                }
            });
        }
    };
    by_groups(n, home, thread, threads, few, last);
}

// One sample alone, whose positions are the lanes.
void alone(const Norm& n, int thread, int threads) {
    const int64_t each = n.y.channels / n.groups, words = int64_t(n.y.width) * WORDS;
    const Share groups(n.groups, thread, threads);
    Steps from(n.y), to(n.out), more(n.add ? *n.add : n.y);
    for (int64_t g = groups.begin; g < groups.end; g++) {
        auto at = [](const Steps& s, int64_t c) { return (float*)s.at(c, 0); };
        const float first = at(from, g * each)[0];
        double sum = 0, squares = 0;
        for (int64_t c = g * each; c < (g + 1) * each; c++) {
            const float* x = at(from, c);
            V a = zero(), q = zero();
            int64_t i = 0;
            for (; i + L <= n.positions; i += L) {
                const V d = load(x + i) - all(first);
                a += d, q += d * d;
            }
            sum += in_pairs(a), squares += in_pairs(q);
            for (; i < n.positions; i++) sum += x[i] - first, squares += double(x[i] - first) * (x[i] - first);
        }
        const double count = double(each) * n.positions, d = sum / count, var = std::max(squares / count - d * d, 0.0);
        const float inv = float(1 / std::sqrt(var + n.eps)), mean = float(first + d);
        for (int64_t c = g * each; c < (g + 1) * each; c++) {
            const V scale = all((n.gamma ? n.gamma[c] : 1) * inv), shift = all(n.beta ? n.beta[c] : 0) - scale * all(mean);
            for (int64_t i = 0; i < words; i += L) {
                V x = load(at(from, c) + i) * scale + shift;
                if (n.add) x += load(at(more, c) + i);
                store(at(to, c) + i, n.relu ? rectified(x, n.relu) : x);
            }
        }
    }
}

}  // namespace

void group_norm(const Norm& n, int thread, int threads) {
    if (n.positions) return alone(n, thread, threads);
    n.y.packed ? forward<Bf16>(n, thread, threads) : forward<Fp32>(n, thread, threads);
}

void group_norm_backward(const NormBackward& g, int thread, int threads) {
    g.of.y.packed ? backward<Bf16>(g, thread, threads) : backward<Fp32>(g, thread, threads);
}
