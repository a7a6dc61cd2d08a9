// out = epilogue(weights · norm(x) + biases), for the one new token of each sequence (decode.h).
//
// Bytes: the weights, once for every few sequences; all else is small. What the speed rests on:
// - All warps of a block share each row: a thread reads the same 1 to 8 chunks of 16 bytes of every
//   row, so that x, and its norm, stay in its registers, and under an RMSNorm no barrier stands
//   between x and the first product.
// - A block takes a row of each round of all blocks, so that they sweep the weights together and
//   none has more than one row over another; it keeps kInFlight chunks a thread under way, 64 KB
//   and more a multiprocessor. The first are loaded before the kernel waits for x.
// - The warps' sums of a row meet in shared memory once, at the end, where a few lanes an output
//   add them, in a fixed order, and finish: 1 / rms, bias, activation, residual.
// - Nothing is loaded before a kernel's first instructions nor after its last products, and a step
//   has hundreds of kernels: so both ends are short, and most layouts have code of their own.
//
// Included by a file for each dtype, so that they compile side by side.
#pragma once
#include <algorithm>

#include "decode_rows.cuh"
#include "reduce.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = kDecodeLinear;
constexpr int kInFlight = 8;      // chunks a thread has under way
constexpr int kThreads = 320;     // of a block, at most, but for the longest rows
constexpr int kMaxThreads = 512;  // for those

// Registers. Two blocks of 256 threads fill a multiprocessor with one of attention beside them:
// with room for a third, one would have three and another one. Short rows without a norm,
// attention's output projection, take fewer, so that the next kernel finds room beside them.
constexpr int kRegistersOfMultiprocessor = 65536, kUsualRegisters = 96;
constexpr int registers_of(bool norm, int loads, int batch) {
  if (batch == 1 && loads == 1 && !norm) return 64;
  return batch == 1 && loads <= (norm ? 2 : 4) ? kUsualRegisters : 128;
}

// At the end kParts lanes add the sums of up to 8 warps, or of 16, two a lane.
constexpr int kParts = 8, kMaxParts = 2 * kParts;
constexpr int kGroups = kWarpSize / kParts;
__host__ __device__ constexpr int parts_of(int num_warps) {
  return num_warps > kParts ? kMaxParts : kParts;
}

enum class NormKind { kNone, kRms, kLayer };

// What the host works out for a kernel.
struct Shape {
  int chunks, units;        // 16 bytes of a row; outputs of a sequence
  int blocks;               // that share them
  int block_units, longer;  // outputs of a block; the first `longer` blocks have one more
  int max_rows;             // of a block
  float inv_size, eps;
};

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
template <typename T, NormKind kNorm, int kLoads>
struct Slice {
  static constexpr int kSize = Vec16<T>::kSize;
  static constexpr bool kWide = kNorm != NormKind::kNone;
  using Chunk = std::conditional_t<kWide, Floats<kSize>, Vec16<T>>;
  Chunk x[kLoads];

