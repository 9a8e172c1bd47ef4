// One token of one sample: what it takes to go through a model of tokens whose earlier ones are known. A value is a row
// of floats, one a channel.
#include <cmath>
#include <vector>

#include "functions.h"

namespace {

constexpr int PANEL = 64;  // tokens whose keys lie together
constexpr int CHAINS = 4;  // sums at once, so that none waits for its last addition

// The floats at L places, which are read four at once.
#if defined(__SSE2__)
INLINE __m128 pick_four(const float* x, const uint16_t* place) {
    uint64_t p;
    memcpy(&p, place, sizeof p);
    const __m128 a = _mm_load_ss(x + (p & 0xffff)), b = _mm_load_ss(x + (p >> 16 & 0xffff));
    const __m128 c = _mm_load_ss(x + (p >> 32 & 0xffff)), d = _mm_load_ss(x + (p >> 48));
    return _mm_movelh_ps(_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
}
INLINE V pick(const float* x, const uint16_t* place) {
#if defined(__AVX2__)
    auto eight = [=](int i) INLINE_LAMBDA {
        return _mm256_set_m128(pick_four(x, place + i + 4), pick_four(x, place + i));
    };
#endif
#if defined(__AVX512F__)
    const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(eight(0)));
    return (V)_mm512_maskz_insertf64x4(__mmask8(-1), low, _mm256_castps_pd(eight(8)), 1);
#elif defined(__AVX2__)
    return (V)eight(0);
#else
    return (V)pick_four(x, place);
#endif
}
#else
INLINE V pick(const float* x, const uint16_t* place) {
    uint64_t p;
    memcpy(&p, place, sizeof p);
    return V{x[p & 0xffff], x[p >> 16 & 0xffff], x[p >> 32 & 0xffff], x[p >> 48]};
}
#endif

// The sum over i < n of f(x[i]), f being of vectors.
template <class F>
INLINE float total(const float* x, int64_t n, F&& f) {
    V acc = zero(), last = zero();
    int64_t i = 0;
    for (; i + L <= n; i += L) acc += f(load(x + i));
    if (i == n) return in_pairs(acc);
    for (int64_t l = 0; i + l < n; l++) last[l] = x[i + l];
    last = f(last);
    for (int64_t l = n - i; l < L; l++) last[l] = 0;
    return in_pairs(acc + last);
}

// out[i] = scale a[i] (0 where a is null) + b[i] (0 where b is null)
void sum(float* out, const float* a, float scale, const float* b, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = (a ? scale * a[i] : 0.0f) + (b ? b[i] : 0.0f);
}

}  // namespace

void sliced_linear(const SlicedLinear& g, int thread, int threads) {
    const Share slices((g.rows + WORDS - 1) / WORDS, thread, threads);
    for (int64_t s = slices.begin; s < slices.end; s++) {
        V acc[G] = {};
        for (int64_t i = g.start[s]; i < g.start[s + 1]; i += WORDS)
            for (int k = 0; k < G; k++)
                acc[k] += load(g.value + i + k * L) * pick(g.x, g.index + i + k * L);
        float y[WORDS];
        memcpy(y, acc, sizeof y);
        const int32_t* order = g.order + s * WORDS;
        const int rows = int(g.rows - s * WORDS < WORDS ? g.rows - s * WORDS : WORDS);
        for (int r = 0; r < rows; r++) g.y[order[r]] = y[r] + (g.bias ? g.bias[order[r]] : 0.0f);
    }
}

void vector_norm(const VectorNorm& g, int thread, int) {
    if (thread) return;
    const float n = float(g.channels);
    const float mean = g.rms ? 0 : total(g.x, g.channels, [](V x) INLINE_LAMBDA { return x; }) / n;
    const V middle = all(mean);
    const float squares = total(g.x, g.channels, [=](V x) INLINE_LAMBDA { return (x - middle) * (x - middle); });
    const float invstd = 1 / std::sqrt(squares / n + g.eps);
    for (int64_t c = 0; c < g.channels; c++)
        g.out[c] = (g.x[c] - mean) * invstd * (g.gamma ? g.gamma[c] : 1.0f) + (g.beta ? g.beta[c] : 0.0f);
}

void cached_attention(const CachedAttention& g, int thread, int threads) {
    static thread_local std::vector<float> scores, query;
    const int64_t now = *g.position, n = now + 1, wide = (g.size + WORDS - 1) / WORDS * WORDS, each = g.heads / g.kv_heads;
    const Share heads(g.kv_heads, thread, threads);
    scores.resize(g.room);
    query.resize(g.size);
    float* p = scores.data();
    for (int64_t h = heads.begin; h < heads.end; h++) {
        float *keys = g.keys + h * g.size * g.room, *values = g.values + h * wide * g.room;
        for (int64_t c = 0; c < g.size; c++) {
            keys[(now / PANEL * g.size + c) * PANEL + now % PANEL] = g.k[h * g.size + c];
            values[now * wide + c] = g.v[h * g.size + c];
        }
        for (int64_t head = h * each; head < (h + 1) * each; head++) {
            for (int64_t c = 0; c < g.size; c++) query[c] = g.scale * g.q[head * g.size + c];
            for (int64_t t = 0; t < n; t += CHAINS * L) {
                const float* key = keys + t / PANEL * g.size * PANEL + t % PANEL;
                V acc[CHAINS] = {};
                if (g.bias) memcpy(acc, g.bias + head * g.bias_head + now * g.room + t, sizeof acc);
                for (int64_t c = 0; c < g.size; c++, key += PANEL)
                    for (int k = 0; k < CHAINS; k++) acc[k] += all(query[c]) * load(key + k * L);
                memcpy(p + t, acc, sizeof acc);
            }
            for (int64_t t = n; t % WORDS; t++) p[t] = -INFINITY;
            V most = load(p), sum = zero();
            for (int64_t t = L; t < n; t += L) most = larger(load(p + t), most);
            float top = most[0];
            for (int l = 1; l < L; l++) top = most[l] > top ? most[l] : top;
            for (int64_t t = 0; t < n; t += L) {
                const V e = exponential(load(p + t) - all(top));
                store(p + t, e);
                sum += e;
            }
            const V part = all(1 / in_pairs(sum));
            for (int64_t c = 0; c < g.size; c += WORDS) {
                V acc[CHAINS][G] = {};
                for (int64_t t = 0; t < n; t += CHAINS)
                    for (int j = 0; j < CHAINS; j++)
                        for (int k = 0; k < G; k++)
                            acc[j][k] += all(p[t + j]) * load(values + (t + j) * wide + c + k * L);
                float y[WORDS];
                for (int k = 0; k < G; k++)
                    store(y + k * L, ((acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k])) * part);
                for (int64_t i = c; i < g.size && i < c + WORDS; i++) g.out[head * g.size + i] = y[i - c];
            }
        }
    }
}

void table_row(const TableRow& g, int thread, int) {
    if (thread) return;
    const int64_t row = g.table ? g.row[g.position ? *g.position : 0] : -1;
    sum(g.out, g.x, g.scale, row < 0 ? nullptr : g.table + row * g.channels, g.channels);
}

void vector_combination(const VectorCombination& g, int thread, int) {
    if (thread) return;
    const float* table = g.table + (g.position ? *g.position : 0) * g.terms * g.channels;
    for (int64_t c = 0; c < g.channels; c++) {
        float sum = 0;
        for (int64_t k = 0; k < g.terms; k++) sum += table[k * g.channels + c] * g.x[g.source[k * g.channels + c]];
        g.out[c] = sum;
    }
}
