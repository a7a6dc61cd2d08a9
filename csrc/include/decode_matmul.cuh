// out = epilogue(weights · x + biases) on tensor cores, for up to 32 sequences at once (decode.h).
//
// Bytes: the weights, once. x is read from L2, once for every 128 rows of weights, so at most half
// as many bytes as the weights. What the speed rests on:
// - The order of the sum over a row is free. So a lane's operand of a product, which is four words
//   of a row far apart, is taken as 16 bytes that lie together, of x alike: weights go from memory
//   into the registers that the tensor cores read, and x into and out of shared memory, in whole
//   16-byte pieces, without a bank conflict.
// - A warp takes 16 rows and has 4 or 8 steps of 32 elements of them under way, 64 KB and more a
//   multiprocessor, also from one 16 rows to the next; the first before the kernel waits for x.
// - x comes in parts, which barriers in shared memory count, so that a warp need not wait for the
//   slowest of its block at each of them.
// - Few rows would leave multiprocessors idle: then the warps of a block and the blocks of a
//   cluster share the row's elements, and send their sums to the block that finishes them.
// - Tiles are spread over all blocks that run at once: full blocks would be fewer, and leave a
//   multiprocessor with one where another has two.
// - Every sum has one order: the same input gives the same bits.
//
// A norm goes before it, in a kernel of its own: in every block it would be done again.
//
// Included by a file for each dtype, so that they compile side by side.
#pragma once
#include <algorithm>

#include "cluster.cuh"
#include "decode_rows.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace hf_fuse {
namespace {

constexpr int kMinBatch = 3;       // for fewer, the kernels without tensor cores, if they read once
constexpr int kMaxBatch = 32;      // at once
constexpr int kStep = 32;          // elements of a row: 16 bytes for each of four lanes
constexpr int kSumSteps = 4;       // that tensor cores add up, and a warp has of a part of x
constexpr int kTileRows = 16;      // of weights, that a warp takes at once
constexpr int kTileSequences = 8;  // of a product
constexpr int kBlockWarps = 8;
constexpr int kBlockThreads = kBlockWarps * kWarpSize;
constexpr int kMaxSplits = 8;  // blocks of a cluster
constexpr int kMinSteps = 4;   // of a warp
constexpr int kLead = 2;       // parts of x on their way before the first is used

// Parts of x whose weights a warp has under way: with many sequences fewer, so that several
// operands of x find room beside them.
__host__ __device__ constexpr int parts_ahead(int tiles) { return tiles > 2 ? 1 : 2; }
// Warps that share a tile's elements, at most, and parts of x in shared memory: two blocks find
// room in it.
__host__ __device__ constexpr int most_shares(int tiles) {
  return tiles == 1 ? 4 : tiles == 2 ? 2 : 1;
}
__host__ __device__ constexpr int part_stages(int tiles, int shares) {
  return tiles * shares > 2 ? 3 : 4;
}
constexpr int kBlocksOfMultiprocessor = 2, kRegisters = 128;  // of a thread, so that there are

// Sums of 16 rows and 8 sequences that a block of a cluster finishes.
__host__ __device__ constexpr int slots_of(int tiles, int splits) {
  return kBlockWarps * tiles > splits ? kBlockWarps * tiles / splits : 1;
}

template <typename T>
struct Matmul {
  DecodeLinear p;
  RowTable<T> all;
  int units, steps, log_splits;
  int block_tiles, longer;  // tiles of 16 rows of a cluster; the first `longer` have one more
};

// sum += 16 rows of weights, of which w has two and the other lanes the rest, times a part of x of
// up to `steps`. Tensor cores cut off what they add to a sum, so theirs are of a few steps only: as
// many whatever the batch, so that a sequence is as exact alone as among others.
template <typename T, int kTiles>
__device__ void multiply_part(float (&sum)[kTiles][4], const Vec16<T> (&w)[kSumSteps][2],
                              const uint4* x, int steps) {
  float part[kTiles][4] = {};
#pragma unroll
  for (int s = 0; s < kSumSteps; ++s) {
    if (s >= steps) break;
    const auto &a = w[s][0].words, &b = w[s][1].words;
    uint4 v[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) v[i] = x[(s * kTiles + i) * kTileSequences * 4];
    // No product waits for the one before.
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      multiply_add<T>(part[i], a[0], b[0], a[1], b[1], v[i].x, v[i].y);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      multiply_add<T>(part[i], a[2], b[2], a[3], b[3], v[i].z, v[i].w);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[i][e] += part[i][e];
  }
}

__device__ inline void add_to(float4& y, const float4& v) {
  y.x += v.x, y.y += v.y, y.z += v.z, y.w += v.w;
}
__device__ inline void add_to(float (&y)[4], const float4& v) {
  y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
}

// y = c if `take`. In C++ the compiler would make an array in memory of them all.
__device__ inline void take_if(bool take, const float (&c)[4], float4& y) {
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %8, 0;\n"
      "selp.f32 %0, %4, %0, p;\nselp.f32 %1, %5, %1, p;\n"
      "selp.f32 %2, %6, %2, p;\nselp.f32 %3, %7, %3, p;\n}"
      : "+f"(y.x), "+f"(y.y), "+f"(y.z), "+f"(y.w)
      : "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "r"(static_cast<int>(take)));
}

// What a lane has of a product of 16 rows and 8 sequences: of rows lane / 4 and 8 more, each of
// sequences lane % 4 * 2 and the next. Gated, the tile's first 8 rows are of the first weight and
// the others the second's rows of the same units.
template <typename T>
struct Outputs {
  const Matmul<T>& m;
  int unit[2];
  Extras<T, Layout::kAny> extras[2];
  float old[4];

