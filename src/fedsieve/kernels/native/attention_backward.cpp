// The gradients of attention: the probabilities are computed anew, from q, k and the sums' logarithms.
#include "attention.h"

using namespace attention_parts;

namespace {

template <int D>
struct Lower {  // in groups of 2 D lanes: a's lower half, and b's
    static constexpr int at(int l) { return l % (2 * D) < D ? l : L + l - D; }
};
template <int D>
struct Upper {
    static constexpr int at(int l) { return l % (2 * D) < D ? l + D : L + l; }
};

template <int D = L / 2>
INLINE void transpose(V* x) {
    for (int i = 0; i < L; i++) {
        if (i & D) continue;
        const V a = x[i], b = x[i + D];
        x[i] = shuffled<Lower<D>>(a, b), x[i + D] = shuffled<Upper<D>>(a, b);
    }
    if constexpr (D > 1) transpose<D / 2>(x);
}

// to[j][i] = from[i][j] for i < rows and j < columns, both whole vectors.
void transpose(const float* from, int64_t line, int64_t rows, int64_t columns, float* to, int64_t to_line) {
    for (int64_t i = 0; i < rows; i += L)
        for (int64_t j = 0; j < columns; j += L) {
            V x[L];
            for (int l = 0; l < L; l++) x[l] = load(from + (i + l) * line + j);
            transpose(x);
            for (int l = 0; l < L; l++) store(to + (j + l) * to_line + i, x[l]);
        }
}

struct Backward {  // of one head, as in Forward, and [token][channel] what ends in _t
    float *q, *k, *v, *grad, *q_t, *grad_t, *grad_q, *grad_k_t, *grad_v_t;
    float *paired_q, *paired_k, *paired_v, *paired_grad;  // where PAIRS: channels of q, as it was, and of the others
    float *tokens_k, *tokens_q_t, *tokens_grad_t;         // and tokens
    float factor;                                         // of the products of q and k
    float *logsum, *delta;  // of the queries: `delta` is the sum of the output times its gradient; logsum times log2(e)
    Prefetch prefetch;
    Marks marks;
};

// p, as dropout leaves it, and dp [keys][MOST queries], of n vectors of queries, and what the keys add to the gradient of
// the queries.
template <int n, bool pairs>
void block_scores(const Shape& s, Backward& g, bool causal, int64_t query, int64_t begin, int64_t end, float* p,
                  float* dp) {
    V logsum[n], delta[n];
    for (int j = 0; j < n; j++) logsum[j] = load(g.logsum + query + j * L), delta[j] = load(g.delta + query + j * L);
    const int64_t seen = causal ? std::max(begin, std::min(end, query)) : end;
    const int64_t depth = pairs ? (s.size + 1) / 2 : s.size;
    auto scores = [&](int64_t from, int64_t to, auto masked) INLINE_LAMBDA {
        const float *k = pairs ? g.paired_k : g.k, *q = (pairs ? g.paired_q : g.q) + query;
        each_score<n, pairs>(k, q, s.line, depth, from, to, [&](auto r, int64_t key, auto& acc) INLINE_LAMBDA {
            g.prefetch.step();
            for (int i = 0; i < decltype(r)::value; i++)
                for (int j = 0; j < n; j++) {
                    V x = pairs ? acc[i][j] * all(g.factor) : acc[i][j];
                    x = power_of_two(g.marks.added(x, s, key + i, query + j * L) - logsum[j]);
                    if (decltype(masked)::value) x = select(sees(query, j, key + i), x, zero());
                    store(p + (key + i - begin) * MOST + j * L, x);
                }
        });
    };
    scores(begin, seen, Constant<0>{}), scores(seen, end, Constant<1>{});
    const float *v = pairs ? g.paired_v : g.v, *grad = (pairs ? g.paired_grad : g.grad) + query;
    each_score<n, pairs>(v, grad, s.line, depth, begin, end, [&](auto r, int64_t key, auto& acc) INLINE_LAMBDA {
        for (int i = 0; i < decltype(r)::value; i++)
            for (int j = 0; j < n; j++) {
                const int64_t at = (key + i - begin) * MOST + j * L;
                const V each = load(p + at);
                auto kept = [&](V x) INLINE_LAMBDA {
                    return g.marks.kept(x * all(g.marks.factor), s, key + i, query + j * L);
                };
                store(dp + at, each * ((g.marks.keep ? kept(acc[i][j]) : acc[i][j]) - delta[j]));
                if (g.marks.keep) store(p + at, kept(each));
            }
    });
    if (pairs) {
        alignas(64) float rows[MOST / 2 * n * L];
        const int64_t keys = end - begin;
        if (keys % 2)
            for (int j = 0; j < n; j++) store(dp + keys * MOST + j * L, zero());
        pair_rows(dp, MOST, keys, n * L, rows, n * L);
        const float* k = g.tokens_k + begin / 2;
        return add_product<n, true>(k, s.line, rows, n * L, (keys + 1) / 2, g.grad_q + query, s.line, s.size);
    }
    add_product<n>(g.k + begin, s.line, dp, MOST, end - begin, g.grad_q + query, s.line, s.size);
}

// The same for the queries from s.whole on; p and dp are those of query s.whole.
void block_last_scores(const Shape& s, Backward& g, bool causal, int64_t begin, int64_t end, float* p, float* dp) {
    alignas(64) float scores[FEW * MOST], slopes[FEW * MOST];
    last_scores(s, g.q, g.k, begin, end, scores, MOST), last_scores(s, g.grad, g.v, begin, end, slopes, MOST);
    for (int64_t query = s.whole; query < s.tokens; query++, p++, dp++) {
        float *x = scores + (query - s.whole) * MOST, *d = slopes + (query - s.whole) * MOST;
        const int64_t last = causal ? std::min(query + 1, end) : end;
        for (int64_t key = begin; key < end; key += L, x += L, d += L) {
            V each = power_of_two(load(x) - all(g.logsum[query]));
            each = select(lane_numbers() < I{} + int(last - key), each, zero());
            const V slope = each * (load(d) - all(g.delta[query]));
            store(d, slope);
            for (int l = 0; l < std::min(int64_t(L), end - key); l++) {
                p[(key - begin + l) * MOST] = each[l];
                dp[(key - begin + l) * MOST] = slope[l];
            }
        }
        add_last_sums(s, slopes + (query - s.whole) * MOST, g.k + begin, end - begin, 1, g.grad_q + query);
    }
}

// Adds what the queries of a block give to the gradients of the keys of a block, and the keys to those of the queries.
template <bool pairs>
void block_gradients(const Shape& s, Backward& g, bool causal, int64_t query, int64_t key) {
    alignas(64) float p[(MOST + 1) * MOST], dp[(MOST + 1) * MOST];
    const int64_t keys = std::min(key + s.block, s.keys), queries = std::min(query + s.block, s.tokens);
    auto scores = [&](auto n, int64_t j, int64_t begin, int64_t end) INLINE_LAMBDA {
        const int64_t at = (begin - key) * MOST + j - query;
        if (begin < end) block_scores<decltype(n)::value, pairs>(s, g, causal, j, begin, end, p + at, dp + at);
    };
    const int64_t whole = std::min(rounded(queries, L), s.whole);
    int64_t j = query;
    for (; j + N * L <= whole; j += N * L) {
        scores(Constant<N>{}, j, key, causal ? std::min(keys, j + L) : keys);
        if (causal)  // keys that the second vector alone attends to
            scores(Constant<1>{}, j + L, std::max(key, j + L), std::min(keys, j + 2 * L));
    }
    for (; j < whole; j += L) scores(Constant<1>{}, j, key, causal ? std::min(keys, j + L) : keys);
    if (j < queries) block_last_scores(s, g, causal, key, keys, p + j - query, dp + j - query);
    constexpr int rows = R < L ? R : L, in_one = pairs ? 2 : 1;
    if (pairs)
        for (float* x : {p, dp}) {
            if ((queries - query) % 2)
                for (int64_t i = 0; i < keys - key; i++) x[i * MOST + queries - query] = 0;
            pair_columns(x, MOST, keys - key, queries - query, x, MOST);
        }
    for (int64_t k = key; k < keys; k += rows) {
        g.prefetch.step();
        const int64_t first = causal && k > query ? k : query, at = (k - key) * MOST + (first - query) / in_one;
        const int64_t row = first / in_one * s.wide, length = (queries - first + in_one - 1) / in_one;
        auto add = [&](const float* from, const float* with, float* to) INLINE_LAMBDA {
            add_product<pairs>(from + at, MOST, with + row, s.wide, length, to + k * s.wide, s.wide,
                               std::min(keys - k, int64_t(rows)), s.wide);
        };
        add(p, pairs ? g.tokens_grad_t : g.grad_t, g.grad_v_t), add(dp, pairs ? g.tokens_q_t : g.q_t, g.grad_k_t);
    }
}

template <class S>
void backward(const AttentionBackward& b, int thread, int threads) {
    const Attention& a = b.of;
    constexpr bool pairs = PAIRS && S::parts == 2;
    const Shape s(a);
    const int64_t transposed = std::max(s.width, s.key_width) * s.wide;
    const int64_t lanes = lanes_of(a.q), group = a.heads / a.kv_heads;
    Scratch scratch((pairs ? 11 : 6) * s.matrix + (pairs ? 6 : 4) * transposed + 2 * s.line);
    Backward g{{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, a.scale * LOG2E, {}, {}, Prefetch(s),
               Marks(a, s, 0)};
    for (float** p : {&g.q, &g.k, &g.v, &g.grad, &g.grad_q}) *p = s.take(scratch);
    if (pairs)
        for (float** p : {&g.paired_q, &g.paired_k, &g.paired_v, &g.paired_grad, &g.tokens_k}) *p = s.take(scratch);
    for (float** p : {&g.q_t, &g.grad_t, &g.grad_k_t, &g.grad_v_t}) *p = scratch.take(transposed);
    if (pairs)
        for (float** p : {&g.tokens_q_t, &g.tokens_grad_t}) *p = scratch.take(transposed);
    float* out = s.take(scratch);
    g.logsum = scratch.take(s.line), g.delta = scratch.take(s.line);
    std::fill(g.logsum, g.logsum + s.width, 0.0f);
    const Share shared(int64_t(a.samples) * a.kv_heads, thread, threads);
    const Heads of{a};
    for (int64_t i = shared.begin * group; i < shared.end * group; i++) {
        if (i % group == 0) {
            of.key(a.k, i).template read<S>(s, g.k);
            of.key(a.v, i).template read<S>(s, g.v);
            if (pairs) {
                pair_rows(g.k, s.line, s.size, s.key_width, g.paired_k, s.line);
                pair_rows(g.v, s.line, s.size, s.key_width, g.paired_v, s.line);
                pair_columns(g.k, s.line, s.size, s.key_width, g.tokens_k, s.line);
            }
            std::fill(g.grad_k_t, g.grad_k_t + transposed, 0.0f);
            std::fill(g.grad_v_t, g.grad_v_t + transposed, 0.0f);
        }
        of.query(b.grad, i).template read<S>(s, g.grad);
        of.query(a.q, i).template read<S>(s, g.q, pairs ? 1 : g.factor);
        of.query(a.out, i).template read<S>(s, out);
        transpose(g.q, s.line, s.wide, s.width, g.q_t, s.wide);
        transpose(g.grad, s.line, s.wide, s.width, g.grad_t, s.wide);
        if (pairs) {
            pair_rows(g.q, s.line, s.size, s.width, g.paired_q, s.line);
            pair_rows(g.grad, s.line, s.size, s.width, g.paired_grad, s.line);
            pair_rows(g.q_t, s.wide, s.width, s.wide, g.tokens_q_t, s.wide);
            pair_rows(g.grad_t, s.wide, s.width, s.wide, g.tokens_grad_t, s.wide);
            if (s.whole < s.tokens) of.query(a.q, i).template read<S>(s, g.q, g.factor);
        }
        const float* logsum = a.logsum + i % a.heads * lanes + i / a.heads * a.length;
        for (int64_t t = 0; t < s.tokens; t++) g.logsum[t] = logsum[t] * LOG2E;
        for (int64_t t = 0; t < s.width; t += L) {
            V delta = zero();
            for (int64_t c = 0; c < s.size; c++) {
                delta += load(g.grad + c * s.line + t) * load(out + c * s.line + t);
                store(g.grad_q + c * s.line + t, zero());
            }
            store(g.delta + t, delta);
        }
        g.marks = Marks(a, s, i);
        g.prefetch.begin();
        if (i + 1 < shared.end * group) {
            for (const Map* m : {&a.q, &b.grad, &a.out}) g.prefetch.add(of.query(*m, i + 1));
            if ((i + 1) % group == 0) g.prefetch.add(of.key(a.k, i + 1)), g.prefetch.add(of.key(a.v, i + 1));
            g.prefetch.add(of.query(b.grad_q, i + 1), true);
            for (const Map* m : {&b.grad_k, &b.grad_v}) g.prefetch.add(of.key(*m, i + 1), true);
        }
        for (int64_t query = 0; query < s.tokens; query += s.block)
            for (int64_t key = 0; key < (a.causal ? std::min(s.tokens, query + s.block) : s.keys); key += s.block)
                block_gradients<pairs>(s, g, a.causal, query, key);
        of.query(b.grad_q, i).template write<S>(s, g.grad_q, a.scale);
        if ((i + 1) % group) continue;
        transpose(g.grad_k_t, s.wide, s.key_width, s.wide, out, s.line);
        of.key(b.grad_k, i).template write<S>(s, out, pairs ? a.scale : LN2);
        transpose(g.grad_v_t, s.wide, s.key_width, s.wide, out, s.line);
        of.key(b.grad_v, i).template write<S>(s, out);
    }
    zero_rest<S>(b.grad_q, int64_t(a.samples) * a.length, thread, threads);
    for (const Map* m : {&b.grad_k, &b.grad_v}) zero_rest<S>(*m, int64_t(a.samples) * a.keys, thread, threads);
}

}  // namespace

void attention_backward(const AttentionBackward& b, int thread, int threads) {
    b.of.q.packed ? backward<Bf16>(b, thread, threads) : backward<Fp32>(b, thread, threads);
}
