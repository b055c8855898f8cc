// What attention's two passes share: views of a head, the lengths of packed operands, and who works
// on what in which part of the workspace.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "vec_math.h"

namespace gpt2::GPT2_ISA {

// Where a maximum of scores starts. Not -inf: where every score so far is -inf, p = exp(s - m) is
// 0, and not exp(-inf + inf).
template <class S>
inline constexpr S kLowest = sizeof(S) == 4 ? S(-__FLT_MAX__) : S(-__DBL_MAX__);

// Head (b, h) of a view: its first row.
template <class T>
const T* head_of(const View& view, int64_t b, int64_t h) {
  return static_cast<const T*>(view.data) + b * view.batch + h * view.head;
}
template <class T>
T* head_of(const OutView& view, int64_t b, int64_t h) {
  return static_cast<T*>(view.data) + b * view.batch + h * view.head;
}

// Extents of packed operands.
template <class P>
struct Packed {
  int64_t ld, steps;  // a row's length, padded with zeros; its length in steps of K

  explicit Packed(int64_t D) : ld(round_up(D, P::V::W)), steps((D + P::K - 1) / P::K) {}
  int64_t rows(int64_t T) const { return round_up(T, P::K) * ld; }
  int64_t panels(int64_t T) const { return round_up(T, kPanel<typename P::V>) * steps * P::K; }
};

// factor * from, rounded to the dtype.
template <class V, class T>
GPT2_INLINE void store_row(const typename V::scalar* from, V factor, T* to, int64_t D) {
  int64_t d = 0;
  for (; d + V::W <= D; d += V::W) (V::load(from + d) * factor).store(to + d);
  if (d < D) (V::load(from + d) * factor).store(to + d, D - d);
}

// Each thread takes whole heads, or, where some threads would be left without one for too long,
// every head is packed first and the threads share the blocks of all heads. `whole` and `shared`
// are what a head costs one way and the other.
inline bool share_heads(const Attention& x, const Threads& threads, int64_t whole, int64_t shared) {
  const int64_t heads = x.B * x.H, rounds = (heads + threads.count - 1) / threads.count;
  return rounds * threads.count * whole > heads * shared;
}

// Where the packed heads and the workers' blocks lie in the workspace.
template <class Head, class Block, class Pass>
class Layout {
 public:
  Layout(const Pass& pass, void* workspace, int64_t heads)
      : pass_(pass), memory_(static_cast<char*>(workspace)), heads_(heads) {
    Arena count(nullptr);
    Head(pass, count);
    head_size_ = count.used();
    Block(pass, count);
    block_size_ = count.used() - head_size_;
  }
  int64_t size(int64_t workers) const { return heads_ * head_size_ + workers * block_size_; }
  Head head(int64_t i) const {
    Arena arena(memory_ + i * head_size_);
    return Head(pass_, arena);
  }
  Block block(int64_t worker) const {
    Arena arena(memory_ + heads_ * head_size_ + worker * block_size_);
    return Block(pass_, arena);
  }

 private:
  const Pass& pass_;
  char* memory_;
  int64_t heads_, head_size_, block_size_;
};

}  // namespace gpt2::GPT2_ISA
