// One new token's attention over each sequence's cache, its rotation and its cache write
// (decode.h).
//
// Bytes: the keys and values from start to length, once for every 8 query heads that share them;
// all else is small, and with one sequence latency is half of the time. So:
// - A cluster of blocks takes a (sequence, key head). Its warps take tiles of slots in turn, a few
//   tiles in flight each. While there are few slots, its blocks are shared out among the query
//   heads: to read a slot once for each costs less than to work on all heads one after another.
// - The first tiles are on their way before the kernel waits for the projection of q, k and v.
// - The softmax is kept relative to a running maximum by each group of lanes that reads a slot,
//   then combined in a fixed order: in the warp, in the block, and over the cluster by stores to
//   the shared memory of the block that writes an output.
#include <algorithm>

#include "../include/decode_attention.cuh"

namespace hf_fuse {
namespace {

constexpr int kAloneTiles = 2;  // a warp, up to which a block is done sooner than a cluster
constexpr int kSplitTiles = 8;  // a warp, up to which a block for each query head is sooner done
constexpr int kFewWarps = 4;    // find room beside two blocks of a projection

// A lane's slots so far: for each query the slot group's maximum score, its sum of weights relative
// to that, and the lane's part of the weighted sum of the values.
template <typename L>
struct Attention {
  float query[L::kGroup][kElements];
  float max[L::kGroup], sum[L::kGroup], out[L::kGroup][kElements];
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
__device__ void begin(Attention<L>& a, const Shared<L>& shared, float scale) {
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

template <typename L>
__device__ void attend_task(Shared<L>& shared, const DecodeAttention& p, const Task& task,
                            int head_dim, int64_t length, int64_t start) {
  using T = typename L::Element;
  const int num_slots = static_cast<int>(length - start);  // but for the new one
  const int num_tiles = (num_slots + L::kTile - 1) / L::kTile;
  if (task.blocks > 1) begin_cluster(&shared.barrier, cluster_bytes<L>(task.blocks));

  T* keys =
      cache_of<T>(p.key_cache, p.key_batch_stride, p.key_head_stride, task) + start * head_dim;
  T* values = cache_of<T>(p.value_cache, p.value_batch_stride, p.value_head_stride, task) +
              start * head_dim;
  // By a shuffle, so that the compiler knows that all lanes have the same and branch as one.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int num_warps = blockDim.x / kWarpSize, step = num_warps * task.blocks;
  int tile = warp * task.blocks + task.rank;
  typename L::Row key[L::kBuffers][L::kSlots], value[L::kBuffers][L::kSlots];
#pragma unroll
  for (int b = 0; b < L::kBuffers; ++b) {
    if (tile + b * step >= num_tiles) break;
    load_tile<L>(key[b], keys, tile + b * step, num_slots, head_dim);
    load_tile<L>(value[b], values, tile + b * step, num_slots, head_dim);
  }
  take_input(shared, p, task, length - start);
  Attention<L> a;
  begin(a, shared, p.scaling * kLog2e);
  if (tile == 0) {
    const int64_t slot = int64_t{num_slots} * head_dim;
    attend_new(a, shared, head_dim, task.round == 0, keys + slot, values + slot);
  }
  while (tile < num_tiles) {
#pragma unroll
    for (int b = 0; b < L::kBuffers; ++b) {
      if (tile >= num_tiles) break;
      const int refill = tile + L::kBuffers * step;
      float scores[L::kSlots][L::kGroup];
      multiply<L, L::kSlots>(scores, a, key[b], tile * L::kTile + L::slot_group(), num_slots);
      if (refill < num_tiles) load_tile<L>(key[b], keys, refill, num_slots, head_dim);
      attend<L, L::kSlots>(a, scores, value[b]);
      if (refill < num_tiles) load_tile<L>(value[b], values, refill, num_slots, head_dim);
      tile += step;
    }
  }
  combine_warp(shared, a, warp);
  __syncthreads();
  finish(shared, p, task);
}

template <typename L>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, L::kGroup > 4 ? 1 : 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttention p, const Split split) {
  using One = Layout<typename L::Element, L::kLanes, 1>;
  __shared__ union {
    Shared<L> all;
    Shared<One> one;
  } shared;
  pdl_trigger();
  // The length and the slots below it are read before the wait. They are the previous step's, all
  // of which has ended: a step's first kernel triggers its dependents after its own wait.
  Task task = find_task<L>(split);
  const int64_t length = load_before_wait(p.length),
                start = load_before_wait(p.start + task.sequence);
  if (length >= p.capacity) __trap();  // the new slot would be another head's
  const int num_warps = blockDim.x / kWarpSize;
  const auto within = [&](int tiles, int blocks) {  // of each warp
    return length - start <= int64_t{tiles * L::kTile * num_warps * blocks};
  };
  const int blocks = split.cluster / L::kGroup;  // for each query head
  if (L::kGroup > 1 && !(blocks > 0 && within(kSplitTiles, blocks))) {
    return attend_task<L>(shared.all, p, task, split.head_dim, length, start);
  }
  // Few slots: the cluster's blocks are shared out among the query heads, to read them again.
  const int head = task.rank / blocks;
  task.blocks = within(kAloneTiles, 1) ? 1 : blocks;
  task.first_rank = head * blocks;
  task.rank -= task.first_rank;
  if (head >= task.num_heads || task.rank >= task.blocks) {
    if (task.blocks > 1) begin_cluster(&shared.one.barrier, 0), cluster_wait();
    return;
  }
  task.first_head += head;
  task.round += head;
  task.num_heads = 1;
  attend_task<One>(shared.one, p, task, split.head_dim, length, start);
}

template <typename T, int kLanes, int kGroup>
void launch_layout(const DecodeAttention& p, void* stream) {
  using L = Layout<T, kLanes, kGroup>;
  const int warps = p.capacity > kLongCache ? kMaxWarps : kFewWarps;
  launch_attention<L>(decode_attention_kernel<L>, p, warps, warps * L::kTile, stream);
}

// As many query heads together as registers hold.
template <typename T, int kLanes>
void launch_group(const DecodeAttention& p, void* stream) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  if (group == 1) return launch_layout<T, kLanes, 1>(p, stream);
  if (group == 2) return launch_layout<T, kLanes, 2>(p, stream);
  if constexpr (kLanes < kWarpSize) {
    if (group > 4) return launch_layout<T, kLanes, 8>(p, stream);
  }
  launch_layout<T, kLanes, 4>(p, stream);
}

void check(const DecodeAttention& p, int element_size) {
  if (p.head_dim % kElements != 0 || p.head_dim > kWarpSize * kElements) {
    throw std::runtime_error(
        "hf_fuse.decode_attention: head_dim must be a multiple of 8 up to 256, got " +
        std::to_string(p.head_dim));
  }
  if (!rows_aligned({{p.key_cache, p.key_batch_stride}, {p.value_cache, p.value_batch_stride}},
                    p.batch, element_size) ||
      !rows_aligned({{p.key_cache, p.key_head_stride}, {p.value_cache, p.value_head_stride}},
                    p.num_kv_heads, element_size) ||
      !rows_aligned({{p.qkv, p.qkv_stride}}, p.batch, sizeof(float))) {
    throw std::runtime_error(
        "hf_fuse.decode_attention: qkv and each head of the caches must start at a multiple of 16 "
        "bytes");
  }
}

}  // namespace

void decode_attention(const DecodeAttention& p, void* stream) {
  dispatch_dtype(kDecodeAttention, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.batch == 0 || p.num_heads == 0) return;
    check(p, sizeof(T));
    if (decode_attention_long<T>(p, stream)) return;
    if (p.head_dim <= 64) return launch_group<T, 8>(p, stream);
    if (p.head_dim <= 128) return launch_group<T, 16>(p, stream);
    launch_group<T, 32>(p, stream);
  });
}

}  // namespace hf_fuse
