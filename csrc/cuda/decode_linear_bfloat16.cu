#include "../include/decode_linear.cuh"

template struct hf_fuse::DecodeLinearOf<__nv_bfloat16>;