  __device__ static int unit_of(const Matmul<T>& m, int tile, int half) {
    const int lane = threadIdx.x % kWarpSize;
    return m.all.pair ? tile * (kTileRows / 2) + lane / 4
                      : tile * kTileRows + half * (kTileRows / 2) + lane / 4;
  }
  __device__ Outputs(const Matmul<T>& m, int tile)
      : m(m),
        unit{unit_of(m, tile, 0), unit_of(m, tile, 1)},
        extras{{m.all, min(unit[0], m.units - 1)}, {m.all, min(unit[1], m.units - 1)}} {}

  __device__ bool present(int i, int sequence) const {
    return sequence < m.p.batch && unit[i / 2] < m.units && (i < 2 || !m.all.pair);
  }
  __device__ int64_t index(int i, int sequence) const {
    return int64_t{sequence} * m.units + unit[i / 2];
  }
  __device__ static int sequence_of(int tile, int i) {
    return tile * kTileSequences + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
  __device__ void load_old(int tile) {
    if (m.p.epilogue != Epilogue::kAdd) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sequence = sequence_of(tile, i);
      if (present(i, sequence))
        old[i] = load_float(static_cast<const float*>(m.p.out) + index(i, sequence));
    }
  }
  __device__ void write(int tile, const float4& y) {
    const float v[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sequence = sequence_of(tile, i);
      Extras<T, Layout::kAny> with = extras[i / 2];
      if (m.p.epilogue == Epilogue::kAdd) with.old = old[i];
      if (present(i, sequence)) write_output(m.p, index(i, sequence), v[i], v[i % 2 + 2], with);
    }
  }
};

// kTiles: of 8 sequences, as many as the batch needs. A block takes up to 8 / kShares tiles of 16
// rows at a time, kShares warps each, and goes through its part of their elements once; with
// several shares it takes no more tiles than that.
template <typename T, int kTiles, int kShares>
__global__ void __maxnreg__(kRegisters) decode_matmul_kernel(const __grid_constant__ Matmul<T> m) {
  using V = Vec16<T>;
  constexpr int kAhead = parts_ahead(kTiles), kStages = part_stages(kTiles, kShares);
  constexpr int kPartSteps = kShares * kSumSteps, kPartLanes = 4 * kPartSteps;
  constexpr int kTilesAtOnce = kBlockWarps / kShares;
  constexpr int kStepPieces = kTiles * kTileSequences * 4;  // of 16 bytes: [step][sequence][4]
  constexpr int kPartPieces = kPartSteps * kStepPieces, kXPieces = kStages * kPartPieces;
  // From a cluster's other blocks: [block][sum][lane]. Where x was, if that takes much room.
  constexpr int kSums = (kMaxSplits - 1) * slots_of(kTiles, kMaxSplits) * kWarpSize;
  constexpr bool kSumsInX = kTiles * kShares > 2 && kTiles > 1;
  static_assert(!kSumsInX || kSums <= kXPieces);
  __shared__ uint4 shared[kSumsInX ? kXPieces : kXPieces + kSums];
  __shared__ uint64_t full[kStages], empty[kStages], received;
  float4* const sums = reinterpret_cast<float4*>(shared + (kSumsInX ? 0 : kXPieces));
  pdl_trigger();
  const DecodeLinear& p = m.p;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int place = warp / kShares, share = warp % kShares;  // the tile's, and of its elements
  const int group = lane / 4, quarter = lane % 4;
  const int splits = 1 << m.log_splits, rank = blockIdx.x & (splits - 1);
  const int block = blockIdx.x >> m.log_splits;
  const int first_step = (m.steps * rank) >> m.log_splits;
  const int steps = ((m.steps * (rank + 1)) >> m.log_splits) - first_step;
  const int parts = (steps + kPartSteps - 1) / kPartSteps;
  const int own = steps - share * kSumSteps;  // from the warp's first of a part on
  const int begin = block * m.block_tiles + min(block, m.longer);
  const int end = begin + m.block_tiles + (block < m.longer);

  const T* row[2];  // the lane's elements of the two rows it loads of a tile
  const auto seek = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = min(Outputs<T>::unit_of(m, tile, i), m.units - 1);
      row[i] = m.all.row(unit, m.all.pair ? i : 0) + (first_step + share * kSumSteps) * kStep +
               quarter * V::kSize;
    }
  };
  V w[kAhead][kSumSteps][2];
  seek(begin + place);
