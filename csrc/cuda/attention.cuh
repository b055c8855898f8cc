// What attention's passes share: tiles of rows on their way between global and shared memory, the
// dropout mask, and which keys a query sees.
//
//   B batch   T time (Tq queries, Tk keys)   H heads   D head size   bh = b * H + h
//
// A block is four warps and owns 64 or 128 rows of one head; kernels are compiled for D = 32, 64,
// 96 and 128, and a smaller D is padded with zeros in shared memory.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace gpt2::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr float kLn2 = 0.693147181f;
constexpr float kLowest = -3.40282347e38f;  // a maximum's start: exp(-inf - kLowest) is 0, not NaN

// How many rows a block owns, and how many it reads at a step. Nothing here has been timed: these
// are the largest tiles that compile without spills and fit 99 KiB of shared memory, which every
// GPU from compute capability 8.0 on has.
template <int MT_, int NT_>
struct TileShape {
  static constexpr int MT = MT_, NT = NT_;
  static constexpr int kOwned = kWarps * 16 * MT, kRead = 8 * NT;
};

// One head of a (B, T, H, D) view: row t is at data + t * stride.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
};

template <class T, class Data>
__device__ HeadRows<T> head_of(const ViewOf<Data>& view, int64_t b, int64_t h) {
  return {static_cast<T*>(view.data) + b * view.batch + h * view.head, view.time};
}

// ---- which keys a query sees

// The keys that a block reads, tile by tile: [begin, end). Those below past_end are seen by each of
// its queries, the others by some.
struct KeyRange {
  int begin, past_end, end;

  // Whether some query does not see some key of [start, start + n).
  __device__ bool is_masked(int start, int n) const { return start + n > past_end; }
};

// The queries that see a block's keys, from `begin`, the start of a tile, to Tq. Those from
// past_begin on see all of the keys, the others some.
struct QueryRange {
  int begin, past_begin;

  // Whether some key is not seen by some query of a tile that begins at `start`.
  __device__ bool is_masked(int start) const { return start < past_begin; }
};

// Query i of Tq sees keys up to i + Tk - Tq.
struct CausalMask {
  int Tq, Tk;

  __device__ int last_key(int query) const { return query + Tk - Tq; }
  __device__ bool hides(int query, int key) const { return key > last_key(query); }

  // The keys that queries [first, first + n) see.
  __device__ KeyRange keys_of(int first, int n) const {
    const int end = min(last_key(first + n - 1) + 1, Tk);
    __builtin_assume(end > 0);  // every query sees a key
    return {0, last_key(first) + 1, end};
  }

  // The queries that see keys [first, first + n), in tiles of `tile`.
  __device__ QueryRange queries_of(int first, int n, int tile) const {
    const int offset = Tk - Tq;
    return {max(first - offset, 0) / tile * tile, first + n - 1 - offset};
  }
};

// ---- softmax

// What the passes know of the scores, as the kernels take it. All exponentials are powers of two.
struct Scores {
  int H, D;
  CausalMask mask;
  float scale, scale_log2;     // softmax_scale, and times log2(e)
  uint32_t dropout_threshold;  // keep where 24 random bits are at least this
  float dropout_scale;         // 1 / (1 - p)
  const int64_t* seed;

  explicit Scores(const Attention& x)
      : H(static_cast<int>(x.H)),
        D(static_cast<int>(x.D)),
        mask{static_cast<int>(x.Tq), static_cast<int>(x.Tk)},
        scale(static_cast<float>(x.softmax_scale)),
        scale_log2(static_cast<float>(x.softmax_scale * 1.4426950408889634)),
        dropout_threshold(static_cast<uint32_t>(rint(x.dropout_p * 0x1p24))),
        dropout_scale(x.dropout_p < 1 ? static_cast<float>(1 / (1 - x.dropout_p)) : 0.0f),
        seed(x.seed) {}

  // p = exp(scale s - lse), for the backward
  __device__ float probability(float s, float lse_log2) const {
    return exp2_fast(s * scale_log2 - lse_log2);
  }

  // Inverted dropout: kept values are scaled by 1 / (1 - p).
  __device__ float drop(bool kept, float x) const { return kept ? x * dropout_scale : 0.0f; }
};

// A row of the online softmax. With s unscaled scores and e(x) = exp(scale x), of the keys so far
//
//   m = max_j s[j]    l = sum_j e(s[j] - m)
//
// A key that raises m scales every sum so far, l and those of the caller, by e(m_old - m).
struct OnlineSoftmax {
  float m = kLowest, l = 0;

