// The backward of add_norm on CPU. With g_i = grad_normed_i * weight_i summed over the norms and
// xhat the normalised row:
//   layer: grad_input = grad_residual + rstd * (g - mean(g) - xhat * mean(g * xhat))
//   rms:   grad_input = grad_residual + rstd * (g - xhat * mean(g * xhat))
// Tokens go in groups: the two means of each token first, then column by column over the group's
// rows, which are still in cache, so the running weight gradients are read and written once a
// group. They are summed over a fixed number of token chunks, then over the chunks in order, so
// they do not depend on the number of threads.
#include <algorithm>

#include "cpu_vec.h"

namespace hf_fuse {
namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kGroup = 4;
constexpr int64_t kColumns = 512;  // of one task of the last sum

int64_t num_chunks(const AddNormBackward& p) { return std::min<int64_t>(p.num_tokens, kMaxChunks); }

// One norm that has a gradient. Its sums, weight and then bias, lie at `sums` of a chunk's part of
// the workspace.
struct Norm {
  const void *grad, *weight;
  int64_t grad_stride;
  void *grad_weight, *grad_bias;
  int64_t sums;
};

struct Norms {
  Norm norm[2];
  int count = 0;
  int64_t sums = 0;  // rows of hidden_size in a chunk's part of the workspace

  explicit Norms(const AddNormBackward& p) {
    add(p.grad_normed1, p.weight1, p.grad_normed1_stride, p.grad_weight1, p.grad_bias1);
    add(p.grad_normed2, p.weight2, p.grad_normed2_stride, p.grad_weight2, p.grad_bias2);
  }
  void add(const void* grad, const void* weight, int64_t stride, void* grad_weight,
           void* grad_bias) {
    if (!grad) return;
    norm[count++] = {grad, weight, stride, grad_weight, grad_bias, sums};
    sums += grad_bias ? 2 : 1;
  }
};

template <typename A>
struct Token {
  A mean, rstd, shift, projection;  // shift = mean(g), projection = mean(g * xhat)
};

template <typename T, bool kRms, int kNorms>
struct Kernel {
  using A = acc_t<T>;
  using V = vec<A>;
  const AddNormBackward& p;
  const Norms& norms;

  V xhat(const Token<A>& token, int64_t t, int64_t i, int64_t left) const {
    V v = load_vec(at<T>(p.residual, t * p.residual_stride + i), left);
    if constexpr (!kRms) v -= token.mean;
    return v * token.rstd;
  }

  V grad_normed(int which, int64_t t, int64_t i, int64_t left) const {
    return load_vec(at<T>(norms.norm[which].grad, t * norms.norm[which].grad_stride + i), left);
  }

  V weight(int which, int64_t i, int64_t left) const {
    return load_vec(at<T>(norms.norm[which].weight, i), left) + A(weight_offset(p.kind));
  }

  Token<A> means(int64_t t) const {
    Token<A> token{kRms ? A(0) : *at<A>(p.mean, t), *at<A>(p.rstd, t), 0, 0};
    V total{}, projection{};
    for_each_vec<A>(p.hidden_size, [&](int64_t i, int64_t left) {
      V g{};
      for (int which = 0; which < kNorms; ++which)
        g += grad_normed(which, t, i, left) * weight(which, i, left);
      if constexpr (!kRms) total += g;
      projection += g * xhat(token, t, i, left);  // absent lanes have g = 0
    });
    token.shift = sum_lanes<A>(total) / p.hidden_size;
    token.projection = sum_lanes<A>(projection) / p.hidden_size;
    return token;
  }

