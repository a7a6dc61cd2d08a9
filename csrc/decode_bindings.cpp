// The ops of a decoding step as torch sees them; they write into tensors that the caller keeps.
// Compiled twice, as bindings.cpp is. What an op computes is said in hf_fuse/ops/decode_<op>.py.
#include "checks.h"
#include "decode.h"
#include "recording.h"

namespace hf_fuse {
namespace bindings {

void check_float32(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float)
    fail(op, ": ", name, " must be float32, got ", name_of(t.scalar_type()));
}

void check_int64(const char* op, const char* name, const Tensor& t, int64_t numel) {
  if (t.scalar_type() != ScalarType::Long || t.numel() != numel || !t.is_contiguous())
    fail(op, ": ", name, " must be ", numel, " int64 in a row, got ", name_of(t.scalar_type()), " ",
         shape_of(t));
}

void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t size) {
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != size || !t.is_contiguous())
    fail(op, ": ", name, " must be a contiguous [", rows, ", ", size, "], got ", shape_of(t));
}

int64_t* int64_of(const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); }

// Scratch for p, from torch's allocator: it belongs to the stream, or to the graph that is
// captured.
Tensor with_workspace(DecodeLinear* p, const Tensor& like) {
  const int64_t bytes = decode_linear_workspace_size(*p);
  if (bytes == 0) return nothing();
  Tensor workspace = empty(like, {bytes}, ScalarType::Byte);
  p->workspace = workspace.data_ptr();
  return workspace;
}

// On the device of `like`; on a CPU it is recorded instead, if this thread records.
template <typename Op, typename... P>
void run(Op* op, [[maybe_unused]] const Tensor& like, const P&... p) {
#ifdef HF_FUSE_CUDA
  DeviceGuard guard(like);
  op(p..., stream_of(like));
#else
  if (is_recording()) return record([=] { op(p..., nullptr); });
  op(p..., nullptr);
#endif
}

DecodeLinear checked_linear(const Tensor& out, const Tensor& x, const OptionalTensor& norm_weight,
                            const OptionalTensor& norm_bias, double eps, bool rms,
                            const Tensor& weight1, const OptionalTensor& weight2,
                            const OptionalTensor& weight3, const OptionalTensor& bias1,
                            const OptionalTensor& bias2, const OptionalTensor& bias3,
                            int64_t epilogue, int64_t act) {
  const char* op = "decode_linear";
  DecodeLinear p{};
  p.dtype = dtype_of(op, "weight1", weight1);
  if (x.dim() != 2) fail(op, ": x must be [batch, size], got ", shape_of(x));
  p.batch = x.size(0), p.size = x.size(1);
  check_matrix(op, "x", x, p.batch, p.size);
  if (epilogue < 0 || epilogue > static_cast<int64_t>(Epilogue::kAdd))
    fail(op, ": epilogue must be 0 to 3, got ", epilogue);
  p.epilogue = static_cast<Epilogue>(epilogue);
  p.act = act_of(op, act);
  if (norm_weight) {
    check_float32(op, "x under a norm", x);
    check_device(op, "x", x, "weight1", weight1);
    check_like(op, "norm_weight", *norm_weight, "weight1", weight1);
    if (norm_weight->dim() != 1 || norm_weight->size(0) != p.size || !norm_weight->is_contiguous())
      fail(op, ": norm_weight must be [", p.size, "], got ", shape_of(*norm_weight));
    if (norm_bias && rms) fail(op, ": norm_bias needs a LayerNorm, RMSNorm has no bias");
    if (norm_bias) check_same_shape(op, "norm_bias", *norm_bias, "norm_weight", *norm_weight);
    if (norm_bias && !norm_bias->is_contiguous()) fail(op, ": norm_bias must be contiguous");
    p.norm_weight = norm_weight->data_ptr(), p.norm_bias = data_or_null(norm_bias);
  } else {
    check_like(op, "x", x, "weight1", weight1);
    if (norm_bias) fail(op, ": norm_bias needs norm_weight");
  }
  p.eps = eps, p.rms = rms;

  int64_t rows = 0;
  const auto add = [&](const char* name, const Tensor& weight, const char* bias_name,
                       const OptionalTensor& bias) {
    check_like(op, name, weight, "weight1", weight1);
    if (weight.dim() != 2 || weight.size(1) != p.size || (p.size > 1 && weight.stride(1) != 1))
      fail(op, ": ", name, " must be [rows, ", p.size, "] with contiguous rows, got ",
           shape_of(weight));
    if (bias) {
      check_like(op, bias_name, *bias, "weight1", weight1);
      if (bias->dim() != 1 || bias->size(0) != weight.size(0) || !bias->is_contiguous())
        fail(op, ": ", bias_name, " must be [", weight.size(0), "], got ", shape_of(*bias));
    }
    p.weights[p.num_weights++] = {weight.data_ptr(), data_or_null(bias), weight.size(0),
                                  weight.stride(0)};
    rows += weight.size(0);
  };
  add("weight1", weight1, "bias1", bias1);
  if (weight2) add("weight2", *weight2, "bias2", bias2);
  if (weight3) add("weight3", *weight3, "bias3", bias3);
  if (weight3 && !weight2) fail(op, ": weight3 needs weight2");
  if (p.epilogue == Epilogue::kGated) {
    if (p.num_weights != 2 || p.weights[0].rows != p.weights[1].rows)
      fail(op, ": a gated epilogue needs two weights of as many rows");
    rows = p.weights[0].rows;
  }
  check_matrix(op, "out", out, p.batch, rows);
  check_device(op, "out", out, "weight1", weight1);
  if (p.epilogue == Epilogue::kStore || p.epilogue == Epilogue::kAdd)
    check_float32(op, "out", out);
  else
    check_like(op, "out", out, "weight1", weight1);
  p.x = x.data_ptr(), p.out = out.data_ptr();
  return p;
}

