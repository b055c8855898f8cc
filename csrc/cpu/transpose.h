// An 8 x 8 transpose of 32-bit words, for the packing in gemm.h. AVX2; bits are only moved.
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace gpt2::GPT2_ISA {

// Scalar: to[c * to_ld + r] = from[r * ld + c]
GPT2_INLINE void transpose8(const float* from, int64_t ld, float* to, int64_t to_ld) {
  __m256 row[8];  // row[i]: row i % 4 and row i % 4 + 4, columns 4 (i / 4) + 0 .. 3
  for (int i = 0; i < 8; ++i) {
    const float* p = from + i % 4 * ld + i / 4 * 4;
    row[i] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
  }
  for (int half = 0; half < 8; half += 4) {
    const __m256 a = _mm256_unpacklo_ps(row[half], row[half + 1]);      // 00 10 01 11
    const __m256 b = _mm256_unpackhi_ps(row[half], row[half + 1]);      // 02 12 03 13
    const __m256 c = _mm256_unpacklo_ps(row[half + 2], row[half + 3]);  // 20 30 21 31
    const __m256 d = _mm256_unpackhi_ps(row[half + 2], row[half + 3]);  // 22 32 23 33
    _mm256_storeu_ps(to + (half + 0) * to_ld, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(to + (half + 1) * to_ld, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(to + (half + 2) * to_ld, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(to + (half + 3) * to_ld, _mm256_shuffle_ps(b, d, 0xee));
  }
}

}  // namespace gpt2::GPT2_ISA
