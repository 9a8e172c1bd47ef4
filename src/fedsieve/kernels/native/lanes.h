// Lanes of a map of tokens that begin anywhere, as rows of floats.
#pragma once
#include "vec.h"

constexpr int SLACK = 32;  // floats before and behind a row that read_lanes may write, and write_lanes read

// to[i] = factor * lane `lane + i` of a channel, for i < n, and 0 behind them up to a whole vector.
template <class S>
INLINE void read_lanes(const uint32_t* channel, int64_t lane, int64_t n, float* to, float factor) {
    if constexpr (S::parts == 1) {
        const uint32_t* p = channel + lane;
        int64_t i = 0;
        for (; i + L <= n; i += L) store(to + i, load(p + i) * all(factor));
        if (i == n) return;
        if (i) {
            const V last = load(p + n - L) * all(factor);
            store(to + n, zero());
            store(to + n - L, last);
        } else {
            V last = zero();
            for (int l = 0; l < int(n); l++) {
                float x;
                memcpy(&x, p + l, sizeof x);
                last[l] = x * factor;
            }
            store(to, last);
        }
    } else {
        constexpr int GROUP = 2 * WORDS;
        for (int64_t g = lane / GROUP; g * GROUP < lane + n; g++) {
            V x[S::K];
            S::read(channel + g * WORDS, x);
            for (int k = 0; k < S::K; k++) store(to + g * GROUP - lane + k * L, x[k] * all(factor));
        }
        store(to + n, zero());
    }
}

// Lane `lane + i` of a channel = factor * from[i], for i < n: no other lane is written, not even with what it holds.
template <class S>
INLINE void write_lanes(uint32_t* channel, int64_t lane, int64_t n, const float* from, float factor) {
    if constexpr (S::parts == 1) {
        uint32_t* p = channel + lane;
        int64_t i = 0;
        for (; i + L <= n; i += L) store(p + i, load(from + i) * all(factor));
        if (i == n) return;
        if (i) return store(p + n - L, load(from + n - L) * all(factor));
        for (; i < n; i++) {
            const float x = from[i] * factor;
            memcpy(p + i, &x, sizeof x);
        }
    } else {
        constexpr int GROUP = 2 * WORDS;
        for (int64_t g = lane / GROUP; g * GROUP < lane + n; g++) {
            const int64_t first = g * GROUP - lane;
            uint32_t *p = channel + g * WORDS, whole[WORDS];
            V x[S::K];
            for (int k = 0; k < S::K; k++) x[k] = load(from + first + k * L) * all(factor);
            const bool inside = first >= 0 && first + GROUP <= n;
            S::write(inside ? p : whole, x);
            if (inside) continue;
            const int begin = first < 0 ? int(-first) : 0, end = first + GROUP <= n ? GROUP : int(n - first);
#if defined(__AVX512BW__)
            const uint32_t lanes = uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
            const __mmask32 halves = _pdep_u32(lanes, 0xaaaaaaaau) | _pdep_u32(lanes >> WORDS, 0x55555555u);
            _mm512_mask_storeu_epi16(p, halves, _mm512_loadu_si512(whole));
#else
            for (int i = begin; i < end; i++) {
                const uint16_t half = uint16_t(i < WORDS ? whole[i] >> 16 : whole[i - WORDS]);
                memcpy((char*)(p + i % WORDS) + (i < WORDS) * sizeof half, &half, sizeof half);
            }
#endif
        }
    }
}
