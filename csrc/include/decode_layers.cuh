// All layers of a step for one sequence in one kernel (decode.h).
//
// Bytes: the weights, once. A chain of kernels leaves the memory idle between two of them, for the
// last loads of one are back before the next one's first are asked for, and with small layers that
// is a third of the time. Here a block stays on its multiprocessor, and some of its warps, the
// loaders, fill a ring of shared memory with the weights that come next, whatever the others, the
// workers, wait for. What the design rests on:
// - Blocks wait for all others twice a layer. A cluster of blocks has a head: each works out a part
//   of q, k and v, attends to a part of the slots, and multiplies all of the head's output by a
//   part of the rows of attention_out. Of the MLP a cluster has some units of the middle, and
//   multiplies them by the same columns of mlp_out. Within a cluster blocks store into each other's
//   memory.
// - So an output of attention_out and of mlp_out is a sum over clusters. It is added up in L2, by
//   integers, whose sum does not depend on the order; each adds one to the low bits too, and a
//   reader knows by them that a sum is complete: nobody waits for stores to be seen.
// - Loads wait behind those asked for before. So at most kUnderWay bytes are under way, enough for
//   the memory's full speed; the small vectors and the caches' first slots of a layer are asked for
//   a layer ahead, into L2, which weights leave first.
// - Products are done on tensor cores, for a warp's instructions would take longer than the loads:
//   8 rows of weights are mma's a, the columns of b the dtype's rounding of x and what that left.
//   Code is run once a layer and comes from a small cache: short code is fast code.
#pragma once
#include <algorithm>

#include "activation.cuh"
#include "decode_tiles.cuh"
#include "mma.cuh"
#include "ring.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kDecodeLayers = "decode_layers";
constexpr int kWarps = 8, kWorkers = kWarps * kWarpSize, kLoaders = 128;
constexpr int kCluster = 4;
constexpr int kHead = 64, kHeadShare = kHead / kCluster, kHeadChunks = kHead / 8;
constexpr int kTileRows = 8;
constexpr int kPad = 64;              // bytes between rows of x's size: two rows are read at once
constexpr int kUnderWay = 48 * 1024;  // bytes of a block
constexpr int kMaxSlots = 16, kLayersInShared = 48;
constexpr int kQuarter = 4;  // lanes that read 64 bytes of a row
constexpr int kGroup = 32;   // elements of them
// A sum: fixed point above, below how many blocks have added to it.
constexpr int kCountBits = 8;
constexpr float kOne = 4294967296.f, kLargest = 131072.f;

// What differs from block to block.
struct Part {
  int cluster, rank;
  bool has_head;
  int first_unit, units;  // of the middle: the cluster's
  int first_row, rows;    // and of them the block's
};

// Where the units of a cluster begin: groups are shared out evenly.
__host__ __device__ inline int first_unit_of(int cluster, int64_t middle, int clusters) {
  return static_cast<int>(cluster * (middle / kGroup) / clusters) * kGroup;
}

// What the workspace holds: the sums; how many blocks have come to the last slot of attention_out,
// and of mlp_out, of all layers so far, a hint when to look at the sums; whether one was out of
// range.
struct Sums {
  int64_t* sets;
  unsigned *done, *invalid;
  int size;
  __device__ Sums(void* workspace, int64_t size)
      : sets(static_cast<int64_t*>(workspace)),
        done(reinterpret_cast<unsigned*>(sets + kSumSets * size)),
        invalid(done + 2),
        size(static_cast<int>(size)) {}
  __device__ int64_t* of(int phase) const { return sets + (phase & (kSumSets - 1)) * size; }
};

struct LayersPlan {
  DecodeLayers p;
  int slots, under_way;  // of the ring: there are, and are loaded at once
};

