// How the taps of a kernel reach the positions of a strided layer's input.
#pragma once
#include <cstdint>
#include <vector>

struct Taps {  // of a kernel: the parity of the input positions that a tap reaches, and where in the gradient
    std::vector<int> parity;
    std::vector<int64_t> down, right;
    Taps(int kernel, int stride, int padding) {
        auto part = [&](int tap, int& rest) {
            rest = ((tap - padding) % stride + stride) % stride;
            return (rest + padding - tap) / stride;
        };
        for (int i = 0; i < kernel; i++)
            for (int j = 0; j < kernel; j++) {
                int top, left;
                down.push_back(part(i, top));
                right.push_back(part(j, left));
                parity.push_back(top * stride + left);
            }
    }
};
