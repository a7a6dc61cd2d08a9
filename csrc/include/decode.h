// The launchers of a decoding step: one new token for each sequence of a batch. csrc/cpu and
// csrc/cuda each implement all of them; csrc/decode_bindings.cpp checks and calls them.
//
// Between kernels a step keeps the residual stream, q, k, v and the logits in fp32; the attention
// output and the MLP's middle have the model's dtype. Everything is contiguous but for the row
// strides named here. Conventions as in ops.h.
#pragma once
#include "ops.h"

namespace hf_fuse {

enum class Epilogue {
  kStore,  // out = y, fp32
  kAct,    // out = act(y), the dtype
  kGated,  // out = act(y of the first weight) * (y of the second), the dtype
  kAdd,    // out += y, fp32
};

// y[b, r] = sum_k weight[r, k] * n[b, k] + bias[r], over the rows of all the weights in turn, where
// n is the norm of x (x then is fp32), or x itself (the dtype). Sums are fp32, in a fixed order.
// The norm rounds nothing: rms: n = x * rsqrt(mean(x^2) + eps) * norm_weight,
// layer: n = (x - mean(x)) * rsqrt(var(x) + eps) * norm_weight + norm_bias.
struct DecodeLinear {
  struct Rows {
    const void* weight;  // [rows, size]
    const void* bias;    // [rows], or null
    int64_t rows, stride;
  };
  DType dtype;
  int64_t batch, size;
  const void* x;                        // [batch, size]; fp32 with a norm, else the dtype
  const void *norm_weight, *norm_bias;  // [size], or null
  double eps;
  bool rms;
  int num_weights;  // 1 to 3; kGated: 2 of as many rows
  Rows weights[3];
  Epilogue epilogue;
  Act act;
  void* out;        // [batch, all rows; kGated: the first's]
  void* workspace;  // decode_linear_workspace_size() bytes, or null: slower with many sequences
};
int64_t decode_linear_workspace_size(const DecodeLinear& p);
void decode_linear(const DecodeLinear& p, void* stream);
// Both, of the same x, dtype, eps and kind of norm, one weight each; neither reads what the other
// writes.
void decode_linear_two(const DecodeLinear& a, const DecodeLinear& b, void* stream);
// Both added to one out: kAdd, of the same dtype and batch, one weight each, no norm.
void decode_linear_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream);

// One query for each sequence b over its cache, the new key and value included, which are rotated
// (the key), rounded to the dtype and written to slot `length`. Slots start[b] to `length` are
// attended to, of them the last `window`; the position, for rotation, is length - start[b].
// Rotation: half-split over the first rotary_dim elements of a head by the angles
// position * inv_freq[i], cos and sin times rope_scale. softcap: scores become softcap *
// tanh(score / softcap). Softmax and sums in fp32, in a fixed order.
struct DecodeAttention {
  DType dtype;
  int64_t batch, num_heads, num_kv_heads, head_dim, capacity, rotary_dim;
  const float* qkv;  // [batch, qkv_stride]
  int64_t qkv_stride;
  int64_t k_offset, v_offset;  // of the first head, in elements, q's is at 0
  int64_t q_head_stride, kv_head_stride;
  int64_t window;                 // 0: all slots
  const float* inv_freq;          // [rotary_dim / 2]; null without rotation
  float rope_scale, scaling;      // scaling multiplies q k
  float softcap;                  // 0: none
  void *key_cache, *value_cache;  // [batch, num_kv_heads, capacity, head_dim], strides:
  int64_t key_batch_stride, key_head_stride, value_batch_stride, value_head_stride;
  const int64_t *length, *start;  // [1], [batch], on the device
  void* out;                      // [batch, num_heads, head_dim], the dtype
};
void decode_attention(const DecodeAttention& p, void* stream);

// Attention sinks, for all layers: the keys and values of a sequence's first tokens into the slots
// directly before the window of the last `window` slots up to `length`. The keys are those of
// positions 0 to sinks - 1; they are rotated, in fp32, by shift * inv_freq, where shift is how many
// tokens lie between: length + 1 - window - start[b] - sinks. Nothing is written while it is not
// positive.
struct DecodeSinks {
  DType dtype;
  int64_t num_layers, batch, num_kv_heads, capacity, head_dim, sinks, rotary_dim, window;
  const void *sink_keys, *sink_values;  // [num_layers, batch, num_kv_heads, sinks, head_dim]
  const float* inv_freq;                // [num_layers, rotary_dim / 2]
  void *keys, *values;                  // [num_layers, batch, num_kv_heads, capacity, head_dim]
  const int64_t *length, *start;        // [1], [batch], on the device
};
void decode_sinks(const DecodeSinks& p, void* stream);

