// BatchNorm, bias, residual sum and ReLU in one pass a channel; sums lane by lane, so that invalid samples drop out.
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
    for (int k = 0; k < S::K; k++)
        for (int l = 0; l < L; l++) m[k][l] = valid.one(b, k * L + l) ? 1.0f : 0.0f;
}

// Calls f(block, row, column offsets in words) row by row; `end` after each row.
template <class F>
INLINE void rows(const Map& m, F&& f) {
    for (int b = 0; b < m.blocks; b++)
        for (int h = 0; h < m.height; h++) f(b, h);
}

template <class S>
void moments(const Map& y, int c, const Valid& valid, double* mean, double* var) {
    Steps s(y);
    V shift[S::K], total[S::K], square[S::K], m[S::K] = {};
    for (int k = 0; k < S::K; k++) total[k] = square[k] = zero();
    S::read(s.at(c, 0), shift);
    rows(y, [&](int b, int h) INLINE_LAMBDA {
        V t[S::K], q[S::K], x[S::K];
        for (int k = 0; k < S::K; k++) t[k] = q[k] = zero();
        const uint32_t* p = s.at(c, b) + h * s.row;
        for (int w = 0; w < y.width; w++, p += WORDS) {
            S::read(p, x);
            for (int k = 0; k < S::K; k++) {
                V d = x[k] - shift[k];
                t[k] += d, q[k] += d * d;
            }
        }
        if (!valid.all(b)) {
            lanes<S>(valid, b, m);
            for (int k = 0; k < S::K; k++) t[k] = select(m[k] > zero(), t[k], zero()), q[k] = select(m[k] > zero(), q[k], zero());
        }
        for (int k = 0; k < S::K; k++) total[k] += t[k], square[k] += q[k];
    });
    double all = 0, about = 0;
    const double each = double(y.height) * y.width;
    double n[S::K * L];
    for (int i = 0; i < S::K * L; i++) {
        n[i] = 0;
        for (int b = 0; b < y.blocks; b++) n[i] += valid.one(b, i) ? each : 0;
        all += n[i] * shift[i / L][i % L] * (n[i] > 0) + (n[i] > 0 ? total[i / L][i % L] : 0);
    }
    const double count = double(valid.samples) * each;
    *mean = all / count;
    for (int i = 0; i < S::K * L; i++) {
        if (n[i] == 0) continue;
        double t = total[i / L][i % L], d = shift[i / L][i % L] - *mean;
        about += square[i / L][i % L] + 2 * d * t + n[i] * d * d;
    }
    *var = about > 0 ? about / count : (about == about ? 0.0 : about);
}

struct Line {
    V scale, shift;
};

Line line(const Norm& n, int c) {
    float scale = 1, shift = n.beta ? n.beta[c] : 0;
    if (n.gamma) {
        scale = n.gamma[c] * n.invstd[c];
        shift -= scale * n.mean[c];
    }
    return {all(scale), all(shift)};
}

template <class S>
void forward(const Norm& n, int c) {
    Valid valid(n.samples, 16 * S::parts);
    if (n.gamma && n.training == 1) {
        double mean, var, count = double(n.samples) * n.y.height * n.y.width;
        moments<S>(n.y, c, valid, &mean, &var);
        n.mean[c] = float(mean);
        n.invstd[c] = float(1 / std::sqrt(var + n.eps));
        n.running_mean[c] += n.momentum * (float(mean) - n.running_mean[c]);
        n.running_var[c] += n.momentum * (float(var * count / (count - 1)) - n.running_var[c]);
    } else if (n.gamma && n.training == 0) {
        n.mean[c] = n.running_mean[c];
        n.invstd[c] = 1 / std::sqrt(n.running_var[c] + n.eps);
    }
    Line f = line(n, c);
    Steps from(n.y), to(n.out), add(n.add ? *n.add : n.y);
    rows(n.y, [&](int b, int h) INLINE_LAMBDA {
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
                for (int k = 0; k < S::K; k++) x[k] = positive(x[k]);
            S::write(q, x);
        }
    });
    zero_halo(n.out, c);
}