void decode_linear(Tensor out, Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias,
                   double eps, bool rms, Tensor weight1, OptionalTensor weight2,
                   OptionalTensor weight3, OptionalTensor bias1, OptionalTensor bias2,
                   OptionalTensor bias3, int64_t epilogue, int64_t act) {
  DecodeLinear p = checked_linear(out, x, norm_weight, norm_bias, eps, rms, weight1, weight2,
                                  weight3, bias1, bias2, bias3, epilogue, act);
  if (out.numel() == 0) return;
  const Tensor workspace = with_workspace(&p, x);
  run(hf_fuse::decode_linear, x, p);
}

void decode_linear_two(Tensor out1, Tensor out2, Tensor x, Tensor norm_weight1,
                       OptionalTensor norm_bias1, Tensor norm_weight2, OptionalTensor norm_bias2,
                       double eps, bool rms, Tensor weight1, OptionalTensor bias1, Tensor weight2,
                       OptionalTensor bias2, int64_t act) {
  const OptionalTensor none;
  const auto checked = [&](const Tensor& out, const OptionalTensor& norm_weight,
                           const OptionalTensor& norm_bias, const Tensor& weight,
                           const OptionalTensor& bias, Epilogue epilogue) {
    return checked_linear(out, x, norm_weight, norm_bias, eps, rms, weight, none, none, bias, none,
                          none, static_cast<int64_t>(epilogue), act);
  };
  DecodeLinear a = checked(out1, norm_weight1, norm_bias1, weight1, bias1, Epilogue::kStore);
  DecodeLinear b = checked(out2, norm_weight2, norm_bias2, weight2, bias2, Epilogue::kAct);
  check_like("decode_linear", "weight2", weight2, "weight1", weight1);
  if (out1.numel() == 0 || out2.numel() == 0)
    fail("decode_linear: two projections need rows, got ", shape_of(out1), " and ", shape_of(out2));
  const Tensor workspace = with_workspace(&a, x);  // one for both: one runs after the other
  b.workspace = a.workspace;
  run(hf_fuse::decode_linear_two, x, a, b);
}

