// Native vectors, and the two ways to store sixteen lanes: a float a word, or two bfloat16 a word.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "abi.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int L = 16, TILE = 16;
#elif defined(__AVX2__)
constexpr int L = 8, TILE = 4;
#elif defined(__aarch64__)
constexpr int L = 4, TILE = 4;
#else
constexpr int L = 4, TILE = 2;
#endif

constexpr int WORDS = 16;     // of a block
constexpr int G = WORDS / L;  // native vectors a block of floats
#if defined(__AVX512F__)
constexpr int B = 2;          // native vectors of output channels in a block of dense weights
#else
constexpr int B = 1;
#endif
constexpr int LANES = B * L;

typedef float V __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));

INLINE V zero() { return V{}; }
INLINE V all(float x) { return x - V{}; }
INLINE U bits(V x) { return (U)x; }
INLINE V load(const void* p) { V x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(void* p, V x) { memcpy(p, &x, sizeof x); }
INLINE V select(I which, V a, V b) { return (V)(((U)which & (U)a) | (~(U)which & (U)b)); }
INLINE V larger(V a, V b) {  // b where one is NaN
#if defined(__AVX512F__)
    return (V)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (V)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE V positive(V x) { return (V)(~(U)(x <= zero()) & (U)x); }  // of NaN: NaN
INLINE V rectified(V x, int relu) {  // by ReLU, or, if 2, ReLU6
    x = positive(x);
    return relu == 2 ? select(x > all(6), all(6), x) : x;
}
INLINE I is_flat(V x, int relu) {  // whether its slope is 0 there, or where it gave x
    return relu == 2 ? (x <= zero()) | (x >= all(6)) : x <= zero();
}

template <class From, int... l>
INLINE V shuffled(V a, V b, std::integer_sequence<int, l...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, From::at(l)...);
#else
    return __builtin_shuffle(a, b, I{From::at(l)...});
#endif
}

// Lanes of a and of b, which follow a's: the l-th is From::at(l).
template <class From>
INLINE V shuffled(V a, V b) {
    return shuffled<From>(a, b, std::make_integer_sequence<int, L>{});
}

INLINE float sum(V x) {
    float s = 0;
    for (int i = 0; i < L; i++) s += x[i];
    return s;
}

template <int N>
struct Moved {
    static constexpr int at(int l) { return (l + N) % L; }
};

template <int N = L / 2>
INLINE float in_pairs(V x) {  // the sum over the lanes
    x += shuffled<Moved<N>>(x, x);
    if constexpr (N > 1) return in_pairs<N / 2>(x);
    else return x[0];
}

struct Fp32 {
    static constexpr int parts = 1, K = G, tile = TILE;
    struct Held { V x[K]; };  // what one side of `dot` keeps in registers
    static INLINE void hold(const uint32_t* p, Held& y) { read(p, y.x); }
    static INLINE void read(const uint32_t* p, V* x) {
        for (int g = 0; g < G; g++) x[g] = load(p + g * L);
    }
    static INLINE void write(uint32_t* p, const V* x) {
        for (int g = 0; g < G; g++) store(p + g * L, x[g]);
    }
    static INLINE void fma(const uint32_t* p, V w, V* acc) {
        for (int g = 0; g < G; g++) acc[g] += w * load(p + g * L);
    }
    static INLINE void dot(const uint32_t* p, const Held& y, V& acc) {
        for (int g = 0; g < G; g++) acc += y.x[g] * load(p + g * L);
    }
};

INLINE U nearest(U x) {  // float bits rounded to even at bfloat16; NaN stays NaN
    U nan = (U)((x & 0x7fffffffu) > 0x7f800000u);
    U rounded = x + 0x7fffu + ((x >> 16) & 1u);
    return (rounded & ~nan) | ((x | 0x400000u) & nan);
}

struct Bf16 {
    static constexpr int parts = 2, K = 2 * G, tile = TILE / 2 > 0 ? TILE / 2 : 1;
    static INLINE U words(const uint32_t* p) { U x; memcpy(&x, p, sizeof x); return x; }
    static INLINE V upper(U x) { return (V)(x & 0xffff0000u); }
    static INLINE V lower(U x) { return (V)(x << 16); }
    static INLINE void read(const uint32_t* p, V* x) {
        for (int g = 0; g < G; g++) {
            U w = words(p + g * L);
            x[g] = upper(w), x[G + g] = lower(w);
        }
    }
#ifdef __AVX512BF16__
    static_assert(G == 1, "a block is one vector");
    struct Held { __m512bh x; };
    static INLINE void hold(const uint32_t* p, Held& y) { memcpy(&y.x, p, sizeof y.x); }
    static INLINE void dot(const uint32_t* p, const Held& y, V& acc) {
        __m512bh x;
        memcpy(&x, p, sizeof x);
        acc = (V)_mm512_dpbf16_ps((__m512)acc, x, y.x);
    }
    static INLINE void write(uint32_t* p, const V* x) {
        static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[0], (__m512)x[1]);
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), halves));
    }
