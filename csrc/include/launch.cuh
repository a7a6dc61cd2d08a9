// Launching: what the device is, which template a dtype means, and a launch that overlaps the tail
// of the kernel before it (programmatic dependent launch) where the device can.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace hf_fuse {

__device__ inline void asm_use(const void* address) { asm volatile("" ::"l"(address)); }

__device__ inline void pdl_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every kernel calls both, in every thread, before it touches global memory: the next kernel may
// then start early, and its own wait still means that everything before it has finished. Addresses
// passed in are computed before the wait, while there is nothing else to do.
template <typename... T>
__device__ inline void pdl_trigger_and_wait([[maybe_unused]] const T*... addresses) {
  pdl_trigger();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  (asm_use(addresses), ...);
#endif
  pdl_wait();
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not fail the next caller's check as well
  throw std::runtime_error(std::string("hf_fuse.") + op + ": " + cudaGetErrorString(error));
}

struct DeviceInfo {
  int major, num_sms, max_shared_bytes;
};

inline const DeviceInfo& device_info(const char* op) {
  constexpr int kMaxDevices = 64;
  static DeviceInfo infos[kMaxDevices];
  static std::once_flag queried[kMaxDevices];
  int device = 0;
  check_cuda(op, cudaGetDevice(&device));
  if (device >= kMaxDevices) throw std::runtime_error("hf_fuse: device index above 63");
  std::call_once(queried[device], [&] {
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      check_cuda(op, cudaDeviceGetAttribute(value, attribute, device));
    };
    get(&infos[device].major, cudaDevAttrComputeCapabilityMajor);
    get(&infos[device].num_sms, cudaDevAttrMultiProcessorCount);
    get(&infos[device].max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  });
  return infos[device];
}

struct Grid {
  int64_t x, y = 1;
  int cluster = 1;    // blocks along x that form a cluster, up to 16; above 1 needs sm_90
  int carveout = -1;  // shared memory's part of the L1 cache, in percent; -1: the driver's choice
  bool cooperative = false;  // all blocks run at once, after the kernel before has ended
};

constexpr int kPortableCluster = 8;  // blocks; more only on GPUs that allow it

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), Grid grid, dim3 block, int shared_bytes,
            void* stream, const Args&... args) {
  if (grid.x > std::numeric_limits<int>::max() || grid.y > 65535) {
    throw std::runtime_error(std::string("hf_fuse.") + op + ": too many rows for one launch: " +
                             std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks");
  }
  if (shared_bytes > 48 * 1024) {
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared_bytes));
  }
  if (grid.carveout >= 0) {
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        grid.carveout));
  }
  if (grid.cluster > kPortableCluster) {
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attributes[2] = {};
  if (grid.cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
  } else {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
  }
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = device_info(op).major < 9 ? 0 : grid.cluster == 1 ? 1 : 2;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  check_cuda(op, cudaGetLastError());
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>()) with the T of a dtype.
template <typename F>
void dispatch_dtype(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>());
    case DType::kFloat16:
      return f(TypeTag<__half>());
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>());
    case DType::kFloat64:
      break;
  }
  throw std::runtime_error(std::string("hf_fuse.") + op +
                           ": float64 is CPU only; CUDA has float32, float16 and bfloat16");
}

struct Rows {
  const void* data;
  int64_t stride = 0;  // in elements; 0 for a single row
};

// Whether every row of every tensor present starts at a multiple of `bytes`.
inline bool rows_aligned(std::initializer_list<Rows> tensors, int64_t num_rows, int element_size,
                         int bytes = 16) {
  for (const Rows& t : tensors) {
    if (t.data == nullptr) continue;
    if (reinterpret_cast<uintptr_t>(t.data) % bytes != 0) return false;
    if (num_rows > 1 && t.stride * element_size % bytes != 0) return false;
  }
  return true;
}

}  // namespace hf_fuse
