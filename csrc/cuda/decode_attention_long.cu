// decode_attention over long caches whose key heads serve several query heads, in half precision:
// products on tensor cores, for done one by one they take longer than reading the cache.
//
// Bytes: the keys and values from start to length, once. A warp takes tiles of slots in turn and
// has the next tile's keys and values under way while it works on this one's; nothing passes
// through shared memory. mma.m16n8k16 multiplies 16 x 16 by 16 x 8 and sums in fp32. For a lane
// with c = lane % 4 and r = lane / 4:
// - scores [heads, slots] = queries [heads, dims] * keys [dims, slots]: a step may take any 16
//   dims, so a lane reads 16-byte chunks c, c + 4, .. of the rows of slots r, r + 8, .. and gives
//   the halves of each to two steps. It gets the scores of head r at slots 2c and 2c + 1 of every
//   8.
// - out [dims, heads] += values [dims, slots] * weights [slots, heads]: it has the weights of just
//   the slots that its part of a step wants, and reads chunk r (and r + 8) of those slots' rows.
//   Two slots' elements are paired in a register by permuting bytes. It gets heads 2c and 2c + 1 of
//   its chunks. Weights are rounded to the dtype for it; their sum is that of fp32.
#include "../include/decode_attention.cuh"
#include "../include/mma.cuh"

namespace hf_fuse {
namespace {

constexpr int kQuad = 4;  // lanes that share a head
// Of a block, the fastest over long caches of 4 to 8 warps and 144 to 168 registers.
constexpr int kWarps = 6, kRegisters = 168;

template <typename L>
struct Tile {
  static constexpr int kChunks = L::kDim / kElements;  // of a cache row
  static constexpr int kKeyChunks = kChunks / kQuad;   // a lane's of a key
  static constexpr int kValueChunks = kChunks / 8;     // a lane's of a value
  static constexpr int kSlots = 2048 / L::kDim;        // 8 chunks a lane, of keys and of values
  static constexpr int kEights = kSlots / 8, kSteps = kSlots / 16;
  typename L::Vector key[kEights][kKeyChunks], value[kSteps][kQuad][kValueChunks];

  // Past the last slot and past a row's end it is that slot and that end once more, as in
  // load_tile of decode_attention.cu.
  __device__ static const typename L::Element* chunk(const typename L::Element* cache, int slot,
                                                     int chunk, int num_slots, int head_dim) {
    return cache + int64_t{min(slot, num_slots - 1)} * head_dim +
           min(chunk * kElements, head_dim - kElements);
  }
  __device__ void load_keys(const typename L::Element* keys, int tile, int num_slots,
                            int head_dim) {
    const int c = threadIdx.x % kQuad, r = threadIdx.x % kWarpSize / kQuad;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < kKeyChunks; ++i) {
        key[n][i] = load_before_wait<typename L::Vector>(
            chunk(keys, tile * kSlots + n * 8 + r, c + i * kQuad, num_slots, head_dim));
      }
    }
  }
  __device__ void load_values(const typename L::Element* values, int tile, int num_slots,
                              int head_dim) {
    const int c = threadIdx.x % kQuad, r = threadIdx.x % kWarpSize / kQuad;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int u = 0; u < kQuad; ++u) {
        const int slot = tile * kSlots + s * 16 + u / 2 * 8 + 2 * c + u % 2;
#pragma unroll
        for (int h = 0; h < kValueChunks; ++h) {
          value[s][u][h] = load_before_wait<typename L::Vector>(
              chunk(values, slot, r + h * 8, num_slots, head_dim));
        }
      }
    }
  }
};

// What a lane has so far: the maximum of head r, the sum of the weights of its own slots, and of
// its chunks for heads 2c and 2c + 1 the outputs: [i] of elements 2i and 2i + 1, each for both
// heads.
template <typename L>
struct Attention {
  uint32_t query[Tile<L>::kKeyChunks][4];
  float max, sum, out[Tile<L>::kValueChunks][kElements / 2][4];
};

template <typename T>
__device__ float rounded(float x) {
  return Vec<T, 1>::from({{x}}).floats()[0];
}

// Nothing attended to yet, or the new key and value alone.
template <typename L>
__device__ void begin(Attention<L>& a, const Shared<L>& shared, float scale, bool with_new) {
  using T = typename L::Element;
  const int c = threadIdx.x % kQuad, r = threadIdx.x % kWarpSize / kQuad;
  const float *key = shared.input[L::kGroup], *value = shared.input[L::kGroup + 1];
  const float* query = shared.input[min(r, L::kGroup - 1)];
  float score = 0.f;
#pragma unroll
  for (int i = 0; i < Tile<L>::kKeyChunks; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int column = (c + i * kQuad) * kElements + 2 * w;
      a.query[i][w] = r < L::kGroup ? pack<T>(query[column], query[column + 1]) : 0;
      if (!with_new) continue;
      score += rounded<T>(query[column]) * rounded<T>(key[column]) +
               rounded<T>(query[column + 1]) * rounded<T>(key[column + 1]);
    }
  }
