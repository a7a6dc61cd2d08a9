// out = epilogue(weights · norm(x) + biases), for the one new token of each sequence (decode.h).
//
// Bytes: the weights, once for every few sequences; all else is small. What the speed rests on:
// - All warps of a block share each row: a thread reads the same 1 to 8 chunks of 16 bytes of every
//   row, so that x, and its norm, stay in its registers, and under an RMSNorm no barrier stands
//   between x and the first product.
// - A block takes every gridDim-th row, so that the grid sweeps the weights together and no block
//   has more than one row over another; it keeps kInFlight chunks a thread under way, 64 KB and
//   more a multiprocessor. The first are loaded before the kernel waits for x.
// - The warps' sums of a row meet in shared memory once, at the end, where a thread an output adds
//   them, in order, and finishes: 1 / rms, bias, activation, residual.
#include <algorithm>

#include "../include/activation.cuh"
#include "../include/decode.cuh"
#include "../include/decode.h"
#include "../include/launch.cuh"
#include "../include/reduce.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_linear";
constexpr int kInFlight = 8;      // chunks a thread has under way
constexpr int kThreads = 256;     // of a block, at most, but for the longest rows
constexpr int kMaxThreads = 512;  // for those
constexpr int kRegisters = 128;   // of a thread; fewer, and a third block fits: uneven
constexpr int kRegistersOfMultiprocessor = 65536;
constexpr int64_t kMaxUnits = 1 << 30;  // so that int counts rows and adds them up

// Where a unit's rows are. Unit: an output of each sequence, a row or, gated, a pair of rows (half
// 0 and 1). The addresses are those that row 0 of all the rows would have.
template <typename T>
struct RowTable {
  const T *weight[3], *bias[3];
  int end[2];  // of the first and the second weight's rows
  int stride[3];
  bool pair;

  explicit RowTable(const DecodeLinear& p) : pair(p.epilogue == Epilogue::kGated) {
    int64_t start = 0;
    for (int i = 0; i < 3; ++i) {
      const DecodeLinear::Rows& rows = p.weights[i];
      weight[i] = static_cast<const T*>(rows.weight) - start * rows.stride;
      bias[i] = rows.bias ? static_cast<const T*>(rows.bias) - start : nullptr;
      stride[i] = static_cast<int>(rows.stride);
      if (!pair) start += rows.rows;
      if (i < 2) end[i] = static_cast<int>(start);
    }
  }

  __device__ int index(int unit, int half) const {
    return pair ? half : (unit >= end[0]) + (unit >= end[1]);
  }
  __device__ const T* row(int unit, int half) const {
    const int i = index(unit, half);
    const T* base = i == 0 ? weight[0] : i == 1 ? weight[1] : weight[2];
    return base + int64_t{unit} * (i == 0 ? stride[0] : i == 1 ? stride[1] : stride[2]);
  }
  __device__ const T* bias_of(int unit, int half) const {
    const T* vector = bias[index(unit, half)];
    return vector ? vector + unit : nullptr;
  }
};

template <typename T>
__device__ float load_float(const T* ptr) {
  return load<Vec<T, 1>>(ptr).floats()[0];
}

__device__ float apply(Act act, float x) {
  switch (act) {
    case Act::kGelu:
      return activate<Act::kGelu>(x);
    case Act::kGeluTanh:
      return activate<Act::kGeluTanh>(x);
    case Act::kRelu:
      return activate<Act::kRelu>(x);
    case Act::kSilu:
      return activate<Act::kSilu>(x);
    default:
      return activate<Act::kRelu2>(x);
  }
}

// The biases of a unit's rows. Loaded long before their use: they may come from memory.
template <typename T>
struct Biases {
  Vec<T, 1> row = {}, up = {};

  __device__ Biases(const RowTable<T>& rows, int unit, int units) {
    if (unit >= units) return;
    const T* bias = rows.bias_of(unit, 0);
    if (bias) row = load_before_wait<Vec<T, 1>>(bias);
    if (!rows.pair) return;
    bias = rows.bias_of(unit, 1);
    if (bias) up = load_before_wait<Vec<T, 1>>(bias);
  }
};

__device__ float old_output(const DecodeLinear& p, int64_t index) {
  return p.epilogue == Epilogue::kAdd ? load_float(static_cast<const float*>(p.out) + index) : 0.f;
}