#pragma unroll
  for (int a = 0; a < kAhead; ++a) {
    const int there = begin + place < end ? own - a * kPartSteps : 0;
#pragma unroll
    for (int s = 0; s < kSumSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_weights<true>(w[a][s][i], row[i] + (a * kPartSteps + s) * kStep, s < there);
    }
  }

  // Sum j of a tile, of its 16 rows and 8 sequences, has the number place * kTiles + j. Of a
  // cluster, block number % splits adds it up and finishes it.
  const int first_sum = (rank - place * kTiles) & (splits - 1);  // of this warp's
  const auto sums_of = [&](int block, int warps) {
    return (warps * kTiles - block + splits - 1) >> m.log_splits;
  };
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&full[i], kBlockThreads);
      init_barrier(&empty[i], kBlockThreads);
    }
    if (splits > 1) {
      expect_stores(&received, (splits - 1) * sums_of(rank, end - begin) * kWarpSize * 16);
    }
  }
  __syncthreads();
  if (splits > 1 && !kSumsInX) cluster_arrive_relaxed();

  // The pieces of a part of x that a thread copies: one of each of kRounds sequences.
  constexpr int kRoundSequences = kBlockThreads / kPartLanes;
  static_assert(kBlockThreads % kPartLanes == 0);
  constexpr int kRounds = (kTiles * kTileSequences + kRoundSequences - 1) / kRoundSequences;
  const int piece = threadIdx.x % kPartLanes, sequence = threadIdx.x / kPartLanes;
  const int size = static_cast<int>(p.size), batch = static_cast<int>(p.batch);
  const T* const x =
      static_cast<const T*>(p.x) + sequence * size + first_step * kStep + piece * V::kSize;
  uint4* const x_to = shared + piece / 4 * kStepPieces + sequence * 4 + piece % 4;
  int loads_left = (end - begin + kTilesAtOnce - 1) / kTilesAtOnce * parts, part_to_load = 0;
  int load_stage = 0, load_parity = 1;
  const auto load_x = [&] {
    if (loads_left == 0) return;
    wait_for(&empty[load_stage], load_parity);  // at first it is
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      const int row = n * kRoundSequences;
      if (sequence + row < batch && part_to_load * kPartSteps + piece / 4 < steps)
        copy_async(x_to + load_stage * kPartPieces + row * 4,
                   x + row * size + part_to_load * (kPartSteps * kStep));
    }
    arrive_after_copies(&full[load_stage]);
    --loads_left;
    if (++part_to_load == parts) part_to_load = 0;
    if (++load_stage == kStages) load_stage = 0, load_parity ^= 1;
  };
  pdl_wait();
