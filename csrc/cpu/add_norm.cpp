// add_norm on CPU: a row's sum is written to the residual stream and read again from there, out of
// the cache, so memory sees each input once and each output once. (A second copy in fp32 would push
// the row out of L1.) LayerNorm's statistics are two-pass (the mean, then the centred sum of
// squares), so a row with mean 1e4 and standard deviation 1 keeps its variance.
#include "cpu_vec.h"

namespace hf_fuse {
namespace {

// Calls body(i, vector count's worth of left elements) over a row, whole vectors first, so that
// their loop has no tail checks. Four independent partial sums hide the latency of the adds; they
// are combined in a fixed order.
template <typename A, typename Body>
A sum_over(int64_t n, const Body& body) {
  constexpr int64_t kStep = kLanes<A>, kWay = 4;
  vec<A> total[kWay] = {};
  int64_t i = 0;
  for (; i + kWay * kStep <= n; i += kWay * kStep)
    for (int64_t w = 0; w < kWay; ++w) total[w] += body(i + w * kStep, kStep);
  for (; i < n; i += kStep) total[0] += body(i, n - i);
  return sum_lanes<A>((total[0] + total[1]) + (total[2] + total[3]));
}

// residual = the sum as the model dtype holds it. Returns what the statistics begin with: the sum
// of the row, or for RMSNorm of its squares.
template <typename T, int kInputs, bool kRms>
acc_t<T> sum_inputs(const AddNormForward& p, int64_t token) {
  using A = acc_t<T>;
  const T* x = at<T>(p.x, token * p.x_stride);
  const T* delta1 = at<T>(p.delta1, token * p.delta1_stride);
  const T* delta2 = at<T>(p.delta2, token * p.delta2_stride);
  T* residual = at<T>(p.residual, token * p.hidden_size);
  return sum_over<A>(p.hidden_size, [&](int64_t i, int64_t left) {
    vec<A> v = load_vec(x + i, left);
    if constexpr (kInputs > 1) {
      vec<A> delta = load_vec(delta1 + i, left);
      if constexpr (kInputs > 2) delta = round_vec<T>(delta + load_vec(delta2 + i, left));
      v = round_vec<T>(delta + v);
      store_vec<T, true>(v, residual + i, left);
    }
    return kRms ? v * v : v;
  });
}

template <typename T, bool kRms>
auto sum_inputs_of(const AddNormForward& p) {
  if (p.delta2) return sum_inputs<T, 3, kRms>;
  return p.delta1 ? sum_inputs<T, 2, kRms> : sum_inputs<T, 1, kRms>;
}

// Of a row in the cache: memory would be idle meanwhile, so it fetches the lines of `dst`, which
// are written next.
template <typename T>
acc_t<T> centred_squares(const T* row, acc_t<T> mean, int64_t n, const T* dst) {
  using A = acc_t<T>;
  return sum_over<A>(n, [&](int64_t i, int64_t left) {
    __builtin_prefetch(dst + i, 1);
    vec<A> centred = load_vec(row + i, left) - mean;
    for (int64_t lane = left; lane < kLanes<A>; ++lane) centred[lane] = 0;
    return centred * centred;
  });
}

template <typename T, Norm kNorm, bool kBias>
void write_normed(const T* row, acc_t<T> mean, acc_t<T> rstd, const T* weight, const T* bias,
                  T* dst, int64_t n) {
  using A = acc_t<T>;
  for_each_vec<A>(n, [&](int64_t i, int64_t left) {
    vec<A> v = load_vec(row + i, left);
    if constexpr (kNorm == Norm::kRms) {
      v = round_vec<T>(v * rstd) * load_vec(weight + i, left);
    } else if constexpr (is_rms(kNorm)) {
      v = v * rstd * (load_vec(weight + i, left) + A(weight_offset(kNorm)));
    } else {
      v = (v - mean) * rstd * load_vec(weight + i, left);
      if constexpr (kBias) v += load_vec(bias + i, left);
    }
    store_vec<T>(v, dst + i, left);
  });
}

template <typename T>
void write_normed(const AddNormForward& p, const T* row, acc_t<T> mean, acc_t<T> rstd,
                  const void* weight_ptr, const void* bias_ptr, T* dst) {
  const T* weight = static_cast<const T*>(weight_ptr);
  const T* bias = static_cast<const T*>(bias_ptr);
  const auto run = [&](auto write) { write(row, mean, rstd, weight, bias, dst, p.hidden_size); };
  if (p.kind == Norm::kRms) return run(write_normed<T, Norm::kRms, false>);
  if (p.kind == Norm::kRmsOnce) return run(write_normed<T, Norm::kRmsOnce, false>);
  if (p.kind == Norm::kRmsOffset) return run(write_normed<T, Norm::kRmsOffset, false>);
  if (bias) return run(write_normed<T, Norm::kLayer, true>);
  run(write_normed<T, Norm::kLayer, false>);
}

template <typename T>
void forward_rows(const AddNormForward& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = p.hidden_size;
  const bool rms = is_rms(p.kind);
  const auto sum_row = rms ? sum_inputs_of<T, true>(p) : sum_inputs_of<T, false>(p);
  for (int64_t token = begin; token < end; ++token) {
    const A sum = sum_row(p, token);
    const T* row = p.delta1 ? at<T>(p.residual, token * n) : at<T>(p.x, token * p.x_stride);
    const A mean = rms ? A(0) : sum / n;
    T* dst = at<T>(p.normed1, token * n);
    const A squares = rms ? sum : centred_squares(row, mean, n, dst);
    const A rstd = 1 / std::sqrt(squares / n + static_cast<A>(p.eps));
    if (p.mean) *at<A>(p.mean, token) = mean;
    if (p.rstd) *at<A>(p.rstd, token) = rstd;
    write_normed<T>(p, row, mean, rstd, p.weight1, p.bias1, dst);
    if (p.weight2)
      write_normed<T>(p, row, mean, rstd, p.weight2, p.bias2, at<T>(p.normed2, token * n));
  }
}

}  // namespace

void add_norm_forward(const AddNormForward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_row(p.num_tokens, p.hidden_size,
                 [&](int64_t begin, int64_t end) { forward_rows<T>(p, begin, end); });
  });
}

}  // namespace hf_fuse
