// Activations that are no part of a product or a norm, and their gradients. Errors: a few units in the last place.
#include "functions.h"

namespace {

INLINE V size_of(V x) { return (V)(bits(x) & 0x7fffffffu); }

INLINE V sigmoid(V x) { return all(1) / (all(1) + exponential(-x)); }

// The normal distribution's integral up to x: its tail by erfc, whose logarithm is a polynomial, or near 0 by erf.
INLINE V normal(V x) {
    const V z = x * all(0.70710678f), t = size_of(z), s = z * z;
    V far = (all(-1.72853470e-5f) * t + all(3.83197126e-4f)) * s + (all(-3.88396438e-3f) * t + all(2.42546219e-2f));
    for (float c : {-1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f}) far = far * t + all(c);
    const V tail = all(0.5f) * exponential(far * t - t);
    V near = all(-5.96761703e-4f);
    for (float c : {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f})
        near = near * s + all(c);
    near = near * z + z;
    return select(t > all(0.92f), select(x > zero(), all(1) - tail, tail), all(0.5f) + all(0.5f) * near);
}

INLINE V twice_of_tanh(V x) { return x * (all(1.59576912f) + all(0.0713548163f) * (x * x)); }  // GELU's: twice its argument

// By a polynomial (Cephes's) near 0, where 1 - e^-2x would lose digits.
INLINE V tanh_of(V x) {
    const V t = size_of(x), s = x * x, e = exponential(t * all(-2));
    V near = all(-5.70498872745e-3f);
    for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) near = near * s + all(c);
    const V far = (all(1) - e) / (all(1) + e);
    return select(t < all(0.625f), near * s * x + x, select(x < zero(), -far, far));
}

template <int F>
INLINE V value_of(V x) {
    if constexpr (F == SIGMOID) return sigmoid(x);
    if constexpr (F == SILU) return x * sigmoid(x);
    if constexpr (F == TANH) return tanh_of(x);
    if constexpr (F == GELU) return x * normal(x);
    if constexpr (F == GELU_TANH) return x * sigmoid(twice_of_tanh(x));
    const V up = positive(x + all(3));
    return x * select(up > all(6), all(6), up) / all(6);
}

template <int F>
INLINE V slope_of(V x) {
    if constexpr (F == GELU) return normal(x) + x * all(0.398942280f) * exponential(all(-0.5f) * (x * x));
    if constexpr (F == HARDSWISH)
        return select(x <= all(-3), zero(), select(x >= all(3), all(1), x / all(3) + all(0.5f)));
    if constexpr (F == TANH) {
        const V e = exponential(size_of(x) * all(-2)), s = all(1) / (all(1) + e);
        return all(4) * e * s * s;
    }
    const V u = F == GELU_TANH ? -twice_of_tanh(x) : -x, e = exponential(select(u > all(88), all(88), u));
    const V s = all(1) / (all(1) + e), rest = e * s;  // 1 - s, as exactly
    if constexpr (F == SIGMOID) return s * rest;
    if constexpr (F == GELU_TANH) return s + x * s * rest * (all(1.59576912f) + all(0.214064449f) * (x * x));
    return s * (all(1) + x * rest);
}

template <class S, int F>
void rows(const Activation& g, int thread, int threads) {
    const Home home(g.in, thread, threads);
    Steps ins(g.in), grads(g.grad), to(g.out);
    for (int64_t c = home.channels.begin; c < home.channels.end; c++) {
        each_line(g.in, home.lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
            const uint32_t* p = ins.at(c, b) + h * ins.row;
            const uint32_t* d = g.grad.data ? grads.at(c, b) + h * grads.row : nullptr;
            uint32_t* q = to.at(c, b) + h * to.row;
            for (int w = 0; w < g.in.width; w++, p += WORDS, q += WORDS) {
                V x[S::K], y[S::K];
                S::read(p, x);
                if (d) {
                    S::read(d, y), d += WORDS;
                    for (int k = 0; k < S::K; k++) y[k] *= slope_of<F>(x[k]);
                } else {
                    for (int k = 0; k < S::K; k++) y[k] = value_of<F>(x[k]);
                }
                S::write(q, y);
            }
        });
        zero_halo(g.out, c, home.lines);
    }
}

template <int F>
void run(const Activation& g, int thread, int threads) {
    g.in.packed ? rows<Bf16, F>(g, thread, threads) : rows<Fp32, F>(g, thread, threads);
}

}  // namespace

void activation(const Activation& g, int thread, int threads) {
    switch (g.function) {
        case SIGMOID: return run<SIGMOID>(g, thread, threads);
        case SILU: return run<SILU>(g, thread, threads);
        case GELU: return run<GELU>(g, thread, threads);
        case GELU_TANH: return run<GELU_TANH>(g, thread, threads);
        case TANH: return run<TANH>(g, thread, threads);
        default: return run<HARDSWISH>(g, thread, threads);
    }
}
