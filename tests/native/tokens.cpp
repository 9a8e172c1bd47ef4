// LayerNorm and attention of tokens beside plain loops in double, in both storages, for one to four threads: results,
// zeros behind the last token, and nothing else written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

void close(double got, double want, const char* where, double size = 1) {
    check(std::fabs(got - want) <= (packed ? 0.02 : 2e-5) * (size + std::fabs(want)), where, got, want);
}

constexpr uint32_t NOTHING = 0x7fc07fc0u;  // NaN in both storages

struct Room {  // channels of tokens in memory of their own, NaN at first
    static constexpr int GAP = 48;
    std::vector<uint32_t> words;
    Map map;
    int tokens;
    Room(int tokens, int channels) : tokens(tokens) {
        const int of_column = packed ? 32 : 16, width = (tokens + of_column - 1) / of_column + 1;
        words.assign(size_t(channels) * (width * 16 + GAP), NOTHING);
        map = Map{nullptr, channels, 1, 1, width, 0, packed, GAP};
    }
    Map view() {
        Map m = map;
        m.data = words.data();
        return m;
    }
    int lanes() const { return map.width * (packed ? 32 : 16); }
    size_t channel() const { return size_t(map.width) * 16 + GAP; }
    float get(int c, int lane) const {
        const uint32_t word = words[c * channel() + (packed ? lane / 32 * 16 + lane % 16 : lane)];
        const uint32_t bits = !packed ? word : lane % 32 < 16 ? word & 0xffff0000u : word << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    void set(int c, int lane, float x) {
        uint32_t bits, &word = words[c * channel() + (packed ? lane / 32 * 16 + lane % 16 : lane)];
        std::memcpy(&bits, &x, sizeof x);
        if (packed) bits = lane % 32 < 16 ? (bits & 0xffff0000u) | (word & 0xffffu) : (word & 0xffff0000u) | bits >> 16;
        word = bits;
    }
    Room& random(bool rest = false) {
        for (int c = 0; c < map.channels; c++)
            for (int i = 0; i < (rest ? lanes() : tokens); i++) set(c, i, i < tokens ? float(int(chance() % 33) - 16) / 8 : 0.0f);
        return *this;
    }
    void is_whole(bool zero) const {  // what lies behind the tokens, and between the channels
        for (int c = 0; c < map.channels; c++) {
            for (int i = tokens; i < lanes(); i++) check(zero ? get(c, i) == 0 : std::isfinite(get(c, i)), "rest", get(c, i));
            for (size_t i = size_t(map.width) * 16; i < channel(); i++) check(words[c * channel() + i] == NOTHING, "gap");
        }
    }
};

template <class T>
void run(Kind kind, const T& args) {
    check(fs_size(kind) == int64_t(sizeof(T)), "size");
    Op op{kind, const_cast<T*>(&args)};
    fs_run(&op, 1, threads);
}

void norm(int tokens, int channels, bool rms, bool in_place) {
    what = "layer norm";
    Room x = Room(tokens, channels).random(true), grad = Room(tokens, channels).random(true), out(tokens, channels);
    Room into(tokens, channels), given = grad;
    Room& grad_x = in_place ? grad : into;
    std::vector<float> gamma(channels), beta(channels), mean(x.lanes()), invstd(x.lanes()), of_gamma(channels), of_beta(channels);
    for (float& g : gamma) g = float(chance() % 8) / 4;
    for (float& b : beta) b = float(chance() % 8) / 4 - 1;
    const LayerNorm n{x.view(), out.view(), gamma.data(), rms ? nullptr : beta.data(), mean.data(), invstd.data(), 0.01f, rms};
    run(LAYER_NORM, n);
    run(LAYER_NORM_BACKWARD, LayerNormBackward{n, grad.view(), grad_x.view(), of_gamma.data(), rms ? nullptr : of_beta.data()});
    std::vector<double> to_gamma(channels), to_beta(channels);
    for (int i = 0; i < tokens; i++) {
        double m = 0, v = 0, s1 = 0, s2 = 0;
        for (int c = 0; c < channels && !rms; c++) m += double(x.get(c, i)) / channels;
        for (int c = 0; c < channels; c++) v += std::pow(x.get(c, i) - m, 2) / channels;
        const double inverse = 1 / std::sqrt(v + double(0.01f));
        for (int c = 0; c < channels; c++) {
            const double hat = (x.get(c, i) - m) * inverse, d = given.get(c, i);
            close(out.get(c, i), hat * gamma[c] + (rms ? 0 : beta[c]), "out");
            to_gamma[c] += d * hat, to_beta[c] += d;
            s1 += rms ? 0 : d * gamma[c] / channels, s2 += d * gamma[c] * hat / channels;
        }
        for (int c = 0; c < channels; c++) {
            const double hat = (x.get(c, i) - m) * inverse;
            close(grad_x.get(c, i), inverse * (given.get(c, i) * gamma[c] - s1 - hat * s2), "gradient", 1 + inverse);
        }
    }
    for (int c = 0; c < channels; c++) {
        close(of_gamma[c], to_gamma[c], "gamma", tokens);
        if (!rms) close(of_beta[c], to_beta[c], "beta", tokens);
    }
    out.is_whole(false), grad_x.is_whole(true);
}

void attend(int samples, int length, int keys, int heads, int kv_heads, int size, bool causal, bool marked = false) {
    what = marked ? "attention with a bias and dropout" : "attention";
    const int tokens = samples * length, others = samples * keys, group = heads / kv_heads;
    Room q = Room(tokens, heads * size).random(), k = Room(others, kv_heads * size).random();
    Room v = Room(others, kv_heads * size).random(), grad = Room(tokens, heads * size).random();
    Room out(tokens, heads * size), grad_q(tokens, heads * size);
    Room grad_k(others, kv_heads * size), grad_v(others, kv_heads * size);
    std::vector<float> logsum(size_t(heads) * q.lanes());
    const float scale = 0.25f;
    const int64_t row = (length + 15) / 16 * 16, each = keys * row;
    std::vector<float> bias(size_t(heads * each));  // of [key][query]
    for (float& b : bias) b = float(chance() % 16) / 4;
    std::vector<uint8_t> keep(size_t(samples * heads * each / 8));
    for (uint8_t& bits : keep) bits = uint8_t(chance());
    const float factor = marked ? 2 : 1;
    const Attention a{q.view(), k.view(), v.view(), out.view(), logsum.data(), marked ? bias.data() : nullptr,
                      marked ? keep.data() : nullptr, 0, each, samples, length, keys, heads, kv_heads, size, causal, scale, factor};
    auto added = [&](int h, int i, int j) { return marked ? bias[size_t(h * each + j * row + i)] * std::log(2.0) : 0.0; };
    auto kept = [&](int b, int h, int i, int j) {
        const int64_t at = (int64_t(b) * heads + h) * each + j * row + i;
        return marked ? factor * double(keep[size_t(at / 8)] >> at % 8 & 1) : 1.0;
    };
    run(ATTENTION, a);
    run(ATTENTION_BACKWARD, AttentionBackward{a, grad.view(), grad_q.view(), grad_k.view(), grad_v.view()});
    std::vector<double> want_k(size_t(kv_heads) * size * others), want_v(want_k.size());
    for (int b = 0; b < samples; b++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < length; i++) {
                const int first = h * size, kv_first = h / group * size, lane = b * length + i, seen = causal ? i + 1 : keys;
                auto product = [&](const Room& x, const Room& y, int j) {
                    double sum = 0;
                    for (int c = 0; c < size; c++) sum += double(x.get(first + c, lane)) * y.get(kv_first + c, b * keys + j);
                    return sum;
                };
                std::vector<double> p(seen), slope(seen), of_out(size), of_q(size);
                double total = 0, delta = 0;
                for (int j = 0; j < seen; j++) total += p[j] = std::exp(scale * product(q, k, j) + added(h, i, j));
                for (int j = 0; j < seen; j++) p[j] /= total, slope[j] = kept(b, h, i, j) * product(grad, v, j), delta += p[j] * slope[j];
                for (int j = 0; j < seen; j++)
                    for (int c = 0; c < size; c++) {
                        const double ds = scale * p[j] * (slope[j] - delta);
                        const size_t at = size_t(kv_first + c) * others + b * keys + j;
                        const double weight = p[j] * kept(b, h, i, j);
                        of_out[c] += weight * v.get(kv_first + c, b * keys + j);
                        of_q[c] += ds * k.get(kv_first + c, b * keys + j);
                        want_k[at] += ds * q.get(first + c, lane), want_v[at] += weight * grad.get(first + c, lane);
                    }
                close(logsum[size_t(h) * q.lanes() + lane], std::log(total), "logsum");
                for (int c = 0; c < size; c++) {
                    close(out.get(first + c, lane), of_out[c], "out");
                    close(grad_q.get(first + c, lane), of_q[c], "q", size);
                }
            }
    for (int c = 0; c < kv_heads * size; c++)
        for (int i = 0; i < others; i++) {
            close(grad_k.get(c, i), want_k[size_t(c) * others + i], "k", size);
            close(grad_v.get(c, i), want_v[size_t(c) * others + i], "v", 4);
        }
    for (const Room* room : {&out, &grad_q, &grad_k, &grad_v}) room->is_whole(true);
}

}  // namespace

int main() {
    for (packed = 0; packed < 2; packed++)
        for (threads = 1; threads <= 4; threads++) {
            for (int kind = 0; kind < 4; kind++) {
                for (int tokens : {1, 15, 16, 33, 300}) norm(tokens, 7, kind & 1, kind & 2);
                norm(65, 1, kind & 1, kind & 2), norm(17, 65, kind & 1, kind & 2);
            }
            for (bool causal : {false, true}) {
                for (int length : {1, 7, 15, 16, 17, 25, 65, 96, 129}) attend(3, length, length, 2, 1, 8, causal);
                for (int size : {1, 7, 33}) attend(2, 19, 19, 4, 2, size, causal);
                for (int length : {1, 15, 16, 33, 100}) attend(2, length, length, 2, 1, 9, causal, true);
            }
            for (int length : {1, 17, 96})
                for (int keys : {1, 16, 33, 129}) attend(2, length, keys, 4, 2, 9, false, length == 17);
        }
    return 0;
}
