// One vector type: N elements that one load or store moves, with conversions to and from fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace hf_fuse {

template <int N>
struct Floats {
  float v[N];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ float operator[](int i) const { return v[i]; }
};

// Two 16-bit elements in a 32-bit word; packing rounds to nearest even.
template <typename T>
__device__ inline float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  using Element = T;
  using Word = std::conditional_t<sizeof(T) * N == 2, uint16_t, uint32_t>;
  static constexpr int kSize = N;
  static constexpr int kWords = sizeof(T) * N / sizeof(Word);
  Word words[kWords];

  __device__ Floats<N> floats() const {
    Floats<N> out;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = __uint_as_float(words[i]);
    } else if constexpr (N == 1) {
      out[0] = unpack<T>(words[0]).x;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 pair = unpack<T>(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
    return out;
  }

  // Rounds to T.
  __device__ static Vec from(const Floats<N>& in) {
    Vec out;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) out.words[i] = __float_as_uint(in[i]);
    } else if constexpr (N == 1) {
      out.words[0] = static_cast<Word>(pack<T>(in[0], 0.f));
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.words[i] = pack<T>(in[2 * i], in[2 * i + 1]);
    }
    return out;
  }
};

// Sums, differences and products rounded to T, never fused into one another. On 16-bit pairs they
// give what fp32 and then a rounding would, for fp32 has more than twice the digits, in a sixth of
// the instructions.
template <typename T, int N, typename PairOp, typename FloatOp>
__device__ inline Vec<T, N> combine(const Vec<T, N>& a, const Vec<T, N>& b, PairOp pair_op,
                                    FloatOp float_op) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < Vec<T, N>::kWords; ++i) {
    const uint32_t x = a.words[i], y = b.words[i];
    if constexpr (sizeof(T) == 4) {
      out.words[i] = __float_as_uint(float_op(__uint_as_float(x), __uint_as_float(y)));
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      const Pair result =
          pair_op(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
      out.words[i] =
          static_cast<typename Vec<T, N>::Word>(reinterpret_cast<const uint32_t&>(result));
    }
  }
  return out;
}

template <typename T, int N>
__device__ inline Vec<T, N> operator+(const Vec<T, N>& a, const Vec<T, N>& b) {
  return combine(
      a, b, [](auto x, auto y) { return __hadd2_rn(x, y); },
      [](float x, float y) { return __fadd_rn(x, y); });
}

template <typename T, int N>
__device__ inline Vec<T, N> operator-(const Vec<T, N>& a, const Vec<T, N>& b) {
  return combine(
      a, b, [](auto x, auto y) { return __hsub2_rn(x, y); },
      [](float x, float y) { return __fsub_rn(x, y); });
}

template <typename T, int N>
__device__ inline Vec<T, N> operator*(const Vec<T, N>& a, const Vec<T, N>& b) {
  return combine(
      a, b, [](auto x, auto y) { return __hmul2_rn(x, y); },
      [](float x, float y) { return __fmul_rn(x, y); });
}

template <typename T>
using Vec16 = Vec<T, 16 / sizeof(T)>;

// Loads and stores are volatile assembly, so that they stay where the kernel puts them: behind
// griddepcontrol.wait, and all of a row's loads before the first use. Not ld.global.nc: that one
// may cross the wait.
template <typename V>
__device__ inline V load(const typename V::Element* ptr) {
  V v;
  auto& w = v.words;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(ptr)
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(ptr) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(ptr) : "memory");
  } else {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(w[0]) : "l"(ptr) : "memory");
  }
  return v;
}

template <typename T>
__device__ inline float load_float(const T* ptr) {
  return load<Vec<T, 1>>(ptr).floats()[0];
}

// For what a kernel reads once: past L1, which is left to the weights that every row reads.
template <typename V>
__device__ inline V load_once(const typename V::Element* ptr) {
  if constexpr (sizeof(V) == 16) {
    V v;
    auto& w = v.words;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(ptr)
                 : "memory");
    return v;
  } else {
    return load<V>(ptr);
  }
}

template <typename V>
__device__ inline void store(typename V::Element* ptr, const V& v) {
  const auto& w = v.words;
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(ptr), "r"(w[0]), "r"(w[1]) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(ptr), "r"(w[0]) : "memory");
  } else {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(ptr), "h"(w[0]) : "memory");
  }
}

// For outputs larger than L2: marked to leave it first, which on an H200 is worth 4 to 5 % of the
// bandwidth of a kernel that reads as much as it writes.
template <typename V>
__device__ inline void store_once(typename V::Element* ptr, const V& v) {
  if constexpr (sizeof(V) == 16) {
    const auto& w = v.words;
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  } else {
    store(ptr, v);
  }
}

// 16 bytes from global to shared memory, past L1 and without a register in between.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace hf_fuse
