// The blocks of a cluster: one barrier for all their threads, and each other's shared memory.
// Before sm_90 a block is its own cluster.
#pragma once
#include <cstdint>

namespace hf_fuse {

// What a thread wrote before it arrives is seen by all after they waited.
__device__ inline void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address that `ptr`, of this block's shared memory, has in the block `rank` of the cluster.
template <typename T>
__device__ inline T* in_block(T* ptr, [[maybe_unused]] int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(ptr), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return ptr;
#endif
}

}  // namespace hf_fuse
