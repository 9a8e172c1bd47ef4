// The kernels of a training step beside plain loops in double, on awkward shapes, in both storages, for one to four
// threads. All numbers are small multiples of 1/8: sums of products are then exact, and compared bit by bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "abi.h"

namespace {

std::mt19937 chance(1);
int threads, packed;
const char* what;

void check(bool right, const char* where, double got = 0, double want = 0) {
    if (right) return;
    std::printf("%s, %s, %d threads, %s: got %.9g, not %.9g\n", what, where, threads, packed ? "bf16" : "fp32", got, want);
    std::exit(1);
}

double rounded(double x) {  // as it is stored
    float f = float(x);
    if (!packed) return f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&f, &bits, 4);
    return f;
}

void equal(double got, double want, const char* where) { check(got == rounded(want), where, got, rounded(want)); }

void close(double got, double want, const char* where) {
    check(std::fabs(got - want) <= (packed ? 0.01 : 2e-5) * (1 + std::fabs(want)), where, got, want);
}

struct Samples {  // [n, c, h, w]; zeros around
    int n, c, h, w;
    std::vector<float> x;
    Samples(int n, int c, int h, int w) : n(n), c(c), h(h), w(w), x(size_t(n) * c * h * w) {}
    float& at(int i, int j, int y, int z) { return x[((size_t(i) * c + j) * h + y) * w + z]; }
    double get(int i, int j, int y, int z) { return y < 0 || z < 0 || y >= h || z >= w ? 0 : at(i, j, y, z); }
    Samples& random() {
        for (float& v : x) v = float(int(chance() % 33) - 16) / 8;
        return *this;
    }
    void each(const std::function<void(int, int, int, int)>& f) {
        for (int i = 0; i < n; i++)
            for (int j = 0; j < c; j++)
                for (int y = 0; y < h; y++)
                    for (int z = 0; z < w; z++) f(i, j, y, z);
    }
};

template <class T>
void run(Kind kind, const T& args) {
    check(fs_size(kind) == int64_t(sizeof(T)), "size");
    Op op{kind, const_cast<T*>(&args)};
    fs_run(&op, 1, threads);
}

struct Room {  // a map in memory of its own, NaN at first
    std::vector<uint32_t> words;
    Map map;
    Room(int n, int c, int h, int w, int halo) {
        int block = packed ? 32 : 16, blocks = (n + block - 1) / block;
        words.assign(size_t(c) * blocks * (h + 2 * halo) * (w + 2 * halo) * 16, 0x7fc07fc0u);
        map = Map{words.data(), c, blocks, h, w, halo, packed};
    }
    Room(Samples& s, int halo) : Room(s.n, s.c, s.h, s.w, halo) { run(PACK, Pack{map, s.x.data(), s.n, 0}); }
    Samples samples(int n) {
        Samples s(n, map.channels, map.height, map.width);
        run(PACK, Pack{map, s.x.data(), n, 1});
        halo_is_zero();
        return s;
    }
    void halo_is_zero() {
        size_t i = 0;
        for (int c = 0; c < map.channels * map.blocks; c++)
            for (int y = -map.halo; y < map.height + map.halo; y++)
                for (int x = -map.halo; x < map.width + map.halo; x++)
                    for (int l = 0; l < 16; l++, i++)
                        if (y < 0 || x < 0 || y >= map.height || x >= map.width) check(words[i] == 0, "halo", words[i]);
    }
    int64_t line() const { return int64_t(map.width + 2 * map.halo) * 16; }
    int64_t channel() const { return line() * (map.height + 2 * map.halo) * map.blocks; }
};

void layout() {
    what = "layout";
    Samples s = Samples(37, 2, 3, 2).random();
    Room r(s, 1);
    r.halo_is_zero();
    s.each([&](int i, int c, int y, int x) {
        int block = packed ? 32 : 16;
        uint32_t word = r.words[c * r.channel() + (i / block * 5 + y + 1) * r.line() + (x + 1) * 16 + i % 16];
        uint32_t bits = !packed ? word : i % 32 < 16 ? word & 0xffff0000u : word << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        equal(f, s.at(i, c, y, x), "word");
    });
    Samples back = r.samples(37);
    check(back.x == s.x, "back");
}

