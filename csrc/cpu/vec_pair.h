// Two vectors side by side, as one vector of twice the lanes.
//
// A function of one vector is a chain of dependent instructions, some 70 cycles for a GELU, and no
// processor looks far enough ahead to overlap enough of them. Written over VecPair, every step of
// the chain is two independent instructions; over VecPair<VecPair<V>>, four. Each lane's result is
// what it would be alone.
#pragma once

#include "vec_math.h"

namespace gpt2::GPT2_ISA {

template <class V>  // max(), where a member hides it
GPT2_INLINE V larger(V a, V b) {
  return max(a, b);
}

template <class V>
struct VecPair {
  using scalar = typename V::scalar;
  static constexpr int64_t W = 2 * V::W;
  V lo, hi;

  static GPT2_INLINE VecPair set(scalar x) { return {V::set(x), V::set(x)}; }
  template <class T>
  static GPT2_INLINE VecPair load(const T* p) {
    return {V::load(p), V::load(p + V::W)};
  }
  template <class T>
  static GPT2_INLINE VecPair load(const T* p, int64_t n) {
    return {V::load(p, n), V::load(p + V::W, n - V::W)};
  }
  template <class T>
  GPT2_INLINE void store(T* p) const {
    lo.store(p), hi.store(p + V::W);
  }
  template <class T>
  GPT2_INLINE void store(T* p, int64_t n) const {
    lo.store(p, n), hi.store(p + V::W, n - V::W);
  }
  GPT2_INLINE scalar sum() const { return (lo + hi).sum(); }
  GPT2_INLINE scalar max() const { return larger(lo, hi).max(); }
};

template <class V>
GPT2_INLINE VecPair<V> operator+(VecPair<V> a, VecPair<V> b) {
  return {a.lo + b.lo, a.hi + b.hi};
}
template <class V>
GPT2_INLINE VecPair<V> operator-(VecPair<V> a, VecPair<V> b) {
  return {a.lo - b.lo, a.hi - b.hi};
}
template <class V>
GPT2_INLINE VecPair<V> operator*(VecPair<V> a, VecPair<V> b) {
  return {a.lo * b.lo, a.hi * b.hi};
}
template <class V>
GPT2_INLINE VecPair<V> operator/(VecPair<V> a, VecPair<V> b) {
  return {a.lo / b.lo, a.hi / b.hi};
}
template <class V>
GPT2_INLINE VecPair<V> fma(VecPair<V> a, VecPair<V> b, VecPair<V> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> max(VecPair<V> a, VecPair<V> b) {
  return {max(a.lo, b.lo), max(a.hi, b.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> min(VecPair<V> a, VecPair<V> b) {
  return {min(a.lo, b.lo), min(a.hi, b.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> first(int64_t n, VecPair<V> a, VecPair<V> b) {
  return {first(n, a.lo, b.lo), first(n - V::W, a.hi, b.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> if_less(VecPair<V> a, VecPair<V> b, VecPair<V> x, VecPair<V> y) {
  return {if_less(a.lo, b.lo, x.lo, y.lo), if_less(a.hi, b.hi, x.hi, y.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> split(VecPair<V> x, VecPair<V>& scale) {
  return {split(x.lo, scale.lo), split(x.hi, scale.hi)};
}
template <class V>
GPT2_INLINE VecPair<V> exp2_of_double(VecPair<V> x) {
  return {exp2_of_double(x.lo), exp2_of_double(x.hi)};
}

}  // namespace gpt2::GPT2_ISA