void decode_linear_sum(Tensor out, Tensor x1, Tensor x2, Tensor weight1, OptionalTensor bias1,
                       Tensor weight2, OptionalTensor bias2) {
  const OptionalTensor none;
  const auto checked = [&](const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return checked_linear(out, x, none, none, 0., true, weight, none, none, bias, none, none,
                          static_cast<int64_t>(Epilogue::kAdd), 0);
  };
  const DecodeLinear a = checked(x1, weight1, bias1), b = checked(x2, weight2, bias2);
  check_like("decode_linear", "weight2", weight2, "weight1", weight1);
  if (out.numel() == 0) return;
  run(hf_fuse::decode_linear_sum, out, a, b);
}

void decode_attention(Tensor out, Tensor qkv, Tensor key_cache, Tensor value_cache, Tensor length,
                      Tensor start, OptionalTensor inv_freq, double rope_scale, bool interleaved,
                      double scaling, int64_t window, double softcap) {
  const char* op = "decode_attention";
  DecodeAttention p{};
  p.dtype = dtype_of(op, "key_cache", key_cache);
  if (out.dim() != 3 || !out.is_contiguous())
    fail(op, ": out must be a contiguous [batch, heads, head_dim], got ", shape_of(out));
  p.batch = out.size(0), p.num_heads = out.size(1), p.head_dim = out.size(2);
  check_like(op, "out", out, "key_cache", key_cache);
  check_same_shape(op, "value_cache", value_cache, "key_cache", key_cache);
  if (key_cache.dim() != 4 || key_cache.size(0) != p.batch || key_cache.size(3) != p.head_dim)
    fail(op, ": key_cache must be [", p.batch, ", kv_heads, capacity, ", p.head_dim, "], got ",
         shape_of(key_cache));
  p.num_kv_heads = key_cache.size(1), p.capacity = key_cache.size(2);
  if (p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads)
    fail(op, ": the heads of out, ", p.num_heads, ", must be a multiple of the cache's, ",
         p.num_kv_heads);
  for (const Tensor* cache : {&key_cache, &value_cache})
    if (cache->stride(3) != 1 || cache->stride(2) != p.head_dim)
      fail(op, ": the last two dimensions of the caches must be contiguous");
  const int64_t width = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim;
  check_matrix(op, "qkv", qkv, p.batch, width);
  check_float32(op, "qkv", qkv);
  check_int64(op, "length", length, 1);
  check_int64(op, "start", start, p.batch);
  const Tensor* present[] = {&qkv, &length, &start, inv_freq ? &*inv_freq : &qkv};
  for (const Tensor* t : present)
    check_device(op, "qkv, length, start and inv_freq", *t, "key_cache", key_cache);
  if (interleaved && p.num_heads != p.num_kv_heads)
    fail(op, ": interleaved q, k and v need as many key heads as query heads");
  p.qkv = static_cast<const float*>(qkv.data_ptr()), p.qkv_stride = width;
  p.k_offset = interleaved ? p.head_dim : p.num_heads * p.head_dim;
  p.v_offset = interleaved ? 2 * p.head_dim : (p.num_heads + p.num_kv_heads) * p.head_dim;
  p.q_head_stride = p.kv_head_stride = interleaved ? 3 * p.head_dim : p.head_dim;
  if (inv_freq) {
    check_float32(op, "inv_freq", *inv_freq);
    if (inv_freq->dim() != 1 || !inv_freq->is_contiguous() || 2 * inv_freq->size(0) > p.head_dim)
      fail(op, ": inv_freq must be [up to ", p.head_dim / 2, "], got ", shape_of(*inv_freq));
    p.inv_freq = static_cast<const float*>(inv_freq->data_ptr());
    p.rotary_dim = 2 * inv_freq->size(0);
  }
  p.rope_scale = static_cast<float>(rope_scale), p.scaling = static_cast<float>(scaling);
  if (window < 0 || softcap < 0)
    fail(op, ": window and softcap must not be negative, got ", window, " and ", softcap);
  p.window = window, p.softcap = static_cast<float>(softcap);
  p.key_cache = key_cache.data_ptr(), p.value_cache = value_cache.data_ptr();
  p.key_batch_stride = key_cache.stride(0), p.key_head_stride = key_cache.stride(1);
  p.value_batch_stride = value_cache.stride(0), p.value_head_stride = value_cache.stride(1);
  p.length = int64_of(length), p.start = int64_of(start);
  p.out = out.data_ptr();
  if (p.batch == 0) return;
  run(hf_fuse::decode_attention, qkv, p);
}

