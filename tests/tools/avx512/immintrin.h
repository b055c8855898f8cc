// The AVX-512 instructions that csrc/cpu uses, lane by lane on a machine that has only AVX2, so
// that the very source of the AVX-512 kernels can be compiled, run and compared with float64
// anywhere. Found before the compiler's own header (-I tests/tools/avx512), which it includes for
// everything else.
//
// Written from Intel's Software Developer's Manual, volume 2. A masked load or store touches the
// lanes of its mask alone, as the instruction does: reading past an end is a fault here, too.
#pragma once

#include_next <immintrin.h>

namespace emulated {

using Mask = unsigned short;
using Int = int;
typedef Int Ints __attribute__((vector_size(64)));
typedef unsigned Words __attribute__((vector_size(64)));
typedef short Shorts __attribute__((vector_size(64)));

template <class To, class From>
inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

inline __m512 each(auto lane) {  // a vector of lane(0) .. lane(15)
  __m512 y;
  for (int i = 0; i < 16; ++i) y[i] = lane(i);
  return y;
}

inline Mask mask_of(auto lane) {
  Mask y = 0;
  for (int i = 0; i < 16; ++i) y |= Mask(lane(i) ? 1 << i : 0);
  return y;
}

// ---- memory

template <class V>
inline V load(const void* p) {
  V y;
  __builtin_memcpy(&y, p, sizeof y);
  return y;
}

inline void store(void* p, __m512 x) {
  __builtin_memcpy(p, &x, sizeof x);
}

inline __m512 maskz_load(Mask k, const void* p) {
  __m512 y = {};
  for (int i = 0; i < 16; ++i) {
    if (k >> i & 1) {
      float lane;
      __builtin_memcpy(&lane, static_cast<const char*>(p) + 4 * i, 4);
      y[i] = lane;
    }
  }
  return y;
}

inline void mask_store(void* p, Mask k, __m512 x) {
  for (int i = 0; i < 16; ++i) {
    const float lane = x[i];
    if (k >> i & 1) __builtin_memcpy(static_cast<char*>(p) + 4 * i, &lane, 4);
  }
}

inline __m256i maskz_load16(Mask k, const void* p) {
  short y[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (k >> i & 1) __builtin_memcpy(y + i, static_cast<const char*>(p) + 2 * i, 2);
  }
  return load<__m256i>(y);
}

inline void mask_store16(void* p, Mask k, __m256i x) {
  short lanes[16];
  __builtin_memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; ++i) {
    if (k >> i & 1) __builtin_memcpy(static_cast<char*>(p) + 2 * i, lanes + i, 2);
  }
}

// ---- arithmetic

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}

// The second operand where either is NaN, or both are zero.
inline __m512 max(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 min(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}

template <int predicate>
inline Mask compare(__m512 a, __m512 b) {
  static_assert(predicate == _CMP_UNORD_Q || predicate == _CMP_LT_OQ);
  return mask_of(
      [&](int i) { return predicate == _CMP_LT_OQ ? a[i] < b[i] : a[i] != a[i] || b[i] != b[i]; });
}

template <class V>
inline V blend(V a, Mask k, V b) {
  Ints x = as<Ints>(a);
  const Ints y = as<Ints>(b);
  for (int i = 0; i < 16; ++i) x[i] = k >> i & 1 ? y[i] : x[i];
  return as<V>(x);
}

// The odd products first, each added with one rounding; denormals are zeros, in and out.
inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  const Words x = as<Words>(a), y = as<Words>(b);
  const auto flushed = [](float f) { return __builtin_fabsf(f) < 0x1p-126f ? 0 * f : f; };
  const auto high = [&](unsigned u) { return flushed(as<float>(u & 0xffff0000)); };
  return each([&](int i) {
    const float s = __builtin_fmaf(high(x[i]), high(y[i]), flushed(sum[i]));
    return flushed(__builtin_fmaf(high(x[i] << 16), high(y[i] << 16), flushed(s)));
  });
}

// ---- conversions

template <int half>
inline __m256 half_of(__m512 x) {
  __m256 y[2];
  __builtin_memcpy(y, &x, sizeof y);
  return y[half];
}

