// The backward of add_norm on CPU. With g_i = grad_normed_i * weight_i summed over the norms and xhat the normalised row:
//   layer: grad_input = grad_residual + rstd * (g - mean(g) - xhat * mean(g * xhat))
//   rms:   grad_input = grad_residual + rstd * (g - xhat * mean(g * xhat))
// Weight gradients are summed over a fixed number of token chunks, then over the chunks in order, so they do not depend
// on the number of threads.
#include <algorithm>

#include "cpu.h"

namespace hf_fuse {
namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int kSums = 4;  // weight1, bias1, weight2, bias2

int64_t num_chunks(const AddNormBackward& p) { return std::min<int64_t>(p.num_tokens, kMaxChunks); }

void* const* wanted(const AddNormBackward& p) { return &p.grad_weight1; }

template <typename A>
struct Row {
  A *grad, *xhat, *dy;  // d(loss)/d(normalised row), the normalised row, one norm's incoming gradient
};

// Adds one norm's part: grad += dy * weight, and its weight and bias sums.
template <typename T>
void accumulate_norm(const AddNormBackward& p, int64_t token, int which, const Row<acc_t<T>>& row, acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t n = p.hidden_size;
  const void* grad_normed = which == 0 ? p.grad_normed1 : p.grad_normed2;
  if (!grad_normed) return;
  load_row(at<T>(grad_normed, token * (which == 0 ? p.grad_normed1_stride : p.grad_normed2_stride)), row.dy, n);
  A* grad_weight = sums + 2 * which * n;
  A* grad_bias = grad_weight + n;
  if (wanted(p)[2 * which])
    for (int64_t i = 0; i < n; ++i) grad_weight[i] += row.dy[i] * row.xhat[i];
  if (wanted(p)[2 * which + 1])
    for (int64_t i = 0; i < n; ++i) grad_bias[i] += row.dy[i];
  A* weight = scratch<A>(3, n);
  load_row(at<T>(which == 0 ? p.weight1 : p.weight2, 0), weight, n);
  for (int64_t i = 0; i < n; ++i) row.grad[i] += row.dy[i] * weight[i];
}

template <typename T>
void backward_token(const AddNormBackward& p, int64_t token, const Row<acc_t<T>>& row, acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t n = p.hidden_size;
  const A rstd = *at<A>(p.rstd, token);
  const A mean = p.rms ? A(0) : *at<A>(p.mean, token);
  load_row(at<T>(p.residual, token * p.residual_stride), row.xhat, n);
  for (int64_t i = 0; i < n; ++i) row.xhat[i] = (row.xhat[i] - mean) * rstd;
  std::fill(row.grad, row.grad + n, A(0));
  accumulate_norm<T>(p, token, 0, row, sums);
  accumulate_norm<T>(p, token, 1, row, sums);
  A total = 0, projection = 0;
#pragma omp simd reduction(+ : total, projection)
  for (int64_t i = 0; i < n; ++i) {
    total += row.grad[i];
    projection += row.grad[i] * row.xhat[i];
  }
  const A shift = p.rms ? A(0) : total / n;
  projection /= n;
  for (int64_t i = 0; i < n; ++i) row.grad[i] = rstd * (row.grad[i] - shift - row.xhat[i] * projection);
  if (p.grad_residual) {
    load_row(at<T>(p.grad_residual, token * p.grad_residual_stride), row.dy, n);
    for (int64_t i = 0; i < n; ++i) row.grad[i] += row.dy[i];
  }
  store_row<T>(row.grad, at<T>(p.grad_input, token * n), n);
}

template <typename T>
void reduce_chunks(const AddNormBackward& p, const acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t n = p.hidden_size;
  A* total = scratch<A>(0, n);
  for (int s = 0; s < kSums; ++s) {
    if (!wanted(p)[s]) continue;
    std::fill(total, total + n, A(0));
    for (int64_t c = 0; c < num_chunks(p); ++c)
      for (int64_t i = 0; i < n; ++i) total[i] += sums[(c * kSums + s) * n + i];
    store_row<T>(total, static_cast<T*>(wanted(p)[s]), n);
  }
}

template <typename T>
void backward(const AddNormBackward& p) {
  using A = acc_t<T>;
  const int64_t n = p.hidden_size, chunks = num_chunks(p);
  A* sums = static_cast<A*>(p.workspace);
  std::fill(sums, sums + chunks * kSums * n, A(0));
  for_each_row(chunks, p.num_tokens / std::max<int64_t>(chunks, 1) * n, [&](int64_t begin, int64_t end) {
    const Row<A> row{scratch<A>(0, n), scratch<A>(1, n), scratch<A>(2, n)};
    for (int64_t c = begin; c < end; ++c)
      for (int64_t t = p.num_tokens * c / chunks; t < p.num_tokens * (c + 1) / chunks; ++t)
        backward_token<T>(p, t, row, sums + c * kSums * n);
  });
  reduce_chunks<T>(p, sums);
}

}  // namespace

int64_t add_norm_workspace_size(const AddNormBackward& p) {
  return num_chunks(p) * kSums * p.hidden_size * (p.dtype == DType::kFloat64 ? 8 : 4);
}

void add_norm_backward(const AddNormBackward& p, void*) {
  dispatch(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace hf_fuse