template <class S>
void backward(const NormBackward& g, int c) {
    const Norm& n = g.of;
    Valid valid(n.samples, 16 * S::parts);
    Line f = line(n, c);
    V centre = all(n.gamma ? n.mean[c] : 0);
    Steps ys(n.y), outs(n.out), grads(g.grad), to(g.grad_y);
    V s1[S::K], s2[S::K], m[S::K] = {};
    for (int k = 0; k < S::K; k++) s1[k] = s2[k] = zero();
    const bool by_output = n.add != nullptr || !n.gamma;  // the ReLU's sign is read off the output
    const bool keep = g.grad.data != g.grad_y.data;
    auto masked = [&](const uint32_t* d, const uint32_t* p, const uint32_t* o, V* dp, V* y) INLINE_LAMBDA {
        S::read(d, dp);
        if (n.gamma) S::read(p, y);
        if (!n.relu) return;
        if (by_output) {
            V out[S::K];
            S::read(o, out);
            for (int k = 0; k < S::K; k++) dp[k] = select(out[k] <= zero(), zero(), dp[k]);
        } else {
            for (int k = 0; k < S::K; k++) dp[k] = select(y[k] * f.scale + f.shift <= zero(), zero(), dp[k]);
        }
    };
    rows(n.y, [&](int b, int h) INLINE_LAMBDA {
        V t1[S::K], t2[S::K], dp[S::K], y[S::K];
        for (int k = 0; k < S::K; k++) t1[k] = t2[k] = y[k] = zero();
        uint32_t* d = grads.at(c, b) + h * grads.row;
        const uint32_t* p = ys.at(c, b) + h * ys.row;
        const uint32_t* o = outs.at(c, b) + h * outs.row;
        for (int w = 0; w < n.y.width; w++, d += WORDS, p += WORDS, o += WORDS) {
            masked(d, p, o, dp, y);
            for (int k = 0; k < S::K; k++) t1[k] += dp[k], t2[k] += dp[k] * (y[k] - centre);
        }
        if (!valid.all(b)) {
            lanes<S>(valid, b, m);
            for (int k = 0; k < S::K; k++) t1[k] = select(m[k] > zero(), t1[k], zero()), t2[k] = select(m[k] > zero(), t2[k], zero());
        }
        for (int k = 0; k < S::K; k++) s1[k] += t1[k], s2[k] += t2[k];
    });
    double sum1 = 0, sum2 = 0;
    for (int k = 0; k < S::K; k++)
        for (int l = 0; l < L; l++) sum1 += s1[k][l], sum2 += s2[k][l];
    if (g.grad_beta) g.grad_beta[c] = float(sum1);
    V scale = all(1), offset = zero(), slope = zero();
    if (n.gamma) {
        const double count = double(n.samples) * n.y.height * n.y.width, inv = n.invstd[c];
        if (g.grad_gamma) g.grad_gamma[c] = float(sum2 * inv);
        scale = f.scale;
        if (n.training) {
            offset = all(float(sum1 / count));
            slope = all(float(sum2 * inv * inv / count));
        }
    }
    rows(n.y, [&](int b, int h) INLINE_LAMBDA {
        uint32_t* d = grads.at(c, b) + h * grads.row;
        const uint32_t* p = ys.at(c, b) + h * ys.row;
        const uint32_t* o = outs.at(c, b) + h * outs.row;
        uint32_t* q = to.at(c, b) + h * to.row;
        bool whole = valid.all(b);
        if (!whole) lanes<S>(valid, b, m);
        V dp[S::K], y[S::K], dy[S::K];
        for (int k = 0; k < S::K; k++) y[k] = zero();
        for (int w = 0; w < n.y.width; w++, d += WORDS, p += WORDS, o += WORDS, q += WORDS) {
            masked(d, p, o, dp, y);
            for (int k = 0; k < S::K; k++) dy[k] = scale * (dp[k] - offset - (y[k] - centre) * slope);
            if (!whole)
                for (int k = 0; k < S::K; k++) dy[k] = select(m[k] > zero(), dy[k], zero());
            if (keep && n.add) S::write(d, dp);
            S::write(q, dy);
        }
    });
    zero_halo(g.grad_y, c);
}

}  // namespace

void zero_halo(const Map& m, int64_t c) {
    if (!m.halo) return;
    Steps s(m);
    const size_t word = sizeof(uint32_t), side = m.halo * WORDS * word;
    for (int b = 0; b < m.blocks; b++) {
        uint32_t* p = m.data + c * s.channel + b * s.block;
        memset(p, 0, m.halo * s.row * word);
        memset(p + (m.height + m.halo) * s.row, 0, m.halo * s.row * word);
        for (int h = m.halo; h < m.height + m.halo; h++) {
            memset(p + h * s.row, 0, side);
            memset(p + (h + 1) * s.row - m.halo * WORDS, 0, side);
        }
    }
}

void norm(const Norm& n, int thread, int threads) {
    Share channels(n.y.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++) n.y.packed ? forward<Bf16>(n, c) : forward<Fp32>(n, c);
}

void norm_backward(const NormBackward& g, int thread, int threads) {
    Share channels(g.of.y.channels, thread, threads);
    for (int64_t c = channels.begin; c < channels.end; c++)
        g.of.y.packed ? backward<Bf16>(g, c) : backward<Fp32>(g, c);
}
