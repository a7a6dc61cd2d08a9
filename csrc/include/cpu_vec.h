// One vector type for the CPU kernels: as many bytes of the accumulation type as a register of the
// build machine holds (gcc makes slow code of wider ones), loaded from and stored to any element
// type. Everything but the conversions and the fused multiply-add is the compiler's own vector
// arithmetic.
#pragma once
#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#define HF_FUSE_AVX2
#endif

#include "cpu.h"

namespace hf_fuse {

#if defined(__AVX512BW__) && defined(HF_FUSE_AVX2)
#define HF_FUSE_AVX512
constexpr int64_t kVecBytes = 64;
#elif defined(HF_FUSE_AVX2)
constexpr int64_t kVecBytes = 32;
#else
constexpr int64_t kVecBytes = 16;
#endif

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
};
template <typename A>
using vec = typename VecOf<A>::type;
template <typename A>
constexpr int64_t kLanes = kVecBytes / sizeof(A);

typedef uint16_t bits16_vec __attribute__((vector_size(kVecBytes / 2)));
typedef uint32_t bits32_vec __attribute__((vector_size(kVecBytes)));
typedef int32_t int_vec __attribute__((vector_size(kVecBytes)));

template <typename A>
vec<A> broadcast(A value) {
  return value - vec<A>{};  // exact, and no instruction; + would be one, since -0 + 0 is 0
}

// n rounded up to whole vectors.
template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// scratch() that begins where a vector may.
template <typename A>
A* aligned_scratch(int slot, int64_t n) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(scratch<A>(slot, n + kLanes<A>));
  return reinterpret_cast<A*>((begin + kVecBytes - 1) / kVecBytes * kVecBytes);
}

#if defined(HF_FUSE_AVX512)
// One permutation each; a conversion and a shift are three instructions.
inline bits32_vec to_upper_half(bits16_vec v) {
  alignas(64) static constexpr uint16_t kFrom[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                                     5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                                     0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (bits32_vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(kFrom),
                                                    _mm512_castsi256_si512((__m256i)v));
}
inline bits16_vec upper_half(bits32_vec v) {
  alignas(64) static constexpr uint16_t kFrom[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                     17, 19, 21, 23, 25, 27, 29, 31};
  return (bits16_vec)_mm512_castsi512_si256(
      _mm512_permutexvar_epi16(_mm512_load_si512(kFrom), (__m512i)v));
}
inline vec<float> from_half(bits16_vec v) { return (vec<float>)_mm512_cvtph_ps((__m256i)v); }
inline bits16_vec to_half(vec<float> v) {
  return (bits16_vec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline bits32_vec to_upper_half(bits16_vec v) {
  return __builtin_convertvector(v, bits32_vec) << 16;
}
inline bits16_vec upper_half(bits32_vec v) { return __builtin_convertvector(v >> 16, bits16_vec); }
#if defined(HF_FUSE_AVX2)
inline vec<float> from_half(bits16_vec v) { return (vec<float>)_mm256_cvtph_ps((__m128i)v); }
inline bits16_vec to_half(vec<float> v) {
  return (bits16_vec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline vec<float> from_half(bits16_vec v) {
  vec<float> wide;
  for (int64_t i = 0; i < kLanes<float>; ++i) wide[i] = to_acc(Half{v[i]});
  return wide;
}
inline bits16_vec to_half(vec<float> v) {
  bits16_vec half;
  for (int64_t i = 0; i < kLanes<float>; ++i) half[i] = from_acc<Half>(v[i]).bits;
  return half;
}
#endif
#endif

// a * b + c in one rounding where the build machine has the instruction. (The build turns
// contraction off, since the other kernels round where eager torch rounds.)
template <typename V>
V multiply_add(V a, V b, V c) {
#if defined(HF_FUSE_AVX512)
  if constexpr (std::is_same_v<V, vec<float>>)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(HF_FUSE_AVX2)
  if constexpr (std::is_same_v<V, vec<float>>)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

// v rounded to bfloat16 (nearest even) in the upper half of each lane; what is left in the lower
// half does not count. A NaN stays a NaN: those of bfloat16 inputs and of the hardware have an
// empty lower half, so nothing is carried.
inline bits32_vec bfloat16_bits(vec<float> v) {
  const bits32_vec bits = (bits32_vec)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <typename T>
vec<acc_t<T>> load_vec(const T* src) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    vec<T> v;
    std::memcpy(&v, src, sizeof v);
    return v;
  } else {
    bits16_vec bits;
    std::memcpy(&bits, src, sizeof bits);
    if constexpr (std::is_same_v<T, Half>) return from_half(bits);
    return (vec<float>)to_upper_half(bits);
  }
}

// kRounded: v came out of round_vec.
template <typename T, bool kRounded = false>
void store_vec(vec<acc_t<T>> v, T* dst) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    std::memcpy(dst, &v, sizeof v);
  } else {
    bits16_vec bits;
    if constexpr (std::is_same_v<T, Half>)
      bits = to_half(v);
    else
      bits = upper_half(kRounded ? (bits32_vec)v : bfloat16_bits(v));
    std::memcpy(dst, &bits, sizeof bits);
  }
}

// What T would hold of v.
template <typename T>
vec<acc_t<T>> round_vec(vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, BFloat16>) return (vec<float>)(bfloat16_bits(v) & 0xffff0000u);
  if constexpr (std::is_same_v<T, Half>) return from_half(to_half(v));
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

template <typename T, bool kRounded = false>
void store_vec(vec<acc_t<T>> v, T* dst, int64_t n) {
  if (n >= kLanes<acc_t<T>>) return store_vec<T, kRounded>(v, dst);
  T lanes[kLanes<acc_t<T>>];
  store_vec<T>(v, lanes);
  std::memcpy(dst, lanes, n * sizeof(T));
}

// body(i, left) for every vector of a row of n elements, whole ones first, so that their loop has
// no tail checks.
template <typename A, typename Body>
void for_each_vec(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, kLanes<A>);
  if (i < n) body(i, n - i);
}

// Lanes summed as a tree, always in the same order: the upper half onto the lower, down to one.
template <typename A, int64_t kBytes = kVecBytes, typename V>
A sum_lanes(V v) {
  if constexpr (kBytes == sizeof(A)) {
    return v[0];
#if defined(HF_FUSE_AVX512)
  } else if constexpr (std::is_same_v<A, float> && kBytes == 64) {
    return _mm512_reduce_add_ps((__m512)v);  // the same tree; gcc takes v through memory below
#endif
  } else {
    typedef A half __attribute__((vector_size(kBytes / 2)));
    half lower, upper;
    std::memcpy(&lower, &v, sizeof lower);
    std::memcpy(&upper, reinterpret_cast<const char*>(&v) + sizeof lower, sizeof upper);
    return sum_lanes<A, kBytes / 2>(lower + upper);
  }
}

}  // namespace hf_fuse