void product(int n, int in, int out, int k, int stride, int pad, int h, int w, int density) {
    what = "product";
    Samples x = Samples(n, in, h, w).random(), bias = Samples(1, out, 1, 1).random(), weight = Samples(out, in, k, k).random();
    std::vector<uint8_t> mask(weight.x.size());
    std::vector<int32_t> index;
    std::vector<float> value;
    for (size_t i = 0; i < mask.size(); i++) {
        mask[i] = density < 0 ? i == mask.size() / 2 : int(chance() % 100) < density;
        if (mask[i]) index.push_back(int32_t(i)), value.push_back(weight.x[i]);
        else weight.x[i] = 0;
    }
    const int count = int(index.size()), high = (h + 2 * pad - k) / stride + 1, wide = (w + 2 * pad - k) / stride + 1;
    const bool taps = k == 3 && stride == 1 && pad == 1;
    Samples grad = Samples(n, out, high, wide).random();
    Room from(x, pad), to(n, out, high, wide, 1), given(grad, k), into(n, in, h, w, 2);
    for (int tapped = 0; tapped <= taps; tapped++) {
        std::vector<int32_t> row(out + 1), offset(count + 1), tap(out * k * k + 1), flat(count + 1);
        fs_entries(mask.data(), out, in, k, 16 * k * k, 16 * k, 0, row.data(), flat.data(), tapped ? tap.data() : nullptr);
        fs_entries(mask.data(), out, in, k, from.channel(), from.line(), 0, row.data(), offset.data(),
                   tapped ? tap.data() : nullptr);
        std::vector<float> ordered(count + 1), found(count + 1, -1);
        check(row[0] == 0 && row[out] == count, "rows", row[out], count);
        for (int r = 0; r < out; r++)
            for (int i = row[r]; i < row[r + 1]; i++) {
                int at = r * in * k * k + flat[i] / 16;
                check(mask[at], "entries");
                ordered[i] = weight.x[at];
            }
        Gather g{from.map, to.map, row.data(), offset.data(), ordered.data(), bias.x.data(), nullptr, out, high, wide, stride,
                 1, 0, 0, 1, tapped ? tap.data() : nullptr};
        run(GATHER, g);
        Samples y = to.samples(n);
        y.each([&](int i, int o, int r, int c) {
            double sum = bias.x[o];
            for (int j = 0; j < in; j++)
                for (int t = 0; t < k * k; t++)
                    sum += x.get(i, j, r * stride - pad + t / k, c * stride - pad + t % k) * weight.at(o, j, t / k, t % k);
            equal(y.at(i, o, r, c), sum > 0 ? sum : 0, "forward");
        });
        g.out = given.map;
        std::vector<float> second(count + 1, -1), alone(count + 1, -1);
        run(DOT, Dot{g, found.data(), second.data()});
        run(DOT, Dot{g, alone.data(), nullptr});
        check(found == alone, "weight gradient by halves");
        for (int o = 0; o < out; o++)
            for (int e = row[o]; e < row[o + 1]; e++) {
                int t = flat[e] / 16 % (k * k), j = flat[e] / 16 / (k * k);
                double sum = 0;
                grad.each([&](int i, int c, int r, int q) {
                    if (c == o) sum += double(grad.at(i, o, r, q)) * x.get(i, j, r * stride - pad + t / k, q * stride - pad + t % k);
                });
                check(found[e] == sum, "weight gradient", found[e], sum);
            }
        check(found[count] == -1 && second[count] == -1, "beyond the weight gradient");
        std::vector<int32_t> rows(stride * stride * in + 1), where(count + 1), order(count + 1), line(in * k * k + 1);
        fs_transposed(index.data(), count, in, k, stride, pad, given.channel(), given.line(), given.map.halo, rows.data(),
                      where.data(), order.data(), tapped ? line.data() : nullptr);
        for (int i = 0; i < count; i++) ordered[i] = value[order[i]];
        for (int more = 0; more < 2; more++)  // the second time added to the first
            for (int top = 0; top < stride; top++)
                for (int left = 0; left < stride; left++)
                    run(GATHER, Gather{given.map, into.map, rows.data() + (top * stride + left) * in, where.data(), ordered.data(),
                                       nullptr, more ? &into.map : nullptr, in, (h - top + stride - 1) / stride,
                                       (w - left + stride - 1) / stride, 1, stride, top, left, 0,
                                       tapped ? line.data() : nullptr});
        Samples dx = into.samples(n);
        dx.each([&](int i, int j, int r, int c) {
            double sum = 0;
            for (int o = 0; o < out; o++)
                for (int t = 0; t < k * k; t++) {
                    int y = r + pad - t / k, z = c + pad - t % k;
                    if (y % stride == 0 && z % stride == 0) sum += grad.get(i, o, y / stride, z / stride) * weight.at(o, j, t / k, t % k);
                }
            equal(dx.at(i, j, r, c), rounded(sum) + sum, "input gradient");
        });
    }
}

