// From a mask to the lists that the products walk.
#include <cstring>
#include <vector>

#include "abi.h"

void fs_entries(const uint8_t* mask, int64_t out, int64_t in, int64_t kernel, int64_t channel, int64_t line,
                int64_t shift, int32_t* row, int32_t* offset) {
    const int64_t area = kernel * kernel, each = in * area;
    std::vector<int32_t> place(each);
    for (int64_t j = 0; j < each; j++) {
        int64_t tap = j % area;
        place[j] = int32_t(j / area * channel + (shift + tap / kernel) * line + (shift + tap % kernel) * 16);
    }
    int32_t n = 0;
    row[0] = 0;
    for (int64_t r = 0; r < out; r++) {
        const uint8_t* m = mask + r * each;
        int64_t j = 0;
        for (; j + 8 <= each; j += 8) {
            uint64_t eight;
            memcpy(&eight, m + j, 8);
            if (!eight) continue;
            for (int64_t k = j; k < j + 8; k++)
                if (m[k]) offset[n++] = place[k];
        }
        for (; j < each; j++)
            if (m[j]) offset[n++] = place[j];
        row[r + 1] = n;
    }
}

void fs_transposed(const int32_t* index, int64_t count, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t channel, int64_t line, int64_t halo, int32_t* row, int32_t* offset, int32_t* order) {
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
    for (int64_t i = 0; i < count; i++) {
        int64_t t = index[i] % area, at = fill[parity[t] * in + index[i] % each / area]++;
        offset[at] = int32_t(index[i] / each * channel + shift[t]);
        order[at] = int32_t(i);
    }
}
