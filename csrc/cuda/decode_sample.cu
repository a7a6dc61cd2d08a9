// The next token of each sequence, drawn from what the filters keep of its logits, and a step
// forward (decode.h).
//
// Bytes: batch * vocab fp32 logits and as much noise, once each, from L2. All else is latency, so a
// cluster of blocks shares a sequence, each thread keeps its scores in registers, and no filter
// sorts: those that are kept are the first of an order, the best score first and the higher index
// first among equals (as transformers' ascending sort leaves them). A place in that order is a
// 64-bit number; its upper half is how far the score is below the largest. The last place to be
// kept is found a few bits at a time by histograms, of counts for top_k and of probability for
// top_p, which the blocks add up through each other's shared memory. Weights are integers, so that
// the order in which they are added changes nothing.
#include <algorithm>

#include "../include/cluster.cuh"
#include "../include/decode_select.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_sample";
constexpr int kThreads = 512;
constexpr int kManyItems = 16, kMostItems = 32;  // scores a thread keeps in registers
constexpr int kFewItems = 4;                     // for which no more blocks are worth it

constexpr int kBinBits = 11, kBins = 1 << kBinBits, kChunks = kBins / kWarpSize;
// Bits of a place that each pass leaves open; the first three fix the score, the others the index.
constexpr int kPasses = 5, kScorePasses = 3;
__device__ constexpr int kOpenBits[kPasses] = {53, 42, 32, kBinBits, 0};
constexpr int kIndexBits = 2 * kBinBits;

// Distances below the largest score are in units of 2^-26, so that scores above 1/8 keep their last
// bit. From 64 on, where exp is 1e-28, all are the same.
constexpr float kUnitsPerOne = 0x1p26f, kTooFar = 64.f;
constexpr uint32_t kFarthest = 0xfffffffeu;
constexpr uint64_t kAll = uint64_t{kFarthest} << 32 | 0xffffffffu;

struct Found {
  uint64_t bin, target, weight;  // target: what is to be reached within the bin
};

struct Shared {
  uint32_t low[kBins], high[kBins];  // this block's histogram, sums of 64-bit weights by halves
  uint64_t totals[kBins];            // the cluster's, of the bins that this block adds up
  uint64_t chunks[kChunks];          // the cluster's, of a warp of bins each
  uint64_t largest[kMaxCluster];     // of each block
  Found found;
};

__device__ uint32_t distance_of(float score, float largest) {
  if (!(largest - score < kTooFar)) return kFarthest;
  const auto units = [](float x) {  // saturates where a score's last bit is worth 2^14 or more
    return static_cast<uint64_t>(__float2ll_rd(x * kUnitsPerOne));
  };
  return min(units(largest) - units(score), uint64_t{kFarthest});
}

// exp(score - largest)
__device__ float weight_of(uint32_t distance) {
  if (distance == kFarthest) return 0.f;
  return expf(-(static_cast<float>(distance) / kUnitsPerOne));
}
__device__ uint64_t mass_of(uint32_t distance) {
  return __float2ull_rn(weight_of(distance) * 0x1p40f);
}

__device__ uint64_t place_of(uint32_t distance, int index) {
  return uint64_t{distance} << 32 | static_cast<uint32_t>(~index);
}
__device__ uint32_t distance_at(uint64_t place) { return place >> 32; }

// This thread's part of a sequence: the elements from `begin` up to `end`, kThreads apart. Scores
// are read once and kept, or, without kItems, read anew.
template <int kItems>
struct Row {
  static constexpr int kHeld = kItems > 0 ? kItems : 1;
  static constexpr bool kHoldsNoise = kItems <= kManyItems;  // for more there are not the registers
  const DecodeSample& p;
  const int begin, end;
  const float *logits, *noise;  // from `begin` on
  const uint8_t* seen;          // the same, or null
  const double top_k, top_p;
  const float min_p, penalty, inverse_penalty, inverse_temperature;
  const bool without_eos;
  float largest = 0.f;
  uint32_t held[kHeld] = {};  // scores, then distances
  float held_noise[kHeld] = {};