inline __m512i widen(__m256i x) {
  unsigned short lanes[16];
  __builtin_memcpy(lanes, &x, sizeof lanes);
  Words y;
  for (int i = 0; i < 16; ++i) y[i] = lanes[i];
  return as<__m512i>(y);
}

inline __m256i narrow(__m512i x) {
  const Words lanes = as<Words>(x);
  unsigned short y[16];
  for (int i = 0; i < 16; ++i) y[i] = static_cast<unsigned short>(lanes[i]);
  return load<__m256i>(y);
}

inline __m512 floats(__m512i x) {
  const Ints lanes = as<Ints>(x);
  return each([&](int i) { return static_cast<float>(lanes[i]); });
}

inline __m512i madd(__m512i a, __m512i b) {
  const Shorts x = as<Shorts>(a), y = as<Shorts>(b);
  Ints sum;
  for (int i = 0; i < 16; ++i) sum[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return as<__m512i>(sum);
}

inline __m512 from_half(__m256i x) {
  __m128i halves[2];
  __builtin_memcpy(halves, &x, sizeof halves);
  const __m256 y[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  return load<__m512>(y);
}

template <int rounding>
inline __m256i to_half(__m512 x) {
  const __m128i y[2] = {_mm256_cvtps_ph(half_of<0>(x), rounding),
                        _mm256_cvtps_ph(half_of<1>(x), rounding)};
  return load<__m256i>(y);
}

}  // namespace emulated

#define _mm512_set1_ps(x) emulated::each([&](int) { return float(x); })
#define _mm512_set1_epi16(x) emulated::as<__m512i>(emulated::Shorts{} + short(x))
#define _mm512_set1_epi32(x) emulated::as<__m512i>(emulated::Ints{} + int(x))
#define _mm512_loadu_ps(p) emulated::load<__m512>(p)
#define _mm512_loadu_si512(p) emulated::load<__m512i>(p)
#define _mm512_storeu_ps(p, x) emulated::store(p, x)
#define _mm512_storeu_si512(p, x) emulated::store(p, emulated::as<__m512>(x))
#define _mm512_maskz_loadu_ps(k, p) emulated::maskz_load(k, p)
#define _mm512_mask_storeu_ps(p, k, x) emulated::mask_store(p, k, x)
#define _mm256_maskz_loadu_epi16(k, p) emulated::maskz_load16(k, p)
#define _mm256_mask_storeu_epi16(p, k, x) emulated::mask_store16(p, k, x)

#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_fmadd_ps(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_max_ps(a, b) emulated::max(a, b)
#define _mm512_min_ps(a, b) emulated::min(a, b)
#define _mm512_dpbf16_ps(c, a, b) emulated::dpbf16(c, a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare<predicate>(a, b)
#define _mm512_mask_mov_ps(a, k, b) emulated::blend(a, k, b)
#define _mm512_mask_mov_epi32(a, k, b) emulated::blend(a, k, b)

#define _mm512_add_epi32(a, b) \
  emulated::as<__m512i>(emulated::as<emulated::Words>(a) + emulated::as<emulated::Words>(b))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_slli_epi32(x, n) emulated::as<__m512i>(emulated::as<emulated::Words>(x) << (n))
#define _mm512_srli_epi32(x, n) emulated::as<__m512i>(emulated::as<emulated::Words>(x) >> (n))

#define _mm512_slli_epi16(x, n) emulated::as<__m512i>(emulated::as<emulated::Shorts>(x) << (n))
#define _mm512_madd_epi16(a, b) emulated::madd(a, b)

#define _mm512_castps_si512(x) emulated::as<__m512i>(x)
#define _mm512_castsi512_ps(x) emulated::as<__m512>(x)
#define _mm512_castps512_ps256(x) emulated::half_of<0>(x)
#define _mm512_extractf32x8_ps(x, half) emulated::half_of<half>(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen(x)
#define _mm512_cvtepi32_epi16(x) emulated::narrow(x)
#define _mm512_cvtepi32_ps(x) emulated::floats(x)
#define _mm512_cvtph_ps(x) emulated::from_half(x)
#define _mm512_cvtps_ph(x, rounding) emulated::to_half<(rounding)>(x)
