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