#pragma unroll
  for (int h = 0; h < Tile<L>::kValueChunks; ++h) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float x = with_new ? rounded<T>(value[(r + h * 8) * kElements + e]) : 0.f;
      a.out[h][e / 2][e % 2 * 2] = a.out[h][e / 2][e % 2 * 2 + 1] = x;
    }
  }
  a.max = kLowest, a.sum = 0.f;
  if (!with_new) return;
#pragma unroll
  for (int offset = 1; offset < kQuad; offset *= 2) {
    score += __shfl_xor_sync(0xffffffffu, score, offset);
  }
  a.max = score * scale;
  if (c == 0) a.sum = 1.f;
}

// By one warp: the new key and value, rounded, to their slot.
template <typename L>
__device__ void write_new(const Shared<L>& shared, int head_dim, typename L::Element* key_slot,
                          typename L::Element* value_slot) {
  using V = typename L::Vector;
  const int column = threadIdx.x % kWarpSize * kElements;
  if (column >= head_dim) return;
  const auto write = [&](const float* from, typename L::Element* to) {
    Floats<V::kSize> x;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) x[i] = from[column + i];
    store(to + column, V::from(x));
  };
  write(shared.input[L::kGroup], key_slot);
  write(shared.input[L::kGroup + 1], value_slot);
}

// The tile's scores, base 2: [2 i + j] is that of slot 2c + j of the i-th eight, -inf from
// `num_slots` on.
template <typename L>
__device__ void multiply(float (&scores)[2 * Tile<L>::kEights], const Attention<L>& a,
                         const Tile<L>& tile, int first_slot, int num_slots, float scale) {
#pragma unroll
  for (int n = 0; n < Tile<L>::kEights; ++n) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < Tile<L>::kKeyChunks; ++i) {
      const auto& key = tile.key[n][i].words;
      const auto& query = a.query[i];
      multiply_add<typename L::Element>(sum, query[0], 0, query[1], 0, key[0], key[1]);
      multiply_add<typename L::Element>(sum, query[2], 0, query[3], 0, key[2], key[3]);
    }
    const int slot = first_slot + n * 8 + 2 * static_cast<int>(threadIdx.x % kQuad);
    scores[2 * n] = slot < num_slots ? sum[0] * scale : -INFINITY;
    scores[2 * n + 1] = slot + 1 < num_slots ? sum[1] * scale : -INFINITY;
  }
}

// Scores become weights; what was attended to before shrinks with the maximum's growth.
template <typename L>
__device__ void weigh(Attention<L>& a, float (&scores)[2 * Tile<L>::kEights]) {
  float max = a.max;
#pragma unroll
  for (float score : scores) max = fmaxf(max, score);
#pragma unroll
  for (int offset = 1; offset < kQuad; offset *= 2) {
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
  }
  const float shrink = fast_exp2(a.max - max);
  a.max = max;
  a.sum *= shrink;
#pragma unroll
  for (float& score : scores) score = fast_exp2(score - max), a.sum += score;
  const int c = threadIdx.x % kQuad;
  const float first = __shfl_sync(0xffffffffu, shrink, 2 * c * kQuad),
              second = __shfl_sync(0xffffffffu, shrink, (2 * c + 1) * kQuad);
#pragma unroll
  for (auto& chunk : a.out) {
#pragma unroll
    for (auto& pair : chunk) {
      pair[0] *= first, pair[1] *= second, pair[2] *= first, pair[3] *= second;
    }
  }
}

template <typename L>
__device__ void add_values(Attention<L>& a, const float (&weights)[2 * Tile<L>::kEights],
                           const Tile<L>& tile) {
  using T = typename L::Element;
#pragma unroll
  for (int s = 0; s < Tile<L>::kSteps; ++s) {
    const float* w = weights + 4 * s;
    const uint32_t low = pack<T>(w[0], w[1]), high = pack<T>(w[2], w[3]);
#pragma unroll
    for (int h = 0; h < Tile<L>::kValueChunks; ++h) {
#pragma unroll
      for (int i = 0; i < kElements / 2; ++i) {
        const auto pair = [&](int u, int selector) {
          return __byte_perm(tile.value[s][u][h].words[i], tile.value[s][u + 1][h].words[i],
                             selector);
        };
        constexpr int kFirst = 0x5410, kSecond = 0x7632;
        multiply_add<T>(a.out[h][i], pair(0, kFirst), pair(0, kSecond), pair(2, kFirst),
                        pair(2, kSecond), low, high);
      }
    }
  }
}

