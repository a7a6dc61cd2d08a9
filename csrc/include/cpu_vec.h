// One vector type for the CPU kernels: 64 bytes of the accumulation type (16 floats or 8 doubles), loaded from and
// stored to any element type. The compiler lowers it to what the build machine has.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "cpu.h"

namespace hf_fuse {

template <typename A> struct VecOf { typedef A type __attribute__((vector_size(64))); };
template <typename A> using vec = typename VecOf<A>::type;
template <typename A> constexpr int64_t kLanes = 64 / sizeof(A);

typedef uint16_t bits16_vec __attribute__((vector_size(32)));
typedef uint32_t bits32_vec __attribute__((vector_size(64)));

// The bits of v rounded to bfloat16 (nearest even, a NaN stays a NaN), in the upper half of each lane.
inline bits32_vec bfloat16_bits(vec<float> v) {
  bits32_vec bits;
  std::memcpy(&bits, &v, 64);
  const auto nan = reinterpret_cast<bits32_vec>(v != v);
  return (((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (0x7fc00000u & nan)) & 0xffff0000u;
}

template <typename T>
vec<acc_t<T>> load_vec(const T* src) {
  using A = acc_t<T>;
  vec<A> v;
  if constexpr (sizeof(T) == sizeof(A)) {
    std::memcpy(&v, src, 64);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    bits16_vec narrow;
    std::memcpy(&narrow, src, 32);
    const bits32_vec wide = __builtin_convertvector(narrow, bits32_vec) << 16;
    std::memcpy(&v, &wide, 64);
  } else {
#ifdef __AVX512F__
    v = reinterpret_cast<vec<A>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src))));
#else
    float lanes[16];
    load_row(src, lanes, 16);
    std::memcpy(&v, lanes, 64);
#endif
  }
  return v;
}

template <typename T>
void store_vec(vec<acc_t<T>> v, T* dst) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    std::memcpy(dst, &v, 64);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const bits16_vec narrow = __builtin_convertvector(bfloat16_bits(v) >> 16, bits16_vec);
    std::memcpy(dst, &narrow, 32);
  } else {
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    float lanes[16];
    std::memcpy(lanes, &v, 64);
    store_row<T>(lanes, dst, 16);
#endif
  }
}

// What T would hold of v.
template <typename T>
vec<acc_t<T>> round_vec(vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, BFloat16>) return reinterpret_cast<vec<float>>(bfloat16_bits(v));
  if constexpr (std::is_same_v<T, Half>) {
    Half lanes[16];
    store_vec<Half>(v, lanes);
    return load_vec<Half>(lanes);
  }
  return v;
}

// The last, partial vector of a row of n elements; absent lanes are zero.
template <typename T>
vec<acc_t<T>> load_vec(const T* src, int64_t n) {
  if (n >= kLanes<acc_t<T>>) return load_vec(src);
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, src, n * sizeof(T));
  return load_vec<T>(lanes);
}

template <typename T>
void store_vec(vec<acc_t<T>> v, T* dst, int64_t n) {
  if (n >= kLanes<acc_t<T>>) return store_vec<T>(v, dst);
  T lanes[kLanes<acc_t<T>>];
  store_vec<T>(v, lanes);
  std::memcpy(dst, lanes, n * sizeof(T));
}

// Lanes summed as a tree, always in the same order.
template <typename A>
A sum_lanes(vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, 64);
  for (int64_t width = kLanes<A> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace hf_fuse
