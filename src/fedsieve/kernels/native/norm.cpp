// BatchNorm, bias, residual sum and ReLU in one pass a channel; sums lane by lane, so that invalid samples drop out.
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace {

struct Valid {  // which lanes of a block hold samples
    int samples, in_block, full;
    explicit Valid(int samples, int in_block) : samples(samples), in_block(in_block), full(samples / in_block) {}
    bool all(int b) const { return b < full; }
    bool one(int b, int i) const { return b * in_block + i < samples; }
};

template <class S>
INLINE void lanes(const Valid& valid, int b, V* m) {
    for (int k = 0; k < S::K; k++) {
        V own = zero();
        for (int l = 0; l < L; l++) own[l] = valid.one(b, k * L + l) ? 1.0f : 0.0f;
        m[k] = own;
    }
}

// Two sums over some of a channel.
struct Sums {
    double of[2];

    static Sums joined(const Sums* parts, int n) {  // in pairs, and so on
        if (n == 1) return parts[0];
        Sums a = joined(parts, n / 2), b = joined(parts + n / 2, n / 2);
        return {{a.of[0] + b.of[0], a.of[1] + b.of[1]}};
    }
};

// Over lines of the channel: what row(block, row, sums) adds up lane by lane, invalid samples left out.
template <class S, class F>
INLINE Sums sums_of(const Map& y, const Share& lines, const Valid& valid, F&& row) {
    constexpr int SIZE = 2 * S::K;
    V total[SIZE];
    for (int k = 0; k < SIZE; k++) total[k] = zero();
    each_line(y, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
        V t[SIZE];
        for (int k = 0; k < SIZE; k++) t[k] = zero();
        row(b, h, t);
        if (!valid.all(int(b))) {
            V m[S::K];
            lanes<S>(valid, int(b), m);
            for (int k = 0; k < SIZE; k++) t[k] = select(m[k % S::K] > zero(), t[k], zero());
        }
        for (int k = 0; k < SIZE; k++) total[k] += t[k];
    });
    for (int k = 1; k < S::K; k++) total[0] += total[k], total[S::K] += total[S::K + k];
    return {{in_pairs(total[0]), in_pairs(total[S::K])}};
}

// For every channel of a thread's part of a map: sums over all of it, of row(channel, block, row, sums), and with them
// apply(channel, sums): a few channels at a time, so that what is read twice is still in the cache. The lines are added up
// in parts, and the parts in pairs, so that the sums are the same for any number of threads.
template <class S, class Row, class Apply>
INLINE void in_two_passes(const Map& y, const Home& home, const Valid& valid, int thread, int threads, Row&& row,
                          Apply&& apply) {
    constexpr int64_t CACHE = 192 * 1024;
    const int64_t mine = home.lines.end - home.lines.begin, bytes = mine * y.width * WORDS * int64_t(sizeof(uint32_t));
    const bool shared = home.by_line && threads > 1;
    const int64_t few = shared ? std::max(int64_t(1), std::min(int64_t(DESK), CACHE / bytes)) : 1;
    const int own = shared ? home.parts / threads : home.parts;
    bool odd = false;  // who is ahead writes the next sums while others still read these
    for (int64_t first = home.channels.begin; first < home.channels.end; first += few, odd = !odd) {
        const int64_t end = std::min(first + few, home.channels.end);
        Sums whole;
        for (int64_t c = first; c < end; c++) {
            Sums parts[8];
            for (int p = 0; p < own; p++) {
                Share lines(mine, p, own);
                lines.begin += home.lines.begin, lines.end += home.lines.begin;
                parts[p] = sums_of<S>(y, lines, valid, [&](int64_t b, int64_t h, V* t) INLINE_LAMBDA { row(c, b, h, t); });
            }
            whole = Sums::joined(parts, own);
            if (shared) memcpy(desk(thread, odd) + 2 * (c - first), &whole, sizeof whole);
        }
        if (shared) barrier();
        for (int64_t c = first; c < end; c++) {
            if (shared) {
                Sums parts[8];
                for (int t = 0; t < threads; t++) memcpy(&parts[t], desk(t, odd) + 2 * (c - first), sizeof parts[t]);
                whole = Sums::joined(parts, threads);
            }
            apply(c, whole);
        }
    }
}

struct Line {
    V scale, shift;
};

