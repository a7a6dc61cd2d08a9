// Two projections added to one row: out += weight1 · x1 + bias1 + weight2 · x2 + bias2, for one
// sequence, without a norm (decode.h). What decode_linear.cuh says holds here, too: a block takes
// its rows of the first weight, then those of the second, whose first chunks are loaded as soon as
// the first weight has no more, so that the memory is not idle between them.
#pragma once
#include "decode_linear.cuh"

namespace hf_fuse {
namespace {

// As load_weights, but v is what it was where not `present`.
template <typename V>
__device__ void load_or_keep(V& v, const typename V::Element* ptr, bool present) {
  auto& w = v.words;
  const int predicate = present;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
      : "l"(ptr), "r"(predicate)
      : "memory");
}

// kFirst, kSecond: chunks a thread has of a row of each weight.
template <typename T, int kFirst, int kSecond>
__global__ void __maxnreg__(registers_of(false, kSecond, 1))
    decode_linear_sum_kernel(const __grid_constant__ Jobs<T, 2> jobs) {
  using V = Vec16<T>;
  constexpr int kRows = kInFlight / kFirst, kSecondRows = kInFlight / kSecond;
  const DecodeLinear& p = jobs.p[1];
  extern __shared__ float sums[];  // [row][warp]
  pdl_trigger();
  const BlockRows<T, Layout::kOne, kFirst> first(jobs.all[0], jobs.shape[0], blockIdx.x, nullptr);
  const BlockRows<T, Layout::kOne, kSecond> second(jobs.all[1], jobs.shape[1], blockIdx.x, nullptr);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize, stride = parts_of(num_warps), rows = first.rows;
  V w[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    const bool of_first = k / kFirst < rows;
    const T* chunk =
        of_first ? first.chunk(k / kFirst, k % kFirst) : second.chunk(k / kSecond, k % kSecond);
    load_weights<true>(w[k], chunk, of_first || k / kSecond < rows);
  }
  // As in decode_linear_kernel, a group of kParts lanes adds up and writes an output.
  const auto row_of = [&](int group) { return min(group + lane / kParts, rows - 1); };
  int unit = second.unit(row_of(warp * kGroups));
  const auto extras_of = [&](int unit) {
    Extras<T, Layout::kOne> extras(jobs.all[1], unit);
    extras.up_bias = jobs.all[0].template load_bias<Layout::kOne>(unit, 0);  // the first weight's
    return extras;
  };
  auto extras = extras_of(unit);
  pdl_wait();
  Slice<T, NormKind::kNone, kFirst> x1;
  Slice<T, NormKind::kNone, kSecond> x2;
  x1.load_x(jobs.p[0].x, 0, jobs.shape[0].chunks);
  x2.load_x(p.x, 0, jobs.shape[1].chunks);
  extras.load_old(p, unit);

  for (int j = 0; j < rows; j += kRows) {
    float sum[kRows] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int row = j + k / kFirst, next = row + kRows;
      sum[k / kFirst] += dot(w[k].floats(), x1.floats(k % kFirst));
      const bool more = next < rows;  // else the chunk's place is the second weight's, once
      const T* chunk =
          more ? first.chunk(next, k % kFirst) : second.chunk(k / kSecond, k % kSecond);
      load_or_keep(w[k], chunk, more || (row < rows && k / kSecond < rows));
    }
    sum_each(sum);
    constexpr int kLanes = kWarpSize / kRows;
    const int row = j + lane / kLanes;
    if (lane % kLanes == 0 && row < rows) sums[row * stride + warp] = sum[0];
  }
  __syncwarp();
  for (int j = 0; j < rows; j += kSecondRows) {
    float sum[kSecondRows] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int next = j + k / kSecond + kSecondRows;
      sum[k / kSecond] += dot(w[k].floats(), x2.floats(k % kSecond));
      load_weights<false>(w[k], second.chunk(next, k % kSecond), next < rows);
    }
    sum_each(sum);
    constexpr int kLanes = kWarpSize / kSecondRows;
    const int row = j + lane / kLanes;
    if (lane % kLanes == 0 && row < rows) sums[row * stride + warp] += sum[0];
  }
  __syncthreads();

  const int part = lane % kParts;
  for (int group = warp * kGroups; group < rows; group += num_warps * kGroups) {
    float y = sum_of_part(sums + row_of(group) * stride, part, num_warps);
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2)
      y += __shfl_xor_sync(0xffffffffu, y, offset);
    if (part == 0 && group + lane / kParts < rows)
      write_output(p, unit, y + extras.up_bias.floats()[0], 0.f, extras);
    if (group + num_warps * kGroups >= rows) break;
    unit = second.unit(row_of(group + num_warps * kGroups));
    extras = extras_of(unit);
    extras.load_old(p, unit);
  }
}

template <typename T, int kFirst, int kSecond>
bool launch_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  const Plan<T, NormKind::kNone, kSecond, 1> plan(b.size);
  const int64_t chunks = a.size / Vec16<T>::kSize, units = b.weights[0].rows;
  if (chunks > kFirst * plan.threads) return false;
  const int64_t blocks = std::max(std::min(units, plan.blocks), ceil_div(units, plan.max_rows));
  const Jobs<T, 2> jobs = {
      {a, b},
      {RowTable<T>(a), RowTable<T>(b)},
      {shape_of(a, chunks, units, blocks), shape_of(b, plan.chunks, units, blocks)}};
  launch(kOp, decode_linear_sum_kernel<T, kFirst, kSecond>, step_grid(1, blocks), plan.threads,
         static_cast<int>(jobs.shape[1].max_rows * plan.row_bytes), stream, jobs);
  return true;
}

}  // namespace

template <typename T>
bool DecodeLinearOf<T>::run_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  if (a.batch != 1 || !readable_by_vectors<T>(a) || !readable_by_vectors<T>(b)) return false;
  const int64_t chunks = b.size / Vec16<T>::kSize;
  if (chunks <= 4 * kThreads && launch_sum<T, 1, 4>(a, b, stream)) return true;
  return chunks <= 8 * kMaxThreads && launch_sum<T, 2, 8>(a, b, stream);
}

}  // namespace hf_fuse
