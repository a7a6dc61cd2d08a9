// decode_layers in bfloat16.
#include "../include/decode_layers.cuh"

template struct hf_fuse::DecodeLayersOf<__nv_bfloat16>;