  // `first` and `size` say which part of the sequence is the block's.
  __device__ Row(const DecodeSample& p, int64_t step, int first, int size)
      : p(p),
        begin(first + static_cast<int>(threadIdx.x)),
        end(first + size),
        logits(p.select.logits + blockIdx.y * p.select.vocab + begin),
        noise(p.noise + blockIdx.y * p.select.vocab + begin),
        seen(p.seen == nullptr ? nullptr : p.seen + blockIdx.y * p.select.vocab + begin),
        top_k(p.filters[2]),
        top_p(p.filters[3]),
        min_p(p.filters[4]),
        penalty(p.filters[0]),
        inverse_penalty(1.f / penalty),  // torch too multiplies on the device, by the same number
        inverse_temperature(1.f / static_cast<float>(p.filters[1])),
        without_eos(step < p.select.min_step) {
    if constexpr (kItems > 0) read();
  }

  // All loads before the first use.
  __device__ void read() {
    float scores[kHeld] = {};
    for_each([&](int at) { scores[at / kThreads] = logits[at]; });
    if (kHoldsNoise && p.noise != nullptr) read_noise();
    if (seen != nullptr) {
      uint8_t marks[kHeld] = {};
      for_each([&](int at) { marks[at / kThreads] = seen[at]; });
      for_each([&](int at) {
        const int i = at / kThreads;
        scores[i] = penalised(scores[i], marks[i]);
      });
    }
    if (without_eos) {
#pragma unroll 1
      for (int64_t i = 0; i < p.select.num_eos; ++i) {
        const int64_t eos = p.select.eos[i];
        for_each([&](int at) {
          if (begin + at == eos) scores[at / kThreads] = -INFINITY;
        });
      }
    }
    for_each([&](int at) {
      const int i = at / kThreads;
      held[i] = __float_as_uint(scores[i] * inverse_temperature);
    });
  }

  __device__ void read_noise() {
    for_each([&](int at) { held_noise[at / kThreads % kHeld] = noise[at]; });
  }

  __device__ float penalised(float logit, uint8_t mark) const {
    return !mark ? logit : logit < 0 ? logit * penalty : logit * inverse_penalty;
  }

  template <typename F>
  __device__ void for_each(F&& f) const {
    if constexpr (kItems == 0) {
      for (int at = 0; begin + at < end; at += kThreads) f(at);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (begin + i * kThreads < end) f(i * kThreads);
      }
    }
  }

  __device__ float score(int at) const {
    if constexpr (kItems > 0) {
      return __uint_as_float(held[at / kThreads]);
    } else {
      if (without_eos && is_eos(p.select, begin + at)) return -INFINITY;
      return penalised(logits[at], seen == nullptr ? 0 : seen[at]) * inverse_temperature;
    }
  }

  __device__ uint64_t largest_key() const {
    uint64_t key = 0;
    for_each([&](int at) { key = max(key, key_of(score(at), begin + at)); });
    return key;
  }

  __device__ void set_largest(float value) {
    largest = value;
    if constexpr (kItems > 0) {
      for_each([&](int at) { held[at / kThreads] = distance_of(score(at), value); });
    }
  }

  // After set_largest.
  __device__ uint32_t distance(int at) const {
    return kItems > 0 ? held[at / kThreads % kHeld] : distance_of(score(at), largest);
  }

  // The largest of exp(score - largest) / noise up to the place `last`.
  __device__ uint64_t race(uint64_t last) {
    if (!kHoldsNoise) read_noise();
    uint64_t key = 0;
    for_each([&](int at) {
      const uint32_t away = distance(at);
      const float weight = weight_of(away);
      if (place_of(away, begin + at) > last || weight < min_p) return;
      const float q = kItems > 0 ? held_noise[at / kThreads % kHeld] : noise[at];
      key = max(key, key_of(weight / q, begin + at));
    });
    return key;
  }
};

