// What maps of tokens are made of, and what is made of them: embeddings, other places, tensors, a loss.
#include <cmath>
#include <vector>

#include "functions.h"

namespace {

template <class S>
constexpr int GROUP = WORDS * S::parts;  // lanes that are read and written at once

template <class S>
INLINE void read(const uint32_t* p, float* x) {
    V v[S::K];
    S::read(p, v);
    memcpy(x, v, sizeof v);
}

template <class S>
INLINE void write(uint32_t* p, const float* x) {
    V v[S::K];
    memcpy(v, x, sizeof v);
    S::write(p, v);
}

template <class S>
void embed(const Embedding& g, int thread, int threads) {
    constexpr int N = GROUP<S>;
    Steps out(g.out), add(g.add ? *g.add : g.out);
    const Share groups(g.out.width, thread, threads);
    for (int64_t w = groups.begin; w < groups.end; w++) {
        const float* from[N];
        for (int i = 0; i < N; i++) {
            const int64_t j = w * N + i, row = j < g.tokens ? g.row[j] : -1;
            from[i] = row < 0 ? nullptr : g.table + row * g.out.channels;
        }
        for (int64_t c = 0; c < g.out.channels; c++) {
            float x[N] = {};
            if (g.add) read<S>(add.at(c, 0) + w * WORDS, x);
            for (int i = 0; i < N; i++)
                if (from[i]) x[i] += from[i][c];
            write<S>(out.at(c, 0) + w * WORDS, x);
        }
    }
}

template <class S>
void embed_backward(const EmbeddingBackward& g, int thread, int threads) {
    constexpr int N = GROUP<S>;
    const int64_t channels = g.grad.channels;
    if (g.clear) {
        const Share rows(g.rows * channels, thread, threads);
        memset(g.grad_table + rows.begin, 0, sizeof(float) * (rows.end - rows.begin));
        barrier();
    }
    Steps grad(g.grad);
    const Share own(channels, thread, threads);
    for (int64_t w = 0; w * N < g.tokens; w++)
        for (int64_t c = own.begin; c < own.end; c++) {
            float x[N];
            read<S>(grad.at(c, 0) + w * WORDS, x);
            for (int i = 0; i < N && w * N + i < g.tokens; i++)
                if (int64_t row = g.row[w * N + i]; row >= 0 && row != g.padding) g.grad_table[row * channels + c] += x[i];
        }
}

template <class S>
void rearranged(const Rearrange& g, int thread, int threads) {
    constexpr int N = GROUP<S>;
    Steps in(g.in), out(g.out);
    const Share own(g.in.channels, thread, threads);
    std::vector<float> from(size_t(g.in.width) * N), to(size_t(g.out.width) * N);
    for (int64_t c = own.begin; c < own.end; c++) {
        for (int w = 0; w < g.in.width; w++) read<S>(in.at(c, 0) + w * WORDS, &from[w * N]);
        std::fill(to.begin(), to.end(), 0.0f);
        for (int64_t i = 0; i < g.count; i++) {
            const int32_t j = g.source[i];
            if (j < 0) continue;
            if (g.scatter) to[j] += g.scale * from[i]; else to[i] = g.scale * from[j];
        }
        for (int w = 0; w < g.out.width; w++) write<S>(out.at(c, 0) + w * WORDS, &to[w * N]);
    }
}

template <class S>
void pack_tokens(const TokenPack& g, int thread, int threads) {
    constexpr int N = GROUP<S>;
    Steps map(g.map);
    const Share groups(g.map.width, thread, threads);
    for (int64_t w = groups.begin; w < groups.end; w++) {
        const int64_t valid = g.tokens - w * N;
        const int n = int(valid < 0 ? 0 : valid < N ? valid : N);
        for (int64_t c = 0; c < g.map.channels; c++) {
            uint32_t* p = map.at(c, 0) + w * WORDS;
            float* plain = g.plain + g.channel[c];
            float x[N] = {};
            if (g.unpack) {
                read<S>(p, x);
                for (int i = 0; i < n; i++) plain[g.token[w * N + i]] = x[i];
            } else {
                for (int i = 0; i < n; i++) x[i] = plain[g.token[w * N + i]];
                write<S>(p, x);
            }
        }
    }
}

template <class S>
void cross_entropy(const TokenLoss& g, int thread, int threads) {
    constexpr int N = GROUP<S>, K = S::K;
    Steps logits(g.logits), grad(g.grad);
    int64_t counted = 0;
    for (int64_t i = 0; i < g.tokens; i++) counted += g.label[i] != g.ignored;
    const Share groups(g.logits.width, thread, threads);
    for (int64_t w = groups.begin; w < groups.end; w++) {
        auto at = [&](int64_t c) INLINE_LAMBDA { return logits.at(c, 0) + w * WORDS; };
        int32_t label[N];
        float weight[N];
        for (int i = 0; i < N; i++) {
            const int64_t j = w * N + i;
            const bool counts = j < g.tokens && g.label[j] != g.ignored;
            label[i] = counts ? int32_t(g.label[j]) : -1;
            weight[i] = counts ? 1.0f / float(counted) : 0.0f;
        }
        V most[K], total[K] = {}, x[K], share[K], own[K] = {};
        I which[K];
        memcpy(which, label, sizeof label);
        memcpy(share, weight, sizeof weight);
        S::read(at(0), most);
        for (int64_t c = 1; c < g.logits.channels; c++) {
            S::read(at(c), x);
            for (int k = 0; k < K; k++) most[k] = larger(x[k], most[k]);
        }
        for (int64_t c = 0; c < g.logits.channels; c++) {
            S::read(at(c), x);
            const I here = I{} + int32_t(c);
            for (int k = 0; k < K; k++) {
                own[k] = select(which[k] == here, x[k], own[k]);
                total[k] += exponential(x[k] - most[k]);
            }
        }
        float sum[N], top[N], value[N];
        memcpy(sum, total, sizeof sum);
        memcpy(top, most, sizeof top);
        memcpy(value, own, sizeof value);
        for (int i = 0; i < N; i++)
            g.each[w * N + i] = label[i] < 0 ? 0.0f : std::log(sum[i]) + (top[i] - value[i]);
        for (int64_t c = 0; c < g.logits.channels; c++) {
            S::read(at(c), x);
            const I here = I{} + int32_t(c);
            for (int k = 0; k < K; k++) {
                const V p = exponential(x[k] - most[k]) / total[k] - select(which[k] == here, all(1), zero());
                x[k] = select(which[k] < 0, zero(), p * share[k]);
            }
            S::write(grad.at(c, 0) + w * WORDS, x);
        }
    }
    barrier();
    if (thread) return;
    double sum = 0;
    for (int64_t i = 0; i < g.tokens; i++) sum += g.each[i];
    *g.loss = float(sum / double(counted ? counted : 1));
}

template <class S>
void multiplied(const Multiply& g, int thread, int threads) {
    const Home home(g.out, thread, threads);
    Steps left(g.a), right(g.b), to(g.out);
    for (int64_t c = home.channels.begin; c < home.channels.end; c++) {
        each_line(g.out, home.lines, [&](int64_t b, int64_t h) INLINE_LAMBDA {
            const uint32_t *p = left.at(c, b) + h * left.row, *r = right.at(c, b) + h * right.row;
            uint32_t* q = to.at(c, b) + h * to.row;
            for (int w = 0; w < g.out.width; w++, p += WORDS, r += WORDS, q += WORDS) {
                V x[S::K], y[S::K], z[S::K];
                S::read(p, x);
                S::read(r, y);
                if (g.accumulate) S::read(q, z);
                for (int k = 0; k < S::K; k++) x[k] = g.accumulate ? z[k] + x[k] * y[k] : x[k] * y[k];
                S::write(q, x);
            }
        });
        zero_halo(g.out, c, home.lines);
    }
}

}  // namespace

#define BY_STORAGE(map, function) (map).packed ? function<Bf16>(g, thread, threads) : function<Fp32>(g, thread, threads)

void embedding(const Embedding& g, int thread, int threads) { BY_STORAGE(g.out, embed); }
void embedding_backward(const EmbeddingBackward& g, int thread, int threads) { BY_STORAGE(g.grad, embed_backward); }
void rearrange(const Rearrange& g, int thread, int threads) { BY_STORAGE(g.in, rearranged); }
void token_pack(const TokenPack& g, int thread, int threads) { BY_STORAGE(g.map, pack_tokens); }
void token_loss(const TokenLoss& g, int thread, int threads) { BY_STORAGE(g.logits, cross_entropy); }
void multiply(const Multiply& g, int thread, int threads) { BY_STORAGE(g.out, multiplied); }