  // m = m_new, and l with it. Returns the factor of the caller's sums.
  __device__ float raise(float m_new, float scale_log2) {
    const float alpha = exp2_fast((m - m_new) * scale_log2);
    m = m_new;
    l *= alpha;
    return alpha;
  }

  // e(s - m). Subtracting before scaling is exact at the maximum; a fused s * scale - m is not, and
  // overflows where scores are huge.
  __device__ float power(float s, float scale_log2) const {
    return exp2_fast((s - m) * scale_log2);
  }

  // log sum_j exp(scale s[j])
  __device__ float lse(float scale_log2) const { return (m * scale_log2 + log2f(l)) * kLn2; }
};

// The rows of a lane's accumulator. A lane's l is the sum over its own columns until the end.
template <int MT>
struct OnlineSoftmaxRows {
  OnlineSoftmax row[MT][2];

  // m = max(m, s) over a tile of scores. Returns alpha, the factor of the caller's sums, by row.
  template <int NT>
  __device__ void raise(const float (&s)[MT][NT][4], float scale_log2, float (&alpha)[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m_new = row[i][half].m;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          m_new = fmaxf(m_new, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        }
        alpha[i][half] = row[i][half].raise(quad_max(m_new), scale_log2);
      }
    }
  }

  // s becomes p = e(s - m), and l gains p.
  template <int NT>
  __device__ void exponentiate(float (&s)[MT][NT][4], float scale_log2) {
    for_each<MT, NT>([&](int i, int n, int e) {
      s[i][n][e] = row[i][e / 2].power(s[i][n][e], scale_log2);
      row[i][e / 2].l += s[i][n][e];
    });
  }
};

// ---- what a block works on

// The head and the queries that a block owns.
struct OwnedQueries {
  int bh, b, h, first;
};

template <class Shape>
__device__ OwnedQueries owned_queries(const Scores& scores) {
  const int tiles = cdiv(scores.mask.Tq, Shape::kOwned), bh = blockIdx.x / tiles;
  // Heavy rows first: what a wave of blocks leaves to the end is light.
  const int first = (tiles - 1 - int(blockIdx.x % tiles)) * Shape::kOwned;
  return {bh, bh / scores.H, bh % scores.H, first};
}

// f(row, chunk) for each chunk of ROWS rows that falls to one thread of THREADS. How many do is
// known when the loop is compiled, which is what unrolls it.
template <class Rows, int ROWS, int THREADS, class F>
__device__ void for_chunks(int thread, const F& f) {
  constexpr int kCount = ROWS * Rows::kChunks;
#pragma unroll
  for (int i = 0; i < cdiv(kCount, THREADS); ++i) {
    const int at = i * THREADS + thread;
    if (kCount % THREADS == 0 || at < kCount) f(at / Rows::kChunks, at % Rows::kChunks);
  }
}

// Starts to copy rows [first, first + ROWS) to a tile, zeros beyond `rows` and beyond column D.
template <int ROWS, class T, int D>
__device__ void load_rows(Tile<T, D> to, HeadRows<const T> from, int first, int rows, int columns) {
  using Rows = Tile<T, D>;
  for_chunks<Rows, ROWS, kThreads>(threadIdx.x, [&](int row, int chunk) {
    const bool valid = first + row < rows && chunk * Rows::kChunk < columns;
    const T* source = from.data + (first + row) * from.stride + chunk * Rows::kChunk;
    cp_async(to.chunk(row, chunk), valid ? source : from.data, valid);
  });
}

// Two tiles that are read together, K and V or Q and dO, in two stages: while a block computes with
// one stage, cp.async fills the other. They lie in shared memory behind a tile that the block owns.
template <class Shape, class T, int D>
struct TilePairs {
  Tile<T, D> owned;

  __device__ Tile<T, D> first(int stage) const {
    return {owned.data + (Shape::kOwned + stage * Shape::kRead) * D};
  }
  __device__ Tile<T, D> second(int stage) const { return first(2 + stage); }
  __device__ T* past_end() const { return first(4).data; }

  // Starts to copy rows of x and y from `start` on, zeros beyond `rows`.
  __device__ void load(HeadRows<const T> x, HeadRows<const T> y, int start, int rows, int columns,
                       int stage) const {
    load_rows<Shape::kRead>(first(stage), x, start, rows, columns);
    load_rows<Shape::kRead>(second(stage), y, start, rows, columns);
  }
};