template <typename T, int kGroups, int kUnitGroups>
struct LayersShared {
  using L = Layout<T, kHeadChunks, 1>;
  // Of a block's share of q, k and v, or of the middle.
  static constexpr int kRows = kWorkers / kCluster;
  static_assert(kRows >= 3 * kHeadShare && kRows >= kUnitGroups * kGroup / kCluster);
  uint64_t full[kMaxSlots], empty[kMaxSlots];
  uint64_t got_input, got_attention, got_middle;  // from the cluster's blocks
  Shared<L> head;                                 // q, k, v; what each warp attended to
  // The norm's result and what its rounding left: pairs 0 and 2 of a chunk, then 1 and 3.
  alignas(16) uint2 x[2][kGroups * kWarps * kQuarter][2];
  float2 moments[kWarps];
  alignas(16) float sums[kRows][kWarps];
  alignas(16) float attended_of[kCluster][kHead], attended[kHead], middle[kUnitGroups * kGroup];
  float2 max_sum[kCluster];
  uint4 tile[2][L::kSlots][kWorkers];  // of keys and values, each lane its own
  DecodeLayers::Layer layers[kLayersInShared];
};

// Columns are stored without gaps. Where rows are a multiple of 128 bytes apart, odd ones have the
// groups of every pair exchanged, so that a warp reads from all banks.
__device__ inline bool exchanged(int row, int chunks) { return row % 2 && chunks % 8 == 0; }
__device__ inline int tiles_of(int slot_bytes, int chunks) {
  const int tiles = slot_bytes / (chunks * kTileRows * 16);
  return chunks > kHeadChunks ? min(tiles, kWarps) : tiles;
}

// The warps that fill the ring.
template <typename T, typename S>
struct Loader {
  const DecodeLayers& p;
  const Sums& all;
  S& shared;
  const Part& part;
  char* const ring;
  const int slots, under_way, slot_bytes, size;
  const int me = threadIdx.x - kWorkers;
  const uint64_t policy = evict_first();
  Cursor to, landed;
  int filled = 0;

  // When the slot is free and few are under way.
  __device__ uint32_t begin() {
    if (filled >= slots) wait_for(&shared.empty[to.slot], to.phase ^ 1);
    if (filled >= under_way) wait_for(&shared.full[landed.slot], landed.phase), landed.next(slots);
    return shared_address(ring + to.slot * slot_bytes);
  }
  __device__ void end() { to.next(slots), ++filled; }

  // Rows of `size`, kTileRows a slot.
  __device__ void load_rows(const T* weight, int rows) {
#pragma unroll 1
    for (int first = 0; first < rows; first += kTileRows) {
      const uint32_t slot = begin();
      uint64_t* full = &shared.full[to.slot];
      const int count = min(kTileRows, rows - first), bytes = size * static_cast<int>(sizeof(T));
      if (me == 0) expect_bytes(full, count * bytes);
      if (me < count)
        copy_bulk(slot + me * (bytes + kPad), weight + int64_t{first + me} * size, bytes, full,
                  policy);
      arrive(full);
      end();
    }
  }

  // Chunks of rows, as many tiles a slot as fit.
  __device__ void load_columns(const T* weight, int64_t stride, int rows, int chunks) {
    const int at_once = tiles_of(slot_bytes, chunks) * kTileRows;
    const int step = kLoaders / chunks, row = me / chunks, chunk = me % chunks;
    const T* from = weight + row * stride + chunk * 8;
#pragma unroll 1
    for (int first = 0; first < rows; first += at_once) {
      const uint32_t slot = begin();
      const T* at = from + first * stride;
      const int count = row < step ? min(at_once, rows - first) : 0;
#pragma unroll 4
      for (int i = row; i < count; i += step, at += step * stride)
        copy_once(slot + (i * chunks + (exchanged(i, chunks) ? chunk ^ kQuarter : chunk)) * 16, at,
                  policy);
      arrive_after_copies(&shared.full[to.slot]);
      end();
    }
  }