__device__ void add(Shared& shared, int bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t sum = atomicAdd(&shared.low[bin], low) + low;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (sum < low);
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

// The blocks' histograms: each block adds up its part of the bins, and all get the chunks' sums.
template <bool kByMass>
__device__ void add_up(Shared& shared) {
  const int blocks = gridDim.x, bins = kBins / blocks, rank = blockIdx.x;
  for (int i = threadIdx.x; i < bins; i += kThreads) {
    const int bin = rank * bins + i;
    uint64_t sum = 0;
#pragma unroll 8
    for (int b = 0; b < blocks; ++b) {
      sum += *in_block(&shared.low[bin], b);
      if (kByMass) sum += uint64_t{*in_block(&shared.high[bin], b)} << 32;
    }
    shared.totals[bin] = sum;
    // A warp is whole here: the bins of a block are a multiple of a chunk.
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const int lane = threadIdx.x % kWarpSize;
    if (lane < blocks) *in_block(&shared.chunks[bin / kWarpSize], lane) = sum;
  }
}

// Inclusive, over the lanes.
__device__ uint64_t warp_scan(uint64_t x) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, x, offset);
    if (threadIdx.x % kWarpSize >= offset) x += before;
  }
  return x;
}

// The first lane at which the sum of the weights reaches the target, which becomes what is left.
__device__ int reach(uint64_t weight, uint64_t& target) {
  const uint64_t sum = warp_scan(weight);
  const int lane = __ffs(__ballot_sync(0xffffffffu, sum >= target)) - 1;
  target -= __shfl_sync(0xffffffffu, sum - weight, lane);
  return lane;
}

// The first bin at which the sum of the weights reaches the target, or all but the part `tail` of
// the sum. By a warp.
__device__ Found find(const Shared& shared, uint64_t target, double tail) {
  static_assert(kChunks == 2 * kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  const uint64_t first = shared.chunks[2 * lane], second = shared.chunks[2 * lane + 1];
  if (target == 0) {
    const uint64_t sum = __shfl_sync(0xffffffffu, warp_scan(first + second), kWarpSize - 1);
    target = sum - min(static_cast<uint64_t>(tail * static_cast<double>(sum)), sum - 1);
  }
  int chunk = 2 * reach(first + second, target);
  const uint64_t half = shared.chunks[chunk];
  if (half < target) target -= half, ++chunk;
  const int bin = chunk * kWarpSize + lane;
  const uint64_t weight = *in_block(&shared.totals[bin], bin / (kBins / gridDim.x));
  const int found = reach(weight, target);
  return {static_cast<uint64_t>(chunk * kWarpSize + found), target,
          __shfl_sync(0xffffffffu, weight, found)};
}

// The last place to be kept of those up to `last`: where the weights, taken in order, reach the
// target, or all but the part `tail` of their sum. By count, scores equal to that one are kept too.
template <bool kByMass, int kItems>
__device__ uint64_t last_kept(Shared& shared, const Row<kItems>& row, uint64_t last,
                              uint64_t target, double tail) {
  uint64_t first = 0, end = ~uint64_t{0};  // where that place is
  for (int pass = 0; pass < (kByMass ? kPasses : kScorePasses); ++pass) {
    const int open_bits = kOpenBits[pass];
    // These bits are set in the complement of any index.
    if (pass == kScorePasses) first |= 0xffffffffu << kIndexBits;
    const uint64_t stop = min(end, last);
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      shared.low[bin] = 0;
      if (kByMass) shared.high[bin] = 0;
    }
    __syncthreads();
    row.for_each([&](int at) {
      const uint32_t distance = row.distance(at);
      const uint64_t place = place_of(distance, row.begin + at);
      if (place < first || place > stop) return;
      const int bin = static_cast<int>((place - first) >> open_bits);
      if constexpr (kByMass) {
        add(shared, bin, mass_of(distance));
      } else {
        atomicAdd(&shared.low[bin], 1u);
      }
    });
    cluster_sync();
    add_up<kByMass>(shared);
    cluster_sync();
    if (threadIdx.x < kWarpSize) {
      const Found found = find(shared, target, tail);
      if (threadIdx.x == 0) shared.found = found;
    }
    __syncthreads();
    const Found found = shared.found;
    first += found.bin << open_bits;
    end = first + ((uint64_t{1} << open_bits) - 1);
    target = found.target;
    // Whether the whole bin is kept, as it is when it holds one score.
    const uint64_t least = kByMass ? mass_of(distance_at(end)) : 1;
    if (target + least > found.weight || found.weight < 2 * least) break;
  }
  return min(end, last);
}