template <class T>
__device__ void store_pair(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
}

template <>
__device__ inline void store_pair<float>(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}

// Stores factor(i, half) * acc, a warp's own rows, through shared memory that nobody else uses any
// more: lanes hold pairs of numbers, memory wants 16 bytes at a time.
template <class T, int D, int MT, class Factor>
__device__ void store_rows(const float (&acc)[MT][D / 8][4], const Factor& factor, Tile<T, D> by,
                           HeadRows<T> to, int first, int rows, int columns) {
  using Rows = Tile<T, D>;
  const Lane<MT> lane;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(i, half);
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const float* c = &acc[i][d][2 * half];
        store_pair(by.element(lane.row(i, half), lane.column(d, 0)), c[0] * f, c[1] * f);
      }
    }
  }
  __syncwarp();
  for_chunks<Rows, 16 * MT, kWarp>(threadIdx.x % kWarp, [&](int in_warp, int chunk) {
    const int row = lane.warp_row + in_warp;
    if (first + row < rows && chunk * Rows::kChunk < columns) {
      T* target = to.data + (first + row) * to.stride + chunk * Rows::kChunk;
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(by.chunk(row, chunk));
    }
  });
}

// Dropout's mask. Which of four neighbouring keys a query keeps is one draw of Philox4x32-7 (see
// kernels/reference.py); lanes that need the same four share it.
class Dropout {
 public:
  __device__ Dropout(const Scores& scores, int bh) : bh_(bh), threshold_(scores.dropout_threshold) {
    const uint64_t seed = *scores.seed;
    k0_ = static_cast<uint32_t>(seed), k1_ = static_cast<uint32_t>(seed >> 32);
  }

  // A bit for each of a lane's elements of a tile of (queries, keys), whose first is this one.
  __device__ uint32_t keep(int query, int key) const {
    const int from = key % 4;  // 0 or 2, this lane's half of the four keys
    const uint32_t mine = four(query + 4 * from, key), other = __shfl_xor_sync(~0u, mine, 1);
    const uint32_t top = from == 0 ? mine : other, bottom = from == 0 ? other : mine;
    return (top >> from & 3) | (bottom >> from & 3) << 2;
  }

  // Of a tile of (keys, queries).
  __device__ uint32_t keep_transposed(int key, int query) const {
    const int from = key % 4;  // one of four lanes, each of which draws for one of four elements
    const uint32_t mine = four(query + from % 2, key + from / 2 * 8);
    const int lane = threadIdx.x % kWarp;
    uint32_t kept = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      kept |= (__shfl_sync(~0u, mine, (lane & ~12) | e << 2) >> from & 1) << e;
    }
    return kept;
  }

 private:
  // Bits for keys key / 4 * 4 and the next three.
  __device__ uint32_t four(int query, int key) const {
    uint32_t k0 = k0_, k1 = k1_, c0 = key / 4, c1 = query, c2 = bh_, c3 = 0;
#pragma unroll
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const uint32_t high0 = __umulhi(c0, 0xD2511F53), high2 = __umulhi(c2, 0xCD9E8D57);
      const uint32_t low0 = c0 * 0xD2511F53, low2 = c2 * 0xCD9E8D57;
      c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    return uint32_t(c0 >> 8 >= threshold_) | uint32_t(c1 >> 8 >= threshold_) << 1 |
           uint32_t(c2 >> 8 >= threshold_) << 2 | uint32_t(c3 >> 8 >= threshold_) << 3;
  }

  uint32_t k0_, k1_, bh_, threshold_;
};

// The mask of a kernel that drops something, and nothing for one that does not.
struct NoDropout {
  __device__ NoDropout(const Scores&, int) {}
};
template <bool DROPOUT>
using DropoutOf = std::conditional_t<DROPOUT, Dropout, NoDropout>;

// f(padded D as a constant)
template <class F>
void with_head_size(int64_t D, const F& f) {
  if (D <= 32) return f(std::integral_constant<int, 32>());
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 96) return f(std::integral_constant<int, 96>());
  return f(std::integral_constant<int, 128>());
}

template <class F>
void with_dropout(const Attention& x, const F& f) {
  if (x.dropout_p > 0) return f(std::true_type());
  return f(std::false_type());
}

}  // namespace gpt2::cuda