void norm(int n, int h, int w, bool batch, bool plus, bool relu) {
    what = "norm";
    const int c = 3;
    Samples y = Samples(n, c, h, w).random(), add = Samples(n, c, h, w).random(), grad = Samples(n, c, h, w).random();
    Room ys(y, 0), adds(add, 1), grads(grad, 0), out(n, c, h, w, 1), back(n, c, h, w, 2);
    float gamma[c] = {0.5, -1, 2}, beta[c] = {0.3f, 0.01f, -0.2f}, mean[c] = {1, 2, 3}, var[c] = {1, 2, 3};
    float kept[c], inv[c], dgamma[c], dbeta[c];
    Norm op{ys.map, out.map, plus ? &adds.map : nullptr, batch ? gamma : nullptr, beta, mean, var, kept, inv, 0.25f, 1e-5f, n, 1,
            relu, 0, 0, nullptr};
    run(NORM, op);
    run(NORM_BACKWARD, NormBackward{op, grads.map, back.map, batch ? dgamma : nullptr, dbeta});
    Samples got = out.samples(n), dy = back.samples(n), rest = grads.samples(n);
    for (int j = 0; j < c; j++) {
        double count = double(n) * h * w, m = 0, v = 0, s1 = 0, s2 = 0;
        auto all = [&](auto f) {
            y.each([&](int i, int k, int r, int q) { if (k == j) f(i, r, q); });
        };
        all([&](int i, int r, int q) { m += y.at(i, j, r, q) / count; });
        all([&](int i, int r, int q) { v += std::pow(y.at(i, j, r, q) - m, 2) / count; });
        double s = batch ? 1 / std::sqrt(v + 1e-5) : 1;
        auto hat = [&](int i, int r, int q) { return batch ? (y.at(i, j, r, q) - m) * s : y.at(i, j, r, q); };
        auto pre = [&](int i, int r, int q) {
            return (batch ? gamma[j] : 1) * hat(i, r, q) + beta[j] + (plus ? add.at(i, j, r, q) : 0);
        };
        auto dp = [&](int i, int r, int q) { return relu && pre(i, r, q) <= 0 ? 0.0 : double(grad.at(i, j, r, q)); };
        all([&](int i, int r, int q) { s1 += dp(i, r, q), s2 += dp(i, r, q) * hat(i, r, q); });
        all([&](int i, int r, int q) {
            double p = pre(i, r, q);
            close(got.at(i, j, r, q), relu && p < 0 ? 0 : p, "forward");
            double d = batch ? gamma[j] * s * (dp(i, r, q) - s1 / count - hat(i, r, q) * s2 / count) : dp(i, r, q);
            close(dy.at(i, j, r, q), d, "gradient");
            if (plus) close(rest.at(i, j, r, q), dp(i, r, q), "gradient of the sum");
        });
        close(dbeta[j], s1, "gradient of the shift");
        if (batch) {
            close(dgamma[j], s2, "gradient of the scale");
            close(mean[j], 0.75 * (j + 1) + 0.25 * m, "running mean");
            close(var[j], 0.75 * (j + 1) + 0.25 * v * count / (count - 1), "running variance");
        }
    }
}

