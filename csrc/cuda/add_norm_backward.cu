// Gradients of add_norm. With xhat = (residual - mean) * rstd and g = sum of grad_normed * weight:
//   grad_input  = grad_residual + rstd * (g - mean(g) - xhat * mean(g * xhat))   (rms: no mean(g))
//   grad_weight = sum over tokens of grad_normed * xhat,  grad_bias = sum over tokens of
//   grad_normed
//
// Bytes per token: hidden_size * element size * (gradients given + residual + grad_input). A
// persistent grid: a block walks its rows, the next rows arrive in shared memory meanwhile, and
// every thread keeps the parameter gradients of its columns in registers. The blocks' partial sums
// go to the workspace, and a second kernel adds them in the order of the blocks.
#include <algorithm>

#include "../include/launch.cuh"
#include "../include/reduce.cuh"
#include "../include/vec.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "add_norm_backward";
constexpr int kMaxGrads = 4;  // weight1, bias1, weight2, bias2, in this order everywhere

int num_norms(const AddNormBackward& p) {
  return p.grad_normed2 || p.grad_weight2 || p.grad_bias2 ? 2 : 1;
}

constexpr int max_threads(int norms, int vecs) {
  return vecs == 1 ? (norms == 1 ? 1024 : 640) : vecs == 2 ? 512 : 128;
}

// Launch choices, from the sizes alone: the workspace is measured before there are pointers.
struct Plan {
  bool in_registers;        // otherwise rows are read twice and sums are kept in the workspace
  int threads, vecs, rows;  // threads a row, vectors a thread, rows a block
  int64_t blocks;           // also the number of partial sums
};

Plan make_plan(const AddNormBackward& p) {
  const int64_t vectors = ceil_div(p.hidden_size, p.dtype == DType::kFloat32 ? 4 : 8);
  const int64_t num_sms = device_info(kOp).num_sms;
  // No model has two RMSNorms of one row, and an offset costs the others' registers nothing.
  const bool supported =
      p.kind == Norm::kLayer || (num_norms(p) == 1 && weight_offset(p.kind) == 0.f);
  if (vectors <= 128) {  // a warp a row: no barrier in the loop, and 4 rows share a partial sum
    return {supported, kWarpSize, 4, 4, std::min(ceil_div(p.num_tokens, 4), 3 * num_sms)};
  }
  // One vector a thread, so that a multiprocessor holds as many threads as their sums leave
  // registers for: 1024 with one norm's, 640 with two LayerNorms'. Rows that are longer than that
  // with two norms take two vectors a thread. Either way 60 to 100 KB are in flight.
  const int64_t most = max_threads(num_norms(p), 1), one = round_up(vectors, kWarpSize);
  if (one <= most) {
    return {supported, static_cast<int>(one), 1, 1, std::min(p.num_tokens, most / one * num_sms)};
  }
  const int64_t two = std::min<int64_t>(512, round_up(ceil_div(vectors, 2), kWarpSize));
  return {supported && vectors <= 1024 && num_norms(p) == 2, static_cast<int>(two), 2, 1,
          std::min(p.num_tokens, 512 / two * num_sms)};
}

struct GradList {
  void* out[kMaxGrads];
  int count = 0;
};

GradList wanted_grads(const AddNormBackward& p) {
  GradList list = {};
  for (void* grad : {p.grad_weight1, p.grad_bias1, p.grad_weight2, p.grad_bias2}) {
    if (grad) list.out[list.count++] = grad;
  }
  return list;
}

// The partial sums [gradient, block, hidden_size] of one block; null where a gradient is not
// wanted.
struct Partials {
  float* rows[kMaxGrads];
  __device__ Partials(const AddNormBackward& p) {
    const void* wanted[kMaxGrads] = {p.grad_weight1, p.grad_bias1, p.grad_weight2, p.grad_bias2};
    int64_t index = blockIdx.x;
#pragma unroll
    for (int i = 0; i < kMaxGrads; ++i) {
      rows[i] = wanted[i] ? static_cast<float*>(p.workspace) + index * p.hidden_size : nullptr;
      if (wanted[i]) index += gridDim.x;
    }
  }
};

template <typename V>
struct RowTerms {
  Floats<V::kSize> xhat, g;

