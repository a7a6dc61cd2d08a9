// What the CPU kernels share: rows converted to the accumulation type and back, the dtype dispatch,
// torch's thread pool.
//
// A kernel works on one row at a time in fp32 (float64 for float64) scratch that stays in L1, so
// every loop below is a plain array loop that the compiler vectorises for the build machine
// (-march=native).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "ops.h"

namespace hf_fuse {

// ATen's intra-op thread pool; defined in bindings.cpp.
void parallel_for_rows(int64_t rows, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context);

// Below about this many elements a task costs more to hand over than to do.
constexpr int64_t kGrainElements = 16384;

template <typename Body>
void for_each_row(int64_t rows, int64_t row_elements, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  const int64_t grain =
      row_elements >= kGrainElements ? 1 : kGrainElements / (row_elements + 1) + 1;
  parallel_for_rows(rows, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_acc(Half v) {
  _Float16 h;
  std::memcpy(&h, &v.bits, 2);
  return static_cast<float>(h);
}

template <typename T>
T from_acc(acc_t<T> v);
template <>
inline float from_acc<float>(float v) {
  return v;
}
template <>
inline double from_acc<double>(double v) {
  return v;
}
template <>
inline BFloat16 from_acc<BFloat16>(float v) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(v == v ? rounded : 0x7fc0u)};
}
template <>
inline Half from_acc<Half>(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  Half out;
  std::memcpy(&out.bits, &h, 2);
  return out;
}

template <typename T>
void load_row(const T* src, acc_t<T>* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_acc(src[i]);
}

template <typename T>
void store_row(const acc_t<T>* src, T* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = from_acc<T>(src[i]);
}

#ifdef __F16C__
// The compiler converts _Float16 one element at a time; the instruction for eight has been there
// since 2012.
template <>
inline void load_row<Half>(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; ++i) dst[i] = to_acc(src[i]);
}
template <>
inline void store_row<Half>(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) dst[i] = from_acc<Half>(src[i]);
}
#endif

// Where eager torch would have written a tensor of the model's dtype.
template <typename T>
void round_row(acc_t<T>* row, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    constexpr int64_t kBlock = 256;
    T block[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t size = n - i < kBlock ? n - i : kBlock;
      store_row<T>(row + i, block, size);
      load_row<T>(block, row + i, size);
    }
  }
}

// Scratch rows of a thread; they keep their capacity between calls.
template <typename A>
A* scratch(int slot, int64_t n) {
  thread_local std::vector<A> rows[4];
  if (static_cast<int64_t>(rows[slot].size()) < n) rows[slot].resize(n);
  return rows[slot].data();
}

template <typename T>
const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <typename T>
T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

// Calls f(T{}) with the element type.
template <typename F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat64:
      return f(double{});
  }
  throw std::runtime_error("hf_fuse: unknown dtype");
}

// The same for what a model decodes in: every dtype but float64.
template <typename F>
void dispatch_decode(const char* op, DType dtype, const F& f) {
  if (dtype == DType::kFloat64)
    throw std::runtime_error(std::string("hf_fuse ") + op +
                             ": takes float32, float16 or bfloat16, got float64");
  dispatch(dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) f(type);
  });
}

}  // namespace hf_fuse