  __device__ Floats<kSize> floats(int i) const {
    if constexpr (kWide) {
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
      if constexpr (kWide) {
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

  // RMSNorm but for 1 / rms, which multiplies the rows' sums at the end: no thread waits for
  // another's part of x. Returns the thread's sum of squares.
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

  // Subtracts `pilot` from the row; returns the thread's sums of that and of its squares.
  __device__ void shift(float pilot, int chunks, float (&sums)[2]) {
    sums[0] = sums[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (static_cast<int>(threadIdx.x + i * blockDim.x) >= chunks) break;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        x[i][e] -= pilot;
        sums[0] += x[i][e];
        sums[1] = fmaf(x[i][e], x[i][e], sums[1]);
      }
    }
  }

  // Weight and bias are 0 past the row.
  __device__ void normalize(float mean, float rstd, const Vec16<T> (&weight)[kLoads],
                            const Vec16<T> (&bias)[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const auto g = weight[i].floats(), b = bias[i].floats();
#pragma unroll
      for (int e = 0; e < kSize; ++e) x[i][e] = (x[i][e] - mean) * rstd * g[e] + b[e];
    }
  }
};

// The mean of a row's first elements. The variance of what is left when it is subtracted needs no
// second pass: the mean of n of size elements is within sqrt(size / n) standard deviations of the
// mean of all, whatever the row.
__device__ float pilot_of(const void* rows, int64_t row, int64_t size) {
  const int at = static_cast<int>(threadIdx.x) % kWarpSize * 4;
  float sum = 0.f;
  if (at < size) {
    const auto v = load<Vec16<float>>(static_cast<const float*>(rows) + row * size + at).floats();
    sum = (v[0] + v[1]) + (v[2] + v[3]);
  }
  return warp_sum(sum) / static_cast<float>(min(int64_t{4 * kWarpSize}, size));
}

// A sum of its own for each chunk: one long chain would delay the loads.
template <int kSize>
__device__ float dot(const Floats<kSize>& w, const Floats<kSize>& x) {
  float sum = w[0] * x[0];
#pragma unroll
  for (int e = 1; e < kSize; ++e) sum = fmaf(w[e], x[e], sum);
  // The next row goes into this one's registers: without this it is loaded into others.
  asm volatile("" : "+f"(sum)::"memory");
  return sum;
}

// At the end, of the warps' sums of a row those that lane `part` of kParts adds up.
__device__ float sum_of_part(const float* sums, int part, int num_warps) {
  const float low = part < num_warps ? sums[part] : 0.f;
  return part + kParts < num_warps ? low + sums[part + kParts] : low;
}

// What a kernel does: one projection, or two that do not depend on each other, a share of the
// blocks each.
template <typename T, int kJobs>
struct Jobs {
  DecodeLinear p[kJobs];
  RowTable<T> all[kJobs];
  Shape shape[kJobs];

  __device__ int job() const {
    return kJobs > 1 && static_cast<int>(blockIdx.x) >= shape[0].blocks;
  }
};

// The rows a block takes: unit j of it is unit index + j * shape.blocks of all.
template <typename T, Layout kLayout, int kLoads>
struct BlockRows {
  static constexpr int kSize = Vec16<T>::kSize;
  static constexpr bool kTable = kLayout == Layout::kAny;
  const RowTable<T>& all;
  const T** const table;  // kAny: [row], in shared memory
  int index, blocks, chunks, pair, rows, step;
  const T* first[2][kLoads];  // else: of each half, the thread's chunks of the first row

  __device__ BlockRows(const RowTable<T>& all, const Shape& shape, int index, const T** table)
      : all(all),
        table(table),
        index(index),
        blocks(shape.blocks),
        chunks(shape.chunks),
        pair(all.template is_pair<kLayout>()) {
    rows = (shape.block_units + (index < shape.longer)) << pair;
    if constexpr (kTable) return;
    step = blocks * all.stride[0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row =
          all.weight[kLayout == Layout::kPair ? half : 0] + int64_t{index} * all.stride[0];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) first[half][i] = row + offset(i);
    }
  }

  __device__ int unit(int j) const { return index + j * blocks; }

  // Of the thread's chunk i, in elements. One past the row is another of the row's: x is zero
  // there.
  __device__ unsigned offset(int i) const {
    const unsigned chunk = threadIdx.x + i * blockDim.x;
    return (chunk < static_cast<unsigned>(chunks) ? chunk : 0u) * kSize;
  }

  __device__ const T* row(int j) const { return all.row(unit(j >> pair), j & pair); }

  // The thread's chunk i of row j, one of the first `from` of fill_table.
  __device__ const T* early_chunk(int j, int i) const {
    if constexpr (kTable) return row(j) + offset(i);
    return chunk(j, i);
  }
  // To work the other rows' addresses out in the loop would take as long as the products.
  __device__ void fill_table(int from) const {
    if constexpr (kTable) {
      for (int j = threadIdx.x + from; j < rows; j += blockDim.x) table[j] = row(j);
      if (rows > from) __syncthreads();
    }
  }
  __device__ const T* chunk(int j, int i) const {
    if constexpr (kTable) return table[j < rows ? j : rows - 1] + offset(i);
    const int half = kLayout == Layout::kPair ? j % 2 : 0;
    const T* at = first[half][i] + int64_t{step} * (kLayout == Layout::kPair ? j / 2 : j);
    if constexpr (kLayout == Layout::kSeveral) {
      if (unit(j) >= all.end[0]) at += all.apart[0];
      if (unit(j) >= all.end[1]) at += all.apart[1];
    }
    return at;
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

template <typename T, NormKind kNorm, Layout kLayout, int kLoads, int kBatch, int kJobs>
__global__ void __maxnreg__(registers_of(kNorm != NormKind::kNone, kLoads, kBatch))
    decode_linear_kernel(const __grid_constant__ Jobs<T, kJobs> jobs) {
  using V = Vec16<T>;
  constexpr int kRows = kInFlight / kLoads;
  using Block = BlockRows<T, kLayout, kLoads>;
  const int job = jobs.job();
  const DecodeLinear& p = jobs.p[job];
  const RowTable<T>& all = jobs.all[job];
  const Shape& shape = jobs.shape[job];
  extern __shared__ uint64_t dynamic[];  // the table, then [row][sequence][warp]
  float* const sums = reinterpret_cast<float*>(dynamic + Block::kTable * shape.max_rows);
  __shared__ float squares[kBatch][kMaxParts], moments[2 * kBatch][kMaxWarps];
  pdl_trigger();
  const Block block(all, shape, blockIdx.x - job * jobs.shape[0].blocks,
                    reinterpret_cast<const T**>(dynamic));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  V rows[kRows][kLoads], weight[kLoads], bias[kLoads];
  if constexpr (kNorm != NormKind::kNone) block.load_vector(weight, p.norm_weight);
  if constexpr (kNorm == NormKind::kLayer) block.load_vector(bias, p.norm_bias);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      load_weights<true>(rows[r][i], block.early_chunk(r, i), r < block.rows);
  }
  // A group of kParts lanes adds up and writes an output.
  const int outputs = (block.rows >> block.pair) * kBatch;
  const auto output_of = [&](int first) { return min(first + lane / kParts, outputs - 1); };
  const int first_output = output_of(warp * kGroups);
  Extras<T, kLayout> extras(all, block.unit(first_output / kBatch));
  block.fill_table(kRows);
  pdl_wait();

  Slice<T, kNorm, kLoads> x[kBatch];
#pragma unroll
  for (int s = 0; s < kBatch; ++s) x[s].load_x(p.x, s, shape.chunks);
  const auto index_of = [&](int output) {
    return int64_t{output % kBatch} * shape.units + block.unit(output / kBatch);
  };
  if constexpr (kNorm == NormKind::kRms) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      const float square = warp_sum(x[s].scale_for_rms(weight));
      if (lane == 0) squares[s][warp] = square;
    }
  }
  if constexpr (kNorm == NormKind::kLayer) {
    float sum[2 * kBatch];
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      float of[2];
      x[s].shift(pilot_of(p.x, s, p.size), shape.chunks, of);
      sum[2 * s] = of[0], sum[2 * s + 1] = of[1];
    }
    row_sum(sum, moments, blockDim.x);
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      const float mean = sum[2 * s] * shape.inv_size;
      const float variance = sum[2 * s + 1] * shape.inv_size - mean * mean;
      x[s].normalize(mean, rsqrtf(variance + shape.eps), weight, bias);
    }
  }
  extras.load_old(p, index_of(first_output));

  for (int j = 0; j < block.rows; j += kRows) {
    constexpr int kCount = kRows * kBatch;
    float sum[kCount] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int next = j + r + kRows;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const auto w = rows[r][i].floats();
        float part[kBatch];
#pragma unroll
        for (int s = 0; s < kBatch; ++s) part[s] = dot(w, x[s].floats(i));
        load_weights<false>(rows[r][i], block.chunk(next, i), next < block.rows);
#pragma unroll
        for (int s = 0; s < kBatch; ++s) sum[r * kBatch + s] += part[s];
      }
    }
    sum_each(sum);
    constexpr int kLanes = kWarpSize / kCount;
    const int row = j + lane / kLanes / kBatch, s = lane / kLanes % kBatch;
    if (lane % kLanes == 0 && row < block.rows)
      sums[(row * kBatch + s) * parts_of(num_warps) + warp] = sum[0];
  }
  __syncthreads();

  const int part = lane % kParts, stride = parts_of(num_warps);
  const auto part_of = [&](const float* sums) { return sum_of_part(sums, part, num_warps); };
  for (int first = warp * kGroups; first < outputs; first += num_warps * kGroups) {
    const int output = output_of(first), s = output % kBatch;
    const float* parts = sums + (((output / kBatch) << block.pair) * kBatch + s) * stride;
    float y = part_of(parts), up = block.pair ? part_of(parts + kBatch * stride) : 0.f;
    float square = kNorm == NormKind::kRms ? part_of(squares[s]) : 0.f;
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) {
      y += __shfl_xor_sync(0xffffffffu, y, offset);
      up += __shfl_xor_sync(0xffffffffu, up, offset);
      square += __shfl_xor_sync(0xffffffffu, square, offset);
    }
    if constexpr (kNorm == NormKind::kRms) {
      const float scale = rsqrtf(square * shape.inv_size + shape.eps);
      y *= scale, up *= scale;
    }
    if (part == 0 && first + lane / kParts < outputs)
      write_output(p, index_of(output), y, up, extras);
    if (first + num_warps * kGroups >= outputs) break;
    const int next = output_of(first + num_warps * kGroups);
    extras = Extras<T, kLayout>(all, block.unit(next / kBatch));
    extras.load_old(p, index_of(next));
  }
}