// By all blocks of a cluster; the largest key of this block, in thread 0.
template <int kItems>
__device__ uint64_t sample(Shared& shared, Row<kItems>& row, uint64_t key) {
  const DecodeSample& p = row.p;
  if (threadIdx.x < kWarpSize) {
    key = __shfl_sync(0xffffffffu, key, 0);
    if (threadIdx.x < gridDim.x) *in_block(&shared.largest[blockIdx.x], threadIdx.x) = key;
  }
  cluster_sync();
  uint64_t largest = 0;
  for (int b = 0; b < int(gridDim.x); ++b) largest = max(largest, shared.largest[b]);
  const uint32_t sortable = largest >> 32;
  const float value = __uint_as_float(sortable & 0x80000000u ? sortable & 0x7fffffffu : ~sortable);
  if (!isfinite(value)) return 0;  // not a distribution: the token is -1
  row.set_largest(value);

  uint64_t last = kAll;
  if (row.top_k > 0 && row.top_k < p.select.vocab) {
    last = last_kept<false>(shared, row, last, static_cast<uint64_t>(row.top_k), 0.);
  }
  if (row.top_p < 1) last = last_kept<true>(shared, row, last, 0, 1 - row.top_p);
  cluster_arrive();  // the last that needs another block's memory
  __syncthreads();   // block_max's memory is free
  key = block_max<kThreads>(row.race(last));
  cluster_wait();
  return key;
}

template <int kItems>
__global__ void __launch_bounds__(kThreads) decode_sample_kernel(const DecodeSample p) {
  __shared__ Shared shared;
  pdl_trigger();
  cluster_arrive();
  pdl_wait();
  const int64_t step = *p.select.step;
  const int vocab = static_cast<int>(p.select.vocab), blocks = gridDim.x;
  const int part = (vocab + blocks - 1) / blocks;
  const int first = min(static_cast<int>(blockIdx.x) * part, vocab);
  Row<kItems> row(p, step, first, min(part, vocab - first));
  uint64_t key = block_max<kThreads>(row.largest_key());
  cluster_wait();  // all blocks of the cluster run
  if (p.noise != nullptr) key = sample(shared, row, key);
  select_and_advance<kThreads>(p.select, key, step, p.seen);
}

}  // namespace

void decode_sample(const DecodeSample& p, void* stream) {
  const int64_t batch = p.select.batch, vocab = p.select.vocab;
  if (batch == 0) return;
  if (vocab > int64_t{1} << kIndexBits) {
    throw std::runtime_error("hf_fuse decode_sample: at most 4194304 logits a sequence, got " +
                             std::to_string(vocab));
  }
  const DeviceInfo& device = device_info(kOp);
  const int most = max_cluster(device);
  const auto items = [&](int64_t blocks) { return ceil_div(vocab, blocks * kThreads); };
  int cluster = 1;
  // Many sequences fill the GPU; then more blocks each are worth it only for what registers hold.
  while (2 * cluster <= most && items(cluster) > kFewItems &&
         (items(cluster) > kMostItems || 2 * cluster * batch <= device.num_sms)) {
    cluster *= 2;
  }
  const auto run = [&](auto kernel) {
    launch(kOp, kernel, step_grid(batch, cluster, batch, cluster), kThreads, 0, stream, p);
  };
  if (items(cluster) > kMostItems) return run(decode_sample_kernel<0>);
  if (items(cluster) > kManyItems) return run(decode_sample_kernel<kMostItems>);
  run(decode_sample_kernel<kManyItems>);
}

}  // namespace hf_fuse
