// residual = (delta1 + delta2) + x, then one or two norms of it (ops.h has the formulas).
//
// Bytes per token: hidden_size * element size * (inputs + residual written + norms). The row is
// read once and stays in registers, in its own dtype: the residual is rounded to it anyway, and
// half the registers mean twice the rows in flight. Weights come from L1 and L2.
#include <algorithm>

#include "../include/launch.cuh"
#include "../include/reduce.cuh"
#include "../include/vec.cuh"

#ifndef HF_FUSE_HIDDEN_SIZES
#define HF_FUSE_HIDDEN_SIZES 2048, 2560, 4096, 8192
#endif

namespace hf_fuse {
namespace {

constexpr const char* kOp = "add_norm_forward";

// How a row of 16-byte vectors is spread: threads a row, vectors a thread, rows a block.
struct RowShape {
  int threads, vecs, rows;
};

// With few tokens latency is all: one vector a thread, so that everything is loaded at once. With
// many, short rows take a warp each (no barrier), longer ones 64 to 256 threads: several blocks a
// multiprocessor then load while others sum, at 32 to 64 KB in flight each.
constexpr int kFewTokens = 256;
constexpr int64_t kPastL2 = 32 << 20;  // bytes written that nobody will find in L2
constexpr int kMaxVectors = 2048;      // beyond it, a row does not fit in registers
constexpr RowShape row_shape(int vectors, bool few_tokens) {
  if (few_tokens && vectors <= 1024) return {int(round_up(vectors, kWarpSize)), 1, 1};
  if (vectors <= 128) return {kWarpSize, int(ceil_div(vectors, kWarpSize)), 4};
  const int vecs = vectors <= 512 ? 2 : 4;
  return {int(round_up(ceil_div(vectors, vecs), kWarpSize)), vecs, 1};
}

// Threads a block has at most (0: known only at run time), and blocks that must fit on a
// multiprocessor: 64 to 80 registers a thread for 768 to 1024 threads.
constexpr int max_threads(int vecs, int threads) {
  if (threads) return threads == kWarpSize ? 4 * kWarpSize : threads;
  return vecs == 1 ? 1024 : vecs == 2 ? 256 : 512;
}
constexpr int min_blocks(int vecs, int threads) {
  if (vecs == 1) return 1;
  if (vecs == 2) return threads > 0 && threads < 256 ? 896 / max_threads(vecs, threads) : 4;
  return threads ? 768 / max_threads(vecs, threads) : 1;
}

// kRmsOnce stands for kRmsOffset as well: `offset` is what the weight counts from.
template <Norm kNorm, typename V>
__device__ V normalize(const V& row, float mean, float rstd, const V& weight, const V& bias,
                       float offset) {
  auto y = row.floats();
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) y[i] = (y[i] - mean) * rstd;
  // transformers casts back to the dtype before it multiplies by the weight.
  if constexpr (kNorm == Norm::kRms) return weight * V::from(y);
  const auto w = weight.floats(), b = bias.floats();
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) {
    y[i] = kNorm == Norm::kLayer ? y[i] * w[i] + b[i] : y[i] * (w[i] + offset);
  }
  return V::from(y);
}

// Adds to *sum the vector's values (kSquares false) or their squares about the centre.
template <bool kSquares, typename V>
__device__ void accumulate(const V& row, float centre, float* sum) {
  const auto x = row.floats();
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) {
    const float d = x[i] - centre;
    *sum += kSquares ? d * d : d;
  }
}

__device__ void save_statistics(const AddNormForward& p, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  if (p.mean) static_cast<float*>(p.mean)[row] = mean;
  if (p.rstd) static_cast<float*>(p.rstd)[row] = rstd;
}

