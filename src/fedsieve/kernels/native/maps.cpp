// What moves maps around: packing samples, pooling, copying, and the loss at the end.
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace {

template <class S>
void pool_forward(const Pool& g, int c, const Map& from, const Map& to) {
    Steps in(from), out(to);
    for (int b = 0; b < to.blocks; b++)
        for (int h = 0; h < to.height; h++)
            for (int w = 0; w < to.width; w++) {
                V best[S::K] = {}, x[S::K];
                const float start = g.average ? 0.0f : -INFINITY;
                for (int k = 0; k < S::K; k++) best[k] = all(start);
                int inside = 0;
                for (int i = 0; i < g.kernel; i++)
                    for (int j = 0; j < g.kernel; j++) {
                        int y = h * g.stride - g.padding + i, z = w * g.stride - g.padding + j;
                        if (y < 0 || z < 0 || y >= from.height || z >= from.width) continue;
                        S::read(in.at(c, b) + y * in.row + z * WORDS, x);
                        inside++;
                        for (int k = 0; k < S::K; k++)
                            best[k] = g.average ? best[k] + x[k] : select((x[k] > best[k]) | (x[k] != x[k]), x[k], best[k]);
                    }
                if (g.average)
                    for (int k = 0; k < S::K; k++) best[k] /= all(float(g.average == 1 ? g.kernel * g.kernel : inside));
                S::write(out.at(c, b) + h * out.row + w * WORDS, best);
            }
    zero_halo(to, c);
}

// Whether a pool is a maximum over windows of SIDE x SIDE, STRIDE apart, that all lie inside the map.
template <int SIDE, int STRIDE>
bool is_maximum(const Pool& g) {
    auto inside = [](int in, int out) { return (out - 1) * STRIDE + SIDE <= in; };
    return !g.average && g.kernel == SIDE && g.stride == STRIDE && g.padding == 0 && inside(g.in.height, g.out.height) &&
           inside(g.in.width, g.out.width);
}

template <class S, int SIDE, int STRIDE>
void maximum(const Pool& g, int c) {
    Steps in(g.in), out(g.out);
    for (int b = 0; b < g.out.blocks; b++)
        for (int h = 0; h < g.out.height; h++) {
            const uint32_t* from = in.at(c, b) + int64_t(h) * STRIDE * in.row;
            uint32_t* to = out.at(c, b) + h * out.row;
            for (int w = 0; w < g.out.width; w++, from += STRIDE * WORDS, to += WORDS) {
                V best[S::K], x[S::K];
                for (int k = 0; k < S::K; k++) best[k] = all(-INFINITY);
                for (int i = 0; i < SIDE; i++)
                    for (int j = 0; j < SIDE; j++) {
                        S::read(from + i * in.row + j * WORDS, x);
                        for (int k = 0; k < S::K; k++) {
                            const V kept = x[k] > best[k] ? x[k] : best[k];
                            best[k] = x[k] != x[k] ? x[k] : kept;
                        }
                    }
                S::write(to, best);
            }
        }
    zero_halo(g.out, c);
}

// The same sums in the same order as pool_backward's. The columns that the next window shares stay in registers.
template <class S, int SIDE, int STRIDE>
void maximum_backward(const Pool& g, int c) {
    constexpr int SHARED = STRIDE < SIDE ? SIDE - STRIDE : 0;
    Steps in(g.in), out(g.out), grad_out(g.grad_out), grad_in(g.grad_in);
    if (!g.accumulate)
        for (int b = 0; b < g.in.blocks; b++)
            for (int h = 0; h < g.in.height; h++)
                memset(grad_in.at(c, b) + h * grad_in.row, 0, sizeof(uint32_t) * WORDS * g.in.width);
    for (int b = 0; b < g.out.blocks; b++)
        for (int h = 0; h < g.out.height; h++) {
            const uint32_t* from = in.at(c, b) + int64_t(h) * STRIDE * in.row;
            uint32_t* to = grad_in.at(c, b) + int64_t(h) * STRIDE * grad_in.row;
            V x[SIDE][SIDE][S::K], sum[SIDE][SIDE][S::K];
            auto take = [&](int first) INLINE_LAMBDA {
                for (int i = 0; i < SIDE; i++)
                    for (int j = first; j < SIDE; j++) {
                        S::read(from + i * in.row + j * WORDS, x[i][j]);
                        S::read(to + i * grad_in.row + j * WORDS, sum[i][j]);
                    }
            };
            auto give = [&](int last) INLINE_LAMBDA {
                for (int i = 0; i < SIDE; i++)
                    for (int j = 0; j < last; j++) S::write(to + i * grad_in.row + j * WORDS, sum[i][j]);
            };
            for (int w = 0; w < g.out.width; w++) {
                w ? take(SHARED) : take(0);
                V d[S::K], best[S::K];
                S::read(grad_out.at(c, b) + h * grad_out.row + w * WORDS, d);
                S::read(out.at(c, b) + h * out.row + w * WORDS, best);
                for (int i = 0; i < SIDE; i++)
                    for (int j = 0; j < SIDE; j++)
                        for (int k = 0; k < S::K; k++) {
                            const I hit = (x[i][j][k] == best[k]) | (x[i][j][k] != x[i][j][k]);
                            sum[i][j][k] += hit ? d[k] : zero();
                            d[k] = hit ? zero() : d[k];
                        }
                if (w + 1 == g.out.width) {
                    give(SIDE);
                    break;
                }
                give(SIDE - SHARED);
                for (int i = 0; i < SIDE; i++)
                    for (int j = 0; j < SHARED; j++)
                        for (int k = 0; k < S::K; k++)
                            x[i][j][k] = x[i][j + STRIDE][k], sum[i][j][k] = sum[i][j + STRIDE][k];
                from += STRIDE * WORDS, to += STRIDE * WORDS;
            }
        }
    zero_halo(g.grad_in, c);
}

// A gradient goes to the first largest element of its window, or to all of it in equal parts.
template <class S>
void pool_backward(const Pool& g, int c) {
    Steps in(g.in), out(g.out), grad_out(g.grad_out), grad_in(g.grad_in);
    if (!g.accumulate)
        for (int b = 0; b < g.in.blocks; b++)
            for (int h = 0; h < g.in.height; h++)
                memset(grad_in.at(c, b) + h * grad_in.row, 0, sizeof(uint32_t) * WORDS * g.in.width);
    for (int b = 0; b < g.out.blocks; b++)
        for (int h = 0; h < g.out.height; h++)
            for (int w = 0; w < g.out.width; w++) {
                V d[S::K], x[S::K], best[S::K] = {}, sum[S::K];
                I open[S::K];
                S::read(grad_out.at(c, b) + h * grad_out.row + w * WORDS, d);
                for (int k = 0; k < S::K; k++) open[k] = I{} - 1;
                if (!g.average) S::read(out.at(c, b) + h * out.row + w * WORDS, best);
                int top = h * g.stride - g.padding, left = w * g.stride - g.padding, inside = g.kernel * g.kernel;
                if (g.average == 2) {
                    auto part = [&](int at, int size) {
                        return std::min(at + g.kernel, size) - std::max(at, 0);
                    };
                    inside = part(top, g.in.height) * part(left, g.in.width);
                }
                for (int i = 0; i < g.kernel; i++)
                    for (int j = 0; j < g.kernel; j++) {
                        int y = top + i, z = left + j;
                        if (y < 0 || z < 0 || y >= g.in.height || z >= g.in.width) continue;
                        uint32_t* to = grad_in.at(c, b) + y * grad_in.row + z * WORDS;
                        S::read(to, sum);
                        if (g.average) {
                            for (int k = 0; k < S::K; k++) sum[k] += d[k] / all(float(inside));
                        } else {
                            S::read(in.at(c, b) + y * in.row + z * WORDS, x);
                            for (int k = 0; k < S::K; k++) {
                                I hit = ((x[k] == best[k]) | (x[k] != x[k])) & open[k];
                                sum[k] += select(hit, d[k], zero());
                                open[k] &= ~hit;
                            }
                        }
                        S::write(to, sum);
                    }
            }
    zero_halo(g.grad_in, c);
}

template <class S>
void copy_channel(const Copy& g, int64_t c, const Share& lines) {
    Steps from(g.from), to(g.to);
    each_line(g.to, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
        for (int w = 0; w < g.to.width; w++) {
            V x[S::K], y[S::K];
            for (int k = 0; k < S::K; k++) x[k] = zero();
            uint32_t* q = to.at(c, b) + h * to.row + w * WORDS;
            if (g.mode != 4) S::read(from.at(c, b) + h * from.row + w * WORDS, x);
            if (g.mode == 1) {
                S::read(q, y);
                for (int k = 0; k < S::K; k++) x[k] += y[k];
            }
            S::write(q, x);
        }
    });
    zero_halo(g.to, c, lines);
}

