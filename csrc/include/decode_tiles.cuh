// Attention of one query over tiles of cache slots, element by element: what a group of lanes does
// with the rows it holds, and how the groups of a warp come together.
#pragma once
#include "decode_attention.cuh"

namespace hf_fuse {
namespace {

// A lane's slots so far: for each query the slot group's maximum score, its sum of weights relative
// to that, and the lane's part of the weighted sum of the values.
template <typename L>
struct Attention {
  float query[L::kGroup][kElements];
  float max[L::kGroup], sum[L::kGroup], out[L::kGroup][kElements];
  float cap;  // of the scores, base 2, where they have one
};

// A lane's part of a tile. Past the last slot and past a row's end it is that slot and that end
// once more: whatever is read is attended to as well, and no load hangs on a condition, which costs
// ptxas registers and a wait for the load.
template <typename L>
__device__ void load_tile(typename L::Row (&rows)[L::kSlots], const typename L::Element* cache,
                          int tile, int num_slots, int head_dim) {
  using T = typename L::Element;
  const int row_bytes = head_dim * static_cast<int>(sizeof(T));
#pragma unroll
  for (int u = 0; u < L::kSlots; ++u) {
    const int slot = min(tile * L::kTile + u * L::kSlotGroups + L::slot_group(), num_slots - 1);
    const char* row = reinterpret_cast<const char*>(cache) + int64_t{slot} * row_bytes;
#pragma unroll
    for (int v = 0; v < L::kVecs; ++v) {
      const int column = min(L::column(v * L::Vector::kSize), head_dim - L::Vector::kSize);
      rows[u][v] = load_before_wait<typename L::Vector>(reinterpret_cast<const T*>(row) + column);
    }
  }
}

template <typename L>
__device__ Floats<kElements> floats_of(const typename L::Row& row) {
  Floats<kElements> out;
#pragma unroll
  for (int v = 0; v < L::kVecs; ++v) {
    const auto part = row[v].floats();
#pragma unroll
    for (int i = 0; i < L::Vector::kSize; ++i) out[v * L::Vector::kSize + i] = part[i];
  }
  return out;
}

// The products of queries and keys, all in each lane of a slot group; -inf from `num_slots` on.
template <typename L, int kSlots>
__device__ void multiply(float (&scores)[kSlots][L::kGroup], const Attention<L>& a,
                         const typename L::Row (&keys)[kSlots], int slot, int num_slots) {
#pragma unroll
  for (int u = 0; u < kSlots; ++u) {
    const auto key = floats_of<L>(keys[u]);
#pragma unroll
    for (int g = 0; g < L::kGroup; ++g) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum += a.query[g][i] * key[i];
#pragma unroll
      for (int offset = L::kLanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
      if constexpr (L::kCapped) sum = a.cap * tanhf(sum / a.cap);
      scores[u][g] = slot + u * L::kSlotGroups < num_slots ? sum : -INFINITY;
    }
  }
}

template <typename L, int kSlots>
__device__ void attend(Attention<L>& a, float (&scores)[kSlots][L::kGroup],
                       const typename L::Row (&values)[kSlots]) {
#pragma unroll
  for (int g = 0; g < L::kGroup; ++g) {
    float max = a.max[g];
#pragma unroll
    for (int u = 0; u < kSlots; ++u) max = fmaxf(max, scores[u][g]);
    const float shrink = fast_exp2(a.max[g] - max);
    a.max[g] = max;
    a.sum[g] *= shrink;
#pragma unroll
    for (int i = 0; i < kElements; ++i) a.out[g][i] *= shrink;
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
      scores[u][g] = fast_exp2(scores[u][g] - max);
      a.sum[g] += scores[u][g];
    }
  }
#pragma unroll
  for (int u = 0; u < kSlots; ++u) {
    const auto value = floats_of<L>(values[u]);
#pragma unroll
    for (int g = 0; g < L::kGroup; ++g) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) a.out[g][i] += scores[u][g] * value[i];
    }
  }
}

// Nothing attended to yet; the scale of the scores is in the queries.
template <typename L>
__device__ void begin(Attention<L>& a, const Shared<L>& shared, float scale, float cap = 0.f) {
  a.cap = cap;
#pragma unroll
  for (int g = 0; g < L::kGroup; ++g) {
    a.max[g] = kLowest;
    a.sum[g] = 0.f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      a.query[g][i] = shared.input[g][L::column(i)] * scale;
      a.out[g][i] = 0.f;
    }
  }
}

// For one warp: rounds the new key and value, attends to them in its first slot group and, where
// `write`, puts them into the caches.
template <typename L>
__device__ void attend_new(Attention<L>& a, const Shared<L>& shared, int head_dim, bool write,
                           typename L::Element* key_slot, typename L::Element* value_slot) {
  using V = typename L::Vector;
  typename L::Row key[1], value[1];
#pragma unroll
  for (int v = 0; v < L::kVecs; ++v) {
    Floats<V::kSize> k, x;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      const int column = L::column(v * V::kSize + i);
      k[i] = shared.input[L::kGroup][column];
      x[i] = shared.input[L::kGroup + 1][column];
    }
    key[0][v] = V::from(k);
    value[0][v] = V::from(x);
  }
  float scores[1][L::kGroup];
  multiply<L, 1>(scores, a, key, 0, 1);
  if (L::slot_group() != 0) return;
  attend<L, 1>(a, scores, value);
#pragma unroll
  for (int v = 0; v < L::kVecs; ++v) {
    const int column = L::column(v * V::kSize);
    if (!write || column >= head_dim) continue;
    store(key_slot + column, key[0][v]);
    store(value_slot + column, value[0][v]);
  }
}

// All slot groups of the warp, to shared memory.
template <typename L>
__device__ void combine_warp(Shared<L>& shared, const Attention<L>& a, int warp) {
#pragma unroll
  for (int g = 0; g < L::kGroup; ++g) {
    float max = a.max[g];
#pragma unroll
    for (int offset = L::kLanes; offset < kWarpSize; offset *= 2) {
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
    }
    const float shrink = fast_exp2(a.max[g] - max);
    const auto total = [&](float x) {
      x *= shrink;
#pragma unroll
      for (int offset = L::kLanes; offset < kWarpSize; offset *= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
      }
      return x;
    };
    const float sum = total(a.sum[g]);
    if (threadIdx.x % kWarpSize == 0) shared.max_sum[warp][g] = {max, sum};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float out = total(a.out[g][i]);
      if (L::slot_group() == 0) shared.out[warp][g * L::kDim + L::column(i)] = out;
    }
  }
}

}  // namespace
}  // namespace hf_fuse