void group_norm(int n, int groups, int h, int w, bool plus, int relu) {
    what = "group norm";
    const int c = 6, each = c / groups;
    Samples y = Samples(n, c, h, w).random(), add = Samples(n, c, h, w).random(), grad = Samples(n, c, h, w).random();
    Room ys(y, 0), adds(add, 1), grads(grad, 0), out(n, c, h, w, 1), back(n, c, h, w, 2);
    const int samples = packed ? 32 : 16, blocks = ys.map.blocks;
    std::vector<float> mean(blocks * groups * samples), inv(mean.size()), sums((7 + blocks) * (2 * groups * samples + 2 * c));
    float gamma[c] = {0.5, -1, 2, 3, 1, -2}, beta[c] = {0.3f, 0.01f, -0.2f, 1, 2, 3}, dgamma[c], dbeta[c];
    Norm op{ys.map, out.map, plus ? &adds.map : nullptr, gamma, beta, nullptr, nullptr, mean.data(), inv.data(), 0, 1e-5f, n, 1,
            relu, groups, 0, sums.data()};
    run(NORM, op);
    run(NORM_BACKWARD, NormBackward{op, grads.map, back.map, dgamma, dbeta});
    Samples got = out.samples(n), dy = back.samples(n), rest = grads.samples(n);
    std::vector<double> shift(c), scale(c);
    for (int i = 0; i < n; i++)
        for (int g = 0; g < groups; g++) {
            double count = double(each) * h * w, m = 0, v = 0, s1 = 0, s2 = 0;
            auto all = [&](auto f) {
                for (int j = g * each; j < (g + 1) * each; j++)
                    for (int r = 0; r < h; r++)
                        for (int q = 0; q < w; q++) f(j, r, q);
            };
            all([&](int j, int r, int q) { m += y.at(i, j, r, q) / count; });
            all([&](int j, int r, int q) { v += std::pow(y.at(i, j, r, q) - m, 2) / count; });
            const double s = 1 / std::sqrt(v + 1e-5);
            auto hat = [&](int j, int r, int q) { return (y.at(i, j, r, q) - m) * s; };
            auto pre = [&](int j, int r, int q) { return gamma[j] * hat(j, r, q) + beta[j] + (plus ? add.at(i, j, r, q) : 0); };
            auto dp = [&](int j, int r, int q) {
                const double p = plus ? rounded(pre(j, r, q)) : pre(j, r, q);  // read off what is stored, or computed
                return (relu && p <= 0) || (relu == 2 && p >= 6) ? 0.0 : double(grad.at(i, j, r, q));
            };
            all([&](int j, int r, int q) { s1 += gamma[j] * dp(j, r, q), s2 += gamma[j] * dp(j, r, q) * hat(j, r, q); });
            all([&](int j, int r, int q) {
                const double p = pre(j, r, q);
                close(got.at(i, j, r, q), relu && p < 0 ? 0 : relu == 2 && p > 6 ? 6 : p, "forward");
                close(dy.at(i, j, r, q), s * (gamma[j] * dp(j, r, q) - s1 / count - hat(j, r, q) * s2 / count), "gradient");
                if (plus) close(rest.at(i, j, r, q), dp(j, r, q), "gradient of the sum");
                shift[j] += dp(j, r, q), scale[j] += dp(j, r, q) * hat(j, r, q);
            });
        }
    for (int j = 0; j < c; j++) {
        close(dbeta[j] / n, shift[j] / n, "gradient of the shift");
        close(dgamma[j] / n, scale[j] / n, "gradient of the scale");
    }
}

void activations(int n) {
    what = "activation";
    Samples x = Samples(n, 3, 5, 2).random(), grad = Samples(n, 3, 5, 2).random();
    for (float& v : x.x) v *= 3;
    const double e = 1e-6, root = std::sqrt(0.5), c = std::sqrt(8 / std::acos(-1));
    const std::function<double(double)> functions[] = {
        [](double v) { return 1 / (1 + std::exp(-v)); },
        [](double v) { return v / (1 + std::exp(-v)); },
        [&](double v) { return v / 2 * std::erfc(-v * root); },
        [&](double v) { return v / (1 + std::exp(-c * (v + 0.044715 * v * v * v))); },
        [](double v) { return v * std::fmin(std::fmax(v + 3, 0), 6) / 6; },
    };
    for (int f = 0; f < 5; f++) {
        Room from(x, 1), given(grad, 2), to(n, 3, 5, 2, 1);
        run(ACTIVATION, Activation{from.map, Map{}, to.map, f});
        Samples y = to.samples(n);
        run(ACTIVATION, Activation{from.map, given.map, given.map, f});
        Samples d = given.samples(n);
        for (size_t i = 0; i < x.x.size(); i++) {
            const double v = x.x[i], slope = (functions[f](v + e) - functions[f](v - e)) / (2 * e);
            close(y.x[i], functions[f](v), "value");
            if (f != HARDSWISH || std::fabs(v) != 3) close(d.x[i], grad.x[i] * slope, "gradient");
        }
    }
}

