// The activations and their gradients on CPU, on vectors of the accumulation type.
//
// The compiler does not vectorise std::exp, tanh and erf, so the float ones are built here on one
// exponential, in forms that keep their relative accuracy where 1 + tanh and 1 + erf cancel.
// float64, for gradcheck alone, calls the library.
#pragma once
#include "cpu_vec.h"

namespace hf_fuse {

// c[0] + c[1] x + c[2] x^2 + ...
template <size_t kTerms>
vec<float> polynomial(vec<float> x, const float (&c)[kTerms]) {
  vec<float> sum = broadcast(c[kTerms - 1]);
  for (size_t i = kTerms - 1; i-- > 0;) sum = multiply_add(sum, x, broadcast(c[i]));
  return sum;
}

// p * 2^n for an integer n of -150 to 128; 2^n alone may overflow or be subnormal where the result
// is not.
inline vec<float> scale(vec<float> p, vec<float> n) {
#ifdef HF_FUSE_AVX512
  return (vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const int_vec exponent = __builtin_convertvector(n, int_vec), half = exponent >> 1;
  const auto power = [](int_vec e) { return (vec<float>)((e + 127) << 23); };
  return p * power(half) * power(exponent - half);
#endif
}

// Within 2 ulp, subnormal results and overflow included: x = n ln(2) + r with |r| <= ln(2) / 2.
// Cephes' expf.
inline vec<float> exp_vec(vec<float> x) {
  x = x > 89.f ? broadcast(89.f) : x;  // a NaN stays a NaN
  x = x < -104.f ? broadcast(-104.f) : x;
  const vec<float> round = broadcast(12582912.f);  // 1.5 * 2^23, where floats have no fraction
  const vec<float> n = multiply_add(x, broadcast(1.44269504f), round) - round;
  vec<float> r = multiply_add(n, broadcast(-0.693359375f), x);  // exact
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  constexpr float kTerms[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                              8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  return scale(multiply_add(polynomial(r, kTerms), r * r, r) + 1.f, n);
}

template <typename F>
vec<double> map_lanes(vec<double> x, const F& f) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

inline vec<double> exp_vec(vec<double> x) {
  return map_lanes(x, [](double v) { return std::exp(v); });
}

// The normal distribution: its share below x, and exp(-x^2 / 2).
template <typename A>
struct Normal {
  vec<A> cdf, bell;
};

inline Normal<float> normal(vec<float> x) {
  vec<float> a = x < 0.f ? -x : x;
  a = a > 15.f ? broadcast(15.f) : a;  // beyond, both are below the smallest float
  const vec<float> bell = exp_vec(a * a * -0.5f);
  // cdf(-a) / bell is smooth in s, and its rounding errors vanish with a: a minimax fit of 1.2e-7.
  constexpr float kTerms[] = {0.5f,
                              -0.398943037f,
                              0.130326673f,
                              -0.0189248249f,
                              -0.000373951654f,
                              0.000271944387f,
                              8.29197306e-05f,
                              -2.93391677e-05f,
                              2.4488013e-06f};
  const vec<float> s = a / multiply_add(a, broadcast(0.3f), broadcast(1.f));
  const vec<float> tail = bell * polynomial(s, kTerms);
  return {x > 0.f ? 1.f - tail : tail, bell};
}

inline Normal<double> normal(vec<double> x) {
  return {map_lanes(x, [](double v) { return 0.5 * std::erfc(-v * M_SQRT1_2); }),
          exp_vec(x * x * -0.5)};
}

// 1 + tanh(u) = 2 / (1 + exp(-2u)), with 2u = x (kGeluLinear + kGeluCubic x^2)
template <typename A>
constexpr A kGeluLinear = A(2 * M_2_SQRTPI * M_SQRT1_2);
template <typename A>
constexpr A kGeluCubic = A(2 * M_2_SQRTPI * M_SQRT1_2 * 0.044715);

template <typename A>
vec<A> gelu_tanh_inner(vec<A> x) {
  return x * multiply_add(x * x, broadcast(kGeluCubic<A>), broadcast(kGeluLinear<A>));
}

template <Act kAct, typename A>
vec<A> activate(vec<A> x) {
  if constexpr (kAct == Act::kGelu) return x * normal(x).cdf;
  if constexpr (kAct == Act::kGeluTanh) return x / (exp_vec(-gelu_tanh_inner<A>(x)) + A(1));
  if constexpr (kAct == Act::kSilu) return x / (exp_vec(-x) + A(1));
  if constexpr (kAct == Act::kRelu)
    return x < A(0) ? vec<A>{} : x;  // a NaN stays a NaN, as in torch
  if constexpr (kAct == Act::kRelu2) return x < A(0) ? vec<A>{} : x * x;
}

template <typename A>
struct Backward {
  vec<A> value, grad;
};

// activate(x) and grad * activate'(x), which share most of their work. The ReLUs select, as torch
// does: an infinite gradient times 0 would be a NaN.
template <Act kAct, typename A>
Backward<A> activate_backward(vec<A> grad, vec<A> x) {
  if constexpr (kAct == Act::kGelu) {
    const Normal<A> at = normal(x);
    return {x * at.cdf, grad * (at.cdf + x * (at.bell * A(0.5 * M_2_SQRTPI * M_SQRT1_2)))};
  }
  if constexpr (kAct == Act::kGeluTanh) {
    const vec<A> inner = gelu_tanh_inner<A>(x);
    const vec<A> e = exp_vec(inner < A(0) ? inner : -inner);
    // The larger of sigmoid(inner) and sigmoid(-inner); their product is e * larger^2.
    const vec<A> larger = A(1) / (e + A(1));
    const vec<A> sigmoid = inner < A(0) ? e * larger : larger;
    const vec<A> slope =
        multiply_add(x * x, broadcast(3 * kGeluCubic<A>), broadcast(kGeluLinear<A>));
    return {x * sigmoid, grad * (sigmoid + x * (e * larger * larger) * slope)};
  }
  if constexpr (kAct == Act::kSilu) {
    const vec<A> sigmoid = A(1) / (exp_vec(-x) + A(1));
    return {x * sigmoid, grad * (sigmoid * (x * (A(1) - sigmoid) + A(1)))};
  }
  if constexpr (kAct == Act::kRelu) return {activate<kAct, A>(x), x <= A(0) ? vec<A>{} : grad};
  if constexpr (kAct == Act::kRelu2)
    return {activate<kAct, A>(x), x <= A(0) ? vec<A>{} : grad * (x * A(2))};
}

template <Act V>
struct ActTag {
  static constexpr Act value = V;
};

template <typename F>
void dispatch_act(Act act, const F& f) {
  switch (act) {
    case Act::kGelu:
      return f(ActTag<Act::kGelu>{});
    case Act::kGeluTanh:
      return f(ActTag<Act::kGeluTanh>{});
    case Act::kRelu:
      return f(ActTag<Act::kRelu>{});
    case Act::kSilu:
      return f(ActTag<Act::kSilu>{});
    case Act::kRelu2:
      return f(ActTag<Act::kRelu2>{});
  }
  throw std::runtime_error("hf_fuse: unknown activation");
}

}  // namespace hf_fuse
