// Functions of whole vectors.
#pragma once
#include "vec.h"

// e^x: 2^n times a polynomial (Cephes's) of the rest; 0 below -87.7, infinite from 88.4 on, NaN of NaN.
INLINE V exponential(V x) {
    x = select(x < all(-87.9f), all(-87.9f), select(x > all(88.8f), all(88.8f), x));
    const V shifted = x * all(1.44269504f) + all(12582912.0f);  // its last bits are n
    const V n = shifted - all(12582912.0f);
    const V r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f);
    V p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + all(c);
    p = p * (r * r) + r + all(1);
    return p * (V)((bits(shifted) << 23) + (127u << 23));
}


// 2^x for x below 128, and 2^-126 below -126; exactly 1 of 0, NaN of NaN. Errors: up to 1.5 units in the last place.
INLINE V power_of_two(V x) {
    x = larger(all(-126), x);
    const V shifted = x + all(12582912.0f);  // its last bits are x's integer part
    const V r = x - (shifted - all(12582912.0f));
    V p = all(1.32646877e-3f);
    for (float c : {9.67151392e-3f, 5.55073395e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f}) p = p * r + all(c);
    return (V)(bits(p) + (bits(shifted) << 23));
}

// The logarithm of positive numbers (Cephes's polynomial) that are not denormal; NaN of NaN and of infinity.
INLINE V logarithm(V x) {
    const I n = (I)(bits(x) - 0x3f3504f3u) >> 23;  // x = 2^n (1 + m), where 1 + m is from sqrt(1/2) to sqrt(2)
    const V m = (V)(bits(x) - ((U)n << 23)) - all(1), square = m * m, exponent = __builtin_convertvector(n, V);
    V p = all(7.0376836292e-2f);
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                    2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = p * m + all(c);
    p = p * m * square + exponent * all(-2.12194440e-4f) - all(0.5f) * square;
    return m + p + exponent * all(0.693359375f) + (x - x);
}