// kThreads and kHidden are 0 where they are known only at run time.
template <typename T, Norm kNorm, int kVecs, int kThreads, int kHidden>
__global__ void __launch_bounds__(max_threads(kVecs, kThreads), min_blocks(kVecs, kThreads))
    add_norm_kernel(const AddNormForward p, const float eps, const float inv_hidden,
                    const bool past_l2, const float offset) {
  using V = Vec16<T>;
  __shared__ alignas(16) float shared[2][1][kMaxWarps];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int threads = kThreads ? kThreads : blockDim.x;
  const int hidden = kHidden ? kHidden : static_cast<int>(p.hidden_size);
  const auto column = [&](int j) { return (j * threads + int(threadIdx.x)) * V::kSize; };
  const auto inside = [&](int j) {
    return (kHidden && kThreads * kVecs * V::kSize == kHidden) || column(j) < hidden;
  };
  const auto start = [&](const void* base, int64_t stride) {
    return static_cast<const T*>(base) + row * stride + column(0);
  };
  const T *x = start(p.x, p.x_stride), *delta1_in = start(p.delta1, p.delta1_stride);
  const T* delta2_in = start(p.delta2, p.delta2_stride);
  pdl_trigger_and_wait(x, delta1_in, delta2_in);
  if (row >= p.num_tokens) return;  // only where a row is one warp, so no barrier misses it

  const auto read_row = [&](V(&v)[kVecs], const T* data) {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (inside(j)) v[j] = load_once<V>(data + (column(j) - column(0)));
    }
  };
  const auto write_vector = [&](T* ptr, const V& v) {
    past_l2 ? store_once(ptr, v) : store(ptr, v);
  };
  const auto read_parameter = [&](V(&v)[kVecs], const void* base) {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (base && inside(j)) v[j] = load<V>(static_cast<const T*>(base) + column(j));
    }
  };

  V weight1[kVecs] = {}, bias1[kVecs] = {}, weight2[kVecs] = {}, bias2[kVecs] = {};
  V h[kVecs] = {};
  {
    V delta1[kVecs] = {}, delta2[kVecs] = {};
    read_row(h, x);
    if (p.delta1) read_row(delta1, delta1_in);
    if (p.delta2) read_row(delta2, delta2_in);
    if constexpr (kVecs == 1) {
      read_parameter(weight1, p.weight1);
      read_parameter(bias1, p.bias1);
      read_parameter(weight2, p.weight2);
      read_parameter(bias2, p.bias2);
    }
    if (p.delta1) {
      T* residual = static_cast<T*>(p.residual) + row * hidden;
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        if (p.delta2) delta1[j] = delta1[j] + delta2[j];
        h[j] = delta1[j] + h[j];
        if (inside(j)) write_vector(residual + column(j), h[j]);
      }
    }
  }
  float sum[1] = {0.f}, mean = 0.f;
  if constexpr (kNorm == Norm::kLayer) {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) accumulate<false>(h[j], 0.f, sum);  // zeros outside the row
    row_sum(sum, shared[0], threads);
    mean = sum[0] * inv_hidden;
    sum[0] = 0.f;
  }
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    if (inside(j)) accumulate<true>(h[j], mean, sum);
  }
  row_sum(sum, shared[1], threads);
  const float rstd = rsqrtf(sum[0] * inv_hidden + eps);
  save_statistics(p, row, mean, rstd);

  const auto write = [&](void* base, const V(&weight)[kVecs], const V(&bias)[kVecs]) {
    T* out = static_cast<T*>(base) + row * hidden;
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (!inside(j)) continue;
      write_vector(out + column(j), normalize<kNorm>(h[j], mean, rstd, weight[j], bias[j], offset));
    }
  };
  if constexpr (kVecs > 1) {  // from L1, in the registers that held the inputs
    read_parameter(weight1, p.weight1);
    read_parameter(bias1, p.bias1);
  }
  write(p.normed1, weight1, bias1);
  if (!p.weight2) return;
  if constexpr (kVecs > 1) {
    read_parameter(weight2, p.weight2);
    read_parameter(bias2, p.bias2);
  }
  write(p.normed2, weight2, bias2);
}

// Rows too long for registers, or not made of aligned 16-byte vectors: a block a row, which it
// reads again (from L2, and what it wrote itself) for the variance and for the result.
template <typename T, int kWidth>
__global__ void __launch_bounds__(1024)
    add_norm_long_kernel(const AddNormForward p, const float eps, const float inv_hidden,
                         const float offset) {
  using V = Vec<T, kWidth>;
  __shared__ alignas(16) float shared[2][1][kMaxWarps];
  pdl_trigger_and_wait();
  const int64_t row = blockIdx.x;
  const int hidden = static_cast<int>(p.hidden_size);
  const int first = threadIdx.x * kWidth, step = blockDim.x * kWidth;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* delta1 = static_cast<const T*>(p.delta1) + row * p.delta1_stride;
  const T* delta2 = static_cast<const T*>(p.delta2) + row * p.delta2_stride;
  T* residual = static_cast<T*>(p.residual) + row * hidden;

  const bool rms = p.kind != Norm::kLayer;
  float sum[1] = {0.f}, mean = 0.f;
  for (int i = first; i < hidden; i += step) {
    V h = load<V>(x + i);
    if (p.delta1) {
      V delta = load<V>(delta1 + i);
      if (p.delta2) delta = delta + load<V>(delta2 + i);
      h = delta + h;
      store(residual + i, h);
    }
    rms ? accumulate<true>(h, 0.f, sum) : accumulate<false>(h, 0.f, sum);
  }
  row_sum(sum, shared[0], blockDim.x);
  const T* row_data = p.delta1 ? residual : x;
  if (!rms) {
    mean = sum[0] * inv_hidden;
    sum[0] = 0.f;
    for (int i = first; i < hidden; i += step) {
      accumulate<true>(load<V>(row_data + i), mean, sum);
    }
    row_sum(sum, shared[1], blockDim.x);
  }
  const float rstd = rsqrtf(sum[0] * inv_hidden + eps);
  save_statistics(p, row, mean, rstd);

  const auto write = [&](void* out, int i, const V& h, const void* weight, const void* bias) {
    const V w = load<V>(static_cast<const T*>(weight) + i);
    V b = {};
    if (bias) b = load<V>(static_cast<const T*>(bias) + i);
    store(static_cast<T*>(out) + row * hidden + i,
          p.kind == Norm::kRms     ? normalize<Norm::kRms>(h, mean, rstd, w, b, offset)
          : p.kind == Norm::kLayer ? normalize<Norm::kLayer>(h, mean, rstd, w, b, offset)
                                   : normalize<Norm::kRmsOnce>(h, mean, rstd, w, b, offset));
  };
  for (int i = first; i < hidden; i += step) {
    const V h = load<V>(row_data + i);
    write(p.normed1, i, h, p.weight1, p.bias1);
    if (p.weight2) write(p.normed2, i, h, p.weight2, p.bias2);
  }
}

