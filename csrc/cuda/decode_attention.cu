// Attention of one new token per sequence: q (B, 1, H, D) over the first lengths[b] rows of a
// cache.
//
//   s[j] = q . k[j]      p = softmax(softmax_scale s)      o = p v
//
// Nothing but reading the cache once, so a block takes a split of kSplit keys of one head: splits
// of fixed size, however many the batch has, keep a row's bits the same in every batch. The lanes
// that share a key hold 16 bytes of it each; a group of lanes carries m, l and acc over its own
// keys, as attention.cu does, and groups, warps and at last splits are added in their order:
//
//   m = max m_i    a_i = exp(softmax_scale (m_i - m))    l = sum a_i l_i    acc = sum a_i acc_i
//
//   B batch   T rows of the cache   H heads   D head size
#include "attention.cuh"

namespace gpt2::cuda {
namespace {

constexpr int kSplit = 128;

struct DecodeArgs {
  View q, k, v;
  const int64_t* lengths;
  void* o;       // (B, H, D)
  float* parts;  // (B, H, splits, D + 2): acc, m, l
  int64_t T;
  int H, D, splits;
  float scale_log2;

  // How many keys of sequence b are read: none where its length lies outside the cache.
  __device__ int64_t keys(int64_t length) const { return length >= 0 && length <= T ? length : 0; }

  // The keys of one split, all of which the query sees.
  __device__ KeyRange keys_of(int split, int64_t length) const {
    const int begin = split * kSplit;
    const int end = static_cast<int>(min(keys(length), int64_t(begin) + kSplit));
    return {begin, end, end};
  }
};

// An online softmax over some keys, and a lane's N columns of acc = sum_j e(s[j] - m) v[j].
template <int N>
struct Part {
  OnlineSoftmax softmax;
  float acc[N] = {};

  __device__ void raise(float m_new, float scale_log2) {
    const float alpha = softmax.raise(m_new, scale_log2);
#pragma unroll
    for (int i = 0; i < N; ++i) acc[i] *= alpha;
  }

  __device__ void add(Part other, float scale_log2) {
    const float m_new = fmaxf(softmax.m, other.softmax.m);
    raise(m_new, scale_log2);
    other.raise(m_new, scale_log2);
    softmax.l += other.softmax.l;
#pragma unroll
    for (int i = 0; i < N; ++i) acc[i] += other.acc[i];
  }

  // The part of the lane whose number differs in this bit.
  __device__ Part shuffle_xor(int lanes) const {
    Part other;
    other.softmax.m = __shfl_xor_sync(~0u, softmax.m, lanes);
    other.softmax.l = __shfl_xor_sync(~0u, softmax.l, lanes);
#pragma unroll
    for (int i = 0; i < N; ++i) other.acc[i] = __shfl_xor_sync(~0u, acc[i], lanes);
    return other;
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 4) decode_attention_kernel(const DecodeArgs args) {
  constexpr int kChunk = kLanes<T>, kChunks = D / kChunk;
  constexpr int kGroup = kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  constexpr int kGroups = kThreads / kGroup, kStep = 4;  // keys whose loads are under way at once
  using Chunk = Vec<T, kChunk>;

  const int split = blockIdx.x % args.splits, bh = blockIdx.x / args.splits;
  const int b = bh / args.H, h = bh % args.H;
  const KeyRange range = args.keys_of(split, args.lengths[b]);
  if (range.begin >= range.end) return;  // decode_attention_sum_kernel knows
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
  const bool holds = lane * kChunk < args.D;  // groups are powers of two, rows need not be
  const int at = holds ? lane * kChunk : 0;
  const T* q = head_of<const T>(args.q, b, h).data;
  const auto k = head_of<const T>(args.k, b, h), v = head_of<const T>(args.v, b, h);

  float wide_q[kChunk];
  const Chunk packed_q = Chunk::load(q + at);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) wide_q[i] = holds ? widen(packed_q.x[i]) : 0.0f;