void pool(int n, int k, int stride, int pad, int h, int w, int average) {
    what = "pool";
    const int high = (h + 2 * pad - k) / stride + 1, wide = (w + 2 * pad - k) / stride + 1;
    Samples x = Samples(n, 2, h, w).random(), grad = Samples(n, 2, high, wide).random(), want(n, 2, h, w);
    Room from(x, 1), to(n, 2, high, wide, 1), given(grad, 0), into(n, 2, h, w, 2);
    Pool op{from.map, to.map, given.map, into.map, k, stride, pad, average, 0, 0};
    run(POOL, op);
    Samples y = to.samples(n);
    y.each([&](int i, int c, int r, int q) {
        double best = -INFINITY, sum = 0;
        int inside = 0, row = 0, column = 0;
        for (int t = 0; t < k * k; t++) {
            int a = r * stride - pad + t / k, b = q * stride - pad + t % k;
            if (a < 0 || b < 0 || a >= h || b >= w) continue;
            inside++, sum += x.at(i, c, a, b);
            if (x.at(i, c, a, b) > best) best = x.at(i, c, a, b), row = a, column = b;
        }
        double size = average == 1 ? k * k : inside;
        average ? close(y.at(i, c, r, q), sum / size, "mean") : equal(y.at(i, c, r, q), best, "maximum");
        if (!average) want.at(i, c, row, column) += grad.at(i, c, r, q);
        for (int t = 0; average && t < k * k; t++) {
            int a = r * stride - pad + t / k, b = q * stride - pad + t % k;
            if (a >= 0 && b >= 0 && a < h && b < w) want.at(i, c, a, b) += float(grad.at(i, c, r, q) / size);
        }
    });
    op.backward = 1;
    for (int more = 0; more < 2; more++) {
        op.accumulate = more;
        run(POOL, op);
        Samples dx = into.samples(n);
        dx.each([&](int i, int c, int r, int q) { close(dx.at(i, c, r, q), (1 + more) * want.at(i, c, r, q), "gradient"); });
    }
}

void copies(int n) {
    what = "copy";
    Samples x = Samples(n, 3, 4, 5).random();
    Room from(x, 2), to(n, 3, 4, 5, 1), flat(n, 60, 1, 1, 0);
    for (int mode = 0; mode < 2; mode++) {
        run(COPY, Copy{from.map, to.map, mode});
        Samples y = to.samples(n);
        for (size_t i = 0; i < x.x.size(); i++) equal(y.x[i], (1 + mode) * x.x[i], mode ? "add" : "copy");
    }
    run(COPY, Copy{from.map, flat.map, 2});
    check(flat.samples(n).x == x.x, "flatten");
    run(COPY, Copy{flat.map, to.map, 3});
    check(to.samples(n).x == x.x, "and back");
    run(COPY, Copy{to.map, to.map, 4});
    check(to.samples(n).x == std::vector<float>(x.x.size()), "zero");
}

void loss(int n, int classes) {
    what = "loss";
    Samples logits = Samples(n, classes, 1, 1).random();
    Room from(logits, 0), grad(n, classes, 1, 1, 0);
    std::vector<int64_t> label(n);
    for (int64_t& l : label) l = int64_t(chance() % classes);
    float got;
    run(LOSS, Loss{from.map, grad.map, label.data(), &got, n});
    Samples d = grad.samples(n);
    double mean = 0;
    for (int i = 0; i < n; i++) {
        double sum = 0;
        for (int c = 0; c < classes; c++) sum += std::exp(double(logits.at(i, c, 0, 0)));
        mean -= (logits.at(i, int(label[i]), 0, 0) - std::log(sum)) / n;
        for (int c = 0; c < classes; c++)
            close(d.at(i, c, 0, 0), (std::exp(double(logits.at(i, c, 0, 0))) / sum - (label[i] == c)) / n, "gradient");
    }
    close(got, mean, "mean");
    for (uint32_t l = 0; l < 16; l++)  // lanes without a sample
        if (!packed && n % 16 && l >= uint32_t(n % 16)) check(grad.words[size_t(grad.map.blocks - 1) * 16 + l] == 0, "padding");
}

