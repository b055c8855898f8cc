// Two vectors side by side, as one vector of twice the lanes.
//
// A function of one vector is a chain of dependent instructions, some 70 cycles for a GELU, and no
// processor looks far enough ahead to overlap enough of them. Written over Wide, every step of the
// chain is two independent instructions; over Wide<Wide<V>>, four. Each lane's result is what it
// would be alone.
#pragma once

#include "vec_math.h"

namespace gpt2::GPT2_ISA {

template <class V>  // max(), where a member hides it
GPT2_INLINE V larger(V a, V b) {
  return max(a, b);
}

template <class V>
struct Wide {
  using scalar = typename V::scalar;
  static constexpr int64_t W = 2 * V::W;
  V lo, hi;

  static GPT2_INLINE Wide set(scalar x) { return {V::set(x), V::set(x)}; }
  template <class T>
  static GPT2_INLINE Wide load(const T* p) {
    return {V::load(p), V::load(p + V::W)};
  }
  template <class T>
  static GPT2_INLINE Wide load(const T* p, int64_t n) {
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
GPT2_INLINE Wide<V> operator+(Wide<V> a, Wide<V> b) {
  return {a.lo + b.lo, a.hi + b.hi};
}
template <class V>
GPT2_INLINE Wide<V> operator-(Wide<V> a, Wide<V> b) {
  return {a.lo - b.lo, a.hi - b.hi};
}
template <class V>
GPT2_INLINE Wide<V> operator*(Wide<V> a, Wide<V> b) {
  return {a.lo * b.lo, a.hi * b.hi};
}
template <class V>
GPT2_INLINE Wide<V> operator/(Wide<V> a, Wide<V> b) {
  return {a.lo / b.lo, a.hi / b.hi};
}
template <class V>
GPT2_INLINE Wide<V> fma(Wide<V> a, Wide<V> b, Wide<V> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class V>
GPT2_INLINE Wide<V> max(Wide<V> a, Wide<V> b) {
  return {max(a.lo, b.lo), max(a.hi, b.hi)};
}
template <class V>
GPT2_INLINE Wide<V> min(Wide<V> a, Wide<V> b) {
  return {min(a.lo, b.lo), min(a.hi, b.hi)};
}
template <class V>
GPT2_INLINE Wide<V> first(int64_t n, Wide<V> a, Wide<V> b) {
  return {first(n, a.lo, b.lo), first(n - V::W, a.hi, b.hi)};
}
template <class V>
GPT2_INLINE Wide<V> if_less(Wide<V> a, Wide<V> b, Wide<V> x, Wide<V> y) {
  return {if_less(a.lo, b.lo, x.lo, y.lo), if_less(a.hi, b.hi, x.hi, y.hi)};
}
template <class V>
GPT2_INLINE Wide<V> split(Wide<V> x, Wide<V>& scale) {
  return {split(x.lo, scale.lo), split(x.hi, scale.hi)};
}
template <class V>
GPT2_INLINE Wide<V> exp2_of_double(Wide<V> x) {
  return {exp2_of_double(x.lo), exp2_of_double(x.hi)};
}

}  // namespace gpt2::GPT2_ISA