#else
    struct Held { V x[K]; };
    static INLINE void hold(const uint32_t* p, Held& y) { read(p, y.x); }
    static INLINE void dot(const uint32_t* p, const Held& y, V& acc) {
        for (int g = 0; g < G; g++) {
            U x = words(p + g * L);
            acc += y.x[g] * upper(x);
            acc += y.x[G + g] * lower(x);
        }
    }
    static INLINE void write(uint32_t* p, const V* x) {
        for (int g = 0; g < G; g++) {
            U w = (nearest(bits(x[g])) & 0xffff0000u) | (nearest(bits(x[G + g])) >> 16);
            memcpy(p + g * L, &w, sizeof w);
        }
    }
#endif
    static INLINE void fma(const uint32_t* p, V w, V* acc) {
        for (int g = 0; g < G; g++) {
            U x = words(p + g * L);
            acc[g] += w * upper(x);
            acc[G + g] += w * lower(x);
        }
    }
};

// A lane's bit for every lane that is set.
INLINE unsigned marks(I m) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
    return unsigned(_mm256_movemask_ps((__m256)m));
#elif defined(__SSE2__)
    return unsigned(_mm_movemask_ps((__m128)m));
#else
    unsigned b = 0;
    for (int l = 0; l < L; l++) b |= unsigned(m[l] != 0) << l;
    return b;
#endif
}

// Writes the marked lanes one after another, and perhaps others behind them, up to L in all; returns where they end.
INLINE float* packed(float* to, V x, unsigned m) {
#if defined(__AVX512F__)
    store(to, (V)_mm512_maskz_compress_ps(__mmask16(m), (__m512)x));
    return to + __builtin_popcount(m);
#else
    for (; m; m &= m - 1) *to++ = x[__builtin_ctz(m)];
    return to;
#endif
}

// Adds one to the numbers of the marked lanes, of all the B vectors.
INLINE void add_marks(int32_t* n, unsigned m) {
#if defined(__AVX512F__)
    for (int v = 0; v < B; v++) {
        __m512i x = _mm512_loadu_si512(n + v * L);
        _mm512_storeu_si512(n + v * L, _mm512_mask_add_epi32(x, __mmask16(m >> (v * L)), x, _mm512_set1_epi32(1)));
    }
#else
    for (; m; m &= m - 1) n[__builtin_ctz(m)]++;
#endif
}

void barrier();  // of the team that runs an operation
constexpr int DESK = 64;
double* desk(int thread, bool odd);  // where a thread puts up to DESK pairs of sums for the others of its team

// Steps through a map, in words.
struct Steps {
    int64_t row, block, channel;
    uint32_t* inside;  // the first position that is not halo
    explicit Steps(const Map& m) {
        row = int64_t(m.width + 2 * m.halo) * WORDS;
        block = row * (m.height + 2 * m.halo);
        channel = block * m.blocks + m.gap;
        inside = m.data + m.halo * (row + WORDS);
    }
    uint32_t* at(int64_t c, int64_t b) const { return inside + c * channel + b * block; }
};

// A thread's share [begin, end) of n things.
struct Share {
    int64_t begin, end;
    Share(int64_t n, int thread, int threads) : begin(n * thread / threads), end(n * (thread + 1) / threads) {}
};

// Who has which part of a map. What another core wrote is slow to read, so a thread keeps to the same lines [block, row]
// of every map, where they can be divided into tiles for all threads, or else to channels: also where its lines of a
// channel are so few that reading ahead takes the next thread's.
struct Home {
    static constexpr int FEW = 2048;  // words
    int parts;  // of the lines, equal: a power of two, at most 8
    bool by_line;
    Share lines, channels;
    Home(const Map& m, int thread, int threads) : lines(0, 0, 1), channels(m.channels, thread, threads) {
        const int64_t all = int64_t(m.blocks) * m.height;
        const int tile = m.packed ? Bf16::tile : Fp32::tile;
        int wide = tile;
        while (wide > m.width) wide /= 2;
        for (parts = 8; all % parts;) parts /= 2;
        by_line = parts % threads == 0 && all / threads % (tile / wide) == 0 && all / threads * m.width * WORDS >= FEW;
        if (by_line) channels = Share(m.channels, 0, 1);
        lines = Share(all, by_line ? thread : 0, by_line ? threads : 1);
    }
};

// Calls f(block, row) for lines.
template <class F>
INLINE void each_line(const Map& m, const Share& lines, F&& f) {
    int64_t b = lines.begin / m.height, h = lines.begin % m.height;
    for (int64_t line = lines.begin; line < lines.end; line++) {
        f(b, h);
        if (++h == m.height) h = 0, b++;
    }
}

void zero_halo(const Map& m, int64_t channel);  // of one channel
void zero_halo(const Map& m, int64_t channel, const Share& lines);

void group_norm(const Norm&, int thread, int threads);
void group_norm_backward(const NormBackward&, int thread, int threads);

#define FS_DECLARE(kind, type, function) void function(const type&, int thread, int threads);
FS_OPERATIONS(FS_DECLARE)
#undef FS_DECLARE
void gather_units(const Gather&, int thread, int threads);
void dot_units(const Dot&, int thread, int threads);
