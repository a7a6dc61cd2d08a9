// residual[b] = scale * table[token[b]] (+ positions[length - start[b]]), in fp32.
//
// Bytes: a row of each table read and one written in fp32, for every sequence: nothing but latency.
#include "../include/decode.cuh"
#include "../include/decode.h"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_embed";
constexpr int kThreads = 128;

// An index outside its table gives NaN, which nobody can miss, rather than a fault.
template <typename V>
__device__ V load_row(const void* table, int64_t row, int64_t num_rows, int64_t size,
                      int64_t column) {
  if (row >= 0 && row < num_rows) {
    return load<V>(static_cast<const typename V::Element*>(table) + row * size + column);
  }
  V nan;
#pragma unroll
  for (int i = 0; i < V::kWords; ++i) nan.words[i] = static_cast<typename V::Word>(~0u);
  return nan;
}

template <typename V>
__global__ void __launch_bounds__(kThreads) decode_embed_kernel(const DecodeEmbed p) {
  // The first kernel of a step triggers only after its wait, so that no kernel of this step starts
  // before the last one has ended: decode_attention reads the length and the cache ahead of its
  // own wait and relies on it.
  pdl_wait();
  pdl_trigger();
  const int64_t b = blockIdx.y;
  const int64_t column = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V::kSize;
  if (column >= p.size) return;
  const int64_t token = p.token[b], position = p.positions ? *p.length - p.start[b] : 0;
  const V row = load_row<V>(p.table, token, p.vocab, p.size, column);
  V positions = {};
  if (p.positions) {
    positions = load_row<V>(p.positions, position, p.num_positions, p.size, column);
  }
  auto x = row.floats();
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) x[i] = x[i] * p.scale + positions.floats()[i];
  store(p.residual + b * p.size + column, Vec<float, V::kSize>::from(x));
}

}  // namespace

void decode_embed(const DecodeEmbed& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.batch == 0 || p.size == 0) return;
    const auto run = [&](auto width) {
      using V = decltype(width);
      launch(kOp, decode_embed_kernel<V>,
             step_grid(p.batch, ceil_div(p.size, kThreads * V::kSize), p.batch), kThreads, 0,
             stream, p);
    };
    // 4 elements a thread: enough threads to a row, and one 16-byte store.
    using V = Vec<T, 4>;
    const bool vectors =
        p.size % V::kSize == 0 &&
        rows_aligned({{p.table, p.size}, {p.positions, p.size}}, p.vocab, sizeof(T), sizeof(V)) &&
        rows_aligned({{p.residual, p.size}}, p.batch, sizeof(float));
    vectors ? run(V()) : run(Vec<T, 1>());
  });
}

}  // namespace hf_fuse