#pragma unroll
  for (int i = 0; i < kLead; ++i) load_x();

  int stage = 0, parity = 0;
  for (int first = begin; first < end; first += kTilesAtOnce) {
    const int tile = first + place;
    bool active = tile < end;
    float sum[kTiles][4] = {};
    for (int part = 0; part < parts; part += kAhead) {
      int ahead = 0;  // steps there are to load
      if (part + kAhead < parts) {
#pragma unroll
        for (int i = 0; i < 2; ++i) row[i] += kAhead * kPartSteps * kStep;
        if (active) ahead = own - (part + kAhead) * kPartSteps;
      } else {
        seek(tile + kTilesAtOnce);
        if (tile + kTilesAtOnce < end) ahead = own;
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (part + a < parts) {
          wait_for(&full[stage], parity);
          const uint4* x_part = shared + stage * kPartPieces + share * (kSumSteps * kStepPieces) +
                                group * 4 + quarter;
          if (active) multiply_part<T>(sum, w[a], x_part, own - (part + a) * kPartSteps);
          arrive(&empty[stage]);
          if (++stage == kStages) stage = 0, parity ^= 1;
          load_x();
        }
#pragma unroll
        for (int s = 0; s < kSumSteps; ++s) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            load_weights<false>(w[a][s][i], row[i] + (a * kPartSteps + s) * kStep,
                                s < ahead - a * kPartSteps);
        }
      }
    }

    if constexpr (kShares > 1) {  // their sums meet where x was
      float4* const part = reinterpret_cast<float4*>(shared) + warp * (kTiles * kWarpSize) + lane;
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (share > 0) part[j * kWarpSize] = {sum[j][0], sum[j][1], sum[j][2], sum[j][3]};
      __syncthreads();
      active &= share == 0;
#pragma unroll
      for (int from = 1; from < kShares; ++from) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (active) add_to(sum[j], part[(from * kTiles + j) * kWarpSize]);
      }
    }
    Outputs<T> outputs(m, tile);
    if (active && first_sum < kTiles) outputs.load_old(first_sum);
    const int slots = slots_of(kTiles, splits);
    if (splits > 1) {
      if (kSumsInX) cluster_arrive_relaxed();
      __syncwarp();
      cluster_wait();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int number = place * kTiles + j, to = number & (splits - 1);
        const int slot = (rank - (rank > to)) * slots + (number >> m.log_splits);
        if (active && to != rank)
          store_cluster(sums + slot * kWarpSize + lane, &received, to,
                        {sum[j][0], sum[j][1], sum[j][2], sum[j][3]});
      }
    }
    if (!active) continue;
    if (splits > 1 && first_sum < kTiles) wait_for(&received, 0);
#pragma unroll 1
    for (int j = first_sum; j < kTiles; j += splits) {
      if (j != first_sum) outputs.load_old(j);
      float4 own = {}, y = {};
#pragma unroll
      for (int k = 0; k < kTiles; ++k) take_if(k == j, sum[k], own);
      const float4* at = sums + ((place * kTiles + j) >> m.log_splits) * kWarpSize + lane;
#pragma unroll 1
      for (int from = 0; from < splits; ++from) {
        float4 part = own;
        if (from != rank) part = *at, at += slots * kWarpSize;
        add_to(y, part);
      }
      outputs.write(j, y);
    }
  }
}

