// decode_attention's kernel of single products with what few models have: norms of q and k (Qwen
// 3), softly capped scores (Gemma 2).
#include "../include/decode_attention_kernel.cuh"

namespace hf_fuse {

template <typename T>
void decode_attention_full(const DecodeAttention& p, void* stream) {
  launch_lanes<T, true>(p, stream);
}

template void decode_attention_full<float>(const DecodeAttention&, void*);
template void decode_attention_full<__half>(const DecodeAttention&, void*);
template void decode_attention_full<__nv_bfloat16>(const DecodeAttention&, void*);

}  // namespace hf_fuse
