// decode_attention with softly capped scores (Gemma 2): the kernel of single products.
#include "../include/decode_attention_kernel.cuh"

namespace hf_fuse {

template <typename T>
void decode_attention_capped(const DecodeAttention& p, void* stream) {
  launch_lanes<T, true>(p, stream);
}

template void decode_attention_capped<float>(const DecodeAttention&, void*);
template void decode_attention_capped<__half>(const DecodeAttention&, void*);
template void decode_attention_capped<__nv_bfloat16>(const DecodeAttention&, void*);

}  // namespace hf_fuse