void decode_sinks(Tensor keys, Tensor values, Tensor sink_keys, Tensor sink_values, Tensor length,
                  Tensor start, Tensor inv_freq, int64_t window) {
  const char* op = "decode_sinks";
  DecodeSinks p{};
  p.dtype = dtype_of(op, "keys", keys);
  if (keys.dim() != 5 || !keys.is_contiguous())
    fail(op, ": keys must be a contiguous [layers, batch, kv_heads, capacity, head_dim], got ",
         shape_of(keys));
  p.num_layers = keys.size(0), p.batch = keys.size(1), p.num_kv_heads = keys.size(2);
  p.capacity = keys.size(3), p.head_dim = keys.size(4);
  check_same_shape(op, "values", values, "keys", keys);
  check_like(op, "sink_keys", sink_keys, "keys", keys);
  if (sink_keys.dim() != 5 || sink_keys.size(0) != p.num_layers || sink_keys.size(1) != p.batch ||
      sink_keys.size(2) != p.num_kv_heads || sink_keys.size(4) != p.head_dim)
    fail(op, ": sink_keys must be [", p.num_layers, ", ", p.batch, ", ", p.num_kv_heads,
         ", sinks, ", p.head_dim, "], got ", shape_of(sink_keys));
  p.sinks = sink_keys.size(3);
  check_same_shape(op, "sink_values", sink_values, "sink_keys", sink_keys);
  if (!values.is_contiguous() || !sink_keys.is_contiguous() || !sink_values.is_contiguous())
    fail(op, ": values, sink_keys and sink_values must be contiguous");
  check_int64(op, "length", length, 1);
  check_int64(op, "start", start, p.batch);
  check_float32(op, "inv_freq", inv_freq);
  if (inv_freq.dim() != 2 || 2 * inv_freq.size(1) > p.head_dim)
    fail(op, ": inv_freq must be [", p.num_layers, ", up to ", p.head_dim / 2, "], got ",
         shape_of(inv_freq));
  check_matrix(op, "inv_freq", inv_freq, p.num_layers, inv_freq.size(1));
  for (const Tensor* t : {&length, &start, &inv_freq})
    check_device(op, "length, start and inv_freq", *t, "keys", keys);
  if (window < 1) fail(op, ": window must be at least 1, got ", window);
  p.rotary_dim = 2 * inv_freq.size(1), p.window = window;
  p.sink_keys = sink_keys.data_ptr(), p.sink_values = sink_values.data_ptr();
  p.inv_freq = static_cast<const float*>(inv_freq.data_ptr());
  p.keys = keys.data_ptr(), p.values = values.data_ptr();
  p.length = int64_of(length), p.start = int64_of(start);
  if (sink_keys.numel() == 0) return;
  run(hf_fuse::decode_sinks, keys, p);
}

// A norm's weight, [size] and like `like`; null without one.
const void* norm_weight_of(const char* op, const char* name, const OptionalTensor& weight,
                           int64_t size, const Tensor& like, const char* like_name = "out") {
  if (!weight) return nullptr;
  check_like(op, name, *weight, like_name, like);
  if (weight->dim() != 1 || weight->size(0) != size || !weight->is_contiguous())
    fail(op, ": ", name, " must be [", size, "], got ", shape_of(*weight));
  return weight->data_ptr();
}

