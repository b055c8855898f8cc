// Products of bfloat16 pairs, summed in float32: AVX-512 BF16's vdpbf16ps, for gemm.h.
#pragma once

#include "vec_avx512.h"

#include "gemm.h"  // after it, to use its transpose8: the name is looked up where gemm.h is read

namespace gpt2::GPT2_ISA {

struct DotBf16 {
  using V = Vec16;
  using Element = bf16;
  static constexpr int64_t K = 2;
  static GPT2_INLINE __m512bh load(const bf16* b) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
  }
  static GPT2_INLINE __m512bh broadcast(const bf16* a) {
    int32_t pair;
    memcpy(&pair, a, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  // Scalar: to[2 i] = a[i], to[2 i + 1] = b[i] for i < 16
  static GPT2_INLINE void store_pairs(const bf16* a, const bf16* b, bf16* to) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Scalar: (c + a[1] b[1]) + a[0] b[0]; denormals count as zero
  static GPT2_INLINE Vec16 mac(__m512bh a, __m512bh b, Vec16 c) {
    return {_mm512_dpbf16_ps(c.v, a, b)};
  }
};

template <>
struct ProductsOf<Vec16, bf16> {
  using type = DotBf16;
};

}  // namespace gpt2::GPT2_ISA