  // All that the workers read elsewhere, to L2.
  __device__ void prefetch_layer(int l, int64_t start, int64_t num_slots) {
    constexpr int kLine = 128;
    const DecodeLayers::Layer& y = shared.layers[l];
    const void* const vectors[8] = {
        y.attention_norm_weight, y.attention_norm_bias, y.attention_out_bias, y.mlp_norm_weight,
        y.mlp_norm_bias,         y.mlp_out_bias,        y.qkv_bias,           y.mlp_in_bias};
    const int small = size, middle = static_cast<int>(p.middle);
    int line = blockIdx.x * kLoaders + me;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int bytes = (i < 6 ? small : i == 6 ? 3 * small : middle) * static_cast<int>(sizeof(T));
      if (line >= 0 && line * kLine < bytes)
        prefetch(static_cast<const char*>(vectors[i]) + line * kLine);
      line -= (bytes + kLine - 1) / kLine;
    }
    if (!part.has_head) return;
    constexpr int kTileSlots = S::L::kTile;
    const int64_t head = part.cluster * p.capacity;
    for (int i = me; i < 2 * kWarps * kTileSlots; i += kLoaders) {
      const int64_t slot =
          (i / 2 / kTileSlots * kCluster + part.rank) * kTileSlots + i / 2 % kTileSlots;
      const void* cache = i % 2 ? y.values : y.keys;
      if (slot < num_slots) prefetch(static_cast<const T*>(cache) + (head + start + slot) * kHead);
    }
  }

  // A part of the sums of two phases, before its workers come to the phases before, and so before
  // any block adds to them. Loaders are fewer layers ahead than there are sets for.
  __device__ void clear_sums(int phase) {
    const int i = me * gridDim.x + blockIdx.x;
    if (i >= 2 * size) return;
    all.of(phase + (i >= size))[i % size] = 0;
    __threadfence();
  }

  __device__ void run() {
    const int64_t start = *p.start, num_slots = *p.length - start;
    const int rows = size / kCluster, middle = static_cast<int>(p.middle);
#pragma unroll 1
    for (int l = 0; l < p.num_layers; ++l) {
      const DecodeLayers::Layer& y = shared.layers[l];
      if (l + 1 < p.num_layers) {
        prefetch_layer(l + 1, start, num_slots);
        clear_sums(2 * l + 2);
      }
      if (part.has_head) {
        const T* qkv = static_cast<const T*>(y.qkv) +
                       int64_t{part.cluster * kHead + part.rank * kHeadShare} * size;
#pragma unroll 1
        for (int i = 0; i < 3; ++i) load_rows(qkv + int64_t{i * size} * size, kHeadShare);
        load_columns(static_cast<const T*>(y.attention_out) + int64_t{part.rank * rows} * size +
                         part.cluster * kHead,
                     size, rows, kHeadChunks);
      }
      load_rows(static_cast<const T*>(y.mlp_in) + int64_t{part.first_row} * size, part.rows);
      load_columns(
          static_cast<const T*>(y.mlp_out) + int64_t{part.rank * rows} * middle + part.first_unit,
          middle, rows, part.units / 8);
    }
    copy_async_commit();
    copy_async_wait<0>();
  }
};

// The warps that multiply. Its members are a thread's registers.
template <typename T, int kGroups, int kUnitGroups, typename S>
struct Worker {
  using V = Vec16<T>;
  using L = typename S::L;
  // That the cluster's blocks store into each one: q, k and v; what they attended to.
  static constexpr int kInputBytes = 3 * kHead * sizeof(float);
  static constexpr int kAttentionBytes = kCluster * (kHead + 2) * sizeof(float);
  const DecodeLayers& p;
  const Sums& all;
  S& shared;
  const Part& part;
  const char* const ring;
  const int slots, slot_bytes, size, clusters;
  const int t = threadIdx.x, lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  // Of a tile a lane reads row `row`, of every 64 bytes the 16 from `quarter` on.
  const int row = lane / kQuarter, quarter = lane % kQuarter;
  const bool owner = static_cast<int>(threadIdx.x) * 8 < size;  // of 8 elements of the residual
  Cursor from;
  float residual[8] = {}, mean = 0.f;
  int added = 0;  // phases whose sums are in the residual
  uint32_t x[kGroups][2];

