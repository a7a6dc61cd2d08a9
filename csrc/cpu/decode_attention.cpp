// decode_attention on CPU: q and the new key are rotated in fp32; then the keys and the values are
// read once, from memory, for all query heads of their group. The slots of a sequence are split by
// a fixed size, counted from its start, whatever the number of threads; the splits' softmaxes are
// combined in their order. So the bits depend neither on the threads nor on the padding.
#include "cpu_activations.h"
#include "decode.h"

namespace hf_fuse {
namespace {

constexpr int64_t kSplit = 256;  // slots; a multiple of a block
constexpr int64_t kBlock = 16;   // slots whose values stay in L1 for all heads of a group
constexpr float kInfinity = __builtin_inff();

// What the passes over the cache share. A query head has a row of queries, rotated and scaled and
// zero beyond head_dim. A split leaves of it, in a row of sums, sum(exp(score - largest) * value);
// then, from padded(head_dim) on, that sum without the value, and largest.
struct Scratch {
  int64_t width, splits;
  float *queries, *sums;
  float* query(int64_t head) const { return queries + head * width; }
  float* sum(int64_t head, int64_t split) const {
    return sums + (head * splits + split) * stride();
  }
  int64_t stride() const { return width + kLanes<float>; }
};

template <typename T>
T* key_row(const DecodeAttention& p, int64_t sequence, int64_t kv_head, int64_t slot) {
  return at<T>(p.key_cache,
               sequence * p.key_batch_stride + kv_head * p.key_head_stride + slot * p.head_dim);
}
template <typename T>
T* value_row(const DecodeAttention& p, int64_t sequence, int64_t kv_head, int64_t slot) {
  return at<T>(p.value_cache,
               sequence * p.value_batch_stride + kv_head * p.value_head_stride + slot * p.head_dim);
}

void rotate(const DecodeAttention& p, const float* head, const float* cos, const float* sin,
            float* dst) {
  const int64_t half = p.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    dst[i] = head[i] * cos[i] - head[half + i] * sin[i];
    dst[half + i] = head[half + i] * cos[i] + head[i] * sin[i];
  }
  for (int64_t i = p.rotary_dim; i < p.head_dim; ++i) dst[i] = head[i];
}

// A sequence's queries into the scratch, its key and value into the caches.
template <typename T>
void enter(const DecodeAttention& p, int64_t sequence, const Scratch& s) {
  const int64_t half = p.rotary_dim / 2, length = *p.length;
  float* cos = scratch<float>(2, 2 * half + p.head_dim);
  float *sin = cos + half, *key = sin + half;
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(length - p.start[sequence]) * p.inv_freq[i];
    cos[i] = std::cos(angle) * p.rope_scale;
    sin[i] = std::sin(angle) * p.rope_scale;
  }
  const float* qkv = p.qkv + sequence * p.qkv_stride;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    float* query = s.query(sequence * p.num_heads + h);
    rotate(p, qkv + h * p.q_head_stride, cos, sin, query);
    for (int64_t i = 0; i < s.width; ++i) query[i] = i < p.head_dim ? query[i] * p.scaling : 0;
  }
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const float* head = qkv + h * p.kv_head_stride;
    rotate(p, head + p.k_offset, cos, sin, key);
    store_row(key, key_row<T>(p, sequence, h, length), p.head_dim);
    store_row(head + p.v_offset, value_row<T>(p, sequence, h, length), p.head_dim);
  }
}