// y and y_up: the sums of the unit's one or two rows.
template <typename T>
__device__ void write_output(const DecodeLinear& p, int64_t index, float y, float y_up,
                             const Biases<T>& biases, float old) {
  y += biases.row.floats()[0];
  if (p.epilogue == Epilogue::kStore || p.epilogue == Epilogue::kAdd) {
    static_cast<float*>(p.out)[index] = old + y;
    return;
  }
  y = apply(p.act, y);
  if (p.epilogue == Epilogue::kGated) y *= y_up + biases.up.floats()[0];
  store(static_cast<T*>(p.out) + index, Vec<T, 1>::from({y}));
}

// Sums each of kCount values over a warp: afterwards lane l has, in v[0], the sum of value
// l / (32 / kCount). Half the shuffles of one value after another for two values, a quarter for 8.
template <int kCount>
__device__ void sum_each(float (&v)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0 && kCount <= kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  int offset = kWarpSize / 2;
#pragma unroll
  for (int n = kCount / 2; n > 0; n /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? v[i] : v[i + n], keep = upper ? v[i + n] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
}

// A thread's chunks of x: fp32 under a norm, else as they are.
template <typename T, bool kNorm, int kLoads>
struct Slice {
  static constexpr int kSize = Vec16<T>::kSize;
  using Chunk = std::conditional_t<kNorm, Floats<kSize>, Vec16<T>>;
  Chunk x[kLoads];

  __device__ Floats<kSize> floats(int i) const {
    if constexpr (kNorm) {
      return x[i];
    } else {
      return x[i].floats();
    }
  }

  // Zero past the row.
  __device__ void load_x(const void* rows, int64_t row, int chunks) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t chunk = threadIdx.x + i * blockDim.x;
      x[i] = {};
      if (chunk >= chunks) continue;
      if constexpr (kNorm) {
        const float* from = static_cast<const float*>(rows) + (row * chunks + chunk) * kSize;
#pragma unroll
        for (int e = 0; e < kSize; e += 4) {
          const auto part = load<Vec16<float>>(from + e).floats();
#pragma unroll
          for (int k = 0; k < 4; ++k) x[i][e + k] = part[k];
        }
      } else {
        x[i] = load<Vec16<T>>(static_cast<const T*>(rows) + (row * chunks + chunk) * kSize);
      }
    }
  }

  // What the block needs of a norm before the first product: for rms x * weight, whose 1 / rms
  // multiplies the rows' sums at the end; returns this thread's sum of squares.
  __device__ float scale_for_rms(const Vec16<T> (&weight)[kLoads]) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const auto g = weight[i].floats();
#pragma unroll
      for (int e = 0; e < kSize; ++e) square = fmaf(x[i][e], x[i][e], square), x[i][e] *= g[e];
    }
    return square;
  }

  // LayerNorm, in two passes: the mean, then the centred squares. Chunks past the row have weight
  // and bias 0.
  __device__ void layer_norm(const DecodeLinear& p, int chunks, const Vec16<T> (&weight)[kLoads],
                             const Vec16<T> (&bias)[kLoads], float (&shared)[2][1][kMaxWarps]) {
    const float inv_size = 1.f / static_cast<float>(p.size);
    float mean[1] = {}, square[1] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) mean[0] += x[i][e];
    }
    row_sum(mean, shared[0], blockDim.x);
    mean[0] *= inv_size;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (static_cast<int>(threadIdx.x + i * blockDim.x) >= chunks) break;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        x[i][e] -= mean[0];
        square[0] = fmaf(x[i][e], x[i][e], square[0]);
      }
    }
    row_sum(square, shared[1], blockDim.x);
    const float rstd = rsqrtf(square[0] * inv_size + static_cast<float>(p.eps));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const auto g = weight[i].floats(), b = bias[i].floats();
#pragma unroll
      for (int e = 0; e < kSize; ++e) x[i][e] = x[i][e] * rstd * g[e] + b[e];
    }
  }
};

// The rows a block takes: unit j of it is unit blockIdx.x + j * gridDim.x of all.
template <typename T, int kLoads>
struct BlockRows {
  static constexpr int kSize = Vec16<T>::kSize;
  const RowTable<T>& all;
  int chunks, pair, rows;

  __device__ BlockRows(const RowTable<T>& all, int chunks, int units)
      : all(all), chunks(chunks), pair(all.pair) {
    const int here = units - static_cast<int>(blockIdx.x);
    rows = here <= 0 ? 0 : ((here - 1) / static_cast<int>(gridDim.x) + 1) << pair;
  }

