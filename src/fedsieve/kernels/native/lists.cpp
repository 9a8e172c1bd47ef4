// From a mask to the lists that the products walk.
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

// Sorts the entries of each row by `kind`, keeping their order within; from: [rows * kinds + 1], where each begins.
template <class Move>
void sorted(const int32_t* row, int64_t rows, int64_t kinds, const std::vector<int8_t>& kind, int32_t* from,
            Move&& move) {
    for (int64_t r = 0; r < rows; r++) {
        int32_t* n = from + r * kinds;
        memset(n, 0, sizeof(int32_t) * kinds);
        for (int32_t i = row[r]; i < row[r + 1]; i++) n[kind[i]]++;
        int32_t at = row[r];
        for (int64_t k = 0; k < kinds; k++) {
            int32_t here = n[k];
            n[k] = at, at += here;
        }
        std::vector<int32_t> next(n, n + kinds);
        for (int32_t i = row[r]; i < row[r + 1]; i++) move(i, next[kind[i]]++);
    }
    from[rows * kinds] = row[rows];
}

void apply(const std::vector<int32_t>& to, int32_t* x) {
    std::vector<int32_t> old(x, x + to.size());
    for (size_t i = 0; i < to.size(); i++) x[to[i]] = old[i];
}

}  // namespace

void fs_entries(const uint8_t* mask, int64_t out, int64_t in, int64_t kernel, int64_t channel, int64_t line,
                int64_t shift, int32_t* row, int32_t* offset, int32_t* tap) {
    const int64_t area = kernel * kernel, each = in * area;
    std::vector<int32_t> place(each);
    std::vector<int8_t> kind;
    for (int64_t j = 0; j < each; j++) {
        int64_t t = j % area;
        place[j] = int32_t(j / area * channel + (shift + t / kernel) * line + (shift + t % kernel) * 16);
    }
    int32_t n = 0;
    row[0] = 0;
    for (int64_t r = 0; r < out; r++) {
        const uint8_t* m = mask + r * each;
        for (int64_t j = 0; j < each;) {
            uint64_t eight = 0;
            int64_t size = each - j < 8 ? each - j : 8;
            memcpy(&eight, m + j, size);
            if (eight)
                for (int64_t k = j; k < j + size; k++)
                    if (m[k]) {
                        offset[n++] = place[k];
                        if (tap) kind.push_back(int8_t(k % area));
                    }
            j += size;
        }
        row[r + 1] = n;
    }
    if (!tap) return;
    std::vector<int32_t> to(n);
    sorted(row, out, area, kind, tap, [&](int32_t i, int32_t at) { to[i] = at; });
    apply(to, offset);
}

void fs_transposed(const int32_t* index, int64_t count, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t channel, int64_t line, int64_t halo, int32_t* row, int32_t* offset, int32_t* order,
                   int32_t* tap) {
    const int64_t area = kernel * kernel, each = in * area;
    std::vector<int64_t> parity(area), shift(area);
    for (int64_t t = 0; t < area; t++) {
        int64_t y = padding - t / kernel, x = padding - t % kernel;  // the gradient's position, from input position 0
        int64_t top = ((-y) % stride + stride) % stride, left = ((-x) % stride + stride) % stride;
        parity[t] = top * stride + left;
        shift[t] = (halo + (top + y) / stride) * line + (halo + (left + x) / stride) * 16;
    }
    std::vector<int64_t> fill(stride * stride * in + 1, 0);
    for (int64_t i = 0; i < count; i++) fill[parity[index[i] % area] * in + index[i] % each / area + 1]++;
    for (size_t r = 1; r < fill.size(); r++) fill[r] += fill[r - 1];
    for (size_t r = 0; r < fill.size(); r++) row[r] = int32_t(fill[r]);
    std::vector<int8_t> kind(tap ? count : 0);
    for (int64_t i = 0; i < count; i++) {
        int64_t t = index[i] % area, at = fill[parity[t] * in + index[i] % each / area]++;
        offset[at] = int32_t(index[i] / each * channel + shift[t]);
        order[at] = int32_t(i);
        if (tap) kind[at] = int8_t(area - 1 - t);
    }
    if (!tap) return;
    std::vector<int32_t> to(count);
    sorted(row, in, area, kind, tap, [&](int32_t i, int32_t at) { to[i] = at; });
    apply(to, offset);
    apply(to, order);
}