  __device__ void sync() const { asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory"); }

  __device__ void release() {
    arrive(&shared.empty[from.slot]);
    from.next(slots);
  }

  __device__ V vector(const void* v) const {
    return owner ? load<V>(static_cast<const T*>(v) + t * 8) : V{};
  }

  // A token or a position outside its table gives NaN, as in decode_embed.
  __device__ void embed(int64_t position) {
    const int64_t token = *p.token;
    const bool there = token >= 0 && token < p.vocab && position >= 0 && position < p.num_positions;
    if (!owner) return;
    const T* const rows[2] = {static_cast<const T*>(p.table) + (there ? token : 0) * size,
                              static_cast<const T*>(p.positions) + (there ? position : 0) * size};
    const auto a = load<V>(rows[0] + t * 8).floats(), b = load<V>(rows[1] + t * 8).floats();
#pragma unroll
    for (int i = 0; i < 8; ++i) residual[i] = there ? a[i] + b[i] : NAN;
  }

  // residual += the sums of a phase, once all blocks have added to them, and their bias.
  __device__ void add_sums(int phase) {
    const DecodeLayers::Layer& y = shared.layers[phase / 2];
    const V bias = vector(phase % 2 ? y.mlp_out_bias : y.attention_out_bias);
    const int adding = phase % 2 ? clusters : static_cast<int>(p.num_heads);
    if (t == 0) {
      const unsigned all_done = (phase / 2 + 1) * adding * kCluster;
      unsigned blocks;
      do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                     : "=r"(blocks)
                     : "l"(all.done + phase % 2)
                     : "memory");
      } while (blocks < all_done);
    }
    sync();
    if (!owner) return;
    const int64_t* from = all.of(phase) + t * 8;
    int64_t sums[8];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        asm volatile("ld.relaxed.gpu.global.v2.s64 {%0, %1}, [%2];"
                     : "=l"(sums[i]), "=l"(sums[i + 1])
                     : "l"(from + i)
                     : "memory");
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        complete &= (static_cast<int>(sums[i]) & ((1 << kCountBits) - 1)) == adding;
    } while (!complete);
    const auto add = bias.floats();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      residual[i] += __ll2float_rn(sums[i] >> kCountBits) * (1.f / kOne) + add[i];
  }

  // x = norm(residual), a part of it for each warp.
  __device__ void normalize(const V& weight, const V& bias) {
    const float inv_size = 1.f / static_cast<float>(size);
    float sum = 0.f, square = 0.f;  // about the mean of the norm before
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = owner ? residual[i] - mean : 0.f;
      sum += d, square = fmaf(d, d, square);
    }
    sum = warp_sum(sum), square = warp_sum(square);
    if (lane == 0) shared.moments[warp] = {sum, square};
    sync();
    sum = square = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.moments[w].x, square += shared.moments[w].y;
    sum *= inv_size;
    mean += sum;
    const float rstd = rsqrtf(square * inv_size - sum * sum + p.eps);
    if (owner) {
      const auto g = weight.floats(), b = bias.floats();
      V high, low;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = (residual[2 * i] - mean) * rstd * g[2 * i] + b[2 * i];
        const float second = (residual[2 * i + 1] - mean) * rstd * g[2 * i + 1] + b[2 * i + 1];
        const int at = i % 2 * 2 + i / 2;
        high.words[at] = pack<T>(first, second);
        const float2 rounded = unpack<T>(high.words[at]);
        low.words[at] = pack<T>(first - rounded.x, second - rounded.y);
      }
      reinterpret_cast<V&>(shared.x[0][t]) = high, reinterpret_cast<V&>(shared.x[1][t]) = low;
    }
    sync();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int chunk = (i * kWarps + warp) * kQuarter + quarter;
      uint2 pairs = {};
      if (row < 4 && chunk * 8 < size) pairs = shared.x[row % 2][chunk][row / 2];
      x[i][0] = pairs.x, x[i][1] = pairs.y;
    }
  }

  // A tile of weights times x. A lane's 16 bytes of a group are four pairs of weights of row `row`:
  // pairs 0 and 2 are rows 0 to 7 of mma's a, pairs 1 and 3 rows 8 to 15. Columns 0 and 1 of b are
  // the parts of x that the former want, columns 2 and 3 those of the latter.
  static constexpr int kChains = 2;  // of products that wait for one another
  template <int kN>
  __device__ static void multiply_tile(float (&part)[kChains][4], const V (&weights)[kN],
                                       const uint32_t (&x)[kN][2]) {
#pragma unroll
    for (auto& d : part) d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const auto& w = weights[i].words;
      multiply_add<T>(part[i % kChains], w[0], w[1], w[2], w[3], x[i][0], x[i][1]);
    }
  }
  // Row `row` of the product, in the lanes of its quarters 0 and 1.
  __device__ float sum_of(const float (&part)[kChains][4]) const {
    float first = part[0][0] + part[0][1], second = part[0][2] + part[0][3];
#pragma unroll
    for (int i = 1; i < kChains; ++i)
      first += part[i][0] + part[i][1], second += part[i][2] + part[i][3];
    const float mine = quarter ? second : first;
    return mine + __shfl_xor_sync(0xffffffffu, mine, 1);
  }

  // finish(i, sum of row i and its bias, to) for `rows` rows times x, to < kCluster.
  template <typename F>
  __device__ void multiply_rows(int rows, const Vec<T, 1>& bias, F&& finish) {
    const int last = ((kGroups - 1) * kWarps + warp) * kGroup < size ? kGroups - 1 : 0;
    const char* const mine =
        ring + (warp * kQuarter + quarter) * 16 + row * (size * static_cast<int>(sizeof(T)) + kPad);
    V weights[kGroups];
    const auto fetch = [&] {
      wait_for(&shared.full[from.slot], from.phase);
      const char* at = mine + from.slot * slot_bytes;
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
        weights[i] = load_shared<V>(at + (i < kGroups - 1 ? i : last) * kWarps * kQuarter * 16);
    };
    fetch();
#pragma unroll 1
    for (int first = 0; first < rows; first += kTileRows) {
      float part[kChains][4];
      multiply_tile(part, weights, x);
      release();
      if (first + kTileRows < rows) fetch();
      const float sum = sum_of(part);
      if (quarter == 0) shared.sums[first + row][warp] = sum;
    }
    sync();
    const float2 sums = reinterpret_cast<const float2*>(shared.sums[finished_row()])[t % kCluster];
    float sum = sums.x + sums.y;
#pragma unroll
    for (int offset = kCluster / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (finished_row() < rows) finish(finished_row(), sum + bias.floats()[0], t % kCluster);
  }
  // The row of a phase that a thread finishes: kCluster threads one row, each for a block.
  __device__ int finished_row() const { return t / kCluster; }

  // The block's rows of a weight, `chunks` chunks of each, times v: added to the phase's sums.
  template <int kN, int kTiles>
  __device__ void multiply_columns(const float* v, int chunks, int phase) {
    int64_t* const sums = all.of(phase) + part.rank * (size / kCluster);
    const int rows = size / kCluster, at_once = tiles_of(slot_bytes, chunks) * kTileRows;
    // Clusters differ by one group.
    const int last = (kN - 1) * kQuarter < chunks ? kN - 1 : 0;
    uint32_t y[kN][2];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const int chunk = i * kQuarter + quarter;
      const bool there = (row == 0 || row == 2) && chunk < chunks;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const float* at = v + chunk * 8 + row + w * 4;
        y[i][w] = there ? pack<T>(at[0], at[1]) : 0;
        asm volatile("" : "+r"(y[i][w]));  // worked out here, not in the loop
      }
    }
    const int exchange = exchanged(row, chunks) ? kQuarter * 16 : 0;
    const char* const mine = ring + (row * chunks + quarter) * 16;
    V weights[kTiles][kN];
    const auto fetch = [&](int first) {
      wait_for(&shared.full[from.slot], from.phase);
      const int tiles = min(at_once, rows - first) / kTileRows;
      const char* at = mine + from.slot * slot_bytes;
      const char* const groups[2] = {at + exchange, at - exchange};  // even ones, odd ones
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int tile = min(warp + j * kWarps, tiles - 1) * kTileRows * chunks * 16;
#pragma unroll
        for (int i = 0; i < kN; ++i)
          weights[j][i] = load_shared<V>(groups[i < kN - 1 ? i % 2 : last % 2] + tile +
                                         (i < kN - 1 ? i : last) * kQuarter * 16);
      }
    };
    bool valid = true;
    fetch(0);