void decode_add_norm(Tensor out, Tensor residual, OptionalTensor delta, OptionalTensor delta_weight,
                     OptionalTensor weight, double eps, double offset) {
  const char* op = "decode_add_norm";
  DecodeAddNorm p{};
  p.dtype = dtype_of(op, "out", out);
  if (out.dim() != 2) fail(op, ": out must be [batch, size], got ", shape_of(out));
  p.batch = out.size(0), p.size = out.size(1);
  if (p.size > kMaxNormSize) fail(op, ": size must be at most ", kMaxNormSize, ", got ", p.size);
  check_matrix(op, "out", out, p.batch, p.size);
  check_matrix(op, "residual", residual, p.batch, p.size);
  check_float32(op, "residual", residual);
  check_device(op, "residual", residual, "out", out);
  if (delta) {
    check_matrix(op, "delta", *delta, p.batch, p.size);
    check_float32(op, "delta", *delta);
    check_device(op, "delta", *delta, "out", out);
    p.delta = static_cast<const float*>(delta->data_ptr());
  } else if (delta_weight) {
    fail(op, ": delta_weight needs delta");
  }
  p.delta_weight = norm_weight_of(op, "delta_weight", delta_weight, p.size, out);
  p.weight = norm_weight_of(op, "weight", weight, p.size, out);
  p.eps = static_cast<float>(eps), p.offset = static_cast<float>(offset);
  p.residual = static_cast<float*>(residual.data_ptr()), p.out = out.data_ptr();
  if (out.numel() == 0) return;
  run(hf_fuse::decode_add_norm, out, p);
}

void decode_head_norm(Tensor qkv, Tensor q_weight, Tensor k_weight, int64_t q_width,
                      int64_t k_width, double eps, double offset) {
  const char* op = "decode_head_norm";
  DecodeHeadNorm p{};
  p.dtype = dtype_of(op, "q_weight", q_weight);
  if (qkv.dim() != 2) fail(op, ": qkv must be [batch, width], got ", shape_of(qkv));
  p.batch = qkv.size(0), p.stride = qkv.size(1);
  check_matrix(op, "qkv", qkv, p.batch, p.stride);
  check_float32(op, "qkv", qkv);
  check_device(op, "qkv", qkv, "q_weight", q_weight);
  p.q_width = q_width, p.k_width = k_width;
  p.q_size = q_weight.numel(), p.k_size = k_weight.numel();
  if (q_width < 0 || k_width < 0 || q_width + k_width > p.stride)
    fail(op, ": q_width and k_width must be within the ", p.stride, " of qkv, got ", q_width,
         " and ", k_width);
  for (const auto& [name, size, width] :
       {std::tuple("q_weight", p.q_size, q_width), std::tuple("k_weight", p.k_size, k_width)})
    if (size < 1 || size > kMaxNormSize || width % size)
      fail(op, ": the size of ", name, " must divide its ", width, " and be at most ", kMaxNormSize,
           ", got ", size);
  p.q_weight = norm_weight_of(op, "q_weight", q_weight, p.q_size, q_weight, "q_weight");
  p.k_weight = norm_weight_of(op, "k_weight", k_weight, p.k_size, q_weight, "q_weight");
  p.eps = static_cast<float>(eps), p.offset = static_cast<float>(offset);
  p.qkv = static_cast<float*>(qkv.data_ptr());
  if (qkv.numel() == 0 || q_width + k_width == 0) return;
  run(hf_fuse::decode_head_norm, qkv, p);
}

void decode_embed(Tensor residual, Tensor token, Tensor table, OptionalTensor positions,
                  Tensor length, Tensor start, double scale) {
  const char* op = "decode_embed";
  DecodeEmbed p{};
  p.dtype = dtype_of(op, "table", table);
  if (table.dim() != 2) fail(op, ": table must be [vocab, size], got ", shape_of(table));
  p.batch = token.numel(), p.vocab = table.size(0), p.size = table.size(1);
  check_matrix(op, "table", table, p.vocab, p.size);
  check_matrix(op, "residual", residual, p.batch, p.size);
  check_float32(op, "residual", residual);
  check_int64(op, "token", token, p.batch);
  check_int64(op, "length", length, 1);
  check_int64(op, "start", start, p.batch);
  if (positions) {
    check_like(op, "positions", *positions, "table", table);
    p.num_positions = positions->size(0);
    check_matrix(op, "positions", *positions, p.num_positions, p.size);
    p.positions = positions->data_ptr();
  }
  const Tensor* present[] = {&residual, &token, &length, &start};
  for (const Tensor* t : present)
    check_device(op, "residual, token, length and start", *t, "table", table);
  p.token = int64_of(token), p.length = int64_of(length), p.start = int64_of(start);
  p.scale = static_cast<float>(scale);
  p.table = table.data_ptr(), p.residual = static_cast<float*>(residual.data_ptr());
  if (p.batch == 0) return;
  run(hf_fuse::decode_embed, table, p);
}

