// Sixteen float lanes: AVX-512 F, BW, DQ and VL. Meaning in vec.h.
#pragma once

#include <immintrin.h>

#include "transpose.h"
#include "vec.h"

namespace gpt2::GPT2_ISA {

struct Vec16 {
  using scalar = float;
  static constexpr int64_t W = 16;
  __m512 v;

  // Scalar: lane < n
  static GPT2_INLINE __mmask16 lanes_below(int64_t n) {
    return n >= W ? __mmask16(0xffff) : __mmask16((1u << (n > 0 ? n : 0)) - 1);
  }

  static GPT2_INLINE Vec16 set(float x) { return {_mm512_set1_ps(x)}; }

  static GPT2_INLINE Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static GPT2_INLINE Vec16 load(const bf16* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static GPT2_INLINE Vec16 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  static GPT2_INLINE Vec16 load(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(lanes_below(n), p)};
  }
  static GPT2_INLINE Vec16 load(const bf16* p, int64_t n) {
    return widened(_mm256_maskz_loadu_epi16(lanes_below(n), p));
  }
  static GPT2_INLINE Vec16 load(const f16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p))};
  }

  // 64 packed int8, each on top of a 16-bit word.
  struct Bytes {
    __m512i numbers[2];

    explicit GPT2_INLINE Bytes(const int8_t* block) {
      const __m512i words = _mm512_loadu_si512(block);
      numbers[0] = _mm512_slli_epi16(words, 8);
      numbers[1] = _mm512_and_si512(words, _mm512_set1_epi16(int16_t(0xff00)));
    }

    GPT2_INLINE Vec16 dot(const int16_t* x) const {
      const __m512i a = _mm512_madd_epi16(_mm512_loadu_si512(x), numbers[0]);
      const __m512i b = _mm512_madd_epi16(_mm512_loadu_si512(x + 32), numbers[1]);
      return {_mm512_cvtepi32_ps(_mm512_add_epi32(a, b))};
    }
  };

  GPT2_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  GPT2_INLINE void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed());
  }
  GPT2_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halved());
  }

  GPT2_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, lanes_below(n), v); }
  GPT2_INLINE void store(bf16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, lanes_below(n), narrowed());
  }
  GPT2_INLINE void store(f16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, lanes_below(n), halved());
  }

  // Scalar: lanes 8 apart, then 4, 2 and 1
  GPT2_INLINE float sum() const {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  GPT2_INLINE float max() const {
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

 private:
  static GPT2_INLINE Vec16 widened(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  GPT2_INLINE __m256i narrowed() const {  // to bfloat16
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __m512i r = _mm512_mask_mov_epi32(_mm512_add_epi32(u, half), nan, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }
  GPT2_INLINE __m256i halved() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

GPT2_INLINE Vec16 operator+(Vec16 a, Vec16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
GPT2_INLINE Vec16 operator-(Vec16 a, Vec16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
GPT2_INLINE Vec16 operator*(Vec16 a, Vec16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
GPT2_INLINE Vec16 operator/(Vec16 a, Vec16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
GPT2_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
GPT2_INLINE Vec16 max(Vec16 a, Vec16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
GPT2_INLINE Vec16 min(Vec16 a, Vec16 b) {
  return {_mm512_min_ps(a.v, b.v)};
}

GPT2_INLINE Vec16 first(int64_t n, Vec16 a, Vec16 b) {
  return {_mm512_mask_mov_ps(b.v, Vec16::lanes_below(n), a.v)};
}

GPT2_INLINE Vec16 if_less(Vec16 a, Vec16 b, Vec16 x, Vec16 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}

// Scalar: n = rint(x), scale = 2^n, x - n; see Vec8's.
GPT2_INLINE Vec16 split(Vec16 x, Vec16& scale) {
  const __m512 magic = _mm512_set1_ps(0x1.8p23f + 127);
  const __m512 t = _mm512_add_ps(x.v, magic);
  scale.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
  return {_mm512_sub_ps(x.v, _mm512_sub_ps(t, magic))};
}

}  // namespace gpt2::GPT2_ISA
