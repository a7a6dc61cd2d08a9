// decode_layers in float16.
#include "../include/decode_layers.cuh"

template struct hf_fuse::DecodeLayersOf<__half>;
