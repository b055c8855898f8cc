// Eight float lanes: AVX2, FMA and F16C. Meaning in vec.h.
#pragma once

#include <immintrin.h>

#include "transpose.h"
#include "vec.h"

namespace gpt2::GPT2_ISA {

struct Vec8 {
  using scalar = float;
  static constexpr int64_t W = 8;
  __m256 v;

  // Scalar: lane < n
  static GPT2_INLINE __m256i lanes_below(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n)), lane);
  }

  static GPT2_INLINE Vec8 set(float x) { return {_mm256_set1_ps(x)}; }

  static GPT2_INLINE Vec8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static GPT2_INLINE Vec8 load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static GPT2_INLINE Vec8 load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  static GPT2_INLINE Vec8 load(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, lanes_below(n))};
  }
  template <class T>  // 16 bits: no masked form
  static GPT2_INLINE Vec8 load(const T* p, int64_t n) {
    T whole[W] = {};
    for (int64_t i = 0; i < W && i < n; ++i) whole[i] = p[i];
    return load(whole);
  }

  // 64 packed int8, each on top of a 16-bit word.
  struct Bytes {
    __m256i numbers[4];

    explicit GPT2_INLINE Bytes(const int8_t* block) {
      const __m256i* words = reinterpret_cast<const __m256i*>(block);
      for (int i = 0; i < 2; ++i) {
        const __m256i w = _mm256_loadu_si256(words + i);
        numbers[i] = _mm256_slli_epi16(w, 8);
        numbers[i + 2] = _mm256_and_si256(w, _mm256_set1_epi16(int16_t(0xff00)));
      }
    }

    GPT2_INLINE Vec8 dot(const int16_t* x) const {
      __m256i sum = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        const __m256i x_i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x_i, numbers[i]));
      }
      return {_mm256_cvtepi32_ps(sum)};
    }
  };

  GPT2_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  GPT2_INLINE void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i r = _mm256_blendv_epi8(_mm256_add_epi32(u, half), quiet, nan);
    store_halves(p, _mm256_srli_epi32(r, 16));
  }
  GPT2_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  GPT2_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, lanes_below(n), v); }
  template <class T>
  GPT2_INLINE void store(T* p, int64_t n) const {
    T whole[W];
    store(whole);
    for (int64_t i = 0; i < W && i < n; ++i) p[i] = whole[i];
  }

  // Scalar: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
  GPT2_INLINE float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  GPT2_INLINE float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

 private:
  template <class T>
  static GPT2_INLINE void store_halves(T* p, __m256i words) {  // the lower 16 bits of each word
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
};

GPT2_INLINE Vec8 operator+(Vec8 a, Vec8 b) {
  return {_mm256_add_ps(a.v, b.v)};
}
GPT2_INLINE Vec8 operator-(Vec8 a, Vec8 b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
GPT2_INLINE Vec8 operator*(Vec8 a, Vec8 b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
GPT2_INLINE Vec8 operator/(Vec8 a, Vec8 b) {
  return {_mm256_div_ps(a.v, b.v)};
}
GPT2_INLINE Vec8 fma(Vec8 a, Vec8 b, Vec8 c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
GPT2_INLINE Vec8 max(Vec8 a, Vec8 b) {
  return {_mm256_max_ps(a.v, b.v)};
}
GPT2_INLINE Vec8 min(Vec8 a, Vec8 b) {
  return {_mm256_min_ps(a.v, b.v)};
}

GPT2_INLINE Vec8 first(int64_t n, Vec8 a, Vec8 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(Vec8::lanes_below(n)))};
}

GPT2_INLINE Vec8 if_less(Vec8 a, Vec8 b, Vec8 x, Vec8 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

// Scalar: n = rint(x), scale = 2^n, x - n. The sum with 1.5 * 2^23 + 127 rounds x to an integer and
// leaves n + 127 in the low bits of the mantissa, where a shift makes it an exponent.
GPT2_INLINE Vec8 split(Vec8 x, Vec8& scale) {
  const __m256 magic = _mm256_set1_ps(0x1.8p23f + 127);
  const __m256 t = _mm256_add_ps(x.v, magic);
  scale.v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
  return {_mm256_sub_ps(x.v, _mm256_sub_ps(t, magic))};
}

}  // namespace gpt2::GPT2_ISA
