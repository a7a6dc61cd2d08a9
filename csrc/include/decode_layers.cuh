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

#include "decode_layers_loader.cuh"
#include "decode_layers_worker.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kDecodeLayers = "decode_layers";

struct LayersPlan {
  DecodeLayers p;
  int slots, under_way;  // of the ring: there are, and are loaded at once
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
  if (ceil_div(tiles_of(slot_bytes, kHeadChunks), kWarps) > kOutTiles) return false;
  if (only_ask) return true;
  const Grid grid = {clusters * kCluster, 1, kCluster, -1, true};
  launch(kDecodeLayers, choice.kernel, grid, threads, bytes, stream,
         LayersPlan{p, slots, under_way});
  return true;
}

}  // namespace hf_fuse
