// What the kernels of decode_attention share: who attends to what, the rotation of the new rows,
// and how the parts of an output come together, over the warps of a block and the blocks of a
// cluster.
#pragma once
#include <cfloat>
#include <cmath>

#include "cluster.cuh"
#include "decode.cuh"
#include "decode.h"
#include "reduce.cuh"

namespace hf_fuse {

constexpr const char* kDecodeAttention = "decode_attention";  // the op's name in errors

namespace {

constexpr int kElements = 8;         // of a cache row, that a lane holds
constexpr int kMaxWarps = 8;         // of a block
constexpr int kLongCache = 1024;     // slots from which other kernels and blocks are faster
constexpr float kLowest = -FLT_MAX;  // the maximum of nothing: -inf would make NaN of exp(m - m)
constexpr float kLog2e = 1.4426950408889634f;

// kLanes_ lanes read a cache row with 16-byte loads, so a warp reads kSlotGroups rows at once, and
// kSlots times for a tile.
template <typename T, int kLanes_, int kGroup_, bool kCapped_ = false>
struct Layout {
  using Element = T;
  using Vector = Vec16<T>;
  static constexpr int kLanes = kLanes_, kSlotGroups = kWarpSize / kLanes;
  static constexpr int kGroup = kGroup_;                // query heads
  static constexpr bool kCapped = kCapped_;             // scores, softly
  static constexpr int kBuffers = kGroup == 1 ? 4 : 2;  // tiles a warp has in flight
  static constexpr int kVecs = kElements / Vector::kSize;
  using Row = Vector[kVecs];  // a lane's part of it
  static constexpr int kSlots = 2 / kVecs, kTile = kSlots * kSlotGroups;
  static constexpr int kDim = kLanes * kElements;  // head_dim and its padding
  static constexpr int kOutputs = kGroup * kDim;

  // The column of a lane's i-th element. Signed: unsigned, the columns would each get a register.
  __device__ static int column(int i) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    return (i / Vector::kSize * kLanes + lane) * Vector::kSize + i % Vector::kSize;
  }
  __device__ static int slot_group() { return static_cast<int>(threadIdx.x) % kWarpSize / kLanes; }
};

template <typename L>
struct Shared {
  alignas(16) float input[L::kGroup + 2][L::kDim];  // the queries, the new key, the new value
  float2 rotation[L::kDim / 2];                     // cos, sin
  alignas(16) float out[kMaxWarps][L::kOutputs];
  float2 max_sum[kMaxWarps][L::kGroup];
  // From each of the cluster's blocks, of the outputs that this block writes.
  float cluster_out[L::kOutputs];
  float2 cluster_max_sum[kMaxCluster][L::kGroup];
  uint64_t barrier;  // counts the bytes of those
};

// Blocks a cluster, rounds over the query heads of a key head, such heads.
struct Split {
  int cluster, rounds, group, head_dim;
};

// The first slot that is attended to.
__device__ inline int64_t first_slot(const DecodeAttention& p, int64_t length, int64_t start) {
  return p.window ? max(start, length + 1 - p.window) : start;
}
// How many there can be.
inline int64_t most_slots(const DecodeAttention& p) {
  return p.window ? std::min(p.window, p.capacity) : p.capacity;
}

// What some blocks of a cluster do: how many, the first one's rank and this one's among them.
struct Task {
  int64_t sequence;
  int kv_head, round, first_head, num_heads;
  int blocks, first_rank, rank;
};

// exp2f without its care for results below 2^-126, which doubles its cost.
__device__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Blocks of a cluster store into each other's shared memory, and the receiver's barrier counts the
// bytes: a barrier of the cluster would first wait for all that a block has under way.
__device__ void begin_cluster(uint64_t* barrier, int bytes) {
  if (threadIdx.x == 0) expect_stores(barrier, bytes);
  cluster_arrive_relaxed();
}

template <typename L>
__device__ Task find_task(const Split& split) {
  const int item = blockIdx.x / split.cluster;
  const int kv_head = item / split.rounds, round = item % split.rounds;
  const int done = round * L::kGroup;
  return {blockIdx.y,
          kv_head,
          round,
          kv_head * split.group + done,
          min(L::kGroup, split.group - done),
          split.cluster,
          0,
          static_cast<int>(blockIdx.x % split.cluster)};
}

// q of the task's heads, the new k and the new v to shared memory, zero where there is none.
template <typename L>
__device__ void read_input(Shared<L>& shared, const DecodeAttention& p, const Task& task) {
  constexpr int kWidth = 4;  // floats a copy
  const float* input = p.qkv + task.sequence * p.qkv_stride;
  for (int i = threadIdx.x * kWidth; i < (L::kGroup + 2) * L::kDim; i += blockDim.x * kWidth) {
    const int row = i / L::kDim, column = i % L::kDim;
    const int64_t offset = row < L::kGroup ? (task.first_head + row) * p.q_head_stride
                                           : (row == L::kGroup ? p.k_offset : p.v_offset) +
                                                 task.kv_head * p.kv_head_stride;
    if (column < p.head_dim && (row < task.num_heads || row >= L::kGroup)) {
      copy_async(&shared.input[row][column], input + offset + column);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) shared.input[row][column + j] = 0.f;
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
}

// The queries and the new key, in place.
template <typename L>
__device__ void rotate_input(Shared<L>& shared, int half) {
  for (int i = threadIdx.x; i < (L::kGroup + 1) * L::kDim / 2; i += blockDim.x) {
    const int row = i / (L::kDim / 2), column = i % (L::kDim / 2);
    if (column >= half) continue;
    float* x = &shared.input[row][column];
    const float first = x[0], second = x[half];
    const float cos = shared.rotation[column].x, sin = shared.rotation[column].y;
    x[0] = first * cos - second * sin;
    x[half] = second * cos + first * sin;
  }
  __syncthreads();
}

// The input, rotated, in shared memory; waits for it. The angles are worked out before.
template <typename L>
__device__ void take_input(Shared<L>& shared, const DecodeAttention& p, const Task& task,
                           int64_t position) {
  const int half = static_cast<int>(p.rotary_dim / 2);
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    float sin, cos;
    sincosf(static_cast<float>(position) * load_before_wait(p.inv_freq + i), &sin, &cos);
    shared.rotation[i] = {cos * p.rope_scale, sin * p.rope_scale};
  }
  pdl_wait();
  read_input(shared, p, task);
  if (half > 0) rotate_input(shared, half);
}

template <typename T>
__device__ T* cache_of(void* cache, int64_t batch_stride, int64_t head_stride, const Task& task) {
  return static_cast<T*>(cache) + task.sequence * batch_stride + task.kv_head * head_stride;
}

struct Output {
  float max, sum, out;
};

// One output from `count` parts, each relative to its own maximum.
template <typename L>
__device__ Output combine(const float* out, int stride, const float2 (*max_sum)[L::kGroup],
                          int head, int count) {
  Output total = {kLowest, 0.f, 0.f};
#pragma unroll 4
  for (int s = 0; s < count; ++s) total.max = fmaxf(total.max, max_sum[s][head].x);
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
    const float shrink = fast_exp2(max_sum[s][head].x - total.max);
    total.sum += shrink * max_sum[s][head].y;
    total.out += shrink * out[s * stride];
  }
  return total;
}