Shape shape_of(const DecodeLinear& p, int64_t chunks, int64_t units, int64_t blocks) {
  const int64_t pair = p.epilogue == Epilogue::kGated;
  return {static_cast<int>(chunks),         static_cast<int>(units),
          static_cast<int>(blocks),         static_cast<int>(units / blocks),
          static_cast<int>(units % blocks), static_cast<int>(ceil_div(units, blocks) << pair),
          1.f / static_cast<float>(p.size), static_cast<float>(p.eps)};
}

// As many blocks as are resident at once: a block that waited for another's place would read alone.
template <typename T, NormKind kNorm, int kLoads, int kBatch>
struct Plan {
  int64_t chunks, blocks, row_bytes, max_rows;  // shared memory a row needs, and rows there are for
  int threads;

  explicit Plan(int64_t size) : chunks(size / Vec16<T>::kSize) {
    constexpr int kRegisters = registers_of(kNorm != NormKind::kNone, kLoads, kBatch);
    const DeviceInfo& device = device_info(kOp);
    threads = static_cast<int>(round_up(ceil_div(chunks, kLoads), 2 * kWarpSize));
    blocks = kRegistersOfMultiprocessor / (threads * std::max(kRegisters, kUsualRegisters)) *
             device.num_sms;
    row_bytes = sizeof(T*) + kBatch * parts_of(threads / kWarpSize) * sizeof(float);
    max_rows = device.max_shared_bytes / 2 / row_bytes;
  }
};

