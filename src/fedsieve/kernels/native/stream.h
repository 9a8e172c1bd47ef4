// Writing past the caches.
#pragma once
#include "vec.h"

INLINE void stream(float* p, V x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

INLINE void streamed() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