#pragma unroll 1
    for (int first = 0; first < rows; first += at_once) {
      float part[kTiles][kChains][4];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply_tile(part[j], weights[j], y);
      release();
      if (first + at_once < rows) fetch(first + at_once);
      float sum = 0.f;  // lane 8 j + i has row i of tile j
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float mine = __shfl_sync(0xffffffffu, sum_of(part[j]), lane % kTileRows * kQuarter);
        if (lane / kTileRows == j) sum = mine;
      }
      const int at = first + (warp + lane / kTileRows * kWarps) * kTileRows + lane % kTileRows;
      if (lane / kTileRows < kTiles && at < min(first + at_once, rows)) add(sums + at, sum);
      valid &= fabsf(sum) <= kLargest;
    }
    if (!valid) {
      *all.invalid = 1;
      __threadfence();  // seen no later than that the block is done
    }
    sync();  // all have read v, too: others may write to it again
    if (t == 0) {
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(all.done + phase % 2)
                   : "memory");
    }
  }

  __device__ static void add(int64_t* sum, float value) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sum),
                 "l"((__float2ll_rn(value * kOne) << kCountBits) + 1)
                 : "memory");
  }

  // The first tile of the caches for each warp.
  __device__ void fetch_tile(const T* keys, const T* values, int tile, int num_slots) {
    if (tile * L::kTile >= num_slots) return;
#pragma unroll
    for (int u = 0; u < L::kSlots; ++u) {
      const int slot = min(tile * L::kTile + u * L::kSlotGroups + L::slot_group(), num_slots - 1);
      copy_async(&shared.tile[0][u][t], keys + slot * kHead + L::column(0));
      copy_async(&shared.tile[1][u][t], values + slot * kHead + L::column(0));
    }
  }

  // From q, k and v in shared memory to the head's output, rounded, in shared memory.
  __device__ void attend_head(T* keys, T* values, int tile, int num_slots, int parity) {
    const int num_tiles = (num_slots + L::kTile - 1) / L::kTile;
    constexpr int kStep = kWarps * kCluster;
    typename L::Row key[L::kSlots], value[L::kSlots];
    copy_async_commit();
    copy_async_wait<0>();
#pragma unroll
    for (int u = 0; u < L::kSlots; ++u) {
      key[u][0] = load_shared<V>(&shared.tile[0][u][t]);
      value[u][0] = load_shared<V>(&shared.tile[1][u][t]);
    }
    wait_for(&shared.got_input, parity);
    if (t == 0) arrive_and_expect(&shared.got_input, kInputBytes);
    Attention<L> a;
    begin(a, shared.head, p.scaling * kLog2e);
    if (tile == kStep - 1) {  // the warp with the fewest tiles
      const int64_t slot = int64_t{num_slots} * kHead;
      attend_new(a, shared.head, kHead, true, keys + slot, values + slot);
    }
#pragma unroll 1
    for (; tile < num_tiles; tile += kStep) {
      const int next = tile + kStep;
      float scores[L::kSlots][1];
      multiply<L, L::kSlots>(scores, a, key, tile * L::kTile + L::slot_group(), num_slots);
      if (next < num_tiles) load_tile<L>(key, keys, next, num_slots, kHead);
      attend<L, L::kSlots>(a, scores, value);
      if (next < num_tiles) load_tile<L>(value, values, next, num_slots, kHead);
    }
    combine_warp(shared.head, a, warp);
    sync();
    static_assert(kWorkers == kCluster * kHead);
    const int to = t / kHead, column = t % kHead;
    const Output mine =
        combine<L>(&shared.head.out[0][column], L::kOutputs, shared.head.max_sum, 0, kWarps);
    const auto send = [&](float* ptr, float v) {
      store_cluster(ptr, &shared.got_attention, to, v);
    };
    send(&shared.attended_of[part.rank][column], mine.out);
    if (column == 0) {
      send(&shared.max_sum[part.rank].x, mine.max);
      send(&shared.max_sum[part.rank].y, mine.sum);
    }
    wait_for(&shared.got_attention, parity);
    if (t == 0) arrive_and_expect(&shared.got_attention, kAttentionBytes);
    if (t < kHead) {
      const float2(*max_sum)[1] = reinterpret_cast<const float2(*)[1]>(shared.max_sum);
      const Output total = combine<L>(&shared.attended_of[0][t], kHead, max_sum, 0, kCluster);
      const Floats<1> y = {{total.out / total.sum}};
      shared.attended[t] = Vec<T, 1>::from(y).floats()[0];
    }
    sync();
  }

  // Attention (even phases) or the MLP (odd ones) of a layer. One body for both: shorter code.
  __device__ void run(int phase, int64_t start, int num_slots) {
    const int l = phase / 2;
    const bool mlp = phase % 2;
    const DecodeLayers::Layer& y = shared.layers[l];
    const V weight = vector(mlp ? y.mlp_norm_weight : y.attention_norm_weight);
    const V norm_bias = vector(mlp ? y.mlp_norm_bias : y.attention_norm_bias);
    const T* biases = static_cast<const T*>(mlp ? y.mlp_in_bias : y.qkv_bias);
    const int rows = mlp ? part.rows : 3 * kHeadShare;
    const int first_row = mlp ? part.first_row : part.cluster * kHead + part.rank * kHeadShare;
    Vec<T, 1> bias = {};
    const int i = finished_row();
    if (i < rows)
      bias =
          load<Vec<T, 1>>(biases + first_row + (mlp ? i : i / kHeadShare * size + i % kHeadShare));
    const int64_t head = (part.cluster * p.capacity + start) * kHead;
    T *keys = static_cast<T*>(y.keys) + head, *values = static_cast<T*>(y.values) + head;
    const int tile = warp * kCluster + part.rank;
    if (!mlp) fetch_tile(keys, values, tile, num_slots);
#pragma unroll 1
    for (; added < phase; ++added) add_sums(added);
    normalize(weight, norm_bias);
    multiply_rows(rows, bias, [&](int i, float sum, int to) {
      if (mlp) {
        const Floats<1> unit = {{apply_act(p.act, sum)}};
        store_cluster(&shared.middle[part.rank * rows + i], &shared.got_middle, to,
                      Vec<T, 1>::from(unit).floats()[0]);
      } else {
        float* column = &shared.head.input[i / kHeadShare][part.rank * kHeadShare + i % kHeadShare];
        store_cluster(column, &shared.got_input, to, sum);
      }
    });
    if (mlp) {
      wait_for(&shared.got_middle, l % 2);
      if (t == 0) arrive_and_expect(&shared.got_middle, part.units * int{sizeof(float)});
      multiply_columns<kUnitGroups, 1>(shared.middle, part.units / 8, phase);
    } else {
      attend_head(keys, values, tile, num_slots, l % 2);
      multiply_columns<kHead / kGroup, 4>(shared.attended, kHeadChunks, phase);
    }
  }

  // The last sums; then those of the first layer are zero again. All others are cleared ahead.
  __device__ void finish() {
#pragma unroll 1
    for (; added < 2 * p.num_layers; ++added) add_sums(added);
    const bool invalid = *static_cast<volatile unsigned*>(all.invalid);
    if (owner) {
#pragma unroll
      for (int i = 0; i < 8; ++i) p.residual[t * 8 + i] = invalid ? NAN : residual[i];
    }
    sync();
#pragma unroll 1
    for (int i = t; i < 2 * size; i += kWorkers) all.sets[i] = 0;
    if (t < 3) all.done[t] = 0;
  }
};

