// The activations and their gradients, in fp32, in the form that torch evaluates them.
#pragma once
#include "launch.cuh"
#include "ops.h"

namespace hf_fuse {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;
constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;

template <Act kAct>
__device__ inline float activate(float x) {
  if constexpr (kAct == Act::kGelu) {
    return 0.5f * x * (1.f + erff(x * kSqrtHalf));
  } else if constexpr (kAct == Act::kGeluTanh) {
    return 0.5f * x * (1.f + tanhf(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x)));
  } else if constexpr (kAct == Act::kSilu) {
    return x / (1.f + expf(-x));
  } else {
    const float positive = x < 0.f ? 0.f : x;  // not fmaxf: a NaN stays one
    return kAct == Act::kRelu ? positive : positive * positive;
  }
}

// An activation in few instructions. The asm keeps the compiler from a jump table: that is one
// more line of constants to wait for.
__device__ inline float apply_act(Act act, float x) {
  if (act == Act::kSilu || act == Act::kGeluTanh) {
    // 0.5 (1 + tanh(z / 2)) = 1 / (1 + exp(-z))
    const float gelu = 2.f * kSqrtTwoOverPi * (x + kGeluCubic * x * x * x);
    return __fdividef(x, 1.f + expf(act == Act::kSilu ? -x : -gelu));
  }
  int other = static_cast<int>(act);
  asm volatile("" : "+r"(other));
  if (other == static_cast<int>(Act::kGelu)) return activate<Act::kGelu>(x);
  const float relu = activate<Act::kRelu>(x);
  return other == static_cast<int>(Act::kRelu) ? relu : relu * relu;
}

// grad * activate'(x). The ReLUs select, as torch does: an infinite gradient times 0 would be a
// NaN.
template <Act kAct>
__device__ inline float activate_backward(float grad, float x) {
  if constexpr (kAct == Act::kGelu) {
    const float cdf = 0.5f * (1.f + erff(x * kSqrtHalf));
    return grad * (cdf + x * (expf(-0.5f * x * x) * kInvSqrtTwoPi));
  } else if constexpr (kAct == Act::kGeluTanh) {
    const float tanh = tanhf(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x));
    const float inner = kSqrtTwoOverPi * (1.f + 3.f * kGeluCubic * x * x);
    return grad * (0.5f * (1.f + tanh) + 0.5f * x * (1.f - tanh * tanh) * inner);
  } else if constexpr (kAct == Act::kSilu) {
    const float sigmoid = 1.f / (1.f + expf(-x));
    return grad * (sigmoid * (1.f + x * (1.f - sigmoid)));
  } else {
    return x <= 0.f ? 0.f : kAct == Act::kRelu ? grad : grad * (2.f * x);
  }
}

template <Act kAct>
struct ActTag {
  static constexpr Act value = kAct;
};

// Calls f(ActTag<kAct>()).
template <typename F>
void dispatch_act(const char* op, Act act, F&& f) {
  switch (act) {
    case Act::kGelu:
      return f(ActTag<Act::kGelu>());
    case Act::kGeluTanh:
      return f(ActTag<Act::kGeluTanh>());
    case Act::kRelu:
      return f(ActTag<Act::kRelu>());
    case Act::kSilu:
      return f(ActTag<Act::kSilu>());
    case Act::kRelu2:
      return f(ActTag<Act::kRelu2>());
  }
  throw std::runtime_error(std::string("hf_fuse.") + op + ": unknown activation " +
                           std::to_string(static_cast<int>(act)));
}

}  // namespace hf_fuse