INLINE Line line(const Norm& n, int64_t c, float mean, float invstd) {
    const float scale = n.gamma ? n.gamma[c] * invstd : 1, shift = n.beta ? n.beta[c] : 0;
    return {all(scale), all(n.gamma ? shift - scale * mean : shift)};
}

template <class S>
void forward(const Norm& n, int thread, int threads) {
    const Valid valid(n.samples, 16 * S::parts);
    const Home home(n.y, thread, threads);
    const bool first = !home.by_line || thread == 0;  // of those who have a channel
    Steps from(n.y), to(n.out), add(n.add ? *n.add : n.y);
    auto apply = [&](int64_t c, float mean, float invstd) INLINE_LAMBDA {
        const Line f = line(n, c, mean, invstd);
        each_line(n.y, home.lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
            const uint32_t* p = from.at(c, b) + h * from.row;
            const uint32_t* r = add.at(c, b) + h * add.row;
            uint32_t* q = to.at(c, b) + h * to.row;
            for (int w = 0; w < n.y.width; w++, p += WORDS, q += WORDS, r += WORDS) {
                V x[S::K], more[S::K];
                S::read(p, x);
                for (int k = 0; k < S::K; k++) x[k] = x[k] * f.scale + f.shift;
                if (n.add) {
                    S::read(r, more);
                    for (int k = 0; k < S::K; k++) x[k] += more[k];
                }
                if (n.relu)
                    for (int k = 0; k < S::K; k++) x[k] = rectified(x[k], n.relu);
                S::write(q, x);
            }
        });
        zero_halo(n.out, c, home.lines);
    };
    if (n.gamma && n.training == 1) {
        const double count = double(n.samples) * n.y.height * n.y.width;
        auto shift = [&](int64_t c) INLINE_LAMBDA {  // some number of the channel's: its sums then lose nothing
            V x[S::K];
            S::read(from.at(c, 0), x);
            return all(x[0][0]);
        };
        auto row = [&](int64_t c, int64_t b, int64_t h, V* t) INLINE_LAMBDA {
            const V s = shift(c);
            const uint32_t* p = from.at(c, b) + h * from.row;
            for (int w = 0; w < n.y.width; w++, p += WORDS) {
                V x[S::K];
                S::read(p, x);
                for (int k = 0; k < S::K; k++) {
                    V d = x[k] - s;
                    t[k] += d, t[S::K + k] += d * d;
                }
            }
        };
        in_two_passes<S>(n.y, home, valid, thread, threads, row, [&](int64_t c, const Sums& sums) INLINE_LAMBDA {
            const double d = sums.of[0] / count, var = std::max(sums.of[1] / count - d * d, 0.0);
            const float mean = float(shift(c)[0] + d), invstd = float(1 / std::sqrt(var + n.eps));
            if (first) {
                n.mean[c] = mean, n.invstd[c] = invstd;
                n.running_mean[c] += n.momentum * (mean - n.running_mean[c]);
                n.running_var[c] += n.momentum * (float(var * count / (count - 1)) - n.running_var[c]);
            }
            apply(c, mean, invstd);
        });
        return;
    }
    for (int64_t c = home.channels.begin; c < home.channels.end; c++) {
        float mean = 0, invstd = 0;
        if (n.gamma && n.training == 2) {
            mean = n.mean[c], invstd = n.invstd[c];
        } else if (n.gamma) {
            mean = n.running_mean[c], invstd = 1 / std::sqrt(n.running_var[c] + n.eps);
            if (first) n.mean[c] = mean, n.invstd[c] = invstd;
        }
        apply(c, mean, invstd);
    }
}