// `wide` [C][B][H][W] and `flat` [C H W][B].
void flatten(const Map& wide, const Map& flat, bool back, int c) {
    Steps a(wide), z(flat);
    for (int b = 0; b < wide.blocks; b++)
        for (int h = 0; h < wide.height; h++)
            for (int w = 0; w < wide.width; w++) {
                uint32_t* p = a.at(c, b) + h * a.row + w * WORDS;
                uint32_t* q = z.at((int64_t(c) * wide.height + h) * wide.width + w, b);
                back ? memcpy(p, q, 4 * WORDS) : memcpy(q, p, 4 * WORDS);
            }
    if (back) zero_halo(wide, c);
}

template <class S>
void pack_channel(const Pack& g, int64_t c, const Share& lines) {
    Steps s(g.map);
    const int64_t area = int64_t(g.map.height) * g.map.width;
    constexpr int in_block = WORDS * S::parts;
    each_line(g.map, lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
        for (int w = 0; w < g.map.width; w++) {
            uint32_t* p = s.at(c, b) + h * s.row + w * WORDS;
            float x[in_block];
            V v[S::K];
            if (g.unpack) {
                S::read(p, v);
                memcpy(x, v, sizeof x);
            }
            for (int i = 0; i < in_block; i++) {
                int64_t n = b * in_block + i;
                float* at = g.plain + (n * g.map.channels + c) * area + h * g.map.width + w;
                if (g.unpack) {
                    if (n < g.samples) *at = x[i];
                } else {
                    x[i] = n < g.samples ? *at : 0;
                }
            }
            if (!g.unpack) {
                memcpy(v, x, sizeof x);
                S::write(p, v);
            }
        }
    });
    if (!g.unpack) zero_halo(g.map, c, lines);
}