DecodeSelect checked_select(const char* op, const Tensor& token, const Tensor& finished,
                            const Tensor& history, const Tensor& length, const Tensor& step,
                            const Tensor& workspace, const Tensor& logits, const Tensor& eos,
                            int64_t pad, int64_t min_step) {
  DecodeSelect p{};
  if (logits.dim() != 2 || logits.size(1) < 1)
    fail(op, ": logits must be [batch, vocab], got ", shape_of(logits));
  p.batch = logits.size(0), p.vocab = logits.size(1), p.num_eos = eos.numel(), p.pad = pad;
  p.min_step = min_step;
  check_matrix(op, "logits", logits, p.batch, p.vocab);
  check_float32(op, "logits", logits);
  check_int64(op, "token", token, p.batch);
  check_int64(op, "finished", finished, p.batch);
  check_int64(op, "eos", eos, p.num_eos);
  check_int64(op, "length", length, 1);
  check_int64(op, "step", step, 1);
  if (history.dim() != 2 || history.size(1) != p.batch)
    fail(op, ": history must be [steps, ", p.batch, "], got ", shape_of(history));
  check_int64(op, "history", history, history.size(0) * p.batch);
  if (workspace.numel() < (decode_select_workspace_size(p.batch) + 7) / 8)
    fail(op, ": workspace is too small, got ", workspace.numel(), " int64");
  check_int64(op, "workspace", workspace, workspace.numel());
  const Tensor* present[] = {&token, &finished, &length, &step, &workspace, &eos};
  for (const Tensor* t : present)
    check_device(op, "token, finished, length, step, workspace and eos", *t, "logits", logits);
  p.max_steps = history.size(0);
  p.logits = static_cast<const float*>(logits.data_ptr()), p.eos = int64_of(eos);
  p.token = int64_of(token), p.finished = int64_of(finished), p.history = int64_of(history);
  p.length = int64_of(length), p.step = int64_of(step), p.workspace = workspace.data_ptr();
  return p;
}

void decode_select(Tensor token, Tensor finished, Tensor history, Tensor length, Tensor step,
                   Tensor workspace, Tensor logits, Tensor eos, int64_t pad, int64_t min_step) {
  const DecodeSelect p = checked_select("decode_select", token, finished, history, length, step,
                                        workspace, logits, eos, pad, min_step);
  if (p.batch == 0) return;
  run(hf_fuse::decode_select, logits, p);
}

#ifdef HF_FUSE_CUDA
void decode_sample(Tensor token, Tensor finished, Tensor history, Tensor length, Tensor step,
                   Tensor workspace, OptionalTensor seen, Tensor logits, OptionalTensor noise,
                   Tensor filters, Tensor eos, int64_t pad, int64_t min_step) {
  const char* op = "decode_sample";
  DecodeSample p{};
  p.select = checked_select(op, token, finished, history, length, step, workspace, logits, eos, pad,
                            min_step);
  if (noise) {
    check_same_shape(op, "noise", *noise, "logits", logits);
    check_matrix(op, "noise", *noise, p.select.batch, p.select.vocab);
    p.noise = static_cast<const float*>(noise->data_ptr());
  }
  if (seen) {
    if (seen->scalar_type() != ScalarType::Byte)
      fail(op, ": seen must be uint8, got ", name_of(seen->scalar_type()));
    check_matrix(op, "seen", *seen, p.select.batch, p.select.vocab);
    check_device(op, "seen", *seen, "logits", logits);
    p.seen = static_cast<uint8_t*>(seen->data_ptr());
  }
  if (filters.scalar_type() != ScalarType::Double || filters.numel() != 5 ||
      !filters.is_contiguous())
    fail(op, ": filters must be 5 float64 in a row, got ", name_of(filters.scalar_type()), " ",
         shape_of(filters));
  check_device(op, "filters", filters, "logits", logits);
  p.filters = static_cast<const double*>(filters.data_ptr());
  if (p.select.batch == 0) return;
  run(hf_fuse::decode_sample, logits, p);
}

