// The vector that every algorithm is written over, and its portable form: one lane.
//
// Vec<S> here defines what the wider types (vec_avx2.h, vec_avx512.h) must do, lane by lane. An
// algorithm header sees a type V with
//
//   V::scalar, V::W                  the lane's type and how many there are
//   V::set(x)                        x in every lane
//   V::load(p), V::load(p, n)        W elements of any storage type; the first n, zero in the rest
//   V::Bytes(block).dot(x)           2^8 times the dot product of 64 int8 (number 32 j + i is byte
//                                    2 i + j) and 64 int16 below 2^13, as one partial sum per lane
//   v.store(p), v.store(p, n)        rounded to the storage type, to nearest even; the first n
//   alone
//   + - * /, fma(a, b, c) = a b + c  max(a, b), min(a, b): b where a is NaN or b is
//   first(n, a, b)                   a in the first n lanes, b in the rest
//   if_less(a, b, x, y)              x where a < b, y elsewhere and where a or b is NaN
//   split(x, scale)                  x = n + f with |f| <= 1/2: returns f and scale = 2^n
//   v.sum(), v.max()                 over the lanes, in a fixed order
//
// Everything below lives in a namespace of the instruction set that is being compiled, so that the
// linker never takes a function from another set's object file.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef GPT2_ISA
#error "compiled through kernels_<instruction set>.cpp, which names it in GPT2_ISA"
#endif

#define GPT2_INLINE inline __attribute__((always_inline))

namespace gpt2::GPT2_ISA {

// ---- storage types

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

GPT2_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

GPT2_INLINE uint64_t bits_of(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}

GPT2_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

GPT2_INLINE float widen(float x) {
  return x;
}
GPT2_INLINE double widen(double x) {
  return x;
}
GPT2_INLINE float widen(bf16 x) {
  return float_of(uint32_t(x.bits) << 16);
}

GPT2_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // Read as a float whose exponent is 112 too small; the product is exact, subnormals included.
  return float_of(bits_of(float_of(rest << 13) * 0x1p112f) | sign);
}

GPT2_INLINE void narrow(float x, float& y) {
  y = x;
}
GPT2_INLINE void narrow(double x, double& y) {
  y = x;
}

GPT2_INLINE void narrow(float x, bf16& y) {
  const uint32_t u = bits_of(x);
  if (x != x) {
    y.bits = uint16_t(u >> 16 | 0x40);
  } else {
    y.bits = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
}

GPT2_INLINE void narrow(float x, f16& y) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  uint32_t h;
  if (rest > 0x7f800000) {
    h = 0x7e00 | (rest >> 13 & 0x3ff);
  } else if (rest >= 0x477ff000) {  // 65520 and more round to infinity
    h = 0x7c00;
  } else if (rest < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    h = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
  } else {
    h = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  y.bits = uint16_t(sign | h);
}

// ---- one lane

template <class S>
struct Vec {
  using scalar = S;
  static constexpr int64_t W = 1;
  S v;

  static GPT2_INLINE Vec set(S x) { return {x}; }
  template <class T>
  static GPT2_INLINE Vec load(const T* p) {
    return {S(widen(*p))};
  }
  template <class T>
  static GPT2_INLINE Vec load(const T* p, int64_t n) {
    return {n > 0 ? S(widen(*p)) : S(0)};
  }
  struct Bytes {
    const int8_t* block;

    explicit Bytes(const int8_t* from) : block(from) {}

    Vec dot(const int16_t* x) const {
      int32_t sum = 0;
      for (int i = 0; i < 64; ++i) sum += x[i] * block[i % 32 * 2 + i / 32];
      return {S(256) * sum};
    }
  };
  template <class T>
  GPT2_INLINE void store(T* p) const {
    narrow(v, *p);
  }
  template <class T>
  GPT2_INLINE void store(T* p, int64_t n) const {
    if (n > 0) narrow(v, *p);
  }
  GPT2_INLINE S sum() const { return v; }
  GPT2_INLINE S max() const { return v; }
};

template <class S>
GPT2_INLINE Vec<S> operator+(Vec<S> a, Vec<S> b) {
  return {a.v + b.v};
}
template <class S>
GPT2_INLINE Vec<S> operator-(Vec<S> a, Vec<S> b) {
  return {a.v - b.v};
}
template <class S>
GPT2_INLINE Vec<S> operator*(Vec<S> a, Vec<S> b) {
  return {a.v * b.v};
}
template <class S>
GPT2_INLINE Vec<S> operator/(Vec<S> a, Vec<S> b) {
  return {a.v / b.v};
}
GPT2_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {__builtin_fmaf(a.v, b.v, c.v)};
}
GPT2_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {__builtin_fma(a.v, b.v, c.v)};
}
template <class S>
GPT2_INLINE Vec<S> max(Vec<S> a, Vec<S> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class S>
GPT2_INLINE Vec<S> min(Vec<S> a, Vec<S> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class S>
GPT2_INLINE Vec<S> first(int64_t n, Vec<S> a, Vec<S> b) {
  return n > 0 ? a : b;
}
template <class S>
GPT2_INLINE Vec<S> if_less(Vec<S> a, Vec<S> b, Vec<S> x, Vec<S> y) {
  return a.v < b.v ? x : y;
}
GPT2_INLINE Vec<float> split(Vec<float> x, Vec<float>& scale) {
  const float n = __builtin_rintf(x.v);
  // n is in [-127, 128]: the ends are 0 and infinity. NaN is left to f.
  scale.v = float_of(n == n ? uint32_t(int32_t(n) + 127) << 23 : 0x3f800000);
  return {x.v - n};
}

// to[c * to_ld + r] = from[r * ld + c] for r, c < 8
template <class S>
void transpose8(const S* from, int64_t ld, S* to, int64_t to_ld) {
  for (int64_t r = 0; r < 8; ++r) {
    for (int64_t c = 0; c < 8; ++c) to[c * to_ld + r] = from[r * ld + c];
  }
}

}  // namespace gpt2::GPT2_ISA
