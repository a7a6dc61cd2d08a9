// A ring of slots in shared memory, filled ahead of need, and copies that report to its barriers.
// From sm_90 on.
#pragma once
#include "barrier.cuh"
#include "vec.cuh"

namespace hf_fuse {

// Where a ring stands: the slot, and the parity of its barriers' phase.
struct Cursor {
  int slot = 0, phase = 0;
  __device__ void next(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// For weights, which are read once: they leave L2 before all else.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
// A multiple of 16 bytes, by the copy engine; the barrier counts them.
__device__ inline void copy_bulk(uint32_t shared, const void* from, int bytes, uint64_t* barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// 16 bytes; the thread's next arrive_after_copies counts them.
__device__ inline void copy_once(uint32_t shared, const void* from, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
      "l"(from), "l"(policy)
      : "memory");
}

#else

__device__ inline uint64_t evict_first() { return 0; }
__device__ inline void copy_bulk(uint32_t, const void*, int, uint64_t*, uint64_t) {}
__device__ inline void copy_once(uint32_t, const void*, uint64_t) {}

#endif

__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// 16 bytes of shared memory, in order with other volatile assembly.
template <typename V>
__device__ inline V load_shared(const void* from) {
  V v;
  auto& w = v.words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared_address(from)));
  return v;
}

}  // namespace hf_fuse