DecodeLayers layers_of(const Tensor& table, int64_t num_layers, int64_t num_heads, int64_t middle) {
  const char* op = "decode_layers";
  DecodeLayers p{};
  p.dtype = dtype_of(op, "table", table);
  if (table.dim() != 2) fail(op, ": table must be [vocab, size], got ", shape_of(table));
  p.num_layers = num_layers, p.num_heads = num_heads, p.middle = middle;
  p.vocab = table.size(0), p.size = table.size(1);
  return p;
}

bool decode_layers_suits(Tensor table, int64_t num_layers, int64_t num_heads, int64_t middle) {
  DeviceGuard guard(table);
  return hf_fuse::decode_layers_suits(layers_of(table, num_layers, num_heads, middle));
}

void decode_layers(Tensor residual, Tensor workspace, Tensor layers, Tensor token, Tensor table,
                   Tensor positions, Tensor length, Tensor start, int64_t num_heads, int64_t middle,
                   int64_t capacity, double eps, double scaling, int64_t act) {
  const char* op = "decode_layers";
  constexpr int64_t kPointers = sizeof(DecodeLayers::Layer) / sizeof(void*);
  const int64_t num_layers = layers.numel() / kPointers;
  DecodeLayers p = layers_of(table, num_layers, num_heads, middle);
  check_matrix(op, "table", table, p.vocab, p.size);
  check_like(op, "positions", positions, "table", table);
  p.num_positions = positions.size(0);
  check_matrix(op, "positions", positions, p.num_positions, p.size);
  check_matrix(op, "residual", residual, 1, p.size);
  check_float32(op, "residual", residual);
  check_int64(op, "layers", layers, num_layers * kPointers);
  check_int64(op, "workspace", workspace, decode_layers_workspace_size(p.size) / 8);
  check_int64(op, "token", token, 1);
  check_int64(op, "length", length, 1);
  check_int64(op, "start", start, 1);
  const Tensor* present[] = {&residual, &workspace, &layers, &token, &length, &start};
  for (const Tensor* t : present)
    check_device(op, "residual, workspace, layers, token, length and start", *t, "table", table);
  p.layers = static_cast<const DecodeLayers::Layer*>(layers.data_ptr());
  p.capacity = capacity, p.eps = static_cast<float>(eps), p.act = act_of(op, act);
  p.scaling = static_cast<float>(scaling);
  p.table = table.data_ptr(), p.positions = positions.data_ptr();
  p.token = int64_of(token), p.length = int64_of(length), p.start = int64_of(start);
  p.residual = static_cast<float*>(residual.data_ptr()), p.workspace = workspace.data_ptr();
  run(hf_fuse::decode_layers, table, p);
}
#endif

}  // namespace bindings
}  // namespace hf_fuse

