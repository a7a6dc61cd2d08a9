// decode_layers: what a block's loaders and its workers both know (decode_layers.cuh says the
// rest).
#pragma once
#include "decode_tiles.cuh"
#include "ring.cuh"

namespace hf_fuse {
namespace {

constexpr int kWarps = 8, kWorkers = kWarps * kWarpSize, kLoaders = 128;
constexpr int kCluster = 4;
constexpr int kHead = 64, kHeadShare = kHead / kCluster, kHeadChunks = kHead / 8;
constexpr int kTileRows = 8, kOutTiles = 4;  // kOutTiles: of attention_out, of a slot, for a warp
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

// What the workspace holds: the sums; how many blocks are done with attention_out, and with
// mlp_out, of all layers so far, a hint when to look at the sums; whether one was out of range.
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
__host__ __device__ inline int tiles_of(int slot_bytes, int chunks) {
  const int tiles = slot_bytes / (chunks * kTileRows * 16);
  return chunks > kHeadChunks && tiles >= kWarps ? kWarps : tiles;
}

}  // namespace
}  // namespace hf_fuse