  __device__ int unit(int j) const { return blockIdx.x + j * gridDim.x; }

  // The rows' addresses, worked out once: to do it in the loop takes as long as the products.
  __device__ void find_rows(const T** addresses) const {
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
      addresses[i] = all.row(unit(i >> pair), i & pair);
    __syncthreads();
  }

  // Of the thread's chunk i, in elements. One past the row is another of the row's: x is zero
  // there.
  __device__ unsigned offset(int i) const {
    const unsigned chunk = threadIdx.x + i * blockDim.x;
    return (chunk < static_cast<unsigned>(chunks) ? chunk : 0u) * kSize;
  }

  // The thread's chunks of a vector, null or [size]; zero past it.
  __device__ void load_vector(Vec16<T> (&v)[kLoads], const void* vector) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int chunk = threadIdx.x + i * blockDim.x;
      v[i] = {};
      if (vector && chunk < chunks)
        load_weights<true>(v[i], static_cast<const T*>(vector) + chunk * kSize, true);
    }
  }
};

template <typename T, bool kNorm, int kLoads, int kBatch>
__global__ void __maxnreg__(kRegisters)
    decode_linear_kernel(const __grid_constant__ DecodeLinear p,
                         const __grid_constant__ RowTable<T> all, const int chunks, const int units,
                         const int max_rows) {
  using V = Vec16<T>;
  constexpr int kRows = kInFlight / kLoads;
  extern __shared__ uint64_t dynamic[];
  const T** const addresses = reinterpret_cast<const T**>(dynamic);  // [row of the block]
  float* const sums = reinterpret_cast<float*>(dynamic + max_rows);  // [row][sequence][warp]
  __shared__ float shared[2][1][kMaxWarps], squares[kBatch][kMaxWarps];
  pdl_trigger();
  const BlockRows<T, kLoads> block(all, chunks, units);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  V rows[kRows][kLoads], weight[kLoads], bias[kLoads];
  block.find_rows(addresses);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T* row = addresses[r < block.rows ? r : 0];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      load_weights<true>(rows[r][i], row + block.offset(i), r < block.rows);
  }
  if constexpr (kNorm) {
    block.load_vector(weight, p.norm_weight);
    block.load_vector(bias, p.norm_bias);
  }
  const Biases<T> biases(all, block.unit(threadIdx.x), units);
  pdl_wait();

  Slice<T, kNorm, kLoads> x[kBatch];
#pragma unroll
  for (int s = 0; s < kBatch; ++s) x[s].load_x(p.x, s, chunks);
  const int first_unit = block.unit(threadIdx.x);
  const float old = first_unit < units ? old_output(p, first_unit) : 0.f;
  if constexpr (kNorm) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      if (p.rms) {
        const float square = warp_sum(x[s].scale_for_rms(weight));
        if (lane == 0) squares[s][warp] = square;
      } else {
        if (s > 0) __syncthreads();
        x[s].layer_norm(p, chunks, weight, bias, shared);
      }
    }
  }

  for (int j = 0; j < block.rows; j += kRows) {
    constexpr int kCount = kRows * kBatch;
    float sum[kCount] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int next = j + r + kRows;
      const T* row = addresses[next < block.rows ? next : 0];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const auto w = rows[r][i].floats();
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
          const auto v = x[s].floats(i);
          float& total = sum[r * kBatch + s];
#pragma unroll
          for (int e = 0; e < V::kSize; ++e) total = fmaf(w[e], v[e], total);
          // The next row goes into this one's registers: without this it is loaded into others.
          asm volatile("" : "+f"(total)::"memory");
        }
        load_weights<false>(rows[r][i], row + block.offset(i), next < block.rows);
      }
    }
    sum_each(sum);
    constexpr int kLanes = kWarpSize / kCount;
    const int row = j + lane / kLanes / kBatch, s = lane / kLanes % kBatch;
    if (lane % kLanes == 0 && row < block.rows)
      sums[(row * kBatch + s) * num_warps + warp] = sum[0];
  }
  __syncthreads();

  const auto total = [&](const float* parts) {
    float sum = 0.f;
    for (int w = 0; w < num_warps; ++w) sum += parts[w];
    return sum;
  };
  const int outputs = block.rows >> block.pair;
  for (int i = threadIdx.x; i < outputs * kBatch; i += blockDim.x) {
    const int j = i % outputs, s = i / outputs, unit = block.unit(j);
    float scale = 1.f;
    if (kNorm && p.rms) {
      float square = 0.f;
      for (int w = 0; w < num_warps; ++w) square += squares[s][w];
      scale = rsqrtf(square / static_cast<float>(p.size) + static_cast<float>(p.eps));
    }
    const float* parts = sums + ((j << block.pair) * kBatch + s) * num_warps;
    const float y = total(parts) * scale;
    const float up = block.pair ? total(parts + kBatch * num_warps) * scale : 0.f;
    const int64_t index = int64_t{s} * units + unit;
    const bool first = i < static_cast<int>(blockDim.x) && s == 0;  // loaded early
    write_output<T>(p, index, y, up, first ? biases : Biases<T>(all, unit, units),
                    first ? old : old_output(p, index));
  }
}

