// decode_layers: the warps that fill the ring with the weights a block reads, in the order of use.
#pragma once
#include "decode_layers_block.cuh"

namespace hf_fuse {
namespace {

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

}  // namespace
}  // namespace hf_fuse