void sgd(int m) {
    what = "sgd";
    Samples w = Samples(1, m, 1, 1).random(), v = Samples(1, m, 1, 1).random(), g = Samples(1, m, 1, 1).random();
    std::vector<float> value(m + 1), taken(m + 1, -1);
    std::vector<int32_t> index(m + 1);
    for (int i = 0; i < m; i++) index[i] = m - 1 - i;
    Samples w0 = w, v0 = v;
    run(SGD, Sgd{w.x.data(), v.x.data(), g.x.data(), m, 0.5f, 0.25f, 0.125f, 1, nullptr, 0, 0});
    for (int i = 0; i < m; i++) {
        double step = 0.25 * v0.x[i] + g.x[i] + 0.125 * w0.x[i];
        check(v.x[i] == float(step) && w.x[i] == float(w0.x[i] - 0.5 * step), "step", w.x[i], w0.x[i] - 0.5 * step);
    }
    w = w0;
    run(SGD, Sgd{w.x.data(), nullptr, g.x.data(), m, 0.5f, 0, 0, 2, value.data(), 0, 0});
    for (int i = 0; i < m; i++) {
        double th = w0.x[i] - 0.5 * g.x[i] * 2 * std::fabs(w0.x[i]);
        check(w.x[i] == float(th), "power", w.x[i], th);
        check(value[i] == float(std::copysign(th * th, th)), "effective weight", value[i], th * th);
    }
    Samples chained = w0, looked = w0, velocity = v0;
    run(SGD, Sgd{chained.x.data(), nullptr, g.x.data(), m, 0.5f, 0, 0, 2, value.data(), 0, 1});
    run(SGD, Sgd{looked.x.data(), velocity.x.data(), g.x.data(), m, 0.5f, 0.25f, 0.125f, 1, nullptr, 1, 0});
    for (int i = 0; i < m; i++) {
        check(chained.x[i] == float(w0.x[i] - 0.5 * g.x[i]), "a gradient of w", chained.x[i]);
        double d = g.x[i] + 0.125 * w0.x[i], step = d + 0.25 * (0.25 * v0.x[i] + d);
        check(looked.x[i] == float(w0.x[i] - 0.5 * step), "Nesterov", looked.x[i], w0.x[i] - 0.5 * step);
    }
    run(TAKE, Take{w.x.data(), index.data(), taken.data(), m});
    for (int i = 0; i < m; i++) check(taken[i] == w.x[m - 1 - i], "take");
    check(taken[m] == -1, "beyond");
}

void adam(int m, int from, bool power) {
    what = "adam";
    Samples w = Samples(1, m + from, 1, 1).random(), g = Samples(1, m + from, 1, 1).random(), start = w;
    std::vector<float> mean(m + from + 1, -1), square(m + from + 1, -1), value(m + from + 1, -1);
    for (int i = from; i < m + from; i++) mean[i] = square[i] = 0;
    std::vector<double> w64(w.x.begin(), w.x.end()), m64(m + from), v64(m + from);
    for (int t = 1; t <= 3; t++) {
        const double lr = 0.01, b1 = 0.9, b2 = 0.99, eps = 1e-8, decay = 0.125, keep = 0.98;
        run(ADAM, Adam{w.x.data() + from, mean.data() + from, square.data() + from, g.x.data() + from, m, float(1 - b1),
                       float(1 - b2), float(eps), float(decay), float(keep), float(lr / (1 - std::pow(b1, t))),
                       float(1 / std::sqrt(1 - std::pow(b2, t))), power ? 1.5f : 1, power ? value.data() + from : nullptr, 0});
        for (int i = from; i < m + from; i++) {
            double d = g.x[i] * (power ? 1.5 * std::sqrt(std::fabs(w64[i])) : 1) + decay * w64[i];
            m64[i] = b1 * m64[i] + (1 - b1) * d, v64[i] = b2 * v64[i] + (1 - b2) * d * d;
            double far = std::sqrt(v64[i] / (1 - std::pow(b2, t))) + eps;
            w64[i] = keep * w64[i] - lr * m64[i] / (1 - std::pow(b1, t)) / far;
            close(w.x[i], w64[i], "step"), close(mean[i], m64[i], "mean"), close(square[i], v64[i], "square");
            if (power) close(value[i], std::copysign(std::pow(std::fabs(w64[i]), 1.5), w64[i]), "effective weight");
        }
    }
    for (int i = 0; i < from; i++) check(w.x[i] == start.x[i] && mean[i] == -1 && square[i] == -1, "before");
    check(mean[m + from] == -1 && square[m + from] == -1 && value[m + from] == -1, "beyond");
}