// The layers of a step for one sequence as one kernel, where the model and the GPU suit it:
// pre-norm LayerNorms, learned positions, as many key heads as query heads, an MLP of one
// activation, biases.
//   residual = table[token] + positions[length - start], then for each layer
//   residual += attention_out(attention(qkv(norm(residual))))
//   residual += mlp_out(act(mlp_in(norm(residual))))
// with decode_linear's weights and decode_attention's caches. What is added to the residual stream
// is summed in fixed point, the same whatever the order: 2^-32, up to 2^17 for a block's part. A
// part above that, or a NaN, makes the residual NaN.
struct DecodeLayers {
  struct Layer {
    const void *attention_norm_weight, *attention_norm_bias, *qkv, *qkv_bias;
    const void *attention_out, *attention_out_bias;
    const void *mlp_norm_weight, *mlp_norm_bias, *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;
    void *keys, *values;  // [num_heads, capacity, head_dim]
  };
  DType dtype;
  int64_t num_layers, size, num_heads, middle, vocab, num_positions, capacity;
  const Layer* layers;  // [num_layers], on the device
  float eps, scaling;
  Act act;
  const int64_t* token;           // [1]
  const void *table, *positions;  // [vocab, size], [num_positions, size]
  const int64_t *length, *start;
  float* residual;  // [size]
  void* workspace;  // decode_layers_workspace_size(size) bytes, zero at first
};
int64_t decode_layers_workspace_size(int64_t size);
bool decode_layers_suits(const DecodeLayers& p);  // by dtype, sizes and the current GPU
void decode_layers(const DecodeLayers& p, void* stream);

// residual[b] += delta[b], or its RMSNorm; out[b] = the RMSNorm of residual[b], or residual[b]
// itself, rounded to the dtype. Nothing else is rounded. A norm: x * rsqrt(mean(x^2) + eps) *
// (offset + weight).
struct DecodeAddNorm {
  DType dtype;
  int64_t batch, size;
  const float* delta;                 // [batch, size], or null: nothing is added
  const void *delta_weight, *weight;  // [size], the dtype; null without that norm
  float eps, offset;
  float* residual;  // [batch, size]
  void* out;        // [batch, size], the dtype
};
constexpr int64_t kMaxNormSize = 16384;  // of the rows of this norm and the next
void decode_add_norm(const DecodeAddNorm& p, void* stream);

// RMSNorms in place, as above, of each row of q_size elements among the first q_width of qkv[b],
// and of each row of k_size among the k_width that follow.
struct DecodeHeadNorm {
  DType dtype;
  int64_t batch, stride, q_width, k_width, q_size, k_size;
  const void *q_weight, *k_weight;  // [q_size], [k_size]
  float eps, offset;
  float* qkv;  // [batch, stride]
};
void decode_head_norm(const DecodeHeadNorm& p, void* stream);

// residual[b] = scale * table[token[b]] (+ positions[length - start[b]]), in fp32.
struct DecodeEmbed {
  DType dtype;
  int64_t batch, size, vocab, num_positions;
  const int64_t* token;           // [batch]
  const void *table, *positions;  // [vocab, size]; [num_positions, size] or null
  const int64_t *length, *start;
  float scale;
  float* residual;  // [batch, size]
};
void decode_embed(const DecodeEmbed& p, void* stream);

// token[b] = the first index of the largest logits[b]; pad for a sequence that had finished. It is
// also written to history[step, b], finished[b] is set if it is one of eos, and length and step
// advance by one. A NaN counts as the largest, as in torch.argmax. While step < min_step, the
// logits of eos count as -inf.
struct DecodeSelect {
  int64_t batch, vocab, num_eos, max_steps;
  const float* logits;  // [batch, vocab]
  const int64_t* eos;   // [num_eos]
  int64_t pad, min_step;
  int64_t *token, *finished;  // [batch]
  int64_t* history;           // [max_steps, batch], on the device or pinned on the host
  int64_t *length, *step;     // [1]
  void* workspace;            // decode_select_workspace_size() bytes, zero at first
};
int64_t decode_select_workspace_size(int64_t batch);
void decode_select(const DecodeSelect& p, void* stream);

// The same from the scores that filters make of the logits, by transformers' rules and in its
// order: the penalty for tokens in `seen` (score * penalty below 0, score / penalty above), the
// least length, then score / temperature, then the top_k largest (equal ones too), of those the
// largest that reach the part top_p of the probability, of those the ones of at least min_p times
// the largest one's. Then the first of the largest exp(score) / noise; without noise, of the
// largest scores. -1 where the scores are not a distribution: NaN, or the largest is infinite. On
// CUDA only.
struct DecodeSample {
  DecodeSelect select;
  const float* noise;     // [batch, vocab], exponentially distributed, or null
  uint8_t* seen;          // [batch, vocab], or null; the token becomes seen
  const double* filters;  // penalty, temperature, top_k or 0, top_p, min_p; on the device
};
void decode_sample(const DecodeSample& p, void* stream);

}  // namespace hf_fuse