template <typename L>
__device__ void write_output(const DecodeAttention& p, const Task& task, int i, Output total) {
  using T = typename L::Element;
  const int head = i / L::kDim, column = i % L::kDim;
  if (head >= task.num_heads || column >= p.head_dim) return;
  const int64_t row = task.sequence * p.num_heads + task.first_head + head;
  const Floats<1> y = {{total.out / total.sum}};
  store(static_cast<T*>(p.out) + row * p.head_dim + column, Vec<T, 1>::from(y));
}

// What a block of the cluster is sent: of the outputs that it writes, and their heads.
template <typename L>
__device__ int cluster_bytes(int cluster) {
  const int owned = L::kOutputs / cluster, heads = max(1, owned / L::kDim);
  return cluster * (owned * int{sizeof(float)} + heads * int{sizeof(float2)});
}

// Combines the warps and, over a cluster, sends each output to the block that writes it.
template <typename L>
__device__ void finish(Shared<L>& shared, const DecodeAttention& p, const Task& task) {
  const int num_warps = blockDim.x / kWarpSize, owned = L::kOutputs / task.blocks;
  if (task.blocks > 1) cluster_wait();
  for (int i = threadIdx.x; i < L::kOutputs; i += blockDim.x) {
    const int head = i / L::kDim;
    const Output part = combine<L>(&shared.out[0][i], L::kOutputs, shared.max_sum, head, num_warps);
    if (task.blocks == 1) {
      write_output<L>(p, task, i, part);
      continue;
    }
    const int owner = i * task.blocks / L::kOutputs, place = i - owner * owned;
    const auto send = [&](float* ptr, float value) {
      store_cluster(ptr, &shared.barrier, task.first_rank + owner, value);
    };
    send(&shared.cluster_out[task.rank * owned + place], part.out);
    if (place % L::kDim == 0) {
      send(&shared.cluster_max_sum[task.rank][head].x, part.max);
      send(&shared.cluster_max_sum[task.rank][head].y, part.sum);
    }
  }
  if (task.blocks == 1) return;
  wait_cluster(&shared.barrier, 0);
  for (int place = threadIdx.x; place < owned; place += blockDim.x) {
    const int i = task.rank * owned + place;
    write_output<L>(p, task, i,
                    combine<L>(&shared.cluster_out[place], owned, shared.cluster_max_sum,
                               i / L::kDim, task.blocks));
  }
}

// Blocks of `warps`, which take `slots` at once: in clusters of up to two a multiprocessor in all,
// with slots for each.
template <typename L, typename Kernel>
void launch_attention(Kernel kernel, const DecodeAttention& p, int warps, int slots, void* stream) {
  const DeviceInfo& device = device_info(kDecodeAttention);
  const int64_t group = p.num_heads / p.num_kv_heads, rounds = ceil_div(group, L::kGroup);
  const int64_t clusters = p.batch * p.num_kv_heads * rounds;
  const int most = max_cluster(device);
  int cluster = 1;
  while (2 * cluster <= most && cluster * clusters <= device.num_sms &&
         cluster * slots < most_slots(p)) {
    cluster *= 2;
  }
  const Split split = {cluster, static_cast<int>(rounds), static_cast<int>(group),
                       static_cast<int>(p.head_dim)};
  launch(kDecodeAttention, kernel,
         step_grid(p.batch, p.num_kv_heads * rounds * cluster, p.batch, cluster), warps * kWarpSize,
         0, stream, p, split);
}

}  // namespace

// decode_attention_long.cu: where it takes the call, true.
template <typename T>
bool decode_attention_long(const DecodeAttention& p, void* stream);

// decode_attention_capped.cu: with a softcap.
template <typename T>
void decode_attention_capped(const DecodeAttention& p, void* stream);

}  // namespace hf_fuse