template <typename T, Norm kNorm, int kVecs, int kThreads = 0, int kHidden = 0>
void launch_row(const AddNormForward& p, RowShape shape, void* stream) {
  const int outputs = 1 + (p.residual != nullptr) + (p.normed2 != nullptr);
  const int64_t written = outputs * p.num_tokens * p.hidden_size * int64_t{sizeof(T)};
  launch(kOp, add_norm_kernel<T, kNorm, kVecs, kThreads, kHidden>,
         {ceil_div(p.num_tokens, shape.rows)}, dim3(shape.threads, shape.rows), 0, stream, p,
         static_cast<float>(p.eps), 1.f / static_cast<float>(p.hidden_size), written >= kPastL2,
         weight_offset(p.kind));
}

template <typename T, int kWidth>
void launch_long(const AddNormForward& p, void* stream) {
  const int threads =
      static_cast<int>(std::min<int64_t>(1024, round_up(ceil_div(p.hidden_size, kWidth), 32)));
  launch(kOp, add_norm_long_kernel<T, kWidth>, {p.num_tokens}, threads, 0, stream, p,
         static_cast<float>(p.eps), 1.f / static_cast<float>(p.hidden_size), weight_offset(p.kind));
}

template <int... kSizes>
struct HiddenSizes {};

template <typename T, Norm kNorm, int kHidden>
bool launch_if_hidden(const AddNormForward& p, void* stream) {
  constexpr int kVectors = kHidden / Vec16<T>::kSize;
  if constexpr (sizeof(T) == 2 && kHidden % Vec16<T>::kSize == 0 && kVectors <= kMaxVectors) {
    if (p.hidden_size != kHidden) return false;
    constexpr RowShape kFew = row_shape(kVectors, true), kMany = row_shape(kVectors, false);
    if (p.num_tokens <= kFewTokens) {
      launch_row<T, kNorm, kFew.vecs, kFew.threads, kHidden>(p, kFew, stream);
    } else {
      launch_row<T, kNorm, kMany.vecs, kMany.threads, kHidden>(p, kMany, stream);
    }
    return true;
  }
  return false;
}

template <typename T, Norm kNorm, int... kSizes>
void launch_vectors(const AddNormForward& p, void* stream, HiddenSizes<kSizes...>) {
  if ((launch_if_hidden<T, kNorm, kSizes>(p, stream) || ...)) return;
  const RowShape shape =
      row_shape(static_cast<int>(p.hidden_size / Vec16<T>::kSize), p.num_tokens <= kFewTokens);
  if (shape.vecs == 1) {
    launch_row<T, kNorm, 1>(p, shape, stream);
  } else if (shape.vecs == 2) {
    launch_row<T, kNorm, 2>(p, shape, stream);
  } else {
    launch_row<T, kNorm, 4>(p, shape, stream);
  }
}

}  // namespace

void add_norm_forward(const AddNormForward& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.num_tokens == 0 || p.hidden_size == 0) return;
    constexpr int kWidth = Vec16<T>::kSize;
    const bool vectors = p.hidden_size % kWidth == 0 && rows_aligned({{p.x, p.x_stride},
                                                                      {p.delta1, p.delta1_stride},
                                                                      {p.delta2, p.delta2_stride},
                                                                      {p.weight1},
                                                                      {p.bias1},
                                                                      {p.weight2},
                                                                      {p.bias2},
                                                                      {p.residual},
                                                                      {p.normed1},
                                                                      {p.normed2}},
                                                                     p.num_tokens, sizeof(T));
    if (!vectors) {
      launch_long<T, 1>(p, stream);
    } else if (p.hidden_size / kWidth > kMaxVectors) {
      launch_long<T, kWidth>(p, stream);
    } else if (p.kind == Norm::kRms) {
      launch_vectors<T, Norm::kRms>(p, stream, HiddenSizes<HF_FUSE_HIDDEN_SIZES>());
    } else if (p.kind == Norm::kLayer) {
      launch_vectors<T, Norm::kLayer>(p, stream, HiddenSizes<HF_FUSE_HIDDEN_SIZES>());
    } else {
      launch_vectors<T, Norm::kRmsOnce>(p, stream, HiddenSizes<>());
    }
  });
}

}  // namespace hf_fuse