  // dy2 and weight2 only with two norms.
  template <int kNorms, bool kOffset = false>
  __device__ static RowTerms make(const V& row, float mean, float rstd, const V& dy1,
                                  const V& weight1, const V& dy2, const V& weight2,
                                  float offset = 0.f) {
    RowTerms t;
    const auto x = row.floats(), d1 = dy1.floats(), w1 = weight1.floats();
    const auto d2 = dy2.floats(), w2 = weight2.floats();
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      t.xhat[i] = (x[i] - mean) * rstd;
      t.g[i] = d1[i] * (kOffset ? w1[i] + offset : w1[i]);
      if (kNorms == 2) t.g[i] += d2[i] * (kOffset ? w2[i] + offset : w2[i]);
    }
    return t;
  }

  __device__ void add_to(float (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      sums[0] += g[i];
      sums[1] += g[i] * xhat[i];
    }
  }

  __device__ V grad_input(float rstd, float mean_g, float mean_gx, const V& grad_residual) const {
    const auto r = grad_residual.floats();
    Floats<V::kSize> out;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      out[i] = rstd * (g[i] - mean_g - xhat[i] * mean_gx) + r[i];
    }
    return V::from(out);
  }
};

// The rows that a thread is about to sum, on their way to shared memory, and the weights. A thread
// reads only what it copied itself, so no barrier is needed. Neighbouring threads' slots lie side
// by side: a warp's copy then fills whole lines of shared memory, without which it ran at half the
// speed. Slots of absent tensors and of columns past the end stay zero.
template <typename T, int kNorms, int kVecs>
class RowRing {
 public:
  using V = Vec16<T>;
  static constexpr int kResidual = 0, kGradNormed = 1, kGradResidual = kNorms + 1;
  static constexpr int kInputs = kNorms + 2;
  // The row being summed, and one or two behind it in flight, as shared memory allows.
  static constexpr int kStages = kVecs == 1 ? 3 : 2;
  static constexpr int kWeights = kStages * kInputs;
  static constexpr int kSlots = (kWeights + kNorms) * kVecs;

  __device__ RowRing(const AddNormBackward& p, uint4* shared, int64_t row, int64_t step)
      : slots_(shared + threadIdx.y * blockDim.x + threadIdx.x),
        pitch_(static_cast<int>(blockDim.x * blockDim.y)),
        hidden_(static_cast<int>(p.hidden_size)) {
    set_input(kResidual, p.residual, p.residual_stride, row, step);
    set_input(kGradNormed, p.grad_normed1, p.grad_normed1_stride, row, step);
    if (kNorms == 2) {
      set_input(kGradNormed + 1, p.grad_normed2, p.grad_normed2_stride, row, step);
    }
    set_input(kGradResidual, p.grad_residual, p.grad_residual_stride, row, step);
    set_weight(0, p.weight1);
    if (kNorms == 2) set_weight(1, p.weight2);
  }

  __device__ int column(int j) const {
    return (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V::kSize;
  }
  __device__ bool inside(int j) const { return column(j) < hidden_; }

  // Starts the copy of the next row; past the last one, an empty group keeps the count.
  __device__ void fetch(int stage, bool exists) {
    if (exists) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        if (next_[i]) copy(stage * kInputs + i, next_[i]);
        if (next_[i]) next_[i] += step_[i];
      }
    }
    copy_async_commit();
  }
  __device__ void wait() const { copy_async_wait<kStages - 1>(); }

  __device__ V input(int stage, int i, int j) const { return slot(stage * kInputs + i, j); }
  __device__ V weight(int norm, int j) const { return slot(kWeights + norm, j); }

 private:
  __device__ V& slot(int array, int j) const {
    return reinterpret_cast<V&>(slots_[(array * kVecs + j) * pitch_]);
  }
  __device__ void set_input(int i, const void* base, int64_t stride, int64_t row, int64_t step) {
    step_[i] = step * stride;
    next_[i] = base ? static_cast<const T*>(base) + row * stride + column(0) : nullptr;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) clear_unless(base, stage * kInputs + i);
  }
  __device__ void set_weight(int norm, const void* base) {
    clear_unless(base, kWeights + norm);
    if (base) copy(kWeights + norm, static_cast<const T*>(base) + column(0));
  }
  __device__ void clear_unless(const void* base, int array) {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (!base || !inside(j)) slot(array, j) = V{};
    }
  }
  __device__ void copy(int array, const T* data) {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (inside(j)) copy_async(&slot(array, j), data + j * blockDim.x * V::kSize);
    }
  }

  uint4* slots_;
  int pitch_;
  int hidden_;
  const T* next_[kInputs];
  int64_t step_[kInputs];
};

