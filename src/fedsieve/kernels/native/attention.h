// What attention and its gradients share. No whole matrix of scores is ever held.
//
// A head is copied out, [channel][token]. Its scores are computed with queries in the lanes: [key][query], by blocks, so
// that the softmax is over successive vectors and every product is a sum of broadcast numbers times vectors.
#pragma once
#include <algorithm>
#include <vector>

#include "functions.h"
#include "lanes.h"
#include "sums.h"

namespace attention_parts {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int R = 8;  // rows of a tile of a product
#else
constexpr int R = 4;
#endif
constexpr int N = 2;        // vectors of a tile: the code for causal attention relies on it
constexpr int BLOCK = 64;   // about so many keys, and queries, are worked at once
constexpr int MOST = 96;    // no block has more
constexpr int FEW = L / 2;  // at most so many queries at the end have their keys in the lanes instead
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

template <int n>
using Constant = std::integral_constant<int, n>;

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Calls f(constant r, row) for r rows at a time.
template <class F>
INLINE void each_row(int64_t begin, int64_t end, F&& f) {
    for (; begin + R <= end; begin += R) f(Constant<R>{}, begin);
    if (begin + 4 <= end) f(Constant<4>{}, begin), begin += 4;
    if (begin + 2 <= end) f(Constant<2>{}, begin), begin += 2;
    if (begin < end) f(Constant<1>{}, begin);
}

// Products of bfloat16 numbers, two of them in a float's place, where the CPU has such: probabilities and their gradients
// are rounded to bfloat16 for them, as PyTorch does.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
INLINE V add_pairs(V sum, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE V successive(V a, V b) { return (V)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }  // all of a's, then b's
INLINE V paired(V a, V b) {  // in each place, one of a's and one of b's
    const V x[2] = {b, a};
    V both;
    Bf16::write((uint32_t*)&both, x);
    return both;
}
#else
constexpr bool PAIRS = false;
INLINE V add_pairs(V sum, V, V) { return sum; }
INLINE V successive(V a, V) { return a; }
INLINE V paired(V a, V) { return a; }
#endif

// acc[i][j] += the sum over l < length of a[i * row + l * step] * (vector j of b + l * line).
template <int r, int n, bool pairs = false>
INLINE void multiply_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t line, int64_t length,
                          V (&acc)[r][n]) {
    for (int64_t l = 0; l < length; l++, a += step, b += line) {
        V x[n];
        for (int j = 0; j < n; j++) x[j] = load(b + j * L);
        for (int i = 0; i < r; i++) {
            const V w = all(a[i * row]);
            for (int j = 0; j < n; j++) acc[i][j] = pairs ? add_pairs(acc[i][j], w, x[j]) : acc[i][j] + w * x[j];
        }
    }
}

// c[i][j] += the same, for i < rows and n vectors.
template <int n, bool pairs = false>
void add_product(const float* a, int64_t row, const float* b, int64_t line, int64_t length, float* c, int64_t c_line,
                 int64_t rows) {
    each_row(0, rows, [&](auto height, int64_t i) INLINE_LAMBDA {
        constexpr int r = decltype(height)::value;
        V acc[r][n];
        for (int k = 0; k < r; k++)
            for (int j = 0; j < n; j++) acc[k][j] = load(c + (i + k) * c_line + j * L);
        multiply_tile<r, n, pairs>(a + i * row, row, 1, b, line, length, acc);
        for (int k = 0; k < r; k++)
            for (int j = 0; j < n; j++) store(c + (i + k) * c_line + j * L, acc[k][j]);
    });
}

// The same for any number of vectors.
template <bool pairs>
void add_product(const float* a, int64_t row, const float* b, int64_t line, int64_t length, float* c,
                        int64_t c_line, int64_t rows, int64_t columns) {
    int64_t j = 0;
    for (; j + N * L <= columns; j += N * L) add_product<N, pairs>(a, row, b + j, line, length, c + j, c_line, rows);
    for (; j < columns; j += L) add_product<1, pairs>(a, row, b + j, line, length, c + j, c_line, rows);
}

// Products of a [size][line] and b alike over their rows: done(constant r, key, acc) gets those of r keys, from `begin`
// to `end`, with n vectors of queries.
template <int n, bool pairs = false, class F>
INLINE void each_score(const float* a, const float* b, int64_t line, int64_t size, int64_t begin, int64_t end,
                       F&& done) {
    each_row(begin, end, [&](auto height, int64_t key) INLINE_LAMBDA {
        constexpr int r = decltype(height)::value;
        V acc[r][n];
        for (int i = 0; i < r; i++)
            for (int j = 0; j < n; j++) acc[i][j] = zero();
        multiply_tile<r, n, pairs>(a + key, 1, line, b, line, size, acc);
        done(height, key, acc);
    });
}

INLINE I lane_numbers() {
    I x;
    for (int i = 0; i < L; i++) x[i] = i;
    return x;
}

// Which lanes of vector j of queries from `query` on are not before a key.
INLINE I sees(int64_t query, int j, int64_t key) { return lane_numbers() >= I{} + int(key - query - j * L); }

// Memory of the calling thread, of which parts are taken one after another.
struct Scratch {
    float* next;
    explicit Scratch(int64_t count) {
        thread_local std::vector<float> memory;
        if (int64_t(memory.size()) < count + WORDS) memory.resize(size_t(count + WORDS));
        next = memory.data() + (WORDS - (uintptr_t(memory.data()) / sizeof(float)) % WORDS) % WORDS;
    }
    float* take(int64_t count) { return std::exchange(next, next + count); }
};

struct Shape {
    int64_t tokens, keys, size;  // of a sample: queries; keys; channels of a head
    int64_t width, key_width, wide;  // all as whole vectors
    int64_t line, matrix;        // floats of a row [channel] of tokens, and of all
    int64_t block;               // tokens
    int64_t whole;               // queries that are in the lanes: all, or all but the FEW at the end
    int64_t row;                 // queries of a row of bias and of dropout's bits
    explicit Shape(const Attention& a)
        : tokens(a.length), keys(a.keys), size(a.size), width(rounded(tokens, L)), key_width(rounded(keys, L)),
          wide(rounded(size, L)) {
        const int64_t most = std::max(tokens, keys);
        line = rounded(rounded(most, L) + 2 * SLACK, WORDS);
        if (line / WORDS % 2 == 0) line += WORDS;  // so that the rows' beginnings lie in different sets of the cache
        matrix = wide * line;
        const int64_t blocks = std::max(int64_t(1), (most + BLOCK / 2) / BLOCK);
        block = rounded((most + blocks - 1) / blocks, L);
        row = rounded(tokens, WORDS);
        whole = tokens % L <= FEW && !a.bias && !a.keep ? tokens - tokens % L : width;
    }
    float* take(Scratch& scratch) const {
        float* p = scratch.take(matrix) + SLACK;
        for (int64_t c = size; c < wide; c++) std::fill(p + c * line, p + c * line + std::max(width, key_width), 0.0f);
        return p;
    }
};

// What is added to a head's scores, and which of its probabilities dropout keeps. Without any, one or both are null.
struct Marks {
    const float* bias = nullptr;
    const uint8_t* keep = nullptr;
    float factor = 1;  // of the probabilities that are kept
    Marks(const Attention& a, const Shape& s, int64_t i) {
        if (a.bias) bias = a.bias + i / a.heads * a.bias_sample + i % a.heads * a.bias_head;
        if (a.keep) keep = a.keep + i * s.keys * s.row / 8, factor = a.factor;
    }
    INLINE V added(V score, const Shape& s, int64_t key, int64_t query) const {
        return bias ? score + load(bias + key * s.row + query) : score;
    }
    INLINE V kept(V x, const Shape& s, int64_t key, int64_t query) const {  // 0 where it is dropped
        if (!keep) return x;
        const int64_t at = key * s.row + query;
        uint32_t mask = keep[at / 8] >> at % 8;
        if (L > 8) mask |= uint32_t(keep[at / 8 + 1]) << 8;
        return select(((I{} + int(mask)) & (I{} + 1) << lane_numbers()) != 0, x, zero());
    }
};

// to = the rows of `from` as bfloat16, two in one.
inline void pair_rows(const float* from, int64_t line, int64_t rows, int64_t columns, float* to, int64_t to_line) {
    for (int64_t i = 0; i < rows; i += 2, from += 2 * line, to += to_line)
        for (int64_t j = 0; j < columns; j += L) store(to + j, paired(load(from + j), load(from + line + j)));
}

// to = the columns of `from` as bfloat16, two in one.
inline void pair_columns(const float* from, int64_t line, int64_t rows, int64_t columns, float* to, int64_t to_line) {
    for (int64_t i = 0; i < rows; i++, from += line, to += to_line)
        for (int64_t j = 0; j < columns; j += 2 * L) store(to + j / 2, successive(load(from + j), load(from + j + L)));
}

// A head's channels of a map, the tokens of one sample.
struct Head {
    const Map* map;
    int64_t channel, lane, tokens;
    template <class S>
    void read(const Shape& s, float* to, float factor = 1) const {
        const Steps steps(*map);
        for (int64_t c = 0; c < s.size; c++)
            read_lanes<S>(steps.at(channel + c, 0), lane, tokens, to + c * s.line, factor);
    }
    template <class S>
    void write(const Shape& s, const float* from, float factor = 1) const {
        const Steps steps(*map);
        for (int64_t c = 0; c < s.size; c++)
            write_lanes<S>(steps.at(channel + c, 0), lane, tokens, from + c * s.line, factor);
    }
};

// Where the heads of an attention are: those of queries, outputs and their gradients; and those of keys and values.
struct Heads {
    const Attention& a;
    Head query(const Map& m, int64_t i) const {
        return {&m, i % a.heads * a.size, i / a.heads * a.length, a.length};
    }
    Head key(const Map& m, int64_t i) const {
        return {&m, i % a.heads / (a.heads / a.kv_heads) * a.size, i / a.heads * a.keys, a.keys};
    }
};

// Brings the lines that the next head is read from and written to into the cache while one is computed: some at every
// step, as many as the last head's steps would have needed.
struct Prefetch {
    struct Rows {
        Head head;
        bool write;
    };
    const Shape& shape;
    Rows parts[8];
    int64_t count = 0, row = 0, steps = 0, rows_of_step = 8;
    explicit Prefetch(const Shape& shape) : shape(shape) {}
    void begin() {
        if (steps) rows_of_step = count * shape.size / steps + 1;
        count = row = steps = 0;
    }
    void add(const Head& head, bool write = false) { parts[count++] = {head, write}; }
    void step() {
        steps++;
        for (int64_t i = 0; i < rows_of_step && row < count * shape.size; i++, row++) {
            const Rows& r = parts[row / shape.size];
            const int64_t in_word = r.head.map->packed ? 2 : 1;
            const uint32_t* p = Steps(*r.head.map).at(r.head.channel + row % shape.size, 0) + r.head.lane / in_word;
            for (int64_t word = 0; word < r.head.tokens / in_word + WORDS; word += WORDS)
                r.write ? __builtin_prefetch(p + word, 1, 2) : __builtin_prefetch(p + word, 0, 2);
        }
    }
};

inline int64_t lanes_of(const Map& m) { return int64_t(m.width) * WORDS * (m.packed ? 2 : 1); }

// Zeros behind the last token, in a thread's share of the channels.
template <class S>
void zero_rest(const Map& m, int64_t tokens, int thread, int threads) {
    const float zeros[4 * WORDS + 2 * SLACK] = {};
    const Steps steps(m);
    const Share mine(m.channels, thread, threads);
    for (int64_t c = mine.begin; c < mine.end; c++)
        for (int64_t lane = tokens, end = lanes_of(m); lane < end; lane += 4 * WORDS)
            write_lanes<S>(steps.at(c, 0), lane, std::min(end - lane, int64_t(4 * WORDS)), zeros + SLACK, 1);
}

// to[query][key] = the products of a's queries from s.whole on and b's keys from `begin` to `end`.
inline void last_scores(const Shape& s, const float* a, const float* b, int64_t begin, int64_t end, float* to,
                        int64_t line) {
    auto some = [&](auto n, int64_t key) INLINE_LAMBDA {
        constexpr int vectors = decltype(n)::value;
        float* at = to + key - begin;
        auto put = [&](auto r, int64_t query, auto& acc) INLINE_LAMBDA {
            for (int i = 0; i < decltype(r)::value; i++)
                for (int j = 0; j < vectors; j++) store(at + (query + i - s.whole) * line + j * L, acc[i][j]);
        };
        each_score<vectors>(a, b + key, s.line, s.size, s.whole, s.tokens, put);
    };
    int64_t key = begin;
    for (; key + 4 * L <= rounded(end, L); key += 4 * L) some(Constant<4>{}, key);
    for (; key < end; key += L) some(Constant<1>{}, key);
}

// to[c][0] += factor * the sum over keys of weight[key] * a[c][key].
inline void add_last_sums(const Shape& s, const float* weight, const float* a, int64_t keys, float factor, float* to) {
    for (int64_t c = 0; c < s.size; c += L) {
        V x[L];
        for (int l = 0; l < L; l++) {
            x[l] = zero();
            for (int64_t key = 0; key < keys; key += L) x[l] += load(weight + key) * load(a + (c + l) * s.line + key);
        }
        const V total = sums<L>(x);
        for (int l = 0; l < std::min(int64_t(L), s.size - c); l++) to[(c + l) * s.line] += factor * total[l];
    }
}

}  // namespace attention_parts
