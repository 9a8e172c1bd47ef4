// Attention: softmax(scale q k^T) v, of each sample and head.
#include "attention.h"

#include <cmath>

using namespace attention_parts;

namespace {

struct Forward {  // of one head: [channel][token], q times scale and log2(e)
    float *q, *k, *v, *out, *logsum, *rows;
    float *paired_q, *paired_k, *paired_v;  // where PAIRS: channels of q, as it was, and of k, and tokens of v
    float factor;                // of their products
    Prefetch prefetch;
    Marks marks;
};

// Adds the keys from `begin` to `end`, a block at most, to what n vectors of queries attend to: `most` is the largest
// score yet, and `total` and `out` are sums of 2^(score - most).
template <int n, bool pairs>
void add_keys(const Shape& s, Forward& f, bool causal, int64_t query, int64_t begin, int64_t end, V* most, V* total) {
    alignas(64) float p[MOST * n * L];
    V highest[n];
    for (int j = 0; j < n; j++) highest[j] = most[j];
    const int64_t seen = causal ? std::max(begin, std::min(end, query)) : end;  // keys before are seen by all
    auto scores = [&](int64_t from, int64_t to, auto masked) INLINE_LAMBDA {
        const float *k = pairs ? f.paired_k : f.k, *q = (pairs ? f.paired_q : f.q) + query;
        const int64_t depth = pairs ? (s.size + 1) / 2 : s.size;
        each_score<n, pairs>(k, q, s.line, depth, from, to, [&](auto r, int64_t key, auto& acc) INLINE_LAMBDA {
            f.prefetch.step();
            for (int i = 0; i < decltype(r)::value; i++)
                for (int j = 0; j < n; j++) {
                    V x = f.marks.added(pairs ? acc[i][j] * all(f.factor) : acc[i][j], s, key + i, query + j * L);
                    if (decltype(masked)::value) x = select(sees(query, j, key + i), x, all(-INFINITY));
                    highest[j] = larger(highest[j], x);
                    store(p + ((key + i - begin) * n + j) * L, x);
                }
        });
    };
    scores(begin, seen, Constant<0>{}), scores(seen, end, Constant<1>{});
    if (begin > 0) {
        V shrink[n];
        for (int j = 0; j < n; j++) shrink[j] = power_of_two(most[j] - highest[j]), total[j] *= shrink[j];
        for (int64_t c = 0; c < s.size; c++)
            for (int j = 0; j < n; j++) {
                float* o = f.out + c * s.line + query + j * L;
                store(o, load(o) * shrink[j]);
            }
    }
    const int64_t keys = end - begin;
    auto weight = [&](int64_t i, int j) INLINE_LAMBDA {
        const V x = power_of_two(load(p + (i * n + j) * L) - highest[j]);
        total[j] += x;
        return f.marks.kept(x, s, begin + i, query + j * L);
    };
    constexpr int in_one = pairs ? 2 : 1;
    for (int64_t i = 0; i < keys; i += in_one)
        for (int j = 0; j < n; j++) {
            V x = weight(i, j);
            if (pairs) x = paired(x, i + 1 < keys ? weight(i + 1, j) : zero());
            store(p + (i / in_one * n + j) * L, x);
        }
    const float* v = pairs ? f.paired_v + begin / 2 : f.v + begin;
    add_product<n, pairs>(v, s.line, p, n * L, (keys + in_one - 1) / in_one, f.out + query, s.line, s.size);
    for (int j = 0; j < n; j++) most[j] = highest[j];
}

// out and logsum of n vectors of queries.
template <int n, bool pairs>
void forward_queries(const Shape& s, Forward& f, bool causal, int64_t query) {
    V most[n], total[n];
    for (int j = 0; j < n; j++) most[j] = all(-3.40282347e38f), total[j] = zero();
    for (int64_t c = 0; c < s.size; c++)
        for (int j = 0; j < n; j++) store(f.out + c * s.line + query + j * L, zero());
    const int64_t last = causal ? std::min(s.tokens, query + L) : s.keys;
    for (int64_t key = 0; key < last; key += s.block)
        add_keys<n, pairs>(s, f, causal, query, key, std::min(last, key + s.block), most, total);
    if (n == 2 && causal && last < s.tokens)  // keys that the second vector alone attends to
        add_keys<1, pairs>(s, f, causal, query + L, last, std::min(s.tokens, last + L), most + 1, total + 1);
    for (int j = 0; j < n; j++) {
        const I none = f.marks.bias ? most[j] == all(-3.40282347e38f) : I{};  // no key may be attended to: the sum is 0
        store(f.logsum + query + j * L, select(none, all(INFINITY), most[j] * all(LN2) + logarithm(total[j])));
        total[j] = select(none, zero(), all(f.marks.factor) / total[j]);
    }
    for (int64_t c = 0; c < s.size; c++)
        for (int j = 0; j < n; j++) {
            float* o = f.out + c * s.line + query + j * L;
            store(o, load(o) * total[j]);
        }
}

// The same for the queries from s.whole on.
void forward_last(const Shape& s, Forward& f, bool causal) {
    last_scores(s, f.q, f.k, 0, s.keys, f.rows, s.line);
    for (int64_t query = s.whole; query < s.tokens; query++) {
        float* row = f.rows + (query - s.whole) * s.line;
        const int64_t last = causal ? query + 1 : s.keys;
        V highest = all(-3.40282347e38f), total = zero();
        for (int64_t key = 0; key < last; key += L) {
            const V x = select(lane_numbers() < I{} + int(last - key), load(row + key), all(-INFINITY));
            highest = larger(highest, x);
            store(row + key, x);
        }
        float most = highest[0];
        for (int l = 1; l < L; l++) most = most > highest[l] ? most : highest[l];
        for (int64_t key = 0; key < last; key += L) {
            const V x = power_of_two(load(row + key) - all(most));
            total += x;
            store(row + key, x);
        }
        const float sum = in_pairs(total);
        f.logsum[query] = most * LN2 + logarithm(all(sum))[0];
        for (int64_t c = 0; c < s.size; c++) f.out[c * s.line + query] = 0;
        add_last_sums(s, row, f.v, last, 1 / sum, f.out + query);
    }
}

template <class S>
void forward(const Attention& a, int thread, int threads) {
    constexpr bool pairs = PAIRS && S::parts == 2;
    const Shape s(a);
    Scratch scratch((pairs ? 7 : 4) * s.matrix + (1 + FEW) * s.line);
    Forward f{{}, {}, {}, {}, {}, {}, {}, {}, {}, a.scale * LOG2E, Prefetch(s), Marks(a, s, 0)};
    for (float** p : {&f.q, &f.k, &f.v, &f.out}) *p = s.take(scratch);
    if (pairs)
        for (float** p : {&f.paired_q, &f.paired_k, &f.paired_v}) *p = s.take(scratch);
    f.logsum = scratch.take(s.line), f.rows = scratch.take(FEW * s.line);
    const int64_t lanes = lanes_of(a.q), group = a.heads / a.kv_heads;
    const Share share(int64_t(a.samples) * a.heads, thread, threads);
    const Heads of{a};
    for (int64_t i = share.begin; i < share.end; i++) {
        if (i == share.begin || i % group == 0) {
            of.key(a.k, i).template read<S>(s, f.k);
            of.key(a.v, i).template read<S>(s, f.v);
            if (pairs) {
                pair_rows(f.k, s.line, s.size, s.key_width, f.paired_k, s.line);
                pair_columns(f.v, s.line, s.size, s.key_width, f.paired_v, s.line);
            }
        }
        if (pairs) {
            of.query(a.q, i).template read<S>(s, f.q);
            pair_rows(f.q, s.line, s.size, s.width, f.paired_q, s.line);
        }
        if (!pairs || s.whole < s.tokens) of.query(a.q, i).template read<S>(s, f.q, f.factor);
        f.marks = Marks(a, s, i);
        f.prefetch.begin();
        if (i + 1 < share.end) {
            f.prefetch.add(of.query(a.q, i + 1)), f.prefetch.add(of.query(a.out, i + 1), true);
            if ((i + 1) % group == 0) f.prefetch.add(of.key(a.k, i + 1)), f.prefetch.add(of.key(a.v, i + 1));
        }
        int64_t query = 0;
        for (; query + N * L <= s.whole; query += N * L) forward_queries<N, pairs>(s, f, a.causal, query);
        for (; query < s.whole; query += L) forward_queries<1, pairs>(s, f, a.causal, query);
        if (query < s.tokens) forward_last(s, f, a.causal);
        of.query(a.out, i).template write<S>(s, f.out);
        memcpy(a.logsum + i % a.heads * lanes + i / a.heads * a.length, f.logsum, size_t(s.tokens) * sizeof(float));
    }
    zero_rest<S>(a.out, int64_t(a.samples) * a.length, thread, threads);
}

}  // namespace

void attention(const Attention& a, int thread, int threads) {
    a.q.packed ? forward<Bf16>(a, thread, threads) : forward<Fp32>(a, thread, threads);
}