template <typename T, NormKind kNorm, Layout kLayout, int kLoads, int kBatch>
void launch_kernel(const DecodeLinear& p, int64_t units, void* stream) {
  const Plan<T, kNorm, kLoads, kBatch> plan(p.size);
  const int64_t pair = p.epilogue == Epilogue::kGated;
  const int64_t blocks =
      std::max(std::min(units, plan.blocks), ceil_div(units, plan.max_rows >> pair));
  const Jobs<T, 1> jobs = {{p}, {RowTable<T>(p)}, {shape_of(p, plan.chunks, units, blocks)}};
  launch(kOp, decode_linear_kernel<T, kNorm, kLayout, kLoads, kBatch, 1>,
         step_grid(p.batch, blocks), plan.threads,
         static_cast<int>(jobs.shape[0].max_rows * plan.row_bytes), stream, jobs);
}

// Two projections in one kernel, each by its share of the blocks.
template <typename T, NormKind kNorm, int kLoads>
bool launch_two(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  const Plan<T, kNorm, kLoads, 1> plan(a.size);
  const int64_t units[2] = {a.weights[0].rows, b.weights[0].rows};
  const int64_t all = units[0] + units[1];
  const int64_t first = (plan.blocks * units[0] + all / 2) / all, second = plan.blocks - first;
  if (first < 1 || second < 1 || all < plan.blocks) return false;
  const Jobs<T, 2> jobs = {
      {a, b},
      {RowTable<T>(a), RowTable<T>(b)},
      {shape_of(a, plan.chunks, units[0], first), shape_of(b, plan.chunks, units[1], second)}};
  const int64_t rows = std::max(jobs.shape[0].max_rows, jobs.shape[1].max_rows);
  if (rows > plan.max_rows) return false;
  launch(kOp, decode_linear_kernel<T, kNorm, Layout::kOne, kLoads, 1, 2>, step_grid(1, plan.blocks),
         plan.threads, static_cast<int>(rows * plan.row_bytes), stream, jobs);
  return true;
}