// Any size and alignment, for one sequence: a warp a row, one element a load, the norm anew for
// every row.
template <typename T>
__global__ void __launch_bounds__(256)
    decode_linear_elements_kernel(const __grid_constant__ DecodeLinear p,
                                  const __grid_constant__ RowTable<T> all, const int units) {
  __shared__ float shared[2][1][kMaxWarps];
  pdl_trigger();
  pdl_wait();
  const auto x = [&](int64_t k) {
    return p.norm_weight ? load_float(static_cast<const float*>(p.x) + k)
                         : load_float(static_cast<const T*>(p.x) + k);
  };
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  const T* norm_bias = static_cast<const T*>(p.norm_bias);
  const float inv_size = 1.f / static_cast<float>(p.size);
  float mean[1] = {}, square[1] = {};
  if (norm_weight && !p.rms) {
    for (int64_t k = threadIdx.x; k < p.size; k += blockDim.x) mean[0] += x(k);
    row_sum(mean, shared[0], blockDim.x);
    mean[0] *= inv_size;
  }
  for (int64_t k = threadIdx.x; k < p.size && norm_weight; k += blockDim.x) {
    square[0] += (x(k) - mean[0]) * (x(k) - mean[0]);
  }
  row_sum(square, shared[1], blockDim.x);
  const float rstd = rsqrtf(square[0] * inv_size + static_cast<float>(p.eps));
  const auto normed = [&](int64_t k) {
    if (!norm_weight) return x(k);
    const float y = (x(k) - mean[0]) * rstd * load_float(norm_weight + k);
    return norm_bias ? y + load_float(norm_bias + k) : y;
  };
  const int warps = blockDim.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int unit = blockIdx.x * warps + threadIdx.x / kWarpSize; unit < units;
       unit += gridDim.x * warps) {
    const T *row = all.row(unit, 0), *up = all.row(unit, all.pair);
    float y = 0.f, y_up = 0.f;
    for (int64_t k = lane; k < p.size; k += kWarpSize) {
      const float n = normed(k);
      y = fmaf(load_float(row + k), n, y);
      if (all.pair) y_up = fmaf(load_float(up + k), n, y_up);
    }
    y = warp_sum(y), y_up = warp_sum(y_up);
    if (lane == 0) {
      write_output<T>(p, unit, y, y_up, Biases<T>(all, unit, units), old_output(p, unit));
    }
  }
}

// As many blocks as are resident at once: a block that waited for another's place would read alone.
template <typename T, bool kNorm, int kLoads, int kBatch>
bool launch_vectors(const DecodeLinear& p, int64_t units, void* stream) {
  const int64_t chunks = p.size / Vec16<T>::kSize;
  const int threads = static_cast<int>(round_up(ceil_div(chunks, kLoads), kWarpSize));
  const DeviceInfo& device = device_info(kOp);
  const int64_t pair = p.epilogue == Epilogue::kGated;
  const int resident = kRegistersOfMultiprocessor / (threads * kRegisters);
  int64_t blocks = std::min<int64_t>(units, resident * device.num_sms);
  const int64_t a_row = sizeof(T*) + kBatch * (threads / kWarpSize) * sizeof(float);
  const int64_t most = device.max_shared_bytes / 2 / a_row >> pair;  // units of a block
  blocks = std::max(blocks, ceil_div(units, most));
  const int64_t max_rows = ceil_div(units, blocks) << pair, shared = max_rows * a_row;
  launch(kOp, decode_linear_kernel<T, kNorm, kLoads, kBatch>, {blocks}, threads, int(shared),
         stream, p, RowTable<T>(p), static_cast<int>(chunks), static_cast<int>(units),
         static_cast<int>(max_rows));
  return true;
}

