// A step's kernels overlap: each starts while the one before it ends, and loads what no kernel of
// the step writes (weights) before it waits for the rest.
#pragma once
#include "decode.h"
#include "launch.cuh"
#include "vec.cuh"

namespace hf_fuse {

// The grid of a step's kernel. All of them ask for the same carveout: a multiprocessor has to be
// empty to change it, and could not run two of them side by side. A few sequences take attention
// and tensor cores more shared memory; with more, or in other steps, L1 is worth more.
inline Grid step_grid(int64_t batch, int64_t x, int64_t y = 1, int cluster = 1) {
  const int carveout = batch >= 2 && batch <= 8 ? 40 : 25;
  return {x, y, cluster, carveout};
}

// 16 bytes of weights, read once; v is unspecified where not `present`. Before the wait the load
// has to be a strong one: ptxas moves weak and read-only loads below it.
template <bool kBeforeWait, typename V>
__device__ inline void load_weights(V& v, const typename V::Element* ptr, bool present) {
  auto& w = v.words;
  const int predicate = present;
  if constexpr (kBeforeWait) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
        "@p ld.relaxed.gpu.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(ptr), "r"(predicate)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
        "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(ptr), "r"(predicate)
        : "memory");
  }
}

// The strong load for all else: 16 bytes, one element, a number.
template <typename V>
__device__ inline V load_before_wait(const typename V::Element* ptr) {
  V v;
  if constexpr (sizeof(V) == 16) {
    load_weights<true>(v, ptr, true);
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v.words[0]) : "l"(ptr) : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v.words[0]) : "l"(ptr) : "memory");
  }
  return v;
}
__device__ inline float load_before_wait(const float* ptr) {
  return load_before_wait<Vec<float, 1>>(ptr).floats()[0];
}
__device__ inline int64_t load_before_wait(const int64_t* ptr) {
  int64_t value;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(ptr) : "memory");
  return value;
}

// decode_layers.cuh: of a dtype; whether it can run, and unless only asked it runs.
template <typename T>
struct DecodeLayersOf {
  static bool run(const DecodeLayers& p, void* stream, bool only_ask);
};
constexpr int kSumSets = 16;  // of sums, used in turn by the phases: attention and MLP of a layer

}  // namespace hf_fuse
