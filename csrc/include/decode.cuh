// A step's kernels overlap: each starts while the one before it ends, and loads what no kernel of
// the step writes (weights) before it waits for the rest.
#pragma once
#include "vec.cuh"

namespace hf_fuse {

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

// One element of them, always by the strong load.
template <typename V>
__device__ inline V load_before_wait(const typename V::Element* ptr) {
  V v;
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v.words[0]) : "l"(ptr) : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v.words[0]) : "l"(ptr) : "memory");
  }
  return v;
}

}  // namespace hf_fuse