// Mean and 1 / deviation of the rows, read a row ahead: their latency would stand before every row.
template <bool kRms>
struct Statistics {
  float mean = 0.f, rstd = 0.f;

  __device__ void read(const AddNormBackward& p, int64_t row) {
    using Scalar = Vec<float, 1>;
    if (row >= p.num_tokens) return;
    rstd = load<Scalar>(static_cast<const float*>(p.rstd) + row).floats()[0];
    if (!kRms) mean = load<Scalar>(static_cast<const float*>(p.mean) + row).floats()[0];
  }
};

// Writes one parameter gradient of the block. Several rows a block: their sums meet in shared
// memory, in the ring, which is larger and by now empty.
template <typename Ring, int kVecs, int kSize>
__device__ void write_partial(const Ring& ring, const float (&sums)[kVecs][kSize], int hidden,
                              float* shared, float* partial) {
  const bool combine = blockDim.y > 1;
  float* out = combine ? shared + threadIdx.y * hidden : partial;
  if (combine) __syncthreads();
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      if (!ring.inside(j)) continue;
      *reinterpret_cast<float4*>(out + ring.column(j) + i) =
          make_float4(sums[j][i], sums[j][i + 1], sums[j][i + 2], sums[j][i + 3]);
    }
  }
  if (!combine) return;
  __syncthreads();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < hidden; c += blockDim.x * blockDim.y) {
    float sum = shared[c];
    for (int y = 1; y < static_cast<int>(blockDim.y); ++y) sum += shared[y * hidden + c];
    partial[c] = sum;
  }
}

template <typename T, bool kRms, int kNorms, int kVecs>
__global__ void __launch_bounds__(max_threads(kNorms, kVecs), 1)
    add_norm_backward_kernel(const AddNormBackward p, const float inv_hidden) {
  using V = Vec16<T>;
  using Ring = RowRing<T, kNorms, kVecs>;
  constexpr int kSums = kRms ? 1 : 2;  // weight, and bias for LayerNorm
  __shared__ alignas(16) float shared[2][2][kMaxWarps];
  extern __shared__ uint4 ring_memory[];
  pdl_trigger_and_wait();
  const int hidden = static_cast<int>(p.hidden_size);
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  Ring ring(p, ring_memory, row, step);
#pragma unroll
  for (int s = 0; s < Ring::kStages - 1; ++s) ring.fetch(s, row + s * step < p.num_tokens);
  Statistics<kRms> next;
  next.read(p, row);

  float grads[kNorms * kSums][kVecs][V::kSize] = {};
  int stage = 0, buffer = 0;
  for (; row < p.num_tokens; row += step) {
    const Statistics<kRms> current = next;
    next.read(p, row + step);
    ring.fetch(stage == 0 ? Ring::kStages - 1 : stage - 1,
               row + (Ring::kStages - 1) * step < p.num_tokens);
    ring.wait();
    const auto terms = [&](int j, V(&dy)[2]) {
#pragma unroll
      for (int n = 0; n < kNorms; ++n) dy[n] = ring.input(stage, Ring::kGradNormed + n, j);
      return RowTerms<V>::template make<kNorms>(ring.input(stage, Ring::kResidual, j), current.mean,
                                                current.rstd, dy[0], ring.weight(0, j),
                                                dy[kNorms - 1], ring.weight(kNorms - 1, j));
    };
    float sums[2] = {0.f, 0.f};
    RowTerms<V> kept[kVecs];
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      V dy[2];
      const auto t = terms(j, dy);
      kept[j] = t;
      t.add_to(sums);
#pragma unroll
      for (int n = 0; n < kNorms; ++n) {
        const auto d = dy[n].floats();
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) {
          grads[n * kSums][j][i] += d[i] * t.xhat[i];
          if (!kRms) grads[n * kSums + 1][j][i] += d[i];
        }
      }
    }
    row_sum(sums, shared[buffer], blockDim.x);
    const float mean_g = kRms ? 0.f : sums[0] * inv_hidden, mean_gx = sums[1] * inv_hidden;
    T* out = static_cast<T*>(p.grad_input) + row * hidden;
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      V dy[2];  // more than one vector's sums leave no registers for what was computed above
      const auto t = kVecs == 1 ? kept[j] : terms(j, dy);
      const V grad =
          t.grad_input(current.rstd, mean_g, mean_gx, ring.input(stage, Ring::kGradResidual, j));
      if (ring.inside(j)) store(out + ring.column(j), grad);
    }
    stage = stage == Ring::kStages - 1 ? 0 : stage + 1;
    buffer ^= 1;
  }

  copy_async_wait<0>();
  const Partials partials(p);
