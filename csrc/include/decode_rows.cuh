// What the two kernels of decode_linear share: where rows and biases are, and what becomes of a
// sum.
#pragma once
#include <algorithm>

#include "activation.cuh"
#include "decode.cuh"
#include "decode.h"
#include "vec.cuh"

namespace hf_fuse {

// Where the rows are: in one weight; in two of one stride, row by row (gated); in up to three of
// one stride, one after another; in any of these ways.
enum class Layout { kOne, kPair, kSeveral, kAny };

// Where a unit's rows are. Unit: an output of each sequence, a row or, gated, a pair of rows (half
// 0 and 1). The addresses are those that row 0 of all the rows would have.
template <typename T>
struct RowTable {
  const T *weight[3], *bias[3];
  int end[2];        // of the first and the second weight's rows
  int64_t apart[2];  // the second weight from the first, the third from the second
  int stride[3];
  int pair;

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
    for (int i = 0; i < 2; ++i) apart[i] = weight[i + 1] - weight[i];
  }

  template <Layout kLayout>
  __device__ int is_pair() const {
    return kLayout == Layout::kAny ? pair : kLayout == Layout::kPair;
  }
  template <Layout kLayout>
  __device__ int index(int unit, int half) const {
    if (kLayout == Layout::kOne) return 0;
    if (kLayout == Layout::kPair || pair) return half;
    return (unit >= end[0]) + (unit >= end[1]);
  }
  __device__ const T* row(int unit, int half) const {
    const int i = index<Layout::kAny>(unit, half);
    return weight[i] + int64_t{unit} * stride[i];
  }
  // Of the unit's row, 0 where it has none. A strong load: it may come before the wait.
  template <Layout kLayout>
  __device__ Vec<T, 1> load_bias(int unit, int half) const {
    const T* vector = bias[index<kLayout>(unit, half)];
    return vector ? load_before_wait<Vec<T, 1>>(vector + unit) : Vec<T, 1>{};
  }
};

// What an output needs beside its sums, loaded long before: it may come from memory.
template <typename T, Layout kLayout>
struct Extras {
  Vec<T, 1> bias, up_bias = {};
  float old = 0.f;

  __device__ Extras(const RowTable<T>& rows, int unit)
      : bias(rows.template load_bias<kLayout>(unit, 0)) {
    if (rows.template is_pair<kLayout>()) up_bias = rows.template load_bias<kLayout>(unit, 1);
  }
  // After the wait.
  __device__ void load_old(const DecodeLinear& p, int64_t index) {
    if (p.epilogue == Epilogue::kAdd) old = load_float(static_cast<const float*>(p.out) + index);
  }
};

// y and up: the sums of the unit's one or two rows.
template <typename T, Layout kLayout>
__device__ void write_output(const DecodeLinear& p, int64_t index, float y, float up,
                             const Extras<T, kLayout>& extras) {
  y += extras.bias.floats()[0];
  if (p.epilogue == Epilogue::kStore || p.epilogue == Epilogue::kAdd) {
    static_cast<float*>(p.out)[index] = extras.old + y;
    return;
  }
  y = apply_act(p.act, y);
  if (p.epilogue == Epilogue::kGated) y *= up + extras.up_bias.floats()[0];
  store(static_cast<T*>(p.out) + index, Vec<T, 1>::from({y}));
}

constexpr const char* kDecodeLinear = "decode_linear";  // the op's name in errors
constexpr int64_t kMaxStride = 1 << 20;  // so that int counts from one row of a block to the next

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

template <typename T>
bool readable_by_vectors(const DecodeLinear& p) {
  const auto* w = p.weights;
  return p.size > 0 && p.size % Vec16<T>::kSize == 0 &&
         std::max({w[0].stride, w[1].stride, w[2].stride}) <= kMaxStride &&
         rows_aligned({{p.x}, {p.norm_weight}, {p.norm_bias}}, 1, sizeof(T)) &&
         rows_aligned({{w[0].weight, w[0].stride}}, w[0].rows, sizeof(T)) &&
         rows_aligned({{w[1].weight, w[1].stride}}, w[1].rows, sizeof(T)) &&
         rows_aligned({{w[2].weight, w[2].stride}}, w[2].rows, sizeof(T));
}

// decode_linear.cuh: of a dtype; `run_two` answers whether one kernel can do both.
template <typename T>
struct DecodeLinearOf {
  static void run(const DecodeLinear& p, int64_t units, void* stream);
  static bool run_two(const DecodeLinear& a, const DecodeLinear& b, void* stream);
  static bool run_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream);
};

// The longest rows that decode_linear.cuh multiplies by two sequences at once, in 16 bytes.
constexpr int64_t kMaxChunksOfTwo = 1280;

// decode_matmul.cuh: many sequences at once, on tensor cores; with a norm it needs the workspace.
template <typename T>
struct DecodeMatmulOf {
  static bool can_run(const DecodeLinear& p);
  static void run(const DecodeLinear& p, int64_t units, void* stream);
};
constexpr int64_t kMaxMatmulSize = 16384;  // a row's norm fits a block's registers

// decode_linear_elements.cu: of any size and alignment, one sequence.
void decode_linear_elements(const DecodeLinear& p, int64_t units, void* stream);

}  // namespace hf_fuse
