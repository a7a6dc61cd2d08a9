// decode_layers: the warps that multiply.
#pragma once
#include "activation.cuh"
#include "decode_layers_block.cuh"
#include "mma.cuh"

namespace hf_fuse {
namespace {

// Its members are a thread's registers.
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

  // The block's rows of a weight, `chunks` chunks of each, times v: added to the phase's sums. Of a
  // slot a warp has at most kTiles tiles.
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
    // What other blocks store comes with the bytes that the barrier counts, as a bulk copy does. A
    // wait of the cluster's scope would invalidate L1, too, and all that is there is asked for
    // anew.
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
      multiply_columns<kHead / kGroup, kOutTiles>(shared.attended, kHeadChunks, phase);
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

}  // namespace
}  // namespace hf_fuse