template <typename T, int kGroups, int kUnitGroups>
__global__ void __launch_bounds__(kWorkers + kLoaders, 1)
    decode_layers_kernel(const __grid_constant__ LayersPlan plan) {
  using S = LayersShared<T, kGroups, kUnitGroups>;
  extern __shared__ __align__(128) char ring[];
  __shared__ S shared;
  const DecodeLayers& p = plan.p;
  const int size = static_cast<int>(p.size), clusters = gridDim.x / kCluster;
  const int slot_bytes = kTileRows * (size * static_cast<int>(sizeof(T)) + kPad);
  Part part;
  part.cluster = blockIdx.x / kCluster, part.rank = blockIdx.x % kCluster;
  part.has_head = part.cluster < p.num_heads;
  part.first_unit = first_unit_of(part.cluster, p.middle, clusters);
  part.units = first_unit_of(part.cluster + 1, p.middle, clusters) - part.first_unit;
  part.rows = part.units / kCluster;
  part.first_row = part.first_unit + part.rank * part.rows;
  const Sums all(p.workspace, size);
  const int words = static_cast<int>(p.num_layers * sizeof(DecodeLayers::Layer) / 8);
#pragma unroll 1
  for (int i = threadIdx.x; i < words; i += blockDim.x)
    reinterpret_cast<uint64_t*>(shared.layers)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < plan.slots; ++i) {
      init_barrier(&shared.full[i], kLoaders);
      init_barrier(&shared.empty[i], kWorkers);
    }
    using W = Worker<T, kGroups, kUnitGroups, S>;
    expect_stores(&shared.got_input, W::kInputBytes);
    expect_stores(&shared.got_attention, W::kAttentionBytes);
    expect_stores(&shared.got_middle, part.units * int{sizeof(float)});
  }
  __syncthreads();
  cluster_sync();
  if (threadIdx.x >= kWorkers) {
    Loader<T, S>{p, all, shared, part, ring, plan.slots, plan.under_way, slot_bytes, size}.run();
    return;
  }
  Worker<T, kGroups, kUnitGroups, S> worker{p,          all,        shared, part,    ring,
                                            plan.slots, slot_bytes, size,   clusters};
  const int64_t length = *p.length, start = *p.start;
  if (length >= p.capacity) __trap();  // the new slot would be another head's
  worker.embed(length - start);