#ifndef HF_FUSE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(hf_fuse, m) {
  // out = epilogue(weights @ norm(x) + biases)
  m.def(
      "decode_linear(Tensor(a!) out, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "bool rms, Tensor weight1, Tensor? weight2, Tensor? weight3, Tensor? bias1, Tensor? bias2, "
      "Tensor? bias3, int epilogue, int act) -> ()");
  // out1 = weight1 @ norm1(x) + bias1, out2 = act(weight2 @ norm2(x) + bias2)
  m.def(
      "decode_linear_two(Tensor(a!) out1, Tensor(b!) out2, Tensor x, Tensor norm_weight1, Tensor? "
      "norm_bias1, Tensor norm_weight2, Tensor? norm_bias2, float eps, bool rms, Tensor weight1, "
      "Tensor? bias1, Tensor weight2, Tensor? bias2, int act) -> ()");
  // out += weight1 @ x1 + bias1 + weight2 @ x2 + bias2
  m.def(
      "decode_linear_sum(Tensor(a!) out, Tensor x1, Tensor x2, Tensor weight1, Tensor? bias1, "
      "Tensor weight2, Tensor? bias2) -> ()");
  // q, k, v into out, k and v into the caches at length
  m.def(
      "decode_attention(Tensor(a!) out, Tensor qkv, Tensor(b!) key_cache, Tensor(c!) value_cache, "
      "Tensor length, Tensor start, Tensor? inv_freq, float rope_scale, bool interleaved, float "
      "scaling, int window=0, float softcap=0) -> ()");
  // the first tokens' keys and values before the window of the token at length, in all layers
  m.def(
      "decode_sinks(Tensor(a!) keys, Tensor(b!) values, Tensor sink_keys, Tensor sink_values, "
      "Tensor length, Tensor start, Tensor inv_freq, int window) -> ()");
  // residual += delta or its norm; out = the norm of residual, or residual
  m.def(
      "decode_add_norm(Tensor(a!) out, Tensor(b!) residual, Tensor? delta, Tensor? delta_weight, "
      "Tensor? weight, float eps, float offset) -> ()");
  // norms of the rows of q and of k, in place
  m.def(
      "decode_head_norm(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, int q_width, int "
      "k_width, float eps, float offset) -> ()");
  // the embedding of token into residual
  m.def(
      "decode_embed(Tensor(a!) residual, Tensor token, Tensor table, Tensor? positions, Tensor "
      "length, Tensor start, float scale=1) -> ()");
  // the largest logit into token and history; length and step advance
  m.def(
      "decode_select(Tensor(a!) token, Tensor(b!) finished, Tensor(c!) history, Tensor(d!) length, "
      "Tensor(e!) step, Tensor(f!) workspace, Tensor logits, Tensor eos, int pad, int min_step=0) "
      "-> ()");
  // the same with the first of the largest exp(score) / noise among the scores that filters keep
  m.def(
      "decode_sample(Tensor(a!) token, Tensor(b!) finished, Tensor(c!) history, Tensor(d!) length, "
      "Tensor(e!) step, Tensor(f!) workspace, Tensor(g!)? seen, Tensor logits, Tensor? noise, "
      "Tensor filters, Tensor eos, int pad, int min_step=0) -> ()");
  // the embedding and all layers for one sequence; layers: addresses, as DecodeLayers::Layer
  m.def(
      "decode_layers(Tensor(a!) residual, Tensor(b!) workspace, Tensor layers, Tensor token, "
      "Tensor table, Tensor positions, Tensor length, Tensor start, int num_heads, int middle, int "
      "capacity, float eps, float scaling, int act) -> ()");
  m.def("decode_layers_suits(Tensor table, int num_layers, int num_heads, int middle) -> bool");
}
#define HF_FUSE_KEY CPU
#else
#define HF_FUSE_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(hf_fuse, HF_FUSE_KEY, m) {
  m.impl("decode_linear", TORCH_BOX(&hf_fuse::bindings::decode_linear));
  m.impl("decode_linear_two", TORCH_BOX(&hf_fuse::bindings::decode_linear_two));
  m.impl("decode_linear_sum", TORCH_BOX(&hf_fuse::bindings::decode_linear_sum));
  m.impl("decode_attention", TORCH_BOX(&hf_fuse::bindings::decode_attention));
  m.impl("decode_sinks", TORCH_BOX(&hf_fuse::bindings::decode_sinks));
  m.impl("decode_add_norm", TORCH_BOX(&hf_fuse::bindings::decode_add_norm));
  m.impl("decode_head_norm", TORCH_BOX(&hf_fuse::bindings::decode_head_norm));
  m.impl("decode_embed", TORCH_BOX(&hf_fuse::bindings::decode_embed));
  m.impl("decode_select", TORCH_BOX(&hf_fuse::bindings::decode_select));
#ifdef HF_FUSE_CUDA
  m.impl("decode_sample", TORCH_BOX(&hf_fuse::bindings::decode_sample));
  m.impl("decode_layers", TORCH_BOX(&hf_fuse::bindings::decode_layers));
  m.impl("decode_layers_suits", TORCH_BOX(&hf_fuse::bindings::decode_layers_suits));
#endif
}