template <class S>
void backward(const NormBackward& g, int thread, int threads) {
    const Norm& n = g.of;
    const Valid valid(n.samples, 16 * S::parts);
    const Home home(n.y, thread, threads);
    const bool first = !home.by_line || thread == 0;
    Steps ys(n.y), outs(n.out), grads(g.grad), to(g.grad_y);
    const bool by_output = n.add != nullptr || !n.gamma;  // the ReLU's sign is read off the output
    const bool keep = g.grad.data != g.grad_y.data;
    auto at = [](const Steps& s, int64_t c, int64_t b, int64_t h) INLINE_LAMBDA { return s.at(c, b) + h * s.row; };
    auto masked = [&](const Line& f, const uint32_t* d, const uint32_t* p, const uint32_t* o, V* dp, V* y) INLINE_LAMBDA {
        S::read(d, dp);
        if (n.gamma) S::read(p, y);
        if (!n.relu) return;
        if (by_output) {
            V out[S::K];
            S::read(o, out);
            for (int k = 0; k < S::K; k++) dp[k] = select(is_flat(out[k], n.relu), zero(), dp[k]);
        } else {
            for (int k = 0; k < S::K; k++) dp[k] = select(is_flat(y[k] * f.scale + f.shift, n.relu), zero(), dp[k]);
        }
    };
    auto line_of = [&](int64_t c) INLINE_LAMBDA { return n.gamma ? line(n, c, n.mean[c], n.invstd[c]) : Line{all(1), zero()}; };
    auto row = [&](int64_t c, int64_t b, int64_t h, V* t) INLINE_LAMBDA {
        const Line f = line_of(c);
        const V centre = all(n.gamma ? n.mean[c] : 0);
        const uint32_t *d = at(grads, c, b, h), *p = at(ys, c, b, h), *o = at(outs, c, b, h);
        V dp[S::K], y[S::K];
        for (int k = 0; k < S::K; k++) y[k] = zero();
        for (int w = 0; w < n.y.width; w++, d += WORDS, p += WORDS, o += WORDS) {
            masked(f, d, p, o, dp, y);
            for (int k = 0; k < S::K; k++) t[k] += dp[k], t[S::K + k] += dp[k] * (y[k] - centre);
        }
    };
    in_two_passes<S>(n.y, home, valid, thread, threads, row, [&](int64_t c, const Sums& sums) INLINE_LAMBDA {
        const double sum1 = sums.of[0], sum2 = sums.of[1];
        if (g.grad_beta && first) g.grad_beta[c] = float(sum1);
        const Line f = line_of(c);
        V centre = zero(), scale = all(1), offset = zero(), slope = zero();
        if (n.gamma) {
            const double count = double(n.samples) * n.y.height * n.y.width, inv = n.invstd[c];
            if (g.grad_gamma && first) g.grad_gamma[c] = float(sum2 * inv);
            centre = all(n.mean[c]), scale = f.scale;
            if (n.training) {
                offset = all(float(sum1 / count));
                slope = all(float(sum2 * inv * inv / count));
            }
        }
        each_line(n.y, home.lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
            uint32_t *d = at(grads, c, b, h), *q = at(to, c, b, h);
            const uint32_t *p = at(ys, c, b, h), *o = at(outs, c, b, h);
            const bool whole = valid.all(int(b));
            V m[S::K], dp[S::K], y[S::K], dy[S::K];
            if (!whole) lanes<S>(valid, int(b), m);
            for (int k = 0; k < S::K; k++) y[k] = zero();
            for (int w = 0; w < n.y.width; w++, d += WORDS, p += WORDS, o += WORDS, q += WORDS) {
                masked(f, d, p, o, dp, y);
                for (int k = 0; k < S::K; k++) dy[k] = scale * (dp[k] - offset - (y[k] - centre) * slope);
                if (!whole)
                    for (int k = 0; k < S::K; k++) dy[k] = select(m[k] > zero(), dy[k], zero());
                if (keep && n.add) S::write(d, dp);
                S::write(q, dy);
            }
        });
        zero_halo(g.grad_y, c, home.lines);
    });
}

}  // namespace

void zero_halo(const Map& m, int64_t c, const Share& lines) {
    if (!m.halo) return;
    Steps s(m);
    const int64_t side = sizeof(uint32_t) * m.halo * WORDS, around = sizeof(uint32_t) * m.halo * s.row;
    each_line(m, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
        uint32_t* p = s.at(c, b) + h * s.row;
        memset(p - m.halo * WORDS, 0, side);
        memset(p + m.width * WORDS, 0, side);
        if (h == 0) memset(p - m.halo * (s.row + WORDS), 0, around);
        if (h == m.height - 1) memset(p + s.row - m.halo * WORDS, 0, around);
    });
}

void zero_halo(const Map& m, int64_t c) { zero_halo(m, c, Share(int64_t(m.blocks) * m.height, 0, 1)); }

void norm(const Norm& n, int thread, int threads) {
    if (n.groups) return group_norm(n, thread, threads);
    n.y.packed ? forward<Bf16>(n, thread, threads) : forward<Fp32>(n, thread, threads);
}

void norm_backward(const NormBackward& g, int thread, int threads) {
    if (g.of.groups) return group_norm_backward(g, thread, threads);
    g.of.y.packed ? backward<Bf16>(g, thread, threads) : backward<Fp32>(g, thread, threads);
}