  // The columns i .. i + left of tokens begin .. end; `first` starts the chunk's sums instead of
  // adding to them.
  void columns(const Token<A>* tokens, int64_t begin, int64_t end, A* sums, bool first, int64_t i,
               int64_t left) const {
    V weights[2], grad_weight[2] = {}, grad_bias[2] = {};
    for (int which = 0; which < kNorms; ++which) weights[which] = weight(which, i, left);
    for (int64_t t = begin; t < end; ++t) {
      const Token<A>& token = tokens[t - begin];
      const V normalised = xhat(token, t, i, left);
      V g{};
      for (int which = 0; which < kNorms; ++which) {
        const V grad = grad_normed(which, t, i, left);
        g += grad * weights[which];
        grad_weight[which] += grad * normalised;
        if constexpr (!kRms) grad_bias[which] += grad;
      }
      if constexpr (!kRms) g -= token.shift;
      g = (g - normalised * token.projection) * token.rstd;
      if (p.grad_residual)
        g += load_vec(at<T>(p.grad_residual, t * p.grad_residual_stride + i), left);
      store_vec<T>(g, at<T>(p.grad_input, t * p.hidden_size + i), left);
    }
    const auto accumulate = [&](A* sum, V part) {
      store_vec<A>(first ? part : part + load_vec(sum, left), sum, left);
    };
    for (int which = 0; which < kNorms; ++which) {
      A* sum = sums + norms.norm[which].sums * p.hidden_size + i;
      accumulate(sum, grad_weight[which]);
      if (norms.norm[which].grad_bias) accumulate(sum + p.hidden_size, grad_bias[which]);
    }
  }

  void chunk(int64_t begin, int64_t end, A* sums) const {
    for (int64_t t = begin; t < end; t += kGroup) {
      const int64_t last = std::min(t + kGroup, end);
      Token<A> tokens[kGroup];
      for (int64_t u = t; u < last; ++u) tokens[u - t] = means(u);
      for_each_vec<A>(p.hidden_size, [&](int64_t i, int64_t left) {
        columns(tokens, t, last, sums, t == begin, i, left);
      });
    }
  }
};

template <typename T, bool kRms, int kNorms>
void backward_tokens(const AddNormBackward& p, const Norms& norms) {
  using A = acc_t<T>;
  const int64_t chunks = num_chunks(p);
  const Kernel<T, kRms, kNorms> kernel{p, norms};
  for_each_row(chunks, p.num_tokens / chunks * p.hidden_size, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      kernel.chunk(p.num_tokens * c / chunks, p.num_tokens * (c + 1) / chunks,
                   at<A>(p.workspace, c * norms.sums * p.hidden_size));
  });
}

// dst = the sum over the chunks of row `sum` of their parts of the workspace.
template <typename T>
void sum_chunks(const AddNormBackward& p, const Norms& norms, int64_t sum, void* dst) {
  using A = acc_t<T>;
  const int64_t chunks = num_chunks(p), n = p.hidden_size;
  for_each_row((n + kColumns - 1) / kColumns, kColumns * chunks, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, columns = std::min(end * kColumns, n) - first;
    for_each_vec<A>(columns, [&](int64_t i, int64_t left) {
      vec<A> total{};
      for (int64_t c = 0; c < chunks; ++c)
        total += load_vec(at<A>(p.workspace, (c * norms.sums + sum) * n + first + i), left);
      store_vec<T>(total, at<T>(dst, first + i), left);
    });
  });
}

template <typename T>
void backward(const AddNormBackward& p) {
  const Norms norms(p);
  const auto run = [&](auto rms) {
    constexpr bool kRms = decltype(rms)::value;
    if (norms.count == 2) return backward_tokens<T, kRms, 2>(p, norms);
    if (norms.count == 1) return backward_tokens<T, kRms, 1>(p, norms);
    backward_tokens<T, kRms, 0>(p, norms);
  };
  is_rms(p.kind) ? run(std::true_type{}) : run(std::false_type{});
  for (void* grad : {p.grad_weight1, p.grad_bias1, p.grad_weight2, p.grad_bias2})
    if (grad) std::memset(grad, 0, p.hidden_size * sizeof(T));  // of a norm without a gradient
  for (int which = 0; which < norms.count; ++which) {
    const Norm& norm = norms.norm[which];
    sum_chunks<T>(p, norms, norm.sums, norm.grad_weight);
    if (norm.grad_bias) sum_chunks<T>(p, norms, norm.sums + 1, norm.grad_bias);
  }
}

}  // namespace

int64_t add_norm_workspace_size(const AddNormBackward& p) {
  return num_chunks(p) * Norms(p).sums * p.hidden_size * (p.dtype == DType::kFloat64 ? 8 : 4);
}

void add_norm_backward(const AddNormBackward& p, void*) {
  dispatch(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace hf_fuse