#pragma unroll
  for (int g = 0; g < kNorms * kSums; ++g) {
    float* partial = partials.rows[kRms ? 2 * g : g];
    if (!partial) continue;
    write_partial(ring, grads[g], hidden, reinterpret_cast<float*>(ring_memory), partial);
  }
}

// Rows too long for registers, or not made of aligned 16-byte vectors: each row is read twice, and
// the block's partial sums live in the workspace, which stays in L2.
template <typename T, int kWidth>
__global__ void __launch_bounds__(512)
    add_norm_backward_long_kernel(const AddNormBackward p, const int norms, const float inv_hidden,
                                  const float offset) {
  using V = Vec<T, kWidth>;
  __shared__ alignas(16) float shared[2][2][kMaxWarps];
  pdl_trigger_and_wait();
  const int hidden = static_cast<int>(p.hidden_size);
  const bool rms = p.kind != Norm::kLayer;
  const Partials partials(p);
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < p.num_tokens; row += gridDim.x) {
    const float rstd = static_cast<const float*>(p.rstd)[row];
    const float mean = rms ? 0.f : static_cast<const float*>(p.mean)[row];
    const auto read = [&](const void* base, int64_t offset) {
      V v = {};
      if (base) v = load<V>(static_cast<const T*>(base) + offset);
      return v;
    };
    const auto terms = [&](int i, V* dy1, V* dy2) {
      *dy1 = read(p.grad_normed1, row * p.grad_normed1_stride + i);
      *dy2 = V{};
      V weight2 = {};
      if (norms == 2) {
        *dy2 = read(p.grad_normed2, row * p.grad_normed2_stride + i);
        weight2 = read(p.weight2, i);
      }
      return RowTerms<V>::template make<2, true>(read(p.residual, row * p.residual_stride + i),
                                                 mean, rstd, *dy1, read(p.weight1, i), *dy2,
                                                 weight2, offset);
    };
    const auto add_partial = [&](float* partial, int i, const Floats<kWidth>& values) {
      constexpr int kPart = kWidth < 4 ? kWidth : 4;
      using F = Vec<float, kPart>;
      if (!partial) return;
#pragma unroll
      for (int e = 0; e < kWidth; e += kPart) {
        Floats<kPart> total = {};
        if (row != blockIdx.x) total = load<F>(partial + i + e).floats();
#pragma unroll
        for (int k = 0; k < kPart; ++k) total[k] += values[e + k];
        store(partial + i + e, F::from(total));
      }
    };
    float sums[2] = {0.f, 0.f};
    for (int i = threadIdx.x * kWidth; i < hidden; i += blockDim.x * kWidth) {
      V dy[2];
      const auto t = terms(i, &dy[0], &dy[1]);
      t.add_to(sums);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const auto d = dy[n].floats();
        Floats<kWidth> product;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) product[e] = d[e] * t.xhat[e];
        add_partial(partials.rows[2 * n], i, product);
        add_partial(partials.rows[2 * n + 1], i, d);
      }
    }
    row_sum(sums, shared[buffer], blockDim.x);
    buffer ^= 1;
    for (int i = threadIdx.x * kWidth; i < hidden; i += blockDim.x * kWidth) {
      V dy[2];
      const auto t = terms(i, &dy[0], &dy[1]);
      store(static_cast<T*>(p.grad_input) + row * hidden + i,
            t.grad_input(rstd, rms ? 0.f : sums[0] * inv_hidden, sums[1] * inv_hidden,
                         read(p.grad_residual, row * p.grad_residual_stride + i)));
    }
  }
}

