// decode_sinks on CPU: a few rows of every layer; the angles are a layer's own.
#include "cpu.h"
#include "decode.h"

namespace hf_fuse {
namespace {

// The sinks of one layer and sequence. cos and sin: [rotary_dim / 2].
template <typename T>
void place(const DecodeSinks& p, int64_t index, int64_t slot, const float* cos, const float* sin) {
  const int64_t half = p.rotary_dim / 2, rows = p.num_kv_heads;
  float* row = scratch<float>(1, p.head_dim);
  for (int64_t head = index * rows; head < (index + 1) * rows; ++head) {
    const int64_t from = head * p.sinks * p.head_dim;
    const int64_t to = (head * p.capacity + slot) * p.head_dim;
    const T* keys = at<T>(p.sink_keys, from);
    for (int64_t i = 0; i < p.sinks; ++i) {
      load_row(keys + i * p.head_dim, row, p.head_dim);
      for (int64_t j = 0; j < half; ++j) {
        const float first = row[j], second = row[half + j];
        row[j] = first * cos[j] - second * sin[j];
        row[half + j] = second * cos[j] + first * sin[j];
      }
      store_row(row, at<T>(p.keys, to + i * p.head_dim), p.head_dim);
    }
    std::copy_n(at<T>(p.sink_values, from), p.sinks * p.head_dim, at<T>(p.values, to));
  }
}

template <typename T>
void run(const DecodeSinks& p, int64_t index) {
  const int64_t layer = index / p.batch, half = p.rotary_dim / 2;
  const int64_t slot = *p.length + 1 - p.window - p.sinks;
  const int64_t shift = slot - p.start[index % p.batch];
  if (shift <= 0) return;
  float *cos = scratch<float>(0, 2 * half), *sin = cos + half;
  for (int64_t j = 0; j < half; ++j) {
    const float angle = static_cast<float>(shift) * p.inv_freq[layer * half + j];
    cos[j] = std::cos(angle), sin[j] = std::sin(angle);
  }
  place<T>(p, index, slot, cos, sin);
}

void check(const DecodeSinks& p) {
  const int64_t slot = *p.length + 1 - p.window - p.sinks;
  for (int64_t b = 0; b < p.batch; ++b)
    if (slot > p.start[b] && (slot < 0 || slot + p.sinks > p.capacity))
      throw std::runtime_error("hf_fuse decode_sinks: there is no room before a window of " +
                               std::to_string(p.window) + " at length " +
                               std::to_string(*p.length));
}

}  // namespace

void decode_sinks(const DecodeSinks& p, void*) {
  check(p);
  dispatch_decode("decode_sinks", p.dtype, [&](auto type) {
    for_each_row(p.num_layers * p.batch, 2 * p.num_kv_heads * p.sinks * p.head_dim,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) run<decltype(type)>(p, i);
                 });
  });
}

}  // namespace hf_fuse