// With the layouts that models have, for one sequence; all others are found by the table.
template <typename T, NormKind kNorm, int kLoads, int kBatch>
bool launch_vectors(const DecodeLinear& p, int64_t units, void* stream) {
  using F = void (*)(const DecodeLinear&, int64_t, void*);
  F launch_layout = launch_kernel<T, kNorm, Layout::kAny, kLoads, kBatch>;
  if constexpr (kBatch == 1 && kLoads < 8) {
    const auto* w = p.weights;
    const auto same_stride = [&](int i) {
      return i >= p.num_weights || w[i].stride == w[0].stride;
    };
    if (p.epilogue != Epilogue::kGated && p.num_weights == 1) {
      launch_layout = launch_kernel<T, kNorm, Layout::kOne, kLoads, 1>;
    } else if constexpr (kNorm != NormKind::kNone) {
      if (p.epilogue == Epilogue::kGated && same_stride(1)) {
        launch_layout = launch_kernel<T, kNorm, Layout::kPair, kLoads, 1>;
      } else if (p.epilogue != Epilogue::kGated && same_stride(1) && same_stride(2)) {
        launch_layout = launch_kernel<T, kNorm, Layout::kSeveral, kLoads, 1>;
      }
    }
  }
  launch_layout(p, units, stream);
  return true;
}

// The fewest loads a thread with which a block holds a row; false where none does.
template <typename T, NormKind kNorm, int kBatch>
bool launch_loads(const DecodeLinear& p, int64_t units, void* stream) {
  const int64_t chunks = p.size / Vec16<T>::kSize;
  if (chunks <= kThreads) return launch_vectors<T, kNorm, 1, kBatch>(p, units, stream);
  if (chunks <= 2 * kThreads) return launch_vectors<T, kNorm, 2, kBatch>(p, units, stream);
  if constexpr (kBatch <= 2) {
    static_assert(kMaxChunksOfTwo == 4 * kThreads);
    if (chunks <= kMaxChunksOfTwo) return launch_vectors<T, kNorm, 4, kBatch>(p, units, stream);
  }
  if constexpr (kBatch == 1) {
    if (chunks <= 8 * kMaxThreads) return launch_vectors<T, kNorm, 8, kBatch>(p, units, stream);
  }
  return false;
}

template <typename T, NormKind kNorm>
bool launch_batch(const DecodeLinear& p, int64_t units, void* stream) {
  if (p.batch == 4) return launch_loads<T, kNorm, 4>(p, units, stream);
  if (p.batch == 2) return launch_loads<T, kNorm, 2>(p, units, stream);
  return launch_loads<T, kNorm, 1>(p, units, stream);
}

template <typename T, NormKind kNorm>
bool launch_both(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  const int64_t chunks = a.size / Vec16<T>::kSize;
  if (chunks <= kThreads) return launch_two<T, kNorm, 1>(a, b, stream);
  if (chunks <= 2 * kThreads) return launch_two<T, kNorm, 2>(a, b, stream);
  return false;
}

}  // namespace

// Four, two or one sequence at a time.
template <typename T>
void DecodeLinearOf<T>::run(const DecodeLinear& p, int64_t units, void* stream) {
  const bool vectors = readable_by_vectors<T>(p);
  const auto try_vectors = [&](const DecodeLinear& part) {
    if (!vectors) return false;
    if (!p.norm_weight) return launch_batch<T, NormKind::kNone>(part, units, stream);
    return p.rms ? launch_batch<T, NormKind::kRms>(part, units, stream)
                 : launch_batch<T, NormKind::kLayer>(part, units, stream);
  };
  for (int64_t first = 0, count = 0; first < p.batch; first += count) {
    count = p.batch - first >= 4 ? 4 : p.batch - first >= 2 ? 2 : 1;
    while (count > 0 && !try_vectors(sequences<T>(p, units, first, count))) count /= 2;
    if (count > 0) continue;
    count = 1;
    decode_linear_elements(sequences<T>(p, units, first, count), units, stream);
  }
}

template <typename T>
bool DecodeLinearOf<T>::run_two(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  if (a.batch != 1 || !readable_by_vectors<T>(a) || !readable_by_vectors<T>(b)) return false;
  return a.rms ? launch_both<T, NormKind::kRms>(a, b, stream)
               : launch_both<T, NormKind::kLayer>(a, b, stream);
}

}  // namespace hf_fuse
