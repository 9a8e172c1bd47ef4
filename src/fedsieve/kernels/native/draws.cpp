// What PyTorch's generator on a CPU draws, several times as fast: MT19937 (Matsumoto & Nishimura 1998).
#include <algorithm>

#include "vec.h"

namespace {

constexpr int N = 624, M = 397;

uint32_t mixed(uint32_t u, uint32_t v) { return ((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1 ^ (v & 1 ? 0x9908b0dfu : 0); }

void renew(uint32_t* x) {
#pragma GCC ivdep
    for (int i = 0; i < N - M; i++) x[i] = x[i + M] ^ mixed(x[i], x[i + 1]);
#pragma GCC ivdep
    for (int i = N - M; i < 2 * (N - M); i++) x[i] = x[i + M - N] ^ mixed(x[i], x[i + 1]);
#pragma GCC ivdep
    for (int i = 2 * (N - M); i < N - 1; i++) x[i] = x[i + M - N] ^ mixed(x[i], x[i + 1]);
    x[N - 1] = x[M - 1] ^ mixed(x[N - 1], x[0]);
}

uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

}  // namespace

void fs_bernoulli(Generator* g, double p, uint8_t* out, int64_t count) {
    uint32_t state[N], drawn[N + 1];
    std::copy(g->state, g->state + N, state);
    const uint64_t below = uint64_t(p * 0x1p53) + (p * 0x1p53 > double(uint64_t(p * 0x1p53)));
    int left = g->left - 1, next = int(g->next), waiting = 0;  // numbers of the state; of the first half of a draw
    for (int64_t missing = 2 * count; missing > 0;) {
        if (!left) renew(state), left = N, next = 0;
        const int taken = int(std::min<int64_t>(left, missing));
        for (int i = 0; i < taken; i++) drawn[waiting + i] = tempered(state[next + i]);
        left -= taken, next += taken, missing -= taken;
        const int pairs = (waiting + taken) / 2;
        for (int i = 0; i < pairs; i++) {
            const uint64_t number = uint64_t(drawn[2 * i] & 0x1fffffu) << 32 | drawn[2 * i + 1];
            out[i] = number < below;
        }
        out += pairs, waiting = (waiting + taken) % 2;
        drawn[0] = drawn[2 * pairs];
    }
    std::copy(state, state + N, g->state);
    g->left = left + 1, g->next = uint64_t(next);
}