void clipped(int m, float most) {
    what = "clip";
    Samples w = Samples(1, m, 1, 1).random(), g = Samples(1, m, 1, 1).random(), s = Samples(1, m, 1, 1).random();
    Samples from = Samples(1, m, 1, 1).random(), g0 = g;
    const int64_t parts = (m + 4095) / 4096;
    std::vector<double> sums(parts + 2, -1);
    sums[0] = 9;  // of another gradient
    run(ADJUST, Adjust{g.x.data(), w.x.data(), from.x.data(), s.x.data(), m, 2, 0.5f, sums.data() + 1});
    double all = 9;
    std::vector<double> want(m);
    for (int i = 0; i < m; i++) {
        want[i] = g0.x[i] * 2 * std::fabs(w.x[i]) + 0.5 * (w.x[i] - from.x[i]) + s.x[i];
        check(g.x[i] == float(want[i]), "changed", g.x[i], want[i]);
        all += want[i] * want[i];
    }
    check(sums[parts + 1] == -1, "sums beyond");
    run(CLIP, Clip{g.x.data(), m, sums.data(), parts + 1, most});
    const double by = std::fmin(1, most / (std::sqrt(all) + 1e-6));
    for (int i = 0; i < m; i++) check(std::fabs(g.x[i] - by * want[i]) <= 1e-6 * std::fabs(want[i]), "cut", g.x[i], by * want[i]);
}

}  // namespace

int main() {
    for (packed = 0; packed < 2; packed++)
        for (threads = 1; threads <= 4; threads++) {
            layout();
            for (int density : {0, -1, 30, 100}) {
                for (int n : {1, 15, 16, 17, 33, 65}) product(n, 3, 5, 3, 1, 1, 3, 5, density);
                for (int k : {1, 3, 5})
                    for (int stride : {1, 2})
                        for (int pad = 0; pad < k; pad++) product(2, 2, 3, k, stride, pad, 7, 5, density);
                for (int w : {1, 2, 4, 8, 16, 33}) product(2, 1, 2, 3, 1, 1, w < 5 ? w : 3, w, density);
                product(17, 65, 7, 1, 1, 0, 1, 1, density);
                product(1, 17, 19, 3, 2, 1, 2, 2, density);
            }
            for (int n : {2, 15, 16, 17, 33})
                for (int kind = 0; kind < 8; kind++) norm(n, 3, 2, kind & 1, kind & 2, kind & 4);
            norm(1, 1, 2, true, false, false);
            for (int n : {1, 16, 17, 70})
                for (int groups : {1, 2, 6}) group_norm(n, groups, 3, 2, groups & 2, n % 3);
            for (int groups : {1, 3}) group_norm(17, groups, 16, 32, groups & 1, 1), group_norm(33, groups, 32, 16, false, 2);
            activations(1), activations(17), activations(70);
            for (int kind = 0; kind < 8; kind++) norm(17, 16, 32, kind & 1, kind & 2, kind & 4), norm(3, 32, 17, kind & 1, kind & 2, kind & 4);
            product(33, 2, 3, 3, 1, 1, 32, 32, 30), product(5, 2, 3, 3, 2, 1, 64, 32, 30), product(17, 2, 3, 5, 1, 2, 16, 18, 30);
            for (int average : {0, 1, 2})
                for (int n : {1, 17, 33}) {
                    pool(n, 2, 2, 0, 4, 6, average);
                    pool(n, 3, 1, 0, 5, 4, average);
                    pool(n, 3, 2, 1, 5, 4, average);
                    pool(n, 5, 3, 2, 7, 7, average);
                    pool(n, 1, 2, 0, 3, 3, average);
                }
            for (int n : {1, 16, 17, 33, 65}) copies(n), loss(n, 1), loss(n, 10), loss(n, 17);
            for (int m : {0, 1, 7, 15, 16, 17, 65}) sgd(m), clipped(m, 1), clipped(m, 1e4f);
            for (int m : {0, 1, 7, 15, 16, 17, 33, 65})
                for (int from : {0, 3}) adam(m, from, false), adam(m, from, true);
            clipped(4097, 1), clipped(12288, 1);
        }
    return 0;
}
