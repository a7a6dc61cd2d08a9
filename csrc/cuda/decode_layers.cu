// decode_layers by dtype (decode_layers.cuh).
#include "../include/decode.cuh"

namespace hf_fuse {
namespace {

bool run(const DecodeLayers& p, void* stream, bool only_ask) {
  if (p.dtype == DType::kBFloat16) {
    return DecodeLayersOf<__nv_bfloat16>::run(p, stream, only_ask);
  }
  return p.dtype == DType::kFloat16 && DecodeLayersOf<__half>::run(p, stream, only_ask);
}

}  // namespace

int64_t decode_layers_workspace_size(int64_t size) { return (kSumSets * size + 2) * 8; }

bool decode_layers_suits(const DecodeLayers& p) { return run(p, nullptr, true); }

void decode_layers(const DecodeLayers& p, void* stream) {
  if (!run(p, stream, false)) {
    throw std::runtime_error(
        "hf_fuse.decode_layers: this model, dtype or GPU does not suit it; decode_layers_suits "
        "says so beforehand");
  }
}

}  // namespace hf_fuse