// out[gradient][column] = sum of the blocks' partial sums: each of the 32 threads of a column adds
// every 32nd of them, and the first adds the 32 results.
template <typename T>
__global__ void __launch_bounds__(1024)
    sum_partials_kernel(const __grid_constant__ GradList grads, const float* partials,
                        const int64_t num_partials, const int64_t hidden) {
  __shared__ float shared[32][33];
  pdl_trigger_and_wait();
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float sum = 0.f;
  if (column < hidden) {
    const float* base = partials + blockIdx.y * num_partials * hidden + column;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < num_partials; i += 32) sum += base[i * hidden];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= hidden) return;
  for (int y = 1; y < 32; ++y) sum += shared[y][threadIdx.x];
  using Scalar = Vec<T, 1>;
  store(static_cast<T*>(grads.out[blockIdx.y]) + column, Scalar::from({sum}));
}

template <typename T, bool kRms, int kNorms, int kVecs>
bool launch_row(const AddNormBackward& p, const Plan& plan, void* stream) {
  const int shared_bytes = RowRing<T, kNorms, kVecs>::kSlots * 16 * plan.threads * plan.rows;
  if (shared_bytes > device_info(kOp).max_shared_bytes - 1024) return false;
  launch(kOp, add_norm_backward_kernel<T, kRms, kNorms, kVecs>, {plan.blocks},
         dim3(plan.threads, plan.rows), shared_bytes, stream, p,
         1.f / static_cast<float>(p.hidden_size));
  return true;
}

template <typename T>
bool made_of_vectors(const AddNormBackward& p) {
  return p.hidden_size % Vec16<T>::kSize == 0 &&
         rows_aligned({{p.grad_residual, p.grad_residual_stride},
                       {p.grad_normed1, p.grad_normed1_stride},
                       {p.grad_normed2, p.grad_normed2_stride},
                       {p.residual, p.residual_stride},
                       {p.weight1},
                       {p.weight2},
                       {p.grad_input},
                       {p.workspace}},
                      p.num_tokens, sizeof(T));
}

// False where the device has too little shared memory.
template <typename T>
bool launch_in_registers(const AddNormBackward& p, const Plan& plan, void* stream) {
  const bool wide = plan.vecs == 4;
  if (num_norms(p) == 2) {
    if (plan.vecs == 1) return launch_row<T, false, 2, 1>(p, plan, stream);
    return wide ? launch_row<T, false, 2, 4>(p, plan, stream)
                : launch_row<T, false, 2, 2>(p, plan, stream);
  }
  if (is_rms(p.kind)) {
    return wide ? launch_row<T, true, 1, 4>(p, plan, stream)
                : launch_row<T, true, 1, 1>(p, plan, stream);
  }
  return wide ? launch_row<T, false, 1, 4>(p, plan, stream)
              : launch_row<T, false, 1, 1>(p, plan, stream);
}

template <typename T, int kWidth>
void launch_long(const AddNormBackward& p, const Plan& plan, void* stream) {
  const int threads =
      static_cast<int>(std::min<int64_t>(512, round_up(ceil_div(p.hidden_size, kWidth), 32)));
  launch(kOp, add_norm_backward_long_kernel<T, kWidth>, {plan.blocks}, threads, 0, stream, p,
         num_norms(p), 1.f / static_cast<float>(p.hidden_size), weight_offset(p.kind));
}

}  // namespace

int64_t add_norm_workspace_size(const AddNormBackward& p) {
  if (p.num_tokens == 0 || p.hidden_size == 0) return 0;
  return wanted_grads(p).count * make_plan(p).blocks * p.hidden_size *
         static_cast<int64_t>(sizeof(float));
}

void add_norm_backward(const AddNormBackward& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.hidden_size == 0) return;
    const Plan plan = make_plan(p);
    if (p.num_tokens > 0) {
      if (!made_of_vectors<T>(p)) {
        launch_long<T, 1>(p, plan, stream);
      } else if (!plan.in_registers || !launch_in_registers<T>(p, plan, stream)) {
        launch_long<T, Vec16<T>::kSize>(p, plan, stream);
      }
    }
    const GradList grads = wanted_grads(p);
    if (grads.count == 0) return;
    launch(kOp, sum_partials_kernel<T>, {ceil_div(p.hidden_size, 32), grads.count}, dim3(32, 32), 0,
           stream, grads, static_cast<const float*>(p.workspace), plan.blocks, p.hidden_size);
  });
}

}  // namespace hf_fuse