#pragma unroll 1
  for (int phase = 0; phase < 2 * p.num_layers; ++phase) {
    if (phase % 2 || part.has_head) worker.run(phase, start, static_cast<int>(length - start));
  }
  if (blockIdx.x == 0) worker.finish();
}

// The kernel of a size, and the groups that a cluster's share of the middle may have.
template <typename T>
struct Choice {
  void (*kernel)(LayersPlan) = nullptr;
  int unit_groups = 0;

  explicit Choice(int64_t size) {
    constexpr int kAtOnce = kWarps * kGroup;
    if (size <= 3 * kAtOnce) {
      kernel = decode_layers_kernel<T, 3, 4>, unit_groups = 4;
    } else if (size <= 4 * kAtOnce) {
      kernel = decode_layers_kernel<T, 4, 5>, unit_groups = 5;
    } else if (size <= 5 * kAtOnce) {
      kernel = decode_layers_kernel<T, 5, 6>, unit_groups = 6;
    } else if (size <= 7 * kAtOnce) {
      kernel = decode_layers_kernel<T, 7, 7>, unit_groups = 7;
    }
  }
};

}  // namespace

// Launches it, or only says whether it can: all blocks have to be on the GPU at once, and the heads
// and the middle have to fit its clusters.
template <typename T>
bool DecodeLayersOf<T>::run(const DecodeLayers& p, void* stream, bool only_ask) {
  const DeviceInfo& device = device_info(kDecodeLayers);
  const Choice<T> choice(p.size);
  if (device.major < 9 || !choice.kernel || p.size % kGroup || p.middle % kGroup) return false;
  if (p.num_heads * kHead != p.size || p.num_layers < 1 || p.num_layers > kLayersInShared)
    return false;
  const auto check = [](cudaError_t error) { check_cuda(kDecodeLayers, error); };
  cudaFuncAttributes own;
  check(cudaFuncGetAttributes(&own, choice.kernel));
  const int slot_bytes = kTileRows * static_cast<int>(p.size * sizeof(T) + kPad);
  const int room = device.max_shared_bytes - static_cast<int>(own.sharedSizeBytes);
  const int slots = std::min(kMaxSlots, room / slot_bytes);
  const int under_way = std::max(2, (kUnderWay + slot_bytes / 2) / slot_bytes);
  if (slots < under_way + 2) return false;
  const int threads = kWorkers + kLoaders, bytes = slots * slot_bytes;
  check(cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = device.num_sms / kCluster * kCluster;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, choice.kernel, &config));
  clusters = std::min(clusters, device.num_sms / kCluster);
  if (clusters < p.num_heads) return false;
  const int64_t groups = p.middle / kGroup, chunks = ceil_div(groups, clusters) * kQuarter;
  if (groups / clusters < choice.unit_groups - 1 || ceil_div(groups, clusters) > choice.unit_groups)
    return false;
  if (slot_bytes < chunks * 16 * kTileRows) return false;
  if (only_ask) return true;
  const Grid grid = {clusters * kCluster, 1, kCluster, -1, true};
  launch(kDecodeLayers, choice.kernel, grid, threads, bytes, stream,
         LayersPlan{p, slots, under_way});
  return true;
}

}  // namespace hf_fuse
