// The blocks of a cluster: a barrier for all their threads, each other's shared memory, and
// barriers there that count what others store. Before sm_90 a block is its own cluster.
#pragma once
#include <cstdint>

#include "barrier.cuh"
#include "launch.cuh"

namespace hf_fuse {

constexpr int kMaxCluster = 16;  // blocks; on sm_90 alone

inline int max_cluster(const DeviceInfo& device) {
  return device.major < 9 ? 1 : device.major == 9 ? kMaxCluster : kPortableCluster;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// What a thread wrote before it arrives is seen by all after they waited.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same without that, so that it does not wait for what the thread has under way: after the wait
// all blocks run, and the barriers that they made are there.
__device__ inline void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address that `ptr`, of this block's shared memory, has in the block `rank` of the cluster.
template <typename T>
__device__ inline T* in_block(T* ptr, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(ptr), "r"(rank));
  return reinterpret_cast<T*>(there);
}

// To where `ptr` is in the block `rank`, counted by `barrier` there.
__device__ inline void store_cluster(float* ptr, uint64_t* barrier, int rank, float value) {
  asm volatile(
      "{\n.reg .b32 to, counter;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [counter];\n}" ::
          "r"(shared_address(ptr)),
      "r"(shared_address(barrier)), "r"(rank), "f"(value)
      : "memory");
}
__device__ inline void store_cluster(float4* ptr, uint64_t* barrier, int rank, const float4& v) {
  asm volatile(
      "{\n.reg .b32 to, counter;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, "
      "[counter];\n}" ::"r"(shared_address(ptr)),
      "r"(shared_address(barrier)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

#else

__device__ inline void cluster_arrive() { __syncthreads(); }
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() {}
template <typename T>
__device__ inline T* in_block(T* ptr, int) {
  return ptr;
}
template <typename T>
__device__ inline void store_cluster(T*, uint64_t*, int, const T&) {}

#endif

// A barrier that is complete when others have stored `bytes` here. By one thread, before it
// arrives.
__device__ inline void expect_stores(uint64_t* barrier, int bytes) {
  init_barrier(barrier, 1);
  publish_barriers();
  arrive_and_expect(barrier, bytes);
}

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace hf_fuse