// out[b] = norm(x[b]), rounded to the dtype, as transformers' layers do. A block a sequence; x is
// read once, and stays in registers.
template <typename T, int kLoads>
__global__ void decode_norm_kernel(const __grid_constant__ DecodeLinear p) {
  using V = Vec16<T>;
  __shared__ float means[1][kMaxWarps], squares[1][kMaxWarps];
  pdl_trigger();
  const auto offset = [](int i) {
    return static_cast<int>(threadIdx.x + i * blockDim.x) * V::kSize;
  };
  const int size = static_cast<int>(p.size);
  const T* const norm_weight = static_cast<const T*>(p.norm_weight);
  const T* const norm_bias = static_cast<const T*>(p.norm_bias);
  V weight[kLoads], bias[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    bias[i] = {};
    load_weights<true>(weight[i], norm_weight + offset(i), offset(i) < size);
    if (norm_bias) load_weights<true>(bias[i], norm_bias + offset(i), offset(i) < size);
  }
  pdl_wait();
  const float* const row = static_cast<const float*>(p.x) + blockIdx.x * p.size;
  Floats<V::kSize> x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    x[i] = {};
    if (offset(i) >= size) continue;
#pragma unroll
    for (int e = 0; e < V::kSize; e += 4) {
      const auto part = load<Vec16<float>>(row + offset(i) + e).floats();
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i][e + k] = part[k];
    }
  }
  const float inv_size = 1.f / static_cast<float>(size);
  if (!p.rms) {
    float sum[1] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) sum[0] += x[i][e];
    }
    row_sum(sum, means, blockDim.x);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (offset(i) >= size) break;
#pragma unroll
      for (int e = 0; e < V::kSize; ++e) x[i][e] -= sum[0] * inv_size;
    }
  }
  float square[1] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
#pragma unroll
    for (int e = 0; e < V::kSize; ++e) square[0] = fmaf(x[i][e], x[i][e], square[0]);
  }
  row_sum(square, squares, blockDim.x);
  const float scale = rsqrtf(square[0] * inv_size + static_cast<float>(p.eps));
  T* const out = static_cast<T*>(p.workspace) + blockIdx.x * p.size;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (offset(i) >= size) break;
    const auto g = weight[i].floats(), b = bias[i].floats();
    Floats<V::kSize> y;
#pragma unroll
    for (int e = 0; e < V::kSize; ++e) y[e] = x[i][e] * scale * g[e] + b[e];
    store(out + offset(i), V::from(y));
  }
}

// The norm of p's rows in the workspace; p afterwards reads them.
template <typename T>
void run_norm(DecodeLinear* p, void* stream) {
  constexpr int kMaxNormThreads = 512;
  const int64_t chunks = p->size / Vec16<T>::kSize;
  const auto launch_loads = [&](auto kernel, int loads) {
    const int64_t threads = round_up(ceil_div(chunks, loads), kWarpSize);
    launch(kDecodeLinear, kernel, step_grid(p->batch, p->batch), static_cast<unsigned>(threads), 0,
           stream, *p);
  };
  if (chunks <= kMaxNormThreads) {
    launch_loads(decode_norm_kernel<T, 1>, 1);
  } else if (chunks <= 2 * kMaxNormThreads) {
    launch_loads(decode_norm_kernel<T, 2>, 2);
  } else {
    launch_loads(decode_norm_kernel<T, 4>, 4);
  }
  p->x = p->workspace;
  p->norm_weight = p->norm_bias = nullptr;
}

// How the tiles of 16 rows are shared out: to `blocks`, in clusters of 1 << log_splits that share
// the elements of a row, of which each block has a part for every one of `shares` warps.
struct Shares {
  int shares, log_splits;
  int64_t clusters;

