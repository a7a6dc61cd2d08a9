// The activations and their derivatives on CPU, in the accumulation type.
#pragma once
#include "cpu.h"

namespace hf_fuse {

template <Act kAct, typename A>
A activate(A x) {
  if constexpr (kAct == Act::kGelu) return A(0.5) * x * (1 + std::erf(x * A(M_SQRT1_2)));
  if constexpr (kAct == Act::kGeluTanh) {
    const A inner = A(M_2_SQRTPI * M_SQRT1_2) * (x + A(0.044715) * x * x * x);
    return A(0.5) * x * (1 + std::tanh(inner));
  }
  if constexpr (kAct == Act::kRelu) return x < 0 ? A(0) : x;  // a NaN stays a NaN, as in torch
  if constexpr (kAct == Act::kSilu) return x / (1 + std::exp(-x));
  if constexpr (kAct == Act::kRelu2) return x < 0 ? A(0) : x * x;
}

template <Act kAct, typename A>
A activate_grad(A x) {
  if constexpr (kAct == Act::kGelu) {
    const A cdf = A(0.5) * (1 + std::erf(x * A(M_SQRT1_2)));
    return cdf + x * std::exp(A(-0.5) * x * x) * A(M_2_SQRTPI * M_SQRT1_2 * 0.5);
  }
  if constexpr (kAct == Act::kGeluTanh) {
    const A scale = A(M_2_SQRTPI * M_SQRT1_2);
    const A t = std::tanh(scale * (x + A(0.044715) * x * x * x));
    return A(0.5) * (1 + t) + A(0.5) * x * (1 - t * t) * scale * (1 + A(3 * 0.044715) * x * x);
  }
  if constexpr (kAct == Act::kRelu) return x > 0 ? A(1) : x <= 0 ? A(0) : x;
  if constexpr (kAct == Act::kSilu) {
    const A s = 1 / (1 + std::exp(-x));
    return s * (1 + x * (1 - s));
  }
  if constexpr (kAct == Act::kRelu2) return x < 0 ? A(0) : 2 * x;
}

template <Act V> struct ActTag { static constexpr Act value = V; };

template <typename F>
void dispatch_act(Act act, const F& f) {
  switch (act) {
    case Act::kGelu: return f(ActTag<Act::kGelu>{});
    case Act::kGeluTanh: return f(ActTag<Act::kGeluTanh>{});
    case Act::kRelu: return f(ActTag<Act::kRelu>{});
    case Act::kSilu: return f(ActTag<Act::kSilu>{});
    case Act::kRelu2: return f(ActTag<Act::kRelu2>{});
  }
  throw std::runtime_error("hf_fuse: unknown activation");
}

}  // namespace hf_fuse