// scores[h * kSplit + slot] = query h times key `slot`. (Unrolled early, here and below, or gcc
// keeps the sums in memory.)
template <typename T, int kHeads>
void score(const T* keys, const float* queries, int64_t head_dim, int64_t width, int64_t slots,
           float* scores) {
  for (int64_t slot = 0; slot < slots; ++slot) {
    vec<float> sum[kHeads] = {};
    for (int64_t i = 0; i < head_dim; i += kLanes<float>) {
      const vec<float> key = load_vec(keys + slot * head_dim + i, head_dim - i);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
        sum[h] = multiply_add(key, load_vec(queries + h * width + i), sum[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) scores[h * kSplit + slot] = sum_lanes<float>(sum[h]);
  }
}

// sums[h * stride + i] += weights[h * kSplit + slot] * value i of `slot`, over the slots.
template <typename T, int kHeads>
void add_values(const T* values, const float* weights, int64_t head_dim, int64_t slots, float* sums,
                int64_t stride) {
  for (int64_t i = 0; i < head_dim; i += kLanes<float>) {
    vec<float> sum[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) sum[h] = load_vec(sums + h * stride + i);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const vec<float> value = load_vec(values + slot * head_dim + i, head_dim - i);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
        sum[h] = multiply_add(value, broadcast(weights[h * kSplit + slot]), sum[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) store_vec<float>(sum[h], sums + h * stride + i);
  }
}

// scores[0 .. slots) to exp(score - largest), and what they add up to.
void exponentiate(float* scores, int64_t slots, float* sum, float* largest) {
  *largest = -kInfinity;
  for (int64_t i = 0; i < slots; ++i) *largest = scores[i] > *largest ? scores[i] : *largest;
  std::fill(scores + slots, scores + padded<float>(slots), -kInfinity);
  vec<float> total = {};
  for (int64_t i = 0; i < slots; i += kLanes<float>) {
    const vec<float> e = exp_vec(load_vec(scores + i) - *largest);
    store_vec<float>(e, scores + i);
    total += e;
  }
  *sum = sum_lanes<float>(total);
}

// body(first, tile) over the heads of a group, in tiles that share the loads of a key or a value.
template <typename Body>
void for_each_tile(int64_t group, const Body& body) {
  int64_t h = 0;
  for (; h + 4 <= group; h += 4) body(h, std::integral_constant<int, 4>{});
  for (; h + 2 <= group; h += 2) body(h, std::integral_constant<int, 2>{});
  for (; h < group; ++h) body(h, std::integral_constant<int, 1>{});
}

// The first slot that a sequence's new token attends to.
int64_t first_slot(const DecodeAttention& p, int64_t sequence) {
  const int64_t start = p.start[sequence];
  return p.window ? std::max(start, *p.length + 1 - p.window) : start;
}

template <typename T>
void attend(const DecodeAttention& p, int64_t sequence, int64_t kv_head, int64_t split,
            const Scratch& s) {
  const int64_t begin = first_slot(p, sequence) + split * kSplit;
  const int64_t slots = std::min(kSplit, *p.length + 1 - begin);
  const int64_t group = p.num_heads / p.num_kv_heads, stride = s.splits * s.stride();
  const int64_t head = sequence * p.num_heads + kv_head * group;
  if (slots <= 0) return;
  const T* keys = key_row<T>(p, sequence, kv_head, begin);
  const T* values = value_row<T>(p, sequence, kv_head, begin);
  float* scores = scratch<float>(3, group * kSplit);
  float* sums = s.sum(head, split);
  for (int64_t slot = 0; slot < slots; slot += kBlock)
    for_each_tile(group, [&](int64_t h, auto tile) {
      score<T, tile>(keys + slot * p.head_dim, s.query(head + h), p.head_dim, s.width,
                     std::min(kBlock, slots - slot), scores + h * kSplit + slot);
    });
  for (int64_t h = 0; h < group; ++h) {
    float* row = sums + h * stride;
    if (p.softcap)
      for (float* x = scores + h * kSplit; x < scores + h * kSplit + slots; ++x)
        *x = p.softcap * std::tanh(*x / p.softcap);
    std::fill(row, row + s.width, 0.f);
    exponentiate(scores + h * kSplit, slots, row + s.width, row + s.width + 1);
  }
  for (int64_t slot = 0; slot < slots; slot += kBlock)
    for_each_tile(group, [&](int64_t h, auto tile) {
      add_values<T, tile>(values + slot * p.head_dim, scores + h * kSplit + slot, p.head_dim,
                          std::min(kBlock, slots - slot), sums + h * stride, stride);
    });
}

int64_t splits_of(const DecodeAttention& p, int64_t sequence) {
  return (*p.length - first_slot(p, sequence)) / kSplit + 1;
}

template <typename T>
void combine(const DecodeAttention& p, int64_t head, const Scratch& s) {
  const int64_t splits = splits_of(p, head / p.num_heads);
  float largest = -kInfinity, sum = 0;
  for (int64_t split = 0; split < splits; ++split)
    largest = std::max(largest, s.sum(head, split)[s.width + 1]);
  float* total = scratch<float>(3, s.width);
  std::fill(total, total + s.width, 0.f);
  for (int64_t split = 0; split < splits; ++split) {
    const float* part = s.sum(head, split);
    const float scale = std::exp(part[s.width + 1] - largest);
    sum += part[s.width] * scale;
    for (int64_t i = 0; i < s.width; ++i) total[i] += part[i] * scale;
  }
  for (int64_t i = 0; i < s.width; ++i) total[i] /= sum;
  store_row(total, at<T>(p.out, head * p.head_dim), p.head_dim);
}

template <typename T>
void run(const DecodeAttention& p) {
  const int64_t heads = p.batch * p.num_heads;
  int64_t splits = 1;
  for (int64_t b = 0; b < p.batch; ++b) splits = std::max(splits, splits_of(p, b));
  Scratch s{padded<float>(p.head_dim), splits, nullptr, nullptr};
  s.queries = aligned_scratch<float>(0, heads * s.width);
  s.sums = aligned_scratch<float>(1, heads * splits * s.stride());
  for (int64_t b = 0; b < p.batch; ++b) enter<T>(p, b, s);
  const int64_t slots = std::min(kSplit, *p.length + 1);
  for_each_row(
      p.batch * p.num_kv_heads * splits, slots * p.head_dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          attend<T>(p, i / splits / p.num_kv_heads, i / splits % p.num_kv_heads, i % splits, s);
      });
  for_each_row(heads, splits * s.width, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) combine<T>(p, head, s);
  });
}

void check(const DecodeAttention& p) {
  const int64_t length = *p.length;
  if (length < 0 || length >= p.capacity)
    throw std::runtime_error("hf_fuse decode_attention: length must be below the capacity of " +
                             std::to_string(p.capacity) + ", got " + std::to_string(length));
  for (int64_t b = 0; b < p.batch; ++b)
    if (first_slot(p, b) < 0 || p.start[b] > length)
      throw std::runtime_error("hf_fuse decode_attention: start must be 0 to the length of " +
                               std::to_string(length) + ", got " + std::to_string(p.start[b]));
}

}  // namespace

void decode_attention(const DecodeAttention& p, void*) {
  check(p);
  dispatch_decode("decode_attention", p.dtype, [&](auto type) { run<decltype(type)>(p); });
}

}  // namespace hf_fuse
