// Loops over PyTorch's threads. Which thread does what never changes a result.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace gpt2::GPT2_ISA {

// f(begin, end) over ranges of [0, n), at least grain long.
template <class F>
void parallel_ranges(const Threads& threads, int64_t n, int64_t grain, const F& f) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  threads.run(n, grain, call, &f);
}

// Items of unequal cost: a worker takes the next whenever it is done with one.
class Queue {
 public:
  explicit Queue(int64_t n) : n_(n) {}
  // The next item in [0, n), or -1 when there is none left.
  int64_t next() {
    const int64_t i = __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED);
    return i < n_ ? i : -1;
  }

 private:
  int64_t n_, taken_ = 0;
};

// work(worker, queue) on each of at most threads.count workers.
template <class F>
void parallel_workers(const Threads& threads, int64_t items, const F& work) {
  Queue queue(items);
  const int64_t workers = items < threads.count ? items : threads.count;
  parallel_ranges(threads, workers, 1, [&](int64_t worker, int64_t end) {
    for (; worker < end; ++worker) work(worker, queue);
  });
}

// Hands out memory piece by piece, each on its own cache line. With null it only counts bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class E>
  E* take(int64_t n) {
    E* taken = memory_ ? reinterpret_cast<E*>(memory_ + used_) : nullptr;
    used_ += (n * int64_t(sizeof(E)) + 63) / 64 * 64;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace gpt2::GPT2_ISA