  Part<kChunk> part;
  for (int first = range.begin; first < range.end; first += kStep * kGroups) {
    const int j = first + group;  // whole warps go on together: a key past the end has no weight
    Chunk keys[kStep], values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int64_t row = min(j + i * kGroups, range.end - 1);
      keys[i] = Chunk::load(k.data + row * k.stride + at);
      values[i] = Chunk::load(v.data + row * v.stride + at);
    }
    // s = q . k    m = max(m, s)
    float s[kStep], m_new = part.softmax.m;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      s[i] = 0;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) s[i] = fmaf(wide_q[c], widen(keys[i].x[c]), s[i]);
#pragma unroll
      for (int step = 1; step < kGroup; step *= 2) {
        s[i] += __shfl_xor_sync(~0u, s[i], step);
      }
      if (j + i * kGroups >= range.end) s[i] = -INFINITY;
      m_new = fmaxf(m_new, s[i]);
    }
    // p = e(s - m)    l = alpha l + p    acc = alpha acc + p v
    part.raise(m_new, args.scale_log2);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const float p = part.softmax.power(s[i], args.scale_log2);
      part.softmax.l += p;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) part.acc[c] = fmaf(p, widen(values[i].x[c]), part.acc[c]);
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int step = kGroup; step < kWarp; step *= 2) {
    part.add(part.shuffle_xor(step), args.scale_log2);
  }
  __shared__ Part<kChunk> parts[kWarps][kGroup];
  if (threadIdx.x % kWarp < kGroup) parts[threadIdx.x / kWarp][lane] = part;
  __syncthreads();
  if (threadIdx.x >= kGroup || !holds) return;
  Part<kChunk> sum = parts[0][lane];
  for (int warp = 1; warp < kWarps; ++warp) sum.add(parts[warp][lane], args.scale_log2);
  float* to = args.parts + (int64_t(bh) * args.splits + split) * (args.D + 2);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) to[at + c] = sum.acc[c];
  if (lane == 0) to[args.D] = sum.softmax.m, to[args.D + 1] = sum.softmax.l;
}

// o = acc / l over the splits of a head, a thread for each column; 0 where there are no keys, NaN
// for a length outside the cache.
template <class T>
__global__ void decode_attention_sum_kernel(const DecodeArgs args) {
  const int bh = blockIdx.x, d = threadIdx.x;
  if (d >= args.D) return;
  const int64_t length = args.lengths[bh / args.H], keys = args.keys(length);
  const float* from = args.parts + int64_t(bh) * args.splits * (args.D + 2);
  Part<1> sum;
  for (int64_t j = 0; j < keys; j += kSplit, from += args.D + 2) {
    sum.add({{from[args.D], from[args.D + 1]}, {from[d]}}, args.scale_log2);
  }
  static_cast<T*>(args.o)[int64_t(bh) * args.D + d] =
      narrow<T>(length == 0 ? 0
                : keys > 0  ? sum.acc[0] / sum.softmax.l
                            : NAN);
}

}  // namespace

template <class T>
int64_t decode_attention(const DecodeAttention& x, const Executor& executor) {
  const int64_t heads = x.B * x.H, splits = cdiv(x.T, int64_t(kSplit));
  if (x.workspace == nullptr) return heads * splits * (x.D + 2) * int64_t(sizeof(float));
  const DecodeArgs args{x.q,
                        x.k,
                        x.v,
                        x.lengths,
                        x.o,
                        static_cast<float*>(x.workspace),
                        x.T,
                        int(x.H),
                        int(x.D),
                        int(splits),
                        static_cast<float>(x.softmax_scale * 1.4426950408889634)};
  with_head_size(x.D, [&](auto D) {
    launch("decode_attention", decode_attention_kernel<T, D>, heads * splits, kThreads, 0, executor,
           args);
  });
  launch("decode_attention_sum", decode_attention_sum_kernel<T>, heads, kThreads, 0, executor,
         args);
  return 0;
}

template int64_t decode_attention<float>(const DecodeAttention&, const Executor&);
template int64_t decode_attention<bf16>(const DecodeAttention&, const Executor&);
template int64_t decode_attention<f16>(const DecodeAttention&, const Executor&);

}  // namespace gpt2::cuda