template <class S>
void cross_entropy(const Loss& g) {
    Steps in(g.logits), out(g.grad);
    const int classes = g.logits.channels;
    constexpr int in_block = WORDS * S::parts;
    double total = 0;
    for (int b = 0; b < g.logits.blocks; b++) {
        float x[in_block], most[in_block];
        double sum[in_block];
        V v[S::K];
        for (int i = 0; i < in_block; i++) most[i] = -INFINITY, sum[i] = 0;
        for (int c = 0; c < classes; c++) {
            S::read(in.at(c, b), v);
            memcpy(x, v, sizeof x);
            for (int i = 0; i < in_block; i++) most[i] = x[i] > most[i] || x[i] != x[i] ? x[i] : most[i];
        }
        for (int c = 0; c < classes; c++) {
            S::read(in.at(c, b), v);
            memcpy(x, v, sizeof x);
            for (int i = 0; i < in_block; i++) sum[i] += std::exp(x[i] - most[i]);
        }
        for (int c = 0; c < classes; c++) {
            S::read(in.at(c, b), v);
            memcpy(x, v, sizeof x);
            for (int i = 0; i < in_block; i++) {
                int64_t n = int64_t(b) * in_block + i;
                if (n >= g.samples) {
                    x[i] = 0;
                    continue;
                }
                bool own = g.label[n] == c;
                if (own) total -= double(x[i]) - most[i] - std::log(sum[i]);
                x[i] = float((std::exp(x[i] - most[i]) / sum[i] - own) / g.samples);
            }
            memcpy(v, x, sizeof x);
            S::write(out.at(c, b), v);
        }
    }
    *g.loss = float(total / g.samples);
}

}  // namespace

void pool(const Pool& g, int thread, int threads) {
    Share channels(g.in.channels, thread, threads);
    const bool close = is_maximum<3, 1>(g), apart = is_maximum<2, 2>(g);
    for (int64_t c = channels.begin; c < channels.end; c++) {
        if (!g.in.packed && close)
            g.backward ? maximum_backward<Fp32, 3, 1>(g, c) : maximum<Fp32, 3, 1>(g, c);
        else if (!g.in.packed && apart)
            g.backward ? maximum_backward<Fp32, 2, 2>(g, c) : maximum<Fp32, 2, 2>(g, c);
        else if (g.backward)
            g.in.packed ? pool_backward<Bf16>(g, c) : pool_backward<Fp32>(g, c);
        else
            g.in.packed ? pool_forward<Bf16>(g, c, g.in, g.out) : pool_forward<Fp32>(g, c, g.in, g.out);
    }
}

void copy(const Copy& g, int thread, int threads) {
    if (g.mode == 2 || g.mode == 3) {
        const Map& wide = g.mode == 2 ? g.from : g.to;
        Share channels(wide.channels, thread, threads);
        for (int64_t c = channels.begin; c < channels.end; c++)
            flatten(wide, g.mode == 2 ? g.to : g.from, g.mode == 3, int(c));
        return;
    }
    const Home home(g.to, thread, threads);
    for (int64_t c = home.channels.begin; c < home.channels.end; c++)
        g.to.packed ? copy_channel<Bf16>(g, c, home.lines) : copy_channel<Fp32>(g, c, home.lines);
}

void pack(const Pack& g, int thread, int threads) {
    const Home home(g.map, thread, threads);
    for (int64_t c = home.channels.begin; c < home.channels.end; c++)
        g.map.packed ? pack_channel<Bf16>(g, c, home.lines) : pack_channel<Fp32>(g, c, home.lines);
}

void loss(const Loss& g, int thread, int) {
    if (thread == 0) g.logits.packed ? cross_entropy<Bf16>(g) : cross_entropy<Fp32>(g);
}
