// Attention's dropout mask, from position alone: reference.dropout_keep holds the definition.
//
// Element (bh, i, j) is kept where the upper 24 bits of word j % 4 of
// Philox4x32-7(key = seed, counter = (j / 4, i, bh, 0)) are at least dropout_p 2^24.
// Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC 2011.
#pragma once

#include "vec.h"

namespace gpt2::GPT2_ISA {

struct Dropout {
  uint32_t key[2], threshold;
  double scale;  // of what is kept

  Dropout(double p, int64_t seed)
      : key{uint32_t(seed), uint32_t(uint64_t(seed) >> 32)},
        threshold(uint32_t(__builtin_rint(p * 0x1p24))),
        scale(p < 1 ? 1 / (1 - p) : 0) {}

  bool active() const { return threshold > 0; }

  // 1 or 0 for keys j in [begin, begin + n) of query i; begin is a multiple of 4. Up to three more
  // are written.
  template <class S>
  void keep(int64_t bh, int64_t i, int64_t begin, int64_t n, S* to) const {
    for (int64_t j = 0; j < n; j += 4) {
      uint32_t word[4] = {uint32_t((begin + j) / 4), uint32_t(i), uint32_t(bh), 0};
      philox(word);
      for (int w = 0; w < 4; ++w) to[j + w] = word[w] >> 8 >= threshold ? S(1) : S(0);
    }
  }

 private:
  GPT2_INLINE void philox(uint32_t (&c)[4]) const {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const uint64_t a = uint64_t(c[0]) * 0xD2511F53, b = uint64_t(c[2]) * 0xCD9E8D57;
      const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b),
                                uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
      memcpy(c, next, sizeof next);
    }
  }
};

}  // namespace gpt2::GPT2_ISA
