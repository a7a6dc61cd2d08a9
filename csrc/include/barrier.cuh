// Barriers in shared memory, which count arrivals and bytes. Parity: of the number of times that
// one was complete.
#pragma once
#include <cstdint>

namespace hf_fuse {

__device__ inline uint32_t shared_address(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
}
// Once this thread's copies are there.
__device__ inline void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void wait_for(uint64_t* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HF_FUSE_WAIT "mbarrier.try_wait"
#else
#define HF_FUSE_WAIT "mbarrier.test_wait"
#endif
  int done = 0;
  while (!done) {
    asm volatile("{\n.reg .pred p;\n" HF_FUSE_WAIT
                 ".parity.shared.b64 p, [%1], %2;\n"
                 "selp.s32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
#undef HF_FUSE_WAIT
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// By the thread that made barriers, before it meets those who use them.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// As wait_for, for what other blocks of the cluster wrote.
__device__ inline void wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#else

__device__ inline void publish_barriers() {}
__device__ inline void expect_bytes(uint64_t*, int) {}
__device__ inline void arrive_and_expect(uint64_t*, int) {}
__device__ inline void wait_cluster(uint64_t*, int) {}

#endif

}  // namespace hf_fuse
