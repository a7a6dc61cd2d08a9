// decode_linear on CPU: every weight is read once, from memory, which is what a step waits for. x
// is normalised into fp32 once and stays in the cache; a tile of rows times a tile of sequences
// is summed in registers, so that a weight is widened once for the sequences of a tile and x is
// loaded once for its rows.
//
// A sum runs along its row in as many chains as a register has lanes, begun anew every kSumSize
// elements: rounding errors grow with the length of a chain. Its bits depend neither on the tiles,
// nor on the threads, nor on the other sequences.
#include "cpu_activations.h"
#include "decode.h"

namespace hf_fuse {
namespace {

constexpr int64_t kTileRows = 4, kTileBatch = 4;
constexpr int64_t kBlockRows = 256;  // between two epilogues; a multiple of a vector
constexpr int64_t kSumSize = 1024;   // a multiple of a vector
constexpr int64_t kAhead = 2048;     // bytes: the hardware's prefetcher stops at the end of a page

// What the rows are multiplied with: [batch, stride] in fp32, zero from size to stride.
struct Input {
  float* rows;
  int64_t batch, size, stride;
};

Input allocate_input(int64_t batch, int64_t size) {
  const int64_t stride = padded<float>(size);
  float* rows = aligned_scratch<float>(0, batch * stride);
  std::memset(rows, 0, batch * stride * sizeof(float));
  return {rows, batch, size, stride};
}

template <typename Body>
float sum_over(const float* row, int64_t n, const Body& body) {
  vec<float> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<float>) sum += body(load_vec(row + i));
  return sum_lanes<float>(sum);
}

// Twice: what rounding leaves of a large mean is small and goes with the second.
void subtract_mean(float* row, int64_t size, int64_t stride) {
  for (int pass = 0; pass < 2; ++pass) {
    const float mean = sum_over(row, stride, [](vec<float> v) { return v; }) / size;
    for (int64_t i = 0; i < size; ++i) row[i] -= mean;
  }
}

template <typename T>
void normalise(const DecodeLinear& p, float* row, int64_t stride) {
  if (!p.rms) subtract_mean(row, p.size, stride);
  const float squares = sum_over(row, stride, [](vec<float> v) { return v * v; });
  const float rstd = 1 / std::sqrt(squares / p.size + static_cast<float>(p.eps));
  const T* weight = static_cast<const T*>(p.norm_weight);
  const T* bias = static_cast<const T*>(p.norm_bias);
  for_each_vec<float>(p.size, [&](int64_t i, int64_t left) {
    vec<float> v = load_vec(row + i) * rstd * load_vec(weight + i, left);
    if (bias) v += load_vec(bias + i, left);
    store_vec<float>(v, row + i, left);
  });
}

template <typename T>
Input load_input(const DecodeLinear& p) {
  const Input input = allocate_input(p.batch, p.size);
  for (int64_t b = 0; b < p.batch; ++b) {
    float* row = input.rows + b * input.stride;
    if (p.norm_weight) {
      std::memcpy(row, at<float>(p.x, b * p.size), p.size * sizeof(float));
      normalise<T>(p, row, input.stride);
    } else {
      load_row(at<T>(p.x, b * p.size), row, p.size);
    }
  }
  return input;
}

// y[b * kBlockRows + r * spacing] = the weight row r * spacing times input row b. Unrolled early,
// or gcc keeps the sums in memory.
template <typename T, int kRows, int kBatch>
void multiply_tile(const T* weight, int64_t stride, int64_t spacing, const float* x,
                   const Input& input, float* y) {
  const int64_t size = input.size, x_stride = input.stride;
  vec<float> total[kRows][kBatch] = {};
  for (int64_t first = 0; first < size; first += kSumSize) {
    const int64_t end = std::min(first + kSumSize, size);
    vec<float> sum[kRows][kBatch] = {};
    for (int64_t i = first; i < end; i += kLanes<float>) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const T* from = weight + r * spacing * stride + i;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
        const vec<float> w = load_vec(from, size - i);
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b)
          sum[r][b] = multiply_add(w, load_vec(x + b * x_stride + i), sum[r][b]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b) total[r][b] += sum[r][b];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < kBatch; ++b)
      y[b * kBlockRows + r * spacing] = sum_lanes<float>(total[r][b]);
}

