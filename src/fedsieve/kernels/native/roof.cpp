// What this machine can do at most: multiply-adds in registers, and reading from its caches and its memory.
#include "vec.h"

namespace {

constexpr int CHAINS = 12;   // sums that need not wait for each other
constexpr int ROUND = 192;   // multiply-adds, for any width of vectors

void multiply_adds(const Roof& r, float* result) {
    V sum[CHAINS], x = all(*result), w = all(result[1]);
    for (V& s : sum) s = x;
    for (int64_t i = 0; i < r.times; i++)
        for (int n = 0; n < ROUND; n += CHAINS * L)
            for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * w + x;
    for (int c = 1; c < CHAINS; c++) sum[0] += sum[c];
    *result = sum[0][0];
}

void reads(const Roof& r, float* from) {
    V sum[CHAINS] = {}, w = all(1.0f);
    for (int64_t i = 0; i < r.times; i++) {
        for (int64_t at = 0; at + CHAINS * L <= r.count; at += CHAINS * L)
            for (int c = 0; c < CHAINS; c++) sum[c] += w * load(from + at + c * L);
        w += sum[0] * 0.0f;
    }
    for (int c = 1; c < CHAINS; c++) sum[0] += sum[c];
    *from = sum[0][0] * 0.0f;
}

}  // namespace

void roof(const Roof& r, int thread, int) {
    float* own = r.memory + thread * r.count;
    r.reads ? reads(r, own) : multiply_adds(r, own);
}
