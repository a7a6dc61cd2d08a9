// One new token's attention over each sequence's cache, its rotation and its cache write
// (decode.h).
//
// Bytes: the keys and values from start to length, once for every 8 query heads that share them;
// all else is small, and with one sequence latency is half of the time. So:
// - A cluster of blocks takes a (sequence, key head). Its warps take tiles of slots in turn, a few
//   tiles in flight each. While there are few slots, its blocks are shared out among the query
//   heads: to read a slot once for each costs less than to work on all heads one after another.
// - The first tiles are on their way before the kernel waits for the projection of q, k and v.
// - The softmax is kept relative to a running maximum by each group of lanes that reads a slot,
//   then combined in a fixed order: in the warp, in the block, and over the cluster by stores to
//   the shared memory of the block that writes an output.
#include "../include/decode_attention_kernel.cuh"

namespace hf_fuse {
namespace {

void check(const DecodeAttention& p, int element_size) {
  if (p.head_dim % kElements != 0 || p.head_dim > kWarpSize * kElements) {
    throw std::runtime_error(
        "hf_fuse.decode_attention: head_dim must be a multiple of 8 up to 256, got " +
        std::to_string(p.head_dim));
  }
  if (!rows_aligned({{p.key_cache, p.key_batch_stride}, {p.value_cache, p.value_batch_stride}},
                    p.batch, element_size) ||
      !rows_aligned({{p.key_cache, p.key_head_stride}, {p.value_cache, p.value_head_stride}},
                    p.num_kv_heads, element_size) ||
      !rows_aligned({{p.qkv, p.qkv_stride}}, p.batch, sizeof(float))) {
    throw std::runtime_error(
        "hf_fuse.decode_attention: qkv and each head of the caches must start at a multiple of 16 "
        "bytes");
  }
}

}  // namespace

void decode_attention(const DecodeAttention& p, void* stream) {
  dispatch_dtype(kDecodeAttention, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.batch == 0 || p.num_heads == 0) return;
    check(p, sizeof(T));
    if (p.softcap > 0) return decode_attention_capped<T>(p, stream);
    if (!decode_attention_long<T>(p, stream)) launch_lanes<T, false>(p, stream);
  });
}

}  // namespace hf_fuse