  Shares(int kTiles, int shares, int64_t tiles, int64_t steps, const DeviceInfo& device)
      : shares(shares), log_splits(0) {
    // As many blocks as there is room for at once: more warps hide each other's products.
    const int64_t room = kBlocksOfMultiprocessor * device.num_sms;
    clusters = std::min(ceil_div(tiles * shares, kBlockWarps), room);
    if (device.major < 9) return;  // which has no clusters
    // The blocks of a larger cluster have to find room on neighbours, and the sums of more blocks
    // meet later: with few sequences, where products take no time, only where the GPU would be
    // left half empty without them.
    const auto room_for = [&](int splits) {
      return splits > 2 && kTiles <= 2 ? room * 3 / 4 : room;
    };
    for (int splits = 2; splits <= kMaxSplits && kMinSteps * shares * splits <= steps;
         splits *= 2) {
      if (clusters * splits > room_for(splits)) break;
      ++log_splits;
    }
    if (log_splits < 2) clusters = std::min(tiles, room >> log_splits);
  }

  int64_t warps(int64_t tiles) const { return tiles * shares << log_splits; }
  bool in_one_pass(int64_t tiles) const { return tiles * shares <= clusters * kBlockWarps; }
};

template <typename T, int kTiles>
void launch_matmul(const DecodeLinear& p, int64_t units, void* stream) {
  const DeviceInfo& device = device_info(kDecodeLinear);
  const int64_t pair = p.epilogue == Epilogue::kGated;
  const int64_t tiles = ceil_div(units << pair, kTileRows), steps = p.size / kStep;
  Shares best(kTiles, 1, tiles, steps, device);
  for (int shares = 2; shares <= most_shares(kTiles); shares *= 2) {
    const Shares other(kTiles, shares, tiles, steps, device);
    if (other.in_one_pass(tiles) && other.warps(tiles) > best.warps(tiles)) best = other;
  }
  const Matmul<T> m = {p,
                       RowTable<T>(p),
                       static_cast<int>(units),
                       static_cast<int>(steps),
                       best.log_splits,
                       static_cast<int>(tiles / best.clusters),
                       static_cast<int>(tiles % best.clusters)};
  const Grid grid = step_grid(p.batch, best.clusters << best.log_splits, 1, 1 << best.log_splits);
  const auto run = [&](auto kernel) {
    launch(kDecodeLinear, kernel, grid, kBlockThreads, 0, stream, m);
  };
  if constexpr (most_shares(kTiles) > 2) {
    if (best.shares == 4) return run(decode_matmul_kernel<T, kTiles, 4>);
  }
  if constexpr (most_shares(kTiles) > 1) {
    if (best.shares == 2) return run(decode_matmul_kernel<T, kTiles, 2>);
  }
  run(decode_matmul_kernel<T, kTiles, 1>);
}

}  // namespace

template <typename T>
bool DecodeMatmulOf<T>::can_run(const DecodeLinear& p) {
  const bool read_twice = p.batch == 2 && p.size / Vec16<T>::kSize > kMaxChunksOfTwo;
  return (p.batch >= kMinBatch || read_twice) && p.size % kStep == 0 && p.size <= kMaxMatmulSize &&
         readable_by_vectors<T>(p);
}

template <typename T>
void DecodeMatmulOf<T>::run(const DecodeLinear& p, int64_t units, void* stream) {
  for (int64_t first = 0; first < p.batch; first += kMaxBatch) {
    DecodeLinear part =
        sequences<T>(p, units, first, std::min<int64_t>(p.batch - first, kMaxBatch));
    if (part.norm_weight) run_norm<T>(&part, stream);
    const int64_t tiles = ceil_div(part.batch, kTileSequences);
    if (tiles <= 1)
      launch_matmul<T, 1>(part, units, stream);
    else if (tiles <= 2)
      launch_matmul<T, 2>(part, units, stream);
    else
      launch_matmul<T, 4>(part, units, stream);
  }
}

}  // namespace hf_fuse