// The fewest loads a thread with which a block holds a row; false where none does.
template <typename T, bool kNorm, int kBatch>
bool launch_loads(const DecodeLinear& p, int64_t units, void* stream) {
  const int64_t chunks = p.size / Vec16<T>::kSize;
  if (chunks <= kThreads) return launch_vectors<T, kNorm, 1, kBatch>(p, units, stream);
  if (chunks <= 2 * kThreads) return launch_vectors<T, kNorm, 2, kBatch>(p, units, stream);
  if constexpr (kBatch <= 2) {
    if (chunks <= 4 * kThreads) return launch_vectors<T, kNorm, 4, kBatch>(p, units, stream);
  }
  if constexpr (kBatch == 1) {
    if (chunks <= 8 * kMaxThreads) return launch_vectors<T, kNorm, 8, kBatch>(p, units, stream);
  }
  return false;
}

template <typename T, bool kNorm>
bool launch_batch(const DecodeLinear& p, int64_t units, void* stream) {
  if (p.batch == 4) return launch_loads<T, kNorm, 4>(p, units, stream);
  if (p.batch == 2) return launch_loads<T, kNorm, 2>(p, units, stream);
  return launch_loads<T, kNorm, 1>(p, units, stream);
}

// Sequences `first` to `first + count` of p.
template <typename T>
DecodeLinear sequences(const DecodeLinear& p, int64_t units, int64_t first, int64_t count) {
  const bool wide_out = p.epilogue == Epilogue::kStore || p.epilogue == Epilogue::kAdd;
  const int64_t x_bytes = p.norm_weight ? sizeof(float) : sizeof(T);
  const int64_t out_bytes = wide_out ? sizeof(float) : sizeof(T);
  DecodeLinear part = p;
  part.batch = count;
  part.x = static_cast<const char*>(p.x) + first * p.size * x_bytes;
  part.out = static_cast<char*>(p.out) + first * units * out_bytes;
  return part;
}

// Four, two or one sequence at a time.
template <typename T>
void launch_all(const DecodeLinear& p, int64_t units, void* stream) {
  const auto* w = p.weights;
  const bool vectors = p.size > 0 && p.size % Vec16<T>::kSize == 0 &&
                       rows_aligned({{p.x}, {p.norm_weight}, {p.norm_bias}}, 1, sizeof(T)) &&
                       rows_aligned({{w[0].weight, w[0].stride}}, w[0].rows, sizeof(T)) &&
                       rows_aligned({{w[1].weight, w[1].stride}}, w[1].rows, sizeof(T)) &&
                       rows_aligned({{w[2].weight, w[2].stride}}, w[2].rows, sizeof(T));
  const auto try_vectors = [&](const DecodeLinear& part) {
    if (!vectors) return false;
    return p.norm_weight ? launch_batch<T, true>(part, units, stream)
                         : launch_batch<T, false>(part, units, stream);
  };
  for (int64_t first = 0, count = 0; first < p.batch; first += count) {
    count = p.batch - first >= 4 ? 4 : p.batch - first >= 2 ? 2 : 1;
    while (count > 0 && !try_vectors(sequences<T>(p, units, first, count))) count /= 2;
    if (count > 0) continue;
    count = 1;
    const int64_t blocks = std::min<int64_t>(ceil_div(units, 8), 4 * device_info(kOp).num_sms);
    launch(kOp, decode_linear_elements_kernel<T>, {blocks}, 256, 0, stream,
           sequences<T>(p, units, first, count), RowTable<T>(p), static_cast<int>(units));
  }
}

}  // namespace

void decode_linear(const DecodeLinear& p, void* stream) {
  int64_t units = p.weights[0].rows;
  if (p.epilogue != Epilogue::kGated) units += p.weights[1].rows + p.weights[2].rows;
  if (units >= kMaxUnits) {
    throw std::runtime_error("hf_fuse.decode_linear: too many rows: " + std::to_string(units));
  }
  dispatch_dtype(kOp, p.dtype,
                 [&](auto tag) { launch_all<typename decltype(tag)::type>(p, units, stream); });
}

}  // namespace hf_fuse