// The warp's part of the outputs, to shared memory.
template <typename L>
__device__ void hand_in(Shared<L>& shared, const Attention<L>& a, int warp) {
  float sum = a.sum;
#pragma unroll
  for (int offset = 1; offset < kQuad; offset *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  const int c = threadIdx.x % kQuad, r = threadIdx.x % kWarpSize / kQuad;
  if (c == 0 && r < L::kGroup) shared.max_sum[warp][r] = {a.max, sum};
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int head = 2 * c + which;
    if (head >= L::kGroup) continue;
#pragma unroll
    for (int h = 0; h < Tile<L>::kValueChunks; ++h) {
      float* to = &shared.out[warp][head * L::kDim + (r + h * 8) * kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[e] = a.out[h][e / 2][e % 2 * 2 + which];
    }
  }
}

template <typename L>
__global__ void __maxnreg__(kRegisters)
    decode_attention_long_kernel(const __grid_constant__ DecodeAttention p, const Split split) {
  using T = typename L::Element;
  __shared__ Shared<L> shared;
  pdl_trigger();
  // Read before the wait, as in decode_attention_kernel.
  const Task task = find_task<L>(split);
  const int64_t length = load_before_wait(p.length),
                start = load_before_wait(p.start + task.sequence);
  if (length >= p.capacity) __trap();
  const int64_t first_of_all = first_slot(p, length, start);
  const int num_slots = static_cast<int>(length - first_of_all);
  const int num_tiles = (num_slots + Tile<L>::kSlots - 1) / Tile<L>::kSlots;
  if (task.blocks > 1) begin_cluster(&shared.barrier, cluster_bytes<L>(task.blocks));

  const int head_dim = split.head_dim;
  T* keys = cache_of<T>(p.key_cache, p.key_batch_stride, p.key_head_stride, task) +
            first_of_all * head_dim;
  T* values = cache_of<T>(p.value_cache, p.value_batch_stride, p.value_head_stride, task) +
              first_of_all * head_dim;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int step = kWarps * task.blocks, first = warp * task.blocks + task.rank;
  Tile<L> tile;
  if (first < num_tiles) {
    tile.load_keys(keys, first, num_slots, head_dim);
    tile.load_values(values, first, num_slots, head_dim);
  }
  take_input(shared, p, task, length - start);

  const float scale = p.scaling * kLog2e;
  Attention<L> a;
  begin(a, shared, scale, first == 0);
  if (first == 0 && task.round == 0) {
    const int64_t slot = int64_t{num_slots} * head_dim;
    write_new(shared, head_dim, keys + slot, values + slot);
  }
  for (int t = first; t < num_tiles; t += step) {
    const int next = t + step;
    float scores[2 * Tile<L>::kEights];
    multiply(scores, a, tile, t * Tile<L>::kSlots, num_slots, scale);
    if (next < num_tiles) tile.load_keys(keys, next, num_slots, head_dim);
    weigh(a, scores);
    add_values(a, scores, tile);
    if (next < num_tiles) tile.load_values(values, next, num_slots, head_dim);
  }
  hand_in(shared, a, warp);
  __syncthreads();
  finish(shared, p, task);
}

template <typename T, int kLanes, int kGroup>
void launch_layout(const DecodeAttention& p, void* stream) {
  using L = Layout<T, kLanes, kGroup>;
  launch_attention<L>(decode_attention_long_kernel<L>, p, kWarps, kWarps * Tile<L>::kSlots, stream);
}

template <typename T, int kLanes>
void launch_group(const DecodeAttention& p, void* stream) {
  p.num_heads / p.num_kv_heads <= 4 ? launch_layout<T, kLanes, 4>(p, stream)
                                    : launch_layout<T, kLanes, 8>(p, stream);
}

}  // namespace

template <typename T>
bool decode_attention_long(const DecodeAttention& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (most_slots(p) <= kLongCache || p.num_heads == p.num_kv_heads) return false;
    if (p.head_dim <= 64) return launch_group<T, 8>(p, stream), true;
    if (p.head_dim <= 128) return launch_group<T, 16>(p, stream), true;
  }
  return false;
}

template bool decode_attention_long<float>(const DecodeAttention&, void*);
template bool decode_attention_long<__half>(const DecodeAttention&, void*);
template bool decode_attention_long<__nv_bfloat16>(const DecodeAttention&, void*);

}  // namespace hf_fuse