template <typename T, int kRows>
void multiply_rows(const T* weight, int64_t stride, int64_t spacing, const Input& input, float* y) {
  int64_t b = 0;
  const auto tiles_of = [&](auto batch) {
    constexpr int kBatch = decltype(batch)::value;
    for (; b + kBatch <= input.batch; b += kBatch)
      multiply_tile<T, kRows, kBatch>(weight, stride, spacing, input.rows + b * input.stride, input,
                                      y + b * kBlockRows);
  };
  tiles_of(std::integral_constant<int, kTileBatch>{});
  tiles_of(std::integral_constant<int, 2>{});
  tiles_of(std::integral_constant<int, 1>{});
}

// Up to kBlockRows rows, with their bias. A tile's rows lie far apart, so that memory is read as
// kTileRows long runs: neighbouring rows, each a new short run to the hardware's prefetcher, come
// at half the pace.
template <typename T>
void multiply_block(const DecodeLinear::Rows& rows, int64_t begin, int64_t count,
                    const Input& input, float* y) {
  const T* weight = at<T>(rows.weight, begin * rows.stride);
  const int64_t run = count / kTileRows;
  for (int64_t r = 0; r < run; ++r)
    multiply_rows<T, kTileRows>(weight + r * rows.stride, rows.stride, run, input, y + r);
  for (int64_t r = run * kTileRows; r < count; ++r)
    multiply_rows<T, 1>(weight + r * rows.stride, rows.stride, 0, input, y + r);
  if (!rows.bias) return;
  const T* bias = at<T>(rows.bias, begin);
  for (int64_t b = 0; b < input.batch; ++b)
    for (int64_t i = 0; i < count; ++i) y[b * kBlockRows + i] += to_acc(bias[i]);
}

template <typename T, Act kAct>
void store_activated(const float* y, const float* up, int64_t count, T* out) {
  for_each_vec<float>(count, [&](int64_t i, int64_t left) {
    vec<float> v = activate<kAct, float>(load_vec(y + i));
    if (up) v *= load_vec(up + i);
    store_vec<T>(v, out + i, left);
  });
}

template <typename T>
void store_block(const DecodeLinear& p, const float* y, const float* up, int64_t count,
                 int64_t offset) {
  if (p.epilogue == Epilogue::kStore) {
    std::memcpy(at<float>(p.out, offset), y, count * sizeof(float));
  } else if (p.epilogue == Epilogue::kAdd) {
    float* out = at<float>(p.out, offset);
    for (int64_t i = 0; i < count; ++i) out[i] += y[i];
  } else {
    dispatch_act(p.act, [&](auto act) {
      store_activated<T, decltype(act)::value>(y, up, count, at<T>(p.out, offset));
    });
  }
}

// Rows begin to end of weight `index`, which go to columns from `column` on of the out.
template <typename T>
void project(const DecodeLinear& p, int index, const Input& input, int64_t begin, int64_t end,
             int64_t column, int64_t columns) {
  const bool gated = p.epilogue == Epilogue::kGated;
  float* y = scratch<float>(1, 2 * p.batch * kBlockRows);
  float* up = gated ? y + p.batch * kBlockRows : nullptr;
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t count = end - r < kBlockRows ? end - r : kBlockRows;
    multiply_block<T>(p.weights[index], r, count, input, y);
    if (gated) multiply_block<T>(p.weights[index + 1], r, count, input, up);
    for (int64_t b = 0; b < p.batch; ++b)
      store_block<T>(p, y + b * kBlockRows, gated ? up + b * kBlockRows : nullptr, count,
                     b * columns + column + r);
  }
}

template <typename T>
void run(const DecodeLinear& p) {
  const Input input = load_input<T>(p);
  const bool gated = p.epilogue == Epilogue::kGated;
  const int count = gated ? 1 : p.num_weights;
  int64_t columns = 0;
  for (int w = 0; w < count; ++w) columns += p.weights[w].rows;
  for_each_row(columns, p.size * (gated ? 2 : 1), [&](int64_t begin, int64_t end) {
    int64_t column = 0;
    for (int w = 0; w < count; ++w) {
      const int64_t rows = p.weights[w].rows;
      project<T>(p, w, input, std::max<int64_t>(begin - column, 0),
                 std::min<int64_t>(end - column, rows), column, columns);
      column += rows;
    }
  });
}

}  // namespace

int64_t decode_linear_workspace_size(const DecodeLinear&) { return 0; }

void decode_linear(const DecodeLinear& p, void*) {
  dispatch_decode("decode_linear", p.dtype, [&](auto type) { run<decltype(type)>(p); });
}

void decode_linear_two(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  decode_linear(a, stream), decode_linear(b, stream);
}

void decode_linear_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  decode_linear(a, stream), decode_linear(b, stream);
}

}  // namespace hf_fuse
